"""memory_estimate.py: every term that a CPU can check against the bytes of real tensors, and --estimate-memory."""

import shutil
from argparse import Namespace

import pytest
import torch
import transformers
from conftest import random_batch, run_script, tiny_model
from test_flags import write_world

import dpo_hf_run
import learn_prompt
import lora
import memory_estimate
import packed_model
import train_rm
import train_safe_mm_dpo
import train_with_preference_prompt
from memory_estimate import GB, Estimate, measure
from packed_model import TokenLogps

MODELS = "qwen3", "llama", "gpt2"
MISTRAL = dict(
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
)


def flags(**changes):
    plain = dict(dtype="bf16", lora_r=16, lora_dropout=0.0, batch_size=4, gradient_accumulation_steps=2)
    plain |= dict(max_length=512, max_prompt_length=256, tokens_per_microbatch=0, gradient_checkpointing="off")
    return Namespace(**plain | changes)


def skeleton_of(model):
    with torch.device("meta"):
        return type(model)(model.config)


def estimate_of(name, lora_r, ranks=1):
    skeleton = skeleton_of(tiny_model(name))
    if lora_r:
        lora.add_adapter(skeleton, "policy", lora_r, 32)
    return Estimate(skeleton, lora.add_adapter, TokenLogps, ranks)


def real_bytes(tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize("lora_r", [4, 0])
@pytest.mark.parametrize("name", MODELS)
def test_weights_adapters_gradients_and_optimiser_are_those_of_a_real_update(name, lora_r):
    model = tiny_model(name, torch.bfloat16 if lora_r else torch.float32)
    parameters = lora.add_adapter(model, "policy", lora_r, 32) if lora_r else list(model.parameters())
    packed_model.prepare_model(model)
    sum(packed_model.packed_logps(model, random_batch([(3, 4, 5)]))).sum().backward()
    optimizer = torch.optim.AdamW(parameters)
    optimizer.step()
    moments = [value for state in optimizer.state.values() for value in state.values() if value.ndim]
    rows = estimate_of(name, lora_r, ranks=2).rows(flags(lora_r=lora_r))
    adapters = [p for p_name, p in model.named_parameters() if "lora_" in p_name]
    base = [p for p_name, p in model.named_parameters() if "lora_" not in p_name]
    assert rows["policy weights"] == [real_bytes(base)] * 4
    assert rows["adapters"] == [real_bytes(adapters)] * 4
    assert rows["gradients"][1] == rows["flat gradient"][3] == real_bytes(p.grad for p in parameters)
    assert rows["optimiser (AdamW)"][1] == real_bytes(moments)
    assert rows["reference"] == ([0] * 4 if lora_r else [real_bytes(base), 0, 0, 0])


@pytest.mark.parametrize("trained, with_kl", [(False, False), (False, True), (True, False)])
@pytest.mark.parametrize("name", MODELS)
def test_the_heads_chunk_is_what_real_tensors_take(name, trained, with_kl):
    model = tiny_model(name, vocab_size=2000)  # where what is as long as the tokens hardly counts, as in real ones
    model.requires_grad_(trained)
    num_tokens = 3000
    expected = memory_estimate.head_bytes(
        skeleton_of(model).requires_grad_(trained), TokenLogps, num_tokens, torch.float32, with_kl
    )
    weight = model.get_output_embeddings().weight
    states = torch.randn(num_tokens, weight.shape[1], requires_grad=True)
    targets = torch.zeros(num_tokens, dtype=torch.long)

    def work():
        reference = (states.detach().clone(), weight.detach(), None) if with_kl else None
        packed_model.token_logps(states, weight, targets, None, reference=reference).sum().backward()

    assert memory_estimate.most_alive(work) == pytest.approx(expected[0], rel=0.01)
    pieces = min(num_tokens, memory_estimate.HEAD_CHUNK) * weight.shape[0] * 4
    assert expected[0] > (pieces if not with_kl else 1.5 * pieces)
    assert memory_estimate.HEAD_CHUNK == packed_model.HEAD_CHUNK


@pytest.mark.parametrize("lora_r", [4, 0])
@pytest.mark.parametrize("name", MODELS)
def test_activations_are_those_of_a_real_pass_over_packed_pairs(name, lora_r):
    """Prompts of one token: the pairs that are the longest.  torch's CPU kernel keeps what a fused GPU kernel keeps."""
    model, batch = tiny_model(name), random_batch([(1, 30, 30)] * 2)
    skeleton = skeleton_of(model)
    for each in (model, skeleton):
        if lora_r:
            lora.add_adapter(each, "policy", lora_r, 32)
    packed_model.prepare_model(model)
    own, saved = {p.untyped_storage()._cdata for p in (*model.parameters(), *model.buffers())}, {}

    def keep(tensor):
        saved[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        states = packed_model._packed_hidden(model, batch)
    real = sum(t.untyped_storage().nbytes() for key, t in saved.items() if key not in own)
    packed_model.disable_dropout(skeleton)
    counted = measure(skeleton.float(), states.shape[0])
    assert sum(counted.saved) == pytest.approx(real, rel=0.1)


def test_twice_the_tokens_take_twice_and_checkpointing_takes_less():
    skeleton = skeleton_of(tiny_model("qwen3"))
    lora.add_adapter(skeleton, "policy", 4, 32)
    once, twice = measure(skeleton, 512), measure(skeleton, 1024)
    assert sum(twice.saved) == pytest.approx(2 * sum(once.saved), rel=0.02)
    assert once.kept(True, False) < once.kept(True, True) < once.kept(False, True)


@pytest.fixture(scope="module")
def mistral():
    with torch.device("meta"):
        return transformers.MistralForCausalLM(transformers.MistralConfig(**MISTRAL))


def test_a_7b_model_with_lora_fits_where_the_documents_say(mistral):
    estimate = Estimate(mistral, lora.add_adapter, TokenLogps)
    rows = estimate.rows(flags(gradient_checkpointing="on"))
    assert rows["policy weights"][0] == pytest.approx(14.5 * GB, rel=0.01)
    assert estimate.total(flags(gradient_checkpointing="on")) < 20 * GB
    full = flags(lora_r=0, gradient_checkpointing="auto")
    assert estimate.total(full) > 80 * GB
    assert "fits no card" in estimate.report(full)
    assert estimate.lever(full, 80 * GB) == "--lora-r 16"


@pytest.mark.parametrize(
    "changes, limit, words",
    [
        (dict(), 30, "--batch-size 2 --gradient-accumulation-steps 4"),
        (dict(batch_size=1), 20, "--gradient-checkpointing on"),
        (dict(batch_size=1), 2, None),
    ],
)
def test_the_lever_that_is_named_makes_it_fit(mistral, changes, limit, words):
    estimate, args = Estimate(mistral, lora.add_adapter, TokenLogps), flags(**changes)
    assert estimate.total(args) > limit * GB
    assert estimate.lever(args, limit * GB) == words
    if words:
        pairs = zip(words.split()[::2], words.split()[1::2])
        found = {flag[2:].replace("-", "_"): int(value) if value.isdigit() else value for flag, value in pairs}
        assert estimate.total(Namespace(**vars(args) | found)) <= limit * GB


SCRIPTS = {
    dpo_hf_run: ["--dataset", "missing.jsonl"],
    train_rm: ["--task", "helpful"],
    train_safe_mm_dpo: [],
    train_with_preference_prompt: ["--preference-text", "a"],
    learn_prompt: ["--prompt-init", "vocab"],
}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_every_script_estimates_from_the_config_alone_and_leaves_nothing(script, tmp_path, monkeypatch, capsys):
    model = write_world(tmp_path / "world") / "model"
    bare = tmp_path / "bare"
    shutil.copytree(model, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    run_script(
        ["--model", bare, *SCRIPTS[script], "--estimate-memory", "--device", "cpu", "--output-dir", "run"], script
    )
    assert sorted(tmp_path.rglob("*")) == before
    printed = capsys.readouterr().out
    assert "bfloat16 (--dtype auto on a GPU)" in printed
    assert "fits 24, 40, 64, 80, 141 GB" in printed
