"""Rows of every shape with one thing changed: refused, left out, or read as one would who has not read our code."""

import json
import random

import pytest
from campaigns import SEED
from mutations import mutated
from worlds import CHATML, char_tokenizer

from preference_data import Account, DataError, read_texts

CASES = 320  # of each shape
ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant"}


# -- a plain reading: what is asked and two answers, texts or lists of (role, text); it fails at all that is odd -------


def text(value):
    assert type(value) is str
    return value


def say(message):
    """(role, text) of a message of the chat API's or of ShareGPT's."""
    if message.get("role") is None and message.get("content") is None and "from" in message:
        role, content = message["from"].lower(), message["value"]
        role = ROLES.get(role, role)
    else:
        role, content = message["role"], message["content"]
    if type(content) is list:
        assert content
        content = "".join(text(part["text"]) for part in content)
    assert role in ("system", "user", "assistant")
    return role, text(content)


def says(messages):
    assert type(messages) is list and messages
    return [say(message) for message in messages]


def conversations(asked, chosen, rejected):
    """Lists of (role, text); the answers may begin with what is asked, and part in an earlier answer than the last."""
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    while shared and chosen[shared - 1][0] == "assistant":
        shared -= 1
    begun, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
    assert chosen[0][0] == rejected[0][0] == "assistant"
    if asked and begun:
        assert asked == begun[: len(asked)]
    assert asked or begun
    return begun or asked, chosen, rejected


def with_system(reading):
    """A reading with the row's system text before what is asked."""

    def read(row):
        asked, *answers = reading(row)
        system = row.get("system")
        if system is not None and text(system).strip():
            asked = "" if isinstance(asked, str) and not asked.strip() else asked
            asked = f"{system}\n\n{asked}" if isinstance(asked, str) else [("system", system), *asked]
        return asked, *answers

    return read


def strings(asked, chosen="chosen", rejected="rejected", form="{}"):
    return lambda row: (form.format(text(row[asked])), text(row[chosen]), text(row[rejected]))


def lists(asked, chosen="chosen", rejected="rejected", answers=says):
    def read(row):
        start = [("user", text(row[asked]))] if type(row[asked]) is str else says(row[asked])
        return conversations(start, answers(row[chosen]), answers(row[rejected]))

    return read


def one_text(value):
    return [("assistant", text(value))]


def one_message(value):
    return [say(value)]


def instruction(row):
    more = [text(row["input"])] if row.get("input") else []
    return (
        "\n\n".join(filter(None, [text(row["instruction"]), *more])) + "\n\n",
        text(row["chosen"]),
        row["rejected"],
    )


def pku(row):
    answers, better = (text(row["response_0"]), text(row["response_1"])), row["better_response_id"]
    return text(row["prompt"]).rstrip() + "\n", answers[int(better)], answers[1 - int(better)]


def rated(row):
    answers = [(float(one["overall_score"]), text(one["response"])) for one in row["completions"]]
    answers.sort(key=lambda one: one[0])
    assert answers[0][0] < answers[-1][0]
    return text(row["prompt"]), answers[-1][1], answers[0][1]


def transcript(row):
    asked, chosen = text(row["chosen"]).rsplit("\n\nAssistant:", 1)
    other, rejected = text(row["rejected"]).rsplit("\n\nAssistant:", 1)
    assert asked == other
    return asked + "\n\nAssistant:", chosen, rejected


def behind_messages(row):
    *asked, chosen = says(row["messages"])
    return asked, [chosen], one_text(row["rejected_response"])


def openai(row):
    inner = row["input"]
    return conversations(says(inner["messages"]), says(row["preferred_output"]), says(row["non_preferred_output"]))


# -- rows: p is asked, c is the better answer; t are turns before ------------------------------------------------------


def turn(role, content):
    return {"role": role, "content": content}


def human(value):
    return {"from": "human", "value": value}


def gpt(value):
    return {"from": "gpt", "value": value}


def a(content):
    return [turn("assistant", content)]


def asked(t, p):
    return [*(turn(role, content) for role, content in t), turn("user", p)]


def share(t, p):
    return [*((human if role == "user" else gpt)(content) for role, content in t), human(p)]


C, R = "chosen", "rejected"
SHAPES = {  # name: (a row of it, the plain reading)
    "strings": (lambda t, p, c, r: {"prompt": p, C: c, R: r}, strings("prompt")),
    "responses": (
        lambda t, p, c, r: {"prompt": p, "chosen_response": c, "rejected_response": r},
        strings("prompt", "chosen_response", "rejected_response"),
    ),
    "question": (lambda t, p, c, r: {"question": p, C: c, R: r}, strings("question")),
    "stack": (
        lambda t, p, c, r: {"question": p, "response_j": c, "response_k": r},
        strings("question", "response_j", "response_k", "Question: {}\n\nAnswer: "),
    ),
    "instruction": (lambda t, p, c, r: {"instruction": p, "input": p[::-1], C: c, R: r}, instruction),
    "pku": (lambda t, p, c, r: {"prompt": p, "response_0": r, "response_1": c, "better_response_id": 1}, pku),
    "rated": (
        lambda t, p, c, r: {
            "prompt": p,
            "completions": [{"response": r, "overall_score": 1}, {"response": c, "overall_score": 4}],
        },
        rated,
    ),
    "transcript": (
        lambda t, p, c, r: {C: f"\n\nHuman: {p}\n\nAssistant: {c}", R: f"\n\nHuman: {p}\n\nAssistant: {r}"},
        transcript,
    ),
    "prompt and messages": (
        lambda t, p, c, r: {"prompt": p, C: a(c), R: a(r)},
        lists("prompt"),
    ),
    "messages": (
        lambda t, p, c, r: {"prompt": asked(t, p), C: a(c), R: a(r)},
        lists("prompt"),
    ),
    "whole": (
        lambda t, p, c, r: {C: asked(t, p) + a(c), R: asked(t, p) + a(r)},
        lambda row: conversations([], says(row[C]), says(row[R])),
    ),
    "prompt and whole": (
        lambda t, p, c, r: {
            "prompt": asked(t, p),
            C: asked(t, p) + a(c),
            R: asked(t, p) + a(r),
        },
        lists("prompt"),
    ),
    "sharegpt": (
        lambda t, p, c, r: {"conversations": share(t, p), C: gpt(c), R: gpt(r)},
        lists("conversations", answers=one_message),
    ),
    "sharegpt texts": (
        lambda t, p, c, r: {"conversations": share(t, p), C: c, R: r},
        lists("conversations", answers=one_text),
    ),
    "openai": (
        lambda t, p, c, r: {
            "input": {"messages": asked(t, p)},
            "preferred_output": a(c),
            "non_preferred_output": a(r),
        },
        openai,
    ),
    "swift": (
        lambda t, p, c, r: {"messages": asked(t, p) + a(c), "rejected_response": r},
        behind_messages,
    ),
}


# -- cases -------------------------------------------------------------------------------------------------------------


def words(draw):
    """A text of some words that no other has."""
    return " ".join("".join(draw.choices("abcdefghijk", k=draw.randint(4, 7))) for _ in range(draw.randint(1, 5)))


def read(path, tokenizer):
    """(prompt, chosen, rejected) of each row of a file: texts, or (role, text)s; and the name of its shape."""
    account = Account()
    rows = read_texts(str(path), tokenizer, 512, 0, False, False, None, account)
    found = []
    for row in rows:
        chosen, rejected = row.chosen, row.rejected
        prompt = row.prompt
        if isinstance(prompt, list):
            prompt = [(message["role"], message["content"]) for message in prompt]
            chosen, rejected = ([(m["role"], m["content"]) for m in side] for side in (chosen, rejected))
        found.append((prompt, chosen, rejected))
    return found, account.shape.name


def plainly(reading, line):
    """The plain reading of a line, or None where there is something odd in it."""
    try:
        return with_system(reading)(json.loads(line))
    except (ValueError, TypeError, KeyError, AttributeError, AssertionError, IndexError, RecursionError, OverflowError):
        return None


@pytest.mark.parametrize("name", SHAPES)
def test_rows(name, tmp_path, tally):
    tokenizer, path = char_tokenizer(template=CHATML), tmp_path / "rows.jsonl"
    make, reading = SHAPES[name]
    for case in range(CASES):
        draw = random.Random(f"{SEED} {name} {case}")
        turns = [(("user", "assistant")[n % 2], words(draw)) for n in range(2 * draw.randint(0, 1))]
        good = make(turns, words(draw), words(draw), words(draw))
        row = make(turns, words(draw), words(draw), words(draw))
        if draw.random() < 0.2 and name not in ("transcript", "whole"):
            row["system"] = words(draw)
        line, what = mutated(row, draw) if case % 20 else (json.dumps(row).encode(), "nothing")
        first, is_first = json.dumps(good).encode(), draw.random() < 0.3
        lines = [line, first] if is_first else [first, line]
        path.write_bytes(b"\n".join(lines) + b"\n")
        where = f"case {case}, {what}: {lines[0][:300]}\n{lines[1][:400]}\n"
        try:
            found, shape = read(path, tokenizer)
        except DataError as error:
            tally.count("refused")
            if "\n" in str(error) or what == "nothing":
                tally.fail(f"{where}{error}")
            continue
        except Exception as error:
            tally.fail(f"{where}{type(error).__name__}: {error}")
            continue
        plain, expected = plainly(reading, first), plainly(reading, line)
        if plain in found:
            found.remove(plain)
        if not found and what != "nothing":
            tally.count("left out")
        elif found == [expected]:
            tally.count("read")
        else:
            tally.fail(f"{where}read as {shape} {found}, plainly {expected}")
    tally.done()
