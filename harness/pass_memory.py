"""What one pass through a model takes in memory, found out without weights or data (on the meta device).

Every tensor that autograd saves is added up, each storage once, and of all that is made on the way the most that is
alive at one time.  Attention stands there for what a fused kernel keeps: query, key, value, output and one number per
row.
"""

import weakref
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask
from transformers.modeling_layers import GradientCheckpointingLayer

from lora_targets import text_decoder
from packed_attention import AMPERE, flash_takes
from packed_model import HEAD_CHUNK, TokenLogps, final_softcap

SIDE = 1024  # of a picture where there are none
TILES = {"idefics3": 17, "smolvlm": 17, "internvl": 10}  # that a processor cuts it into, with the whole, by default


class FusedAttention(torch.autograd.Function):
    """Saves what a fused attention kernel saves, and computes nothing: for tensors without data."""

    @staticmethod
    def forward(ctx, query, key, value):
        output = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:3], dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx, grad):
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


def _attend(module, query, key, value, attention_mask, **kwargs):
    """As packed attention on the GPU here or, without one, on a newer one; where FlashAttention does not run, each head
    has keys and values of its own."""
    query, key = query.to(value.dtype), key.to(value.dtype)
    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else AMPERE
    if not flash_takes(query, capability):
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    return FusedAttention.apply(query, key, value).transpose(1, 2).contiguous(), None


AttentionInterface.register("counted", _attend)
AttentionMaskInterface.register("counted", sdpa_mask)


class AsOnGPU(TorchFunctionMode):
    """What the meta device lacks: dropout whose mask is bytes, and autocast: products in `dtype`, weights cast once."""

    PRODUCTS = F.linear, torch.addmm, torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__

    def __init__(self, dtype):
        super().__init__()
        self.dtype, self.weights = dtype, {}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.dropout:
            return torch.native_dropout(args[0], kwargs["p"], kwargs["training"])[0]
        if function is torch.Tensor.to and isinstance(args[0], nn.Parameter) and isinstance(args[1], torch.dtype):
            return self._cast(args[0], args[1])  # LoRA's A and B
        if self.dtype and function in self.PRODUCTS:
            args = [self._cast(arg, self.dtype) for arg in args]
        return function(*args, **(kwargs or {}))

    def _cast(self, arg, dtype):
        if not isinstance(arg, torch.Tensor) or not arg.is_floating_point():
            return arg
        if not isinstance(arg, nn.Parameter):
            return arg.to(dtype)
        if arg not in self.weights:
            self.weights[arg] = arg.to(dtype)
        return self.weights[arg]


class Alive(TorchDispatchMode):
    """Bytes of the tensors that were made within and are alive: now, and the most at one time."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self.known = set()  # storages that are counted, or were there before

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.known |= {storage(x)._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        result = function(*args, **(kwargs or {}))
        for new in (storage(x) for x in tree_leaves(result) if isinstance(x, torch.Tensor)):
            if new._cdata not in self.known:
                self.known.add(new._cdata)
                self.now += new.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(new, self._gone, new._cdata, new.nbytes())
        return result

    def _gone(self, number, size):
        self.known.discard(number)
        self.now -= size


def storage(tensor):
    return tensor.untyped_storage()


def most_alive(work):
    """The most bytes that are alive at one time of what work() makes."""
    with Alive() as alive:
        work()
    return alive.most


class Pass(NamedTuple):
    """Bytes of a pass through the backbone; a list has a number for each block and, last, one for what is in none."""

    saved: list  # for backward
    casts: list  # of weights, to the type that is computed in
    inputs: list  # what comes into each block (not saved, but kept with checkpointing)
    passing: int  # made and given back on the way, the most at one time beside what is saved
    ungraded: int  # the most of a pass without gradient

    def kept(self, checkpointing, in_block):
        """What is kept; with checkpointing what comes into each block, and all of the one that runs again, in_block."""
        if not checkpointing:
            return sum(self.saved)
        *blocks, rest = self.saved
        return sum(self.inputs) + rest + (max(blocks) if in_block else 0)


def blocks_of(model):
    """Those that text goes through."""
    return [module for module in text_decoder(model).modules() if isinstance(module, GradientCheckpointingLayer)]


class Picture(NamedTuple):
    """One picture of SIDE x SIDE pixels in a prompt."""

    tokens: int  # in the row; 0: the model does not see, or as nobody here knows
    numbers: int  # that the tower has at one time on the way, without gradient


def picture_of(model):
    """The Picture of a model, from its config: whole, shrunk to the size that its tower has, or cut into tiles.

    The numbers are pixels, three of a block's width and two of its MLP's, and what comes into each block where the
    projector may take any of them.  It is that of CLIP and SigLIP; masks, copies and gates of others add up to a half.
    """
    config, tower = model.config, getattr(model.config, "vision_config", None)
    if not getattr(tower, "patch_size", None):
        return Picture(0, 0)
    text = {*text_decoder(model).modules()}
    blocks = [part for part in model.modules() if isinstance(part, GradientCheckpointingLayer) and part not in text]
    shapes = [part.weight.shape for block in blocks for part in block.modules() if type(part) is nn.Linear]
    width, middle = min(map(min, shapes), default=0), max(map(max, shapes), default=0)
    first = lambda size: size[0] if isinstance(size, list | tuple) else size
    patch, frames = first(tower.patch_size), getattr(tower, "temporal_patch_size", 1)
    merge = getattr(tower, "spatial_merge_size", None) or getattr(config, "spatial_merge_size", 1)  # patches to a side
    merge = merge * getattr(config, "scale_factor", 1) / getattr(config, "downsample_ratio", 1)  # of a token
    side, tiles = min(SIDE, first(getattr(tower, "image_size", None) or SIDE)), TILES.get(config.model_type, 1)
    if grids := getattr(config, "image_grid_pinpoints", None):
        from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

        tiles = image_size_to_num_patches((SIDE, SIDE), grids, side)
    patches = tiles * (round(side / (patch * merge)) * merge) ** 2
    tokens = getattr(config, "mm_tokens_per_image", None) or patches / merge**2
    inputs = len(blocks) + 1 if hasattr(config, "vision_feature_layer") else 1
    numbers = patches * (3 * frames * patch**2 + (inputs + 3) * width + 2 * middle)
    return Picture(round(tokens), round(numbers))


def measure(model, num_tokens, compute=None):
    """The Pass of T tokens through the backbone of a model on the meta device; compute: a type, under autocast."""
    blocks = blocks_of(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    ids = torch.zeros(1, num_tokens, dtype=torch.long, device=model.device)
    inputs = []  # bytes of what comes into each block
    saved = {}  # number of a storage -> (a tensor of it, place of its block); held, so that no other gets the number
    place = len(blocks)  # of the block that is running; behind the last: none

    def forward():
        with AsOnGPU(compute) as casts:
            given = {"input_ids": ids, "position_ids": ids, "attention_mask": ids.new_ones(1, 1, 1, 1)}
            return model.base_model(**given, use_cache=False).last_hidden_state, casts

    def forward_and_backward():
        states, casts = forward()
        del casts
        states.backward(torch.empty_like(states))

    def enter(block, args, kwargs):
        nonlocal place
        place = len(inputs)
        inputs.append(storage(args[0] if args else kwargs["hidden_states"]).nbytes())

    def leave(*_):
        nonlocal place
        place = len(blocks)

    def keep(tensor):
        saved.setdefault(storage(tensor)._cdata, (tensor, place))
        return tensor

    attention, hooks = model.config._attn_implementation, []
    model.set_attn_implementation("counted")
    try:
        with torch.no_grad():
            ungraded = most_alive(forward)
        if not trained:  # a soft prompt is
            train_output = lambda module, args, output: output.requires_grad_()
            hooks.append(model.get_input_embeddings().register_forward_hook(train_output))
        for parameter in trained:
            parameter.grad = torch.empty_like(parameter)  # gradients are counted elsewhere
        most = most_alive(forward_and_backward)
        for block in blocks:
            hooks.append(block.register_forward_pre_hook(enter, with_kwargs=True))
            hooks.append(block.register_forward_hook(leave))
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            states, casts = forward()
    finally:
        model.set_attn_implementation(attention)
        for hook in hooks:
            hook.remove()
        for parameter in trained:
            parameter.grad = None
    weights = {storage(tensor)._cdata for tensor in (*model.parameters(), *model.buffers())}
    cast_weights = {storage(weight)._cdata for weight in casts.weights.values()}
    activation_bytes, cast_bytes = [0] * (len(blocks) + 1), [0] * (len(blocks) + 1)
    for number, (tensor, place_of_tensor) in saved.items():
        if number in cast_weights:
            cast_bytes[place_of_tensor] += storage(tensor).nbytes()
        elif number not in weights:
            activation_bytes[place_of_tensor] += storage(tensor).nbytes()
    passing = max(0, most - sum(activation_bytes) - sum(cast_bytes))
    return Pass(activation_bytes, cast_bytes, inputs, passing, max(0, ungraded - sum(cast_bytes)))


def head_bytes(model, num_tokens, compute, with_kl):
    """(most bytes with the backward, most without gradient) of the language-model head at N response tokens."""
    weight = model.get_output_embeddings().weight
    states = torch.empty(num_tokens, weight.shape[1], device="meta", dtype=compute, requires_grad=True)
    targets = torch.empty(num_tokens, dtype=torch.long, device="meta")
    softcap = final_softcap(model)

    def work():
        reference = (torch.empty_like(states), weight.detach().to(compute), softcap) if with_kl else None
        numbers = TokenLogps.apply(states, weight.to(compute), targets, softcap, HEAD_CHUNK, reference)
        if torch.is_grad_enabled():
            numbers.sum().backward()

    with torch.no_grad():
        ungraded = most_alive(work)
    return most_alive(work), ungraded
