"""What two trained reward models know of Anthropic's HH pairs, beside baselines that see nothing but words or lengths.

The files are HH's two test sets, helpful-base and harmless-base, split by prompt: md5 of a prompt modulo 100 below 80
trains, the rest tests.

    python benchmarks/reward_models_on_hh.py --split helpful-base-test.jsonl.gz harmless-base-test.jsonl.gz hh
    python train_rm.py --task helpful --model BASE --output-dir helpful_rm --learning-rate 2e-4 \\
        --train-helpful-path hh/helpful_train.jsonl --val-helpful-path hh/helpful_test.jsonl    # harmless likewise
    python benchmarks/reward_models_on_hh.py --model BASE --helpful-rm helpful_rm --harmless-rm harmless_rm \\
        --helpful-train hh/helpful_train.jsonl --helpful-test hh/helpful_test.jsonl \\
        --harmless-train hh/harmless_train.jsonl --harmless-test hh/harmless_test.jsonl

Accuracy: pairs whose chosen response scores higher, a tie counts half; with 95 % intervals, by resampling prompts.  All
scorers see what train_rm.py's --max-length leaves.  Bigrams: Bradley-Terry (arXiv:1706.03741), linear in log(1 + count)
of hashed words and pairs of words.  Length: more tokens are better, or fewer, whichever holds more often in training.
"""

import hashlib
import itertools
import json
import math
import re
import sys
import zlib
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the scripts lie one folder up

import torch
import torch.nn.functional as F

import distributed
import lora
from formats.model_files import load_model, load_tokenizer
from formats.row_files import DataError, Malformed, Unusable, parse_row, read_rows
from formats.row_shapes import chosen_and_rejected
from harness import device, endings, flags
from packed_model import prepare_scores
from packing import hold_out, pack, passes
from preference_data import load_pairs

TASKS = "helpful", "harmless"
LENGTHS = 512, 256  # train_rm.py's --max-length and --max-prompt-length
PASS_TOKENS, BUCKETS, PENALTIES = 2048, 2**18, (1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001)


def get_args(argv=None):
    parser = flags.Parser(__doc__)
    add, count = parser.add_argument, flags.number(int, least=0)
    needed = "--split" not in (sys.argv if argv is None else argv)
    add("--model", required=needed, metavar="BASE", help="base of both reward models: folder or hub id")
    for task in TASKS:
        add(f"--{task}-rm", required=needed, metavar="DIR", help=f"adapter of train_rm.py --task {task}")
        add(f"--{task}-train", required=needed, metavar="FILE", help="its pairs, which the baselines learn from too")
        add(f"--{task}-test", required=needed, metavar="FILE", help="pairs it has not seen")
    add("--seed", type=count, default=0, metavar="N", help="of the prompts that choose the L2, and of the resampling")
    add("--bootstrap", type=flags.number(int, least=1), default=2000, metavar="N", help="resamplings per interval")
    add("--num-samples", type=count, default=0, metavar="N", help="rows to read of each file; 0: all")
    add("--split", nargs=3, metavar=("HELPFUL", "HARMLESS", "OUT_DIR"), help="only make the four files in OUT_DIR")
    return parser.parse_args(argv)


def part_of(prompt):
    """The part that a prompt belongs to, about 80 % train, by its text alone."""
    return "train" if int(hashlib.md5(prompt.strip().encode()).hexdigest(), 16) % 100 < 80 else "test"


def split(source, task, folder):
    """Write TASK_train.jsonl and TASK_test.jsonl of one of HH's two files.  Raises DataError."""
    lines = {"train": [], "test": []}
    for where, row in read_rows(source):
        try:
            prompt, chosen, rejected = chosen_and_rejected(parse_row(row))
        except Unusable:  # two prompts
            continue
        except (Malformed, KeyError) as problem:
            raise DataError(f"{where}: {problem}; a row of HH has two transcripts, chosen and rejected") from None
        row = {"prompt": prompt, "chosen_response": chosen, "rejected_response": rejected, "dimension": task}
        lines[part_of(prompt)].append(json.dumps(row) + "\n")
    Path(folder).mkdir(parents=True, exist_ok=True)
    for part, rows in lines.items():
        (Path(folder) / f"{task}_{part}.jsonl").write_text("".join(rows), encoding="utf-8")
        print(f"{folder}/{task}_{part}.jsonl: {len(rows):,} rows")


@torch.no_grad()
def reward_margins(model, pairs):
    """Margins (N,) of the reward model whose adapter and head are on."""
    lengths, margins = [sum(map(len, pair[:3])) for pair in pairs], torch.zeros(len(pairs), dtype=torch.float64)
    for indices in passes(range(len(pairs)), 0, lengths, PASS_TOKENS):
        chosen, rejected = model.packed_scores(pack([pairs[i] for i in indices], model.device))
        margins[indices] = (chosen - rejected).cpu().double()
    return margins


def bigrams(text):
    """{bucket: log(1 + count)} of words, signs and neighbours; by crc32: Python's own hash is new in every process."""
    words = re.findall(r"\w+|[^\w\s]", text.lower())
    counts = Counter(zlib.crc32(gram.encode()) % BUCKETS for gram in [*words, *map(" ".join, zip(words, words[1:]))])
    return {bucket: math.log1p(count) for bucket, count in counts.items()}


def bigram_features(texts):
    """N (chosen, rejected) texts -> their differences: buckets (M,), values (M,), where in them a pair begins (N,)."""
    buckets, values, begins = [], [], []
    for chosen, rejected in (map(bigrams, two) for two in texts):
        begins.append(len(buckets))
        buckets += chosen | rejected
        values += [chosen.get(bucket, 0.0) - rejected.get(bucket, 0.0) for bucket in chosen | rejected]
    return torch.tensor(buckets), torch.tensor(values, dtype=torch.float64), torch.tensor(begins)


def linear_margins(features, weights):
    """bigram_features of N pairs, weights (BUCKETS,) -> margins (N,)."""
    buckets, values, begins = features
    return F.embedding_bag(buckets, weights[:, None], begins, per_sample_weights=values, mode="sum")[:, 0]


def bradley_terry(features, penalty):
    """The weights (BUCKETS,) with the least mean of -logsigmoid(margin), + penalty / 2 * |weights|^2."""
    weights = torch.zeros(BUCKETS, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=200, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        total = -F.logsigmoid(linear_margins(features, weights)).mean() + penalty / 2 * weights.square().sum()
        total.backward()
        return total

    optimizer.step(loss)
    return weights.detach()


def train_bigrams(pairs, texts, seed):
    """(weights (BUCKETS,), penalty): the penalty with the least loss on a tenth of the pairs, by whole prompts."""
    parts = hold_out(pairs, math.ceil(len(pairs) / 10), seed)
    fit, choose = (bigram_features([texts[i] for i in part]) for part in parts)
    penalty = min(PENALTIES, key=lambda p: -F.logsigmoid(linear_margins(choose, bradley_terry(fit, p))).mean())
    return bradley_terry(bigram_features(texts), penalty), penalty


def length_margins(pairs):
    """Tokens of chosen - tokens of rejected, (N,)."""
    return torch.tensor([len(pair[1]) - len(pair[2]) for pair in pairs], dtype=torch.float64)


def credits(margins):
    """Of each margin, (N,): 1 where the chosen response scores higher, 1/2 for a tie, else 0."""
    return (margins.sign() + 1) / 2


def interval(values, prompts, draws, seed):
    """(mean, low, high) of values (N,) of pairs, 95 %: prompts are drawn again, as pairs of one prompt are not
    independent, each with all of its pairs.
    """
    groups = {prompt: group for group, prompt in enumerate(dict.fromkeys(prompts))}
    sums = torch.zeros(2, len(groups), dtype=torch.float64)  # of the values, of the pairs
    sums.index_add_(1, torch.tensor([groups[p] for p in prompts]), torch.stack((values, torch.ones_like(values))))
    picks = torch.randint(len(groups), (draws, len(groups)), generator=torch.Generator().manual_seed(seed))
    values_of, pairs_of = sums[:, picks].sum(2)  # each (draws,)
    bounds = (values_of / pairs_of).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    return values.mean().item(), *bounds.tolist()


def main(args):
    if args.split:
        for task, source in zip(TASKS, args.split):
            split(source, task, args.split[2])
        return
    tokenizer, train, test = load_tokenizer(args.model), {}, {}
    for task, (part, pairs) in itertools.product(TASKS, (("train", train), ("test", test))):
        pairs[task], report = load_pairs(getattr(args, f"{task}_{part}"), tokenizer, *LENGTHS, args.num_samples)
        print(report[0])
    texts = lambda pairs: [[tokenizer.decode(ids, skip_special_tokens=True) for ids in pair[1:3]] for pair in pairs]
    world = distributed.start()
    model = load_model(args.model, device.pick_dtype("auto", world), world.device, scores=True)
    heads = {task: lora.load_adapter(model, getattr(args, f"{task}_rm"), task, with_head=True)[1] for task in TASKS}
    print(f"{prepare_scores(model)} ({world.device}, {str(model.dtype).removeprefix('torch.')})")

    def cell(task, values):
        prompts = [tuple(pair.prompt_ids) for pair in test[task]]
        return "{:.3f} [{:.3f}, {:.3f}]".format(*interval(values, prompts, args.bootstrap, args.seed))

    print("\n| scorer | helpful test | harmless test | more than the bigrams, own task |\n|---|---|---|---|")
    for task in TASKS:
        with lora.use_adapter(model, task):
            model.score.weight.data.copy_(heads[task])
            reward = {other: credits(reward_margins(model, test[other])) for other in TASKS}
        weights, penalty = train_bigrams(train[task], texts(train[task]), args.seed)
        words = {other: credits(linear_margins(bigram_features(texts(test[other])), weights)) for other in TASKS}
        sign = 1 if length_margins(train[task]).sign().sum() >= 0 else -1
        length = {other: credits(sign * length_margins(test[other])) for other in TASKS}
        names = f"{task} reward model", f"{task} bigrams, L2 {penalty:g}", f"{task} length, sign {sign:+d}"
        more = cell(task, reward[task] - words[task]), "", ""
        for name, by_task, beyond in zip(names, (reward, words, length), more):
            print(f"| {name} | {' | '.join(cell(*accuracy) for accuracy in by_task.items())} | {beyond} |", flush=True)


if __name__ == "__main__":
    endings.run(main, get_args())
