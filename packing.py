"""The plan of an epoch, which every rank computes alike, and packing: pairs -> one row of tokens without padding.

    [prompt, chosen, rejected][prompt, chosen, rejected]...

Both responses of a pair share one copy of their prompt; packed_model.py sees to it that neither sees the other.

Legend: B pairs, T tokens of a packed row, N response tokens of a packed row.
"""

from dataclasses import dataclass

import torch


def epoch_plan(num_pairs, epoch, seed, batch_size, accumulation, world_size):
    """The updates of one epoch: a list of (pairs in the update, micro-batches of each rank).

    One shuffle that every rank computes alike.  An update is batch_size * accumulation * world_size pairs, the last
    one what is left; rank r takes every world_size-th pair from r, in micro-batches of batch_size, the last short or
    none at all.  Dividing each loss by the pairs of the whole update makes the gradient independent of the split.
    """
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    order = torch.randperm(num_pairs, generator=generator).tolist()
    updates = []
    for update in _chunks(order, batch_size * accumulation * world_size):
        updates.append((len(update), [_chunks(update[rank::world_size], batch_size) for rank in range(world_size)]))
    return updates


def _chunks(items, size):
    return [items[start : start + size] for start in range(0, len(items), size)]


@dataclass(frozen=True)
class PackedPairs:
    """B pairs in one row of T tokens without padding; N response tokens, all chosen ones first, then all rejected."""

    input_ids: torch.Tensor  # (1, T)
    position_ids: torch.Tensor  # (1, T)  rejected positions restart at the end of the prompt
    segments: tuple  # per pair (prompt start, chosen start, rejected start, end) in T
    predictors: torch.Tensor  # (N,)  where in T the hidden state is that predicts each response token
    targets: torch.Tensor  # (N,)  the response tokens
    lengths: tuple  # response tokens of each chosen, then of each rejected response: 2B numbers, N in sum


def pack(pairs, device="cpu"):
    """Pairs -> PackedPairs on `device`."""
    input_ids, position_ids, segments = [], [], []
    predictors, targets = ([], []), ([], [])  # of chosen, of rejected
    for prompt, chosen, rejected in pairs:
        start = len(input_ids)
        split, again = start + len(prompt), start + len(prompt) + len(chosen)
        input_ids += prompt + chosen + rejected
        position_ids += [*range(len(prompt) + len(chosen)), *range(len(prompt), len(prompt) + len(rejected))]
        segments.append((start, split, again, len(input_ids)))
        # The last prompt token predicts the first token of both responses.
        predictors[0].extend(range(split - 1, again - 1))
        predictors[1].extend([split - 1, *range(again, len(input_ids) - 1)])
        targets[0].extend(chosen)
        targets[1].extend(rejected)

    def tensor(values):
        return torch.tensor(values, dtype=torch.long, device=device)

    return PackedPairs(
        input_ids=tensor([input_ids]),
        position_ids=tensor([position_ids]),
        segments=tuple(segments),
        predictors=tensor(predictors[0] + predictors[1]),
        targets=tensor(targets[0] + targets[1]),
        lengths=tuple(len(response) for side in (1, 2) for response in (pair[side] for pair in pairs)),
    )
