"""A run that SIGTERM, Ctrl-C or a closed terminal (SIGHUP) ended anywhere leaves whole files, and goes on from them to
what an uninterrupted one leaves: in the pass of a frozen model, an update, an evaluation, a save, the final one too.
"""

import importlib
import signal

import pytest
from campaigns import (
    NOT_THE_SAME,
    SAMPLE,
    contents,
    difference,
    drafts,
    points,
    raw_rows,
    run,
    signal_at,
    visible,
    words_of_run,
)
from helpers import TRAINERS
from worlds import write_rows

import evaluate_alignment
import generate
import prepare_data

SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]
POINTS = 5  # of each trainer and signal, at files and as many at forward passes


def moments(events, name, most):
    """Numbers of events: at files, and at forward passes."""
    places = {True: [], False: []}
    for number, what in enumerate(events, 1):
        places[what.startswith("forward")].append(number)
    return sorted(some[n - 1] for some in places.values() for n in points(len(some) - 1, most, name))


@pytest.mark.parametrize("asked", SIGNALS, ids=lambda number: number.name)
@pytest.mark.parametrize("script", TRAINERS)
def test_trainers(script, asked, labelled_world, tmp_path, tally):
    words = words_of_run(script, labelled_world)
    module = importlib.import_module(script)
    whole = run(module, words, tmp_path / "whole", forwards=True)
    assert whole.code == 0, whole
    tally.command = whole.command
    expected = contents(tmp_path / "whole", NOT_THE_SAME)
    for number in moments(whole.events, f"{script} {asked.name}", POINTS):
        folder = tmp_path / str(number)
        ended = run(module, words, folder, signal_at(number, asked), forwards=True)
        where = f"{asked.name} at event {number}, {whole.events[number - 1]}: {ended}"
        tally.count(f"code {ended.code}")
        has_begun = [name for name in visible(folder) if not name.startswith("out/cache/")]
        early = ended.code == -asked and not has_begun  # before the run has begun a signal ends it as any program
        if ended.code not in (0, 128 + asked) and not early:
            tally.fail(where)
        if left := drafts(folder):
            tally.fail(f"{where}\nleft {left}")
        again = run(module, [*words, "--resume", "auto"], folder)
        found = difference(contents(folder, NOT_THE_SAME), expected)
        if again.code or found:
            tally.fail(f"{where}\nand started again: {found}; {again}")
        else:
            tally.count("identical")
    tally.done()


def words_of_tool(script, world, raw):
    model = ["--model", world / "model", "--helpful-rm-path", world / "helpful"]
    return {
        generate: [
            *model[:2],
            "--prompts",
            world / "train.jsonl",
            *SAMPLE,
            "--batch-size",
            4,
            "--output",
            "o/rows.jsonl",
        ],
        evaluate_alignment: [*model, "--prompts", world / "val.jsonl", *SAMPLE, "--output-dir", "out"],
        prepare_data: ["--input", raw, "--output-dir", "data"],
    }[script]


@pytest.mark.parametrize("script", [generate, evaluate_alignment, prepare_data], ids=lambda script: script.__name__)
def test_tools(script, labelled_world, tmp_path, tally):
    """What they leave is gone on with; of prepare_data.py it is whole, or nothing."""
    words = words_of_tool(script, labelled_world, write_rows(tmp_path / "raw.jsonl", raw_rows(60, "signals")))
    whole = run(script, words, tmp_path / "whole", forwards=True)
    assert whole.code == 0, whole
    tally.command, expected = whole.command, visible(tmp_path / "whole")
    for asked in SIGNALS:
        for number in moments(whole.events, asked.name, 6):
            folder = tmp_path / f"{asked.name}_{number}"
            ended = run(script, words, folder, signal_at(number, asked), forwards=True)
            where = f"{asked.name} at event {number}, {whole.events[number - 1]}: {ended}"
            tally.count(f"code {ended.code}")
            if ended.code not in (0, 128 + asked, -asked) or len(ended.err.splitlines()) > 1:
                tally.fail(where)
            stands = visible(folder)
            if script is prepare_data and stands not in ({}, expected):
                tally.fail(f"{where}\nneither nothing nor all: {difference(stands, expected)}")
            if stands == expected:
                continue
            again = run(script, words, folder)
            found = difference(visible(folder), expected)
            if again.code or found or drafts(folder):
                tally.fail(f"{where}\nand started again: {found}; drafts {drafts(folder)}; {again}")
            else:
                tally.count("identical")
    tally.done()
