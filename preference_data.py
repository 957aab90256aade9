"""Preference rows of a known shape -> texts -> token ids.

rows   a .jsonl or .json file (gzip too), or a dataset: an id on a hub or a folder (needs the extra `hub`)
texts  (prompt, chosen, rejected): strings as they stand, or messages through the tokenizer's chat template
pairs  prompt_ids, chosen_ids, rejected_ids: a response ends in exactly one end token and carries the loss
"""

import gzip
import hashlib
import itertools
import json
import textwrap
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from chat_text import (
    PreferenceError,
    TextError,
    as_messages,
    common_prefix,
    encode_pair,
    full_texts,
    note,
    note_lines,
    response_end,
    shortened,
    token_ids,
)


class DataError(ValueError):
    """Data the user has to mend: one sentence saying what, where (file:line) and what to do."""


class Malformed(ValueError):
    """A row that is not JSON or lacks a field: stops the run unless --skip-invalid."""


class Unusable(ValueError):
    """A well-formed row that can teach nothing: skipped and counted."""


class Pair(NamedTuple):
    prompt_ids: list
    chosen_ids: list
    rejected_ids: list
    labels: tuple | None = None  # of harm, (chosen, rejected): +1 harmful, -1 safe; None where the row has none
    prompted_ids: list | None = None  # the prompt with a preference in it, where load_pairs was given one
    end: int | None = None  # the token that ends its responses, where it is not the tokenizer's end-of-sequence


# -- rows --------------------------------------------------------------------------------------------------------


def read_rows(source):
    """Yield (where, row) of a file or a dataset; where is file:line, and a line of JSON is not parsed yet."""
    path = Path(source)
    if not path.exists() and (source.startswith((".", "/", "~")) or source.endswith((".json", ".jsonl", ".gz"))):
        raise DataError(f"there is no file {source}: check the path")
    if path.is_dir() or not path.exists():
        yield from _dataset_rows(source)
        return
    try:
        with open(path, "rb") as file:
            opener = gzip.open if file.read(2) == b"\x1f\x8b" else open
        with opener(path, "rt", encoding="utf-8-sig", newline="\n") as file:
            if file.read(64).lstrip().startswith("["):
                file.seek(0)
                yield from ((f"{path}: row {n}", row) for n, row in enumerate(json.load(file)))
            else:
                file.seek(0)
                yield from ((f"{path}:{n}", line) for n, line in enumerate(file, 1) if line.strip())
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno} is not JSON ({error.msg}): mend the list there") from None
    except (UnicodeDecodeError, EOFError, OSError, zlib.error) as error:
        raise DataError(f"{path} cannot be read ({error}): is it UTF-8 text, or gzip of it, and whole?") from None


HUB_FOLDERS = {"lvwerra/stack-exchange-paired": "data/finetune"}  # its folder `evaluation` hides its train split


def _dataset_rows(name):
    """The train split, streamed, of a dataset on a hub or of a folder with the files of one."""
    folder = Path(name).absolute()  # "json" alone would be a format to `datasets`, and no folder
    if folder.is_dir():
        what, advice = f"{name} is a folder", "name a .jsonl file (docs/data.md shows how to make one)"
    else:
        what, advice = f"there is no file {name}", "name a .jsonl file or a folder, or a mirror in HF_ENDPOINT"
    try:
        from datasets import load_dataset, logging
    except ImportError:
        raise DataError(
            f"{what}, and what reads a dataset is missing: name a .jsonl file, or install the extra hub "
            "(bash setup.sh hub, or pip install -U datasets)"
        ) from None
    logging.set_verbosity(logging.CRITICAL)  # it logs what it raises, and a mistake is told once
    try:
        path, part = str(folder) if folder.is_dir() else name, HUB_FOLDERS.get(name)
        dataset = load_dataset(path, data_dir=part, split="train", streaming=True)
        yield from ((f"{name}: row {n}", row) for n, row in enumerate(dataset))
    except Exception as error:  # a network and a dozen formats have no class in common
        reason = textwrap.shorten(f"{type(error).__name__}: {error}", 200, placeholder=" ...")
        raise DataError(f"{what}, and `datasets` reads no train split under that name ({reason}): {advice}") from None


# -- shapes: a row -> (prompt, chosen, rejected), all strings or all lists of messages -----------------------------


class Shape(NamedTuple):
    name: str
    fields: dict  # field -> the type it has in every row
    texts: Callable  # row -> (prompt, chosen, rejected)
    without: tuple = ()  # fields it must not have: a prompt in a form we do not know is not to be dropped


def columns(*names):
    return lambda row: tuple(row[name] for name in names)


def strings(*names):
    return dict.fromkeys(names, str)


def chosen_and_rejected(row):
    """Two strings without a prompt: Anthropic HH transcripts, which part after the last "Assistant:", or a beginning
    that both share, cut back to whole words (a tokenizer's words begin with their blank, so the blank stays behind).
    """
    chosen, rejected = row["chosen"], row["rejected"]
    turn = "\n\nAssistant:"
    if turn in chosen and turn in rejected:
        (prompt, _, chosen), (other, _, rejected) = chosen.rpartition(turn), rejected.rpartition(turn)
        if prompt != other:
            raise Unusable("the prompts of chosen and rejected differ")
        return prompt + turn, chosen, rejected
    same = common_prefix(chosen, rejected)
    same = max(chosen.rfind(" ", 0, same), chosen.rfind("\n", 0, same) + 1, 0)
    return chosen[:same], chosen[same:], rejected[same:]


def message_lists(row):
    """Responses as messages that may begin with the prompt's turns; `prompt` may also be a string (ultrafeedback)."""
    chosen, rejected = row["chosen"], row["rejected"]
    same = common_prefix(chosen, rejected)
    prompt = chosen[:same] or [{"role": "user", "content": row.get("prompt", "")}]
    return prompt, chosen[same:], rejected[same:]


def stack_exchange(row):
    return f"Question: {row['question']}\n\nAnswer: ", row["response_j"], row["response_k"]


def instruction(row):
    if not isinstance(row.get("input"), str | None):
        raise Malformed("`input` is not a str")
    return "\n\n".join(filter(None, (row["instruction"], row.get("input")))) + "\n\n", row["chosen"], row["rejected"]


def dual_labels(row):
    """PKU-SafeRLHF, by helpfulness.  Question and answer are two texts there: a newline keeps them apart."""
    better, responses = row["better_response_id"], (row["response_0"], row["response_1"])
    if better not in (0, 1):
        raise Malformed("`better_response_id` is neither 0 nor 1")
    return row["prompt"].rstrip() + "\n", responses[better], responses[1 - better]


SHAPES = [  # the first whose fields fit a file's first row is the shape of the file
    Shape("prompt/chosen/rejected", strings("prompt", "chosen", "rejected"), columns("prompt", "chosen", "rejected")),
    Shape(
        "prompt/chosen_response/rejected_response",
        strings("prompt", "chosen_response", "rejected_response"),
        columns("prompt", "chosen_response", "rejected_response"),
    ),
    Shape(
        "prompt/chosen/rejected messages",
        {"prompt": list, "chosen": list, "rejected": list},
        columns("prompt", "chosen", "rejected"),
    ),
    Shape("prompt string, messages", {"prompt": str, "chosen": list, "rejected": list}, message_lists),
    Shape("chosen/rejected messages", {"chosen": list, "rejected": list}, message_lists, ("prompt",)),
    Shape("question/response_j/response_k", strings("question", "response_j", "response_k"), stack_exchange),
    Shape(
        "prompt/response_0/response_1/better_response_id",
        strings("prompt", "response_0", "response_1") | {"better_response_id": int},
        dual_labels,
    ),
    Shape("instruction/chosen/rejected", strings("instruction", "chosen", "rejected"), instruction),
    Shape(
        "chosen/rejected strings",
        strings("chosen", "rejected"),
        chosen_and_rejected,
        ("prompt", "instruction", "question"),
    ),
]


def recognise(row, where):
    """The Shape of a file, by its first row.  Raises DataError that names the known shapes."""
    for shape in SHAPES:
        fits = all(isinstance(row.get(field), kind) for field, kind in shape.fields.items())
        if fits and not row.keys() & set(shape.without):
            return shape
    known = ", ".join(shape.name for shape in SHAPES)
    raise DataError(
        f"{where} has the fields {', '.join(row) or '(none)'}, which is no known shape: rename them to one of {known}"
    )


def row_texts(row, shape):
    """(prompt, chosen, rejected) of one row.  Raises Malformed or Unusable."""
    for field, kind in shape.fields.items():
        value = row.get(field)
        if not isinstance(value, kind):
            raise Malformed(f"`{field}` is {'not a ' + kind.__name__ if field in row else 'missing'}")
        if kind is list and not (value and all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in value)):
            raise Malformed(f"`{field}` is not a list of messages with role and content")
    prompt, chosen, rejected = shape.texts(row)
    for name, response in (("chosen", chosen), ("rejected", rejected)):
        text = response if isinstance(response, str) else "".join(str(message["content"]) for message in response)
        if not text.strip():
            raise Unusable(f"the {name} response is empty")
    if chosen == rejected:
        raise Unusable("the two responses are equal")
    return prompt, chosen, rejected


def harm_labels(row):
    """(chosen, rejected) of a row's `safety_labels`, +1 harmful and -1 safe, or None.  Raises Malformed."""
    labels = row.get("safety_labels")
    if labels is None:
        return None
    if not isinstance(labels, dict) or not labels.keys() >= {"chosen", "rejected"}:
        raise Malformed('`safety_labels` is not {"chosen": ±1, "rejected": ±1}')
    for side in ("chosen", "rejected"):
        if type(labels[side]) is not int or labels[side] not in (1, -1):
            raise Malformed(f"the safety label of {side} is {labels[side]!r}: +1 is harmful, -1 is safe")
    return labels["chosen"], labels["rejected"]


# -- pairs ------------------------------------------------------------------------------------------------------------


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
    shape, rows, texts, left_out, first = None, [], [], Counter(), ""
    for where, row in itertools.islice(read_rows(source), limit or None):
        try:
            row = parse_row(row)
            shape = shape or recognise(row, where)
            label = harm_labels(row)
            row = row_texts(row, shape)
            if chat_template_strings and isinstance(row[0], str):
                row = as_messages(*row)
            is_chat = isinstance(row[0], list)
            if is_chat and not tokenizer.chat_template:
                raise DataError(f"{where} needs a chat template and this tokenizer has none: use an instruct model's")
            texts.append(full_texts(*row, tokenizer, prefer))
            rows.append((where, row, label))
        except (Malformed, TextError) as problem:
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
    flat = token_ids([text for of_row in texts for text in of_row], tokenizer, is_chat) if rows else []
    for place, (where, row, label) in enumerate(rows):
        try:
            of_row, ids = texts[place], flat[place * len(texts[0]) : (place + 1) * len(texts[0])]
            is_long, end = len(ids[0]) > max_prompt_length, response_end(row[0], tokenizer)
            if is_chat and is_long:
                short = shortened(row[0], tokenizer, max_prompt_length)
                ids = token_ids(full_texts(short, *row[1:], tokenizer, prefer), tokenizer, is_chat)
            *parts, prompted = encode_pair(ids, tokenizer, max_length, max_prompt_length, end, is_chat)
            if parts[1] == parts[2]:
                at_all = "after the cut at --max-length" if parts[1][-1] != end else "as the model reads them"
                raise Unusable(f"the two responses are equal {at_all}")
            pairs.append(Pair(*parts, label, prompted, None if end == tokenizer.eos_token_id else end))
            seam = any(common_prefix(ids[0], whole) < len(ids[0]) for whole in ids[1:3])
            merged += seam and all(text.startswith(of_row[0]) for text in of_row[1:3])
            cut += is_long and (is_chat or len(parts[0]) == max_prompt_length) or any(r[-1] != end for r in parts[1:])
            if is_chat:
                note(notes, where, *row, of_row, tokenizer)
        except (Unusable, TextError) as reason:
            left_out[str(reason)] += 1
            first = first or f"{where}: {reason}"
    reasons = ", ".join(f"{count} because {reason}" for reason, count in left_out.most_common())
    if not pairs:
        raise DataError(f"{source} has {num_rows} rows and no usable pair ({reasons or 'the file is empty'})")
    enough = " (as many as asked for)" if num_rows == limit else ""
    report = [f"{source}: {shape.name}, {num_rows:,} rows{enough}, {len(pairs):,} pairs"]
    if left_out:
        report.append(f"  left out {sum(left_out.values())} rows: {reasons}; the first is {first}")
    if cut:
        report.append(f"  cut {cut:,} pairs to --max-length {max_length} or --max-prompt-length {max_prompt_length}")
    if merged:
        report.append(f"  in {merged:,} pairs a token spans the seam of prompt and response, and counts as response")
    report += note_lines(notes, "pairs", rows[0][1][0], tokenizer) if is_chat else []
    for name, ids in zip(Pair._fields, pairs[0][:3]):
        text = repr(tokenizer.decode(ids))
        text = text if len(text) <= 150 else f"{text[:60]} ... {text[-80:]}"
        report.append(f"  row 0 {name[:-4]:8} {len(ids):4} tokens  {text}")
    return pairs, report


def parse_row(row):
    """A row as a dict.  Raises Malformed."""
    if isinstance(row, str):
        try:
            row = json.loads(row)
        except ValueError as error:
            raise Malformed(f"not JSON ({error})") from None
    if not isinstance(row, dict):
        raise Malformed("not a JSON object {...}")
    return row


def fingerprint(pairs):
    """sha256 of the token ids of all pairs, in order: the same number means the same training data."""
    digest = hashlib.sha256()
    for pair in pairs:
        digest.update(json.dumps(pair[:4]).encode())
    return digest.hexdigest()
