"""The plan of an epoch, which every rank computes alike, and packing: pairs -> one row of tokens without padding.

    [prompt, chosen, rejected][prompt, chosen, rejected]...

Both responses of a pair share one copy of their prompt; packed_model.py sees to it that neither sees the other.

Legend: B pairs, T tokens of a packed row, N response tokens of a packed row.
"""

from dataclasses import dataclass, field
from itertools import chain
from typing import NamedTuple

import torch


def epoch_plan(indices, epoch, seed, batch_size, accumulation, ranks, lengths=None, budget=0):
    """The updates of one epoch over pairs `indices`: a list of (number of pairs, passes of each rank).

    One shuffle that every rank computes alike.  An update is batch_size * accumulation * ranks pairs, the last
    one what is left; rank r takes every ranks-th pair from r, in passes of batch_size pairs or, with a budget, of
    so many tokens at most.  Dividing each loss by the pairs of the whole update makes the gradient independent of the
    split, so that pairs may change places within their update: with a budget they go by length, longest first.
    All ranks have as many passes, if need be empty ones.
    """
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    order = [indices[place] for place in torch.randperm(len(indices), generator=generator).tolist()]
    updates = []
    for start in range(0, len(order), batch_size * accumulation * ranks):
        update = order[start : start + batch_size * accumulation * ranks]
        if budget:
            update.sort(key=lambda index: -lengths[index])  # so that every rank gets as many tokens
        updates.append((len(update), passes_of_ranks(update, ranks, batch_size, lengths, budget)))
    return updates


def rows_of_run(plan_epoch, num_updates, held_out):
    """The pairs that a run asks a frozen model about: of its updates and the held-out ones, sorted.

    plan_epoch(epoch): epoch_plan.  The first epoch has all that later ones have.
    """
    needed = set(held_out)
    for _, passes_of_each_rank in plan_epoch(epoch=0)[:num_updates]:
        for passes_of_one in passes_of_each_rank:
            needed.update(*passes_of_one)
    return sorted(needed)


def joined(helpful, harmless):
    """The pairs of both files, and the directions of their labels, [helpful, harmless] each: 1 as the pair stands, -1
    the other way, 0 none.  A pair that both files have, in either order, is one row with two labels.
    """
    pairs, labels = list(helpful), [[1, 0] for _ in helpful]
    places = {}  # (prompt, chosen, rejected) -> place of the pair
    for place, pair in enumerate(helpful):
        places.setdefault(((*pair[0], *digests(pair)), tuple(pair[1]), tuple(pair[2])), place)
    for pair in harmless:
        prompt, chosen, rejected = (*pair[0], *digests(pair)), tuple(pair[1]), tuple(pair[2])
        for key, direction in (((prompt, chosen, rejected), 1), ((prompt, rejected, chosen), -1)):
            if key in places and not labels[places[key]][1]:
                labels[places[key]][1] = direction
                break
        else:
            pairs.append(pair)
            labels.append([0, 1])
    return pairs, labels


def digests(pair):
    """Of its pictures: two prompts with other ones have the same ids."""
    pictures = getattr(pair, "pictures", None)
    return pictures.digests if pictures else ()


def passes(indices, batch_size, lengths=None, budget=0):
    """Split pairs into lists of batch_size; or, with a budget, of at most `budget` tokens, lengths[index] each: the
    longest first, each into the first list with room for it.  A pair beyond the budget gets a list of its own.
    """
    if not budget:
        return [list(indices[start : start + batch_size]) for start in range(0, len(indices), batch_size)]
    lists, room = [], []  # room: tokens that each list has left
    for index in sorted(indices, key=lambda index: -lengths[index]):
        place = next((place for place, left in enumerate(room) if lengths[index] <= left), None)
        if place is None:
            place = len(lists)
            lists.append([])
            room.append(budget)
        lists[place].append(index)
        room[place] -= lengths[index]
    return lists


def passes_of_ranks(indices, ranks, batch_size, lengths=None, budget=0):
    """The passes of each rank over its share of the pairs, every ranks-th; as many of them on each, if need be empty
    ones: where the weights are sharded, no rank goes through the model without the others.
    """
    of_ranks = [passes(indices[rank::ranks], batch_size, lengths, budget) for rank in range(ranks)]
    most = max(len(of_rank) for of_rank in of_ranks)
    for of_rank in of_ranks:
        of_rank += [[] for _ in range(most - len(of_rank))]
    return of_ranks


def passes_of_rank(indices, rank, ranks, batch_size, lengths=None, budget=0):
    """passes_of_ranks of one rank."""
    return passes_of_ranks(indices, ranks, batch_size, lengths, budget)[rank]


def largest_pass(ranks, batch_size, lengths, budget):
    """The most tokens that a pass can have, whatever the shuffle, on any number of ranks."""
    if not budget:
        return sum(sorted(lengths)[-batch_size:])
    return min(max([budget, *lengths]), sum(lengths))  # a pair beyond the budget has a pass of its own


def hold_out(pairs, num_samples, seed):
    """Split off at least `num_samples` pairs for evaluation, where there are so many: indices (train, held out).

    By whole prompts: none stands on both sides, and one always stays to train on.  The draw depends on the seed alone.
    """
    by_prompt = {}
    for index, pair in enumerate(pairs):
        by_prompt.setdefault((*pair.prompt_ids, *digests(pair)), []).append(index)
    groups, held = list(by_prompt.values()), set()
    for group in torch.randperm(len(groups), generator=torch.Generator().manual_seed(seed)).tolist()[1:]:
        if len(held) < num_samples:
            held.update(groups[group])
    return [index for index in range(len(pairs)) if index not in held], sorted(held)


class Segment(NamedTuple):
    """Where a pair stands in a packed row: first tokens, and one behind the last.

    prompt_start    chosen_start    rejected_start    end
    v               v               v                 v
    p0  p1  p2      c0  c1  c2      r0  r1            the next pair
    0   1   2       3   4   5       3   4             position: rejected ones restart at the end of the prompt
            c0, r0  c1  c2          r1                what the hidden state there predicts
    """

    prompt_start: int
    chosen_start: int
    rejected_start: int
    end: int


@dataclass(frozen=True)
class PackedPairs:
    """B pairs in one row of T tokens without padding; N response tokens, all chosen ones first, then all rejected."""

    input_ids: torch.Tensor  # (1, T)
    position_ids: torch.Tensor  # (1, T)
    segments: tuple  # the Segment of each pair
    predictors: torch.Tensor  # (N,)  where in T the hidden state is that predicts each response token
    ends: torch.Tensor  # (2B,)  where in T the last token of each chosen, then of each rejected response is
    targets: torch.Tensor  # (N,)  the response tokens
    response_lengths: torch.Tensor  # (2B,)  tokens of each chosen, then of each rejected response
    lengths: tuple  # the same numbers for Python
    pictures: tuple = ()  # where a pair has some: of each what the model takes beside its ids (vision.py), or None
    digests: tuple = ()  # sha256 of the files of each of these
    features: dict = field(default_factory=dict)  # what a tower has made of them, for further passes over this row


def pack(pairs, device="cpu"):
    """Pairs -> PackedPairs on `device`; of no pairs a row of three tokens from which nothing is asked."""
    of_files = tuple(map(digests, pairs))
    pairs, pictures = opened(pairs)
    input_ids, position_ids, segments = [], [], []
    of_chosen, of_rejected = [], []  # predictors
    for prompt, chosen, rejected, *_ in pairs or [([0], [0], [0])]:
        prompt_start = len(input_ids)
        chosen_start = prompt_start + len(prompt)
        rejected_start = chosen_start + len(chosen)
        end = rejected_start + len(rejected)
        segments.append(Segment(prompt_start, chosen_start, rejected_start, end))
        input_ids += [*prompt, *chosen, *rejected]
        position_ids += range(len(prompt) + len(chosen))
        position_ids += range(len(prompt), len(prompt) + len(rejected))
        # The last prompt token predicts the first token of both responses.
        of_chosen += range(chosen_start - 1, rejected_start - 1)
        of_rejected += [chosen_start - 1, *range(rejected_start, end - 1)]
    predictors = of_chosen + of_rejected
    responses = [pair[1] for pair in pairs] + [pair[2] for pair in pairs]
    targets = [token for response in responses for token in response]
    lengths = [len(response) for response in responses]
    ends = [segment.rejected_start - 1 for segment in segments] + [segment.end - 1 for segment in segments]
    if not pairs:
        predictors, ends = [], []

    columns = input_ids, position_ids, predictors, ends, targets, lengths
    numbers = send(torch.tensor(list(chain(*columns))), device)  # one copy for all
    input_ids, position_ids, *others = numbers.split([len(column) for column in columns])
    return PackedPairs(
        input_ids[None], position_ids[None], tuple(segments), *others, tuple(lengths), pictures, of_files
    )


def opened(pairs):
    """(pairs, what the model takes beside the ids of each), () where none has a picture."""
    if not any(getattr(pair, "pictures", None) for pair in pairs):
        return pairs, ()
    with_ids, beside = [], []
    for pair in pairs:
        ids, given = pair.pictures.open() if pair.pictures else (pair.prompt_ids, None)
        with_ids.append(pair._replace(prompt_ids=ids))
        beside.append(given)
    return with_ids, tuple(beside)


def send(tensor, device):
    """A CPU tensor to `device`; to a GPU from pinned memory, so that the host need not wait for the copy."""
    if torch.device(device).type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def of_pairs(facts, indices, device):
    """Of a NamedTuple of tensors (N,) on the CPU the rows of some pairs, (B,) each, on `device`: one copy for all."""
    return type(facts)(*send(torch.stack(facts)[:, indices], device))
