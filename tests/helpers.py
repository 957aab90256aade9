"""The project as the tests see it: where it is, its scripts, their flags."""

import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = "formats", "harness", "tools"  # of code, beside the files of the root
SOURCES = {path.name: path.read_text("utf-8") for path in sorted(ROOT.glob("*.py"))}  # of the root
SCRIPTS = [name for name, text in SOURCES.items() if "def main(args):" in text]  # and toy_world.py, which is a leaf too
TRAINERS = [name[:-3] for name in SCRIPTS if "training_flags.add_common_flags(" in SOURCES[name]]  # their modules
READMES = ["README.md", "README.zh.md"]


def copy_code(folder):
    """The scripts and all that they import, copied into a folder."""
    for path in ROOT.glob("*.py"):
        shutil.copy(path, folder)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))


def parser_actions(script):
    """The arguments of a script module's own parser, which its get_args builds and throws away."""
    original = script.flags.Parser

    class Built(Exception):
        pass

    class Caught(original):
        def parse_args(self, argv=None):
            raise Built(self._actions)  # before it misses a flag that is required

    script.flags.Parser = Caught
    try:
        script.get_args([])
    except Built as built:
        return built.args[0]
    finally:
        script.flags.Parser = original
