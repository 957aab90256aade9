"""Where a script runs: device, number type, ranks, and data parallel by hand.

Every rank holds the same replica and works on its own share of each update; one all-reduce of one flat fp32 gradient
per update makes the replicas take the same step.  Where all weights are trained, torch's FSDP2 splits them, their
gradients and the optimiser's state over the ranks instead (`shard`).  Ranks come from the environment that torchrun,
accelerate and deepspeed set (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT); without it there is one process.
"""

import math
import os
import random
import re
import sys
import time
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor
from tqdm import tqdm
from transformers.modeling_layers import GradientCheckpointingLayer

# What launchers set, and from what to what; any machine has fewer ranks.
VARIABLES = {"RANK": (0, 999_999), "WORLD_SIZE": (1, 10**6), "LOCAL_RANK": (0, 999_999)}
VARIABLES |= {"LOCAL_WORLD_SIZE": (1, 10**6), "MASTER_PORT": (0, 65_535)}
START = "start with torchrun (accelerate, deepspeed), which sets these, or unset them for one process"


class DeviceError(ValueError):
    """A device or number type that this machine lacks, or ranks that do not agree: one sentence for the user."""


class World(NamedTuple):
    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self):
        return self.rank == 0


def start(device="auto", timeout=600):
    """Join the other ranks if there are any; returns the World.  Raises DeviceError.

    timeout: seconds that a rank waits for the others, here and in each exchange, before it ends.
    """
    rank, size, local_rank = ranks_of_environment()
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise DeviceError("--device cuda: torch sees no CUDA device; check nvidia-smi and CUDA_VISIBLE_DEVICES")
    if device == "mps" and not torch.backends.mps.is_available():
        raise DeviceError("--device mps: this machine has no Metal device; use --device cpu")
    if device == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise DeviceError(f"rank {rank} wants GPU {local_rank} and only {torch.cuda.device_count()} are visible")
        torch.cuda.set_device(local_rank)
        device = f"cuda:{local_rank}"
        # Since torch 2.11 the first choice on H100 and B200.  It takes up to a second to plan for each new length and
        # stride, and no two packed rows are alike; its gradients can be NaN (github.com/pytorch/pytorch/issues/196678).
        torch.backends.cuda.enable_cudnn_sdp(False)
    if device == "cpu":  # oneDNN keeps 1,024 compiled products, a third of a gigabyte where every length is new
        os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")
    if size > 1:
        # On GPUs both: flags and counts go between hosts by gloo, without waiting for a device.
        backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"
        try:
            dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
        except dist.DistNetworkError as error:
            if "EADDRINUSE" not in str(error):
                raise
            raise DeviceError(
                f"MASTER_PORT {os.environ['MASTER_PORT']} is taken on this machine, by another run or program: set a "
                "free one (deepspeed: --master_port)"
            ) from None
    return World(rank, size, torch.device(device))


def ranks_of_environment():
    """(RANK, WORLD_SIZE, LOCAL_RANK) of the environment; 0, 1 and 0 without it.  Raises DeviceError.

    What cannot be would be waited for without end (a rank that nobody has), or be silent (rank 3 of one process).
    """
    given = {name: os.environ[name] for name in VARIABLES if os.environ.get(name)}
    for name, (least, most) in VARIABLES.items():
        value = given.get(name, "")
        if value and not (re.fullmatch(r"[0-9]{1,9}", value) and least <= int(value) <= most):
            raise DeviceError(f"{name} is {value[:40]!r}, and has to be a whole number from {least} to {most}: {START}")
    rank, size, local_rank = (int(given.get(name, start)) for name, start in zip(VARIABLES, (0, 1, 0)))
    if not rank < size:
        raise DeviceError(f"RANK {rank} is none of WORLD_SIZE {size}, which count from 0: {START}")
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if size > 1 and missing:
        raise DeviceError(f"WORLD_SIZE is {size}, and there is no {' and no '.join(missing)}: {START}")
    return rank, size, local_rank


def room(world):
    """Bytes of the device that a rank has for itself, the least of all ranks: a GPU's memory; or a machine's, shared by
    its ranks.
    """
    if world.device.type == "cuda":
        size = torch.cuda.mem_get_info(world.device)[1]
    elif world.device.type == "mps":
        size = torch.mps.recommended_max_memory()
    elif hasattr(os, "sysconf"):  # not on Windows
        size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    else:
        size = math.inf
    least = torch.tensor(float(size), dtype=torch.float64)
    if world.size > 1:
        dist.all_reduce(least, op=dist.ReduceOp.MIN)
    return least.item()


def stop():
    if dist.is_initialized():
        dist.destroy_process_group()


def main_first(world, work):
    """work() on rank 0, then on the other ranks, which find it done; returns its result."""
    if world.size > 1 and not world.is_main:
        dist.barrier()
    result = work()
    if world.size > 1 and world.is_main:
        dist.barrier()
    return result


def check_same_on_all_ranks(facts, world):
    """Raise DeviceError, on every rank the same, unless all of them pass the same {name: value}.

    To be called before any model loads: ranks that read other rows or flags wait for each other without end, or train
    on what nobody meant.
    """
    if world.size == 1:
        return
    of_rank = [None] * world.size
    dist.all_gather_object(of_rank, facts)
    first = of_rank[0]
    for rank, other in enumerate(of_rank):
        for name in first | other:
            if first.get(name) != other.get(name):
                here, there = (str(values.get(name))[:24] for values in (first, other))
                values = f" ({there}, not {here})" if there != here else ""
                time.sleep(0 if world.is_main else 1)  # torchrun ends the rest once one has ended: rank 0 has to speak
                raise DeviceError(
                    f"{name} of rank {rank} is not that of rank 0{values}: start all ranks with the same flags, on the "
                    "same files"
                )


def shows_bars(world):
    """Whether to show progress bars: on rank 0, where someone may be watching."""
    return world.is_main and sys.stderr.isatty()


def print0(world, *text, sep=" "):
    """Print on rank 0, above a progress bar if one is shown."""
    if world.is_main:
        tqdm.write(sep.join(map(str, text)))
        sys.stdout.flush()


def seed_everything(seed):
    random.seed(seed)
    torch.manual_seed(seed)


# -- number type -----------------------------------------------------------------------------------------------------


DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def pick_dtype(name, world, begun_in=None):
    """torch dtype of the base weights for --dtype; the same on every rank.  Raises DeviceError.

    auto: the type of the run or file that is gone on with, if there is one (begun_in: its name, as its record has it);
    else bf16 where the device multiplies in it, else fp16 on CUDA, else fp32.  No clock: a type that hung on the load
    of the machine would make two runs of one command.
    """
    kind = world.device.type
    known = {str(dtype).removeprefix("torch."): short for short, dtype in DTYPES.items()}
    begun_in = str(begun_in).removeprefix("torch.")
    if name == "auto" and begun_in in known:
        name = known[begun_in]
    elif name == "auto" and kind == "cuda":
        name = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    elif name == "auto":
        has = torch.tensor(float(kind == "cpu" and cpu_has_bf16()))
        if world.size > 1:  # another host may have another processor
            dist.all_reduce(has, op=dist.ReduceOp.MIN)
        name = "bf16" if has else "fp32"
    if name == "fp16" and kind == "cpu":
        raise DeviceError("--dtype fp16 needs a GPU: on a CPU use bf16 or fp32")
    return DTYPES[name]


def cpu_has_bf16(cpuinfo="/proc/cpuinfo"):
    """Whether the processor multiplies in bf16 (x86: AVX512-BF16 or AMX; Arm: its BF16 extension), as Linux tells.

    Without such instructions bf16 products are slower than fp32's.  Where there is no such file (macOS, Windows) the
    answer is no: torch has no fast ones there.
    """
    try:
        features = Path(cpuinfo).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return re.search(r"^(flags|Features)\b.*\b(avx512_bf16|amx_bf16|bf16)\b", features, re.MULTILINE) is not None


# -- data parallel ---------------------------------------------------------------------------------------------------


def all_reduce_gradients(parameters, world):
    """Sum the gradients of all ranks in one flat fp32 all-reduce.  A rank without gradients counts as zero.

    A sum and not a mean: every rank has divided its losses by the pairs of the whole update already.  Gradients of
    sharded weights are sums of all ranks when they come out of backward.
    """
    if world.size == 1 or isinstance(parameters[0], DTensor):
        return
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    flat = torch.cat([parameter.grad.flatten().float() for parameter in parameters])
    dist.all_reduce(flat)
    for parameter, summed in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.grad.copy_(summed.view_as(parameter))


def take_step(parameters, optimizer, scheduler, scaler, max_grad_norm):
    """One update on the gradients that all ranks agree on, which are gone after it; returns their norm, on the device.

    max_grad_norm: 0 does not clip.  The schedule stands still where an fp16 scaler skips an update, on all ranks alike.
    """
    scaler.unscale_(optimizer)
    norm = _whole(torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm or math.inf))
    scale = scaler.get_scale()
    scaler.step(optimizer)
    scaler.update()
    if scaler.get_scale() >= scale:
        scheduler.step()
    optimizer.zero_grad()
    return norm


def all_reduce_sum(values, world):
    """Element-wise sum of a tensor over the ranks, in place."""
    if world.size > 1:
        dist.all_reduce(values)
    return values


@torch.no_grad()
def sums_over_ranks(passes, num_metrics, measure, world):
    """Sums and sums of squares over all ranks of measure(indices), (num_metrics, B), for each list of indices in this
    rank's `passes`: (2, num_metrics) fp64.
    """
    sums = torch.zeros(2, num_metrics, dtype=torch.float64)
    for some in passes:
        values = measure(some).cpu().double()
        sums += torch.stack((values.sum(1), (values**2).sum(1)))
    return all_reduce_sum(sums, world)


def gather(values, world):
    """The tensors of all ranks, stacked: (ranks, ...)."""
    rows = [torch.empty_like(values) for _ in range(world.size)]
    if world.size > 1:
        dist.all_gather(rows, values)
    else:
        rows = [values]
    return torch.stack(rows).cpu()


def on_any_rank(asked, world):
    """The greatest of the ranks' numbers `asked`, 0 where nobody asks; all ranks get the same answer."""
    greatest = torch.tensor(asked, dtype=torch.int32)
    if world.size > 1:
        dist.all_reduce(greatest, op=dist.ReduceOp.MAX)
    return greatest.item()


def assert_same_on_all_ranks(parameters, world):
    """Replicas that drifted apart train different models and save one of them: stop instead."""
    if world.size == 1 or isinstance(parameters[0], DTensor):  # a shard has no replica
        return
    mine = torch.stack(
        [p.detach().double().sum() for p in parameters] + [p.detach().double().norm() for p in parameters]
    )
    mine = mine.to(torch.float32) if world.device.type == "mps" else mine
    theirs = mine.clone()
    dist.broadcast(theirs, src=0)
    assert torch.equal(mine, theirs), f"the parameters of rank {world.rank} differ from those of rank 0"


# -- full fine-tuning: weights split over the ranks ------------------------------------------------------------------

METHODS = "packed_logps", "packed_scores", "response_states"  # of packed_model.py: what goes through a whole model


def shard(model, reference, world, dtype, say, offload=False):
    """Split the weights of a model on the CPU over the ranks' devices (FSDP2), and with them gradients and optimiser
    state; the reference's too, if it is another.  Returns the model's parameters.

    A block is put together while it computes, in `dtype`, and what is outside of the blocks around METHODS; what a rank
    keeps is fp32.  All ranks have to go through the models in step.  offload: what a rank keeps is on the CPU.  A model
    that does not take packed pairs is not split: how often it runs depends on the number of sequences.
    """
    how = {
        "mesh": init_device_mesh(world.device.type, (world.size,)),
        "mp_policy": MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32),
        "offload_policy": CPUOffloadPolicy(pin_memory=world.device.type == "cuda") if offload else OffloadPolicy(),
    }
    for each in dict.fromkeys((model, reference)):
        if not each.packs_pairs:
            each.to(world.device)
            say(f"Not sharded, as sequences are scored one by one: each of {world.size} ranks has all of the weights")
            continue
        for block in [module for module in each.modules() if isinstance(module, GradientCheckpointingLayer)]:
            fully_shard(block, **how)
        # The head of a reference stays whole after a pass: its states are used with it, outside.  A model's must not,
        # as its weights change.
        fully_shard(each, **how, reshard_after_forward=each is model)
        for module in _sharded(each):  # a sum and not a mean, as in all_reduce_gradients
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
        for name in METHODS:
            if hasattr(each, name):
                register_fsdp_forward_method(each, name)
    parameters = list(model.parameters())
    if model.packs_pairs:
        mine, total = sum(p.to_local().numel() for p in parameters), sum(p.numel() for p in parameters)
        say(f"Sharded over {world.size} ranks (FSDP2): rank 0 keeps {mine:,} of {total:,} weights")
    return parameters


def _sharded(model):
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


@contextmanager
def gathered(model):
    """A block in which a sharded model is whole on every rank, in the type it computes in: to generate, which each rank
    does as often as it has to.  Weights must not change within.
    """
    for module in _sharded(model):
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in _sharded(model):
            module.set_reshard_after_forward(True, recurse=False)
            module.reshard()


def _whole(tensor):
    """All of a sharded tensor; every rank has to ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_state(model, dtype, world):
    """{name: tensor} of a model that was trained whole, in `dtype` on the CPU of rank 0; {} on the other ranks.

    A tied weight is there once, as in the files of transformers.
    """
    again = {n for n, _ in model.named_parameters(remove_duplicate=False)} - dict(model.named_parameters()).keys()
    state = {}
    for name, tensor in model.state_dict().items():
        tensor = None if name in again else _whole(tensor)
        if world.is_main and tensor is not None:
            state[name] = tensor.cpu().to(dtype if tensor.is_floating_point() else tensor.dtype)
    return state
