"""A script and the files of its `Copy with:` line, copied into an empty folder, are all that a lesson needs."""

import ast
import os
import re
import shutil
import subprocess
import sys

import pytest
from test_flags import ROOT, write_world

TREES = {path.name: ast.parse(path.read_text("utf-8")) for path in sorted(ROOT.glob("*.py"))}


def has_main(tree):
    """Whether a module ends in `if __name__ == "__main__"`: such a file is a script, any other a leaf."""
    return any(isinstance(node, ast.If) and "__name__" in ast.unparse(node.test) for node in tree.body)


SCRIPTS = [name for name, tree in TREES.items() if has_main(tree)]
LEAVES = [name for name in TREES if name not in SCRIPTS]


def sibling_imports(tree):
    """Files of this folder that a module imports, anywhere in it, inside functions too."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "." * node.level)
    return {f"{name.partition('.')[0]}.py" for name in names} & TREES.keys()


def all_imports(name):
    """Files that a module needs: those it imports, and what those import in turn."""
    found, new = set(), sibling_imports(TREES[name])
    while new:
        found |= new
        new = {sibling for known in new for sibling in sibling_imports(TREES[known])} - found
    return found


def copy_with(tree):
    """The files that the docstring names: the `Copy with:` line and the indented lines behind it."""
    found = re.search(r"^Copy with:(.*(?:\n[ \t]+\S.*)*)", ast.get_docstring(tree, clean=False) or "", re.MULTILINE)
    return found and found.group(1).split()


def test_there_are_scripts_and_leaves():
    assert "dpo_hf_run.py" in SCRIPTS
    assert {"lora.py", "losses.py", "preference_data.py", "flags.py", "run_files.py"} <= set(LEAVES)


@pytest.mark.parametrize("name", SCRIPTS)
def test_copy_with_names_exactly_what_the_script_needs(name):
    named = copy_with(TREES[name])
    assert named, f"the docstring of {name} has no `Copy with:` line"
    assert len(named) == len(set(named))
    assert set(named) == all_imports(name)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_imports_no_script(name):
    assert sibling_imports(TREES[name]) & set(SCRIPTS) == set()


@pytest.mark.parametrize("name", LEAVES)
def test_a_leaf_imports_no_script_and_not_itself_and_is_not_run(name):
    assert all_imports(name) & {name, *SCRIPTS} == set()
    assert copy_with(TREES[name]) is None
    assert "__main__" not in {node.value for node in ast.walk(TREES[name]) if isinstance(node, ast.Constant)}


@pytest.mark.parametrize("name", TREES)
def test_a_file_has_at_most_400_lines(name):
    # Four roles, three objectives and the constraint; two prompts, two teachers and the KL: read top to bottom each.
    most = {"train_safe_mm_dpo.py": 536, "train_with_preference_prompt.py": 470, "toy_world.py": 412}.get(name, 400)
    assert len((ROOT / name).read_text("utf-8").splitlines()) <= most


# What each script is run with after the copy; {world} is a folder with a tiny model and pairs.
RUNS = {
    "dpo_hf_run.py": "--model {world}/model --dataset {world}/pairs.jsonl --max-steps 1 --device cpu",
    "train_rm.py": "--task harmless --model {world}/model --train-harmless-path {world}/pairs.jsonl "
    "--val-harmless-path {world}/pairs.jsonl --max-steps 1 --device cpu",
    "train_safe_mm_dpo.py": "--model {world}/model --train-helpful-path {world}/pairs.jsonl --eval-samples 0 "
    "--lambda-init 0 --w 0 --max-steps 1 --report-to none --device cpu",
    "train_with_preference_prompt.py": "--model {world}/model --dataset-path {world}/pairs.jsonl --preference-text "
    "polite --max-steps 1 --gradient-accumulation-steps 2 --device cpu",
    "learn_prompt.py": "--model {world}/model --dataset-path {world}/pairs.jsonl --preference-text polite "
    "--max-steps 1 --device cpu",
    "prepare_data.py": "--input {world}/pairs.jsonl --dimension helpful",
    "evaluate_alignment.py": "--model {world}/model --prompts {world}/pairs.jsonl --num-samples 2 --max-new-tokens 4 "
    "--device cpu",
    "generate.py": "--model {world}/model --prompts {world}/pairs.jsonl --num-samples 2 --max-new-tokens 4 "
    "--output run/responses.jsonl --device cpu",
}
LEAVES_BEHIND = {  # a training script: these below
    "prepare_data.py": ["train/helpful_pairs.jsonl", "account.json"],
    "generate.py": ["responses.jsonl", "responses.jsonl.args.json"],
    "evaluate_alignment.py": ["report.json", "report.html", "report.txt", "responses.jsonl"],
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_copied_script_runs(name, tmp_path):
    assert name in RUNS, f"{name} is new: say in RUNS with which flags it can run in a second"
    lesson, world = tmp_path / "lesson", write_world(tmp_path / "world")
    lesson.mkdir()
    for file in [name, *copy_with(TREES[name])]:
        shutil.copy(ROOT / file, lesson)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}  # only the copies count
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    words = RUNS[name].format(world=world).split()
    words += [] if "--output" in words else ["--output-dir", "run"]
    done = subprocess.run(
        [sys.executable, name, *words],
        cwd=lesson,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "saved to run" in done.stdout
    left = LEAVES_BEHIND.get(name, ["adapter_model.safetensors", name])
    assert [file for file in left if not (lesson / "run" / file).exists()] == []
    if name in left:
        assert (lesson / "run" / name).read_text("utf-8") == (ROOT / name).read_text("utf-8")
