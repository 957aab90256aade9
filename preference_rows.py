"""Preference rows of a known shape -> (prompt, chosen, rejected): strings as they stand, or messages.

rows    a .jsonl or .json file (gzip too), or a dataset: an id on a hub or a folder (needs the extra `hub`)
shapes  what a row's fields mean; a file has the shape of its first row
"""

import gzip
import json
import textwrap
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple


class DataError(ValueError):
    """Data the user has to mend: one sentence saying what, where (file:line) and what to do."""


class Malformed(ValueError):
    """A row that is not JSON or lacks a field: stops the run unless --skip-invalid."""


class Unusable(ValueError):
    """A well-formed row that can teach nothing: skipped and counted."""


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


def common_prefix(a, b):
    """Length of the longest common beginning of two sequences."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


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
