"""Does it fit, is it fast: memory beside the estimate, launches, how much of the time the GPU works."""

import time
from argparse import Namespace
from contextlib import contextmanager

import torch
import transformers

import lora
from harness import speed
from harness.memory_estimate import CUDA, Estimate
from tools.gpu_models import NEEDS_GPU, Updates, build, launches_of, profiled, random_pairs

GB = 1e9
QWEN3 = "qwen3", dict(vocab_size=151_936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, head_dim=128)
QWEN3[1].update(num_attention_heads=16, num_key_value_heads=8, tie_word_embeddings=True)  # Qwen3-0.6B
MISTRAL = "mistral", dict(sliding_window=None)  # 7B, by transformers' defaults
PAIRS = [(256, 256, 256)] * 4  # of --max-length 512
TOKENS = sum(map(sum, PAIRS))
ROLES = "policy", "helpful", "harmless"
FOUR_ROLES = dict(full=False, checkpointing=True, roles=ROLES, kl_coeff=0.1)
SETTINGS = dict(dtype="bf16", lora_dropout=0.0, batch_size=4, gradient_accumulation_steps=1, tokens_per_microbatch=0)
SETTINGS |= dict(max_length=512, max_prompt_length=256, gradient_checkpointing="off")
RUNS = [  # (what, model, all weights, checkpointing, GB of a card that has the room)
    ("LoRA", QWEN3, False, False, 15),
    ("LoRA, checkpointing", QWEN3, False, True, 8),
    ("all weights", QWEN3, True, False, 24),
    ("LoRA of 7B", MISTRAL, False, False, 40),
    ("LoRA of 7B, checkpointing", MISTRAL, False, True, 22),
]


def config_of(model):
    return transformers.CONFIG_MAPPING[model[0]](**model[1])


def predicted(config, full, checkpointing, roles=("policy",), **flags):
    """Bytes of the first update, by the estimate of the scripts."""
    with torch.device("meta"):
        skeleton = build(config)
    for role in () if full else reversed(roles):  # the policy last: it is on, and its gradient is what passes
        lora.add_adapter(skeleton, role, 16, 32, trainable=role == "policy")
    args = Namespace(**SETTINGS | {"lora_r": 0 if full else 16} | flags)
    return Estimate(skeleton).first_update(args, checkpointing, TOKENS)


def memory(report, device):
    """What updates take beside what --estimate-memory says of them; what CUDA takes outside of torch."""
    if device.type != "cuda":
        return report.line("note", "memory", NEEDS_GPU)
    for what, model, full, checkpointing, size in RUNS:
        if (free := torch.cuda.mem_get_info()[0]) < size * GB:
            report.line("note", f"memory, {what}", f"not tried: {free / GB:.0f} GB are free, of {size}")
            continue
        config = config_of(model)
        try:
            with peak() as measured:
                updates = Updates(config, torch.bfloat16, device, full, checkpointing)
                updates.update(random_pairs(PAIRS, config.vocab_size))
            _compare(report, what, predicted(config, full, checkpointing), measured[0])
        except torch.OutOfMemoryError as error:  # the others may fit
            report.line("FAIL", f"memory, {what}", str(error)[:200])
        updates = None  # its memory is for the next
    _four_roles(report, device)
    free, total = torch.cuda.mem_get_info()
    outside = (total - free - torch.cuda.memory_reserved()) / GB
    text = f"{outside:.2f} GB, other programs included; the estimate counts {CUDA / GB:.2f}"
    report.check(outside < 1.5 * CUDA / GB, "CUDA, outside of torch's memory", text, "note")


def _four_roles(report, device):
    """Policy, reference and two reward models on one 7B base: an update of Safe-MM-DPO stays below 18 GB."""
    if torch.cuda.mem_get_info()[0] < 20 * GB:
        report.line("note", "memory, four roles of 7B", "not tried: the card has too little free")
        return
    config = config_of(MISTRAL)
    with peak() as measured:
        updates = Updates(config, torch.bfloat16, device, checkpointing=True, roles=ROLES)
        updates.update_with_four_roles(random_pairs(PAIRS, config.vocab_size))
    _compare(report, "four roles of 7B", predicted(config, **FOUR_ROLES), measured[0])
    report.check(measured[0] < 18 * GB, "four roles of 7B below 18 GB", f"{measured[0] / GB:.2f} GB", "slow")


@contextmanager
def peak():
    """A block, and a list that then holds the most bytes that its tensors took."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before, most = torch.cuda.memory_allocated(), []
    yield most
    torch.cuda.synchronize()
    most.append(torch.cuda.max_memory_allocated() - before)


def _compare(report, what, expected, measured):
    away = measured / expected - 1
    text = f"{expected / GB:.2f} GB predicted, {measured / GB:.2f} measured ({100 * away:+.0f} %)"
    report.check(abs(away) < 0.1, f"memory, {what}", text, "FAIL" if abs(away) > 0.15 else "slow")


def launch_time(device):
    """Microseconds that the host takes to launch a kernel of one number: the median of 2,000."""
    x, times = torch.zeros(1, device=device), []
    for _ in range(2000):
        began = time.perf_counter()
        x.add_(1)
        times.append(time.perf_counter() - began)
    return 1e6 * sorted(times)[1000]


def speeds(report, device):
    """Pairs, tokens, useful operations a second, in passes of new lengths; launches; the GPU's share of the time.

    An update takes at least its launches times what one takes the host: below that the GPU waits for it.
    """
    if device.type != "cuda":
        return report.line("note", "speeds", NEEDS_GPU)
    launch = launch_time(device)
    report.check(launch <= 15, "a launch", f"{launch:.1f} us of this host (at most 15)", "slow")
    config = config_of(QWEN3)
    for what, count, longest in (("2 pairs of 768", 2, 256), ("8 pairs of 768", 8, 256), ("32 pairs of 192", 32, 64)):
        torch.cuda.empty_cache()
        updates = Updates(config, torch.bfloat16, device)
        batches = []
        for seed in range(12):
            shape = longest - seed % 7, longest - seed % 5, longest - seed % 3
            batches.append(random_pairs([shape] * count, config.vocab_size, seed))
        for batch in batches[:4]:
            updates.update(batch)
        torch.cuda.synchronize()
        began = time.perf_counter()
        for batch in batches[4:]:
            updates.update(batch)
        torch.cuda.synchronize()
        seconds = (time.perf_counter() - began) / 8
        operations = sum(speed.useful_flops(updates.model, batches[4]))
        events = profiled(lambda updates=updates, batch=batches[0]: updates.update(batch))
        busy = min(1.0, sum(event.self_device_time_total for event in events) / 1e6 / seconds)
        launches = launches_of(events)
        text = f"{count / seconds:.1f} pairs/s, {3 * longest * count / seconds:,.0f} tokens/s, "
        text += f"{operations / seconds / 1e12:.0f} TFLOP/s, "
        text += f"{launches} launches, {1e6 * seconds / launches:.0f} us of the host for each, "
        report.check(busy > 0.7, f"bf16 LoRA, {what}", f"{text}GPU busy {100 * busy:.0f} %", "slow")
        del updates
