"""Scripts run in this process, and what a run left."""

import hashlib
import json
import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import dpo_hf_run
from harness import endings

RESULTS = "metrics.jsonl", "adapter_model.safetensors"  # that two runs alike have alike, byte for byte
LN2 = 0.6931471805599453


# -- scripts in this process ------------------------------------------------------------------------------------------


def run_script(argv, script=dpo_hf_run):
    """A script as its last line runs it, under its own name; a user error is SystemExit(2)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{script.__name__}.py"])
        endings.run(script.main, script.get_args([str(word) for word in argv]))


def as_words(changes):
    """{name of a flag: value} as words; True is a switch, None is not given."""
    words = []
    for name, value in changes.items():
        if value is True:
            words.append(f"--{name.replace('_', '-')}")
        elif isinstance(value, list):
            words += [f"--{name.replace('_', '-')}", *value]
        elif value is not None:
            words.append(f"--{name}={value}")
    return words


class Run:
    """One training run in this process: its folder and numbers."""

    def __init__(self, script, **changes):
        run_script(as_words(changes), script)
        self.folder = Path(changes["output_dir"])

    @property
    def lines(self):
        return metrics_of(self.folder)

    @property
    def train(self):
        return [line for line in self.lines if "loss" in line]

    @property
    def evals(self):
        return [line for line in self.lines if "eval_loss" in line]

    @property
    def losses(self):
        return [line["loss"] for line in self.train]

    @property
    def record(self):
        return json.loads((self.folder / "reward_model.json").read_text())

    @property
    def weights(self):
        return adapter_of(self.folder)

    @property
    def bytes(self):
        return adapter_bytes(self.folder)


DPO = dict(
    dtype="fp32",
    device="cpu",
    report_to="none",
    learning_rate=1e-2,
    batch_size=4,
    gradient_accumulation_steps=1,
    eval_samples=4,
    logging_steps=1,
    max_steps=2,
)


def dpo_run(world, folder, **changes):
    """Two updates of dpo_hf_run.py on what write_world wrote."""
    data = dict(model=world / "model", dataset=world / "pairs.jsonl", output_dir=folder)
    return Run(dpo_hf_run, **data | DPO | changes)


def listen():
    """Let this process be asked to end also where the tests run behind `&` or nohup, which has it ignore that."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def ask_to_end(monkeypatch, number, *signals):
    """The `signals` (SIGTERM) reach this process in its update `number`."""
    plain, calls = torch.optim.AdamW.step, []
    listen()

    def step(*given, **named):
        calls.append(1)
        if len(calls) == number:
            for asked in signals or [signal.SIGTERM]:
                os.kill(os.getpid(), asked)
        return plain(*given, **named)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)


# -- what it left -----------------------------------------------------------------------------------------------------


def one_line(capsys):
    """The one line on standard error; anything more or less fails."""
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def metrics_of(folder):
    """The lines of a run's metrics.jsonl."""
    return rows_of(folder / "metrics.jsonl")


def rows_of(path):
    return [json.loads(line) for line in Path(path).read_text("utf-8").splitlines()]


def adapter_of(folder):
    return load_file(folder / "adapter_model.safetensors")


def adapter_bytes(folder):
    return (folder / "adapter_model.safetensors").read_bytes()


def results(folder):
    """The bytes of what a run is compared by."""
    return [(folder / name).read_bytes() for name in RESULTS]


def assert_same_files(one, other, names=RESULTS):
    for name in names:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


def snapshot(folder):
    """{path: hash of its content} of everything below a folder; {} where there is none."""
    paths = [path for path in Path(folder).rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def flip(path):
    """One bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
