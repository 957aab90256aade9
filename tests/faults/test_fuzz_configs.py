"""The YAML files of configs/ with one thing changed: refused in one sentence, or each value is what PyYAML's plainest
reader says that it is.
"""

import importlib
import random
import sys

import pytest
import yaml
from campaigns import SEED
from helpers import ROOT, parser_actions

CASES = 1000  # of each file
FILES = {"dpo_config.yaml": "train_safe_mm_dpo", "rm_config.yaml": "train_rm", "rm_config_full.yaml": "train_rm"}
JUNK = """- [ ] { } : # & * ! | > ' " % @ ` , ? ~
    null Null yes no on off true False 010 0x10 1:30 1e5 .inf .nan -1 1_000 5. +3 1e400
    2026-02-30 2001-01-01T00:00:00Z
    !!int !!float !!timestamp !!binary !!python/object:os.system &a *a << toy auto""".split()
JUNK += ["\t", "\n", "  ", "\x00", "\ufeff", "é", "9" * 5000, "[" * 3000, "{a: " * 2000, "---", "...", "- a", "[1, 2]"]
SWITCHES = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


def mutated(lines, draw):
    """Lines of a config with one thing changed, and what."""
    lines, kind = list(lines), draw.choice("value value value key line twice cut swapped bit indent".split())
    n = draw.choice([n for n, line in enumerate(lines) if ":" in line.partition("#")[0]])
    key, _, value = lines[n].partition("#")[0].rstrip().partition(":")
    junk = draw.choice(JUNK)
    if kind == "value":
        lines[n] = f"{key}: {draw.choice([junk, value + junk, junk + value, f'{junk} 5'])}"
    elif kind == "key":
        lines[n] = f"{draw.choice([key + junk, junk + key, key[:-1], key.upper(), junk])}:{value}"
    elif kind == "line":
        lines.insert(n, junk)
    elif kind == "twice":
        lines.insert(draw.randrange(len(lines)), f"{key.strip()}: {draw.choice([value.strip(), junk, '7'])}")
    elif kind == "cut":
        lines[n:] = [lines[n][: draw.randrange(len(lines[n]))]]
    elif kind == "swapped":
        other = draw.randrange(len(lines))
        lines[n], lines[other] = lines[other], lines[n]
    elif kind == "bit":
        place = draw.randrange(len(lines[n]))
        lines[n] = lines[n][:place] + chr(ord(lines[n][place]) ^ (1 << draw.randrange(7))) + lines[n][place + 1 :]
    else:
        lines[n] = draw.choice([" ", "  ", "\t"]) + lines[n]
    return "\n".join(lines) + "\n", f"{kind} in line {n + 1}"


def plainly(text):
    """{key: text, None or a list} of a config by PyYAML's BaseLoader, its block `lora` as lora_...; and keys that stand
    twice."""
    node, found, twice = yaml.compose(text, yaml.SafeLoader), {}, []

    def take(mapping, prefix):
        names = [key.value for key, _ in mapping.value]
        twice.extend(name for name in names if names.count(name) > 1)
        for key, value in mapping.value:
            if key.value == "lora" and isinstance(value, yaml.MappingNode):
                take(value, "lora_")
            elif isinstance(value, yaml.ScalarNode):
                is_null = value.style is None and value.value in ("", "~", "null", "Null", "NULL")
                found[prefix + str(key.value)] = None if is_null else value.value
            else:
                found[prefix + str(key.value)] = [part.value for part in value.value]

    if node is not None:
        take(node, "")
    return found, twice


def is_meant(action, value, got):
    """Whether a parsed value is what a config says."""
    if action.nargs == 0:
        return SWITCHES.get(value.lower()) == got
    if isinstance(got, list):
        return got == (value if isinstance(value, list) else [value])
    if isinstance(got, bool) or not isinstance(got, int | float):
        return got == value
    return float(value.replace("_", "")) == got


@pytest.mark.parametrize("name", FILES)
def test_configs(name, tmp_path, tally, capsys, monkeypatch):
    script, path = importlib.import_module(FILES[name]), tmp_path / "config.yaml"
    lines = (ROOT / "configs" / name).read_text("utf-8").splitlines()
    actions = {word: action for action in parser_actions(script) for word in action.option_strings}
    words = ["--config", str(path), *(["--task", "helpful"] if FILES[name] == "train_rm" else [])]
    monkeypatch.setattr(sys, "argv", [f"{FILES[name]}.py"])
    for case in range(CASES):
        draw = random.Random(f"{SEED} {name} {case}")
        text, what = mutated(lines, draw) if case % 100 else ("\n".join(lines), "nothing")
        path.write_text(text, "utf-8")
        where = (
            f"case {case}, {what}: {text.splitlines()[int(what.split()[-1]) - 1][:200] if what != 'nothing' else ''}"
        )
        try:
            args = script.get_args(words)
        except SystemExit as end:
            said = capsys.readouterr().err.splitlines()
            tally.count("refused")
            if end.code != 2 or len(said) != 1 or what == "nothing":
                tally.fail(f"{where}\n{end.code} {said}")
            continue
        except Exception as error:
            tally.fail(f"{where}\n{type(error).__name__}: {str(error)[:300]}")
            continue
        tally.count("read")
        found, twice = plainly(text)
        if twice:
            tally.fail(f"{where}\n{twice[0]} stands twice, and is read")
        if SWITCHES.get(str(found.get("use_lora")).lower()) is False:
            found.pop("lora_r", None)  # which it overrules
        for key, value in found.items():
            action = actions.get(f"--{key.replace('_', '-')}")
            if action and value is not None and not is_meant(action, value, getattr(args, action.dest)):
                tally.fail(f"{where}\n{key}: {value!r} is read as {getattr(args, action.dest)!r}")
    tally.done()
