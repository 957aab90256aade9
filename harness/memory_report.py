"""What memory_estimate.Estimate says, in words: the table of --estimate-memory, the cards that have the room, the flags
that would make it enough, what a GPU then measured, and what a run says of its size and memory.

    print(report(Estimate(skeleton, ranks=8), args))
"""

import itertools
import math
import sys
from argparse import Namespace

import torch

import lora_targets
from harness.pass_memory import SIDE

GB = 1e9
MOMENTS = "scoring", "head", "backward", "update"  # memory_estimate's
DEVICES = 24, 40, 64, 80, 141  # GB that cards have
PHASES = {  # of a run's Stopwatch, in words
    "load": "while models were loaded",
    "cache": "while frozen models scored the pairs",
    "forward": "in a pass of the training",
    "backward": "in a pass of the training",
    "communicate": "while gradients were exchanged",
    "step": "in the optimiser's step",
    "cost": "while responses were sampled",
}


def report(estimate, args):
    """The table of an Estimate and, for cards of DEVICES, whether they have the room or which flags make it enough."""
    rows, mode = estimate.rows(args), args.gradient_checkpointing
    rows["total"] = [sum(column) for column in zip(*rows.values(), strict=True)]
    dtype = str(estimate.dtype(args)).removeprefix("torch.")
    auto = " (--dtype auto on a GPU)" if args.dtype == "auto" else ""
    lines = [
        f"Memory of each of {estimate.ranks} devices in GB, estimated: {dtype}{auto}, passes of at most "
        f"{estimate.tokens(args):,} tokens, gradient checkpointing {'off' if mode == 'auto' else mode}",
        *_of_pictures(estimate.picture),
        f"{'':20}" + "".join(f"{moment:>10}" for moment in MOMENTS),
    ]
    for name, numbers in rows.items():
        lines.append(f"{name:20}" + "".join(f"{number / GB:10.2f}" for number in numbers))
    fits_as_it_is, fits_with_checkpointing, advice = [], [], ""  # sizes of cards
    for size in DEVICES:
        args_there, fits = args, fits_as_it_is
        if mode == "auto" and estimate.checkpointing(args, size * GB):
            args_there, fits = _with(args, {"gradient_checkpointing": "on"}), fits_with_checkpointing
        if estimate.total(args_there) <= size * GB:
            fits.append(str(size))
        else:
            flags = lever(estimate, args_there, size * GB)
            advice += f"; for {size} GB: {flags or 'no flag or pair of flags is enough'}"
    cards = []
    if fits_as_it_is:
        cards.append(f"{', '.join(fits_as_it_is)} GB")
    if fits_with_checkpointing:
        cards.append(f"{', '.join(fits_with_checkpointing)} GB, where auto turns checkpointing on")
    most = f"{max(rows['total']) / GB:.2f} GB at most"
    return "\n".join([*lines, f"{most}: fits {' and '.join(cards) or 'no card of these sizes'}{advice}"])


def _of_pictures(picture):
    """What is counted of them, where a model sees, as the lines of a report."""
    if picture.tokens:
        yield f"With one picture of {SIDE} x {SIDE} pixels in each pair: {picture.tokens:,} tokens"


def first_update(estimate, args, checkpointing, micro_batches, lengths):
    """The log line that compares the estimate with what a GPU needed until the first update was done."""
    passes = [indices for passes_of_rank in micro_batches for indices in passes_of_rank]
    tokens = max(sum(lengths[i] for i in indices) for indices in passes)
    measured = torch.cuda.max_memory_allocated()
    try:
        return compared(estimate.first_update(args, checkpointing, tokens), measured)
    except ValueError as error:  # memory_estimate.EstimateError
        return f"GPU memory of the first update: {measured / GB:.2f} GB measured; {error}"


def compared(predicted, measured):
    """A log line of two numbers of bytes."""
    numbers = f"{predicted / GB:.2f} GB predicted, {measured / GB:.2f} GB measured"
    return f"GPU memory of the first update: {numbers} ({round(100 * (measured / predicted - 1)):+d} %)"


def out_of_memory(estimate, args, phase, room):
    """What to say of a run whose memory ran out in a phase of its Stopwatch, on a device of `room` bytes."""
    mode = "on" if estimate.checkpointing(args, room) else "off"
    args = _with(args, {"gradient_checkpointing": mode})
    total = estimate.total(args)
    # A run that was to fit has others beside it, or is more than was estimated: clearly less, then.
    flags = lever(estimate, args, 0.9 * min(room, total))
    when = f"it ran out {PHASES[phase]}, and " if phase in PHASES else ""
    numbers = f"the run was estimated to take {total / GB:.2f} GB of {room / GB:.2f} GB"
    return f"{when}{numbers}; {f'try {flags}' if flags else 'no flag or pair of flags would be enough'}"


def lever(estimate, args, limit):
    """The flags of the cheapest lever, or pair of them, with which the run takes at most `limit` bytes, or None."""
    sharded = estimate.shards(getattr(args, "lora_r", None)) > 1
    alone = list(levers(args, sharded))
    for pulled in [(steps,) for steps in alone] + list(itertools.combinations(alone, 2)):
        strongest = [steps[-1] for steps in pulled]
        if estimate.total(_with(args, *strongest)) <= limit:
            mildest_first = itertools.product(*pulled)
            return _words(next(steps for steps in mildest_first if estimate.total(_with(args, *steps)) <= limit))
    return None


def levers(args, sharded):
    """What can be done for memory, the cheapest first: for each lever its steps {flag: value}, the mildest first."""
    pairs = args.batch_size * args.gradient_accumulation_steps
    if args.tokens_per_microbatch:
        sizes = _halves(args.tokens_per_microbatch, 2 * args.max_length)
        smaller_passes = [{"tokens_per_microbatch": size} for size in sizes]
    else:
        smaller_passes = [
            {"batch_size": size, "gradient_accumulation_steps": math.ceil(pairs / size)}
            for size in _halves(args.batch_size, 1)
        ]
    if smaller_passes:
        yield smaller_passes
    if args.gradient_checkpointing != "on":
        yield [{"gradient_checkpointing": "on"}]
    if getattr(args, "optimizer", "adamw") == "adamw" and not getattr(args, "optimizer_offload", False):
        # One or the other; bitsandbytes does not step on shards.
        yield [{"optimizer_offload": True}] if sharded else [{"optimizer": "adamw8bit"}, {"optimizer_offload": True}]
    if getattr(args, "lora_r", None) == 0:
        yield [{"lora_r": 16}]
    prompt, sizes = args.max_prompt_length, _halves(args.max_length, 64)
    if sizes:
        yield [{"max_length": size, "max_prompt_length": min(prompt, size // 2)} for size in sizes]


def _halves(number, least):
    """Half of a number, a quarter, ..., down to `least`."""
    return [number >> times for times in range(1, number.bit_length()) if number >> times >= least]


def _with(args, *steps):
    args = Namespace(**vars(args))
    for step in steps:
        vars(args).update(step)
    return args


def _words(steps):
    """Steps as they are typed; where two set one flag, the later."""
    flags = {name: value for step in steps for name, value in step.items()}
    words = [f"--{name.replace('_', '-')}" + ("" if value is True else f" {value}") for name, value in flags.items()]
    return " ".join(words)


# -- log lines of a run ----------------------------------------------------------------------------------------------


def memory_lines(world):
    """Memory of this process as log lines: of a GPU what tensors take, now and at most, and what torch holds for them;
    on a CPU the highest resident size.
    """
    if world.device.type == "cuda":
        return [
            f"GPU memory allocated: {torch.cuda.memory_allocated() / GB:.2f} GB",
            f"GPU memory allocated, highest so far: {torch.cuda.max_memory_allocated() / GB:.2f} GB",
            f"GPU memory reserved: {torch.cuda.memory_reserved() / GB:.2f} GB",
        ]
    if world.device.type == "mps":
        return [f"GPU memory allocated: {torch.mps.current_allocated_memory() / 1e9:.2f} GB"]
    try:
        import resource  # not on Windows
    except ImportError:
        return []
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)  # bytes
    return [f"CPU memory, highest so far: {peak / 1e9:.2f} GB"]


def start_lines(role, parameters, model, args, world):
    """What a run says before its first update: how much it trains, memory, and pairs per update.

    role: of the model, in words, or "".  A run without --lora-r trains a soft prompt, beside the model's parameters.
    """
    trainable, total = sum(p.numel() for p in parameters), sum(p.numel() for p in model.parameters())
    lora_r = getattr(args, "lora_r", None)
    if lora_r is None:
        method, total = f"{role}, the rest frozen", total + trainable
    elif lora_r:
        method = f"LoRA enabled for {role}" if role else "LoRA enabled"
    else:
        method = f"Full fine-tuning of {role}" if role else "Full fine-tuning"
    lines = [f"{method}: {trainable:,} trainable / {total:,} total parameters ({100 * trainable / total:.2f}%)"]
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
