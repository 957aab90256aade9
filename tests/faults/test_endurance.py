"""2,000 updates of each trainer: the memory, the open files, the threads and the size of a checkpoint do not grow."""

import importlib
import json
import os
from pathlib import Path

import pytest
import torch
from campaigns import run, words_of_run
from helpers import TRAINERS

UPDATES, EARLY = 2000, 500
LONG = f"--max-steps {UPDATES} --epochs 2000 --save-steps {EARLY} --save-total-limit 0 --eval-steps 100".split()
OWN = {"train_safe_mm_dpo": ["--cost-every", 100]}  # else most of its time is sampling
LIMITS = {"memory": 16e6, "files": 0, "threads": 0, "checkpoint": 300}  # bytes; what the history takes is in the first


def record_use():
    """Write what this process has of each after its update EARLY and its last to use.json."""
    plain, calls, found = torch.optim.AdamW.step, [], []

    def step(*given, **named):
        result = plain(*given, **named)
        calls.append(1)
        if len(calls) in (EARLY, UPDATES):
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            counts = {"files": len(os.listdir("/proc/self/fd")), "threads": len(os.listdir("/proc/self/task"))}
            found.append({"memory": pages * os.sysconf("SC_PAGE_SIZE")} | counts)
            Path("use.json").write_text(json.dumps(found))
        return result

    torch.optim.AdamW.step = step


def size_of(folder):
    return sum(path.stat().st_size for path in folder.iterdir())


@pytest.mark.parametrize("script", TRAINERS)
def test_nothing_grows(script, labelled_world, tmp_path, tally):
    words = [*words_of_run(script, labelled_world), *LONG, *OWN.get(script, [])]
    ended = run(importlib.import_module(script), words, tmp_path, limit=500, prepare=record_use)
    assert ended.code == 0, ended
    tally.command = ended.command
    early, late = json.loads((tmp_path / "use.json").read_text())
    for use, updates in ((early, EARLY), (late, UPDATES)):
        use["checkpoint"] = size_of(tmp_path / f"out/checkpoint-{updates}")
    tally.count("updates", UPDATES)
    for name, most in LIMITS.items():
        tally.count(f"more {name}", late[name] - early[name])
        if late[name] - early[name] > most:
            tally.fail(f"{name}: {early[name]:,} after {EARLY} updates, {late[name]:,} after {UPDATES}")
    tally.done()
