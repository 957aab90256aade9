"""Is it right: the machine, the kernels of attention, log-probs and gradients beside a CPU's, optimisers, waits."""

import os
import platform
import shutil
import subprocess
import time
import warnings
from argparse import Namespace
from pathlib import Path

import torch
import transformers
from torch import nn

import distributed
import packed_attention
from formats.model_files import enable_checkpointing
from harness import optimizers
from packed_attention import PairLayout
from packed_model import prepare_model
from packing import Segment, pack
from tools.gpu_models import (
    DTYPES,
    KINDS,
    NEEDS_GPU,
    SEEING,
    SHAPES,
    Updates,
    adapted,
    distance,
    launches_of,
    loss_and_gradient,
    pairs_with_pictures,
    profiled,
    random_pairs,
)

GB = 1e9
FAR = {"fp32": (1e-5, 1e-3), "bf16": (1e-2, 0.08), "fp16": (2e-3, 0.02)}  # log-probs, gradients: from fp64


def version_of(package):
    try:
        return __import__(package).__version__
    except Exception:  # a broken installation raises what it likes
        return "not there"


def machine(report, device):
    """Versions, cards, and what the scripts set."""
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, Python {platform.python_version()}")
    print(f"bitsandbytes {version_of('bitsandbytes')}, {platform.platform()}")
    if device.type != "cuda":
        return
    driver = "unknown"
    if shutil.which("nvidia-smi"):
        words = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(words, capture_output=True, text=True).stdout.partition("\n")[0]
    nccl = torch.cuda.nccl.version() if torch.distributed.is_nccl_available() else "not there"
    libraries = f"cuDNN {torch.backends.cudnn.version()}, NCCL {nccl}"
    print(f"CUDA {torch.version.cuda}, driver {driver}, {libraries}")
    for number in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(number)
        card = torch.cuda.get_device_properties(number)
        size = f"{total / GB:.1f} GB, {free / GB:.1f} free"
        print(f"GPU {number}: {card.name}, compute {card.major}.{card.minor}, {size}")
        if free < 0.95 * total - GB:
            report.line("note", f"GPU {number}", f"{(total - free) / GB:.1f} GB are taken by others")
    allocator = os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF")
    report.check("expandable_segments:True" in (allocator or ""), "allocator", allocator or "as torch has it", "note")
    has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    report.check(has_bf16, "bf16", "in hardware" if has_bf16 else "not in hardware: --dtype auto is fp16", "note")
    is_on = torch.backends.cuda.cudnn_sdp_enabled()
    report.check(not is_on, "cuDNN attention", "on: NaN gradients, a plan for each new length" if is_on else "off")


def kernels(report, device):
    """Attention of two packed pairs, as in a layer of Qwen3-0.6B: from fp64; its kernels; what a new length costs."""
    module = nn.Module()
    module.pair_reach = None

    def attend(query, key, value):
        segments = Segment(0, 200, 391, 580), Segment(580, 700, 741, query.shape[2])
        return packed_attention.packed_attention(module, query, key, value, None, PairLayout(segments))[0]

    def inputs(dtype, length=900):
        torch.manual_seed(0)
        sizes = [(1, heads, length, 128) for heads in (16, 8, 8)]
        return [torch.randn(size).to(device, dtype).requires_grad_() for size in sizes]

    for name, dtype in DTYPES.items():
        if name == "fp16" and device.type == "cpu":
            continue
        given = inputs(dtype)
        wide = [x.detach().cpu().double().requires_grad_() for x in given]
        found = attend(*given)
        expected = attend(*wide)
        found = [found, *torch.autograd.grad(found.float().square().sum(), given)]
        expected = [expected, *torch.autograd.grad(expected.square().sum(), wide)]
        furthest = max(distance(x.detach().cpu().double(), y.detach()) for x, y in zip(found, expected))
        report.judge(f"attention in {name}, from fp64", furthest, {"fp32": 1e-4, "bf16": 2e-2, "fp16": 3e-3}[name])
        if device.type == "cuda":
            _kernels_of(report, name, lambda given=given: attend(*given).sum().backward())
            _cost_of_a_length(report, name, attend, lambda length, dtype=dtype: inputs(dtype, length))


def _kernels_of(report, name, work):
    events = profiled(work)
    kinds = {"flash": "flash", "mem-efficient": "fmha", "cuDNN": "cudnn", "math": "softmax_warp"}
    taken = [kind for kind, word in kinds.items() if any(word in event.key.lower() for event in events)]
    launches = f"{launches_of(events)} launches for 2 pairs, there and back"
    is_fast = not {"cuDNN", "math"} & set(taken)
    report.check(is_fast, f"kernels of attention in {name}", f"{', '.join(taken) or 'others'}; {launches}", "slow")


def _cost_of_a_length(report, name, attend, inputs):
    times = []
    for length in range(901, 911):
        given = inputs(length)  # drawn on the CPU: that takes longer than the attention
        torch.cuda.synchronize()
        began = time.perf_counter()
        attend(*given)
        torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - began))
    middle = sorted(times)[len(times) // 2]
    report.check(middle < 20, f"a new length in {name}", f"{middle:.1f} ms (hundreds where a plan is built for each)")


def numbers(report, device):
    """Log-probs, KL and LoRA's gradients of packed pairs, four kinds of model, from sequences one by one in fp64."""
    for kind in KINDS:
        _beside_one_by_one(report, device, kind, random_pairs(SHAPES))


def pictures(report, device):
    """The same of pairs with pictures; the KL's pass, the second over them, has features that were kept on the CPU."""
    for kind in SEEING:
        _beside_one_by_one(report, device, kind, pairs_with_pictures(kind))


def _beside_one_by_one(report, device, kind, pairs):
    model, parameters = adapted(kind, torch.float64, "cpu")
    prepare_model(model)
    model.packs_pairs = False  # sequences one by one
    on_cpu = [loss_and_gradient(model, parameters, pack(pairs), with_kl) for with_kl in (False, True)]
    for name, dtype in DTYPES.items():
        if name == "fp16" and device.type == "cpu":
            continue
        model, parameters = adapted(kind, dtype, device)
        says = prepare_model(model)
        if not model.packs_pairs:
            report.line("FAIL", f"{kind} {name}", says)
            continue
        scale = 1024.0 if name == "fp16" else 1.0
        here = [loss_and_gradient(model, parameters, pack(pairs, device), with_kl, scale) for with_kl in (False, True)]
        logps = max(distance(ours[0], theirs[0]) for ours, theirs in zip(here, on_cpu))
        gradients = max(distance(ours[1], theirs[1]) for ours, theirs in zip(here, on_cpu))
        report.judge(f"{kind} {name}: log-probs", logps, FAR[name][0])
        report.judge(f"{kind} {name}: gradients", gradients, FAR[name][1])
        model.train()
        batch = pack(pairs, device)
        plain, again = (loss_and_gradient(model, parameters, batch, False, scale)[1] for _ in range(2))
        enable_checkpointing(model, draws=False)
        checkpointed = loss_and_gradient(model, parameters, batch, False, scale)[1]
        noise = distance(again, plain)  # kernels that add up in any order
        report.judge(f"{kind} {name}: checkpointing", distance(checkpointed, plain), max(1e-6, 4 * noise))


def steps(report, device):
    """AdamW in its three forms beside a CPU's; an fp16 update whose gradient overflows is left out."""
    begin = [torch.randn(5000, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]

    def after_three(device, optimizer="adamw", offload=False):
        flags = dict(optimizer=optimizer, optimizer_offload=offload, learning_rate=1e-3, weight_decay=0.01)
        parameters = [nn.Parameter(x.clone().to(device)) for x in begin]
        stepper = optimizers.make_optimizer(parameters, Namespace(**flags))
        schedule = torch.optim.lr_scheduler.ConstantLR(stepper, 1.0)
        scaler = torch.amp.GradScaler(device.type, enabled=False)
        for number in range(1, 4):
            for parameter, x in zip(parameters, begin):
                parameter.grad = (x * number).to(device)
            distributed.take_step(parameters, stepper, schedule, scaler, 1.0)
        moved = [parameter.detach().cpu() - x for parameter, x in zip(parameters, begin)]
        return torch.cat(moved).double()

    by_hand = torch.cat(_adamw_by_hand(begin))
    report.judge("AdamW", distance(after_three(device), by_hand), 1e-3)
    if device.type == "cuda":
        report.judge("AdamW, --optimizer-offload", distance(after_three(device, offload=True), by_hand), 1e-3)
    if version_of("bitsandbytes") == "not there":
        report.line("note", "AdamW, adamw8bit", "bitsandbytes is not installed")
    else:
        report.judge("AdamW, adamw8bit", distance(after_three(device, "adamw8bit"), by_hand), 0.1)
    if device.type == "cuda":
        _overflow(report, device)


def _adamw_by_hand(begin):
    """How far three updates go, in fp64: rate 1e-3, decay 0.01, gradients n x begin, of norm 1 (arXiv:1711.05101)."""
    norm = torch.cat(begin).double().norm()
    moved = []
    for x in begin:
        weight, first, second = x.double().clone(), 0.0, 0.0
        for number in range(1, 4):
            gradient = x.double() / norm  # n x begin has more than norm 1, and is clipped to it
            first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
            direction = first / (1 - 0.9**number) / ((second / (1 - 0.999**number)).sqrt() + 1e-8)
            weight = weight * (1 - 1e-3 * 0.01) - 1e-3 * direction
        moved.append(weight - x.double())
    return moved


def _overflow(report, device):
    for offload in (False, True):
        flags = dict(optimizer="adamw", optimizer_offload=offload, learning_rate=1e-3, weight_decay=0.0)
        parameter = nn.Parameter(torch.ones(8, device=device))
        optimizer = optimizers.make_optimizer([parameter], Namespace(**flags))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda update: 1.0 / (update + 1))
        scaler, seen = torch.amp.GradScaler(device.type), []
        for factor in (float("inf"), 1.0):
            scaler.scale((parameter * factor).sum()).backward()
            distributed.take_step([parameter], optimizer, schedule, scaler, 1.0)
            seen.append((parameter[0].item(), schedule.last_epoch))
        is_right = seen[0] == (1.0, 0) and seen[1][0] < 1 and seen[1][1] == 1
        what = f"fp16 overflow is left out{', offloaded' if offload else ''}"
        report.check(is_right, what, f"weight and schedule after each of two updates: {seen}")


def waits(report, device):
    """Where an update makes the host wait for the GPU: nowhere, but once in fp16."""
    if device.type != "cuda":
        return report.line("note", "waits", NEEDS_GPU)
    config = transformers.CONFIG_MAPPING["qwen3"](**KINDS["qwen3"][1])
    for name, allowed in (("bf16", 0), ("fp16", 1)):
        updates = Updates(config, DTYPES[name], device)
        updates.update(random_pairs(SHAPES))
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype")
            torch.cuda.set_sync_debug_mode("warn")
            updates.update(random_pairs(SHAPES, seed=1))
            torch.cuda.set_sync_debug_mode("default")
        places = [f"{Path(w.filename).name}:{w.lineno}" for w in told if "synchroniz" in str(w.message)]
        report.check(len(places) <= allowed, f"waits in an update, {name}", f"{len(places)} {' '.join(places)}", "slow")
