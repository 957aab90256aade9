"""Each flag that takes a number, of each script, at the limits of what can be typed: refused in one sentence, or a
finite number.
"""

import importlib
import math
import sys

import pytest
from helpers import SCRIPTS, parser_actions

NUMBERS = ["0", "-0", "-1", "1", "0.5", "1e-300", "1e30", "1e31", "1e308", "1e400", "nan", "inf", "-inf", "", " ", "--"]
NUMBERS += [
    "1" + "0" * 18,
    "-" + "9" * 18,
    "1" + "0" * 400,
    "9" * 5000,
    "0x10",
    "1_000",
    "0" * 5000 + "1",
    "٣",
    "½",
    "1,5",
]
NEEDED = {
    "train_rm": "--task helpful",
    "prepare_data": "--input rows.jsonl",
    "generate": "--prompts p.jsonl --output o.jsonl",
    "evaluate_alignment": "--prompts p.jsonl",
    "learn_prompt": "--preference-text x",
    "train_with_preference_prompt": "--preference-text x",
}


@pytest.mark.parametrize("script", [name.removesuffix(".py") for name in SCRIPTS])
def test_numbers(script, tally, capsys, monkeypatch):
    module = importlib.import_module(script)
    monkeypatch.setattr(sys, "argv", [f"{script}.py"])
    for action in parser_actions(module):
        for text in NUMBERS if action.type else ():
            word = f"{action.option_strings[0]}={text}"
            try:
                value = getattr(module.get_args([*NEEDED.get(script, "").split(), word]), action.dest)
            except SystemExit as end:
                said = capsys.readouterr().err.splitlines()
                tally.count("refused")
                if end.code != 2 or len(said) != 1 or len(said[0]) > 300:
                    tally.fail(f"{word[:60]}: {end.code} {said}"[:400])
                continue
            except Exception as error:
                tally.fail(f"{word[:60]}: {type(error).__name__} {error}"[:400])
                continue
            tally.count("taken")
            if isinstance(value, int | float) and not math.isfinite(value):
                tally.fail(f"{word[:60]} is {value}")
    tally.done()
