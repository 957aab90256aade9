"""How contenders are measured, each in a process of its own, and the table of what came out.

An update lasts from the end of one optimiser step to the end of the next; what comes before the first is printed apart.
Useful work is 4 FLOPs per weight of the blocks' linears and unique token (a prompt counts once), and 4 per weight of a
language-model head and response token: no padding, recomputation, reference, attention's products or LoRA.
Memory is the highest of the whole process (on a GPU: of its tensors).  Linux only (/proc).
"""

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import timeit
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import mean, median
from types import ModuleType
from typing import NamedTuple

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook
from trl_trainers import DTYPES, token_ids

import distributed
import lora
from formats.model_files import load_skeleton, load_tokenizer
from formats.row_files import read_rows
from harness import device, flags, speed
from packing import epoch_plan
from preference_data import DataError, fingerprint, load_pairs

CONTENDERS = "ours trl-defaults trl-best ours-fp32 trl-fp32 ours-compiled ours-compiled-fp32".split()
COLUMNS = ["contender", "s per update", "pairs/s", "x of trl-defaults", "peak memory GB", "x of trl-defaults"]
COLUMNS += ["useful TFLOP/s", "share of measured matmul peak"]


class Benchmark(NamedTuple):
    """One of our scripts beside one of TRL's trainers."""

    file: str  # the benchmark's own: each contender runs it again, in a process of its own
    script: ModuleType  # ours, with get_args and main
    words: Callable  # (args, plan, name) -> the part of our command line that is not every script's
    write_start: Callable  # (args, flags of ours, folder): the adapter that trl-fp32 begins with, as ours-fp32 does
    run_trl: Callable  # (args, flags of ours, plan, name) -> what trl_trainers.train returns
    scores: bool  # a reward model: with a scalar head, which is trained whole, in place of the language model's
    before: str  # what comes before the first update


def get_args(benchmark, doc, batch_size, accumulation, argv=None):
    """The flags of a benchmark; doc: its docstring; the two numbers: the defaults of its script."""
    parser = flags.Parser(f"{doc}\n{__doc__}")
    add, natural, script = parser.add_argument, flags.number(int, least=1), Path(benchmark.script.__file__).name
    add("--model", required=True, metavar="DIR", help="folder of the model, or hub id")
    add("--dataset", required=True, metavar="FILE", help=f"pairs, in any shape that {script} reads")
    add("--batch-size", type=natural, default=batch_size, metavar="N", help="pairs per pass")
    add("--gradient-accumulation-steps", type=natural, default=accumulation, metavar="N", help="passes per update")
    add("--max-length", type=natural, default=512, metavar="N", help="tokens of prompt + response")
    add("--max-prompt-length", type=natural, default=256, metavar="N", help="tokens of the prompt")
    add("--updates", type=natural, default=10, metavar="N", help="updates to measure, after the warm-up")
    add("--warmup", type=natural, default=3, metavar="N", help="updates before them, not measured")
    add("--rounds", type=natural, default=1, metavar="N", help="run the contenders N times in turn: machines are noisy")
    what = f"of {', '.join(CONTENDERS)} (default: all but those compiled)"
    add("--contenders", nargs="+", choices=CONTENDERS, default=CONTENDERS[:-2], metavar="NAME", help=what)
    add("--json", metavar="FILE", help="write everything to this file, each measured time too")
    add("--contender", metavar="PLAN", help=argparse.SUPPRESS)  # this process is the one that the file names
    args = parser.parse_args(argv)
    if missing := [name for name in ("trl", "peft", "accelerate") if not find_spec(name)]:
        parser.error(f"{' and '.join(missing)} not installed: run `bash setup.sh bench`")
    return args


def our_flags(benchmark, args, plan, name="ours"):
    """Command line of our script: its defaults, but for the task."""
    words = ["--model", args.model, *benchmark.words(args, plan, name), "--num-samples", plan["rows"]]
    words += ["--batch-size", args.batch_size, "--gradient-accumulation-steps", args.gradient_accumulation_steps]
    words += ["--tokens-per-microbatch", "auto"]  # as where no --batch-size is given
    words += ["--max-length", args.max_length, "--max-prompt-length", args.max_prompt_length, "--eval-samples", 0]
    words += ["--compile"] if "compiled" in name else []
    words += ["--report-to", "none", "--output-dir", plan["output"], "--learning-rate"]
    if name.endswith("fp32"):  # a higher rate, so that the losses move and their being equal means something
        return [*map(str, words), "1e-3", "--dtype", "fp32", "--logging-steps", "1"]
    return [*map(str, words), "1e-4", "--dtype", plan["dtype"]]  # what `auto` is here, asked once for all contenders


def first_pairs(args, wanted):
    """(rows, pairs): how many rows of the file hold its first `wanted` usable pairs.  Raises DataError."""
    tokenizer, rows = load_tokenizer(args.model), wanted
    while True:
        pairs, _ = load_pairs(args.dataset, tokenizer, args.max_length, args.max_prompt_length, limit=rows)
        if len(pairs) == wanted:
            return rows, pairs
        if sum(1 for _ in itertools.islice(read_rows(args.dataset), rows)) < rows:
            raise DataError(f"{args.dataset} has {len(pairs)} pairs, {wanted} are needed: lower --updates or --warmup")
        rows += wanted - len(pairs)  # never too many: a row gives one pair at most


# -- in a process of its own -----------------------------------------------------------------------------------------


def probe(benchmark, args, plan, _):
    """The machine: what `--dtype auto` is, FLOP/s of the best of several matrix products.  Writes the fp32 start."""
    world = distributed.start()
    dtype, peaks, on_gpu = device.pick_dtype("auto", world), {}, world.device.type == "cuda"
    scale = 8 if on_gpu else 1  # 9 GFLOP keep a CPU busy
    for kind in DTYPES if on_gpu else ("bf16", "fp32"):
        a, b = (torch.randn(1024 * scale, n * scale, device=world.device, dtype=DTYPES[kind]) for n in (1024, 4096))
        product = lambda a=a, b=b: now(a @ b)
        seconds = timeit.timeit(product, number=1)
        if seconds < 1:  # else the type is emulated here, and once is long enough
            seconds = min(seconds, *timeit.repeat(product, number=1, repeat=7))
        peaks[kind] = 2 * a.numel() * b.shape[1] / seconds
    if any(name.endswith("fp32") for name in args.contenders):
        ours = benchmark.script.get_args(our_flags(benchmark, args, plan))
        benchmark.write_start(args, ours, plan["adapter"])
    cpu = Path("/proc/cpuinfo").read_text().partition("model name\t: ")[2].partition("\n")[0]
    machine = f"{torch.cuda.get_device_name() if on_gpu else cpu}, {torch.get_num_threads()} of {os.cpu_count()} cores"
    return {"dtype": next(k for k in DTYPES if DTYPES[k] == dtype), "peaks": peaks, "machine": machine}


def run_ours(script, ours, plan, name):
    script.main(ours)
    output, dtype = Path(plan["output"]), "fp32" if name.endswith("fp32") else plan["dtype"]
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    data = re.search(r"training data sha256 (\w+)", (output / "README.md").read_text())[1]
    return {"losses": [line["loss"] for line in lines], "tokens": lines[-1]["num_tokens"], "dtype": dtype, "data": data}


def run_contender(benchmark, args, plan, name):
    ends = []
    register_optimizer_step_post_hook(lambda *_: ends.append(now()))
    ours = benchmark.script.get_args(our_flags(benchmark, args, plan, name))
    is_ours = name.startswith("ours")
    result = run_ours(benchmark.script, ours, plan, name) if is_ours else benchmark.run_trl(args, ours, plan, name)
    times = [after - before for before, after in itertools.pairwise(ends)]
    # Not ru_maxrss: it outlives exec, so a child's would begin at what its parent had.
    highest = 1024 * int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
    result["memory"] = torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else highest
    result["before"] = ends[0] - plan["begin"] - median(times)  # the clock is the same in all processes
    return result | {"updates": len(ends), "times": times[args.warmup - 1 :], "host_memory": highest}


def now(*_):
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return timeit.default_timer()


# -- in the process that compares ------------------------------------------------------------------------------------


def run_child(benchmark, name, work, plan):
    """The JSON that a process of its own prints last."""
    file = Path(tempfile.mkdtemp(dir=work)) / "plan.json"
    file.write_text(json.dumps(plan | {"name": name, "output": str(file.parent / "run"), "begin": now()}))
    words = [sys.executable, benchmark.file, *sys.argv[1:], "--contender", str(file)]
    gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]  # TRL refuses one process that sees several GPUs
    done = subprocess.run(words, env=os.environ | {"CUDA_VISIBLE_DEVICES": gpu}, capture_output=True, text=True)
    if done.returncode:
        print(done.stderr.strip(), file=sys.stderr)
        sys.exit(2 if done.returncode == 2 else f"{name} failed with exit code {done.returncode}: see above")
    return json.loads(done.stdout.strip().splitlines()[-1])


def compare(benchmark, args):
    """Plan the updates, run the contenders, check that all did the same work, print the table."""
    if args.contender:
        plan = json.loads(Path(args.contender).read_text())
        work = probe if plan["name"] == "probe" else run_contender
        return print("\n" + json.dumps(work(benchmark, args, plan, plan["name"])), flush=True)
    plan = {"rows": 0, "output": "DIR", "dtype": "auto"}
    ours = benchmark.script.get_args(our_flags(benchmark, args, plan))
    per_update = args.batch_size * args.gradient_accumulation_steps
    skeleton = load_skeleton(args.model, load_tokenizer(args.model), args, scores=benchmark.scores)
    plan["rows"], pairs = first_pairs(args, (args.warmup + args.updates) * per_update)
    shuffled = epoch_plan(pairs, 0, ours.seed, args.batch_size, args.gradient_accumulation_steps, 1)
    plan["updates"] = [[pair for micro_batch in ranks[0] for pair in micro_batch] for _, ranks in shuffled]
    with tempfile.TemporaryDirectory() as work:
        plan["adapter"] = f"{work}/adapter"
        plan |= run_child(benchmark, "probe", work, plan)
        runs = {name: [] for name in args.contenders}
        for _, name in itertools.product(range(args.rounds), runs):
            runs[name].append(run_child(benchmark, name, work, plan))
            print(f"{name}: {median(runs[name][-1]['times']):.3f} s per update", flush=True)

    # All had to do the same work: did they?
    unique = [sum(len(ids) for pair in update for ids in pair[:3]) for update in plan["updates"]]
    response = [sum(len(ids) for pair in update for ids in pair[1:3]) for update in plan["updates"]]
    linears = [skeleton.get_submodule(path).weight for path in lora.select_targets(skeleton)]
    trainable = ours.lora_r * sum(sum(weight.shape) for weight in linears)
    trainable += skeleton.score.in_features if benchmark.scores else 0
    for name, run in ((name, run) for name, done in runs.items() for run in done):
        due = len(unique), sum(unique), trainable, fingerprint(pairs)
        if name.startswith("trl"):  # it passes a prompt twice
            due = len(unique), 2 * sum(unique) - sum(response), trainable, token_ids(plan["updates"])
        found = run["updates"], run["tokens"], run.get("trainable", trainable), run["data"]
        if found != due:
            counts = "(updates, tokens, trainable parameters, sha256 of token ids)"
            sys.exit(f"{name} had {counts} {found} instead of {due}: no comparison")

    seconds = {name: median(itertools.chain.from_iterable(run["times"] for run in done)) for name, done in runs.items()}
    memory = {name: max(run["memory"] for run in done) for name, done in runs.items()}
    skeleton.requires_grad_(False)  # the base is frozen in all of them
    flops = [sum(speed.useful_flops(skeleton, update)) for update in plan["updates"][args.warmup :]]
    everything = {"runs": runs, "seconds": seconds, "memory": memory, "useful_flops": flops, "peaks": plan["peaks"]}
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "trl", "peft"))
    peaks = ", ".join(f"{peak / 1e12:.3g} TFLOP/s in {kind}" for kind, peak in plan["peaks"].items())
    print(f"\n{plan['machine']}; {packages}; matmul peak {peaks}")
    print(f"{args.updates} x {args.rounds} updates of {per_update} pairs, {mean(unique):.0f} unique tokens an update")
    print("ours: python", Path(benchmark.script.__file__).name, *our_flags(benchmark, args, plan))
    for name in (name for name in runs if name.startswith("trl")):
        given, resolved = (runs[name][0][key].items() for key in ("config", "resolved"))
        print(f"{name}: {runs[name][0]['kind']}Config({', '.join(f'{key}={value!r}' for key, value in given)})")
        print("    resolved:", ", ".join(f"{key}={value}" for key, value in resolved))
    print(f"\n| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    for name, done in runs.items():
        rate, peak = mean(flops) / seconds[name], plan["peaks"][done[0]["dtype"]]
        faster, smaller = (of.get("trl-defaults", float("nan")) / of[name] for of in (seconds, memory))
        print(f"| {name} | {seconds[name]:.3f} | {per_update / seconds[name]:.2f} | {faster:.2f}", end=" | ")
        print(f"{memory[name] / 1e9:.2f} | {smaller:.2f} | {rate / 1e12:.3g} | {rate / peak:.1%} |")
    before = ", ".join(f"{name} {median(run['before'] for run in done):.1f}" for name, done in runs.items())
    print(f"\ns before the first update ({benchmark.before}): {before}")
    if {"ours-fp32", "trl-fp32"} <= runs.keys():
        losses = [runs[name][0]["losses"] for name in ("ours-fp32", "trl-fp32")]
        difference = everything["largest_loss_difference"] = max(abs(a - b) for a, b in zip(*losses, strict=True))
        print(f"equal losses in fp32: largest difference of {len(unique)} updates {difference:.1e}", end="")
        print(f" (from {losses[0][0]:.4f} to {losses[0][-1]:.4f})")
    if args.json:
        everything |= {"unique_tokens": unique, "response_tokens": response, "packages": packages, "args": vars(args)}
        Path(args.json).write_text(json.dumps(everything | {"machine": plan["machine"]}, indent=1, default=list) + "\n")
