"""A tool that was killed at any event of the file system leaves what was there before or what an uninterrupted run
leaves, and the same command again leaves the latter.
"""

import types

import pytest
from campaigns import SAMPLE, difference, drafts, is_sentence, kill_at, points, raw_rows, run, visible
from runs import snapshot
from worlds import write_rows

import evaluate_alignment
import generate
import prepare_data
import toy_world

POINTS = 30  # of each tool


def campaign(tally, script, words, folder, most=POINTS, before=None, is_at_once=True, journal=None, prepare=None):
    """Kill and start again at `most` points.  before(folder): makes what is there before the program runs.

    is_at_once: what is there after a kill is all old or all new, or a `journal` is there too, that readers look at.
    """

    def start(name, at_event=None):
        return run(script, words, folder / name, at_event, prepare=prepare)

    def begin(name):
        (folder / name).mkdir()
        if before:
            before(folder / name)

    begin("whole")
    old = visible(folder / "whole")
    whole = start("whole")
    assert whole.code == 0, whole
    new = visible(folder / "whole")
    tally.command = whole.command
    tally.count("events", len(whole.events))
    for number in points(len(whole.events), most, f"{script.__name__} {bool(before)}"):
        begin(str(number))
        killed = start(str(number), kill_at(number, torn=number % 2 == 0))
        tally.count("kills", killed.code == -9 or number > len(whole.events))
        stands = visible(folder / str(number))
        where = f"killed before event {number}, {killed.last}"
        is_marked = journal and (folder / str(number) / journal).exists()
        if is_at_once and stands not in (old, new) and not is_marked:
            tally.fail(f"{where}: neither old nor new, {difference(stands, new)}")
        again = start(str(number))
        found = difference(visible(folder / str(number)), new)
        if again.code and not (is_sentence(again) and stands == new):  # a tool may say that all is there
            tally.fail(f"{where}, and started again: {again}")
        elif found or drafts(folder / str(number)):
            tally.fail(f"{where}, and started again: {found}, drafts {drafts(folder / str(number))}")
        else:
            tally.count("identical")
    tally.done()


BENCHMARK = "--safety-benchmark data/bench.jsonl --output-dir data".split()
JOURNAL = "data/.prepare_data/journal.json"


def test_prepare_data(tmp_path, tally):
    rows = write_rows(tmp_path / "raw.jsonl", raw_rows(60, "new"))
    campaign(tally, prepare_data, ["--input", rows, *BENCHMARK], tmp_path, most=200, journal=JOURNAL)


@pytest.mark.parametrize("fewer", [False, True])
def test_prepare_data_overwrites(fewer, tmp_path, tally):
    """fewer: the new run has no file for some of the old ones."""
    old, new = (write_rows(tmp_path / f"{name}.jsonl", raw_rows(60, name)) for name in ("old", "new"))
    ratios = ["--train-ratio", 0, "--val-ratio", 0, "--test-ratio", 1] if fewer else []

    def before(folder):
        assert run(prepare_data, ["--input", old, *BENCHMARK], folder).code == 0

    words = ["--input", new, *BENCHMARK, *ratios, "--overwrite"]
    campaign(tally, prepare_data, words, tmp_path, most=200, before=before, journal=JOURNAL)


@pytest.mark.parametrize("kind", ["rows", "pairs"])
def test_generate(kind, labelled_world, tmp_path, tally):
    words = ["--model", labelled_world / "model", "--prompts", labelled_world / "train.jsonl", *SAMPLE]
    words += ["--batch-size", 4, "--output", "out/rows.jsonl"]
    if kind == "pairs":
        words += ["--pairs", "--num-responses", 2, "--reward-model", labelled_world / "helpful"]
    campaign(tally, generate, words, tmp_path, is_at_once=False)


def test_evaluate_alignment(labelled_world, tmp_path, tally):
    words = ["--model", labelled_world / "model", "--prompts", labelled_world / "val.jsonl", *SAMPLE]
    words += ["--helpful-rm-path", labelled_world / "helpful", "--output-dir", "out"]
    campaign(tally, evaluate_alignment, words, tmp_path, most=24, is_at_once=False)


def test_toy_world(tmp_path, tally):
    def fewer():
        toy_world.EXAMPLES = 24, 24  # what takes its time: the supervised run

    script = types.SimpleNamespace(
        __name__="toy_world", get_args=list, main=lambda _: print(toy_world.build("outputs/toy_world"))
    )
    campaign(tally, script, [], tmp_path, most=24, is_at_once=False, prepare=fewer)
    assert snapshot(tmp_path / "whole/outputs/toy_world")
