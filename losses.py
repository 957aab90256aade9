"""Every equation of the preference losses: tensors in, tensors out, one loss per pair.

Legend: B pairs.  Log-probs are sums over the response's tokens (nats, end-of-sequence included, prompt excluded):
DPO is derived for log pi(y|x), and a mean would silently divide beta by the length of each response.
Nothing here averages over a batch: the scripts divide by the number of pairs of the whole update.
"""

import math

import torch
import torch.nn.functional as F

DPO_LOSSES = ("sigmoid", "robust", "hinge", "ipo")


def dpo_loss(
    policy_chosen_logps,  # (B,)
    policy_rejected_logps,  # (B,)
    ref_chosen_logps,  # (B,)
    ref_rejected_logps,  # (B,)
    beta,  # > 0
    loss="sigmoid",
    label_smoothing=0.0,  # assumed probability that a pair's label is flipped, below 0.5
    chosen_lengths=None,  # (B,) response tokens, for "ipo"
    rejected_lengths=None,  # (B,)
):
    """Loss of each pair and its two implicit rewards: losses (B,), chosen_rewards (B,), rejected_rewards (B,).

    With h = log pi/ref(chosen) - log pi/ref(rejected) and e = label_smoothing:

    sigmoid  -(1-e) logsigmoid(beta h) - e logsigmoid(-beta h)                 DPO, arXiv:2305.18290 Eq. 7;
             e > 0 is conservative DPO, least at beta h = log((1-e)/e)
    robust   (-(1-e) logsigmoid(beta h) + e logsigmoid(-beta h)) / (1-2e)      arXiv:2403.00409: the DPO loss in
             expectation over flipped labels; unbounded below for e > 0
    hinge    relu(1 - beta h)                                                  arXiv:2305.10425 on log-ratios
    ipo      (h' - 1/(2 beta))^2, h' with log-ratios averaged over tokens      arXiv:2310.12036 Eq. 17; the mean
             is the authors' own correction

    A reward is beta times the log-ratio (arXiv:2305.18290 Eq. 5, partition function dropped), without gradient.
    """
    chosen_logratios = policy_chosen_logps - ref_chosen_logps
    rejected_logratios = policy_rejected_logps - ref_rejected_logps
    margin = chosen_logratios - rejected_logratios
    if loss == "sigmoid":
        losses = -(1 - label_smoothing) * F.logsigmoid(beta * margin) - label_smoothing * F.logsigmoid(-beta * margin)
    elif loss == "robust":
        kept, flipped = F.logsigmoid(beta * margin), F.logsigmoid(-beta * margin)
        losses = (-(1 - label_smoothing) * kept + label_smoothing * flipped) / (1 - 2 * label_smoothing)
    elif loss == "hinge":
        losses = torch.relu(1 - beta * margin)
    elif loss == "ipo":
        margin_per_token = chosen_logratios / chosen_lengths - rejected_logratios / rejected_lengths
        losses = (margin_per_token - 1 / (2 * beta)) ** 2
    else:
        raise ValueError(f"unknown DPO loss {loss!r}; known: {', '.join(DPO_LOSSES)}")
    return losses, beta * chosen_logratios.detach(), beta * rejected_logratios.detach()


PAIR_METRICS = """rewards/chosen rewards/rejected rewards/accuracies rewards/margins logps/chosen logps/rejected
    logps/accuracies logps/chosen_change logps/rejected_change""".split()


def pair_metrics(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta):
    """PAIR_METRICS of each pair {name: (B,)}: TRL's names, and the change of each log-prob since the reference."""
    chosen_change, rejected_change = policy_chosen_logps - ref_chosen_logps, policy_rejected_logps - ref_rejected_logps
    chosen_rewards, rejected_rewards = beta * chosen_change, beta * rejected_change
    return {
        "rewards/chosen": chosen_rewards,
        "rewards/rejected": rejected_rewards,
        "rewards/accuracies": chosen_rewards > rejected_rewards,  # strictly: 0, not 0.5, while policy = reference
        "rewards/margins": chosen_rewards - rejected_rewards,
        "logps/chosen": policy_chosen_logps,
        "logps/rejected": policy_rejected_logps,
        "logps/accuracies": policy_chosen_logps > policy_rejected_logps,  # what the model itself finds likelier
        "logps/chosen_change": chosen_change,
        "logps/rejected_change": rejected_change,
    }


DISPLACEMENT = 4.0  # nats that chosen and rejected may both lose before the log says so


def displacement(metrics):
    """A line for the log where both log-probs have fallen far while the loss improved, else None."""
    fall = -max(metrics["logps/chosen_change"], metrics["logps/rejected_change"])
    if fall > DISPLACEMENT:
        return (
            f"Both log-probs have fallen by {fall:.1f} nats or more, away from chosen and rejected alike.\n"
            "If the text gets worse: a larger --beta, --nll-coeff 0.1 or a smaller --learning-rate."
        )


def nll_loss(policy_chosen_logps, chosen_lengths):
    """Negative log-likelihood per token of each chosen response, (B,): -log pi(y|x) / |y|, as in arXiv:2404.19733.

    DPO fixes only the difference of two log-probs, and both may fall together; this term holds the chosen one up.
    """
    return -policy_chosen_logps / chosen_lengths


def reward_loss(chosen_scores, rejected_scores, center=0.0):
    """Ranking loss of a reward model for each pair, (B,): -logsigmoid(s_chosen - s_rejected), Bradley-Terry.

    arXiv:1706.03741; scores (B,), higher is better.  The loss does not see a constant added to all scores; `center`
    times the mean of the two squared scores holds them around zero.
    """
    losses = -F.logsigmoid(chosen_scores - rejected_scores)
    return losses + center * (chosen_scores**2 + rejected_scores**2) / 2


def harm_label_loss(chosen_scores, rejected_scores, labels):
    """What the label terms of a cost model add for each pair, (B,): arXiv:2310.12773 Eq. 6 with score = -cost.

    -logsigmoid(z_c s_c) - logsigmoid(z_r s_r), z = -label; labels (B, 2) of chosen and rejected: +1 harmful, -1 safe,
    0 without a label, which adds nothing.  They give the scores their zero: above it a response is safe.  Both terms
    and the ranking pull in one direction: safer is higher.
    """
    scores = torch.stack((chosen_scores, rejected_scores), dim=1)
    return -(F.logsigmoid(-labels * scores) * labels.abs()).sum(1)


# -- preference-guided DPO --------------------------------------------------------------------------------------------


def aligned_loss(margin, prompted_margin):
    """relu(m_p - m) of each pair, (B,): m (B,) = log pi(chosen|x) - log pi(rejected|x), m_p the same behind a
    preference prompt, without gradient: it pulls m up to what the prompt brings about, and no further.

    Context distillation of a margin (arXiv:2112.00861 distils whole distributions).  The derivative by m is -1 where
    m < m_p, else 0.
    """
    return torch.relu(prompted_margin.detach() - margin)


def matched_loss(margin, prompted_margin):
    """(m - m_p)^2 / 2 of each pair, (B,): as aligned_loss, from both sides: it is least where m is what the prompt
    brings about, and pulls back what went beyond.
    """
    return (margin - prompted_margin.detach()) ** 2 / 2


# -- Safe-MM-DPO ---------------------------------------------------------------------------------------------------


def dynamic_beta(margin, beta, w, k):
    """MM-DPO's beta of each pair, arXiv:2502.10391: beta * (1 + w * (1 - exp(-k * max(margin, 0)))), without gradient.

    margin (B,): a frozen reward model's score of chosen minus that of rejected.  From beta, where the model disagrees
    with the pair or is indifferent, up to (1 + w) * beta where it is sure.  w = 0 or k = 0 is beta to the last bit.
    Raises ValueError for a margin that is NaN.  Worth knowing: the gradient grows with beta only while beta * h is
    below 1.278; beyond, a larger beta pulls less, and the margin h it asks for is smaller.
    """
    if margin.isnan().any():
        raise ValueError("a reward margin is NaN: the reward model's weights or the pair are broken")
    return beta * (1 - w * torch.expm1(-k * margin.detach().clamp(min=0)))


def soft_label_loss(beta_margin, probability):
    """Each pair's loss where chosen is preferred with `probability`, (B,): -p logsigmoid(z) - (1 - p) logsigmoid(-z).

    beta_margin z (B,): beta * h of the policy.  Least at z = logit(p): with p = sigmoid(dr + lambda ds), dr and ds the
    helpful and the harmless model's margins, that is the policy ref * exp((r - lambda c) / beta), c = -s.
    """
    return -probability * F.logsigmoid(beta_margin) - (1 - probability) * F.logsigmoid(-beta_margin)


def joint_loss(combine, h, beta, helpful_margin, harmless_margin, helpful_label, multiplier):
    """The loss of each pair where both reward models act on one term, (B,); zeros for "additive", which has two terms.

    margin  -logsigmoid(beta h - lambda ds), MODPO, arXiv:2310.03708 Eq. 8 with cost = -score; helpful_label (B,) 1 as
            the pair stands, -1 the other way, 0 none: then sigmoid(dr), the helpful model's word, stands for it
    soft    soft_label_loss with p = sigmoid(dr + lambda ds)

    h (B,): log pi/ref(chosen) - log pi/ref(rejected); dr, ds (B,): the reward models' margins.  Both are least for
    pi = ref * exp((r - lambda c) / beta), arXiv:2305.18290 Eq. 4 with that reward.
    """
    if combine == "margin":
        label = torch.where(helpful_label == 0, helpful_margin.sigmoid(), (1 + helpful_label) / 2)
        return soft_label_loss(beta * h - multiplier * harmless_margin, label)
    if combine == "soft":
        return soft_label_loss(beta * h, (helpful_margin + multiplier * harmless_margin).sigmoid())
    return torch.zeros_like(h)


class Multiplier:
    """The Lagrange multiplier lambda of E[cost] <= threshold, moved in log space (arXiv:2310.12773):

        log lambda += rate * lambda * J_C,    J_C = E[cost] - threshold, smoothed

    It grows while the policy costs more than it may and shrinks while it costs less.  The log itself is clamped: a
    clamp behind exp would let it wind up beyond the cap and take some seventy updates to come back, here it takes one.
    J_C is a moving average with the weight of the first steps corrected, as Adam's; one that is not finite is left out
    and counted.  initial = 0 switches it off for good; rate = 0 keeps it where it is.
    """

    def __init__(self, initial, rate, least, most, decay=0.95):
        self.rate, self.decay = rate, decay
        self.bounds = [math.log(least), math.log(most)]
        self.log = math.log(initial) if initial else -math.inf
        self.average, self.weight, self.skipped, self.at_cap = 0.0, 0.0, 0, 0  # at_cap: updates in a row

    @property
    def value(self):
        return math.exp(self.log)

    @property
    def violation(self):
        """J_C, smoothed; 0 before the first one."""
        return self.average / self.weight if self.weight else 0.0

    def update(self, violation):
        """One step on J_C, a number that is the same on all ranks."""
        if not math.isfinite(violation):
            self.skipped += 1
            return
        self.average = self.decay * self.average + (1 - self.decay) * violation
        self.weight = self.decay * self.weight + (1 - self.decay)
        if self.value and self.rate:
            moved = self.log + self.rate * self.value * self.violation
            self.log = min(max(moved, self.bounds[0]), self.bounds[1])
            self.at_cap = self.at_cap + 1 if self.log == self.bounds[1] else 0

    def state(self):
        """What a checkpoint keeps {name: number}; -inf, which JSON has not, stands as None."""
        moved = {name: getattr(self, name) for name in ("average", "weight", "skipped", "at_cap")}
        return moved | {"log": None if self.log == -math.inf else self.log}

    def load(self, state):
        vars(self).update(state)
        self.log = -math.inf if state["log"] is None else state["log"]
