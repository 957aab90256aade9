"""Preference rows of a known shape -> (prompt, chosen, rejected): three strings as they stand, or lists of messages.

A file has the shape of its first row.  What else a row asks (`system`, `history`, `tools`, ...) comes with every shape;
a column that looks like part of what is asked and that nothing reads is malformed, in whichever row it stands.
"""

import re
import reprlib
import textwrap
from typing import NamedTuple

from formats.chat_text import as_messages
from formats.row_files import DataError, Malformed, Unusable
from formats.row_prompts import CONTEXT, as_turns, check_columns, said, with_context
from formats.row_shapes import ANSWERS, ASKS, SCORES, SHAPES, TEXTS


class Texts(NamedTuple):
    prompt: str | list
    chosen: str | list
    rejected: str | list
    template_args: dict = {}  # for the chat template: the row's tools and chat_template_kwargs
    unread: tuple = ()  # columns of text that no shape reads


# -- the shape of a file ----------------------------------------------------------------------------------------


def example_of(shape):
    """A row of the shape, in short."""
    if shape.example:
        return shape.example
    values = {str: '"…"', int: "0", bool: "true", dict: ANSWERS, list: f"[{ASKS}]"}
    fields = []
    for field, kind in shape.fields.items():
        is_answers = kind is list and field in ("chosen", "rejected")
        fields.append(f'"{field}": ' + (f"[{ANSWERS}]" if is_answers else values[kind]))
    return "{" + ", ".join(fields) + "}"


def nearest_shapes(row, others=()):
    """The two of SHAPES (and of others) with the most of the row's fields, then with the most words of their names in
    common, then with the fewest fields that the row lacks.
    """
    words = {word for name in row for word in _words(name)}

    def distance(shape):
        shared = len({*shape.fields, *shape.reads} & row.keys())
        shared_words = len({word for name in shape.fields for word in _words(name)} & words)
        lacking = len(shape.fields.keys() - row.keys()) if shared else 0
        return -shared, -shared_words, lacking

    candidates = [shape for shape in [*SHAPES, *others] if not shape.lists or row.keys() >= shape.fields.keys()]
    return sorted(candidates, key=distance)[:2]


def _words(name):
    return re.findall(r"[a-z]+", name.lower())


def of_one_response(row):
    """Whether a row has one response, good or bad by itself, as KTO's have."""
    labels = [row[name] for name in ("label", "kto_tag") if name in row]
    is_labelled = any(label in (True, False) or str(label).lower() in ("true", "false") for label in labels)
    responses = {"completion", "response", "messages", "conversations", "output"}
    return is_labelled and row.keys() & responses and not any("rejected" in name for name in row)


def recognise(row, where, others=()):
    """The Shape of a file, by its first row.  Raises DataError that shows the two nearest shapes (`others`: more)."""
    for shape in SHAPES:
        fits = all(isinstance(row.get(field), kind) for field, kind in shape.fields.items())
        if fits and shape.fits(row) and not row.keys() & set(shape.without):
            return shape
    kinds = {str: "", list: " (a list)", dict: " (an object)", type(None): " (null)", bool: " (true or false)"}
    kinds |= {int: " (a number)", float: " (a number)"}
    fields = [textwrap.shorten(name, 40) + kinds.get(type(row[name]), " (no text)") for name in list(row)[:20]]
    rest = ", …" if len(row) > 20 else ""
    has_fields = f"{where} has the fields {', '.join(fields) or '(none)'}{rest}"
    if of_one_response(row):
        raise DataError(
            f"{has_fields}, which is one response that is good or bad (KTO), and a pair is two responses to one "
            f"prompt: write a good and a bad one as {example_of(SHAPES[0])}"
        )
    nearest = " or ".join(map(example_of, nearest_shapes(row, others)))
    raise DataError(
        f"{has_fields}, which is no known shape; the nearest are {nearest}: rename or rewrite them (docs/data.md)"
    )


# -- a row -> texts -----------------------------------------------------------------------------------------------


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
        if kind is list and field not in shape.lists:
            turns[field] = as_turns(row[field], field)
    return shape.texts(row | turns)


def row_texts(row, shape, as_chat=False):
    """Texts of one row.  Raises Malformed or Unusable.

    as_chat: strings become messages, to go through the chat template.
    """
    prompt, chosen, rejected = own_texts(row, shape)
    if as_chat and isinstance(prompt, str):
        prompt, chosen, rejected = as_messages(prompt, chosen, rejected)
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
    unread = check_columns(row, {*shape.fields, *shape.reads, *CONTEXT}, shape.name, prompt, responses)
    for field in shape.lists:
        for response in filter(lambda response: isinstance(response, dict), row[field]):
            others = check_columns(response, {*TEXTS, *SCORES}, f"{shape.name}, in `{field}`", prompt, responses)
            unread += tuple(f"{field}.{name}" for name in others if f"{field}.{name}" not in unread)
    return Texts(prompt, chosen, rejected, args, unread)


def harm_labels(row):
    """(chosen, rejected) of a row's `safety_labels`, +1 harmful and -1 safe, or None.  Raises Malformed."""
    labels = row.get("safety_labels")
    if labels is None:
        return None
    if not isinstance(labels, dict) or not labels.keys() >= {"chosen", "rejected"}:
        raise Malformed('`safety_labels` is not {"chosen": ±1, "rejected": ±1}')
    for side in ("chosen", "rejected"):
        if type(labels[side]) is not int or labels[side] not in (1, -1):
            raise Malformed(f"the safety label of {side} is {reprlib.repr(labels[side])}: +1 is harmful, -1 is safe")
    return labels["chosen"], labels["rejected"]
