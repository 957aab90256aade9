"""What a run will take in memory on each device, from the model's config alone: no weights are read, nothing is run.

Weights, gradients and optimiser are counted.  What passes keep and work with is counted too: the model without its
weights (meta device) runs one pass of the run's largest size.  Every tensor that autograd saves is added up, each
storage once, and of all that is made on the way the most that is alive at one time.  Attention stands there for what a
fused kernel keeps: query, key, value, output and one number per row.

    rows = Estimate(skeleton, ranks=8).rows(args)

A run has four moments (columns of memory_report's table), and its memory is that of the largest:
    scoring     the frozen models score all pairs, without gradient
    head        a pass has gone through the blocks and is at the language-model head: all activations are kept
    backward    a pass is in the last block on its way back: all activations are kept, and gradients pass
    update      gradients go to the other ranks, the optimiser steps; a policy that has to, samples
"""

import copy
import weakref
from argparse import Namespace
from functools import cache
from pathlib import Path
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

import lora
from harness.device import DTYPES
from harness.optimizers import moments_bytes
from packed_model import HEAD_CHUNK, TokenLogps

CUDA = 0.8e9  # what CUDA's context and the libraries' workspaces take, about
WIDE = 4  # bytes of fp32
USABLE = 0.9  # of a device; the rest is for fragmentation and for what is left out here
MANY = 16 * HEAD_CHUNK  # tokens that are counted chunk by chunk
SOME = 1024  # tokens that are measured: with fused attention memory grows in line with them


class EstimateError(ValueError):
    """A model whose passes cannot be run without its weights, in one sentence for the user."""


# -- a pass on the meta device ---------------------------------------------------------------------------------------


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
    """As packed attention: the second half of the tokens, rejected, has keys and values of its own for each head, and
    the first too where flash attention does not run (packed_attention.takes_groups)."""
    outputs, groups = [], query.shape[1] // key.shape[1]
    flash = value.element_size() == 2 and value.shape[-1] <= 256
    for q, *kv, grouped in zip(*(x.to(value.dtype).chunk(2, 2) for x in (query, key, value)), (flash, False)):
        outputs.append(FusedAttention.apply(q, *(kv if grouped else [x.repeat_interleave(groups, 1) for x in kv])))
    return torch.cat(outputs, 2).transpose(1, 2).contiguous(), None


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
        args = [self._cast(arg) for arg in args] if self.dtype and function in self.PRODUCTS else args
        return function(*args, **(kwargs or {}))

    def _cast(self, arg):
        if not isinstance(arg, torch.Tensor) or not arg.is_floating_point():
            return arg
        if not isinstance(arg, nn.Parameter):
            return arg.to(self.dtype)
        if arg not in self.weights:
            self.weights[arg] = arg.to(self.dtype)
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
    """Bytes of a pass through the backbone; a list has a number for each block, and one for what is in none."""

    saved: list  # for backward
    casts: list  # of weights, to the type that is computed in
    inputs: list  # what comes into each block (not saved, but kept with checkpointing)
    passing: int  # made and given back on the way, the most at one time beside what is saved
    ungraded: int  # the most of a pass without gradient

    def kept(self, checkpointing, in_block):
        """What is kept; with checkpointing what comes into each block, and all of the one that runs again, in_block."""
        if not checkpointing:
            return sum(self.saved)
        return sum(self.inputs) + self.saved[-1] + (max(self.saved[:-1]) if in_block else 0)


def measure(model, num_tokens, compute=None):
    """The Pass of T tokens through the backbone of a model on the meta device; compute: a type, under autocast."""
    blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    place = torch.zeros(1, num_tokens, dtype=torch.long, device=model.device)
    inputs, saved, where = [], {}, [len(blocks)]

    def forward():
        with AsOnGPU(compute) as casts:
            given = {"input_ids": place, "position_ids": place, "attention_mask": place.new_ones(1, 1, 1, 1)}
            return model.base_model(**given, use_cache=False).last_hidden_state, casts

    def both():
        states, casts = forward()
        del casts
        states.backward(torch.empty_like(states))

    def enter(block, args, kwargs):
        where[0] = len(inputs)
        inputs.append(storage(args[0] if args else kwargs["hidden_states"]).nbytes())

    def keep(tensor):
        saved.setdefault(storage(tensor)._cdata, (tensor, where[0]))  # held, so that no other gets its number
        return tensor

    before, hooks = model.config._attn_implementation, []
    model.set_attn_implementation("counted")
    try:
        with torch.no_grad():
            ungraded = most_alive(forward)
        if not trained:  # a soft prompt is
            hooks.append(model.get_input_embeddings().register_forward_hook(lambda *of: of[-1].requires_grad_()))
        for parameter in trained:
            parameter.grad = torch.empty_like(parameter)  # gradients are counted elsewhere
        most = most_alive(both)
        hooks += [block.register_forward_pre_hook(enter, with_kwargs=True) for block in blocks]
        hooks += [block.register_forward_hook(lambda *_: where.__setitem__(0, len(blocks))) for block in blocks]
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            states, casts = forward()
    finally:
        model.set_attn_implementation(before)
        for hook in hooks:
            hook.remove()
        for parameter in trained:
            parameter.grad = None
    own = {storage(tensor)._cdata for tensor in (*model.parameters(), *model.buffers())}
    cast = {storage(weight)._cdata for weight in casts.weights.values()}
    sums = [[0] * (len(blocks) + 1) for _ in range(2)]
    for number, (tensor, block) in saved.items():
        if number not in own:
            sums[number in cast][block] += storage(tensor).nbytes()
    return Pass(*sums, inputs, max(0, most - sum(map(sum, sums))), max(0, ungraded - sum(sums[1])))


def head_bytes(model, num_tokens, compute, with_kl):
    """The most that the language-model head takes at N response tokens: with its backward, and without gradient."""
    weight = model.get_output_embeddings().weight
    states = torch.empty(num_tokens, weight.shape[1], device="meta", dtype=compute, requires_grad=True)
    targets = torch.empty(num_tokens, dtype=torch.long, device="meta")
    softcap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)

    def both():
        other = (torch.empty_like(states), weight.detach().to(compute), softcap) if with_kl else None
        numbers = TokenLogps.apply(states, weight.to(compute), targets, softcap, HEAD_CHUNK, other)
        if torch.is_grad_enabled():
            numbers.sum().backward()

    with torch.no_grad():
        ungraded = most_alive(both)
    return most_alive(both), ungraded


# -- the terms -------------------------------------------------------------------------------------------------------


def size_of(parameters, width=None):
    """Bytes of parameters as they are, or with `width` bytes for each number."""
    return sum(parameter.numel() * (width or parameter.element_size()) for parameter in parameters)


def groups(model):
    """Numbers in the weights of the largest block, in those of no block, and in the language-model head."""
    blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    sizes, head = [size_of(block.parameters(), 1) for block in blocks], model.get_output_embeddings()
    return max(sizes), size_of(model.parameters(), 1) - sum(sizes), head.weight.numel() if head else 0


def of_shards(model, reference, width, with_kl, samples):
    """The rows of what FSDP2 gathers, in `width` bytes a number; reference: the model that scores all pairs first.

    The next block is gathered while one computes.  The gradients of a block are there whole, and in fp32, on their way,
    those of the one before.  What is in no block is gathered for a whole pass, of a reference from then on; its
    gradients go last.  A policy that samples is whole, between two updates.
    """
    (block, rest, head), (ref_block, ref_rest, _) = groups(model), groups(reference)
    held, whole = ref_rest * with_kl, samples * size_of(model.parameters(), 1)
    gathered = ref_rest + 2 * ref_block, held + rest + block, held + rest + 2 * block, held + whole
    return {
        "gathered weights": [width * numbers for numbers in gathered],
        "whole gradients": [0, 0, width * (head + block) + WIDE * block, (width + WIDE) * rest],
    }


class Estimate:
    """The memory of runs of one script on one model.

    skeleton: on the meta device, with the adapters of the run; reference: another model's, where there is one;
    reward_folders: {task: folder} of frozen reward models; vectors: length of a soft prompt that is trained.
    """

    def __init__(self, skeleton, ranks=1, reference=None, reward_folders=None, vectors=0):
        self.skeleton, self.ranks = skeleton, ranks
        self.reference, self.reward_folders, self.vectors, self.packs = reference, reward_folders or {}, vectors, True
        self.model, self.measured, self.head = cache(self._model), cache(self._measured), cache(self._head)

    @staticmethod
    def dtype(args):
        """The type that --dtype is on the GPU here or, without one, on one that has bf16."""
        lacks = torch.cuda.is_available() and not torch.cuda.is_bf16_supported(including_emulation=False)
        return DTYPES[("fp16" if lacks else "bf16") if args.dtype == "auto" else args.dtype]

    def tokens(self, args):
        """Of the largest pass, where nobody gives them: two responses as long as can be, behind the shortest prompt."""
        longest = 2 * args.max_length + self.vectors
        return max(args.tokens_per_microbatch, longest) if args.tokens_per_microbatch else args.batch_size * longest

    def shares(self, lora_r):
        """Over how many ranks weights, gradients and moments are sharded; a model that takes no packed pairs is not."""
        return self.ranks if lora_r == 0 and self.packs else 1

    def _model(self, lora_r, dropout, dtype):
        """The skeleton in the types of a pass; where all weights are trained, a lever gets its adapter here."""
        model = copy.deepcopy(self.skeleton)
        if lora_r and not any("lora_" in name for name, _ in model.named_parameters()):
            lora.add_adapter(model, "policy", lora_r, 32.0)
        for name, parameter in model.named_parameters():
            wide = "lora_" in name or self.shares(lora_r) == 1 and (name == "score.weight" or lora_r == 0)
            parameter.data = parameter.data.to(torch.float32 if wide else dtype)
            parameter.requires_grad_(lora_r is not None and (parameter.requires_grad or name == "score.weight"))
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            if hasattr(module, "lora_A"):
                module.settings = {name: (scale, dropout) for name, (scale, _) in module.settings.items()}
        return model.train()

    def _measured(self, lora_r, dropout, dtype):
        """A Pass of SOME tokens, from the first two blocks: the others are taken to be as the second."""
        model = copy.deepcopy(self.model(lora_r, dropout, dtype))
        stacks = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m)]
        stack = next(m for m in stacks if isinstance(m[0], GradientCheckpointingLayer))
        more = max(0, len(stack) - 2)
        del stack[2:]
        autocast = lora_r == 0 and self.shares(lora_r) == 1 and dtype != torch.float32
        passed = measure(model, SOME, dtype if autocast else None)
        saved, casts = ([*of[:-1], *of[-2:-1] * more, of[-1]] for of in (passed.saved, passed.casts))
        return Pass(saved, casts, passed.inputs + passed.inputs[-1:] * more, passed.passing, passed.ungraded)

    def _head(self, lora_r, dropout, dtype, num_tokens, with_kl):
        """head_bytes; beyond MANY tokens, which the head takes chunk by chunk, it grows in line with them."""
        if self.skeleton.get_output_embeddings() is None:  # a reward model
            return 0, 0
        model = self.model(lora_r, dropout, dtype)
        at = lambda tokens: head_bytes(model, tokens, dtype, with_kl)
        if num_tokens <= MANY:
            return at(num_tokens)
        return [many + (num_tokens / MANY - 1) * 2 * (many - half) for half, many in zip(at(MANY // 2), at(MANY))]

    def rows(self, args, tokens=None):
        """{term: its bytes at each of the four moments}, with checkpointing `auto` as off.  Raises EstimateError."""
        lora_r, on = getattr(args, "lora_r", None), args.gradient_checkpointing == "on"
        how, tokens = (lora_r, getattr(args, "lora_dropout", 0.0), self.dtype(args)), tokens or self.tokens(args)
        full, shares, narrow = lora_r == 0, self.shares(lora_r), how[-1].itemsize
        optimizer, offload = getattr(args, "optimizer", "adamw"), getattr(args, "optimizer_offload", False)
        on_device = not (offload and shares > 1)  # with shards, weights and gradients go to the CPU too
        with_kl = bool(getattr(args, "kl_coeff", 0) or getattr(args, "lambda_kl", 0))
        try:
            passed, (head, ungraded_head) = self.measured(*how), self.head(*how, tokens, with_kl)
        except Exception as problem:  # whatever a foreign model does here
            reason = f"{type(problem).__name__}: {problem}".partition("\n")[0]
            raise EstimateError(
                f"the memory of this model's passes cannot be estimated ({reason}): leave --estimate-memory out"
            ) from None
        model, passes = self.model(*how), tokens / SOME
        adapter = size_of(p for name, p in model.named_parameters() if "lora_" in name)
        base = [p for name, p in model.named_parameters() if "lora_" not in name]
        soft = self.vectors * model.get_input_embeddings().weight.shape[1]
        sizes = [soft, *(p.numel() for p in model.parameters() if p.requires_grad)]
        trained, moments = WIDE * sum(sizes) / shares, 0 if offload else moments_bytes(sizes, optimizer) / shares
        earlier = args.gradient_accumulation_steps > 1 or args.tokens_per_microbatch  # passes, and their gradients
        begun = trained if earlier else WIDE * (groups(model)[0] + groups(model)[2]) / shares * full
        reference = self.reference or model  # without another, LoRA's is the policy with its adapter off
        another = (self.reference is not None or (full and with_kl)) and on_device
        other = another * size_of(reference.parameters(), WIDE if full else narrow) / shares
        rewards = {task: self._reward_bytes(folder, base, adapter, how) for task, folder in self.reward_folders.items()}
        samples = getattr(args, "cost_estimate", None) == "policy" and "harmless" in rewards
        casts, of_block = sum(passed.casts), max(passed.casts) if on else sum(passed.casts)
        rows = {
            "policy weights": [size_of(base, WIDE if full else None) / shares * on_device] * 4,
            "adapters": [adapter + WIDE * soft] * 4,
            "gradients": [of * on_device for of in (0, trained if earlier else 0, begun, trained)],
            "optimiser": [0] + [moments] * 3,
            "reference": [other] + [other * with_kl] * 3,
            "reward models": [sum(rewards.values())] + [samples * rewards.get("harmless", 0)] * 3,
            "activations": [0, passed.kept(on, False) * passes, passed.kept(on, True) * passes, 0],
            "passing in a block": [passed.ungraded * passes, 0, passed.passing * passes, 0],
            "logits chunk": [ungraded_head, head, 0, 0],
        }
        if shares > 1:
            rows |= of_shards(model, reference, narrow, with_kl, samples)
        else:  # with a KL the reference, too, is computed with in this type
            rows["weights cast"] = [casts, casts * (1 + with_kl), of_block, 0]
            rows["flat gradient"] = [0, 0, 0, trained * (self.ranks > 1)]
        return rows | {"CUDA": [CUDA] * 4}

    def _reward_bytes(self, folder, base, adapter, how):
        """A frozen reward model: an adapter on the policy's base, as large as its file or else as the policy's."""
        files = [file.stat().st_size for file in Path(folder).glob("*.safetensors")]
        whole = files and (Path(folder) / "config.json").exists()
        return (0 if how[0] or whole else size_of(base, how[2].itemsize)) + (sum(files) or adapter)

    def total(self, args, tokens=None):
        """Bytes at the moment that has the most."""
        return max(map(sum, zip(*self.rows(args, tokens).values(), strict=True)))

    def checkpointing(self, args, room, tokens=None, packs=True):
        """Whether a run on devices of `room` bytes has gradient checkpointing; auto: where it would not fit without."""
        self.packs = packs
        # More than any takes: 8 bytes of activations for each weight and token.  Small models need not be measured.
        most = size_of(self.skeleton.parameters(), 40 + 8 * (tokens or self.tokens(args))) + CUDA
        if args.gradient_checkpointing != "auto" or (most <= USABLE * room and self.reference is None):
            return args.gradient_checkpointing == "on"
        try:
            return self.total(args, tokens) > USABLE * room
        except EstimateError:
            return getattr(args, "lora_r", None) == 0  # a guess: there it is needed most

    def first_update(self, args, checkpointing, tokens=None):
        """Bytes of tensors at most in the first update, whose passes have no moments yet; checkpointing: whether on."""
        rows = self.rows(Namespace(**vars(args) | {"gradient_checkpointing": ("off", "on")[checkpointing]}), tokens)
        rows |= {"optimiser": [0, 0, 0, rows["optimiser"][3]], "CUDA": [0] * 4}  # what CUDA takes torch does not see
        return max(map(sum, zip(*rows.values(), strict=True)))
