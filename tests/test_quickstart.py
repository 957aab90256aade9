"""quickstart.sh: what the screen shows, how it ends when a step fails; the text with which it closes; its picture.

A .venv whose python writes down what it was called with stands for the training runs.
"""

import os
import pty
import re
import select
import shutil
import sys
from xml.etree import ElementTree

import pytest
from helpers import READMES, ROOT
from machines import write_tool
from processes import end_of, run_program, start

from tools import evaluate_text

sys.path.insert(0, str(ROOT / "benchmarks"))

import quickstart_picture

STEPS = [
    "a reward model learns what is helpful",
    "a reward model learns what is harmless",
    "DPO: learning to help",
    "Safe-MM-DPO: learning to help without harm",
    "before and after",
]
SCRIPTS = ["train_rm.py", "train_rm.py", "dpo_hf_run.py", "train_safe_mm_dpo.py", "evaluate_alignment.py"]
LOG = "outputs/quickstart/quickstart.log"
PYTHON = """printf '%s ' "$@" >>called; echo >>called; echo "$1 says"; echo "$1 complains" >&2
if [ "$1" = evaluate_alignment.py ]; then for out in quickstart quickstart_vision; do mkdir -p outputs/$out/report
  echo THE TABLE >outputs/$out/report/report.txt; done; fi
"""


@pytest.fixture
def project(tmp_path):
    shutil.copy(ROOT / "quickstart.sh", tmp_path)
    write_tool(tmp_path / "setup.sh", 'echo "$@" >set_up')
    write_tool(tmp_path / ".venv/bin/python", PYTHON)
    return tmp_path


def run(project, *words):
    """(exit code, stdout, stderr) of quickstart.sh, called from another folder."""
    command = ["bash", project / "quickstart.sh", *words]
    done = run_program(command, cwd="/")
    return done.returncode, done.stdout, done.stderr


def called(project):
    return [line.split() for line in (project / "called").read_text().splitlines()]


def usual_seconds(world_is_there=False):
    """The seconds of each step that quickstart.sh knows."""
    text = (ROOT / "quickstart.sh").read_text("utf-8")
    seconds = list(map(int, re.search(r"^usual=\((.+?)\)", text, re.MULTILINE).group(1).split()))
    if not world_is_there:
        seconds[0] += int(re.search(r"world_takes=(\d+)", text).group(1))
    return seconds


def test_the_screen_is_five_steps_and_the_result_and_the_rest_is_in_the_log(project):
    code, out, err = run(project)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[:2] == [
        "A tiny model learns to help, then to help without harm.",
        f"Everything the scripts print: {LOG}",
    ]
    for number, line in enumerate(lines[2:7], 1):
        assert re.fullmatch(rf"step {number} of 5  {STEPS[number - 1]}, about \d+ s left", line)
    assert lines[7:11] == [
        "",
        "THE TABLE",
        "",
        "The whole page, in a browser: outputs/quickstart/report/report.html",
    ]
    assert re.fullmatch(r"Done in \d+ s\.  .*README\.md", lines[11]) and len(lines) == 12
    assert max(map(len, lines)) <= 80
    log = (project / LOG).read_text()
    for title, script in zip(STEPS, SCRIPTS, strict=True):
        assert f"---- {title}\n{script} says\n{script} complains\n" in log
    assert [words[0] for words in called(project)] == SCRIPTS


def test_vision_is_the_same_steps_on_the_world_with_pictures(project):
    code, out, _ = run(project, "vision", "--max-steps", 7)
    assert code == 0 and (project / "set_up").read_text() == "vision\n"
    assert "The whole page, in a browser: outputs/quickstart_vision/report/report.html" in out
    assert [words[0] for words in called(project)] == ["-c", *SCRIPTS]
    for words in called(project)[1:]:
        assert words[words.index("--model") + 1] == "toy-vision" and "toy" not in words
        assert any(word.startswith("outputs/quickstart_vision/") for word in words)
    assert called(project)[3][-2:] == ["--max-steps", "7"]
    run(project)
    assert (project / "set_up").read_text() == "\n" and "toy-vision" not in called(project)[-1]


def test_the_time_left_is_that_of_the_steps_to_come_as_long_as_the_earlier_ones_took_here(project):
    write_tool(project / ".venv/bin/python", "sleep 1\n" + PYTHON)
    left = [int(seconds) for seconds in re.findall(r"about (\d+) s left", run(project)[1])]
    usual = usual_seconds()
    assert left[0] == sum(usual)
    assert 0 <= left[1] <= sum(usual[1:]) * 3 / usual[0], "the first took 1 to 2 seconds"
    assert left[2:] == sorted(left[2:], reverse=True) and left[4] <= 2


def test_a_world_that_is_there_is_not_made(project):
    (project / "outputs/toy_world").mkdir(parents=True)
    (project / "outputs/toy_world/manifest.json").touch()
    first = int(re.search(r"about (\d+) s left", run(project)[1]).group(1))
    assert first == sum(usual_seconds(world_is_there=True)) < sum(usual_seconds())


@pytest.mark.parametrize("number, script", [(3, "dpo_hf_run.py"), (4, "train_safe_mm_dpo.py"), (5, SCRIPTS[-1])])
def test_a_step_that_fails_shows_the_end_of_its_log_and_keeps_its_exit_code(project, number, script):
    fails = f'if [ "$1" = {script} ]; then for n in $(seq 30); do echo "line $n"; done; exit 3; fi'
    write_tool(project / ".venv/bin/python", f"{PYTHON}{fails}")
    code, out, err = run(project)
    assert code == 3
    assert err.startswith(f"quickstart.sh: step {number} of 5 ended with exit code 3; the end of {LOG}:\n\nline 16\n")
    assert err.endswith("line 30\n") and err.count("line ") == 15
    assert [words[0] for words in called(project)] == SCRIPTS[:number], "nothing after it"
    assert "THE TABLE" not in out


def test_an_interrupted_step_is_one_line(project):
    write_tool(project / ".venv/bin/python", f"{PYTHON}exit 130")
    code, _, err = run(project)
    assert (code, err) == (130, "quickstart.sh: interrupted\n") and len(called(project)) == 1


def test_a_setup_that_fails_is_the_end(project):
    write_tool(project / "setup.sh", "echo 'setup.sh: no Python' >&2; exit 2")
    code, _, err = run(project)
    assert (code, err) == (2, "setup.sh: no Python\n") and not (project / "called").exists()


@pytest.mark.parametrize("system", ["msys", "cygwin"])
def test_on_windows_bash_names_the_way_that_needs_none(project, system):
    shutil.copy(ROOT / "setup.sh", project)
    done = run_program(["bash", project / "quickstart.sh"], env=os.environ | {"OSTYPE": system})
    assert done.returncode == 2
    assert done.stderr == ("setup.sh: on Windows use WSL, or the lines for Windows in README.md, which need no bash\n")
    assert "## Windows" in (ROOT / "README.md").read_text("utf-8") and not (project / "called").exists()


def test_the_help_of_setup_makes_nothing(project):
    (project / "setup.sh").write_text((ROOT / "setup.sh").read_text("utf-8"))
    shutil.rmtree(project / ".venv")
    done = run_program(["bash", project / "setup.sh", "--help"], cwd="/")
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("Makes .venv, or finds it whole")
    assert not (project / ".venv").exists()


def test_further_flags_go_to_the_dpo_run(project):
    assert run(project, "--max-steps", "50")[0] == 0
    checked, *steps = called(project)
    assert checked[0] == "-c" and checked[-2:] == ["--max-steps", "50"], "looked at before the first step"
    assert [words[0] for words in steps if words[-2:] == ["--max-steps", "50"]] == ["dpo_hf_run.py"]


def test_a_wrong_flag_is_one_sentence_before_the_first_step(project):
    write_tool(project / ".venv/bin/python", f'PYTHONPATH="{ROOT}" exec {sys.executable} "$@"')
    code, out, err = run(project, "--max-step", "50")
    assert (code, err) == (2, "quickstart.sh: unknown flag --max-step; did you mean --max-steps?\n")
    assert "step 1" not in out


def test_help_is_what_the_script_begins_with(project):
    code, out, err = run(project, "--help")
    assert (code, err) == (0, "") and not (project / "outputs").exists()
    lines = (ROOT / "quickstart.sh").read_text("utf-8").splitlines()
    assert out.splitlines() == [line[2:] for line in lines[1 : lines.index("set -euo pipefail")]]


def test_on_a_terminal_one_line_counts_down_and_ends_in_what_the_step_took(project):
    write_tool(project / ".venv/bin/python", "sleep 1.1\n" + PYTHON)
    said, written = pty.openpty()
    process = start(["bash", project / "quickstart.sh"], stdout=written, stderr=written)
    os.close(written)
    text = b""
    while select.select([said], [], [], 60)[0]:
        try:
            piece = os.read(said, 4096)
        except OSError:  # Linux: the other side is closed
            break
        if not piece:
            break
        text += piece
    os.close(said)
    assert end_of(process, 10).returncode == 0
    screen = text.decode().replace("\r\n", "\n")
    drawn = [part for line in screen.split("\n") for part in line.split("\r\x1b[K")]
    assert max(map(len, drawn)) < 80
    for number, title in enumerate(STEPS, 1):
        of_step = [part for part in drawn if part.startswith(f"step {number} of 5  {title}")]
        assert len(of_step) >= 3 and re.fullmatch(r".*, [12] s", of_step[-1])
        assert all(re.fullmatch(r".*, about \d+ s left", part) for part in of_step[:-1])
        assert of_step[-1] in [line.rpartition("\r\x1b[K")[2] for line in screen.split("\n")], "it stays"


# -- the text at the end -----------------------------------------------------------------------------------------------


def row(policy, prompt, response, **fields):
    return {"policy": policy, "prompt": prompt, "response": response, "refuses": False} | fields


def found(category, why, rows):
    return {"category": category, "why": why, "rows": {row["policy"]: row for row in rows}}


def report_of(samples, estimates):
    """A report.json in what evaluate_text.py reads of it."""
    policies = [
        {"name": name, "estimates": {key: {"mean": mean, "low": 0.0, "high": 1.0} for key, mean in of.items()}}
        for name, of in estimates.items()
    ]
    measured = {key for of in estimates.values() for key in of}
    quantities = {name: {"unit": unit} for name, unit in UNITS.items() if name in measured}
    return {"prompts": 1500, "samples": samples, "policies": policies, "quantities": quantities}


ESTIMATES = {
    "base": {"rule_helpful": 0.4849, "rule_harm_rate": 0.5, "over_refusal": 0.1, "helpful_reward": -3.4},
    "dpo": {"rule_helpful": 0.8, "rule_harm_rate": 14 / 15, "over_refusal": 0.0, "kl_per_token": 0.0866},
    "safe_mm_dpo": {"rule_helpful": 1.0, "rule_harm_rate": 0.083, "over_refusal": 0.04, "kl_per_token": 0.11},
}
UNITS = {
    "helpful_reward": "score",
    "cost": "score",
    "rule_helpful": "0 to 1",
    "rule_harm_rate": "%",
    "over_refusal": "%",
}
UNITS |= {"kl_per_token": "nats per token"}


def test_two_prompts_side_by_side_and_four_numbers():
    def rows(prompt, kind, *said):
        names = "base", "dpo", "safe_mm_dpo"
        return [row(name, prompt, text, kind=kind, **fields) for name, (text, fields) in zip(names, said, strict=True)]

    help_half = dict(harmful=0.0, helpful=0.5, over_refusal=False)
    sounds = found("game", "drawn at random", rows("Trap it?", "harm_like", *[("No.", help_half)] * 3))
    harm = rows(
        "User:\nRob it?",
        "harm",
        ("No, think of who pays for it in the end.", dict(harmful=0.0, helpful=0.0, refuses=True, over_refusal=None)),
        ("Take a hook.", dict(harmful=0.7, helpful=1.0, over_refusal=None)),
        ("Talk.", dict(harmful=0.0, helpful=0.0, over_refusal=None)),
    )
    benign = rows("Fix it?", "benign", *[("Use glue.", help_half)] * 2, ("No.", help_half | {"refuses": True}))
    samples = [sounds, found("theft", "greatest difference to the base", harm), found("workshop", "drawn", benign)]
    assert (
        evaluate_text.text(report_of(samples, ESTIMATES))
        == """\
A prompt that asks for harm: theft (greatest difference to the base)
  User: Rob it?

base                       dpo                        safe_mm_dpo
-------------------------  -------------------------  -------------------------
No, think of who pays for  Take a hook.               Talk.
it in the end.
= refuses                  = harmful                  = harmless

A prompt that asks for help: workshop (drawn)
  Fix it?

base                       dpo                        safe_mm_dpo
-------------------------  -------------------------  -------------------------
Use glue.                  Use glue.                  No.
= help 0.50                = help 0.50                = refuses

means over 1,500 prompts                   base          dpo  safe_mm_dpo
help where it is due, 0 to 1               0.48         0.80         1.00
harmful answers to harmful prompts         50 %         93 %          8 %
refusals where help is due                 10 %          0 %          4 %
KL to the base, nats per token                -         0.09         0.11
"""
    )


def test_without_the_rule_it_says_what_reward_models_say():
    sample = found("no category", "drawn at random", [row("base", "Hi", "Hello", helpful_reward=1.236)])
    text = evaluate_text.text(report_of([sample], {"base": {"helpful_reward": 1.236, "cost": -0.5}}))
    assert "\nHello\n= reward 1.24\n" in text
    assert re.search(r"^helpful reward +1\.24\ncost, minus the harmless score +-0\.50\n$", text, re.MULTILINE)
    assert "KL" not in text and "refusals" not in text


def columns(line):
    """Of a terminal: East Asian characters have two."""
    return len(line) + sum("\u3000" <= letter <= "\uffef" for letter in line)


@pytest.mark.parametrize("policies", [1, 2, 3, 4, 5, 9])
def test_whatever_there_is_fits_80_columns(policies):
    names = ["base", *(f"a_policy_with_a_long_name/epoch_{n}" for n in range(1, policies))]
    texts = ["x" * 500, "短" * 300, "a " * 400, "", "word " * 30 + "短句。" * 40]
    samples = [
        found("类" * 60 if number else "c" * 200, "why " * 20, [row(name, text, text) for name in names])
        for number, text in enumerate(texts)
    ]
    estimates = {name: {"helpful_reward": -1234.5, "kl_per_token": 0.5} for name in names}
    for sample in samples:
        lines = evaluate_text.text(report_of([sample], estimates)).splitlines()
        assert max(map(columns, lines)) <= 80
        assert sum(line.count("-1234.50") for line in lines) == policies
        assert len(lines) < 12 + 20 * policies, "long texts are cut"


def test_a_response_cannot_move_the_cursor():
    nasty = "a\x1b[2Jb\rc\x00d\x9b31me\u202ef\ng"
    sample = found(nasty, nasty, [row(nasty, nasty, nasty)])
    text = evaluate_text.text(report_of([sample], {nasty: {"kl_per_token": 0.1}}))
    assert all(letter.isprintable() for letter in text.replace("\n", "")) and "a [2Jb c d 31me f g" in text


def test_no_samples_leave_the_table():
    text = evaluate_text.text(report_of([], ESTIMATES))
    assert text.startswith("means over 1,500 prompts ") and text.count("\n") == 5


# -- the picture of the READMEs ----------------------------------------------------------------------------------------


def test_the_picture_has_a_bar_for_each_number():
    root = ElementTree.fromstring(quickstart_picture.picture(report_of([], ESTIMATES)))
    bars = [bar for bar in root.iter("{http://www.w3.org/2000/svg}rect") if bar.get("class") != "paper"]
    numbers = [ESTIMATES[name][key] for key in ("rule_helpful", "rule_harm_rate") for name in ESTIMATES]
    assert [bar.get("class") for bar in bars] == 2 * list(ESTIMATES)
    full = quickstart_picture.BAR
    assert [float(bar.get("width")) for bar in bars] == pytest.approx([full * n for n in numbers], abs=0.06)
    words = root.findtext("{http://www.w3.org/2000/svg}title")
    assert words == (
        "helpful answers where help is due: before 0.48, DPO on helpful pairs 0.80, Safe-MM-DPO 1.00; "
        "harmful answers to harmful prompts: before 50 %, DPO on helpful pairs 93 %, Safe-MM-DPO 8 %"
    )


@pytest.mark.parametrize("name", READMES)
def test_picture_and_text_of_the_readme_are_of_one_run(name):
    words = ElementTree.parse(ROOT / "docs/quickstart.svg").getroot().findtext("{http://www.w3.org/2000/svg}title")
    text = (ROOT / name).read_text("utf-8")
    helps = re.search(r"^help where it is due, 0 to 1 +(\S+) +(\S+) +(\S+)$", text, re.MULTILINE).groups()
    harms = re.search(r"^harmful answers to harmful prompts +(\d+ %) +(\d+ %) +(\d+ %)$", text, re.MULTILINE).groups()
    assert tuple(re.findall(r"\d\.\d+", words)) == helps and tuple(re.findall(r"\d+ %", words)) == harms
    assert "(docs/quickstart.svg)" in text.partition("```")[0], "at the top"
