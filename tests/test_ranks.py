"""Data parallel by hand: any number of gloo ranks takes the steps of one process, with one exchange per update."""

import itertools
import json
import math
import os
import sys
from pathlib import Path

import pytest
import torch
import transformers
from helpers import ROOT
from processes import run_program
from ranks import TRAINERS, on_ranks, run_module, run_ranks
from runs import adapter_of, assert_same_files, metrics_of
from tiny_models import MISTRAL
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from worlds import QUICK, words_of

import distributed
import lora

# -- any number of ranks is one process -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(labelled_world):
    return labelled_world


def train(script, world, out, ranks, batch_size, accumulation, *more):
    """Two epochs of 5 updates, 8 pairs each and the fifth 3; (adapter, lines of metrics.jsonl)."""
    split = ["--batch-size", batch_size, "--gradient-accumulation-steps", accumulation]
    words = ["--model", world / "model", *words_of(script, world), *QUICK, *split, *more, "--output-dir", out / "run"]
    codes, said = run_ranks(script, words, ranks, out)
    assert codes == [0] * ranks, said
    assert said[0].count("Effective batch size: 8 ") == 1
    assert (f"world_size={ranks}" in said[0]) == (ranks > 1)
    assert not any("Effective batch size" in other for other in said[1:]), "rank 0 alone prints"
    return adapter_of(out / "run"), metrics_of(out / "run")


@pytest.fixture(scope="module")
def one_process(world, tmp_path_factory):
    """one_process(script) -> what one process leaves, that takes each update in one pass."""
    known = {}

    def result(script):
        if script not in known:
            known[script] = train(script, world, tmp_path_factory.mktemp("one"), 1, 8, 1)
        return known[script]

    return result


@pytest.mark.parametrize(("ranks", "batch_size", "accumulation"), [(1, 2, 4), (2, 2, 2), (4, 1, 2)])
@pytest.mark.parametrize("script", TRAINERS)
def test_any_split_is_one_run(script, world, one_process, tmp_path, ranks, batch_size, accumulation):
    """Of the 3 pairs of a short update the fourth rank has none; lambda moves with every update, by sampled costs."""
    expected, expected_metrics = one_process(script)
    adapter, metrics = train(script, world, tmp_path, ranks, batch_size, accumulation)
    assert_alike(adapter, metrics, expected, expected_metrics)
    evaluations = 3 if script == "train_rm" else 2  # the first, one behind each epoch or the last
    updates = [line for line in metrics if "grad_norm" in line]
    assert len(updates) == 10 and len(metrics) == 10 + evaluations
    if script == "train_safe_mm_dpo":
        for name in ("lambda", "J_C", "E_cost"):
            theirs = [line[name] for line in expected_metrics if name in line]
            assert [line[name] for line in updates] == pytest.approx(theirs, abs=1e-6, rel=1e-6), name
        assert len({line["lambda"] for line in updates}) == 10
        assert len({line["E_cost"] for line in updates}) == 6  # sampled before the first and every second


def assert_alike(adapter, metrics, expected, expected_metrics):
    moved = [value.abs().max().item() for key, value in expected.items() if "lora_B" in key]
    if not moved:  # vectors, which start elsewhere: their effect
        moved = [expected_metrics[-1]["eval_loss"] - expected_metrics[0]["eval_loss"]]
    assert max(map(abs, moved)) > 2e-4, "B starts at zero and has to move for the comparison to mean anything"
    assert adapter.keys() == expected.keys()
    assert max((adapter[key] - expected[key]).abs().max().item() for key in expected) < 1e-5
    for ours, theirs in zip(metrics, expected_metrics, strict=True):
        assert ours == {k: v if v is None else pytest.approx(v, abs=1e-4, rel=1e-4) for k, v in theirs.items()}


def test_importance_weights_look_back_on_the_responses_of_all_ranks(world, tmp_path):
    """lambda moves by them where 32 effective samples are there, from the third update on."""
    results = []
    for ranks, batch_size in ((1, 8), (4, 2)):
        out, more = tmp_path / str(ranks), ("--own-pairs", 0, "--cost-estimate", "snis", "--cost-prompts", "all")
        results.append(train("train_safe_mm_dpo", world, out, ranks, batch_size, 1, *more))
    assert_alike(*results[1], *results[0])
    lambdas = [line["lambda"] for line in results[0][1] if "lambda" in line]
    assert lambdas[:2] == [1.0, 1.0] and len(set(lambdas)) == 9


def run_python(*words):
    """A Python command in a process of its own, one thread per rank."""
    return run_program([sys.executable, *words], env=os.environ | {"OMP_NUM_THREADS": "1"})


def test_torchrun_starts_the_same_ranks(world, tmp_path):
    words = ["--model", world / "model", *words_of("dpo_hf_run", world), *QUICK, "--max-steps", 2, "--output-dir"]
    codes, _ = run_ranks("dpo_hf_run", [*words, tmp_path / "forked"], 2, tmp_path)
    launcher = "-m torch.distributed.run --standalone --nproc_per_node=2".split()
    done = run_python(*launcher, ROOT / "dpo_hf_run.py", *words, tmp_path / "torchrun")
    assert (codes, done.returncode) == ([0, 0], 0), done.stderr
    assert "world_size=2" in done.stdout
    assert_same_files(tmp_path / "torchrun", tmp_path / "forked")


def test_accelerate_launches_the_script(world, tmp_path):
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    # One process: on a CPU accelerate leaves more of them to MPI.
    launcher = "-m accelerate.commands.launch --cpu --num_processes=1 --num_machines=1 --mixed_precision=no".split()
    script = ["--dynamo_backend=no", ROOT / "dpo_hf_run.py", "--model", world / "model", *words_of("dpo_hf_run", world)]
    done = run_python(*launcher, *script, *QUICK, "--max-steps", 1, "--output-dir", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out/adapter_model.safetensors").exists()


# -- what ranks exchange ----------------------------------------------------------------------------------------------


class Exchanges(TorchDispatchMode):
    """Writes down the collective operations of torch.distributed: (name, bytes of the tensors of this rank)."""

    def __init__(self, events):
        super().__init__()
        self.events = events

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "c10d" in function.namespace:
            tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]
            size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
            self.events.append((function.name(), size))
        return function(*args, **kwargs or {})


def run_and_write_down_exchanges(words):
    """dpo_hf_run.py on this rank; exchangesN.json is what it exchanged, and ["step"] where it took a step."""
    events = []
    register_optimizer_step_post_hook(lambda *_: events.append(["step"]))
    with Exchanges(events):
        run_module("dpo_hf_run", words)
    Path(f"exchanges{os.environ['RANK']}.json").write_text(json.dumps(events))


def test_an_update_is_one_exchange_of_the_adapters_gradient_whatever_the_accumulation(world, tmp_path):
    """Between two steps go the gradient, in fp32, and a number of 4 bytes: whether some rank was asked to end."""
    words = ["--model", world / "model", *words_of("dpo_hf_run", world), *QUICK, "--logging-steps", 100]
    words += ["--batch-size", 1, "--gradient-accumulation-steps", 4, "--output-dir", tmp_path / "run"]
    codes, said = on_ranks(run_and_write_down_exchanges, ([str(word) for word in words],), 2, tmp_path)
    assert codes == [0, 0], said
    trained = sum(value.numel() for value in adapter_of(tmp_path / "run").values())
    assert f"LoRA enabled for policy model: {trained:,} trainable" in said[0]
    for rank in (0, 1):
        events = json.loads((tmp_path / f"exchanges{rank}.json").read_text())
        steps = [place for place, event in enumerate(events) if event == ["step"]]
        assert len(steps) == 10
        for start, end in itertools.pairwise(steps):
            assert events[start + 1 : end] == [["c10d::allreduce_", 4], ["c10d::allreduce_", 4 * trained]]
        assert len(events) > 30, "and before and behind them evaluation and the comparison of the replicas are seen"


def test_a_7b_model_exchanges_168_mb_per_update():
    """LoRA with r = 16 on all linear layers of Mistral-7B."""
    with torch.device("meta"):
        mistral = transformers.MistralForCausalLM(transformers.MistralConfig(**MISTRAL))
    parameters = lora.add_adapter(mistral, "policy", 16, 32)
    trained = sum(parameter.numel() for parameter in parameters)
    assert {parameter.dtype for parameter in parameters} == {torch.float32}
    assert trained == 41_943_040
    assert 4 * trained == pytest.approx(167.8e6, abs=0.05e6)
    assert 2 * (8 - 1) / 8 * 4 * trained == pytest.approx(293.6e6, abs=0.05e6), "sent by each rank of a ring of 8"


# -- what launchers set ------------------------------------------------------------------------------------------------

TWO = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


@pytest.fixture
def ranks_of(monkeypatch):
    """ranks_of(variables) -> what the environment says with these, and no others, set."""

    def read(variables):
        for name in (*TWO, "LOCAL_WORLD_SIZE"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        return distributed.ranks_of_environment()

    return read


def test_ranks_of_the_environment(ranks_of):
    assert ranks_of({}) == (0, 1, 0)
    assert ranks_of(TWO) == (1, 2, 1)
    assert ranks_of(dict.fromkeys(TWO, "")) == (0, 1, 0)
    assert ranks_of({"MASTER_ADDR": "node1", "MASTER_PORT": "1", "WORLD_SIZE": "1"}) == (0, 1, 0)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"WORLD_SIZE": "two"},
            "WORLD_SIZE is 'two', and has to be a whole number from 1 to 1000000: start",
        ),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0', and has to be"),
        ({"WORLD_SIZE": "9" * 5000}, f"WORLD_SIZE is '{'9' * 40}', and has to be"),
        ({"RANK": "x"}, "RANK is 'x', and has to be a whole number from 0"),
        ({"RANK": "-1"}, "RANK is '-1', and has to be"),
        ({"RANK": "2"}, "RANK 2 is none of WORLD_SIZE 2, which count from 0"),
        ({"LOCAL_RANK": "1.0"}, "LOCAL_RANK is '1.0', and has to be"),
        ({"LOCAL_WORLD_SIZE": "0"}, "LOCAL_WORLD_SIZE is '0', and has to be a whole number from 1"),
        ({"MASTER_PORT": "99999"}, "MASTER_PORT is '99999', and has to be a whole number from 0 to 65535"),
        ({"MASTER_PORT": "80x"}, "MASTER_PORT is '80x', and has to be"),
        (
            {"RANK": "", "MASTER_PORT": ""},
            "WORLD_SIZE is 2, and there is no RANK and no MASTER_PORT: start",
        ),
    ],
)
def test_an_environment_that_cannot_be_is_one_sentence(ranks_of, changes, sentence):
    with pytest.raises(distributed.DeviceError) as error:
        ranks_of(TWO | changes)
    assert str(error.value).startswith(sentence)
    assert str(error.value).endswith("unset them for one process")


# -- a rank that has nothing, too much, or something else -------------------------------------------------------------


def sum_unlike_gradients():
    world = distributed.start("cpu")
    a, b = torch.zeros(2, 2, requires_grad=True), torch.zeros(3, requires_grad=True)
    a.grad = torch.full((2, 2), 3.0) if world.rank == 0 else torch.eye(2)
    b.grad = torch.tensor([1.0, 2.0, 4.0]) if world.rank == 0 else None
    distributed.all_reduce_gradients([a, b], world)
    assert torch.equal(a.grad, torch.tensor([[4.0, 3.0], [3.0, 4.0]])), a.grad
    assert torch.equal(b.grad, torch.tensor([1.0, 2.0, 4.0])), b.grad
    distributed.stop()


def test_gradients_are_summed_and_a_rank_without_any_counts_as_zero(tmp_path):
    codes, said = on_ranks(sum_unlike_gradients, (), 2, tmp_path)
    assert codes == [0, 0], said


def overflow_on_one_rank():
    """Three fp16 updates of one weight at rate 1, the second with an infinite gradient on rank 1."""
    world = distributed.start("cpu")
    weight = torch.nn.Parameter(torch.tensor([10.0]))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    scaler, found = torch.amp.GradScaler("cpu", init_scale=1024.0), []
    for gradient in ((0.5, 1.5), (0.5, math.inf), (1.0, 3.0)):
        scaler.scale(weight * gradient[world.rank]).backward()
        distributed.all_reduce_gradients([weight], world)
        norm = distributed.take_step([weight], optimizer, scheduler, scaler, max_grad_norm=0)
        found.append([weight.item(), scheduler.last_epoch, scaler.get_scale(), norm.item()])
    Path(f"found{world.rank}.json").write_text(json.dumps(found))
    distributed.stop()


def test_an_overflow_on_one_rank_skips_the_update_on_all(tmp_path):
    """Weight, updates that the schedule counts, scale of the loss, norm of the gradient: after each update."""
    codes, said = on_ranks(overflow_on_one_rank, (), 2, tmp_path)
    assert codes == [0, 0], said
    expected = [[8.0, 1, 1024.0, 2.0], [8.0, 1, 512.0, math.inf], [6.0, 2, 512.0, 4.0]]  # the rates: 1, -, 1/2
    for rank in (0, 1):
        assert json.loads((tmp_path / f"found{rank}.json").read_text()) == expected


def drift():
    world = distributed.start("cpu")
    distributed.assert_same_on_all_ranks([torch.ones(3)], world)
    distributed.assert_same_on_all_ranks([torch.ones(3) * (1 + world.rank)], world)


def test_one_rank_that_drifts_is_noticed(tmp_path):
    codes, said = on_ranks(drift, (), 2, tmp_path)
    assert codes[1] != 0
    assert "the parameters of rank 1 differ from those of rank 0" in said[1]
