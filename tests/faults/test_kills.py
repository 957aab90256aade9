"""A run that was killed at any event of the file system, and started again, leaves what an uninterrupted one leaves."""

import importlib

import pytest
from campaigns import NOT_THE_SAME, contents, difference, drafts, kill_at, points, run, words_of_run
from helpers import TRAINERS

POINTS = 24  # of each trainer
MERGED = {"dpo_hf_run": ["--save-merged"], "train_safe_mm_dpo": ["--epochs", 2, "--max-steps", 0]}


@pytest.mark.parametrize("script", TRAINERS)
def test_trainers(script, labelled_world, tmp_path, tally):
    words = [*words_of_run(script, labelled_world), *MERGED.get(script, []), "--resume", "auto"]
    module = importlib.import_module(script)
    whole = run(module, words, tmp_path / "whole")
    assert whole.code == 0, whole
    tally.command = whole.command
    expected = contents(tmp_path / "whole", NOT_THE_SAME)
    tally.count("events", len(whole.events))
    for number in points(len(whole.events), POINTS, script):
        folder, torn = tmp_path / str(number), number % 2 == 0
        killed = run(module, words, folder, kill_at(number, torn))
        tally.count("kills", killed.code == -9 or number > len(whole.events))
        again = run(module, words, folder)
        where = f"killed before event {number}{torn * ', a file torn'}, {killed.last}, and started again: {again}"
        if again.code:
            tally.fail(where)
        elif found := difference(contents(folder, NOT_THE_SAME), expected):
            tally.fail(f"{where}\n{found}")
        elif left := drafts(folder):
            tally.fail(f"{where}\nleft {left}")
        else:
            tally.count("identical")
    tally.done()
