"""Safe-MM-DPO on Anthropic's HH pairs over fixed lambdas, and once with lambda free: what it does to held-out pairs.

The files and reward models are those of reward_models_on_hh.py.  Implicit accuracy: held-out pairs of a file whose
chosen response gained more log-prob over the base than the rejected one.  A larger lambda weighs the harmless pairs
more, so that theirs should rise and that of the helpful pairs fall.  The adaptive run asks for what --cost-threshold
auto gives with a harmless model that was trained without labels: the start policy's E[cost] minus half a spread.

    python benchmarks/safe_mm_dpo_on_hh.py --model BASE --helpful-rm helpful_rm --harmless-rm harmless_rm \\
        --helpful-train hh/helpful_train.jsonl --helpful-test hh/helpful_test.jsonl \\
        --harmless-train hh/harmless_train.jsonl --harmless-test hh/harmless_test.jsonl --work outputs/safe_hh

Intervals are 95 %, paired: of the difference on the same pairs.  What is finished stays in --work.
"""

import json
import math
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the scripts lie one folder up

import torch

import distributed
import lora
from formats.model_files import load_model, load_tokenizer
from harness import device, endings, flags
from packed_model import prepare_model
from packing import pack, passes
from preference_data import load_pairs

ROOT = Path(__file__).resolve().parent.parent
TASKS = "helpful", "harmless"
PASS_TOKENS = 2048


def get_args(argv=None):
    parser = flags.Parser(__doc__)
    add, natural = parser.add_argument, flags.number(int, least=1)
    add("--model", required=True, metavar="BASE", help="base of both reward models: folder or hub id")
    for task in TASKS:
        add(f"--{task}-rm", required=True, metavar="DIR", help=f"adapter of train_rm.py --task {task}")
        add(f"--{task}-train", required=True, metavar="FILE", help="its pairs")
        add(f"--{task}-test", required=True, metavar="FILE", help="pairs of other prompts")
    add("--work", required=True, metavar="DIR", help="where everything goes; what is finished there is not repeated")
    add("--lambdas", nargs="+", type=flags.number(float, least=0), default=[0.0, 0.3, 1.0, 3.0], metavar="L")
    add("--train-pairs", type=natural, default=300, metavar="N", help="rows of each file to train on")
    add("--test-pairs", type=natural, default=250, metavar="N", help="rows of each file to measure on")
    add("--learning-rate", type=flags.number(float, above=0), default=5e-4, metavar="LR", help="of all runs")
    add("--kl-coeff", type=flags.number(float, least=0), default=0.0, metavar="C", help="a KL costs a forward more")
    add("--max-length", type=natural, default=256, metavar="N", help="tokens of prompt + response")
    add("--max-prompt-length", type=natural, default=128, metavar="N", help="tokens of the prompt")
    add("--json", metavar="FILE", help="write all numbers to this file")
    return parser.parse_args(argv)


def train(args, name, words):
    """Run train_safe_mm_dpo.py into --work/NAME unless it has ended well there; seconds that it took."""
    output, seconds = Path(args.work) / name, Path(args.work) / f"{name}.seconds"
    if seconds.exists():
        return float(seconds.read_text())
    words = ["--model", args.model, "--num-samples", args.train_pairs, "--learning-rate", args.learning_rate, *words]
    for task in TASKS:
        words += [
            f"--train-{task}-path",
            getattr(args, f"{task}_train"),
            f"--{task}-rm-path",
            getattr(args, f"{task}_rm"),
        ]
    words += ["--max-length", args.max_length, "--max-prompt-length", args.max_prompt_length, "--eval-samples", 0]
    words += ["--epochs", 1, "--lora-dropout", 0, "--logging-steps", 1, "--report-to", "none", "--overwrite"]
    words += ["--kl-coeff", args.kl_coeff]
    words += ["--cache-dir", f"{args.work}/cache", "--output-dir", output]
    words = [sys.executable, ROOT / "train_safe_mm_dpo.py", *words]
    print(*words[1:], flush=True)
    begin = time.perf_counter()
    with open(f"{output}.log", "w") as log:
        done = subprocess.run([*map(str, words)], stdout=log, stderr=log)
    if done.returncode:
        sys.exit(f"train_safe_mm_dpo.py ended with exit code {done.returncode}: see {output}.log")
    seconds.write_text(str(time.perf_counter() - begin))
    return float(seconds.read_text())


@torch.no_grad()
def log_ratios(model, pairs):
    """log p(chosen) - log p(rejected) of each pair, (N,) fp64."""
    lengths, margins = [sum(map(len, pair[:3])) for pair in pairs], torch.zeros(len(pairs), dtype=torch.float64)
    for indices in passes(range(len(pairs)), 0, lengths, PASS_TOKENS):
        chosen, rejected = model.packed_logps(pack([pairs[i] for i in indices], model.device))
        margins[indices] = (chosen - rejected).cpu().double()
    return margins


def difference(after, before):
    """(mean, half of its 95 % interval) of after - before on the same pairs, (N,) each."""
    both = (after - before).double()
    return both.mean().item(), 1.96 * both.std().item() / math.sqrt(len(both))


def main(args):
    Path(args.work).mkdir(parents=True, exist_ok=True)
    fixed = {f"lambda {value:g}": ["--lambda-lr", 0, "--lambda-init", value] for value in args.lambdas}
    free = ["--cost-threshold", "auto", "--cost-every", 4, "--lambda-lr", 0.05]
    runs = {name: [*words, "--cost-estimate", "snis"] for name, words in fixed.items()} | {"adaptive": free}
    seconds = {name: train(args, name.replace(" ", "_"), words) for name, words in runs.items()}

    world, tokenizer = distributed.start(), load_tokenizer(args.model)
    dtype = device.pick_dtype("auto", world)
    model = load_model(args.model, dtype, world.device)
    prepare_model(model)
    limits = dict(max_length=args.max_length, max_prompt_length=args.max_prompt_length, limit=args.test_pairs)
    pairs = {task: load_pairs(getattr(args, f"{task}_test"), tokenizer, **limits)[0] for task in TASKS}
    base = {task: log_ratios(model, pairs[task]) for task in TASKS}
    right = {name: {} for name in runs}  # {run: {task: 1 where the implicit reward is right, (N,)}}
    for name in runs:
        lora.load_adapter(model, Path(args.work) / name.replace(" ", "_"), "policy")
        right[name] = {task: (log_ratios(model, pairs[task]) > base[task]).double() for task in TASKS}
        lora.remove_adapter(model, "policy")

    print(f"\nheld out: {', '.join(f'{len(pairs[task])} {task} pairs' for task in TASKS)}; {dtype}")
    print("\n| | helpful accuracy | harmless accuracy | s |\n|---|---|---|---|")
    for name in runs:
        cells = " | ".join(f"{right[name][task].mean().item():.3f}" for task in TASKS)
        print(f"| {name} | {cells} | {seconds[name]:.0f} |")
    steps = [*pairwise(fixed), (next(iter(fixed)), [*fixed][-1])]
    print("\n| from, to | helpful | harmless |\n|---|---|---|")
    for before, after in steps:
        changes = (difference(right[after][task], right[before][task]) for task in TASKS)
        print(f"| {before}, {after} | {' | '.join(f'{middle:+.3f} ± {half:.3f}' for middle, half in changes)} |")
    lines = [json.loads(line) for line in (Path(args.work) / "adaptive/metrics.jsonl").read_text().splitlines()]
    print(f"\nadaptive, threshold {lines[-1]['cost_threshold']:.3f}:")
    sampled = [line for line, last in zip(lines, [None, *lines]) if last is None or line["E_cost"] != last["E_cost"]]
    print(*(f"step {x['step']} E[cost] {x['E_cost']:.3f} lambda {x['lambda']:.3f}" for x in sampled), sep="\n")
    if args.json:
        means = {name: {task: right[name][task].mean().item() for task in TASKS} for name in runs}
        numbers = {"accuracy": means, "seconds": seconds, "adaptive": lines}
        Path(args.json).write_text(json.dumps(numbers, indent=1) + "\n")


if __name__ == "__main__":
    endings.run(main, get_args())
