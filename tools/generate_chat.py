"""A chat in the terminal or through a pipe: an answer to each line, as its words come; Ctrl-C stops it alone."""

import re
import sys
from typing import NamedTuple

from transformers import TextStreamer

import lora
from formats.chat_text import prompt_ids
from sampling import end_tokens, response_text, sample

COMMANDS = """/base   what the base without the adapter answers to the last message
/reset  forget what was said
/help   these lines
/quit   end, as /exit and Ctrl-D do; Ctrl-C stops an answer"""


class Draws(NamedTuple):
    """How an answer is drawn."""

    temperature: float  # 0: the likeliest token each time
    top_p: float = 1.0  # from the likeliest tokens that make up this much
    top_k: int = 0  # from so many of the likeliest; 0: from all


def draws_of(args, own):
    """(Draws, a line that says whose they are) of a chat.

    Flags where either was given, else the model's own generation settings (GenerationConfig) where it samples by them.
    Else the likeliest token: drawn at temperature 1, every second answer of a small model is wrong.
    """
    change = "--temperature and --top-p change that"
    if {"temperature", "top_p"} & set(args.given):
        draws = Draws(args.temperature, args.top_p)
        return draws, f"temperature {draws.temperature:g}, top-p {draws.top_p:g}"
    if not own.do_sample:
        return Draws(0.0), f"temperature 0, the likeliest token each time: the model names no settings; {change}"
    draws = Draws(
        temperature=1.0 if own.temperature is None else own.temperature,
        top_p=1.0 if own.top_p is None else own.top_p,
        top_k=0 if own.top_k is None else own.top_k,
    )
    words = f"temperature {draws.temperature:g}, top-p {draws.top_p:g}, top-k {draws.top_k}"
    return draws, f"{words}: the model's generation_config.json; {change}"


class Said(TextStreamer):
    """Prints an answer as it comes and keeps its ids, for one that is stopped."""

    def __init__(self, tokenizer):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.ids = None

    def put(self, value):
        self.ids = [] if self.ids is None else self.ids + value.flatten().tolist()  # the prompt comes first
        super().put(value)


def answer(model, tokenizer, adapter, ids, max_new_tokens, seed, draws):
    """Print what the model says to `ids` with the adapter (None: the base); its text, as far as it came."""
    streamer, ends = Said(tokenizer), end_tokens(model, tokenizer)
    settings = max_new_tokens, seed, draws.temperature, draws.top_p
    try:
        with lora.use_adapter(model, adapter):
            (response,) = sample(model, tokenizer, [ids], *settings, streamer=streamer, top_k=draws.top_k)
    except KeyboardInterrupt:
        response = streamer.ids or []
        streamer.end()  # the words that it held back, and the end of the line
    return response_text(ids, response, ends, tokenizer) if response else ""


def chat(model, tokenizer, args):
    """Answer what is typed, or piped in, until /quit or the end.  KeyboardInterrupt where Ctrl-C meets no answer."""
    draws, line = draws_of(args, model.generation_config)
    print(line, "/base, /reset, /help; Ctrl-C stops an answer; /quit", sep="\n", flush=True)
    messages, ids, turn = [], None, 0
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        if line in ("/quit", "/exit"):
            return
        if line == "/reset":
            messages, ids = [], None
        elif line == "/help":
            print(COMMANDS, flush=True)
        elif line == "/base":
            if ids and args.adapter:
                answer(model, tokenizer, None, ids, args.max_new_tokens, args.seed + turn, draws)
            else:
                print("/base needs --adapter and a message to answer", flush=True)
        elif re.fullmatch(r"/\w+", line):  # a slip: not for the model
            print(f"there is no {line}\n{COMMANDS}", flush=True)
        elif line:
            turn += 1
            asked = {"role": "user", "content": line}
            if tokenizer.chat_template:
                ids = prompt_ids([*messages, asked], tokenizer, args.max_prompt_length, day=None)
            else:  # each line stands by itself
                ids = prompt_ids(line, tokenizer, args.max_prompt_length)
            adapter = "policy" if args.adapter else None
            text = answer(model, tokenizer, adapter, ids, args.max_new_tokens, args.seed + turn, draws)
            if text.strip():  # else it is as if nothing had been asked
                messages += [asked, {"role": "assistant", "content": text}]
