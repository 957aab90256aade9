"""Every command line in READMEs, docs, docstrings and shell scripts is parsed by the script it runs; every flag and
file that the READMEs name exists; every flag of a training script is documented.
"""

import argparse
import importlib
import re
import shlex

import pytest
from helpers import READMES, ROOT, SCRIPTS, parser_actions

from harness import flag_names

LESSONS = [f"lessons/{name}" for name in READMES]
DOCUMENTS = [*READMES, *LESSONS, *sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("docs/*.md"))]
SHELL = sorted(str(path.relative_to(ROOT)) for folder in ("", "scripts/") for path in ROOT.glob(f"{folder}*.sh"))
# Flags of other programs that the READMEs may name.
FOREIGN_FLAGS = {
    *("--nproc-per-node", "--nnodes", "--node-rank", "--master-addr", "--master-port", "--standalone"),  # torchrun
    *("--rdzv-backend", "--rdzv-endpoint", "--num-processes", "--num-gpus", "--logdir", "--version"),
    *("--include", "--dry-run"),  # deepspeed, the wrappers
    "--faults",  # run_tests.sh
    *("--index-url", "--extra-index-url", "--upgrade", "--find-links", "--help", "--durations"),  # pip, pytest
}

RUNS_PYTHON = r"(?:\S*python[\d.]*|\S*torchrun|accelerate launch|deepspeed|\"\$py\")"
COMMAND = re.compile(rf"(?<![\w/.-]){RUNS_PYTHON}[ \t][^\n`|;&<>#]*?\b([\w/.-]+\.py)\b([^\n`]*)")


def text_of(name):
    if not (ROOT / name).exists():
        pytest.skip(f"{name} is not written yet")
    return (ROOT / name).read_text("utf-8")


def variables_of(text):
    """{name: value} of the plain assignments of a shell script; ${NAME:-value} gives its default."""
    found = re.findall(r"^\s*(?:export |local )?(\w+)=(\"[^\"\n]*\"|'[^'\n]*'|[^\s#]*)", text, re.MULTILINE)
    return {name: re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", value.strip("\"'")) for name, value in found}


def commands(text):
    """(script, words) of every command in a text that runs a Python file of ours, as far as a person would type it."""
    joined, variables = re.sub(r"\\\n\s*", " ", text), variables_of(text)
    found = []
    for script, rest in COMMAND.findall(joined):
        rest = re.sub(r"\"?\$(?:@|\*|\{\w+\[@\][^}]*\})\"?", " ", rest)  # further words of whoever calls the wrapper
        rest = re.sub(r"\$\{(\w+):-([^}]*)\}", r"\2", rest)
        rest = re.sub(r"\$\{?(\w+)\}?", lambda match: variables.get(match.group(1), match.group()), rest)
        lexer = shlex.shlex(rest, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        lexer.commenters = "#"
        words = []
        for word in lexer:
            if set(word) <= set("();<>|&"):  # the command ends here
                break
            words.append(word)
        found.append((script, [word for word in words if word not in ("...", "…", "[...]")]))
    return found


def parser_of(script):
    return importlib.import_module(script.removesuffix(".py")).get_args


SOURCES = [*DOCUMENTS, *SHELL, *SCRIPTS]


def commands_of(name):
    text = text_of(name)
    if name.endswith(".py"):
        text = importlib.import_module(name.removesuffix(".py")).__doc__
    return commands(text)


@pytest.mark.parametrize("name", SOURCES)
def test_every_command_is_one_that_its_script_takes(name, capsys):
    for script, words in commands_of(name):
        assert (ROOT / script).exists(), f"{name} runs {script}, which does not exist"
        if script not in SCRIPTS:
            continue
        try:
            parser_of(script)(words)
        except SystemExit as exit:
            assert exit.code == 0, f"{name}: {script} {' '.join(words)}\n{capsys.readouterr().err}"


@pytest.mark.parametrize("name", ["README.md", "quickstart.sh", *SCRIPTS])
def test_commands_are_found_where_there_are_some(name):
    assert [script for script, _ in commands_of(name) if script in SCRIPTS], f"no command of ours in {name}"


def test_the_search_for_commands_finds_what_people_write():
    text = """
    Run `python dpo_hf_run.py --seed 1`, or:
        MODEL=${MODEL:-toy}
        torchrun --nproc_per_node=4 dpo_hf_run.py \\
            --model "$MODEL" --dataset a_b.jsonl  # four GPUs
        OMP_NUM_THREADS=1 .venv/bin/python dpo_hf_run.py --beta 0.3 "$@" >log.txt 2>&1 &
        CUDA_VISIBLE_DEVICES=0 python3 dpo_hf_run.py --seed ${SEED:-3} "${flags[@]}" && echo done
    The file dpo_hf_run.py is no command.
    """
    assert commands(text) == [
        ("dpo_hf_run.py", ["--seed", "1"]),
        ("dpo_hf_run.py", ["--model", "toy", "--dataset", "a_b.jsonl"]),
        ("dpo_hf_run.py", ["--beta", "0.3"]),
        ("dpo_hf_run.py", ["--seed", "3"]),
    ]


def options_of(script):
    """Option strings of a script's parser that its --help shows."""
    actions = parser_actions(importlib.import_module(script.removesuffix(".py")))
    return {option for action in actions if action.help != argparse.SUPPRESS for option in action.option_strings}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_flag_in_inline_code_exists(name):
    text = re.sub(r"^\s*```.*?^\s*```", "", text_of(name), flags=re.MULTILINE | re.DOTALL)
    known = set.union(*(options_of(script) for script in SCRIPTS)) | FOREIGN_FLAGS | {"--local-rank"}
    known |= {*flag_names.SAME, *flag_names.VALUES, *flag_names.INSTEAD}
    named = {flag.replace("_", "-") for code in re.findall(r"`([^`\n]+)`", text) for flag in flags_in(code)}
    assert named - known == set()


def flags_in(text):
    return re.findall(r"(?<![\w-])--[^\W\d][\w-]*", text)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_file_that_is_named_exists(name):
    # But for the map from the documents' paths to ours, which says what is not here yet.
    text = "\n".join(line for line in text_of(name).splitlines() if not re.search("lesson5/|code/|not here yet", line))
    files = set(re.findall(r"(?<![\w/.*-])((?:[\w-]+/)*[\w-]+\.(?:py|sh))\b", text))
    missing = {
        file
        for file in files
        if not any((ROOT / folder / file).exists() for folder in ("", "tests", "scripts", "lessons"))
    }
    assert missing == set()


PAIRED = [
    ("dpo_hf_run.py", "docs/flags.md"),
    ("train_rm.py", "docs/train_rm.md"),
    ("train_safe_mm_dpo.py", "docs/safe_mm_dpo.md"),
    ("evaluate_alignment.py", "docs/evaluate.md"),
    ("generate.py", "docs/generate.md"),
    ("train_with_preference_prompt.py", "docs/preference_prompt.md#Flags of `train_with_preference_prompt.py`"),
    ("learn_prompt.py", "docs/preference_prompt.md#Flags of `learn_prompt.py`"),
]


def section_of(document):
    """The text of a document, or of FILE#HEADING the part below that heading."""
    name, _, heading = document.partition("#")
    parts = re.split(r"^## (.*)\n", text_of(name), flags=re.MULTILINE)
    return parts[parts.index(heading) + 1] if heading else text_of(name)


@pytest.mark.parametrize("script, document", PAIRED)
def test_every_flag_of_a_script_is_documented(script, document):
    documented = {flag.replace("_", "-") for flag in flags_in(section_of(document))}
    assert options_of(script) - documented - {"-h", "--help", "--config", "--local-rank"} == set()


@pytest.mark.parametrize("script, document", PAIRED)
def test_a_document_gives_the_defaults_of_its_script(script, document):
    """The table's second column, where it is a number."""
    defaults = {
        action.option_strings[0]: action.default
        for action in parser_actions(importlib.import_module(script.removesuffix(".py")))
    }
    rows = re.findall(r"^\| `(--[\w-]+)`[^|]*\| (-?[\d.e-]+) \|", section_of(document), re.MULTILINE)
    assert len(rows) > 7
    assert {flag: float(number) for flag, number in rows} == {flag: defaults[flag] for flag, _ in rows}


@pytest.mark.parametrize("script", [name for name in SCRIPTS if name.startswith(("dpo_", "train_", "learn_"))])
def test_every_training_script_has_its_command_for_several_machines(script):
    line = rf"^    torchrun --nnodes=2 --node-rank=0 --master-addr=\S+ --master-port=\d+ --nproc-per-node=8 {script} \S"
    assert re.search(line, text_of("docs/multi_gpu.md"), re.MULTILINE)


def test_the_readme_is_there():
    assert (ROOT / "README.md").exists()
