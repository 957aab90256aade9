"""A user's mistakes through the whole script: one sentence, exit code 2, nothing written; a run that goes non-finite:
exit code 3 and no weights; and what a good run leaves.
"""

import argparse
import importlib
import io
import json
import math
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from helpers import ROOT
from processes import end_of, environment, run_program, start
from runs import LN2, dpo_run, one_line, run_script, snapshot
from safetensors.torch import load_file, save_file
from transformers import TrainerState
from worlds import BROKEN, char_tokenizer, edit, strings, write_model, write_rows

import dpo_hf_run
import reward_models
from formats.model_files import ModelError, base_of, load_model, load_tokenizer
from harness import metrics_log, run_files
from packing import hold_out
from preference_data import fingerprint, load_pairs


@pytest.fixture(scope="session")
def finished(world, tmp_path_factory):
    """A folder that holds a run of rank 4; tests copy it or leave it alone."""
    return dpo_run(world, tmp_path_factory.mktemp("finished") / "run", lora_r=4, save_merged=True)


@pytest.fixture
def fails(world, tmp_path, capsys):
    """Run the script with flags that have to fail; its one line on standard error, and nothing written."""

    def run_and_fail(*words, code=2, output_dir=None):
        output_dir = Path(output_dir or tmp_path / "out")
        there, before = output_dir.exists(), snapshot(output_dir)
        capsys.readouterr()
        defaults = ["--model", world / "model", "--dataset", world / "pairs.jsonl", "--output-dir", output_dir]
        defaults += ["--device", "cpu", "--dtype", "fp32", "--report-to", "none", "--learning-rate", "1e-2"]
        with pytest.raises(SystemExit) as exit:
            run_script([*defaults, *words])
        assert exit.value.code == code
        if code == 2:
            assert output_dir.exists() == there
            assert snapshot(output_dir) == before
        line = one_line(capsys)
        assert line.startswith("dpo_hf_run.py: ")
        return line.removeprefix("dpo_hf_run.py: ")

    return run_and_fail


# -- data -------------------------------------------------------------------------------------------------------------


def test_a_data_file_that_is_missing(fails, tmp_path):
    assert fails("--dataset", tmp_path / "none.jsonl") == f"there is no file {tmp_path}/none.jsonl: check the path"


def test_an_eval_file_that_is_missing(fails, tmp_path):
    missing = f"there is no file {tmp_path}/none.jsonl: check the path"
    assert fails("--eval-dataset", tmp_path / "none.jsonl") == f"{missing} (without validation: --eval-samples 0)"


def test_line_17_of_3000_that_is_not_json(fails, tmp_path):
    rows = [strings(n) for n in range(3000)]
    rows[16] = '{"prompt": "q'
    line = fails("--dataset", write_rows(tmp_path / "rows.jsonl", rows), "--num-samples", "0")
    assert line.startswith(f"{tmp_path}/rows.jsonl:17: not JSON")
    assert line.endswith("; mend the row, or leave such rows out with --skip-invalid")


def test_a_row_without_chosen(fails, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [strings(1), {"prompt": "q", "rejected": "a"}])
    mend = "mend the row, or leave such rows out with --skip-invalid"
    assert fails("--dataset", path) == f"{path}:2: `chosen` is missing; {mend}"


def test_nothing_usable(fails, tmp_path):
    path = write_rows(
        tmp_path / "rows.jsonl", [strings(1) | {"chosen": ""}, strings(2) | dict(chosen="a", rejected="a")]
    )
    assert fails("--dataset", path) == (
        f"{path} has 2 rows and no usable pair "
        "(1 because the chosen response is empty, 1 because the two responses are equal)"
    )


def test_messages_for_a_model_without_a_chat_template(fails, world, tmp_path):
    model = shutil.copytree(world / "model", tmp_path / "model")
    char_tokenizer().save_pretrained(model)
    (model / "chat_template.jinja").unlink()
    line = fails("--model", model, "--chat-template-strings")
    assert line == f"{world}/pairs.jsonl:1 needs a chat template and this tokenizer has none: use an instruct model's"


@pytest.mark.parametrize("samples", [24, 1000])
def test_eval_samples_that_leave_nothing_to_train_on(fails, samples):
    line = fails("--eval-samples", samples)
    assert line == f"--eval-samples {samples} leaves nothing to train on: make it smaller"


def test_many_answers_to_one_prompt_are_no_mistake_of_the_user(world, tmp_path):
    # By default a tenth is held out, by whole prompts: with a single prompt that would be everything.
    rows = [strings(n) | {"prompt": "same "} for n in range(20)]
    result = dpo_run(world, tmp_path / "out", dataset=write_rows(tmp_path / "rows.jsonl", rows), eval_samples=None)
    assert len(result.train) == 2


# -- models -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("breaking", BROKEN)
def test_a_model_folder_that_cannot_be_used(fails, world, tmp_path, monkeypatch, breaking):
    monkeypatch.chdir(tmp_path)
    model = shutil.copytree(world / "model", tmp_path / "broken")
    damage, said = BROKEN[breaking]
    damage(model)
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))  # what would be asked would be allowed
    line = fails("--model", model)
    assert str(model) in line and said in line
    assert not re.search(r"[.!?] [A-Z]", line), "more than one sentence"
    assert not (model / "ran").exists() and not (tmp_path / "pickle_ran").exists()


@pytest.mark.parametrize(
    "breaking",
    [
        "no model.safetensors",
        "weights cut off",
        "no config.json",
        "fewer tokens than the tokenizer",
        "quantised to fp8",
        "fewer positions than --max-length",
    ],
)
def test_a_reference_folder_that_cannot_be_used(fails, world, tmp_path, breaking):
    model, (damage, said) = shutil.copytree(world / "model", tmp_path / "broken"), BROKEN[breaking]
    damage(model)
    line = fails("--ref-model-path", model)
    assert str(model) in line and said in line


def test_weights_that_the_config_has_no_place_for_are_said_in_one_line(world, tmp_path, capsys):
    model = shutil.copytree(world / "model", tmp_path / "model")
    edit(model / "config.json", num_hidden_layers=1, layer_types=None, max_window_layers=None)
    number = sum(".layers.1." in name for name in load_file(model / "model.safetensors"))
    load_model(str(model), torch.float32, "cpu")
    said = (
        f"{model} has {number} weights (first: model.layers.1.input_layernorm.weight) that its config.json has no place"
    )
    assert said in one_line(capsys)


SCRIPTS = {
    "train_rm": "--task harmless --train-harmless-path {pairs} --eval-samples 0 --output-dir {out}",
    "train_safe_mm_dpo": "--train-helpful-path {pairs} --eval-samples 0 --lambda-init 0 --w 0 --output-dir {out}",
    "train_with_preference_prompt": "--dataset-path {pairs} --preference-text polite --output-dir {out}",
    "learn_prompt": "--dataset-path {pairs} --preference-text polite --output-dir {out}",
    "evaluate_alignment": "--prompts {pairs} --max-new-tokens 97 --output-dir {out}",
    "generate": "--prompts {pairs} --max-new-tokens 97 --output {out}/rows.jsonl",
}
TOO_LONG = dict.fromkeys(SCRIPTS, "--max-length 512") | {
    "train_with_preference_prompt": "--max-length 300",
    **dict.fromkeys(("evaluate_alignment", "generate"), "a prompt of 5 tokens and --max-new-tokens 97"),
}


@pytest.mark.parametrize("breaking", ["fewer positions than --max-length", "quantised to fp8"])
@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_refuses_such_a_model_before_it_loads(world, tmp_path, capsys, name, breaking):
    model = shutil.copytree(world / "model", tmp_path / "broken")
    BROKEN[breaking][0](model)
    (model / "model.safetensors").unlink()  # whoever reads the weights says something else
    words = SCRIPTS[name].format(pairs=world / "pairs.jsonl", out=tmp_path / "out").split()
    with pytest.raises(SystemExit) as exit:
        run_script(["--model", model, "--device", "cpu", *words], importlib.import_module(name))
    line = one_line(capsys)
    assert exit.value.code == 2 and not (tmp_path / "out").exists()
    too_long = f"{TOO_LONG[name]} is more than the 100 positions of the model {model}"
    assert (too_long if "positions" in breaking else BROKEN[breaking][1]) in line


RECORD = {"task": "helpful", "base_model": "some/base", "base_sha256": "", "calibrated": True, "sha256": {}}
RECORD |= {"pictures": None, "validation": {"score_std": 0.5, "safe_score": 1.0, "harmful_score": -1.5}}
WRONG_RECORDS = [
    dict(task="Helpful"),
    dict(task=["helpful"]),
    dict(base_sha256=None),
    dict(base_model=5),
    dict(base_model=""),
    dict(calibrated=None),
    dict(calibrated="yes"),
    dict(calibrated=1),
    dict(validation=5),
    dict(validation=[0.5]),
    dict(validation={"score_std": [0.5]}),
    dict(validation={"score_std": "0.5"}),
    dict(validation={"score_std": 10**400}),
    dict(validation={"score_std": math.nan}),
    dict(validation={"safe_score": math.inf}),
    dict(sha256="0"),
    dict(sha256=[1]),
    dict(sha256={"config.json": 5}),
    dict(pictures=5),
]


@pytest.mark.parametrize("changes", WRONG_RECORDS, ids=lambda changes: str(changes)[:40])
def test_a_reward_models_record_of_other_types_is_one_sentence(world, tmp_path, changes):
    folder, tokenizer = shutil.copytree(world / "model", tmp_path / "rm"), load_tokenizer(world / "model")
    path = folder / "reward_model.json"
    path.write_text(json.dumps(RECORD))
    assert reward_models.read_record(folder, "helpful", tokenizer) == RECORD
    path.write_text(json.dumps(RECORD | changes))
    (name,) = changes
    with pytest.raises(reward_models.RewardModelError, match=f"^{path} says {name}=.*, and it has to be ") as error:
        reward_models.read_record(folder, "helpful", tokenizer)
    assert len(str(error.value)) < len(str(path)) + 200  # no 400 digits


@pytest.mark.parametrize("name", ["base_sha256", "calibrated", "validation"])
def test_a_reward_models_record_that_lacks_a_value(world, tmp_path, name):
    folder, tokenizer = shutil.copytree(world / "model", tmp_path / "rm"), load_tokenizer(world / "model")
    (folder / "reward_model.json").write_text(json.dumps({key: RECORD[key] for key in RECORD if key != name}))
    if name == "validation":  # as of a model that was not validated
        record = reward_models.read_record(folder, "helpful", tokenizer)
        with pytest.raises(reward_models.RewardModelError, match="needs a harmless model that was validated"):
            reward_models.check_threshold(argparse.Namespace(cost_threshold="auto"), record)
        with pytest.raises(reward_models.RewardModelError, match="--score-units spread needs the validation scores of"):
            reward_models.spread(record, folder)
    else:
        with pytest.raises(reward_models.RewardModelError, match=f"says {name}=None"):
            reward_models.read_record(folder, "helpful", tokenizer)


@pytest.mark.parametrize("text", ["[" * 5000, '{"task": "helpful", "task": "harmless"}', "[]", "5", "1" * 5000, "\xff"])
def test_a_reward_models_record_that_is_none(tmp_path, text):
    (tmp_path / "reward_model.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(reward_models.RewardModelError, match="is no reward model"):
        reward_models.read_record(tmp_path, "helpful", char_tokenizer())


def test_a_reward_models_tokenizer_runs_no_code_that_was_not_allowed(world, tmp_path, monkeypatch):
    folder = shutil.copytree(world / "model", tmp_path / "rm")
    (folder / "reward_model.json").write_text(json.dumps(RECORD))
    BROKEN["a tokenizer of its own code"][0](folder)
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))  # transformers would ask, and take this for a yes
    with pytest.raises(ModelError, match="comes with code of its own: read it, and pass --trust-remote-code"):
        reward_models.read_record(folder, "helpful", char_tokenizer())
    assert not (folder / "ran").exists()


def test_one_file_alone_loads_models_and_tokenizers():
    """So that one place decides about --trust-remote-code, which transformers else asks about on standard input."""
    loads = re.compile(r"Auto(Config|Model|Tokenizer)|(?<!Prompt)Config\.from_pretrained")
    ours = [*ROOT.glob("*.py"), *ROOT.glob("[fht]*/[a-z]*.py")]
    loading = [path for path in ours if path.parent.name != "tests" and loads.search(path.read_text("utf-8"))]
    assert [path.relative_to(ROOT).as_posix() for path in loading] == ["formats/model_files.py"]
    text = loading[0].read_text("utf-8")
    # One for all that is loaded, one for skeletons; the third reads the generation_config.json that was just written.
    assert len(re.findall(r"\.from_(pretrained|config)\b", text)) == 3
    assert len(re.findall(r"_from, Auto\w+, path, trust_remote_code=trust_remote_code\)", text)) == 2
    assert 'options |= {"dtype": dtype, "trust_remote_code": trust_remote_code}' in text


# What libraries write to standard error by themselves shows only in a process of its own; a process takes seconds.
@pytest.fixture(scope="module")
def processes(world, tmp_path_factory):
    """{name: (exit code, lines on standard error, whether an output folder is there)}; all of them at once."""
    folder = tmp_path_factory.mktemp("processes")
    no_weights = shutil.copytree(world / "model", folder / "no_weights")
    (no_weights / "model.safetensors").unlink()
    other_shapes = shutil.copytree(world / "model", folder / "other_shapes")
    edit(other_shapes / "config.json", intermediate_size=48)
    cases = {
        "model id": ["--model", "someone/some-model", "--dataset", world / "pairs.jsonl"],
        "data id": ["--model", world / "model", "--dataset", "someone/some-pairs"],
        "no weights": ["--model", no_weights, "--dataset", world / "pairs.jsonl"],
        "other shapes": ["--model", other_shapes, "--dataset", world / "pairs.jsonl"],
    }
    script = ROOT / "dpo_hf_run.py"
    running = {
        name: start(
            [sys.executable, script, *words, "--output-dir", folder / name, "--device", "cpu"],
            env=environment(HF_HOME=str(folder / "home")),
            cwd=folder,
        )
        for name, words in cases.items()
    }
    outcomes = {}
    for name, process in running.items():
        done = end_of(process)
        outcomes[name] = done.returncode, done.stderr.splitlines(), (folder / name).exists()
    return outcomes


@pytest.mark.parametrize(
    "name, beginning, advice",
    [
        ("model id", "dpo_hf_run.py: no tokenizer at someone/some-model", "folder"),
        ("data id", "dpo_hf_run.py: there is no file someone/some-pairs, and ", "name a .jsonl file"),
        ("no weights", "dpo_hf_run.py: no model at ", "model.safetensors"),
        ("other shapes", "dpo_hf_run.py: model.layers.0.mlp.down_proj.weight of ", "is (32, 64), and its config.json"),
    ],
)
def test_without_hub_or_weights_a_process_says_one_sentence(processes, name, beginning, advice):
    code, lines, written = processes[name]
    assert (code, len(lines), written) == (2, 1, False), lines
    assert lines[0].startswith(beginning)
    assert advice in lines[0]


# -- adapters ---------------------------------------------------------------------------------------------------------


def test_lora_target_modules_that_match_nothing(fails):
    assert fails("--lora-target-modules", "nothing_matches", "nor_this") == (
        "no linear layer of this model is called nothing_matches or nor_this: names for --lora-target-modules are "
        "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"
    )


def change_config(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_weights(folder, change):
    path = folder / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)


FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
WRONG_ADAPTERS = {
    "other rank": (lambda f: change_config(f, r=8), "expected (8, 32)"),
    "other targets": (
        lambda f: change_config(f, target_modules=["fc1"]),
        "no linear layer of this model is called fc1",
    ),
    "keys missing": (lambda f: change_weights(f, lambda s: {k: v for k, v in s.items() if k != FIRST}), FIRST),
    "foreign keys": (lambda f: change_weights(f, lambda s: s | {"other.weight": s[FIRST].clone()}), "other.weight"),
    "a method that is not done here": (lambda f: change_config(f, use_dora=True), "use_dora=True"),
    "not LoRA": (lambda f: change_config(f, peft_type="IA3"), "IA3"),
    "no config": (lambda f: (f / "adapter_config.json").unlink(), "adapter_config.json is missing"),
    "no weights": (lambda f: (f / "adapter_model.safetensors").unlink(), "adapter_model.safetensors is missing"),
    "config that is no JSON": (lambda f: (f / "adapter_config.json").write_text("{"), "cannot be read as an adapter"),
    "weights cut off": (lambda f: os.truncate(f / "adapter_model.safetensors", 999), "cannot be read as an adapter"),
}


@pytest.mark.parametrize("name", WRONG_ADAPTERS)
def test_a_wrong_adapter(fails, finished, tmp_path, name):
    breaking, said = WRONG_ADAPTERS[name]
    adapter = shutil.copytree(finished.folder, tmp_path / "adapter")
    (adapter / "manifest.json").unlink()  # somebody else's: nothing says what it was
    breaking(adapter)
    line = fails("--adapter", adapter)
    assert line.startswith(str(adapter)) and said in line


def test_an_adapter_of_another_base(fails, finished, world, tmp_path):
    other = shutil.copytree(world / "model", tmp_path / "other")
    write_model(other, seed=0, hidden_size=48)
    line = fails("--adapter", finished.folder, "--model", other)
    assert line.startswith(f"{finished.folder} does not fit this model") and "on another base?" in line


@pytest.mark.parametrize(
    "text",
    ["[" * 5000, "[]", "{}", "\xff"]
    + [json.dumps({"base_model_name_or_path": name}) for name in (None, 5, "", [], ["a"])]
    + ['{"base_model_name_or_path": "a", "base_model_name_or_path": "b"}'],
    ids=range(10),
)
def test_an_adapter_that_names_no_base(tmp_path, text):
    (tmp_path / "adapter_config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ModelError, match="adapter_config.json names no base model: name it with --model"):
        base_of([tmp_path])


def test_an_adapter_folder_that_is_missing(fails, tmp_path):
    line = fails("--adapter", tmp_path / "none")
    assert line == f"{tmp_path}/none is not an adapter folder: adapter_config.json is missing"


# -- flags and machine ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["--beta", "0"], "--beta: has to be above 0, got 0"),
        (["--batch-size", "0"], "--batch-size: has to be at least 1, got 0"),
        (["--num-sample", "3"], "unknown flag --num-sample; did you mean --num-samples?"),
        (["--max-length", "9", "--max-prompt-length", "9"], "--max-prompt-length 9 leaves no room for a response"),
        (["--label-smoothing", "0.1", "--loss", "hinge"], "--label-smoothing has no effect on --loss hinge: use "),
        (["--lora-r", "0", "--lora-dropout", "0.1"], "--lora-dropout has no effect with --lora-r 0"),
        (["--config", "none.yaml"], "--config none.yaml cannot be read"),
        (["--dtype", "fp16"], "--dtype fp16 needs a GPU: on a CPU use bf16 or fp32"),
        (["--seed", "99999999999999999999"], "--seed"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_flag_that_cannot_be(fails, words, sentence):
    assert fails(*words).startswith(sentence)


def test_a_seed_of_64_bits_runs(world, tmp_path):
    # torch.initial_seed() and the clock in nanoseconds give such numbers
    assert len(dpo_run(world, tmp_path / "run", seed=2**63 - 1).train) == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU, so --device cuda is right here")
def test_cuda_on_a_machine_without_it(fails):
    assert fails("--device", "cuda").startswith("--device cuda: torch sees no CUDA device; check nvidia-smi")


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="this machine has a Metal device")
def test_mps_on_a_machine_without_it(fails):
    assert fails("--device", "mps") == "--device mps: this machine has no Metal device; use --device cpu"


# -- the output folder ------------------------------------------------------------------------------------------------


def test_a_folder_that_holds_another_run_stays_as_it_is(fails, finished):
    line = fails(output_dir=finished.folder)
    advice = "choose another, or pass --resume auto or --overwrite"
    assert line == f"--output-dir {finished.folder} holds a run (metrics.jsonl): {advice}"


@pytest.mark.parametrize("name", run_files.RUN_FILES)
def test_any_file_of_a_run_is_a_run(fails, tmp_path, name):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("x")
    assert f"holds a run ({name})" in fails()


def test_a_folder_with_other_files_is_used_and_they_stay(world, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/notes.txt").write_text("mine")
    result = dpo_run(world, tmp_path / "out")
    assert (result.folder / "notes.txt").read_text() == "mine"


def test_an_output_folder_that_is_a_file(fails, tmp_path):
    (tmp_path / "file").write_text("x")
    line = fails("--output-dir", tmp_path / "file/run")
    assert line.startswith(f"--output-dir {tmp_path}/file/run cannot be written")
    assert (tmp_path / "file").read_text() == "x"


def test_a_logging_folder_that_is_a_file_leaves_the_earlier_run_alone(fails, finished, tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed: nothing is written to --logging-dir")
    (tmp_path / "file").write_text("x")
    run = shutil.copytree(finished.folder, tmp_path / "run")
    words = ["--overwrite", "--report-to", "tensorboard", "--logging-dir", tmp_path / "file"]
    assert f"--logging-dir {tmp_path}/file" in fails(*words, output_dir=run)


def test_missing_tensorboard_leaves_the_earlier_run_alone(fails, finished, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)  # it is not found, and importing it raises ImportError
    run = shutil.copytree(finished.folder, tmp_path / "run")
    line = fails("--overwrite", "--report-to", "tensorboard", output_dir=run)
    assert line == "--report-to tensorboard needs it installed: bash setup.sh tensorboard, or --report-to none"


def test_without_tensorboard_a_run_says_what_it_leaves_out(world, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    assert len(dpo_run(world, tmp_path / "run", report_to="auto").train) == 2
    assert "TensorBoard is not installed (bash setup.sh tensorboard): no event files" in capsys.readouterr().out


def test_overwrite_replaces_the_run(world, finished, tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed: no event files that could mix")
    folder = shutil.copytree(finished.folder, tmp_path / "run")
    dpo_run(world, folder, overwrite=True, report_to="tensorboard")
    old_events = {path.name for path in folder.rglob("events.*")}
    changed = dpo_run(world, folder, overwrite=True, report_to="tensorboard", lora_r=8)
    assert json.loads((folder / "adapter_config.json").read_text())["r"] == 8
    assert [line["step"] for line in changed.lines] == [0, 1, 2, 2]
    assert not (folder / "merged").exists()  # it was the earlier run's
    events = {path.name for path in folder.rglob("events.*")}
    assert len(events) == 1 and not events & old_events  # else TensorBoard draws both runs as one


def test_overwrite_of_a_full_model_leaves_no_model_beside_the_adapter(world, tmp_path):
    dpo_run(world, tmp_path / "run", lora_r=0)
    result = dpo_run(world, tmp_path / "run", overwrite=True)
    assert leaves(result) == RUN_LEAVES
    dpo_run(world, tmp_path / "run", overwrite=True, lora_r=0)
    assert not list(result.folder.glob("adapter_*"))


# -- non-finite -------------------------------------------------------------------------------------------------------


GOOD = "a model without NaN"


def left_no_weights(folder):
    files = [path for path in Path(folder).rglob("*") if path.parent.name != "cache"]
    return [path for path in files if path.suffix == ".safetensors" or "saving" in path.name] == []


@pytest.fixture
def nan_model(world, tmp_path):
    model = shutil.copytree(world / "model", tmp_path / "nan_model")
    state = load_file(model / "model.safetensors")
    state["model.layers.1.mlp.up_proj.weight"][3, 5] = math.nan
    save_file(state, model / "model.safetensors", metadata={"format": "pt"})
    return model


@pytest.mark.parametrize(
    "words, sentence",
    [
        ([], "reference log-probs of 24 pairs are not all finite: nothing is saved; look for broken weights"),
        (
            ["--lora-r", "0"],
            "reference log-probs of 24 pairs are not all finite: nothing is saved; look for broken weights",
        ),
        (
            ["--ref-model-path", GOOD, "--eval-samples", "4"],
            "the held-out loss is nan at step 0: nothing is saved; try ",
        ),
        (["--ref-model-path", GOOD, "--eval-samples", "0"], "the gradient is nan at step 1: nothing is saved; try "),
    ],
    ids=["reference", "all weights", "held out", "gradient"],
)
def test_weights_that_hold_nan(fails, world, nan_model, tmp_path, words, sentence):
    words = [world / "model" if word == GOOD else word for word in words]
    assert fails("--model", nan_model, *words, code=3).startswith(sentence)
    assert left_no_weights(tmp_path / "out")


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["--eval-samples", "0"], "the gradient is nan at step 2: nothing is saved"),
        (["--eval-samples", "0", "--max-grad-norm", "0"], "the gradient is nan at step 2: nothing is saved"),
        (["--max-steps", "1"], "the held-out loss is nan at step 1: nothing is saved"),
        (["--lora-r", "0", "--eval-samples", "0"], "the gradient is nan at step 2: nothing is saved"),
    ],
    ids=["gradient", "gradient that is not clipped", "held out", "all weights"],
)
def test_a_run_that_diverges(fails, tmp_path, words, sentence):
    words = ["--learning-rate", "1e30", "--batch-size", "2", "--gradient-accumulation-steps", "1", *words]
    assert fails(*words, code=3).startswith(sentence)
    assert left_no_weights(tmp_path / "out")


def test_numbers_that_are_not_finite_are_null_in_the_log(fails, tmp_path):
    words = ["--learning-rate", "1e30", "--batch-size", "2", "--gradient-accumulation-steps", "1"]
    fails(*words, "--eval-samples", "0", "--logging-steps", "1", code=3)
    lines = (tmp_path / "out/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line, parse_constant=pytest.fail)["step"] for line in lines] == [1]
    log = metrics_log.MetricsLog(
        dpo_hf_run.get_args(["--output-dir", str(tmp_path / "log"), "--report-to", "none"]), is_main=True
    )
    log.write(1, 0.5, {"loss": math.nan, "grad_norm": math.inf, "beta": 0.1})
    log.close()
    text = (tmp_path / "log/metrics.jsonl").read_text()
    assert text == '{"step": 1, "epoch": 0.5, "loss": null, "grad_norm": null, "beta": 0.1}\n'


def test_a_fault_of_ours_says_what_to_report(tmp_path):
    (tmp_path / "odd.py").write_text("from harness import endings\nendings.begin_program()\n1 / 0\n")
    done = run_program([sys.executable, tmp_path / "odd.py"], env=environment())
    lines = done.stderr.splitlines()
    assert done.returncode == 1 and "ZeroDivisionError: division by zero" in lines
    assert lines[-1].startswith(
        "odd.py: this is a fault of the program, not yours: please report it with the lines above"
    )


def test_lines_that_a_full_disk_did_not_take_come_with_the_next(tmp_path, capsys):
    words = ["--output-dir", str(tmp_path / "out"), "--report-to", "none"]
    log = metrics_log.MetricsLog(dpo_hf_run.get_args(words), is_main=True)
    metrics = tmp_path / "out/metrics.jsonl"
    log.write(1, 0.1, {"loss": 1.0})
    metrics.rename(tmp_path / "first")
    metrics.symlink_to("/dev/full")
    log.write(2, 0.2, {"loss": 2.0})
    log.write(3, 0.3, {"loss": 3.0})
    (tmp_path / "first").replace(metrics)
    log.write(4, 0.4, {"loss": 4.0})
    assert [json.loads(line)["step"] for line in metrics.read_text().splitlines()] == [1, 2, 3, 4]
    sentence = f"{metrics} cannot be written (No space left on device): training goes on, and it is tried again"
    assert capsys.readouterr().out.splitlines() == [sentence], "once"


@pytest.mark.parametrize("output", ["a reader that ends", "a full disk"])
def test_outputs_that_break_do_not_end_a_run(output, world, tmp_path):
    """As of `... | head -1`; in the ascii of a machine without a language the prompts are written as escapes."""
    rows = [strings(n) | {"prompt": f"\u4f60\u597d{n}"} for n in range(20)]
    write_rows(tmp_path / "rows.jsonl", rows)
    words = ["--model", world / "model", "--dataset", "rows.jsonl", "--max-steps", "2", "--logging-steps", "1"]
    words += ["--output-dir", "out", "--device", "cpu", "--dtype", "fp32", "--report-to", "none"]
    options = dict(cwd=tmp_path, env=environment(PYTHONIOENCODING="ascii"))
    with open("/dev/full", "w") as full:
        outputs = dict.fromkeys(("stdout", "stderr"), full) if output == "a full disk" else {}
        run = start([sys.executable, ROOT / "dpo_hf_run.py", *words], **options, **outputs)
    if run.stdout:
        assert run.stdout.readline().startswith("rows.jsonl: prompt/chosen/rejected, 20 rows")
        run.stdout.close()
        run.stderr.close()
    assert run.wait(100) == 0
    assert (tmp_path / "out/adapter_model.safetensors").exists()


# -- what a good run leaves -------------------------------------------------------------------------------------------

RUN_LEAVES = {
    "adapter_config.json",
    "adapter_model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "trainer_state.json",
    "metrics.jsonl",
    "curves.html",
    "args.json",
    "dpo_hf_run.py",
    "README.md",
    "manifest.json",
}
METRICS = {
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
    "logps/accuracies",
    "logps/chosen_change",
    "logps/rejected_change",
    "nll_loss",
}


def leaves(run):
    """The files of a run, but for the cache of reference log-probs, which belongs to several runs."""
    return {name for name in snapshot(run.folder) if not name.startswith("cache/")}


def test_a_good_run_leaves_exactly_these_files(world, tmp_path):
    assert leaves(dpo_run(world, tmp_path / "run")) == RUN_LEAVES


def test_a_full_run_leaves_exactly_these_files(world, tmp_path):
    model = {"config.json", "generation_config.json", "model.safetensors"}
    adapter = {"adapter_config.json", "adapter_model.safetensors"}
    assert leaves(dpo_run(world, tmp_path / "run", lora_r=0)) == RUN_LEAVES - adapter | model


def test_metrics_at_step_0_and_the_keys_of_every_line(finished):
    first, *rest = finished.lines
    evaluation = {f"eval_{name}{end}" for name in METRICS for end in ("", "_ci95")}
    update = METRICS | {"grad_norm", "learning_rate", "beta", "num_tokens"}
    assert first.keys() == {"step", "epoch"} | evaluation
    assert [line.keys() - {"step", "epoch"} for line in rest] == [update, update, evaluation]
    assert (first["step"], first["epoch"]) == (0, 0)
    assert first["eval_loss"] == pytest.approx(LN2, abs=1e-6)
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen_change"):
        assert first[f"eval_{name}"] == pytest.approx(0, abs=1e-5)
        assert first[f"eval_{name}_ci95"] == pytest.approx(0, abs=1e-5)
    assert first["eval_logps/chosen"] < -1 and first["eval_nll_loss"] > 1
    assert [line["epoch"] for line in finished.train] == [0.2, 0.4]  # 5 updates of 4 pairs are an epoch


def test_trainer_state_loads_in_transformers(finished):
    state = TrainerState.load_from_json(str(finished.folder / "trainer_state.json"))
    assert state.log_history == finished.lines
    assert (state.global_step, state.max_steps, state.epoch, state.train_batch_size) == (2, 2, 0.4, 4)
    assert state.num_input_tokens_seen == finished.train[-1]["num_tokens"] > 0


def test_the_copy_of_the_script_is_the_script(finished):
    assert (finished.folder / "dpo_hf_run.py").read_bytes() == (ROOT / "dpo_hf_run.py").read_bytes()


def test_the_model_card_names_base_data_and_numbers(finished, world):
    card = (finished.folder / "README.md").read_text()
    header = card.split("---\n")[1].splitlines()
    assert header[:3] == [f"base_model: {world}/model", "library_name: peft", "pipeline_tag: text-generation"]
    assert {"- dpo", "- lora"} <= set(header)
    first, last = finished.evals
    for name in ("loss", "rewards/margins"):
        cells = [f"{line['eval_' + name]:.4f} ± {line[f'eval_{name}_ci95']:.4f}" for line in (first, last)]
        assert f"| {name} | {cells[0]} | {cells[1]} |" in card
    pairs, _ = load_pairs(str(world / "pairs.jsonl"), char_tokenizer(), 512, 256)
    train, _ = hold_out(pairs, 4, seed=42)
    assert f"training data sha256 {fingerprint([pairs[i] for i in train])}." in card
    assert "    python dpo_hf_run.py" in card and "Seed 42;" in card


def test_a_save_that_breaks_off_leaves_the_folder_as_it_was(tmp_path):
    (tmp_path / "kept.txt").write_text("old")
    with pytest.raises(KeyboardInterrupt), run_files.whole_files(tmp_path) as folder:
        (folder / "kept.txt").write_text("half")
        raise KeyboardInterrupt
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"kept.txt": "old"}


def test_a_run_deletes_nothing_but_runs(world, tmp_path):
    """Files of the user's own beside a run, with names near to ours, with and without --overwrite."""
    folder = tmp_path / "run"
    mine = ["weights.safetensors", "my_model.safetensors", "logs/yesterday.txt", "checkpoint-notes/a.txt"]
    mine += ["checkpoint-7-mine.txt", "checkpoint-3-best/manifest.json"]
    for name in mine:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("mine")
    dpo_run(world, folder)
    dpo_run(world, folder, overwrite=True)
    assert [(folder / name).read_text() for name in mine] == ["mine"] * len(mine)


@pytest.mark.parametrize("name", ["README.md", "merged/model.safetensors"])
def test_a_folder_with_files_that_a_run_would_replace_is_refused(fails, tmp_path, name):
    (tmp_path / "out" / name).parent.mkdir(parents=True)
    (tmp_path / "out" / name).write_text("mine")
    assert f"holds a run ({name.split('/')[0]})" in fails()
    assert (tmp_path / "out" / name).read_text() == "mine"
