"""--base-dtype nf4: a base in 4 bits is the model of its own whole weights, to the bit; LoRA on it is PEFT's on
bitsandbytes' layers; runs train, go on and merge; memory.
"""

import copy
import json
import sys

import bitsandbytes
import peft
import pytest
import torch
from helpers import TRAINERS
from runs import assert_same_files, metrics_of, one_line, run_script
from safetensors.torch import load_file
from tiny_models import MISTRAL, ON, SHAPES, oracle, random_adapter, random_pairs, scores, tiny_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from worlds import QUICK, data_of, words_of

import dpo_hf_run
import lora
from formats.model_files import enable_checkpointing
from harness import four_bit, score_cache
from harness.four_bit import FourBit, linears_of_blocks, make_whole, quantise
from harness.memory_estimate import Estimate
from packed_model import prepare_model

CPU = torch.device("cpu")
NF4 = ["--base-dtype", "nf4"]


def both(name, dtype=torch.float32):
    """(a model in 4 bits, the same with those weights made whole)."""
    model = tiny_model(name, dtype)
    quantise(model, CPU)
    whole = copy.deepcopy(tiny_model(name, dtype))
    for packed, plain in zip(linears_of_blocks(model), linears_of_blocks(whole), strict=True):
        plain.weight.data = packed.weight.whole()
    return model, whole


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["qwen3", "mistral", "gemma3"])
def test_it_is_the_model_of_its_whole_weights_to_the_bit(name, dtype, checkpointing):
    """Packed pairs, log-probs and gradients of LoRA; and the packed path is sequences one by one."""
    results, pairs = [], random_pairs(SHAPES)
    for model in both(name, dtype):
        parameters = random_adapter(model, 4, 8)
        assert prepare_model(model) == ON
        if checkpointing:
            enable_checkpointing(model)
        model.train()
        total = scores(model, pairs)
        (total[0] - 0.5 * total[1]).sum().backward()
        results.append([total.detach(), *(parameter.grad for parameter in parameters)])
    assert all(torch.equal(packed, whole) for packed, whole in zip(*results))
    assert results[0][0].std() > 1 and all(gradient.abs().max() > 0 for gradient in results[0][1:])


@torch.no_grad()
def test_packed_pairs_are_sequences_one_by_one():
    model, whole = both("qwen3")
    assert prepare_model(model) == ON
    torch.testing.assert_close(
        scores(model, random_pairs(SHAPES)), oracle(whole, random_pairs(SHAPES)), rtol=1e-5, atol=1e-4
    )


def test_what_is_kept_is_4_127_bits_a_weight_and_no_whole_one():
    linear = nn.Linear(512, 256, bias=False)
    model = tiny_model("qwen3", hidden_size=256, intermediate_size=512)
    quantise(model, CPU)
    kept = 0
    for layer in linears_of_blocks(model):
        scales = layer.weight.scales
        kept += layer.weight.packed.nbytes + scales.absmax.nbytes + scales.state2.absmax.nbytes
    numbers = sum(layer.weight.numel() for layer in linears_of_blocks(model))
    assert 8 * kept / numbers == pytest.approx(four_bit.BITS, rel=2e-3)  # 4.127; a block that is not full counts whole
    saved, x = [], torch.randn(2, 512, requires_grad=True)
    holder = nn.Module()
    holder.weight = FourBit(*_packed(linear.weight), linear.weight.detach())
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        nn.functional.linear(x, holder.weight).sum().backward()
    assert not saved and x.grad is not None


def _packed(weight):
    settings = dict(blocksize=64, compress_statistics=True, quant_type="nf4")
    return bitsandbytes.functional.quantize_4bit(weight.detach(), **settings)


def test_lora_on_it_is_pefts_on_layers_of_bitsandbytes():
    """Outputs and gradients of A and B, fp32, of every linear layer of a model."""
    ours, theirs = tiny_model("llama"), tiny_model("llama")
    quantise(ours, CPU)
    for path, layer in list(theirs.named_modules()):
        if path.endswith("proj"):
            size = layer.in_features, layer.out_features
            new = bitsandbytes.nn.Linear4bit(*size, False, torch.float32, True, "nf4")
            new.weight = bitsandbytes.nn.Params4bit(
                layer.weight.data, False, quant_type="nf4", compress_statistics=True
            )
            parent, _, child = path.rpartition(".")
            setattr(theirs.get_submodule(parent), child, new.to("cpu"))
    theirs.is_loaded_in_4bit = True
    names = sorted({path.rpartition(".")[2] for path, _ in theirs.named_modules() if path.endswith("proj")})
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(r=4, lora_alpha=8, target_modules=names))
    layer = theirs.base_model.model.model.layers[0].mlp.up_proj
    assert type(layer).__module__ == "peft.tuners.lora.bnb" and layer.base_layer.weight.dtype == torch.uint8
    random_adapter(ours, 4, 8)
    state = lora.adapter_state(ours, "policy")
    live = {name.replace(".default", ""): p for name, p in theirs.named_parameters() if "lora_" in name}
    assert live.keys() == state.keys()
    with torch.no_grad():
        for name, parameter in live.items():
            parameter.copy_(state[name])
    ids, grads = torch.arange(2, 34)[None], []
    for model in (ours, theirs):
        logits = model(input_ids=ids).logits
        (logits.log_softmax(-1) * torch.linspace(-1, 1, 64)).mean().backward()
        grads.append(logits.detach())
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-5, atol=1e-5)
    mine = {name.replace(".policy", ".weight"): p for name, p in ours.named_parameters() if "lora_" in name}
    for name, parameter in live.items():
        gradient = mine[name.removeprefix("base_model.model.")].grad
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-4, atol=1e-6)


def test_the_hash_of_the_base_is_its_sources_and_that_of_its_numbers_is_not():
    source = tiny_model("qwen3")
    model, whole = both("qwen3")
    assert score_cache.frozen_sha256(model) == score_cache.frozen_sha256(whole) != score_cache.frozen_sha256(source)
    model.source_sha256 = score_cache.base_sha256(source)  # as Run.load has it
    assert score_cache.base_sha256(model) == score_cache.base_sha256(source)


# -- runs --------------------------------------------------------------------------------------------------------


def train(script, world, out, *words):
    given = ["--model", world / "model", *words_of(script, world), "--output-dir", out, *QUICK, "--max-steps", 4]
    run_script([*given, *NF4, *words], __import__(script))
    return out


@pytest.mark.parametrize("script", TRAINERS)
def test_a_script_trains_says_so_and_goes_on_to_the_same_bytes(script, labelled_world, tmp_path, capsys):
    whole = train(script, labelled_world, tmp_path / "whole", "--save-steps", 2)
    assert "base in 4 bits (NF4): 14 linear layers, " in capsys.readouterr().out
    again = train(script, labelled_world, tmp_path / "again", "--resume", whole / "checkpoint-2")
    assert metrics_of(again)[-1] == metrics_of(whole)[-1]
    if script != "learn_prompt":
        assert_same_files(whole, again, ["adapter_model.safetensors"])
    with pytest.raises(SystemExit):
        given = ["--model", labelled_world / "model", *words_of(script, labelled_world), *QUICK, "--max-steps", 4]
        run_script(
            [*given, "--output-dir", tmp_path / "x", "--resume", whole / "checkpoint-2", "--base-dtype", "same"],
            __import__(script),
        )
    assert "base_dtype" in one_line(capsys)


def test_a_merged_model_is_what_4_bits_left_plus_the_adapter(labelled_world, tmp_path, capsys):
    out = train("dpo_hf_run", labelled_world, tmp_path / "run", "--save-merged", "--learning-rate", 0.01)
    assert "merged: its base is what 4 bits left, made whole in torch.float32" in capsys.readouterr().out
    base = AutoModelForCausalLM.from_pretrained(labelled_world / "model", dtype=torch.float32)
    quantise(base, CPU)
    assert make_whole(base)
    lora.load_adapter(base, out, "policy")
    merged = AutoModelForCausalLM.from_pretrained(out / "merged", dtype=torch.float32)
    ids = torch.arange(2, 12)[None]
    torch.testing.assert_close(merged(ids).logits, base(ids).logits, rtol=1e-5, atol=1e-5)
    lora.switch_adapter(base, None)
    assert (merged(ids).logits - base(ids).logits).abs().max() > 1e-3


def test_numbers_of_4_bits_are_not_those_of_the_cache_of_whole_weights(labelled_world, tmp_path, capsys):
    cache = ["--cache-dir", tmp_path / "cache"]
    train("dpo_hf_run", labelled_world, tmp_path / "four", *cache)
    first = capsys.readouterr().out
    train("dpo_hf_run", labelled_world, tmp_path / "whole", *cache, "--base-dtype", "same")
    second = capsys.readouterr().out
    assert "computed now and kept in" in first and "computed now and kept in" in second
    names = {path.name for path in (tmp_path / "cache").glob("reference-*")}
    numbers = [load_file(tmp_path / "cache" / name)["scores"] for name in names]
    known = numbers[0].isfinite().all(1)
    assert len(names) == 2 and (numbers[0] - numbers[1])[known].abs().max() > 1e-3


def test_reward_adapters_of_the_whole_base_go_on_it_in_4_bits(labelled_world, tmp_path, capsys):
    """As their base is by its source: no second model is loaded."""
    words = [*data_of("train_safe_mm_dpo", labelled_world), *QUICK, "--max-steps", 2]
    run_script(
        ["--model", labelled_world / "model", *words, *NF4, "--output-dir", tmp_path / "run"],
        __import__("train_safe_mm_dpo"),
    )
    assert capsys.readouterr().out.count("an adapter on the policy's frozen base") == 2


# -- what cannot be ------------------------------------------------------------------------------------------------


def test_without_bitsandbytes(labelled_world, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    with pytest.raises(SystemExit) as ended:
        train("dpo_hf_run", labelled_world, tmp_path / "run")
    assert ended.value.code == 2 and not (tmp_path / "run").exists()
    line = one_line(capsys)
    assert line.startswith("dpo_hf_run.py: --base-dtype nf4 needs bitsandbytes (")
    assert line.endswith("): pip install bitsandbytes, or leave it out")


@pytest.mark.parametrize("script", [script for script in TRAINERS if script != "learn_prompt"])
def test_all_weights_cannot_be_trained_in_4_bits(script, labelled_world, tmp_path, capsys):
    words = ["--model", labelled_world / "model", *data_of(script, labelled_world), "--output-dir", tmp_path / "run"]
    with pytest.raises(SystemExit) as ended:
        run_script([*words, *QUICK, *NF4, "--lora-r", 0], __import__(script))
    assert ended.value.code == 2 and not (tmp_path / "run").exists()
    sentence = "--base-dtype nf4 is of a frozen base, and --lora-r 0 trains it: leave one of them out"
    assert one_line(capsys) == f"{script}.py: {sentence}"


def test_a_model_without_linear_layers_in_its_blocks():
    with pytest.raises(
        four_bit.FourBitError, match="^--base-dtype nf4: the blocks of this model have no linear layers"
    ):
        quantise(tiny_model("gpt2"), CPU)


# -- memory --------------------------------------------------------------------------------------------------------


def test_the_estimate_counts_4_bits_of_the_linears_and_one_that_is_whole():
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(AutoConfig.for_model("mistral", **MISTRAL))
    lora.add_adapter(skeleton, "policy", 16, 32)
    flags = ["--gradient-checkpointing", "on", "--batch-size", "1", "--dtype", "bf16"]
    plain, packed = (
        Estimate(skeleton).rows(dpo_hf_run.get_args([*flags, "--base-dtype", kind])) for kind in ("same", "nf4")
    )
    numbers = 32 * (4096 * (4096 + 1024 + 1024 + 4096) + 3 * 4096 * 14336)
    assert plain["policy weights"][0] - packed["policy weights"][0] == pytest.approx(
        numbers * (2 - 4.127 / 8), rel=1e-4
    )
    assert packed["weights made whole"] == [4096 * 14336 * 2, 0, 4096 * 14336 * 2, 0]
    assert {name: row for name, row in packed.items() if name in plain} | {"policy weights": 0} == plain | {
        "policy weights": 0
    }


def test_args_json_names_it(labelled_world, tmp_path):
    out = train("dpo_hf_run", labelled_world, tmp_path / "run")
    assert json.loads((out / "args.json").read_text())["base_dtype"] == "nf4"
