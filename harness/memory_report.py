"""What memory_estimate.Estimate says, in words: the table of --estimate-memory, the cards that have the room, the flags
that would make it enough, what a GPU then measured, and what a run says of its size and memory.

    print(report(Estimate(skeleton, ranks=8), args))
"""

import itertools
import sys
from argparse import Namespace

import torch

import lora_targets

GB = 1e9
MOMENTS = "scoring", "head", "backward", "update"  # memory_estimate's
DEVICES = 24, 40, 64, 80, 141  # GB that cards have


def report(estimate, args):
    """The table of an Estimate and, for cards of DEVICES, whether they have the room or which flags make it enough."""
    rows, mode = estimate.rows(args), args.gradient_checkpointing
    sums = {"total": [sum(column) for column in zip(*rows.values(), strict=True)]}
    dtype = str(estimate.dtype(args)).removeprefix("torch.")
    auto = " (--dtype auto on a GPU)" if args.dtype == "auto" else ""
    lines = [
        f"Memory of each of {estimate.ranks} devices in GB, estimated: {dtype}{auto}, passes of at most "
        f"{estimate.tokens(args):,} tokens, gradient checkpointing {'off' if mode == 'auto' else mode}",
        f"{'':20}" + "".join(f"{moment:>10}" for moment in MOMENTS),
    ]
    for name, numbers in (rows | sums).items():
        lines.append(f"{name:20}" + "".join(f"{number / GB:10.2f}" for number in numbers))
    as_it_is, turned_on, advice = [], [], ""  # sizes of cards
    for size in DEVICES:
        auto_on = mode == "auto" and estimate.checkpointing(args, size * GB)
        of_card = _with(args, [{"gradient_checkpointing": "on"}] * auto_on)
        if estimate.total(of_card) <= size * GB:
            (turned_on if auto_on else as_it_is).append(str(size))
        else:
            flags = lever(estimate, of_card, size * GB)
            advice += f"; for {size} GB: {flags or 'no flag or pair of flags is enough'}"
    fits = [f"{', '.join(as_it_is)} GB"] * bool(as_it_is)
    fits += [f"{', '.join(turned_on)} GB, where auto turns checkpointing on"] * bool(turned_on)
    line = f"{max(sums['total']) / GB:.2f} GB at most: fits {' and '.join(fits) or 'no card of these sizes'}{advice}"
    return "\n".join([*lines, line])


def first_update(estimate, args, checkpointing, micro_batches, lengths):
    """The log line that compares the estimate with what a GPU needed until the first update was done."""
    tokens = max(sum(lengths[i] for i in indices) for share in micro_batches for indices in share)
    measured = torch.cuda.max_memory_allocated()
    try:
        return compared(estimate.first_update(args, checkpointing, tokens), measured)
    except ValueError as error:  # memory_estimate.EstimateError
        return f"GPU memory of the first update: {measured / GB:.2f} GB measured; {error}"


def compared(predicted, measured):
    """A log line of two numbers of bytes."""
    numbers = f"{predicted / GB:.2f} GB predicted, {measured / GB:.2f} GB measured"
    return f"GPU memory of the first update: {numbers} ({round(100 * (measured / predicted - 1)):+d} %)"


def lever(estimate, args, limit):
    """The flags of the cheapest lever, or pair of them, with which the run takes at most `limit` bytes, or None."""
    kinds = [kind for kind in levers(args, sharded=estimate.shares(getattr(args, "lora_r", None)) > 1) if kind]
    for some in (*((kind,) for kind in kinds), *itertools.combinations(kinds, 2)):
        if estimate.total(_with(args, [kind[-1] for kind in some])) <= limit:  # the strongest step of each
            steps = (steps for steps in itertools.product(*some) if estimate.total(_with(args, steps)) <= limit)
            return " ".join(_words(next(steps)))
    return None


def levers(args, sharded):
    """What can be done for memory, the cheapest first: for each lever its steps {flag: value}, the mildest first."""
    pairs, budget, longest = (
        args.batch_size * args.gradient_accumulation_steps,
        args.tokens_per_microbatch,
        args.max_length,
    )
    sizes = [size for size in _halves(args.batch_size, 1) if not budget]
    yield [{"batch_size": size, "gradient_accumulation_steps": -(-pairs // size)} for size in sizes] or [
        {"tokens_per_microbatch": size} for size in _halves(budget, 2 * longest)
    ]
    yield [{"gradient_checkpointing": "on"}] * (args.gradient_checkpointing != "on")
    if getattr(args, "optimizer", "adamw") == "adamw" and not getattr(args, "optimizer_offload", False):
        # One or the other; bitsandbytes does not step on shards.
        yield [{"optimizer": "adamw8bit"}] * (not sharded) + [{"optimizer_offload": True}]
    yield [{"lora_r": 16}] * (getattr(args, "lora_r", None) == 0)
    prompt = args.max_prompt_length
    yield [{"max_length": size, "max_prompt_length": min(prompt, size // 2)} for size in _halves(longest, 64)]


def _halves(number, least):
    return [number >> times for times in range(1, number.bit_length()) if number >> times >= least]


def _with(args, steps):
    return Namespace(**vars(args) | {name: value for step in steps for name, value in step.items()})


def _words(steps):
    flags = {f"--{name.replace('_', '-')}": value for step in steps for name, value in step.items()}
    return [name if value is True else f"{name} {value}" for name, value in flags.items()]


# -- log lines of a run ----------------------------------------------------------------------------------------------


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


def start_lines(what, parameters, model, args, world):
    """What a run says before its first update: how much it trains, memory, and pairs per update."""
    trainable, total = sum(p.numel() for p in parameters), sum(p.numel() for p in model.parameters())
    how, lora_r = f"Full fine-tuning{what and ' of ' + what}", getattr(args, "lora_r", None)  # None: a soft prompt
    if lora_r is None:
        how, total = f"{what}, the rest frozen", total + trainable
    elif lora_r:
        how = f"LoRA enabled{what and ' for ' + what}"
    lines = [f"{how}: {trainable:,} trainable / {total:,} total parameters ({100 * trainable / total:.2f}%)"]
    lines += lora_targets.left_out(model) or []
    if lora_r and "learning_rate" not in args.given:
        lines.append(
            f"--learning-rate {args.learning_rate:g}, the default with LoRA ({args.full_rate:g} is for all weights)"
        )
    elif lora_r and args.learning_rate <= args.full_rate:
        lines.append(
            f"--learning-rate {args.learning_rate:g} is for all weights: with LoRA a start is 1e-4, the default"
        )
    batch = effective_batch_line(args.batch_size, args.gradient_accumulation_steps, world)
    return [*lines, *memory_lines(world), batch]


def effective_batch_line(batch_size, accumulation, world):
    """Pairs per update over all ranks."""
    ranks = "GPUs" if world.device.type == "cuda" else "processes"
    total = batch_size * accumulation * world.size
    return (
        f"Effective batch size: {total} (batch_size={batch_size} x accumulation={accumulation} x {world.size} {ranks})"
    )
