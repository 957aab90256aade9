"""Preference rows of a known shape -> texts -> token ids.

rows   of a file or a dataset (formats/row_files.py)
texts  (prompt, chosen, rejected): strings as they stand, or messages through the chat template
       (formats/preference_rows.py)
pairs  prompt_ids, chosen_ids, rejected_ids: a response ends in exactly one end token and carries the loss
"""

import contextlib
import hashlib
import itertools
import json
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from formats.chat_text import (
    PreferenceError,
    cut_chat,
    encode_pair,
    full_texts,
    is_past_template,
    note,
    note_lines,
    render,
    response_end,
    token_ids,
)
from formats.preference_rows import harm_labels, recognise, row_texts
from formats.row_files import DataError, Malformed, Unusable, parse_row, read_rows
from formats.row_prompts import common_prefix, shortened
from formats.row_shapes import Shape


class Pair(NamedTuple):
    prompt_ids: list
    chosen_ids: list
    rejected_ids: list
    labels: tuple | None = None  # of harm, (chosen, rejected): +1 harmful, -1 safe; None where the row has none
    prompted_ids: list | None = None  # the prompt with a preference in it, where load_pairs was given one
    end: int | None = None  # the token that ends its responses, where it is not the tokenizer's end-of-sequence
    pictures: Any = None  # Pictures of its prompt (formats/picture_reader.py): ids are placeholders until it is packed
    prompted_pictures: Any = None  # the same of prompted_ids


class TextRow(NamedTuple):
    """A row before it is tokenised."""

    where: str  # file:line
    labels: tuple | None  # as in Pair
    prompt: str | list  # a string or messages, and so the responses
    chosen: str | list
    rejected: str | list
    template_args: dict  # for the chat template
    texts: list  # that are tokenised: full_texts
    found: Any = None  # its pictures: formats/picture_reader.py

    @property
    def is_chat(self):
        return isinstance(self.prompt, list)


@dataclass
class Account:
    """What became of the rows of a source."""

    shape: Shape | None = None  # of the first row
    num_rows: int = 0
    left_out: Counter = field(default_factory=Counter)  # reason -> rows that became no pair
    first_left_out: str = ""  # where, and why
    unread: Counter = field(default_factory=Counter)  # column of text that nothing reads -> rows
    num_cut: int = 0  # pairs that were too long
    num_merged: int = 0  # pairs in which a token spans the seam of prompt and response
    notes: dict = field(default_factory=dict)  # what a chat template changes -> places of the rows

    def leave_out(self, reason, where, problem):
        self.left_out[reason] += 1
        self.first_left_out = self.first_left_out or f"{where}: {problem}"

    def reasons(self):
        return ", ".join(f"{count} because {reason}" for reason, count in self.left_out.most_common())


def load_pairs(
    source,
    tokenizer,
    max_length,
    max_prompt_length,
    limit=0,
    skip_invalid=False,
    chat_template_strings=False,
    prefer=None,
    by_default=False,
    reader=None,
):
    """Pairs of the first `limit` rows (0: all) of a file or hub dataset, and a report: (pairs, lines to print).

    prefer: puts a preference into a prompt, a string or messages; the pairs then have prompted_ids too.
    by_default: nobody asked for that limit, which the report then says.  reader: a PictureReader, of a model
    that sees.
    Raises DataError at the first malformed row (skip_invalid counts it instead), for an unknown shape, and when no
    usable pair is left.  Unusable rows are counted by reason, and the first one left out is named.
    Needs max_prompt_length < max_length, so that a cut leaves something of every response.
    """
    account, as_read = Account(), (source, tokenizer, max_length, limit, skip_invalid)
    rows = read_texts(*as_read, chat_template_strings, prefer, account, reader)
    if any(row.found for row in rows) and not all(row.is_chat for row in rows):  # strings beside pictures: messages too
        account = Account()
        rows = read_texts(*as_read, True, prefer, account, reader)
    pairs = encode(rows, tokenizer, max_length, max_prompt_length, prefer, account, reader, skip_invalid)
    if not pairs:
        reasons = account.reasons() or "the file is empty"
        raise DataError(f"{source} has {account.num_rows} rows and no usable pair ({reasons})")
    enough = " (as many as are read by default; --num-samples 0: all)" if by_default else " (as many as asked for)"
    read = f"{account.num_rows:,} rows{enough if account.num_rows == limit else ''}"
    lines = [f"{source}: {account.shape.name}, {read}, {len(pairs):,} pairs"]
    return pairs, lines + report(account, rows, pairs[0], tokenizer, max_length, max_prompt_length)


# -- rows -> texts ---------------------------------------------------------------------------------------------------


def read_texts(source, tokenizer, max_length, limit, skip_invalid, chat_template_strings, prefer, account, reader=None):
    """The TextRows of a source; rows that give none are counted in the account.  Raises DataError."""
    rows = []
    for where, raw in itertools.islice(read_rows(source), limit or None):
        account.num_rows += 1
        try:
            row, found = parse_row(raw), None
            if reader:
                row, found = reader.take(row, source)
            account.shape = account.shape or recognise(row, where)
            labels = harm_labels(row)
            content = row_texts(row, account.shape, as_chat=chat_template_strings or found)
            if isinstance(content.prompt, list) and not tokenizer.chat_template:
                raise DataError(f"{where} needs a chat template and this tokenizer has none: use an instruct model's")
            prompt = shortened(content.prompt, -max_length)
            if found:
                prompt = reader.place(prompt, found)
            chosen, rejected = shortened(content.chosen, max_length), shortened(content.rejected, max_length)
            texts = full_texts(prompt, chosen, rejected, tokenizer, prefer, **content.template_args)
            if isinstance(prompt, list):
                check_tools(content, tokenizer)
            rows.append(TextRow(where, labels, prompt, chosen, rejected, content.template_args, texts, found))
            account.unread.update(content.unread)
        except Malformed as problem:
            leave_out_malformed(problem, where, skip_invalid, account)
        except PreferenceError as problem:
            raise DataError(f"{where}: {problem}") from None
        except Unusable as reason:
            account.leave_out(str(reason), where, reason)
    return rows


def leave_out_malformed(problem, where, skip_invalid, account):
    """Raise DataError, or count the row."""
    if not skip_invalid:
        advice = "mend the row, or leave such rows out with --skip-invalid"
        raise DataError(f"{where}: {problem}; {advice}") from None
    account.leave_out("malformed", where, problem)


def check_tools(row, tokenizer):
    """Raise Malformed where the chat template leaves out the tools of a row (Texts of messages), or a call of one."""

    def text(messages, args):
        with contextlib.suppress(Malformed):
            return render(messages, tokenizer, **args)
        return None  # a template that misses them reads them

    def check(name, messages, args):
        """Without what is called `name` the text must be another."""
        if (messages, args) != (turns, row.template_args):
            without = text(messages, args)
            if without is not None and without == text(turns, row.template_args):
                raise Malformed(f"the chat template does not read `{name}`: write them as text, or remove them")

    for response in (row.chosen, row.rejected):
        turns = row.prompt + response
        no_calls = [{key: value for key, value in message.items() if key != "tool_calls"} for message in turns]
        no_tools = {key: value for key, value in row.template_args.items() if key != "tools"}
        check("tool_calls", no_calls, row.template_args)
        check("tools", turns, no_tools)


# -- texts -> token ids ----------------------------------------------------------------------------------------------

ROWS_AT_ONCE = 256  # to the tokenizer, whose working memory is many times the text


def encode(rows, tokenizer, max_length, max_prompt_length, prefer, account, reader=None, skip_invalid=False):
    """The Pairs of TextRows; what was cut, changed or left out is counted in the account."""
    pairs = []
    for start in range(0, len(rows), ROWS_AT_ONCE):
        some = rows[start : start + ROWS_AT_ONCE]
        all_ids = iter(token_ids([text for row in some for text in row.texts], tokenizer, some[0].is_chat))
        for row in some:
            ids = [next(all_ids) for _ in row.texts]
            try:
                pair = encode_row(row, ids, tokenizer, max_length, max_prompt_length, prefer, account)
                pairs.append(with_pictures(pair, row, ids, reader) if reader else pair)
            except Malformed as problem:
                if row.found:
                    leave_out_malformed(problem, row.where, skip_invalid, account)
                else:
                    account.leave_out(str(problem), row.where, problem)
            except Unusable as reason:
                account.leave_out(str(reason), row.where, reason)
    return pairs


def with_pictures(pair, row, ids, reader):
    """The Pair of a model that sees, with the pictures of its row; ids: of its texts.  Raises Malformed, Unusable."""
    if not row.found:
        reader.check_text(pair)
        return pair
    seen = reader.seeing(pair, row.found, row.texts[0], row.where, len(ids[0]))
    if pair.prompted_ids is None:
        return seen
    prompted = pair._replace(prompt_ids=pair.prompted_ids)
    prompted = reader.seeing(prompted, row.found, row.texts[3], row.where, len(ids[3]))
    return seen._replace(prompted_ids=prompted.prompt_ids, prompted_pictures=prompted.pictures)


def encode_row(row, ids, tokenizer, max_length, max_prompt_length, prefer, account):
    """The Pair of a TextRow; ids: of each of its texts.  Raises Malformed, Unusable."""
    end = response_end(row.prompt, tokenizer)
    is_long = len(ids[0]) > max_prompt_length
    if row.found and is_long:
        raise Unusable("the text of a prompt with pictures is longer than --max-prompt-length, and is not cut")
    if row.is_chat and is_long:
        prompt = cut_chat(row.prompt, tokenizer, max_prompt_length, **row.template_args)
        texts = full_texts(prompt, row.chosen, row.rejected, tokenizer, prefer, **row.template_args)
        ids = token_ids(texts, tokenizer, row.is_chat)
    prompt_ids, chosen_ids, rejected_ids, prompted_ids = encode_pair(
        ids, tokenizer, max_length, max_prompt_length, end, row.is_chat
    )
    if chosen_ids == rejected_ids:
        where = "after the cut at --max-length" if chosen_ids[-1] != end else "as the model reads them"
        raise Unusable(f"the two responses are equal {where}")
    if row.is_chat and not row.found:
        note(account.notes, row.where, row.prompt, row.chosen, row.rejected, row.texts, tokenizer)
    prompt_is_cut = is_long and (row.is_chat or len(prompt_ids) == max_prompt_length)
    if prompt_is_cut or chosen_ids[-1] != end or rejected_ids[-1] != end:
        account.num_cut += 1
    prompt_text, *whole_texts = row.texts[:3]
    if min(common_prefix(ids[0], whole) for whole in ids[1:3]) < len(ids[0]) and all(
        text.startswith(prompt_text) for text in whole_texts
    ):
        account.num_merged += 1
    own_end = None if end == tokenizer.eos_token_id else end
    return Pair(prompt_ids, chosen_ids, rejected_ids, row.labels, prompted_ids, own_end)


# -- what became of the rows -----------------------------------------------------------------------------------------


def report(account, rows, first_pair, tokenizer, max_length, max_prompt_length):
    """Lines on what was left out, not read, cut or changed, and the first pair."""
    lines = []
    if account.left_out:
        number = account.left_out.total()
        lines.append(f"  left out {number} rows: {account.reasons()}; the first is {account.first_left_out}")
    if account.unread:
        columns = ", ".join(f"{name} ({count:,} rows)" for name, count in account.unread.most_common())
        lines.append(f"  columns of text that are not read: {columns}")
    if account.num_cut:
        limits = f"--max-length {max_length} or --max-prompt-length {max_prompt_length}"
        lines.append(f"  cut {account.num_cut:,} pairs to {limits}")
    if account.num_merged:
        number = account.num_merged
        lines.append(f"  in {number:,} pairs a token spans the seam of prompt and response, and counts as response")
    if rows[0].is_chat:
        first_prompt, template_args = rows[0].prompt, rows[0].template_args
        lines += note_lines(account.notes, "pairs", first_prompt, tokenizer, **template_args)
    elif plain := sum(is_past_template(row.prompt, tokenizer) for row in rows):
        lines.append(
            f"  {plain:,} rows are strings and pass by the tokenizer's chat template: for a model that is to chat, "
            "train with --chat-template-strings"
        )
    for name, ids in zip(("prompt", "chosen", "rejected"), first_pair[:3]):
        text = repr(tokenizer.decode(ids))
        text = text if len(text) <= 150 else f"{text[:60]} ... {text[-80:]}"
        lines.append(f"  row 0 {name:8} {len(ids):4} tokens  {text}")
    return lines


def fingerprint(pairs):
    """sha256 of the token ids of all pairs and of their pictures, in order: the same number means the same training
    data.
    """
    digest = hashlib.sha256()
    for pair in pairs:
        digest.update(json.dumps(pair[:4]).encode())
        if pictures := getattr(pair, "pictures", None):
            digest.update(json.dumps(pictures.digests).encode())
    return digest.hexdigest()
