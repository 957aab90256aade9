"""The prompts of a file of rows, a text or messages each -> the ids that a model goes on from, as in training."""

import itertools
import sys
from collections import Counter
from typing import Any, NamedTuple

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
    pictures: Any = None  # Pictures, with which `ids` are placeholders

    @property
    def text(self):
        return text_of(self.prompt, between="\n")


class PromptFile(NamedTuple):
    prompts: list  # Prompt
    num_cut: int  # how many lost their beginning
    left_out: Counter  # {why a row cannot be asked: how many}
    notes: list  # lines on what the chat template makes of messages
    reader: Any  # a PictureReader of a model that sees, or None


def text_of(prompt, between="\n\n"):
    """A prompt as a text: itself, or what its messages say."""
    return prompt if isinstance(prompt, str) else between.join(message["content"] for message in prompt)


def read_prompts(args, tokenizer, question_of, reader=None, leave_out=False, as_chat=False):
    """PromptFile of the first --num-samples rows of --prompts.  Raises DataError with file:line at the first mistake.

    question_of(row, where): the Question of a row (a dict), as a script reads it.  reader: models.picture_reader.
    leave_out: whether rows that are Unusable are left out and counted; otherwise they are a mistake too.
    as_chat: strings as messages, as --chat-template-strings; and as all those of a file with pictures.
    """
    as_chat = as_chat or args.chat_template_strings
    prompts, num_cut, left_out, changes, last_chat, are_chat = [], 0, Counter(), {}, None, []
    for where, row in itertools.islice(read_rows(args.prompts), args.num_samples or None):
        try:
            row, found = parse_row(row), None
            if reader:
                row, found = reader.take(row, args.prompts)
            question = question_of(row, where)
            whole, template_args = with_all_columns(question, row, args, as_chat or found)
            if found:
                whole = reader.place(whole, found)
            is_chat = isinstance(whole, list)
            are_chat.append(is_chat)
            if is_chat and not tokenizer.chat_template:
                raise DataError(f"{where} needs a chat template and this tokenizer has none: use an instruct model's")
            ids = prompt_ids(whole, tokenizer, sys.maxsize, **template_args)
            is_cut, pictures = len(ids) > args.max_prompt_length, None
            if is_cut and found:
                raise Unusable("its text is longer than --max-prompt-length, and one with pictures is not cut")
            if reader:
                text = prompt_text(whole, tokenizer, **template_args)
                ids, pictures = reader.of_prompt(ids, found, text, where)
                question = question._replace(prompt=reader.written(question.prompt))
            if is_cut:
                ids = prompt_ids(whole, tokenizer, args.max_prompt_length, **template_args)
            if is_chat and not found:
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
        end = response_end(whole, tokenizer)
        prompts.append(Prompt(where, question.prompt, question.fields, ids, end, pictures))
    if any(prompt.pictures for prompt in prompts) and not all(are_chat):
        return read_prompts(args, tokenizer, question_of, reader, leave_out, as_chat=True)
    notes = []
    if last_chat:
        messages, template_args = last_chat
        notes = note_lines(changes, "prompts", messages, tokenizer, **template_args)
    return PromptFile(prompts, num_cut, left_out, notes, reader)


def with_all_columns(question, row, args, as_chat):
    """(all that a row asks, arguments for the chat template); as_chat: a text as messages.  Raises Malformed."""
    whole = question.prompt
    if as_chat and isinstance(whole, str):
        whole = as_messages(whole, "", "")[0]
    whole, template_args = with_context(row, whole)
    check_columns(question.fields, CONTEXT, question.shape, whole, [])
    return shortened(whole, -args.max_prompt_length), template_args
