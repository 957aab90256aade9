"""The tests' own house: what several of them need stands in a file of its own, and nothing is waited for for ever."""

import ast
import sys
import time
from pathlib import Path

import pytest
from processes import fork, run_program

FILES = sorted(Path(__file__).parent.glob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_no_test_file_is_imported(path):
    """Nor is conftest.py, which is for fixtures."""
    tree, names = ast.parse(path.read_text("utf-8")), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    assert [name for name in sorted(names) if name.startswith("test_") or name == "conftest"] == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_processes_are_started_where_each_has_a_limit(path):
    starts = {"subprocess.run", "subprocess.Popen", "subprocess.check_output", "os.fork", "os.system", "os.waitpid"}
    calls = [node.func for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.Call)]
    assert path.stem == "processes" or starts & {ast.unparse(call) for call in calls} == set()


HANGS = """
import subprocess, sys
print("began", flush=True)
waits = "import os, time; open('pid', 'w').write(str(os.getpid())); time.sleep(60)"
subprocess.run([sys.executable, "-c", waits], start_new_session=True)
"""


def test_a_program_that_hangs_is_a_failure_that_says_what_it_said_and_what_it_started_is_gone(tmp_path):
    with pytest.raises(pytest.fail.Exception, match=r"not ended after 5 s: (?s:.*)stdout: \.\.\.began\n"):
        run_program([sys.executable, "-c", HANGS], limit=5, cwd=tmp_path)
    words = Path("/proc", (tmp_path / "pid").read_text(), "cmdline")
    for _ in range(100):  # a killed process takes a moment
        gone = not words.exists() or words.read_bytes() == b""  # the latter where nobody has waited for it
        if gone:
            break
        time.sleep(0.1)
    assert gone


def test_a_fork_that_hangs_is_a_failure():
    with pytest.raises(AssertionError, match="a fork has not ended after 1 s"):
        fork(lambda: time.sleep(60), limit=1)
    assert (fork(lambda: None), fork(lambda: sys.exit(3))) == (0, 0)
