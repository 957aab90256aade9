"""Preference rows of a known shape -> (prompt, chosen, rejected): three strings as they stand, or lists of messages.

A file has the shape of its first row.  What else a row asks (`system`, `history`, `tools`, ...) comes with every shape;
a column that looks like part of what is asked and that nothing reads is malformed, in whichever row it stands.
"""

from collections.abc import Callable
from typing import NamedTuple

from row_files import DataError, Malformed, Unusable
from row_prompts import CONTEXT, as_turns, check_columns, common_prefix, is_within, parted, said, with_context


class Texts(NamedTuple):
    prompt: str | list
    chosen: str | list
    rejected: str | list
    template_args: dict = {}  # for the chat template: the row's tools and chat_template_kwargs
    unread: tuple = ()  # columns of text that no shape reads


# -- shapes: a row -> (prompt, chosen, rejected), all strings or all lists of messages -----------------------------


class Shape(NamedTuple):
    name: str
    fields: dict  # field -> the type it has in every row
    texts: Callable  # row, its lists as turns -> (prompt, chosen, rejected)
    without: tuple = ()  # fields no row may have: they would hold a prompt
    reads: tuple = ()  # fields that a row may have


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


def prompt_and_responses(prompt, chosen, rejected):
    """The Shape of strings in these fields.  The prompt comes off responses that both repeat it, unless it is short:
    an answer to "Hello" may begin with "Hello".
    """

    def texts(row):
        asked, responses = row[prompt], [row[chosen], row[rejected]]
        if all(text.lstrip().startswith("Human:") and "\n\nAssistant:" in text for text in responses):
            transcript = chosen_and_rejected({"chosen": responses[0], "rejected": responses[1]})
            if not is_within(asked, transcript[0]):
                raise Unusable("the prompts of chosen and rejected differ")
            return transcript
        again = asked.strip()
        if len(again) >= 30 and all(text.lstrip().startswith(again) for text in responses):
            blanks = asked[len(asked.rstrip()) :]  # behind the prompt: a response repeats them too
            responses = [text.lstrip()[len(again) :].removeprefix(blanks) for text in responses]
        return asked, *responses

    return Shape(f"{prompt}/{chosen}/{rejected}", strings(prompt, chosen, rejected), texts)


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
    prompt_and_responses("prompt", "chosen", "rejected"),
    prompt_and_responses("prompt", "chosen_response", "rejected_response"),
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
    read = {field for shape in SHAPES for field in shape.fields}
    if odd := [field for field in row if field in read and not isinstance(row[field], str | list | int)]:
        what = "null" if row[odd[0]] is None else f"a {type(row[odd[0]]).__name__}"
        raise DataError(f"{where}: `{odd[0]}` is {what}, and no text or list of messages: mend the row")
    known = ", ".join(shape.name for shape in SHAPES)
    raise DataError(
        f"{where} has the fields {', '.join(row) or '(none)'}, which is no known shape: rename them to one of {known}"
    )


def own_texts(row, shape):
    """(prompt, chosen, rejected) of a row by its shape alone.  Raises Malformed or Unusable."""
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
    return shape.texts(row | turns)


def row_texts(row, shape, wrap=None):
    """Texts of one row.  Raises Malformed or Unusable.

    wrap: (prompt, chosen, rejected) as strings -> as messages, for rows of strings that go through the chat template.
    """
    prompt, chosen, rejected = own_texts(row, shape)
    if wrap and isinstance(prompt, str):
        prompt, chosen, rejected = wrap(prompt, chosen, rejected)
    if isinstance(prompt, list) and not any(m["content"].strip() for m in prompt if m["role"] != "system"):
        raise Unusable("the prompt is empty")
    prompt, args = with_context(row, prompt)
    responses = []
    for name, response in (("chosen", chosen), ("rejected", rejected)):
        is_text = isinstance(response, str)
        texts = [response] if is_text else [turn["content"] for turn in response if turn["role"] == "assistant"]
        if not "".join(texts).strip():
            raise Unusable(f"the {name} response is empty")
        responses += texts
    if said(chosen) == said(rejected):
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
