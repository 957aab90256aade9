"""LoRA (Low-Rank Adaptation, arXiv:2106.09685) by hand: the layer, named adapters on one frozen base, PEFT files.

    y = x W^T + b + scale * dropout(x) A^T B^T        A (r, in), B (out, r), scale = alpha / r

One base can carry several adapters, each with its own r, alpha and targets; at most one is switched on:

    add_adapter(model, "policy", r=16, alpha=32)     # A random, B zero: the model's outputs do not change
    with use_adapter(model, None): ...               # the base alone: this is DPO's reference model
    save_adapter(model, "policy", folder, base_model="Qwen/Qwen3-0.6B")

Deviations from the paper: A is Kaiming-uniform with a = sqrt(5) and not Gaussian (as loralib and PEFT do).
Files are PEFT's (adapter_config.json, adapter_model.safetensors), read strictly: a key too many or too few is an error.
"""

import json
import math
import re
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from formats import written_files
from formats.json_files import is_number, read_object, wrong_value
from formats.tensor_files import load_file, save_file
from lora_targets import AdapterError, adaptable_linears, matches, select_targets
from lora_targets import left_out as left_out  # for scripts

KEY_PREFIX = "base_model.model."  # PEFT wraps a model twice; its keys say so
HEAD_KEY = f"{KEY_PREFIX}score.weight"


def lora_linear(x, weight, bias, a, b, scale, dropout=0.0):
    """The equation above: x (..., in), weight (out, in), bias (out,) or None, a (r, in), b (out, r) -> (..., out).

    a and b are cast to the type of x, not x to theirs: an fp32 copy of every activation makes LoRA slow and large.
    """
    a, b = a.to(x.dtype), b.to(x.dtype)
    return F.linear(x, weight, bias) + F.linear(F.linear(F.dropout(x, dropout), a), b) * scale


def fused_lora(x, weight, bias, a, b, scale):
    """lora_linear without dropout as one node of the graph."""
    rows = FusedLoRA.apply(x.reshape(-1, x.shape[-1]), weight, bias, a, b, scale)
    return rows.view(*x.shape[:-1], weight.shape[0])


class FusedLoRA(torch.autograd.Function):
    """The adapter's part is added into the base's output, and its gradient into the base's: no further tensor of the
    size of x or y is made or kept.  Trap: what forward returns must be no view, or a model that adds to it in place
    (Llama 4, to the output of its shared expert) is refused by autograd.
    """

    @staticmethod
    def forward(ctx, rows, weight, bias, a, b, scale):  # (N, in) -> (N, out)
        ctx.scale, ctx.dtype = scale, a.dtype
        a, b = a.to(rows.dtype), b.to(rows.dtype)  # once, for backward too
        low = rows @ a.t()  # (N, r)
        ctx.save_for_backward(rows, weight, a, b, low)
        return F.linear(rows, weight, bias).addmm_(low, b.t(), alpha=scale)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_rows):  # (N, out)
        rows, weight, a, b, low = ctx.saved_tensors
        grad_low = (grad_rows @ b).mul_(ctx.scale)  # (N, r)
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad_rows @ weight).addmm_(grad_low, a)
        if ctx.needs_input_grad[1]:  # not in a model: add_adapter freezes the base
            grad_weight = grad_rows.t() @ rows
        if ctx.needs_input_grad[2]:
            grad_bias = grad_rows.sum(0)
        grad_a = (grad_low.t() @ rows).to(ctx.dtype)
        grad_b = (grad_rows.t() @ low).to(ctx.dtype).mul_(ctx.scale)
        return grad_x, grad_weight, grad_bias, grad_a, grad_b, None


class LoRALinear(nn.Module):
    """An nn.Linear (or GPT-2's Conv1D, whose weight is transposed) with named adapters beside its frozen weight.

    The weight and bias keep their names, so the state dict of the base is unchanged but for lora_A.* and lora_B.*.
    A and B are fp32 whatever the base is.
    """

    def __init__(self, base):
        super().__init__()
        self.weight, self.bias = base.weight, base.bias
        self.transposed = isinstance(base, Conv1D)  # weight (in, out) instead of (out, in)
        self.in_features, self.out_features = linear_shape(base)
        self.lora_A, self.lora_B = nn.ParameterDict(), nn.ParameterDict()
        self.settings = {}  # adapter name -> (scale, dropout)
        self.active = None
        self.train(base.training)

    def forward(self, x):
        weight = self.weight.t() if self.transposed else self.weight
        if self.active not in self.settings:
            return F.linear(x, weight, self.bias)
        scale, dropout = self.settings[self.active]
        inputs = x, weight, self.bias, self.lora_A[self.active], self.lora_B[self.active], scale
        return lora_linear(*inputs, dropout) if dropout and self.training else fused_lora(*inputs)

    def extra_repr(self):
        return f"in={self.in_features}, out={self.out_features}, adapters={list(self.settings)}, on={self.active}"


def linear_shape(module):
    """(in, out) of an nn.Linear, Conv1D or LoRALinear."""
    if isinstance(module, LoRALinear):
        return module.in_features, module.out_features
    rows, columns = module.weight.shape
    return (rows, columns) if isinstance(module, Conv1D) else (columns, rows)


def lora_layers(model):
    """{module path: LoRALinear} of every layer that carries an adapter."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def has_dropout(model):
    """Whether any adapter draws dropout in training."""
    return any(dropout for layer in lora_layers(model).values() for _, dropout in layer.settings.values())


def add_adapter(model, name, r, alpha, dropout=0.0, target_modules=None, trainable=True):
    """Add adapter `name` and switch it on.  The base is frozen; A is drawn from torch's global generator, B is zero.

    Returns the trainable fp32 parameters [A, B, A, B, ...] in module order.  Raises AdapterError, before the model is
    touched: of select_targets, for a rank beyond that of any matrix here, or for a layer that would no longer give what
    it gives.
    """
    assert not any(name in layer.settings for layer in lora_layers(model).values()), f"there is an adapter {name}"
    layers = {path: model.get_submodule(path) for path in select_targets(model, target_modules)}
    widest = max((max(linear_shape(layer)) for layer in layers.values()), default=r)
    if r > widest:
        raise AdapterError(f"a rank of {r} is beyond the widest layer to adapt, which has {widest}: lower --lora-r")
    new = {path: LoRALinear(layer) for path, layer in layers.items() if not isinstance(layer, LoRALinear)}
    for path, layer in new.items():
        _check_unchanged(path, layers[path], layer)
    for path, layer in new.items():
        parent, _, child = path.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)
    parameters = []
    for layer in (layers | new).values():
        device = layer.weight.device
        a = torch.empty(r, layer.in_features)  # drawn on the CPU: the same numbers on every device
        nn.init.kaiming_uniform_(a, a=math.sqrt(5))
        layer.lora_A[name] = nn.Parameter(a.to(device), requires_grad=trainable)
        layer.lora_B[name] = nn.Parameter(torch.zeros(layer.out_features, r, device=device), requires_grad=trainable)
        layer.settings[name] = (alpha / r, dropout)
        parameters += [layer.lora_A[name], layer.lora_B[name]]
    for key, parameter in model.named_parameters():
        if "lora_" not in key:
            parameter.requires_grad_(False)
    switch_adapter(model, name)
    return parameters


@torch.no_grad()
def _check_unchanged(path, base, layer):
    """Raise AdapterError unless a LoRALinear gives what its base gives: hooks, replaced methods do not come along."""
    if base.weight.is_meta:
        return
    x = torch.linspace(-1, 1, 3 * layer.in_features).view(3, -1).to(base.weight)
    wanted, got = base(x).nan_to_num(), layer(x).nan_to_num()  # what is not finite is told of where it matters
    tolerance = 1e-3 if x.dtype in (torch.float32, torch.float64) else 0.05
    if (got - wanted).abs().max() > tolerance * wanted.abs().max():
        raise AdapterError(
            f"{path} computes more than its weight and bias say, and would lose it under an adapter: "
            "leave it out with --lora-target-modules"
        )


def switch_adapter(model, name):
    """Switch adapter `name` on and every other off; None leaves the base alone."""
    for layer in lora_layers(model).values():
        layer.active = name


@contextmanager
def use_adapter(model, name):
    """Run a block with another adapter (None: the base), then switch back.

    For passes without gradient.  Trap: gradient checkpointing runs the forward again during backward, and then the
    adapter that is on at that moment counts; so the adapter being trained must be the one outside every `with`.
    """
    before = {layer: layer.active for layer in lora_layers(model).values()}
    switch_adapter(model, name)
    try:
        yield model
    finally:
        for layer, active in before.items():
            layer.active = active


def remove_adapter(model, name):
    """Give the memory of an adapter back; one that is switched on leaves the base alone."""
    for layer in lora_layers(model).values():
        for adapters in (layer.settings, layer.lora_A, layer.lora_B):
            if name in adapters:
                del adapters[name]


@torch.no_grad()
def merge_adapter(model, name):
    """Fold one adapter into the base weights (W + scale * B A, summed in fp32, rounded once) and remove them all."""
    for layer in lora_layers(model).values():
        if name in layer.settings:
            update = layer.settings[name][0] * (layer.lora_B[name] @ layer.lora_A[name])  # (out, in)
            wide = torch.promote_types(layer.weight.dtype, torch.float32)
            layer.weight.copy_(layer.weight.to(wide) + (update.t() if layer.transposed else update))
        for adapters in (layer.settings, layer.lora_A, layer.lora_B):
            adapters.clear()


# -- PEFT's files ------------------------------------------------------------------------------------------------


def adapter_state(model, name):
    """{PEFT key: tensor} of one adapter, as views of the live parameters."""
    state = {}
    for path, layer in lora_layers(model).items():
        if name in layer.settings:
            state[f"{KEY_PREFIX}{path}.lora_A.weight"] = layer.lora_A[name].detach()
            state[f"{KEY_PREFIX}{path}.lora_B.weight"] = layer.lora_B[name].detach()
    return state


def adapter_config(model, name, base_model, has_head=False):
    """The subset of PEFT's LoraConfig that every PEFT version reads."""
    layers = {path: layer for path, layer in lora_layers(model).items() if name in layer.settings}
    first = next(iter(layers.values()))
    scale, dropout = first.settings[name]
    r = first.lora_A[name].shape[0]
    targets = sorted({path.rsplit(".", 1)[-1] for path in layers})
    if {path for path, _ in model.named_modules() if matches(path, targets)} != set(layers):
        targets = sorted(layers)  # short names would catch other layers too
    return {
        "base_model_name_or_path": base_model,
        "bias": "none",
        "fan_in_fan_out": first.transposed,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": scale * r if (scale * r) % 1 else int(scale * r),
        "lora_dropout": dropout,
        "modules_to_save": ["score"] if has_head else None,
        "peft_type": "LORA",
        "r": r,
        "target_modules": targets,
        "task_type": "SEQ_CLS" if has_head else "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }


def save_adapter(model, name, folder, base_model, head=None):
    """Write adapter_model.safetensors (fp32) and adapter_config.json into `folder`, loadable by plain PEFT.

    head (1, H): the scalar head of a reward model, which transformers calls `score`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = adapter_state(model, name) | ({} if head is None else {HEAD_KEY: head.detach()})
    state = {key: tensor.contiguous().cpu() for key, tensor in state.items()}
    save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = adapter_config(model, name, base_model, head is not None)
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def load_adapter(model, folder, name, trainable=False, with_head=False):
    """Add adapter `name` from PEFT files and switch it on; returns its parameters.

    with_head: of a reward model; returns (parameters, head (1, H) fp32), and the head is not put into the model.
    Raises AdapterError, before the model is touched, when a file is missing or unreadable, when the adapter uses what
    this file does not do (DoRA, ranks per layer, ...), or when keys or shapes are not exactly those of this model.
    """
    folder = Path(folder)
    config, state = _read_adapter_files(folder, with_head)
    head = state.pop(HEAD_KEY, None)
    r, alpha = config["r"], config["lora_alpha"]
    if config["use_rslora"]:
        alpha = alpha * math.sqrt(r)  # arXiv:2312.03732 scales by alpha / sqrt(r)
    try:
        targets = select_targets(model, config["target_modules"])
    except AdapterError as error:
        raise AdapterError(f"{folder} does not fit this model: {error}") from None
    linears = adaptable_linears(model)
    expected = {}
    for path in targets:
        n_in, n_out = linear_shape(linears[path])
        expected[f"{KEY_PREFIX}{path}.lora_A.weight"] = (r, n_in)
        expected[f"{KEY_PREFIX}{path}.lora_B.weight"] = (n_out, r)
    missing, foreign = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    if missing or foreign:
        faults = []
        if missing:
            faults.append(f"lacks {len(missing)} tensors (first: {missing[0]})")
        if foreign:
            faults.append(f"has {len(foreign)} tensors this model has no place for (first: {foreign[0]})")
        fault = " and ".join(faults)
        raise AdapterError(f"{folder} does not fit this model: it {fault}; was it trained on another base?")
    for key, shape in expected.items():
        if tuple(state[key].shape) != shape:
            raise AdapterError(
                f"{folder} does not fit this model: {key} is {tuple(state[key].shape)}, expected {shape} "
                f"for r={r}; was it trained with another rank or on another base?"
            )
    if with_head and head.shape != (1, model.config.get_text_config().hidden_size):
        wanted = 1, model.config.get_text_config().hidden_size
        raise AdapterError(f"{folder} does not fit this model: score.weight is {tuple(head.shape)}, expected {wanted}")
    dropout = config["lora_dropout"] if trainable else 0.0  # a frozen adapter is a fixed function
    parameters = add_adapter(model, name, r, alpha, dropout, targets, trainable)
    with torch.no_grad():
        for key, live in adapter_state(model, name).items():
            live.copy_(state[key])
    return (parameters, head.float()) if with_head else parameters


def _is_pattern(value):
    """Whether target_modules are names, or one regular expression; None: PEFT left it to its own table."""
    if not isinstance(value, str):
        return value is None or (
            isinstance(value, list) and value != [] and all(isinstance(name, str) for name in value)
        )
    try:
        return value != "" and re.compile(value) is not None
    except re.error:
        return False


PEFTS_DEFAULTS = {"r": 8, "lora_alpha": 8, "lora_dropout": 0.0, "use_rslora": False, "target_modules": None}
EXPECTED = {  # of adapter_config.json
    "r": ("a whole number from 1 to 65536", lambda value: type(value) is int and 1 <= value <= 65536),
    "lora_alpha": ("a number above 0, at most 1e30", lambda value: is_number(value) and value > 0),
    "lora_dropout": ("a number from 0 to below 1", lambda value: is_number(value) and 0 <= value < 1),
    "use_rslora": ("true or false", lambda value: value is None or type(value) is bool),
    "target_modules": ("a list of names or a regular expression", _is_pattern),
}


def _read_adapter_files(folder, with_head):
    if damage := written_files.damage(folder, *written_files.ADAPTER):
        raise AdapterError(damage)
    try:
        config = PEFTS_DEFAULTS | read_object(folder / "adapter_config.json")
        state = load_file(folder / "adapter_model.safetensors")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise AdapterError(
            f"{folder} is not an adapter folder: {Path(error.filename or error.args[0]).name} is missing"
        ) from None
    except (OSError, ValueError, SafetensorError) as error:  # ValueError: no record
        raise AdapterError(f"{folder} cannot be read as an adapter ({error}): save it again") from None
    if config.get("peft_type") != "LORA":
        raise AdapterError(f"{folder} holds a {config.get('peft_type')} adapter, only LORA is read here")
    has_head = HEAD_KEY in state
    if has_head and not with_head:
        raise AdapterError(f"the adapter in {folder} is a reward model's, with a scalar head")
    if with_head and not has_head:
        raise AdapterError(f"the adapter in {folder} is no reward model: it has no head score.weight")
    saved = config.get("modules_to_save")
    if has_head and isinstance(saved, list) and all(name in ("classifier", "score") for name in saved):
        config["modules_to_save"] = None  # PEFT adds both names to what stands there, again at each save
    plain = {  # values of the plain LoRA above
        "bias": (None, "none"),
        "use_dora": (None, False),
        "init_lora_weights": (None, True, False, "gaussian"),  # PiSSA, OLoRA, ... change the base weights too
        "rank_pattern": (None, {}),
        "alpha_pattern": (None, {}),
        "modules_to_save": (None, []),
        "layers_to_transform": (None,),
        "exclude_modules": (None,),
        "alora_invocation_tokens": (None,),
    }
    for key, allowed in plain.items():
        if config.get(key) not in allowed:
            raise AdapterError(f"{folder} uses {key}={config[key]!r}, which this loader does not do")
    if wrong := wrong_value(config, EXPECTED):
        raise AdapterError(f"{folder}/adapter_config.json says {wrong}")
    for key, tensor in state.items():
        if not tensor.is_floating_point():
            raise AdapterError(f"{folder} holds {key} as {tensor.dtype}, which are no weights: save it again")
    return config, state
