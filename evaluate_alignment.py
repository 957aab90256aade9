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
    packed_probe.py packing.py preference_data.py reward_models.py sampling.py toy_vision.py toy_world.py vision.py
"""

from functools import partial

from harness import endings, flags, toys
from tools.evaluate_adapters import named_folder


def get_args(argv=None):
    parser = flags.Parser(__doc__)
    count, natural = flags.number(int, least=0), flags.number(int, least=1)
    responses, tokens = flags.number(int, least=1, most=10_000), flags.number(int, least=1, most=10**6)
    share = flags.number(float, above=0, most=1)
    add = parser.group("model")
    add("--model", "--base-model-path", default="Qwen/Qwen3-0.6B", help="the base: folder, hub id or `toy`")
    adapters = "LoRA adapters, each a policy to measure; --model is then by default what they were trained on"
    add("--adapters", nargs="*", default=[], metavar="[NAME=]DIR", help=adapters)
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
    if args.prompts is None and args.model not in toys.FOLDERS:
        parser.error("--prompts FILE has to be given (--prompts toy: those of the toy world)")
    args.prompts = args.prompts or args.model
    if args.temperature == 0 and args.num_responses > 1:
        parser.error("--num-responses above 1 has no effect at --temperature 0, where all would be the same")
    args.adapters = [named_folder(word) for word in args.adapters]
    names = ["base"] + [name for name, _ in args.adapters]
    if len(set(names)) < len(names):
        twice = max(names, key=names.count)
        parser.error(f"--adapters has two policies called {twice}: tell them apart with NAME=DIR")
    return args


if __name__ == "__main__":
    ARGS = get_args()  # before torch is loaded, which takes seconds: --help and a wrong flag are answered at once

from tqdm import tqdm

import distributed
import lora
from formats.model_files import base_of, load_tokenizer
from harness import device, score_cache
from packed_model import prepare_model
from sampling import end_tokens
from tools import (
    evaluate_numbers,
    evaluate_pairs,
    evaluate_prompts,
    evaluate_report,
    evaluate_text,
    evaluate_words,
    models,
)
from tools.evaluate_adapters import CURVES, adapter_folder, other_bases
from tools.evaluate_report import Policy
from tools.evaluate_responses import Kept, measured, response_rows, sampled

FIELDS = {"helpful": "helpful_reward", "harmless": "harmless_score"}  # of a row, by the reward model's task


def main(args):
    # 1 setup
    if distributed.ranks_of_environment()[1] > 1:
        raise distributed.DeviceError("one process evaluates: start it without torchrun")
    world = distributed.start(args.device)
    say = partial(distributed.print0, world)
    evaluate_report.take_output(args)
    toys.take(args, {"model": "model", "prompts": "prompts.jsonl"})

    # 2 prompts
    folders = [(name, adapter_folder(folder)) for name, folder in args.adapters]
    if folders and "model" not in args.given:
        args.model = base_of([folder for _, folder in folders])
        say(f"the base is {args.model}, as the adapters say")
    tokenizer = load_tokenizer(args.model, args.trust_remote_code)
    file = evaluate_prompts.read(args, tokenizer, models.picture_reader(args, tokenizer))
    prompts, categories = file.prompts, evaluate_report.count_categories(file.prompts)
    for line in file.notes:
        say(line)
    labelled = evaluate_pairs.read_pairs(args.prompts, tokenizer, args, file.reader)
    rule, benign = evaluate_prompts.what_is_known(prompts, args)

    # 3 models: one frozen base, and on it by name the adapters and the reward models that share it
    policies = [Policy("base")]
    policies += [Policy(name, f"policy_{place}", folder) for place, (name, folder) in enumerate(folders)]
    adapters = {policy.adapter: policy.folder for policy in policies if policy.adapter}
    reward_folders = {"helpful": args.helpful_rm_path, "harmless": args.harmless_rm_path}
    rewards = models.find_rewards(reward_folders, tokenizer, args)
    longest = max(len(prompt.ids) for prompt in prompts)
    models.check(args, tokenizer, adapters, rewards, longest)  # before the weights are read
    dtype = device.pick_dtype(args.dtype, world)
    model = models.load(args, adapters, dtype, world.device)
    for sentence in other_bases(folders, args.model):
        say(sentence)
    base_sha256 = score_cache.base_sha256(model)
    judges = models.load_rewards(args, rewards, model, base_sha256, dtype, longest + args.max_new_tokens, prompts)
    for judge in judges.values():
        say(judge.line)
    lora.switch_adapter(model, None)
    path = prepare_model(model, **models.example(prompts, world.device))
    say(f"{path} ({world.device}, {str(dtype).removeprefix('torch.')})")
    calibrated = "harmless" in judges and bool(judges["harmless"].record.get("calibrated"))

    # 4 responses: sampled, scored, judged
    rows, ends = {}, end_tokens(model, tokenizer)  # rows: of each policy, by its name
    scorers = {FIELDS[task]: judge for task, judge in judges.items()}
    kept = Kept(args, model, policies, prompts, dtype, say)
    total = len(policies) * len(prompts) * args.num_responses
    bar = tqdm(total=total, desc="responses", disable=not distributed.shows_bars(world))
    for policy in policies:
        responses = sampled(model, tokenizer, policy.adapter, prompts, args, kept, bar)
        numbers = measured(model, policy.adapter, scorers, prompts, responses, ends, args)
        policy_rows = response_rows(policy.name, prompts, responses, numbers, tokenizer, ends)
        evaluate_numbers.judge_rows(policy_rows, rows.get("base"), benign, calibrated, rule)
        rows[policy.name] = policy_rows
    bar.close()

    # 5 report
    report = evaluate_report.settings_entries(args, dtype, world.device) | {
        "base_sha256": base_sha256,
        "prompts_sha256": evaluate_report.prompts_sha256(prompts),
        "reward_models": {
            task: evaluate_report.judge_entry(reward_folders[task], judge, model) for task, judge in judges.items()
        },
        "prompts": len(prompts),
        "prompts_cut": file.num_cut,
        "pairs": len(labelled),
        "categories": categories,
        "over_refusal": {"by": "rule" if rule else "phrases", "benign_prompts": None if rule else sum(benign)},
        "quadrants": evaluate_numbers.QUADRANTS,
        "curves": CURVES,
        "policies": [],
    }
    for policy in policies:
        entry = evaluate_report.policy_entry(policy, model, args.model)
        base_rows = rows["base"] if policy.adapter else None
        entry |= evaluate_numbers.statistics(rows[policy.name], base_rows, categories, calibrated, args.seed)
        if labelled and policy.adapter:
            ratios = evaluate_pairs.log_ratios(model, policy.adapter, labelled, args.batch_size)
            entry["estimates"]["implicit_accuracy"] = evaluate_pairs.accuracy(ratios, args.seed)
        report["policies"].append(entry)
        if line := evaluate_report.log_line(entry):
            say(line)
    report |= evaluate_words.in_words(report)
    picked = evaluate_numbers.pick_samples(rows, args.samples, args.seed)
    report["samples"] = evaluate_prompts.with_pictures(picked, prompts)

    # 6 save
    evaluate_report.save(args.output_dir, report, [row for of_policy in rows.values() for row in of_policy], kept)
    say("\n" + evaluate_text.text(report), f"saved to {args.output_dir}", sep="\n")


if __name__ == "__main__":
    endings.run(main, ARGS)
