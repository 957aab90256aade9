"""What a row asks, whole: messages with a role and a text, the columns around a prompt, and those that nobody reads."""

import re
import reprlib

from formats.json_files import parse_json
from formats.row_files import Malformed, Unusable

# -- messages ------------------------------------------------------------------------------------------------------

ROLES = "system", "user", "assistant", "tool"  # what chat templates know; others they drop, or take for one of these
OTHER_ROLES = {"human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant", "developer": "system"}
OTHER_ROLES |= {"function": "tool", "observation": "tool", "ipython": "tool"}


def as_turns(messages, field):
    """Messages with a role that templates know and a content that is a string; keys that are null go.  Those of
    ShareGPT, {"from": "human", "value": ...}, become such.  Raises Malformed: to many a template a role of another name
    or a content that is no string is nothing at all.
    """
    if not (messages and isinstance(messages, list) and all(isinstance(message, dict) for message in messages)):
        raise Malformed(f"`{field}` is not a list of messages with role and content, or with from and value")
    turns = []
    for message in messages:
        kept = {key: value for key, value in message.items() if value is not None}
        if {"from", "value"} <= kept.keys() and not kept.keys() & {"role", "content"}:
            kept["role"], kept["content"] = str(kept.pop("from")).lower(), kept.pop("value")
            kept["role"] = OTHER_ROLES.get(kept["role"], kept["role"])
            message = kept
        if not {"role", "content"} <= message.keys():
            raise Malformed(f"`{field}` is not a list of messages with role and content, or with from and value")
        role = message["role"]
        if role not in ROLES:
            meant = OTHER_ROLES.get(str(role).lower(), str(role).lower())
            advice = f"write {meant}" if meant in ROLES else f"it is one of {', '.join(ROLES)}"
            raise Malformed(f"a message of `{field}` has the role {reprlib.repr(role)}: {advice}")
        turns.append(kept | {"content": _text_of(message, field)})
    return turns


def _text_of(message, field):
    content = message["content"]
    if isinstance(content, list) and content:  # the chat API's form: [{"type": "text", "text": "..."}]
        others = [part for part in content if not isinstance(part, dict) or not isinstance(part.get("text"), str)]
        if others:
            kind = others[0].get("type", "another kind") if isinstance(others[0], dict) else type(others[0]).__name__
            raise Malformed(f"a message of `{field}` has a part that is no text ({kind})")
        return "".join(part["text"] for part in content)
    if not isinstance(content, str):
        kind = "null" if content is None else "empty" if content == [] else f"of type {type(content).__name__}"
        advice = "; write its tool call as text" if message.get("tool_calls") or message.get("function_call") else ""
        raise Malformed(f"the content of a message of `{field}` is {kind}, and no text{advice}")
    return content


def said(messages):
    """What makes two lists of messages, or two strings, the same: no id, name or weight does."""
    if isinstance(messages, str):
        return messages
    return [
        tuple(message.get(key) for key in ("role", "content", "reasoning_content", "tool_calls"))
        for message in messages
    ]


def common_prefix(a, b):
    """Length of the longest common beginning of two sequences."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def shortened(texts, tokens):
    """A string or messages, each text cut to 256 characters for each of so many tokens: with tokens below 0 to its end,
    above to its beginning.

    What a cut at that many tokens leaves is the same, unless a tokenizer's token stands for more characters than that,
    or a text of this length is one word to it; but a huge text is not tokenised whole, which takes minutes.
    """
    part = slice(256 * tokens, None) if tokens < 0 else slice(256 * tokens)
    if isinstance(texts, str):
        return texts[part]
    return [message | {"content": message["content"][part]} for message in texts]


def parted(prompt, chosen, rejected):
    """(prompt, chosen, rejected) of responses that may begin with the prompt, or with more of it than `prompt` has.

    prompt: messages, or the text of a turn, or None.  Raises Malformed where there is no prompt, and Unusable where the
    three begin differently: else the words of a user would be trained as a response.
    """
    if isinstance(prompt, list):
        asked = prompt
    else:
        asked = [{"role": "user", "content": prompt}] if (prompt or "").strip() else []
    shared = common_prefix(said(chosen), said(rejected))
    if any(response[shared]["role"] != "assistant" for response in (chosen, rejected) if response[shared:]):
        raise Unusable("the prompts of chosen and rejected differ")
    least = len(asked) if said(asked) == said(chosen[: len(asked)]) else 0
    while shared > least and chosen[shared - 1]["role"] == "assistant":  # no prompt, but a response with two turns
        shared -= 1
    begun, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
    if begun and begun[0]["role"] in ("system", "user"):
        asked = _merged(asked, begun, isinstance(prompt, str))
    else:
        asked = asked + begun
    if not asked:
        raise Malformed("there is no prompt: neither a column, nor messages that both responses begin with")
    last = asked[-1]["content"] if asked[-1]["role"] == "assistant" else ""  # a beginning, which both may repeat
    if last and all(response and response[0]["content"].startswith(last) for response in (chosen, rejected)):
        chosen, rejected = (
            [response[0] | {"content": response[0]["content"][len(last) :]}, *response[1:]]
            for response in (chosen, rejected)
        )
    return asked, chosen, rejected


def _merged(asked, begun, is_text):
    """One prompt of two that say the same, where either may say more: a system message, earlier or later turns."""
    if is_text:
        texts = [" ".join(message["content"].split()) for message in begun]
        text = " ".join(asked[0]["content"].split()) if asked else texts[0]
        if text in texts or all(turn in text for turn in texts):  # all: a transcript of the turns
            return begun
        raise Unusable("the prompts of chosen and rejected differ")
    before, after = said(asked), said(begun)
    if any(before == after[start : start + len(before)] for start in range(len(after))):
        return begun
    for overlap in range(len(after), 0, -1):
        if before[-overlap:] == after[:overlap]:
            return asked + begun[overlap:]
    raise Unusable("the prompts of chosen and rejected differ")


# -- what else a row asks --------------------------------------------------------------------------------------------

CONTEXT = "system", "history", "initial_reason_steps", "tools", "chat_template_kwargs"  # read with every shape
OURS = {"conversation", "tools", "chat_template", "add_generation_prompt", "continue_final_message", "tokenize"}
OURS |= {"padding", "truncation", "max_length", "return_tensors", "return_dict", "tokenizer_kwargs"}
OURS |= {
    "messages",
    "tokenizer",
    "day",
    "prompt",
    "chosen",
    "rejected",
    "prefer",
    "max_prompt_length",
}  # chat_text.py's


def with_context(row, prompt):
    """(prompt, arguments for the chat template) with all else that the row asks.  Raises Malformed.

    `system` and `history` stand in front of the prompt, unless it says them, and `initial_reason_steps`, with which the
    answer begins, behind it: as messages, or as texts with blank lines between.
    """
    args = _template_args(row)
    system, begun = (_optional(row, name, str) for name in ("system", "initial_reason_steps"))
    turns = _history(_optional(row, "history", list))
    if isinstance(prompt, str):
        if args:
            names = " and ".join(f"`{name}`" for name in CONTEXT[-2:] if row.get(name))
            raise Malformed(f"{names} can only go to a chat template, and the texts are strings: make them messages")
        history = [turn["content"] for turn in turns]
        before = [texts for texts in ([system], history) if not all(is_within(text, prompt) for text in texts)]
        texts = [text.strip("\n") for texts in before for text in texts]
        prompt = "\n\n".join([*texts, prompt.lstrip("\n")]) if texts else prompt
        between = "\n" if begun.strip() and prompt and not prompt[-1].isspace() else ""
        return (prompt + between + begun if begun.strip() else prompt), args
    own, rest = (prompt[:1], prompt[1:]) if prompt[0]["role"] == "system" else ([], prompt)
    if system.strip() and own and own[0]["content"].strip() != system.strip():
        raise Malformed("`system` is another than the system message of the prompt")
    own = own or ([{"role": "system", "content": system}] if system.strip() else [])
    earlier = [] if said(turns) == said(rest[: len(turns)]) else turns
    return own + earlier + rest + ([{"role": "assistant", "content": begun}] if begun.strip() else []), args


def _history(history):
    """[[question, answer], ...], or messages, as messages."""
    if history and all(isinstance(turn, list) for turn in history):
        texts = [text for turn in history for text in turn]
        if not all(len(turn) == 2 for turn in history) or not all(isinstance(text, str) for text in texts):
            raise Malformed("`history` is not a list of [question, answer]")
        return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]
    return as_turns(history, "history") if history else []


def _template_args(row):
    """{argument: value} for the chat template, from `tools` and `chat_template_kwargs`, objects or their JSON."""
    args = {}
    for name, kind in ("tools", list), ("chat_template_kwargs", dict):
        value = row.get(name)
        try:
            value = parse_json(value) if isinstance(value, str) and value.strip() else value or None
        except ValueError as error:
            raise Malformed(f"`{name}` is no JSON ({error})") from None
        if not isinstance(value, kind | None):
            raise Malformed(f"`{name}` is not a {kind.__name__}")
        args[name] = value
    tools, own_args = args["tools"], args["chat_template_kwargs"] or {}
    if not all(isinstance(tool, dict) for tool in tools or ()):
        raise Malformed("`tools` is not a list of objects")
    if own_args.keys() & OURS:
        raise Malformed(
            f"`chat_template_kwargs` sets {', '.join(sorted(own_args.keys() & OURS))}: that is not for a row to say"
        )
    return {key: value for key, value in {**own_args, "tools": tools}.items() if value is not None}


def _optional(row, name, kind):
    value = row.get(name)
    if not isinstance(value, kind | None):
        raise Malformed(f"`{name}` is not a {kind.__name__}")
    return kind() if value is None else value


# Words in names of columns, without a plural s: a name of ASKED alone is part of what is asked, one of ABOUT never.
ASKED = set(
    "prompt query question instruction input context conversation message dialog dialogue history system trajectory "
    "problem passage document article post story image video audio text request knowledge persona turn tool function "
    "问题 提问 指令 输入 提示 提示词 历史 对话 系统 上下文".split()
)
WITH_ASKED = set("user human full original initial previous past chat multi list string content".split())
ABOUT = set(
    "id uid uuid qid idx index hash sha256 md5 source origin rating score reward margin category model dataset subset "
    "split language lang date time timestamp created url license label tag type kind difficulty level topic domain "
    "author annotator metadata meta version dimension winner preference rank name".split()
)


PICTURES = "images", "image"


def check_columns(row, read, shape_name, prompt, responses):
    """Names of columns outside `read` with a text that neither the prompt nor one of the responses (texts) has.
    Raises Malformed for one that looks like part of what is asked.
    """
    unread, responses = [], {text.strip() for text in responses}
    for name, value in row.items():
        if name in read:
            continue
        words = {word.lower().removesuffix("s") for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+|[^\W_a-zA-Z]+", name)}
        texts = () if words & ABOUT else _leaves(value)
        if texts and name in PICTURES:
            raise Malformed(f"`{name}`: pictures need a vision-language model, and this one reads text alone")
        lost = [text for text in texts if text.strip() not in responses and not is_within(text, prompt)]
        if lost and words & ASKED and words <= ASKED | WITH_ASKED:
            raise Malformed(
                f"`{name}` is not read where a file's first row is {shape_name}: "
                "call what is asked `prompt`, or remove the column"
            )
        if lost:
            unread.append(name)
    return tuple(unread)


def _leaves(value):
    """The texts in a value, but for what a message is beside its text; a picture is one too."""
    texts, left = [], [value]
    while left:
        value = left.pop()
        if isinstance(value, dict):
            left += [part for key, part in value.items() if key not in ("role", "from", "type")]
        elif isinstance(value, list | tuple):
            left += value
        elif isinstance(value, str):
            if value.strip():
                texts.append(value)
        elif not isinstance(value, int | float | None):
            texts.append(repr(value))
    return texts


def is_within(text, whole):
    """Whether `whole`, a string or messages, says the text, in whatever lines, and not as a part of other words."""
    whole = whole if isinstance(whole, str) else "\n".join(message["content"] for message in whole)
    whole, text = " ".join(whole.split()), " ".join(text.split())

    def cuts_a_word(place):
        return re.fullmatch("[a-zA-Z0-9]{2}", whole[place - 1 : place + 1]) is not None

    start = whole.find(text)
    while start >= 0:
        if not cuts_a_word(start) and not cuts_a_word(start + len(text)):
            return True
        start = whole.find(text, start + 1)
    return False
