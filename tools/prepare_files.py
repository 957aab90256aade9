"""Which files prepare_data.py reads and writes: checked before anything is read, written whole or not at all."""

import contextlib
import json
import os
import tempfile
from pathlib import Path
from typing import NamedTuple

from formats import written_files
from formats.row_files import DataError
from tools.prepare_pairs import DIMENSIONS, SPLITS

SUFFIXES = ".jsonl", ".json", ".csv", ".tsv", ".parquet", ".gz"


class Targets(NamedTuple):
    """Where everything goes."""

    benchmark: Path | None
    pairs: dict  # {(split, dimension): path}
    account: Path

    def paths(self):
        """All of them; the account is the last to be written: with it the folder is whole."""
        return [*([self.benchmark] if self.benchmark else []), *self.pairs.values(), self.account]


def targets_of(args):
    output = Path(args.output_dir)
    pairs = {(split, name): output / split / f"{name}_pairs.jsonl" for split in SPLITS for name in DIMENSIONS}
    benchmark = Path(args.safety_benchmark) if args.safety_benchmark else None
    return Targets(benchmark, pairs, output / "account.json")


def check_files(args):
    """(files to read, Targets).  Raises DataError where a file cannot be read or written; changes nothing."""
    sources, targets = sources_of(args), targets_of(args)
    places = [path.resolve() for path in targets.paths()]
    if len(set(places)) < len(places):
        raise DataError(f"--safety-benchmark {args.safety_benchmark} is the file of the pairs: name another")
    account = read_account(targets.account)
    for path in targets.paths():
        if any(written_files.is_same(path, source) for source in sources):
            raise DataError(
                f"{path} would be read and then replaced: choose another --output-dir, or read raw rows only"
            )
        if path.exists() and (path.is_dir() or not args.overwrite):
            raise DataError(f"{path} is there already: choose another place, or pass --overwrite")
        if path.exists() and not is_as_written(path, targets, account):
            raise DataError(f"{path} is not as account.json says it was written: move it away, or choose another place")
        parent = existing_folder(path)
        if not parent.is_dir() or not os.access(parent, os.W_OK):
            raise DataError(f"{path} cannot be written: {parent} is not a folder you can write to")
    earlier = account.get("benchmark") and Path(account["benchmark"]["file"])
    if earlier and earlier.exists() and earlier.resolve() not in places:
        raise DataError(
            f"{earlier} asks prompts of the test split to be replaced: pass --safety-benchmark too, or remove it"
        )
    return sources, targets


def sources_of(args):
    """The files of --input and those in --input-dir, each once.  Raises DataError for a folder without any."""
    names = list(args.input or ())
    if args.input_dir:
        folder = Path(args.input_dir)
        paths = [path for path in sorted(folder.rglob("*")) if path.suffix in SUFFIXES]
        shown = [path for path in paths if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
        if not shown:
            raise DataError(f"--input-dir {folder} is no folder with {', '.join(SUFFIXES)} files in it: check the path")
        names += map(str, shown)
    return list({Path(name).resolve(): name for name in names}.values())


def read_account(path):
    """account.json of an earlier run; {} where there is none."""
    try:
        account = json.loads(path.read_text("utf-8"))
        return account if isinstance(account["written"], dict) else {}
    except (OSError, ValueError, TypeError, KeyError):
        return {}


def is_as_written(path, targets, account):
    """Whether an earlier run has written the file as it is now; the account vouches for the others and for itself."""
    written = account.get("written", {})
    if path == targets.account and written:
        return True
    return written_files.sha256(path) == written.get(os.path.relpath(path, targets.account.parent))


def existing_folder(path):
    """The nearest folder above a path that is there."""
    return next(folder for folder in path.absolute().parents if folder.exists())


def write_whole(texts, targets):
    """Write {path: text} to temporary folders, then move all into place; of `targets` nothing older stays."""
    with contextlib.ExitStack() as stack:
        drafts = []
        for path, text in texts.items():
            parent = existing_folder(path)
            written_files.remove_drafts(parent, ".prepare_data-")
            names = {"prefix": ".prepare_data-", "suffix": f".{os.getpid()}"}
            folder = stack.enter_context(tempfile.TemporaryDirectory(dir=parent, **names))
            drafts.append(Path(folder) / "draft")
            drafts[-1].write_text(text, encoding="utf-8")
        for path in reversed(targets.paths()):
            path.unlink(missing_ok=True)
        for draft, path in zip(drafts, texts, strict=True):
            path.parent.mkdir(parents=True, exist_ok=True)
            draft.replace(path)
