"""Compare dpo_hf_run.py with TRL's DPOTrainer: one model, the same LoRA, the same token ids in every update.

An update lasts from the end of one optimiser step to the end of the next.  What comes before is printed apart:
imports, loading, the pass that keeps the reference's log-probs.  trl-best gets the pairs of an update by length.
Useful work is 4 N FLOPs per unique token (a prompt counts once) and 4 H V per response token; N: weights of the blocks'
linears, H V: of the head.  Padding, recomputation, the reference, attention's products and LoRA are no useful work.
Memory is the highest of the whole process (on a GPU: of its tensors), each contender in its own.  Linux only (/proc).

    bash setup.sh bench
    .venv/bin/python benchmarks/dpo_vs_trl.py --model Qwen/Qwen3-0.6B --dataset harmless-base-test.jsonl.gz --rounds 3
"""

import argparse
import dataclasses
import itertools
import json
import os
import subprocess
import sys
import tempfile
import timeit
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import mean, median

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the scripts lie one folder up

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

import distributed
import dpo_hf_run
import flags
import lora
from model_files import ModelError, load_model, load_skeleton, load_tokenizer
from packing import epoch_plan
from preference_data import DataError, Pair, load_pairs, read_rows

CONTENDERS = "ours trl-defaults trl-best ours-fp32 trl-fp32".split()
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
RESOLVED = "bf16 fp16 gradient_checkpointing precompute_ref_log_probs padding_free optim".split()
COLUMNS = ["contender", "s per update", "pairs/s", "x of trl-defaults", "peak memory GB", "x of trl-defaults"]
COLUMNS += ["useful TFLOP/s", "share of measured matmul peak"]


def get_args(argv=None):
    parser = flags.Parser(__doc__)
    add, natural = parser.add_argument, flags.number(int, least=1)
    add("--model", required=True, metavar="DIR", help="folder of the model, or hub id")
    add("--dataset", required=True, metavar="FILE", help="pairs, in any shape that dpo_hf_run.py reads")
    add("--batch-size", type=natural, default=2, metavar="N", help="pairs per pass")
    add("--gradient-accumulation-steps", type=natural, default=4, metavar="N", help="passes per update")
    add("--max-length", type=natural, default=512, metavar="N", help="tokens of prompt + response")
    add("--max-prompt-length", type=natural, default=256, metavar="N", help="tokens of the prompt")
    add("--updates", type=natural, default=10, metavar="N", help="updates to measure, after the warm-up")
    add("--warmup", type=natural, default=3, metavar="N", help="updates before them, not measured")
    add("--rounds", type=natural, default=1, metavar="N", help="run the contenders N times in turn: machines are noisy")
    add("--contenders", nargs="+", choices=CONTENDERS, default=CONTENDERS, metavar="NAME", help=", ".join(CONTENDERS))
    add("--json", metavar="FILE", help="write everything to this file, each measured time too")
    add("--contender", metavar="PLAN", help=argparse.SUPPRESS)  # this process is the one that the file names
    args = parser.parse_args(argv)
    if missing := [name for name in ("trl", "peft", "accelerate") if not find_spec(name)]:
        parser.error(f"{' and '.join(missing)} not installed: run `bash setup.sh bench`")
    return args


def our_flags(args, plan, name="ours"):
    """Command line of dpo_hf_run.py: its defaults, but for the task."""
    words = ["--model", args.model, "--dataset", args.dataset, "--num-samples", plan["rows"], "--eval-samples", 0]
    words += ["--batch-size", args.batch_size, "--gradient-accumulation-steps", args.gradient_accumulation_steps]
    words += ["--max-length", args.max_length, "--max-prompt-length", args.max_prompt_length]
    words += ["--report-to", "none", "--output-dir", plan["output"], "--learning-rate"]
    if name.endswith("fp32"):  # a higher rate, so that the losses move and their being equal means something
        return [*map(str, words), "1e-3", "--dtype", "fp32", "--adapter", plan["adapter"], "--logging-steps", "1"]
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


def probe(args, plan, _):
    """The machine: what `--dtype auto` is, FLOP/s of the best of several matrix products.  Writes an adapter."""
    world = distributed.start()
    dtype, peaks, on_gpu = distributed.pick_dtype("auto", world), {}, world.device.type == "cuda"
    scale = 8 if on_gpu else 1  # 9 GFLOP keep a CPU busy
    for kind in DTYPES if on_gpu else ("bf16", "fp32"):
        a, b = (torch.randn(1024 * scale, n * scale, device=world.device, dtype=DTYPES[kind]) for n in (1024, 4096))
        peaks[kind] = 2 * a.numel() * b.shape[1] / min(timeit.repeat(lambda a=a, b=b: now(a @ b), number=1, repeat=8))
    if any(name.endswith("fp32") for name in args.contenders):
        ours, model = dpo_hf_run.get_args(our_flags(args, plan)), load_model(args.model, torch.float32, "cpu")
        distributed.seed_everything(ours.seed)
        for lora_b in lora.add_adapter(model, "random", ours.lora_r, ours.lora_alpha)[1::2]:
            torch.nn.init.normal_(lora_b, std=0.02)  # with B = 0 the gradient of A is zero, which proves little
        lora.save_adapter(model, "random", plan["adapter"], args.model)
    cpu = Path("/proc/cpuinfo").read_text().partition("model name\t: ")[2].partition("\n")[0]
    machine = f"{torch.cuda.get_device_name() if on_gpu else cpu}, {torch.get_num_threads()} of {os.cpu_count()} cores"
    return {"dtype": next(k for k in DTYPES if DTYPES[k] == dtype), "peaks": peaks, "machine": machine}


def run_ours(args, plan, name):
    dpo_hf_run.main(dpo_hf_run.get_args(our_flags(args, plan, name)))
    lines = [json.loads(line) for line in (Path(plan["output"]) / "metrics.jsonl").read_text().splitlines()]
    dtype, losses = "fp32" if name == "ours-fp32" else plan["dtype"], [line["loss"] for line in lines]
    return {"losses": losses, "tokens": lines[-1]["num_tokens"], "dtype": dtype}


def run_trl(args, plan, name):
    import peft
    import trl
    from datasets import Dataset

    class SamePairs(trl.DPOTrainer):
        """On token ids, in the order given: of itself it tokenises strings, and shuffles in its own way."""

        def _prepare_dataset(self, dataset, *_, **__):
            return dataset

        def _get_train_sampler(self, *_, **__):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    ours, model = dpo_hf_run.get_args(our_flags(args, plan, name)), args.model
    config = dict(per_device_train_batch_size=args.batch_size, max_length=args.max_length, num_train_epochs=1)
    config |= dict(gradient_accumulation_steps=args.gradient_accumulation_steps, learning_rate=ours.learning_rate)
    config |= dict(beta=ours.beta, seed=ours.seed, save_strategy="no", report_to="none", disable_tqdm=True)
    config |= dict(use_cpu=not torch.cuda.is_available())  # without it and without a GPU, TRL's bf16=True is an error
    adapter = peft.LoraConfig(r=ours.lora_r, lora_alpha=ours.lora_alpha, target_modules="all-linear")
    dtype = {"trl-defaults": "bf16", "trl-best": plan["dtype"], "trl-fp32": "fp32"}[name]
    if name != "trl-defaults":  # with bf16 weights autocast stays: LoRA's are fp32, and so would be its products
        config |= dict(bf16=dtype == "bf16", fp16=dtype == "fp16", logging_strategy="no")
        config |= dict(gradient_checkpointing=False, precompute_ref_log_probs=True)
    if name == "trl-best":  # a path, as in TRL's documentation; of itself TRL loads weights as fp32
        config |= dict(model_init_kwargs={"dtype": str(DTYPES[dtype]).removeprefix("torch.")})
    if name == "trl-fp32":  # TRL makes a frozen copy of a given adapter its reference, as ours does
        config |= dict(logging_strategy="steps", logging_steps=1)
        base, adapter = load_model(args.model, torch.float32, "cpu"), None
        model = peft.PeftModel.from_pretrained(base, plan["adapter"], is_trainable=True)
    pairs = [[Pair(*ids) for ids in update] for update in plan["updates"]]
    if name == "trl-best":  # less padding: by length within an update, as group_by_length does beyond it
        pairs = [sorted(update, key=lambda pair: -len(pair[0]) - max(map(len, pair[1:3]))) for update in pairs]
    rows = Dataset.from_list([dict(zip(Pair._fields, pair[:3])) for update in pairs for pair in update])
    settings = trl.DPOConfig(output_dir=plan["output"], **config)
    trainer = SamePairs(model, args=settings, train_dataset=rows, peft_config=adapter)
    trainer.train()
    history, weights = trainer.state.log_history, trainer.model.get_base_model()
    defaults = {field.name: field.default for field in dataclasses.fields(settings)}
    result = {"dtype": dtype, "losses": [entry["loss"] for entry in history if "loss" in entry]}
    result["tokens"] = max(entry.get("num_tokens", 0) for entry in history)
    result["trainable"] = sum(parameter.numel() for parameter in weights.parameters() if parameter.requires_grad)
    result["config"] = {key: value for key, value in config.items() if value != defaults[key]}
    result["resolved"] = {key: str(getattr(settings, key)) for key in RESOLVED}
    result["resolved"] |= {"weights": str(weights.dtype), "attention": weights.config._attn_implementation}
    return result


def run_contender(args, plan, name):
    ends = []
    register_optimizer_step_post_hook(lambda *_: ends.append(now()))
    result = (run_ours if name.startswith("ours") else run_trl)(args, plan, name)
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


def run_child(name, work, plan):
    """The JSON that a process of its own prints last."""
    file = Path(tempfile.mkdtemp(dir=work)) / "plan.json"
    file.write_text(json.dumps(plan | {"name": name, "output": str(file.parent / "run"), "begin": now()}))
    words = [sys.executable, __file__, *sys.argv[1:], "--contender", str(file)]
    gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]  # TRL refuses one process that sees several GPUs
    done = subprocess.run(words, env=os.environ | {"CUDA_VISIBLE_DEVICES": gpu}, capture_output=True, text=True)
    if done.returncode:
        print(done.stderr.strip(), file=sys.stderr)
        sys.exit(2 if done.returncode == 2 else f"{name} failed with exit code {done.returncode}: see above")
    return json.loads(done.stdout.strip().splitlines()[-1])


def main(args):
    if args.contender:
        plan = json.loads(Path(args.contender).read_text())
        work = probe if plan["name"] == "probe" else run_contender
        return print("\n" + json.dumps(work(args, plan, plan["name"])), flush=True)
    plan = {"rows": 0, "output": "DIR", "dtype": "auto"}
    ours = dpo_hf_run.get_args(our_flags(args, plan))
    per_update = args.batch_size * args.gradient_accumulation_steps
    skeleton = load_skeleton(args.model, load_tokenizer(args.model))
    plan["rows"], pairs = first_pairs(args, (args.warmup + args.updates) * per_update)
    shuffled = epoch_plan(pairs, 0, ours.seed, args.batch_size, args.gradient_accumulation_steps, 1)
    plan["updates"] = [[pair for micro_batch in ranks[0] for pair in micro_batch] for _, ranks in shuffled]
    with tempfile.TemporaryDirectory() as work:
        plan["adapter"] = f"{work}/adapter"
        plan |= run_child("probe", work, plan)
        runs = {name: [] for name in args.contenders}
        for _, name in itertools.product(range(args.rounds), runs):
            runs[name].append(run_child(name, work, plan))
            print(f"{name}: {median(runs[name][-1]['times']):.3f} s per update", flush=True)

    seconds = {name: median(itertools.chain.from_iterable(run["times"] for run in done)) for name, done in runs.items()}
    memory = {name: max(run["memory"] for run in done) for name, done in runs.items()}
    linears = [skeleton.get_submodule(path).weight for path in lora.select_targets(skeleton)]
    unique = [sum(len(ids) for pair in update for ids in pair[:3]) for update in plan["updates"]]
    response = [sum(len(ids) for pair in update for ids in pair[1:3]) for update in plan["updates"]]
    # All had to do the same work: did they?
    trainable, twice = ours.lora_r * sum(sum(weight.shape) for weight in linears), 2 * sum(unique) - sum(response)
    for name, run in ((name, run) for name, done in runs.items() for run in done):
        due = len(unique), sum(unique) if name.startswith("ours") else twice, trainable  # TRL passes a prompt twice
        found = run["updates"], run["tokens"], run.get("trainable", trainable)
        if found != due:
            sys.exit(f"{name} had (updates, tokens, trainable parameters) {found} instead of {due}: no comparison")
    weights, head = sum(weight.numel() for weight in linears), skeleton.get_output_embeddings().weight.numel()
    flops = [4 * weights * tokens + 4 * head * answers for tokens, answers in zip(unique, response)][args.warmup :]
    everything = {"runs": runs, "seconds": seconds, "memory": memory, "useful_flops": flops, "peaks": plan["peaks"]}

    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "trl", "peft"))
    peaks = ", ".join(f"{peak / 1e12:.3g} TFLOP/s in {kind}" for kind, peak in plan["peaks"].items())
    print(f"\n{plan['machine']}; {packages}; matmul peak {peaks}")
    print(f"{args.updates} x {args.rounds} updates of {per_update} pairs, {mean(unique):.0f} unique tokens an update")
    print("ours: python dpo_hf_run.py", *our_flags(args, plan))
    for name in (name for name in runs if name.startswith("trl")):
        given, resolved = (runs[name][0][key].items() for key in ("config", "resolved"))
        print(f"{name}: DPOConfig({', '.join(f'{key}={value!r}' for key, value in given)})")
        print("    resolved:", ", ".join(f"{key}={value}" for key, value in resolved))
    print(f"\n| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    for name, done in runs.items():
        rate, peak = mean(flops) / seconds[name], plan["peaks"][done[0]["dtype"]]
        faster, smaller = (of.get("trl-defaults", float("nan")) / of[name] for of in (seconds, memory))
        print(f"| {name} | {seconds[name]:.3f} | {per_update / seconds[name]:.2f} | {faster:.2f}", end=" | ")
        print(f"{memory[name] / 1e9:.2f} | {smaller:.2f} | {rate / 1e12:.3g} | {rate / peak:.1%} |")
    before = ", ".join(f"{name} {median(run['before'] for run in done):.1f}" for name, done in runs.items())
    print(f"\ns before the first update (imports, loading, the pass that keeps the reference's log-probs): {before}")
    if {"ours-fp32", "trl-fp32"} <= runs.keys():
        losses = [runs[name][0]["losses"] for name in ("ours-fp32", "trl-fp32")]
        difference = everything["largest_loss_difference"] = max(abs(a - b) for a, b in zip(*losses, strict=True))
        print(f"equal losses in fp32: largest difference of {len(unique)} updates {difference:.1e}", end="")
        print(f" (from {losses[0][0]:.4f} to {losses[0][-1]:.4f})")
    if args.json:
        everything |= {"unique_tokens": unique, "response_tokens": response, "packages": packages, "args": vars(args)}
        Path(args.json).write_text(json.dumps(everything | {"machine": plan["machine"]}, indent=1, default=list) + "\n")


if __name__ == "__main__":
    flags.run(main, get_args(), DataError, ModelError, lora.AdapterError, distributed.DeviceError)
