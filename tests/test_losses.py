"""Every preference loss against numbers worked out by hand, its gradient, its minimum and its behaviour far out."""

import math

import pytest
import torch

from losses import DPO_LOSSES, dpo_loss, nll_loss

BETA, EPS = 0.3, 0.2
SIDES = ("policy_chosen", "policy_rejected", "ref_chosen", "ref_rejected")


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


def loss_at(margin, **options):
    """The loss where policy/ref(chosen) - policy/ref(rejected) is `margin`, spread unevenly over all four inputs."""
    margin = torch.as_tensor(margin, dtype=torch.float64)
    nothing = torch.zeros_like(margin)
    options = dict(beta=BETA) | options
    return dpo_loss(0.5 * margin - 3, -0.25 * margin - 4, nothing - 0.25 * margin - 3, nothing - 4, **options)[0]


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def test_sigmoid_robust_and_hinge_are_ln_2_ln_2_and_1_where_policy_and_reference_agree():
    logps = double(-3.0, -7.5), double(-4.0, -1.5)
    for smoothing in (0.0, 0.1, 0.4):
        losses, chosen, rejected = dpo_loss(*logps, *logps, beta=0.1, label_smoothing=smoothing)
        assert losses == pytest.approx([math.log(2)] * 2, abs=1e-15)
        assert chosen.tolist() == rejected.tolist() == [0, 0]
        robust = dpo_loss(*logps, *logps, beta=0.1, loss="robust", label_smoothing=smoothing)[0]
        assert robust == pytest.approx([math.log(2)] * 2, abs=1e-15)
    assert dpo_loss(*logps, *logps, beta=0.1, loss="hinge")[0].tolist() == [1, 1]


@pytest.mark.parametrize(
    ("options", "expected"),
    # Policy chosen -10, rejected -14, reference chosen -11, rejected -12: log-ratios +1 and -2, h = 3; beta 0.5 makes
    # beta h = 1.5.  -logsigmoid(1.5) = log(1 + e^-1.5) = 0.2014132779827524; -logsigmoid(-1.5) = 1.7014132779827524.
    [
        (dict(), 0.2014132779827524),
        (dict(label_smoothing=0.1), 0.3514132779827524),  # 0.9 * 0.20141 + 0.1 * 1.70141
        (dict(loss="robust", label_smoothing=0.1), 0.0139132779827524),  # (0.9 * 0.20141 - 0.1 * 1.70141) / 0.8
        (dict(loss="hinge"), 0.0),
        (dict(loss="hinge", beta=0.2), 0.4),  # 1 - 0.2 * 3
        (dict(loss="ipo", chosen_lengths=double(4), rejected_lengths=double(5)), 0.1225),  # (1/4 + 2/5 - 1)^2
    ],
)
def test_loss_and_rewards_of_one_pair_worked_out_by_hand(options, expected):
    options = dict(beta=0.5) | options
    losses, chosen_rewards, rejected_rewards = dpo_loss(double(-10), double(-14), double(-11), double(-12), **options)
    assert losses.tolist() == pytest.approx([expected], abs=1e-15)
    assert chosen_rewards.tolist() == pytest.approx([options["beta"] * 1], abs=1e-15)
    assert rejected_rewards.tolist() == pytest.approx([options["beta"] * -2], abs=1e-15)


@pytest.mark.parametrize("margin", [-6.0, -0.5, 0.0, 2.0, 9.0])
@pytest.mark.parametrize(
    ("options", "slope"),  # d loss / d h, by hand
    [
        (dict(), lambda h: -BETA * sigmoid(-BETA * h)),
        (
            dict(label_smoothing=EPS),
            lambda h: BETA * (EPS * sigmoid(BETA * h) - (1 - EPS) * sigmoid(-BETA * h)),
        ),
        (
            dict(loss="robust", label_smoothing=EPS),
            lambda h: -BETA * (EPS * sigmoid(BETA * h) + (1 - EPS) * sigmoid(-BETA * h)) / (1 - 2 * EPS),
        ),
        (dict(loss="hinge"), lambda h: -BETA if BETA * h < 1 else 0.0),
    ],
    ids=["sigmoid", "smoothed", "robust", "hinge"],
)
def test_gradient_by_each_log_prob_has_the_closed_form_and_its_sign(options, slope, margin):
    logps = dict(zip(SIDES, (double(margin - 5), double(-4), double(-5), double(-4))))
    for logp in logps.values():
        logp.requires_grad_()
    dpo_loss(*logps.values(), beta=BETA, **options)[0].sum().backward()
    signs = dict(policy_chosen=1, policy_rejected=-1, ref_chosen=-1, ref_rejected=1)
    for side, logp in logps.items():
        assert logp.grad.item() == pytest.approx(signs[side] * slope(margin), abs=1e-15), side


def test_ipo_gradient_is_divided_by_the_length_of_its_own_response():
    chosen, rejected = double(-6).requires_grad_(), double(-9).requires_grad_()
    lengths = dict(chosen_lengths=torch.tensor([2]), rejected_lengths=torch.tensor([5]))
    dpo_loss(chosen, rejected, double(-7), double(-8), beta=0.25, loss="ipo", **lengths)[0].sum().backward()
    residual = 1 / 2 + 1 / 5 - 2  # per-token log-ratios of +1 over 2 and of -1 over 5 tokens, less 1 / (2 * 0.25)
    assert chosen.grad.item() == pytest.approx(2 * residual / 2, abs=1e-15)
    assert rejected.grad.item() == pytest.approx(-2 * residual / 5, abs=1e-15)


@pytest.mark.parametrize("smoothing", [0.01, 0.1, 0.3, 0.49])
def test_label_smoothing_puts_the_minimum_at_the_log_odds_of_a_right_label(smoothing):
    margin = double(math.log((1 - smoothing) / smoothing) / BETA).requires_grad_()
    loss = loss_at(margin, label_smoothing=smoothing)
    loss.sum().backward()
    assert margin.grad.item() == pytest.approx(0, abs=1e-15)
    # There the loss is the entropy of the label; to either side it is larger.
    entropy = -(1 - smoothing) * math.log(1 - smoothing) - smoothing * math.log(smoothing)
    assert loss.item() == pytest.approx(entropy, abs=1e-15)
    for step in (-0.1, 0.1):
        assert loss_at(margin.detach() + step, label_smoothing=smoothing).item() > entropy


@pytest.mark.parametrize("smoothing", [0.05, 0.2, 0.45])
def test_robust_loss_is_the_clean_loss_in_expectation_over_flipped_labels(smoothing):
    margins = torch.linspace(-20, 20, 41, dtype=torch.float64)
    robust = dict(loss="robust", label_smoothing=smoothing)
    expected = (1 - smoothing) * loss_at(margins, **robust) + smoothing * loss_at(-margins, **robust)
    torch.testing.assert_close(expected, loss_at(margins), rtol=1e-13, atol=1e-13)
    # The smoothed loss has no such property: it is not the robust one by another name.
    smoothed = (1 - smoothing) * loss_at(margins, label_smoothing=smoothing)
    smoothed += smoothing * loss_at(-margins, label_smoothing=smoothing)
    assert (smoothed - loss_at(margins)).abs().max() > 0.1


def test_hinge_is_zero_from_beta_h_1_on_and_linear_below():
    scaled = double(-9, 0, 0.75, 1, 1.25, 40)
    assert loss_at(scaled / BETA, loss="hinge").tolist() == pytest.approx([10, 1, 0.25, 0, 0, 0], abs=1e-14)


@pytest.mark.parametrize("beta", [0.05, 0.1, 1.0])
def test_ipo_is_least_where_the_margin_per_token_is_1_over_2_beta(beta):
    lengths = dict(chosen_lengths=torch.tensor([3] * 3), rejected_lengths=torch.tensor([7] * 3))
    per_token = 1 / (2 * beta) + double(-0.5, 0, 0.5)
    rejected_ratio = double(-2, -2, -2)  # -2/7 per token
    chosen_ratio = 3 * (per_token - 2 / 7)
    zeros = torch.zeros(3, dtype=torch.float64)
    losses = dpo_loss(chosen_ratio, rejected_ratio, zeros, zeros, beta, "ipo", **lengths)[0]
    assert losses.tolist() == pytest.approx([0.25, 0, 0.25], abs=1e-12)


@pytest.mark.parametrize("loss", ["sigmoid", "robust", "hinge"])
@pytest.mark.parametrize("scaled", [-1e4, 1e4])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_and_gradient_are_right_in_fp32_at_ten_thousand_nats(loss, scaled, smoothing):
    smoothing = 0.0 if loss == "hinge" else smoothing
    chosen = torch.tensor([scaled / 0.1], requires_grad=True)
    zero = torch.zeros(1)
    losses = dpo_loss(chosen, zero, zero, zero, 0.1, loss, smoothing)[0]
    losses.sum().backward()
    # -logsigmoid(x) is max(0, -x) this far out, and so is its slope.
    right, wrong = max(0, -scaled), max(0, scaled)
    if loss == "hinge":
        value, slope = max(0, 1 - scaled), -0.1 * (scaled < 0)
    else:
        sign = -1 if loss == "robust" else 1
        over = 1 - 2 * smoothing if loss == "robust" else 1
        value = ((1 - smoothing) * right + sign * smoothing * wrong) / over
        slope = 0.1 * ((1 - smoothing) * -(scaled < 0) + sign * smoothing * (scaled > 0)) / over
    assert losses.item() == pytest.approx(value, rel=1e-5)
    assert chosen.grad.item() == pytest.approx(slope, rel=1e-5)


def trl_losses(chosen_scores, rejected_scores, beta, smoothing, chosen_lengths, rejected_lengths):
    """The per-pair losses as TRL 1.16's DPOTrainer writes them (scores are its name for log-ratios)."""
    delta_score = chosen_scores - rejected_scores
    right, flipped = torch.sigmoid(beta * delta_score).log(), torch.sigmoid(-beta * delta_score).log()
    ipo_delta = chosen_scores / chosen_lengths - rejected_scores / rejected_lengths
    return {
        "sigmoid": -right,
        "robust": (-(1 - smoothing) * right - -smoothing * flipped) / (1 - 2 * smoothing),
        "hinge": torch.relu(1 - beta * delta_score),
        "ipo": (ipo_delta - 1 / (2 * beta)) ** 2,
    }


@pytest.mark.parametrize("loss", DPO_LOSSES)
def test_a_batch_of_pairs_gives_one_loss_each_as_trl_computes_them(loss):
    draw = torch.Generator().manual_seed(0)
    logps = -20 * torch.rand(4, 16, generator=draw, dtype=torch.float64)
    lengths = torch.randint(1, 30, (2, 16), generator=draw)
    options = dict(chosen_lengths=lengths[0], rejected_lengths=lengths[1])
    options["label_smoothing"] = 0.1 if loss == "robust" else 0.0
    losses, chosen, rejected = dpo_loss(*logps, 0.2, loss, **options)
    expected = trl_losses(logps[0] - logps[2], logps[1] - logps[3], 0.2, 0.1, *lengths)[loss]
    torch.testing.assert_close(losses, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(chosen, 0.2 * (logps[0] - logps[2]), rtol=1e-15, atol=1e-15)
    torch.testing.assert_close(rejected, 0.2 * (logps[1] - logps[3]), rtol=1e-15, atol=1e-15)


def test_rewards_carry_no_gradient_and_the_loss_does():
    chosen, rejected = double(-1).requires_grad_(), double(-2).requires_grad_()
    losses, *rewards = dpo_loss(chosen, rejected, double(-1), double(-2), 0.1)
    assert losses.requires_grad
    assert not any(reward.requires_grad for reward in rewards)


def test_unknown_loss_is_an_error_that_names_the_known_ones():
    with pytest.raises(ValueError, match="unknown DPO loss 'sigmod'; known: sigmoid, robust, hinge, ipo"):
        loss_at([1.0], loss="sigmod")


def test_nll_is_the_mean_negative_log_prob_of_each_response_and_pulls_it_up():
    logps = double(-6, -10).requires_grad_()
    losses = nll_loss(logps, torch.tensor([3, 4]))
    assert losses.tolist() == [2.0, 2.5]
    losses.sum().backward()
    assert logps.grad.tolist() == pytest.approx([-1 / 3, -1 / 4], abs=1e-15)
