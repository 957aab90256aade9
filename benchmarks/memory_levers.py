"""What each lever for memory brings, measured: the highest resident memory of runs of dpo_hf_run.py, one per lever.

    python benchmarks/memory_levers.py --model smollm2 --dataset harmless-base-test.jsonl.gz

Every run has a process of its own, 2 updates of 4 pairs, and the same rows: those of the file with the longest
responses, as memory is that of the largest pass.  What is read is VmHWM of the process, whole: Python, torch and the
model's file are in it.  Runs on the CPU only.  Linux only (/proc).
"""

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the scripts lie one folder up

import dpo_hf_run
from formats.preference_rows import recognise, row_texts
from formats.row_files import DataError, Malformed, Unusable, parse_row, read_rows
from harness import endings, flags, toys

BASE = "--batch-size 4 --gradient-accumulation-steps 1 --max-length 512 --lora-r 16 --gradient-checkpointing off"
LEVERS = [  # what stands behind the base's flags, and takes their place
    "",
    "--batch-size 1 --gradient-accumulation-steps 4",
    "--tokens-per-microbatch 1024",
    "--gradient-checkpointing on",
    "--max-length 256 --max-prompt-length 128",
    "--lora-r 4",
    "--lora-r 64",
    "--lora-r 0",
    "--lora-r 0 --gradient-checkpointing on",
    "--lora-r 0 --gradient-checkpointing on --optimizer adamw8bit",
]
ON_GPU = "--optimizer-offload", "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True"
UPDATE = 4  # pairs


def get_args(argv=None):
    parser = flags.Parser(__doc__)
    add, natural = parser.add_argument, flags.number(int, least=1)
    add("--model", default="toy", metavar="DIR", help="folder of the model, or hub id")
    add("--dataset", default="toy", metavar="FILE", help="pairs, in any shape that dpo_hf_run.py reads")
    add("--updates", type=natural, default=2, metavar="N", help="updates of a run")
    add("--dtype", choices=("auto", "bf16", "fp32"), default="auto", help="of the base model's weights")
    add("--json", metavar="FILE", help="write the bytes of each run to this file")
    add("--lever", choices=LEVERS, help=argparse.SUPPRESS)  # this process is that run
    add("--work", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def longest_rows(dataset, count):
    """The `count` rows of a file whose two responses have the most characters, as dicts.  Raises DataError."""
    shape, rows = None, []
    for where, row in read_rows(dataset):
        try:
            row = parse_row(row)
            shape = shape or recognise(row, where)
            _, chosen, rejected, *_ = row_texts(row, shape)
        except Malformed as error:
            raise DataError(f"{where}: {error}: mend the line") from None
        except Unusable:
            continue
        rows.append((len(str(chosen)) + len(str(rejected)), row))
    if len(rows) < count:
        raise DataError(f"{dataset} has {len(rows)} usable rows, {count} are needed: lower --updates")
    return [row for _, row in sorted(rows, key=lambda both: -both[0])[:count]]


def run(args):
    """The run of one lever; prints its highest resident memory in bytes, last."""
    words = ["--model", args.model, "--dataset", f"{args.work}/rows.jsonl", "--dtype", args.dtype, "--device", "cpu"]
    words += ["--max-steps", str(args.updates), "--num-samples", "0", "--eval-samples", "0", "--report-to", "none"]
    output = f"{args.work}/run{LEVERS.index(args.lever)}"  # its own: no numbers of another's reference
    words += ["--output-dir", output, *BASE.split(), *args.lever.split()]
    dpo_hf_run.main(dpo_hf_run.get_args(words))
    # Not ru_maxrss: it outlives exec, so a child's would begin at what its parent had.
    print(1024 * int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]), flush=True)


def table(memory):
    """The markdown of {lever: bytes}, and of the levers that are not there."""
    lines = ["| | highest resident memory, GB | of the base |", "|---|---|---|"]
    for lever, highest in memory.items():
        lines.append(f"| {f'`{lever}`' if lever else 'base'} | {highest / 1e9:.2f} | {highest / memory['']:.0%} |")
    absent = {lever: "bitsandbytes is not installed" for lever in LEVERS if lever not in memory}
    for lever, reason in (absent | dict.fromkeys(ON_GPU, "GPU only")).items():
        lines.append(f"| `{lever}` | not measured here: {reason} | |")
    return "\n".join(lines)


def main(args):
    if args.lever is not None:
        return run(args)
    installed = importlib.util.find_spec("bitsandbytes")
    levers = [lever for lever in LEVERS if installed or "8bit" not in lever]
    memory = {}
    with tempfile.TemporaryDirectory() as work:
        toys.take(args, {"model": "model", "dataset": "train/helpful_pairs.jsonl"})
        rows = longest_rows(args.dataset, args.updates * UPDATE)
        Path(work, "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        own = ["--model", args.model, "--updates", str(args.updates), "--dtype", args.dtype, "--work", work]
        for lever in levers:
            done = subprocess.run(
                [sys.executable, __file__, *own, f"--lever={lever}"], stdout=subprocess.PIPE, text=True, check=True
            )
            memory[lever] = int(done.stdout.split()[-1])
            print(f"{lever or 'base'}: {memory[lever] / 1e9:.2f} GB", flush=True)
    print(f"\npython {' '.join(sys.argv)}")
    print(f"Base: dpo_hf_run.py {BASE}; {args.updates} updates of the {len(rows)} rows with the longest responses\n")
    print(table(memory))
    if args.json:
        Path(args.json).write_text(json.dumps(memory) + "\n")


if __name__ == "__main__":
    endings.run(main, get_args())
