"""Preference rows of a known shape -> texts -> token ids.

rows   of a file or a dataset (row_files.py)
texts  (prompt, chosen, rejected): strings as they stand, or messages through the chat template (preference_rows.py)
pairs  prompt_ids, chosen_ids, rejected_ids: a response ends in exactly one end-of-sequence and carries the loss
"""

import contextlib
import hashlib
import itertools
import json
import re
from collections import Counter
from functools import partial
from typing import NamedTuple

from jinja2 import TemplateError

from preference_rows import harm_labels, recognise, row_texts
from row_files import DataError, Malformed, Unusable, parse_row, read_rows
from row_prompts import common_prefix, shortened


class Pair(NamedTuple):
    prompt_ids: list
    chosen_ids: list
    rejected_ids: list
    labels: tuple | None = None  # of harm, (chosen, rejected): +1 harmful, -1 safe; None where the row has none
    prompted_ids: list | None = None  # the prompt with a preference in it, where load_pairs was given one


# -- texts -> token ids ---------------------------------------------------------------------------------------------


def as_messages(prompt, chosen, rejected):
    """Plain strings as chat messages; the turns of an HH transcript become turns of the chat."""
    before, *turns = re.split(r"\n\n(Human|Assistant):", prompt)
    roles = {"Human": "user", "Assistant": "assistant"}
    messages = [
        {"role": roles[who], "content": said.strip()}
        for who, said in zip(turns[::2], turns[1::2], strict=True)
        if said.strip()  # the last, empty "Assistant:" is where the response goes
    ]
    if before.strip() or not messages:
        messages = [{"role": "user", "content": prompt.strip()}]
    return messages, *([{"role": "assistant", "content": response.strip()}] for response in (chosen, rejected))


def full_texts(prompt, chosen, rejected, tokenizer, prefer=None, template_args=None):
    """The texts to tokenise: prompt, prompt + chosen, prompt + rejected, and prefer(prompt).  Raises Malformed."""
    texts = [prompt, prompt + chosen, prompt + rejected]
    try:
        texts += [prefer(prompt)] if prefer else []
        if isinstance(prompt, list):
            render = partial(tokenizer.apply_chat_template, tokenize=False, **(template_args or {}))
            texts = [render(text, add_generation_prompt=place in (0, 3)) for place, text in enumerate(texts)]
        "".join(texts).encode()  # a tokenizer takes no lone surrogates, and names no line
    except (TemplateError, TypeError) as error:  # TypeError: content that is null
        raise Malformed(f"the chat template refuses its messages ({error})") from None
    except UnicodeEncodeError as error:
        raise Malformed(f"text that is no Unicode ({error.reason})") from None
    return texts


def encode_pair(ids, tokenizer, max_length, max_prompt_length, is_chat=False):
    """Token ids of prompt, prompt + chosen, prompt + rejected and perhaps prompted prompt -> Pair.  Raises Unusable.

    The boundary is the longest common prefix of the first three: where a token spans the seam of prompt and response,
    it belongs to the responses.  Too long a prompt loses its beginning (but for a BOS), then the responses their end.
    """
    whole_ids, full_chosen_ids, full_rejected_ids, *prompted_ids = ids
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    boundary = min(common_prefix(whole_ids, ids) for ids in (full_chosen_ids, full_rejected_ids))
    prompt_ids = whole_ids[:boundary] or [eos if bos is None else bos]  # something must predict the first token
    keep, dropped = int(prompt_ids[0] == bos), max(0, len(prompt_ids) - max_prompt_length)
    if dropped:
        prompt_ids = prompt_ids[:keep] + prompt_ids[keep + dropped :]
    responses = []
    for ids in (full_chosen_ids[boundary:], full_rejected_ids[boundary:]):
        if is_chat and eos in ids:  # templates write a newline behind the last end-of-sequence
            ids = ids[: len(ids) - ids[::-1].index(eos)]
        while ids and ids[-1] == eos:
            ids = ids[:-1]
        responses.append((ids + [eos])[: max_length - len(prompt_ids)])
    if responses[0] == responses[1]:
        raise Unusable("the two responses are equal after the cut at --max-length")
    if not prompted_ids:
        return Pair(prompt_ids, *responses)
    same, cut = prompted_ids[0] == whole_ids, (keep, dropped, len(whole_ids) - boundary)
    return Pair(prompt_ids, *responses, None, prompt_ids if same else _cut_alike(prompted_ids[0], whole_ids, *cut))


def _cut_alike(ids, whole_ids, keep, dropped, seam):
    """The prompted ids without what the plain prompt loses, `dropped` tokens behind the first `keep` and `seam` at the
    end.  What the preference adds stays, also where all around it goes."""
    before, after = common_prefix(ids, whole_ids), common_prefix(ids[::-1], whole_ids[::-1])
    if after >= len(whole_ids) - keep:  # in front of all but a BOS; it may begin with the token that all begins with
        before = min(before, len(whole_ids) - after)
    else:
        after = common_prefix(ids[before:][::-1], whole_ids[before:][::-1])
    head, added, tail = ids[:before], ids[before : len(ids) - after], ids[len(ids) - after :]
    gone = keep + dropped - (len(whole_ids) - after)  # of the tail
    return head[:keep] + head[keep + dropped :] + added + tail[max(0, gone) : len(tail) - min(seam, len(tail))]


def check_tools(row, tokenizer):
    """Raise Malformed where the chat template leaves out the tools of a row (Texts of messages), or a call of one."""
    render, args = partial(tokenizer.apply_chat_template, tokenize=False), row.template_args
    for response in (row.chosen, row.rejected):
        turns = row.prompt + response
        plain = [{key: value for key, value in message.items() if key != "tool_calls"} for message in turns]
        no_tools = {key: value for key, value in args.items() if key != "tools"}
        for name, messages, more in (("tool_calls", plain, args), ("tools", turns, no_tools)):
            with contextlib.suppress(TemplateError, TypeError):  # a template that misses them reads them
                if (messages, more) != (turns, args) and render(messages, **more) == render(turns, **args):
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
):
    """Pairs of the first `limit` rows (0: all) of a file or hub dataset, and a report: (pairs, lines to print).

    prefer: puts a preference into a prompt, a string or messages; the pairs then have prompted_ids too.
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
            prompt, *responses = shortened(row.prompt, -max_length), *(shortened(text, max_length) for text in row[1:3])
            texts = full_texts(prompt, *responses, tokenizer, prefer, row.template_args)
            if is_chat:
                check_tools(row, tokenizer)
            rows.append((where, label, texts))
            unread.update(row.unread)
        except Malformed as problem:
            if not skip_invalid:
                advice = "mend the row, or leave such rows out with --skip-invalid"
                raise DataError(f"{where}: {problem}; {advice}") from None
            left_out["malformed"] += 1
            first = first or f"{where}: {problem}"
        except Unusable as reason:
            left_out[str(reason)] += 1
            first = first or f"{where}: {reason}"
    pairs, cut, merged, num_rows = [], 0, 0, len(rows) + left_out.total()
    for begin in range(0, len(rows), ROWS_AT_ONCE):
        some = rows[begin : begin + ROWS_AT_ONCE]
        texts = [text for _, _, texts in some for text in texts]
        # A chat template writes the special tokens itself.
        ids = iter(tokenizer(texts, add_special_tokens=not is_chat, verbose=False)["input_ids"])
        for where, label, texts in some:
            of_row = [next(ids) for _ in texts]
            try:
                pair = encode_pair(of_row, tokenizer, max_length, max_prompt_length, is_chat)._replace(labels=label)
                merged += any(common_prefix(of_row[0], ids) < len(of_row[0]) for ids in of_row[1:3])
                is_cut = len(pair.prompt_ids) == max_prompt_length < len(of_row[0])
                cut += is_cut or any(ids[-1] != tokenizer.eos_token_id for ids in pair[1:3])
                pairs.append(pair)
            except Unusable as reason:
                left_out[str(reason)] += 1
                first = first or f"{where}: {reason}"
    reasons = ", ".join(f"{count} because {reason}" for reason, count in left_out.most_common())
    if not pairs:
        raise DataError(f"{source} has {num_rows} rows and no usable pair ({reasons or 'the file is empty'})")
    enough = " (as many as asked for)" if num_rows == limit else ""
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
