"""LoRA against PEFT on the same weights, named adapters on one base, merging, and adapter files right and wrong."""

import copy
import json
import math
import re
import shutil
from types import SimpleNamespace

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from runs import adapter_of
from safetensors.torch import load_file, save_file
from tiny_models import randomize, tiny_model
from torch import nn
from torch.testing import assert_close
from transformers.pytorch_utils import Conv1D
from worlds import edit_config, edit_state

import lora
from lora import (
    AdapterError,
    FusedLoRA,
    LoRALinear,
    adapter_state,
    add_adapter,
    fused_lora,
    load_adapter,
    lora_layers,
    lora_linear,
    merge_adapter,
    save_adapter,
    select_targets,
    switch_adapter,
    use_adapter,
)

IDS = torch.arange(2, 50).view(3, 16)
QWEN_LINEARS = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks for it


@torch.no_grad()
def logits(model, ids=IDS):
    return model(input_ids=ids).logits


def adapted(name="qwen3", r=4, alpha=8, targets=None, adapter="policy", dropout=0.0, **options):
    model = tiny_model(name, **options)
    torch.manual_seed(3)
    randomize(add_adapter(model, adapter, r, alpha, dropout, targets))
    return model


def peft_model(base, seed=7, **config):
    """PEFT's model with A and B random on a copy of `base`, in eval mode."""
    config = dict(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM") | config
    transposed = base.config.model_type == "gpt2"
    model = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(fan_in_fan_out=transposed, **config))
    randomize([parameter for key, parameter in model.named_parameters() if "lora_" in key], seed)
    return model.eval()


# -- a fresh adapter -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["qwen3", "llama", "gpt2"])
def test_a_fresh_adapter_changes_no_bit_of_the_output_and_no_tensor_of_the_base(name, dtype):
    model = tiny_model(name, dtype)
    before, state = logits(model), copy.deepcopy(model.state_dict())
    parameters = add_adapter(model, "policy", r=4, alpha=8)
    assert torch.equal(logits(model), before)
    after = model.state_dict()
    assert [key for key in after if "lora_" not in key] == list(state)
    assert all(torch.equal(after[key], tensor) for key, tensor in state.items())
    targets = select_targets(model)
    assert {key for key in after if "lora_" in key} == {f"{p}.lora_{x}.policy" for p in targets for x in "AB"}
    trainable = {key: parameter for key, parameter in model.named_parameters() if parameter.requires_grad}
    assert all("lora_" in key for key in trainable)
    assert all(parameter.dtype == torch.float32 for parameter in parameters)
    # [A, B, A, B, ...] in module order: an optimiser's state is restored by this order.
    assert [id(parameter) for parameter in parameters] == [id(parameter) for parameter in trainable.values()]
    for path, a, b in zip(targets, parameters[0::2], parameters[1::2]):
        layer = model.get_submodule(path)
        assert a is layer.lora_A["policy"] and b is layer.lora_B["policy"]
        assert a.shape == (4, layer.in_features) and b.shape == (layer.out_features, 4)
        assert torch.equal(b, torch.zeros_like(b))
        bound = 1 / math.sqrt(layer.in_features)  # Kaiming-uniform with a = sqrt(5)
        assert 0.9 * bound < a.abs().max() <= bound
        assert abs(a.mean()) < 0.2 * bound


def test_the_same_seed_draws_the_same_adapter_and_another_seed_another():
    drawn = []
    for seed in (0, 0, 1):
        model = tiny_model("qwen3")
        torch.manual_seed(seed)
        drawn.append(torch.cat([p.flatten() for p in add_adapter(model, "policy", 4, 8)]))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_an_adapter_added_as_frozen_trains_nothing():
    model = tiny_model("qwen3")
    assert not any(parameter.requires_grad for parameter in add_adapter(model, "ref", 4, 8, trainable=False))
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("base", [nn.Linear(5, 3), nn.Linear(5, 3, bias=False), Conv1D(3, 5)])
def test_the_layer_is_its_equation(base):
    layer = LoRALinear(base)
    assert (layer.in_features, layer.out_features) == (5, 3)
    a, b, x = torch.randn(2, 5), torch.randn(3, 2), torch.randn(4, 6, 5)
    layer.lora_A["x"], layer.lora_B["x"], layer.settings["x"] = nn.Parameter(a), nn.Parameter(b), (1.5, 0.0)
    assert torch.equal(layer(x), F.linear(x, base.weight.t() if isinstance(base, Conv1D) else base.weight, base.bias))
    layer.active = "x"
    torch.testing.assert_close(layer(x), base(x) + 1.5 * (x @ a.t() @ b.t()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7, 5), (2, 3, 5), (0, 5)])
def test_the_fused_function_has_the_values_and_every_gradient_of_its_definition(shape, bias):
    draw = torch.Generator().manual_seed(0)

    def tensor(*size):
        return torch.randn(size, generator=draw, dtype=torch.float64).requires_grad_()

    inputs = tensor(*shape), tensor(3, 5), tensor(3) if bias else None, tensor(2, 5), tensor(3, 2)
    fused, plain = fused_lora(*inputs, 1.5), lora_linear(*inputs, 1.5)
    assert_close(fused, plain, rtol=1e-13, atol=1e-13)
    wanted = [tensor for tensor in inputs if tensor is not None]
    grad = torch.randn(plain.shape, generator=draw, dtype=torch.float64)
    for ours, theirs in zip(torch.autograd.grad(fused, wanted, grad), torch.autograd.grad(plain, wanted, grad)):
        assert_close(ours, theirs, rtol=1e-13, atol=1e-13)
    assert torch.autograd.gradcheck(lambda *tensors: fused_lora(*tensors, 1.5), inputs)


@pytest.mark.parametrize("name", ["qwen3", "gpt2"])  # gpt2: Conv1D, whose weight is used transposed
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_with_the_fused_function_has_the_gradients_of_the_plain_one(name, dtype, monkeypatch):
    gradients = {}
    for path in ("fused", "plain"):
        if path == "plain":
            monkeypatch.setattr(FusedLoRA, "apply", lora_linear)
        model = adapted(name)
        model = model.to(dtype)
        for layer in lora_layers(model).values():
            layer.lora_A.float(), layer.lora_B.float()
        model(input_ids=IDS, labels=IDS).loss.backward()
        gradients[path] = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])
    assert gradients["fused"].dtype == torch.float32
    assert gradients["plain"].norm() > 0.1
    difference = (gradients["fused"] - gradients["plain"]).norm() / gradients["plain"].norm()
    assert difference < (1e-6 if dtype == torch.float32 else 0.03)


def test_the_fused_function_keeps_the_input_once_and_nothing_else_of_its_size():
    """What a layer holds until backward, in bytes: no fp32 copy of the input, no second output."""
    kept, x = [], torch.randn(64, 40, dtype=torch.bfloat16, requires_grad=True)
    layer = LoRALinear(nn.Linear(40, 48, dtype=torch.bfloat16).requires_grad_(False))
    a, b = nn.Parameter(torch.randn(4, 40)), nn.Parameter(torch.randn(48, 4))
    layer.lora_A["x"], layer.lora_B["x"], layer.settings["x"], layer.active = a, b, (1.5, 0.0), "x"
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        layer(x)
    by_storage = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in kept}
    weights = sum(tensor.numel() * 2 for tensor in (layer.weight, a, b))  # A and B as they are multiplied
    assert sum(by_storage.values()) == weights + 64 * 40 * 2 + 64 * 4 * 2  # x, and x A^T


# -- against PEFT --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rslora", [False, True], ids=["lora", "rslora"])
@pytest.mark.parametrize("name", ["qwen3", "llama", "gpt2"])
def test_forward_and_gradients_equal_pefts(name, rslora, tmp_path):
    theirs = peft_model(tiny_model(name), r=3, lora_alpha=7, use_rslora=rslora)
    theirs.save_pretrained(tmp_path)
    ours = tiny_model(name)
    base = logits(ours)
    load_adapter(ours, tmp_path, "policy", trainable=True)
    assert (logits(ours) - base).abs().max() > 0.1
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-5, atol=1e-5)

    weights = torch.linspace(-1, 1, 64)
    for model in (ours, theirs):
        for key, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in key)
        (model(input_ids=IDS).logits.log_softmax(-1) * weights).mean().backward()
    expected = {
        key.removeprefix("base_model.model.").replace(".default.weight", ""): parameter.grad
        for key, parameter in theirs.named_parameters()
        if parameter.grad is not None
    }
    got = {key.removesuffix(".policy"): p.grad for key, p in ours.named_parameters() if p.grad is not None}
    assert got.keys() == expected.keys()
    for key, gradient in got.items():
        assert (gradient - expected[key]).norm() <= 1e-5 * expected[key].norm(), key


@pytest.mark.parametrize("name", ["qwen3", "llama", "gpt2"])
@pytest.mark.parametrize("targets", [None, "two", "one layer"])
def test_plain_peft_loads_our_files(name, targets, tmp_path):
    two = ["c_attn", "mlp.c_proj"] if name == "gpt2" else ["q_proj", "down_proj"]
    if targets == "two":
        targets = two
    elif targets == "one layer":  # short names would catch the other layer too
        targets = [path for path in select_targets(tiny_model(name)) if ".1." in path]
    ours = adapted(name, r=5, alpha=7, targets=targets)
    save_adapter(ours, "policy", tmp_path, base_model="some/base")
    theirs = peft.PeftModel.from_pretrained(tiny_model(name), tmp_path).eval()
    wrapped = {key for key, module in theirs.named_modules() if isinstance(module, peft.tuners.lora.LoraLayer)}
    assert wrapped == {"base_model.model." + path for path in lora_layers(ours)}
    torch.testing.assert_close(logits(theirs), logits(ours), rtol=1e-5, atol=1e-5)
    assert (logits(ours) - logits(tiny_model(name))).abs().max() > 0.1


def test_our_files_say_what_pefts_say_and_come_back_bit_for_bit(tmp_path):
    ours = adapted("gpt2", r=4, alpha=8, dropout=0.05)
    save_adapter(ours, "policy", tmp_path / "ours", base_model="some/base")
    peft_model(tiny_model("gpt2"), lora_dropout=0.05).save_pretrained(tmp_path / "theirs")
    config, theirs = (json.loads((tmp_path / who / "adapter_config.json").read_text()) for who in ("ours", "theirs"))
    for key in config.keys() - {"base_model_name_or_path", "target_modules"}:
        assert config[key] == theirs[key], key
    assert config["fan_in_fan_out"] is True  # Conv1D keeps its weight transposed
    assert config["base_model_name_or_path"] == "some/base"
    assert config["target_modules"] == ["c_attn", "c_fc", "c_proj"]
    state, their_state = (load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs"))
    assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in their_state.items()}

    again = tiny_model("gpt2")
    parameters = load_adapter(again, tmp_path / "ours", "other name", trainable=True)
    assert torch.equal(logits(again.eval()), logits(ours.eval()))
    assert all(parameter.requires_grad and parameter.dtype == torch.float32 for parameter in parameters)
    assert {layer.settings["other name"] for layer in lora_layers(again).values()} == {(2.0, 0.05)}


def test_llama_files_do_not_say_transposed_and_a_loaded_adapter_is_frozen_by_default(tmp_path):
    save_adapter(adapted("llama"), "policy", tmp_path, base_model="some/base")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["fan_in_fan_out"] is False
    assert config["target_modules"] == QWEN_LINEARS
    assert not any(parameter.requires_grad for parameter in load_adapter(tiny_model("llama"), tmp_path, "ref"))


def test_an_rslora_adapter_keeps_its_scale_through_our_own_files(tmp_path):
    theirs = peft_model(tiny_model("qwen3"), r=3, lora_alpha=7, use_rslora=True)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = tiny_model("qwen3")
    load_adapter(ours, tmp_path / "theirs", "policy")
    save_adapter(ours, "policy", tmp_path / "ours", base_model="some/base")  # says use_rslora false: alpha carries it
    again = peft.PeftModel.from_pretrained(tiny_model("qwen3"), tmp_path / "ours").eval()
    torch.testing.assert_close(logits(again), logits(theirs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "regex", "count"),
    [("qwen3", r".*\.1\.self_attn\.[qv]_proj", 2), ("gpt2", r"transformer\.h\.\d+\.mlp\.c_(fc|proj)", 4)],
)
def test_a_regular_expression_in_a_peft_config_selects_the_same_layers(name, regex, count, tmp_path):
    theirs = peft_model(tiny_model(name), target_modules=regex)
    theirs.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == regex
    ours = tiny_model(name)
    load_adapter(ours, tmp_path, "policy")
    assert len(lora_layers(ours)) == count
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-5, atol=1e-5)


# -- which layers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spelling", [None, "all-linear", ["all-linear"]])
@pytest.mark.parametrize("name", ["qwen3", "qwen2", "llama", "mistral", "gemma3", "gpt2", "bloom"])
def test_default_targets_are_pefts_all_linear(name, spelling):
    theirs = peft_model(tiny_model(name), target_modules="all-linear")
    wrapped = {key for key, module in theirs.named_modules() if isinstance(module, peft.tuners.lora.LoraLayer)}
    targets = select_targets(tiny_model(name), spelling)
    assert {"base_model.model." + path for path in targets} == wrapped
    assert len(targets) == len(wrapped) == (8 if name in ("gpt2", "bloom") else 14)


def test_named_targets_match_whole_words_at_the_end_of_the_path():
    model = tiny_model("gpt2")
    blocks = ["transformer.h.0.", "transformer.h.1."]
    assert select_targets(model, ["c_attn"]) == [block + "attn.c_attn" for block in blocks]
    assert select_targets(model, ["mlp.c_proj"]) == [block + "mlp.c_proj" for block in blocks]
    assert select_targets(model, ["transformer.h.1.attn.c_proj"]) == ["transformer.h.1.attn.c_proj"]
    with pytest.raises(AdapterError):
        select_targets(model, ["proj"])  # ends the word c_proj, and is not the word


def test_the_head_is_accepted_untied_and_refused_tied():
    assert select_targets(tiny_model("llama"), ["lm_head"]) == ["lm_head"]
    ours, base = adapted("llama", targets=["lm_head", "q_proj"]), logits(tiny_model("llama"))
    assert len(lora_layers(ours)) == 3
    assert (logits(ours) - base).abs().max() > 0.1
    tied = tiny_model("qwen3")
    with pytest.raises(AdapterError) as error:
        add_adapter(tied, "policy", 4, 8, target_modules=["q_proj", "lm_head"])
    assert "lm_head shares its weight with the input embeddings" in str(error.value)
    assert not lora_layers(tied) and all(parameter.requires_grad for parameter in tied.parameters())


@pytest.mark.parametrize(("name", "known"), [("qwen3", ", ".join(QWEN_LINEARS)), ("gpt2", "c_attn, c_fc, c_proj")])
def test_targets_that_match_nothing_name_the_flag_and_the_models_own_layers(name, known):
    model = tiny_model(name)
    with pytest.raises(AdapterError) as error:
        add_adapter(model, "policy", 4, 8, target_modules=["query", "value"])
    expected = "no linear layer of this model is called query or value: names for --lora-target-modules are"
    assert str(error.value) == f"{expected} {known}"
    assert not lora_layers(model)


# -- several adapters on one base ----------------------------------------------------------------------------------


def two_adapters():
    model = tiny_model("qwen3")
    alone = {None: logits(model)}
    for name, r, targets, seed in (("policy", 4, None, 1), ("reward", 2, ["q_proj", "up_proj"], 2)):
        single = tiny_model("qwen3")
        randomize(add_adapter(single, name, r, 3 * r, target_modules=targets), seed)
        alone[name] = logits(single)
        randomize(add_adapter(model, name, r, 3 * r, target_modules=targets), seed)
    return model, alone


def test_each_of_two_adapters_gives_what_it_gives_alone_and_none_gives_the_base():
    model, alone = two_adapters()
    assert torch.equal(logits(model), alone["reward"])  # the last one added is on
    for name in ("policy", None, "reward", "policy"):
        switch_adapter(model, name)
        assert torch.equal(logits(model), alone[name])
    assert min((alone[x] - alone[y]).abs().max() for x, y in ((None, "policy"), (None, "reward"))) > 0.1


def test_use_adapter_nests_and_switches_back_even_after_an_error():
    model, alone = two_adapters()
    switch_adapter(model, "policy")
    with use_adapter(model, None) as same:
        assert same is model
        assert torch.equal(logits(model), alone[None])
        with use_adapter(model, "reward"):
            assert torch.equal(logits(model), alone["reward"])
        assert torch.equal(logits(model), alone[None])
        with pytest.raises(RuntimeError, match="inside"), use_adapter(model, "policy"):
            assert torch.equal(logits(model), alone["policy"])
            raise RuntimeError("inside")
        assert torch.equal(logits(model), alone[None])
    assert torch.equal(logits(model), alone["policy"])


@pytest.mark.parametrize("active", ["policy", "reward"])
def test_gradients_flow_into_the_active_adapter_only(active):
    model, _ = two_adapters()
    switch_adapter(model, active)
    model(input_ids=IDS).logits.square().mean().backward()
    reached = {key for key, parameter in model.named_parameters() if parameter.grad is not None}
    assert reached == {key for key, _ in model.named_parameters() if key.endswith("." + active)}
    assert all(p.grad.abs().max() > 0 for _, p in model.named_parameters() if p.grad is not None)


def test_files_hold_the_named_adapter_alone(tmp_path):
    model, alone = two_adapters()
    for name in ("policy", "reward"):
        save_adapter(model, name, tmp_path / name, base_model="some/base")
        again = tiny_model("qwen3")
        load_adapter(again, tmp_path / name, "again")
        assert torch.equal(logits(again), alone[name])
    assert len(load_file(tmp_path / "reward" / "adapter_model.safetensors")) == 2 * 4  # A and B of four layers
    assert json.loads((tmp_path / "reward" / "adapter_config.json").read_text())["r"] == 2


def test_adapter_state_is_a_view_of_the_live_parameters():
    model = adapted()
    state = adapter_state(model, "policy")
    with torch.no_grad():
        next(iter(lora_layers(model).values())).lora_B["policy"].fill_(3)
    assert state["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"].eq(3).all()


# -- dropout -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", [nn.Linear(40, 3), Conv1D(3, 40)])
def test_dropout_touches_the_lora_branch_alone_and_in_train_mode_alone(base):
    layer, x = LoRALinear(base), torch.randn(6, 40)
    layer.lora_A["x"], layer.lora_B["x"] = nn.Parameter(torch.randn(2, 40)), nn.Parameter(torch.randn(3, 2))
    layer.settings["x"], layer.active = (0.5, 0.4), "x"

    def expected(branch_input):
        return base(x) + 0.5 * F.linear(F.linear(branch_input, layer.lora_A["x"]), layer.lora_B["x"])

    torch.manual_seed(2)
    dropped = F.dropout(x, 0.4)
    torch.manual_seed(2)
    torch.testing.assert_close(layer(x), expected(dropped), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.eval()(x), expected(x), rtol=1e-5, atol=1e-5)


def test_an_adapter_added_in_eval_mode_is_in_eval_mode():
    """A module is born in train mode: on a model that is being evaluated the new layers would drop out alone."""
    model = adapted(dropout=0.5)
    assert not any(module.training for module in model.modules())
    assert torch.equal(logits(model), logits(model))
    assert all(layer.training for layer in lora_layers(adapted(dropout=0.5).train()).values())


def test_the_reference_pass_knows_no_dropout_and_draws_no_random_number():
    model = adapted(dropout=0.5).eval()
    base, steady = logits(tiny_model("qwen3")), logits(model)
    assert torch.equal(logits(model), steady)
    model.train()
    assert not torch.equal(logits(model), logits(model))
    with use_adapter(model, None):
        state = torch.get_rng_state()
        assert torch.equal(logits(model), base)
        assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(logits(model.eval()), steady)


def test_an_adapter_loaded_frozen_never_drops_out(tmp_path):
    """It is the reference of a policy in train mode, which loads the same file and does drop out."""
    trained = adapted(dropout=0.5).eval()
    save_adapter(trained, "policy", tmp_path, base_model="some/base")
    model = tiny_model("qwen3")
    load_adapter(model, tmp_path, "ref")
    load_adapter(model, tmp_path, "policy", trainable=True)
    model.train()
    assert not torch.equal(logits(model), logits(model))
    with use_adapter(model, "ref"):
        assert torch.equal(logits(model), logits(trained))


# -- merging -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "targets"),
    [("qwen3", None), ("llama", None), ("llama", ["lm_head", "v_proj"]), ("gpt2", None), ("gpt2", ["c_proj"])],
)
def test_merging_keeps_the_logits_and_leaves_a_plain_model_that_saves_and_loads(name, targets, tmp_path):
    model = adapted(name, targets=targets)
    before, keys = logits(model), set(tiny_model(name).state_dict())
    merge_adapter(model, "policy")
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-5)
    assert set(model.state_dict()) == keys
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(again), logits(model))
    assert (before - logits(tiny_model(name))).abs().max() > 0.1


def test_merging_one_of_two_adapters_folds_that_one_and_drops_both():
    model, alone = two_adapters()
    merge_adapter(model, "policy")  # though "reward" is the one that is on
    torch.testing.assert_close(logits(model), alone["policy"], rtol=1e-5, atol=1e-5)
    assert not [key for key in model.state_dict() if "lora_" in key]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_merging_into_bf16_rounds_once(name):
    model = adapted(name, dtype=torch.bfloat16)
    expected = {}
    for path, layer in lora_layers(model).items():
        update = 2 * (layer.lora_B["policy"].double() @ layer.lora_A["policy"].double())
        exact = layer.weight.double() + (update.t() if name == "gpt2" else update)
        expected[path] = exact.float().bfloat16()
    merge_adapter(model, "policy")
    for path, weight in expected.items():
        got = model.get_submodule(path).weight
        # A tie between two bf16 numbers may fall either way by a last bit of fp32; two roundings miss by far more.
        assert (got != weight).float().mean() < 0.002, path


# -- files that do not fit -----------------------------------------------------------------------------------------


def truncate(folder):
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def say_twice(folder, words):
    path = folder / "adapter_config.json"
    path.write_text(path.read_text().rstrip().removesuffix("}") + f", {words}}}")


FIRST_A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
WRONG = {  # what is done to the folder of a good qwen3 adapter, and what the message must name
    "rank": (lambda d: edit_config(d, r=8), [FIRST_A, "is (4, 32), expected (8, 32) for r=8"]),
    "missing key": (lambda d: edit_state(d, lambda s: s.pop(FIRST_A)), ["lacks 1 tensors", FIRST_A]),
    "foreign key": (
        lambda d: edit_state(d, lambda s: s.update({"base_model.model.score.lora_A.weight": torch.ones(4, 32)})),
        ["has 1 tensors this model has no place for", "base_model.model.score.lora_A.weight"],
    ),
    "both": (
        lambda d: edit_state(d, lambda s: s.update({"x": s.pop(FIRST_A)})),
        ["lacks 1 tensors", "and has 1 tensors this model has no place for (first: x)"],
    ),
    "other targets": (lambda d: edit_config(d, target_modules=["q_proj"]), ["has 24 tensors", "no place for"]),
    "foreign targets": (lambda d: edit_config(d, target_modules=["c_attn"]), ["no linear layer", "called c_attn"]),
    "no weights": (lambda d: (d / "adapter_model.safetensors").unlink(), ["adapter_model.safetensors is missing"]),
    "no config": (lambda d: (d / "adapter_config.json").unlink(), ["adapter_config.json is missing"]),
    "no folder": (lambda d: d.rename(d.with_name("elsewhere")), ["adapter_config.json is missing"]),
    "truncated": (truncate, ["cannot be read as an adapter"]),
    "empty weights": (lambda d: (d / "adapter_model.safetensors").write_bytes(b""), ["cannot be read as an adapter"]),
    "not JSON": (lambda d: (d / "adapter_config.json").write_text("r: 4"), ["cannot be read as an adapter"]),
    "JSON, no object": (lambda d: (d / "adapter_config.json").write_text("[4]"), []),
    "not text": (lambda d: (d / "adapter_config.json").write_bytes(b"\xff\xfe\x00r"), []),
    "other method": (lambda d: edit_config(d, peft_type="IA3"), ["holds a IA3 adapter, only LORA"]),
    "no method": (lambda d: edit_config(d, peft_type=None), ["only LORA is read here"]),
    "DoRA": (lambda d: edit_config(d, use_dora=True), ["use_dora=True"]),
    "trained modules": (lambda d: edit_config(d, modules_to_save=["lm_head"]), ["modules_to_save=['lm_head']"]),
    "biases": (lambda d: edit_config(d, bias="all"), ["bias='all'"]),
    "ranks per layer": (lambda d: edit_config(d, rank_pattern={"q_proj": 2}), ["rank_pattern={'q_proj': 2}"]),
    "alphas per layer": (lambda d: edit_config(d, alpha_pattern={"q_proj": 2}), ["alpha_pattern={'q_proj': 2}"]),
    "some layers": (lambda d: edit_config(d, layers_to_transform=[0]), ["layers_to_transform=[0]"]),
    "excluded": (lambda d: edit_config(d, exclude_modules=["v_proj"]), ["exclude_modules=['v_proj']"]),
    "a rank that is no whole number": (lambda d: edit_config(d, r=4.0), ["says r=4.0", "a whole number from 1"]),
    "no rank": (lambda d: edit_config(d, r=None), ["says r=None"]),
    "rank true": (lambda d: edit_config(d, r=True), ["says r=True"]),
    "rank 0": (lambda d: edit_config(d, r=0), ["says r=0"]),
    "alpha as a text": (lambda d: edit_config(d, lora_alpha="8"), ["says lora_alpha='8'", "a number above 0"]),
    "no alpha": (lambda d: edit_config(d, lora_alpha=None), ["says lora_alpha=None"]),
    "alpha as a list": (lambda d: edit_config(d, lora_alpha=[]), ["says lora_alpha=[]"]),
    "alpha of 400 digits": (lambda d: edit_config(d, lora_alpha=10**400), ["lora_alpha=1000", "at most 1e30"]),
    "alpha beyond fp32": (lambda d: edit_config(d, lora_alpha=1e300), ["says lora_alpha=1e+300", "at most 1e30"]),
    "rank of 400 digits": (lambda d: edit_config(d, r=10**400), ["says r=1000", "from 1 to 65536"]),
    "alpha twice": (lambda d: say_twice(d, '"lora_alpha": 64'), ["`lora_alpha` stands twice"]),
    "alpha NaN": (lambda d: edit_config(d, lora_alpha=math.nan), ["says lora_alpha=nan"]),
    "dropout as a text": (lambda d: edit_config(d, lora_dropout="0.1"), ["lora_dropout='0.1'", "from 0 to below 1"]),
    "dropout 2": (lambda d: edit_config(d, lora_dropout=2), ["says lora_dropout=2"]),
    "rslora as a text": (lambda d: edit_config(d, use_rslora="false"), ["use_rslora='false'", "true or false"]),
    "a number for targets": (lambda d: edit_config(d, target_modules=5), ["says target_modules=5", "a list of names"]),
    "numbers for targets": (lambda d: edit_config(d, target_modules=[5]), ["says target_modules=[5]"]),
    "no targets": (lambda d: edit_config(d, target_modules=[]), ["says target_modules=[]"]),
    "half a regex": (lambda d: edit_config(d, target_modules="("), ["target_modules='('", "a regular expression"]),
    "weights that are whole numbers": (
        lambda d: edit_state(d, lambda s: s.update({FIRST_A: s[FIRST_A].long()})),
        [f"holds {FIRST_A} as torch.int64"],
    ),
    "nested 5,000 deep": (
        lambda d: (d / "adapter_config.json").write_text("[" * 5000 + "]" * 5000),
        ["cannot be read as an adapter"],
    ),
    "a folder for the config": (
        lambda d: ((d / "adapter_config.json").unlink(), (d / "adapter_config.json").mkdir()),
        ["cannot be read as an adapter"],
    ),
    "a folder for the weights": (
        lambda d: ((d / "adapter_model.safetensors").unlink(), (d / "adapter_model.safetensors").mkdir()),
        ["cannot be read as an adapter"],
    ),
    "a file": (lambda d: (shutil.rmtree(d), d.write_text("adapter")), ["adapter_config.json is missing"]),
    # These two come with the usual tensors and other mathematics: PiSSA takes its start out of the base weights, an
    # activated LoRA is off until its invocation tokens.
    "PiSSA": (lambda d: edit_config(d, init_lora_weights="pissa"), ["init_lora_weights='pissa'"]),
    "activated": (lambda d: edit_config(d, alora_invocation_tokens=[5, 6]), ["alora_invocation_tokens=[5, 6]"]),
}


@pytest.fixture(scope="module")
def good_adapter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters") / "good"
    save_adapter(adapted("qwen3"), "policy", folder, base_model="some/base")
    return SimpleNamespace(config=(folder / "adapter_config.json").read_bytes(), folder=folder)


def assert_refused_untouched(model, folder, named):
    before = {key: (id(parameter), parameter.requires_grad) for key, parameter in model.named_parameters()}
    with pytest.raises(AdapterError) as error:
        load_adapter(model, folder, "policy")
    text = str(error.value)
    for words in [str(folder), *named]:
        assert words in text
    assert "\n" not in text
    assert not re.search(r"[.!?] [A-Z]", text), "more than one sentence"
    assert not lora_layers(model)
    after = {key: (id(parameter), parameter.requires_grad) for key, parameter in model.named_parameters()}
    assert after == before


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_adapter_is_refused_in_one_sentence_before_the_model_changes(wrong, good_adapter, tmp_path):
    folder = tmp_path / "adapter"
    folder.mkdir()
    for path in good_adapter.folder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    load_adapter(tiny_model("qwen3"), folder, "policy")  # so that what is refused below is the damage alone
    damage, named = WRONG[wrong]
    damage(folder)
    assert_refused_untouched(tiny_model("qwen3"), folder, named)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (dict(hidden_size=48), ["q_proj.lora_A.weight is (4, 32), expected (4, 48)", "another base"]),
        (dict(intermediate_size=48), ["gate_proj.lora_B.weight is (64, 4), expected (48, 4)", "another base"]),
        (dict(num_hidden_layers=3), ["lacks 14 tensors", "model.layers.2.", "another base"]),
        (dict(num_hidden_layers=1), ["has 14 tensors", "no place for", "model.layers.1.", "another base"]),
    ],
    ids=["wider", "narrower MLP", "deeper", "shallower"],
)
def test_an_adapter_of_another_base_is_refused_before_the_model_changes(changes, named, good_adapter):
    config = tiny_model("qwen3").config.to_dict() | dict(layer_types=None) | changes
    other = transformers.AutoModelForCausalLM.from_config(transformers.Qwen3Config(**config))
    assert_refused_untouched(other, good_adapter.folder, named)


def test_an_adapter_of_a_tied_head_is_refused_for_the_tie_and_not_for_its_base(good_adapter, tmp_path):
    save_adapter(adapted("llama", targets=["q_proj", "lm_head"]), "policy", tmp_path, base_model="some/base")
    assert_refused_untouched(tiny_model("qwen3"), tmp_path, ["lm_head", "shares its weight with the input embeddings"])


def test_a_bf16_adapter_file_loads_as_fp32(good_adapter, tmp_path):
    state = adapter_of(good_adapter.folder)
    save_file({key: tensor.bfloat16() for key, tensor in state.items()}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_bytes(good_adapter.config)
    model = tiny_model("qwen3", torch.bfloat16)
    parameters = load_adapter(model, tmp_path, "policy")
    assert all(parameter.dtype == torch.float32 for parameter in parameters)
    assert torch.equal(adapter_state(model, "policy")[FIRST_A], state[FIRST_A].bfloat16().float())


def test_lora_keys_begin_as_pefts_do():
    assert lora.KEY_PREFIX == "base_model.model."
    theirs = peft.get_peft_model_state_dict(peft_model(tiny_model("qwen3")))
    assert adapter_state(adapted(), "policy").keys() == theirs.keys()
