"""The tests' own house: what several of them need stands in a file of its own, not in another test."""

import ast
from pathlib import Path

import pytest

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
