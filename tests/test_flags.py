"""flags.py: spellings, defaults, --config, one-sentence errors; and that every flag of dpo_hf_run.py has an effect
(those of train_rm.py: test_train_rm.py).
"""

import argparse
import json
import os
import re
import sys
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from helpers import parser_actions
from processes import run_program
from runs import DPO, LN2, adapter_of, dpo_run, one_line, run_script
from worlds import char_tokenizer, write_model, write_rows

import dpo_hf_run
import evaluate_alignment
import generate
import learn_prompt
import losses
import preference_prompt
import prepare_data
import toy_world
import train_rm
import train_safe_mm_dpo
import train_with_preference_prompt
from harness import flag_names
from preference_data import load_pairs

SCRIPTS = dpo_hf_run, learn_prompt, train_rm, train_safe_mm_dpo, train_with_preference_prompt

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = "dpo_hf_run.py"
pytestmark = pytest.mark.usefixtures("script_name")


NEEDED = {  # flags without which a script does not begin
    train_rm: ["--task", "helpful"],
    generate: ["--prompts", "x", "--output", "y"],
    evaluate_alignment: ["--prompts", "x"],
    prepare_data: ["--input", "x"],
    learn_prompt: ["--preference-text", "x"],
    train_with_preference_prompt: ["--preference-text", "x"],
}


def parse(*words):
    return dpo_hf_run.get_args([str(word) for word in words])


def refused(capsys, *words):
    """Parse words that have to be refused; the one line on standard error."""
    with pytest.raises(SystemExit) as exit:
        parse(*words)
    assert exit.value.code == 2
    return one_line(capsys)


# -- spellings and defaults -------------------------------------------------------------------------------------------

DEFAULTS = dict(
    model="Qwen/Qwen3-0.6B",
    ref_model_path=None,
    adapter=None,
    dataset="lvwerra/stack-exchange-paired",
    eval_dataset=None,
    num_samples=1000,
    eval_samples=None,
    epochs=1,
    max_steps=0,
    batch_size=2,
    gradient_accumulation_steps=4,
    tokens_per_microbatch="auto",
    learning_rate=1e-4,  # with LoRA
    warmup_steps=0,
    lr_scheduler="linear",
    weight_decay=0.0,
    max_grad_norm=1.0,
    optimizer="adamw",
    optimizer_offload=False,
    base_dtype="same",
    tf32=False,
    compile=False,
    nll_coeff=0.0,
    beta=0.1,
    loss="sigmoid",
    label_smoothing=0.0,
    lora_r=16,
    lora_alpha=32,
    lora_dropout=0.0,
    lora_target_modules=None,
    max_length=512,
    max_prompt_length=256,
    seed=42,
    dtype="auto",
    device="auto",
    gradient_checkpointing="auto",
    ddp_timeout=600,
    logging_steps=10,
    eval_steps=0,
    report_to="auto",
    output_dir="outputs/dpo_qwen_trl",
    cache_dir=None,
    resume="none",
    save_steps=0,
    save_total_limit=0,
    logging_dir=None,
    overwrite=False,
    save_merged=False,
    skip_invalid=False,
    trust_remote_code=False,
    estimate_memory=False,
    chat_template_strings=False,
)


def test_documented_defaults_and_nothing_else_without_any_flag():
    defaults = vars(parse())
    assert {name: defaults.pop(name) for name in DEFAULTS} == DEFAULTS
    of_the_parser = dict(config=None, hub="huggingface", local_rank=None, typed=set(), given=set())
    assert defaults == of_the_parser | dict(full_rate=5e-6, as_begun={})


@pytest.mark.parametrize(
    "words, name, value",
    [
        (["--output_dir", "a_b"], "output_dir", "a_b"),
        (["--output-dir=a_b-c"], "output_dir", "a_b-c"),
        (["--output_dir=--a_b"], "output_dir", "--a_b"),
        (["--learning_rate=1e-4"], "learning_rate", 1e-4),
        (["--num-epochs", "3"], "epochs", 3),
        (["--num_train_epochs", "3"], "epochs", 3),
        (["--policy-model-path", "m"], "model", "m"),
        (["--base_model_path=m_n"], "model", "m_n"),
        (["--reference_model_path", "m"], "ref_model_path", "m"),
        (["--β_ori", "0.3"], "beta", 0.3),
        (["--β-ori=0.3"], "beta", 0.3),
        (["--lora_target_modules", "q_proj", "v_proj"], "lora_target_modules", ["q_proj", "v_proj"]),
        (["--local_rank=3"], "local_rank", 3),
        (["--local-rank", "3"], "local_rank", 3),
        (["--trust_remote_code"], "trust_remote_code", True),
        (["--eval_samples", "0"], "eval_samples", 0),
        (["--beta", "0.2", "--β-ori", "0.3"], "beta", 0.3),
    ],
)
def test_spelling(words, name, value):
    assert getattr(parse(*words), name) == value


def test_given_names_what_the_user_set_here_or_in_the_file(tmp_path):
    # set to its default is set too
    assert parse("--num-train-epochs", "1", "--output_dir=x").given == {"epochs", "output_dir"}
    (tmp_path / "c.yaml").write_text("lora: {r: 8}\nβ_ori: 0.1\nsave_merged: false\n")
    given = parse("--config", tmp_path / "c.yaml", "--seed", "1").given
    assert set(given) - {"config"} == {"lora_r", "beta", "seed"}


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["--num-sample", "3"], "unknown flag --num-sample; did you mean --num-samples?"),
        (["--learning-rte=1"], "unknown flag --learning-rte=1; did you mean --learning-rate?"),
        (["--lora_rang", "3"], "unknown flag --lora-rang; did you mean --lora-r?"),
        (["--zzzzzz"], "unknown flag --zzzzzz; --help lists them"),
        (["--overwrite", "toy"], "unknown flag toy; --help lists them"),
        (["--beta"], "--beta: expected one argument"),
        (["--beta", "high"], "--beta: expected a number, got 'high'"),
        (["--beta", "0"], "--beta: has to be above 0, got 0"),
        (["--beta", "nan"], "--beta: has to be finite, got nan"),
        (["--batch-size", "2-4"], "--batch-size: pick one number of 2-4"),
        (["--learning-rate", "5e-7-1e-6"], "--learning-rate: pick one number of 5e-7-1e-6"),
        (
            ["--zzzzzz", "--qqqqqq", "3"],
            "unknown flag --zzzzzz; --help lists them; unknown flag --qqqqqq; --help lists them",
        ),
        (["--batch-size", "1.5"], "--batch-size: expected a whole number, got '1.5'"),
        (["--tokens-per-microbatch", "-1"], "--tokens-per-microbatch: has to be at least 0, got -1"),
        (["--batch-size", "0"], "--batch-size: has to be at least 1, got 0"),
        (["--label-smoothing", "0.5"], "--label-smoothing: has to be below 0.5, got 0.5"),
        (["--lora-dropout", "1"], "--lora-dropout: has to be below 1, got 1"),
        (["--num-samples=-1"], "--num-samples: has to be at least 0, got -1"),
    ],
)
def test_a_wrong_word_is_one_sentence_and_exit_code_2(capsys, words, sentence):
    assert refused(capsys, *words) == f"dpo_hf_run.py: {sentence}"


ALL_SCRIPTS = *SCRIPTS, evaluate_alignment, generate, prepare_data


def numeric_flags():
    """(script, flag, whether a fraction will do) of every flag with a type in every script's parser."""
    for script in ALL_SCRIPTS:
        for action in parser_actions(script):
            if action.type is not None:
                flag = next(option for option in action.option_strings if option.startswith("--"))
                try:
                    yield script, flag, action.type("0.25") == 0.25
                except argparse.ArgumentTypeError:
                    yield script, flag, False


NUMERIC = list(numeric_flags())
HUGE = ["1" + "0" * 18, "1" + "0" * 30, "1" + "0" * 400, "9" * 5000, f"-{10**30}", "-" + "9" * 5000]


@pytest.mark.parametrize(("script", "flag", "fraction"), NUMERIC, ids=lambda value: getattr(value, "__name__", None))
def test_every_number_has_a_bound_and_says_it(capsys, script, flag, fraction):
    values = ["1e31", "1e308", "-1e308", "inf", "nan", "1" + "0" * 400] if fraction else HUGE
    for value in values[flag == "--seed" :]:  # 10^18 is a seed
        with pytest.raises(SystemExit) as exit:
            script.get_args([f"{flag}={value}"])
        assert exit.value.code == 2
        line = one_line(capsys)
        assert re.search(rf"{flag}: has to be (at most|below|at least|above|finite)", line), line
        assert len(line) < 150


def test_numbers_are_found_in_every_script():
    of = {script: [flag for found, flag, _ in NUMERIC if found is script] for script in ALL_SCRIPTS}
    assert min(map(len, of.values())) >= 5 and len(NUMERIC) > 130
    assert {"--cost-threshold", "--lambda-max", "--ddp-timeout", "--local-rank"} <= set(of[train_safe_mm_dpo])
    assert {"--num-responses", "--min-reward", "--top-p"} <= set(of[generate])


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["--lora-r", "65537"], "--lora-r: has to be at most 65536, got 65537"),
        (["--max-length", "10000001"], "--max-length: has to be at most 10000000, got 10000001"),
        (["--epochs", "2147483648"], "--epochs: has to be at most 2147483647, got 2147483648"),
        (["--seed", str(2**63)], f"--seed: has to be below {2**63}, got {2**63}"),
        (["--beta=--"], "--beta: expected a value, got '--'"),
        (["--output_dir=--"], "--output-dir: expected a value, got '--'"),
        (["--lora-target-modules=--"], "--lora-target-modules: expected a value, got '--'"),
    ],
)
def test_a_number_beyond_its_bound_and_a_value_that_argparse_would_lose(capsys, words, sentence):
    assert refused(capsys, *words) == f"dpo_hf_run.py: {sentence}"


@pytest.mark.parametrize("flag", ["--loss", "--lr-scheduler", "--dtype", "--device", "--report-to"])
def test_a_wrong_choice_names_the_choices(capsys, flag):
    [action] = [a for a in parser_actions(dpo_hf_run) if flag in a.option_strings]
    line = refused(capsys, flag, "wrong")
    assert flag in line and all(choice in line for choice in action.choices)


GROUPS = ["model", "data", "method", "LoRA", "updates", "memory and device", "output"]


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("script", ALL_SCRIPTS, ids=lambda script: script.__name__)
def test_help_fits_the_terminal_in_groups_behind_one_line_of_usage(capsys, monkeypatch, script, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    with pytest.raises(SystemExit) as exit:
        script.get_args(["--help"])
    assert exit.value.code == 0
    text = capsys.readouterr().out
    lines = text.splitlines()
    assert lines[0].startswith("usage: ") and lines[1] == ""
    assert [line for line in lines if len(line) > columns and not line.startswith("    ")] == []  # but for code
    flat = " ".join(text.split())
    for part in script.__doc__.split("\n\n"):
        assert (" ".join(part.split()) in flat) != part.startswith("Copy with:")
    for action in parser_actions(script):
        shown = [option for option in action.option_strings if re.search(rf"(?<![\w-]){option}(?![\w-])", text)]
        assert shown == ([] if action.help == argparse.SUPPRESS else action.option_strings)
    titles = [line.rstrip(":") for line in lines if re.fullmatch(r"[A-Za-z ]+:", line)]
    wanted = GROUPS if script in SCRIPTS else [title for title in GROUPS if title in titles]
    wanted = [title for title in wanted if title in titles or script is not learn_prompt]  # it has no LoRA
    assert [title for title in titles if title in GROUPS] == wanted and len(wanted) >= 2


def test_help_shows_defaults(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    text = " ".join(capsys.readouterr().out.split())
    for default in ("outputs/dpo_qwen_trl)", "1e-4 with LoRA, 5e-6 for all weights)", "half of --max-length)"):
        assert f"(default: {default}" in text


INTERRUPTED = """
import runpy, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # where the tests run behind `&` it is ignored
sys.path[:0], sys.argv = sys.argv[1:3], sys.argv[3:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("library", ["yaml", "torch"])  # of the first tenth of a second, and of the seconds after it
@pytest.mark.parametrize("script", ALL_SCRIPTS, ids=lambda script: script.__name__)
def test_ctrl_c_while_libraries_are_loaded_is_one_line(script, library, tmp_path):
    if script is prepare_data and library == "torch":
        pytest.skip("it has no use for torch")
    (tmp_path / f"{library}.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGINT)")
    words = NEEDED.get(script, [])
    done = run_program([sys.executable, "-c", INTERRUPTED, tmp_path, ROOT, script.__file__, *words])
    assert (done.returncode, done.stdout, done.stderr) == (130, "", f"{script.__name__}.py: interrupted\n")


@pytest.mark.parametrize("library", ["yaml", "torch"])
def test_an_ignored_ctrl_c_stays_ignored_while_libraries_are_loaded(library, tmp_path):
    """As a shell's `&` and nohup have it."""
    (tmp_path / f"{library}.py").write_text(
        "import os, signal; os.kill(os.getpid(), signal.SIGINT); raise SystemExit(7)"
    )
    ignored = INTERRUPTED.replace("signal.default_int_handler", "signal.SIG_IGN")
    done = run_program([sys.executable, "-c", ignored, tmp_path, ROOT, ROOT / "dpo_hf_run.py"])
    assert (done.returncode, done.stderr) == (7, "")


@pytest.mark.parametrize("words", [["--help"], ["--no-such-flag"]])
@pytest.mark.parametrize("script", ALL_SCRIPTS, ids=lambda script: script.__name__)
def test_help_and_a_wrong_flag_are_answered_before_torch_is_loaded(script, words):
    """Started as a person would, with a torch that cannot be imported."""
    code = "import runpy, sys; sys.modules |= dict(torch=None, transformers=None); del sys.argv[0]; "
    code += "runpy.run_path(sys.argv[0], run_name='__main__')"
    done = run_program([sys.executable, "-c", code, script.__file__, *words])
    assert done.returncode == (0 if words == ["--help"] else 2), done.stderr
    assert len(done.stderr.splitlines()) == (0 if words == ["--help"] else 1)


def test_choices_that_a_script_writes_out_are_those_of_the_module_behind():
    choices = lambda script: {action.dest: action.choices for action in parser_actions(script)}
    assert choices(dpo_hf_run)["loss"] == losses.DPO_LOSSES
    assert choices(learn_prompt)["preference_position"] == preference_prompt.VECTOR_POSITIONS
    assert train_with_preference_prompt.VECTOR_POSITIONS == preference_prompt.VECTOR_POSITIONS


# -- names of other trainers ------------------------------------------------------------------------------------------

EXAMPLES = {"--nll-coeff": "0.5", "--beta": "0.5", "--label-smoothing": "0.1", "--loss": "ipo", "--dtype": "bf16"}
EXAMPLES |= {"--learning-rate": "0.5", "--lr-scheduler": "cosine", "--optimizer": "adamw8bit", "--resume": "auto"}
EXAMPLES |= {"--lora-target-modules": "x"}
TAKERS = {"--reward-model": generate, "--max-new-tokens": generate, "--num-responses": generate}
TAKERS |= {"--tokenizer-name": train_rm, "--temperature": generate}


def differences(script, words):
    """Flags with other values than without the words."""
    plain, args = (vars(script.get_args([*NEEDED.get(script, []), *some])) for some in ([], words))
    return {name: value for name, value in args.items() if value != plain[name] and name not in ("given", "typed")}


@pytest.mark.parametrize("theirs", flag_names.SAME)
def test_a_name_of_the_same_meaning_is_the_flag(tmp_path, theirs):
    ours = flag_names.SAME[theirs]
    script, value = TAKERS.get(ours, dpo_hf_run), EXAMPLES.get(ours, "8")
    expected = differences(script, [ours, value])
    assert len(expected) >= 1
    assert differences(script, [theirs, value]) == expected
    assert differences(script, [f"{theirs.replace('-', '_').replace('__', '--', 1)}={value}"]) == expected
    (tmp_path / "c.yaml").write_text(f"{theirs[2:].replace('-', '_')}: {value}\n")
    in_file = differences(script, ["--config", str(tmp_path / "c.yaml")])
    assert in_file.pop("config") and in_file == expected
    assert ours in {option for action in parser_actions(script) for option in action.option_strings}


def table_of_values():
    return [(flag, value, words) for flag, values in flag_names.VALUES.items() for value, words in values.items()]


@pytest.mark.parametrize("flag, value, words", table_of_values())
def test_a_value_of_another_trainer_is_ours(tmp_path, flag, value, words):
    script = TAKERS.get(next(iter(words.split()), flag), dpo_hf_run) if flag != "--do-sample" else generate
    expected = differences(script, words.split())
    assert differences(script, [flag, value]) == differences(script, [f"{flag}={value}"]) == expected
    if value == "true":
        assert differences(script, [flag]) == differences(script, [flag, "True", "--seed", "42"]) == expected
    (tmp_path / "c.yaml").write_text(f"{flag[2:].replace('-', '_')}: {value}\n")
    in_file = differences(script, ["--config", str(tmp_path / "c.yaml")])
    in_file.pop("config")
    assert in_file == expected


@pytest.mark.parametrize("theirs", flag_names.INSTEAD)
@pytest.mark.parametrize("script", ALL_SCRIPTS, ids=lambda script: script.__name__)
def test_a_name_of_another_meaning_is_answered_with_what_there_is(capsys, script, theirs):
    known = {option for action in parser_actions(script) for option in action.option_strings}
    if theirs in known or flag_names.SAME.get(theirs) in known:
        return
    with pytest.raises(SystemExit) as exit:
        script.get_args([f"{theirs}=epoch"])
    assert exit.value.code == 2
    line = one_line(capsys)
    fitting = [what for what in flag_names.INSTEAD[theirs] if what.split()[0] in known or not what.startswith("--")]
    assert theirs in line and (not fitting or line.endswith(fitting[0]))
    of_some = "--rpo-alpha", "--dataset-test-split", "--center-rewards-coefficient", "--adapter-name-or-path"
    assert fitting or script not in (dpo_hf_run, train_rm) or theirs in of_some, line
    named = set(re.findall(r"--[a-z][\w-]*", line.partition(theirs)[2]))
    every = {option for each in ALL_SCRIPTS for action in parser_actions(each) for option in action.option_strings}
    assert named <= every, f"{theirs} is answered with a flag that no script has"


LLAMA_FACTORY = """
model_name_or_path: m
trust_remote_code: true
stage: dpo
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all
pref_beta: 0.2
pref_loss: sigmoid
dataset: d
template: llama3
cutoff_len: 2048
max_samples: 500
overwrite_cache: true
preprocessing_num_workers: 16
output_dir: o
logging_steps: 5
save_steps: 500
plot_loss: true
overwrite_output_dir: true
save_only_model: false
report_to: none
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 5.0e-6
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
ddp_timeout: 10000
resume_from_checkpoint: null
"""


def test_a_file_of_llama_factory(capsys, tmp_path):
    """What has no counterpart is named at once, and without it the file is a config here."""
    (tmp_path / "c.yaml").write_text(LLAMA_FACTORY)
    line = refused(capsys, "--config", tmp_path / "c.yaml")
    left = "stage do_train template overwrite_cache preprocessing_num_workers plot_loss save_only_model warmup_ratio"
    assert re.findall(r"unknown key (\w+): ", line) == left.split()
    kept = [row for row in LLAMA_FACTORY.splitlines() if row.partition(":")[0] not in left.split()]
    (tmp_path / "c.yaml").write_text("\n".join(kept))
    args = parse("--config", tmp_path / "c.yaml")
    expected = dict(model="m", trust_remote_code=True, lora_r=8, lora_target_modules=["all-linear"], beta=0.2)
    expected |= dict(loss="sigmoid", dataset="d", max_length=2048, max_prompt_length=1024, num_samples=500)
    expected |= dict(output_dir="o", logging_steps=5, save_steps=500, overwrite=True, report_to=["none"], batch_size=1)
    expected |= dict(gradient_accumulation_steps=8, learning_rate=5e-6, epochs=3, lr_scheduler="cosine", dtype="bf16")
    expected |= dict(ddp_timeout=10000, resume="none")
    assert {name: getattr(args, name) for name in expected} == expected


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["--warmup_ratio", "0.1"], "unknown flag --warmup-ratio: use --warmup-steps N (updates)"),
        (["--bf16=maybe"], "--bf16 is true or false, not 'maybe'"),
        (["--overwrite=maybe"], "--overwrite is true or false, not 'maybe'"),
        (["--finetuning_type", "freeze"], "--finetuning-type is lora or full, not 'freeze'"),
        (["--save_strategy", "epoch"], "--save-strategy is no or steps, not 'epoch': use --save-steps N (updates)"),
        (["--optim", "lion"], "--optimizer: invalid choice: 'lion' (choose from"),
    ],
)
def test_a_value_that_means_nothing_here(capsys, words, sentence):
    assert refused(capsys, *words).startswith(f"dpo_hf_run.py: {sentence}")


def test_switches_take_true_and_false_and_names_a_comma():
    assert parse("--overwrite", "True", "--trust_remote_code=false").overwrite is True
    assert parse("--overwrite", "False").given == set()
    assert parse("--lora_target", "q_proj,v_proj").lora_target_modules == ["q_proj", "v_proj"]
    assert parse("--gradient_checkpointing", "--seed", "1").gradient_checkpointing == "on"


# -- defaults that follow from another flag ---------------------------------------------------------------------------

RATES = {dpo_hf_run: (1e-4, 5e-6), train_rm: (1e-4, 2e-5), train_safe_mm_dpo: (1e-4, 5e-7)}
RATES |= {train_with_preference_prompt: (5e-4, 5e-6), learn_prompt: (1e-2, 1e-2)}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_the_rate_where_none_is_given(tmp_path, script):
    needed = {train_rm: ["--task", "helpful"], train_with_preference_prompt: ["--preference-text", "x"]}
    needed |= {learn_prompt: ["--preference-text", "x"]}
    rate = lambda *words: script.get_args([*NEEDED.get(script, []), *words]).learning_rate
    (tmp_path / "c.yaml").write_text("learning_rate: 3e-5\n")
    assert (rate(), rate("--learning-rate", "7e-7"), rate("--config", str(tmp_path / "c.yaml"))) == (
        RATES[script][0],
        7e-7,
        3e-5,
    )
    if script is not learn_prompt:
        assert rate("--lora-r", "0") == RATES[script][1]


def test_the_configs_leave_the_rate_to_the_weights_that_are_trained():
    for words, rate in (([], 1e-4), (["--lora-r", "0"], 5e-7)):
        assert train_safe_mm_dpo.get_args(["--config", f"{ROOT}/configs/dpo_config.yaml", *words]).learning_rate == rate
    for file, words, rate in (
        ("rm_config", [], 1e-4),
        ("rm_config", ["--lora-r", "0"], 2e-5),
        ("rm_config_full", [], 2e-5),
    ):
        words = ["--task", "helpful", "--config", f"{ROOT}/configs/{file}.yaml", *words]
        assert train_rm.get_args(words).learning_rate == rate


@pytest.mark.parametrize(
    "script, words, prompt",
    [
        (dpo_hf_run, [], 256),
        (dpo_hf_run, ["--max-length", "256"], 128),
        (dpo_hf_run, ["--max-length", "1024"], 512),
        (dpo_hf_run, ["--max-length", "2"], 1),
        (dpo_hf_run, ["--max-length", "256", "--max-prompt-length", "200"], 200),
        (train_with_preference_prompt, ["--preference-text", "x"], 128),
        (train_with_preference_prompt, ["--preference-text", "x", "--max-length", "100"], 50),
        (train_rm, ["--task", "helpful", "--config", f"{ROOT}/configs/rm_config_full.yaml"], 128),
        (train_rm, ["--task", "helpful", "--config", f"{ROOT}/configs/rm_config.yaml", "--max-length", "256"], 128),
    ],
)
def test_the_prompt_s_length_follows_the_length(script, words, prompt):
    assert script.get_args(words).max_prompt_length == prompt


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["--max-length", "64", "--max-prompt-length", "64"], "--max-prompt-length 64 leaves no room for a response"),
        (
            ["--max-length", "100", "--max-prompt-length", "256"],
            "--max-prompt-length 256 leaves no room for a response within --max-length 100",
        ),
        (["--lora-r", "0", "--lora-alpha", "3"], "--lora-alpha has no effect with --lora-r 0"),
        (["--lora-r", "0", "--lora-dropout", "0"], "--lora-dropout has no effect with --lora-r 0"),
        (["--lora-r", "0", "--lora-target-modules", "x"], "--lora-target-modules has no effect with --lora-r 0"),
        (["--lora-r", "0", "--save-merged"], "--save-merged has no effect with --lora-r 0"),
        (["--lora-r", "0", "--adapter", "x"], "--adapter has no effect with --lora-r 0"),
        (["--adapter", "x", "--lora-r", "8"], "--lora-r has no effect with --adapter"),
        (["--loss", "hinge", "--label-smoothing", "0.1"], "--label-smoothing has no effect on --loss hinge"),
        (["--loss", "ipo", "--label-smoothing", "0.1"], "--label-smoothing has no effect on --loss ipo"),
    ],
)
def test_flags_that_cannot_go_together(capsys, words, sentence):
    assert refused(capsys, *words).startswith(f"dpo_hf_run.py: {sentence}")


TEXTS = {  # the flags of each script that take a text: paths, names
    script: [
        action
        for action in parser_actions(script)
        if action.nargs != 0 and action.type is None and not action.choices and action.dest != "preference_text"
    ]
    for script in ALL_SCRIPTS
}


@pytest.mark.parametrize(
    "text, fault", [("", "is empty: "), ("a\0b", "has a zero byte"), ("o\udcff", "has bytes that are no UTF-8")]
)
@pytest.mark.parametrize("script", ALL_SCRIPTS, ids=lambda script: script.__name__)
def test_a_text_that_names_nothing(capsys, monkeypatch, script, text, fault):
    """--output-dir "$OUT" with a variable that is not set, and what no file is called."""
    assert len(TEXTS[script]) > 3
    for action in TEXTS[script]:
        name = action.option_strings[0]
        monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py"])
        with pytest.raises(SystemExit) as exit:
            script.get_args([*NEEDED.get(script, []), name, text])
        assert exit.value.code == 2
        assert one_line(capsys).startswith(f"{script.__name__}.py: {name} {fault}")


@pytest.mark.parametrize("rank", ["1", "x", ""])
def test_a_stray_local_rank_silences_nobody(capsys, monkeypatch, rank):
    monkeypatch.setenv("LOCAL_RANK", rank)
    assert refused(capsys, "--beta", "0") == "dpo_hf_run.py: --beta: has to be above 0, got 0"


def test_only_the_first_process_of_a_machine_speaks(capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(SystemExit) as exit:
        parse("--beta", "0")
    assert exit.value.code == 2
    assert capsys.readouterr().err == ""


# -- --config ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def config(tmp_path):
    """Write a YAML file, parse it with further words."""

    def parse_config(text, *words):
        (tmp_path / "run.yaml").write_text(text, "utf-8")
        return parse("--config", tmp_path / "run.yaml", *words)

    return parse_config


@pytest.mark.parametrize(
    "text, expected",
    [
        (
            "use_lora: true\nlora:\n  r: 8\n  alpha: 64\n  dropout: 0.1\n",
            dict(lora_r=8, lora_alpha=64, lora_dropout=0.1),
        ),
        ("lora:\n  target_modules: [q_proj, v_proj]\n", dict(lora_target_modules=["q_proj", "v_proj"])),
        ("lora_target_modules:\n- q_proj\n", dict(lora_target_modules=["q_proj"])),
        ("lora_target_modules: q_proj\n", dict(lora_target_modules=["q_proj"])),
        ("use_lora: false\n", dict(lora_r=0)),
        # the documents' block stays where it is while use_lora switches it off
        ("use_lora: false\nlora: {r: 16, alpha: 32, dropout: 0.1}\n", dict(lora_r=0)),
        ("lora:\n", dict(lora_r=16)),
        ("learning_rate: 5e-6\nweight-decay: 1.0e-2\n", dict(learning_rate=5e-6, weight_decay=0.01)),
        ("β_ori: 0.3\n", dict(beta=0.3)),
        ("num_train_epochs: 3\nbase_model_path: m_n\n", dict(epochs=3, model="m_n")),
        ("save_merged: true\nskip-invalid: false\n", dict(save_merged=True, skip_invalid=False)),
        ("gradient_checkpointing: on\n", dict(gradient_checkpointing="on")),  # YAML reads on and off as booleans
        ("gradient_checkpointing: 'off'\n", dict(gradient_checkpointing="off")),
        (
            "gradient_checkpointing: off\n",
            dict(gradient_checkpointing="off", given={"config", "gradient_checkpointing"}),
        ),
        ("output_dir: --a b_c\n", dict(output_dir="--a b_c")),
        ("seed: 7  # why not\neval_dataset: null\n", dict(seed=7, eval_dataset=None)),
        ("", dict(seed=42)),
        ("seed: 010\nmax_steps: 1_0\n", dict(seed=10, max_steps=10)),  # no octal number
        (
            "output_dir: 2026-02-30\nmodel: 1:30\ndataset: yes\n",
            dict(output_dir="2026-02-30", model="1:30", dataset="yes"),
        ),
        ("use_lora: 'false'\noverwrite: 'true'\n", dict(lora_r=0, overwrite=True)),
        ("eval_dataset: ~\nadapter:\n", dict(eval_dataset=None, adapter=None)),
    ],
)
def test_config_file(config, text, expected):
    args = config(text)
    assert {name: getattr(args, name) for name in expected} == expected


@pytest.mark.parametrize("without", ["use_lora: false", "use-lora: no", "use_peft: false", "finetuning_type: full"])
@pytest.mark.parametrize("rank", ["lora_rank: 8", "lora: {r: 8}"])
def test_no_lora_overrules_a_rank_wherever_it_stands(config, without, rank):
    assert config(f"{without}\n{rank}\n").lora_r == config(f"{rank}\n{without}\n").lora_r == 0


@pytest.mark.parametrize("order", ["file first", "file last"])
def test_the_command_line_wins_over_the_file(tmp_path, order):
    (tmp_path / "run.yaml").write_text("seed: 7\nbeta: 0.3\nlora: {r: 8, target_modules: [q_proj]}\n")
    file, words = ["--config", tmp_path / "run.yaml"], ["--seed", "1", "--lora-target-modules", "k_proj"]
    args = parse(*file, *words) if order == "file first" else parse(*words, *file)
    assert (args.seed, args.beta, args.lora_r, args.lora_target_modules) == (1, 0.3, 8, ["k_proj"])


def test_a_later_file_wins_over_an_earlier_one(tmp_path):
    (tmp_path / "a.yaml").write_text("seed: 1\nbeta: 0.3\n")
    (tmp_path / "b.yaml").write_text("seed: 2\n")
    args = parse(f"--config={tmp_path / 'a.yaml'}", "--config", tmp_path / "b.yaml")
    assert (args.seed, args.beta) == (2, 0.3)
    assert args.given == {"config", "seed", "beta"}  # of both


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("learning_rat: 1e-4\n", "unknown key learning_rat; did you mean --learning-rate?"),
        ("lora: {rang: 8}\n", "unknown key lora_rang; did you mean --lora-r"),
        ("batch_size: [2, 4]\n", "batch_size: pick one of 2, 4"),
        ("gradient_accumulation_steps: 4 - 8\n", "--gradient-accumulation-steps: pick one number of 4 - 8"),
        ("beta: 0\n", "--beta: has to be above 0, got 0"),
        ("batch_size: 2-4\n", "--batch-size: pick one number of 2-4"),
        ("beta: false\n", "--beta"),
        ("lora: 8\n", "lora"),
        ("lora: [r, 8]\n", "lora"),
        ("- beta\n", "not a list of `flag: value` lines"),
        ("just words\n", "not a list of `flag: value` lines"),
        ("a: [1\n", "cannot be read"),
        ("overwrite: maybe\n", "overwrite is true or false"),
        ("use_lora:\n", "--use-lora is true or false, not 'none'"),
        ("use_lora: [yes]\n", "use_lora: pick one of yes"),
        ("max_steps: 1:30\n", "--max-steps: expected a whole number, got '1:30'"),  # no 90
        ("seed: 0x10\n", "--seed: expected a whole number, got '0x10'"),
        (f"seed: {'9' * 5000}\n", "--seed: has to be below"),
        (f"seed: !!int {'9' * 5000}\n", "cannot be read"),
        ("seed: !!int x\n", "cannot be read"),
        ("seed: !!int ''\n", "cannot be read"),
        ("beta: !!float x\n", "cannot be read"),
        ("output_dir: !!timestamp 2026-02-30\n", "cannot be read"),
        ("output_dir: !!timestamp x\n", "cannot be read"),
        ("overwrite: !!bool x\n", "cannot be read"),
        ("output_dir: !!float 5\n", "cannot be read"),  # no 5.0
        ("output_dir: !!binary YQ==\n", "cannot be read"),
        ("dataset: !!set {a, b}\n", "cannot be read"),
        ("output_dir: !!binary é\n", "cannot be read"),
        ("[" * 5000, "cannot be read"),
        ("output_dir: !!python/name:os.system\n", "cannot be read"),
        ("? [a]\n: b\n", "cannot be read"),
        ("beta: --\n", "--beta: expected a value, got '--'"),
        ("beta: 0.1\nseed: 1\nbeta: 0.2\n", "cannot be read (beta stands twice in"),
        ("lora: {r: 4, r: 8}\n", "cannot be read (r stands twice in"),
        ("lora_rank: 4\nlora-r: 8\n", "lora_rank and lora-r both are --lora-r: keep one of them"),
        ("lora: {r: 4}\nlora_r: 8\n", "lora_r and lora_r both are --lora-r: keep one of them"),
        ("model_name_or_path: a\nmodel: b\n", "model_name_or_path and model both are --model: keep one of them"),
        ("config: other.yaml\n", "config: a file cannot name another: give both on the command line"),
        ("dataset: {path: a}\n", "dataset: a block of keys is no value for it"),
        ("dataset: [[a]]\n", "dataset: pick one of ['a']"),
        ("lora_target_modules: [q_proj, --overwrite]\n", "lora_target_modules: --overwrite is no value for it"),
        ("lora_target_modules: [[q_proj]]\n", "lora_target_modules: ['q_proj'] is no value for it"),
        ("lora_target_modules: [q_proj, {a: b}]\n", "lora_target_modules: {'a': 'b'} is no value for it"),
        ("lora_target_modules: [q_proj, '']\n", "--lora-target-modules is empty: give it a value, or leave it out"),
        ("output_dir: ''\n", "--output-dir is empty: give it a value, or leave it out"),
        ("adapter: ''\n", "--adapter is empty: give it a value, or leave it out"),
        ('cache_dir: "a\\0b"\n', "--cache-dir has a zero byte in it, which no name has"),
    ],
)
def test_a_mistake_in_the_file_names_the_file(capsys, config, tmp_path, text, sentence):
    with pytest.raises(SystemExit) as exit:
        config(text)
    assert exit.value.code == 2
    line = one_line(capsys)
    assert str(tmp_path / "run.yaml") in line and sentence in line


def test_a_mistake_on_the_command_line_does_not_blame_the_file(capsys, config, tmp_path):
    with pytest.raises(SystemExit):
        config("beta: 0.3\n", "--beta", "0")
    assert one_line(capsys) == "dpo_hf_run.py: --beta: has to be above 0, got 0"


def test_a_missing_config_file(capsys, tmp_path):
    line = refused(capsys, "--config", tmp_path / "none.yaml")
    assert line.startswith(f"dpo_hf_run.py: --config {tmp_path}/none.yaml cannot be read")


@pytest.mark.parametrize("content", [b"\xff\xfe", None], ids=["not UTF-8", "a folder"])
def test_a_config_file_that_is_no_text(capsys, tmp_path, content):
    (tmp_path / "run.yaml").write_bytes(content) if content else (tmp_path / "run.yaml").mkdir()
    assert "run.yaml cannot be read" in refused(capsys, "--config", tmp_path / "run.yaml")


# -- every flag has an effect -----------------------------------------------------------------------------------------


@pytest.fixture
def run(world, tmp_path):
    """run(flag=value, ...) -> Run; each call writes a folder of its own."""
    folders = iter(range(100))
    return lambda **changes: dpo_run(world, tmp_path / f"run{next(folders)}", **changes)


@pytest.fixture(scope="session")
def plain(world, tmp_path_factory):
    """The run that the others are compared with."""
    return dpo_run(world, tmp_path_factory.mktemp("plain") / "run")


def test_the_same_flags_give_the_same_bytes(plain, run):
    again = run()
    assert again.bytes == plain.bytes
    assert again.losses == plain.losses


def test_the_plain_run_is_what_the_others_assume(plain):
    assert [line["step"] for line in plain.train] == [1, 2]
    assert [line["step"] for line in plain.evals] == [0, 2]
    assert plain.losses[0] == pytest.approx(LN2, abs=1e-6)
    assert abs(plain.losses[1] - LN2) > 1e-3


@pytest.mark.parametrize(
    "changes",
    [
        dict(seed=1),
        dict(lora_alpha=8),
        dict(lora_dropout=0.5),
        dict(beta=0.5),
        dict(weight_decay=0.5),
        dict(max_grad_norm=1e-9),  # Adam divides a smaller gradient away, but for its epsilon
        dict(nll_coeff=1.0),
        dict(label_smoothing=0.3),
        dict(loss="robust", label_smoothing=0.3),
        dict(loss="hinge"),
        dict(loss="ipo"),
        dict(lr_scheduler="constant"),
        dict(warmup_steps=1),
        dict(learning_rate=1e-3),
        dict(batch_size=2),
        dict(gradient_accumulation_steps=2),
        dict(dtype="bf16"),
        dict(max_length=7, max_prompt_length=4),
        dict(max_prompt_length=4),
        dict(chat_template_strings=True),
        dict(num_samples=12),
        dict(eval_samples=0),
    ],
    ids=lambda changes: " ".join(f"{name}={value}" for name, value in changes.items()),
)
def test_flag_changes_the_adapter(plain, run, changes):
    assert run(**changes).bytes != plain.bytes


@pytest.mark.parametrize(
    "changes",
    [
        dict(loss="robust"),  # without label smoothing it is the sigmoid loss
        dict(eval_steps=1),
        dict(logging_steps=2),
        dict(skip_invalid=True),
        dict(trust_remote_code=True),
        dict(save_merged=True),
        dict(num_samples=0),
        dict(epochs=2),
        dict(max_grad_norm=1e9),
        dict(optimizer_offload=True),
    ],
    ids=lambda changes: " ".join(f"{name}={value}" for name, value in changes.items()),
)
def test_flag_leaves_the_adapter_byte_for_byte(plain, run, changes):
    if "max_grad_norm" in changes:  # no clipping at all is what a high bound is
        plain = run(max_grad_norm=0)
    assert run(**changes).bytes == plain.bytes


def test_8_bit_moments(plain, run):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (pip install bitsandbytes)")
    assert run(optimizer="adamw8bit", lora_r=64).bytes != run(lora_r=64).bytes  # tensors of 4,096 numbers


@pytest.mark.parametrize("script", SCRIPTS)
def test_8_bit_moments_without_bitsandbytes(monkeypatch, capsys, tmp_path, script):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    own = {train_rm: ["--task=helpful"], train_with_preference_prompt: ["--preference-text=x"]}
    own[learn_prompt] = ["--prompt-init=vocab"]
    with pytest.raises(SystemExit) as exit:
        run_script(
            [*own.get(script, []), "--model=nowhere", f"--output-dir={tmp_path / 'out'}", "--optimizer=adamw8bit"],
            script,
        )
    assert exit.value.code == 2
    line = one_line(capsys)
    assert line.startswith(f"{script.__name__}.py: --optimizer adamw8bit needs bitsandbytes (")
    assert line.endswith("): pip install bitsandbytes, or --optimizer adamw")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("lora_r", [16, 0])
def test_gradient_checkpointing_auto_is_on_where_memory_is_short(monkeypatch, run, capsys, lora_r):
    """What the run takes is the estimate's 0.8 GB for CUDA and next to nothing else: 90 % of 0.85 GB are too few."""
    plain, same = os.sysconf, dict(lora_r=lora_r, max_steps=1, eval_samples=0)
    for size, ranks, said in ((1.0e9, 1, False), (0.85e9, 1, True), (1.7e9, 2, True)):
        memory = {"SC_PHYS_PAGES": int(size), "SC_PAGE_SIZE": 1}
        monkeypatch.setattr(os, "sysconf", lambda name, memory=memory: memory.get(name) or plain(name))
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
        run(**same)
        assert ("gradient checkpointing: on" in capsys.readouterr().out.splitlines()) == said


@pytest.mark.parametrize(
    "changes, updates",
    [
        (dict(max_steps=0), 5),  # 24 - 4 held out = 20 pairs, 4 each
        (dict(max_steps=0, epochs=2), 10),
        (dict(max_steps=7, epochs=2), 7),
        (dict(max_steps=3), 3),
        (dict(max_steps=0, num_samples=12), 2),
        (dict(max_steps=0, eval_samples=0), 6),
        (dict(max_steps=0, eval_samples=0, num_samples=9), 3),  # the last one is short
        (dict(max_steps=0, batch_size=2), 10),
        (dict(max_steps=0, gradient_accumulation_steps=2), 3),
    ],
)
def test_number_of_updates(run, changes, updates):
    assert [line["step"] for line in run(**changes).train] == list(range(1, updates + 1))


@pytest.mark.parametrize("num_samples", [4, 3])  # 3: passes of 2 pairs and of 1
def test_batch_size_times_accumulation_is_one_update_however_it_is_split(run, num_samples):
    same = dict(num_samples=num_samples, eval_samples=0, max_steps=1, max_grad_norm=0)
    whole, split = run(**same), run(**same, batch_size=2, gradient_accumulation_steps=2)
    assert split.train[0]["grad_norm"] == pytest.approx(whole.train[0]["grad_norm"], rel=1e-4)
    assert split.train[0]["logps/chosen"] == pytest.approx(whole.train[0]["logps/chosen"], rel=1e-5)


def test_passes_of_a_budget_of_tokens_are_the_same_update(run, world, monkeypatch, capsys):
    passes, layer = [], transformers.models.qwen3.modeling_qwen3.Qwen3Model
    plain = layer.forward

    def noted(self, *given, **named):
        hidden = plain(self, *given, **named)
        passes.append(hidden[0].shape[:-1].numel())  # tokens
        return hidden

    monkeypatch.setattr(layer, "forward", noted)
    pairs, _ = load_pairs(str(world / "pairs.jsonl"), char_tokenizer(), 512, 256)
    longest = max(sum(map(len, pair[:3])) for pair in pairs)
    same = dict(eval_samples=4, max_steps=1, max_grad_norm=0, num_samples=0, batch_size=8)
    whole = run(**same)
    by_pairs = list(passes)
    passes.clear()
    packed = run(**same, tokens_per_microbatch=3 * longest)
    assert packed.train[0]["grad_norm"] == pytest.approx(whole.train[0]["grad_norm"], rel=1e-4)
    assert packed.train[0]["num_tokens"] == whole.train[0]["num_tokens"] == by_pairs[-2]  # then the evaluation
    assert packed.evals[0]["eval_logps/chosen"] == pytest.approx(whole.evals[0]["eval_logps/chosen"], rel=1e-5)
    assert all(tokens <= 3 * longest for tokens in passes), "reference, evaluation and training alike"
    assert len(passes) > len(by_pairs)
    assert "take a pass each" not in capsys.readouterr().out
    run(**same, tokens_per_microbatch=longest - 1)
    assert f"Pairs of more than {longest - 1} tokens take a pass each; the longest has " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("", "auto"),
        ("--batch-size 3", 0),
        ("--config {config}", 0),
        ("--batch-size 3 --tokens-per-microbatch auto", "auto"),
        ("--tokens-per-microbatch 700", 700),
    ],
)
def test_passes_are_of_tokens_unless_their_pairs_are_given(words, expected, tmp_path):
    config = tmp_path / "some.yaml"
    config.write_text("batch_size: 4\n")
    assert parse(*words.format(config=config).split()).tokens_per_microbatch == expected


def test_auto_is_what_is_fast_on_a_cpu_and_the_same_update(run):
    same = dict(eval_samples=0, max_steps=1, max_grad_norm=0)
    by_pairs, auto = run(**same, batch_size=2), run(**same, batch_size=None)
    flags = [json.loads((one.folder / "args.json").read_text())["tokens_per_microbatch"] for one in (by_pairs, auto)]
    assert flags == [0, 1024]
    assert auto.train[0]["num_tokens"] == by_pairs.train[0]["num_tokens"]
    assert auto.train[0]["grad_norm"] == pytest.approx(by_pairs.train[0]["grad_norm"], rel=1e-4)


def test_eval_samples(run, capsys):
    assert run(eval_samples=0).evals == []
    assert "held out" not in capsys.readouterr().out
    run(eval_samples=6)
    assert "held out 6 pairs by whole prompts, 18 to train on" in capsys.readouterr().out
    run(eval_samples=None)
    assert "held out 2 pairs by whole prompts, 22 to train on" in capsys.readouterr().out  # a tenth


def test_eval_dataset_is_evaluated_and_nothing_is_held_out(run, tmp_path, capsys):
    rows = [{"prompt": "z? ", "chosen": "ab", "rejected": "cd"}, {"prompt": "y? ", "chosen": "cd", "rejected": "ab"}]
    path = write_rows(tmp_path / "other.jsonl", rows)
    other = run(eval_dataset=path, eval_samples=None)
    assert "held out" not in capsys.readouterr().out
    assert [line["step"] for line in other.evals] == [0, 2]
    assert run(eval_dataset=path, eval_samples=0).evals == []
    one = run(eval_dataset=path, eval_samples=1)
    assert one.bytes == other.bytes
    assert one.evals[0]["eval_logps/chosen"] != other.evals[0]["eval_logps/chosen"]
    assert one.evals[0]["eval_logps/chosen_ci95"] == 0  # of a single pair


def test_eval_steps_and_logging_steps(run):
    result = run(max_steps=5, eval_steps=2, logging_steps=3)
    assert [line["step"] for line in result.evals] == [0, 2, 4, 5]
    assert [line["step"] for line in result.train] == [3, 5]


def test_a_log_line_is_the_mean_over_its_updates(run):
    each, pair = run(max_steps=4), run(max_steps=4, logging_steps=2)
    for key in ("loss", "logps/chosen", "rewards/margins"):
        means = [sum(line[key] for line in each.train[start : start + 2]) / 2 for start in (0, 2)]
        assert [line[key] for line in pair.train] == pytest.approx(means, rel=1e-5)
    assert [line["num_tokens"] for line in pair.train] == [each.train[1]["num_tokens"], each.train[3]["num_tokens"]]


@pytest.mark.parametrize(
    "changes, rates",
    [
        (dict(), [0.01 * 3 / 4, 0.01 * 2 / 4, 0.01 / 4, 0]),
        (dict(lr_scheduler="constant"), [0.01] * 4),
        (dict(lr_scheduler="cosine"), [0.01 * 0.8535534, 0.005, 0.01 * 0.1464466, 0]),
        (dict(warmup_steps=2), [0.005, 0.01, 0.005, 0]),
        (dict(warmup_steps=2, lr_scheduler="constant"), [0.005, 0.01, 0.01, 0.01]),
    ],
    ids=["linear", "constant", "cosine", "warmup", "constant behind a warm-up"],
)
def test_learning_rate_over_the_updates(run, changes, rates):
    logged = [line["learning_rate"] for line in run(max_steps=4, **changes).train]
    assert logged == pytest.approx(rates, abs=1e-8)


@pytest.mark.parametrize(
    "changes, rate, line",
    [
        (dict(learning_rate=None), 1e-4, "--learning-rate 0.0001, the default with LoRA (5e-06 is for all weights)"),
        (dict(learning_rate=5e-6), 5e-6, "--learning-rate 5e-06 is for all weights: with LoRA a start is 1e-4"),
        (dict(learning_rate=6e-6), 6e-6, None),
        (dict(learning_rate=None, lora_r=0), 5e-6, None),
    ],
)
def test_the_rate_of_lora_and_of_all_weights_and_what_is_said_of_it(run, capsys, changes, rate, line):
    result = run(lr_scheduler="constant", **changes)
    assert [logged["learning_rate"] for logged in result.train] == [rate, rate]
    said = [row for row in capsys.readouterr().out.splitlines() if "all weights" in row]
    assert [row.startswith(line) for row in said] == [True] if line else said == []


def test_a_warm_up_that_is_longer_than_the_run_is_said(run, capsys):
    result = run(warmup_steps=8, max_steps=2)
    assert result.train[-1]["learning_rate"] == pytest.approx(0.01 * 2 / 8)
    said = "--warmup-steps 8 is longer than the run of 2 updates: its rate ends at 0.0025, not 0.01\n"
    assert said in capsys.readouterr().out
    run(warmup_steps=2, max_steps=2)
    assert "--warmup-steps" not in capsys.readouterr().out


def test_weight_decay_shrinks_a(plain, run):
    # With B = 0 the first update leaves A no gradient: AdamW's decay alone moves it, by lr * decay.
    start, decayed = run(max_steps=1), run(max_steps=1, weight_decay=0.5)
    for key in start.weights:
        if "lora_A" in key:
            torch.testing.assert_close(decayed.weights[key], start.weights[key] * (1 - 0.01 * 0.5))


def test_max_grad_norm_logs_the_norm_before_the_cut(plain, run):
    clipped = run(max_grad_norm=1e-9)
    assert clipped.train[0]["grad_norm"] == plain.train[0]["grad_norm"] > 1e-3


@pytest.mark.parametrize(
    "changes, first",
    [
        (dict(loss="sigmoid", label_smoothing=0.2), LN2),
        (dict(loss="robust", label_smoothing=0.2), LN2),
        (dict(loss="hinge"), 1.0),
        (dict(loss="ipo", beta=0.25), 4.0),
    ],
)
def test_first_loss_of_each_variant(run, changes, first):
    result = run(**changes)
    assert result.evals[0]["eval_loss"] == pytest.approx(first, abs=1e-5)
    assert result.losses[0] == pytest.approx(first, abs=1e-5)


def test_nll_coeff_adds_that_much_of_the_nll(run):
    first = run(nll_coeff=0.5).train[0]
    assert first["nll_loss"] > 1
    assert first["loss"] == pytest.approx(LN2 + 0.5 * first["nll_loss"], abs=1e-5)


def test_beta_scales_the_rewards_and_is_logged(run):
    last = run(beta=0.3).train[-1]
    assert last["beta"] == 0.3
    assert last["rewards/chosen"] == pytest.approx(0.3 * last["logps/chosen_change"], rel=1e-5)
    assert last["rewards/chosen"] != 0


@pytest.mark.parametrize(
    "changes, r, alpha, targets",
    [
        (dict(), 16, 32, 7),
        (dict(lora_r=4), 4, 32, 7),
        (dict(lora_r=4, lora_alpha=2), 4, 2, 7),
        (dict(lora_target_modules=["q_proj", "up_proj"]), 16, 32, 2),
        (dict(lora_target_modules=["all-linear"]), 16, 32, 7),
    ],
)
def test_lora_flags_shape_the_adapter(run, changes, r, alpha, targets):
    result = run(lora_dropout=0.25, **changes)
    config = json.loads((result.folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (r, alpha, 0.25)
    assert len(config["target_modules"]) == targets
    assert len(result.weights) == targets * 2 * 2  # A and B in two blocks
    assert {min(tensor.shape) for tensor in result.weights.values()} == {r}


def test_dtype_bf16_is_the_type_of_the_base_and_not_of_the_adapter(run, capsys):
    result = run(dtype="bf16")
    assert "(cpu, bfloat16)" in capsys.readouterr().out
    assert {tensor.dtype for tensor in result.weights.values()} == {torch.float32}


def test_max_length_and_max_prompt_length_cut(run, capsys):
    run(max_length=7, max_prompt_length=4)
    assert "cut 23 pairs to --max-length 7 or --max-prompt-length 4" in capsys.readouterr().out


def test_chat_template_strings_puts_the_template_around_strings(run, capsys):
    run(chat_template_strings=True)
    assert r"'<|im_start|>user\na0?<|im_end|>\n<|im_start|>assistant\n'" in capsys.readouterr().out


def test_skip_invalid_leaves_a_broken_row_out(run, plain, world, tmp_path, capsys):
    lines = (world / "pairs.jsonl").read_text().splitlines()
    path = write_rows(tmp_path / "pairs.jsonl", [*lines[:5], "broken", *lines[5:]])
    result = run(dataset=path, skip_invalid=True)
    assert f"left out 1 rows: 1 because malformed; the first is {path}:6: not JSON" in capsys.readouterr().out
    assert result.bytes == plain.bytes


def test_num_samples_does_not_read_further(run, world, tmp_path):
    path = write_rows(tmp_path / "pairs.jsonl", [*(world / "pairs.jsonl").read_text().splitlines()[:12], "broken"])
    assert len(run(dataset=path, num_samples=12, max_steps=0).train) == 2


def outputs(model, text="a0? ab"):
    """The logits of a model for a text, in fp64."""
    with torch.no_grad():
        return model.double()(torch.tensor([[ord(character) for character in text]])).logits


def load_model(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def with_adapter(world, folder):
    """The base with an adapter added to its weights here, by hand."""
    model, config = load_model(world / "model"), json.loads((folder / "adapter_config.json").read_text())
    weights, parameters = adapter_of(folder), dict(model.named_parameters())
    for key, b in weights.items():
        if key.endswith("lora_B.weight"):
            a = weights[key.replace("lora_B", "lora_A")]
            name = key.removeprefix("base_model.model.").replace("lora_B.", "")
            with torch.no_grad():
                parameters[name] += config["lora_alpha"] / config["r"] * b @ a
    return model


def test_save_merged_is_base_plus_adapter(run, world):
    result = run(save_merged=True)
    merged = outputs(load_model(result.folder / "merged"))
    torch.testing.assert_close(merged, outputs(with_adapter(world, result.folder)), rtol=1e-5, atol=1e-5)
    assert (merged - outputs(load_model(world / "model"))).abs().max() > 0.1
    tokenizer = transformers.AutoTokenizer.from_pretrained(result.folder / "merged")
    assert tokenizer("ab")["input_ids"] == [97, 98]


def test_ref_model_path_is_the_reference(run, plain, tmp_path):
    other = write_model(tmp_path / "other", seed=5)
    result = run(ref_model_path=other)
    assert abs(result.evals[0]["eval_loss"] - LN2) > 1e-2
    assert result.evals[0]["eval_logps/chosen"] == plain.evals[0]["eval_logps/chosen"]  # the policy is the same


def test_ref_model_path_of_the_same_model_changes_nothing(run, plain, world):
    result = run(ref_model_path=world / "model")
    assert result.losses == pytest.approx(plain.losses, abs=1e-6)


def test_adapter_goes_on_from_an_adapter_and_refers_to_it(run, plain, world):
    result = run(adapter=plain.folder)
    assert result.evals[0]["eval_loss"] == pytest.approx(LN2, abs=1e-6)
    assert result.evals[0]["eval_rewards/margins"] == pytest.approx(0, abs=1e-6)
    # it starts where the other run ended, not at the base
    assert result.evals[0]["eval_logps/chosen"] == pytest.approx(plain.evals[-1]["eval_logps/chosen"], abs=1e-4)
    assert abs(plain.evals[-1]["eval_logps/chosen_change"]) > 1e-2
    assert result.weights.keys() == plain.weights.keys()
    change = outputs(with_adapter(world, result.folder)) - outputs(with_adapter(world, plain.folder))
    assert change.abs().max() > 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_lora_r_0_trains_all_weights_and_saves_a_model(run, world, dtype):
    result = run(lora_r=0, dtype="fp32" if dtype == torch.float32 else "bf16")
    assert result.evals[0]["eval_loss"] == pytest.approx(LN2, abs=1e-6)
    assert result.evals[-1]["eval_loss"] < LN2 - 0.01 or result.losses[-1] < LN2 - 0.01
    assert not (result.folder / "adapter_config.json").exists()
    assert json.loads((result.folder / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    base, trained = load_model(world / "model"), load_model(result.folder)
    same = [n for (n, p), q in zip(base.named_parameters(), trained.parameters(), strict=True) if torch.equal(p, q)]
    assert same == []


def test_report_to_none_writes_no_events_and_logging_dir_takes_them(run, tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed: no event files to read back")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert not list(run().folder.rglob("events.*"))
    result = run(report_to="tensorboard", logging_dir=tmp_path / "events")
    assert not list(result.folder.rglob("events.*"))
    events = EventAccumulator(str(tmp_path / "events")).Reload()
    for prefix, tag, lines in (("", "train/", result.train), ("eval_", "eval/", result.evals)):
        for key in ("loss", "rewards/accuracies", "rewards/margins", "logps/chosen"):
            logged = [(event.step, event.value) for event in events.Scalars(tag + key)]
            assert logged == [(line["step"], pytest.approx(line[prefix + key], rel=1e-6)) for line in lines]
    assert [event.value for event in events.Scalars("train/learning_rate")] == pytest.approx([0.005, 0])
    assert [path.parent.name for path in run(report_to="auto").folder.rglob("events.*")] == ["logs"]


def test_the_toy_world_is_a_name_for_model_and_data(monkeypatch, world, tmp_path, capsys):
    # The real world takes 20 s to build and has its own tests; here it is our tiny one in its place.
    toy = tmp_path / "toy"
    for split in ("train", "test"):
        (toy / split).mkdir(parents=True)
        (toy / split / "helpful_pairs.jsonl").write_text((world / "pairs.jsonl").read_text())
    (toy / "model").symlink_to(world / "model")
    monkeypatch.setattr(toy_world, "build", lambda folder: toy)
    result = dpo_run(world, tmp_path / "run", model="toy", dataset="toy", eval_samples=None, max_steps=1)
    out = capsys.readouterr().out
    assert f"{toy}/train/helpful_pairs.jsonl: prompt/chosen/rejected, 24 rows" in out
    assert f"{toy}/test/helpful_pairs.jsonl: prompt/chosen/rejected, 24 rows" in out
    assert "held out" not in out
    assert [line["step"] for line in result.evals] == [0, 1]


# -- args.json goes back in -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        dict(seed=3, lora_r=8, lora_target_modules=["q_proj", "v_proj"], beta=0.2),
        dict(lora_r=0),
        dict(gradient_checkpointing="on", max_length=64, max_prompt_length=32, eval_samples=0),
        dict(adapter=True),
    ],
    ids=["LoRA", "all weights", "strings that YAML reads as booleans", "from an adapter"],
)
def test_args_json_of_a_run_is_a_config_for_the_same_run(run, plain, changes):
    if "adapter" in changes:
        changes = dict(adapter=plain.folder)
    result = run(**changes)
    written = json.loads((result.folder / "args.json").read_text())
    args = parse("--config", result.folder / "args.json")
    others = ("config", "given", "typed", "full_rate", "local_rank", "estimate_memory", "as_begun")
    again = {name: value for name, value in vars(args).items() if name not in others}
    assert again == written
    again = run(**dict.fromkeys(DPO), model=None, dataset=None, config=result.folder / "args.json")
    assert again.losses == result.losses


def test_args_json_is_yaml_too(plain):
    text = (plain.folder / "args.json").read_text()
    assert yaml.safe_load(text) == json.loads(text)


# -- no flag without a test -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", [dpo_hf_run, train_rm], ids=lambda script: script.__name__)
def test_every_option_of_the_parser_stands_in_some_test(script):
    """Also as a keyword of Run, learning_rate=..., which becomes the flag."""
    text = "".join(path.read_text("utf-8") for path in sorted(Path(__file__).parent.glob("*.py")))
    missing = []
    for action in parser_actions(script):
        for option in action.option_strings:
            name = re.escape(option.lstrip("-")).replace(r"\-", "[-_]")
            if option != "-h" and not re.search(rf"--{name}\b(?!-)|\b{name}=", text):
                missing.append(option)
    assert missing == []
