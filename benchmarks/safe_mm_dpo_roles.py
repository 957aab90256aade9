"""Compare train_safe_mm_dpo.py, four roles on one frozen base, with four models that are loaded side by side.

four-models is the plain computation: policy (with this project's LoRA), reference and two sequence-classification
models; in every update padded batches of helpful and of harmless pairs, chosen and rejected apart, through policy,
reference and reward model; log-softmax over full logits in the type of the model; the full-vocabulary KL of the
helpful chosen responses from two more forwards.  It leaves prompts unshared and keeps no numbers of frozen models.
Ours is its defaults (additive, w 0.5, KL 0.1) with --cost-estimate snis, so that neither of the two samples: what
sampling E[cost] takes is the phase `cost` in the log of a run.

A batch is padded to its longest row; with --pad-to N to N at least, as loaders with padding="max_length" do.

Both train on the same pairs in the same updates, on average --batch-size of a kind.  An update lasts from the end of
one optimiser step to the end of the next; what comes before the first is printed apart.  Memory is the highest of the
whole process (on a GPU: of its tensors), each contender in its own.  Linux only (/proc).

    python benchmarks/safe_mm_dpo_roles.py --model Qwen/Qwen3-0.6B --rounds 3 \\
        --helpful data/train/helpful_pairs.jsonl --harmless data/train/harmless_pairs.jsonl
"""

import argparse
import itertools
import json
import re
import sys
import tempfile
from functools import partial
from pathlib import Path
from statistics import mean, median
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the scripts lie one folder up

import contenders
import torch
from contenders import DTYPES, now
from torch.optim.optimizer import register_optimizer_step_post_hook

import distributed
import lora
import train_safe_mm_dpo
from formats.model_files import load_model, load_tokenizer, pad_unlike_ends
from formats.row_files import read_rows
from harness import endings, flags, score_cache
from losses import Multiplier, dpo_loss, dynamic_beta
from packing import epoch_plan, joined
from preference_data import fingerprint

TASKS = train_safe_mm_dpo.TASKS
COMPUTATIONS = "ours", "four-models"
COLUMNS = ["contender", "s per update", "pairs/s", "x of four-models", "peak memory GB", "x of four-models"]


def get_args(argv=None):
    parser = flags.Parser(__doc__)
    add, natural = parser.add_argument, flags.number(int, least=1)
    add("--model", required=True, metavar="DIR", help="folder of the model, or hub id")
    for task in TASKS:
        add(f"--{task}", required=True, metavar="FILE", help=f"{task} pairs, in any shape that the script reads")
    add("--batch-size", type=natural, default=2, metavar="N", help="pairs of either kind in an update")
    add("--max-length", type=natural, default=512, metavar="N", help="tokens of prompt + response")
    add("--max-prompt-length", type=natural, default=256, metavar="N", help="tokens of the prompt")
    whole = flags.number(int, least=0)
    add(
        "--pad-to", type=whole, default=0, metavar="N", help="least width of four-models' batches; 0: their longest row"
    )
    add("--updates", type=natural, default=10, metavar="N", help="updates to measure, after the warm-up")
    add("--warmup", type=natural, default=3, metavar="N", help="updates before them, not measured")
    add("--rounds", type=natural, default=1, metavar="N", help="run the contenders N times in turn: machines are noisy")
    add("--dtypes", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"], metavar="NAME", help="fp32, bf16")
    add("--json", metavar="FILE", help="write everything to this file, each measured time too")
    add("--contender", metavar="PLAN", help=argparse.SUPPRESS)  # this process is the one that the file names
    return parser.parse_args(argv)


def our_flags(args, plan, dtype):
    """Command line of train_safe_mm_dpo.py: its defaults, but for the task."""
    words = ["--model", args.model, "--cost-estimate", "snis", "--lora-dropout", 0, "--learning-rate", "1e-4"]
    for task in TASKS:
        words += [f"--train-{task}-path", plan[task], f"--{task}-rm-path", plan[f"{task}_rm"]]
    words += ["--batch-size", 2 * args.batch_size, "--gradient-accumulation-steps", 1, "--epochs", 1]
    words += ["--max-length", args.max_length, "--max-prompt-length", args.max_prompt_length, "--eval-samples", 0]
    words += ["--logging-steps", 1, "--report-to", "none", "--dtype", dtype, "--output-dir", plan["output"]]
    return [*map(str, words)]


def write_reward_models(args, plan):
    """Two random adapters with a head, in folders as train_rm.py leaves them: how good they are does not matter."""
    tokenizer, model = load_tokenizer(args.model), load_model(args.model, torch.float32, "cpu", scores=True)
    torch.manual_seed(0)
    record = {"base_model": args.model, "base_sha256": score_cache.base_sha256(model), "calibrated": False}
    for task in TASKS:
        for lora_b in lora.add_adapter(model, task, 16, 32)[1::2]:
            torch.nn.init.normal_(lora_b, std=0.02)
        folder, head = Path(plan[f"{task}_rm"]), torch.randn_like(model.score.weight) / model.config.hidden_size**0.5
        lora.save_adapter(model, task, folder, args.model, head)
        lora.remove_adapter(model, task)
        tokenizer.save_pretrained(folder)
        (folder / "reward_model.json").write_text(json.dumps(record | {"task": task, "validation": None}))
    return {}


def run_ours(args, plan, dtype):
    train_safe_mm_dpo.main(train_safe_mm_dpo.get_args(our_flags(args, plan, dtype)))
    lines = [json.loads(line) for line in (Path(plan["output"]) / "metrics.jsonl").read_text().splitlines()]
    data = re.search(r"training data sha256 (\w+)", (Path(plan["output"]) / "README.md").read_text())[1]
    return {"losses": [line["loss_H"] for line in lines], "tokens": lines[-1]["num_tokens"], "data": data}


def padded(pairs, side, pad, device, least=0):
    """Prompt + response of one side of each pair, padded on the right to the longest or to `least`: ids, attention
    mask, response mask (B, T)."""
    rows = [pair[0] + pair[side] for pair in pairs]
    width = max(least, *map(len, rows))
    place = torch.arange(width)[None]
    ends, starts = torch.tensor([[len(row)] for row in rows]), torch.tensor([[len(pair[0])] for pair in pairs])
    ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows])
    return [tensor.to(device) for tensor in (ids, (place < ends).long(), (place >= starts) & (place < ends))]


def log_softmax(model, batch):
    ids, mask, _ = batch
    return model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].log_softmax(-1)  # (B, T - 1, V)


def logps(model, batch):
    ids, _, response = batch
    at_tokens = log_softmax(model, batch).gather(-1, ids[:, 1:, None]).squeeze(-1).float()
    return (at_tokens * response[:, 1:]).sum(1)  # (B,)


def vocabulary_kl(policy, reference, batch):
    """KL(policy || reference) per response token, from a forward of each."""
    log_p, inside = log_softmax(policy, batch), batch[2][:, 1:]
    with torch.no_grad():
        log_q = log_softmax(reference, batch)
    return ((log_p.exp() * (log_p - log_q)).sum(-1).float() * inside).sum() / inside.sum()


def run_four_models(args, plan, dtype):
    ours, world = train_safe_mm_dpo.get_args(our_flags(args, plan, dtype)), distributed.start()
    policy, reference = (load_model(args.model, DTYPES[dtype], world.device) for _ in range(2))
    distributed.seed_everything(ours.seed)
    parameters = lora.add_adapter(policy, "policy", ours.lora_r, ours.lora_alpha)
    judges, pad = {}, pad_unlike_ends(args.model, load_tokenizer(args.model), policy.config)
    for task in TASKS:
        judge = judges[task] = load_model(args.model, DTYPES[dtype], world.device, scores=True)
        _, head = lora.load_adapter(judge, plan[f"{task}_rm"], "reward", with_head=True)
        lora.merge_adapter(judge, "reward")
        judge.score.to(DTYPES[dtype]).weight.data.copy_(head)
        judge.config.pad_token_id = pad
    for model in (reference, *judges.values()):
        model.requires_grad_(False)
    optimizer, losses, tokens = torch.optim.AdamW(parameters, lr=ours.learning_rate, weight_decay=0), [], 0
    multiplier = Multiplier(ours.lambda_init, ours.lambda_lr, ours.lambda_min, ours.lambda_max)
    for step, update in enumerate(plan["updates"]):
        optimizer.param_groups[0]["lr"] = ours.learning_rate * (1 - step / len(plan["updates"]))  # as ours: linear
        loss = {}
        for task, pairs in ((task, pairs) for task, pairs in update.items() if pairs):
            sides = [padded(pairs, side, pad, world.device, args.pad_to) for side in (1, 2)]
            with torch.no_grad():
                ref_logps = [logps(reference, side) for side in sides]
                answers = [judges[task](input_ids=ids, attention_mask=mask) for ids, mask, _ in sides]
            scores = [answer.logits[:, 0].float() for answer in answers]
            beta = dynamic_beta(scores[0] - scores[1], ours.beta, ours.w, ours.k)
            loss[task] = dpo_loss(*(logps(policy, side) for side in sides), *ref_logps, beta)[0].mean()
            if task == "helpful":
                loss["kl"] = ours.kl_coeff * vocabulary_kl(policy, reference, sides[0])
            else:
                multiplier.update(-torch.cat(scores).mean().item())
            tokens += sum(len(ids) for pair in pairs for ids in pair)
        both = loss.get("helpful", 0) + multiplier.value * loss.get("harmless", 0)
        (both / (1 + multiplier.value) + loss.get("kl", 0)).backward()
        torch.nn.utils.clip_grad_norm_(parameters, ours.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss["helpful"].item() if "helpful" in loss else None)
    return {"losses": losses, "tokens": tokens}


def measured(args, plan, name):
    """What a contender returns, the seconds of its updates and its highest memory."""
    ends, (computation, dtype) = [], name.rsplit(" ", 1)
    register_optimizer_step_post_hook(lambda *_: ends.append(now()))
    result = (run_ours if computation == "ours" else run_four_models)(args, plan, dtype)
    times = [after - before for before, after in itertools.pairwise(ends)]
    highest = 1024 * int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
    result["memory"] = torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else highest
    result["before"] = ends[0] - plan["begin"] - median(times)
    return result | {"updates": len(ends), "times": times[args.warmup - 1 :]}


def plan_updates(args, work):
    """The plan of the contenders: files with so many usable rows of each kind, and the pairs of every update."""
    plan, pairs, wanted = {"output": "DIR"}, {}, (args.warmup + args.updates) * args.batch_size
    for task in TASKS:
        file = plan[task] = f"{work}/{task}.jsonl"
        rows, pairs[task] = contenders.first_pairs(SimpleNamespace(**vars(args), dataset=getattr(args, task)), wanted)
        lines = (row for _, row in itertools.islice(read_rows(getattr(args, task)), rows))
        lines = [row.decode().strip() if isinstance(row, bytes) else json.dumps(row) for row in lines]
        Path(file).write_text("\n".join(lines) + "\n")
        plan[f"{task}_rm"] = f"{work}/{task}_rm"
    rows, labels = joined(pairs["helpful"], pairs["harmless"])
    seed = train_safe_mm_dpo.get_args(our_flags(args, plan, "fp32")).seed
    shuffled = epoch_plan(range(len(rows)), 0, seed, 2 * args.batch_size, 1, 1)
    updates = [[i for indices in ranks[0] for i in indices] for _, ranks in shuffled]
    plan["updates"] = [
        {task: [turned(rows[i], labels[i][side]) for i in update if labels[i][side]] for side, task in enumerate(TASKS)}
        for update in updates
    ]
    plan |= {"unique": [sum(len(ids) for i in update for ids in rows[i][:3]) for update in updates]}
    return plan | {"data": fingerprint(rows)}


def turned(pair, direction):
    """The pair in the direction of a label: a row of both files may have another order in each."""
    prompt, chosen, rejected, *_ = pair
    return (prompt, chosen, rejected) if direction > 0 else (prompt, rejected, chosen)


def main(args):
    if args.contender:
        plan = json.loads(Path(args.contender).read_text())
        name = plan["name"]
        result = write_reward_models(args, plan) if name == "reward models" else measured(args, plan, name)
        return print("\n" + json.dumps(result), flush=True)
    names = [f"{computation} {dtype}" for dtype in args.dtypes for computation in COMPUTATIONS]
    run_child = partial(contenders.run_child, SimpleNamespace(file=__file__))
    with tempfile.TemporaryDirectory() as work:
        plan = plan_updates(args, work)
        run_child("reward models", work, plan)
        runs = {name: [] for name in names}
        for _, name in itertools.product(range(args.rounds), names):
            runs[name].append(run_child(name, work, plan))
            print(f"{name}: {median(runs[name][-1]['times']):.3f} s per update", flush=True)
    passed = [pair for update in plan["updates"] for pairs in update.values() for pair in pairs]
    for name, run in ((name, run) for name, done in runs.items() for run in done):  # all had to do the same work
        due = sum(plan["unique"]) if name.startswith("ours") else sum(len(ids) for pair in passed for ids in pair)
        if (run["updates"], run["tokens"], run.get("data", plan["data"])) != (len(plan["unique"]), due, plan["data"]):
            sys.exit(f"{name} did not have the {len(plan['unique'])} updates of {due:,} tokens: no comparison")
    seconds = {name: median(itertools.chain.from_iterable(run["times"] for run in done)) for name, done in runs.items()}
    memory = {name: max(run["memory"] for run in done) for name, done in runs.items()}
    pairs = 2 * args.batch_size
    print(f"\n{args.updates} x {args.rounds} updates of {pairs} pairs, {mean(plan['unique']):.0f} unique tokens each")
    print("ours: python train_safe_mm_dpo.py", *our_flags(args, plan, "DTYPE"))
    print(f"\n| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    for name in names:
        rival = f"four-models {name.rsplit(' ', 1)[1]}"
        faster, smaller = seconds[rival] / seconds[name], memory[name] / memory[rival]
        print(f"| {name} | {seconds[name]:.3f} | {pairs / seconds[name]:.2f} | {faster:.2f}", end=" | ")
        print(f"{memory[name] / 1e9:.2f} | {smaller:.2f} |")
    before = ", ".join(f"{name} {median(run['before'] for run in done):.1f}" for name, done in runs.items())
    print(f"\ns before the first update (imports, loading, ours: the passes that keep frozen numbers): {before}")
    for dtype in args.dtypes:
        losses = zip(*(runs[f"{computation} {dtype}"][0]["losses"] for computation in COMPUTATIONS), strict=True)
        difference = max(abs(ours - theirs) for ours, theirs in losses if theirs is not None)
        print(f"largest difference of loss_H, {dtype}: {difference:.1e} (ours has the KL of both sides in its loss)")
    if args.json:
        everything = {"runs": runs, "seconds": seconds, "memory": memory, "unique_tokens": plan["unique"]}
        Path(args.json).write_text(json.dumps(everything | {"args": vars(args)}, indent=1, default=list) + "\n")


if __name__ == "__main__":
    endings.run(main, get_args())
