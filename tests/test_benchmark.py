"""benchmarks/dpo_vs_trl.py on the toy world: every contender does the same work.  Nothing is asserted about speed."""

import importlib.util
import json
import math
import os
import sys

import pytest
from helpers import ROOT
from processes import run_program
from transformers import AutoTokenizer

from preference_data import load_pairs

CONTENDERS = ["ours", "trl-defaults", "ours-fp32", "trl-fp32"]
UPDATES, WARMUP, BATCH, ACCUMULATION = 2, 1, 2, 2
PAIRS = (UPDATES + WARMUP) * BATCH * ACCUMULATION

absent = [name for name in ("trl", "peft", "accelerate") if not importlib.util.find_spec(name)]
skip = pytest.mark.skipif(bool(absent), reason=f"yardstick {', '.join(absent)} not installed")
pytestmark = [skip, pytest.mark.slow]


def run(toy, dataset, *words):
    command = [sys.executable, ROOT / "benchmarks/dpo_vs_trl.py", "--model", toy / "model", "--dataset", dataset]
    sizes = ["--updates", UPDATES, "--warmup", WARMUP, "--batch-size", BATCH]
    command += [*sizes, "--gradient-accumulation-steps", ACCUMULATION, *words]
    return run_program(command, env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"})


@pytest.fixture(scope="module")
def rows(toy, tmp_path_factory):
    """A file whose second row cannot be used: the first PAIRS pairs are in its first PAIRS + 1 rows."""
    first, *others = (toy / "train/helpful_pairs.jsonl").read_text().splitlines()[: PAIRS + 10]
    equal = json.loads(first)
    equal["rejected_response"] = equal["chosen_response"]
    file = tmp_path_factory.mktemp("rows") / "pairs.jsonl"
    file.write_text("\n".join([first, json.dumps(equal), *others]) + "\n")
    return file


@pytest.fixture(scope="module")
def measured(toy, rows, tmp_path_factory):
    """(what --json wrote, what was printed)."""
    file = tmp_path_factory.mktemp("benchmark") / "result.json"
    done = run(toy, rows, "--contenders", *CONTENDERS, "--json", file)
    assert done.returncode == 0, done.stderr
    return json.loads(file.read_text()), done.stdout


@pytest.fixture(scope="module")
def pairs(toy, rows):
    return load_pairs(rows, AutoTokenizer.from_pretrained(toy / "model"), 512, 256, limit=PAIRS + 1)[0]


def test_every_contender_trains_on_the_same_tokens(measured, pairs):
    result, _ = measured
    assert len(pairs) == PAIRS
    unique = sum(len(prompt) + len(chosen) + len(rejected) for prompt, chosen, rejected, *_ in pairs)
    twice = sum(2 * len(prompt) + len(chosen) + len(rejected) for prompt, chosen, rejected, *_ in pairs)
    assert sum(result["unique_tokens"]) == unique
    assert sum(result["response_tokens"]) == sum(len(chosen) + len(rejected) for _, chosen, rejected, *_ in pairs)
    assert list(result["runs"]) == CONTENDERS
    for name, (done,) in result["runs"].items():  # TRL counts what it passes: no padding, but the prompt of each side
        assert (name, done["tokens"]) == (name, unique if name.startswith("ours") else twice)
        assert (name, PAIRS / done["updates"]) == (name, BATCH * ACCUMULATION)  # pairs of an update
        assert len(done["times"]) == UPDATES
        assert min(done["times"]) > 0
        assert done["before"] > 0


def test_losses_in_fp32_are_equal_and_move(measured):
    ours, theirs = (measured[0]["runs"][name][0]["losses"] for name in ("ours-fp32", "trl-fp32"))
    assert len(ours) == len(theirs) == UPDATES + WARMUP
    difference = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
    assert difference == measured[0]["largest_loss_difference"] < 1e-4
    assert max(abs(loss - math.log(2)) for loss in ours) > 1e-3, "losses that stay at ln 2 are equal by definition"


def test_useful_work(measured, toy):
    result, _ = measured
    config = json.loads((toy / "model/config.json").read_text())
    hidden, inner, heads = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    width, narrow = config["num_attention_heads"] * heads, config["num_key_value_heads"] * heads
    block = hidden * (2 * width + 2 * narrow) + 3 * hidden * inner  # q and o, k and v; gate, up, down
    per_unique, per_response = 4 * config["num_hidden_layers"] * block, 4 * hidden * config["vocab_size"]
    tokens = [*zip(result["unique_tokens"], result["response_tokens"], strict=True)][WARMUP:]
    assert result["useful_flops"] == [per_unique * unique + per_response * response for unique, response in tokens]
    assert min([*result["peaks"].values(), *result["memory"].values()]) > 0


def test_report_names_the_settings_and_has_a_row_for_each(measured):
    result, printed = measured
    defaults, best = (result["runs"][name][0]["resolved"] for name in ("trl-defaults", "trl-fp32"))
    assert defaults["bf16"] == defaults["gradient_checkpointing"] == "True"
    assert defaults["precompute_ref_log_probs"] == "False"
    assert defaults["weights"] == best["weights"] == "torch.float32"
    assert best["bf16"] == best["gradient_checkpointing"] == "False"
    assert best["precompute_ref_log_probs"] == "True"
    table = [line.split("|")[1].strip() for line in printed.splitlines() if line.startswith("| ")]
    assert table == ["contender", *CONTENDERS]
    assert "dpo_hf_run.py --model" in printed
    assert "equal losses in fp32" in printed


def test_too_few_rows_and_no_model_are_one_sentence(toy, rows):
    done = run(toy, rows, "--updates", 100)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert f"has {PAIRS + 10} pairs, {101 * BATCH * ACCUMULATION} are needed" in done.stderr
    done = run(toy / "nowhere", rows)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "nowhere" in done.stderr
