"""What a model is asked before it is trained: how far back its layers look, whether a token leaks into another
sequence, whether it is causal, and whether train mode is the same network as eval mode.
"""

import copy
import importlib
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import transformers
from odd_models import Calls, build
from runs import run_script
from tiny_models import ON, oracle, random_pairs, scores, tiny_model
from torch import nn
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    chunked_causal_mask_function,
    or_masks,
    sliding_window_causal_mask_function,
)
from worlds import RUNS, write_world

import lora
from formats.model_files import ModelError, load_skeleton, load_tokenizer
from packed_attention import NO_REACH, reach_mask
from packed_model import prepare_model, prepare_scores

# -- windows and chunks --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "packs"), [("phimoe", True), ("qwen2_moe", True), ("llama4", True), ("doge", False)])
@pytest.mark.parametrize("size", [12, 90])  # 90: longer than the test pairs of prepare_model
@torch.no_grad()
def test_a_window_that_only_the_mask_knows_is_seen(name, packs, size):
    what = "attention_chunk_size" if name == "llama4" else "sliding_window"
    model, wide = build(name, **{what: size}), build(name, **{what: 125})
    pairs = random_pairs([(60, 40, 50), (20, 70, 10)])
    expected = oracle(copy.deepcopy(model), pairs)
    assert (oracle(wide, pairs) - expected).abs().max() > 0.1 or name == "doge"  # the window cuts something off
    assert (prepare_model(model).startswith(ON)) == packs
    torch.testing.assert_close(scores(model, pairs), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("mask", "size", "reach"),
    [
        (causal_mask_function, None, 0),
        *((sliding_window_causal_mask_function(n), n, n) for n in (1, 2, 12, 4096, 100_000)),
        *((sliding_window_causal_mask_function(n), None, n) for n in (7, 4096)),  # nobody names it
        *((chunked_causal_mask_function(n, torch.zeros(1, dtype=torch.long)), n, -n) for n in (3, 8192, 50_000)),
        (bidirectional_mask_function, None, NO_REACH),
        (sliding_window_causal_mask_function(0), 0, NO_REACH),
        (or_masks(sliding_window_causal_mask_function(9), lambda b, h, query, key: key < 2), 9, NO_REACH),  # sinks
        (chunked_causal_mask_function(16, torch.full((1,), 5)), 16, NO_REACH),
    ],
)
def test_the_reach_of_a_mask(mask, size, reach):
    assert reach_mask(mask, size).item() == reach


# -- leaks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("prepare", [prepare_model, prepare_scores])
def test_a_leak_that_rounding_would_hide_takes_the_plain_path(dtype, prepare):
    """A state that runs through the row beside attention, as in hybrid models; 1e-4 of a token reaches the next one."""
    model = build("llama", dtype)
    if prepare is prepare_scores:
        model = transformers.LlamaForSequenceClassification(model.config).to(dtype).eval()

    def run_on(module, args):
        states, *others = args
        return states + 1e-4 * F.pad(states, (0, 0, 1, 0))[:, :-1], *others

    model.model.layers[0].register_forward_pre_hook(run_on)
    assert "depend on tokens outside of their own sequence" in prepare(model)
    assert not model.packs_pairs


@torch.no_grad()
def test_a_hybrid_with_attention_in_every_layer_is_scored_one_by_one():
    model = build("falcon_h1", torch.bfloat16, std=0.02)
    pairs, untouched = random_pairs([(10, 7, 5), (4, 6, 8)]), copy.deepcopy(model)
    assert prepare_model(model).startswith("packed pairs: off")
    torch.testing.assert_close(scores(model, pairs), oracle(untouched, pairs).float(), rtol=0.02, atol=0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["bert", "gemma3 of both sides"])
def test_a_model_that_sees_later_tokens_is_no_base(name, dtype):
    with pytest.raises(ModelError, match="is no causal language model.*name a decoder"):
        prepare_model(build(name, dtype, std=0.02))


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    """Folders of an encoder and an encoder-decoder: config and tokenizer, and no weights that could be loaded."""
    folder = tmp_path_factory.mktemp("encoders")
    world = write_world(folder / "world")
    tokenizer = load_tokenizer(str(world / "model"))
    small = dict(vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    of_both = dict(vocab_size=len(tokenizer), d_model=32, encoder_layers=1, decoder_layers=1)
    for config in (transformers.BertConfig(**small), transformers.BartConfig(**of_both), transformers.T5Config()):
        config.save_pretrained(folder / config.model_type)
        tokenizer.save_pretrained(folder / config.model_type)
    return folder


@pytest.mark.parametrize("kind", ["bert", "bart"])
@pytest.mark.parametrize("script", sorted(script for script in RUNS if "--model" in RUNS[script]))
def test_every_script_refuses_an_encoder_before_its_weights(script, kind, encoders, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = RUNS[script].replace("{world}/model", str(encoders / kind)).format(world=encoders / "world").split()
    words += [] if "--output" in words else ["--output-dir", "out"]
    with pytest.raises(SystemExit) as ended:
        run_script(words, importlib.import_module(script.removesuffix(".py")))
    assert ended.value.code == 2
    assert f"{encoders / kind} is no causal language model" in capsys.readouterr().err


def test_an_encoder_decoder_without_a_decoder_of_its_own_is_one_sentence(encoders):
    with pytest.raises(ModelError):
        load_skeleton(str(encoders / "t5"), load_tokenizer(str(encoders / "t5")), SimpleNamespace())


# -- train mode ----------------------------------------------------------------------------------------------------


def train_is_eval(model, pairs):
    before = scores(model.eval(), pairs)
    return all(torch.equal(scores(model.train(), pairs), before) for _ in range(3))


@pytest.mark.parametrize("name", ["seed_oss", "starcoder2", "falcon", "phimoe"])
@torch.no_grad()
def test_chance_of_the_base_is_off_in_train_mode(name):
    model, pairs = build(name), random_pairs([(40, 30, 30), (20, 10, 40)])
    untouched = copy.deepcopy(model).train()
    assert not torch.equal(oracle(untouched, pairs), oracle(untouched, pairs))
    expected = oracle(untouched.eval(), pairs)
    says = prepare_model(model)
    assert ("PhimoeTopKRouter: in training too as in evaluation" in says) == (name == "phimoe")
    assert train_is_eval(model, pairs)
    torch.testing.assert_close(scores(model, pairs), expected, rtol=1e-4, atol=1e-4)
    assert all(block.training for block in model.modules() if hasattr(block, "gradient_checkpointing_enable"))


class Noisy(nn.Module):
    def forward(self, x):
        return x + 0.01 * torch.randn_like(x) if self.training else x


class Doubling(nn.Module):
    def forward(self, x):
        return 2 * x if self.training else x


class Rarely(nn.Module):
    """Draws each time, and what it draws seldom counts: only the state of the generator tells."""

    def forward(self, x):
        return x + (torch.rand(()) > 0.9999) if self.training else x


@pytest.mark.parametrize("kind", [Noisy, Doubling, Rarely])
@torch.no_grad()
def test_a_module_that_is_another_in_train_mode_is_kept_in_eval_mode(kind):
    model = build("llama")
    for layer in model.model.layers:
        layer.mlp.act_fn = nn.Sequential(nn.SiLU(), kind())
    assert f"; {kind.__name__}: in training too as in evaluation" in prepare_model(model)
    assert train_is_eval(model, random_pairs([(9, 5, 6)]))
    again = copy.deepcopy(model).train()
    assert [type(m).__name__ for m in again.modules() if not m.training] == [kind.__name__] * 2
    assert again.model.layers[0].mlp.act_fn[1].training is False and again.model.layers[0].training


def test_a_block_that_is_another_in_train_mode_is_named():
    model = build("llama")
    kind = type(model.model.layers[1])

    class LoudBlock(kind):
        def forward(self, hidden_states, **kwargs):
            return super().forward(hidden_states + self.training * torch.rand_like(hidden_states), **kwargs)

    model.model.layers[1].__class__ = LoudBlock
    with pytest.raises(ModelError, match=r"in train mode its module model.layers.1 \(LoudBlock\) draws chance"):
        prepare_model(model)


@torch.no_grad()
def test_dropout_of_lora_is_no_fault_and_stays():
    model = build("llama")
    for b in lora.add_adapter(model, "policy", 4, 8, dropout=0.5)[1::2]:
        nn.init.normal_(b)
    assert prepare_model(model) == ON
    assert not train_is_eval(model, random_pairs([(9, 5, 6)]))


# -- CUDA ----------------------------------------------------------------------------------------------------------


def test_packed_attention_with_repeated_heads_is_that_with_grouped_ones(monkeypatch):
    model, pairs = tiny_model("qwen3", torch.float64), random_pairs([(5, 4, 3), (2, 6, 1)])
    assert prepare_model(model) == ON
    with torch.no_grad(), Calls() as calls:
        expected = scores(model, pairs)
        monkeypatch.setattr("packed_attention.takes_groups", lambda query: False)
        repeated = scores(model, pairs)
    assert (False, False) in calls.found[: len(calls.found) // 2]
    assert (False, False) not in calls.found[len(calls.found) // 2 :]
    torch.testing.assert_close(repeated, expected, rtol=1e-12, atol=1e-12)
