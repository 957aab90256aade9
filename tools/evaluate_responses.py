"""What a policy says to the prompts, and what models say of that: log-probs, KL to the base, scores."""

import hashlib
import json
from pathlib import Path

import torch

import lora
from harness import score_cache
from harness.flags import NonFinite
from packed_model import logps_of
from packing import digests, pack, passes
from reward_models import as_pairs
from sampling import response_text, sample
from tools import models
from tools.evaluate_report import SAMPLED, adapter_sha256
from tools.generate_output import BatchFile, OutputError

SAMPLING = "num_responses max_new_tokens temperature top_p batch_size seed".split()  # flags that responses depend on


class Kept:
    """Responses as they are sampled, in OUTPUT_DIR/sampled.jsonl until the report is there: the same command goes on
    behind those of an evaluation that was killed.

    policies: those of the report.
    """

    def __init__(self, args, model, policies, prompts, dtype, say):
        depends_on = [getattr(args, name) for name in SAMPLING] + [str(dtype), model.device.type]
        depends_on += [[[*prompt.ids, *digests(prompt)] for prompt in prompts], score_cache.frozen_sha256(model)]
        depends_on += [adapter_sha256(model, policy.adapter) for policy in policies if policy.adapter]
        identity = {"responses": hashlib.sha256(json.dumps(depends_on).encode()).hexdigest()}
        self.file = BatchFile(Path(args.output_dir) / SAMPLED)
        try:
            self.file.check(identity)
        except OutputError:
            say(f"{self.file.path} is of another evaluation that was killed, or was changed: it begins anew")
            self.file = BatchFile(self.file.path, overwrite=True)
        self.progress = self.file.begin(identity)
        lines = self.file.path.read_text(encoding="utf-8").splitlines()
        self.before = [json.loads(line)["ids"] for line in lines]
        if self.before:
            say(f"{self.file.path}: going on behind {len(self.before):,} responses")

    def take(self, number):
        """The next responses of the evaluation before; None where it had no more."""
        taken, self.before = self.before[:number], self.before[number:]
        return taken or None

    def add(self, responses):
        self.file.write([{"ids": ids} for ids in responses], self.progress, finished=False)

    def note_saving(self):
        """From here on the report's files are of this evaluation."""
        self.file.write([], self.progress | {"saving": True}, finished=False)

    def remove(self):
        for path in (self.file.path, self.file.record):
            path.unlink()


@torch.no_grad()
def sampled(model, tokenizer, adapter, prompts, args, kept, bar):
    """Responses (ids) of one policy, args.num_responses to each prompt in turn; adapter None: the base.  All that are
    sampled go to `kept`, and those that are there already are taken.
    """
    asked, responses = [prompt for prompt in prompts for _ in range(args.num_responses)], []
    with lora.use_adapter(model, adapter):
        for batch in passes(asked, args.batch_size):
            draws = range(len(responses), len(responses) + len(batch))  # the same for each policy, where they agree
            settings = args.max_new_tokens, args.seed, args.temperature, args.top_p, draws
            new = kept.take(len(batch))
            if new is None:
                ids, pictures = [prompt.ids for prompt in batch], [prompt.pictures for prompt in batch]
                new = sample(model, tokenizer, ids, *settings, pictures=pictures)
                kept.add(new)
            responses += new
            bar.update(len(batch))
    return responses


def measured(model, adapter, judges, prompts, responses, ends, args):
    """Numbers of one policy's responses {name: [one for each]}: log-probs under policy and base and the KL of the two,
    summed over its tokens (nats), and the scores of `judges` {name: RewardModel}.  Raises NonFinite.

    Log-probs are of the tokens as they were sampled, scores of the response with the end that is trained.
    """
    groups = passes(responses, args.num_responses)
    numbers = log_probs(model, adapter, prompts, groups, args.batch_size)
    for name, judge in judges.items():
        numbers[name] = models.scores(judge, prompts, groups, ends, args.batch_size)
    return numbers


@torch.no_grad()
def log_probs(model, adapter, prompts, responses, batch_size):
    """{"logp", "base_logp", "kl"}, a list each; responses: for each prompt a list of responses (ids)."""
    pairs, places = as_pairs(prompts, responses)
    by_pair = {name: torch.zeros(2, len(pairs), dtype=torch.float64) for name in ("logp", "base_logp", "kl")}
    for indices in passes(range(len(pairs)), batch_size):
        batch = pack([pairs[i] for i in indices], model.device)
        with lora.use_adapter(model, None):
            reference = model.response_states(batch)
            base_logps = logps_of(batch, *reference)
        if adapter is None:
            logps, kl = base_logps, [torch.zeros_like(side) for side in base_logps]
        else:
            with lora.use_adapter(model, adapter):
                *logps, chosen_kl, rejected_kl = model.packed_logps(batch, reference)
                kl = chosen_kl, rejected_kl
        for name, sides in (("logp", logps), ("base_logp", base_logps), ("kl", kl)):
            by_pair[name][:, indices] = torch.stack(tuple(sides)).cpu().double()
    if not all(numbers.isfinite().all() for numbers in by_pair.values()):
        raise NonFinite("a model gives numbers that are not finite: try --dtype fp32, or look for broken weights")
    return {
        name: [numbers[side, pair].item() for group in places for side, pair in group]
        for name, numbers in by_pair.items()
    }


def response_rows(name, prompts, responses, numbers, tokenizer, ends):
    """A row per response: who said what to which prompt, and the numbers of `measured`."""
    groups, rows = passes(responses, len(responses) // len(prompts)), []
    for prompt_index, (prompt, group) in enumerate(zip(prompts, groups, strict=True)):
        for response_index, ids in enumerate(group):
            row = {"policy": name, "prompt_index": prompt_index, "response_index": response_index}
            row |= {"category": prompt.fields["category"], "prompt": prompt.text}
            row |= {"response": response_text(prompt.ids, ids, ends, tokenizer), "tokens": len(ids)}
            row["finished"] = ids[-1] in ends
            rows.append(row)
    for field, values in numbers.items():
        for row, value in zip(rows, values, strict=True):
            row[field] = value
    return rows
