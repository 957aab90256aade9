"""What holds for each of the five training scripts: a stopped run goes on to the same bytes, as the same run or not at
all; gradient checkpointing checkpoints.  (That any number of ranks is one process: test_ranks.py.)
"""

import fcntl
import json
import os
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
import transformers
from ranks import TRAINERS
from runs import RESULTS, ask_to_end, assert_same_files, flip, metrics_of, one_line, run_script, snapshot
from safetensors.torch import load_file
from worlds import QUICK, data_of, words_of

from formats import written_files
from harness import score_cache

SIZE = ["--batch-size", 4, "--gradient-accumulation-steps", 2, "--learning-rate", 1e-3]  # 10 updates in 2 epochs
PREFERENCES = [script for script in TRAINERS if script not in ("train_rm", "learn_prompt")]  # these have a reference


def test_no_script_is_forgotten():
    assert "dpo_hf_run learn_prompt train_rm train_safe_mm_dpo train_with_preference_prompt".split() == TRAINERS


@pytest.fixture
def train(labelled_world, monkeypatch, capsys):
    """train(script, output folder, words ...) -> what it said: a run in this process; LoRA has dropout."""

    def run(script, out, *words):
        capsys.readouterr()
        adapter = "--lora-r" not in words
        data = words_of(script, labelled_world, dropout=0.1) if adapter else data_of(script, labelled_world)
        where = ["--model", labelled_world / "model", *data, "--output-dir", out]
        run_script([*where, *QUICK, *SIZE, *words], __import__(script))
        return capsys.readouterr().out

    return run


@pytest.fixture
def refused(train, capsys):
    """refused(script, folder, words ...) -> the one sentence of a resume that changes no file."""

    def run(script, out, *words):
        before = snapshot(out)
        with pytest.raises(SystemExit) as ended:
            train(script, out, "--resume", "auto", *words)
        assert ended.value.code == 2
        assert snapshot(out) == before
        return one_line(capsys)

    return run


SIGNALS = {"dpo_hf_run": (signal.SIGTERM, 143), "train_rm": (signal.SIGHUP, 129)}  # of the others Ctrl-C


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """stopped(script, train) -> the folder of a run that Ctrl-C or SIGTERM ended after its third update; made once."""
    folder = tmp_path_factory.mktemp("stopped")

    def run(script, train):
        if not (folder / script).exists():
            with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
                asked, code = SIGNALS.get(script, (signal.SIGINT, 130))
                ask_to_end(patch, 3, asked)
                train(script, folder / script)
            assert ended.value.code == code
            assert [path.name for path in (folder / script).glob("checkpoint-*")] == ["checkpoint-3"]
        return folder / script

    return run


@pytest.mark.parametrize("script", TRAINERS)
def test_a_stopped_run_goes_on_to_the_same_bytes(script, train, stopped, tmp_path):
    """--dtype auto, which is bf16 where the processor has it, is the checkpoint's type in a run that goes on."""
    train(script, tmp_path / "whole")
    shutil.copytree(stopped(script, train), tmp_path / "stopped")
    said = train(script, tmp_path / "stopped", "--dtype", "auto", "--resume", "auto")
    assert f"resumed from {tmp_path / 'stopped/checkpoint-3'}" in said and "(cpu, float32)" in said
    record = ["reward_model.json"] if script == "train_rm" else []
    assert_same_files(tmp_path / "stopped", tmp_path / "whole", [*RESULTS, *record])
    steps = [line["step"] for line in metrics_of(tmp_path / "whole")]
    assert max(steps) == 10 and len(steps) > 10


@pytest.mark.parametrize("script", TRAINERS)
def test_a_second_run_in_a_folder_is_refused_while_the_first_writes(script, refused, stopped, train, tmp_path):
    folder = stopped(script, train)
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write('{"host": "h", "pid": 7, "since": "noon"}')
        lock.flush()
        said = refused(script, folder)
    sentence = f"--output-dir {folder} is being written by another run (process 7 on h, since noon)"
    assert said == f"{script}.py: {sentence}: wait for it, or choose another"
    (folder / ".lock").unlink()


@pytest.mark.parametrize("script", TRAINERS)
def test_resume_takes_the_flags_that_nobody_gives_from_the_run(script, train, stopped, tmp_path):
    """Nothing is typed but where the run is, and what kills need."""
    train(script, tmp_path / "whole")
    shutil.copytree(stopped(script, train), tmp_path / "stopped")
    run_script(["--output-dir", tmp_path / "stopped", "--resume", "auto"], __import__(script))
    assert_same_files(tmp_path / "stopped", tmp_path / "whole", RESULTS)


@pytest.mark.parametrize("script", TRAINERS)
def test_logs_of_a_killed_run_go_back_to_its_checkpoint(script, train, tmp_path):
    more = ["--save-steps", "2", "--logging-steps", "1"]
    train(script, tmp_path / "whole", *more)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        ask_to_end(patch, 4, signal.SIGINT, signal.SIGINT)  # at once, when there is a third line
        train(script, tmp_path / "killed", *more)
    state = json.loads((tmp_path / "killed/checkpoint-2/state.json").read_text())
    logs = ["metrics.jsonl", "lambda.jsonl"] if script == "train_safe_mm_dpo" else ["metrics.jsonl"]
    assert list(state["logs"]) == logs
    train(script, tmp_path / "killed", *more, "--resume", "auto")
    assert_same_files(tmp_path / "killed", tmp_path / "whole", [*RESULTS, *logs])
    sizes = [(tmp_path / f"whole/checkpoint-{step}/state.json").stat().st_size for step in (6, 10)]
    assert sizes[1] - sizes[0] < 60, "the history is not in it, but how long the logs are, and how far the run is"


@pytest.mark.parametrize("script", TRAINERS)
def test_a_checkpoint_of_another_layout_is_refused_in_one_sentence(script, refused, train, stopped, tmp_path):
    """As versions before the harness wrote them; files and hashes are whole."""
    shutil.copytree(stopped(script, train), tmp_path / "stopped")
    checkpoint = tmp_path / "stopped/checkpoint-3"
    state = json.loads((checkpoint / "state.json").read_text())
    del state["identity"]["layout"]
    (checkpoint / "state.json").write_text(json.dumps(state))
    written_files.write(checkpoint, written_files.entries(checkpoint))
    line = f"{script}.py: {checkpoint} is of another version of the script, which has no layout: start anew"
    assert refused(script, tmp_path / "stopped") == line


@pytest.mark.parametrize("script", [script for script in TRAINERS if script != "learn_prompt"])
def test_a_checkpoint_holds_an_adapter_that_peft_can_load(script, train, stopped):
    """The last one is a model to try, too: its adapter is the trained weights that it resumes from."""
    checkpoint = stopped(script, train) / "checkpoint-3"
    adapter = load_file(checkpoint / "adapter_model.safetensors")
    trained = load_file(checkpoint / "training.safetensors")
    numbers = sorted(value.double().sum().item() for name, value in trained.items() if name.startswith("parameter."))
    assert sorted(value.double().sum().item() for value in adapter.values()) == numbers
    assert (checkpoint / "adapter_config.json").exists()


WEIGHTS = {
    "dpo_hf_run": "fp32",
    "train_rm": "bf16",
    "train_safe_mm_dpo": "fp32",
    "train_with_preference_prompt": "bf16",
}


@pytest.mark.parametrize(("script", "dtype"), WEIGHTS.items())
def test_all_weights_go_on_to_the_same_bytes(script, dtype, train, tmp_path):
    """Stopped in the second epoch, behind an evaluation."""
    words = ["--lora-r", 0, "--dtype", dtype]
    train(script, tmp_path / "whole", *words)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        ask_to_end(patch, 7, signal.SIGINT)
        train(script, tmp_path / "stopped", *words)
    said = train(script, tmp_path / "stopped", *words, "--resume", "auto")
    assert f"resumed from {tmp_path / 'stopped/checkpoint-7'}" in said
    record = ["reward_model.json"] if script == "train_rm" else []
    assert_same_files(tmp_path / "stopped", tmp_path / "whole", ["metrics.jsonl", "model.safetensors", *record])


@pytest.mark.parametrize("script", [script for script in TRAINERS if script != "train_rm"])
def test_ctrl_c_while_a_frozen_model_scores_keeps_what_it_has(script, train, tmp_path, monkeypatch):
    """And only the pairs of the run's updates and those held out are scored."""
    words, out = ["--max-steps", 1, "--alpha", 1, "--teacher", "ref"], tmp_path / "stopped"
    words = words if script == "train_with_preference_prompt" else words[:2]
    said = train(script, tmp_path / "whole", *words)
    of = re.findall(r"^(\w+) [a-z-]+ of (\d+) pairs: computed now and kept", said, re.MULTILINE)
    roles = {"train_safe_mm_dpo": "reference helpful harmless", "train_with_preference_prompt": "reference prompted"}
    assert of == [(role, "13") for role in roles.get(script, "reference").split()]  # 8 and 5, of 40
    plain, calls = score_cache.pad, []

    def interrupted(*given, **named):
        calls.append(1)
        if len(calls) == 2:  # of four passes
            os.kill(os.getpid(), signal.SIGINT)
        return plain(*given, **named)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # where the tests run behind `&` it is ignored
        patch.setattr(score_cache, "pad", interrupted)
        train(script, out, *words)
    assert ended.value.code == 130 and [path.name for path in out.iterdir()] == ["cache"]
    assert "reference log-probs of 13 pairs: 8 read from" in train(script, out, *words)
    assert_same_files(out, tmp_path / "whole")


def other_base(folder, world):
    shutil.copytree(world / "model", folder / "other")
    flip(folder / "other/model.safetensors")
    return ["--model", folder / "other"]


def other_settings(folder, world):
    """The same weights, which compute something else."""
    shutil.copytree(world / "model", folder / "other")
    config = json.loads((folder / "other/config.json").read_text())
    (folder / "other/config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    return ["--model", folder / "other"]


OTHERS = {
    "base": (other_base, "base model was"),
    "config": (other_settings, "base model was"),
    "data": (lambda *_: ["--num-samples", 14], "data was"),
    "seed": (lambda *_: ["--seed", 1], "seed was 42 and is 1"),
    "type": (lambda *_: ["--dtype", "bf16"], "dtype was torch.float32 and is torch.bfloat16"),
    "rate": (lambda *_: ["--learning-rate", 2e-3], "learning_rate was 0.001 and is 0.002"),
    "epochs": (lambda *_: ["--epochs", 3], "epochs was 2 and is 3"),
    "updates": (lambda *_: ["--max-steps", 10], "max_steps was 0 and is 10"),
    "size": (lambda *_: ["--batch-size", 2], "pairs per update (batch size x accumulation x ranks) was 8 and is 4"),
}


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("script", TRAINERS)
def test_another_run_is_refused(script, other, train, stopped, refused, labelled_world, tmp_path):
    change, difference = OTHERS[other]
    out = stopped(script, train)
    sentence = refused(script, out, *change(tmp_path, labelled_world))
    assert sentence.startswith(f"{script}.py: {out / 'checkpoint-3'} is of another run: {difference}")
    assert sentence.endswith("start it the same way")


OWN = {
    "dpo_hf_run": ("--beta", "--loss", "--lora-r"),
    "learn_prompt": ("--beta", "--num-virtual-tokens", "--preference-position"),
    "train_rm": ("--center-rewards", "--classification-loss-weight", "--lora-alpha"),
    "train_safe_mm_dpo": ("--lambda-lr", "--cost-prompts", "--cost-every"),
    "train_with_preference_prompt": ("--alpha", "--teacher", "--preference-text"),
}
VALUES = {"--loss": "hinge", "--preference-position": "before-response", "--cost-prompts": "all", "--teacher": "ref"}


@pytest.mark.parametrize(("script", "flag"), [(script, flag) for script in OWN for flag in OWN[script]])
def test_a_flag_of_its_own_that_matters_is_refused(script, flag, train, stopped, refused):
    sentence = refused(script, stopped(script, train), flag, VALUES.get(flag, 3))
    assert f"is of another run: {flag[2:].replace('-', '_')} was" in sentence


@pytest.mark.parametrize("script", PREFERENCES)
def test_another_base_is_refused_where_nothing_but_the_policy_stands_on_it(
    script,
    train,
    refused,
    labelled_world,
    tmp_path,
):
    """The reference is a model of its own, and no reward model nor KL is asked for."""
    words = ["--max-steps", 2, "--save-steps", 1, "--ref-model-path", labelled_world / "model"]
    alone = {"train_safe_mm_dpo": ["--own-pairs", 0, "--lambda-init", 0, "--w", 0, "--kl-coeff", 0]}
    alone["train_with_preference_prompt"] = ["--lambda-kl", 0]
    words += alone.get(script, [])
    train(script, tmp_path / "out", *words)
    sentence = refused(script, tmp_path / "out", *words, *other_base(tmp_path, labelled_world))
    assert "checkpoint-2 is of another run: base model was" in sentence


def test_responses_are_sampled_as_long_in_the_run_that_goes_on(train, stopped, refused):
    """The rows are the same within --max-length 60; what the policy may say to a prompt is not."""
    sentence = refused("train_safe_mm_dpo", stopped("train_safe_mm_dpo", train), "--max-length", 60)
    assert "is of another run: tokens of a sampled response was 32 and is 28" in sentence


MAY_DIFFER = """--batch-size 2 --gradient-accumulation-steps 4 --tokens-per-microbatch 200 --gradient-checkpointing on
    --optimizer-offload --ddp-timeout 60 --logging-steps 2 --eval-steps 2 --save-steps 4 --save-total-limit 1
    --skip-invalid --trust-remote-code""".split()


@pytest.mark.parametrize("script", TRAINERS)
def test_what_may_differ_goes_on(script, train, stopped, labelled_world, tmp_path):
    """Also a model and data that lie elsewhere, and another place to log to."""
    shutil.copytree(stopped(script, train), tmp_path / "run")
    moved = Path(shutil.copytree(labelled_world, tmp_path / "moved"))
    words = words_of(script, labelled_world, dropout=0.1)
    words = [moved / word.relative_to(labelled_world) if isinstance(word, Path) else word for word in words]
    words += ["--model", moved / "model", "--logging-dir", tmp_path / "logs"]
    said = train(script, tmp_path / "run", "--resume", "auto", *words, *MAY_DIFFER)
    assert "resumed from" in said and f"saved to {tmp_path / 'run'}" in said
    assert metrics_of(tmp_path / "run")[-1]["step"] == 10


@pytest.mark.parametrize("script", TRAINERS)
def test_gradient_checkpointing_runs_each_block_again_and_changes_nothing(script, train, tmp_path, monkeypatch):
    """Of two blocks, in one pass with gradient."""
    layer, calls = transformers.models.qwen3.modeling_qwen3.Qwen3MLP, []
    plain = layer.forward

    def counted(self, states):
        if self.training and torch.is_grad_enabled():  # the probe of a model asks for gradients in eval mode
            calls.append(self)
        return plain(self, states)

    monkeypatch.setattr(layer, "forward", counted)
    words, counts = ["--max-steps", 1, "--batch-size", 8, "--gradient-accumulation-steps", 1, "--eval-samples", 0], []
    for setting in ("off", "on"):
        calls.clear()
        said = train(script, tmp_path / setting, *words, "--gradient-checkpointing", setting)
        assert ("gradient checkpointing: on" in said.splitlines()) == (setting == "on")
        counts.append(len(calls))
    assert counts == [2, 4]
    assert_same_files(tmp_path / "on", tmp_path / "off")
