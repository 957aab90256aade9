"""Preference rows of a known shape -> texts -> token ids.

rows   of a file or a dataset (row_files.py)
texts  (prompt, chosen, rejected): strings as they stand, or messages through the chat template (preference_rows.py)
pairs  prompt_ids, chosen_ids, rejected_ids: a response ends in exactly one end token and carries the loss
"""

import contextlib
import hashlib
import itertools
import json
from collections import Counter
from typing import NamedTuple

from formats.chat_text import (
    PreferenceError,
    as_messages,
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


class Pair(NamedTuple):
    prompt_ids: list
    chosen_ids: list
    rejected_ids: list
    labels: tuple | None = None  # of harm, (chosen, rejected): +1 harmful, -1 safe; None where the row has none
    prompted_ids: list | None = None  # the prompt with a preference in it, where load_pairs was given one
    end: int | None = None  # the token that ends its responses, where it is not the tokenizer's end-of-sequence


def check_tools(row, tokenizer):
    """Raise Malformed where the chat template leaves out the tools of a row (Texts of messages), or a call of one."""

    def text(messages, args):
        with contextlib.suppress(Malformed):
            return render(messages, tokenizer, **args)
        return None  # a template that misses them reads them

    args = row.template_args
    for response in (row.chosen, row.rejected):
        turns = row.prompt + response
        plain = [{key: value for key, value in message.items() if key != "tool_calls"} for message in turns]
        no_tools = {key: value for key, value in args.items() if key != "tools"}
        for name, messages, more in (("tool_calls", plain, args), ("tools", turns, no_tools)):
            if (messages, more) != (turns, args) and text(messages, more) == text(turns, args) is not None:
                raise Malformed(f"the chat template does not read `{name}`: write them as text, or remove them")


ROWS_AT_ONCE = 256  # to the tokenizer, whose working memory is many times the text


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
):
    """Pairs of the first `limit` rows (0: all) of a file or hub dataset, and a report: (pairs, lines to print).

    prefer: puts a preference into a prompt, a string or messages; the pairs then have prompted_ids too.
    by_default: nobody asked for that limit, which the report then says.
    Raises DataError at the first malformed row (skip_invalid counts it instead), for an unknown shape, and when no
    usable pair is left.  Unusable rows are counted by reason, and the first one left out is named.
    Needs max_prompt_length < max_length, so that a cut leaves something of every response.
    """
    shape, rows, left_out, unread, first = None, [], Counter(), Counter(), ""
    for where, row in itertools.islice(read_rows(source), limit or None):
        try:
            row = parse_row(row)
            shape = shape or recognise(row, where)
            label = harm_labels(row)
            row = row_texts(row, shape, as_messages if chat_template_strings else None)
            is_chat = isinstance(row.prompt, list)
            if is_chat and not tokenizer.chat_template:
                raise DataError(f"{where} needs a chat template and this tokenizer has none: use an instruct model's")
            said = shortened(row.prompt, -max_length), *(shortened(text, max_length) for text in row[1:3])
            texts = full_texts(*said, tokenizer, prefer, **row.template_args)
            if is_chat:
                check_tools(row, tokenizer)
            rows.append((where, label, said, row.template_args, texts))
            unread.update(row.unread)
        except Malformed as problem:
            if not skip_invalid:
                advice = "mend the row, or leave such rows out with --skip-invalid"
                raise DataError(f"{where}: {problem}; {advice}") from None
            left_out["malformed"] += 1
            first = first or f"{where}: {problem}"
        except PreferenceError as problem:
            raise DataError(f"{where}: {problem}") from None
        except Unusable as reason:
            left_out[str(reason)] += 1
            first = first or f"{where}: {reason}"
    pairs, cut, merged, notes, num_rows = [], 0, 0, {}, len(rows) + left_out.total()
    for begin in range(0, len(rows), ROWS_AT_ONCE):
        some = rows[begin : begin + ROWS_AT_ONCE]
        all_ids = iter(token_ids([text for row in some for text in row[-1]], tokenizer, is_chat))
        for where, label, said, args, texts in some:
            ids, end = [next(all_ids) for _ in texts], response_end(said[0], tokenizer)
            is_long = len(ids[0]) > max_prompt_length
            try:
                if is_chat and is_long:
                    short = cut_chat(said[0], tokenizer, max_prompt_length, **args)
                    ids = token_ids(full_texts(short, *said[1:], tokenizer, prefer, **args), tokenizer, is_chat)
                *parts, prompted = encode_pair(ids, tokenizer, max_length, max_prompt_length, end, is_chat)
                if parts[1] == parts[2]:
                    at_all = "after the cut at --max-length" if parts[1][-1] != end else "as the model reads them"
                    raise Unusable(f"the two responses are equal {at_all}")
                pairs.append(Pair(*parts, label, prompted, None if end == tokenizer.eos_token_id else end))
                seam = any(common_prefix(ids[0], whole) < len(ids[0]) for whole in ids[1:3])
                merged += seam and all(text.startswith(texts[0]) for text in texts[1:3])
                is_cut = is_long and (is_chat or len(parts[0]) == max_prompt_length)
                cut += is_cut or any(response[-1] != end for response in parts[1:])
                if is_chat:
                    note(notes, where, *said, texts, tokenizer)
            except (Malformed, Unusable) as reason:
                left_out[str(reason)] += 1
                first = first or f"{where}: {reason}"
    reasons = ", ".join(f"{count} because {reason}" for reason, count in left_out.most_common())
    if not pairs:
        raise DataError(f"{source} has {num_rows} rows and no usable pair ({reasons or 'the file is empty'})")
    enough = " (as many as are read by default; --num-samples 0: all)" if by_default else " (as many as asked for)"
    enough = enough if num_rows == limit else ""
    report = [f"{source}: {shape.name}, {num_rows:,} rows{enough}, {len(pairs):,} pairs"]
    if left_out:
        report.append(f"  left out {sum(left_out.values())} rows: {reasons}; the first is {first}")
    if unread:
        columns = ", ".join(f"{name} ({count:,} rows)" for name, count in unread.most_common())
        report.append(f"  columns of text that are not read: {columns}")
    if cut:
        report.append(f"  cut {cut:,} pairs to --max-length {max_length} or --max-prompt-length {max_prompt_length}")
    if merged:
        report.append(f"  in {merged:,} pairs a token spans the seam of prompt and response, and counts as response")
    plain = 0 if is_chat else sum(is_past_template(row[2][0], tokenizer) for row in rows)
    if plain:
        report.append(
            f"  {plain:,} rows are strings and pass by the tokenizer's chat template: for a model that is to chat, "
            "train with --chat-template-strings"
        )
    if is_chat:
        _, _, (prompt, *_), args, _ = rows[0]
        report += note_lines(notes, "pairs", prompt, tokenizer, **args)
    for name, ids in zip(Pair._fields, pairs[0][:3]):
        text = repr(tokenizer.decode(ids))
        text = text if len(text) <= 150 else f"{text[:60]} ... {text[-80:]}"
        report.append(f"  row 0 {name[:-4]:8} {len(ids):4} tokens  {text}")
    return pairs, report


def fingerprint(pairs):
    """sha256 of the token ids of all pairs, in order: the same number means the same training data."""
    digest = hashlib.sha256()
    for pair in pairs:
        digest.update(json.dumps(pair[:4]).encode())
    return digest.hexdigest()
