"""Every equation of the preference losses: tensors in, tensors out, one loss per pair.

Legend: B pairs.  Log-probs are sums over the response's tokens (nats, end-of-sequence included, prompt excluded):
DPO is derived for log pi(y|x), and a mean would silently divide beta by the length of each response.
Nothing here averages over a batch: the scripts divide by the number of pairs of the whole update.
"""

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
