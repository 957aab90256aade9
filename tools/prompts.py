"""The prompts of a file of rows, a text or messages each -> the ids that a model goes on from, as in training."""

import itertools
import sys
from collections import Counter
from typing import NamedTuple

from formats.chat_text import as_messages, note, note_lines, prompt_ids, prompt_text, response_end
from formats.row_files import DataError, Malformed, Unusable, parse_row, read_rows
from formats.row_prompts import CONTEXT, check_columns, shortened, with_context


class Question(NamedTuple):
    """What a row asks by itself, without the columns around it (`system`, `history`, ...)."""

    prompt: str | list  # a text, or messages
    fields: dict  # the row's other columns, as far as they go along
    shape: str = "prompt"  # of the row, for a sentence about a column that nobody reads


class Prompt(NamedTuple):
    where: str  # file:line of its row
    prompt: str | list  # of its Question
    fields: dict  # of its Question
    ids: list  # all that is asked, with the columns around the prompt
    end: int  # the token that ends a response to it

    @property
    def text(self):
        return text_of(self.prompt, between="\n")


class PromptFile(NamedTuple):
    prompts: list  # Prompt
    num_cut: int  # how many lost their beginning
    left_out: Counter  # {why a row cannot be asked: how many}
    notes: list  # lines on what the chat template makes of messages


def text_of(prompt, between="\n\n"):
    """A prompt as a text: itself, or what its messages say."""
    return prompt if isinstance(prompt, str) else between.join(message["content"] for message in prompt)


def read_prompts(args, tokenizer, question_of, leave_out=False):
    """PromptFile of the first --num-samples rows of --prompts.  Raises DataError with file:line at the first mistake.

    question_of(row, where): the Question of a row (a dict), as a script reads it.
    leave_out: whether rows that are Unusable are left out and counted; otherwise they are a mistake too.
    """
    prompts, num_cut, left_out, changes, last_chat = [], 0, Counter(), {}, None
    for where, row in itertools.islice(read_rows(args.prompts), args.num_samples or None):
        try:
            row = parse_row(row)
            question = question_of(row, where)
            whole, template_args = with_all_columns(question, row, args)
            is_chat = isinstance(whole, list)
            if is_chat and not tokenizer.chat_template:
                raise DataError(f"{where} needs a chat template and this tokenizer has none: use an instruct model's")
            ids = prompt_ids(whole, tokenizer, sys.maxsize, **template_args)
            is_cut = len(ids) > args.max_prompt_length
            if is_cut:
                ids = prompt_ids(whole, tokenizer, args.max_prompt_length, **template_args)
            if is_chat:
                last_chat = whole, template_args
                note(changes, where, whole, [], [], [prompt_text(whole, tokenizer, **template_args)], tokenizer)
        except Unusable as reason:
            if not leave_out:
                raise DataError(f"{where}: {reason}; mend the row") from None
            left_out[str(reason)] += 1
            continue
        except (Malformed, UnicodeEncodeError) as problem:
            raise DataError(f"{where}: {problem}; mend the row") from None
        num_cut += is_cut
        prompts.append(Prompt(where, question.prompt, question.fields, ids, response_end(whole, tokenizer)))
    notes = []
    if last_chat:
        messages, template_args = last_chat
        notes = note_lines(changes, "prompts", messages, tokenizer, **template_args)
    return PromptFile(prompts, num_cut, left_out, notes)


def with_all_columns(question, row, args):
    """(all that a row asks, arguments for the chat template).  Raises Malformed."""
    whole = question.prompt
    if args.chat_template_strings and isinstance(whole, str):
        whole = as_messages(whole, "", "")[0]
    whole, template_args = with_context(row, whole)
    check_columns(question.fields, CONTEXT, question.shape, whole, [])
    return shortened(whole, -args.max_prompt_length), template_args
