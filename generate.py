"""Responses of a model to a file of prompts: to distil from, or best against worst as pairs for DPO; or a chat with it.

    rows out    prompt, response; with a reward, reward; what else the prompt's row had (a category) goes along
    --pairs     prompt, chosen, rejected, chosen_reward, rejected_reward: the best and the worst of --num-responses

The reward is a model of train_rm.py or a function of your own.  What a row draws depends on the seed and its place
among all rows alone: the same flags give the same bytes, and a file that was left unfinished is gone on with.

    python generate.py --model toy --prompts toy --output outputs/responses.jsonl                # laptop, offline
    python generate.py --adapter outputs/dpo_qwen_trl --chat                                     # /base to compare
    python generate.py --prompts p.jsonl --num-responses 8 --pairs --reward-model models/helpful_rm --output pairs.jsonl

Copy with: formats/ harness/ tools/ distributed.py lora.py lora_targets.py packed_attention.py packed_model.py
    packed_probe.py packing.py preference_data.py reward_models.py sampling.py toy_world.py
"""

import hashlib
import itertools
import json
import re
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import NamedTuple

from harness import flags


def get_args(argv=None):
    parser = flags.Parser(__doc__)
    natural, number = flags.number(int, least=1), flags.number(float)
    responses, tokens = flags.number(int, least=1, most=10_000), flags.number(int, least=1, most=10**6)
    count, seed = flags.number(int, least=0), flags.number(int, least=0, below=2**63)
    temperature, share = flags.number(float, least=0), flags.number(float, above=0, most=1)
    add = parser.group("model")
    what = "folder, hub id or `toy`; of an adapter, its base"
    add("--model", "--base-model-path", default="Qwen/Qwen3-0.6B", help=what)
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
    names = "prompts output num_samples num_responses pairs reward_model reward_fn min_reward batch_size overwrite"
    for name in names.split() if args.chat else ():
        if name in args.given:
            parser.error(f"--{name.replace('_', '-')} has no effect with --chat: leave one of them out")
    for name in () if args.chat else ("prompts", "output"):
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

import torch

import distributed
import lora
import reward_models
import toy_world
from formats import written_files
from formats.chat_text import as_messages, note, note_lines, prompt_ids, prompt_text, response_end
from formats.model_files import ModelError, base_of, check_positions, load_model, load_skeleton, load_tokenizer
from formats.preference_rows import recognise
from formats.row_files import DataError, Malformed, Unusable, parse_row, read_rows
from formats.row_prompts import shortened, with_context
from harness import device, score_cache
from packed_model import prepare_model
from packing import pack, passes
from sampling import closed, end_tokens, response_text, sample
from tools import generated_rows, reward_function
from tools.batch_file import BatchFile, OutputError, files_sha256
from tools.chat_session import chat

TOY_FOLDER = "outputs/toy_world"
SECONDS_PER_LINE = 30  # of the log
MATTER = "pairs num_responses min_reward max_new_tokens temperature top_p batch_size seed".split()


class Row(NamedTuple):
    where: str  # file:line
    prompt: str | list  # text or messages, as it goes to the output
    others: dict  # fields that go along
    ids: list
    end: int  # the token that ends a response to it


def read_prompts(args, tokenizer):
    """(rows of --prompts, lines to print).  Raises DataError with file:line at the first mistake."""
    rows, cut, left_out, notes, talk = [], 0, Counter(), {}, None
    for where, row in itertools.islice(read_rows(args.prompts), args.num_samples or None):
        try:
            row = parse_row(row)
            json.dumps(row, ensure_ascii=False, default=str).encode()  # half a surrogate pair cannot be written
            try:
                shape = recognise(row, where)
            except DataError:  # no preference row
                shape = None
            prompt, others = generated_rows.prompt_of(row, shape)
            wrapped = args.chat_template_strings and isinstance(prompt, str)
            shown = as_messages(prompt, "", "")[0] if wrapped else prompt  # as in training
            shown, template_args = with_context(row, shown)
            shown = shortened(shown, -args.max_prompt_length)
            talk = (shown, template_args) if isinstance(shown, list) else talk
            if isinstance(shown, list) and not tokenizer.chat_template:
                raise DataError(f"{where} needs a chat template and this tokenizer has none: use an instruct model's")
            whole, ids = (
                prompt_ids(shown, tokenizer, length, **template_args)
                for length in (sys.maxsize, args.max_prompt_length)
            )
            rows.append(Row(where, prompt, others, ids, response_end(shown, tokenizer)))
            cut += ids != whole
            if isinstance(shown, list):
                note(notes, where, shown, [], [], [prompt_text(shown, tokenizer, **template_args)], tokenizer)
        except Unusable as reason:
            left_out[str(reason)] += 1
        except (Malformed, generated_rows.PromptError, UnicodeEncodeError) as problem:
            raise DataError(f"{where}: {problem}; mend the row") from None
    if not rows:
        raise DataError(f"{args.prompts} has no row with a prompt: name a file that has")
    longest, text = max(len(row.ids) for row in rows), repr(tokenizer.decode(rows[0].ids))
    text = text if len(text) <= 150 else f"{text[:60]} ... {text[-80:]}"
    report = [f"{args.prompts}: {len(rows):,} prompts of {longest} tokens at most"]
    report += [f"  left out {count:,} rows because {reason}" for reason, count in left_out.items()]
    report += [f"  cut {cut:,} prompts to --max-prompt-length {args.max_prompt_length}"] if cut else []
    report += note_lines(notes, "prompts", talk[0], tokenizer, **talk[1]) if talk else []
    return rows, [*report, f"  row 0  {text}"]


@torch.no_grad()
def model_rewards(reward, prompts, responses, batch_size, device):
    """Scores of responses (lists of ids, a list of them for each prompt) under a RewardModel, one list for all."""
    triples, places = reward_models.as_pairs(prompts, responses)
    scores = torch.zeros(2, len(triples))
    with lora.use_adapter(reward.model, reward.adapter):
        for indices in passes(range(len(triples)), batch_size):
            batch = pack([triples[i] for i in indices], device)
            scores[:, indices] = torch.stack(reward.model.packed_scores(batch, reward.head)).float().cpu()
    if not scores.isfinite().all():
        raise flags.NonFinite("the reward model gives scores that are not finite: try --dtype fp32")
    return [scores[place].item() for of_prompt in places for place in of_prompt]


def main(args):
    # 1 setup
    if distributed.ranks_of_environment()[1] > 1:
        raise distributed.DeviceError("generation is one process: start it with python, not with torchrun")
    world = distributed.start(args.device)
    say, output = partial(distributed.print0, world), BatchFile(args.output or "", args.overwrite)
    if not args.chat:
        output.check_place(path for _, _, path in written_files.inputs(args))
    function = args.reward_fn and reward_function.load(args.reward_fn)
    if "toy" in (args.model, args.prompts):
        toy = toy_world.build(TOY_FOLDER)
        args.model = str(toy / "model") if args.model == "toy" else args.model
        args.prompts = str(toy / "prompts.jsonl") if args.prompts == "toy" else args.prompts

    # 2 prompts and reward (before the model: a mistake in them should not wait for gigabytes of weights)
    if args.adapter and "model" not in args.given:
        args.model = base_of([args.adapter])
    tokenizer = load_tokenizer(args.model, args.trust_remote_code)
    skeleton = load_skeleton(args.model, tokenizer, args)
    adapter = "policy" if args.adapter else None
    if adapter:
        lora.load_adapter(skeleton, args.adapter, adapter)  # a wrong one shows here
    rows = []
    if not args.chat:
        rows, report = read_prompts(args, tokenizer)
        say(*report, sep="\n")
    longest = max((len(row.ids) for row in rows), default=args.max_prompt_length)
    what = f"a prompt of {longest} tokens and --max-new-tokens {args.max_new_tokens}"
    longest += args.max_new_tokens
    check_positions(skeleton.config, longest, what, args.model)
    identity = {f"--{name.replace('_', '-')}": getattr(args, name) for name in MATTER}
    identity["prompts"] = hashlib.sha256(json.dumps([row[1:] for row in rows], default=str).encode()).hexdigest()[:16]
    identity["reward"] = None
    if function:
        file, _, name = args.reward_fn.rpartition(":")
        identity["reward"] = f"{name} {files_sha256([file])}"
    if args.reward_model:
        folder = Path(args.reward_model)
        record = reward_models.read_record(folder, None, tokenizer, args.trust_remote_code)
        reward_models.check_loads(folder, record, skeleton, tokenizer, args)
        identity["reward"] = files_sha256([folder / "reward_model.json", *sorted(folder.glob("*.safetensors"))])
    if not args.chat:
        output.check(identity)

    # 3 models
    begun_in = None if args.chat else output.begun()[0].get("--dtype")
    dtype = device.pick_dtype(args.dtype, world, begun_in)
    model = load_model(args.model, dtype, world.device, args.trust_remote_code)
    if adapter:
        lora.load_adapter(model, args.adapter, adapter)
    dtype_name = str(dtype).removeprefix("torch.")
    say(f"{args.model}{f' with {args.adapter}' if adapter else ''} ({world.device}, {dtype_name})")
    if args.chat:
        return chat(model, tokenizer, args)
    weights = score_cache.weights_sha256(model.state_dict().items())[:16]
    identity |= {"weights": weights, "--dtype": dtype_name, "--device": world.device.type}
    reward = None
    if args.reward_model:
        home = model, score_cache.base_sha256(model)
        reward = reward_models.load(folder, record["task"], record, *home, args, dtype, world.device, longest)
        say(reward.line)
        if args.min_reward is not None and not record.get("calibrated"):
            say("  these scores have no zero (calibrated: false): --min-reward is a limit by their own measure")
        if reward.model is model:
            lora.switch_adapter(model, adapter)  # loading has switched the reward's on
            say(prepare_model(model))

    # 4 generate
    progress = dict.fromkeys(generated_rows.COUNTS, 0) | output.begin(identity)
    prompts_at_once = max(1, args.batch_size // args.num_responses)
    batches, ends, began = passes(rows, prompts_at_once), end_tokens(model, tokenizer), time.time()
    done, tokens_before, last_line = progress["batches"], progress["tokens"], began
    if done:
        say(f"{output.path}: going on behind batch {done} of {len(batches)}")
    for place in range(done, len(batches)):
        batch = batches[place]
        asked = [row for row in batch for _ in range(args.num_responses)]
        first = place * prompts_at_once * args.num_responses  # of the batch's places among all responses
        places = range(first, first + len(asked))
        settings = args.max_new_tokens, args.seed, args.temperature, args.top_p, places
        responses = sample(model, tokenizer, [row.ids for row in asked], *settings)
        texts = [response_text(row.ids, response, ends, tokenizer) for row, response in zip(asked, responses)]
        cut = [response[-1] not in ends for response in responses]
        of_prompts = passes(range(len(asked)), args.num_responses)  # places of each prompt's responses
        rewards = []
        if function:
            rewards = [
                reward_function.call(function, generated_rows.text_of(row.prompt), text, row.where)
                for row, text in zip(asked, texts)
            ]
        if reward:  # of ids as in training
            as_trained = [closed(response, ends, row.end) for row, response in zip(asked, responses)]
            answers = [[as_trained[i] for i in places] for places in of_prompts]
            rewards = model_rewards(reward, [row.ids for row in batch], answers, prompts_at_once, world.device)
        lines = []
        for row, places in zip(batch, of_prompts, strict=True):
            said, worth = [texts[i] for i in places], [rewards[i] for i in places if rewards]
            if args.pairs:
                pair = generated_rows.pair_row(row.prompt, row.others, said, worth)
                lines += [pair] if pair else []
                progress["ties"] += pair is None
            else:
                lines += generated_rows.response_rows(row.prompt, row.others, said, worth)
        if args.min_reward is not None:
            enough = [line for line in lines if line["reward"] >= args.min_reward]
            progress["below"] += len(lines) - len(enough)
            lines = enough
        counts = {"prompts": len(batch), "responses": len(asked), "cut": sum(cut), "rows": len(lines)}
        generated_rows.count(progress, rewards, tokens=sum(map(len, responses)), **counts)
        output.write(lines, progress, finished=place == len(batches) - 1)
        now = time.time()
        if now > last_line + SECONDS_PER_LINE or place == len(batches) - 1:
            rate, last_line = (progress["tokens"] - tokens_before) / (now - began), now
            say(f"{generated_rows.in_words(progress, args.pairs)}, {rate:,.0f} tokens/s")
    say(f"saved to {output.path}")


USER_ERRORS = (DataError, Malformed, Unusable, ModelError, lora.AdapterError, distributed.DeviceError, OutputError)
USER_ERRORS += (reward_models.RewardModelError, reward_function.RewardFunctionError)

if __name__ == "__main__":
    flags.run(main, ARGS, *USER_ERRORS)
