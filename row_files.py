"""Rows of a .jsonl or .json file (gzip too), or of a dataset: an id on a hub or a folder (needs the extra `hub`)."""

import codecs
import gzip
import json
import textwrap
import zlib
from pathlib import Path

import hub_files


class DataError(ValueError):
    """Data the user has to mend: one sentence saying what, where (file:line) and what to do."""


class Malformed(ValueError):
    """A row that is not JSON or lacks a field: stops the run unless --skip-invalid."""


class Unusable(ValueError):
    """A well-formed row that can teach nothing: skipped and counted."""


def read_rows(source):
    """Yield (where, row) of a file or a dataset; where is file:line, and a line of JSON is bytes for parse_row."""
    path = Path(source)
    try:
        is_file, is_folder = path.exists() and not path.is_dir(), path.is_dir()
    except (OSError, ValueError) as error:  # a name too long, a folder that may not be entered, a zero byte
        raise DataError(f"{source} cannot be read ({error}): check the path") from None
    if not is_file and not is_folder and (source.startswith((".", "/", "~")) or source.endswith(ENDINGS)):
        raise DataError(f"there is no file {source}: check the path")
    yield from _file_rows(path) if is_file else _dataset_rows(source)


ENDINGS = ".json", ".jsonl", ".gz"
UTF_16 = codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE


def _file_rows(path):
    try:
        with open(path, "rb") as file:
            opener = gzip.open if file.read(2) == b"\x1f\x8b" else open
        with opener(path, "rb") as file:
            start = file.read(64)
            if start.startswith(UTF_16):
                raise OSError("UTF-16")
            file.seek(len(codecs.BOM_UTF8) if start.startswith(codecs.BOM_UTF8) else 0)
            if start.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
                # A byte that is no UTF-8 becomes half a surrogate pair, which whoever reads that row refuses.
                rows = parse_json(file.read().decode("utf-8", "surrogateescape"))
                yield from ((f"{path}: row {n}", row) for n, row in enumerate(rows))
            else:
                yield from ((f"{path}:{n}", line) for n, line in enumerate(file, 1) if line.strip())
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno} is not JSON ({error.msg}): mend the list there") from None
    except NotJSON as error:
        raise DataError(f"{path} is not JSON ({error}): mend the list there") from None
    except (EOFError, OSError, zlib.error) as error:
        raise DataError(f"{path} cannot be read ({error}): is it UTF-8 text, or gzip of it, and whole?") from None


class NotJSON(ValueError):
    """JSON to Python's parser, and no row to anybody."""


def parse_json(text):
    """JSON.  Raises json.JSONDecodeError, or NotJSON for what Python cannot hold and for a key that stands twice."""

    def once(pairs):
        row = dict(pairs)
        if len(row) < len(pairs):
            keys = [key for key, _ in pairs]
            raise NotJSON(f"`{next(key for key in keys if keys.count(key) > 1)}` stands twice")
        return row

    try:
        return json.loads(text, object_pairs_hook=once)
    except RecursionError:
        raise NotJSON("nested too deeply") from None
    except ValueError as error:
        if isinstance(error, json.JSONDecodeError | NotJSON):
            raise
        raise NotJSON("a number of thousands of digits") from None


def parse_row(row):
    """A row as a dict.  Raises Malformed."""
    if isinstance(row, bytes):
        try:
            row = parse_json(row.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise Malformed(f"byte {error.start + 1} of the line is no UTF-8") from None
        except ValueError as error:
            raise Malformed(f"not JSON ({error})") from None
    if not isinstance(row, dict):
        raise Malformed("not a JSON object {...}")
    return row


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
        part = HUB_FOLDERS.get(name)
        path = str(folder) if folder.is_dir() else hub_files.local(name, "dataset", part=part)
        dataset = load_dataset(path, data_dir=part, split="train", streaming=True)
        yield from ((f"{name}: row {n}", row) for n, row in enumerate(dataset))
    except hub_files.HubError as error:
        raise DataError(str(error)) from None
    except Exception as error:  # a network and a dozen formats have no class in common
        if reason := hub_files.unanswered(name):
            raise DataError(f"{what}: {reason}") from None
        reason = textwrap.shorten(f"{type(error).__name__}: {error}", 200, placeholder=" ...")
        raise DataError(f"{what}, and `datasets` reads no train split under that name ({reason}): {advice}") from None
