"""What several test files need that is no fixture."""

import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = "formats", "harness", "tools"  # of code, beside the files of the root


def copy_code(folder):
    """The scripts and all that they import, copied into a folder."""
    for path in ROOT.glob("*.py"):
        shutil.copy(path, folder)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
