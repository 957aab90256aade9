"""A changed bit, a cut or a missing file in what is read: found and said in one sentence, or the result is the same."""

import random
import shutil
import types

import pytest
from campaigns import (
    DRAFTS,
    LOGS,
    SAMPLE,
    SEED,
    contents,
    damaged,
    difference,
    is_sentence,
    kill_at,
    raw_rows,
    run,
    words_of_run,
)
from worlds import write_rows

import dpo_hf_run
import generate
import learn_prompt
import prepare_data
import toy_world
import train_rm
import train_with_preference_prompt
from formats import written_files
from harness import checkpoints

CASES = 60  # of each kind


def go_on_run(world, folder):
    """A run that was killed behind its second checkpoint, of two that it keeps."""
    words = [*words_of_run("dpo_hf_run", world), "--save-total-limit", 0, "--output-dir", "read"]
    events = run(dpo_hf_run, words, folder / "first").events
    last = max(number for number, what in enumerate(events, 1) if "checkpoint-4.unfinished" in what)
    run(dpo_hf_run, words, folder, kill_at(last + 3))
    for path in [path for pattern in DRAFTS for path in folder.glob(f"read/{pattern}")]:
        shutil.rmtree(path)
    return dpo_hf_run, [*words, "--resume", "auto"]


def sample(world, *words):
    prompts = ["--prompts", world / "train.jsonl", *SAMPLE, "--output", "rows.jsonl"]
    return generate, ["--model", world / "model", *prompts, "--batch-size", 4, *words]


def adapter(world, folder):
    run(dpo_hf_run, [*words_of_run("dpo_hf_run", world), "--output-dir", "read"], folder)
    return sample(world, "--adapter", "read")


def whole_model(world, folder):
    words = words_of_run("dpo_hf_run", world)
    place = words.index("--lora-dropout")
    del words[place : place + 2]
    run(dpo_hf_run, [*words, "--lora-r", 0, "--output-dir", "read", "--save-steps", 0], folder)
    return sample(world, "--model", "read")


def reward_model(world, folder):
    run(train_rm, [*words_of_run("train_rm", world), "--output-dir", "read"], folder)
    return sample(world, "--reward-model", "read")


def soft_prompt(world, folder):
    run(learn_prompt, [*words_of_run("learn_prompt", world), "--output-dir", "read"], folder)
    words = words_of_run("train_with_preference_prompt", world)
    place = words.index("--preference-text")
    words[place : place + 2] = ["--use-prompt-embedding", "--prompt-embedding-path", "read"]
    return train_with_preference_prompt, words


def cache(world, folder):
    words = [*words_of_run("dpo_hf_run", world), "--cache-dir", "read"]
    run(dpo_hf_run, words, folder)
    shutil.rmtree(folder / "out")
    return dpo_hf_run, words


def unfinished_rows(world, folder):
    script, words = sample(world, "--output", "read/rows.jsonl")
    events = run(script, words, folder / "first").events
    run(script, words, folder, kill_at(len(events) - 3))
    return script, words


def prepared(world, folder):
    """Replaced by a new run: what was changed since is the user's, and stays."""
    old, new = (write_rows(folder / f"{name}.jsonl", raw_rows(60, name)) for name in ("old", "new"))
    run(prepare_data, ["--input", old, "--output-dir", "read"], folder)
    return prepare_data, ["--input", new, "--output-dir", "read", "--overwrite"]


def toy(world, folder):
    main = lambda _: print(toy_world.build("read"))  # noqa: E731
    script = types.SimpleNamespace(__name__="toy_world", get_args=list, main=main)
    run(script, [], folder, prepare=few_examples)
    return script, []


def few_examples():
    toy_world.EXAMPLES = 24, 24  # what takes its time: the supervised run


KINDS = [go_on_run, adapter, whole_model, reward_model, soft_prompt, cache, unfinished_rows, prepared, toy]


@pytest.mark.parametrize("make", KINDS, ids=lambda make: make.__name__)
def test_damage(make, labelled_world, tmp_path, tally):
    draw = random.Random(f"{SEED} damage {make.__name__}")
    source = tmp_path / "source"
    source.mkdir()
    script, words = make(labelled_world, source)
    whole = shutil.copytree(source, tmp_path / "whole")
    ended = run(script, words, whole, prepare=few_examples)
    assert ended.code == 0, ended
    tally.command, expected = ended.command, contents(whole, LOGS)
    names = [name for name in contents(source) if name.startswith("read/")]
    assert names
    for case in range(CASES):
        name, kind = names[case % len(names)], draw.choice(["bit", "bit", "bit", "cut", "gone"])
        folder = shutil.copytree(source, tmp_path / "case")
        path = folder / name
        before = path.read_bytes()
        after = damaged(before, kind, draw) if before else b"{"
        path.unlink() if kind == "gone" else path.write_bytes(after)
        ended = run(script, words, folder, prepare=few_examples)
        found = difference(contents(folder, LOGS) | {name: b""}, expected | {name: b""})
        if is_sentence(ended) or "/metrics.jsonl is not as checkpoint-" in ended.out:
            tally.count("found")
        elif ended.code == 0 and not found:
            tally.count("same result")
        else:
            byte = next((n for n, (one, other) in enumerate(zip(before, after)) if one != other), len(after))
            tally.fail(f"{name}: {kind} at byte {byte} of {len(before)}: {found}; {ended}")
        shutil.rmtree(folder)
    tally.done()


def is_found(folder):
    """Whether damage in it is found by what reads it."""
    if folder.name.startswith("checkpoint-"):
        return checkpoints.find(folder.parent, "auto", lambda _: None) != folder
    return written_files.damage(folder, *written_files.ADAPTER, *written_files.WHOLE_MODEL, "reward_model.json")


READ = {go_on_run: "read/checkpoint-4", adapter: "read", whole_model: "read", reward_model: "read"}
PLACES = 300  # bytes of each file


@pytest.mark.parametrize("make", READ, ids=lambda make: make.__name__)
def test_every_changed_bit_is_found(make, labelled_world, tmp_path, tally):
    draw = random.Random(f"{SEED} bits {make.__name__}")
    make(labelled_world, tmp_path)
    folder = tmp_path / READ[make]
    names = [*written_files.ADAPTER, "config.json", "model.safetensors", "reward_model.json"]
    names += ["state.json", "training.safetensors"]
    for path in [folder / name for name in names if (folder / name).exists()]:
        content = path.read_bytes()
        for _ in range(PLACES):
            after = damaged(content, draw.choice(["bit", "bit", "cut"]), draw)
            path.write_bytes(after)
            tally.count("damaged")
            if not is_found(folder):
                tally.fail(f"{path} of {len(content)} bytes: {len(after)} bytes, not found")
        path.write_bytes(content)
        assert not is_found(folder)
    tally.done()
