"""The fixtures that several test files share: the toy world, tiny worlds, the name of the script."""

import logging
import os
import signal
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach a network
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
import transformers

pytest.register_assert_rewrite("helpers", "machines", "processes", "runs", "tiny_models", "worlds")

from ranks import run_ranks
from safetensors.torch import save_file
from worlds import QUICK, labelled_rows, write_model, write_rows, write_world

import toy_world

transformers.utils.logging.set_verbosity_error()
logging.getLogger("transformers").setLevel(logging.ERROR)
for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:  # as a shell's `&` and nohup have it: tests send it, and wait for it
        signal.signal(number, handler)
LIMIT = 600  # seconds for a test, and for its fixtures: what waits for ever fails, and shows where it waits


def too_long(*_):
    pytest.fail(f"not ended after {LIMIT} s")


def in_time():
    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(LIMIT)
    try:
        return (yield)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


pytest_runtest_setup = pytest.hookimpl(wrapper=True)(in_time)
pytest_runtest_call = pytest.hookimpl(wrapper=True)(in_time)


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """The toy world, built once (about 20 s)."""
    return toy_world.build(tmp_path_factory.mktemp("world") / "toy")


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """What write_world writes, other/ (the model with other weights) and soft.safetensors; no test writes there."""
    folder = write_world(tmp_path_factory.mktemp("world"))
    write_model(folder / "other", seed=5)
    vectors = 0.3 * torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    save_file({"prompt_embeddings": vectors}, folder / "soft.safetensors", metadata={"preference_position": "prefix"})
    return folder


@pytest.fixture(scope="session")
def labelled_world(tmp_path_factory):
    """A tiny Qwen3, 35 pairs to train on and 5 to evaluate on, and two reward models on it."""
    folder = write_world(tmp_path_factory.mktemp("world"))
    train, held_out = labelled_rows(35, seed=1), labelled_rows(5, seed=2)
    write_rows(folder / "train.jsonl", train)
    write_rows(folder / "val.jsonl", held_out)
    write_rows(folder / "train_helpful.jsonl", train[:20])  # five rows with both labels
    write_rows(folder / "train_harmless.jsonl", train[15:])
    for task in ("helpful", "harmless"):
        data = ["--model", folder / "model", f"--train-{task}-path", folder / "train.jsonl"]
        data += [f"--val-{task}-path", folder / "val.jsonl"]
        words = ["--task", task, *data, *QUICK, "--lora-dropout", 0, "--learning-rate", 1e-2]
        words += ["--output-dir", folder / task]
        codes, said = run_ranks("train_rm", words, 1, folder / f"{task}_log")
        assert codes == [0], said
    return folder


@pytest.fixture
def script_name(request, monkeypatch):
    """sys.argv as SCRIPT of the test's module has it: what says a mistake in its flags begins with that name."""
    monkeypatch.setattr(sys, "argv", [request.module.SCRIPT])
