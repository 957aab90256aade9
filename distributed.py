"""Where a script runs: device, number type, ranks, and data parallel by hand.

Every rank holds the same replica and works on its own share of each update; one all-reduce of one flat fp32 gradient
per update makes the replicas take the same step.  Where all weights are trained, torch's FSDP2 splits them, their
gradients and the optimiser's state over the ranks instead (`shard`).  Ranks come from the environment that torchrun,
accelerate and deepspeed set (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT); without it there is one process.
"""

import math
import os
import random
import sys
import time
from contextlib import contextmanager
from datetime import timedelta
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

import lora_targets


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
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
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


def pick_dtype(name, world):
    """torch dtype of the base weights for --dtype; the same on every rank.  Raises DeviceError.

    auto: bf16 where the device has it (on a CPU: where it is faster), else fp16 on CUDA, else fp32.
    """
    kind = world.device.type
    if name == "auto" and kind == "cuda":
        name = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    elif name == "auto":
        faster = torch.tensor(float(kind == "cpu" and _cpu_bf16_is_faster()))
        if world.size > 1:
            dist.all_reduce(faster, op=dist.ReduceOp.MIN)
        name = "bf16" if faster else "fp32"
    if name == "fp16" and kind == "cpu":
        raise DeviceError("--dtype fp16 needs a GPU: on a CPU use bf16 or fp32")
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[name]


def _cpu_bf16_is_faster(size=512, rounds=5):
    """Whether a bf16 product beats an fp32 one here by 1.5 or more (about 20 ms; it takes AVX512-BF16 or AMX)."""
    best = {}
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.ones(size, size, dtype=dtype)
        times = []
        for _ in range(rounds):
            begin = time.perf_counter()
            a @ a
            times.append(time.perf_counter() - begin)
        best[dtype] = min(times[1:])
    return best[torch.float32] > 1.5 * best[torch.bfloat16]


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
    """Whether `asked` is true on some rank; all ranks get the same answer."""
    return bool(all_reduce_sum(torch.tensor(float(asked)), world)) if world.size > 1 else asked


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


# -- log lines -------------------------------------------------------------------------------------------------------


def memory_lines(world):
    """Memory of this process as log lines: allocated and reserved on a GPU, the highest resident size on a CPU."""
    if world.device.type == "cuda":
        return [
            f"GPU memory allocated: {torch.cuda.memory_allocated() / 1e9:.2f} GB",
            f"GPU memory reserved: {torch.cuda.memory_reserved() / 1e9:.2f} GB",
        ]
    if world.device.type == "mps":
        return [f"GPU memory allocated: {torch.mps.current_allocated_memory() / 1e9:.2f} GB"]
    try:
        import resource  # not on Windows
    except ImportError:
        return []
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)  # bytes
    return [f"CPU memory, highest so far: {peak / 1e9:.2f} GB"]


def start_lines(what, parameters, model, args, world, slow_rate):
    """What a run says before its first update: how much it trains, memory, and pairs per update."""
    trainable, total = sum(p.numel() for p in parameters), sum(p.numel() for p in model.parameters())
    how, lora_r = f"Full fine-tuning{what and ' of ' + what}", getattr(args, "lora_r", None)  # None: a soft prompt
    if lora_r is None:
        how, total = f"{what}, the rest frozen", total + trainable
    elif lora_r:
        how = f"LoRA enabled{what and ' for ' + what}"
    lines = [f"{how}: {trainable:,} trainable / {total:,} total parameters ({100 * trainable / total:.2f}%)"]
    lines += lora_targets.left_out(model) or []
    if lora_r and "learning_rate" not in args.given and args.learning_rate < slow_rate:
        lines.append(f"--learning-rate {args.learning_rate:g} is a rate for training all weights: with LoRA try 1e-4")
    batch = effective_batch_line(args.batch_size, args.gradient_accumulation_steps, world)
    return [*lines, *memory_lines(world), batch]


def effective_batch_line(batch_size, accumulation, world):
    """Pairs per update over all ranks."""
    ranks = "GPUs" if world.device.type == "cuda" else "processes"
    total = batch_size * accumulation * world.size
    return (
        f"Effective batch size: {total} (batch_size={batch_size} x accumulation={accumulation} x {world.size} {ranks})"
    )
