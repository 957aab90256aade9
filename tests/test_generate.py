"""generate.py: rows and pairs out, the same bytes again and after a kill, rewards, mistakes, the chat, online DPO."""

import fcntl
import io
import json
import os
import re
import shutil
import signal
import statistics
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import ROOT
from processes import run_program
from runs import listen, one_line, rows_of, run_script, snapshot
from tiny_models import argmax_one_by_one
from transformers import GenerationConfig
from worlds import CHATML, char_tokenizer, make_adapter, make_reward_model, write_model, write_rows, write_world

import generate
import lora
import toy_world
from formats.chat_text import prompt_ids
from formats.model_files import load_model, load_tokenizer
from preference_data import load_pairs
from tools import (
    evaluate_prompts,
    generate_chat,
    generate_output,
    generate_prompts,
    generate_reward,
    generate_rows,
    models,
)


@pytest.fixture(autouse=True)
def script_name(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["generate.py"])


def read_rows(path):
    return [json.loads(line) for line in Path(path).read_text("utf-8").splitlines()]


def progress_of(path):
    return json.loads(Path(f"{path}.args.json").read_text("utf-8"))["progress"]


# -- worlds: the toy world for text that means something, a tiny random model for everything quick --------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """model, pairs.jsonl; rules.py with reward functions; adapter and reward, two adapters on the model."""
    folder = write_world(tmp_path_factory.mktemp("world"))
    (folder / "rules.py").write_text(
        "import math\n"
        "one = 1\n"
        "def length(prompt, response): return len(response)\n"
        "def nothing(prompt, response): pass\n"
        "def text(prompt, response): return '1'\n"
        "def nan(prompt, response): return math.nan\n"
        "def broken(prompt, response): return 1 / 0\n"
        "def constant(prompt, response): return 1\n"
        "def own(prompt, response):\n"
        "    assert prompt.startswith('User:') and not response.startswith('User:')\n"
        "    return prompt.count('a') + response.count('a') / 100\n"
        "def large(prompt, response): return 1e200\n"
        "def long(prompt, response): return 10**400\n"
        "def leaves(prompt, response): raise SystemExit(0)\n"
        "class Odd:\n"
        "    def __float__(self): return {}['a']\n"
        "    __repr__ = __float__\n"
        "def odd(prompt, response): return Odd()\n"
        "def longer(prompt, response): return 10**5000\n"
        "class Leaves:\n"
        "    def __float__(self): raise SystemExit(0)\n"
        "    def __repr__(self): return 'leaves'\n"
        "def leaves_late(prompt, response): return Leaves()\n"
    )
    make_adapter(folder / "model", folder / "adapter")
    make_reward_model(folder / "model", folder / "reward")
    return folder


FP32 = ["--dtype", "fp32", "--device", "cpu"]


@pytest.fixture
def make(tmp_path, capsys):
    """make(model folder, prompts, words...) -> (the file, its rows); the log is in make.log."""
    files = iter(range(100))

    def run(model, prompts, *words, output=None):
        output = Path(output or tmp_path / f"out{next(files)}.jsonl")
        short = ["--max-new-tokens", "8"]
        run_script(["--model", model, "--prompts", prompts, "--output", output, *FP32, *short, *words], generate)
        run.log = capsys.readouterr().out
        return output, rows_of(output)

    return run


@pytest.fixture
def toy_make(make, toy):
    """make on the toy world's held-out prompts."""

    def run(*words, **options):
        made = make(toy / "model", toy / "prompts.jsonl", "--max-new-tokens", "40", *words, **options)
        run.log = make.log
        return made

    return run


@pytest.fixture
def world_make(make, world):
    """make on the tiny model's pairs."""

    def run(*words, **options):
        made = make(world / "model", world / "pairs.jsonl", *words, **options)
        run.log = make.log
        return made

    return run


# -- responses --------------------------------------------------------------------------------------------------------


def test_rows_stand_in_the_order_of_their_prompts_with_what_came_along(toy, toy_make):
    _, rows = toy_make("--num-samples", "10", "--num-responses", "2", "--batch-size", "6")
    prompts = rows_of(toy / "prompts.jsonl")[:10]
    assert [(row["prompt"], row["category"]) for row in rows] == [
        (row["prompt"], row["category"]) for row in prompts for _ in range(2)
    ]
    assert set(rows[0]) == {"prompt", "response", "category"}
    assert len({row["response"] for row in rows}) > 10
    assert all(row["response"].strip().endswith(".") and "<|" not in row["response"] for row in rows)
    assert "10 prompts of " in toy_make.log
    assert "20 rows of 20 responses to 10 prompts, " in toy_make.log


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(toy_make):
    words = "--num-samples", "20", "--batch-size", "8"
    first, rows = toy_make(*words)
    again, _ = toy_make(*words)
    other, _ = toy_make(*words, "--seed", "1")
    assert first.read_bytes() == again.read_bytes()
    assert first.read_bytes() != other.read_bytes()
    # A row depends on the seed and its place alone: fewer prompts, the same beginning.
    _, fewer = toy_make("--num-samples", "8", "--batch-size", "8")
    assert fewer == rows[:8]


def test_the_batch_size_changes_no_response(toy_make):
    words = "--num-samples", "7", "--num-responses", "3", "--top-p", "0.9"
    _, rows = toy_make(*words, "--batch-size", "21")
    assert len({row["response"] for row in rows}) > 10
    for batch_size in ("1", "6"):  # a prompt at once and two
        assert toy_make(*words, "--batch-size", batch_size)[1] == rows


def test_batches_draw_unlike_each_other(make, toy, tmp_path):
    (prompt, *_) = rows_of(toy / "prompts.jsonl")
    prompts = write_rows(tmp_path / "prompts.jsonl", [prompt] * 8)
    _, rows = make(toy / "model", prompts, "--batch-size", "2")
    assert len({(first["response"], second["response"]) for first, second in zip(rows[::2], rows[1::2])}) == 4


def test_temperature_0_is_the_likeliest_token_one_prompt_at_a_time(toy, toy_make):
    _, rows = toy_make("--temperature", "0", "--num-samples", "6", "--batch-size", "4")
    model, tokenizer = load_model(str(toy / "model"), torch.float32, "cpu"), load_tokenizer(str(toy / "model"))
    assert len({len(prompt_ids(row["prompt"], tokenizer, 256)) for row in rows}) > 2
    for row in rows:
        ids = prompt_ids(row["prompt"], tokenizer, 256)
        with torch.no_grad():
            response = argmax_one_by_one(model, ids, 40, ends=(tokenizer.eos_token_id,))
        assert row["response"] == tokenizer.decode(response, skip_special_tokens=True)


def test_each_flag_of_the_draws_has_an_effect(world_make):
    _, rows = world_make()
    for words in (["--top-p", "0.3"], ["--temperature", "0.3"], ["--max-prompt-length", "2"]):
        assert world_make(*words)[1] != rows
    assert "cut 24 prompts to --max-prompt-length 2" in world_make.log
    _, shorter = world_make("--max-new-tokens", "4")
    assert all(whole["response"].startswith(part["response"]) for whole, part in zip(rows, shorter, strict=True))
    letters = [[len(row["response"].replace("<s>", "#")) for row in made] for made in (shorter, rows)]  # a token each
    assert max(letters[0]) <= 4 < max(letters[1])
    assert "cut at --max-new-tokens" in world_make.log


def test_an_adapter_is_on_and_messages_go_through_the_template(make, world, tmp_path):
    texts = [{"prompt": "ab"}, {"prompt": "a longer one"}]
    chats = [{"prompt": [{"role": "user", "content": row["prompt"]}]} for row in texts]
    plain, chat = write_rows(tmp_path / "p.jsonl", texts), write_rows(tmp_path / "c.jsonl", chats)
    _, rows = make(world / "model", chat, "--temperature", "0")
    assert [row["prompt"] for row in rows] == [row["prompt"] for row in chats]
    wrapped = make(world / "model", plain, "--temperature", "0", "--chat-template-strings")[1]
    assert [row["prompt"] for row in wrapped] == ["ab", "a longer one"]
    assert [row["response"] for row in wrapped] == [row["response"] for row in rows]
    words = world / "model", plain, "--adapter", world / "adapter", "--temperature", "0"
    _, adapted = make(*words)
    model = load_model(str(world / "model"), torch.float32, "cpu")
    lora.load_adapter(model, world / "adapter", "x")
    with torch.no_grad():
        response = argmax_one_by_one(model, [ord(letter) for letter in "ab"], 8)
        lora.switch_adapter(model, None)
        assert argmax_one_by_one(model, [ord(letter) for letter in "ab"], 8) != response
    assert adapted[0]["response"] == char_tokenizer().decode(response, skip_special_tokens=True)


# -- gone on with -----------------------------------------------------------------------------------------------------


class Killed(BaseException):
    pass


@pytest.mark.parametrize("when", ["between batches", "behind the rows", "within a line", "before the first"])
def test_a_killed_run_goes_on_to_the_same_bytes(toy_make, tmp_path, monkeypatch, when):
    words = "--num-samples 20 --batch-size 4 --num-responses 2 --reward-fn".split()
    words.append(f"{ROOT}/scripts/reward_polite.py:polite")
    whole, _ = toy_make(*words)
    output, sample, save, calls = tmp_path / "killed.jsonl", generate.sample, generate_output.BatchFile._save, []

    def sample_or_die(*args, **options):
        calls.append(1)
        if len(calls) == 4 and when in ("between batches", "within a line"):
            raise Killed
        return sample(*args, **options)

    def save_or_die(self, progress):
        if progress["batches"] == (3 if when == "behind the rows" else 0) and when in (
            "behind the rows",
            "before the first",
        ):
            raise Killed  # the rows are there, and not yet counted
        save(self, progress)

    monkeypatch.setattr(generate, "sample", sample_or_die)
    monkeypatch.setattr(generate_output.BatchFile, "_save", save_or_die)
    with pytest.raises(Killed):
        toy_make(*words, output=output)
    monkeypatch.setattr(generate_output.BatchFile, "_save", save)
    monkeypatch.setattr(generate, "sample", lambda *args, **options: calls.append(1) or sample(*args, **options))
    if when == "within a line":
        with open(output, "a") as file:
            file.write('{"prompt": "User:')
    if when != "before the first":
        lines = whole.read_bytes().splitlines(keepends=True)[:12]
        assert output.read_bytes().startswith(b"".join(lines))
    calls.clear()
    # bf16 where the processor has it; in a file that is gone on with, the type it was begun in
    toy_make(*words, *(["--dtype", "auto"] if when != "before the first" else []), output=output)
    done = {"between batches": 3, "within a line": 3, "behind the rows": 2, "before the first": 0}[when]
    assert len(calls) == 10 - done  # and what was there was not drawn again
    assert (f"going on behind batch {done} of 10" in toy_make.log) == (done > 0)
    assert output.read_bytes() == whole.read_bytes()
    assert Path(f"{output}.args.json").read_bytes() == Path(f"{whole}.args.json").read_bytes()
    assert sorted(path.name for path in tmp_path.glob(".*")) == []


def begin(world_make, output, *words):
    """An unfinished output."""
    with pytest.MonkeyPatch.context() as patch:
        calls, sample = [], generate.sample

        def once(*args, **options):
            calls.append(1)
            if len(calls) > 1:
                raise Killed
            return sample(*args, **options)

        patch.setattr(generate, "sample", once)
        with pytest.raises(Killed):
            world_make(*words, output=output)


@pytest.mark.parametrize(
    "words, difference",
    [
        (["--seed", "1"], "--seed 42, now it is 1"),
        (["--temperature", "0.5"], "--temperature 1.0, now it is 0.5"),
        (["--top-p", "0.5"], "--top-p 1.0, now it is 0.5"),
        (["--max-new-tokens", "9"], "--max-new-tokens 8, now it is 9"),
        (["--batch-size", "8"], "--batch-size 4, now it is 8"),
        (["--num-responses", "2"], "--num-responses 1, now it is 2"),
        (["--num-samples", "20"], "prompts "),
        (["--max-prompt-length", "3"], "prompts "),
        (["--chat-template-strings"], "prompts "),
        (["--adapter", "{world}/adapter"], "weights "),
        (["--dtype", "bf16"], "weights "),
        (["--reward-fn", "{world}/rules.py:length"], "reward None, now it is length "),
        (["--reward-model", "{world}/reward"], "reward None, now it is "),
        (["--reward-fn", "{world}/rules.py:length", "--min-reward", "3"], "--min-reward None, now it is 3.0"),
        (["--reward-fn", "{world}/rules.py:length", "--pairs", "--num-responses=2"], "--pairs False, now it is True"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_an_output_begun_with_other_flags_is_refused(world, world_make, tmp_path, capsys, words, difference):
    output = tmp_path / "o.jsonl"
    begin(world_make, output, "--batch-size", "4")
    before = snapshot(tmp_path)
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        world_make("--batch-size", "4", *[word.format(world=world) for word in words], output=output)
    assert exit.value.code == 2
    line = one_line(capsys)
    assert line.startswith(f"generate.py: {output} was begun with {difference}")
    assert line.endswith(": choose another --output, make it the same, or begin anew with --overwrite")
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("what", ["batches", "responses", "bytes", "a key", "a byte", "no JSON", "deep", "a list"])
def test_a_changed_record_is_refused(world_make, tmp_path, capsys, what):
    output = tmp_path / "o.jsonl"
    begin(world_make, output, "--batch-size", "4")
    record = tmp_path / "o.jsonl.args.json"
    content = record.read_text()
    changed = {
        "a key": content.replace('"batches"', '"batcheS"'),
        "a byte": content.replace('"seed"', '"sead"').replace("--seed", "--sead"),
        "no JSON": content[:-9],
        "deep": "[" * 100_000,
        "a list": "[1]",
    }
    record.write_text(changed.get(what) or re.sub(rf'"{what}": \d+', f'"{what}": 7', content))
    assert record.read_text() != content
    before = snapshot(tmp_path)
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        world_make("--batch-size", "4", output=output)
    assert ended.value.code == 2 and snapshot(tmp_path) == before
    fault = "cannot be read (" if what in ("no JSON", "deep", "a list") else "was changed since it was written: "
    line = one_line(capsys)
    assert line.startswith(f"generate.py: {record} {fault}") and line.endswith(": choose another --output")


def test_a_second_run_into_the_file_is_refused(world_make, tmp_path, capsys):
    output, _ = world_make(output=tmp_path / "o.jsonl")
    before = snapshot(tmp_path)
    with open(tmp_path / ".o.jsonl.lock", "w") as lock, pytest.raises(SystemExit) as ended:
        fcntl.flock(lock, fcntl.LOCK_EX)
        world_make("--overwrite", output=output)
    assert ended.value.code == 2
    assert one_line(capsys).startswith(f"generate.py: --output {output} is being written by another run")
    (tmp_path / ".o.jsonl.lock").unlink()
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("asked", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_asked_to_end_it_says_what_goes_on(world_make, tmp_path, monkeypatch, capsys, asked):
    sample, calls, output = generate.sample, [], tmp_path / "o.jsonl"

    def ask(*args, **options):
        calls.append(1)
        if len(calls) == 2:
            signal.raise_signal(asked)
        return sample(*args, **options)

    monkeypatch.setattr(generate, "sample", ask)
    listen()
    with pytest.raises(SystemExit) as ended:
        world_make("--batch-size", "4", output=output)
    assert ended.value.code == 128 + asked
    said = "interrupted" if asked == signal.SIGINT else f"ended by {asked.name}"
    assert one_line(capsys) == f"generate.py: {said}; the same command goes on behind what is written"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["o.jsonl", "o.jsonl.args.json"]
    world_make("--batch-size", "4", output=output)
    assert "going on behind batch 1 of" in world_make.log


def test_a_finished_output_is_refused_and_overwritten_on_request(world_make, tmp_path, capsys):
    output, rows = world_make()
    before = snapshot(tmp_path)
    with pytest.raises(SystemExit):
        world_make(output=output)
    instead = "choose another --output, or begin anew with --overwrite"
    assert one_line(capsys) == f"generate.py: {output} is finished: {instead}"
    assert snapshot(tmp_path) == before
    _, other = world_make("--overwrite", "--seed", "1", "--num-samples", "5", output=output)
    assert len(other) == 5
    assert other != rows[:5]


def test_an_output_that_was_tampered_with_is_refused(world_make, tmp_path, capsys):
    output = tmp_path / "o.jsonl"
    begin(world_make, output)
    output.write_bytes(output.read_bytes()[:-1])
    with pytest.raises(SystemExit):
        world_make(output=output)
    said = f"generate.py: {output} was changed since it was written: move it away, or choose another --output"
    assert one_line(capsys) == said
    Path(f"{output}.args.json").write_text("{")
    with pytest.raises(SystemExit):
        world_make(output=output)
    assert one_line(capsys).startswith(f"generate.py: {output}.args.json cannot be read (")


CHANGES = {"a byte": lambda data: data[:9] + b"?" + data[10:], "a row": lambda data: data + b"{}\n"}


@pytest.mark.parametrize(
    ("finished", "change", "words"),
    [
        (True, "a byte", ["--overwrite"]),
        (True, "a row", ["--overwrite"]),
        (False, "a byte", ["--overwrite"]),
        (False, "a byte", []),  # a row behind the last whole batch is what a kill leaves: it is written again
    ],
)
def test_an_output_that_was_changed_is_kept(world_make, tmp_path, capsys, finished, change, words):
    output = tmp_path / "o.jsonl"
    world_make(output=output) if finished else begin(world_make, output)
    output.write_bytes(CHANGES[change](output.read_bytes()))
    before = snapshot(tmp_path)
    capsys.readouterr()
    with pytest.raises(SystemExit):
        world_make(*words, output=output)
    said = f"generate.py: {output} was changed since it was written: move it away, or choose another --output"
    assert one_line(capsys) == said
    assert snapshot(tmp_path) == before


# -- pairs by a function ----------------------------------------------------------------------------------------------


def by_prompt(rows, count):
    return [rows[start : start + count] for start in range(0, len(rows), count)]


def test_pairs_are_the_best_against_the_worst_of_the_same_responses(world, toy_make):
    words = ["--num-samples", "30", "--num-responses", "3", "--batch-size", "12"]
    _, responses = toy_make(*words)
    reward = f"{world}/rules.py:length"
    _, pairs = toy_make(*words, "--pairs", "--reward-fn", reward)
    expected, ties = [], 0
    for group in by_prompt(responses, 3):
        texts = sorted((row["response"] for row in group), key=len)
        ties += len(texts[0]) == len(texts[-1])
        if len(texts[0]) < len(texts[-1]):
            lengths = {"chosen_reward": len(texts[-1]), "rejected_reward": len(texts[0])}
            expected.append({**group[0], "chosen": texts[-1], "rejected": texts[0], **lengths})
            del expected[-1]["response"]
    by_length = [{**pair, "chosen": len(pair["chosen"]), "rejected": len(pair["rejected"])} for pair in pairs]
    assert by_length == [{**row, "chosen": len(row["chosen"]), "rejected": len(row["rejected"])} for row in expected]
    for pair, group in zip(pairs, (g for g in by_prompt(responses, 3) if len({len(r["response"]) for r in g}) > 1)):
        texts = [row["response"] for row in group]
        assert pair["chosen"] == max(texts, key=len)  # the first of equals, as max and min take it
        assert pair["rejected"] == min(texts, key=len)
    lengths = [len(row["response"]) for row in responses]
    mean, spread = statistics.fmean(lengths), statistics.pstdev(lengths)
    assert f"{len(pairs)} pairs of 90 responses to 30 prompts" in toy_make.log
    assert f"rm_reward_mean={mean:.4f} rm_reward_std={spread:.4f}, " in toy_make.log
    assert (f"{ties} ties dropped" in toy_make.log) == (ties > 0)


def test_ties_are_dropped_and_counted(world, toy_make):
    words = ["--num-samples", "8", "--num-responses", "4", "--batch-size", "8", "--pairs", "--reward-fn"]
    output, pairs = toy_make(*words, f"{world}/rules.py:constant")
    assert pairs == []
    assert (
        "0 pairs of 32 responses to 8 prompts, 8 ties dropped, rm_reward_mean=1.0000 rm_reward_std=0.0000"
        in toy_make.log
    )
    assert progress_of(output)["ties"] == 8
    output, pairs = toy_make(*words, f"{ROOT}/scripts/reward_polite.py:polite")
    assert 0 < len(pairs) < 8
    assert progress_of(output)["ties"] == 8 - len(pairs)
    assert all(pair["chosen_reward"] > pair["rejected_reward"] for pair in pairs)
    assert all(toy_world.judge(pair["prompt"], pair["chosen"]).polite == pair["chosen_reward"] for pair in pairs)


def test_the_function_gets_prompt_and_response_in_this_order(make, world, toy, tmp_path):
    chats = [{"prompt": [{"role": "user", "content": text}]} for text in ("User: aa", "User: b")]
    _, rows = make(world / "model", write_rows(tmp_path / "c.jsonl", chats), "--reward-fn", f"{world}/rules.py:own")
    assert [int(row["reward"]) for row in rows] == [2, 0]
    assert rows[0]["reward"] == pytest.approx(2 + rows[0]["response"].count("a") / 100)


def test_pairs_of_texts_and_of_messages_load_as_they_are(make, world, toy, toy_make, tmp_path):
    tokenizer = load_tokenizer(str(toy / "model"))
    prompts = rows_of(toy / "prompts.jsonl")[:10]
    questions = [row["prompt"].removeprefix("User:\n").removesuffix("\nAssistant:\n") for row in prompts]
    chats = write_rows(tmp_path / "c.jsonl", [{"prompt": [{"role": "user", "content": q}]} for q in questions])
    words = ["--num-responses", "2", "--pairs", "--reward-fn", f"{world}/rules.py:length", "--max-new-tokens", "40"]
    texts, _ = make(toy / "model", toy / "prompts.jsonl", *words, "--num-samples", "10")
    messages, rows = make(toy / "model", chats, *words)
    assert rows[0]["prompt"][0]["role"] == "user"
    assert rows[0]["chosen"][0]["role"] == rows[0]["rejected"][0]["role"] == "assistant"
    (pairs, _), (chat_pairs, report) = (load_pairs(str(file), tokenizer, 512, 256) for file in (texts, messages))
    assert "messages" in report[0]
    assert len(pairs) == len(rows_of(texts)) > 5
    assert pairs == chat_pairs  # the toy world's template renders its strings
    for pair, row in zip(pairs, rows_of(texts), strict=True):
        assert pair.prompt_ids == prompt_ids(row["prompt"], tokenizer, 256)
        assert pair.chosen_ids == [*tokenizer(row["chosen"]).input_ids, tokenizer.eos_token_id]
        assert len(row["chosen"]) == row["chosen_reward"] > row["rejected_reward"] == len(row["rejected"])


def test_best_and_worst():
    choose = generate_rows.best_and_worst
    assert choose(["a", "b", "c"], [1.0, 3.0, 2.0]) == (1, 0)
    assert choose(["a", "b", "c", "d"], [2.0, 1.0, 2.0, 1.0]) == (0, 1)  # the first of equals
    assert choose(["a", "b"], [1.0, 1.0]) is None
    assert choose(["same", "same"], [1.0, 2.0]) is None  # ids may differ where texts do not
    assert choose([" ", "b", "c"], [9.0, 1.0, 2.0]) == (2, 1)  # an empty response cannot be trained on
    assert choose(["", "b"], [1.0, 2.0]) is None
    assert choose(["", " "], [1.0, 2.0]) is None


# -- rewards by a model -----------------------------------------------------------------------------------------------


@pytest.fixture
def drawn(monkeypatch):
    """(prompt ids, response ids) of all that generate.py samples."""
    pairs, sample = [], generate.sample

    def record(model, tokenizer, prompts, *args, **options):
        responses = sample(model, tokenizer, prompts, *args, **options)
        pairs.extend(zip(prompts, responses, strict=True))
        return responses

    monkeypatch.setattr(generate, "sample", record)
    return pairs


def as_strings(drawn):
    """Responses to strings, which also stop at <|im_end|>, as they are trained: with </s>."""
    return [(prompt, [*response[:-1], 1] if response[-1] == 3 else response) for prompt, response in drawn]


@torch.no_grad()
def plain_scores(folder, drawn, base=None, whole=False):
    """The head on the last token's hidden state, one sequence at a time."""
    model, head = load_model(str(folder if whole else base), torch.float32, "cpu", scores=True), None
    if not whole:
        _, head = lora.load_adapter(model, folder, "x", with_head=True)
    head = model.score.weight if head is None else head
    scores = []
    for prompt, response in drawn:
        hidden = model.base_model(input_ids=torch.tensor([prompt + response]), use_cache=False).last_hidden_state
        scores.append((hidden[0, -1] @ head[0]).item())
    return scores


@pytest.mark.parametrize("count", [1, 3])
def test_a_reward_models_scores_are_of_the_ids_that_were_drawn(world, world_make, drawn, count):
    words = ["--num-responses", count, "--batch-size", "6", "--max-new-tokens", "20", "--adapter", world / "adapter"]
    _, without = world_make(*words)
    drawn.clear()
    _, rows = world_make(*words, "--reward-model", world / "reward")
    assert "an adapter on the policy's frozen base" in world_make.log
    # The policy's adapter is on while responses are drawn and off while they are scored; scoring changes no draw.
    assert [row["response"] for row in rows] == [row["response"] for row in without]
    ended = {response[-1] == 1 for _, response in drawn}
    assert ended == {True, False}  # finished and cut
    expected = plain_scores(world / "reward", as_strings(drawn), world / "model")
    assert [row["reward"] for row in rows] == pytest.approx(expected, abs=1e-5)
    assert statistics.pstdev(expected) > 0.1
    assert f"rm_reward_mean={statistics.fmean(expected):.4f}" in world_make.log


def test_a_shared_base_gives_the_scores_of_a_model_by_itself(world, world_make, tmp_path, drawn):
    words = ["--num-responses", "2", "--batch-size", "8", "--adapter", world / "adapter"]
    _, shared = world_make(*words, "--reward-model", world / "reward")
    other = shutil.copytree(world / "reward", tmp_path / "other")
    record = json.loads((other / "reward_model.json").read_text())
    (other / "reward_model.json").write_text(json.dumps(record | {"base_sha256": "of another base"}))
    (other / "manifest.json").unlink(missing_ok=True)
    _, alone = world_make(*words, "--reward-model", other)
    assert "a model of its own" in world_make.log
    assert [row["response"] for row in alone] == [row["response"] for row in shared]
    assert [row["reward"] for row in alone] == pytest.approx([row["reward"] for row in shared], abs=1e-5)
    drawn.clear()
    whole = make_reward_model(world / "model", tmp_path / "whole", whole=True)
    _, merged = world_make(*words, "--reward-model", whole)
    assert "a model of its own" in world_make.log
    assert [row["reward"] for row in merged] == pytest.approx([row["reward"] for row in shared], abs=1e-4)
    assert [row["reward"] for row in merged] == pytest.approx(
        plain_scores(whole, as_strings(drawn), whole=True), abs=1e-5
    )


def test_a_reward_model_on_a_base_of_another_size(world, world_make, tmp_path, drawn):
    base = tmp_path / "base"
    char_tokenizer(template=CHATML).save_pretrained(base)
    write_model(base, seed=3, hidden_size=48)
    folder = make_reward_model(base, tmp_path / "reward")
    _, rows = world_make("--reward-model", folder)
    assert "a model of its own" in world_make.log
    assert [row["reward"] for row in rows] == pytest.approx(plain_scores(folder, as_strings(drawn), base), abs=1e-5)


def test_another_end_token_is_scored_as_the_one_of_training(world, make, tmp_path, drawn):
    model = shutil.copytree(world / "model", tmp_path / "model")
    settings = json.loads((model / "generation_config.json").read_text())
    many = list(range(1, 60))  # nearly any token ends a response
    (model / "generation_config.json").write_text(json.dumps(settings | {"eos_token_id": many}))
    _, rows = make(model, world / "pairs.jsonl", "--reward-model", world / "reward", "--max-new-tokens", "20")
    assert {response[-1] for _, response in drawn} - {1} & set(many)
    as_trained = [(prompt, [*r[:-1], 1] if r[-1] in many else r) for prompt, r in drawn]  # 3 is one of them
    expected = plain_scores(world / "reward", as_trained, world / "model")
    assert [row["reward"] for row in rows] == pytest.approx(expected, abs=1e-5)


def test_a_chats_response_is_scored_with_the_end_of_its_turn_as_the_reward_model_was_trained(
    world, make, tmp_path, drawn
):
    """The template ends a turn in <|im_end|>, the tokenizer a text in </s>; the score is that of the row trained on."""
    chats = [{"prompt": [{"role": "user", "content": text}]} for text in ("aa", "b", "abc?")]
    words = ["--reward-model", world / "reward", "--max-new-tokens", "30", "--num-responses", "40"]
    _, rows = make(world / "model", write_rows(tmp_path / "chats.jsonl", chats), *words)
    tokenizer, pairs, rewards = load_tokenizer(str(world / "model")), [], []
    for row, (_, response) in zip(rows, drawn, strict=True):
        if response[-1] not in (1, 3) or not row["response"].strip():
            continue
        trained = {"prompt": row["prompt"], "chosen": [{"role": "assistant", "content": row["response"]}]}
        trained["rejected"] = [{"role": "assistant", "content": "no"}]
        (pair,), _ = load_pairs(str(write_rows(tmp_path / "rows.jsonl", [trained])), tokenizer, 512, 256)
        assert pair.chosen_ids[-1] == 3
        if pair.chosen_ids[:-1] == response[:-1]:  # its tokens are those of its text
            pairs.append((pair.prompt_ids, pair.chosen_ids))
            rewards.append(row["reward"])
    assert {response[-1] for _, response in drawn} >= {1, 3} and len(pairs) > 5
    assert rewards == pytest.approx(plain_scores(world / "reward", pairs, world / "model"), abs=1e-5)


def test_min_reward_keeps_what_reaches_it(world, world_make):
    words = ["--num-responses", "2", "--reward-model", world / "reward"]
    _, rows = world_make(*words)
    limit = sorted(row["reward"] for row in rows)[20]
    output, kept = world_make(*words, f"--min-reward={limit!r}")
    assert kept == [row for row in rows if row["reward"] >= limit]
    assert len(kept) == 28
    assert progress_of(output)["below"] == 20
    assert "28 rows of 48 responses to 24 prompts, 20 below --min-reward" in world_make.log
    assert "these scores have no zero (calibrated: false)" in world_make.log
    assert f"rm_reward_mean={statistics.fmean(row['reward'] for row in rows):.4f}" in world_make.log  # of all


def test_pairs_by_a_reward_model(world, world_make):
    words = ["--num-responses", "3", "--reward-model", world / "reward", "--batch-size", "12"]
    _, rows = world_make(*words)
    _, pairs = world_make(*words, "--pairs")
    expected = []
    for group in by_prompt(rows, 3):
        group = [row for row in group if row["response"].strip()]  # an empty one makes no pair
        best, worst = (choose(group, key=lambda row: row["reward"]) for choose in (max, min))
        expected.append((best["response"], worst["response"], best["reward"], worst["reward"]))
    fields = "chosen", "rejected", "chosen_reward", "rejected_reward"
    assert [tuple(pair[field] for field in fields) for pair in pairs] == expected


# -- prompts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row, prompt, others",
    [
        ({"prompt": "a", "category": "c", "n": [1]}, "a", {"category": "c", "n": [1]}),
        ({"prompt": "a", "chosen": "x", "rejected": "y", "id": 3}, "a", {"id": 3}),
        (
            {"prompt": "a", "chosen_response": "x", "rejected_response": "y", "dimension": "helpful"}
            | {"safety_labels": {"chosen": 1, "rejected": -1}, "category": "c"},
            "a",
            {"category": "c"},
        ),
        ({"prompt": "a", "response": "old", "reward": 3, "score_chosen": 1}, "a", {}),
        ({"prompt": "Why? ", "response_0": "x", "response_1": "y", "better_response_id": 1}, "Why?\n", {}),
        (
            {"prompt": "a", "chosen": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "x"}]}
            | {"rejected": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "y"}]},
            [{"role": "user", "content": "a"}],
            {},
        ),
        ({"question": "q", "response_j": "x", "response_k": "y"}, "Question: q\n\nAnswer: ", {}),
        (
            {"chosen": "\n\nHuman: q\n\nAssistant: x", "rejected": "\n\nHuman: q\n\nAssistant: y"},
            "\n\nHuman: q\n\nAssistant:",
            {},
        ),
    ],
    ids=str,
)
def test_a_row_gives_its_prompt_and_what_is_not_of_its_responses(make, world, tmp_path, row, prompt, others):
    words = world / "model", write_rows(tmp_path / "rows.jsonl", [row])
    _, (out,) = make(*words)
    assert {name: value for name, value in out.items() if name != "response"} == {"prompt": prompt, **others}


def test_rows_whose_prompts_differ_are_left_out_and_counted(make, world, tmp_path):
    rows = [
        {"chosen": f"\n\nHuman: {q}\n\nAssistant: x", "rejected": "\n\nHuman: q\n\nAssistant: y"}
        for q in ("q", "other")
    ]
    _, out = make(world / "model", write_rows(tmp_path / "rows.jsonl", rows))
    assert len(out) == 1
    assert "left out 1 rows because the prompts of chosen and rejected differ" in make.log


def test_what_is_not_ascii_is_written_as_it_is(make, world, tmp_path):
    prompts = write_rows(tmp_path / "rows.jsonl", [json.dumps({"prompt": "你好", "类别": "问候"}, ensure_ascii=False)])
    output, (row,) = make(world / "model", prompts)
    assert (row["prompt"], row["类别"]) == ("你好", "问候")
    assert '"你好"' in output.read_text("utf-8")


# -- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def fails(world, tmp_path, capsys, monkeypatch):
    """Flags that have to be refused before any weights load; the one line on standard error."""

    def run_and_fail(*words, output=None, loads=False):
        if not loads:
            monkeypatch.setattr(models, "load_model", lambda *args, **kwargs: pytest.fail("weights were loaded"))
        output, before = output or tmp_path / "new/out.jsonl", snapshot(tmp_path)
        defaults = ["--model", world / "model", "--prompts", world / "pairs.jsonl", "--output", output]
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit:
            run_script([*defaults, *FP32, "--max-new-tokens", "4", *words], generate)
        assert exit.value.code == 2
        if not loads:
            assert snapshot(tmp_path) == before
        line = one_line(capsys)
        assert line.startswith("generate.py: ") or line.startswith("pytest")
        return line.partition(": ")[2]

    return run_and_fail


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["--prompts", "none.jsonl"], "there is no file none.jsonl: check the path"),
        (
            ["--reward-fn", "r.py:f", "--reward-model", "m"],
            "--reward-model and --reward-fn are two rewards: leave one of them out",
        ),
        (["--reward-fn", "r.py"], "--reward-fn r.py is not FILE.py:FUNCTION, as in scripts/reward_polite.py:polite"),
        (["--reward-fn", "none.py:f"], "--reward-fn: there is no file none.py: check the path"),
        (["--reward-fn", "{world}/rules.py:f"], "--reward-fn: {world}/rules.py has no function f: check the name"),
        (
            ["--reward-fn", "{world}/rules.py:number"],
            "--reward-fn: {world}/rules.py has no function number: check the name",
        ),
        (
            ["--pairs", "--num-responses", "4"],
            "--pairs needs a reward to tell best from worst: --reward-model or --reward-fn",
        ),
        (
            ["--pairs", "--reward-fn", "{world}/rules.py:length"],
            "--pairs needs two responses to a prompt or more, as in --num-responses 4",
        ),
        (["--min-reward", "1"], "--min-reward needs a reward: --reward-model or --reward-fn"),
        (
            ["--min-reward", "1", "--pairs", "--num-responses", "2", "--reward-model", "{world}/reward"],
            "--min-reward chooses single responses, --pairs two: leave one of them out",
        ),
        (
            ["--temperature", "0", "--num-responses", "2"],
            "--temperature 0 takes the likeliest token each time: leave out --num-responses",
        ),
        (
            ["--temperature", "0", "--top-p", "0.5"],
            "--temperature 0 takes the likeliest token each time: leave out --top-p",
        ),
        (["--top-p", "1.5"], "--top-p: has to be at most 1, got 1.5"),
        (["--chat"], "--prompts has no effect with --chat: leave one of them out"),
        (["--adapter", "{world}/reward"], "the adapter in {world}/reward is a reward model's, with a scalar head"),
        (["--adapter", "{world}/model"], "{world}/model is not an adapter folder: adapter_config.json is missing"),
        (
            ["--reward-model", "{world}/adapter"],
            "{world}/adapter is no reward model (no reward_model.json that can be read): name a folder of train_rm.py",
        ),
        (
            ["--max-new-tokens", "1020"],
            "a prompt of 5 tokens and --max-new-tokens 1020 is more than the 1024 positions of the model "
            "{world}/model: make it smaller",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_sentence_before_weights_load(fails, world, words, sentence):
    assert fails(*[word.format(world=world) for word in words]) == sentence.format(world=world)


def test_prompts_and_output_have_to_be_given(capsys):
    for words, name in ((["--output", "o"], "prompts"), (["--prompts", "p"], "output")):
        with pytest.raises(SystemExit) as exit:
            generate.get_args(words)
        assert exit.value.code == 2
        assert one_line(capsys) == f"generate.py: --{name} has to be given (or --chat, to type the prompts)"


@pytest.mark.parametrize(
    "row, problem",
    [
        ("{}", "`prompt` is missing; mend the row"),
        ('{"text": "a"}', "`prompt` is missing; mend the row"),
        ('{"prompt": 3}', "`prompt` is neither a text nor a list of messages; mend the row"),
        (
            '{"prompt": []}',
            "`prompt` is not a list of messages with role and content, or with from and value; mend the row",
        ),
        (
            '{"prompt": ["a"]}',
            "`prompt` is not a list of messages with role and content, or with from and value; mend the row",
        ),
        (
            '{"prompt": [{"role": "user", "content": null}]}',
            "the content of a message of `prompt` is null, and no text; mend",
        ),
        (
            '{"prompt": [{"role": "gpt", "content": "a"}]}',
            "a message of `prompt` has the role 'gpt': write assistant; mend",
        ),
        ('{"prompt": "a", "query": "b"}', "`query` is not read where a file's first row is prompt: call what is asked"),
        ('["a"]', "not a JSON object {{...}}; mend the row"),
        ('{"prompt"', "not JSON ("),
        ('{"prompt": "\\ud800"}', "'utf-8' codec can't encode"),
    ],
)
def test_a_row_without_a_prompt_is_named_by_its_line(fails, tmp_path, row, problem):
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": "a"}, "", row])
    assert fails("--prompts", rows).startswith(f"{rows}:3: {problem.replace('{{', '{').replace('}}', '}')}")


def test_what_else_a_row_asks_is_asked_and_goes_along(world, tmp_path):
    more = {"system": "Be brief.", "history": [["q?", "a."]]}
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": "b?"} | more])
    tokenizer = char_tokenizer(eos="<|im_end|>", template=CHATML)
    for words, text in (
        ([], "Be brief.\n\nq?\n\na.\n\nb?"),
        (
            ["--chat-template-strings"],
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nq?<|im_end|>\n"
            "<|im_start|>assistant\na.<|im_end|>\n<|im_start|>user\nb?<|im_end|>\n<|im_start|>assistant\n",
        ),
    ):
        args = generate.get_args(["--prompts", str(rows), "--output", "o", *words])
        [row] = generate_prompts.read(args, tokenizer).prompts
        assert tokenizer.decode(row.ids) == text
        assert (row.prompt, row.fields) == ("b?", more)  # training puts them together again


def test_a_huge_prompt_is_cut_before_it_is_tokenised(tmp_path):
    found, start = [], time.perf_counter()
    for size in (10**3, 3 * 10**7):
        rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": "p" * size + "Q?"}])
        args = generate.get_args(["--prompts", str(rows), "--output", "o", "--max-prompt-length", "9"])
        found.append(generate_prompts.read(args, char_tokenizer()).prompts[0].ids)
    assert found == [[ord(letter) for letter in "pppppppQ?"]] * 2
    assert time.perf_counter() - start < 20


def test_a_column_that_says_what_the_system_message_says_is_no_mistake(tmp_path):
    """As in training and in evaluate_alignment.py: whatever is asked is read, if in another column."""
    row = {"prompt": "b?", "system": "Be brief.", "instruction": "Be brief."}
    rows = write_rows(tmp_path / "rows.jsonl", [row])
    args = generate.get_args(["--prompts", str(rows), "--output", "o"])
    found = [module.read(args, char_tokenizer()).prompts[0].ids for module in (generate_prompts, evaluate_prompts)]
    assert found == [[ord(letter) for letter in "Be brief.\n\nb?"]] * 2


def test_a_reward_model_without_room_for_a_response_is_refused(fails, world, tmp_path):
    folder = make_reward_model(world / "model", tmp_path / "reward", whole=True)
    (folder / "manifest.json").unlink(missing_ok=True)
    for name, changes in (("config.json", {"max_position_embeddings": 8}), ("reward_model.json", {"sha256": {}})):
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(content | changes))
    line = fails("--reward-model", folder)  # --max-new-tokens 4
    said = f"a prompt of 5 tokens and --max-new-tokens 4 is more than the 8 positions of the model {folder}"
    assert line == f"{said}: make it smaller"


def test_an_adapter_that_is_not_finite_ends_with_exit_code_3(world, tmp_path, capsys):
    make_adapter(world / "model", tmp_path / "broken", spread=float("inf"))
    words = ["--model", world / "model", "--prompts", world / "pairs.jsonl", "--output", tmp_path / "new" / "out.jsonl"]
    with pytest.raises(SystemExit) as exit:
        run_script([*words, "--adapter", tmp_path / "broken", *FP32], generate)
    assert exit.value.code == 3
    assert "has weights that are not finite: train it anew" in one_line(capsys)
    assert not (tmp_path / "new").exists()


def test_messages_need_a_template(fails, world, tmp_path):
    model = shutil.copytree(world / "model", tmp_path / "model")
    char_tokenizer().save_pretrained(model)
    (model / "chat_template.jinja").unlink()
    line = fails("--model", model, "--chat-template-strings")
    assert line == f"{world}/pairs.jsonl:1 needs a chat template and this tokenizer has none: use an instruct model's"


def test_a_file_without_rows(fails, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", [])
    assert fails("--prompts", rows) == f"{rows} has no row with a prompt: name a file that has"


def test_outputs_that_cannot_be_written(fails, world, tmp_path):
    prompts = write_rows(tmp_path / "rows.jsonl", [{"prompt": "a"}])
    line = fails("--prompts", prompts, "--overwrite", output=prompts)
    assert line == f"{prompts} would be read and written at once: choose another --output"
    assert fails(output=tmp_path) == f"--output {tmp_path} cannot be written: {tmp_path} is a folder"
    line = fails(output=prompts / "out.jsonl")
    assert line == f"--output {prompts}/out.jsonl cannot be written: {prompts} is not a folder you can write to"
    assert fails(output=prompts) == f"{prompts} is there already, with no rows.jsonl.args.json: choose another --output"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission(fails, tmp_path):
    (tmp_path / "closed").mkdir(mode=0o500)
    line = fails(output=tmp_path / "closed/out.jsonl")
    assert line.endswith(f"cannot be written: {tmp_path}/closed is not a folder you can write to")


def test_an_adapter_or_a_reward_model_of_another_base(fails, world, tmp_path):
    base = tmp_path / "base"
    char_tokenizer(template=CHATML).save_pretrained(base)
    write_model(base, seed=3, hidden_size=48)
    make_adapter(base, tmp_path / "adapter")
    assert fails("--adapter", tmp_path / "adapter").startswith(f"{tmp_path}/adapter does not fit this model: ")
    folder = make_reward_model(base, tmp_path / "reward")
    record = json.loads((folder / "reward_model.json").read_text())
    (folder / "reward_model.json").write_text(json.dumps(record | {"base_model": str(tmp_path / "gone")}))
    assert fails("--reward-model", folder) == f"there is no folder {tmp_path}/gone: check the path"
    char_tokenizer(merges=[("a", "b")]).save_pretrained(folder)
    assert fails("--reward-model", folder).startswith(f"{folder} was trained with another tokenizer than the policy's")


def test_more_than_one_process_is_refused(fails, monkeypatch):
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    assert fails() == "generation is one process: start it with python, not with torchrun"


NUMBER = "it has to return a finite number (and none above 1e30)"


@pytest.mark.parametrize(
    "function, words",
    [
        ("nothing", "returns None for a response to {row}: " + NUMBER),
        ("text", "returns '1' for a response to {row}: " + NUMBER),
        ("nan", "returns nan for a response to {row}: " + NUMBER),
        ("large", "returns 1e+200 for a response to {row}: " + NUMBER),
        ("long", "returns 100000000000000000...0000000000000000000 for a response to {row}: " + NUMBER),
        ("odd", "returns <Odd instance at 0x> for a response to {row}: " + NUMBER),
        ("longer", "returns something of type int for a response to {row}: " + NUMBER),
        ("leaves_late", "returns leaves for a response to {row}: " + NUMBER),
        ("leaves", "fails on a response to {row} (SystemExit: 0, {world}/rules.py:14)"),
        ("broken", "fails on a response to {row} (ZeroDivisionError: division by zero, {world}/rules.py:7)"),
    ],
)
def test_a_reward_that_is_no_number_names_the_prompt(fails, world, function, words):
    line = re.sub("0x[0-9a-f]+", "0x", fails("--reward-fn", f"{world}/rules.py:{function}", loads=True))
    assert line == "--reward-fn " + words.format(row=f"{world}/pairs.jsonl:1", world=world)


def test_a_reward_file_that_cannot_be_run(fails, tmp_path):
    (tmp_path / "r.py").write_text("import no_such_module\n")
    line = fails("--reward-fn", f"{tmp_path}/r.py:f")
    assert line.startswith(f"--reward-fn {tmp_path}/r.py cannot be run (ModuleNotFoundError: No module named")


def test_numbers_of_any_kind_are_rewards():
    for value in (1, True, 0.5, torch.tensor(0.5)):
        assert generate_reward.call(lambda p, r, value=value: value, "p", "r", "row") == float(value)


# -- chat -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def talk(monkeypatch, capsys):
    """talk(words, lines) -> what is printed behind the greeting."""

    def run(words, *lines):
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        run_script([*FP32, "--chat", "--temperature", "0", "--max-prompt-length", "100", *words], generate)
        greeting, _, said = capsys.readouterr().out.partition("/quit\n")
        run.greeting = greeting
        return said

    return run


@pytest.fixture
def answer(world):
    """answer(conversation or text, adapter on) -> what the tiny model says to it, by the likeliest token."""
    model, tokenizer = load_model(str(world / "model"), torch.float32, "cpu"), load_tokenizer(str(world / "model"))
    lora.load_adapter(model, world / "adapter", "x")

    @torch.no_grad()
    def say(*turns, base=False, limit=256):
        roles = ["user", "assistant"] * len(turns)
        messages = [{"role": role, "content": turn} for role, turn in zip(roles, turns)]
        with lora.use_adapter(model, None if base else "x"):
            ids = argmax_one_by_one(model, prompt_ids(messages, tokenizer, limit), 6)
        return tokenizer.decode(ids, skip_special_tokens=True)

    return say


def test_a_chat_remembers_compares_and_forgets(world, talk, answer):
    words = ["--model", world / "model", "--adapter", world / "adapter", "--max-new-tokens", "6"]
    lines = "hi", "ab", "/base", "cd", "/reset", "/base", "cd", "/quit", "never"
    first = answer("hi")
    second = answer("hi", first, "ab")
    compared, third = answer("hi", first, "ab", base=True), answer("hi", first, "ab", second, "cd")
    afresh = answer("cd")
    assert len({second, compared, third, afresh}) == 4
    hint = "/base needs --adapter and a message to answer"
    assert talk(words, *lines) == "".join(f"{line}\n" for line in (first, second, compared, third, hint, afresh))


def test_a_chat_drops_its_oldest_turn_where_it_gets_too_long(world, talk, answer):
    words = ["--model", world / "model", "--adapter", world / "adapter", "--max-new-tokens", "6"]
    turn = len("user\nhi\n") + 2
    limit = 3 * turn + 30
    said = talk([*words, "--max-prompt-length", limit], *["hi"] * 3).splitlines()
    assert said[0] == answer("hi")
    assert len(said) == 3
    whole = talk(words, *["hi"] * 3).splitlines()
    assert said[:2] == whole[:2]
    tokenizer = load_tokenizer(str(world / "model"))
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": said[0]}] * 2
    assert len(prompt_ids([*messages, messages[0]], tokenizer, 999)) > limit
    assert said[2] == answer("hi", said[1], "hi")


def test_the_commands_of_a_chat(world, talk, answer):
    words = ["--model", world / "model", "--adapter", world / "adapter", "--max-new-tokens", "6"]
    commands = generate_chat.COMMANDS
    assert talk(words, "/help", "hi", "/exit", "never") == f"{commands}\n{answer('hi')}\n"
    assert talk(words, "/rest", "/quit") == f"there is no /rest\n{commands}\n"  # a slip is no message
    assert all(re.search(rf"^{name} ", commands, re.MULTILINE) for name in ("/base", "/reset", "/help", "/quit"))


def interrupt_at(monkeypatch, *places):
    """Ctrl-C as the answers' tokens come: before the nth of all, counted from 1."""
    put, seen = generate_chat.Said.put, []

    def put_or_interrupt(self, value):
        if value.numel() == 1:  # not the prompt
            seen.append(1)
            if len(seen) in places:
                signal.raise_signal(signal.SIGINT)
        put(self, value)

    monkeypatch.setattr(generate_chat.Said, "put", put_or_interrupt)


def test_ctrl_c_stops_the_answer_and_what_was_said_counts(world, talk, answer, monkeypatch):
    words = ["--model", world / "model", "--adapter", world / "adapter", "--max-new-tokens", "6"]
    whole = answer("hi")
    interrupt_at(monkeypatch, 4)
    said = talk(words, "hi", "ab").splitlines()
    assert (said[0], len(whole)) == (whole[:3], 6)
    assert said[1:] == [answer("hi", whole[:3], "ab")]


def test_ctrl_c_before_the_first_word_takes_the_message_back(world, talk, answer, monkeypatch):
    words = ["--model", world / "model", "--adapter", world / "adapter", "--max-new-tokens", "6"]
    interrupt_at(monkeypatch, 1)
    assert talk(words, "hi", "ab").splitlines() == ["", answer("ab")]


def test_ctrl_c_at_the_prompt_ends_the_chat(world, monkeypatch, capsys):
    class Interrupted(io.StringIO):
        def readline(self, *_):
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(sys, "stdin", Interrupted())
    with pytest.raises(SystemExit) as exit:
        run_script([*FP32, "--chat", "--model", world / "model"], generate)
    assert exit.value.code == 130
    assert one_line(capsys) == "generate.py: interrupted"


@pytest.mark.parametrize(
    "own, words, draws, line",
    [
        ({}, [], (0, 1, 0), "temperature 0, the likeliest token each time: the model names no settings; "),
        ({"temperature": 0.6}, [], (0, 1, 0), "temperature 0, "),  # it would not sample by it
        (
            {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 20},
            [],
            (0.6, 0.95, 20),
            "temperature 0.6, top-p 0.95, top-k 20: the model's generation_config.json; ",
        ),
        ({"do_sample": True, "top_k": 64}, [], (1, 1, 64), "temperature 1, top-p 1, top-k 64: "),
        (
            {"do_sample": True, "temperature": 0.6, "top_k": 20},
            ["--temperature", "1"],
            (1, 1, 0),
            "temperature 1, top-p 1",
        ),
        ({"do_sample": True, "top_k": 20}, ["--top-p", "0.5"], (1, 0.5, 0), "temperature 1, top-p 0.5"),
    ],
)
def test_a_chat_draws_by_its_models_settings_and_says_so(own, words, draws, line):
    found, said = generate_chat.draws_of(generate.get_args(["--chat", *words]), GenerationConfig(**own))
    assert found == draws
    assert said.startswith(line)
    assert said.endswith("; --temperature and --top-p change that") == (not words)


def test_the_settings_of_the_folder_reach_the_chat(world, talk, tmp_path, answer, monkeypatch, capsys):
    folder = shutil.copytree(world / "model", tmp_path / "model")
    settings = {"do_sample": True, "temperature": 9.0, "top_k": 1}  # of all that is wild, the likeliest
    own = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(own | settings))
    monkeypatch.setattr(sys, "stdin", io.StringIO("hi\n"))
    run_script([*FP32, "--chat", "--model", folder, "--max-new-tokens", "6"], generate)
    out = capsys.readouterr().out
    assert "\ntemperature 9, top-p 1, top-k 1: the model's generation_config.json; " in out
    assert out.splitlines()[-1] == answer("hi", base=True)


# -- the base of an adapter -------------------------------------------------------------------------------------------


def test_the_base_is_the_one_the_adapter_was_trained_on(world, make, talk, tmp_path, capsys):
    _, named = make(world / "model", world / "pairs.jsonl", "--adapter", world / "adapter")
    words = ["--adapter", world / "adapter", "--prompts", world / "pairs.jsonl", *FP32, "--max-new-tokens", "8"]
    run_script([*words, "--output", tmp_path / "o.jsonl"], generate)
    assert rows_of(tmp_path / "o.jsonl") == named
    assert f"\n{world}/model with {world}/adapter (cpu, float32)\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    "config, problem",
    [
        (None, " is not an adapter folder: adapter_config.json is missing"),
        ("[1]", "/adapter_config.json names no base model: name it with --model"),
        ("{", "/adapter_config.json names no base model: name it with --model"),
        (
            '{"base_model_name_or_path": null}',
            "/adapter_config.json names no base model: name it with --model",
        ),
    ],
)
def test_an_adapter_that_names_no_base(tmp_path, capsys, config, problem):
    if config:
        (tmp_path / "adapter_config.json").write_text(config)
    with pytest.raises(SystemExit) as exit:
        run_script(["--chat", "--adapter", tmp_path], generate)
    assert exit.value.code == 2
    assert one_line(capsys) == f"generate.py: {tmp_path}{problem}"


def test_each_turn_draws_anew_by_the_seed_and_the_base_with_its_turns_chance(toy, talk, tmp_path):
    make_adapter(toy / "model", tmp_path / "adapter", spread=0.05)
    words = ["--model", toy / "model", "--max-new-tokens", "40", "--temperature", "1"]
    adapted, question = [*words, "--adapter", tmp_path / "adapter"], "How do I paint a wooden chair?"
    lines = question, "/base", "/base", "/reset", question
    said = talk(adapted, *lines)
    first, base, again, second = said.splitlines()
    assert base == again == talk(words, question).strip("\n")  # what the base would have said in this place
    assert second != first
    assert talk(adapted, *lines) == said
    assert talk([*adapted, "--seed", "1"], question).strip("\n") != first


def test_without_a_template_each_line_stands_by_itself(world, talk, tmp_path):
    model = shutil.copytree(world / "model", tmp_path / "model")
    char_tokenizer().save_pretrained(model)
    (model / "chat_template.jinja").unlink()
    plain = load_model(str(model), torch.float32, "cpu")
    with torch.no_grad():
        ids = [argmax_one_by_one(plain, [ord(letter) for letter in line], 6) for line in ("ab", "cd")]
    expected = [char_tokenizer().decode(response, skip_special_tokens=True) for response in ids]
    assert talk(["--model", model, "--max-new-tokens", "6"], "ab", "", "cd").splitlines() == expected


def test_a_chat_writes_nothing(world, talk, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    talk(["--model", world / "model", "--max-new-tokens", "6"], "hi")
    assert list(tmp_path.iterdir()) == []


# -- the scripts around it --------------------------------------------------------------------------------------------


def test_the_rule_of_the_example_is_the_toy_worlds():
    polite = generate_reward.load(f"{ROOT}/scripts/reward_polite.py:polite")
    texts = [
        "Thank you. Use a rope.",
        "Use a rope.",
        "PLEASE, do it.",
        "Pleased to.",
        "",
        "dear " + "word " * 15,
        "Welcome!",
    ]
    assert [polite("p", text) for text in texts] == [toy_world.judge("p", text).polite for text in texts]
    assert [polite("p", text) for text in texts] == [1, 0, 1, 0, 0, 0.5, 1]


def loop(tmp_path, toy, **variables):
    environment = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment |= {"MODEL": str(toy / "model"), "PROMPTS": str(toy / "train/helpful_pairs.jsonl"), "DTYPE": "fp32"}
    environment |= {"OUTPUT_DIR": str(tmp_path / "online"), "EVAL_PROMPTS": "none", "ROUNDS": "2", "NUM_SAMPLES": "96"}
    command = ["bash", ROOT / "scripts/online_dpo.sh", "--eval-samples", "0", "--batch-size", "8", "--device", "cpu"]
    environment |= {"LEARNING_RATE": "3e-3"} | variables
    return run_program(command, env=environment)


@pytest.mark.parametrize("rounds", ["round[$(touch ran)]", "1.5", "08", "-1", "0", "1;x", "two", " 1", "99999"])
def test_rounds_are_digits_and_nothing_is_evaluated(rounds, tmp_path):
    environment = os.environ | {"ROUNDS": rounds, "OUTPUT_DIR": str(tmp_path / "online"), "PYTHON": "true"}
    words = ["bash", ROOT / "scripts/online_dpo.sh"]
    done = run_program(words, env=environment)
    assert done.returncode == 2
    assert done.stderr == f"online_dpo.sh: ROUNDS is a number of rounds, 1 or more, and not '{rounds}'\n"
    assert not (tmp_path / "online").exists() and not (ROOT / "ran").exists()


def test_online_dpo_raises_the_reward(toy, tmp_path):
    done = loop(tmp_path, toy)
    assert done.returncode == 0, done.stderr
    rounds = [tmp_path / "online" / f"round_{n}" for n in (1, 2)]
    first, second = (progress_of(folder / "pairs.jsonl")["rm_reward_mean"] for folder in rounds)
    assert first < 0.2
    assert second > first + 0.1
    assert f"rm_reward_mean={first:.4f}" in done.stdout
    assert f"rm_reward_mean={second:.4f}" in done.stdout
    # Round 2 went on with round 1's adapter: drawn with it, trained from it.
    args = json.loads((rounds[1] / "args.json").read_text())
    assert (args["adapter"], args["seed"]) == (str(rounds[0]), 2)
    weights = [(folder / "adapter_model.safetensors").read_bytes() for folder in rounds]
    assert weights[0] != weights[1]
    # Again: refused; with RESUME nothing is left to do, and a third round begins where the second ended.
    again = loop(tmp_path, toy)
    assert again.returncode == 2
    assert again.stderr.startswith(f"online_dpo.sh: {tmp_path}/online holds rounds: ")
    before = snapshot(tmp_path)
    assert loop(tmp_path, toy, RESUME="1").returncode == 0
    assert snapshot(tmp_path) == before
