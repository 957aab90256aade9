"""The prompts that an evaluation asks: rows with `prompt`, a text or messages, and if known `category`."""

import itertools
import sys
from typing import NamedTuple

from formats.chat_text import as_messages, note, note_lines, prompt_ids, prompt_text, response_end
from formats.row_files import DataError, Malformed, Unusable, parse_row, read_rows
from formats.row_prompts import CONTEXT, as_turns, check_columns, shortened, with_context


class Prompt(NamedTuple):
    text: str  # of messages: all that is said, a line each
    ids: list
    category: str
    end: int  # the token that ends a response to it


def read_prompts(source, tokenizer, args):
    """([Prompt], how many lost their beginning, lines to print) of a file of rows.  Raises DataError with file:line."""
    prompts, cut, notes, talk = [], 0, {}, None
    for where, row in itertools.islice(read_rows(source), args.num_samples or None):
        try:
            row = parse_row(row)
            prompt, category = row.get("prompt"), row.get("category")
            is_text = isinstance(prompt, str) and prompt.strip()
            if not is_text and not isinstance(prompt, list):
                raise Malformed("there is no `prompt` that is a text or a list of messages with role and content")
            if not isinstance(category, str | None):
                raise Malformed("`category` is not a str")
            prompt = prompt if is_text else as_turns(prompt, "prompt")
            text = prompt if is_text else "\n".join(message["content"] for message in prompt)
            (text + (category or "")).encode()  # half a surrogate is no text, which would show after hours of sampling
            if is_text and args.chat_template_strings:
                prompt = as_messages(prompt, "", "")[0]
            prompt, template_args = with_context(row, prompt)
            check_columns(row, {"prompt", "messages", *CONTEXT}, "prompt", prompt, [])
            prompt = shortened(prompt, -args.max_prompt_length)
            if isinstance(prompt, list) and not tokenizer.chat_template:
                raise DataError(f"{where} needs a chat template and this tokenizer has none: use an instruct model's")
            whole, ids = (
                prompt_ids(prompt, tokenizer, length, **template_args)
                for length in (sys.maxsize, args.max_prompt_length)
            )
            cut += len(ids) < len(whole)
            if isinstance(prompt, list):
                talk = prompt, template_args
                note(notes, where, prompt, [], [], [prompt_text(prompt, tokenizer, **template_args)], tokenizer)
        except (Malformed, Unusable, UnicodeEncodeError) as problem:
            raise DataError(f"{where}: {problem}; mend the row") from None
        prompts.append(Prompt(text, ids, category or "no category", response_end(prompt, tokenizer)))
    if not prompts:
        raise DataError(f'{source} has no prompts: it needs rows like {{"prompt": "...", "category": "..."}}')
    return prompts, cut, note_lines(notes, "prompts", talk[0], tokenizer, **talk[1]) if talk else []


def benign_prompts(prompts, args, rule):
    """Whether each prompt is benign; by the rule None.  Raises DataError for a category that no prompt has."""
    names = {prompt.category for prompt in prompts}
    for name in args.benign_categories or ():
        if rule:
            raise DataError("--benign-categories has no effect here, where the toy world's rule knows what is benign")
        if name not in names:
            raise DataError(f"--benign-categories {name}: no prompt has it; there are {', '.join(sorted(names))}")
    benign = args.benign_categories or [name for name in names if name.lower().startswith("benign")]
    return [None if rule else prompt.category in benign for prompt in prompts]
