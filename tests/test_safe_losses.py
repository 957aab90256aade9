"""Safe-MM-DPO piece by piece: the dynamic beta, the joint losses, the multiplier, E[cost], the rows of two files, and
the loss of an update against pairs scored one by one."""

import argparse
import itertools
import json
import math
import random

import pytest
import torch
from tiny_models import random_pairs, tiny_model

from expected_cost import LEAST_SAMPLES, WINDOW, empty_window, importance_weighted, shuffled, slide
from losses import Multiplier, dpo_loss, dynamic_beta, joint_loss, soft_label_loss
from packed_model import prepare_model
from packing import joined, pack
from train_safe_mm_dpo import METRICS, PairFacts, Terms, pair_losses, update_loss

MODES = "additive", "margin", "soft"


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


def sigmoid(x):
    return 1 / (1 + math.exp(-x)) if x > 0 else math.exp(x) / (1 + math.exp(x))


def logsigmoid(x):
    return min(x, 0) - math.log1p(math.exp(-abs(x)))


# -- dynamic beta ---------------------------------------------------------------------------------------------------


def test_dynamic_beta_has_the_closed_form_and_its_two_limits():
    margins = double(-1e4, -3, 0, 2, 1e4)
    # d = 2, w = 0.5, k = 0.5: 0.1 * (1 + 0.5 * (1 - e^-1)) = 0.1 * (1 + 0.5 * 0.6321205588285577)
    expected = [0.1, 0.1, 0.1, 0.13160602794142788, 0.15]
    assert dynamic_beta(margins, 0.1, 0.5, 0.5).tolist() == pytest.approx(expected, abs=1e-15)
    # w and k have different parts: w = 2, k = 0.25 and d = 2 make 0.3 * (1 + 2 * (1 - e^-0.5)).
    assert dynamic_beta(double(2), 0.3, 2.0, 0.25).item() == pytest.approx(0.5360816041724199, abs=1e-15)


def test_dynamic_beta_rises_with_the_margin_and_stays_within_its_range():
    margins = torch.linspace(-20, 20, 401, dtype=torch.float64)
    betas = dynamic_beta(margins, 0.1, 0.7, 0.9)
    assert torch.equal(betas[margins <= 0], torch.full_like(betas[margins <= 0], 0.1))
    assert (betas[margins >= 0].diff() > 0).all()
    assert betas.min() == 0.1 and betas.max() < 0.17
    assert betas.max() == pytest.approx(0.17, abs=1e-7)  # 0.7 e^-18 below the limit


@pytest.mark.parametrize("off", [dict(w=0.0, k=0.5), dict(w=0.5, k=0.0)], ids=["w", "k"])
def test_without_w_or_without_k_beta_is_itself_to_the_last_bit(off):
    """Far out too: exp(500) of a margin that is not clamped is infinite in fp32, and 0 * inf no number."""
    margins = torch.tensor([-1e4, -1000.0, -180.0, -0.3, 0.0, 0.7, 180.0, 1e4])
    for dtype, beta in itertools.product((torch.float32, torch.float64), (0.1, 0.37, 1.0)):
        betas = dynamic_beta(margins.to(dtype), beta, **off)
        assert betas.dtype == dtype
        assert torch.equal(betas, torch.full_like(betas, beta))


def test_dynamic_beta_carries_no_gradient():
    margins = double(1.0, 2.0).requires_grad_()
    assert not dynamic_beta(margins, 0.1, 0.5, 0.5).requires_grad


def test_a_margin_that_is_nan_is_an_error():
    with pytest.raises(ValueError, match="a reward margin is NaN"):
        dynamic_beta(double(0.5, math.nan, 2), 0.1, 0.5, 0.5)


def test_a_larger_beta_pulls_harder_only_while_beta_h_is_below_1_278():
    """What dynamic_beta's description says: the pull beta sigmoid(-beta h) is largest at beta h = 1 + exp(-beta h)."""

    def pull(beta_h, h=2.0):
        logps = [double(value).requires_grad_() for value in (h, 0, 0, 0)]
        dpo_loss(*logps, beta=beta_h / h)[0].sum().backward()
        return -logps[0].grad.item()

    assert pull(1.20) < pull(1.278) > pull(1.36)
    assert pull(0.5) < pull(0.6) and pull(3.0) > pull(3.1)


# -- soft labels and the joint loss -----------------------------------------------------------------------------------


@pytest.mark.parametrize("probability", [0.03, 0.3, 0.5, 0.9])
def test_soft_label_loss_is_least_at_the_log_odds_and_there_the_entropy(probability):
    z = double(math.log(probability / (1 - probability))).requires_grad_()
    loss = soft_label_loss(z, double(probability))
    loss.sum().backward()
    assert z.grad.item() == pytest.approx(0, abs=1e-15)
    entropy = -probability * math.log(probability) - (1 - probability) * math.log(1 - probability)
    assert loss.item() == pytest.approx(entropy, abs=1e-15)
    for step in (-0.1, 0.1):
        assert soft_label_loss(z.detach() + step, double(probability)).item() > entropy


def test_a_sure_label_is_the_dpo_loss_of_that_direction_to_the_last_bit():
    z = torch.cat((torch.linspace(-30, 30, 61), torch.tensor([-1e4, 1e4])))
    zero = torch.zeros_like(z)
    assert torch.equal(soft_label_loss(z, zero + 1), dpo_loss(z, zero, zero, zero, 1.0)[0])
    assert torch.equal(soft_label_loss(z, zero), dpo_loss(zero, z, zero, zero, 1.0)[0])


@pytest.mark.parametrize("z", [-1e4, 1e4])
@pytest.mark.parametrize("probability", [0.0, 0.3, 1.0])
def test_soft_label_loss_and_its_gradient_are_right_in_fp32_at_ten_thousand_nats(z, probability):
    value = torch.tensor([z], requires_grad=True)
    loss = soft_label_loss(value, torch.tensor([probability]))
    loss.sum().backward()
    assert loss.item() == pytest.approx(1e4 * (1 - probability if z > 0 else probability), rel=1e-5)
    assert value.grad.item() == pytest.approx((z > 0) - probability, rel=1e-5)


def joint(combine, h, beta, helpful_margin, harmless_margin, helpful_label, multiplier):
    tensors = (double(value) for value in (h, beta, helpful_margin, harmless_margin, helpful_label))
    return joint_loss(combine, *tensors, multiplier).item()


@pytest.mark.parametrize(
    ("combine", "helpful_label", "expected"),
    # beta 0.5, h 3, dr log 3, ds 0.25, lambda 2.
    # margin: beta h - lambda ds = 1.5 - 0.5 = 1; -logsigmoid(1) = 0.3132616875182228, of -1 it is one more.
    # soft: sigmoid(log 3 + 0.5) = 3 / (3 + e^-0.5) = 0.8318224328884..., at z = 1.5: log(1 + e^-1.5) + (1 - p) 1.5.
    [
        ("margin", 1, 0.3132616875182228),
        ("margin", -1, 1.3132616875182228),
        ("margin", 0, 0.5632616875182228),  # sigmoid(log 3) = 0.75 for the label: 0.75 of the first, 0.25 of the second
        ("soft", 1, 0.2014132779827524 + 1.5 * math.exp(-0.5) / (3 + math.exp(-0.5))),
        ("soft", 0, 0.2014132779827524 + 1.5 * math.exp(-0.5) / (3 + math.exp(-0.5))),  # soft asks for no label
        ("additive", 1, 0.0),  # two terms of its own
    ],
)
def test_joint_loss_of_one_pair_worked_out_by_hand(combine, helpful_label, expected):
    assert joint(combine, 3, 0.5, math.log(3), 0.25, helpful_label, 2.0) == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("combine", ["margin", "soft"])
@pytest.mark.parametrize("helpful_label", [-1, 0, 1])
def test_a_pair_the_other_way_round_with_its_label_turned_is_the_same_pair(combine, helpful_label):
    one = joint(combine, 1.3, 0.4, -0.6, 0.9, helpful_label, 1.7)
    assert joint(combine, -1.3, 0.4, 0.6, -0.9, -helpful_label, 1.7) == pytest.approx(one, abs=1e-15)


@pytest.mark.parametrize("combine", ["margin", "soft"])
@pytest.mark.parametrize("multiplier", [0.0, 0.5, 4.0])
@pytest.mark.parametrize("harmless_margin", [-1.5, 0.8])
def test_joint_loss_is_least_where_beta_h_is_dr_plus_lambda_ds(combine, multiplier, harmless_margin):
    """A larger lambda moves the policy towards the response the harmless model prefers, in proportion.

    Once where the helpful model's word stands for the label, and once in expectation over labels that it draws.
    """
    beta, dr = 0.4, 0.7
    best = (dr + multiplier * harmless_margin) / beta
    sure = sigmoid(dr)
    for weights in ({0: 1.0}, {1: sure, -1: 1 - sure}):
        h = double(best).requires_grad_()
        arguments = double(beta), double(dr), double(harmless_margin)
        losses = [p * joint_loss(combine, h, *arguments, double(label), multiplier) for label, p in weights.items()]
        sum(losses).sum().backward()
        assert h.grad.item() == pytest.approx(0, abs=1e-15)
        for step in (-0.2, 0.2):
            beside = (
                p * joint(combine, best + step, beta, dr, harmless_margin, x, multiplier) for x, p in weights.items()
            )
            assert sum(beside) > sum(losses).item()


@pytest.mark.parametrize("combine", ["margin", "soft"])
def test_raising_lambda_pulls_towards_the_safer_response(combine):
    """The sign by itself: from any policy, the pull along h grows where chosen is the safer one, else it shrinks."""
    for safer, h, label in itertools.product((1.0, -1.0), (-4.0, 0.0, 4.0), (0, 1)):
        pulls = []
        for multiplier in (0.5, 1.0, 2.0):
            margin = double(h).requires_grad_()
            joint_loss(combine, margin, 0.5, double(0.3), double(safer), double(label), multiplier).sum().backward()
            pulls.append(-margin.grad.item())
        steps = [safer * (after - before) for before, after in itertools.pairwise(pulls)]
        assert min(steps) > 1e-3


# -- the multiplier ---------------------------------------------------------------------------------------------------


def multiplier(initial=1.0, rate=0.1, least=1e-6, most=10.0, decay=0.0):
    """Without a moving average, unless asked for."""
    return Multiplier(initial, rate, least, most, decay)


def test_a_step_of_log_lambda_is_rate_times_lambda_times_the_violation():
    for initial, rate, violation in itertools.product((0.3, 2.0), (0.01, 0.2), (-1.5, 0.4)):
        it = multiplier(initial, rate)
        it.update(violation)
        assert math.log(it.value) == pytest.approx(math.log(initial) + rate * initial * violation, abs=1e-15)
        assert (it.value > initial) == (violation > 0)  # it grows while the policy costs more than it may


def test_the_constraint_met_exactly_leaves_lambda_where_it_is():
    it = multiplier(0.7)
    before = it.value
    for _ in range(20):
        it.update(0.0)
    assert it.value == before == pytest.approx(0.7, abs=1e-15)


def test_rate_zero_fixes_lambda_and_still_follows_the_violation():
    it = multiplier(0.7, rate=0.0)
    before = it.value
    for violation in (3.0, -2.0, 5.0):
        it.update(violation)
    assert it.value == before and it.violation == 5.0


def test_lambda_zero_stays_zero_and_goes_through_a_checkpoint():
    it = multiplier(0.0)
    for violation in (3.0, -2.0, 0.0, 50.0):
        it.update(violation)
        assert it.value == 0.0  # and no 0 * inf
    again = multiplier(1.0)
    again.load(json.loads(json.dumps(it.state(), allow_nan=False)))  # JSON knows no -Infinity
    again.update(7.0)
    assert again.value == 0.0


def updates_to_leave_the_cap(update, value, cap):
    for count in range(1, 1000):
        update(-1.0)
        if value() < 0.99 * cap:
            return count


def test_lambda_leaves_its_cap_in_one_update_where_a_clamp_on_the_value_alone_takes_seventy():
    """At the cap a step is rate * lambda * J = 0.01 * 10 * 1 = 0.1 of log lambda: 70 steps wind the log up by 7."""
    cap, rate = 10.0, 0.01
    ours = multiplier(1.0, rate, most=cap)
    naive = {"log": 0.0}

    def clamped_value():
        return min(math.exp(naive["log"]), cap)

    def naive_update(violation):
        naive["log"] += rate * clamped_value() * violation

    def at_cap_for_seventy_updates(update, value):
        while value() < cap * (1 - 1e-9):
            update(1.0)
        for _ in range(70):
            update(1.0)

    at_cap_for_seventy_updates(ours.update, lambda: ours.value)
    at_cap_for_seventy_updates(naive_update, clamped_value)
    assert ours.value == pytest.approx(cap, rel=1e-12)
    assert updates_to_leave_the_cap(ours.update, lambda: ours.value, cap) == 1
    assert 70 <= updates_to_leave_the_cap(naive_update, clamped_value, cap) <= 72
    # One step down from the cap is a whole one.
    once = multiplier(cap, rate, most=cap)
    once.update(-1.0)
    assert math.log(once.value) == pytest.approx(math.log(cap) - 0.1, abs=1e-12)


def test_with_the_moving_average_lambda_leaves_its_cap_with_the_first_negative_average():
    it = multiplier(1.0, 0.05, decay=0.95)
    for _ in range(300):
        it.update(1.0)
    assert it.value == pytest.approx(10)
    while it.violation >= 0:
        assert it.value == pytest.approx(10)
        it.update(-1.0)
    assert it.value < 9.999


def test_the_floor_holds_and_is_left_in_one_update():
    # lambda itself is a factor of the step: at 0.01 a violation of 100 moves log lambda by 0.2 * 0.01 * 100 = 0.2.
    it = multiplier(1.0, 0.2, least=0.01)
    for _ in range(50):
        it.update(-100.0)
    assert it.value == pytest.approx(0.01, rel=1e-12)
    it.update(100.0)
    assert math.log(it.value) == pytest.approx(math.log(0.01) + 0.2, abs=1e-12)


def test_the_average_is_adams_with_the_weight_of_the_first_steps_corrected():
    chance = random.Random(0)
    it, moment, log = multiplier(1.3, 0.05, decay=0.95), 0.0, math.log(1.3)
    assert it.violation == 0.0  # before the first
    for step in range(1, 200):
        violation = chance.gauss(0.1, 2)
        moment = 0.95 * moment + 0.05 * violation
        corrected = moment / (1 - 0.95**step)
        log += 0.05 * math.exp(log) * corrected
        it.update(violation)
        assert it.violation == pytest.approx(corrected, rel=1e-10, abs=1e-12)
        assert math.log(it.value) == pytest.approx(log, abs=1e-10)
    assert Multiplier(1.0, 0.1, 1e-6, 10.0).decay == 0.95  # the documented one


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_violation_that_is_not_finite_is_left_out_and_counted(bad):
    broken, whole = multiplier(decay=0.95), multiplier(decay=0.95)
    for step, violation in enumerate((0.5, -0.2, 1.5, 0.1)):
        broken.update(bad)
        broken.update(violation)
        whole.update(violation)
        assert (broken.value, broken.violation) == (whole.value, whole.violation)
        assert (broken.skipped, whole.skipped) == (step + 1, 0)
        assert broken.state() | {"skipped": 0} == whole.state()


def test_a_resumed_multiplier_goes_on_to_the_last_bit():
    chance = random.Random(1)
    one = multiplier(1.0, 0.07, most=3.0, decay=0.95)
    for _ in range(37):
        one.update(chance.gauss(0.8, 2))
    one.update(math.nan)
    two = multiplier(0.2, 0.07, most=3.0, decay=0.95)
    two.load(json.loads(json.dumps(one.state(), allow_nan=False)))
    assert (two.skipped, two.at_cap) == (one.skipped, one.at_cap) == (1, one.at_cap)
    for _ in range(60):
        assert two.state() == one.state() and two.value == one.value
        violation = chance.gauss(0.8, 2)
        one.update(violation)
        two.update(violation)


def test_at_cap_counts_the_updates_in_a_row_and_goes_into_the_checkpoint():
    it = multiplier(9.0, 0.1, most=10.0)
    assert it.at_cap == 0
    for count in range(1, 6):
        it.update(1.0)
        assert it.at_cap == count
    again = multiplier(1.0, 0.1, most=10.0)
    again.load(it.state())
    it.update(-0.01)
    assert it.at_cap == 0
    again.update(1.0)
    assert again.at_cap == 6


# -- E[cost] ----------------------------------------------------------------------------------------------------------


def windows_of(log_ratios, costs, ranks=1):
    """(ranks, 2, N / ranks)."""
    return torch.stack((torch.as_tensor(log_ratios), torch.as_tensor(costs))).view(2, ranks, -1).transpose(0, 1)


def responses(count, spread=1.0, seed=0):
    chance = random.Random(seed)
    return [chance.gauss(0, spread) for _ in range(count)], [chance.gauss(0.3, 1) for _ in range(count)]


def test_importance_weights_give_the_weighted_mean_and_the_effective_size():
    """Of the fp32 numbers that a window holds, summed in fp64."""
    windows = windows_of(*map(torch.tensor, responses(200)))
    log_ratios, costs = windows[0].tolist()
    weights = [math.exp(x) for x in log_ratios]
    cost = sum(w * c for w, c in zip(weights, costs)) / sum(weights)
    size = sum(weights) ** 2 / sum(w * w for w in weights)
    assert LEAST_SAMPLES < size < 150  # neither all alike nor a few
    assert windows.dtype == torch.float32
    assert importance_weighted(windows) == pytest.approx((cost, size), rel=1e-12)


def test_equal_weights_are_the_mean_and_all_samples():
    costs = double(*responses(64)[1])
    for level in (0.0, -300.0, 250.0):
        estimate = importance_weighted(windows_of(torch.full_like(costs, level), costs))
        assert estimate == pytest.approx((costs.mean().item(), 64.0), rel=1e-12)


@pytest.mark.parametrize("shift", [-1e4, 1e4])
def test_a_factor_common_to_all_weights_changes_nothing(shift):
    """exp(1e4) is no number even in fp64; the shift is a power of two's multiple, so fp64 keeps every digit of it."""
    log_ratios, costs = responses(200)
    log_ratios = (double(*log_ratios) * 2**30).round() / 2**30
    expected = importance_weighted(windows_of(log_ratios, double(*costs)))
    shifted = importance_weighted(windows_of(log_ratios + shift, double(*costs)))
    assert shifted == pytest.approx(expected, rel=1e-12) and math.isfinite(shifted[0])


def test_below_32_effective_samples_there_is_no_estimate():
    costs = torch.ones(100, dtype=torch.float64)

    def of(count):  # so many of equal weight, the others without any
        return importance_weighted(windows_of(double(*[0.0] * count, *[-1e3] * (100 - count)), costs))

    assert of(32) == (1.0, 32.0)
    cost, size = of(31)
    assert math.isnan(cost) and size == 31
    # One response that the policy now finds e^20 times likelier than the reference did is worth one sample.
    cost, size = importance_weighted(windows_of(double(20.0, *[0.0] * 99), costs))
    assert math.isnan(cost) and size == pytest.approx(1, abs=1e-4)


def test_an_empty_window_has_no_samples_and_no_estimate():
    cost, size = importance_weighted(torch.stack([empty_window(4, "cpu")] * 4))
    assert math.isnan(cost) and size == 0
    assert empty_window(4, "cpu").shape == (2, WINDOW // 4)


def test_a_broken_number_gives_no_estimate():
    log_ratios, costs = (double(*values) for values in responses(100))
    for broken in (log_ratios, costs):
        kept = broken[3].item()
        broken[3] = math.nan
        assert math.isnan(importance_weighted(windows_of(log_ratios, costs))[0])
        broken[3] = kept


def test_the_window_fills_slides_and_forgets():
    window = empty_window(1, "cpu")
    first = torch.zeros(40), torch.full((40,), 5.0)
    window = slide(window, *first)
    assert window.shape == (2, WINDOW)
    assert importance_weighted(window[None]) == pytest.approx((5.0, 40.0))  # the empty places weigh nothing
    window = slide(window, torch.zeros(0), torch.zeros(0))  # a pass without such rows
    for start in range(40, 40 + WINDOW, 64):
        window = slide(window, torch.arange(start, start + 64) / 1e3, torch.full((64,), -1.0))
    # The latest 512 responses, the oldest first; nothing of the first forty is left.
    assert torch.equal(window[0], torch.arange(40, 40 + WINDOW) / 1e3)
    assert torch.equal(window[1], torch.full((WINDOW,), -1.0))
    # More at once than it holds: the last ones.
    assert torch.equal(slide(window, torch.arange(600.0), torch.arange(600.0))[1], torch.arange(600.0)[-WINDOW:])


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_windows_of_several_ranks_are_one(ranks):
    log_ratios, costs = (double(*values) for values in responses(WINDOW))
    log_ratios += torch.arange(WINDOW) / 200  # so that the ranks weigh differently, and a mean of their means is wrong
    expected = importance_weighted(windows_of(log_ratios, costs))
    assert importance_weighted(windows_of(log_ratios, costs, ranks)) == pytest.approx(expected, rel=1e-12)


def test_the_order_of_prompts_follows_from_its_seed():
    prompts = [[number] for number in range(40)]
    orders = [shuffled(prompts, seed) for seed in (3, 3, 4, 2**64 + 3)]
    assert orders[0] == orders[1] != orders[2]
    assert orders[3] == orders[0]  # a seed beyond what torch takes is one that it takes
    assert sorted(orders[0]) == prompts  # no prompt twice
    # Every prompt comes first: not only the first ones of the file.
    assert {prompt[0] for seed in range(400) for prompt in shuffled(prompts, seed)[:1]} == set(range(40))


# -- the rows of two files --------------------------------------------------------------------------------------------


def test_a_pair_that_both_files_have_is_one_row_with_two_labels():
    pairs = random_pairs([(3, 2, 4)] * 6)
    helpful, harmless = pairs[:4], [pairs[5], pairs[1], (pairs[3][0], pairs[3][2], pairs[3][1]), pairs[4]]
    rows, labels = joined(helpful, harmless)
    assert rows == [*pairs[:4], pairs[5], pairs[4]]  # the helpful ones as they stand, the other ones behind them
    assert labels == [[1, 0], [1, 1], [1, 0], [1, -1], [0, 1], [0, 1]]


def test_the_same_responses_to_another_prompt_are_another_pair():
    prompt, other, chosen, rejected = [10], [11], [20], [30]
    rows, labels = joined([(prompt, chosen, rejected)], [(other, chosen, rejected), (other, rejected, chosen)])
    assert rows == [(prompt, chosen, rejected), (other, chosen, rejected), (other, rejected, chosen)]
    assert labels == [[1, 0], [0, 1], [0, 1]]


def test_a_token_at_the_seam_of_prompt_and_response_makes_two_pairs_different():
    one, two = ([10, 20], [30], [40]), ([10], [20, 30], [20, 40])  # the same tokens in a row
    assert joined([one], [two])[1] == [[1, 0], [0, 1]]


def test_duplicates_within_a_file_stay_and_no_label_is_lost():
    pair = ([10], [20], [30])
    turned = pair[0], pair[2], pair[1]
    assert joined([pair, pair], []) == ([pair, pair], [[1, 0]] * 2)
    assert joined([], [pair, pair]) == ([pair, pair], [[0, 1]] * 2)
    for again, helpful_first in itertools.product((pair, turned), ([pair], [pair, pair], [pair, turned])):
        harmless = [pair, again, pair]
        rows, labels = joined(helpful_first, harmless)
        assert [sum(map(abs, side)) for side in zip(*labels)] == [len(helpful_first), len(harmless)]
        # Whichever row took a label: the direction is that of the file.
        wins = sum(label[1] * (1 if row == pair else -1) for row, label in zip(rows, labels))
        assert wins == sum(1 if row == pair else -1 for row in harmless)


def test_joining_leaves_the_lists_of_the_caller_alone():
    helpful, harmless = [([1], [2], [3])], [([4], [5], [6])]
    joined(helpful, harmless)
    assert len(helpful) == len(harmless) == 1


# -- the loss of an update --------------------------------------------------------------------------------------------


def update_args(combine="additive", kl_coeff=0.0, beta=0.3, nll_coeff=0.0):
    return argparse.Namespace(combine=combine, kl_coeff=kl_coeff, beta=beta, nll_coeff=nll_coeff)


COUNTED = {"helpful_rows": 3, "harmless_rows": 5, "tokens": 8, "pairs": 7}
SUMS = 6.0, 10.0, 21.0, 4.0  # loss_H, loss_S, joint, KL


@pytest.mark.parametrize(
    ("args", "lambda_", "sums", "counts", "expected"),
    [
        (update_args(), 3.0, SUMS, {}, 2.0),  # (6/3 + 3 * 10/5) / (1 + 3)
        (update_args(), 0.5, SUMS, {}, 2.0),  # (2 + 0.5 * 2) / 1.5: equal terms are independent of lambda
        (update_args(), 1.0, (12.0, 10.0, 21.0, 4.0), {}, 3.0),  # (4 + 2) / 2
        (update_args(), 0.0, SUMS, {}, 2.0),
        (
            update_args(),
            3.0,
            (6.0, 0.0, 21.0, 4.0),
            {"harmless_rows": 0},
            0.5,
        ),  # without harmless rows the other term keeps its part
        (update_args(), 3.0, (0.0, 10.0, 21.0, 4.0), {"helpful_rows": 0}, 1.5),
        (update_args(kl_coeff=0.1), 3.0, SUMS, {}, 2.05),  # + 0.1 * 4/8, which lambda does not divide
        (update_args("margin"), 3.0, SUMS, {}, 3.0),  # 21/7
        (update_args("soft"), 3.0, SUMS, {}, 3.0),
        (update_args("soft", kl_coeff=0.5), 3.0, SUMS, {}, 3.25),
    ],
)
def test_loss_of_an_update_worked_out_by_hand(args, lambda_, sums, counts, expected):
    loss = update_loss(Terms(*double(*sums)), lambda_, COUNTED | counts, args)
    assert loss.item() == pytest.approx(expected, abs=1e-14)


def test_without_harmless_rows_and_lambda_zero_it_is_the_mean_dpo_loss_to_the_last_bit():
    sums = torch.rand(4)
    assert torch.equal(update_loss(Terms(*sums), 0.0, COUNTED | {"harmless_rows": 0}, update_args()), sums[0] / 3)


@pytest.mark.parametrize("combine", MODES)
def test_the_passes_of_an_update_add_up_to_the_whole(combine):
    """Each pass knows the counts of the whole update; one of these has no harmless row, and one no helpful row."""
    terms = torch.rand(4, 9, dtype=torch.float64)
    terms[0, 5:], terms[1, :4] = 0, 0  # helpful rows 0 to 4, harmless ones 4 to 8
    args, counts = update_args(combine, kl_coeff=0.3), {"helpful_rows": 5, "harmless_rows": 5, "tokens": 31, "pairs": 9}
    whole = update_loss(Terms(*terms), 2.5, counts, args)
    for split in ([4, 5], [5, 4], [1, 1, 7], [9]):
        passes = [update_loss(Terms(*part), 2.5, counts, args) for part in terms.split(split, dim=1)]
        assert sum(passes).item() == pytest.approx(whole.item(), abs=1e-14)


# -- pairs of a model -------------------------------------------------------------------------------------------------

# The labels [helpful, harmless] of each row: either, both alike, both against each other, and none of them the one that
# a row without the other's label could be taken for.
LABELS = [(1, 0), (0, 1), (1, 1), (1, -1), (0, -1), (1, 0), (1, -1)]
SHAPES = [(5, 4, 3), (1, 3, 1), (4, 1, 6), (2, 2, 2), (3, 5, 2), (1, 2, 1), (6, 2, 7)]


def judged_rows(reference, dtype=torch.float64):
    """(pairs, facts (B, 8)): margins of either sign, betas of every row its own, log-probs of another model."""
    pairs = random_pairs(SHAPES, seed=2)
    torch.manual_seed(5)
    with torch.no_grad():
        logps = [[one_by_one(reference, pair[0], response)[0].sum() for response in pair[1:3]] for pair in pairs]
    margins, betas = torch.randn(len(pairs), 2), 0.05 + torch.rand(len(pairs), 2)
    return pairs, torch.cat((torch.tensor(logps), margins, betas, torch.tensor(LABELS)), dim=1).to(dtype)


def one_by_one(model, prompt, response):
    """Log-probs of the response's tokens, and of the whole vocabulary at each."""
    ids = torch.tensor([prompt + response])
    logps = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    return logps[range(len(response)), response], logps


def expected_terms(model, reference, pairs, facts, combine, lambda_, nll_coeff):
    """loss_H, loss_S, joint loss and KL of the pairs, (B,) each, from numbers and textbook formulas."""
    rows = []
    for (prompt, *sides), fact in zip([pair[:3] for pair in pairs], facts.tolist()):
        ref_chosen, ref_rejected, dr, ds, beta_H, beta_S, helpful, harmless = fact
        scored = [one_by_one(model, prompt, side) for side in sides]
        with torch.no_grad():
            theirs = [one_by_one(reference, prompt, side)[1] for side in sides]
        chosen, rejected = (tokens.sum() for tokens, _ in scored)
        nll = [-tokens.mean() for tokens, _ in scored]
        kl = sum((ours.exp() * (ours - q)).sum() for (_, ours), q in zip(scored, theirs))
        h = chosen - rejected - (ref_chosen - ref_rejected)
        ls = torch.nn.functional.logsigmoid
        loss_H = abs(helpful) * (-ls(beta_H * h) + nll_coeff * nll[0])
        loss_S = abs(harmless) * (-ls(harmless * beta_S * h) + nll_coeff * nll[harmless < 0])  # of the safer one
        if combine == "additive":
            whole = 0 * h
        elif combine == "margin":
            z = beta_H * h - lambda_ * ds
            p = 1.0 if helpful else sigmoid(dr)
            whole = -p * ls(z) - (1 - p) * ls(-z)
        else:
            p = sigmoid(dr + lambda_ * ds)
            whole = -p * ls(beta_H * h) - (1 - p) * ls(-beta_H * h)
        rows.append([loss_H, loss_S, whole + nll_coeff * nll[0], kl])
    return [torch.stack(term) for term in zip(*rows)]


@pytest.fixture(scope="module")
def models():
    """Policy and reference in fp64, twice: packed, and as transformers made them."""
    packed, plain = ([tiny_model("qwen3", torch.float64, seed=seed) for seed in (0, 1)] for _ in range(2))
    assert all(prepare_model(model).startswith("packed pairs: on") for model in packed)
    return packed, plain


@pytest.mark.parametrize("nll_coeff", [0.0, 0.2])
@pytest.mark.parametrize("combine", MODES)
def test_terms_and_gradients_are_those_of_responses_scored_one_by_one(models, combine, nll_coeff):
    (policy, reference), (plain, plain_reference) = models
    pairs, facts = judged_rows(plain_reference)
    batch, args = pack(pairs), update_args(combine, kl_coeff=0.1, nll_coeff=nll_coeff)
    with torch.no_grad():
        states = reference.response_states(batch)
    terms = pair_losses(policy, batch, PairFacts(*facts.unbind(1)), 1.7, args, states)[0]
    expected = expected_terms(plain, plain_reference, pairs, facts, combine, 1.7, nll_coeff)
    if combine == "additive":
        expected[2] = terms.joint  # the joint loss has no part in it
    # transformers' norms are fp32 in a double model too: another order of summation is another 1e-7 there.
    torch.testing.assert_close(torch.stack(terms), torch.stack(expected), rtol=1e-5, atol=1e-5)

    counts = {"helpful_rows": 5, "harmless_rows": 5, "tokens": batch.response_lengths.sum().item(), "pairs": len(pairs)}
    H, S, whole, kl = (term.sum() for term in expected)
    loss = (H / 5 + 1.7 * S / 5) / 2.7 if combine == "additive" else whole / len(pairs)
    losses = update_loss(terms, 1.7, counts, args), loss + 0.1 * kl / counts["tokens"]
    gradients = [
        torch.cat([gradient.flatten() for gradient in torch.autograd.grad(loss, list(model.parameters()))])
        for loss, model in zip(losses, (policy, plain), strict=True)
    ]
    assert (gradients[0] - gradients[1]).norm() < 1e-4 * gradients[1].norm()


def test_metrics_are_those_of_the_rows_that_carry_the_label(models):
    (policy, reference), (plain, plain_reference) = models
    pairs, facts = judged_rows(plain_reference)
    batch, args = pack(pairs), update_args(beta=0.3, nll_coeff=0.2)
    with torch.no_grad():
        states = reference.response_states(batch)
        terms, metrics = pair_losses(policy, batch, PairFacts(*facts.unbind(1)), 1.7, args, states)
        expected = expected_terms(plain, plain_reference, pairs, facts, "additive", 1.7, 0.2)
        logps = [[one_by_one(plain, pair[0], side)[0] for side in pair[1:3]] for pair in pairs]
    assert metrics.keys() | {"pairs"} == {*METRICS, *METRICS.values()}
    metrics = {name: values.double().tolist() for name, values in metrics.items()}
    chosen, rejected = (torch.stack([row[side].sum() for row in logps]) for side in (0, 1))
    changes = chosen - facts[:, 0], rejected - facts[:, 1]
    h = changes[0] - changes[1]
    helpful, harmless = facts[:, 6], facts[:, 7]
    kinds = set(zip(harmless.tolist(), (h * harmless > 0).tolist()))
    assert kinds >= set(itertools.product((1, -1), (True, False)))  # right and wrong in either direction
    by_hand = {
        "loss_H": expected[0],
        "accuracy_H": ((h > 0) & (helpful != 0)).double(),
        "beta_H": helpful.abs() * facts[:, 4],
        "loss_S": expected[1],
        "accuracy_S": (h * harmless > 0).double(),  # as often as the policy prefers the safer one
        "beta_S": harmless.abs() * facts[:, 5],
        "KL": expected[3],
        "nll_loss": torch.stack([-row[0].mean() for row in logps]),
        "rewards/chosen": 0.3 * changes[0],
        "rewards/rejected": 0.3 * changes[1],
        "rewards/accuracies": (h > 0).double(),
        "rewards/margins": 0.3 * h,
        "logps/chosen": chosen,
        "logps/rejected": rejected,
        "logps/accuracies": (chosen > rejected).double(),
        "logps/chosen_change": changes[0],
        "logps/rejected_change": changes[1],
        "helpful_rows": helpful.abs(),
        "harmless_rows": harmless.abs(),
        "tokens": double(*[chosen + rejected for _, chosen, rejected in SHAPES]),
    }
    assert by_hand.keys() == metrics.keys()
    for name, values in by_hand.items():
        assert metrics[name] == pytest.approx(values.tolist(), rel=1e-5, abs=1e-5), name
    with torch.no_grad():  # without a reference no token is counted for the KL
        terms, metrics = pair_losses(policy, batch, PairFacts(*facts.unbind(1)), 1.7, args)
    assert not terms.kl.any() and not metrics["tokens"].any()


def test_where_helpful_rows_are_the_harmless_rows_lambda_changes_no_gradient(models):
    """The terms are a mean of the two losses, which are one: any weights of them are the plain DPO loss."""
    (policy, _), (_, plain_reference) = models
    pairs, facts = judged_rows(plain_reference)
    batch, args = pack(pairs), update_args()
    facts[:, 4:6], facts[:, 6:8] = 0.3, 1  # one beta (w = 0), both labels as the row stands
    counts = dict.fromkeys(METRICS.values(), len(pairs))
    gradients = []
    for lambda_ in (0.0, 0.3, 1.0, 10.0):
        terms, _ = pair_losses(policy, batch, PairFacts(*facts.unbind(1)), lambda_, args)
        loss = update_loss(terms, lambda_, counts, args)
        found = torch.autograd.grad(loss, list(policy.parameters()))
        gradients.append(torch.cat([gradient.flatten() for gradient in found]))
    assert gradients[0].norm() > 1e-2
    for gradient in gradients[1:]:
        assert (gradient - gradients[0]).norm() < 1e-5 * gradients[0].norm()
    # Not because lambda goes unused: turned harmless labels are another gradient.
    facts[:, 7] = -1
    terms, _ = pair_losses(policy, batch, PairFacts(*facts.unbind(1)), 1.0, args)
    loss = update_loss(terms, 1.0, counts, args)
    turned = torch.cat([gradient.flatten() for gradient in torch.autograd.grad(loss, list(policy.parameters()))])
    assert (turned - gradients[0]).norm() > 0.1 * gradients[0].norm()
