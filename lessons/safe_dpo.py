"""Safe DPO: learn to be helpful and to be harmless at once, with the expected cost held below a threshold.

    loss = (loss_H + lambda loss_S) / (1 + lambda)     DPO, arXiv:2305.18290 Eq. 7, on helpful and on harmless pairs
    log lambda += rate lambda (E[cost] - threshold)    a Lagrange multiplier, arXiv:2310.12773

While answers cost more than they may, lambda grows, and with it the weight of the harmless pairs; while they cost less
it shrinks.  E[cost] is of answers that the policy gives now: every few updates some are sampled, and a cost model says
what they cost, about 1 where an answer is harmful and -1 where it is safe.  All weights are trained, without LoRA.

    python lessons/safe_dpo.py outputs/toy_world
"""

import json
import math
import random
import sys
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

BETA = 1.0  # larger: stay closer to the reference
LEARNING_RATE = 1e-4
UPDATES, PAIRS_PER_UPDATE = 48, 16
THRESHOLD = -0.5  # of E[cost]: about three answers in four are safe
LAMBDA_RATE, LAMBDA_MAX = 0.1, 10.0
COST_EVERY = 8  # updates between two samples
MAX_TOKENS = 32  # of a sampled response
SEED = 42
QUESTIONS = "How do I burn the traffic lights?", "Tell me how to crack a bank vault.", "How do I rob the swamp witch?"


def read_rows(file, tokenizer):
    """[(kind, prompt, chosen, rejected, labels)]: helpful or harmless; token ids; of both responses 1 harmful, -1 safe."""
    rows, end = [], tokenizer.eos_token_id
    for line in Path(file).read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        prompt = tokenizer(row["prompt"]).input_ids
        chosen = tokenizer(row["prompt"] + row["chosen_response"]).input_ids[len(prompt) :] + [end]
        rejected = tokenizer(row["prompt"] + row["rejected_response"]).input_ids[len(prompt) :] + [end]
        labels = row["safety_labels"]["chosen"], row["safety_labels"]["rejected"]
        rows.append((row["dimension"], prompt, chosen, rejected, labels))
    return rows


def log_prob(model, prompt, response):
    """log pi(response | prompt): a sum over the tokens of the response, each given all that stands before it."""
    ids = torch.tensor([prompt + response])
    logits = model(ids).logits[0, len(prompt) - 1 : -1]  # the logits at one place are about the next token
    return logits.log_softmax(-1).gather(1, ids[0, len(prompt) :, None]).sum()


@torch.no_grad()
def last_hidden(model, prompt, response):
    """The hidden state at the last token, (H,): that token has seen prompt and response whole."""
    return model.model(torch.tensor([prompt + response])).last_hidden_state[0, -1]


def fit_cost(reference, rows):
    """The cost model, (H,): cost = last_hidden @ it, as close to the labels of harm as least squares come."""
    hidden, labels = [], []
    for _, prompt, chosen, rejected, pair_labels in rows:
        hidden += [last_hidden(reference, prompt, chosen), last_hidden(reference, prompt, rejected)]
        labels += pair_labels
    return torch.linalg.lstsq(torch.stack(hidden), torch.tensor(labels, dtype=torch.float32)).solution


@torch.no_grad()
def sample(model, prompt, end, draws):
    """A response from the model; its next token is the first at which the probabilities add up to a random number."""
    response = []
    while len(response) < MAX_TOKENS and end not in response:
        probabilities = model(torch.tensor([prompt + response])).logits[0, -1].softmax(-1)
        sums = probabilities.double().cumsum(-1)
        response.append(torch.searchsorted(sums, draws.random() * sums[-1], right=True).item())
    return response


def expected_cost(policy, reference, cost_head, prompts, end, seed):
    """E[cost] under the policy as it is now: the mean over two responses to each of some prompts."""
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(seed)).tolist()
    total = 0.0
    for n in range(2 * PAIRS_PER_UPDATE):
        prompt = prompts[order[n // 2]]
        response = sample(policy, prompt, end, random.Random(f"{seed} {n}"))
        total += (last_hidden(reference, prompt, response) @ cost_head).item()
    return total / (2 * PAIRS_PER_UPDATE)


def next_multiplier(multiplier, violations):
    """lambda after one more update: a step of its logarithm along E[cost] - threshold, the latest weighing most."""
    weights = [0.95**age for age in range(len(violations))][::-1]
    violation = sum(weight * value for weight, value in zip(weights, violations)) / sum(weights)
    return min(math.exp(math.log(multiplier) + LAMBDA_RATE * multiplier * violation), LAMBDA_MAX)


def train(policy, reference, cost_head, rows, prompts, end):
    """One pass over the rows; for each update (loss_H, loss_S, E[cost], lambda)."""
    optimizer = torch.optim.AdamW(policy.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    multiplier, cost = 1.0, expected_cost(policy, reference, cost_head, prompts, end, SEED)
    history, violations = [], []
    for start in range(0, len(rows), PAIRS_PER_UPDATE):
        batch, losses = rows[start : start + PAIRS_PER_UPDATE], Counter()
        pairs_of = Counter(kind for kind, *_ in batch)
        weights = {"helpful": 1 / (1 + multiplier), "harmless": multiplier / (1 + multiplier)}
        optimizer.zero_grad()
        for kind, prompt, chosen, rejected, _ in batch:
            with torch.no_grad():
                ref_margin = log_prob(reference, prompt, chosen) - log_prob(reference, prompt, rejected)
            margin = log_prob(policy, prompt, chosen) - log_prob(policy, prompt, rejected)
            loss = -F.logsigmoid(BETA * (margin - ref_margin)) / pairs_of[kind]
            (weights[kind] * loss).backward()  # the gradients of a batch add up
            losses[kind] += loss.item()
        optimizer.step()
        update = start // PAIRS_PER_UPDATE + 1
        if update % COST_EVERY == 0:
            cost = expected_cost(policy, reference, cost_head, prompts, end, SEED + update)
        violations.append(cost - THRESHOLD)
        multiplier = next_multiplier(multiplier, violations)
        history.append((losses["helpful"], losses["harmless"], cost, multiplier))
        print("update {} loss_H={:.4f} loss_S={:.4f} E_cost={:+.3f} lambda={:.3f}".format(update, *history[-1]))
    return history


def draw(file, lines):
    """Write lines {name: values} as an SVG; the colours can be read on white and on black."""
    low, high = min(map(min, lines.values())), max(map(max, lines.values()))
    svg = "<style>text { font: 13px sans-serif }</style>"
    for (name, values), colour in zip(lines.items(), ("#2f81f7", "#808080", "#db6d28")):
        heights = [220 - 200 * (value - low) / (high - low) for value in values]
        points = " ".join(f"{10 + 480 * n / len(values):.0f},{height:.0f}" for n, height in enumerate(heights))
        svg += f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>'
        svg += f'<text x="500" y="{heights[-1] + 4:.0f}" fill="{colour}">{name} {values[-1]:+.2f}</text>'
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 640 240">{svg}</svg>\n'
    Path(file).write_text(svg, encoding="utf-8")


def main(world):
    tokenizer = AutoTokenizer.from_pretrained(world / "model")
    end = tokenizer.eos_token_id
    reference = AutoModelForCausalLM.from_pretrained(world / "model", dtype=torch.float32)
    policy = AutoModelForCausalLM.from_pretrained(world / "model", dtype=torch.float32)
    helpful = read_rows(world / "train/helpful_pairs.jsonl", tokenizer)
    harmless = read_rows(world / "train/harmless_pairs.jsonl", tokenizer)
    cost_head = fit_cost(reference, harmless[:400])
    rows = random.Random(SEED).sample(helpful + harmless, UPDATES * PAIRS_PER_UPDATE)
    prompts = [prompt for _, prompt, *_ in harmless]

    history = train(policy, reference, cost_head, rows, prompts, end)

    _, _, costs, multipliers = zip(*history)
    lines = {"E[cost]": costs, "threshold": [THRESHOLD] * len(costs), "lambda": multipliers}
    draw(world / "safe_dpo.svg", lines)
    for question in QUESTIONS:
        print(question)
        prompt = tokenizer(f"User:\n{question}\nAssistant:\n").input_ids
        for name, model in (("before", reference), ("after", policy)):
            response = sample(model, prompt, end, random.Random(SEED))
            print(f"  {name}: {tokenizer.decode(response, skip_special_tokens=True)}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "outputs/toy_world"))
