"""A chat in the terminal or through a pipe: an answer to each line, as its words come; Ctrl-C stops it alone."""

import re
import sys

from transformers import TextStreamer

import lora
from formats.chat_text import prompt_ids
from sampling import end_tokens, response_text, sample

COMMANDS = """/base   what the base without the adapter answers to the last message
/reset  forget what was said
/help   these lines
/quit   end, as /exit and Ctrl-D do; Ctrl-C stops an answer"""


def draws_of(args, own):
    """((temperature, top_p, top_k), a line that says whose they are) of a chat.

    Flags where either was given, else the model's own generation settings (GenerationConfig) where it samples by them.
    Else the likeliest token: drawn at temperature 1, every second answer of a small model is wrong.
    """
    change = "--temperature and --top-p change that"
    if {"temperature", "top_p"} & set(args.given):
        return (args.temperature, args.top_p, 0), f"temperature {args.temperature:g}, top-p {args.top_p:g}"
    if own.do_sample:
        draws = [own.temperature, own.top_p, own.top_k]
        temperature, top_p, top_k = (
            usual if value is None else value for value, usual in zip(draws, (1.0, 1.0, 0), strict=True)
        )
        words = f"temperature {temperature:g}, top-p {top_p:g}, top-k {top_k}: the model's generation_config.json"
        return (temperature, top_p, top_k), f"{words}; {change}"
    return (0.0, 1.0, 0), f"temperature 0, the likeliest token each time: the model names no settings; {change}"


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
    temperature, top_p, top_k = draws
    settings = max_new_tokens, seed, temperature, top_p
    try:
        with lora.use_adapter(model, adapter):
            (response,) = sample(model, tokenizer, [ids], *settings, streamer=streamer, top_k=top_k)
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
