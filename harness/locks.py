"""One writer per place: a lock file that names its holder.

The system takes a lock (flock) back however its process ends, so that one left behind by a kill locks nobody out: what
then still stands in the file is only what the next holder says of the one before.
"""

import contextlib
import json
import os
import socket
import time
from pathlib import Path
from typing import NamedTuple

from formats.user_errors import UserError

try:
    import fcntl
except ImportError:  # Windows has none: there two runs are not told apart
    fcntl = None


class LockedError(UserError):
    """Somebody else writes there: one sentence for the user."""


class Held(NamedTuple):
    path: Path
    handle: int
    made: list  # the folders that were made for it, the innermost first


HELD = []  # by this process


def hold(path, what, say=None, waits=False):
    """Take the lock file `path` until `release` or the end of this process, making its folder.

    what: the place, as the user named it.  say(sentence): gets a word about a holder that was killed.  Where somebody
    has it: raises LockedError, or waits.
    """
    path = Path(path)
    made = [folder for folder in path.parents if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    while (handle := _locked(path)) is None and waits:
        time.sleep(0.05)
    if handle is None:
        raise LockedError(f"{what} is being written by another run ({holder(path)}): wait for it, or choose another")
    HELD.append(Held(path, handle, made))
    if (before := holder(path)) and fcntl and say:
        say(f"{what}: the run before ({before}) was killed; its lock is taken over")
    record = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
    os.truncate(handle, 0)
    os.pwrite(handle, json.dumps(record).encode(), 0)


def release(path=None):
    """Give back the lock of `path`, or all; of folders that were made for one, those that stayed empty go."""
    for held in [held for held in HELD if path is None or held.path == Path(path)]:
        HELD.remove(held)
        with contextlib.suppress(OSError):  # the folder may be gone, or not be ours to write any more
            held.path.unlink()
        os.close(held.handle)
        with contextlib.suppress(OSError):  # not empty
            for folder in held.made:
                folder.rmdir()


def clear(path):
    """Remove the lock file of a process that was killed."""
    with contextlib.suppress(OSError):  # a folder that is not ours to write to
        handle = _locked(path) if path.exists() else None
        if handle is not None:
            path.unlink()
            os.close(handle)


def holder(path):
    """Who has written a lock file, in words; "" for an empty one."""
    try:
        record = json.loads(Path(path).read_text(encoding="utf-8"))
        return f"process {record['pid']} on {record['host']}, since {record['since']}"
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return ""


def _locked(path):
    """A handle that holds the lock of the file now at `path`; None where somebody else does."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if fcntl:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            return None
        except OSError:  # a file system without locks
            pass
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), os.stat(path)):
                return handle
        os.close(handle)  # its holder has just removed it: that lock is of no file any more
