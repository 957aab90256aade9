"""What train_with_preference_prompt.py costs per pair beside dpo_hf_run.py, on the same pairs in the same updates.

    python benchmarks/preference_dpo_cost.py --model Qwen/Qwen3-0.6B --dataset pairs.jsonl --rounds 3

DPO is one forward and one backward.  A policy that is its own teacher adds a forward without gradient over the same
responses behind the preference, the KL one over the plain pairs; what the reference says is computed once, before.
An update lasts from the end of one optimiser step to the end of the next.  Each run has a process of its own.
"""

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
import timeit
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the scripts lie one folder up

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

import dpo_hf_run
import train_with_preference_prompt
from harness import endings, flags

RUNS = {
    "dpo_hf_run.py": None,
    "teacher policy": ["--teacher", "policy"],
    "teacher policy, no KL": ["--teacher", "policy", "--lambda-kl", "0"],
    "teacher ref": ["--teacher", "ref"],
    "teacher ref, no KL": ["--teacher", "ref", "--lambda-kl", "0"],
}


def get_args(argv=None):
    parser = flags.Parser(__doc__)
    add, natural = parser.add_argument, flags.number(int, least=1)
    add("--model", required=True, metavar="DIR", help="folder of the model, or hub id")
    add("--dataset", required=True, metavar="FILE", help="pairs, in any shape that the scripts read")
    add("--preference-text", default="Please answer politely and briefly.", metavar="TEXT", help="the preference")
    add("--batch-size", type=natural, default=4, metavar="N", help="pairs per pass and update")
    add("--updates", type=natural, default=8, metavar="N", help="updates to measure, after two more")
    add("--rounds", type=natural, default=1, metavar="N", help="run all N times in turn: machines are noisy")
    add("--dtype", choices=("auto", "bf16", "fp16", "fp32"), default="auto", help="of the base model's weights")
    add("--json", metavar="FILE", help="write each measured time to this file")
    add("--run", choices=RUNS, help=argparse.SUPPRESS)  # this process is that run
    add("--output", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def run(args):
    """One run; writes the seconds of its updates."""

    def now():
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        return timeit.default_timer()

    ends = []
    register_optimizer_step_post_hook(lambda *_: ends.append(now()))
    words = ["--model", args.model, "--dataset", args.dataset, "--batch-size", args.batch_size, "--dtype", args.dtype]
    words += ["--gradient-accumulation-steps", 1, "--max-steps", args.updates + 2, "--eval-samples", 0]
    words += ["--num-samples", args.batch_size * (args.updates + 2), "--max-length", 512, "--max-prompt-length", 256]
    words += ["--learning-rate", "1e-4", "--lora-dropout", 0, "--beta", 0.05, "--report-to", "none"]
    words = [*map(str, words), "--output-dir", f"{args.output}/run", "--logging-dir", f"{args.output}/logs"]
    if RUNS[args.run] is None:
        dpo_hf_run.main(dpo_hf_run.get_args(words))
    else:
        words += ["--preference-text", args.preference_text, *RUNS[args.run]]
        train_with_preference_prompt.main(train_with_preference_prompt.get_args(words))
    times = [after - before for before, after in itertools.pairwise(ends)][1:]
    Path(args.output, "times.json").write_text(json.dumps(times))


def main(args):
    if args.run:
        return run(args)
    times = {name: [] for name in RUNS}
    for _, name in itertools.product(range(args.rounds), RUNS):
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, __file__, *sys.argv[1:], "--run", name, "--output", folder]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            times[name] += json.loads(Path(folder, "times.json").read_text())
        print(f"{name}: {median(times[name]):.3f} s per update", flush=True)
    print(f"\n{args.rounds} x {args.updates} updates of {args.batch_size} pairs\n")
    print("| | s per update | x of dpo_hf_run.py |\n|---|---|---|")
    for name, seconds in times.items():
        print(f"| {name} | {median(seconds):.3f} | {median(seconds) / median(times['dpo_hf_run.py']):.2f} |")
    if args.json:
        Path(args.json).write_text(json.dumps(times) + "\n")


if __name__ == "__main__":
    endings.run(main, get_args())
