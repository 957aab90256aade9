"""The folder of a toy world: written whole or not at all, once for a recipe and seed; and a world as a command."""

import argparse
import os
import sys
import tempfile
from pathlib import Path

from formats import written_files
from formats.row_files import DataError


def _is_complete(folder: Path, key: str) -> bool:
    files = written_files.read(folder)
    missing = [name for name in files if not (folder / name).exists()]
    if changed := written_files.unlike(folder, files.keys() - missing):
        raise DataError(f"{folder / min(changed)} was changed since the toy world was made: move it away or remove it")
    return "recipe.txt" in files and not missing and (folder / "recipe.txt").read_text() == key


def build_once(folder, key: str, write, duration: str) -> Path:
    """Write a world under `folder` by `write(empty folder)`, unless it is there already, whole and of this key, which
    stands for its recipe and seed.

    Replaces what was written there before and nothing else.  Raises DataError for a file of the user's in its place.
    """
    folder = Path(folder)
    written_files.remove_drafts(folder.parent, f".{folder.name}-")
    if _is_complete(folder, key):
        return folder
    print(f"toy world: building {folder} (once, about {duration})", file=sys.stderr, flush=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    names = {"prefix": f".{folder.name}-", "suffix": f".{os.getpid()}"}
    with tempfile.TemporaryDirectory(dir=folder.parent, **names) as temporary:
        (made := Path(temporary) / "made").mkdir()
        write(made)
        (made / "recipe.txt").write_text(key)
        if _is_complete(folder, key):  # another process has put an equal one there
            return folder
        if taken := written_files.replace(folder, made):
            raise DataError(f"{taken} is in the place of a file of the toy world: move it away")
    return folder


def main(build, what: str):
    """A toy world as a command: python FILE DIR."""
    parser = argparse.ArgumentParser(description=f"Write {what}.")
    parser.add_argument("folder", metavar="DIR", help="where it goes; stays as it is where it is whole")
    try:
        print(f"saved to {build(parser.parse_args().folder)}")
    except DataError as error:
        parser.error(str(error))
