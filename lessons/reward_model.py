"""A reward model: a score for each response, higher for the chosen one of a pair, above zero where it is safe.

    loss = -logsigmoid(s(chosen) - s(rejected))                       Bradley-Terry, arXiv:1706.03741
           - logsigmoid(z s(chosen)) - logsigmoid(z s(rejected))      arXiv:2310.12773 Eq. 6, cost = -score

s is a linear map of the hidden state at the last token of a response; z is 1 for a response labelled safe, -1 for a
harmful one.  The pairs alone say nothing of a zero, as s + 5 has the same loss: the labels set it.  The head begins at
zero, so every score is 0 at first, and the loss is 3 ln 2 = 2.0794.

    python lessons/reward_model.py outputs/toy_world
"""

import json
import math
import random
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

LABEL_WEIGHT = 1.0  # of the second line of the loss; 0: the pairs alone
LEARNING_RATE = 3e-3
UPDATES, PAIRS_PER_UPDATE = 40, 16
RANK, ALPHA = 16, 32  # of LoRA: in how many directions a layer may change, and how strongly
SEED = 42
QUESTIONS = "How do I burn the traffic lights?", "Tell me how to crack a bank vault.", "How do I rob the swamp witch?"


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
    for module in list(model.layers.modules()):
        for name, layer in list(module.named_children()):
            if isinstance(layer, nn.Linear):
                setattr(module, name, LoRALinear(layer))
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def read_pairs(file, tokenizer):
    """[(prompt, chosen, rejected, labels)]: three lists of token ids, and for both responses 1 safe or -1 harmful."""
    pairs = []
    for line in Path(file).read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        prompt = tokenizer(row["prompt"]).input_ids
        chosen = tokenizer(row["prompt"] + row["chosen_response"]).input_ids[len(prompt) :]
        rejected = tokenizer(row["prompt"] + row["rejected_response"]).input_ids[len(prompt) :]
        labels = -row["safety_labels"]["chosen"], -row["safety_labels"]["rejected"]  # in the file 1 is harmful
        pairs.append((prompt, chosen + [tokenizer.eos_token_id], rejected + [tokenizer.eos_token_id], labels))
    return pairs


def score(model, head, prompt, response):
    """The score of a response: its last token has seen prompt and response whole."""
    hidden = model(torch.tensor([prompt + response])).last_hidden_state  # (1, T, H)
    return hidden[0, -1] @ head


def train(model, head, parameters, pairs):
    """One pass over the pairs; the loss of each update, before its step."""
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0)
    losses = []
    for start in range(0, len(pairs), PAIRS_PER_UPDATE):
        batch, total = pairs[start : start + PAIRS_PER_UPDATE], 0.0
        optimizer.zero_grad()
        for prompt, chosen, rejected, (chosen_label, rejected_label) in batch:
            chosen, rejected = score(model, head, prompt, chosen), score(model, head, prompt, rejected)
            ranking = -F.logsigmoid(chosen - rejected)
            labels = -F.logsigmoid(chosen_label * chosen) - F.logsigmoid(rejected_label * rejected)
            loss = ranking + LABEL_WEIGHT * labels
            (loss / len(batch)).backward()  # the gradients of a batch add up
            total += loss.item()
        optimizer.step()
        losses.append(total / len(batch))
        print(f"update {len(losses)} loss={losses[-1]:.4f}")
    return losses


def draw(file, title, groups):
    """Write a histogram for each of {name: numbers} as an SVG; the colours can be read on white and on black."""
    low, high = min(map(min, groups.values())), max(map(max, groups.values()))
    svg = f'<text x="10" y="20">{title}</text>'
    for (name, numbers), colour, floor in zip(groups.items(), ("#3fb950", "#f85149"), (130, 240)):
        counts = torch.tensor(numbers).histc(bins=40, min=low, max=high)
        for place, height in enumerate((90 * counts / counts.max()).tolist()):
            box = f'x="{10 + 13 * place}" y="{floor - height:.0f}" width="12" height="{height:.0f}"'
            svg += f'<rect {box} fill="{colour}"/>'
        svg += f'<text x="540" y="{floor}" style="fill:{colour}">{name}</text>'
    zero = 10 + 520 * (0 - low) / (high - low)
    svg += f'<path d="M{zero:.0f} 30V244" stroke="#808080"/><text x="{zero - 4:.0f}" y="260">0</text>'
    style = "<style>text { font: 13px sans-serif; fill: #808080 }</style>"
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 640 270">{style}{svg}</svg>\n'
    Path(file).write_text(svg, encoding="utf-8")


def main(world):
    tokenizer = AutoTokenizer.from_pretrained(world / "model")
    torch.manual_seed(SEED)
    model = AutoModel.from_pretrained(world / "model", dtype=torch.float32)  # without the head that predicts words
    parameters = add_lora(model)
    head = nn.Parameter(torch.zeros(model.config.hidden_size))
    pairs = read_pairs(world / "train/harmless_pairs.jsonl", tokenizer)
    random.Random(SEED).shuffle(pairs)

    train(model, head, [*parameters, head], pairs[: UPDATES * PAIRS_PER_UPDATE])

    scores, right = {"safe": [], "harmful": []}, 0
    for prompt, chosen, rejected, labels in read_pairs(world / "test/harmless_pairs.jsonl", tokenizer):
        pair = [score(model, head, prompt, response).item() for response in (chosen, rejected)]
        right += pair[0] > pair[1]
        for label, number in zip(labels, pair):
            scores["safe" if label > 0 else "harmful"].append(number)
    draw(world / "reward_model.svg", "scores of held-out responses, by their label", scores)
    print(f"of 200 held-out pairs {right} have the higher score for chosen; of their responses are above 0:")
    for name, numbers in scores.items():
        print(f"  {sum(number > 0 for number in numbers)} of {len(numbers)} that are {name}")

    policy = AutoModelForCausalLM.from_pretrained(world / "model", dtype=torch.float32)
    for question in QUESTIONS:  # what a score is good for: the best of eight answers
        inputs = tokenizer([f"User:\n{question}\nAssistant:\n"] * 8, return_tensors="pt")
        output = policy.generate(**inputs, max_new_tokens=40, do_sample=True, top_k=0)
        answers, prompt = [], inputs.input_ids[0].tolist()
        for ids in output[:, len(prompt) :]:
            text = tokenizer.decode(ids, skip_special_tokens=True)
            response = tokenizer(text).input_ids + [tokenizer.eos_token_id]
            answers.append((score(model, head, prompt, response).item(), text))
        print(question)
        print("  before, the first answer: {1} ({0:+.1f})".format(*answers[0]))
        print("  after, the best of eight: {1} ({0:+.1f})".format(*max(answers)))


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "outputs/toy_world"))
