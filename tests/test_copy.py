"""The house: which file may import which, how long they may be; a script and what its `Copy with:` line names, copied
into an empty folder, are all that it needs.
"""

import ast
import os
import re
import shutil
import sys

import pytest
from helpers import FOLDERS, ROOT, SCRIPTS
from processes import run_program
from worlds import RUNS, write_world

FILES = [
    path.relative_to(ROOT).as_posix() for folder in (".", *FOLDERS) for path in sorted((ROOT / folder).glob("*.py"))
]
TREES = {name: ast.parse((ROOT / name).read_text("utf-8")) for name in FILES}


LEAVES = [name for name in TREES if name not in SCRIPTS and "/" not in name]
TRAINERS = [name for name in SCRIPTS if "training_flags" in (ROOT / name).read_text("utf-8")]


def imports(name):
    """Files of ours that a module imports, anywhere in it, inside functions too."""
    names = set()
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name}: from {node.module} import ... with leading dots"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return {f"{name.replace('.', '/')}.py" for name in names} & TREES.keys()


def all_imports(name):
    """Files that a module needs: those it imports, and what those import in turn."""
    found, new = set(), imports(name)
    while new:
        found |= new
        new = {further for known in new for further in imports(known)} - found
    return found


def copy_with(tree):
    """The folders and files that the docstring names: the `Copy with:` line and the indented lines behind it."""
    found = re.search(r"^Copy with:(.*(?:\n[ \t]+\S.*)*)", ast.get_docstring(tree, clean=False) or "", re.MULTILINE)
    return found and found.group(1).split()


def floor(name):
    """A module imports what stands on its own floor or below; scripts import no script."""
    if name in SCRIPTS:
        return 4
    return {"formats": 0, "": 1, "harness": 2, "tools": 3}[name.rpartition("/")[0]]


def lines_of_main(name):
    return next(node.end_lineno - node.lineno + 1 for node in TREES[name].body if getattr(node, "name", None) == "main")


def test_there_are_scripts_and_leaves():
    assert len(SCRIPTS) == 9
    assert len(TRAINERS) == 5
    assert {"lora.py", "losses.py", "preference_data.py", "packing.py"} <= set(LEAVES)


def test_the_root_shows_at_most_26_files():
    most = 24 + 2  # vision.py, as pictures are an idea of their own, and toy_vision.py, the world that has some
    assert len(SCRIPTS) + len(LEAVES) <= most


@pytest.mark.parametrize("name", TREES)
def test_imports_point_downwards_and_not_in_circles(name):
    assert [other for other in imports(name) if floor(other) > floor(name)] == []
    assert imports(name) & set(SCRIPTS) == set()
    assert name not in all_imports(name)


@pytest.mark.parametrize("name", SCRIPTS)
def test_copy_with_names_exactly_what_the_script_needs(name):
    named = copy_with(TREES[name])
    assert named, f"the docstring of {name} has no `Copy with:` line"
    assert len(named) == len(set(named))
    needed = all_imports(name)
    folders = {f"{file.partition('/')[0]}/" for file in needed if "/" in file}
    assert set(named) == folders | {file for file in needed if "/" not in file}


WORLDS = "toy_world.py", "toy_vision.py"  # which are commands too


@pytest.mark.parametrize("name", [name for name in TREES if name not in (*SCRIPTS, *WORLDS)])
def test_what_is_imported_is_not_run(name):
    assert copy_with(TREES[name]) is None
    assert "__main__" not in {node.value for node in ast.walk(TREES[name]) if isinstance(node, ast.Constant)}


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_main_of_a_script_is_read_in_one_go(name):
    assert lines_of_main(name) <= (110 if name == "train_safe_mm_dpo.py" else 90)


@pytest.mark.parametrize("name", TREES)
def test_a_file_has_at_most_400_lines(name):
    most = 300 if name in SCRIPTS and name != "train_safe_mm_dpo.py" else 400
    assert len((ROOT / name).read_text("utf-8").splitlines()) <= most


LEAVES_BEHIND = {  # a training script: these below
    "prepare_data.py": ["train/helpful_pairs.jsonl", "account.json"],
    "generate.py": ["responses.jsonl", "responses.jsonl.args.json"],
    "evaluate_alignment.py": ["report.json", "report.html", "report.txt", "responses.jsonl"],
    "gpu_check.py": [],
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_copied_script_runs(name, tmp_path):
    assert name in RUNS, f"{name} is new: say in RUNS with which flags it can run in a second"
    lesson, world = tmp_path / "lesson", write_world(tmp_path / "world")
    lesson.mkdir()
    shutil.copy(ROOT / name, lesson)
    for file in copy_with(TREES[name]):
        if file.endswith("/"):
            shutil.copytree(ROOT / file, lesson / file, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / file, lesson)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}  # only the copies count
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    words = RUNS[name].format(world=world).split()
    left = LEAVES_BEHIND.get(name, ["adapter_model.safetensors", name])
    words += ["--output-dir", "run"] if left and "--output" not in words else []
    done = run_program([sys.executable, name, *words], cwd=lesson, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "saved to run" in done.stdout or not left
    assert [file for file in left if not (lesson / "run" / file).exists()] == []
    if name in left:
        assert (lesson / "run" / name).read_text("utf-8") == (ROOT / name).read_text("utf-8")
