"""preference_data.py: rows of every shape -> texts -> token ids, cuts, malformed and unusable rows, files, hold-out."""

import gzip
import inspect
import json
import random
import sys
import time
import zlib

import pytest
from found_files import FOUND, OPENAI, TWO, A, B, P, S, gpt, human, lines_of, of_messages, scored, write_found
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from worlds import CHATML, assistant, char_tokenizer, ids, load, strings, system, user, write_rows

import preference_data
from formats import chat_text, row_prompts
from formats.chat_text import as_messages
from formats.preference_rows import Texts, recognise, row_texts
from formats.row_files import DataError, Malformed, Unusable, parse_row, read_rows
from packing import hold_out
from preference_data import Pair, fingerprint

EOS = 1


def pku_row(**changes):
    return {"prompt": "Why?", "response_0": "So.", "response_1": "No.", "better_response_id": 0} | changes


# -- shapes -----------------------------------------------------------------------------------------------------------

SHAPES = {
    "strings": (
        {"prompt": "p ", "chosen": "c", "rejected": "r"},
        "prompt/chosen/rejected",
        ("p ", "c", "r"),
    ),
    "response names": (
        {"prompt": "p", "chosen_response": " c", "rejected_response": " r", "dimension": "helpful"},
        "prompt/chosen_response/rejected_response",
        ("p", " c", " r"),
    ),
    "messages": (
        {"prompt": [user("p")], "chosen": [assistant("c")], "rejected": [assistant("r")]},
        "prompt/chosen/rejected messages",
        ([user("p")], [assistant("c")], [assistant("r")]),
    ),
    "implicit prompt in messages": (
        {
            "chosen": [user("a"), assistant("b"), user("c"), assistant("d")],
            "rejected": [user("a"), assistant("b"), user("c"), assistant("e")],
        },
        "chosen/rejected messages",
        ([user("a"), assistant("b"), user("c")], [assistant("d")], [assistant("e")]),
    ),
    "ultrafeedback": (  # `prompt` repeats what the message lists begin with; it must not come twice
        {"prompt": "p", "chosen": [user("p"), assistant("c")], "rejected": [user("p"), assistant("r")], "score": 3},
        "prompt string, messages",
        ([user("p")], [assistant("c")], [assistant("r")]),
    ),
    "prompt string and answers as messages": (
        {"prompt": "p", "chosen": [assistant("c")], "rejected": [assistant("r")]},
        "prompt string, messages",
        ([user("p")], [assistant("c")], [assistant("r")]),
    ),
    "stack exchange": (  # j is the better answer
        {"qid": 7, "question": "Why?\n", "response_j": "So.", "response_k": "No."},
        "question/response_j/response_k",
        ("Question: Why?\n\n\nAnswer: ", "So.", "No."),
    ),
    "PKU": (  # question and answer are two texts; what is safer is prepare_data.py's matter
        pku_row(better_response_id=1, safer_response_id=0, is_response_0_safe=True),
        "prompt/response_0/response_1/better_response_id",
        ("Why?\n", "No.", "So."),
    ),
    "PKU, the first is better, a prompt that ends in white space": (
        pku_row(prompt=" Why?\n\n", better_response_id=0),
        "prompt/response_0/response_1/better_response_id",
        (" Why?\n", "So.", "No."),
    ),
    "instruction with input": (
        {"instruction": "Add.", "input": "1 2", "chosen": "3", "rejected": "4"},
        "instruction/chosen/rejected",
        ("Add.\n\n1 2\n\n", "3", "4"),
    ),
    "instruction with empty input": (
        {"instruction": "Add.", "input": "", "chosen": "3", "rejected": "4"},
        "instruction/chosen/rejected",
        ("Add.\n\n", "3", "4"),
    ),
    "instruction without input": (
        {"instruction": "Add.", "chosen": "3", "rejected": "4"},
        "instruction/chosen/rejected",
        ("Add.\n\n", "3", "4"),
    ),
    "HH, one turn": (
        {"chosen": "\n\nHuman: Hi?\n\nAssistant: Hello.", "rejected": "\n\nHuman: Hi?\n\nAssistant: Go."},
        "chosen/rejected strings",
        ("\n\nHuman: Hi?\n\nAssistant:", " Hello.", " Go."),
    ),
    "HH, split at the last Assistant turn": (  # both answers begin alike: the shared words stay in the responses
        {
            "chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: It is d.",
            "rejected": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: It is e.",
        },
        "chosen/rejected strings",
        ("\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:", " It is d.", " It is e."),
    ),
    "implicit prompt in strings": (  # back to whole words, and the blank goes with the word behind it
        {"chosen": "What is it? A friend.", "rejected": "What is it? A foe."},
        "chosen/rejected strings",
        ("What is it? A", " friend.", " foe."),
    ),
    "implicit prompt that ends in a newline": (
        {"chosen": "Name it.\nA", "rejected": "Name it.\nB"},
        "chosen/rejected strings",
        ("Name it.\n", "A", "B"),
    ),
    "no common beginning": (
        {"chosen": "yes", "rejected": "no"},
        "chosen/rejected strings",
        ("", "yes", "no"),
    ),
}


@pytest.mark.parametrize("name", SHAPES)
def test_shape_gives_these_texts(name):
    row, shape_name, texts = SHAPES[name]
    shape = recognise(row, "file:1")
    assert shape.name == shape_name
    assert row_texts(row, shape) == Texts(*texts)


REPEATS = {  # a row whose answers are c and r -> its prompt, which comes once
    "prompt list": (of_messages([P], [P], [P]), [P]),
    "with a system message": (of_messages([S, P], [S, P], [S, P]), [S, P]),
    "the system message only in the prompt": (of_messages([S, P], [P], [P]), [S, P]),
    "the system message only in the answers": (of_messages([P], [S, P], [S, P]), [S, P]),
    "prompt has the first turn only": (of_messages([P], [P, A, B], [P, A, B]), [P, A, B]),
    "prompt has the last turn only": (of_messages([B], [P, A, B], [P, A, B]), [P, A, B]),
    "prompt and answers overlap": (of_messages([S, P, A], [P, A, B], [P, A, B]), [S, P, A, B]),
    "prompt string is the last turn": (of_messages("b", [P, A, B], [P, A, B]), [P, A, B]),
    "prompt string differs in blanks": (of_messages(" p\n", [P], [P]), [P]),
    "prompt string is a transcript": (of_messages("Human: p\n\nAssistant:", [P], [P]), [P]),
    "blank prompt string": (of_messages(" ", [P], [P]), [P]),
    "keys that are no text": (of_messages([P], [P | {"id": 1}], [P | {"name": "x", "weight": None}]), [P]),
    "answers go on with turns they share": (of_messages([P], [A, B], [A, B]), [P, A, B]),
    "a beginning of the answer": (of_messages([P, A], [P, A], [P, A]), [P, A]),
    "two answers in a row": (of_messages(None, [P, A], [P]), [P]),
}


@pytest.mark.parametrize("name", REPEATS)
def test_a_prompt_that_the_responses_repeat_comes_once(name):
    row, prompt = REPEATS[name]
    texts = row_texts(row, recognise(row, "file:1"))
    assert [(m["role"], m["content"]) for m in texts.prompt] == [(m["role"], m["content"]) for m in prompt]
    assert (texts.chosen[-1], texts.rejected) == (assistant("c"), [assistant("r")])
    assert len(texts.chosen) == 1 + (name == "two answers in a row")


DIFFER = "the prompts of chosen and rejected differ"
UNUSABLE = {  # messages that teach nothing, or would teach a user's words
    "a blank": (of_messages("p", [P], [user("p ")]), DIFFER),
    "system messages": (of_messages(None, [S, P], [system("t"), P]), DIFFER),
    "a later turn of the user": (of_messages(None, [P, A, B], [P, A, user("B")]), DIFFER),
    "the same, with the prompt apart": (of_messages([P], [A, B], [A, user("B")]), DIFFER),
    "another prompt list": (of_messages([B], [P], [P]), DIFFER),
    "another prompt string": (of_messages("b", [P], [P]), DIFFER),
    "one repeats the prompt, one does not": (of_messages([P], [P], []), DIFFER),
    "a prompt that ends in the middle of the answer": (
        {"prompt": [P, A], "chosen": [P, assistant("a c")], "rejected": [P, assistant("a r")]},
        DIFFER,
    ),
    "one ends earlier": (of_messages(None, [P], [P, assistant("c"), B]), DIFFER),
    "an answer of the user": ({"prompt": [P], "chosen": [user("c")], "rejected": [user("r")]}, DIFFER),
    "an answer of a tool": ({"prompt": [P], "chosen": [P | {"role": "tool"}], "rejected": [A]}, DIFFER),
    "equal but for a key": (
        {"prompt": [P], "chosen": [A | {"id": 1}], "rejected": [A | {"id": 2}]},
        "the two responses are equal",
    ),
    "no answer": ({"chosen": [P, A], "rejected": [P]}, "the rejected response is empty"),
    "only words of the user": (
        {"prompt": [P], "chosen": [assistant(" "), B], "rejected": [A]},
        "the chosen response is empty",
    ),
    "an empty prompt": (of_messages([user(" ")]), "the prompt is empty"),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_messages_that_teach_nothing_are_left_out(tmp_path, name):
    row, reason = UNUSABLE[name]
    path = write_rows(tmp_path / "rows.jsonl", [row])
    with pytest.raises(DataError, match=rf"has 1 rows and no usable pair \(1 because {reason}\)$"):
        load(path, char_tokenizer(template=CHATML))


def test_parts_of_a_message_are_its_text(tmp_path):
    parts = [{"type": "text", "text": "p", "image": None}, {"type": "text", "text": "q"}]
    row = {"prompt": [user(parts)], "chosen": [assistant(parts[:1])], "rejected": [assistant("r")]}
    texts = row_texts(row, recognise(row, "file:1"))
    assert texts == Texts([user("pq")], [assistant("p")], [assistant("r")])


@pytest.mark.parametrize(
    "field, message, what",
    [
        ("prompt", user(None), "the content of a message of `prompt` is null, and no text"),
        ("chosen", assistant(None), "the content of a message of `chosen` is null, and no text"),
        (
            "chosen",
            assistant(None) | {"tool_calls": [{"function": {"name": "f"}}]},
            "the content of a message of `chosen` is null, and no text; write its tool call as text",
        ),
        ("prompt", user(5), "the content of a message of `prompt` is of type int, and no text"),
        ("prompt", user([]), "the content of a message of `prompt` is empty, and no text"),
        ("prompt", user(["p"]), "a message of `prompt` has a part that is no text (str)"),
        (
            "prompt",
            user([{"type": "text", "text": "p"}, {"type": "image_url", "image_url": {"url": "u"}}]),
            "a message of `prompt` has a part that is no text (image_url)",
        ),
        ("prompt", P | {"role": "human"}, "a message of `prompt` has the role 'human': write user"),
        ("rejected", A | {"role": "gpt"}, "a message of `rejected` has the role 'gpt': write assistant"),
        ("prompt", P | {"role": "User"}, "a message of `prompt` has the role 'User': write user"),
        ("prompt", P | {"role": "developer"}, "a message of `prompt` has the role 'developer': write system"),
        (
            "prompt",
            P | {"role": None},
            "a message of `prompt` has the role None: it is one of system, user, assistant, t",
        ),
        (
            "prompt",
            P | {"role": "usar"},
            "a message of `prompt` has the role 'usar': it is one of system, user, assist",
        ),
        (
            "prompt",
            {"from": "human"},
            "`prompt` is not a list of messages with role and content, or with from and value",
        ),
        (
            "prompt",
            {"from": "function_call", "value": "p"},
            "a message of `prompt` has the role 'function_call': it is",
        ),
        ("prompt", {"from": "human", "value": None}, "`prompt` is not a list of messages with role and content, or"),
    ],
)
def test_a_message_without_a_known_role_and_a_text_is_malformed(tmp_path, field, message, what):
    good = {"prompt": [P], "chosen": [assistant("c")], "rejected": [assistant("r")]}
    path = write_rows(tmp_path / "rows.jsonl", [good, good | {field: [message]}])
    with pytest.raises(DataError) as error:
        load(path, char_tokenizer(template=CHATML))
    assert str(error.value).startswith(f"{path}:2: {what}")
    assert len(load(path, char_tokenizer(template=CHATML), skip_invalid=True)[0]) == 1


@pytest.mark.parametrize("row", [of_messages(), of_messages(" ")], ids=["no prompt", "a blank one"])
def test_messages_without_a_prompt_make_up_none(tmp_path, row):
    with pytest.raises(DataError, match="rows.jsonl:1: there is no prompt: neither a column, nor messages"):
        load(write_rows(tmp_path / "rows.jsonl", [row]), char_tokenizer(template=CHATML))


LONG = "What is the capital of the country?"


@pytest.mark.parametrize(
    "prompt, chosen, expected",
    [
        (LONG, LONG + " Paris.", (LONG, " Paris.", " Lyon.")),
        (LONG + "\n", "\n" + LONG + " Paris.", (LONG + "\n", " Paris.", " Lyon.")),
        (LONG + "\n\n", LONG + "\n\nParis.", (LONG + "\n\n", "Paris.", " Lyon.")),  # and not its blanks twice
        (LONG, "Paris.", (LONG, "Paris.", LONG + " Lyon.")),  # one alone may quote it
        ("What", "What is it?", ("What", "What is it?", LONG + " Lyon.")),
    ],
)
def test_a_prompt_string_that_both_responses_repeat_comes_once(prompt, chosen, expected):
    for names in (("chosen", "rejected"), ("chosen_response", "rejected_response")):
        row = {"prompt": prompt} | dict(zip(names, (chosen, LONG + " Lyon.")))
        assert row_texts(row, recognise(row, "file:1")) == Texts(*expected)


def test_transcripts_beside_a_prompt_part_after_the_last_assistant(tmp_path):
    start = "\n\nHuman: p?\n\nAssistant:"
    row = {"prompt": "p?", "chosen": start + " c", "rejected": start + " r"}
    assert row_texts(row, recognise(row, "file:1")) == Texts(start, " c", " r")
    with pytest.raises(DataError, match=f"1 because {DIFFER}"):
        load(write_rows(tmp_path / "rows.jsonl", [row | {"prompt": "q?"}]))


HH = "\n\nHuman: p?\n\nAssistant: a"
HALVES = {  # a row -> (prompt, chosen, rejected), or None where only one of its responses is a transcript
    "a word": ({"chosen": "x", "rejected": HH}, None),
    "a flipped bit": ({"chosen": HH.replace("Assistant", "Assistanv") + " b", "rejected": HH}, None),
    "the other way": ({"chosen": HH, "rejected": "a"}, None),
    "beside a prompt": ({"prompt": "p?", "chosen": HH, "rejected": "b"}, None),
    "beside a question": ({"question": "p?", "chosen": "b", "rejected": HH}, None),
    "both": ({"chosen": HH, "rejected": HH + " b"}, (HH[:-2], " a", " a b")),
    "a talk that was asked for": (
        {"prompt": "Write a talk.", "chosen": HH, "rejected": "b"},
        ("Write a talk.", HH, "b"),
    ),
}


@pytest.mark.parametrize("name", HALVES)
def test_a_transcript_beside_a_response_that_is_none_is_left_out(tmp_path, name):
    row, texts = HALVES[name]
    if texts:
        assert row_texts(row, recognise(row, "file:1")) == Texts(*texts)
    else:
        with pytest.raises(Unusable, match="^only one of chosen and rejected is a transcript$"):
            row_texts(row, recognise(row, "file:1"))


# -- columns around the prompt ----------------------------------------------------------------------------------------

TOOLS = "{% if tools %}{{ 'TOOLS ' + tools | tojson }}{% endif %}{{ mode }}" + CHATML
TOOL = {"type": "function", "function": {"name": "f"}}
AROUND = {  # columns beside the prompt "p?", as a string and as a message -> what is asked
    "system": ({"system": "s."}, "s.\n\np?", [system("s."), user("p?")]),
    "system that is said": ({"system": "p?"}, "p?", [system("p?"), user("p?")]),
    "history": (
        {"history": [["q", "a"], ["q2", "a2"]]},
        "q\n\na\n\nq2\n\na2\n\np?",
        [user("q"), assistant("a"), user("q2"), assistant("a2"), user("p?")],
    ),
    "history of messages": ({"history": [P, A]}, "p\n\na\n\np?", [P, A, user("p?")]),
    "system and history": (
        {"system": "s.", "history": [["q", "a"]]},
        "s.\n\nq\n\na\n\np?",
        [system("s."), user("q"), A, user("p?")],
    ),
    "a beginning of the answer": (
        {"initial_reason_steps": "Step 1:"},
        "p?\nStep 1:",
        [user("p?"), assistant("Step 1:")],
    ),
    "nothing": ({"system": "", "history": [], "tools": None, "initial_reason_steps": None}, "p?", [user("p?")]),
}


@pytest.mark.parametrize("name", AROUND)
def test_columns_around_the_prompt_are_part_of_it(name):
    more, text, messages = AROUND[name]
    row = {"prompt": "p?", "chosen": "c", "rejected": "r"} | more
    assert row_texts(row, recognise(row, "file:1")) == Texts(text, "c", "r")
    chat = [assistant("c")], [assistant("r")]
    assert row_texts(row, recognise(row, "file:1"), as_chat=True) == Texts(messages, *chat)
    row |= dict(zip(("prompt", "chosen", "rejected"), ([user("p?")], *chat)))
    assert row_texts(row, recognise(row, "file:1")) == Texts(messages, *chat)


def test_system_and_history_of_an_instruction_and_of_a_transcript():
    more = {"system": "s.", "history": [["q", "a"]], "chosen": "c", "rejected": "r"}
    row = {"instruction": "Add.", "input": "1 2"} | more
    assert row_texts(row, recognise(row, "file:1")).prompt == "s.\n\nq\n\na\n\nAdd.\n\n1 2\n\n"
    start = "\n\nHuman: p?\n\nAssistant:"
    row = {"system": "s.", "chosen": start + " c", "rejected": start + " r"}
    assert row_texts(row, recognise(row, "file:1")) == Texts("s." + start, " c", " r")


def test_a_system_message_that_the_prompt_has_comes_once():
    row = of_messages([S, P]) | {"system": "s"}
    assert row_texts(row, recognise(row, "file:1")).prompt == [S, P]
    with pytest.raises(Malformed, match="`system` is another than the system message of the prompt"):
        row_texts(row | {"system": "t"}, recognise(row, "file:1"))


@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL])], ids=["objects", "JSON"])
def test_tools_and_arguments_go_to_the_chat_template(tmp_path, tools):
    row = of_messages([P]) | {"tools": tools, "chat_template_kwargs": {"mode": "MODE", "other": None}}
    tokenizer = char_tokenizer(eos="<|im_end|>", template=TOOLS)
    [pair] = load(write_rows(tmp_path / "rows.jsonl", [row]), tokenizer)[0]
    text = tokenizer.decode(pair.prompt_ids)
    assert text == f"TOOLS {json.dumps([TOOL])}MODE<|im_start|>user\np<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    "row, what",
    [
        (strings(1) | {"tools": [TOOL]}, "`tools` can only go to a chat template, and the texts are strings"),
        (strings(1) | {"chat_template_kwargs": {"a": 1}}, "`chat_template_kwargs` can only go to a chat template"),
        (of_messages([P]) | {"tools": [TOOL]}, "the chat template does not read `tools`"),
        (of_messages([P, A | {"tool_calls": [TOOL]}, B]), "the chat template does not read `tool_calls`"),
        (of_messages([P]) | {"tools": ["f"]}, "`tools` is not a list of objects"),
        (of_messages([P]) | {"tools": "f"}, r"`tools` is no JSON \("),
        (of_messages([P]) | {"chat_template_kwargs": {"tokenize": True}}, "`chat_template_kwargs` sets tokenize: that"),
        (strings(1) | {"system": 5}, "`system` is not a str"),
        (strings(1) | {"history": "q"}, "`history` is not a list"),
        (strings(1) | {"history": [["q"]]}, r"`history` is not a list of \[question, answer\]"),
    ],
)
def test_columns_around_the_prompt_that_cannot_be_read(tmp_path, row, what):
    with pytest.raises(DataError, match=f"rows.jsonl:1: {what}"):
        load(write_rows(tmp_path / "rows.jsonl", [row]), char_tokenizer(template=CHATML))


@pytest.mark.parametrize("name", sorted(row_prompts.OURS))
def test_an_argument_of_ours_is_not_for_a_row_to_say(tmp_path, name):
    path = write_rows(tmp_path / "rows.jsonl", [of_messages([P]) | {"chat_template_kwargs": {name: 5}}])
    with pytest.raises(DataError, match=f"rows.jsonl:1: `chat_template_kwargs` sets {name}: that is not for a row"):
        load(path, char_tokenizer(template=CHATML))


def test_ours_are_all_that_the_functions_take_which_pass_a_rows_arguments_on():
    takers = [function for function in vars(chat_text).values() if inspect.isfunction(function)]
    takers = [inspect.signature(function).parameters for function in takers]
    takers = [parameters for parameters in takers if "template_args" in parameters]
    assert len(takers) == 6
    names = {name for parameters in takers for name in parameters} - {"template_args", "notes", "rows"}
    assert names <= row_prompts.OURS


LOST = {  # columns that look like what is asked, beside a prompt or without one
    "input": "Why?",
    "query": "Why?",
    "conversations": [{"from": "human", "value": "Why?"}],
    "trajectory": [{"from": "user", "value": "Why?"}],
    "messages": [user("Why?")],
    "system_prompt": "Be brief.",
    "chat_history": [["Why?", "So."]],
    "userPrompt": "Why?",
    "context": "In 1900",
    "documents": ["d"],
    "images": ["a.png"],
    "问题": "Why?",
}


@pytest.mark.parametrize("name", LOST)
@pytest.mark.parametrize(
    "first, shape",
    [
        ({"chosen": "yes", "rejected": "no"}, "chosen/rejected strings"),
        (strings(1), "prompt/chosen/rejected"),
        (of_messages([P]), "prompt/chosen/rejected messages"),
    ],
    ids=["no prompt", "prompt", "messages"],
)
def test_a_column_that_looks_like_a_prompt_is_not_lost_in_any_row(tmp_path, name, first, shape):
    alone = shape == "chosen/rejected strings" and name in ("input", "query", "conversations", "messages")
    cases = [([first, first, first | {name: LOST[name]}], 3)] + [([first | {name: LOST[name]}], 1)] * (not alone)
    for rows, place in cases:  # alone in the first row it is what the file asks
        path = write_rows(tmp_path / "rows.jsonl", rows)
        with pytest.raises(DataError) as error:
            load(path, char_tokenizer(template=CHATML))
        reason = f"`{name}` is not read where a file's first row is {shape}: call what is asked `prompt`, or"
        if name == "images":
            reason = "`images`: pictures need a vision-language model, and this one reads text alone"
        assert str(error.value).startswith(f"{path}:{place}: {reason}")


@pytest.mark.parametrize("field", ["prompt", "question", "instruction"])
def test_a_later_row_with_a_prompt_where_the_first_has_none(tmp_path, field):
    rows = [
        {"chosen": "Q one? yes", "rejected": "Q one? no"},
        {field: "Hi", "chosen": "Hi you", "rejected": "Hi there"},
    ]
    with pytest.raises(DataError, match=rf"rows.jsonl:2: `{field}` is not read where a file's first row is chosen/rej"):
        load(write_rows(tmp_path / "rows.jsonl", rows))


def test_what_the_prompt_says_in_other_lines_is_not_lost(tmp_path):
    row = strings(1) | {"prompt": "In 1900\n\nWhy?\n", "context": "In 1900", "question": "In 1900\r\n\r\nWhy?"}
    pairs, report = load(write_rows(tmp_path / "rows.jsonl", [row]))
    assert len(pairs) == 1 and not any("not read" in line for line in report)
    with pytest.raises(DataError, match=r"rows\.jsonl:1: `question` is not read"):
        load(write_rows(tmp_path / "rows.jsonl", [row | {"question": "In 1900 Why not?"}]))


def test_other_columns_of_text_are_named_once(tmp_path):
    about = {"source": "web", "prompt_id": "abc", "chosen-model": "m", "metadata": {"a": "b"}, "rating": "5", "n": 3}
    said = {"question": "q1", "messages": [user("q1"), assistant(" yes 1")], "output": " yes 1", "input": ""}
    rows = [strings(1) | about | said, strings(2) | {"answer": "a", "rationale": "b"}, strings(3) | {"answer": "c"}]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    pairs, report = load(path)
    assert len(pairs) == 3
    assert report[1] == "  columns of text that are not read: answer (2 rows), rationale (1 rows)"
    assert not any("not read" in line for line in load(path, limit=1)[1])


STRINGS = '{"prompt": "…", "chosen": "…", "rejected": "…"}'
CHAT = '{"prompt": [ASKS], "chosen": [ANSWERS], "rejected": [ANSWERS]}'


@pytest.mark.parametrize(
    "row, fields, first, second",
    [
        ({"text": "x", "label": 1}, "text, label (a number)", STRINGS, CHAT),
        ({}, "(none)", STRINGS, CHAT),
        ({"prompt": None, "rejected": "r"}, "prompt (null), rejected", STRINGS, CHAT),
        (
            {"prompt": "p", "chosen": {"a": 1}, "rejected": True},
            "prompt, chosen (an object), rejected (true or false)",
            STRINGS,
            CHAT,
        ),
        (
            {"question": "q", "answers": ["a", "b"]},
            "question, answers (a list)",
            '{"question": "…", "response_j": "…", "response_k": "…"}',
            '{"question": "…", "chosen": "…", "rejected": "…"}',
        ),
        (
            {"instruction": "i", "input": "", "output": "o"},
            "instruction, input, output",
            '{"instruction": "…", "chosen": "…", "rejected": "…"}',
            '{"instruction": "…", "chosen_response": "…", "rejected_response": "…"}',
        ),
        (
            {"messages": [P, A]},
            "messages (a list)",
            '{"messages": [ASKS, ANSWERS], "rejected_messages": [ASKS, ANSWERS]}',
            '{"messages": [ASKS, ANSWERS], "rejected_response": "…"}',
        ),
        (
            {"prompt": "p", "completions": ["a", "b"]},
            "prompt, completions (a list)",
            '{"prompt": "…", "completions": [{"response": "…", "overall_score": 5}, …]}',
            STRINGS,
        ),
    ],
)
def test_an_unknown_shape_names_its_fields_and_shows_the_two_nearest(tmp_path, row, fields, first, second):
    path = write_rows(tmp_path / "rows.jsonl", [row])
    with pytest.raises(DataError) as error:
        load(path)
    words = {"ASKS": '{"role": "user", "content": "…"}', "ANSWERS": '{"role": "assistant", "content": "…"}'}
    said = str(error.value)
    for word, text in words.items():
        said = said.replace(text, word)
    assert said == (
        f"{path}:1 has the fields {fields}, which is no known shape; the nearest are {first} or {second}: rename or "
        "rewrite them (docs/data.md)"
    )


@pytest.mark.parametrize(
    "row, what",
    [
        ({"prompt": None, "chosen": "yes", "rejected": "no"}, r" has the fields prompt \(null\), .* no known shape"),
        (
            {"prompt": "p", "chosen": assistant("a"), "rejected": assistant("b")},
            r" has the fields .*chosen \(an object\), .* no known shape",
        ),
        ({"prompt": [user("p")], "chosen": "yes", "rejected": "no"}, " needs a chat template"),  # read, as messages
        ({"instruction": ["p"], "chosen": "yes", "rejected": "no"}, " has the fields .* no known shape"),
    ],
    ids=["null prompt", "a message, no list", "prompt as messages, answers as strings", "instruction as a list"],
)
def test_a_field_of_the_wrong_type_in_the_first_row_is_not_dropped_silently(tmp_path, row, what):
    # chosen and rejected alone are a known shape too; taking the file for that would train without any prompt.
    with pytest.raises(DataError, match=rf"rows\.jsonl:1{what}"):
        load(write_rows(tmp_path / "rows.jsonl", [row, row | {"chosen": "yes!"}]))


# -- files that people have ------------------------------------------------------------------------------------------


ANSWERS_2 = {"chosen": [assistant("c")], "rejected": [assistant("r")]}


@pytest.mark.parametrize("name", FOUND)
def test_files_that_people_have_give_these_texts(tmp_path, name):
    path, (_, shape, texts) = write_found(tmp_path, name), FOUND[name]
    where, row = next(read_rows(str(path)))
    row = parse_row(row)
    assert row_texts(row, recognise(row, where))[:3] == texts
    pairs, report = load(path, char_tokenizer(template=CHATML))
    assert report[0].startswith(f"{path}: {shape}, ")
    assert pairs


KTO = (
    "which is one response that is good or bad (KTO), and a pair is two responses to one prompt: write a good and a bad"
)
NO_SHAPE = "which is no known shape; the nearest are "
REFUSED = {  # file -> its content, what is said of it behind its name
    "gbk.csv": (
        "prompt,chosen,rejected\n你好,c,r\n".encode("gbk"),
        ":2: it is no UTF-8 (a spreadsheet saves it as CSV",
    ),
    "gbk_header.csv": (
        "问题,c,r\n".encode("gbk"),
        ":1 is no UTF-8 (a spreadsheet saves it as CSV UTF-8): mend the header",
    ),
    "utf16.csv": ("prompt,chosen,rejected\n".encode("utf-16"), " cannot be read (UTF-16): is it UTF-8 text"),
    "open_quote.csv": ('prompt,chosen,rejected\np,c,r\n"p,c,r\n', ":3 cannot be parted into cells (unexpected end of"),
    "bare_quote.tsv": ('prompt\tchosen\trejected\np\t"c" d\tr\n', ":2 cannot be parted into cells ("),
    "huge.csv": (
        "prompt,chosen,rejected\np,c,r\np,c," + "r" * 200_000,
        ":3 cannot be parted into cells (field larger than field limit (131072)): close the quote there, double one "
        "inside a quoted cell, or make a .jsonl file",
    ),
    "short_row.csv": ("prompt,chosen,rejected\np,c\n", ":2: it has 2 cells and the header 3; mend the row"),
    "twice.csv": ("prompt,chosen,chosen\np,c,r\n", ":1 has the column chosen twice: mend the header"),
    "no_header.csv": ("Why?,So.,No.\np,c,r\n", f":2 has the fields Why?, So., No., {NO_SHAPE}"),
    "python_lists.csv": (
        "prompt,chosen,rejected\np,\"[{'role': 'user', 'content': 'c'}]\",r\n",
        ":2: the cell of `chosen` is no JSON (",
    ),
    "no.parquet": (b"PAR1 and no more", " cannot be read as parquet ("),
    "table.xlsx": (b"PK\3\4 and so on", " is a spreadsheet or an archive: save it as CSV UTF-8, or unpack it"),
    "openai_tools.jsonl": (
        lines_of(OPENAI | {"input": {"messages": [P], "tools": [TOOL]}}),
        ":1: `input` has `tools`, which is not read there: give the row a column of that name; mend the row",
    ),
    "openai_text.jsonl": (
        lines_of(OPENAI | {"input": {"text": "p"}}),
        ":1: `input` has `text`, which is not read there",
    ),
    "openai_empty.jsonl": (lines_of(OPENAI | {"input": {}}), ":1: `input.messages` is not a list of messages"),
    "sharegpt_other_end.jsonl": (
        lines_of({"conversations": [human("p"), gpt("a")], "chosen": gpt("c"), "rejected": gpt("r")}),
        ":1: `conversations` ends in an answer that is not `chosen`: end it in what is asked; mend the row",
    ),
    "ms_swift_end.jsonl": (
        lines_of({"messages": [P], "rejected_response": "r"}),
        ":1: `messages` does not end in an answer of the assistant's, which would be the chosen one; mend the row",
    ),
    "query_and_input.jsonl": (
        lines_of({"query": "p", "input": "q"} | TWO),
        ":1: `input` is not read where a file's first row is query/chosen/rejected: call what is asked `prompt`",
    ),
    "equal_ratings.jsonl": (
        lines_of({"prompt": "p", "completions": [scored("a", 5), scored("b", 5.0)]}),
        " has 1 rows and no usable pair (1 because no two responses have different ratings)",
    ),
    "ratings_too_few.jsonl": (
        lines_of({"prompt": "p", "completions": ["a", "b"], "ratings": [5]}),
        ":1: `ratings` has 1 entries and `completions` has 2; mend the row",
    ),
    "ratings_in_words.jsonl": (
        lines_of({"prompt": "p", "completions": ["a", "b"], "ratings": ["good", "bad"]}),
        ":1: a rating of `completions` is 'good', and no number; mend the row",
    ),
    "other_prompts.jsonl": (
        lines_of({"prompt": "p", "completions": [scored("a", 5, system_prompt="s"), scored("b", 1)]}),
        ":1: `system_prompt` is not read where a file's first row is prompt/completions with ratings, in `completions`",
    ),
    "kto.jsonl": (
        lines_of({"prompt": "p", "completion": "c", "label": True}),
        f":1 has the fields prompt, completion, label (true or false), {KTO}",
    ),
    "kto_messages.jsonl": (
        lines_of({"messages": [P, A], "label": False}),
        ":1 has the fields messages (a list), label",
    ),
    "kto.csv": ("prompt,completion,label\np,c,True\n", f":2 has the fields prompt, completion, label, {KTO}"),
    "answers.jsonl": (lines_of({"prompt": "p", "response": "c"}), f":1 has the fields prompt, response, {NO_SHAPE}"),
    "two_lists.json": (
        json.dumps({"train": [], "test": []}),
        f":1 has the fields train (a list), test (a list), {NO_SHAPE}",
    ),
    "open.json": (
        '{"data": [\n{"prompt": "p"},\n{"prompt": \n]}',
        ":4 is not JSON (Expecting value): mend the list there",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_files_that_people_have_and_that_are_no_pairs_get_one_sentence(tmp_path, name):
    content, sentence = REFUSED[name]
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(DataError) as error:
        load(path, char_tokenizer(template=CHATML))
    assert str(error.value).startswith(f"{path}{sentence}")
    assert "\n" not in str(error.value)


def test_a_parquet_file_without_its_reader_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "rows.parquet").write_bytes(b"PAR1...")
    with pytest.raises(DataError) as error:
        load(tmp_path / "rows.parquet")
    assert str(error.value) == (
        f"{tmp_path}/rows.parquet is a parquet file, and what reads it is missing: install the extra hub "
        "(bash setup.sh hub, or pip install pyarrow)"
    )


def test_every_row_of_a_table_is_checked_and_skipped_by_its_line(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_bytes(b'prompt,chosen,rejected\n"a\nb",c,r\n\nshort\nq\xe9,c,r\nq,c,r,,\nq,c,r,more\n')
    pairs, report = load(path, skip_invalid=True)
    assert [pair.prompt_ids for pair in pairs] == [ids("a\nb"), ids("q")]
    assert report[1] == (
        f"  left out 3 rows: 3 because malformed; the first is {path}:5: it has 1 cells and the header 3"
    )


@pytest.mark.parametrize(
    "change", [{"chosen": "c"}, {"conversations": "p"}, {"chosen": [gpt("c")]}, {"rejected": None}]
)
def test_a_later_row_of_sharegpt_has_the_shape_of_the_first(tmp_path, change):
    row = {"conversations": [human("p")], "chosen": gpt("c"), "rejected": gpt("r")}
    path = write_rows(tmp_path / "rows.jsonl", [row, row | change])
    with pytest.raises(DataError, match=rf"rows.jsonl:2: `{list(change)[0]}` is not a (dict|list)"):
        load(path, char_tokenizer(template=CHATML))


def test_what_else_a_rated_response_says_is_named(tmp_path):
    completions = [scored("a", 5, critique="good", custom_system_prompt="s"), scored("b", 1, critique="bad")]
    path = write_rows(tmp_path / "rows.jsonl", [{"instruction": "p", "completions": completions}] * 2)
    assert load(path)[1][1] == (
        "  columns of text that are not read: completions.critique (2 rows), completions.custom_system_prompt (2 rows)"
    )


# -- texts -> token ids -----------------------------------------------------------------------------------------------


def test_strings_become_these_token_ids(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": "Q: ", "chosen": "ab", "rejected": "c"}])
    pairs, report = load(path)
    assert pairs == [Pair([81, 58, 32], [97, 98, 1], [99, 1])]
    assert report == [
        f"{path}: prompt/chosen/rejected, 1 rows, 1 pairs",
        "  row 0 prompt      3 tokens  'Q: '",
        "  row 0 chosen      3 tokens  'ab</s>'",
        "  row 0 rejected    2 tokens  'c</s>'",
    ]


def test_a_token_that_spans_the_seam_belongs_to_the_responses(tmp_path):
    # " y" is one token (128): the prompt "Q: " would end in a blank that neither full text has as a token.
    tokenizer = char_tokenizer(merges=[(" ", "y")])
    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": "Q: ", "chosen": "yes", "rejected": "no"}])
    [pair] = load(path, tokenizer)[0]
    assert pair == Pair(ids("Q:"), [128, *ids("es"), EOS], [*ids(" no"), EOS])
    assert pair.prompt_ids + pair.chosen_ids == [*tokenizer("Q: yes")["input_ids"], EOS]


def test_the_boundary_is_the_shorter_of_the_two_responses_prefixes(tmp_path):
    # Only the rejected response merges over the seam; the prompt is shared, so it ends before the seam for both.
    tokenizer = char_tokenizer(merges=[("b", "c")])
    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": "ab", "chosen": "x", "rejected": "c"}])
    assert load(path, tokenizer)[0] == [Pair(ids("a"), [*ids("bx"), EOS], [128, EOS])]


def test_every_pair_is_the_tokenisation_of_the_whole_texts_and_one_eos(tmp_path):
    draw = random.Random(0)
    pieces = ["a", "b", "ab", " ", "  ", "\n", "ba", ".", "é", "你", "好", "🙂", "Assistant", "\t"]

    def text(least):
        return "".join(draw.choice(pieces) for _ in range(draw.randint(least, 9)))

    backend = Tokenizer(models.BPE())  # merges across words and lines: the seam is anywhere
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["</s>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([text(5) for _ in range(500)], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    rows = [{"prompt": text(1), "chosen": text(1) + "1", "rejected": text(1) + "2"} for _ in range(500)]
    pairs, _ = load(write_rows(tmp_path / "rows.jsonl", rows), tokenizer)
    moved = 0
    for row, pair in zip(rows, pairs, strict=True):
        prompt_ids, eos = tokenizer(row["prompt"])["input_ids"], [tokenizer.eos_token_id]
        for name, response_ids in (("chosen", pair.chosen_ids), ("rejected", pair.rejected_ids)):
            whole = tokenizer(row["prompt"] + row[name])["input_ids"] + eos
            if pair.prompt_ids == eos:  # nothing in common: EOS stands in for the prompt
                whole = eos + whole
            assert pair.prompt_ids + response_ids == whole
        moved += len(pair.prompt_ids) < len(prompt_ids)
    assert moved > 50  # else the tokenizer does not merge over the seam and this test shows little


@pytest.mark.parametrize(
    "tokenizer, response",
    [
        (char_tokenizer(), "ab</s>"),
        (char_tokenizer(), "ab</s></s>"),
        (char_tokenizer(after="</s>"), "ab"),
        (char_tokenizer(after="</s>"), "ab</s>"),
    ],
    ids=["EOS in the text", "twice", "EOS from the tokenizer", "both"],
)
def test_a_response_ends_in_exactly_one_eos(tmp_path, tokenizer, response):
    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": "Q", "chosen": response, "rejected": "c"}])
    assert load(path, tokenizer)[0] == [Pair([81], [97, 98, EOS], [99, EOS])]


def test_a_template_that_writes_a_newline_behind_eos_ends_in_exactly_one_eos(tmp_path):
    tokenizer = char_tokenizer(eos="<|im_end|>", template=CHATML)
    row = {"prompt": [user("Q")], "chosen": [assistant("ab")], "rejected": [assistant("c")]}
    [pair] = load(write_rows(tmp_path / "rows.jsonl", [row]), tokenizer)[0]
    prompt = [2, *ids("user\nQ"), 3, 10, 2, *ids("assistant\n")]
    assert pair == Pair(prompt, [97, 98, 3], [99, 3])


def test_an_eos_inside_a_chat_of_several_turns_stays(tmp_path):
    tokenizer = char_tokenizer(eos="<|im_end|>", template=CHATML)
    row = {"prompt": [user("Q")], "chosen": [assistant("a"), user("b"), assistant("c")], "rejected": [assistant("d")]}
    [pair] = load(write_rows(tmp_path / "rows.jsonl", [row]), tokenizer)[0]
    assert pair.chosen_ids == [97, 3, 10, 2, *ids("user\nb"), 3, 10, 2, *ids("assistant\nc"), 3]


def test_a_template_that_ends_in_no_eos_gets_one(tmp_path):
    template = CHATML.replace("<|im_end|>", "#")  # as Gemma's <end_of_turn>, which is another token than its EOS
    row = {"prompt": [user("Q")], "chosen": [assistant("a")], "rejected": [assistant("b")]}
    [pair] = load(write_rows(tmp_path / "rows.jsonl", [row]), char_tokenizer(template=template))[0]
    assert pair[1:3] == (ids("a#\n") + [EOS], ids("b#\n") + [EOS])


def test_a_template_that_writes_bos_gives_one_bos(tmp_path):
    tokenizer = char_tokenizer(before="<s>", template="{{ bos_token }}" + CHATML)
    row = {"prompt": [user("Q")], "chosen": [assistant("a")], "rejected": [assistant("b")]}
    [pair] = load(write_rows(tmp_path / "rows.jsonl", [row]), tokenizer)[0]
    assert pair.prompt_ids[:2] == [0, 2]
    assert sum(pair[:3], []).count(0) == 1


@pytest.mark.parametrize(
    "tokenizer, prompt, prompt_ids",
    [
        (char_tokenizer(before="<s>"), "Q", [0, 81]),
        (char_tokenizer(before="<s>"), "", [0]),
        (char_tokenizer(), "", [EOS]),
        (char_tokenizer(before="<s>", after="</s>"), "Q", [0, 81]),
        (char_tokenizer(before="<s>", after="</s>"), "", [0]),
        (char_tokenizer(after="</s>"), "", [EOS]),
    ],
    ids=["BOS", "BOS, empty", "no BOS, empty", "BOS and EOS", "BOS and EOS, empty", "EOS, empty"],
)
def test_prompt_has_one_bos_and_is_never_empty(tmp_path, tokenizer, prompt, prompt_ids):
    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": prompt, "chosen": "a", "rejected": "b"}])
    assert load(path, tokenizer)[0] == [Pair(prompt_ids, [97, EOS], [98, EOS])]


@pytest.mark.parametrize(
    "before, max_prompt_length, prompt_ids",
    [("", 3, ids("cde")), ("<s>", 3, [0, *ids("de")]), ("<s>", 1, [0]), ("<s>", 6, [0, *ids("abcde")]), ("", 1, [101])],
)
def test_a_prompt_is_cut_from_the_left_but_for_its_bos(tmp_path, before, max_prompt_length, prompt_ids):
    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": "abcde", "chosen": "xyz", "rejected": "uv"}])
    pairs, report = load(path, char_tokenizer(before=before), max_prompt_length=max_prompt_length)
    assert pairs == [Pair(prompt_ids, [*ids("xyz"), EOS], [*ids("uv"), EOS])]
    assert any("cut 1 pairs to" in line for line in report) == (len(prompt_ids) < 5 + bool(before))


@pytest.mark.parametrize(
    "max_length, max_prompt_length, chosen_ids, rejected_ids",
    [
        (7, 3, ids("wxyz"), [*ids("uv"), EOS]),  # only what does not fit loses its end, and its EOS with it
        (8, 3, [*ids("wxyz"), EOS], [*ids("uv"), EOS]),
        (5, 3, ids("wx"), ids("uv")),
        (4, 3, ids("w"), ids("u")),  # never to nothing
    ],
)
def test_responses_are_cut_from_the_right(tmp_path, max_length, max_prompt_length, chosen_ids, rejected_ids):
    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": "abcde", "chosen": "wxyz", "rejected": "uv"}])
    pairs, _ = load(path, max_length=max_length, max_prompt_length=max_prompt_length)
    assert pairs == [Pair(ids("cde"), chosen_ids, rejected_ids)]


def test_responses_that_are_equal_after_the_cut_are_counted(tmp_path):
    rows = [{"prompt": "abc", "chosen": "wxyz", "rejected": "wx!!"}, {"prompt": "abc", "chosen": "k", "rejected": "l"}]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    pairs, report = load(path, max_length=5, max_prompt_length=3)
    assert pairs == [Pair(ids("abc"), [107, EOS], [108, EOS])]
    reason = "the two responses are equal after the cut at --max-length"
    assert report[1] == f"  left out 1 rows: 1 because {reason}; the first is {path}:1: {reason}"


def test_one_cut_pair_among_many_is_counted_once(tmp_path):
    rows = [strings(n) for n in range(8)] + [{"prompt": "p" * 99, "chosen": "c" * 99, "rejected": "r" * 99}]
    pairs, report = load(write_rows(tmp_path / "rows.jsonl", rows), max_length=40, max_prompt_length=20)
    assert [len(part) for part in pairs[-1][:3]] == [20, 20, 20]
    assert "  cut 1 pairs to --max-length 40 or --max-prompt-length 20" in report


# -- rows that teach nothing ------------------------------------------------------------------------------------------


def test_unusable_rows_are_counted_by_reason_and_the_first_is_named(tmp_path):
    rows = [
        strings(1),
        strings(2) | {"chosen": ""},
        strings(3) | {"rejected": " \n\t"},
        strings(4) | {"rejected": ""},
        strings(5) | {"chosen": "x", "rejected": "x"},
        strings(6),
    ]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    pairs, report = load(path)
    assert [pair.prompt_ids for pair in pairs] == [ids("q1"), ids("q6")]
    assert report[0] == f"{path}: prompt/chosen/rejected, 6 rows, 2 pairs"
    assert report[1] == (
        "  left out 4 rows: 2 because the rejected response is empty, 1 because the chosen response is empty, "
        f"1 because the two responses are equal; the first is {path}:2: the chosen response is empty"
    )


def test_hh_transcripts_with_differing_prompts_are_left_out(tmp_path):
    def row(question, other):
        start = "\n\nHuman: {}\n\nAssistant: {}"
        return {"chosen": start.format(question, "Yes."), "rejected": start.format(other, "No.")}

    path = write_rows(tmp_path / "rows.jsonl", [row("a", "a"), row("a", "b"), row("c", "c")])
    pairs, report = load(path)
    assert [len(part) for part in pairs[1][:3]] == [22, 6, 5]
    assert report[1] == (
        "  left out 1 rows: 1 because the prompts of chosen and rejected differ; "
        f"the first is {path}:2: the prompts of chosen and rejected differ"
    )


@pytest.mark.parametrize(
    "lines, reason",
    [
        (["{}"], "no known shape"),
        ([], "0 rows and no usable pair .the file is empty"),
        (["", "  "], "0 rows and no usable pair .the file is empty"),
        ([strings(1) | {"chosen": ""}] * 3, "3 rows and no usable pair .3 because the chosen response is empty"),
    ],
)
def test_no_usable_pair_is_an_error(tmp_path, lines, reason):
    with pytest.raises(DataError, match=reason):
        load(write_rows(tmp_path / "rows.jsonl", lines))


# -- malformed rows ---------------------------------------------------------------------------------------------------


def test_line_17_of_3000_is_named(tmp_path):
    rows = [strings(n) for n in range(3000)]
    rows[16] = json.dumps(rows[16])[:-1]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    with pytest.raises(DataError, match=rf"^{path}:17: not JSON .*--skip-invalid"):
        load(path)


def message_row(**changes):
    return {"prompt": [user("p")], "chosen": [assistant("a")], "rejected": [assistant("b")]} | changes


MALFORMED = {  # a first row of the same shape -> a later row, what is said about it
    "missing": (strings(0), {"prompt": "p", "rejected": "r"}, "`chosen` is missing"),
    "wrong type": (strings(0), strings(1) | {"rejected": 5}, "`rejected` is not a str"),
    "null": (strings(0), strings(1) | {"prompt": None}, "`prompt` is not a str"),
    "not an object": (strings(0), "[1, 2]", "not a JSON object"),
    "a number": (strings(0), "17", "not a JSON object"),
    "string for messages": (message_row(), message_row(chosen="a"), "`chosen` is not a list"),
    "messages without role": (message_row(), message_row(rejected=[{"content": "b"}]), "`rejected` is not a list of m"),
    "messages that are strings": (message_row(), message_row(prompt=["p"]), "`prompt` is not a list of messages"),
    "content that is null": (message_row(), message_row(chosen=[assistant(None)]), ""),  # by its template or by us
    "no message in the prompt": (message_row(), message_row(prompt=[]), "`prompt`"),
    "input that is a number": (
        {"instruction": "i", "input": "x", "chosen": "a", "rejected": "b"},
        {"instruction": "i", "input": 5, "chosen": "a", "rejected": "b"},
        "`input`",
    ),
    "PKU, 2": (pku_row(), pku_row(better_response_id=2), "`better_response_id` is neither 0 nor 1"),
    "PKU, -1": (pku_row(), pku_row(better_response_id=-1), "`better_response_id` is neither 0 nor 1"),
    "PKU, null": (pku_row(), pku_row(better_response_id=None), "`better_response_id` is not a int"),
    "PKU, no answer": (pku_row(), pku_row(response_1=None), "`response_1` is not a str"),
    "half of a surrogate pair": (strings(0), '{"prompt": "p", "chosen": "\\ud83d", "rejected": "r"}', ""),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_row_stops_with_its_place_and_field(tmp_path, name):
    good, bad, what = MALFORMED[name]
    path = write_rows(tmp_path / "rows.jsonl", [good, bad, good])
    with pytest.raises(DataError) as error:
        load(path, char_tokenizer(template=CHATML))
    assert str(error.value).startswith(f"{path}:2: {what}")
    assert str(error.value).endswith("; mend the row, or leave such rows out with --skip-invalid")


@pytest.mark.parametrize("name", MALFORMED)
def test_skip_invalid_counts_malformed_rows_and_goes_on(tmp_path, name):
    good, bad, what = MALFORMED[name]
    path = write_rows(tmp_path / "rows.jsonl", [good, bad, good, bad, good])
    pairs, report = load(path, char_tokenizer(template=CHATML), skip_invalid=True)
    assert len(pairs) == 3
    assert report[1].startswith(f"  left out 2 rows: 2 because malformed; the first is {path}:2: {what}")


LINES = {  # what a line may hold that no row does -> what is said of it
    "no UTF-8": (b'{"prompt": "caf\xe9", "chosen": "a", "rejected": "b"}', "byte 16 of the line is no UTF-8"),
    "nested too deeply": (b'{"prompt": ' + b"[" * 10**5 + b"]" * 10**5 + b"}", "not JSON (nested too deeply)"),
    "a long number": (b'{"prompt": ' + b"9" * 5000 + b"}", "not JSON (a number of thousands of digits)"),
    "a key twice": (b'{"chosen": "a", "rejected": "b", "chosen": "c"}', "not JSON (`chosen` stands twice)"),
}


@pytest.mark.parametrize("name", LINES)
def test_a_line_that_python_cannot_hold_is_named_and_skipped(tmp_path, name):
    line, what = LINES[name]
    path, good = tmp_path / "rows.jsonl", json.dumps(strings(1)).encode()
    path.write_bytes(b"\n".join((good, line, good)))
    with pytest.raises(DataError) as error:
        load(path)
    assert str(error.value) == f"{path}:2: {what}; mend the row, or leave such rows out with --skip-invalid"
    pairs, report = load(path, skip_invalid=True)
    assert len(pairs) == 2
    assert report[1] == f"  left out 1 rows: 1 because malformed; the first is {path}:2: {what}"
    path.write_bytes(b"[" + good + b"," + line + b"]")
    with pytest.raises(DataError, match="is not JSON" if name != "no UTF-8" else "row 1: text that is no Unicode"):
        load(path)


def test_a_byte_that_is_no_utf8_in_a_list_is_skipped_with_its_row(tmp_path):
    path = tmp_path / "rows.json"
    path.write_bytes(json.dumps([strings(1), strings(2)]).encode().replace(b"yes 2", b"yes \xe9"))
    assert [pair.prompt_ids for pair in load(path, skip_invalid=True)[0]] == [ids("q1")]


@pytest.mark.parametrize("name", ["x" * 300, "x" * 300 + ".jsonl"])
def test_a_name_that_no_file_can_have_is_one_sentence(name):
    with pytest.raises(DataError, match=r"cannot be read .*File name too long.*: check the path$"):
        load(name)


def test_a_huge_row_gives_the_pair_of_the_whole_texts(tmp_path):
    def pairs(size):
        row = {"prompt": "p " * size + "Q? ", "chosen": "c " * size, "rejected": "r " * size}
        chat = {
            "prompt": [user(row["prompt"])],
            "chosen": [assistant(row["chosen"])],
            "rejected": [assistant(row["rejected"])],
        }
        found = []
        for either in (row, chat):
            path = write_rows(tmp_path / "rows.jsonl", [either, either])
            found.append(load(path, char_tokenizer(template=CHATML), max_length=60, max_prompt_length=50))
        return [pairs for pairs, _ in found], [report[1] for _, report in found]

    start = time.perf_counter()
    huge = pairs(3 * 10**6)
    assert huge == pairs(200)
    assert time.perf_counter() - start < 20  # 72 million characters; a million take a tokenizer a second and more
    assert huge[1] == ["  cut 2 pairs to --max-length 60 or --max-prompt-length 50"] * 2


def test_many_rows_are_tokenised_in_parts(tmp_path):
    rows = [strings(n) for n in range(2 * preference_data.ROWS_AT_ONCE + 3)]
    pairs, _ = load(write_rows(tmp_path / "rows.jsonl", rows))
    assert pairs == [Pair(ids(f"q{n}"), [*ids(f" yes {n}"), EOS], [*ids(f" no {n}"), EOS]) for n in range(len(rows))]


def test_skip_invalid_skips_a_first_row_that_is_not_json(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", ["not JSON", strings(1), strings(2)])
    pairs, report = load(path, skip_invalid=True)
    assert [pair.prompt_ids for pair in pairs] == [ids("q1"), ids("q2")]
    assert "1 because malformed" in report[1]


def test_a_first_row_without_chosen_names_its_place_and_fields(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": "p", "rejected": "r"}, strings(1)])
    with pytest.raises(DataError, match=rf"^{path}:1 has the fields prompt, rejected, which is no known shape"):
        load(path)


def test_a_json_list_whose_items_are_no_objects(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([strings(0), [1]]))
    with pytest.raises(DataError, match=rf"^{path}: row 1: not a JSON object"):
        load(path)


# -- files ------------------------------------------------------------------------------------------------------------

ROWS = [strings(0), {"prompt": "a\u2028b", "chosen": "\x85c\u2029d", "rejected": "e\x0bf"}, strings(2)]


def jsonl(end="\n", ascii=False):
    return "".join(json.dumps(row, ensure_ascii=ascii) + end for row in ROWS)


FILES = {  # \u2028 and \x85 end a line for str.splitlines, not in JSON: ensure_ascii=False writes them as they are
    "JSONL": jsonl().encode(),
    "no newline at the end": jsonl().rstrip().encode(),
    "blank lines": b"\n  \n" + jsonl("\n\n").encode() + b"\n",
    "BOM": b"\xef\xbb\xbf" + jsonl().encode(),
    "CRLF": jsonl("\r\n").encode(),
    "gzip": gzip.compress(jsonl().encode()),
    "gzip of BOM and CRLF": gzip.compress(b"\xef\xbb\xbf" + jsonl("\r\n").encode()),
    "JSON": json.dumps(ROWS, ensure_ascii=False).encode(),
    "JSON with indent": b"\n" + json.dumps(ROWS, indent=2).encode(),
    "JSON with BOM": b"\xef\xbb\xbf" + json.dumps(ROWS).encode(),
    "gzip of JSON": gzip.compress(json.dumps(ROWS).encode()),
}


@pytest.mark.parametrize("ending", ["jsonl", "json", "txt", "gz"])
@pytest.mark.parametrize("name", FILES)
def test_the_same_rows_are_read_from_any_encoding_under_any_ending(tmp_path, name, ending):
    path = tmp_path / f"rows.{ending}"
    path.write_bytes(FILES[name])
    expected = [
        Pair([*ids("q0")], [*ids(" yes 0"), EOS], [*ids(" no 0"), EOS]),
        Pair([97, 4, 98], [4, 99, 4, 100, EOS], [101, 4, 102, EOS]),  # 4: characters that the tokenizer lacks
        Pair([*ids("q2")], [*ids(" yes 2"), EOS], [*ids(" no 2"), EOS]),
    ]
    assert load(path)[0] == expected


def test_the_line_number_counts_blank_lines(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", ["", strings(0), "", "{"])
    with pytest.raises(DataError, match=rf"^{path}:4: not JSON"):
        load(path)


def damaged_gzip():
    whole = bytearray(gzip.compress(jsonl().encode()))
    whole[10] |= 0b110  # the first block is of a type that does not exist
    with pytest.raises(zlib.error):  # not an OSError, unlike the other ways in which a gzip file is broken
        gzip.decompress(whole)
    return bytes(whole)


@pytest.mark.parametrize(
    "content, where",
    [
        (gzip.compress(jsonl().encode() * 200)[:-20], "rows.jsonl cannot be read"),
        (gzip.compress(jsonl().encode())[:12], "rows.jsonl cannot be read"),
        (damaged_gzip(), "rows.jsonl cannot be read"),
        (jsonl().encode("utf-16"), "rows.jsonl cannot be read"),
        (json.dumps(ROWS, indent=0).encode()[:-30], r"rows.jsonl:\d+ is not JSON"),
    ],
    ids=["gzip cut off", "gzip cut off early", "gzip damaged", "UTF-16", "JSON list cut off"],
)
def test_a_file_that_is_not_whole_text_is_an_error(tmp_path, content, where):
    (tmp_path / "rows.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=where):
        load(tmp_path / "rows.jsonl")


@pytest.mark.parametrize("name", ["./rows", "/no/rows", "rows.jsonl", "data/rows.json", "rows.jsonl.gz", "~/rows"])
def test_a_missing_file_is_not_looked_for_on_a_hub(name):
    with pytest.raises(DataError, match=rf"^there is no file {name}: check the path$"):
        load(name)


@pytest.mark.parametrize("limit, count", [(0, 5), (1, 1), (3, 3), (9, 5)])
def test_limit_reads_that_many_rows(tmp_path, limit, count):
    pairs, report = load(write_rows(tmp_path / "rows.jsonl", [strings(n) for n in range(5)]), limit=limit)
    assert [pair.prompt_ids for pair in pairs] == [ids(f"q{n}") for n in range(count)]
    rows = f"{count} rows (as many as asked for)" if limit == count else f"{count} rows"
    assert report[0].endswith(f": prompt/chosen/rejected, {rows}, {count} pairs")


def test_a_limit_that_nobody_asked_for_is_called_the_default(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [strings(n) for n in range(5)])
    [first, *_] = load(path, limit=3, by_default=True)[1]
    assert first.endswith(", 3 rows (as many as are read by default; --num-samples 0: all), 3 pairs")
    assert ", 5 rows, 5 pairs" in load(path, limit=9, by_default=True)[1][0]


def test_limit_does_not_reach_a_malformed_row_behind_it(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [strings(0), strings(1), "not JSON"])
    assert len(load(path, limit=2)[0]) == 2
    with pytest.raises(DataError, match=":3: not JSON"):
        load(path, limit=3)


# -- chat templates ---------------------------------------------------------------------------------------------------


def test_chat_template_strings_wraps_a_plain_prompt(tmp_path):
    tokenizer = char_tokenizer(eos="<|im_end|>", template=CHATML)
    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": "Hi?", "chosen": " Yes.", "rejected": "No. "}])
    [pair] = load(path, tokenizer, chat_template_strings=True)[0]
    assert tokenizer.decode(pair.prompt_ids) == "<|im_start|>user\nHi?<|im_end|>\n<|im_start|>assistant\n"
    assert [tokenizer.decode(part) for part in pair[1:3]] == ["Yes.<|im_end|>", "No.<|im_end|>"]


def test_chat_template_strings_makes_turns_of_an_hh_transcript(tmp_path):
    tokenizer = char_tokenizer(eos="<|im_end|>", template=CHATML)
    start = "\n\nHuman: a?\n\nAssistant: b.\n\nHuman: c?\n\nAssistant:"
    path = write_rows(tmp_path / "rows.jsonl", [{"chosen": start + " Yes.", "rejected": start + " No."}])
    [pair] = load(path, tokenizer, chat_template_strings=True)[0]
    assert tokenizer.decode(pair.prompt_ids) == (
        "<|im_start|>user\na?<|im_end|>\n<|im_start|>assistant\nb.<|im_end|>\n"
        "<|im_start|>user\nc?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert [tokenizer.decode(part) for part in pair[1:3]] == ["Yes.<|im_end|>", "No.<|im_end|>"]


HH_ROW = {"chosen": "\n\nHuman: a?\n\nAssistant: b", "rejected": "\n\nHuman: a?\n\nAssistant: c"}
RENDERED = {"prompt": "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n", "chosen": "b", "rejected": "c"}
AS_ANSWERED = "User: a\nAssistant: "  # a template without tokens of its own, as it renders a prompt
PLAIN = "{% for m in messages %}{{ m.role | capitalize + ': ' + m.content + '\n' }}{% endfor %}"
PLAIN += "{% if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}"


@pytest.mark.parametrize(
    "row, template, count",
    [
        (strings(1), CHATML, 2),
        (HH_ROW, CHATML, 2),
        (RENDERED, CHATML, 0),
        (of_messages([P]), CHATML, 0),
        (strings(1), None, 0),
        (strings(1), PLAIN, 2),
        ({"prompt": AS_ANSWERED, "chosen": "b", "rejected": "c"}, PLAIN, 0),
    ],
    ids=["strings", "HH", "rendered", "messages", "no template", "another template", "rendered without tokens"],
)
def test_strings_for_a_chat_model_are_said_once_with_the_flag(tmp_path, row, template, count):
    path, tokenizer = write_rows(tmp_path / "rows.jsonl", [row, row]), char_tokenizer(template=template)
    said = f"  {count} rows are strings and pass by the tokenizer's chat template: for a model that is to chat, train "
    found = [line for line in load(path, tokenizer)[1] if "--chat-template-strings" in line]
    assert found == [said + "with --chat-template-strings"] * (count > 0)
    if template:
        assert "--chat-template-strings" not in "\n".join(load(path, tokenizer, chat_template_strings=True)[1])


def test_text_before_the_first_turn_keeps_a_prompt_whole():
    prompt = "Be brief.\n\nHuman: a?\n\nAssistant:"
    assert as_messages(prompt, " b", " c")[0] == [user(prompt)]


def test_messages_need_a_tokenizer_with_a_template(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [message_row()])
    with pytest.raises(DataError, match=rf"^{path}:1 needs a chat template and this tokenizer has none: use an instru"):
        load(path)


@pytest.mark.parametrize(
    "template",
    [
        "{{ 1/0 }}",
        "{{ messages.x.y }}",
        "{{ [1][0](2) }}",
        "{{ range(10**9)|list }}",
        "{% if",
        "{{ messages[0].role + 5 }}",
    ]
    + ["{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"],
)
def test_a_template_that_fails_in_any_way_is_one_sentence(tmp_path, template):
    path = write_rows(tmp_path / "rows.jsonl", [of_messages([P])])
    with pytest.raises(DataError, match=rf"^{path}:1: the chat template refuses its messages \(.+\); mend the row"):
        load(path, char_tokenizer(template=template))
    load(write_rows(tmp_path / "rows.jsonl", [strings(1)]), char_tokenizer(template=template))  # strings need none


def test_a_template_that_refuses_the_messages_names_the_row(tmp_path):
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML
    rows = [message_row(), message_row(prompt=[{"role": "system", "content": "s"}, user("p")])]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    with pytest.raises(DataError, match=rf"^{path}:2: the chat template refuses its messages .no system role"):
        load(path, char_tokenizer(template=template))


# -- fingerprint and hold-out -----------------------------------------------------------------------------------------


def test_fingerprint_is_equal_on_reload_and_changes_with_any_token_and_any_order(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [strings(n) for n in range(5)])
    pairs = load(path)[0]
    assert fingerprint(pairs) == fingerprint(load(path)[0])
    numbers = {fingerprint(pairs), fingerprint(pairs[::-1]), fingerprint(pairs[:-1])}
    numbers.add(fingerprint([Pair(p, r, c) for p, c, r, *_ in pairs]))
    changes = 0
    for part in range(3):
        for place in range(len(pairs[2][part])):
            changed = [Pair(*map(list, pair[:3])) for pair in pairs]
            changed[2][part][place] += 1
            numbers.add(fingerprint(changed))
            changes += 1
    moved = [*pairs[:2], Pair(pairs[2].prompt_ids + pairs[2].chosen_ids[:1], pairs[2].chosen_ids[1:], [98])]
    numbers |= {fingerprint(moved), fingerprint([*pairs[:2], Pair(*pairs[2][:2], [98])])}
    assert len(numbers) == 4 + changes + 2


def test_hold_out_parts_by_whole_prompts():
    # 40 prompts with 1 to 4 pairs each, mixed
    pairs = [Pair([n % 40], [n, 1], [n, 2]) for n in range(160) if n % 7]
    train, held = hold_out(pairs, 20, seed=3)
    assert sorted(train + held) == list(range(len(pairs)))
    assert not {pairs[i].prompt_ids[0] for i in train} & {pairs[i].prompt_ids[0] for i in held}
    assert 20 <= len(held) < 24  # it stops with the prompt that reaches 20, and a prompt has at most 4
    assert (train, held) == (sorted(train), sorted(held))  # the file's order stays on both sides


def test_hold_out_depends_on_the_seed_alone():
    pairs = [Pair([n], [n, 1], [n, 2]) for n in range(100)]
    assert hold_out(pairs, 10, seed=1) == hold_out(pairs, 10, seed=1)
    draws = [tuple(hold_out(pairs, 10, seed)[1]) for seed in range(5)]
    assert [len(draw) for draw in draws] == [10] * 5
    assert len(set(draws)) == 5
    assert (0, 1, 2, 3, 4, 5, 6, 7, 8, 9) not in draws  # drawn, not the first ten


@pytest.mark.parametrize("wanted, held", [(0, 0), (1, 1), (7, 6), (9, 6)])
def test_hold_out_sizes(wanted, held):
    pairs = [Pair([n], [n, 1], [n, 2]) for n in range(7)]
    assert [len(side) for side in hold_out(pairs, wanted, seed=0)] == [7 - held, held]


# -- labels of harm --------------------------------------------------------------------------------------------------


def test_labels_of_harm_come_with_their_pair_and_count_in_the_fingerprint(tmp_path):
    rows = [strings(n) | {"safety_labels": labels} for n, labels in enumerate(({"chosen": -1, "rejected": 1}, None))]
    pairs, _ = load(write_rows(tmp_path / "rows.jsonl", [*rows, strings(2)]))
    assert [pair.labels for pair in pairs] == [(-1, 1), None, None]
    assert fingerprint(pairs) != fingerprint([pairs[0]._replace(labels=(1, 1)), *pairs[1:]])


@pytest.mark.parametrize(
    ("labels", "sentence"),
    [
        ({"chosen": 1}, r'`safety_labels` is not {"chosen": ±1, "rejected": ±1}'),
        ([1, -1], r'`safety_labels` is not {"chosen": ±1, "rejected": ±1}'),
        ({"chosen": 0, "rejected": 1}, r"the safety label of chosen is 0: \+1 is harmful, -1 is safe"),
        ({"chosen": 1, "rejected": True}, r"the safety label of rejected is True: "),
        ({"chosen": 1, "rejected": "-1"}, r"the safety label of rejected is '-1': "),
    ],
)
def test_labels_that_are_not_plus_or_minus_one_for_both_stop_the_run(tmp_path, labels, sentence):
    path = write_rows(tmp_path / "rows.jsonl", [strings(0), strings(1) | {"safety_labels": labels}])
    with pytest.raises(DataError, match=rf"rows.jsonl:2: {sentence}"):
        load(path)
    assert len(load(path, skip_invalid=True)[0]) == 1
