"""Which layers get an adapter, on the architectures where that is a question; and that plain PEFT loads all of it."""

import copy
import sys

import pytest
import torch
from helpers import ROOT
from runs import run_script
from tiny_models import tiny_model
from torch import nn
from torch.nn.utils import parametrizations
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification
from worlds import write_world

import lora
from lora import AdapterError, add_adapter, left_out, lora_layers
from lora_targets import select_targets

sys.path.insert(0, str(ROOT / "benchmarks"))

from lora_in_peft import in_peft

SMALL = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=128,
    bos_token_id=0,
    eos_token_id=1,
    pad_token_id=0,
)
EXPERTS = dict(moe_intermediate_size=16, num_experts_per_tok=2)
MLA = dict(q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, num_key_value_heads=4)
MAMBA = dict(mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8, mamba_n_groups=1, mamba_expand=2)
EYES = dict(
    hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
)
LINEAR = dict(linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8)
ATTENTION, MLP = "k_proj o_proj q_proj v_proj", "down_proj gate_proj up_proj"
OF_MLA = "kv_a_proj_with_mqa kv_b_proj o_proj q_a_proj q_b_proj"
ARCHITECTURES = {  # type -> (what its config needs, names of the layers that get an adapter, and their number)
    "falcon": (dict(head_dim=None, num_kv_heads=4), "dense dense_4h_to_h dense_h_to_4h query_key_value", 8),
    "phimoe": (dict(num_local_experts=4, num_experts_per_tok=2), ATTENTION, 8),
    "qwen3_moe": (EXPERTS | dict(num_experts=4), ATTENTION, 8),
    "qwen2_moe": (EXPERTS | dict(num_experts=4), f"{ATTENTION} shared_expert_gate", 10),
    "deepseek_v3": (
        EXPERTS | MLA | dict(n_routed_experts=4, n_group=1, topk_group=1, first_k_dense_replace=1),
        OF_MLA,
        10,
    ),
    "glm4_moe": (EXPERTS | dict(n_routed_experts=4, first_k_dense_replace=1), ATTENTION, 8),
    "llama4_text": (
        dict(num_local_experts=4, num_experts_per_tok=1, intermediate_size_mlp=48, attention_chunk_size=16),
        f"{ATTENTION} {MLP}",
        14,
    ),
    "gpt_oss": (dict(num_local_experts=4, num_experts_per_tok=2), ATTENTION, 8),
    "mamba": (dict(state_size=8), "in_proj", 2),
    "bamba": (MAMBA | dict(attn_layer_indices=[1]), f"{ATTENTION} {MLP} in_proj", 11),
    "qwen3_next": (
        EXPERTS | LINEAR | dict(num_experts=4, layer_types=["linear_attention", "full_attention"]),
        f"{ATTENTION} in_proj_ba in_proj_qkvz out_proj shared_expert_gate",
        9,
    ),
    "zamba": (
        dict(num_hidden_layers=4, layers_block_type=["mamba", "hybrid"] * 2, n_mamba_heads=2),
        "in_proj linear",
        6,
    ),
    "modernbert-decoder": ({}, "Wi Wo k_proj q_proj v_proj", 12),
    "gemma3": (dict(vision_config=EYES, mm_tokens_per_image=4), f"{ATTENTION} {MLP}", 14),
}


def architecture(kind, build=AutoModelForCausalLM):
    sizes = {name: value for name, value in (SMALL | ARCHITECTURES[kind][0]).items() if value is not None}
    if "vision_config" in sizes:  # the sizes above are those of the text
        sizes = {name: sizes[name] for name in ("vision_config", "mm_tokens_per_image")} | {"text_config": SMALL}
    torch.manual_seed(0)
    model = build.from_config(AutoConfig.for_model(kind, **sizes)).float().eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)) or "Experts" in type(module).__name__:
                for weight in module.parameters(recurse=False):
                    if weight.ndim > 1:
                        weight.normal_(0, 0.2)
    return model


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_a_fresh_adapter_changes_nothing_and_plain_peft_loads_the_whole_of_a_trained_one(kind):
    model, (_, names, number) = architecture(kind), ARCHITECTURES[kind]
    targets = select_targets(model)
    assert sorted({path.rsplit(".", 1)[-1] for path in targets}) == sorted(names.split(), key=str)
    assert len(targets) == number
    numbers = in_peft(model)
    assert numbers["fresh"] < 1e-6
    assert numbers["effect"] > 0.1
    assert numbers["peft"] < 1e-5
    assert numbers["warnings"] == []
    assert numbers["merged"] < 1e-4


@pytest.mark.parametrize("kind", ["qwen3_moe", "qwen2_moe", "gemma3", "falcon"])
def test_a_reward_model_has_the_targets_of_its_base(kind):
    def of(build):
        return {
            path[path.index("layers." if kind != "falcon" else "h.") :]
            for path in select_targets(architecture(kind, build))
        }

    assert of(AutoModelForSequenceClassification) == of(AutoModelForCausalLM)


# -- what is said of the rest ------------------------------------------------------------------------------------------

EXPERT_LINE = (
    "{} weights of experts ({}) get no adapter: a parameter holds those of a whole block, and it is no linear layer"
)
PEFT_LINE = "PEFT takes their names for those of the experts, and would load an adapter in part"
KERNEL_LINE = "the GPU kernels of a state-space layer read such weights past an adapter"
SHARED_LINE = "they share a weight with another layer"
SAID = {
    "qwen3_moe": [EXPERT_LINE.format("12,288", "down_proj, gate_up_proj")],  # 2 blocks x 4 experts x 3 x 32 x 16
    "phimoe": [
        EXPERT_LINE.format("36,864", "down_proj, gate_up_proj"),
        "2 PhimoeTopKRouter (router) without an adapter: no plain nn.Linear",
    ],
    "glm4_moe": [
        EXPERT_LINE.format("6,144", "down_proj, gate_up_proj"),
        f"6 linear layers (down_proj, gate_proj, up_proj) without an adapter by default: {PEFT_LINE}",
    ],
    "gpt_oss": [  # with biases
        EXPERT_LINE.format("37,888", "down_proj, down_proj_bias, gate_up_proj, gate_up_proj_bias")
    ],
    "mamba": [f"6 linear layers (dt_proj, out_proj, x_proj) without an adapter by default: {KERNEL_LINE}"],
    "bamba": [f"1 linear layer (out_proj) without an adapter by default: {KERNEL_LINE}"],
    "falcon": [],
    "gemma3": [],
}


@pytest.mark.parametrize("kind", SAID)
def test_what_has_no_adapter_is_said_with_its_number(kind):
    model = architecture(kind)
    assert left_out(model) is None  # all weights are trained
    add_adapter(model, "policy", 2, 4)
    assert left_out(model) == SAID[kind]


def test_layers_that_were_asked_for_and_that_peft_does_not_load_are_said():
    model = architecture("glm4_moe")
    add_adapter(model, "policy", 2, 4, target_modules=["q_proj", "up_proj"])
    assert left_out(model)[1:] == [f"2 linear layers (up_proj) with an adapter, as asked, but {PEFT_LINE}"]
    model = architecture("glm4_moe")
    add_adapter(model, "policy", 2, 4, target_modules=["q_proj"])  # the rest is left out as asked
    assert left_out(model) == SAID["glm4_moe"][:1]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_peft_does_load_such_layers_in_part():
    """Else there would be no reason to leave them out: the test of the reason, not of us."""
    numbers = in_peft(architecture("glm4_moe"), ["q_proj", "gate_proj", "up_proj", "down_proj"])
    assert numbers["peft"] > 0.1 * numbers["effect"] or numbers["warnings"]


def test_a_vision_tower_has_no_adapter_and_its_equal_names_are_not_in_the_file(tmp_path):
    model = architecture("gemma3")
    model.model.connector = nn.ModuleList([nn.ModuleDict({"up": nn.Linear(8, 8)})])  # to the text, not of it
    names = {path.rsplit(".", 1)[-1] for path, _ in model.named_modules() if "vision_tower" in path}
    assert {"q_proj", "k_proj"} <= names  # PEFT would match them
    add_adapter(model, "policy", 2, 4)
    assert all(".language_model." in path for path in lora_layers(model))
    config = lora.adapter_config(model, "policy", "some/base")
    assert config["target_modules"] == sorted(lora_layers(model))


def test_log_and_card_of_a_run_say_it(tmp_path, capsys, monkeypatch):
    world = write_world(tmp_path / "world")
    model = architecture("qwen3_moe")
    model.resize_token_embeddings(128)
    model.save_pretrained(world / "model")
    words = ["--model", world / "model", "--dataset", world / "pairs.jsonl", "--output-dir", tmp_path / "out"]
    words += "--max-steps 1 --eval-samples 0 --dtype fp32 --device cpu --report-to none --max-length 64".split()
    run_script([*words, "--max-prompt-length", "32"])
    line = SAID["qwen3_moe"][0]
    assert line in capsys.readouterr().out.splitlines()
    assert f"\n{line}.\n" in (tmp_path / "out/README.md").read_text()


# -- layers that are no plain linear -----------------------------------------------------------------------------------


class Net(nn.Module):
    """Two blocks with one linear each, of any kind."""

    def __init__(self, *linears):
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({"up": linear}) for linear in linears])

    def get_input_embeddings(self):
        return None

    def forward(self, x):
        for layer in self.layers:
            x = layer["up"](x)
        return x


class Rounded(nn.Linear):
    def forward(self, x):
        return nn.functional.linear(x.round(), self.weight.sign() * self.weight.abs().mean())


class Same(nn.Linear):
    pass


def hooked(linear):
    linear.register_forward_hook(lambda module, args, output: 2 * output)
    return linear


def replaced(linear):
    linear.forward = lambda x: linear.weight.sum() * x
    return linear


def test_a_subclass_is_left_alone():
    torch.manual_seed(0)
    net, x = Net(Rounded(8, 8), nn.Linear(8, 8)), torch.randn(4, 8)
    wanted = net(x)
    assert len(add_adapter(net, "policy", 2, 4)) == 2  # A and B of one layer
    assert torch.equal(net(x), wanted)
    assert list(lora_layers(net)) == ["layers.1.up"]
    assert left_out(net) == ["1 Rounded (up) without an adapter: no plain nn.Linear"]


@pytest.mark.parametrize("other", [Rounded(8, 8), Same(8, 8), parametrizations.weight_norm(nn.Linear(8, 8))])
def test_a_model_of_nothing_but_subclasses_has_no_place_for_an_adapter(other):
    with pytest.raises(AdapterError, match="no linear layer of this model can carry an adapter: train all weights"):
        add_adapter(Net(other), "policy", 2, 4)


@pytest.mark.parametrize("change", [hooked, replaced])
def test_a_linear_that_gives_something_else_is_named_before_the_model_changes(change):
    torch.manual_seed(0)
    net, x = Net(nn.Linear(8, 8), change(nn.Linear(8, 8))), torch.randn(4, 8)
    wanted = net(x)
    with pytest.raises(AdapterError, match=r"^layers\.1\.up computes more than its weight and bias say"):
        add_adapter(net, "policy", 2, 4)
    assert not lora_layers(net) and torch.equal(net(x), wanted)
    add_adapter(net, "policy", 2, 4, target_modules=["layers.0.up"])
    assert torch.equal(net(x), wanted)


@pytest.mark.parametrize("shares", ["module", "weight"])
def test_a_weight_that_stands_twice_gets_no_adapter(shares):
    """Merged, an adapter on one of the two would change both."""
    shared = nn.Linear(8, 8)
    again = shared if shares == "module" else nn.Linear(8, 8)
    again.weight = shared.weight
    net = Net(shared, again, nn.Linear(8, 8))
    assert select_targets(net) == ["layers.2.up"]
    with pytest.raises(AdapterError, match=r"^layers\.0\.up shares its weight with another layer"):
        select_targets(net, ["up"])


def test_a_model_may_add_in_place_to_what_a_layer_gives():
    """Llama 4 does, to the output of its shared expert: a view made by a custom function would be refused."""
    model = tiny_model("qwen3")
    add_adapter(model, "policy", 2, 4)
    layer = next(iter(lora_layers(model).values()))
    out = layer(torch.randn(1, 5, layer.in_features, requires_grad=True))
    out.add_(1).sum().backward()
    assert layer.lora_B["policy"].grad.abs().max() > 0


def test_the_targets_are_the_same_with_and_without_weights():
    for kind in ("llama4_text", "zamba", "gemma3"):
        model = architecture(kind)
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(copy.deepcopy(model.config))
        assert select_targets(skeleton) == select_targets(model)
