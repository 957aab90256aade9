"""benchmarks/memory_levers.py on a tiny model: which rows a run gets, which flags, and the table of what came out."""

import json
import os
import sys

import pytest
from helpers import ROOT
from processes import run_program
from worlds import write_world

from preference_data import DataError

sys.path.insert(0, str(ROOT / "benchmarks"))
import memory_levers


def test_the_rows_with_the_longest_responses_are_taken(tmp_path):
    rows = [{"prompt": "p" * long, "chosen": "c" * n, "rejected": "r"} for n, long in ((2, 1), (5, 1), (1, 99), (4, 1))]
    rows.append({"prompt": "p", "chosen": "equal, and long", "rejected": "equal, and long"})
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert memory_levers.longest_rows(str(tmp_path / "pairs.jsonl"), 2) == [rows[1], rows[3]]
    with pytest.raises(DataError, match="has 4 usable rows, 5 are needed: lower --updates"):
        memory_levers.longest_rows(str(tmp_path / "pairs.jsonl"), 5)
    (tmp_path / "pairs.jsonl").write_text("{\n")
    with pytest.raises(DataError, match=r"pairs.jsonl:2 is not JSON"):
        memory_levers.longest_rows(str(tmp_path / "pairs.jsonl"), 1)


def test_a_levers_flags_take_the_place_of_the_bases_and_its_memory_is_that_of_the_process(tmp_path):
    world = write_world(tmp_path / "world")
    (tmp_path / "rows.jsonl").write_text((world / "pairs.jsonl").read_text())
    lever = "--batch-size 1 --gradient-accumulation-steps 4"
    command = [sys.executable, ROOT / "benchmarks/memory_levers.py", "--model", world / "model", "--updates", 1]
    command = [*map(str, command), f"--lever={lever}", f"--work={tmp_path}", "--dtype=fp32"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    holds = bytearray(b"1") * 1_000_000_000  # of this process: none of it may be in the number of the other
    done = run_program(command, env=environment)
    del holds
    assert done.returncode == 0, done.stderr
    assert 100e6 < int(done.stdout.split()[-1]) < 1e9
    ran = json.loads((tmp_path / f"run{memory_levers.LEVERS.index(lever)}/args.json").read_text())
    expected = dict(
        batch_size=1, gradient_accumulation_steps=4, max_length=512, lora_r=16, gradient_checkpointing="off"
    )
    assert {name: ran[name] for name in expected} == expected
    assert ran["max_steps"] == 1


def test_the_table_names_what_was_not_measured():
    memory = {lever: 1_000_000_000 * (n + 2) for n, lever in enumerate(memory_levers.LEVERS[:-1])}
    lines = memory_levers.table(memory).splitlines()
    assert lines[2] == "| base | 2.00 | 100% |"
    assert lines[3] == "| `--batch-size 1 --gradient-accumulation-steps 4` | 3.00 | 150% |"
    assert lines[-3] == (
        "| `--lora-r 0 --gradient-checkpointing on --optimizer adamw8bit` | not measured here: bitsandbytes is not "
        "installed | |"
    )
    assert lines[-1] == "| `PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True` | not measured here: GPU only | |"
    assert len(lines) == 2 + len(memory_levers.LEVERS) + 2


def test_a_dataset_that_is_not_there_is_one_sentence(tmp_path):
    words = [
        sys.executable,
        ROOT / "benchmarks/memory_levers.py",
        "--model",
        tmp_path,
        "--dataset",
        tmp_path / "no.jsonl",
    ]
    done = run_program(words)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("memory_levers.py: there is no file")
    assert "Traceback" not in done.stderr
