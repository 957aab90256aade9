"""Plain strings and chat messages -> the text that a model reads -> token ids: what all scripts share of it.

prompt_text    what stands before a response; an assistant's beginning at its end is continued
response_end   the one token in which a response ends, trained, sampled or scored
cut_chat       a chat that is too long, by whole turns and then by words; its headers stay
"""

import os
import re
from bisect import bisect_left
from datetime import datetime
from functools import lru_cache
from typing import NamedTuple

from formats.row_files import DataError, Malformed, Unusable
from formats.row_prompts import common_prefix


class PreferenceError(DataError):
    """A preference that a chat template cannot take: one sentence without its place."""


# -- messages ------------------------------------------------------------------------------------------------------


def as_messages(prompt, chosen, rejected):
    """Plain strings as chat messages; the turns of an HH transcript become turns of the chat."""
    before, *turns = re.split(r"\n\n(Human|Assistant):", prompt)
    roles = {"Human": "user", "Assistant": "assistant"}
    messages = [
        {"role": roles[who], "content": _words(said.lstrip(" "))}
        for who, said in zip(turns[::2], turns[1::2], strict=True)
        if said.strip()  # the last, empty "Assistant:" is where the response goes
    ]
    if before.strip() or not messages:
        messages = [{"role": "user", "content": _words(prompt)}]
    if messages[-1]["role"] == "assistant":  # a beginning, which the responses go on with as they stand
        messages[-1]["content"] += turns[-1][len(turns[-1].rstrip()) :]
        responses = chosen.rstrip(), rejected.rstrip()
    else:
        blanks = " " if turns else ""  # behind "Assistant:"
        responses = _words(chosen.lstrip(blanks)), _words(rejected.lstrip(blanks))
    return messages, *([{"role": "assistant", "content": response}] for response in responses)


def _words(text):
    """A text without empty lines around it and one blank before it; the indentation of code stays."""
    text = re.sub(r"\A(?:[^\S\n]*\n)+", "", text.rstrip())
    return text[1:] if re.match(r" \S", text) else text


def conversation(prompt, response):
    """The messages of both; a beginning of the assistant's that ends the prompt and its response are one message."""
    if not prompt[-1]["role"] == response[0]["role"] == "assistant":
        return prompt + response
    said = prompt[-1]["content"] + response[0]["content"]
    return [*prompt[:-1], prompt[-1] | response[0] | {"content": said}, *response[1:]]


# -- messages -> text ------------------------------------------------------------------------------------------------

DAY = datetime(2024, 7, 26)  # of every text: Llama 3's templates fall back on it
DATE_CODES = "%Y %y %m %-m %d %-d %e %j %B %b %A %a %H %I %M %S %p".split()


def render(messages, tokenizer, day=DAY, **template_args):
    """Messages through the chat template.  Raises Malformed.

    day: what a template that asks for the date is told, so that a run can be repeated; None: the time it is.
    template_args: add_generation_prompt, continue_final_message, tools, or what else the template knows.
    """
    template = tokenizer.get_chat_template(None, template_args.get("tools"))
    if day and "strftime_now" in template:  # transformers hands no function to a template; the newline goes
        written = "".join(f" | replace('{code}', '{day.strftime(code)}')" for code in DATE_CODES)
        template = "{% macro strftime_now(format) %}{{ format" + written + " }}{% endmacro %}\n" + template
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, chat_template=template, **template_args)
    except Exception as error:  # a template is a program: it can divide by zero
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise Malformed(f"the chat template refuses its messages ({reason})") from None


def prompt_text(prompt, tokenizer, **template_args):
    """What stands before a response: a string as it is; messages up to the header of the assistant's answer, or up to
    the words of the assistant's that end them."""
    if isinstance(prompt, str):
        return prompt
    continues = prompt[-1]["role"] == "assistant"
    template_args |= {"add_generation_prompt": not continues, "continue_final_message": continues}
    return render(prompt, tokenizer, **template_args)


def full_texts(prompt, chosen, rejected, tokenizer, prefer=None, **template_args):
    """The texts to tokenise: prompt, prompt + chosen, prompt + rejected, and prefer(prompt).

    Raises Malformed, and PreferenceError where the template takes the prompt and not the preference in it.
    """
    texts = [prompt_text(prompt, tokenizer, **template_args)]
    for response in (chosen, rejected):
        if isinstance(prompt, str):
            texts.append(prompt + response)
        else:
            texts.append(render(conversation(prompt, response), tokenizer, **template_args))
    if prefer:
        preferred = prefer(prompt)
        try:
            texts.append(prompt_text(preferred, tokenizer, **template_args))
            reason = "the chat template drops it" if texts[3] == texts[0] and preferred != prompt else ""
        except Malformed as error:
            reason = str(error)
        if reason:
            raise PreferenceError(f"no place for the preference ({reason}): use --preference-position user")
    try:
        "".join(texts).encode()  # a tokenizer takes no lone surrogates, and names no line
    except UnicodeEncodeError as error:
        raise Malformed(f"text that is no Unicode ({error.reason})") from None
    return texts


# -- text -> token ids ------------------------------------------------------------------------------------------------


def token_ids(texts, tokenizer, is_chat):
    """Ids of each text.  A template writes the special tokens itself; so may a string, whose BOS is not doubled."""
    ids, bos = tokenizer(texts, add_special_tokens=not is_chat, verbose=False)["input_ids"], tokenizer.bos_token_id
    return [row[1:] if row[:2] == [bos, bos] else row for row in ids]


def prompt_ids(prompt, tokenizer, max_prompt_length, **template_args):
    """Token ids of a prompt, a string or messages, cut to max_prompt_length.  Raises Malformed.

    The same ids as a pair's prompt in training, but for a token that spans the seam of prompt and response.
    """
    is_chat = not isinstance(prompt, str)
    (ids,) = token_ids([prompt_text(prompt, tokenizer, **template_args)], tokenizer, is_chat)
    if is_chat:
        if len(ids) > max_prompt_length:
            prompt = cut_chat(prompt, tokenizer, max_prompt_length, **template_args)
            (ids,) = token_ids([prompt_text(prompt, tokenizer, **template_args)], tokenizer, is_chat)
        return ids
    return _cut(_never_empty(_open(ids, tokenizer), tokenizer), max_prompt_length, tokenizer)


def _open(ids, tokenizer):
    """Ids of a string that goes on: some tokenizers end every text."""
    while ids and ids[-1] == tokenizer.eos_token_id:
        ids = ids[:-1]
    return ids


def _never_empty(ids, tokenizer):
    """Something must predict the first token."""
    return ids or [tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id]


def _cut(ids, length, tokenizer):
    """The last `length` ids, of which a BOS at the beginning is one."""
    keep = int(ids[0] == tokenizer.bos_token_id)
    return ids[:keep] + ids[keep + max(0, len(ids) - length) :]


def cut_chat(prompt, tokenizer, max_prompt_length, **template_args):
    """Messages whose text has at most max_prompt_length tokens.  Raises Unusable where no word has room.

    The oldest turns go first, up to a user's, and never the system's.  Where the last turn is still too long, the
    longest messages lose the beginning of their words, down to as many tokens for each as fit.
    """

    def excess(messages):
        text = prompt_text(messages, tokenizer, **template_args)
        return len(token_ids([text], tokenizer, is_chat=True)[0]) - max_prompt_length

    num_system = next((n for n, message in enumerate(prompt) if message["role"] != "system"), 0)
    system, turns = prompt[:num_system], prompt[num_system:]
    starts = [0] + [n for n, message in enumerate(turns) if n and message["role"] == "user"]
    fitting = bisect_left(starts, True, key=lambda start: excess(system + turns[start:]) <= 0)
    if fitting < len(starts):
        return system + turns[starts[fitting] :]
    messages = system + turns[starts[-1] :]
    texts = [message["content"] if isinstance(message["content"], str) else "" for message in messages]
    ids = [tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in texts]
    lengths, too_many = [len(row) for row in ids], excess(messages)
    room = sum(lengths)  # tokens for the words of all messages
    while too_many > 0:
        room -= too_many
        # The most tokens for each message with which all have room.
        most = bisect_left(
            range(1, max(lengths, default=0) + 1), True, key=lambda n: sum(min(n, m) for m in lengths) > room
        )
        if most < 1:
            raise Unusable("the chat template's own words leave no room within --max-prompt-length")
        cut = []
        for message, text, row in zip(messages, texts, ids, strict=True):
            kept = len(text) if len(row) <= most else len(tokenizer.decode(row[-most:]).lstrip("\ufffd"))
            cut.append(message | {"content": text[-kept:]} if kept < len(text) else message)
        too_many = excess(cut)
    return cut


# -- the end of a response --------------------------------------------------------------------------------------------


def response_end(prompt, tokenizer):
    """Id of the token that ends a response to this prompt, in training, sampling and scoring.

    Messages, or a string that a chat template has rendered already: the token in which the template ends the
    assistant's turn.  Any other string, and a template that ends it in no token of its own: the end-of-sequence.
    """
    is_chat = not isinstance(prompt, str) or is_rendered(prompt, tokenizer)
    return turn_end(tokenizer) if is_chat else tokenizer.eos_token_id


def is_rendered(text, tokenizer):
    """Whether a string holds the end of a turn, as the chat template writes it."""
    return bool(tokenizer.chat_template) and tokenizer.convert_ids_to_tokens(turn_end(tokenizer)) in text


def is_past_template(text, tokenizer):
    """Whether the prompt is a string that does not read as the tokenizer's chat template writes: it holds no end of a
    turn, and does not end in the header of the assistant's answer.
    """
    if not tokenizer.chat_template or is_rendered(text, tokenizer):
        return False
    header = _answer_header(tokenizer, str(tokenizer.chat_template))
    return not (header and text.endswith(header))


@lru_cache(8)
def _answer_header(tokenizer, template):
    talk = [{"role": "user", "content": "What is said"}]
    try:
        before, whole = (render(talk, tokenizer, add_generation_prompt=begins) for begins in (False, True))
    except Malformed:
        return ""
    return whole.removeprefix(before)


def turn_end(tokenizer):
    """Id of the token that ends the assistant's turn (Gemma's <end_of_turn>, ChatML's <|im_end|>), or the eos."""
    return _turn_end(tokenizer, str(tokenizer.chat_template)) if tokenizer.chat_template else tokenizer.eos_token_id


@lru_cache(8)
def _turn_end(tokenizer, template):
    said = "What is said"
    try:
        talk = [{"role": "user", "content": said}, {"role": "assistant", "content": said}]
        tail = render(talk, tokenizer).rpartition(said)[2]
    except Malformed:
        return tokenizer.eos_token_id
    own = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    ends = (i for i in tokenizer(tail, add_special_tokens=False)["input_ids"] if i in own)
    return next((i for i in ends if tokenizer.decode([i]).strip()), tokenizer.eos_token_id)


def _ended(ids, end, tokenizer, is_chat):
    """A response's ids with its one end; what a template or a text writes behind it goes (a newline, another end)."""
    if is_chat and end in ids:
        ids = ids[: len(ids) - ids[::-1].index(end)]
    places = [place for place, token in enumerate(ids) if token in (end, tokenizer.eos_token_id)]
    for place in reversed(places):
        if tokenizer.decode(ids[place + 1 :]).strip():  # an end between two turns, or in a text
            break
        ids = ids[:place]
    return [*ids, end]


def encode_pair(ids, tokenizer, max_length, max_prompt_length, end, is_chat=False):
    """[prompt, prompt + chosen, prompt + rejected, and perhaps the prompted prompt] as token ids -> the ids of
    (prompt, chosen, rejected, prompted prompt or None).

    Where a token spans the seam of prompt and response, it belongs to the responses: the boundary is the longest common
    prefix of the first three.  Too long a string loses its beginning, the prompted one the same; then the responses
    lose their end.  A chat is `cut_chat` before.  With max_prompt_length 3, where 1 is the BOS and 9 the end:

        prompt               1 2 3 4        ->   1 3 4          2 goes, the BOS stays
        prompt + chosen      1 2 3 4 5 6    ->   5 6 9
        prompt + rejected    1 2 3 4 7      ->   7 9
        prompted prompt      1 2 3 4 8 8    ->   1 3 4 8 8      as many go
    """
    whole_prompt, with_chosen, with_rejected, *prompted = ids
    boundary = min(common_prefix(whole_prompt, with_chosen), common_prefix(whole_prompt, with_rejected))
    uncut = _never_empty(whole_prompt[:boundary], tokenizer)
    prompt = _cut(uncut, max_prompt_length, tokenizer)
    room = max_length - len(prompt)
    chosen = _ended(with_chosen[boundary:], end, tokenizer, is_chat)[:room]
    rejected = _ended(with_rejected[boundary:], end, tokenizer, is_chat)[:room]
    if not prompted:
        return prompt, chosen, rejected, None
    (prompted,) = prompted
    if prompted == whole_prompt:
        prompted = prompt
    elif is_chat:
        spanning = len(whole_prompt) - boundary  # tokens at its end that belong to the responses
        prompted = prompted[: len(prompted) - spanning]
    else:  # the preference stands at its end
        prompted, removed = _open(prompted, tokenizer), len(uncut) - len(prompt)
        prompted = _cut(prompted, len(prompted) - removed, tokenizer)
    return prompt, chosen, rejected, prompted


# -- what a template does to a row ------------------------------------------------------------------------------------


def note(notes, where, prompt, chosen, rejected, texts, tokenizer):
    """Add to notes {change: [where]} what the text of a row of messages has otherwise than they say.

    texts: those of `full_texts`; of a prompt alone, with no responses, the first.
    """
    for change, detail in _changes(prompt, chosen, rejected, texts, tokenizer):
        notes.setdefault(change, []).append(where + detail)


def note_lines(notes, rows, messages, tokenizer, **template_args):
    """Lines for the report: the notes with a count of `rows` ("pairs"), and the date that a template writes."""
    lines = [f"  in {len(places):,} {rows} {change}; the first is {places[0]}" for change, places in notes.items()]
    another_day = datetime(1987, 11, 9, 13)
    if render(messages, tokenizer, **template_args) != render(messages, tokenizer, another_day, **template_args):
        lines.append(f"  the chat template writes a date: {DAY:%d %b %Y} in every run")
    return lines


def _changes(prompt, chosen, rejected, texts, tokenizer):
    """[(change, detail)], both in words."""
    changes = []
    of_prompt, *whole_texts = texts[:3]
    shared = len(os.path.commonprefix([of_prompt, *whole_texts]))
    if shared < len(of_prompt):
        lacks = f", and lacks {of_prompt[shared:]!r}"
        changes.append(("the prompt in training is not that of generation", lacks))
    last_words = str(prompt[-1]["content"]).strip()
    behind_words = min(shared, of_prompt.rfind(last_words) + len(last_words)) if last_words in of_prompt else shared

    def response_text(message, text):
        """What stands behind the prompt, with a beginning of the answer that generation is given (<think>)."""
        is_there = _letters(message["content"]) in _letters(text[behind_words:])
        return text[behind_words:] if is_there else text[shared:]

    in_prompt = [_dropped(message, of_prompt[:shared]) for message in prompt]
    in_responses = []
    for response, text in zip((chosen, rejected), whole_texts):
        in_responses += [_dropped(message, response_text(message, text)) for message in response]
    for side, sizes in (("responses", in_responses), ("prompt", in_prompt)):
        dropped, of_all = sum(size.dropped for size in sizes), sum(size.all for size in sizes)
        if dropped:
            detail = f", {dropped:,} of {of_all:,} characters"
            changes.append((f"the chat template drops text of the {side}", detail))
    others = sorted({message["role"] for message in chosen + rejected} - {"assistant"})
    if others:
        changes.append((f"the responses hold turns of the {' and the '.join(others)}, which carry loss", ""))
    if any(isinstance(m["content"], str) and is_rendered(m["content"], tokenizer) for m in prompt):
        changes.append(("the prompt's words hold the end of a turn, as the chat template writes it", ""))
    return changes


class Size(NamedTuple):
    """Characters of a message."""

    dropped: int  # those that its text lacks
    all: int


def _dropped(message, text):
    """The Size of a message's words in a text; white space counts in front of code alone."""
    dropped, size = 0, 0
    for key in ("content", "reasoning_content", "reasoning", "thinking"):
        said = message.get(key)
        if not isinstance(said, str) or message["role"] == "tool":  # a template may write a tool's words as JSON
            continue
        letters = _letters(said)
        size += len(letters)
        if said.strip() in text or letters in _letters(text):
            code = re.match(r"(?:\t| {2})\s*\S.*", said)
            if code and code[0].rstrip() not in text:
                indentation = len(said) - len(said.lstrip())
                dropped += indentation
                size += indentation
        else:
            there, lengths = _letters(text), range(1, len(letters) + 1)
            head = bisect_left(lengths, True, key=lambda n: letters[:n] not in there)
            tail = bisect_left(lengths, True, key=lambda n: letters[-n:] not in there)
            dropped += len(letters) - max(head, tail)
    return Size(dropped, size)


def _letters(text):
    return "".join(text.split())
