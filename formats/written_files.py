"""The record of what was written: manifest.json names the files of its folder and below, each with size and sha256.

    {"adapter_config.json": {"size": 712, "sha256": "..."}, "merged/model.safetensors": {...}}

It answers two questions.  Is a folder whole?  It is when its files are as listed: our loaders ask (`damage`).  Whose is
a file?  One that is as listed is ours: `remove` takes those and nothing else, so what a user added or changed stays.
A name is listed before its file is moved into place: a kill at any moment leaves listed files, or missing ones.
"""

import fnmatch
import hashlib
import json
import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import NamedTuple

NAME = "manifest.json"
ADAPTER = "adapter_config.json", "adapter_model.safetensors"
WHOLE_MODEL = "config.json", "*.safetensors", "*.safetensors.index.json"
# Flags that name what is read: folders, files, hub ids, or a list of them.
READ = """model tokenizer_name ref_model_path adapter adapters helpful_rm_path harmless_rm_path reward_model reward_fn
    dataset eval_dataset dataset_path test_dataset_path train_helpful_path train_harmless_path val_helpful_path
    val_harmless_path prompt_embedding_path prompts resume""".split()


# -- the record ------------------------------------------------------------------------------------------------------


def sha256(path, size=sys.maxsize):
    """sha256 of a file's first `size` bytes: all of them, if no size is given."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(min(size, 1 << 20)):
            digest.update(piece)
            size -= len(piece)
    return digest.hexdigest()


def entry(path):
    """What a manifest says of a file."""
    return {"size": path.stat().st_size, "sha256": sha256(path)}


def entries(folder):
    """{name: entry} of all files of a folder and below but its own manifest; the names are as POSIX writes them."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / NAME)
    return dict(zip([path.relative_to(folder).as_posix() for path in paths], _of_each(entry, paths), strict=True))


def _of_each(work, *values):
    """list(map(work, *values)), in threads where there are several: hashing lets other threads run."""
    if len(values[0]) < 2:  # as a page drawn at the exit, where no thread starts any more
        return list(map(work, *values))
    with ThreadPoolExecutor() as pool:
        return list(pool.map(work, *values))


def read(folder, name=NAME):
    """{name: entry} of a folder's manifest; {} where there is none, or one that is not ours."""
    try:
        files = json.loads(_text(Path(folder) / name))
        if files.keys() == {"key", "files"}:  # as toy worlds had it before
            files = {file: {"sha256": sha} for file, sha in files["files"].items()}
        ours = all(isinstance(e.get("size", 0), int) and isinstance(e["sha256"], str) for e in files.values())
        inside = not any(PurePosixPath(file).is_absolute() or ".." in PurePosixPath(file).parts for file in files)
        return files if ours and inside else {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return {}


def _text(path):
    """What a file holds.  Raises OSError; for a pipe too, of which no end may come."""
    if not path.is_file():
        raise FileNotFoundError(path)
    return path.read_text(encoding="utf-8")


def write(folder, files, name=NAME):
    """Write a manifest; it appears whole or not at all."""
    draft = folder / f".{name}.{os.getpid()}"
    draft.write_text(json.dumps(files, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    sync(draft)
    os.replace(draft, folder / name)


def sync(path):
    """Flush a file or folder to the disk.  Windows flushes only what is open for writing, and no folder."""
    if os.name == "nt" and path.is_dir():
        return
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def is_as_listed(path, entry):
    """Whether a file is what its entry says; a log that a killed run was writing may be longer (`grows`)."""
    try:
        size = path.stat().st_size
        listed = entry.get("size", size)
        may_be = path.is_file() and (size == listed or (size > listed and entry.get("grows", False)))
        return may_be and sha256(path, listed) == entry["sha256"]
    except OSError:
        return False


def unlike(folder, names):
    """Those of the names that a folder's manifest lists and that are not as listed."""
    listed = read(folder)
    names = [name for name in names if name in listed]
    whole = _of_each(is_as_listed, [folder / name for name in names], [listed[name] for name in names])
    return [name for name, is_whole in zip(names, whole, strict=True) if not is_whole]


def damage(folder, *patterns):
    """A sentence about the first file of these names that is not as the folder's manifest lists it, or None.

    A folder without a manifest, or that lists no such file, is somebody else's: there is nothing to compare with.
    """
    folder = Path(folder)
    wrong = unlike(folder, [n for n in read(folder) if any(fnmatch.fnmatchcase(n, pattern) for pattern in patterns)])
    if not wrong:
        return None
    fault = "is not what was written there" if (folder / wrong[0]).exists() else "is missing"
    return (
        f"{folder / wrong[0]} {fault}: train it again, or --resume auto if the run was killed; if you changed it "
        f"yourself, remove {folder / NAME}"
    )


def remove_drafts(folder, prefix):
    """Remove the files and folders PREFIX... .PID of a folder, where no such process is left."""
    for path in Path(folder).glob(".*"):
        pid = path.name.rpartition(".")[2]
        if path.name.startswith(prefix) and pid.isdecimal() and not _is_running(int(pid)):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def _is_running(pid):
    """Whether a process of this machine has the number `pid`, as far as can be told."""
    if os.name == "nt":  # where signal 0 is Ctrl-C
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):  # another user's; no number of a process
        pass
    return True


# -- moving and removing ---------------------------------------------------------------------------------------------


def put(draft, folder, name=NAME, grows=()):
    """Move what the folder `draft` holds into `folder`, in place of what has these names there.

    The manifest (`name`) goes first: old files make way, new ones are listed, new ones come.  Killed in between, the
    folder lacks files and cannot be taken for whole.  grows: names of logs that will become longer.
    """
    new = entries(draft)
    for file in new:
        sync(draft / file)
        if file in grows:
            new[file]["grows"] = True
    write(draft, read(folder, name) | new, name)
    for file in new:
        (folder / file).unlink(missing_ok=True)
    os.replace(draft / name, folder / name)
    for file in new:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.move(draft / file, folder / file)  # a rename, or a copy where a link leads to another disk
    sync(folder)


def remove(folder):
    """Remove the files that are as the folder's manifest lists them, it too, and folders that are empty then."""
    files = read(folder)
    if not files:
        return
    changed = unlike(folder, files)
    for name in files.keys() - changed:
        (folder / name).unlink()
    (folder / NAME).unlink()
    below = {folder / parent for name in files for parent in PurePosixPath(name).parents}
    for path in sorted(below, key=lambda path: len(path.parts), reverse=True):
        with suppress(OSError):  # not empty: something of the user's is in it
            path.rmdir()


def replace(folder, made):
    """Put the new folder `made` in the place of what `folder`'s manifest lists; files of the user's stay.

    Returns the path of one that is in the way, and then has changed nothing; else None.
    """
    new, old = entries(made), read(folder)
    if os.path.lexists(folder) and not folder.is_dir():
        return folder
    names = [*new, *(parent.as_posix() for name in new for parent in PurePosixPath(name).parents[:-1])]
    for name in names if old else [*names, NAME]:
        path = folder / name
        if name not in old and os.path.lexists(path) and not (name not in new and path.is_dir()):
            return path
    write(made, new)
    remove(folder)
    try:
        made.rename(folder)
    except OSError:  # files of the user's are there
        put(made, folder)
    return None


# -- what is read and what is written --------------------------------------------------------------------------------


class Input(NamedTuple):
    flag: str  # as the user types it, with its value
    is_resume: bool
    path: Path


def inputs(args, toy="outputs/toy_world"):
    """The Inputs of `args`: all that the flags say to read, and that is on this machine."""
    found = []
    for name in READ:
        given = getattr(args, name, None) or []
        for value in given if isinstance(given, list) else [given]:
            value = value[1] if isinstance(value, tuple) else value  # NAME=DIR
            path = toy if value == "toy" else value
            if name == "reward_fn":  # FILE:FUNCTION
                path = value.rpartition(":")[0]
            asks_for_none = name == "resume" and value in ("none", "auto")
            if os.path.exists(path) and not asks_for_none:
                found.append(Input(f"--{name.replace('_', '-')} {value}", name == "resume", Path(path)))
    return found


def is_same(path, other):
    """Whether two paths are one file or folder, by links too, and in whatever spelling the disk takes for it."""
    return os.path.exists(path) and os.path.exists(other) and os.path.samefile(path, other)


def clash(args, replaced):
    """A sentence about an output folder that is read, or in which something is that would be replaced, or None.

    replaced: patterns of the names that the script replaces in --output-dir.  Other inputs may be in it: they stay.
    """
    for output in ("output_dir", "cache_dir", "logging_dir"):
        place = getattr(args, output, None)
        output_flag = f"--{output.replace('_', '-')} {place}"
        for source in inputs(args) if place else ():
            if is_same(place, source.path):
                return f"{output_flag} is {source.flag}, which is read: choose another place to write to"
            path = source.path.resolve()
            around = next((folder for folder in path.parents if is_same(folder, place)), None)
            if around is None or output != "output_dir" or source.is_resume:
                continue
            name = path.relative_to(around)
            is_ours = any(fnmatch.fnmatch(name.parts[0], pattern) for pattern in replaced)
            if is_ours or name.as_posix() in read(place):
                advice = "choose another place to write to"
                return f"{source.flag} is read, and would be replaced in {output_flag}: {advice}"
    return None
