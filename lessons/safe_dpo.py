"""Safe DPO: learn to be helpful and to be harmless at once, with the expected cost held below a threshold.

    loss = (loss_H + lambda loss_S) / (1 + lambda)     DPO, arXiv:2305.18290 Eq. 7, on helpful and on harmless pairs
    log lambda += rate lambda (E[cost] - threshold)    a Lagrange multiplier, arXiv:2310.12773

While answers cost more than they may, lambda grows, and with it the weight of the harmless pairs.  E[cost] is of the
policy's own answers: every few updates some are sampled and a cost model says what they cost, about 1 where harmful and
-1 where safe.  All weights are trained, without LoRA (dpo.py has it).

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

BETA, LEARNING_RATE = 1.0, 3e-4
UPDATES, PAIRS_PER_UPDATE = 40, 16
THRESHOLD = -0.4  # of E[cost]: about seven answers in ten are safe
LAMBDA_RATE, LAMBDA_MAX = 0.05, 10.0
COST_EVERY, MAX_TOKENS, SEED = 8, 32, 7  # updates between two samples; tokens of a sampled response
QUESTIONS = "How do I burn the traffic lights?", "How do I crack a bank vault?", "How do I move an old clock?"


def read_rows(file, tokenizer):
    """[(kind, prompt, chosen, rejected, labels)]: helpful or harmless; token ids; of both, 1 harmful or -1 safe."""
    rows, end = [], tokenizer.eos_token_id
    for line in Path(file).read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        prompt = tokenizer(row["prompt"]).input_ids
        chosen = tokenizer(row["prompt"] + row["chosen_response"]).input_ids[len(prompt) :] + [end]
        rejected = tokenizer(row["prompt"] + row["rejected_response"]).input_ids[len(prompt) :] + [end]
        rows.append((row["dimension"], prompt, chosen, rejected, row["safety_labels"]))
    return rows


def log_prob(model, prompt, response):
    """log pi(response | prompt): a sum over the tokens of the response, each given all that stands before it."""
    ids = torch.tensor([prompt + response])
    logits = model(ids).logits[0, len(prompt) - 1 : -1]  # the logits at one place are about the next token
    return logits.log_softmax(-1).gather(1, ids[0, len(prompt) :, None]).sum()


def last_hidden(model, prompt, response):
    """The hidden state at the last token, (H,): that token has seen prompt and response whole."""
    return model.model(torch.tensor([prompt + response])).last_hidden_state[0, -1]


def fit_cost(reference, rows):
    """The cost model, (H,): cost = last_hidden @ it, as close to the labels of harm as least squares come."""
    hidden, labels = [], []
    for _, prompt, chosen, rejected, label in rows:
        hidden += [last_hidden(reference, prompt, chosen), last_hidden(reference, prompt, rejected)]
        labels += [float(label["chosen"]), float(label["rejected"])]
    return torch.linalg.lstsq(torch.stack(hidden), torch.tensor(labels)).solution


@torch.no_grad()
def sample(model, prompt, end, draws):
    """A response from the model; its next token is the first at which the probabilities add up to a random number."""
    response = []
    while len(response) < MAX_TOKENS and end not in response:
        probabilities = model(torch.tensor([prompt + response])).logits[0, -1].softmax(-1)
        sums = probabilities.double().cumsum(-1)
        response.append(torch.searchsorted(sums, draws.random() * sums[-1], right=True).item())
    return response


def expected_cost(policy, reference, cost_head, prompts, end, seed, responses=2):
    """E[cost] under the policy as it is now: the mean over some responses to each of some prompts."""
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(seed)).tolist()
    total = 0.0
    for n in range(responses * PAIRS_PER_UPDATE):
        prompt = prompts[order[n // responses]]
        response = sample(policy, prompt, end, random.Random(f"{seed} {n}"))
        total += (last_hidden(reference, prompt, response) @ cost_head).item()
    return total / (responses * PAIRS_PER_UPDATE)


def next_multiplier(multiplier, violations):
    """lambda after one more update: a step of its logarithm along E[cost] - threshold, the latest weighing most."""
    weights = [0.95**age for age in range(len(violations))][::-1]
    violation = sum(weight * value for weight, value in zip(weights, violations)) / sum(weights)
    return min(math.exp(math.log(multiplier) + LAMBDA_RATE * multiplier * violation), LAMBDA_MAX)


def train(policy, reference, cost_head, rows, prompts, end):
    """One pass over the rows; of each update (loss_H, loss_S, E[cost], lambda), the losses before its step."""
    optimizer = torch.optim.AdamW(policy.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    multiplier, cost = 1.0, expected_cost(policy, reference, cost_head, prompts, end, SEED, responses=8)
    history, violations = [], []
    for update in range(1, len(rows) // PAIRS_PER_UPDATE + 1):
        batch = rows[(update - 1) * PAIRS_PER_UPDATE : update * PAIRS_PER_UPDATE]
        losses = {"helpful": torch.zeros(()), "harmless": torch.zeros(())}
        counts = Counter(kind for kind, *_ in batch)
        for kind, prompt, chosen, rejected, _ in batch:
            ref_margin = log_prob(reference, prompt, chosen) - log_prob(reference, prompt, rejected)
            margin = log_prob(policy, prompt, chosen) - log_prob(policy, prompt, rejected)
            losses[kind] = losses[kind] - F.logsigmoid(BETA * (margin - ref_margin)) / counts[kind]
        optimizer.zero_grad()
        ((losses["helpful"] + multiplier * losses["harmless"]) / (1 + multiplier)).backward()
        optimizer.step()
        if update % COST_EVERY == 0:
            cost = expected_cost(policy, reference, cost_head, prompts, end, SEED + update)
        violations.append(cost - THRESHOLD)
        multiplier = next_multiplier(multiplier, violations)
        history.append((losses["helpful"].item(), losses["harmless"].item(), cost, multiplier))
        print("update {} loss_H={:.4f} loss_S={:.4f} E_cost={:+.3f} lambda={:.3f}".format(update, *history[-1]))
    return history


def draw(file, lines):
    """Write lines {name: values} as an SVG; the colours can be read on white and on black."""
    low, high = min(map(min, lines.values())), max(map(max, lines.values()))
    svg = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 640 240" font-family="sans-serif" font-size="13">'
    for (name, values), colour in zip(lines.items(), ("#2f81f7", "#808080", "#db6d28")):
        heights = [220 - 200 * (value - low) / (high - low or 1) for value in values]
        points = " ".join(f"{10 + 480 * n / len(values):.0f},{height:.0f}" for n, height in enumerate(heights))
        svg += f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>'
        svg += f'<text x="500" y="{heights[-1] + 4:.0f}" fill="{colour}">{name} {values[-1]:+.2f}</text>'
    Path(file).write_text(svg + "</svg>\n", encoding="utf-8")


def main(world):
    tokenizer = AutoTokenizer.from_pretrained(world / "model")
    reference = AutoModelForCausalLM.from_pretrained(world / "model", dtype=torch.float32).requires_grad_(False)
    policy = AutoModelForCausalLM.from_pretrained(world / "model", dtype=torch.float32)
    helpful = read_rows(world / "train/helpful_pairs.jsonl", tokenizer)
    harmless = read_rows(world / "train/harmless_pairs.jsonl", tokenizer)
    rows = random.Random(SEED).sample(helpful + harmless, UPDATES * PAIRS_PER_UPDATE)
    prompts, end = [prompt for _, prompt, *_ in harmless], tokenizer.eos_token_id
    _, _, costs, multipliers = zip(*train(policy, reference, fit_cost(reference, harmless[:400]), rows, prompts, end))
    draw(world / "safe_dpo.svg", {"E[cost]": costs, "threshold": [THRESHOLD] * len(costs), "lambda": multipliers})
    for question in QUESTIONS:
        print(question)
        prompt = tokenizer(f"User:\n{question}\nAssistant:\n").input_ids
        for name, model in (("before", reference), ("after", policy)):
            response = sample(model, prompt, end, random.Random(SEED))  # the same draws for both
            print(f"  {name}: {tokenizer.decode(response, skip_special_tokens=True)}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "outputs/toy_world"))
