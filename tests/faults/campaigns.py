"""What the campaigns share: programs in forks of this process, which are killed or get a signal at a counted event, and
what they leave.

An event is what a program does to the files below its folder (open to write, write of a whole safetensors file, rename,
remove, mkdir, rmdir, truncate, fsync), and on demand each forward pass of a model.  The same command has the same
events, so that a number says where it was; FAULTS_SEED moves the numbers, and a failure says which they were.
"""

import atexit
import functools
import json
import os
import random
import shlex
import signal
import sys
import traceback
from pathlib import Path
from typing import NamedTuple

import pytest
import safetensors.torch
import torch
from processes import fork
from runs import run_script
from worlds import QUICK, words_of

SEED = int(os.environ.get("FAULTS_SEED", 0))
WRITES = os.O_WRONLY | os.O_RDWR
CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink"}
LOGS = "out.log", "err.log", "events.log"
NOT_THE_SAME = "args.json", "manifest.json", *LOGS  # of a run that goes on: it names --resume
DRAFTS = ".saving-*", "*.unfinished", ".prepare_data", ".toy_world-*", ".manifest.json.*", ".*.args.json.*"


class Ended(NamedTuple):
    """A program in a fork that has ended."""

    code: int  # negative: the signal that killed it
    out: str
    err: str
    events: list  # what each was, in words
    folder: Path
    words: str  # the command

    @property
    def command(self):
        return f"cd {self.folder}; {self.words}"

    @property
    def last(self):
        """The last event, before which or at which it ended."""
        return self.events[-1].replace(f"{self.folder}/", "") if self.events else "the first"

    def __str__(self):
        return f"exit code {self.code}; {self.err[-1500:]}"


def run(script, words, folder, at_event=None, forwards=False, limit=120, prepare=None):
    """A script (a module) with `words` in a fork that stands in `folder`; Ended.

    at_event(number, what) is called before each event, from 1.  forwards: forward passes are events too.
    prepare(): called in the fork before the script.
    """
    folder.mkdir(parents=True, exist_ok=True)
    logs = [folder / name for name in LOGS]
    words = [str(word) for word in words]
    code = fork(functools.partial(_be_program, script, words, folder, logs, at_event, forwards, prepare), limit)
    out, err, events = (log.read_text("utf-8", "replace") for log in logs)
    return Ended(code, out, err, events.splitlines(), folder, f"{script.__name__}.py {shlex.join(words)}")


def _be_program(script, words, folder, logs, at_event, forwards, prepare):
    atexit._clear()  # of the tests' own process
    handles = [os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) for log in logs]
    os.dup2(handles[0], 1)
    os.dup2(handles[1], 2)
    sys.stdout = os.fdopen(1, "w", 1, encoding="utf-8", closefd=False)
    sys.stderr = os.fdopen(2, "w", 1, encoding="utf-8", closefd=False)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(folder)
    torch.set_num_threads(1)
    code = 1
    try:
        if prepare:
            prepare()
        watch(folder, handles[2], at_event, forwards)
        run_script(words, script)
        code = 0
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(code)


def watch(folder, log, at_event, forwards):
    """Count the events of this process below `folder`, write each to the open file `log`, and call at_event."""
    folder, number, is_ours = str(folder.resolve()), 0, False
    quiet = {str(Path(folder) / name) for name in LOGS}

    def event(what, path, handle=-1):
        nonlocal number, is_ours
        if is_ours:  # what at_event does itself
            return
        if path is not None:
            beside = os.readlink(f"/proc/self/fd/{handle}") if handle not in (-1, None) else ""
            path = os.path.abspath(os.path.join(beside, os.fsdecode(path)))
            if not path.startswith(folder + os.sep) or path in quiet:
                return
        number += 1
        os.write(log, f"{what} {path or ''}\n".encode())
        if at_event:
            is_ours = True
            at_event(number, what, path)
            is_ours = False

    def hook(name, given):
        if name == "open" and isinstance(given[0], str | bytes | os.PathLike) and given[2] & WRITES:
            event("open", given[0])
        elif name in CHANGES and not isinstance(given[0], int):
            event(name[3:], given[0], -1 if name == "os.truncate" else given[-1])  # the last is the folder's handle

    def fsync(handle, plain=os.fsync):
        event("fsync", os.readlink(f"/proc/self/fd/{handle}"))
        plain(handle)

    def serialize_file(tensors, path, *more, plain=safetensors.torch.serialize_file, **named):
        event("open", path)  # its library writes past Python
        plain(tensors, path, *more, **named)

    os.fsync, safetensors.torch.serialize_file = fsync, serialize_file
    if forwards:
        first = lambda module, _: event("forward", None) if isinstance(module, torch.nn.Embedding) else None  # noqa: E731
        torch.nn.modules.module.register_module_forward_pre_hook(first)
    sys.addaudithook(hook)


def kill_at(number, torn=False):
    """at_event: SIGKILL before event `number`; torn: and the file that was just opened has half of what came to it."""
    last = []

    def at_event(here, what, path):
        if here == number:
            if torn and last and os.path.isfile(last[0]):
                os.truncate(last[0], (last[1] + os.path.getsize(last[0])) // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        last[:] = [path, os.path.getsize(path) if os.path.exists(path) else 0] if what == "open" else []

    return at_event


def signal_at(number, *signals):
    """at_event: the signals, at event `number`."""

    def at_event(here, *_):
        if here == number:
            for asked in signals:
                os.kill(os.getpid(), asked)

    return at_event


def points(count, most, name):
    """Some `most` numbers of 1 .. count + 1, equally far apart, drawn by the seed and a name."""
    step = max(1.0, (count + 1) / most)
    first = random.Random(f"{SEED} {name}").uniform(0, step)
    return sorted({int(first + place * step) + 1 for place in range(most) if first + place * step < count + 1})


def contents(folder, but=()):
    """{name: bytes} of all files below a folder, without those of these names."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in but]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def visible(folder):
    """`contents` without drafts, which nobody reads, and locks."""
    files = contents(folder, LOGS)
    return {name: content for name, content in files.items() if not any(part[0] == "." for part in name.split("/"))}


def difference(one, other):
    """The first name that two `contents` do not have alike, in words; None where they are the same."""
    for name in sorted(one.keys() | other.keys()):
        if one.get(name) != other.get(name):
            return f"{name} is {'missing' if name not in one else 'new' if name not in other else 'another'}"
    return None


def drafts(folder):
    """What an ended run may not leave: files and folders that were to become others."""
    return [str(path.relative_to(folder)) for pattern in DRAFTS for path in folder.rglob(pattern)]


def is_sentence(ended):
    """Whether it ended as a mistake of the user's does: exit code 2 and one line, but for the toy world's, a lock's."""
    others = "toy world: building ", "its lock is taken over"
    lines = [line for line in ended.err.splitlines() if not any(other in line for other in others)]
    return ended.code == 2 and len(lines) == 1


# -- what is run -------------------------------------------------------------------------------------------------------

SAMPLE = "--max-new-tokens 6 --num-samples 12 --device cpu --dtype fp32".split()
SIZE = "--batch-size 4 --gradient-accumulation-steps 2 --learning-rate 1e-3 --max-steps 4 --num-samples 24".split()
SAVES = "--save-steps 2 --save-total-limit 1 --eval-steps 2".split()


def words_of_run(script, world):
    """A run of four updates with dropout, two checkpoints and three evaluations, into out/."""
    words = ["--model", world / "model", *words_of(script, world, dropout=0.1), *QUICK, *SIZE, *SAVES]
    return [*words, "--output-dir", "out"]


def raw_rows(count, seed):
    """Raw rows of random letters, for prepare_data.py."""
    draw = random.Random(f"{SEED} {seed}")
    word = lambda: "".join(draw.choices("abcdefgh", k=6))  # noqa: E731
    ids = {"better_response_id": 0, "safer_response_id": 1, "is_response_0_safe": False, "is_response_1_safe": True}
    return [{"prompt": word(), "response_0": word(), "response_1": word(), **ids} for _ in range(count)]


# -- what is said ------------------------------------------------------------------------------------------------------


class Tally:
    """The cases of a campaign; `done` fails with all that went wrong, and says the counts at the end of the tests."""

    def __init__(self, request):
        self.request, self.counts, self.failures, self.command = request, {}, [], ""

    def count(self, what, number=1):
        self.counts[what] = self.counts.get(what, 0) + number

    def fail(self, sentence):
        self.failures.append(sentence)

    def done(self):
        self.request.node.user_properties.append(("counts", json.dumps(self.counts)))
        if self.failures:
            shown = "\n\n".join(self.failures[:12])
            text = f"{len(self.failures)} failures of {self.counts}, FAULTS_SEED={SEED}: {self.command}\n{shown}"
            pytest.fail(text, pytrace=False)


def damaged(content, kind, draw):
    """Bytes with one bit changed, or cut."""
    place = draw.randrange(len(content))
    if kind == "cut":
        return content[:place]
    return content[:place] + bytes([content[place] ^ (1 << draw.randrange(8))]) + content[place + 1 :]
