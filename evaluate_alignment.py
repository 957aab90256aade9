"""Before and after: the responses of a base model and of adapters on it to the same prompts, measured.

    better = helpful reward above that of the base's response;  safe = harmless score above 0    quadrants of
    cost = -harmless score;  harm rate = share of responses with harmless score below 0          arXiv:2310.12773
    KL to the base = mean over response tokens of sum_v pi(v) * (log pi(v) - log base(v)), over the whole vocabulary

Every policy draws each response by the same chance; differences to the base are of the same prompts.  Intervals are the
middle 95 % of 1,000 bootstrap resamples of the prompts.  A harmless model that is not calibrated has no zero: there are
quantiles of its score then instead of a harm rate, and `safe` means at least the score of the base's response.

    python evaluate_alignment.py --model toy --adapters outputs/quickstart/dpo                             # offline
    python evaluate_alignment.py --prompts data/safety_benchmark.jsonl \\
        --adapters before=outputs/dpo_qwen_trl after=models/aligned \\
        --helpful-rm-path models/helpful_rm --harmless-rm-path models/harmless_rm                          # one GPU

Copy with: formats/ harness/ tools/ distributed.py lora.py lora_targets.py packed_attention.py packed_model.py
    packed_probe.py packing.py preference_data.py reward_models.py sampling.py toy_world.py
"""

import hashlib
import json
import os
import re
from collections import Counter
from functools import partial
from pathlib import Path

from harness import flags


def get_args(argv=None):
    parser = flags.Parser(__doc__)
    count, natural = flags.number(int, least=0), flags.number(int, least=1)
    responses, tokens = flags.number(int, least=1, most=10_000), flags.number(int, least=1, most=10**6)
    share = flags.number(float, above=0, most=1)
    add = parser.group("model")
    add("--model", "--base-model-path", default="Qwen/Qwen3-0.6B", help="the base: folder, hub id or `toy`")
    what = "LoRA adapters, each a policy to measure; --model is then by default what they were trained on"
    add("--adapters", nargs="*", default=[], metavar="[NAME=]DIR", help=what)
    add("--helpful-rm-path", metavar="DIR", help="helpful reward model, a folder of train_rm.py")
    add("--harmless-rm-path", metavar="DIR", help="harmless reward model, a folder of train_rm.py")
    add("--trust-remote-code", action="store_true", help="run model code that comes with the weights")
    add = parser.group("data")
    add("--prompts", metavar="FILE", help="rows with `prompt` and, if known, `category`; or `toy`, as with --model toy")
    add("--benign-categories", nargs="+", metavar="NAME", help="where a refusal is one too many (default: benign...)")
    add("--num-samples", type=count, default=0, metavar="N", help="prompts to read; 0: all")
    add("--max-prompt-length", type=tokens, default=256, metavar="N", help="tokens of the prompt, its end")
    add("--chat-template-strings", action="store_true", help="put plain strings through the chat template")
    add = parser.group("method")
    add("--num-responses", type=responses, default=1, metavar="M", help="responses to each prompt")
    add("--max-new-tokens", type=tokens, default=256, metavar="N", help="tokens of a response at most")
    add("--temperature", type=flags.number(float, least=0), default=1.0, metavar="T", help="0: the likeliest token")
    add("--top-p", type=share, default=1.0, metavar="P", help="sample from the likeliest P")
    add("--seed", type=flags.number(int, least=0, below=2**63), default=42, metavar="N", help="of all that is drawn")
    add = parser.group("memory and device")
    add("--batch-size", type=natural, default=16, metavar="B", help="responses sampled, or pairs scored, at a time")
    add("--dtype", choices=("auto", "bf16", "fp16", "fp32"), default="auto", help="of the base model's weights")
    add("--device", choices=("auto", "cuda", "mps", "cpu"), default="auto", help="where to compute")
    add = parser.group("output")
    add("--output-dir", default="outputs/alignment_report", metavar="DIR", help="where the report goes")
    add("--overwrite", action="store_true", help="replace the report that the output folder holds")
    add("--samples", type=count, default=6, metavar="N", help="prompts shown side by side, per category")
    args = parser.parse_args(argv)
    if args.prompts is None and args.model != "toy":
        parser.error("--prompts FILE has to be given (--prompts toy: those of the toy world)")
    args.prompts = args.prompts or "toy"
    if args.temperature == 0 and args.num_responses > 1:
        parser.error("--num-responses above 1 has no effect at --temperature 0, where all would be the same")
    args.adapters = [named_folder(word) for word in args.adapters]
    names = ["base"] + [name for name, _ in args.adapters]
    if len(set(names)) < len(names):
        twice = max(names, key=names.count)
        parser.error(f"--adapters has two policies called {twice}: tell them apart with NAME=DIR")
    return args


def named_folder(word):
    """NAME=DIR, or DIR named after itself (an epoch_N after its run too) -> (name, folder)."""
    name, equals, folder = word.partition("=")
    if equals and name and not Path(word).exists():
        return name, folder
    path = Path(word).resolve()
    return (f"{path.parent.name}/{path.name}" if is_part_of_run(path) else path.name), word


def is_part_of_run(path):
    return re.fullmatch(r"(epoch_|checkpoint-)\d+", path.name) is not None


if __name__ == "__main__":
    ARGS = get_args()  # before torch is loaded, which takes seconds: --help and a wrong flag are answered at once

import torch
import transformers
from tqdm import tqdm

import distributed
import lora
import reward_models
import toy_world
from formats import written_files
from formats.model_files import ModelError, base_of, check_positions, load_model, load_skeleton, load_tokenizer
from formats.row_files import DataError
from harness import device, run_files, score_cache, training_curves
from packed_model import logps_of, prepare_model
from packing import pack, passes
from sampling import closed, end_tokens, response_text, sample
from tools import evaluation_numbers, implicit_rewards, report_page, report_text
from tools.evaluation_prompts import benign_prompts, read_prompts

TOY_FOLDER = "outputs/toy_world"
REPORTS = "report.json", "report.html", "report.txt", "responses.jsonl"
MANIFEST = "report.manifest.json"  # of these, for the folder may be a run's, which has one of its own
NOT_SETTINGS = "output_dir", "overwrite", "device", "hub"  # of the flags: what changes no number, or is resolved below
SHOWN = (
    "helpful_reward cost harm_rate rule_helpful rule_harm_rate over_refusal kl_per_token implicit_accuracy".split()
)  # in the log
FIELDS = {"helpful": "helpful_reward", "harmless": "harmless_score"}  # of a row, by the reward model's task


def adapter_folder(folder):
    """The folder itself, or its newest epoch_N where the run of Safe-MM-DPO keeps its adapters there alone."""
    epochs = [path for path in Path(folder).glob("epoch_*/adapter_config.json") if is_part_of_run(path.parent)]
    if (Path(folder) / "adapter_config.json").exists() or not epochs:
        return Path(folder)
    return max(epochs, key=lambda path: int(path.parent.name.removeprefix("epoch_"))).parent


# -- what a policy says, and what models say of it -------------------------------------------------------------------


@torch.no_grad()
def sampled(model, tokenizer, adapter, prompts, args, bar):
    """Responses (ids) of one policy, args.num_responses to each prompt in turn; adapter None: the base."""
    wanted, responses = [prompt.ids for prompt in prompts for _ in range(args.num_responses)], []
    with lora.use_adapter(model, adapter):
        for some in passes(wanted, args.batch_size):
            places = range(len(responses), len(responses) + len(some))  # like draws for each policy, where they agree
            settings = args.max_new_tokens, args.seed, args.temperature, args.top_p, places
            responses += sample(model, tokenizer, some, *settings)
            bar.update(len(some))
    return responses


@torch.no_grad()
def measured(model, adapter, judges, prompts, responses, ends, args):
    """Numbers of one policy's responses {name: [one for each]}: log-probs under policy and base and the KL of the two,
    summed over its tokens (nats), and the scores of `judges` {name: RewardModel}.  Raises NonFinite.

    Log-probs are of the tokens as they were sampled, scores of the response with the end that is trained.
    """
    groups = [responses[start : start + args.num_responses] for start in range(0, len(responses), args.num_responses)]
    pairs, places = reward_models.as_pairs([prompt.ids for prompt in prompts], groups)
    as_trained = [[closed(said, ends, prompt.end) for said in group] for prompt, group in zip(prompts, groups)]
    judged, _ = reward_models.as_pairs([prompt.ids for prompt in prompts], as_trained)
    names = ["logp", "base_logp", "kl", *judges]
    numbers = torch.zeros(len(names), 2, len(pairs), dtype=torch.float64)
    for indices in passes(range(len(pairs)), args.batch_size):
        batch = pack([pairs[i] for i in indices], model.device)
        with lora.use_adapter(model, None):
            reference = model.response_states(batch)
            base_logps = logps = logps_of(batch, *reference)
        kl = [torch.zeros_like(side) for side in base_logps]  # of the base to itself
        if adapter is not None:
            with lora.use_adapter(model, adapter):
                *logps, chosen_kl, rejected_kl = model.packed_logps(batch, reference)
                kl = [chosen_kl, rejected_kl]
        found, batch = [logps, base_logps, kl], pack([judged[i] for i in indices], model.device)
        for judge in judges.values():
            with lora.use_adapter(judge.model, judge.adapter):
                found.append(judge.model.packed_scores(batch, judge.head))
        numbers[:, :, indices] = torch.stack([torch.stack(tuple(sides)) for sides in found]).cpu().double()
    if not numbers.isfinite().all():
        raise flags.NonFinite("a model gives numbers that are not finite: try --dtype fp32, or look for broken weights")
    in_order = [numbers[:, side, pair].tolist() for of_prompt in places for side, pair in of_prompt]
    return dict(zip(names, map(list, zip(*in_order)), strict=True))


def response_rows(name, prompts, responses, numbers, tokenizer, ends):
    """A row per response: who said what to which prompt, and the numbers of `measured`."""
    num_responses, rows = len(responses) // len(prompts), []
    for place, ids in enumerate(responses):
        prompt = prompts[place // num_responses]
        row = {"policy": name, "prompt_index": place // num_responses, "response_index": place % num_responses}
        row |= {"category": prompt.category, "prompt": prompt.text}
        row |= {"response": response_text(prompt.ids, ids, ends, tokenizer), "tokens": len(ids)}
        row["finished"] = ids[-1] in ends
        rows.append(row | {field: values[place] for field, values in numbers.items()})
    return rows


# -- the report ------------------------------------------------------------------------------------------------------


def training(folder):
    """The curves of the run that an adapter is from: one in epoch_N has it in the folder above."""
    curves = training_curves.of_run(folder.resolve().parent if is_part_of_run(folder.resolve()) else folder)
    wanted = [prefix + name for name in evaluation_numbers.CURVES for prefix in ("", "eval_")] + ["cost_threshold"]
    return {name: curves[name] for name in wanted if name in curves}


def trained_on(folder, model):
    """The base model that an adapter's folder names; `model` where it names none."""
    return json.loads((folder / "adapter_config.json").read_text("utf-8")).get("base_model_name_or_path") or model


def judge_sha256(judge):
    """sha256 of what a reward model adds to its base, or of all of it."""
    weights = lora.adapter_state(judge.model, judge.adapter) if judge.adapter else judge.model.state_dict()
    return score_cache.weights_sha256([("head", judge.head), *weights.items()])


def check_output(args):
    """Raise RunFolderError when --output-dir holds a report or an input, or cannot be written.  Changes nothing."""
    folder = Path(args.output_dir)
    if sentence := written_files.clash(args, REPORTS):
        raise run_files.RunFolderError(sentence)
    found = [name for name in REPORTS if (folder / name).exists()]
    if found and not args.overwrite:
        raise run_files.RunFolderError(f"{folder} holds a report ({found[0]}): choose another, or pass --overwrite")
    listed = written_files.read(folder, MANIFEST)
    for name in found:
        if name not in listed or not written_files.is_as_listed(folder / name, listed[name]):
            raise run_files.RunFolderError(
                f"{folder / name} is not as this script wrote it ({MANIFEST}): move it away, or choose another folder"
            )
    parent = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise run_files.RunFolderError(f"--output-dir {folder} cannot be written: {parent} is no writable folder")


def main(args):
    # 1 setup
    if distributed.ranks_of_environment()[1] > 1:
        raise distributed.DeviceError("one process evaluates: start it without torchrun")
    world = distributed.start(args.device)
    say = partial(distributed.print0, world)
    check_output(args)
    if "toy" in (args.model, args.prompts):
        toy = toy_world.build(TOY_FOLDER)
        args.model = str(toy / "model") if args.model == "toy" else args.model
        args.prompts = str(toy / "prompts.jsonl") if args.prompts == "toy" else args.prompts

    # 2 prompts, and all that can be checked before the weights are read
    folders = {name: adapter_folder(folder) for name, folder in args.adapters}
    if folders and "model" not in args.given:
        args.model = base_of(folders.values())
        say(f"the base is {args.model}, as the adapters say")
    tokenizer = load_tokenizer(args.model, args.trust_remote_code)
    prompts, cut, report = read_prompts(args.prompts, tokenizer, args)
    if report:
        say(*report, sep="\n")
    labelled = implicit_rewards.read_pairs(args.prompts, tokenizer, args)
    rule = toy_world.judge if all(toy_world.judge(p.text, "").kind != "unknown" for p in prompts) else None
    benign = benign_prompts(prompts, args, rule)
    skeleton = load_skeleton(args.model, tokenizer, args)
    for place, folder in enumerate(folders.values()):
        lora.load_adapter(skeleton, folder, f"policy_{place}")
    rm_folders = {"helpful": args.helpful_rm_path, "harmless": args.harmless_rm_path}
    rm_folders = {task: folder for task, folder in rm_folders.items() if folder}
    records = {
        task: reward_models.read_record(folder, task, tokenizer, args.trust_remote_code)
        for task, folder in rm_folders.items()
    }
    longest = max(len(prompt.ids) for prompt in prompts)
    what = f"a prompt of {longest} tokens and --max-new-tokens {args.max_new_tokens}"
    check_positions(skeleton.config, longest + args.max_new_tokens, what, args.model)

    # 3 models: one frozen base, and on it by name the adapters and the reward models that share it
    dtype = device.pick_dtype(args.dtype, world)
    model = load_model(args.model, dtype, world.device, args.trust_remote_code)
    base_sha256 = score_cache.base_sha256(model)
    policies = {"base": None} | {name: f"policy_{place}" for place, name in enumerate(folders)}
    for name, folder in folders.items():
        if not all(part.isfinite().all() for part in lora.load_adapter(model, folder, policies[name])):
            raise flags.NonFinite(f"the adapter in {folder} has weights that are not finite: train it anew")
        if Path(base := trained_on(folder, args.model)).name != Path(args.model).name:
            say(f"{name} was trained on {base}, and is measured on {args.model}")

    judges = {}
    for task, record in records.items():
        home = model, base_sha256
        judge = reward_models.load(rm_folders[task], task, record, *home, args, dtype, world.device, longest)
        judges[FIELDS[task]] = judge
        say(judge.line)
    lora.switch_adapter(model, None)
    say(f"{prepare_model(model)} ({world.device}, {str(dtype).removeprefix('torch.')})")

    # 4 sample, score, judge
    calibrated = bool(records.get("harmless", {}).get("calibrated"))
    judged = partial(evaluation_numbers.judged, calibrated=calibrated, rule=rule)
    total, by_policy = len(policies) * len(prompts) * args.num_responses, {}
    ends = end_tokens(model, tokenizer)
    bar = tqdm(total=total, desc="responses", disable=not distributed.shows_bars(world))
    for name, adapter in policies.items():
        responses = sampled(model, tokenizer, adapter, prompts, args, bar)
        numbers = measured(model, adapter, judges, prompts, responses, ends, args)
        rows = response_rows(name, prompts, responses, numbers, tokenizer, ends)
        pairs = zip(rows, by_policy.get("base") or [None] * len(rows), strict=True)
        by_policy[name] = [judged(row, base, benign[row["prompt_index"]]) for row, base in pairs]
    bar.close()

    # 5 count
    settings = {name: value for name, value in vars(args).items() if name not in (*run_files.NOT_FLAGS, *NOT_SETTINGS)}
    report = {
        "settings": settings | {"dtype": str(dtype).removeprefix("torch."), "device": world.device.type},
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "base_sha256": base_sha256,
        "prompts_sha256": hashlib.sha256(json.dumps([(p.text, p.category) for p in prompts]).encode()).hexdigest(),
        "reward_models": {
            task: {"folder": rm_folders[task], "calibrated": bool(record.get("calibrated"))}
            | {"shares_the_base": judges[FIELDS[task]].model is model, "sha256": judge_sha256(judges[FIELDS[task]])}
            | {"validation_accuracy": (record.get("validation") or {}).get("accuracy")}
            for task, record in records.items()
        },
        "prompts": len(prompts),
        "prompts_cut": cut,
        "pairs": len(labelled),
        "categories": dict(Counter(prompt.category for prompt in prompts)),
        "over_refusal": {"by": "rule" if rule else "phrases", "benign_prompts": None if rule else sum(benign)},
        "quadrants": evaluation_numbers.QUADRANTS,
        "curves": evaluation_numbers.CURVES,
        "policies": [],
    }
    for name, rows in by_policy.items():
        policy = {"name": name}
        if name in folders:
            policy |= {"folder": str(folders[name]), "trained_on": trained_on(folders[name], args.model)}
            policy["sha256"] = score_cache.weights_sha256(lora.adapter_state(model, policies[name]).items())
            policy["training"] = training(folders[name])
        base_rows = None if name == "base" else by_policy["base"]
        policy |= evaluation_numbers.statistics(rows, base_rows, report["categories"], calibrated, args.seed)
        if labelled and name in folders:
            ratios = implicit_rewards.log_ratios(model, policies[name], labelled, args.batch_size)
            policy["estimates"]["implicit_accuracy"] = implicit_rewards.accuracy(ratios, args.seed)
        report["policies"].append(policy)
        found = [(key, policy["estimates"][key]) for key in SHOWN if key in policy["estimates"]]
        numbers = " ".join("{}={mean:.4f} [{low:.4f}, {high:.4f}]".format(key, **e) for key, e in found)
        if numbers:  # of a base that nothing judges there are none
            say(f"{name}: {numbers}")
    report |= evaluation_numbers.in_words(report)
    report["samples"] = evaluation_numbers.pick_samples(by_policy, args.samples, args.seed)

    # 6 save
    Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    with run_files.whole_files(args.output_dir, MANIFEST) as folder:
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for rows in by_policy.values() for row in rows)
        (folder / "responses.jsonl").write_text("".join(lines), encoding="utf-8")
        text = json.dumps(report, indent=1, ensure_ascii=False) + "\n"
        (folder / "report.json").write_text(text, encoding="utf-8")
        (folder / "report.html").write_text(report_page.page(json.loads(text)), encoding="utf-8")
        (folder / "report.txt").write_text(report_text.text(report), encoding="utf-8")
    say("\n" + report_text.text(report))
    say(f"saved to {args.output_dir}")


USER_ERRORS = (DataError, ModelError, lora.AdapterError, distributed.DeviceError, run_files.RunFolderError)
USER_ERRORS += (reward_models.RewardModelError,)

if __name__ == "__main__":
    flags.run(main, ARGS, *USER_ERRORS)
