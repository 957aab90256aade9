"""Runs of prepare_data.py in a test's own folder, and what they write."""

import json
import os
import signal
from pathlib import Path

import pytest
from runs import one_line, run_script, snapshot

import prepare_data

SPLITS, DIMENSIONS = ("train", "val", "test"), ("helpful", "harmless")
ALL_TRAIN = "--train-ratio", 1, "--val-ratio", 0, "--test-ratio", 0
ALL_TEST = "--train-ratio", 0, "--val-ratio", 0, "--test-ratio", 1
MEND = "; mend the row, or leave such rows out with --skip-invalid"


def prepare(*words):
    run_script(words, prepare_data)


def read_data(folder):
    files = {(s, d): Path(folder, s, f"{d}_pairs.jsonl") for s in SPLITS for d in DIMENSIONS}
    return {key: read_jsonl(path) for key, path in files.items() if path.exists()}


def read_jsonl(path):
    return [json.loads(line) for line in path.read_text("utf-8").split("\n")[:-1]]


def account(folder="data"):
    return json.loads(Path(folder, "account.json").read_text("utf-8"))


def counts(dropped):
    return {reason: entry["count"] for reason, entry in dropped.items()}


def fails(capsys, *words):
    """Run with words that have to fail: exit code 2, nothing written; the one line on standard error."""
    before = snapshot(".")
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        prepare(*words)
    assert exit.value.code == 2
    assert snapshot(".") == before
    line = one_line(capsys)
    assert line.startswith("prepare_data.py: ")
    return line.removeprefix("prepare_data.py: ")


def be_killed(number, words):
    """prepare_data.py until before its rename `number`."""
    replace, calls = Path.replace, []

    def killer(draft, path):
        calls.append(path)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return replace(draft, path)

    Path.replace = killer
    prepare(*words)
