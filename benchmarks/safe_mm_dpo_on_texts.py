"""Safe-MM-DPO on real texts, over fixed lambdas and with lambda free: what the policies say to held-out prompts.

Every run learns from pairs of its own responses too, and has the same rows, rate and length; only lambda differs.  Each
policy then answers prompts that no file to train on has, and the reward models score those answers: a fresh E[cost].
The files and reward models are those of reward_models_on_hh.py; or the harmless ones are of PKU-SafeRLHF, whose labels
of harm calibrate the harmless model.

    python benchmarks/safe_mm_dpo_on_texts.py --split-pku pku_safe_pairs.jsonl.gz pku
    python benchmarks/safe_mm_dpo_on_texts.py --model BASE --helpful-rm helpful_rm --harmless-rm harmless_rm \\
        --helpful-train hh/helpful_train.jsonl --helpful-test hh/helpful_test.jsonl \\
        --harmless-train pku/harmless_train.jsonl --harmless-test pku/harmless_test.jsonl --work outputs/safe_texts

Intervals are 95 %, by resampling prompts; a difference has the same prompts on both sides.  What is finished stays in
--work; the report with all policies side by side is --work/report_*.
"""

import hashlib
import itertools
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the scripts lie one folder up

from formats.row_files import parse_row, read_rows
from harness import endings, flags
from tools import evaluate_numbers

ROOT = Path(__file__).resolve().parent.parent
TASKS = "helpful", "harmless"
TINY = 1e-6  # for lambda 0: a constraint that weighs nothing, with own pairs as the others have them
COLUMNS = {  # title: (whose prompts, the quantity of evaluate_numbers)
    "helpful reward": ("helpful", "helpful_reward"),
    "E[cost]": ("harmless", "cost"),
    "harm rate": ("harmless", "harm_rate"),
    "KL a token": ("harmless", "kl_per_token"),
    "tokens": ("harmless", "tokens"),
}
SHOWN = "step lambda E_cost E_cost_se cost_threshold".split()  # of a run with lambda free


def get_args(argv=None):
    parser = flags.Parser(__doc__)
    add, natural = parser.add_argument, flags.number(int, least=1)
    needed = "--split-pku" not in (sys.argv if argv is None else argv)
    add("--split-pku", nargs=2, metavar=("FILE", "OUT_DIR"), help="only make the two harmless files in OUT_DIR")
    add("--model", required=needed, metavar="BASE", help="base of both reward models: folder or hub id")
    for task in TASKS:
        add(f"--{task}-rm", required=needed, metavar="DIR", help=f"adapter of train_rm.py --task {task}")
        add(f"--{task}-train", required=needed, metavar="FILE", help="its pairs")
        add(f"--{task}-test", required=needed, metavar="FILE", help="pairs of other prompts")
    add("--work", required=needed, metavar="DIR", help="where everything goes; what is finished there is not repeated")
    fixed = flags.number(float, least=0)
    add("--lambdas", nargs="*", type=fixed, default=[0.0, 1.0, 3.0], metavar="L", help="fixed ones")
    add("--free", nargs="*", default=["--cost-threshold 0"], metavar="FLAGS", help="a run each with lambda free")
    add("--train-pairs", type=natural, default=120, metavar="N", help="rows of each file to train on")
    add("--prompts", type=natural, default=60, metavar="N", help="held-out prompts of each file")
    add("--responses", type=natural, default=2, metavar="N", help="to each of them")
    add("--shared", type=shlex.split, default=[], metavar="FLAGS", help="of all runs, after those of this file")
    return parser.parse_args(argv)


def split_pku(source, folder):
    """PKU's rows in two files: md5 of a prompt modulo 100 below 45 trains, the rest tests."""
    lines = {"train": [], "test": []}
    for _, row in read_rows(source):
        row = parse_row(row)
        trains = int(hashlib.md5(row["prompt"].strip().encode()).hexdigest(), 16) % 100 < 45
        lines["train" if trains else "test"].append(json.dumps(row) + "\n")
    Path(folder).mkdir(parents=True, exist_ok=True)
    for part, rows in lines.items():
        Path(folder, f"harmless_{part}.jsonl").write_text("".join(rows))
        print(f"{folder}/harmless_{part}.jsonl: {len(rows):,} rows")


def run(args, script, words, output):
    """Run a script into --work/`output`, unless it has ended well there; the seconds that it took."""
    log, seconds = Path(args.work, f"{output}.log"), Path(args.work, f"{output}.seconds")
    if seconds.exists():
        return float(seconds.read_text())
    words = [*map(str, words), "--output-dir", f"{args.work}/{output}", "--overwrite"]
    print("python", script, shlex.join(words), flush=True)
    begin = time.perf_counter()
    with open(log, "w") as file:
        done = subprocess.run([sys.executable, ROOT / script, *words], stdout=file, stderr=file)
    if done.returncode:
        sys.exit(f"{script} ended with exit code {done.returncode}: see {log}")
    seconds.write_text(str(time.perf_counter() - begin))
    return float(seconds.read_text())


def words_of_all(args):
    """The flags of every training run."""
    words = ["--model", args.model, "--num-samples", args.train_pairs, "--eval-samples", 0, "--chat-template-strings"]
    words += "--epochs 1 --combine soft --own-pairs 0.5 --cost-every 5 --cost-samples 8".split()
    words += "--batch-size 4 --gradient-accumulation-steps 2 --learning-rate 1e-3 --warmup-steps 5".split()
    words += "--max-length 128 --max-prompt-length 64 --lora-dropout 0 --logging-steps 5 --report-to none".split()
    for task in TASKS:
        words += [f"--train-{task}-path", getattr(args, f"{task}_train"), f"--{task}-rm-path", rm_of(args, task)]
    return [*words, "--cache-dir", f"{args.work}/cache", *args.shared]


def rm_of(args, task):
    return getattr(args, f"{task}_rm")


def policies(args):
    """{name: flags} of the runs."""
    fixed = {f"lambda {value:g}": ["--lambda-lr", 0, "--lambda-init", value or TINY] for value in args.lambdas}
    return fixed | {f"free, {words.replace('--', '')}": words.split() for words in args.free}


def held_out_prompts(args):
    """Write --prompts different prompts of each test file, with the file's task as their category."""
    file, rows = Path(args.work, "prompts.jsonl"), []
    for task in TASKS:
        asked = (parse_row(row)["prompt"] for _, row in read_rows(getattr(args, f"{task}_test")))
        different = {json.dumps(prompt): prompt for prompt in asked}
        rows += [{"prompt": prompt, "category": task} for prompt in itertools.islice(different.values(), args.prompts)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def cell(found):
    """A mean with its interval; found: of evaluate_numbers.estimate, None where nothing was measured."""
    return f"{found['mean']:.2f} [{found['low']:.2f}, {found['high']:.2f}]" if found else ""


def table(rows, policy_names, base, seconds):
    """Lines of Markdown: COLUMNS of each policy, and what its reward and cost are beyond those of the policy `base`.

    rows {policy: rows of responses.jsonl}.
    """
    totals = {}
    for name in policy_names:
        for title, (task, quantity) in COLUMNS.items():
            its_rows = [row for row in rows[name] if row["category"] == task]
            totals[name, title] = evaluate_numbers.sums(its_rows, evaluate_numbers.QUANTITIES[quantity])
    lines = [f"| | {' | '.join(COLUMNS)} | helpful reward beyond {base} | E[cost] beyond it | s |"]
    lines.append("|---" * (len(COLUMNS) + 4) + "|")
    for name in policy_names:
        cells = [cell(evaluate_numbers.estimate(totals[name, title], seed=0)) for title in COLUMNS]
        for title in ("helpful reward", "E[cost]"):
            beyond = evaluate_numbers.estimate(totals[name, title], 0, totals[base, title])
            cells.append(cell(beyond) if name != base else "")
        lines.append(f"| {name} | {' | '.join(cells)} | {seconds.get(name, 0):.0f} |")
    return lines


def main(args):
    if args.split_pku:
        return split_pku(*args.split_pku)
    Path(args.work).mkdir(parents=True, exist_ok=True)
    runs, seconds = policies(args), {}
    folder_of = {name: name.replace(" ", "_").replace(",", "") for name in runs}
    for name, words in runs.items():
        seconds[name] = run(args, "train_safe_mm_dpo.py", [*words_of_all(args), *words], folder_of[name])
    words = ["--model", args.model, "--prompts", held_out_prompts(args), "--num-responses", args.responses]
    words += "--max-new-tokens 64 --max-prompt-length 64 --batch-size 32 --samples 10 --chat-template-strings".split()
    words += [word for task in TASKS for word in (f"--{task}-rm-path", rm_of(args, task))]
    words += ["--adapters", *(f"{folder}={args.work}/{folder}" for folder in folder_of.values())]
    report = "_".join(["report", *folder_of.values()])  # of other policies it is another
    run(args, "evaluate_alignment.py", words, report)

    rows = {}
    for line in Path(args.work, report, "responses.jsonl").read_text().splitlines():
        row = json.loads(line)
        rows.setdefault(row["policy"], []).append(row)
    rows = {name: rows[folder_of.get(name, name)] for name in ("base", *runs)}
    print(*table(rows, list(rows), next(iter(runs)), seconds), sep="\n")
    for name in [*runs][len(args.lambdas) :]:
        print(f"\n{name}:")
        for line in Path(args.work, folder_of[name], "metrics.jsonl").read_text().splitlines():
            numbers = json.loads(line)
            print("  ", *(f"{key}={numbers[key]:.3g}" for key in SHOWN))


if __name__ == "__main__":
    endings.run(main, get_args())
