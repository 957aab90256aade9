"""Rows of the shapes, and files of the kinds, that people have pairs in."""

import gzip
import io
import json

import pytest
from worlds import assistant, system, user


def of_messages(prompt=None, chosen=(), rejected=()):
    given = {"chosen": [*chosen, assistant("c")], "rejected": [*rejected, assistant("r")]}
    return given if prompt is None else {"prompt": prompt} | given


S, P, A, B = system("s"), user("p"), assistant("a"), user("b")


def lines_of(*rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def parquet(*rows):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    file = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(list(rows)), file)
    return file.getvalue()


def human(text):
    return {"from": "human", "value": text}


def gpt(text):
    return {"from": "gpt", "value": text}


def scored(text, score, **more):
    return {"response": text, "overall_score": score, "model": "m"} | more


HAVE, TWO = "name,prompt,chosen,rejected", {"chosen": "c", "rejected": "r"}
ASKED = user("p")
OPENAI = {
    "input": {"messages": [system("s"), ASKED], "tools": [], "parallel_tool_calls": True},
    "preferred_output": [assistant("c")],
    "non_preferred_output": [assistant("r")],
}


FOUND = {  # file -> its content, the shape that is named, (prompt, chosen, rejected)
    "pairs.csv": (
        '\ufeffprompt,chosen,rejected,score\r\n"p, ""q""\r\nz",c,r,5\r\n',
        "prompt/chosen/rejected",
        ('p, "q"\r\nz', "c", "r"),
    ),
    "semicolons.csv": ("prompt;chosen;rejected\np;c, d;r\n", "prompt/chosen/rejected", ("p", "c, d", "r")),
    "pandas.csv": (",prompt,chosen,rejected\n0,p,c,r\n1,p,d,r\n", "prompt/chosen/rejected", ("p", "c", "r")),
    "pairs.tsv": ('question\tchosen\trejected\np, q\tc\t"r\ns"\n', "question/chosen/rejected", ("p, q", "c", "r\ns")),
    "pairs.csv.gz": (gzip.compress(b"prompt,chosen,rejected\np,c,r\n"), "prompt/chosen/rejected", ("p", "c", "r")),
    "pku.csv": (
        "prompt,response_0,response_1,better_response_id,is_response_0_safe,is_response_1_safe\np,r,c,1,True,False\n",
        "prompt/response_0/response_1/better_response_id",
        ("p\n", "c", "r"),
    ),
    "messages.csv": (
        "prompt,chosen,rejected\np,{0}c{1},{0}r{1}\n".format('"[{""role"": ""assistant"", ""content"": ""', '""}]"'),
        "prompt string, messages",
        ([ASKED], [assistant("c")], [assistant("r")]),
    ),
    "pairs.parquet": (
        lambda: parquet({"prompt": "p", "system": None} | TWO),
        "prompt/chosen/rejected",
        ("p", "c", "r"),
    ),
    "messages.parquet": (
        lambda: parquet(of_messages([S, P]) | {"score_chosen": 5.0}),
        "prompt/chosen/rejected messages",
        ([S, P], [assistant("c")], [assistant("r")]),
    ),
    "sharegpt.json": (
        json.dumps([{"conversations": [human("p"), gpt("a"), human("b")], "chosen": gpt("c"), "rejected": gpt("r")}]),
        "conversations, chosen/rejected as one message each",
        ([P, A, B], [assistant("c")], [assistant("r")]),
    ),
    "sharegpt_with_system.json": (
        json.dumps(
            [{"system": "s", "conversations": [human("p")], "chosen": gpt("c"), "rejected": gpt("r")}], indent=1
        ),
        "conversations, chosen/rejected as one message each",
        ([S, P], [assistant("c")], [assistant("r")]),
    ),
    "sharegpt_texts.jsonl": (
        lines_of({"conversations": [{"from": "system", "value": "s"}, human("p")]} | TWO),
        "conversations, chosen/rejected as texts",
        ([S, P], [assistant("c")], [assistant("r")]),
    ),
    "sharegpt_whole.jsonl": (  # the conversation goes on to the chosen answer
        lines_of({"conversations": [human("p"), gpt("c")], "chosen": gpt("c"), "rejected": gpt("r")}),
        "conversations, chosen/rejected as one message each",
        ([P], [assistant("c")], [assistant("r")]),
    ),
    "messages_and_answers.jsonl": (
        lines_of({"messages": [S, P], "chosen": assistant("c"), "rejected": assistant("r")}),
        "messages, chosen/rejected as one message each",
        ([S, P], [assistant("c")], [assistant("r")]),
    ),
    "openai.jsonl": (
        lines_of(OPENAI),
        "input/preferred_output/non_preferred_output",
        ([S, P], [assistant("c")], [assistant("r")]),
    ),
    "ms_swift.jsonl": (
        lines_of({"messages": [S, P, assistant("c")], "rejected_response": "r"}),
        "messages/rejected_response",
        ([S, P], [assistant("c")], [assistant("r")]),
    ),
    "ms_swift_messages.jsonl": (
        lines_of({"messages": [P, A, B, assistant("c")], "rejected_messages": [P, A, B, assistant("r")]}),
        "messages/rejected_messages",
        ([P, A, B], [assistant("c")], [assistant("r")]),
    ),
    "orca.jsonl": (
        lines_of({"system": "s", "question": "p"} | TWO),
        "question/chosen/rejected",
        ("s\n\np", "c", "r"),
    ),
    "orca_argilla.jsonl": (
        lines_of({"system": "s", "input": "p", "generations": ["c", "r"], "rating": [9, 3], "status": "tie"} | TWO),
        "input/chosen/rejected",
        ("s\n\np", "c", "r"),
    ),
    "query.jsonl": (lines_of({"query": "p", "source": "web"} | TWO), "query/chosen/rejected", ("p", "c", "r")),
    "alpaca.json": (
        json.dumps([{"instruction": "p", "input": "q"} | TWO]),
        "instruction/chosen/rejected",
        ("p\n\nq\n\n", "c", "r"),
    ),
    "argilla.jsonl": (
        lines_of({"instruction": "p", "chosen_response": "c", "rejected_response": "r", "chosen-rating": "5"}),
        "instruction/chosen_response/rejected_response",
        ("p\n\n", "c", "r"),
    ),
    "ultrafeedback.jsonl": (
        lines_of({"instruction": "p", "completions": [scored("r", 1.5), scored("c", 9), scored("d", 9)]}),
        "instruction/completions with ratings",
        ("p\n\n", "c", "r"),
    ),
    "ultrafeedback_ratings.jsonl": (
        lines_of({"prompt": "p", "completions": ["x", "c", "r"], "ratings": [None, "5", "1"]}),
        "prompt/completions with ratings",
        ("p", "c", "r"),
    ),
    "distilabel.jsonl": (
        lines_of({"instruction": "p", "generations": ["r", "c"], "ratings": [2, 4], "rationales": ["x", "y"]}),
        "instruction/generations with ratings",
        ("p\n\n", "c", "r"),
    ),
    "data.json": (
        json.dumps({"version": "1.0", "data": [{"prompt": "p"} | TWO] * 2}, indent=2),
        "prompt/chosen/rejected",
        ("p", "c", "r"),
    ),
    "data_one_line.json": (json.dumps({"data": [{"prompt": "p"} | TWO]}), "prompt/chosen/rejected", ("p", "c", "r")),
    "lines.json": (lines_of({"prompt": "p"} | TWO, {"prompt": "p"} | TWO), "prompt/chosen/rejected", ("p", "c", "r")),
    "one_row.json": (json.dumps({"prompt": "p"} | TWO, indent=2), "prompt/chosen/rejected", ("p", "c", "r")),
}


def write_found(folder, name):
    content = FOUND[name][0]
    content = content() if callable(content) else content
    (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return folder / name
