"""Why a policy has to learn from its own responses: a bandit whose files lack the best arm.

One prompt, five responses with a reward and a cost; of all policies with E[cost] <= threshold the best is
ref exp((r - lambda c) / beta), by bisection of lambda.  The policy is a table of five numbers, which learns by the
script's loss (--combine soft) and multiplier from every pair of the files, and with --own-pairs also from every pair of
responses, as often as the policy says both.  Nothing is sampled: what is left over is no noise.

    python benchmarks/own_pairs_on_a_bandit.py --figure docs/own_pairs.svg
"""

import itertools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the losses lie one folder up

import torch

from harness import endings, flags
from losses import Multiplier, joint_loss

BETA, THRESHOLD, UPDATES, CAP = 0.5, 0.1, 3000, 20.0
REWARDS = torch.tensor([0.6, 1.2, 0.2, 0.9, -0.5], dtype=torch.float64)
COSTS = torch.tensor([0.2, 1.0, 0.6, -0.4, 0.1], dtype=torch.float64)
REFERENCE = torch.tensor([0.4, 0.25, 0.2, 0.1, 0.05], dtype=torch.float64).log()
BEST = 3  # the arm that no pair of the files has
PAIRS = torch.tensor(list(itertools.permutations(range(5), 2))).t()  # (2, 20): chosen, rejected

WIDE, HIGH, LEFT, TOP = 600, 220, 44, 44
COLOURS = {"reference": "#6e7781 #8b949e", "files alone": "#cf222e #ff7b72", "with own pairs": "#0969da #58a6ff"}
COLOURS |= {"the best policy": "#1a7f37 #3fb950", "text": "#24292f #e6edf3", "paper": "#ffffff #0d1117"}


def get_args(argv=None):
    parser = flags.Parser(__doc__)
    share = flags.number(float, above=0, most=1)
    parser.add_argument("--share", type=share, default=0.5, metavar="SHARE", help="of the loss by own pairs")
    parser.add_argument("--figure", metavar="FILE", help="write the probabilities of the arms to this SVG file")
    return parser.parse_args(argv)


def cost(logps):
    """E[cost] of log-probs (5,)."""
    return (logps.exp() * COSTS).sum().item()


def optimum():
    """(lambda, log-probs) of the best policy that keeps the threshold."""
    low, high = 0.0, CAP
    for _ in range(60):
        middle = (low + high) / 2
        logps = (REFERENCE + (REWARDS - middle * COSTS) / BETA).log_softmax(0)
        low, high = (middle, high) if cost(logps) > THRESHOLD else (low, middle)
    return middle, logps


def trained(own_share):
    """(lambda, log-probs) after UPDATES on all pairs without the best arm and, for own_share of the loss, own pairs."""
    table = REFERENCE.clone().requires_grad_()
    chosen, rejected = PAIRS
    dr, ds = REWARDS[chosen] - REWARDS[rejected], COSTS[rejected] - COSTS[chosen]
    in_files = ((chosen != BEST) & (rejected != BEST)).double()
    multiplier = Multiplier(1.0, 0.05, 1e-6, CAP)
    optimizer = torch.optim.Adam([table], lr=0.02)
    for _ in range(UPDATES):
        logps = table.log_softmax(0)
        ratios = logps - REFERENCE
        h = ratios[chosen] - ratios[rejected]
        losses = joint_loss("soft", h, BETA, dr, ds, torch.zeros_like(h), multiplier.value)
        own = (logps[chosen] + logps[rejected]).exp().detach()  # how often both are said
        weights = (1 - own_share) * in_files / in_files.sum() + own_share * own / own.sum()
        optimizer.zero_grad()
        (weights * losses).sum().backward()
        optimizer.step()
        multiplier.update(cost(table.detach().log_softmax(0)) - THRESHOLD)
    return multiplier.value, table.detach().log_softmax(0)


def figure(policies):
    """SVG text: for each arm the probability by each policy {name: log-probs}."""
    theme = lambda dark: " ".join(f".{key(name)} {{ fill: {both.split()[dark]} }}" for name, both in COLOURS.items())
    svg = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDE} {HIGH + 100}" role="img" font-size="13">']
    svg += [f"<style>{theme(0)} @media (prefers-color-scheme: dark) {{ {theme(1)} }}</style>"]
    svg += ['<rect class="paper" width="100%" height="100%"/>']
    place_of = lambda x, y, anchor: f'class="text" text-anchor="{anchor}" x="{x}" y="{y}"'
    text = lambda x, y, words, anchor="middle": f"<text {place_of(x, y, anchor)}>{words}</text>"
    for place, name in enumerate(policies):
        x = LEFT + place * 138
        svg += [f'<rect class="{key(name)}" x="{x}" y="12" width="14" height="14"/>', text(x + 20, 24, name, "start")]
    most = max(logps.exp().max().item() for logps in policies.values())
    for arm in range(5):
        x = LEFT + arm * 110
        for place, (name, logps) in enumerate(policies.items()):
            probability = logps[arm].exp().item()
            high = HIGH * probability / most
            left, top = x + 23 * place, TOP + HIGH - high
            svg += [f'<rect class="{key(name)}" x="{left}" y="{top:.1f}" width="21" height="{high:.1f}"/>']
            svg += [f'<g font-size="9">{text(left + 10.5, round(top - 3, 1), f"{100 * probability:.0f}")}</g>']
        words = f"r {REWARDS[arm]:g}, c {COSTS[arm]:g}"
        svg += [text(x + 46, TOP + HIGH + 18, words), text(x + 46, TOP + HIGH + 36, "not in the files" * (arm == BEST))]
    return "\n".join([*svg, "</svg>\n"])


def key(name):
    """A name as a class of the style sheet."""
    return name.replace(" ", "-")


def main(args):
    found = {"files alone": trained(0), "with own pairs": trained(args.share), "the best policy": optimum()}
    best = found["the best policy"][1]
    print("| | lambda | E[cost] | KL to the best policy |\n|---|---|---|---|")
    for name, (lambda_, logps) in found.items():
        kl = (logps.exp() * (logps - best)).sum().item()
        print(f"| {name} | {lambda_:.3f} | {cost(logps):.3f} | {kl:.1e} |")
    if args.figure:
        policies = {"reference": REFERENCE} | {name: logps for name, (_, logps) in found.items()}
        Path(args.figure).write_text(figure(policies))


if __name__ == "__main__":
    endings.run(main, get_args())
