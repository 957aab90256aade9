"""prepare_data.py: raw rows of every kind -> pairs in splits by prompt, copies, account, benchmark, mistakes."""

import fcntl
import functools
import gzip
import json
import os
import random
import shutil
import signal
import sys
from pathlib import Path

import pytest
from found_files import FOUND, write_found
from helpers import ROOT
from prepared import (
    ALL_TEST,
    ALL_TRAIN,
    DIMENSIONS,
    MEND,
    SPLITS,
    account,
    be_killed,
    counts,
    fails,
    prepare,
    read_data,
    read_jsonl,
)
from processes import fork, run_program
from runs import snapshot
from worlds import CHATML, assistant, char_tokenizer, ids, user, write_rows

from preference_data import DataError, load_pairs


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    """Every test runs in its own folder, where file names in messages are short."""
    monkeypatch.chdir(tmp_path)


def prepare_rows(rows, *words, name="rows.jsonl"):
    """{(split, dimension): rows} and the account of a run on one file of these rows."""
    write_rows(Path(name), rows)
    prepare("--input", name, *words)
    return read_data("data"), account()


def pku(number=0, better=0, safer=1, safe=(False, True), **more):
    row = {"prompt": f"q{number}?", "response_0": f"a{number}", "response_1": f"b{number}"}
    row |= {"better_response_id": better, "safer_response_id": safer}
    return row | {f"is_response_{n}_safe": flag for n, flag in enumerate(safe)} | more


def beaver(text, is_safe, prompt="q?", **more):
    return {"prompt": prompt, "response": text, "is_safe": is_safe} | more


def pair(number=0, **more):
    return {"prompt": f"q{number}", "chosen": f"a{number}", "rejected": f"b{number}"} | more


def lists(responses, **more):
    return {"prompt": "q", "responses": responses} | more


def written(prompt, chosen, rejected, dimension, labels=None, category=None):
    """A row as prepare_data.py writes it; labels (chosen, rejected) are 1 for harmful."""
    row = {"prompt": prompt, "chosen_response": chosen, "rejected_response": rejected, "dimension": dimension}
    if labels:
        row["safety_labels"] = dict(zip(("chosen", "rejected"), labels))
    return row | ({"category": category} if category else {})


# -- kinds of rows ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("better", [0, 1])
@pytest.mark.parametrize("safer", [0, 1])
@pytest.mark.parametrize("safe", [(False, True), (True, False), (True, True), (False, False)])
def test_a_pku_row_gives_a_pair_of_each_dimension_with_labels(better, safer, safe):
    responses, harm = ("a0", "b0"), [-1 if flag else 1 for flag in safe]
    data, _ = prepare_rows([pku(0, better, safer, safe)], *ALL_TRAIN)

    def expected(index, dimension):
        labels = harm[index], harm[1 - index]
        return written("q0?\n", responses[index], responses[1 - index], dimension, labels)

    assert data["train", "helpful"] == [expected(better, "helpful")]
    if safe[safer] or not safe[1 - safer]:
        assert data["train", "harmless"] == [expected(safer, "harmless")]
    else:  # the label says that the response called safer is the harmful one: no harmless pair
        assert ("train", "harmless") not in data


def test_a_harmless_pair_that_its_labels_contradict_is_dropped_and_its_row_used():
    data, said = prepare_rows([pku(0, better=0, safer=0, safe=(False, True))], *ALL_TRAIN)
    reason = "the response that is called safer is labelled harmful (1) and the other safe (-1)"
    assert said["pairs"]["dropped"] == {reason: {"count": 1, "first": "rows.jsonl:1"}}
    assert said["rows"] == {"read": 1, "used": 1, "dropped": {}}
    assert data == {("train", "helpful"): [written("q0?\n", "a0", "b0", "helpful", (1, -1))]}


def test_a_pku_row_without_safety_flags_has_no_labels():
    row = pku(0, better=1, safer=0, safe=())
    data, said = prepare_rows([row], *ALL_TRAIN)
    assert data["train", "helpful"] == [written("q0?\n", "b0", "a0", "helpful")]
    assert data["train", "harmless"] == [written("q0?\n", "a0", "b0", "harmless")]
    assert said["labels"] == {dimension: {"pairs": 0, "safe": 0, "harmful": 0} for dimension in DIMENSIONS}


@pytest.mark.parametrize("absent, dimension", [("better_response_id", "harmless"), ("safer_response_id", "helpful")])
def test_a_pku_file_of_one_dimension(absent, dimension):
    rows = [pku(n) for n in range(3)]
    for row in rows:
        del row[absent]
    data, _ = prepare_rows(rows, *ALL_TRAIN)
    assert list(data) == [("train", dimension)]
    assert len(data["train", dimension]) == 3


def test_categories_of_a_pku_row_and_the_rarest_stands_for_its_prompt():
    def harm(*names):
        return {name: name in names for name in ("Drugs", "Theft", "Violence")}

    rows = [
        pku(0, response_0_harm_category=harm("Violence"), response_1_harm_category=harm()),
        pku(1, response_0_harm_category=harm("Violence", "Theft"), response_1_harm_category=harm("Violence")),
        pku(2, response_0_harm_category=harm(), response_1_harm_category=harm()),
    ]
    data, _ = prepare_rows(rows, *ALL_TRAIN)
    for dimension in DIMENSIONS:
        found = {row["prompt"]: row.get("category") for row in data["train", dimension]}
        assert found == {"q0?\n": "Violence", "q1?\n": "Theft", "q2?\n": None}


def test_rows_with_one_response_are_paired_over_rows_and_files_safe_against_harmful():
    write_rows(Path("a.jsonl"), [beaver("bad", False, category={"Theft": True, "Drugs": False}), beaver("s1", True)])
    write_rows(Path("b.jsonl"), [beaver("s2", True, prompt=" q?\n"), beaver("s3", True)])
    prepare("--input", "a.jsonl", "b.jsonl", *ALL_TRAIN)
    data, said = read_data("data"), account()
    assert list(data) == [("train", "harmless")]
    rows = sorted(data["train", "harmless"], key=lambda row: row["chosen_response"])
    assert rows == [
        written("q?\n", "s1", "bad", "harmless", (-1, 1), "Theft"),
        written(" q?\n", "s2", "bad", "harmless", (-1, 1), "Theft"),
        written("q?\n", "s3", "bad", "harmless", (-1, 1), "Theft"),
    ]
    assert [(file["file"], file["read"], file["used"]) for file in said["files"]] == [
        ("a.jsonl", 2, 2),
        ("b.jsonl", 2, 2),
    ]
    assert said["labels"]["harmless"] == {"pairs": 3, "safe": 3, "harmful": 3}


@pytest.mark.parametrize("num_safe, num_harmful", [(1, 1), (5, 2), (2, 5), (3, 3), (7, 3)])
def test_no_response_is_used_more_than_once_above_another_of_its_side(num_safe, num_harmful):
    rows = [beaver(f"s{n}", True) for n in range(num_safe)] + [beaver(f"h{n}", False) for n in range(num_harmful)]
    data, said = prepare_rows(rows, *ALL_TRAIN)
    pairs = [(row["chosen_response"], row["rejected_response"]) for row in data["train", "harmless"]]
    assert len(set(pairs)) == len(pairs) == max(num_safe, num_harmful)
    for side, number, letter in ((0, num_safe, "s"), (1, num_harmful, "h")):
        times = [sum(pair[side] == f"{letter}{n}" for pair in pairs) for n in range(number)]
        assert sum(times) == len(pairs)
        assert max(times) - min(times) <= 1 and min(times) >= 1
    assert said["rows"] == {"read": len(rows), "used": len(rows), "dropped": {}}


def test_the_seed_draws_which_responses_are_paired():
    rows = [beaver(f"{side}{n}", side == "s") for side in "sh" for n in range(12)]
    found = []
    for seed in (1, 2):
        data, _ = prepare_rows(rows, "--seed", seed, "--overwrite", *ALL_TRAIN)
        found.append({(row["chosen_response"], row["rejected_response"]) for row in data["train", "harmless"]})
    assert len(found[0]) == 12
    assert len(found[0] & found[1]) < 6
    assert len(found[0] & {(f"s{n}", f"h{n}") for n in range(12)}) < 6  # nor does the alphabet


def test_responses_that_make_no_pair_are_counted():
    rows = [beaver("a", True, "safe?"), beaver("b", True, "safe?"), beaver("c", False, "harmful?")]
    rows += [beaver("d", True, "both?"), beaver(" d ", False, "both?"), beaver("e", True, "both?")]
    rows += [beaver("s", True), beaver("s", True), beaver("h", False), beaver(" ", False)]
    data, said = prepare_rows(rows, *ALL_TRAIN)
    assert data == {("train", "harmless"): [written("q?\n", "s", "h", "harmless", (-1, 1))]}
    dropped = {
        "all responses to the prompt are safe": {"count": 3, "first": "rows.jsonl:1"},
        "all responses to the prompt are harmful": {"count": 1, "first": "rows.jsonl:3"},
        "the response is labelled both safe and harmful": {"count": 2, "first": "rows.jsonl:4"},
        "the response is there already": {"count": 1, "first": "rows.jsonl:8"},
    }
    assert said["responses"]["dropped"] == dropped
    assert said["rows"]["dropped"].pop("a response is empty") == {"count": 1, "first": "rows.jsonl:10"}
    assert counts(said["rows"]["dropped"]) == counts(dropped)
    assert (said["rows"]["read"], said["rows"]["used"]) == (10, 2)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q?", "responses": [{"response": "s", "is_safe": True}, {"response": "h", "is_safe": False}]},
        {"prompt": "q?\n", "responses": [{"text": "s", "is_safe": 1}, {"text": "h", "is_safe": 0}]},
        {"prompt": "q?", "responses": ["s", "h"], "is_safe": [True, False]},
    ],
    ids=["response", "text", "parallel lists"],
)
def test_a_row_with_lists_of_responses(row):
    data, _ = prepare_rows([row | {"category": ["Theft"]}], *ALL_TRAIN)
    assert data == {("train", "harmless"): [written("q?\n", "s", "h", "harmless", (-1, 1), "Theft")]}


HH = "\n\nHuman: {}?\n\nAssistant:"
PAIRS = {  # a row -> how it is written, as helpful where the row does not say
    "prompt/chosen/rejected": (pair(), written("q0", "a0", "b0", "helpful")),
    "its own dimension": (
        {"prompt": "q", "chosen_response": "a", "rejected_response": "b", "dimension": "harmless"},
        written("q", "a", "b", "harmless"),
    ),
    "labels": (
        pair(safety_labels={"chosen": 1, "rejected": -1}, category="Theft", score=3),
        written("q0", "a0", "b0", "helpful", (1, -1), "Theft"),
    ),
    "no labels": (pair(safety_labels=None, category=None), written("q0", "a0", "b0", "helpful")),
    "the documents' pairs": (
        {"prompt": "q?", "response_chosen": "a", "response_rejected": "b", "labels": {"chosen": -1, "rejected": 1}},
        written("q?\n", "a", "b", "helpful", (-1, 1)),
    ),
    "HH": (
        {"chosen": HH.format("q") + " a", "rejected": HH.format("q") + " b"},
        written(HH.format("q"), " a", " b", "helpful"),
    ),
    "stack exchange": (
        {"question": "q", "response_j": "a", "response_k": "b"},
        written("Question: q\n\nAnswer: ", "a", "b", "helpful"),
    ),
    "Chinese, and separators of lines": (
        pair(prompt="如何\u2028问", chosen="答\x85案🙂"),
        written("如何\u2028问", "答\x85案🙂", "b0", "helpful"),
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_a_pair_is_written_as_it_stands(name):
    row, expected = PAIRS[name]
    data, said = prepare_rows([row], "--dimension", "helpful", *ALL_TRAIN)
    assert data == {("train", expected["dimension"]): [expected]}
    assert said["rows"] == {"read": 1, "used": 1, "dropped": {}}


def test_both_spellings_of_the_documents_flags_and_the_names_of_files_say_the_dimension():
    Path("raw/harmless-base").mkdir(parents=True)
    Path("raw/.cache").mkdir()
    write_rows(Path("raw/helpful.json"), [])
    Path("raw/helpful.json").write_text(json.dumps([pair(n) for n in range(4)]))
    with gzip.open("raw/harmless-base/train.jsonl.gz", "wt") as file:
        file.write(json.dumps(pair(9)) + "\n")
    Path("raw/notes.txt").write_text("no data")
    Path("raw/.cache/state.json").write_text("{}")
    words = "--input_dir raw --output_dir out --train_ratio 1 --val_ratio 0 --test_ratio=0 --seed 42"
    prepare(*words.split())
    data = read_data("out")
    assert {key: len(rows) for key, rows in data.items()} == {("train", "helpful"): 4, ("train", "harmless"): 1}
    assert data["train", "harmless"] == [written("q9", "a9", "b9", "harmless")]
    files = [(file["file"], file["kind"]) for file in account("out")["files"]]
    assert files == [
        ("raw/harmless-base/train.jsonl.gz", "prompt/chosen/rejected as harmless"),
        ("raw/helpful.json", "prompt/chosen/rejected as helpful"),
    ]


def test_the_command_line_wins_over_the_name_of_a_file_and_a_row_over_both():
    rows = [pair(0), pair(1, dimension="helpful")]
    data, _ = prepare_rows(rows, "--dimension", "harmless", *ALL_TRAIN, name="helpful.jsonl")
    assert data["train", "harmless"] == [written("q0", "a0", "b0", "harmless")]
    assert data["train", "helpful"] == [written("q1", "a1", "b1", "helpful")]


def test_a_file_that_is_named_twice_is_read_once():
    write_rows(Path("rows.jsonl"), [pku(n) for n in range(5)])
    prepare("--input", "rows.jsonl", "./rows.jsonl", *ALL_TRAIN)
    assert account()["rows"] == {"read": 5, "used": 5, "dropped": {}}


KINDS = {  # a row of each kind, and the prompt that is written of it
    "PKU": (pku(0), "q0?\n"),
    "answers": (lists([{"response": "a", "is_safe": True}, {"response": "b", "is_safe": False}]), "q\n"),
    "documents": ({"prompt": "q", "response_chosen": "a", "response_rejected": "b", "dimension": "helpful"}, "q\n"),
    "pair": (pair(0, dimension="helpful"), "q0"),
    "instruction": ({"instruction": "q", "chosen": "a", "rejected": "b", "dimension": "helpful"}, "q\n\n"),
}


@pytest.mark.parametrize("name", KINDS)
def test_what_else_a_row_asks_is_part_of_its_prompt(name):
    row, prompt = KINDS[name]
    data, _ = prepare_rows([row | {"system": "Be brief.", "history": [["x?", "y."]]}], *ALL_TRAIN)
    assert {row["prompt"] for rows in data.values() for row in rows} == {f"Be brief.\n\nx?\n\ny.\n\n{prompt}"}


@pytest.mark.parametrize("name", KINDS)
def test_a_column_that_looks_like_a_prompt_is_not_dropped(name, capsys):
    row, _ = KINDS[name]
    write_rows(Path("rows.jsonl"), [row, row | {"query": "Why?"}])
    assert fails(capsys, "--input", "rows.jsonl").startswith(
        "rows.jsonl:2: `query` is not read where a file's first row"
    )
    write_rows(Path("rows.jsonl"), [row, row | {"tools": [{"name": "f"}]}])
    assert fails(capsys, "--input", "rows.jsonl").startswith(
        "rows.jsonl:2: `tools` can only go to a chat template, and"
    )


@pytest.mark.parametrize("name", KINDS)
def test_other_columns_of_text_are_in_the_account(name, capsys):
    row, _ = KINDS[name]
    _, said = prepare_rows([row | {"rationale": "x", "source": "web"}, row], *ALL_TRAIN)
    assert said["files"][0]["columns_not_read"] == {"rationale": 1}
    assert "  the column rationale is not read, in 1 rows" in capsys.readouterr().out.splitlines()


def test_a_pair_whose_prompt_is_another_column_is_written_with_it():
    rows = [{"input": f"What is {n}?", "chosen": "a", "rejected": "b", "dimension": "helpful"} for n in range(3)]
    data, _ = prepare_rows(rows, *ALL_TRAIN)
    assert sorted(row["prompt"] for row in data["train", "helpful"]) == ["What is 0?", "What is 1?", "What is 2?"]


@pytest.mark.parametrize("name", FOUND)
def test_files_that_people_have_are_prepared_as_training_reads_them(name):
    path, (_, _, (prompt, chosen, rejected)) = write_found(Path(), name), FOUND[name]
    prepare("--input", path, "--dimension", "helpful", *ALL_TRAIN)
    row = read_data("data")["train", "helpful"][-1 if name == "pandas.csv" else 0]
    names = ("chosen_response", "rejected_response") if isinstance(prompt, str) else ("chosen", "rejected")
    if name != "pandas.csv":  # two rows to one prompt
        assert (row["prompt"], *(row[side] for side in names)) == (prompt, chosen, rejected)
    tokenizer = char_tokenizer(template=CHATML)
    raw, prepared = (load_pairs(str(file), tokenizer, 512, 256)[0] for file in (path, "data/train/helpful_pairs.jsonl"))
    assert {str(pair[:3]) for pair in prepared} == {str(pair[:3]) for pair in raw}


# -- messages ---------------------------------------------------------------------------------------------------------


def chat(number=0, **more):
    turns = {"prompt": [user(f"q{number}")], "chosen": [assistant(f"a{number}")], "rejected": [assistant(f"b{number}")]}
    return turns | {"dimension": "harmless"} | more


def test_messages_stay_messages_with_their_labels_and_in_the_benchmark():
    labels = {"safety_labels": {"chosen": -1, "rejected": 1}, "category": "theft"}
    data, _ = prepare_rows([chat(1) | labels], *ALL_TEST, "--safety-benchmark", "b.jsonl")
    assert data == {("test", "harmless"): [chat(1) | labels]}
    assert read_jsonl(Path("b.jsonl")) == [{"prompt": [user("q1")], "category": "theft"}]


def test_the_same_messages_are_one_prompt_whatever_their_ids_keys_and_white_space():
    rows = []
    for n in range(30):
        said = {"content": f"q{n} ", "role": "user", "id": n}
        rows += [chat(n), chat(n, prompt=[said], chosen=[assistant("other")]), chat(n, dimension="helpful")]
    data, made = prepare_rows([*rows, chat(0, chosen=[assistant("a0") | {"id": 5}])])
    prompts = {split: set() for split in SPLITS}
    for (split, _), written_rows in data.items():
        prompts[split] |= {row["prompt"][0]["content"].strip() for row in written_rows}
    assert sum(map(len, prompts.values())) == len(set.union(*prompts.values())) == 30
    assert len(prompts["test"]) > 0
    assert counts(made["pairs"]["dropped"]) == {"the same pair is there already": 1}


def test_messages_and_strings_are_not_prepared_into_one_file(capsys):
    write_rows(Path("chat.jsonl"), [chat()])
    write_rows(Path("rows.jsonl"), [pair(0, dimension="harmless")])
    assert fails(capsys, "--input", "chat.jsonl", "rows.jsonl") == (
        "chat.jsonl:1 holds messages and rows.jsonl:1 strings: prepare them one by one"
    )
    write_rows(Path("chat.jsonl"), [chat(tools=[{"name": "f"}])])
    assert fails(capsys, "--input", "chat.jsonl").startswith(
        "chat.jsonl:1: `tools` is not written to the pairs: train on the file as it is"
    )


def test_all_kinds_of_files_of_a_folder_are_read():
    Path("raw").mkdir()
    write_rows(Path("raw/a.jsonl"), [pair(0)])
    Path("raw/b.csv").write_text("prompt,chosen,rejected\nq1,a,b\n")
    Path("raw/c.tsv").write_text("prompt\tchosen\trejected\nq2\ta\tb\n")
    Path("raw/d.txt").write_text("no rows")
    prepare("--input-dir", "raw", "--dimension", "helpful", *ALL_TRAIN)
    assert {row["prompt"] for row in read_data("data")["train", "helpful"]} == {"q0", "q1", "q2"}


def test_answers_with_labels_of_harm_in_a_table_are_paired():
    Path("rows.csv").write_text("prompt,response,is_safe\nq?,a,True\nq?,b,False\n")
    prepare("--input", "rows.csv", *ALL_TRAIN)
    assert read_data("data")["train", "harmless"] == [written("q?\n", "a", "b", "harmless", (-1, 1))]


# -- splits -----------------------------------------------------------------------------------------------------------


def prompts_by_split(data):
    found = {split: set() for split in SPLITS}
    for (split, _), rows in data.items():
        found[split] |= {row["prompt"].strip() for row in rows}
    return found


def test_no_prompt_is_in_two_splits_over_both_dimensions_and_all_files():
    draw = random.Random(0)
    rows = [pku(draw.randrange(600), draw.randrange(2), safe=(True, True)) for _ in range(2000)]
    for n, row in enumerate(rows):
        row |= {"prompt": draw.choice(["", " ", "\n"]) + row["prompt"], "response_0": f"c{n}"}
    write_rows(Path("pku.jsonl"), rows)
    write_rows(Path("harmless.jsonl"), [pair(n) | {"prompt": f"q{n}? "} for n in range(600)])
    prepare("--input", "pku.jsonl", "harmless.jsonl")
    data, said = read_data("data"), account()
    found = prompts_by_split(data)
    assert len(data) == 6
    assert not found["train"] & found["val"] and not found["train"] & found["test"] and not found["val"] & found["test"]
    assert {split: len(prompts) for split, prompts in found.items()} == said["prompts"]
    assert sum(said["prompts"].values()) == 600
    assert said["pairs"]["kept"] == 4600
    for (split, dimension), rows in data.items():
        assert len(rows) == said["splits"][dimension][split]


@pytest.mark.parametrize("ratios", [(0.8, 0.1, 0.1), (0.7, 0.2, 0.1), (0.5, 0, 0.5), (0, 1, 0)])
def test_the_shares_of_prompts(ratios):
    words = [word for split, ratio in zip(SPLITS, ratios) for word in (f"--{split}-ratio", ratio)]
    data, said = prepare_rows([pair(n) for n in range(4000)], "--dimension", "helpful", *words)
    for split, ratio in zip(SPLITS, ratios):
        deviation = (4000 * ratio * (1 - ratio)) ** 0.5
        assert abs(said["prompts"][split] - 4000 * ratio) <= 3 * deviation
        assert ((split, "helpful") in data) == (ratio > 0)
    assert sum(said["prompts"].values()) == 4000


def some_rows():
    """Rows of two kinds with copies, contradictions, categories."""
    draw = random.Random(1)
    blanks = ["", "", " ", "\n"]  # the order of copies that differ in these alone must not decide which one stays
    duals = [
        pku(draw.randrange(200), draw.randrange(2), 1, response_0_harm_category={draw.choice("ABC"): True})
        for _ in range(150)
    ]
    singles = [
        beaver(
            draw.choice(blanks) + f"r{draw.randrange(30)}", draw.random() < 0.5, draw.choice(blanks) + f"q{n % 150}?"
        )
        for n in range(900)
    ]
    for row in duals:
        row["prompt"] = draw.choice(blanks) + row["prompt"]
    return duals, singles


def files_of(rows, seed, order, folder):
    duals, singles = rows
    for name, group in (("a.jsonl", duals), ("b.jsonl", singles)):
        write_rows(Path(name), random.Random(order).sample(group, len(group)) if order else group)
    sources = ["b.jsonl", "a.jsonl"] if order else ["a.jsonl", "b.jsonl"]
    words = "--safety-benchmark", f"{folder}/benchmark.jsonl", "--seed", seed
    prepare("--input", *sources, "--output-dir", folder, *words)
    return {name: sha for name, sha in snapshot(folder).items() if name != "account.json"}


def test_the_order_of_rows_and_files_changes_no_byte_and_the_seed_does():
    rows = some_rows()
    first = files_of(rows, 42, 0, "first")
    assert len(first) == 7
    assert files_of(rows, 42, 0, "again") == first
    assert files_of(rows, 42, 7, "other") == first
    said, other = account("first"), account("other")
    assert counts(said["rows"]["dropped"]) == counts(other["rows"]["dropped"])
    assert said["pairs"]["dropped"].keys() == other["pairs"]["dropped"].keys() and said["prompts"] == other["prompts"]
    assert files_of(rows, 43, 0, "seed").keys() == first.keys()
    assert prompts_by_split(read_data("seed"))["test"] != prompts_by_split(read_data("first"))["test"]


def test_more_rows_move_no_prompt():
    few, _ = prepare_rows([pair(n) for n in range(200)], "--dimension", "helpful")
    more, _ = prepare_rows([pair(n) for n in range(900)], "--dimension", "helpful", "--overwrite")
    for split in SPLITS:
        assert prompts_by_split(few)[split] < prompts_by_split(more)[split]


# -- copies and the account --------------------------------------------------------------------------------------------


def test_1545_copies_among_5000_rows_go_and_are_counted():
    rows = [pku(n) for n in range(3455)]
    rows += random.Random(0).choices(rows, k=1545)
    random.Random(1).shuffle(rows)
    data, said = prepare_rows(rows)
    assert said["rows"]["read"] == 5000 and said["rows"]["used"] == 3455
    assert counts(said["rows"]["dropped"]) == {"the same pair is there already": 1545}
    assert counts(said["pairs"]["dropped"]) == {"the same pair is there already": 2 * 1545}
    for dimension in DIMENSIONS:
        texts = [json.dumps(row) for (_, d), rows in data.items() if d == dimension for row in rows]
        assert len(texts) == len(set(texts)) == 3455


def test_of_copies_the_one_with_labels_stays_wherever_it_is():
    labels = {"chosen": -1, "rejected": 1}
    rows = [pair(), pair(safety_labels=labels), pair() | {"prompt": " q0 ", "chosen": "a0\n"}]
    data, said = prepare_rows(rows, "--dimension", "harmless", *ALL_TRAIN)
    assert data["train", "harmless"] == [written("q0", "a0", "b0", "harmless", (-1, 1))]
    assert said["rows"]["dropped"] == {"the same pair is there already": {"count": 2, "first": "rows.jsonl:1"}}


def test_copies_that_contradict_each_other_all_go():
    rows = [pair(0), pair(1), {"prompt": "q0", "chosen": "b0", "rejected": "a0"}, pair(0)]
    rows += [pair(2, safety_labels={"chosen": 1, "rejected": 1}), pair(2, safety_labels={"chosen": -1, "rejected": -1})]
    rows += [pair(3, dimension="harmless")]  # the same texts in the other dimension are another pair
    rows += [{"prompt": "q3", "chosen": "b3", "rejected": "a3"}]
    data, said = prepare_rows(rows, "--dimension", "helpful", *ALL_TRAIN)
    assert sorted(row["prompt"] for row in data["train", "helpful"]) == ["q1", "q3"]
    assert data["train", "harmless"] == [written("q3", "a3", "b3", "harmless")]
    dropped = {
        "the same two responses are there the other way round": {"count": 3, "first": "rows.jsonl:1"},
        "the same pair is there with other labels": {"count": 2, "first": "rows.jsonl:5"},
    }
    by_count = {reason: entry["count"] for reason, entry in dropped.items()}
    assert counts(said["rows"]["dropped"]) == counts(said["pairs"]["dropped"]) == by_count
    assert said["rows"]["dropped"] == dropped


MESSY = [
    "not JSON",
    "[1]",
    *(pku(n, better=n % 2) for n in range(40)),
    pku(3, better=1),  # a copy of q3's pairs
    pku(4, better=1),  # the other way round for helpful, a copy for harmless
    pku(50, better=2),
    pku(51, safe=(True, None)),
    pku(52) | {"response_1": 7},
    pku(53) | {"response_1": " "},
    pku(54) | {"response_1": "a54"},
    pku(55) | {"prompt": "\n"},
    pku(56, safer=0),  # its harmless pair contradicts its labels
    '{"prompt": "q", "response_0": "\\ud83d", "response_1": "b", "better_response_id": 0, "safer_response_id": 0}',
]


def messy_run():
    write_rows(Path("pku.jsonl"), ["", *MESSY, "  "])
    write_rows(Path("beaver.jsonl"), [*some_rows()[1], beaver(None, True), beaver("x", "yes"), beaver("", True)])
    write_rows(Path("harmless.jsonl"), [pair(n % 30, safety_labels={"chosen": -1, "rejected": 1}) for n in range(40)])
    write_rows(Path("helpful.jsonl"), [pair(n) for n in range(5)] + [pair(6, dimension="both"), {"prompt": "p"}])
    prepare("--input", "pku.jsonl", "beaver.jsonl", "harmless.jsonl", "helpful.jsonl", "--skip-invalid")
    return account(), read_data("data")


def test_every_row_of_messy_files_is_used_or_dropped_for_a_reason(capsys):
    said, data = messy_run()
    rows, pairs = said["rows"], said["pairs"]
    assert [file["read"] for file in said["files"]] == [len(MESSY), 903, 40, 7]
    assert rows["read"] == len(MESSY) + 950 == rows["used"] + sum(counts(rows["dropped"]).values())
    for file in said["files"]:
        assert file["read"] == file["used"] + sum(counts(file["dropped"]).values())
    assert rows["used"] == sum(file["used"] for file in said["files"])
    for reason, number in counts(rows["dropped"]).items():
        assert number == sum(counts(file["dropped"]).get(reason, 0) for file in said["files"])
    assert pairs["made"] == pairs["kept"] + sum(counts(pairs["dropped"]).values())
    assert pairs["kept"] == sum(map(len, data.values())) == sum(n for d in said["splits"].values() for n in d.values())
    first = said["files"][0]
    assert first["kind"] == "PKU-SafeRLHF with better_response_id and safer_response_id"
    assert first["used"] == 41
    assert counts(first["dropped"]) == {
        "the row is malformed": 6,
        "the same pair is there already": 1,
        "the same two responses are there the other way round": 1,
        "the rejected response is empty": 1,
        "the two responses are equal": 1,
        "the prompt is empty": 1,
    }
    assert counts(said["files"][3]["dropped"])["the row is malformed"] == 2
    lines = capsys.readouterr().out.splitlines()
    assert f"rows: {rows['read']:,} read, {rows['used']} used, {rows['read'] - rows['used']} dropped" in lines
    assert lines[-1] == "saved to data"
    malformed = next(line for line in lines if "because the row is malformed" in line)
    assert malformed.endswith("the first is pku.jsonl:2: not JSON (Expecting value: line 1 column 1 (char 0))")


def test_the_account_says_what_it_did(capsys):
    rows = [pku(n, safe=(n % 3 == 0, True)) for n in range(30)] + [pku(0)]
    prepare_rows(rows, "--seed", 3, "--safety-benchmark", "b.jsonl", name="pku.jsonl")
    said = account()
    assert (said["seed"], said["ratios"]) == (3, {"train": 0.8, "val": 0.1, "test": 0.1})
    assert said["labels"] == {dimension: {"pairs": 29, "safe": 38, "harmful": 20} for dimension in DIMENSIONS}
    numbers = said["prompts"].values()
    harmful = len(read_jsonl(Path("b.jsonl")))
    shares = "".join(f"{f'{n} ({n / 29:.1%})':>16}" for n in numbers)
    known = "29 with labels: 38 responses safe, 20 harmful"
    assert capsys.readouterr().out.splitlines() == [
        "pku.jsonl: PKU-SafeRLHF with better_response_id and safer_response_id, 31 rows, 29 used",
        "rows: 31 read, 29 used, 2 dropped",
        "  2 because the same pair is there with other labels; the first is pku.jsonl:1",
        "pairs: 62 made, 58 kept, 4 dropped",
        "  4 because the same pair is there with other labels; the first is pku.jsonl:1",
        " " * 10 + "".join(f"{split:>16}" for split in SPLITS),
        f"{'prompts':10}{shares}",
        *(f"{d:10}{''.join(f'{n:16}' for n in numbers)}   {known}" for d in DIMENSIONS),
        f"b.jsonl: {harmful} harmful prompts, not balanced, as no row names a category",
        "saved to data",
    ]


# -- the benchmark ----------------------------------------------------------------------------------------------------


def harm_rows():
    """90 harmful prompts of Drugs, 30 of Theft, 6 of both, and 40 safe ones."""
    kinds = ["Drugs"] * 90 + ["Theft"] * 30 + ["Drugs,Theft"] * 6 + [""] * 40
    return [
        pku(n, safe=(not kind, True), response_0_harm_category={name: True for name in kind.split(",") if name})
        for n, kind in enumerate(kinds)
    ]


def benchmark_of(rows, *words, name="rows.jsonl"):
    data, said = prepare_rows(rows, "--safety-benchmark", "data/benchmarks/b.jsonl", *words, name=name)
    return read_jsonl(Path("data/benchmarks/b.jsonl")), prompts_by_split(data), said


def test_the_benchmark_has_the_harmful_prompts_of_the_test_split_and_no_other():
    prompts, splits, said = benchmark_of(harm_rows(), "--test-ratio", 0.5, "--train-ratio", 0.4, "--max-prompts", 0)
    asked = [row["prompt"].strip() for row in prompts]
    harmful = {f"q{n}?" for n in range(126)}
    assert len(asked) == len(set(asked)) > 40
    assert set(asked) == splits["test"] & harmful
    for row in prompts:
        number = int(row["prompt"].strip()[1:-1])
        assert row["prompt"].endswith("?\n")  # as in the pairs
        assert row["category"] == ("Drugs" if number < 90 else "Theft")  # of two, the rarer
        assert row.get("all_categories") == (["Drugs", "Theft"] if number >= 120 else None)
    kinds = said["benchmark"]["categories"]
    assert kinds == {name: sum(row["category"] == name for row in prompts) for name in ("Drugs", "Theft")}
    assert said["benchmark"] == {"file": "data/benchmarks/b.jsonl", "prompts": len(prompts), "categories": kinds}


@pytest.mark.parametrize("number", [2, 11, 20])
def test_the_benchmark_is_balanced_by_category(number):
    prompts, _, said = benchmark_of(harm_rows(), *ALL_TEST, "--max-prompts", number)
    kinds = said["benchmark"]["categories"]
    assert sum(kinds.values()) == len(prompts) == number
    assert abs(kinds["Drugs"] - kinds["Theft"]) <= 1


def test_the_benchmark_is_a_sample_that_the_seed_draws():
    found = [benchmark_of(harm_rows(), *ALL_TEST, "--max-prompts", 30, "--seed", n, "--overwrite")[0] for n in (1, 2)]
    first, second = ({row["prompt"] for row in prompts} for prompts in found)
    assert len(first & second) < 25
    alphabet = sorted(f"q{n}?\n" for n in range(90))[:15]
    assert len(first & set(alphabet)) < 10


def test_a_prompt_whose_responses_are_all_safe_is_not_in_the_benchmark():
    write_rows(Path("pku.jsonl"), [pku(n, safe=(n > 4, True)) for n in range(9)])
    write_rows(Path("beaver.jsonl"), [beaver(f"r{n}", n > 4, f"q{n}?") for n in range(9)])  # no pairs of their own
    prepare("--input", "pku.jsonl", "beaver.jsonl", "--safety-benchmark", "b.jsonl", *ALL_TEST)
    assert {row["prompt"] for row in read_jsonl(Path("b.jsonl"))} == {f"q{n}?\n" for n in range(5)}


def test_where_a_category_ends_the_others_fill_the_benchmark(capsys):
    _, _, said = benchmark_of(harm_rows(), *ALL_TEST, "--max-prompts", 100)
    assert said["benchmark"]["categories"] == {"Drugs": 64, "Theft": 36}
    assert "b.jsonl: 100 harmful prompts, 2 categories with 36 to 64 each" in capsys.readouterr().out


def test_without_labels_and_categories_the_prompts_of_harmless_pairs_are_the_benchmark():
    rows = [pair(n, dimension="helpful" if n < 30 else "harmless") for n in range(60)]
    prompts, _, said = benchmark_of(rows, *ALL_TEST)
    assert {row["prompt"] for row in prompts} == {f"q{n}" for n in range(30, 60)}
    assert {row["category"] for row in prompts} == {"unknown"}
    assert said["benchmark"]["categories"] == {"unknown": 30}


# -- files ------------------------------------------------------------------------------------------------------------


def test_prepared_data_is_not_replaced_without_overwrite(capsys):
    prepare_rows([pku(n) for n in range(50)])
    write_rows(Path("rows.jsonl"), [pku(n) for n in range(60)])
    message = fails(capsys, "--input", "rows.jsonl")
    assert message == "data/train/helpful_pairs.jsonl is there already: choose another place, or pass --overwrite"


def test_overwrite_replaces_its_own_files_and_no_other():
    prepare_rows([pku(n) for n in range(50)])
    for stranger in ("data/notes.txt", "data/train/other.jsonl", "data/raw/helpful_pairs.jsonl"):
        Path(stranger).parent.mkdir(exist_ok=True)
        Path(stranger).write_text("mine")
    data, _ = prepare_rows([pair(n) for n in range(9)], "--dimension", "helpful", "--overwrite", *ALL_TRAIN)
    assert set(data) == {("train", "helpful")}  # nothing of the earlier split stays
    assert set(snapshot("data")) == {
        *("train/helpful_pairs.jsonl", "account.json"),
        *("notes.txt", "train/other.jsonl", "raw/helpful_pairs.jsonl"),
    }
    assert Path("data/train/other.jsonl").read_text() == "mine"


@pytest.mark.parametrize("name", ["data/train/helpful_pairs.jsonl", "data/account.json"])
def test_overwrite_never_replaces_what_it_has_not_written(capsys, name):
    Path(name).parent.mkdir(parents=True)
    Path(name).write_text('{"bank": 1}')
    write_rows(Path("rows.jsonl"), [pku(n) for n in range(60)])
    for words in ([], ["--overwrite"]):
        assert name in fails(capsys, "--input", "rows.jsonl", *words)
    assert Path(name).read_text() == '{"bank": 1}'
    Path(name).unlink()
    prepare("--input", "rows.jsonl")
    rows = Path("data/train/helpful_pairs.jsonl")
    rows.write_text(rows.read_text() + "\n")
    before = snapshot("data")
    said = "data/train/helpful_pairs.jsonl is not as account.json says it was written: move it away"
    assert fails(capsys, "--input", "rows.jsonl", "--overwrite").startswith(said)
    assert snapshot("data") == before


def test_a_write_that_fails_leaves_everything_as_it_was(monkeypatch, capsys):
    prepare_rows([pku(n) for n in range(50)])
    write_rows(Path("rows.jsonl"), [pku(n) for n in range(60)])
    write_text, calls = Path.write_text, []

    def full(path, *args, **options):
        calls.append(path)
        if len(calls) == 4:
            raise OSError(28, "No space left on device")
        return write_text(path, *args, **options)

    monkeypatch.setattr(Path, "write_text", full)
    said = "No space left on device: make room there, or choose another place"
    assert fails(capsys, "--input", "rows.jsonl", "--overwrite") == said
    calls.clear()
    assert fails(capsys, "--input", "rows.jsonl", "--output-dir", "new") == said
    assert sorted(path.name for path in Path().iterdir()) == ["data", "rows.jsonl"]  # no new folder, no draft


@pytest.mark.parametrize("number", range(1, 12))
def test_killed_while_files_are_put_in_place_the_next_start_finishes_and_readers_are_told(number, capsys):
    """number: of the rename before which it is killed; the first makes the drafts count."""
    write_rows(Path("rows.jsonl"), [pku(n) for n in range(50)])
    prepare("--input", "rows.jsonl", "--output-dir", "old")
    shutil.copytree("old", "data")
    write_rows(Path("new.jsonl"), [pku(n) for n in range(60)])
    words = ["--input", "new.jsonl", "--overwrite"]
    prepare(*words, "--output-dir", "old")
    code = fork(functools.partial(be_killed, number, words))
    assert code == (-signal.SIGKILL if number < 9 else 0)
    if 1 < number < 9:
        said = "data/train/helpful_pairs.jsonl was being replaced when prepare_data.py was killed: run that again"
        with pytest.raises(DataError, match=said):
            load_pairs("data/train/helpful_pairs.jsonl", char_tokenizer(), 512, 256)
    prepare(*words)
    assert snapshot("data") == snapshot("old")


def test_a_fresh_run_that_was_killed_is_run_again_with_the_same_command(capsys):
    write_rows(Path("rows.jsonl"), [pku(n) for n in range(60)])
    assert fork(functools.partial(be_killed, 4, ["--input", "rows.jsonl"])) == -signal.SIGKILL
    prepare("--input", "rows.jsonl")
    prepare("--input", "rows.jsonl", "--output-dir", "other")
    assert snapshot("data") == snapshot("other")
    assert "helpful_pairs.jsonl is there already" in fails(capsys, "--input", "rows.jsonl")


def test_a_second_run_in_the_folder_is_refused(capsys):
    prepare_rows([pku(n) for n in range(50)])
    before = snapshot("data")
    with open("data/.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        said = fails(capsys, "--input", "rows.jsonl", "--overwrite")
    assert said.startswith("--output-dir data is being written by another run")
    Path("data/.lock").unlink()
    assert snapshot("data") == before


def test_the_account_is_put_in_place_last(monkeypatch):
    moved, replace = [], Path.replace
    monkeypatch.setattr(Path, "replace", lambda draft, path: (moved.append(str(path)), replace(draft, path)))
    prepare_rows([pku(n) for n in range(50)], "--safety-benchmark", "data/b.jsonl")
    assert moved.pop(0) == "data/.prepare_data/journal.json" and len(moved) == 8
    assert moved[-1] == "data/account.json"


def test_the_benchmark_of_an_earlier_split_does_not_stay_behind(capsys):
    prepare_rows([pku(n) for n in range(50)], "--safety-benchmark", "b.jsonl")
    message = fails(capsys, "--input", "rows.jsonl", "--overwrite", "--seed", 1)
    said = "b.jsonl asks prompts of the test split to be replaced: pass --safety-benchmark too, or remove it"
    assert message == said
    assert fails(capsys, "--input", "rows.jsonl", "--overwrite", "--safety-benchmark", "c.jsonl") == said
    prepare("--input", "rows.jsonl", "--overwrite", "--seed", 1, "--safety-benchmark", "b.jsonl")
    asked = {row["prompt"].strip() for row in read_jsonl(Path("b.jsonl"))}
    assert asked == prompts_by_split(read_data("data"))["test"]
    Path("b.jsonl").unlink()
    prepare("--input", "rows.jsonl", "--overwrite")


def test_in_a_process_of_its_own_and_read_by_the_training_scripts_reader(tmp_path):
    rows = [pku(n, better=n % 2, safe=(False, n % 3 > 0)) for n in range(40)]
    write_rows(tmp_path / "pku.jsonl", rows)
    done = run_program([sys.executable, ROOT / "prepare_data.py", "--input", "pku.jsonl"], cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("saved to data\n")
    found = 0
    for dimension in DIMENSIONS:
        pairs, report = load_pairs(f"data/train/{dimension}_pairs.jsonl", char_tokenizer(), 512, 256)
        assert "prompt/chosen_response/rejected_response" in report[0]
        for pair in pairs:
            number = int(bytes(pair.prompt_ids).decode().strip()[1:-1])
            chosen = number % 2 if dimension == "helpful" else 1
            harm = (1, -1 if number % 3 else 1)
            assert pair[:3] == (
                ids(f"q{number}?\n"),
                [*ids("ab"[chosen] + str(number)), 1],
                [*ids("ba"[chosen] + str(number)), 1],
            )
            assert pair.labels == (harm[chosen], harm[1 - chosen])
            found += 1
    assert found == sum(account()["splits"][dimension]["train"] for dimension in DIMENSIONS) > 50


# -- mistakes ---------------------------------------------------------------------------------------------------------

GOOD = {"pku": pku(), "beaver": beaver("a", True), "pair": pair(dimension="helpful")}
BAD = {  # a first row of the same kind, a malformed row, what is said
    "not JSON": ("pku", "{", "not JSON (Expecting property name enclosed in double quotes: line 2 column 1 (char 2))"),
    "better_response_id 2": ("pku", pku(1, better=2), "`better_response_id` is neither 0 nor 1"),
    "better_response_id true": ("pku", pku(1, better=True), "`better_response_id` is neither 0 nor 1"),
    "safer_response_id -1": ("pku", pku(1, safer=-1), "`safer_response_id` is neither 0 nor 1"),
    "safer_response_id null": ("pku", pku(1, safer=None), "`safer_response_id` is neither 0 nor 1"),
    "one flag": (
        "pku",
        pku(1, safe=(True, None)),
        "`is_response_1_safe` is missing and the other is there: give both or none",
    ),
    "a flag that is a word": ("pku", pku(1, safe=("no", True)), "`is_response_0_safe` is neither true nor false"),
    "a category that is a number": (
        "pku",
        pku(1, response_0_harm_category=3),
        "the category is neither a name, nor a list of names, nor {name: true or false}",
    ),
    "no response_1": ("pku", {k: v for k, v in pku(1).items() if k != "response_1"}, "`response_1` is missing"),
    "no safer_response_id": (
        "pku",
        {k: v for k, v in pku(1).items() if k != "safer_response_id"},
        "`safer_response_id` is missing",
    ),
    "a response that is a number": ("beaver", beaver(5, True), "`response` is not a str"),
    "no is_safe": ("beaver", {"prompt": "q", "response": "a"}, "`is_safe` is missing"),
    "is_safe null": ("beaver", beaver("a", None), "`is_safe` is neither true nor false"),
    "label 0": (
        "pair",
        pair(1, dimension="helpful", safety_labels={"chosen": 0, "rejected": 1}),
        "the safety label of chosen is 0: +1 is harmful, -1 is safe",
    ),
    "label true": (
        "pair",
        pair(1, dimension="helpful", safety_labels={"chosen": -1, "rejected": True}),
        "the safety label of rejected is True: +1 is harmful, -1 is safe",
    ),
    "one label": (
        "pair",
        pair(1, dimension="helpful", safety_labels={"chosen": 1}),
        '`safety_labels` is not {"chosen": ±1, "rejected": ±1}',
    ),
    "dimension safe": ("pair", pair(1, dimension="safe"), "`dimension` is 'safe', neither helpful nor harmless"),
    "no dimension": (
        "pair",
        pair(1),
        "`dimension` is missing, and there is no --dimension",
    ),
    "no chosen": ("pair", {"prompt": "p", "rejected": "r", "dimension": "helpful"}, "`chosen` is missing"),
    "no UTF-8": ("pair", '{"prompt": "caf\udce9"}', "byte 16 of the line is no UTF-8"),
    "nested too deeply": ("pair", '{"prompt": ' + "[" * 10**5, "not JSON (nested too deeply)"),
    "a key twice": ("pair", '{"prompt": "a", "prompt": "b"}', "not JSON (`prompt` stands twice)"),
    "half a surrogate pair": (
        "pair",
        json.dumps(pair(1, dimension="helpful", chosen="\ud83d")),
        "'utf-8' codec can't encode character '\\ud83d' in position 28: surrogates not allowed",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_malformed_row_stops_with_its_place_and_is_counted_with_skip_invalid(name, capsys):
    kind, bad, what = BAD[name]
    second = beaver("b", False) if kind == "beaver" else GOOD[kind]
    write_rows(Path("rows.jsonl"), [GOOD[kind], bad, second])
    assert fails(capsys, "--input", "rows.jsonl") == f"rows.jsonl:2: {what}{MEND}"
    prepare("--input", "rows.jsonl", "--skip-invalid", *ALL_TRAIN)
    rows = account()["rows"]
    assert rows["dropped"]["the row is malformed"] == {"count": 1, "first": f"rows.jsonl:2: {what}"}
    assert rows["read"] == 3


@pytest.mark.parametrize(
    "row, what",
    [
        (lists("a"), "`responses` is not a list with something in it"),
        (lists([]), "`responses` is not a list with something in it"),
        (lists(["a", "b"], is_safe=[True]), "`is_safe` has 1 entries and `responses` has 2"),
        (lists(["a"]), "`responses` holds no {response, is_safe} objects, and `is_safe` is no list"),
        (lists([{"response": "a"}]), "`is_safe` is missing"),
        (lists([{"is_safe": True}]), "`response` is missing"),
    ],
)
def test_a_malformed_list_of_responses(row, what, capsys):
    write_rows(Path("rows.jsonl"), [row])
    assert fails(capsys, "--input", "rows.jsonl") == f"rows.jsonl:1: {what}{MEND}"


@pytest.mark.parametrize(
    "row, fields, shapes",
    [
        (
            {"text": "x", "is_safe": True},
            "text, is_safe (true or false)",
            '{"prompt": "…", "response": "…", "is_safe": true} or {"prompt": "…", "chosen": "…", "rejected": "…"}',
        ),
        (
            {"prompt": "q", "response_chosen": "a"},
            "prompt, response_chosen",
            '{"prompt": "…", "response_chosen": "…", "response_rejected": "…"} or '
            '{"prompt": "…", "chosen_response": "…", "rejected_response": "…"}',
        ),
    ],
)
def test_the_message_about_a_row_of_no_known_kind_shows_the_nearest(row, fields, shapes, capsys):
    write_rows(Path("rows.jsonl"), [row])
    assert fails(capsys, "--input", "rows.jsonl") == (
        f"rows.jsonl:1 has the fields {fields}, which is no known shape; the nearest are {shapes}: rename or "
        "rewrite them (docs/data.md)"
    )


def test_rows_of_one_response_are_refused_with_the_reason(capsys):
    write_rows(Path("rows.jsonl"), [{"prompt": "p", "completion": "c", "label": True}])
    assert "which is one response that is good or bad (KTO)" in fails(capsys, "--input", "rows.jsonl")


def test_pairs_of_an_unknown_dimension_are_refused(capsys):
    said = "{} does not say its dimension: pass --dimension helpful or --dimension harmless"
    for name in ("rows.jsonl", "helpful_or_harmless.jsonl", "unhelpful.jsonl"):
        write_rows(Path(name), [pair()])
        assert fails(capsys, "--input", name) == said.format(f"{name}:1")


def test_no_usable_pair_is_an_error_that_says_why(capsys):
    write_rows(Path("rows.jsonl"), [beaver("a", True), beaver("b", True)])
    assert fails(capsys, "--input", "rows.jsonl") == (
        "rows.jsonl: no usable pair (2 because all responses to the prompt are safe; the first is rows.jsonl:1)"
    )
    write_rows(Path("rows.jsonl"), [])
    assert fails(capsys, "--input", "rows.jsonl") == "rows.jsonl: no usable pair (there is no row)"


def test_no_harmful_prompt_is_an_error(capsys):
    write_rows(Path("rows.jsonl"), [pku(n, safe=(True, True)) for n in range(50)])
    message = fails(capsys, "--input", "rows.jsonl", "--safety-benchmark", "b.jsonl")
    assert message == "--safety-benchmark finds no harmful prompt in the test split: leave it out, or read more"


@pytest.mark.parametrize(
    "words, message",
    [
        ("", "there is nothing to read: name raw rows with --input FILE or --input-dir DIR"),
        ("--input none.jsonl", "there is no file none.jsonl: check the path"),
        (
            "--input-dir none",
            "--input-dir none is no folder with .jsonl, .json, .csv, .tsv, .parquet, .gz files in it: check the path",
        ),
        (
            "--input rows.jsonl --train-ratio 0.9",
            "--train-ratio, --val-ratio and --test-ratio add up to 1.1: make it 1",
        ),
        ("--input rows.jsonl --val-ratio -0.1", "--val-ratio: has to be at least 0, got -0.1"),
        ("--input rows.jsonl --seed x", "--seed: expected a whole number, got 'x'"),
        (
            "--input rows.jsonl --dimension safe",
            "--dimension: invalid choice: 'safe' (choose from helpful, harmless)",
        ),
        ("--input rows.jsonl --max-prompts 9", "--max-prompts has no effect without --safety-benchmark: leave it out"),
        (
            "--input rows.jsonl --safety-benchmark b.jsonl --val-ratio 0.2 --test-ratio 0",
            "--safety-benchmark takes its prompts from the test split, and --test-ratio is 0: raise it",
        ),
        (
            "--input rows.jsonl --safety-benchmark data/test/harmless_pairs.jsonl",
            "--safety-benchmark data/test/harmless_pairs.jsonl is the file of the pairs: name another",
        ),
        (
            "--input rows.jsonl --safety-benchmark rows.jsonl --overwrite",
            "rows.jsonl would be read and then replaced: choose another --output-dir, or read raw rows only",
        ),
        (
            "--input rows.jsonl --output-dir rows.jsonl",
            "rows.jsonl/train/helpful_pairs.jsonl cannot be written: "
            "{here}/rows.jsonl is not a folder you can write to",
        ),
        ("--input rows.jsonl --output-folder x", "unknown flag --output-folder; did you mean --output-dir?"),
    ],
)
def test_a_mistake_on_the_command_line(words, message, capsys):
    write_rows(Path("rows.jsonl"), [pku(n) for n in range(9)])
    said = fails(capsys, *words.split()).replace(
        "(choose from 'helpful', 'harmless')", "(choose from helpful, harmless)"
    )
    assert said == message.format(here=os.getcwd())


def test_its_own_output_is_not_read_as_raw_rows(capsys):
    Path("data").mkdir()
    prepare_rows([pku(n) for n in range(50)])
    message = fails(capsys, "--input-dir", "data", "--overwrite")
    assert message == (
        "data/train/helpful_pairs.jsonl would be read and then replaced: "
        "choose another --output-dir, or read raw rows only"
    )
