"""What the device of a run can do: the number type that it multiplies in, and the memory that a rank has."""

import math
import os
import re
from pathlib import Path

import torch
import torch.distributed as dist

from distributed import DeviceError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def pick_dtype(name, world, begun_in=None):
    """torch dtype of the base weights for --dtype; the same on every rank.  Raises DeviceError.

    auto: the type of the run or file that is gone on with, if there is one (begun_in: its name, as its record has it);
    else bf16 where the device multiplies in it, else fp16 on CUDA, else fp32.  No clock: a type that hung on the load
    of the machine would make two runs of one command.
    """
    kind = world.device.type
    short_names = {str(dtype).removeprefix("torch."): short for short, dtype in DTYPES.items()}
    begun_in = str(begun_in).removeprefix("torch.")
    if name == "auto" and begun_in in short_names:
        name = short_names[begun_in]
    elif name == "auto" and kind == "cuda":
        name = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    elif name == "auto":
        has = torch.tensor(float(kind == "cpu" and cpu_has_bf16()))
        if world.size > 1:  # another host may have another processor
            dist.all_reduce(has, op=dist.ReduceOp.MIN)
        name = "bf16" if has else "fp32"
    if name == "fp16" and kind == "cpu":
        raise DeviceError("--dtype fp16 needs a GPU: on a CPU use bf16 or fp32")
    if name == "bf16" and kind == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise DeviceError(
            f"--dtype bf16: {torch.cuda.get_device_name(world.device)} does not multiply in it, and would emulate it: "
            "use fp16 or fp32"
        )
    return DTYPES[name]


def use_tf32(world, dtype):
    """Let products of fp32 run in TF32 (--tf32).  Raises DeviceError where there are none."""
    if dtype != torch.float32:
        name = str(dtype).removeprefix("torch.")
        raise DeviceError(f"--tf32 is for --dtype fp32, and this run computes in {name}: leave one of them out")
    if world.device.type != "cuda" or torch.cuda.get_device_capability(world.device) < (8, 0):
        raise DeviceError("--tf32 needs a GPU that has it (Ampere or newer): leave it out")
    torch.set_float32_matmul_precision("high")


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


def room(world):
    """Bytes of the device that a rank has for itself, the least of all ranks."""
    least = torch.tensor(float(own_room(world)), dtype=torch.float64)
    if world.size > 1:
        dist.all_reduce(least, op=dist.ReduceOp.MIN)
    return least.item()


def own_room(world):
    """Of this rank: what a GPU has free or torch holds already; or a machine's memory, shared by its ranks."""
    if world.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(world.device)  # not the total: others may be on it, or a desktop
        size = free + torch.cuda.memory_reserved(world.device)
    elif world.device.type == "mps":
        size = torch.mps.recommended_max_memory()
    elif hasattr(os, "sysconf"):  # not on Windows
        size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
    else:
        size = math.inf
    return size
