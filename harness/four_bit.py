"""A frozen base in 4 bits: NF4 (QLoRA, arXiv:2305.14314), for LoRA and soft prompts on a model that would not fit.

Of 64 weights each stands as one of 16 values, times the largest of them, which stands in 8 bits: 4.127 bits a weight.
A FourBit tensor is asked for as the weight that it stands for, and makes a new whole one for the moment of a product.
bitsandbytes does the packing, on GPUs and CPUs.
"""

import logging

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map
from transformers.modeling_layers import GradientCheckpointingLayer

from formats.user_errors import UserError
from lora_targets import text_decoder

BITS = 4 + 8 / 64 + 32 / (64 * 256)  # a weight: itself, the scale of its 64, and the scale of 256 such scales


class FourBitError(UserError):
    """A base that cannot stand in 4 bits: one sentence for the user."""


class FourBit(torch.Tensor):
    """A frozen weight (out, in) in 4 bits.  packed (out * in / 2, 1) uint8; scales: bitsandbytes' QuantState."""

    @staticmethod
    def __new__(cls, packed, scales, like):
        settings = {"dtype": like.dtype, "device": packed.device, "requires_grad": False}
        return torch.Tensor._make_wrapper_subclass(cls, like.shape, **settings)

    def __init__(self, packed, scales, like):
        self.packed, self.scales = packed, scales

    def whole(self):
        """What it stands for: a new tensor (out, in)."""
        return _bitsandbytes().dequantize_4bit(self.packed, self.scales).to(self.dtype)

    def __repr__(self):
        return f"FourBit({tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is F.linear and isinstance(args[1], cls):
            return FrozenLinear.apply(*args)
        with torch._C.DisableTorchFunctionSubclass():  # else what comes out would be called a FourBit too
            return function(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return cls(args[0].packed, args[0].scales, args[0])
        unpack = lambda leaf: leaf.whole() if isinstance(leaf, cls) else leaf
        return function(*tree_map(unpack, args), **tree_map(unpack, kwargs or {}))


class FrozenLinear(torch.autograd.Function):
    """x W^T + b of a FourBit W: whole in forward, and again in backward, and kept for neither."""

    @staticmethod
    def forward(ctx, x, weight, bias=None):  # (..., in) -> (..., out)
        ctx.weight = weight
        return F.linear(x, weight.whole(), bias)

    @staticmethod
    def backward(ctx, grad):
        return grad @ ctx.weight.whole(), None, None


def check(trains_all):
    """Raise FourBitError, before any model loads, where --base-dtype nf4 cannot be."""
    if trains_all:
        raise FourBitError("--base-dtype nf4 is of a frozen base, and --lora-r 0 trains it: leave one of them out")
    try:
        _bitsandbytes()
    except ImportError as error:
        raise FourBitError(
            f"--base-dtype nf4 needs bitsandbytes ({error}): pip install bitsandbytes, or leave it out"
        ) from None


def quantise(model, device):
    """Move a frozen model to `device`, the linears of its blocks in 4 bits, one at a time; returns a line for the log.

    Embeddings, norms and heads stay as they are.  Raises FourBitError where no block has a linear layer.
    """
    linears = linears_of_blocks(model)
    if not linears:
        raise FourBitError("--base-dtype nf4: the blocks of this model have no linear layers: leave it out")
    before = after = 0
    for linear in linears:
        weight = linear.weight.detach()
        packed, scales = _bitsandbytes().quantize_4bit(
            weight.to(device).contiguous(), blocksize=64, compress_statistics=True, quant_type="nf4"
        )
        linear.weight = nn.Parameter(FourBit(packed, scales, weight), requires_grad=False)
        before, after = before + weight.nbytes, after + BITS / 8 * weight.numel()
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None and not isinstance(parameter, FourBit):
                parameter.data = parameter.data.to(device)
        for name, buffer in module._buffers.items():
            module._buffers[name] = buffer if buffer is None else buffer.to(device)
    return f"base in 4 bits (NF4): {len(linears)} linear layers, {after / 1e9:.2f} GB instead of {before / 1e9:.2f}"


def make_whole(model):
    """Put whole weights in the place of those in 4 bits; returns whether there were any."""
    found = [module for module in model.modules() if isinstance(getattr(module, "weight", None), FourBit)]
    for module in found:
        module.weight = nn.Parameter(module.weight.whole(), requires_grad=False)
    return bool(found)


def linears_of_blocks(model):
    """The linear layers of a model's blocks, with adapters or without; not GPT-2's, whose weights are (in, out)."""
    blocks = [part for part in text_decoder(model).modules() if isinstance(part, GradientCheckpointingLayer)]
    inner = [module for block in blocks for module in block.modules()]
    with_adapters = [module for module in inner if hasattr(module, "lora_A") and not module.transposed]
    return [module for module in inner if type(module) is nn.Linear] + with_adapters


def _bitsandbytes():
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # or it asks, on a CPU, for a package that is faster
    import bitsandbytes.functional

    return bitsandbytes.functional
