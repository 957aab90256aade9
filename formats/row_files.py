"""Rows of a file (.jsonl, .json, .csv, .tsv, gzip of these, .parquet), or of a dataset: an id on a hub or a folder.
A parquet file and a dataset need the extra `hub`.
"""

import codecs
import contextlib
import csv
import gzip
import io
import itertools
import json
import textwrap
import zlib
from pathlib import Path

from formats import hub_files
from formats.json_files import NotJSON, parse_json
from formats.user_errors import UserError


class DataError(UserError):
    """Data the user has to mend: one sentence saying what, where (file:line) and what to do."""


class Malformed(UserError):
    """A row that is not JSON or lacks a field: stops the run unless --skip-invalid."""


class Unusable(UserError):
    """A well-formed row that can teach nothing: skipped and counted."""


def read_rows(source):
    """Yield (where, row) of a file or a dataset: where is file:line, and the row is for parse_row (bytes of JSON, a
    dict, or a Malformed that says why it is none).
    """
    path = Path(source)
    try:
        is_file, is_folder = path.exists() and not path.is_dir(), path.is_dir()
    except (OSError, ValueError) as error:  # a name too long, a folder that may not be entered, a zero byte
        raise DataError(f"{source} cannot be read ({error}): check the path") from None
    if any((folder / JOURNAL).exists() for folder in (path.parent, path.parent.parent)):
        raise DataError(f"{source} was being replaced when prepare_data.py was killed: run that again, and it is whole")
    if not is_file and not is_folder and (source.startswith((".", "/", "~")) or source.endswith(ENDINGS)):
        raise DataError(f"there is no file {source}: check the path")
    yield from _file_rows(path) if is_file else _dataset_rows(source)


JOURNAL = ".prepare_data/journal.json"  # in its output folder, while prepare_data.py puts new files in place
TABLES = ".csv", ".tsv", ".csv.gz", ".tsv.gz"
ENDINGS = ".json", ".jsonl", ".parquet", ".gz", *TABLES
UTF_16 = codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE


def _file_rows(path):
    try:
        with open(path, "rb") as file:
            magic = file.read(4)
        if magic == b"PAR1":
            yield from _parquet_rows(path)
            return
        if magic in (b"PK\3\4", b"\xd0\xcf\x11\xe0"):
            raise DataError(f"{path} is a spreadsheet or an archive: save it as CSV UTF-8, or unpack it")
        opener = gzip.open if magic[:2] == b"\x1f\x8b" else open
        with opener(path, "rb") as file:
            start = file.read(64)
            if start.startswith(UTF_16):
                raise OSError("UTF-16")
            begin = file.seek(len(codecs.BOM_UTF8) if start.startswith(codecs.BOM_UTF8) else 0)
            if path.name.lower().endswith(TABLES):
                yield from _table_rows(path, file)
                return
            is_list = start.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")
            if is_list or _is_one_object(file, begin):
                # A byte that is no UTF-8 becomes half a surrogate pair, which whoever reads that row refuses.
                rows = parse_json(file.read().decode("utf-8", "surrogateescape"))
                rows = rows if is_list else _inner_rows(rows)
                yield from ((f"{path}: row {n}", row) for n, row in enumerate(rows))
            else:
                yield from ((f"{path}:{n}", line) for n, line in enumerate(file, 1) if line.strip())
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno} is not JSON ({error.msg}): mend the list there") from None
    except NotJSON as error:
        raise DataError(f"{path} is not JSON ({error}): mend the list there") from None
    except (EOFError, OSError, zlib.error) as error:
        raise DataError(f"{path} cannot be read ({error}): is it UTF-8 text, or gzip of it, and whole?") from None


def _is_one_object(file, begin):
    """Whether a file is one JSON object, {"data": [row, ...]} or a row over many lines, and no row in each line.
    Leaves the file at `begin`.
    """
    first, second = [*itertools.islice(filter(bytes.strip, file), 2), b"", b""][:2]
    file.seek(begin)
    if (row := _object(first)) is not None:
        return not second and _inner_rows(row) != [row]
    # The first line breaks off where one of an object may; but it is just malformed where the next is a row.
    return first[:1] == b"{" and first.rstrip()[-1:] in (b"{", b"[", b",", b":") and _object(second) is None


def _object(line):
    with contextlib.suppress(ValueError):
        row = parse_json(line.decode())
        return row if isinstance(row, dict) else None


INNER = "data", "rows", "examples", "train"


def _inner_rows(whole):
    """The rows of {"data": [row, ...], "version": ...}; of any other JSON, which is a row itself, that alone."""
    parts = {name: value for name, value in whole.items() if isinstance(value, dict | list)}
    if len(parts) == 1 and parts.keys() <= set(INNER):
        (rows,) = parts.values()
        if isinstance(rows, list) and all(isinstance(row, dict) for row in rows):
            return rows
    return [whole]


# -- tables ----------------------------------------------------------------------------------------------------------

# Columns whose cells are JSON: lists, objects, numbers, true or false (True and False as Python writes them).
JSON_CELLS = "better_response_id safer_response_id is_safe is_response_0_safe is_response_1_safe safety_labels labels "
JSON_CELLS += "messages conversations history tools chat_template_kwargs completions generations responses ratings"
JSON_CELLS = {*JSON_CELLS.split(), "rejected_messages", "preferred_output", "non_preferred_output"}


def _table_rows(path, file):
    """(where, row) of a CSV or TSV file with a header.  Raises DataError for what the csv module cannot part."""
    text = io.TextIOWrapper(file, "utf-8", "surrogateescape", newline="")
    head = text.readline()
    delimiter = "\t" if ".tsv" in path.name.lower() else max(",;\t", key=head.count)
    reader, header = csv.reader(itertools.chain([head], text), delimiter=delimiter, strict=True), None
    while True:
        where = f"{path}:{reader.line_num + 1}"
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise DataError(
                f"{where} cannot be parted into cells ({error}): close the quote there, double one inside a quoted "
                "cell, or make a .jsonl file"
            ) from None
        if cells is None:
            return
        if header:
            if any(cell.strip() for cell in cells):
                yield where, _table_row(header, cells)
        elif cells:
            header = [name.strip() or "index" for name in cells]  # pandas gives its index no name
            twice = [name for name in header if header.count(name) > 1]
            if twice or _is_broken(header):
                fault = f"has the column {twice[0]} twice" if twice else NO_UTF8
                raise DataError(f"{where} {fault}: mend the header")


NO_UTF8 = "is no UTF-8 (a spreadsheet saves it as CSV UTF-8)"


def _is_broken(cells):
    return any("\udc80" <= character <= "\udcff" for cell in cells for character in cell)


def _table_row(header, cells):
    """{column: cell}, or a Malformed."""
    while len(cells) > len(header) and not cells[-1].strip():
        cells.pop()
    if len(cells) != len(header):
        return Malformed(f"it has {len(cells)} cells and the header {len(header)}")
    if _is_broken(cells):
        return Malformed(f"it {NO_UTF8}")
    row = dict(zip(header, cells, strict=True))
    for name, cell in row.items():
        is_list = cell.lstrip().startswith("[{") and any(key in cell for key in ("role", "from"))
        if name in JSON_CELLS or is_list:  # is_list: messages, which no answer looks like
            try:
                row[name] = parse_json({"True": "true", "False": "false"}.get(cell, cell)) if cell.strip() else None
            except ValueError as error:
                return Malformed(f"the cell of `{name}` is no JSON ({error}), as pandas' to_json would write it")
    return row


def _parquet_rows(path):
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise DataError(
            f"{path} is a parquet file, and what reads it is missing: install the extra hub (bash setup.sh hub, or "
            "pip install pyarrow)"
        ) from None
    try:
        with parquet.ParquetFile(path) as file:
            rows = itertools.chain.from_iterable(batch.to_pylist() for batch in file.iter_batches(1024))
            yield from ((f"{path}: row {n}", row) for n, row in enumerate(rows))
    except (pyarrow.ArrowException, ValueError, OSError) as error:
        reason = textwrap.shorten(str(error), 200, placeholder=" ...")
        raise DataError(f"{path} cannot be read as parquet ({reason}): is it whole?") from None


def parse_row(row):
    """A row as a dict.  Raises Malformed."""
    if isinstance(row, Malformed):
        raise row
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
        problem, advice = f"{name} is a folder", "name a .jsonl file (docs/data.md shows how to make one)"
    else:
        problem, advice = f"there is no file {name}", "name a .jsonl file or a folder, or a mirror in HF_ENDPOINT"
    try:
        from datasets import load_dataset, logging
    except ImportError:
        raise DataError(
            f"{problem}, and what reads a dataset is missing: name a .jsonl file, or install the extra hub "
            "(bash setup.sh hub, or pip install -U datasets)"
        ) from None
    logging.set_verbosity(logging.CRITICAL)  # it logs what it raises, and a mistake is told once
    try:
        part = HUB_FOLDERS.get(name)
        path = str(folder) if folder.is_dir() else hub_files.local(name, "dataset", part=part)
        dataset = load_dataset(path, data_dir=part, split="train", streaming=True)
        if "Image(" in repr(dataset.features):  # pictures as they are in their files, not decoded
            dataset = dataset.decode(False)
        yield from ((f"{name}: row {n}", row) for n, row in enumerate(dataset))
    except hub_files.HubError as error:
        raise DataError(str(error)) from None
    except Exception as error:  # a network and a dozen formats have no class in common
        if reason := hub_files.unanswered(name):
            raise DataError(f"{problem}: {reason}") from None
        reason = textwrap.shorten(f"{type(error).__name__}: {error}", 200, placeholder=" ...")
        raise DataError(
            f"{problem}, and `datasets` reads no train split under that name ({reason}): {advice}"
        ) from None
