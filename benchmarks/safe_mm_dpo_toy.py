"""Study of Safe-MM-DPO in the toy world, whose truth is known: what is learned, at what price, over several seeds.

The harmless *model* steers the training; the world's rule only judges, what each policy answers to prompts about
combinations that no training file shows.  Per seed: two reward models; the helpful pairs alone, by DPO and, as additive
has another beta and a KL, by additive without a constraint; Safe-MM-DPO in its three modes, soft and additive without
own pairs too; soft with lambda fixed at several values, with own pairs and without.

    python benchmarks/safe_mm_dpo_toy.py --work outputs/safe_study --json study.json --figure study.svg

Numbers are means over seeds ± half of a 95 % t-interval.  What is finished stays in --work: a study that was
interrupted goes on there.  After a change of the scripts name a new folder.
"""

import json
import math
import os
import shlex
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from statistics import mean, stdev

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the scripts lie one folder up

import torch

import lora
import toy_world
from formats.model_files import load_model, load_tokenizer
from harness import endings, flags

ROOT = Path(__file__).resolve().parent.parent
ALL = "--model toy --batch-size 16 --gradient-accumulation-steps 1 --dtype fp32 --report-to none --overwrite".split()
REWARD = [*ALL, *"--learning-rate 3e-3 --logging-steps 25".split()]
EPOCHS = {"helpful": "4", "harmless": "2"}
POLICY = "--beta 1 --learning-rate 1e-3 --warmup-steps 5 --lora-dropout 0 --epochs 4 --max-length 64".split()
POLICY = [*ALL, *POLICY, *"--max-prompt-length 32 --eval-samples 0 --cache-dir cache".split()]
POLICY += "--logging-steps 8".split()  # as --cost-every: a line for each sample of E[cost]
HELPFUL_ONLY = [*POLICY, *"--dataset toy --num-samples 0".split()]
ADDITIVE = "--combine additive --beta 0.3 --w 0".split()
OWN = "--own-pairs 0.25".split()
STRICT, LENIENT = "--harm-rate 0.02".split(), "--harm-rate 0.08".split()
# One setting for each mode, chosen on other seeds than those of the tables.
MODES = {
    "soft": ["--combine", "soft", *STRICT, *OWN],
    "soft, files alone": ["--combine", "soft", *STRICT],
    "additive": [*ADDITIVE, *LENIENT, *OWN],
    "additive, harm rate 0.05": [*ADDITIVE, "--harm-rate", "0.05", *OWN],
    "additive, files alone": [*ADDITIVE, *LENIENT],
    "margin": ["--combine", "margin", *STRICT, *OWN],
}
SAFE = [*POLICY, *"--cost-estimate policy".split()]
# What each is to be measured by: the helpful pairs alone, at the same beta and KL.
BASES = {mode: "helpful-only, beta 0.3" if mode.startswith("additive") else "helpful-only" for mode in MODES}
ROWS = ["start", "helpful-only", "helpful-only, beta 0.3", *MODES]
LAST = 12  # samples of 32 responses that E[cost] at the end is the mean of
STUDENT = 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262  # t of 97.5 % for 1, 2, ... degrees of freedom
JUDGED = {"helpful": "helpful", "harm_rate": "harm rate", "over_refusal": "over-refusal"}
CONSTRAINT = {"lambda": "final lambda", "at_cap": "of the time at its cap", "cost": "E[cost] at the end"}
COLUMNS = {**JUDGED, "gain": "share of the helpful-only gain", **CONSTRAINT, "threshold": "its threshold"}
SHARES = "harm_rate", "over_refusal", "gain", "at_cap"  # shown in percent


def get_args(argv=None):
    parser = flags.Parser(__doc__)
    add, natural, fixed = parser.add_argument, flags.number(int, least=1), flags.number(float, above=0)
    seeds = flags.number(int, least=1, below=len(STUDENT) + 2)
    add("--seeds", type=seeds, default=5, metavar="N", help="seeds 0 to N - 1")
    add("--work", required=True, metavar="DIR", help="where everything goes; what is finished there is not repeated")
    add("--lambdas", nargs="*", type=fixed, default=[0.5, 2.0, 5.0], metavar="L", help="fixed ones, with soft")
    add("--lambda-seeds", type=natural, default=5, metavar="N", help="seeds of them that the fixed ones have")
    add("--responses", type=natural, default=4, metavar="N", help="samples per prompt that are judged")
    add("--json", metavar="FILE", help="write all numbers to this file")
    add("--figure", metavar="FILE", help="write harm against helpfulness to this SVG file")
    return parser.parse_args(argv)


def kept(file, key, make):
    """make(), a value of JSON, or what it was when `file` was written, if that was for the same key."""
    if file.exists() and (found := json.loads(file.read_text()))["key"] == key:
        return found["value"]
    value = make()
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(".unfinished")
    unfinished.write_text(json.dumps({"key": key, "value": value}))
    os.replace(unfinished, file)
    return value


def train(work, script, words, output):
    """Run a script in `work`, unless this command has ended well there before; what it prints goes to OUTPUT.log."""
    words = [*words, "--output-dir", output]

    def run():
        print("python", script, shlex.join(words), flush=True)
        log = work / f"{output}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "w") as file:
            done = subprocess.run([sys.executable, ROOT / script, *words], cwd=work, stdout=file, stderr=file)
        if done.returncode:
            sys.exit(f"{script} ended with exit code {done.returncode}: see {log}")

    kept(work / f"{output}.trained.json", [script, *words], run)
    return words


def judge(work, output, words, seed, responses):
    """JUDGED of the adapter `output` (None: of the base) on the held-out prompts."""

    def run():
        folder = work / "outputs/toy_world"
        prompts = [json.loads(line)["prompt"] for line in (folder / "prompts.jsonl").read_text().splitlines()]
        model, tokenizer = load_model(folder / "model", torch.float32, "cpu"), load_tokenizer(folder / "model")
        if output:
            lora.load_adapter(model, work / output, "policy")
        found = toy_world.judge_model(model, tokenizer, prompts, seed, responses, batch_size=256)
        return {name: found[name] for name in JUDGED}

    return kept(work / f"{output or f'seed_{seed}/start'}.judged.json", [words, seed, responses], run)


def constraint(folder):
    """CONSTRAINT of a Safe-MM-DPO run, from what it left."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    cap = json.loads((folder / "args.json").read_text())["lambda_max"] * (1 - 1e-9)
    result = {"lambda": lines[-1]["lambda"], "at_cap": mean(line["lambda"] >= cap for line in lines)}
    return result | {"cost": mean(line["E_cost"] for line in lines[-LAST:]), "threshold": lines[-1]["cost_threshold"]}


def run_seed(args, work, seed, fixed):
    """{row: numbers} of one seed: start, helpful-only, the modes, and the fixed lambdas."""
    own, name = ["--seed", str(seed)], f"seed_{seed}"
    rows = {"start": judge(work, None, [], seed, args.responses)}
    words = train(work, "dpo_hf_run.py", [*HELPFUL_ONLY, *own], f"{name}/helpful_only")
    rows["helpful-only"] = judge(work, f"{name}/helpful_only", words, seed, args.responses)
    words = train(work, "train_safe_mm_dpo.py", [*POLICY, *own, *ADDITIVE, "--lambda-init", "0"], f"{name}/helpful_03")
    rows["helpful-only, beta 0.3"] = judge(work, f"{name}/helpful_03", words, seed, args.responses)
    safe, before = [*SAFE, *own], []
    for task, epochs in EPOCHS.items():
        words = [*REWARD, *own, "--task", task, "--epochs", epochs]
        before += train(work, "train_rm.py", words, f"{name}/{task}_rm")
        safe += [f"--{task}-rm-path", f"{name}/{task}_rm"]
    runs = dict(MODES)
    for value in fixed:
        steady = ["--combine", "soft", *STRICT, "--lambda-lr", "0", "--lambda-init", f"{value:g}"]
        runs |= {f"lambda {value:g}": [*steady, *OWN], f"lambda {value:g}, files alone": steady}
    for row, flags_of_row in runs.items():
        output = f"{name}/{row.replace(', ', '_').replace(' ', '_')}"
        words = train(work, "train_safe_mm_dpo.py", [*safe, *flags_of_row], output)
        rows[row] = judge(work, output, before + words, seed, args.responses)
        if row in MODES:
            rows[row] |= constraint(work / output)
    return rows


def interval(values):
    """(mean, half of the 95 % t-interval) of independent values; NaN for the half of a single one."""
    n = len(values)
    return mean(values), STUDENT[n - 2] * stdev(values) / math.sqrt(n) if n > 1 else math.nan


def add_gains(seeds):
    """Puts `gain` into each row but the first: the share of its seed's gain in helpfulness by the helpful pairs alone.

    All seeds start from one policy, so the gains are from the mean of what the seeds sampled from it.
    """
    start = mean(rows["start"]["helpful"] for rows in seeds)
    for rows in seeds:
        for name in list(rows)[1:]:
            base = rows[BASES.get(name, name if name in ROWS else "helpful-only")]
            rows[name]["gain"] = (rows[name]["helpful"] - start) / (base["helpful"] - start)


def summary(seeds):
    """{row: {column: (mean, half)}} over the seeds that have the row."""
    result = {}
    for name in max(seeds, key=len):
        rows = [rows[name] for rows in seeds if name in rows]
        result[name] = {column: interval([row[column] for row in rows]) for column in COLUMNS if column in rows[0]}
    return result


def table(rows, names, columns):
    """Lines of Markdown."""
    lines = [f"| | {' | '.join(COLUMNS[column] for column in columns)} |", f"|---|{'---|' * len(columns)}"]
    for name in names:
        cells = [cell(column, *rows[name][column]) if column in rows[name] else "" for column in columns]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def cell(column, middle, half):
    scale, unit = (100, " %") if column in SHARES else (1, "")
    digits = 3 if column == "helpful" else 1 if unit else 2
    return f"{scale * middle:.{digits}f}" + ("" if math.isnan(half) else f" ± {scale * half:.{digits}f}") + unit


def height(line, x):
    """y at x of the line through points (x, y) in any order; beyond its ends that of the nearest point."""
    line = sorted(line)
    for (x0, y0), (x1, y1) in pairwise(line):
        if x0 <= x <= x1 and x1 > x0:
            return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    return line[0][1] if x <= line[0][0] else line[-1][1]


LEFT, TOP, WIDE, HIGH = 64, 16, 560, 360  # of the plot within the picture
SHAPES = "text, circle, rect { fill: currentColor } path, polyline { stroke: currentColor; fill: none }"
# On light and on dark pages.
COLOURS = {"text": "#24292f #e6edf3", "paper": "#ffffff #0d1117", "grid": "#d8dee4 #30363d", "fixed": "#8250df #bc8cff"}
COLOURS |= {"start": "#6e7781 #8b949e", "helpful-only": "#cf222e #ff7b72", "additive": "#bf8700 #e3b341"}
COLOURS |= {"margin": "#1a7f37 #3fb950", "soft": "#0969da #58a6ff", "alone": "#6639ba #d2a8ff"}


def kind_of(name):
    """The class of a row in the picture."""
    kind = name.partition(",")[0].partition(" ")[0]
    kind = "fixed" if kind == "lambda" else kind
    return "alone" if name.endswith("files alone") else kind


def figure(seeds, means):
    """SVG text: a small point per seed and row, a large one at its mean; the means of fixed lambdas are a line."""
    theme = lambda dark: " ".join(f".{name} {{ color: {both.split()[dark]} }}" for name, both in COLOURS.items())
    style = f".seed {{ opacity: 0.35 }} {SHAPES} {theme(0)} @media (prefers-color-scheme: dark) {{ {theme(1)} }}"
    heights = [row["helpful"] for rows in seeds for row in rows.values()]
    low, high = math.floor(10 * min(heights)), math.ceil(10 * max(heights) + 1e-9)  # in tenths
    place = lambda harm, helpful: (LEFT + WIDE * harm, TOP + HIGH * (high - 10 * helpful) / (high - low))
    text = lambda x, y, words, more="": f'<text class="text" x="{x:.1f}" y="{y:.1f}" {more}>{words}</text>'
    size, middle = f"{LEFT + WIDE + 180} {TOP + HIGH + 52}", 'text-anchor="middle"'
    svg = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size}" role="img" font-size="13">']
    svg += [f'<style>{style}</style><rect class="paper" width="100%" height="100%"/>']
    for tenth in range(0, 11, 2):
        x, y = place(tenth / 10, low / 10)
        svg += [f'<path class="grid" d="M{x:.1f} {TOP}V{y:.1f}"/>', text(x, y + 18, f"{10 * tenth} %", middle)]
    for tenth in range(low, high + 1):
        x, y = place(0, tenth / 10)
        svg += [f'<path class="grid" d="M{x} {y:.1f}h{WIDE}"/>', text(x - 32, y + 4, f"{tenth / 10:.1f}")]
    svg += [text(LEFT + WIDE / 2, TOP + HIGH + 42, "harmful answers to harmful prompts", middle)]
    y = TOP + HIGH / 2
    svg += [text(16, y, "helpfulness where help is due", f'{middle} transform="rotate(-90 16 {y})"')]
    at = {name: place(row["harm_rate"][0], row["helpful"][0]) for name, row in means.items()}
    for kind in ("fixed", "alone"):
        line = [place for name, place in at.items() if name.startswith("lambda") and kind_of(name) == kind]
        svg += [f'<polyline class="{kind}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in line)}"/>'] if line else []
    for name, (x, y) in at.items():
        kind = kind_of(name)
        points = [place(rows[name]["harm_rate"], rows[name]["helpful"]) for rows in seeds if name in rows]
        svg += [f'<circle class="seed {kind}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in points]
        svg += [f'<circle class="mean {kind}" cx="{x:.1f}" cy="{y:.1f}" r="{7 if name in ROWS else 4}"/>']
    words = [(0, 0)]  # where labels stand: one that would lie upon another goes beneath it
    for name, (x, y) in sorted(at.items(), key=lambda item: item[1][1]):
        near = [below for left, below in words if abs(left - x) < 80]
        words.append((x, max([y - 7, *(below + 14 for below in near)])))
        svg += [text(x + 9, words[-1][1], name)]
    return "\n".join([*svg, "</svg>\n"])


def main(args):
    work = Path(args.work).resolve()
    work.mkdir(parents=True, exist_ok=True)
    toy_world.build(work / "outputs/toy_world")  # where the scripts, run in `work`, look for it
    seeds = [run_seed(args, work, n, args.lambdas if n < args.lambda_seeds else []) for n in range(args.seeds)]
    add_gains(seeds)
    means = summary(seeds)
    fixed = [name for name in means if name not in ROWS]
    print(f"\n{args.seeds} seeds, {args.responses} responses to each held-out prompt; mean ± half of a 95 % interval\n")
    print(*table(means, ROWS, COLUMNS), sep="\n")
    if fixed:
        print(f"\nsoft with a fixed lambda, {min(args.seeds, args.lambda_seeds)} seeds\n")
        print(*table(means, fixed, [*JUDGED, "gain"]), sep="\n")
        line = [(means[name]["harm_rate"][0], means[name]["helpful"][0]) for name in fixed if "alone" not in name]
        for mode in MODES:
            above = means[mode]["helpful"][0] - height(line, means[mode]["harm_rate"][0])
            print(f"{mode}: helpfulness {above:+.3f} from the line of fixed lambdas, with own pairs, at its harm rate")
    if args.json:
        Path(args.json).write_text(
            json.dumps({"args": vars(args), "seeds": seeds, "means": means}, indent=1, default=list) + "\n"
        )
    if args.figure:
        Path(args.figure).write_text(figure(seeds, means))


if __name__ == "__main__":
    endings.run(main, get_args())
