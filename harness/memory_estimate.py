"""What a run will take in memory on each device, from the model's config alone: no weights are read, nothing is run.

Weights, gradients and optimiser are counted, and what passes keep and work with (pass_memory.py), at the run's largest.

    rows = Estimate(skeleton, ranks=8).rows(args)

A run has four moments (columns of memory_report's table), and its memory is that of the largest:
    scoring     the frozen models score all pairs, without gradient
    head        a pass has gone through the blocks and is at the language-model head: all activations are kept
    backward    a pass is in the last block on its way back: all activations are kept, and gradients pass
    update      gradients go to the other ranks, the optimiser steps; a policy that has to, samples
"""

import copy
import itertools
from argparse import Namespace
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

import lora
from formats.user_errors import UserError
from harness import four_bit
from harness.device import DTYPES
from harness.optimizers import moments_bytes
from harness.pass_memory import blocks_of, head_bytes, measure, picture_of
from lora_targets import text_decoder
from packed_model import HEAD_CHUNK

CUDA = 0.8e9  # what CUDA's context and the libraries' workspaces take, about
NCCL = 0.5e9  # what its buffers take where there are several ranks, about
WIDE = 4  # bytes of fp32
USABLE = 0.9  # of a device; the rest is for fragmentation and for what is left out here
MANY = 16 * HEAD_CHUNK  # tokens that are counted chunk by chunk
# Tokens of a pass, for `--tokens-per-microbatch auto`: on a GPU the most that fit, on a CPU see docs/results.md.
PASSES = 16_384, 8_192, 4_096, 2_048
CPU_PASS = 1_024
SOME = 1024  # tokens that are measured: with fused attention memory grows in line with them


class EstimateError(UserError):
    """A model whose passes cannot be run without its weights, in one sentence for the user."""


def size_of(parameters, width=None):
    """Bytes of parameters as they are, or with `width` bytes for each number."""
    return sum(parameter.numel() * (width or parameter.element_size()) for parameter in parameters)


class Numbers(NamedTuple):
    """How many numbers stand in the weights of a model's parts."""

    block: int  # the largest block
    rest: int  # all that is in no block
    head: int  # the language-model head

    @classmethod
    def of(cls, model):
        sizes, head = [size_of(block.parameters(), 1) for block in blocks_of(model)], model.get_output_embeddings()
        return cls(max(sizes), size_of(model.parameters(), 1) - sum(sizes), head.weight.numel() if head else 0)


class Case(NamedTuple):
    """A run, by what the rows of its table depend on.  A method is a row: bytes at each of the four moments."""

    model: nn.Module  # the policy, in the types of its passes
    reference: nn.Module | None  # None: the policy itself, its adapter off or before its first update
    trained: list  # sizes of the tensors that are trained
    full: bool  # all weights are trained
    shards: int  # over how many ranks weights, gradients and moments are split; 1: each rank has all
    offload: bool  # the moments are in the CPU's memory, and with shards the weights and gradients too
    accumulates: bool  # an update has several passes
    with_kl: bool  # the reference takes part in every pass
    samples: bool  # the policy samples, and the harmless model scores that
    own_pairs: bool  # the helpful model and the reference are asked about it too
    width: int  # bytes of a number that is computed with
    in_four_bits: bool  # the frozen base

    def between_passes(self, numbers):
        """Bytes of fp32 numbers that a rank keeps of all ranks', on its device."""
        return 0 if self.offload and self.shards > 1 else WIDE * numbers / self.shards

    def policy_weights(self):
        base = [parameter for name, parameter in self.model.named_parameters() if "lora_" not in name]
        return [self.between_passes(size_of(base, 1)) if self.full else size_of(base) - self.spared(self.model)] * 4

    def spared(self, model):
        """Bytes that a frozen model has less in 4 bits."""
        if not self.in_four_bits:
            return 0
        numbers = size_of((layer.weight for layer in four_bit.linears_of_blocks(model)), 1)
        return numbers * (self.width - four_bit.BITS / 8)

    def made_whole(self):
        """The largest weight that a pass takes out of 4 bits."""
        layers = four_bit.linears_of_blocks(self.model) if self.in_four_bits else []
        most = max((self.width * layer.weight.numel() for layer in layers), default=0)
        return [most, 0, most, 0]

    def gradients(self):
        trained = self.between_passes(sum(self.trained))
        if self.accumulates:  # those of the passes before
            return [0, trained, trained, trained]
        numbers = Numbers.of(self.model)
        return [0, 0, self.between_passes(numbers.block + numbers.head) if self.full else 0, trained]

    def optimiser(self, optimizer):
        moments = 0 if self.offload else moments_bytes(self.trained, optimizer) / self.shards
        return [0, moments, moments, moments]

    @property
    def asks_reference(self):
        """Whether it is asked in training, too."""
        return self.with_kl or self.own_pairs

    def references(self):
        if self.reference is None:
            return [0] * 4
        weights = size_of(self.reference.parameters(), 1)
        size = self.between_passes(weights) if self.full else weights * self.width - self.spared(self.reference)
        return [size] * 4 if self.asks_reference else [size, 0, 0, 0]

    def reward_models(self, sizes):
        later = (sizes["harmless"] if self.samples else 0) + (sizes["helpful"] if self.own_pairs else 0)
        return [sum(sizes.values()), later, later, later]

    def gathered_weights(self):
        """What FSDP2 puts together: the next block while one computes, and what is in no block for a whole pass."""
        policy, first = Numbers.of(self.model), Numbers.of(self.reference or self.model)
        stays = first.rest if self.asks_reference else 0  # of a reference, from its first pass on
        whole = size_of(self.model.parameters(), 1) if self.samples else 0
        numbers = [first.rest + 2 * first.block, stays + policy.rest + policy.block]
        numbers += [stays + policy.rest + 2 * policy.block, stays + whole]
        return [self.width * number for number in numbers]

    def whole_gradients(self):
        """Those of a block are there whole, and in fp32, on their way, those of the one before; of the rest last."""
        numbers = Numbers.of(self.model)
        in_block = self.width * (numbers.head + numbers.block) + WIDE * numbers.block
        rest = sum(self.trained) - sum(size_of(block.parameters(), 1) for block in blocks_of(self.model))
        return [0, 0, in_block, (self.width + WIDE) * rest]


class Estimate:
    """The memory of runs of one script on one model.

    skeleton: on the meta device, with the adapters of the run; reference: another model's, where there is one;
    reward_folders: {task: folder} of frozen reward models; vectors: length of a soft prompt that is trained.
    """

    def __init__(self, skeleton, ranks=1, reference=None, reward_folders=None, vectors=0):
        self.skeleton, self.ranks, self.reference = skeleton, ranks, reference
        self.reward_folders, self.vectors = reward_folders or {}, vectors
        self.picture = picture_of(skeleton)
        self.packs = True  # whether the model takes packed pairs
        self.model, self.measured, self.head = cache(self._model), cache(self._measured), cache(self._head)

    @staticmethod
    def dtype(args):
        """The type that --dtype is on the GPU here or, without one, on one that has bf16."""
        lacks = torch.cuda.is_available() and not torch.cuda.is_bf16_supported(including_emulation=False)
        return DTYPES[("fp16" if lacks else "bf16") if args.dtype == "auto" else args.dtype]

    def tokens(self, args):
        """Of the largest pass, where nobody gives them: two responses as long as can be, behind the shortest prompt, or
        behind a picture, which --max-length counts as one token."""
        longest = 2 * args.max_length + self.vectors + max(0, self.picture.tokens - 1)
        return max(args.tokens_per_microbatch, longest) if args.tokens_per_microbatch else args.batch_size * longest

    def shards(self, lora_r):
        """Over how many ranks weights, gradients and moments are split; a model that takes no packed pairs is not."""
        return self.ranks if lora_r == 0 and self.packs else 1

    def _model(self, lora_r, dropout, dtype):
        """The skeleton in the types of a pass; where all weights are trained, a lever gets its adapter here."""
        model = copy.deepcopy(self.skeleton)
        if lora_r and not any("lora_" in name for name, _ in model.named_parameters()):
            lora.add_adapter(model, "policy", lora_r, 32.0)
        for name, parameter in model.named_parameters():
            is_head = name == "score.weight"
            wide = "lora_" in name or (self.shards(lora_r) == 1 and (is_head or lora_r == 0))
            parameter.data = parameter.data.to(torch.float32 if wide else dtype)
            parameter.requires_grad_(lora_r is not None and (parameter.requires_grad or is_head))
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            if hasattr(module, "lora_A"):
                module.settings = {name: (scale, dropout) for name, (scale, _) in module.settings.items()}
        return model.train()

    def _measured(self, lora_r, dropout, dtype):
        """A Pass of SOME tokens, from the first two blocks: the others are taken to be as the second."""
        model = copy.deepcopy(self.model(lora_r, dropout, dtype))
        stacks = [m for m in text_decoder(model).modules() if isinstance(m, nn.ModuleList) and len(m)]
        stack = next(m for m in stacks if isinstance(m[0], GradientCheckpointingLayer))
        others = max(0, len(stack) - 2)
        del stack[2:]
        autocast = lora_r == 0 and self.shards(lora_r) == 1 and dtype != torch.float32
        measured = measure(model, SOME, dtype if autocast else None)

        def of_all(numbers):
            *blocks, rest = numbers
            return [*blocks, *blocks[-1:] * others, rest]

        inputs = measured.inputs + measured.inputs[-1:] * others
        return measured._replace(saved=of_all(measured.saved), casts=of_all(measured.casts), inputs=inputs)

    def _head(self, lora_r, dropout, dtype, num_tokens, with_kl):
        """head_bytes; beyond MANY tokens, which the head takes chunk by chunk, it grows in line with them."""
        if self.skeleton.get_output_embeddings() is None:  # a reward model
            return 0, 0
        model = self.model(lora_r, dropout, dtype)
        if num_tokens <= MANY:
            return head_bytes(model, num_tokens, dtype, with_kl)
        halves = head_bytes(model, MANY // 2, dtype, with_kl)
        wholes = head_bytes(model, MANY, dtype, with_kl)
        beyond = num_tokens / MANY - 1
        return [whole + beyond * 2 * (whole - half) for half, whole in zip(halves, wholes)]

    def rows(self, args, tokens=None):
        """{term: its bytes at each of the four moments}, with checkpointing `auto` as off.  Raises EstimateError."""
        lora_r, dropout, dtype = getattr(args, "lora_r", None), getattr(args, "lora_dropout", 0.0), self.dtype(args)
        tokens, on = tokens or self.tokens(args), args.gradient_checkpointing == "on"
        with_kl = bool(getattr(args, "kl_coeff", 0) or getattr(args, "lambda_kl", 0))
        own_pairs = bool(getattr(args, "own_pairs", 0))
        try:
            measured = self.measured(lora_r, dropout, dtype)
            head, ungraded_head = self.head(lora_r, dropout, dtype, tokens, with_kl)
        except Exception as problem:  # whatever a foreign model does here
            reason = f"{type(problem).__name__}: {problem}".partition("\n")[0]
            raise EstimateError(
                f"the memory of this model's passes cannot be estimated ({reason}): leave --estimate-memory out"
            ) from None
        model, full, passes = self.model(lora_r, dropout, dtype), lora_r == 0, tokens / SOME
        soft_prompt = self.vectors * model.get_input_embeddings().weight.shape[1]
        case = Case(
            model=model,
            reference=self.reference or (model if full and (with_kl or own_pairs) else None),
            trained=[soft_prompt, *(p.numel() for p in model.parameters() if p.requires_grad)],
            full=full,
            shards=self.shards(lora_r),
            offload=getattr(args, "optimizer_offload", False),
            accumulates=args.gradient_accumulation_steps > 1 or args.tokens_per_microbatch > 0,
            with_kl=with_kl,
            samples=getattr(args, "cost_estimate", None) == "policy" and "harmless" in self.reward_folders,
            own_pairs=own_pairs,
            width=dtype.itemsize,
            in_four_bits=getattr(args, "base_dtype", "same") == "nf4",
        )
        adapters = size_of(p for name, p in model.named_parameters() if "lora_" in name)
        rewards = {task: self._reward_bytes(folder, case, adapters) for task, folder in self.reward_folders.items()}
        rows = {
            "policy weights": case.policy_weights(),
            "adapters": [adapters + WIDE * soft_prompt] * 4,
            "gradients": case.gradients(),
            "optimiser": case.optimiser(getattr(args, "optimizer", "adamw")),
            "reference": case.references(),
            "reward models": case.reward_models(rewards),
            "activations": [0, measured.kept(on, False) * passes, measured.kept(on, True) * passes, 0],
            "passing in a block": [measured.ungraded * passes, 0, measured.passing * passes, 0],
            "logits chunk": [ungraded_head, head, 0, 0],
        }
        if self.picture.tokens:
            # The tower runs first, for one pair at a time: what a pass has later is not there yet.
            tower = self.picture.numbers * (WIDE if full and case.shards == 1 else case.width)
            features = tokens * case.width * model.get_input_embeddings().weight.shape[1]
            later = rows["passing in a block"][0], rows["activations"][1]
            rows["pictures"] = [*(features + max(0, tower - of_pass) for of_pass in later), features, 0]
        if case.in_four_bits:
            rows["weights made whole"] = case.made_whole()
        if case.shards > 1:
            rows |= {"gathered weights": case.gathered_weights(), "whole gradients": case.whole_gradients()}
        else:
            casts = sum(measured.casts)
            again = max(measured.casts) if on else casts  # of the block that runs again
            rows["weights cast"] = [casts, 2 * casts if with_kl else casts, again, 0]  # 2: the reference's too
            rows["flat gradient"] = [0, 0, 0, WIDE * sum(case.trained) if self.ranks > 1 else 0]
        return rows | {"CUDA": [CUDA + NCCL if self.ranks > 1 else CUDA] * 4}

    def _reward_bytes(self, folder, case, adapters):
        """A frozen reward model: an adapter on the policy's base, as large as its file or else as the policy's."""
        files = [file.stat().st_size for file in Path(folder).glob("*.safetensors")]
        size = sum(files) or adapters
        is_whole = files and (Path(folder) / "config.json").exists()
        if is_whole or not case.full:
            return size
        return size + size_of(case.model.parameters(), case.width)  # the policy's base changes: it needs its own

    def total(self, args, tokens=None):
        """Bytes at the moment that has the most."""
        return max(map(sum, zip(*self.rows(args, tokens).values(), strict=True)))

    def fits(self, args, room, tokens=None):
        """Whether a run, with checkpointing `auto` as off, leaves a tenth of devices of `room` bytes.  Raises
        EstimateError."""
        # More than any takes: 8 bytes of activations for each weight and token.  Small models need not be measured.
        most = size_of(self.skeleton.parameters(), 40 + 8 * (tokens or self.tokens(args))) + CUDA + NCCL
        is_small = most <= USABLE * room and self.reference is None
        return is_small or self.total(args, tokens) <= USABLE * room

    def checkpointing(self, args, room, tokens=None, packs=True):
        """Whether a run on devices of `room` bytes has gradient checkpointing; auto: where it would not fit without."""
        self.packs = packs
        if args.gradient_checkpointing != "auto":
            return args.gradient_checkpointing == "on"
        try:
            return not self.fits(args, room, tokens)
        except EstimateError:
            return getattr(args, "lora_r", None) == 0  # a guess: there it is needed most

    def auto_pass(self, args, device_type, room):
        """Tokens of a pass of `--tokens-per-microbatch auto` on a cuda, cpu or mps device of `room` bytes.

        On a GPU the most of PASSES, if need be with checkpointing where that is `auto`.  --estimate-memory is about
        GPUs: elsewhere it gets the least that a run has there.
        """
        if device_type != "cuda":
            on_others = CPU_PASS if device_type == "cpu" else 0  # by pairs on mps: not measured there
            return PASSES[-1] if args.estimate_memory else on_others
        modes = ("off", "on") if args.gradient_checkpointing == "auto" else (args.gradient_checkpointing,)
        for mode, tokens in itertools.product(modes, PASSES):
            flags = {"gradient_checkpointing": mode, "tokens_per_microbatch": tokens}
            with suppress(EstimateError):
                if self.fits(Namespace(**vars(args) | flags), room):
                    return tokens
        return PASSES[-1]

    def first_update(self, args, checkpointing, tokens=None):
        """Bytes of tensors at most in the first update, whose passes have no moments yet; checkpointing: whether on."""
        mode = "on" if checkpointing else "off"
        rows = self.rows(Namespace(**vars(args) | {"gradient_checkpointing": mode}), tokens)
        rows |= {"optimiser": [0, 0, 0, rows["optimiser"][3]], "CUDA": [0] * 4}  # what CUDA takes torch does not see
        return max(map(sum, zip(*rows.values(), strict=True)))
