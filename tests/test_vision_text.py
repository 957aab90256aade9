"""Text-only pairs on vision-language models: which class loads them, what is trained, measured and packed."""

import copy
import json
import sys

import pytest
import torch
import transformers
from helpers import ROOT
from runs import metrics_of, run_script
from tiny_models import ON, assert_same, oracle, random_pairs, randomize, scores, skeleton_of, tiny_model
from tiny_vision import FAMILIES, vision_model
from worlds import char_tokenizer, write_rows

import lora
import train_rm
from formats.model_files import load_model
from harness import pass_memory, speed
from harness.memory_estimate import Estimate
from lora_targets import select_targets, text_decoder, train_text
from packed_model import prepare_model

sys.path.insert(0, str(ROOT / "benchmarks"))

from lora_in_peft import in_peft

PAIRS = random_pairs([(5, 4, 3), (9, 1, 6), (12, 7, 8)], vocab=128)


TEXT_READERS = [family for family in FAMILIES if family != "paligemma"]  # whose prompt sees itself


@pytest.mark.parametrize("family", TEXT_READERS)
def test_packed_log_probs_and_gradients_of_text_equal_those_one_by_one(family):
    model, _ = vision_model(family)
    randomize(lora.add_adapter(model, "policy", 4, 8))
    model.double()
    untouched, own = copy.deepcopy(model), model.config._attn_implementation
    tower = model.config.vision_config._attn_implementation
    assert prepare_model(model) == ON
    assert model.config.vision_config._attn_implementation == tower != "packed_pairs"
    weights = torch.linspace(-1, 1.5, 2 * len(PAIRS), dtype=torch.float64).view(2, -1)
    for each, got in ((model, scores(model, PAIRS)), (untouched, oracle(untouched, PAIRS, own))):
        (got * weights).sum().backward()
        each.got = got.detach()
    assert model.got.std() > 1
    assert_same(model.got, untouched.got)
    expected = dict(untouched.named_parameters())
    for path, parameter in model.named_parameters():
        if "lora_" in path:
            assert ".vision" not in path and ".visual" not in path
            assert parameter.grad.norm() > 1e-6
            assert_same(parameter.grad, expected[path].grad, 1e-10)


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_are_in_the_decoder_alone_and_plain_peft_loads_them(family):
    model, _ = vision_model(family, torch.float32)
    inside = {path for path, module in model.named_modules() if module in {*text_decoder(model).modules()}}
    targets = select_targets(model)
    assert len(targets) == 21 and set(targets) <= inside  # 3 blocks of 7
    numbers = in_peft(model)
    assert numbers["fresh"] < 1e-6 and numbers["effect"] > 0.1
    assert numbers["peft"] < 1e-4 and numbers["merged"] < 1e-3
    assert numbers["warnings"] == []


@pytest.mark.parametrize("family", FAMILIES)
def test_where_all_weights_are_trained_what_sees_is_frozen(family):
    model, _ = vision_model(family, torch.float32)
    trained = train_text(model)
    text = [*text_decoder(model).parameters(), model.get_output_embeddings().weight]
    assert {*trained} == {*text}
    assert all(parameter.requires_grad == (parameter in {*text}) for parameter in model.parameters())
    assert len(trained) < len(list(model.parameters()))


def test_of_a_text_model_all_weights_are_trained_in_their_order():
    for name in ("qwen3", "gpt2", "gemma3"):
        model = tiny_model(name)
        assert [*map(id, train_text(model))] == [*map(id, model.parameters())]
        assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("family", TEXT_READERS)
def test_useful_operations_and_memory_are_those_of_the_text_model(family):
    model, _ = vision_model(family, torch.float32)
    hidden, kv, middle, words = 32, 16, 64, 160
    in_blocks = 3 * (2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * middle)
    lora.add_adapter(model, "policy", 4, 8)
    expected = [
        4 * (in_blocks * (p + c + r) + words * hidden * (c + r)) for p, c, r in ((5, 4, 3), (9, 1, 6), (12, 7, 8))
    ]
    assert speed.useful_flops(model, PAIRS) == expected
    blocks = pass_memory.blocks_of(skeleton_of(model))
    assert len(blocks) == 3 and {type(block) for block in blocks} == {type(text_decoder(model).layers[0])}


def test_the_measured_pass_of_a_vision_language_model_is_that_of_its_text_model():
    skeleton = skeleton_of(vision_model("llava")[0])
    with torch.device("meta"):
        of_text = transformers.LlamaForCausalLM(skeleton.config.text_config)
    measured = []
    for each in (skeleton, of_text):
        lora.add_adapter(each, "policy", 4, 8)
        measured.append(Estimate(each).measured(4, 0.0, torch.float32))
    assert measured[0] == measured[1]


# -- as a user has them --------------------------------------------------------------------------------------------


def write_folder(folder, family):
    model, _ = vision_model(family, torch.float32)
    model.save_pretrained(folder)
    char_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("family", "kind"), [("llava", "Llava"), ("qwen2_5_vl", "Qwen2_5_VL"), ("gemma3", "Gemma3")])
def test_a_folder_loads_as_the_whole_model(tmp_path, family, kind):
    model = load_model(str(write_folder(tmp_path / "model", family)), torch.float32, "cpu")
    assert type(model).__name__ == f"{kind}ForConditionalGeneration"


def words_for(folder, **changes):
    flags = dict(dtype="fp32", device="cpu", report_to="none", logging_steps=1, learning_rate=1e-2, max_length=64)
    flags |= dict(max_prompt_length=32, model=folder, output_dir=folder.parent / "out") | changes
    return [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]


def data_for(folder):
    rows = [
        {"prompt": f"{chr(97 + n)}{n}? ", "chosen": "ab" * (n % 5 + 1), "rejected": "cd" * (n % 4 + 1)}
        for n in range(24)
    ]
    return write_rows(folder.parent / "pairs.jsonl", rows)


@pytest.mark.parametrize("lora_r", [4, 0])
def test_a_text_run_trains_the_text_model_and_leaves_the_tower_as_it_was(tmp_path, capsys, lora_r):
    folder = write_folder(tmp_path / "model", "qwen2_5_vl")
    words = words_for(folder, dataset=data_for(folder), lora_r=lora_r, max_steps=3)
    run_script([*words, *(["--save-merged"] if lora_r else [])])
    said = capsys.readouterr().out
    assert ON in said
    before = load_model(str(folder), torch.float32, "cpu").state_dict()
    after = load_model(str(tmp_path / ("out/merged" if lora_r else "out")), torch.float32, "cpu").state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and not any(".visual." in name for name in changed)
    assert any(".language_model." in name for name in changed)


def test_its_memory_is_estimated(tmp_path, capsys):
    folder = write_folder(tmp_path / "model", "llava")
    run_script([*words_for(folder, dataset=data_for(folder)), "--estimate-memory"])
    assert "activations" in capsys.readouterr().out


def test_a_reward_model_on_one_learns_from_text(tmp_path):
    folder = write_folder(tmp_path / "model", "llava")
    out = tmp_path / "out"
    run_script(
        words_for(folder, task="helpful", train_helpful_path=data_for(folder), output_dir=out, eval_samples=0), train_rm
    )
    losses = [line["loss"] for line in metrics_of(out) if "loss" in line]
    assert losses[0] == pytest.approx(0.6931, abs=1e-3) and losses[-1] < losses[0]
    assert json.loads((out / "reward_model.json").read_text())["base_model"] == str(folder)
