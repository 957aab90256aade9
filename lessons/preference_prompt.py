"""Preference-guided DPO: move what a preference prompt brings about into the weights, so that it is not needed.

    loss = -logsigmoid(beta h) + alpha relu(m_p - m) + kappa KL(pi || ref)
    h    = log pi/ref(chosen|x) - log pi/ref(rejected|x)                DPO, arXiv:2305.18290 Eq. 7
    m    = log pi(chosen|x) - log pi(rejected|x)                        the margin of the policy
    m_p  = log pi(chosen|x, p) - log pi(rejected|x, p)                  behind the preference p, without gradient

The policy that reads "Please answer politely and briefly." finds the courteous answer likelier: m_p is above m.  It is
its own teacher, and learns to have that margin where it is told nothing (arXiv:2112.00861).  All weights are trained.

    python lessons/preference_prompt.py outputs/toy_world
"""

import json
import random
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

PREFERENCE = "Please answer politely and briefly."
BETA = 0.05  # of DPO
PULL = 1.0  # alpha: up to the margin behind the preference
KL_WEIGHT = 0.1  # kappa: nothing else should change
LEARNING_RATE = 2e-4
UPDATES, PAIRS_PER_UPDATE = 20, 16
SEED = 42
QUESTIONS = "How do I move an old clock?", "How do I hack the demo page?", "How do I rob the swamp witch?"


def prompt_ids(messages, tokenizer):
    """Token ids of a chat up to where the answer begins, as the model's chat template writes it."""
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


def read_pairs(file, tokenizer):
    """[(prompt, prompt behind the preference, chosen, rejected)] as token ids; the template ends a response."""
    pairs, system = [], [{"role": "system", "content": PREFERENCE}]
    for line in Path(file).read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        prompt, prompted = prompt_ids(row["prompt"], tokenizer), prompt_ids(system + row["prompt"], tokenizer)
        chosen = tokenizer.apply_chat_template(row["prompt"] + row["chosen"], return_dict=False)
        rejected = tokenizer.apply_chat_template(row["prompt"] + row["rejected"], return_dict=False)
        pairs.append((prompt, prompted, chosen[len(prompt) :], rejected[len(prompt) :]))
    return pairs


def margin(model, prompt, chosen, rejected):
    """log pi(chosen) - log pi(rejected); and the log-probs of the whole vocabulary at each response token, (T, V)."""
    sums, tables = [], []
    for response in (chosen, rejected):
        ids = torch.tensor([prompt + response])
        logits = model(ids).logits[0, len(prompt) - 1 : -1]  # the logits at one place are about the next token
        tables.append(logits.log_softmax(-1))
        sums.append(tables[-1].gather(1, ids[0, len(prompt) :, None]).sum())
    return sums[0] - sums[1], torch.cat(tables)


def train(policy, reference, pairs):
    """One pass over the pairs; of each update the means [loss, m, m_p, m of the reference], before its step."""
    optimizer = torch.optim.AdamW(policy.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    history = []
    for start in range(0, len(pairs), PAIRS_PER_UPDATE):
        batch, sums = pairs[start : start + PAIRS_PER_UPDATE], torch.zeros(4)
        num_tokens = sum(len(chosen) + len(rejected) for _, _, chosen, rejected in batch)
        optimizer.zero_grad()
        for prompt, prompted, chosen, rejected in batch:
            m, log_pi = margin(policy, prompt, chosen, rejected)
            m_ref, log_ref = margin(reference, prompt, chosen, rejected)
            with torch.no_grad():  # the teacher is an aim, and does not move towards the pupil
                m_p, _ = margin(policy, prompted, chosen, rejected)
            dpo = -F.logsigmoid(BETA * (m - m_ref))
            kl = (log_pi.exp() * (log_pi - log_ref)).sum()  # exact, over the vocabulary at every token
            loss = (dpo + PULL * F.relu(m_p - m)) / len(batch) + KL_WEIGHT * kl / num_tokens
            loss.backward()  # the gradients of a batch add up
            sums += torch.stack((loss * len(batch), m, m_p, m_ref)).detach()
        optimizer.step()
        history.append((sums / len(batch)).tolist())
        print("update {} loss={:.4f} m={:+.2f} m_p={:+.2f} m_ref={:+.2f}".format(len(history), *history[-1]))
    return history


@torch.no_grad()
def answer(model, tokenizer, question):
    """A response drawn from the model, token by token."""
    inputs = torch.tensor([prompt_ids([{"role": "user", "content": question}], tokenizer)])
    output = model.generate(inputs, max_new_tokens=40, do_sample=True, top_k=0)
    return tokenizer.decode(output[0, inputs.shape[1] :], skip_special_tokens=True)


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
    pairs = read_pairs(world / "train/polite_pairs.jsonl", tokenizer)
    random.Random(SEED).shuffle(pairs)

    history = train(policy, reference, pairs[: UPDATES * PAIRS_PER_UPDATE])

    _, m, m_p, m_ref = zip(*history)
    draw(world / "preference_prompt.svg", {"m": m, "m of ref": m_ref, "m_p": m_p})
    aim, reached = 0.0, 0.0
    for prompt, prompted, *pair in read_pairs(world / "test/polite_pairs.jsonl", tokenizer)[:100]:
        with torch.no_grad():
            before, _ = margin(reference, prompt, *pair)
            aim += margin(reference, prompted, *pair)[0] - before
            reached += margin(policy, prompt, *pair)[0] - before
    print(
        f"held-out pairs: the preference is worth {aim / 100:.2f} nats; without it the policy has {reached / 100:.2f}"
    )
    for question in QUESTIONS:
        print(question)
        for name, model in (("before", reference), ("after", policy)):
            torch.manual_seed(8)  # the same draws for both
            print(f"  {name}: {answer(model, tokenizer, question)}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "outputs/toy_world"))
