"""A JSONL file that is written batch by batch, and after a kill gone on with to the same bytes.

Beside FILE.jsonl stands FILE.jsonl.args.json: `identity` says what the rows depend on, `progress` how far the file is
and what was counted on the way.  It is replaced after each batch: what a killed run wrote behind its last whole batch,
half a line perhaps, is cut off and written again.
"""

import hashlib
import json
import os
from pathlib import Path

from formats import written_files


class OutputError(ValueError):
    """An output file that cannot be used: one sentence for the user."""


class BatchFile:
    """The file at `path`; with `overwrite` one that was written here before is begun anew."""

    def __init__(self, path, overwrite=False):
        self.path, self.overwrite = Path(path), overwrite
        self.record, self.identity = Path(f"{path}.args.json"), None

    def check_place(self, inputs=()):
        """Raise OutputError where it cannot be written, is one of the `inputs` (paths), or is not a file of ours to
        begin anew.  Changes nothing.
        """
        for path in (self.path, self.record):
            if any(written_files.is_same(path, source) for source in inputs):
                raise OutputError(f"{path} would be read and written at once: choose another --output")
        parent = next(folder for folder in self.path.absolute().parents if folder.exists())
        if self.path.is_dir() or not parent.is_dir() or not os.access(parent, os.W_OK):
            what = self.path if self.path.is_dir() else parent
            reason = "is a folder" if self.path.is_dir() else "is not a folder you can write to"
            raise OutputError(f"--output {self.path} cannot be written: {what} {reason}")
        if self.path.exists() and not self.record.exists():
            raise OutputError(f"{self.path} is there already, with no {self.record.name}: choose another --output")
        if self.path.exists() and self.overwrite and not self._is_as_left(self._read()[1]):
            raise OutputError(f"{self.path} was changed since it was written: move it away, or choose another --output")

    def begun(self):
        """(identity, progress) of the file that is gone on with; ({}, {}) where one begins.  Raises OutputError."""
        return ({}, {}) if self.overwrite or not self.record.exists() else self._read()

    def check(self, identity):
        """Progress (a dict) of a file that `identity`, or the rest of what it is a part of, has begun; None: no file.

        Raises OutputError, naming the first difference, for a file begun otherwise, and for one that is finished.
        """
        began, progress = self.begun()
        if not progress:
            return None
        instead = "choose another --output, make it the same, or begin anew with --overwrite"
        for name, here in identity.items():
            if began.get(name) != here:
                raise OutputError(f"{self.path} was begun with {name} {began.get(name)}, now it is {here}: {instead}")
        if progress.get("finished"):
            raise OutputError(f"{self.path} is finished: choose another --output, or begin anew with --overwrite")
        if not self._is_as_left(progress):
            raise OutputError(f"{self.path} was changed since it was written: move it away, or choose another --output")
        return progress

    def _read(self):
        """(identity, progress) of the record.  Raises OutputError."""
        try:
            record = json.loads(self.record.read_text(encoding="utf-8"))
            began, progress = dict(record["identity"]), dict(record["progress"])
            if not isinstance(progress["bytes"], int) or progress["bytes"] < 0:
                raise ValueError("no number of bytes")
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise OutputError(f"{self.record} cannot be read ({error}): choose another --output") from None
        return began, progress

    def _is_as_left(self, progress):
        """Whether the file begins with what was written; behind that a killed run may have left half a batch."""
        written, size = progress["bytes"], self.path.stat().st_size if self.path.exists() else 0
        if written > size or (progress.get("finished") and written < size):
            return False
        known = progress.get("sha256")  # outputs of before it was recorded have none
        return known is None or not written or known == written_files.sha256(self.path, written)

    def begin(self, identity):
        """Open the file behind its last whole batch; its progress, a dict to count in and to hand to `write`."""
        self.identity, progress = identity, self.check(identity) or {"batches": 0, "bytes": 0, "finished": False}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        written_files.remove_drafts(self.path.parent, f".{self.record.name}.")
        self._save(progress)
        with open(self.path, "ab") as file:
            file.truncate(progress["bytes"])
        self.digest = hashlib.sha256(self.path.read_bytes())
        return progress

    def write(self, rows, progress, finished):
        """One batch: its rows, then what progress is with them."""
        lines = "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows).encode()
        with open(self.path, "ab") as file:
            file.write(lines)
        self.digest.update(lines)
        progress.update(batches=progress["batches"] + 1, bytes=progress["bytes"] + len(lines), finished=finished)
        progress.update(sha256=self.digest.hexdigest())
        self._save(progress)

    def _save(self, progress):
        draft = self.record.with_name(f".{self.record.name}.{os.getpid()}")
        draft.write_text(json.dumps({"identity": self.identity, "progress": progress}, indent=1), encoding="utf-8")
        os.replace(draft, self.record)


def files_sha256(paths):
    """sha256 of the bytes of files, for an identity; shortened."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            while piece := file.read(2**20):
                digest.update(piece)
    return digest.hexdigest()[:16]
