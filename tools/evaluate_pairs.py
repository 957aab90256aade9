"""The reward that a policy implies, beta * log pi(y|x) / base(y|x) (arXiv:2305.18290), on pairs with a known choice: it
judges an adapter without a reward model.
"""

import numpy as np
import torch

import lora
from formats.preference_rows import recognise
from formats.row_files import DataError, Malformed, parse_row, read_rows
from harness.flags import NonFinite
from packing import pack, passes
from preference_data import load_pairs
from tools import evaluate_numbers


def read_pairs(source, tokenizer, args, reader):
    """The pairs that the rows of a prompt file hold besides; [] where it holds prompts alone."""
    limits = args.max_prompt_length + args.max_new_tokens, args.max_prompt_length, args.num_samples
    try:
        where, row = next(iter(read_rows(source)))
        recognise(parse_row(row), where)
        return load_pairs(source, tokenizer, *limits, True, args.chat_template_strings, reader=reader)[0]
    except (DataError, Malformed):
        return []


@torch.no_grad()
def log_ratios(model, adapter, pairs, batch_size):
    """log pi/base of the responses of pairs, (chosen, rejected) (N, 2).  Raises NonFinite."""
    base_logps, logps = (torch.zeros(2, len(pairs), dtype=torch.float64) for _ in range(2))  # (chosen and rejected, N)
    for indices in passes(range(len(pairs)), batch_size):
        batch = pack([pairs[i] for i in indices], model.device)
        for name, by_side in ((None, base_logps), (adapter, logps)):
            with lora.use_adapter(model, name):
                by_side[:, indices] = torch.stack(model.packed_logps(batch)).cpu().double()
    if not (logps - base_logps).isfinite().all():
        raise NonFinite("a model gives numbers that are not finite: try --dtype fp32, or look for broken weights")
    return (logps - base_logps).T


def accuracy(ratios, seed):
    """{mean, low, high, prompts}: the share of pairs whose chosen response has the higher ratio; a tie is not."""
    right = (ratios[:, 0] > ratios[:, 1]).double().numpy()
    return evaluate_numbers.estimate(np.stack((right, np.ones(len(right))), axis=1), seed)
