"""Where the time of a run goes, and how much of it is useful work.

Useful floating-point operations of a preference pair, for one forward and one backward:

    4 * weights of the blocks * tokens (the prompt counted once)  +  4 * weights of the head * response tokens

2 each for the forward and for the gradient of the inputs; 6 in place of 4 where the weights are trained too.  Padding,
recomputed activations, the reference and LoRA's own matrices are not counted: they are the price, not the work.
A picture counts as the tokens that it has in the prompt; what its frozen tower computes, once for all epochs, does not.
"""

import re
import time
from itertools import pairwise
from typing import NamedTuple

import torch

from lora_targets import text_decoder

TRAINING = "forward", "backward", "communicate", "step"  # the phases that rate() divides by


class Work(NamedTuple):
    pairs: int
    flops: int
    seconds: float  # of training


class Stopwatch:
    """Seconds per phase; each phase lasts until the next one begins.

    On a GPU, where the host runs ahead of the device, phases end at CUDA events that are read only when asked for.
    """

    def __init__(self, device, phase):
        self.cuda = device.type == "cuda"
        self.seconds, self.marks = {}, []
        self.pairs = self.flops = 0  # so far
        self.reported = Work(0, 0, 0.0)  # at the last rate()
        self.phase(phase)

    def phase(self, name):
        """Begin a phase."""
        mark = torch.cuda.Event(enable_timing=True) if self.cuda else time.perf_counter()
        if self.cuda:
            mark.record()
        self.marks.append((name, mark))

    def read(self):
        """{phase: seconds until now}, in the order of their first beginning."""
        self.phase(self.marks[-1][0])
        if self.cuda:
            torch.cuda.synchronize()
        for (name, begin), (_, end) in pairwise(self.marks):
            took = begin.elapsed_time(end) / 1000 if self.cuda else end - begin
            self.seconds[name] = self.seconds.get(name, 0.0) + took
        self.marks = self.marks[-1:]
        return dict(self.seconds)

    def work(self, pairs, flops):
        """Count what an update did."""
        self.pairs += pairs
        self.flops += flops

    def rate(self):
        """Pairs and useful operations per second of training since the last call, as text."""
        seconds = self.read()
        now, before = Work(self.pairs, self.flops, sum(seconds.get(phase, 0.0) for phase in TRAINING)), self.reported
        self.reported = now
        took = now.seconds - before.seconds
        pairs, flops = (now.pairs - before.pairs) / took, (now.flops - before.flops) / took
        return f"pairs/s={pairs:.2f} TFLOP/s={flops / 1e12:.3g}"


def useful_flops(model, pairs):
    """Useful floating-point operations of each (prompt, chosen, rejected, ...), see above.

    A reward model has no language-model head, and its own is one row.
    """
    blocks = [
        weight
        for name, weight in text_decoder(model).named_parameters(prefix="decoder")
        if weight.ndim == 2 and re.search(r"\.\d+\.", name) and ".lora_" not in name
    ]
    per_weight = 6 if any(weight.requires_grad for weight in blocks) else 4
    in_blocks, head = sum(weight.numel() for weight in blocks), model.get_output_embeddings()
    in_head = 0 if head is None else head.weight.numel()
    return [
        per_weight * (in_blocks * (len(prompt) + len(chosen) + len(rejected)) + in_head * (len(chosen) + len(rejected)))
        for prompt, chosen, rejected, *_ in pairs
    ]
