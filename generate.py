"""Responses of a model to a file of prompts: to distil from, or best against worst as pairs for DPO; or a chat with it.

    rows out    prompt, response; with a reward, reward; what else the prompt's row had (a category) goes along
    --pairs     prompt, chosen, rejected, chosen_reward, rejected_reward: the best and the worst of --num-responses

The reward is a model of train_rm.py or a function of your own.  What a row draws depends on the seed and its place
among all rows alone: the same flags give the same bytes, and a file that was left unfinished is gone on with.

    python generate.py --model toy --prompts toy --output outputs/responses.jsonl                # laptop, offline
    python generate.py --adapter outputs/dpo_qwen_trl --chat                                     # /base to compare
    python generate.py --prompts p.jsonl --num-responses 8 --pairs --reward-model models/helpful_rm --output pairs.jsonl

Copy with: formats/ harness/ tools/ distributed.py lora.py lora_targets.py packed_attention.py packed_model.py
    packed_probe.py packing.py preference_data.py reward_models.py sampling.py toy_vision.py toy_world.py vision.py
"""

import re
import time
from functools import partial

from harness import endings, flags, toys

NOT_IN_CHAT = """prompts output num_samples num_responses pairs reward_model reward_fn min_reward batch_size
    overwrite""".split()


def get_args(argv=None):
    parser = flags.Parser(__doc__)
    natural, number = flags.number(int, least=1), flags.number(float)
    responses, tokens = flags.number(int, least=1, most=10_000), flags.number(int, least=1, most=10**6)
    count, seed = flags.number(int, least=0), flags.number(int, least=0, below=2**63)
    temperature, share = flags.number(float, least=0), flags.number(float, above=0, most=1)
    add = parser.group("model")
    model = "folder, hub id or `toy`; of an adapter, its base"
    add("--model", "--base-model-path", default="Qwen/Qwen3-0.6B", help=model)
    add("--adapter", metavar="DIR", help="a LoRA adapter (PEFT files)")
    add("--trust-remote-code", action="store_true", help="run model code that comes with the weights")
    add = parser.group("data")
    add("--prompts", metavar="FILE", help="rows with `prompt` (text or messages), or pairs: file, hub id or `toy`")
    add("--num-samples", type=count, default=0, metavar="N", help="prompts to read; 0: all")
    add("--max-prompt-length", type=tokens, default=256, metavar="N", help="tokens of a prompt, its last ones")
    add("--chat-template-strings", action="store_true", help="put plain strings through the chat template")
    add("--chat", action="store_true", help="answer what is typed instead; /help")
    add = parser.group("method")
    add("--num-responses", type=responses, default=1, metavar="K", help="responses to each prompt")
    add("--max-new-tokens", type=tokens, default=256, metavar="N", help="tokens of a response")
    add("--temperature", type=temperature, default=1.0, metavar="T", help="0: the likeliest token each time")
    add("--top-p", type=share, default=1.0, metavar="P", help="draw from the likeliest tokens that make up P; 1: all")
    add("--pairs", action="store_true", help="write the best against the worst response to each prompt, ties dropped")
    add("--reward-model", metavar="DIR", help="scores the responses: a folder of train_rm.py")
    add("--reward-fn", metavar="FILE.py:FUNCTION", help="function(prompt, response) -> number: your code, which is run")
    add("--min-reward", type=number, metavar="X", help="leave out responses with a lower reward")
    add("--seed", type=seed, default=42, metavar="N", help="of the draws")
    add = parser.group("memory and device")
    add("--batch-size", type=natural, default=16, metavar="B", help="responses at once; those to one prompt together")
    add("--dtype", choices=("auto", "bf16", "fp16", "fp32"), default="auto", help="of the weights")
    add("--device", choices=("auto", "cuda", "mps", "cpu"), default="auto", help="where to run")
    add = parser.group("output")
    add("--output", metavar="FILE.jsonl", help="where the rows go; an unfinished file is gone on with")
    add("--overwrite", action="store_true", help="begin anew where the output is there already")
    args = parser.parse_args(argv)
    if args.chat:
        for name in NOT_IN_CHAT:
            if name in args.given:
                parser.error(f"--{name.replace('_', '-')} has no effect with --chat: leave one of them out")
    else:
        for name in ("prompts", "output"):
            if not getattr(args, name):
                parser.error(f"--{name} has to be given (or --chat, to type the prompts)")
    has_reward = args.reward_model or args.reward_fn
    if args.reward_model and args.reward_fn:
        parser.error("--reward-model and --reward-fn are two rewards: leave one of them out")
    if args.reward_fn and not re.fullmatch(r".+\.py:\w+", args.reward_fn):
        parser.error(f"--reward-fn {args.reward_fn} is not FILE.py:FUNCTION, as in scripts/reward_polite.py:polite")
    if args.pairs and not has_reward:
        parser.error("--pairs needs a reward to tell best from worst: --reward-model or --reward-fn")
    if args.pairs and args.num_responses < 2:
        parser.error("--pairs needs two responses to a prompt or more, as in --num-responses 4")
    if args.min_reward is not None and not has_reward:
        parser.error("--min-reward needs a reward: --reward-model or --reward-fn")
    if args.min_reward is not None and args.pairs:
        parser.error("--min-reward chooses single responses, --pairs two: leave one of them out")
    if args.temperature == 0 and (args.num_responses > 1 or "top_p" in args.given):
        other = "top-p" if "top_p" in args.given else "num-responses"
        parser.error(f"--temperature 0 takes the likeliest token each time: leave out --{other}")
    return args


if __name__ == "__main__":
    ARGS = get_args()  # before torch is loaded, which takes seconds: --help and a wrong flag are answered at once

import distributed
import lora
from formats import written_files
from formats.model_files import base_of, load_tokenizer
from harness import device, locks, score_cache
from packed_model import prepare_model
from packing import passes
from sampling import end_tokens, response_text, sample
from tools import generate_output, generate_prompts, generate_reward, generate_rows, models
from tools.generate_chat import chat

SECONDS_PER_LINE = 30  # of the log


def main(args):
    # 1 setup
    if distributed.ranks_of_environment()[1] > 1:
        raise distributed.DeviceError("generation is one process: start it with python, not with torchrun")
    world = distributed.start(args.device)
    say = partial(distributed.print0, world)
    output = generate_output.BatchFile(args.output or "", args.overwrite)
    if not args.chat:
        output.check_place(path for _, _, path in written_files.inputs(args))
        locks.hold(output.path.with_name(f".{output.path.name}.lock"), f"--output {args.output}", endings.say)
    function = generate_reward.load(args.reward_fn) if args.reward_fn else None
    toys.take(args, {"model": "model", "prompts": "prompts.jsonl"})

    # 2 prompts: none for a chat
    if args.adapter and "model" not in args.given:
        args.model = base_of([args.adapter])
    tokenizer = load_tokenizer(args.model, args.trust_remote_code)
    prompts = []
    if not args.chat:
        file = generate_prompts.read(args, tokenizer, models.picture_reader(args, tokenizer))
        prompts = file.prompts
        say(*generate_prompts.report(file, args, tokenizer), sep="\n")

    # 3 models: the policy, and a reward model; the weights are not read before all is known to fit
    adapters = {"policy": args.adapter} if args.adapter else {}
    rewards = models.find_rewards({None: args.reward_model}, tokenizer, args)  # None: of either task
    longest = max((len(prompt.ids) for prompt in prompts), default=args.max_prompt_length)
    models.check(args, tokenizer, adapters, rewards, longest)
    identity = generate_output.identity(args, prompts)
    begun = None if args.chat else output.check(identity)
    dtype = device.pick_dtype(args.dtype, world, begun and begun.identity.get("--dtype"))
    model = models.load(args, adapters, dtype, world.device)
    dtype_name = str(dtype).removeprefix("torch.")
    say(f"{args.model}{f' with {args.adapter}' if args.adapter else ''} ({world.device}, {dtype_name})")
    if args.chat:
        return chat(model, tokenizer, args)
    weights_sha256 = score_cache.weights_sha256(model.state_dict().items())[:16]
    identity |= {"weights": weights_sha256, "--dtype": dtype_name, "--device": world.device.type}
    reward = None
    if rewards:
        base_sha256, max_length = score_cache.base_sha256(model), longest + args.max_new_tokens
        (reward,) = models.load_rewards(args, rewards, model, base_sha256, dtype, max_length, prompts).values()
        say(reward.line)
        if args.min_reward is not None and not reward.record.get("calibrated"):
            say("  these scores have no zero (calibrated: false): --min-reward is a limit by their own measure")
        if reward.model is model:
            lora.switch_adapter(model, "policy" if args.adapter else None)  # loading has switched the reward's on
            say(prepare_model(model, **models.example(prompts, world.device)))

    # 4 generate
    progress = dict.fromkeys(generate_rows.COUNTS, 0) | output.begin(identity)
    prompts_at_once = max(1, args.batch_size // args.num_responses)
    batches, ends = passes(prompts, prompts_at_once), end_tokens(model, tokenizer)
    if progress["batches"]:
        say(f"{output.path}: going on behind batch {progress['batches']} of {len(batches)}")
    began, tokens_before = time.time(), progress["tokens"]
    last_line = began
    for batch in batches[progress["batches"] :]:
        asked = [prompt for prompt in batch for _ in range(args.num_responses)]
        draws = range(progress["responses"], progress["responses"] + len(asked))  # places among all responses
        settings = args.max_new_tokens, args.seed, args.temperature, args.top_p, draws
        ids, pictures = [prompt.ids for prompt in asked], [prompt.pictures for prompt in asked]
        responses = sample(model, tokenizer, ids, *settings, pictures=pictures)
        texts = [response_text(prompt.ids, ids, ends, tokenizer) for prompt, ids in zip(asked, responses, strict=True)]
        scores = []
        if function:
            scores = generate_reward.scores(function, asked, texts)
        if reward:  # of ids as in training
            groups = passes(responses, args.num_responses)
            scores = models.scores(reward, batch, groups, ends, prompts_at_once)
        made = generate_rows.rows_of(batch, texts, scores, args)
        counts = {"prompts": len(batch), "responses": len(asked), "tokens": sum(map(len, responses))}
        counts |= {"cut": sum(ids[-1] not in ends for ids in responses), "rows": len(made.rows)}
        generate_rows.count(progress, scores, **counts, ties=made.num_ties, below=made.num_below)
        is_last = batch is batches[-1]
        output.write(made.rows, progress, finished=is_last)
        now = time.time()
        if now > last_line + SECONDS_PER_LINE or is_last:
            rate, last_line = (progress["tokens"] - tokens_before) / (now - began), now
            say(f"{generate_rows.in_words(progress, args.pairs)}, {rate:,.0f} tokens/s")
    say(f"saved to {output.path}")


if __name__ == "__main__":
    endings.run(main, ARGS)
