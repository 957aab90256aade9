"""Of two ranks one is killed, or asked to end, anywhere: the other ends with a sentence of its own, and both go on to
what an uninterrupted run of two ranks leaves.
"""

import os
import random
import signal
from pathlib import Path

import pytest
from campaigns import NOT_THE_SAME, SEED, contents, difference, drafts, signal_at, watch, words_of_run
from helpers import TRAINERS
from ranks import on_ranks, run_module

CASES = dict.fromkeys(TRAINERS, 6) | {"dpo_hf_run": 14}  # of each script
GOES = "cannot reach another"


def be_a_watched_rank(script, argv, rank, number, asked):
    """A script on this rank; rank `rank` gets the signal `asked` at its event `number` (0: never)."""
    own = int(os.environ["RANK"])
    log = os.open(f"events{own}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    watch(Path.cwd(), log, signal_at(number, asked) if own == rank else None, forwards=True)
    run_module(script, argv)


@pytest.mark.parametrize("script", TRAINERS)
def test_one_of_two_ranks(script, labelled_world, tmp_path, tally):
    draw = random.Random(f"{SEED} ranks {script}")
    words = [str(word) for word in words_of_run(script, labelled_world)]
    tally.command = f"two ranks of {script}.py {' '.join(words)}"

    def start(name, *more, rank=0, number=0, asked=0):
        return on_ranks(be_a_watched_rank, (script, [*words, *more], rank, number, asked), 2, tmp_path / name)

    codes, said = start("whole")
    assert codes == [0, 0], said
    logs = [(tmp_path / f"whole/events{rank}.log").read_text().splitlines() for rank in (0, 1)]
    names = (
        *NOT_THE_SAME,
        *(f"{word}{rank}.{end}" for rank in (0, 1) for word, end in (("rank", "txt"), ("events", "log"))),
    )
    expected = contents(tmp_path / "whole", names)
    for case in range(CASES[script]):
        rank, asked = case % 2, draw.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM])
        number = draw.randrange(1, len(logs[rank]) + 1)
        codes, said = start(str(case), rank=rank, number=number, asked=asked)
        where = f"{asked.name} to rank {rank} at its event {number}, {logs[rank][number - 1]}: codes {codes}"
        tally.count(f"{asked.name} {codes}")
        other = said[1 - rank].splitlines()
        has_ended = codes[1 - rank] == 0 and codes[rank] in (0, -asked, 128 + asked)  # it was at its end
        together = codes == [128 + asked] * 2
        alone = codes[rank] == -asked and codes[1 - rank] == 1 and other and GOES in other[-1]
        if not (has_ended or together or alone) or any("Traceback" in text for text in said):
            tally.fail(f"{where}\n{said[0][-1000:]}\n{said[1][-1000:]}")
        codes, said = start(str(case), "--resume", "auto")
        found = difference(contents(tmp_path / str(case), names), expected)
        if codes != [0, 0] or found or drafts(tmp_path / str(case)):
            tally.fail(f"{where}\nand started again: {codes} {found} {drafts(tmp_path / str(case))}\n{said[0][-800:]}")
        else:
            tally.count("identical")
    tally.done()
