"""Direct Preference Optimization: a model learns to prefer the chosen response of each pair over the rejected one.

    loss = -logsigmoid(beta * h)                                                        arXiv:2305.18290 Eq. 7
    h = [log pi(chosen|x) - log ref(chosen|x)] - [log pi(rejected|x) - log ref(rejected|x)]

pi is the policy, which learns; ref is the reference, the model that it starts from.  At first they are the same:
h is 0 and the loss is ln 2 = 0.6931.

    python lessons/dpo.py outputs/toy_world
"""

import json
import math
import random
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

BETA = 1.0  # larger: stay closer to the reference
LEARNING_RATE = 1e-3
UPDATES, PAIRS_PER_UPDATE = 50, 16
RANK, ALPHA = 16, 32  # of LoRA: in how many directions a layer may change, and how strongly
SEED = 42
QUESTIONS = "How do I move an old clock?", "How do I hack the demo page?", "How do I loot a parked truck?"


class LoRALinear(nn.Module):
    """y = W x + alpha/r B A x, arXiv:2106.09685.  W is frozen; A is random, B is zero: at first nothing changes."""

    def __init__(self, linear):
        super().__init__()
        self.linear = linear
        self.A = nn.Parameter(torch.empty(RANK, linear.in_features))
        self.B = nn.Parameter(torch.zeros(linear.out_features, RANK))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def forward(self, x):
        return self.linear(x) + ALPHA / RANK * (x @ self.A.T @ self.B.T)


def add_lora(model):
    """Freeze a model and put a LoRALinear in the place of every linear layer of its blocks; what there is to learn."""
    model.requires_grad_(False)
    for module in list(model.model.layers.modules()):
        for name, layer in list(module.named_children()):
            if isinstance(layer, nn.Linear):
                setattr(module, name, LoRALinear(layer))
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def read_pairs(file, tokenizer):
    """[(prompt, chosen, rejected)], each a list of token ids.  A response ends in the end token, which counts too."""
    pairs = []
    for line in Path(file).read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        prompt = tokenizer(row["prompt"]).input_ids
        chosen = tokenizer(row["prompt"] + row["chosen_response"]).input_ids[len(prompt) :]
        rejected = tokenizer(row["prompt"] + row["rejected_response"]).input_ids[len(prompt) :]
        pairs.append((prompt, chosen + [tokenizer.eos_token_id], rejected + [tokenizer.eos_token_id]))
    return pairs


def log_prob(model, prompt, response):
    """log pi(response | prompt): a sum over the tokens of the response, each given all that stands before it."""
    ids = torch.tensor([prompt + response])
    logits = model(ids).logits[0, len(prompt) - 1 : -1]  # the logits at one place are about the next token
    return logits.log_softmax(-1).gather(1, ids[0, len(prompt) :, None]).sum()


def log_ratio(policy, reference, prompt, response):
    """log pi(response | prompt) - log ref(response | prompt): how much likelier the response has become, in nats."""
    return log_prob(policy, prompt, response) - log_prob(reference, prompt, response)


def train(policy, reference, parameters, pairs):
    """One pass over the pairs; of each update the means [loss, log-ratio of chosen, of rejected], before its step."""
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0)
    history = []
    for start in range(0, len(pairs), PAIRS_PER_UPDATE):
        batch, sums = pairs[start : start + PAIRS_PER_UPDATE], torch.zeros(3)
        optimizer.zero_grad()
        for prompt, chosen, rejected in batch:
            chosen = log_ratio(policy, reference, prompt, chosen)
            rejected = log_ratio(policy, reference, prompt, rejected)
            loss = -F.logsigmoid(BETA * (chosen - rejected))
            (loss / len(batch)).backward()  # the gradients of a batch add up
            sums += torch.stack((loss, chosen, rejected)).detach()
        optimizer.step()
        history.append((sums / len(batch)).tolist())
        print("update {} loss={:.4f} chosen={:+.2f} rejected={:+.2f}".format(len(history), *history[-1]))
    return history


@torch.no_grad()
def answer(model, tokenizer, question):
    """A response drawn from the model, token by token."""
    inputs = tokenizer(f"User:\n{question}\nAssistant:\n", return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=40, do_sample=True, top_k=0)
    return tokenizer.decode(output[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)


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
    torch.manual_seed(SEED)
    parameters = add_lora(policy)
    pairs = read_pairs(world / "train/helpful_pairs.jsonl", tokenizer)
    random.Random(SEED).shuffle(pairs)

    history = train(policy, reference, parameters, pairs[: UPDATES * PAIRS_PER_UPDATE])

    _, chosen, rejected = zip(*history)
    draw(world / "dpo.svg", {"chosen": chosen, "reference": [0.0] * len(chosen), "rejected": rejected})
    held_out = read_pairs(world / "test/helpful_pairs.jsonl", tokenizer)
    with torch.no_grad():
        right = sum(log_ratio(policy, reference, x, c) > log_ratio(policy, reference, x, r) for x, c, r in held_out)
    print(f"of {len(held_out)} held-out pairs the policy has learned to prefer chosen in {right}")
    for question in QUESTIONS:
        print(question)
        for name, model in (("before", reference), ("after", policy)):
            torch.manual_seed(8)  # the same draws for both
            print(f"  {name}: {answer(model, tokenizer, question)}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "outputs/toy_world"))
