"""Preference rows of a known shape -> (prompt, chosen, rejected): three strings as they stand, or lists of messages.

A file has the shape of its first row.  What else a row asks (`system`, `history`, `tools`, ...) comes with every shape;
a column that looks like part of what is asked and that nothing reads is malformed, in whichever row it stands.
"""

import json
import re
from collections.abc import Callable
from typing import NamedTuple

from row_files import DataError, Malformed, Unusable


class Texts(NamedTuple):
    prompt: str | list
    chosen: str | list
    rejected: str | list
    template_args: dict = {}  # for the chat template: the row's tools and chat_template_kwargs
    unread: tuple = ()  # columns of text that no shape reads


# -- messages ------------------------------------------------------------------------------------------------------

ROLES = "system", "user", "assistant", "tool"  # what chat templates know; others they drop, or take for one of these
OTHER_ROLES = {"human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant", "developer": "system"}
OTHER_ROLES |= {"function": "tool", "observation": "tool", "ipython": "tool"}


def as_turns(messages, field):
    """Messages with a role that templates know and a content that is a string; keys that are null go.  Raises
    Malformed: to many a template a role of another name or a content that is no string is nothing at all.
    """
    if not (messages and isinstance(messages, list) and all(isinstance(message, dict) for message in messages)):
        raise Malformed(f"`{field}` is not a list of messages with role and content")
    turns = []
    for message in messages:
        if not {"role", "content"} <= message.keys():
            raise Malformed(f"`{field}` is not a list of messages with role and content")
        role, kept = message["role"], {key: value for key, value in message.items() if value is not None}
        if role not in ROLES:
            known = OTHER_ROLES.get(str(role).lower(), str(role).lower())
            advice = f"write {known}" if known in ROLES else f"it is one of {', '.join(ROLES)}"
            raise Malformed(f"a message of `{field}` has the role {role!r}: {advice}")
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
        what = "null" if content is None else "empty" if content == [] else f"a {type(content).__name__}"
        advice = "; write its tool call as text" if message.get("tool_calls") or message.get("function_call") else ""
        raise Malformed(f"the content of a message of `{field}` is {what}, and no text{advice}")
    return content


def _said(messages):
    """What makes two messages the same: no id, name or weight does."""
    return [
        tuple(message.get(key) for key in ("role", "content", "reasoning_content", "tool_calls"))
        for message in messages
    ]


def common_prefix(a, b):
    """Length of the longest common beginning of two sequences."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def parted(prompt, chosen, rejected):
    """(prompt, chosen, rejected) of responses that may begin with the prompt, or with more of it than `prompt` has.

    prompt: messages, or the text of a turn, or None.  Raises Malformed where there is no prompt, and Unusable where the
    three begin differently: else the words of a user would be trained as a response.
    """
    asked = (
        prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}] if (prompt or "").strip() else []
    )
    shared = common_prefix(_said(chosen), _said(rejected))
    if any(response[shared]["role"] != "assistant" for response in (chosen, rejected) if response[shared:]):
        raise Unusable("the prompts of chosen and rejected differ")
    least = len(asked) if _said(asked) == _said(chosen[: len(asked)]) else 0
    while shared > least and chosen[shared - 1]["role"] == "assistant":  # no prompt, but a response with two turns
        shared -= 1
    begun, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
    if begun and begun[0]["role"] in ("system", "user"):
        asked = _merged(asked, begun, isinstance(prompt, str))
    else:
        asked = asked + begun
    if not asked:
        raise Malformed("there is no prompt: neither a column, nor messages that both responses begin with")
    return asked, chosen, rejected


def _merged(asked, begun, is_text):
    """One prompt of two that say the same, where either may say more: a system message, earlier or later turns."""
    if is_text:
        texts = [" ".join(message["content"].split()) for message in begun]
        text = " ".join(asked[0]["content"].split()) if asked else texts[0]
        if text in texts or all(said in text for said in texts):  # all: a transcript of the turns
            return begun
        raise Unusable("the prompts of chosen and rejected differ")
    before, after = _said(asked), _said(begun)
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


def with_context(row, prompt):
    """The prompt with the row's `system` and `history` in front, and behind it `initial_reason_steps`, with which the
    answer begins: messages, or texts with blank lines between.  What the prompt says already is not said again.
    Raises Malformed.
    """
    system, begun = (_optional(row, name, str) for name in ("system", "initial_reason_steps"))
    turns = _history(_optional(row, "history", list))
    if isinstance(prompt, str):
        texts = [system, *(turn["content"] for turn in turns)]
        texts = [text.strip("\n") for text in texts if text.strip() and not is_within(text, prompt)]
        prompt = "\n\n".join([*texts, prompt.lstrip("\n")]) if texts else prompt
        between = "\n" if begun.strip() and prompt and not prompt[-1].isspace() else ""
        return prompt + between + begun if begun.strip() else prompt
    own, rest = (prompt[:1], prompt[1:]) if prompt[0]["role"] == "system" else ([], prompt)
    if system.strip() and own and own[0]["content"].strip() != system.strip():
        raise Malformed("`system` is another than the system message of the prompt")
    own = own or ([{"role": "system", "content": system}] if system.strip() else [])
    earlier = [] if _said(turns) == _said(rest[: len(turns)]) else turns
    return own + earlier + rest + ([{"role": "assistant", "content": begun}] if begun.strip() else [])


def _history(history):
    """[[question, answer], ...], or messages, as messages."""
    if history and all(isinstance(turn, list) for turn in history):
        texts = [text for turn in history for text in turn]
        if not all(len(turn) == 2 for turn in history) or not all(isinstance(text, str) for text in texts):
            raise Malformed("`history` is not a list of [question, answer]")
        return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]
    return as_turns(history, "history") if history else []


def template_args(row):
    """{argument: value} for the chat template, from `tools` and `chat_template_kwargs`.  Raises Malformed."""
    args = {}
    for name, kind in ("chat_template_kwargs", dict), ("tools", list):
        value = row.get(name)
        try:
            value = json.loads(value) if isinstance(value, str) and value.strip() else value or None
        except ValueError as error:
            raise Malformed(f"`{name}` is no JSON ({error})") from None
        if not isinstance(value, kind | None) or not all(isinstance(tool, dict | str) for tool in value or ()):
            raise Malformed(f"`{name}` is not a {'list of objects' if kind is list else 'dict'}")
        more = value if kind is dict else {name: value}
        args |= {key: given for key, given in (more or {}).items() if given is not None}
        if kind is dict and args.keys() & OURS:
            raise Malformed(f"`{name}` sets {', '.join(sorted(args.keys() & OURS))}, which is not for a row to say")
    return args


def _optional(row, name, kind):
    value = row.get(name)
    if not isinstance(value, kind | None):
        raise Malformed(f"`{name}` is not a {kind.__name__}")
    return kind() if value is None else value


# Words in names of columns, without a plural s: a name of ASKED alone is part of what is asked, one of ABOUT never.
ASKED = set(
    "prompt query question instruction input context conversation message dialog dialogue history system trajectory "
    "problem passage document article image video audio text request knowledge persona turn tool function".split()
)
WITH_ASKED = set("user human full original initial previous past chat multi list string content".split())
ABOUT = set(
    "id uid uuid qid idx index hash sha256 md5 source origin rating score reward margin category model dataset subset "
    "split language lang date time timestamp created url license label tag type kind difficulty level topic domain "
    "author annotator metadata meta version dimension winner preference rank name".split()
)


def check_columns(row, read, shape_name, prompt, responses):
    """Names of columns outside `read` with a text that neither the prompt nor one of the responses (texts) has.
    Raises Malformed for one that looks like part of what is asked.
    """
    unread, responses = [], {text.strip() for text in responses}
    for name, value in row.items():
        words = {word.lower().removesuffix("s") for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+|\d+", name)}
        if name in read or words & ABOUT:
            continue
        said = [text for text in _leaves(value) if text.strip() not in responses and not is_within(text, prompt)]
        if said and words & ASKED and words <= ASKED | WITH_ASKED:
            raise Malformed(
                f"`{name}` is not read where a file's first row is {shape_name}: "
                "call what is asked `prompt`, or remove the column"
            )
        unread += [name] if said else []
    return tuple(unread)


def _leaves(value):
    """The texts in a value, but for what a message is beside its text; a picture is one too."""
    found, left = [], [value]
    while left:
        value = left.pop()
        if isinstance(value, dict):
            left += [part for key, part in value.items() if key not in ("role", "from", "type")]
        elif isinstance(value, list | tuple):
            left += value
        elif isinstance(value, str):
            found += [value] if value.strip() else []
        elif not isinstance(value, int | float | None):
            found.append(repr(value))
    return found


def is_within(text, whole):
    """Whether `whole`, a string or messages, says the text, and not just as a part of other words."""
    whole = whole if isinstance(whole, str) else "\n".join(message["content"] for message in whole)
    text, cut_word = text.strip(), re.compile("[a-zA-Z0-9]{2}")
    at = whole.find(text)
    while at >= 0:
        end = at + len(text)
        if not cut_word.fullmatch(whole[at - 1 : at + 1]) and not cut_word.fullmatch(whole[end - 1 : end + 1]):
            return True
        at = whole.find(text, at + 1)
    return False


# -- shapes: a row -> (prompt, chosen, rejected), all strings or all lists of messages -----------------------------


class Shape(NamedTuple):
    name: str
    fields: dict  # field -> the type it has in every row
    texts: Callable  # row, its lists as turns -> (prompt, chosen, rejected)
    without: tuple = ()  # fields no row may have: they would hold a prompt
    reads: tuple = ()  # fields that a row may have


def columns(*names):
    return lambda row: tuple(row[name] for name in names)


def strings(*names):
    return dict.fromkeys(names, str)


def chosen_and_rejected(row):
    """Two strings without a prompt: Anthropic HH transcripts, which part after the last "Assistant:", or a beginning
    that both share, cut back to whole words (a tokenizer's words begin with their blank, so the blank stays behind).
    """
    chosen, rejected = row["chosen"], row["rejected"]
    turn = "\n\nAssistant:"
    if turn in chosen and turn in rejected:
        (prompt, _, chosen), (other, _, rejected) = chosen.rpartition(turn), rejected.rpartition(turn)
        if prompt != other:
            raise Unusable("the prompts of chosen and rejected differ")
        return prompt + turn, chosen, rejected
    same = common_prefix(chosen, rejected)
    same = max(chosen.rfind(" ", 0, same), chosen.rfind("\n", 0, same) + 1, 0)
    return chosen[:same], chosen[same:], rejected[same:]


def message_lists(row):
    return parted(row.get("prompt"), row["chosen"], row["rejected"])


def stack_exchange(row):
    return f"Question: {row['question']}\n\nAnswer: ", row["response_j"], row["response_k"]


def instruction(row):
    if not isinstance(row.get("input"), str | None):
        raise Malformed("`input` is not a str")
    return "\n\n".join(filter(None, (row["instruction"], row.get("input")))) + "\n\n", row["chosen"], row["rejected"]


def dual_labels(row):
    """PKU-SafeRLHF, by helpfulness.  Question and answer are two texts there: a newline keeps them apart."""
    better, responses = row["better_response_id"], (row["response_0"], row["response_1"])
    if better not in (0, 1):
        raise Malformed("`better_response_id` is neither 0 nor 1")
    return row["prompt"].rstrip() + "\n", responses[better], responses[1 - better]


SHAPES = [  # the first whose fields fit a file's first row is the shape of the file
    Shape("prompt/chosen/rejected", strings("prompt", "chosen", "rejected"), columns("prompt", "chosen", "rejected")),
    Shape(
        "prompt/chosen_response/rejected_response",
        strings("prompt", "chosen_response", "rejected_response"),
        columns("prompt", "chosen_response", "rejected_response"),
    ),
    Shape("prompt/chosen/rejected messages", {"prompt": list, "chosen": list, "rejected": list}, message_lists),
    Shape("prompt string, messages", {"prompt": str, "chosen": list, "rejected": list}, message_lists),
    Shape("chosen/rejected messages", {"chosen": list, "rejected": list}, message_lists, ("prompt",)),
    Shape("question/response_j/response_k", strings("question", "response_j", "response_k"), stack_exchange),
    Shape(
        "prompt/response_0/response_1/better_response_id",
        strings("prompt", "response_0", "response_1") | {"better_response_id": int},
        dual_labels,
    ),
    Shape("instruction/chosen/rejected", strings("instruction", "chosen", "rejected"), instruction, reads=("input",)),
    Shape(
        "chosen/rejected strings",
        strings("chosen", "rejected"),
        chosen_and_rejected,
        ("prompt", "instruction", "question"),
    ),
]


def recognise(row, where):
    """The Shape of a file, by its first row.  Raises DataError that names the known shapes."""
    for shape in SHAPES:
        fits = all(isinstance(row.get(field), kind) for field, kind in shape.fields.items())
        if fits and not row.keys() & set(shape.without):
            return shape
    known = ", ".join(shape.name for shape in SHAPES)
    raise DataError(
        f"{where} has the fields {', '.join(row) or '(none)'}, which is no known shape: rename them to one of {known}"
    )


def row_texts(row, shape, wrap=None):
    """Texts of one row.  Raises Malformed or Unusable.

    wrap: (prompt, chosen, rejected) as strings -> as messages, for rows of strings that go through the chat template.
    """
    for field in shape.without:
        if row.get(field) is not None:
            raise Malformed(
                f"`{field}` is not read where a file's first row is {shape.name}: let all rows have it, or none"
            )
    turns = {}
    for field, kind in shape.fields.items():
        if not isinstance(row.get(field), kind):
            raise Malformed(f"`{field}` is {'not a ' + kind.__name__ if field in row else 'missing'}")
        if kind is list:
            turns[field] = as_turns(row[field], field)
    prompt, chosen, rejected = shape.texts(row | turns)
    if wrap and isinstance(prompt, str):
        prompt, chosen, rejected = wrap(prompt, chosen, rejected)
    if isinstance(prompt, list) and not any(m["content"].strip() for m in prompt if m["role"] != "system"):
        raise Unusable("the prompt is empty")
    prompt, args = with_context(row, prompt), template_args(row)
    if args and isinstance(prompt, str):
        names = " and ".join(f"`{name}`" for name in CONTEXT[-2:] if row.get(name))
        raise Malformed(f"{names} can only go to a chat template, and the texts are strings: make them messages")
    responses = []
    for name, response in (("chosen", chosen), ("rejected", rejected)):
        said = [response] if isinstance(response, str) else [m["content"] for m in response if m["role"] == "assistant"]
        if not "".join(said).strip():
            raise Unusable(f"the {name} response is empty")
        responses += said
    if chosen == rejected:
        raise Unusable("the two responses are equal")
    read = {*shape.fields, *shape.reads, *CONTEXT}
    return Texts(prompt, chosen, rejected, args, check_columns(row, read, shape.name, prompt, responses))


def harm_labels(row):
    """(chosen, rejected) of a row's `safety_labels`, +1 harmful and -1 safe, or None.  Raises Malformed."""
    labels = row.get("safety_labels")
    if labels is None:
        return None
    if not isinstance(labels, dict) or not labels.keys() >= {"chosen", "rejected"}:
        raise Malformed('`safety_labels` is not {"chosen": ±1, "rejected": ±1}')
    for side in ("chosen", "rejected"):
        if type(labels[side]) is not int or labels[side] not in (1, -1):
            raise Malformed(f"the safety label of {side} is {labels[side]!r}: +1 is harmful, -1 is safe")
    return labels["chosen"], labels["rejected"]
