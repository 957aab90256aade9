"""The logs of a run: metrics.jsonl, which every number goes to, lambda.jsonl of Safe-MM-DPO, curves.html, and what
--report-to names.

A checkpoint does not hold the history: it notes how long each log was, and its sha256 (`marks`), and a run that goes on
from there cuts the logs back to that.
"""

import atexit
import hashlib
import json
import math
import os
from contextlib import suppress
from pathlib import Path

from tqdm import tqdm

from formats import written_files
from harness import trackers, training_curves
from harness.run_files import flags_to_show, goes_on, remove_drafts, remove_run, whole_files

LOGS = "metrics.jsonl", "lambda.jsonl"


class MetricsLog:
    """The logs, and the history of trainer_state.json; does nothing but on rank 0.

    Making one starts the run's folder: what an earlier run left there (--overwrite) goes now, and not before.
    checkpoint, step, marks: what a resumed run goes on from, its update, and the `marks` that are in it.
    """

    def __init__(self, args, is_main, checkpoint=None, step=0, marks=None):
        self.is_main, self.history, self.trackers = is_main, [], []
        if not is_main:
            return
        self.folder = folder = Path(args.output_dir)
        self.path = folder / "metrics.jsonl"
        self.unwritten, self.has_failed = {}, False  # {path: lines}
        remove_drafts(folder)
        logs = {name: _lines(checkpoint, name, mark, step) for name, mark in (marks or {self.path.name: None}).items()}
        self.history = [json.loads(line) for line in logs[self.path.name].splitlines()]
        here = goes_on(args, checkpoint)
        if not here and (args.overwrite or written_files.read(folder)) and (left := remove_run(folder)):
            tqdm.write(left)
        folder.mkdir(parents=True, exist_ok=True)
        with whole_files(folder, grows=logs) as draft:
            text = json.dumps(flags_to_show(args), indent=2, ensure_ascii=False) + "\n"
            (draft / "args.json").write_text(text, encoding="utf-8")
            for name in () if here else logs:
                (draft / name).write_bytes(logs[name])
        if here:
            self._cut_back(logs)
        atexit.register(self.draw)  # however the run ends
        self.logs = Path(args.logging_dir or folder / "logs")
        self.before = set(self.logs.rglob("*"))
        self._start_trackers(args)
        self._list(self._tracked(), grows=True)

    def _cut_back(self, logs):
        """Leave the lines {name: bytes} in the logs.  Killed at any moment, they have these at least."""
        self._note(logs)
        for name, lines in logs.items():
            path = self.folder / name
            if path.exists() and path.read_bytes().startswith(lines):
                os.truncate(path, len(lines))
            else:
                draft = self.folder / f".saving-{name}"
                draft.write_bytes(lines)
                os.replace(draft, path)

    def _start_trackers(self, args):
        if "auto" in args.report_to and not trackers.is_installed("tensorboard"):
            where = "metrics.jsonl and curves.html have the same numbers"
            tqdm.write(f"TensorBoard is not installed (bash setup.sh tensorboard): no event files, {where}")
        for name in trackers.chosen(args):
            self.logs.mkdir(parents=True, exist_ok=True)
            write, _ = tracker = trackers.TRACKERS[name](args, flags_to_show(args), self.logs, self.history)
            self.trackers.append(tracker)
            for entry in self.history if name != "tensorboard" else ():  # which has them from before
                numbers = {key: entry[key] for key in entry if key not in ("step", "epoch")}
                write(trackers.tagged(numbers), step=entry["step"])

    def _tracked(self):
        """The files that the trackers of this run have written so far."""
        found = {path for pattern in trackers.FILES for path in self.logs.glob(pattern)} - self.before
        return [path.resolve() for path in found if path.is_file()]

    def write(self, step, epoch, metrics):
        """One line of metrics {name: float}, which trackers get too; an evaluation draws curves.html."""
        if not self.is_main:
            return
        entry = {"step": step, "epoch": round(epoch, 4)}
        entry |= {name: value if math.isfinite(value) else None for name, value in metrics.items()}  # NaN is not JSON
        self.history.append(entry)
        self._append(self.path, entry)
        for write, _ in self.trackers:
            write(trackers.tagged(metrics), step=step)
        if any(name.startswith("eval_") for name in metrics):
            self.draw()

    def write_lambda(self, step, numbers):
        """One line of lambda.jsonl: what moves at each update and costs nothing to know."""
        if self.is_main:
            entry = {"step": step} | {name: value for name, value in numbers.items() if math.isfinite(value)}
            self._append(self.folder / "lambda.jsonl", entry)

    def _append(self, path, entry):
        self.unwritten[path] = self.unwritten.get(path, "") + json.dumps(entry) + "\n"
        self._catch_up()

    def _catch_up(self):
        """Write the lines that are not in the logs yet.  A full disk is no reason to end a run: they come later."""
        for path, lines in list(self.unwritten.items()):
            size = path.stat().st_size if path.exists() else 0
            try:
                if not path.exists():
                    self._note({path.name: b""})
                with open(path, "a", encoding="utf-8") as file:
                    file.write(lines)
                del self.unwritten[path]
            except OSError as error:
                with suppress(OSError):
                    os.truncate(path, size)  # half a line
                if not self.has_failed:
                    tqdm.write(f"{path} cannot be written ({error.strerror}): training goes on, and it is tried again")
                self.has_failed = True

    def marks(self):
        """{name: size and sha256} of the logs as they are, for a checkpoint."""
        if not self.is_main:
            return {}
        self._catch_up()
        paths = [path for path in (self.folder / name for name in LOGS) if path.exists()]
        for path in paths:
            written_files.sync(path)
        return {path.name: written_files.entry(path) for path in paths}

    def draw(self):
        """curves.html, whole or as it was: a page that cannot be written is no reason to end a run."""
        if not self.history:
            return
        last, page = self.history[-1], self.folder / "curves.html"
        lead = f"Up to update {last['step']}, epoch {last['epoch']:g}. The numbers are in metrics.jsonl."
        try:
            if not page.exists():
                tqdm.write(f"curves: {page}, for a browser; drawn anew at each evaluation and at the end")
            curves = training_curves.of_run(self.folder)
            with whole_files(self.folder) as draft:
                text = training_curves.page(self.folder.resolve().name, lead, curves)
                (draft / page.name).write_text(text, encoding="utf-8")
        except OSError as error:
            tqdm.write(f"{page} cannot be written ({error}): training goes on")

    def close(self):
        """At the end of the run.  The logs are as long as they get: they are ours as they are, and no longer."""
        for _, close in self.trackers:
            close()
        if self.is_main:
            self._catch_up()
            self.draw()
            atexit.unregister(self.draw)
            self._list([self.path, self.folder / "lambda.jsonl", *self._tracked()])

    def _list(self, paths, **grows):
        folder = self.folder.resolve()
        paths = [path.resolve() for path in paths]
        inside = {path.relative_to(folder).as_posix(): path for path in paths if path.is_relative_to(folder)}
        new = {name: written_files.entry(path) | grows for name, path in inside.items() if path.exists()}
        written_files.write(folder, written_files.read(folder) | new)

    def _note(self, logs):
        """List logs {name: bytes} as they are, and as what will become longer."""
        new = {name: {"size": len(lines), "sha256": hashlib.sha256(lines).hexdigest()} for name, lines in logs.items()}
        new = {name: entry | {"grows": True} for name, entry in new.items()}
        written_files.write(self.folder, written_files.read(self.folder) | new)


def _lines(checkpoint, name, mark, step):
    """The lines of a log, as bytes, that stood there when a checkpoint was written: it has noted their `mark`.

    Where they have changed since: those that can be read, of its update `step` at the latest.
    """
    if not mark:
        return b""
    path = checkpoint.parent / name
    lines = path.read_bytes() if path.is_file() else b""
    if hashlib.sha256(lines[: mark["size"]]).hexdigest() == mark["sha256"]:
        return lines[: mark["size"]]
    tqdm.write(f"{path} is not as {checkpoint.name} has noted it: what can be read of it up to step {step} is kept")
    return b"".join(line for line in lines.splitlines(keepends=True) if _is_up_to(line, step))


def _is_up_to(line, step):
    with suppress(ValueError, TypeError, KeyError, RecursionError):
        return 0 <= json.loads(line)["step"] <= step and line.endswith(b"\n")
    return False
