"""Which files prepare_data.py reads and writes: checked before anything is read, written whole or not at all."""

import errno
import json
import os
import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from formats import written_files
from formats.json_files import read_object
from formats.row_files import JOURNAL, DataError
from harness import endings, locks
from tools.prepare_pairs import DIMENSIONS, SPLITS

IMAGES = "images"  # where pictures are, in the output folder and in the folder of drafts
SUFFIXES = ".jsonl", ".json", ".csv", ".tsv", ".parquet", ".gz"


class Targets(NamedTuple):
    """Where everything goes."""

    benchmark: Path | None
    pairs: dict  # {(split, dimension): path}
    account: Path
    pictures: list = []  # those of an earlier run, which go

    def paths(self):
        """All of them; the account is the last to be written: with it the folder is whole."""
        return [*self.pictures, *([self.benchmark] if self.benchmark else []), *self.pairs.values(), self.account]

    def drafts(self):
        """The folder of what is not yet in place."""
        return (self.account.parent / JOURNAL).parent


def targets_of(args):
    output = Path(args.output_dir)
    pairs = {(split, name): output / split / f"{name}_pairs.jsonl" for split in SPLITS for name in DIMENSIONS}
    benchmark = Path(args.safety_benchmark) if args.safety_benchmark else None
    return Targets(benchmark, pairs, output / "account.json")


def check_files(args):
    """(files to read, Targets), whose folder nobody else writes to from here on.

    Raises DataError where a file cannot be read or written, and LockedError; changes nothing but to finish what a
    killed run had begun to put in place.
    """
    sources, targets = sources_of(args), targets_of(args)
    places = [path.resolve() for path in targets.paths()]
    if len(set(places)) < len(places):
        raise DataError(f"--safety-benchmark {args.safety_benchmark} is the file of the pairs: name another")
    for path in targets.paths():
        if any(written_files.is_same(path, source) for source in sources):
            raise DataError(
                f"{path} would be read and then replaced: choose another --output-dir, or read raw rows only"
            )
        parent = existing_folder(path)
        if not parent.is_dir() or not os.access(parent, os.W_OK):
            raise DataError(f"{path} cannot be written: {parent} is not a folder you can write to")
    locks.hold(targets.account.with_name(".lock"), f"--output-dir {args.output_dir}", endings.say)
    may_replace = put_in_place(targets.account.parent) or args.overwrite
    account = read_account(targets.account)
    earlier = [Path(name) for name in account.get("written", {}) if Path(name).parent == Path(IMAGES)]
    targets = targets._replace(pictures=[targets.account.parent / path for path in earlier])
    for path in targets.paths():
        if path.exists() and (path.is_dir() or not may_replace):
            raise DataError(f"{path} is there already: choose another place, or pass --overwrite")
        if path.exists() and not is_as_written(path, targets, account):
            raise DataError(f"{path} is not as account.json says it was written: move it away, or choose another place")
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
        account = read_object(path)
        return account if isinstance(account["written"], dict) else {}
    except (OSError, ValueError, TypeError, KeyError):
        return {}


def is_as_written(path, targets, account):
    """Whether an earlier run has written the file as it is now; the account vouches for the others and for itself."""
    written = account.get("written", {})
    if path == targets.account and written:
        return True
    return written_files.sha256(path) == written.get(os.path.relpath(path, targets.account.parent))


@contextmanager
def no_drafts_left(targets):
    """Remove the folder of drafts, with the pictures that were read, however the run ends."""
    try:
        yield
    finally:
        if not (targets.account.parent / JOURNAL).exists():
            shutil.rmtree(targets.drafts(), ignore_errors=True)


def existing_folder(path):
    """The nearest folder above a path that is there."""
    return next(folder for folder in path.absolute().parents if folder.exists())


# -- all or nothing ----------------------------------------------------------------------------------------------------
#
# All files are written to a folder of drafts.  Its journal.json, which says where each draft goes, makes them count: a
# kill before it leaves the old files, and after it the next start puts in place what was not yet.  Until then whoever
# reads rows there is told so (formats/row_files.py).


def write_whole(texts, pictures, targets):
    """Write {path: text}, and the pictures of these names, which are drafts already; of `targets` nothing older stays.

    Call it within no_drafts_left.
    """
    output, drafts = targets.account.parent, targets.drafts()
    drafts.mkdir(exist_ok=True)
    journal = {"new": {}, "old": [os.path.relpath(path, output) for path in reversed(targets.paths())]}
    journal["new"] |= {f"{IMAGES}/{name}": f"{IMAGES}/{name}" for name in pictures}
    if pictures and hasattr(os, "sync"):
        os.sync()  # of all at once: one by one they take 6 ms each, and there may be 100,000
    for number, (path, text) in enumerate(texts.items()):
        (drafts / str(number)).write_text(text, encoding="utf-8")
        written_files.sync(drafts / str(number))
        journal["new"][str(number)] = os.path.relpath(path, output)
    (drafts / "draft").write_text(json.dumps(journal), encoding="utf-8")
    written_files.sync(drafts / "draft")
    written_files.sync(drafts)
    with endings.held():
        (drafts / "draft").replace(output / JOURNAL)
        put_in_place(output)


def put_in_place(output):
    """Finish what the drafts of a folder hold, or remove what is not complete; whether something was to be finished."""
    drafts = (output / JOURNAL).parent
    if is_complete := (output / JOURNAL).exists():
        journal = read_object(output / JOURNAL)
        if all((drafts / number).exists() for number in journal["new"]):  # none is in place yet
            for name in journal["old"]:  # the account first: without it the folder is not whole
                (output / name).unlink(missing_ok=True)
        for number, name in journal["new"].items():  # and last
            if (drafts / number).exists():
                move(drafts / number, output / name)
    shutil.rmtree(drafts, ignore_errors=True)
    return is_complete


def move(draft, path):
    """A rename; where another disk is, a copy that appears whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        draft.replace(path)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        beside = path.with_name(f".{path.name}.draft")
        shutil.copyfile(draft, beside)
        written_files.sync(beside)
        beside.replace(path)
        draft.unlink()
