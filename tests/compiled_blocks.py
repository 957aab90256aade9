"""--compile: the same numbers from compiled blocks, of few graphs, in training alone.  test_compiled.py runs this."""

import pytest
import torch
from runs import dpo_run
from tiny_models import SHAPES, double_model, random_adapter, random_batch, tiny_model
from torch._dynamo.utils import counters
from transformers import AttentionInterface

import lora
from formats.model_files import enable_checkpointing
from harness import compiled
from harness.four_bit import quantise
from packed_attention import packed_attention
from packed_model import prepare_model


@pytest.fixture(autouse=True)
def as_before():
    torch._dynamo.reset()
    counters.clear()
    yield
    AttentionInterface.register("packed_pairs", packed_attention)


def graphs():
    return counters["stats"]["unique_graphs"]


def gradients(model, parameters, batch):
    chosen, rejected = model.packed_logps(batch)
    return torch.autograd.grad((chosen - 0.5 * rejected).sum(), parameters)


def trained(name, four_bits=False, recomputes=False, dropout=0.0):
    """A model with an adapter, in training, and the adapter's parameters; in fp64, norms too, or on 4 bits."""
    model = tiny_model(name) if four_bits else double_model(name)
    if four_bits:
        quantise(model, torch.device("cpu"))
    parameters = random_adapter(model)
    for layer in lora.lora_layers(model).values():
        layer.settings["policy"] = layer.settings["policy"][0], dropout
    prepare_model(model)
    if recomputes:
        enable_checkpointing(model, draws=dropout > 0)
    return model.train(), parameters


@pytest.mark.parametrize(("name", "recomputes"), [("qwen3", True), ("gemma3", False)])
def test_compiled_blocks_give_the_same_gradients_from_the_same_graphs_in_passes_of_any_size(name, recomputes):
    model, parameters = trained(name, recomputes=recomputes)
    batches = random_batch(SHAPES[:2]), random_batch(SHAPES)
    wanted = [gradients(model, parameters, batch) for batch in batches]
    line = compiled.compile_blocks(model, recomputes, draws=False)
    assert line == "--compile: 2 blocks, in the first updates, which takes a minute or more"
    counters.clear()  # of the question whether there is a compiler
    counts = []
    for batch, of_batch in zip(batches, wanted):
        for got, eager in zip(gradients(model, parameters, batch), of_batch, strict=True):
            torch.testing.assert_close(got, eager, rtol=1e-9, atol=1e-9 * eager.abs().max().item())
        counts.append(graphs())
    assert counts[0] == counts[1] > 0
    model.eval()
    with torch.no_grad():
        model.packed_logps(batches[0])
    assert graphs() == counts[0]


def test_dropout_recomputed_in_compiled_blocks_is_the_same_again():
    """Of the log-probs by B, which is behind dropout: the difference quotient, with the draws held."""
    model, parameters = trained("qwen3", recomputes=True, dropout=0.5)
    compiled.compile_blocks(model, recomputes=True, draws=True)
    batch, weight, step = random_batch(SHAPES[:2]), parameters[1], 1e-4
    direction = torch.ones_like(weight)

    def loss():
        torch.manual_seed(0)
        return (model.packed_logps(batch)[0]).sum()

    (gradient,) = torch.autograd.grad(loss(), [weight])
    with torch.no_grad():
        weight += step * direction
        after = loss()
        weight -= 2 * step * direction
        before = loss()
    slope = ((after - before) / (2 * step)).item()
    assert (gradient.double() * direction).sum().item() == pytest.approx(slope, rel=1e-3)
    assert graphs() > 0


def test_a_base_in_4_bits_is_compiled_around():
    pytest.importorskip("bitsandbytes", reason="the base in 4 bits is bitsandbytes's")
    model, parameters = trained("qwen3", four_bits=True, recomputes=True)
    batch = random_batch(SHAPES)
    wanted = gradients(model, parameters, batch)
    compiled.compile_blocks(model, recomputes=True, draws=False)
    for got, eager in zip(gradients(model, parameters, batch), wanted, strict=True):
        torch.testing.assert_close(got, eager, rtol=1e-4, atol=1e-4 * eager.abs().max().item())


def test_a_compiled_run_learns_the_same_and_goes_on_without(world, tmp_path, capsys):
    eager = dpo_run(world, tmp_path / "eager", max_steps=4, gradient_checkpointing="on")
    settings = dict(max_steps=4, gradient_checkpointing="on", save_steps=2)
    fast = dpo_run(world, tmp_path / "fast", **settings, compile=True)
    lines = capsys.readouterr().out.splitlines()
    assert lines.count("--compile: 2 blocks, in the first updates, which takes a minute or more") == 1
    assert graphs() > 0
    assert [line["loss"] for line in fast.train] == pytest.approx([line["loss"] for line in eager.train], rel=1e-5)
    assert fast.train[-1]["grad_norm"] == pytest.approx(eager.train[-1]["grad_norm"], rel=1e-4)
    half = tmp_path / "fast" / "checkpoint-2"
    rest = dpo_run(world, tmp_path / "fast", **settings, resume=half)  # as --gradient-checkpointing it may change
    assert rest.train[-1]["loss"] == pytest.approx(eager.train[-1]["loss"], rel=1e-5)
