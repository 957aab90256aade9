"""Data parallel by hand: two gloo ranks and one process take the same steps, whatever the split of an update."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent
TORCHRUN = ("-m", "torch.distributed.run", "--standalone")


def run(*words, **variables):
    """A Python command in a process of its own, one thread per rank."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | variables
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def train(toy, out, ranks, batch, accumulation):
    """10 updates of 8 pairs, the last one short; returns (adapter, lines of metrics.jsonl, standard output)."""
    launcher = [*TORCHRUN, f"--nproc_per_node={ranks}"] if ranks > 1 else []
    data = ["--model", toy / "model", "--dataset", toy / "train/helpful_pairs.jsonl", "--num-samples", 90]
    size = ["--eval-samples", 12, "--batch-size", batch, "--gradient-accumulation-steps", accumulation]
    how = "--learning-rate 1e-4 --dtype fp32 --device cpu --logging-steps 1 --report-to none".split()
    done = run(*launcher, ROOT / "dpo_hf_run.py", *data, *size, *how, "--output-dir", out)
    assert done.returncode == 0, done.stdout + done.stderr
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return load_file(out / "adapter_model.safetensors"), metrics, done.stdout


@pytest.fixture(scope="module")
def one_process(toy, tmp_path_factory):
    return train(toy, tmp_path_factory.mktemp("one") / "out", 1, 8, 1)


@pytest.mark.parametrize(("ranks", "batch", "accumulation"), [(2, 4, 1), (2, 1, 4), (1, 2, 4)])
def test_any_split_is_one_run(toy, one_process, tmp_path, ranks, batch, accumulation):
    adapter, metrics, log = train(toy, tmp_path / "out", ranks, batch, accumulation)
    expected, expected_metrics, _ = one_process
    assert "held out 12 pairs by whole prompts, 78 to train on" in log, "9 updates of 8 pairs and a short one of 6"
    assert len(metrics) == len(expected_metrics) == 10 + 2  # with the first and the last evaluation
    moved = max((expected[key]).abs().max() for key in expected if "lora_B" in key)
    assert moved > 2e-4, "B starts at zero and has to move for the comparison to mean anything"
    assert adapter.keys() == expected.keys()
    assert max((adapter[key] - expected[key]).abs().max().item() for key in expected) < 1e-5
    for ours, theirs in zip(metrics, expected_metrics, strict=True):
        assert ours["step"] == theirs["step"]
        for key in theirs:
            assert ours[key] == pytest.approx(theirs[key], abs=1e-4), key
    assert ("world_size=2" in log) == (ranks == 2)
    assert "Effective batch size: 8 " in log
    assert log.count("Effective batch size") == 1, "rank 0 alone prints"


def test_one_rank_that_drifts_is_noticed(tmp_path):
    (tmp_path / "drift.py").write_text(
        "import torch, distributed\n"
        "world = distributed.start('cpu')\n"
        "distributed.assert_same_on_all_ranks([torch.ones(3)], world)\n"
        "distributed.assert_same_on_all_ranks([torch.ones(3) * (1 + world.rank)], world)\n"
    )
    done = run(*TORCHRUN, "--nproc_per_node=2", tmp_path / "drift.py", PYTHONPATH=str(ROOT))
    assert done.returncode != 0
    assert "the parameters of rank 1 differ from those of rank 0" in done.stderr


def test_gradients_are_summed_and_a_rank_without_any_counts_as_zero(tmp_path):
    (tmp_path / "reduce.py").write_text(
        "import torch, distributed\n"
        "world = distributed.start('cpu')\n"
        "a, b = torch.zeros(2, 2, requires_grad=True), torch.zeros(3, requires_grad=True)\n"
        "a.grad = torch.full((2, 2), 3.0) if world.rank == 0 else torch.eye(2)\n"
        "b.grad = torch.tensor([1.0, 2.0, 4.0]) if world.rank == 0 else None\n"
        "distributed.all_reduce_gradients([a, b], world)\n"
        "assert torch.equal(a.grad, torch.tensor([[4.0, 3.0], [3.0, 4.0]])), a.grad\n"
        "assert torch.equal(b.grad, torch.tensor([1.0, 2.0, 4.0])), b.grad\n"
        "distributed.stop()\n"
    )
    done = run(*TORCHRUN, "--nproc_per_node=2", tmp_path / "reduce.py", PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr


def test_accelerate_launches_the_script(toy, tmp_path):
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    # One process: on a CPU accelerate leaves more of them to MPI.
    launcher = "-m accelerate.commands.launch --cpu --num_processes=1 --num_machines=1 --mixed_precision=no".split()
    data = ["--model", toy / "model", "--dataset", toy / "train/helpful_pairs.jsonl", "--num-samples", 24]
    how = ["--dynamo_backend=no", ROOT / "dpo_hf_run.py", *data, "--max-steps", 1, "--dtype", "fp32"]
    done = run(*launcher, *how, "--output-dir", tmp_path / "out", "--report-to", "none")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out/adapter_model.safetensors").exists()
