"""Where the time goes: phases that add up, and floating-point operations counted as a profiler counts them."""

import itertools
import re

import pytest
import torch
from runs import run_script
from tiny_models import random_pairs, tiny_model
from torch.utils.flop_counter import FlopCounterMode
from worlds import write_world

import lora
from harness import speed
from packed_model import prepare_model
from packing import pack

PAIRS = random_pairs([(5, 4, 3), (9, 1, 6), (12, 7, 8)])


@pytest.mark.parametrize("name", ["qwen3", "llama", "mistral"])
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_useful_operations_are_those_of_the_matrix_products(name, trained):
    """torch's own counter over forward and backward, attention left out, as the definition leaves it out."""
    model = tiny_model(name, tie_word_embeddings=False)
    prepare_model(model)
    model.requires_grad_(trained)
    model.get_input_embeddings().requires_grad_(True)  # so that gradients flow through every layer
    with FlopCounterMode(display=False) as counter:
        chosen, rejected = model.packed_logps(pack(PAIRS))
        (chosen - rejected).sum().backward()
    products = (torch.ops.aten.mm, torch.ops.aten.addmm)
    counted = sum(flops for op, flops in counter.get_flop_counts()["Global"].items() if op in products)
    again = 2 * 64 * 32 * sum(len(pair[1]) + len(pair[2]) for pair in PAIRS)  # logits of a trained head, in backward
    assert sum(speed.useful_flops(model, PAIRS)) == counted - trained * again


def test_useful_operations_by_hand():
    model = tiny_model("llama")  # hidden 32, 2 layers of q and o 32 x 32, k and v 32 x 16, three of 32 x 64; 64 words
    in_blocks = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64)
    lora.add_adapter(model, "policy", 4, 8)
    expected = [4 * (in_blocks * (p + c + r) + 64 * 32 * (c + r)) for p, c, r in ((5, 4, 3), (9, 1, 6), (12, 7, 8))]
    assert speed.useful_flops(model, PAIRS) == expected
    assert speed.useful_flops(tiny_model("llama"), PAIRS) == [flops * 6 // 4 for flops in expected]


def test_phases_add_up_and_nothing_is_counted_twice(monkeypatch):
    clock = itertools.count(step=1.0)  # every look at the clock is a second later
    monkeypatch.setattr(speed.time, "perf_counter", lambda: next(clock))
    watch = speed.Stopwatch(torch.device("cpu"), "load")  # 0
    for _ in range(3):
        watch.phase("forward")  # 1, 3, 5
        watch.phase("step")  # 2, 4, 6
    watch.phase("other")  # 7
    assert watch.read() == {"load": 1.0, "forward": 3.0, "step": 3.0, "other": 1.0}  # 8
    assert watch.read() == {"load": 1.0, "forward": 3.0, "step": 3.0, "other": 2.0}
    watch.work(8, 3e12)
    watch.work(4, 3e12)
    assert watch.rate() == "pairs/s=2.00 TFLOP/s=1"  # 6 seconds of training
    watch.phase("backward")
    watch.phase("other")
    watch.work(1, 5e11)
    assert watch.rate() == "pairs/s=1.00 TFLOP/s=0.5"  # since the last time


def test_a_run_says_where_its_time_went(tmp_path, capsys):
    world = write_world(tmp_path)
    data = ["--model", world / "model", "--dataset", world / "pairs.jsonl", "--output-dir", tmp_path / "out"]
    run_script([*data, *"--max-steps 3 --logging-steps 1 --device cpu --report-to none --eval-samples 4".split()])
    out = capsys.readouterr().out
    lines = [line for line in out.splitlines() if line.startswith("Epoch 1 step ")]
    assert len(lines) == 3
    assert all(re.search(r" pairs/s=\d+\.\d\d TFLOP/s=[\d.e-]+$", line) for line in lines)
    (line,) = (line for line in out.splitlines() if line.startswith("Seconds: "))
    phases = dict(part.rsplit(" ", 1) for part in line.removeprefix("Seconds: ").split(", "))
    assert list(phases) == ["start", "tokenise", "load", "other", "cache", "forward", "backward", "communicate", "step"]
    assert all(float(seconds) >= 0 for seconds in phases.values())
