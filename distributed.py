"""Data parallel by hand: several processes ("ranks"), each with the same model, train as one.

    world = start()                                  # which rank this is, how many there are, its device
    assert_same_on_all_ranks(parameters, world)      # all begin with the same weights
    for ...:                                         # each rank: its share of the update's pairs
        (losses.sum() / pairs_of_the_whole_update).backward()
        all_reduce_gradients(parameters, world)      # the sum over all ranks, the same on each
        take_step(parameters, optimizer, ...)        # so all take the same step, and stay the same
    stop()

Where all weights are trained and do not fit on one device, harness/sharding.py splits them over the ranks instead.
Ranks come from the environment that torchrun, accelerate and deepspeed set (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR,
MASTER_PORT); without it there is one process.
"""

import math
import os
import random
import re
import signal
import sys
import threading
import time
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from formats.user_errors import UserError

# What launchers set, and from what to what; any machine has fewer ranks.
VARIABLES = {"RANK": (0, 999_999), "WORLD_SIZE": (1, 10**6), "LOCAL_RANK": (0, 999_999)}
VARIABLES |= {"LOCAL_WORLD_SIZE": (1, 10**6), "MASTER_PORT": (0, 65_535)}
START = "start with torchrun (accelerate, deepspeed), which sets these, or unset them for one process"


class DeviceError(UserError):
    """A device or number type that this machine lacks, or ranks that do not agree: one sentence for the user."""


# -- who is there ----------------------------------------------------------------------------------------------------


class World(NamedTuple):
    rank: int  # of this process, 0, 1, ...
    size: int  # how many processes there are
    device: torch.device  # of this process

    @property
    def is_main(self):
        return self.rank == 0


def start(device="auto", timeout=600):
    """Join the other ranks if there are any; returns the World.  Raises DeviceError.

    timeout: seconds that a rank waits for the others, here and in each exchange, before it ends.
    """
    rank, size, local_rank = ranks_of_environment()
    device = device_of_rank(device, rank, local_rank)
    if size > 1:
        if "TORCHELASTIC_RUN_ID" in os.environ:  # this process is a child of torchrun's, or accelerate's
            threading.Thread(target=_end_with_launcher, args=(os.getppid(),), daemon=True).start()
        # On GPUs both: flags and counts go between hosts by gloo, without waiting for a device.
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        try:
            dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
        except dist.DistNetworkError as error:
            if "EADDRINUSE" not in str(error):
                raise
            raise DeviceError(
                f"MASTER_PORT {os.environ['MASTER_PORT']} is taken on this machine, by another run or program: set a "
                "free one (deepspeed: --master_port)"
            ) from None
    world = World(rank, size, device)
    if device.type == "cuda" and size > 1:
        check_own_device(str(torch.cuda.get_device_properties(device).uuid), world)
    return world


def _end_with_launcher(launcher, seconds=40):
    """Ask this rank to save and end once its launcher is gone (killed, out of memory); end it `seconds` later.

    Else it would train on, unseen, into the folder that the next run goes on in.
    """
    while os.getppid() == launcher:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(seconds)
    os._exit(128 + signal.SIGTERM)


def ranks_of_environment():
    """(RANK, WORLD_SIZE, LOCAL_RANK) of the environment; 0, 1 and 0 without it.  Raises DeviceError.

    What cannot be would be waited for without end (a rank that nobody has), or be silent (rank 3 of one process).
    """
    given = {name: os.environ[name] for name in VARIABLES if os.environ.get(name)}
    for name, (least, most) in VARIABLES.items():
        value = given.get(name, "")
        if value and not (re.fullmatch(r"[0-9]{1,9}", value) and least <= int(value) <= most):
            raise DeviceError(f"{name} is {value[:40]!r}, and has to be a whole number from {least} to {most}: {START}")
    rank = int(given.get("RANK", 0))
    size = int(given.get("WORLD_SIZE", 1))
    local_rank = int(given.get("LOCAL_RANK", 0))
    if not rank < size:
        raise DeviceError(f"RANK {rank} is none of WORLD_SIZE {size}, which count from 0: {START}")
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if size > 1 and missing:
        raise DeviceError(f"WORLD_SIZE is {size}, and there is no {' and no '.join(missing)}: {START}")
    return rank, size, local_rank


def device_of_rank(name, rank, local_rank):
    """The torch.device of --device (auto, cuda, mps, cpu) for the rank local_rank of its host.  Raises DeviceError."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise DeviceError("--device cuda: torch sees no CUDA device; check nvidia-smi and CUDA_VISIBLE_DEVICES")
    if name == "mps" and not torch.backends.mps.is_available():
        raise DeviceError("--device mps: this machine has no Metal device; use --device cpu")
    if name == "cuda":
        if torch.cuda.device_count() == 1:  # some launchers show each process its own: srun --gpus-per-task=1
            local_rank = 0
        if local_rank >= torch.cuda.device_count():
            raise DeviceError(f"rank {rank} wants GPU {local_rank} and only {torch.cuda.device_count()} are visible")
        torch.cuda.set_device(local_rank)
        # Since torch 2.11 the first choice on H100 and B200.  It takes up to a second to plan for each new length and
        # stride, and no two packed rows are alike; its gradients can be NaN (github.com/pytorch/pytorch/issues/196678).
        torch.backends.cuda.enable_cudnn_sdp(False)
        return torch.device("cuda", local_rank)
    if name == "cpu":  # oneDNN keeps 1,024 compiled products, a third of a gigabyte where every length is new
        os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")
    return torch.device(name)


def check_own_device(name, world):
    """Raise DeviceError, on every rank the same, where two ranks have one device: name, which no other device has."""
    of_ranks = [None] * world.size
    dist.all_gather_object(of_ranks, name)
    for rank, other in enumerate(of_ranks):
        first = of_ranks.index(other)
        if first != rank:
            raise DeviceError(
                f"ranks {first} and {rank} have one GPU between them: start as many processes as there are GPUs "
                "(--nproc-per-node), or show each process its own"
            )


def stop():
    if dist.is_initialized():
        dist.destroy_process_group()


# -- an update -------------------------------------------------------------------------------------------------------


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
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm or math.inf)
    if isinstance(norm, DTensor):  # of sharded weights: each rank has a part of it
        norm = norm.full_tensor()
    scaler.step(optimizer)
    scaler.update()
    if not scaler.is_enabled() or norm.isfinite():  # with fp16 alone it waits for the GPU
        scheduler.step()
    optimizer.zero_grad()
    return norm


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


# -- other numbers of all ranks --------------------------------------------------------------------------------------


def all_reduce_sum(values, world):
    """Element-wise sum of a tensor over the ranks, in place."""
    if world.size > 1:
        dist.all_reduce(values)
    return values


def gather(values, world):
    """The tensors of all ranks, stacked: (ranks, ...)."""
    of_ranks = [values]
    if world.size > 1:
        of_ranks = [torch.empty_like(values) for _ in range(world.size)]
        dist.all_gather(of_ranks, values)
    return torch.stack(of_ranks).cpu()


def gather_objects(value, world):
    """The values of all ranks, a list."""
    of_ranks = [value]
    if world.size > 1:
        of_ranks = [None] * world.size
        dist.all_gather_object(of_ranks, value)
    return of_ranks


def on_any_rank(asked, world):
    """The greatest of the ranks' numbers `asked`, 0 where nobody asks; all ranks get the same answer."""
    greatest = torch.tensor(asked, dtype=torch.int32)
    if world.size > 1:
        dist.all_reduce(greatest, op=dist.ReduceOp.MAX)
    return greatest.item()


# -- ranks that do the same ------------------------------------------------------------------------------------------


def check_same_on_all_ranks(values, world):
    """Raise DeviceError, on every rank the same, unless all of them pass the same {name: value}.

    To be called before any model loads: ranks that read other rows or flags wait for each other without end, or train
    on what nobody meant.
    """
    of_ranks = gather_objects(values, world)
    first = of_ranks[0]
    for rank, other in enumerate(of_ranks):
        for name in first | other:
            if first.get(name) != other.get(name):
                wanted, got = str(first.get(name))[:24], str(other.get(name))[:24]
                difference = f" ({got}, not {wanted})" if got != wanted else ""
                time.sleep(0 if world.is_main else 1)  # torchrun ends the rest once one has ended: rank 0 has to speak
                raise DeviceError(
                    f"{name} of rank {rank} is not that of rank 0{difference}: start all ranks with the same flags, on "
                    "the same files"
                )


def on_main(world, work):
    """work() on rank 0; a UserError of it is raised on every rank."""
    errors = [None]
    if world.is_main:
        try:
            work()
        except UserError as error:
            errors = [error]
    if world.size > 1:
        dist.broadcast_object_list(errors, src=0)
    if errors[0]:
        raise errors[0]


def main_first(world, work):
    """work() on rank 0, then on the other ranks, which find it done; returns its result."""
    if world.size > 1 and not world.is_main:
        dist.barrier()
    result = work()
    if world.size > 1 and world.is_main:
        dist.barrier()
    return result


def seed_everything(seed):
    random.seed(seed)
    torch.manual_seed(seed)


# -- rank 0 speaks for all -------------------------------------------------------------------------------------------


def shows_bars(world):
    """Whether to show progress bars: on rank 0, where someone may be watching."""
    return world.is_main and sys.stderr.isatty()


def print0(world, *text, sep=" "):
    """Print on rank 0, above a progress bar if one is shown."""
    if world.is_main:
        tqdm.write(sep.join(map(str, text)))
        sys.stdout.flush()
