"""A JSONL file that is written batch by batch, and after a kill gone on with to the same bytes.

Beside FILE.jsonl stands FILE.jsonl.args.json: `identity` says what the rows depend on, `progress` how far the file is
and what was counted on the way.  It is replaced after each batch: what a killed run wrote behind its last whole batch,
half a line perhaps, is cut off and written again.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import NamedTuple

from formats import json_files, written_files
from formats.user_errors import UserError


class OutputError(UserError):
    """An output file that cannot be used: one sentence for the user."""


class Record(NamedTuple):
    """What FILE.jsonl.args.json says."""

    identity: dict  # what the rows depend on, {name: value}
    progress: dict  # "bytes" and "batches" written, whether "finished", and what else is counted


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
        if self.path.is_dir():
            raise OutputError(f"--output {self.path} cannot be written: {self.path} is a folder")
        if not parent.is_dir() or not os.access(parent, os.W_OK):
            raise OutputError(f"--output {self.path} cannot be written: {parent} is not a folder you can write to")
        if self.path.exists() and not self.record.exists():
            raise OutputError(f"{self.path} is there already, with no {self.record.name}: choose another --output")
        if self.path.exists() and self.overwrite and not self._is_as_left(self._read().progress):
            raise OutputError(f"{self.path} was changed since it was written: move it away, or choose another --output")

    def check(self, identity):
        """The Record of a file that `identity`, or the rest of what it is a part of, has begun; None: no file.

        Raises OutputError, naming the first difference, for a file begun otherwise, and for one that is finished.
        """
        if self.overwrite or not self.record.exists():
            return None
        record = self._read()
        instead = "choose another --output, make it the same, or begin anew with --overwrite"
        for name, here in identity.items():
            there = record.identity.get(name)
            if there != here:
                raise OutputError(f"{self.path} was begun with {name} {there}, now it is {here}: {instead}")
        if record.progress.get("finished"):
            raise OutputError(f"{self.path} is finished: choose another --output, or begin anew with --overwrite")
        if not self._is_as_left(record.progress):
            raise OutputError(f"{self.path} was changed since it was written: move it away, or choose another --output")
        return record

    def _read(self):
        """The Record on the disk.  Raises OutputError."""
        try:
            content = json_files.read_object(self.record)
            is_ours = content["sha256"] == _sha256(content["identity"], content["progress"])
        except (OSError, ValueError, KeyError) as error:
            raise OutputError(f"{self.record} cannot be read ({error}): choose another --output") from None
        if not is_ours:
            raise OutputError(f"{self.record} was changed since it was written: choose another --output")
        return Record(content["identity"], content["progress"])

    def _is_as_left(self, progress):
        """Whether the file begins with what was written; behind that a killed run may have left half a batch."""
        written, size = progress["bytes"], self.path.stat().st_size if self.path.exists() else 0
        if written > size or (progress.get("finished") and written < size):
            return False
        sha256 = progress.get("sha256")  # outputs of before it was recorded have none
        return sha256 is None or not written or sha256 == written_files.sha256(self.path, written)

    def begin(self, identity):
        """Open the file behind its last whole batch; its progress, a dict to count in and to hand to `write`."""
        record, self.identity = self.check(identity), identity
        progress = record.progress if record else {"batches": 0, "bytes": 0, "finished": False}
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
        content = {"identity": self.identity, "progress": progress, "sha256": _sha256(self.identity, progress)}
        try:
            draft.write_text(json.dumps(content, indent=1), encoding="utf-8")
            os.replace(draft, self.record)
        finally:
            draft.unlink(missing_ok=True)


def _sha256(identity, progress):
    return hashlib.sha256(json.dumps([identity, progress], sort_keys=True).encode()).hexdigest()


# -- what the rows depend on -----------------------------------------------------------------------------------------

FLAGS = "pairs num_responses min_reward max_new_tokens temperature top_p batch_size seed".split()


def identity(args, prompts):
    """What the rows depend on, {name: value}, as far as it is known before the weights are read."""
    flags = {f"--{name.replace('_', '-')}": getattr(args, name) for name in FLAGS}
    asked = [(prompt.prompt, prompt.fields, prompt.ids, prompt.end) for prompt in prompts]
    prompts_sha256 = hashlib.sha256(json.dumps(asked, default=str).encode()).hexdigest()[:16]
    return flags | {"prompts": prompts_sha256, "reward": reward_identity(args)}


def reward_identity(args):
    if args.reward_fn:
        file, _, function = args.reward_fn.rpartition(":")
        return f"{function} {files_sha256([file])}"
    if args.reward_model:
        folder = Path(args.reward_model)
        return files_sha256([folder / "reward_model.json", *sorted(folder.glob("*.safetensors"))])
    return None


def files_sha256(paths):
    """sha256 of the bytes of files, shortened."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            while piece := file.read(2**20):
                digest.update(piece)
    return digest.hexdigest()[:16]
