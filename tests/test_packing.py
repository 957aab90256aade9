"""A packed row written out by hand, and the plan of an epoch under every split into micro-batches and ranks."""

import itertools
import random

import pytest
import torch

from packing import epoch_plan, pack, passes

TWO_PAIRS = [([10, 11, 12], [20, 21], [30, 31, 32]), ([40], [50], [60, 61])]


def test_two_pairs_in_one_row_are_exactly_these_tensors():
    batch = pack(TWO_PAIRS)
    #   index                       0   1   2   3   4   5   6   7   8   9  10  11
    assert batch.input_ids.tolist() == [[10, 11, 12, 20, 21, 30, 31, 32, 40, 50, 60, 61]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 3, 4, 5, 0, 1, 1, 2]]
    assert batch.segments == ((0, 3, 5, 8), (8, 9, 10, 12))
    # Chosen of both pairs, then rejected of both; the first token of each response is predicted from the prompt's last.
    assert batch.targets.tolist() == [20, 21, 50, 30, 31, 32, 60, 61]
    assert batch.predictors.tolist() == [2, 3, 8, 2, 5, 6, 8, 10]
    assert batch.lengths == (2, 1, 3, 2)
    for tensor in (batch.input_ids, batch.position_ids, batch.targets, batch.predictors):
        assert tensor.dtype == torch.long


@pytest.mark.parametrize("pair", [([7], [8], [9]), ([1, 2, 3, 4, 5], [6], [6]), ([2], [3, 3, 3], [3])])
def test_every_predictor_stands_before_its_target_in_the_sequence_it_belongs_to(pair):
    prompt, chosen, rejected = pair
    batch = pack([pair])
    ids, positions = batch.input_ids[0], batch.position_ids[0]
    expected = [(len(prompt) + i - 1, token) for side in (chosen, rejected) for i, token in enumerate(side)]
    assert list(zip(positions[batch.predictors].tolist(), batch.targets.tolist())) == expected
    for side, inputs in zip((chosen, rejected), batch.predictors.split(batch.lengths)):
        assert ids[inputs].tolist() == [prompt[-1], *side[:-1]]  # what stands before each response token


def test_packing_leaves_the_callers_pairs_alone():
    prompt, chosen, rejected = [1, 2], [3], [4, 5]
    pack([(prompt, chosen, rejected), (prompt, chosen, rejected)])
    assert (prompt, chosen, rejected) == ([1, 2], [3], [4, 5])


def rows(plan):
    """The pairs of each update as a set, whoever computes them."""
    return [frozenset(pair for rank in ranks for micro in rank for pair in micro) for _, ranks in plan]


SPLITS = [split for split in itertools.product(range(1, 13), repeat=3) if split[0] * split[1] * split[2] == 12]


@pytest.mark.parametrize("num_pairs", [1, 11, 12, 13, 40])
def test_every_split_with_one_product_gives_the_same_updates_in_the_same_order(num_pairs):
    reference = rows(epoch_plan(range(num_pairs), 1, 42, 12, 1, 1))
    assert [len(update) for update in reference] == [12] * (num_pairs // 12) + [num_pairs % 12] * (num_pairs % 12 > 0)
    assert len(SPLITS) == 18
    for split in SPLITS:
        assert rows(epoch_plan(range(num_pairs), 1, 42, *split)) == reference, split


@pytest.mark.parametrize("split", [(1, 1, 1), (2, 3, 2), (4, 1, 3), (3, 2, 8), (5, 7, 1)])
@pytest.mark.parametrize("num_pairs", [1, 7, 35, 36, 37, 100])
def test_every_pair_comes_once_in_micro_batches_of_the_asked_size(num_pairs, split):
    batch_size, accumulation, world_size = split
    plan = epoch_plan(range(num_pairs), 0, 0, *split)
    seen = [pair for _, ranks in plan for rank in ranks for micro in rank for pair in micro]
    assert sorted(seen) == list(range(num_pairs))
    window = batch_size * accumulation * world_size
    for number, (count, ranks) in enumerate(plan):
        shares = [sum(map(len, rank)) for rank in ranks]
        assert len(ranks) == world_size and len({len(rank) for rank in ranks}) == 1, "in step"
        assert count == sum(shares) == min(window, num_pairs - number * window)  # only the last window is short
        assert max(shares) - min(shares) <= 1
        for rank in ranks:
            assert len(rank) <= accumulation
            filled = [micro for micro in rank if micro]
            assert rank[: len(filled)] == filled, "empty passes come last"
            assert all(len(micro) == batch_size for micro in filled[:-1])
            assert all(len(micro) <= batch_size for micro in filled)
        assert max(len([micro for micro in rank if micro]) for rank in ranks) == len(ranks[0]), "and no more of them"


def test_a_rank_without_pairs_in_the_last_window_has_an_empty_pass():
    count, ranks = epoch_plan(range(9), epoch=0, seed=3, batch_size=2, accumulation=1, ranks=4)[-1]
    assert count == 1
    assert [[len(micro) for micro in rank] for rank in ranks] == [[1], [0], [0], [0]]


def test_the_plan_depends_on_seed_and_epoch_and_on_nothing_else():
    split = dict(batch_size=2, accumulation=2, ranks=2)
    plans = {(seed, epoch): epoch_plan(range(50), epoch, seed, **split) for seed in range(4) for epoch in range(4)}
    for one, other in itertools.combinations(plans, 2):
        assert plans[one] != plans[other], f"{one} and {other} give one order"
    torch.manual_seed(99)  # the global generator has no part in it, and is not moved either
    before = torch.random.get_rng_state()
    assert epoch_plan(range(50), 2, 1, **split) == plans[1, 2]
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_plan_is_shuffled_and_not_the_files_order():
    order = [pair for update in epoch_plan(range(200), 0, 42, 1, 1, 1) for pair in update[1][0][0]]
    assert sorted(order) == list(range(200))
    # A random permutation keeps one element in place on average; twenty would be a shuffle in name only.
    assert sum(place == pair for place, pair in enumerate(order)) < 20


# -- a budget of tokens --------------------------------------------------------------------------------------------

LENGTHS = [7, 30, 12, 5, 90, 8, 8, 21, 40, 3, 11, 16, 60, 2, 9, 33, 14, 6, 25, 10, 19, 4, 50]


@pytest.mark.parametrize("budget", [1, 40, 64, 100, 10_000])
def test_passes_hold_every_pair_once_and_no_more_tokens_than_the_budget(budget):
    lists = passes(range(len(LENGTHS)), 2, LENGTHS, budget)
    assert sorted(itertools.chain.from_iterable(lists)) == list(range(len(LENGTHS)))
    for indices in lists:
        assert len(indices) == 1 or sum(LENGTHS[i] for i in indices) <= budget
    # First fit, longest first: two passes that are both at most half full would have been one.
    assert sum(sum(LENGTHS[i] for i in indices) <= budget // 2 for indices in lists) <= 1
    assert len(lists) <= {1: 23, 40: 14, 64: 9, 100: 6, 10_000: 1}[budget], "sum of lengths / budget, and a little"


def test_passes_by_hand():
    assert passes([0, 1, 2, 3, 4], 2) == [[0, 1], [2, 3], [4]]
    assert passes([4, 2, 0], 2, [5, 0, 4, 0, 3], 8) == [[0, 4], [2]]  # 5 + 3, then 4
    assert passes([0, 1], 2, [9, 9], 8) == [[0], [1]]  # longer than the budget: alone
    assert passes([], 2, [], 8) == []


@pytest.mark.parametrize("budget", [30, 100])
def test_a_budget_moves_no_pair_to_another_update(budget):
    for split in ((2, 3, 1), (3, 1, 2), (1, 2, 3)):
        plain = epoch_plan(range(23), 1, 42, *split)
        packed = epoch_plan(range(23), 1, 42, *split, lengths=LENGTHS, budget=budget)
        assert rows(packed) == rows(plain)
        for (count, ranks), (plain_count, plain_ranks) in zip(packed, plain, strict=True):
            assert count == plain_count
            assert [sum(map(len, rank)) for rank in ranks] == [sum(map(len, rank)) for rank in plain_ranks]
            for rank in ranks:
                assert all(len(row) == 1 or sum(LENGTHS[i] for i in row) <= budget for row in rank)


def test_a_budget_gives_every_rank_about_as_many_tokens():
    draw = random.Random(0)
    lengths = [draw.choice([10, 20, 400]) for _ in range(64)]
    tokens = {}
    for budget in (0, 500):
        ((_, ranks),) = epoch_plan(range(64), 0, 0, 16, 1, 4, lengths, budget)
        tokens[budget] = [sum(lengths[i] for row in rank for i in row) for rank in ranks]
    assert max(tokens[500]) - min(tokens[500]) <= 400  # dealt out by length: one pair apart at most
    assert max(tokens[0]) - min(tokens[0]) > 400, "or this data would not show it"


def test_the_plan_speaks_of_the_pairs_it_was_given():
    plan = epoch_plan([5, 17, 3], 0, 0, 1, 1, 1)
    assert sorted(row[0] for _, ranks in plan for row in ranks[0]) == [3, 5, 17]
