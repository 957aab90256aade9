"""--compile: in training, the blocks of a model run through torch.compile, which makes few passes over memory of what
stands between products: norms, rotations, gates, residual sums.

Attention stays outside: where the pairs of a pass stand are numbers of Python, and each pass would be a new graph.
"""

from functools import partial

import torch
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface
from transformers.modeling_layers import GradientCheckpointingLayer

from lora_targets import text_decoder
from packed_attention import packed_attention

GRAPHS = 64  # kept of one function: with the adapter on and off, with gradients and without, of each kind of block


def compile_blocks(model, recomputes, draws):
    """Have its blocks compiled when training first runs them; returns what to say: that, or why it goes on without.

    recomputes: they are run again in backward (gradient checkpointing); draws: they draw random numbers, which have to
    be the same again.  Evaluation, sampling and the cache's passes run as they stand: they are too few.
    """
    blocks = [part for part in text_decoder(model).modules() if isinstance(part, GradientCheckpointingLayer)]
    if not blocks:
        return "--compile: this model has no blocks that transformers can run in another way: goes on without"
    if reason := missing_compiler(model.device):
        return f"--compile: torch finds no compiler here ({reason}): goes on without"
    AttentionInterface.register("packed_pairs", torch.compiler.disable(packed_attention))
    torch._dynamo.config.recompile_limit = GRAPHS
    torch._dynamo.config.suppress_errors = True  # what it cannot compile runs as it stands, with a warning

    @partial(torch.compile, dynamic=True)
    def run_compiled(block, args):
        return block(*args)

    # transformers' own way to have a block run by another function in training, which is made for checkpointing.
    def run_block(block, *args):
        if not recomputes:
            return run_compiled(block, args)
        # Trap: `checkpoint` itself keeps the compiler away from what it calls, in silence; what it wraps does not.
        return checkpoint.__wrapped__(run_compiled, block, args, use_reentrant=False, preserve_rng_state=draws)

    for block in blocks:
        block.gradient_checkpointing, block._gradient_checkpointing_func = True, run_block
    return f"--compile: {len(blocks)} blocks, in the first updates, which takes a minute or more"


def missing_compiler(device):
    """Why torch.compile does not work here, or None where it does: it is asked, as no list says it."""
    try:
        torch.compile(lambda x: x.sin() + 1, dynamic=True)(torch.ones(3, device=device))
    except Exception as error:  # of C++, of Triton, of a file system that runs nothing
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        reason = " ".join(lines[: 1 + lines[0].endswith(":")])  # behind "... raised:" stands what
        return reason.rstrip(".:")[:200]
    return None
