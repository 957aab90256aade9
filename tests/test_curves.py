"""What a run shows of itself: curves.html, the trackers of --report-to, and files that others may read."""

import importlib
import json
import os
import re
import shutil
import stat
import struct
import sys
from xml.etree import ElementTree

import pytest
import torch
from helpers import ROOT
from processes import run_program
from runs import DPO, dpo_run, metrics_of, one_line, run_script
from worlds import write_rows

import dpo_hf_run
import lora
import train_safe_mm_dpo
from formats import model_files
from harness import charts, checkpoints, metrics_log, score_cache, trackers, training_curves

SHORT = "--model {w}/model --device cpu --dtype fp32 --report-to none --batch-size 4 --gradient-accumulation-steps 1"
SHORT += " --logging-steps 1 --max-steps 2 --learning-rate 1e-2 --max-length 64 --max-prompt-length 32"
PAIRS = "--eval-samples 4 --dataset"
WORDS = {  # how each script gets its data; and charts that its page has
    "dpo_hf_run": (f"{PAIRS} {{w}}/pairs.jsonl", "loss rewards logps accuracy"),
    "train_rm": (
        "--task helpful --train-helpful-path {w}/pairs.jsonl --val-helpful-path {w}/pairs.jsonl",
        "loss accuracy scores",
    ),
    "train_safe_mm_dpo": (
        "--train-helpful-path {w}/pairs.jsonl --val-helpful-path {w}/pairs.jsonl --lambda-init 0 --w 0",
        "loss rewards logps KL",
    ),
    "train_with_preference_prompt": (f"{PAIRS}-path {{w}}/pairs.jsonl --preference-text polite", "loss rewards KL"),
    "learn_prompt": (f"{PAIRS}-path {{w}}/pairs.jsonl --preference-text polite", "loss rewards logps"),
}


def figures(page):
    """{caption: figure element} of a page, which has to be well-formed and to load nothing."""
    assert "default-src 'none'" in page and not re.search(r"<script|src=|url\(|@import|https?://", page)
    tree = ElementTree.fromstring(page.removeprefix("<!DOCTYPE html>"))
    return {figure.findtext("figcaption"): figure for figure in tree.iter("figure")}


@pytest.mark.parametrize("script", WORDS)
def test_every_training_script_leaves_its_curves_and_names_them_once(world, tmp_path, capsys, script):
    data, captions = WORDS[script]
    words = f"{SHORT} {data} --output-dir {tmp_path}/run".format(w=world).split()
    run_script(words, importlib.import_module(script))
    assert capsys.readouterr().out.count(f"curves: {tmp_path}/run/curves.html") == 1
    page = (tmp_path / "run" / "curves.html").read_text("utf-8")
    found = figures(page)
    assert set(captions.split()) <= found.keys()
    assert not [caption for caption in found if "ci95" in caption or caption in ("step", "epoch", "num_tokens")]
    assert "Up to update 2," in page and "prefers-color-scheme: dark" in page
    assert not list((tmp_path / "run").glob(".saving-*"))


def test_the_page_is_drawn_at_each_evaluation_and_not_at_each_log_line(world, tmp_path, monkeypatch):
    drawn, page = [], training_curves.page
    monkeypatch.setattr(training_curves, "page", lambda *given: drawn.append(given[1]) or page(*given))
    dpo_run(world, tmp_path / "run", max_steps=4, eval_steps=2, report_to="none")
    assert [re.search(r"update (\d+)", lead).group(1) for lead in drawn] == ["0", "2", "4", "4"]


def test_a_run_that_ends_early_has_its_curves_to_the_last_log_line(tmp_path):
    program = f"""import sys, dpo_hf_run
from harness import metrics_log
log = metrics_log.MetricsLog(dpo_hf_run.get_args(["--report-to", "none", "--output-dir", "{tmp_path}/run"]), True)
log.write(7, 0.5, {{"loss": 0.25, "grad_norm": float("nan")}})
sys.exit(143)"""
    done = run_program([sys.executable, "-c", program], cwd=ROOT)
    assert done.returncode == 143, done.stderr
    page = (tmp_path / "run" / "curves.html").read_text("utf-8")
    assert "Up to update 7," in page and figures(page).keys() == {"loss"}


def test_overwrite_replaces_the_curves_and_the_steps_of_lambda(world, tmp_path):
    folder = tmp_path / "run"
    words = f"{SHORT} {WORDS['dpo_hf_run'][0]} --output-dir {folder}".format(w=world)
    log = metrics_log.MetricsLog(dpo_hf_run.get_args(words.split()), True)
    log.write(1, 0.5, {"loss": 0.25, "eval_loss": 0.5})
    log.write_lambda(1, {"lambda": 9.0})
    log.close()
    assert (folder / "lambda.jsonl").read_text() == '{"step": 1, "lambda": 9.0}\n'
    dpo_run(world, folder, overwrite=True, eval_samples=0)
    assert not (folder / "lambda.jsonl").exists()
    assert "eval_" not in json.dumps(list(figures((folder / "curves.html").read_text("utf-8"))))


def test_a_page_that_cannot_be_written_does_not_end_the_run(tmp_path, capsys):
    log = metrics_log.MetricsLog(dpo_hf_run.get_args(["--report-to", "none", "--output-dir", f"{tmp_path}/run"]), True)
    (tmp_path / "run/curves.html").mkdir()  # no file can be put there
    log.write(1, 0.5, {"eval_loss": 0.25})
    assert "curves.html cannot be written" in capsys.readouterr().out
    log.close()
    assert [json.loads(line)["eval_loss"] for line in log.path.read_text().splitlines()] == [0.25]


@pytest.mark.parametrize("broken", [1.7e308, "a sentence", None, True, [1]])
def test_a_chart_that_cannot_be_drawn_is_left_out(broken):
    rows = [{"step": 1, "loss": 0.5, "odd": broken}, {"step": 2, "loss": 0.25, "odd": -1.7e308}, {"no": "step"}, 7]
    found = figures(training_curves.page("run", "", training_curves.points_of(rows)))
    assert set(found) == {"loss"}


def test_points_bring_their_intervals_and_a_run_that_went_back_starts_there():
    rows = [{"step": n, "loss": n / 8, "epoch": 0} for n in (1, 2, 3, 2, 3)]
    rows += [{"step": 3, "eval_loss": 0.5, "eval_loss_ci95": 0.25}, {"step": 4, "loss": float("nan")}]
    found = training_curves.points_of(rows)
    assert found["loss"] == [[1, 0.125], [2, 0.25], [3, 0.375]]
    assert found["eval_loss"] == [[3, 0.5, 0.25]]
    assert not [name for name in found if name.endswith("_ci95")]


def test_a_whisker_stands_where_its_interval_ends_and_a_share_ends_at_1():
    curve = charts.Curve(1, "x", True, [[0, 0.5, 0.25], [8, 0.75, 0.5]])
    for unit, top in (("nats", 1.25), ("share of pairs", 1)):
        chart = charts.curve_chart("x", unit, [curve])
        up = [float(text) for text in re.findall(r'text-anchor="end" class="soft">([\d.]+)<', chart)]
        y = charts.scale(min(up), max(up), 170, 22)
        ends = [tuple(map(float, pair)) for pair in re.findall(r'd="M[\d.]+ ([\d.]+)V([\d.]+)"', chart)]
        assert ends == [pytest.approx((y(low), y(high)), abs=0.06) for low, high in ((0.25, 0.75), (0.25, top))]


def test_long_curves_are_thinned_and_keep_their_ends():
    points = training_curves.points_of({"step": n, "loss": 1 / n} for n in range(1, 1001))["loss"]
    assert points[0] == [1, 1.0] and points[-1] == [1000, 0.001]
    assert len(points) <= training_curves.POINTS + 1


# -- lambda ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def constrained(world, tmp_path_factory):
    """A run of Safe-MM-DPO under a constraint, one log line in 12 updates: its folder."""
    folder, pairs = tmp_path_factory.mktemp("constrained"), f"{world}/pairs.jsonl"
    rm = f"{SHORT} --task harmless --train-harmless-path {pairs} --val-harmless-path {pairs} --output-dir {folder}/rm"
    run_script(rm.format(w=world).split(), importlib.import_module("train_rm"))
    words = f"{SHORT} --train-helpful-path {pairs} --train-harmless-path {pairs} --harmless-rm-path {folder}/rm --w 0"
    words += f" --eval-samples 0 --epochs 2 --max-steps 12 --logging-steps 12 --lambda-lr 0.1 --output-dir {folder}/run"
    run_script(words.format(w=world).split(), train_safe_mm_dpo)
    return folder / "run"


def test_lambda_is_drawn_from_the_first_update_with_its_rise_and_the_threshold(constrained):
    [logged] = metrics_of(constrained)
    rows = [json.loads(line) for line in (constrained / "lambda.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert rows[-1] == {"step": 12, **{name: logged[name] for name in ("lambda", "J_C", "E_cost")}}
    rising = [b["lambda"] > a["lambda"] for a, b in zip(rows, rows[1:])]
    assert rising == [row["J_C"] > 0 for row in rows[1:]]  # which the shades say
    curves = training_curves.of_run(constrained)
    assert [point[0] for point in curves["lambda"]] == list(range(1, 13))
    found = figures((constrained / "curves.html").read_text("utf-8"))
    for name in ("lambda", "E_cost", "J_C"):
        [line] = found[name].iter("polyline")
        assert len(line.get("points").split()) == 12
    assert (found["lambda"].find(".//rect[@class='shade']") is not None) == any(row["J_C"] > 0 for row in rows)
    [level] = [line for line in found["E_cost"].iter("line") if line.get("class").startswith("level")]
    assert level.get("y1") == level.get("y2") and level.get("x1") == f"{charts.START:.1f}"
    threshold = charts.number(logged["cost_threshold"])
    assert f"dotted: threshold {threshold}" in "".join(found["E_cost"].itertext())


def test_shades_are_where_the_cost_is_above_the_threshold():
    violations = [0.5, 0.25, -0.5, -1, 0.125, 1]
    rows = [{"step": n, "J_C": violation} for n, violation in enumerate(violations, 1)]
    assert training_curves.above(training_curves.points_of(rows)) == [(1, 3), (5, 6)]


def test_what_lambda_was_before_a_run_went_on_elsewhere_comes_from_its_log(tmp_path):
    write_rows(tmp_path / "metrics.jsonl", [{"step": n, "lambda": n, "loss": n} for n in (2, 4, 6)])
    write_rows(tmp_path / "lambda.jsonl", [{"step": n, "lambda": 10 * n} for n in (5, 6)])
    curves = training_curves.of_run(tmp_path)
    assert curves["lambda"] == [[2, 2.0], [4, 4.0], [5, 50.0], [6, 60.0]]
    assert curves["loss"] == [[2, 2.0], [4, 4.0], [6, 6.0]]


# -- trackers ----------------------------------------------------------------------------------------------------------


def records(path):
    """The records of a file in LevelDB's log format (wandb, swanlab): blocks of 32 KiB, a head of 7 bytes each."""
    data, place, parts, found = path.read_bytes(), 7, b"", []
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:  # no room for a head: the next block
            place += 32768 - place % 32768
            continue
        size, kind = struct.unpack("<HB", data[place + 4 : place + 7])
        parts += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # whole, or its last part
            found.append(parts)
            parts = b""
    return found


def of_wandb(folder):
    """({tag: [(step, value)]}, its settings) that wandb has kept offline."""
    from wandb.proto.wandb_internal_pb2 import Record

    [path], curves, config = folder.glob("wandb/offline-run-*/run-*.wandb"), {}, {}
    for data in records(path):
        record = Record.FromString(data)
        config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        values = {"/".join(item.nested_key) or item.key: item.value_json for item in record.history.item}
        for tag, value in values.items():
            if not tag.startswith("_"):
                curves.setdefault(tag, []).append((record.history.step.num, json.loads(value)))
    return curves, config


def of_swanlab(folder):
    from swanlab.proto.swanlab.record.v1.record_pb2 import Record

    [path], curves = folder.glob("swanlog/run-*/run-*.swanlab"), {}
    for data in records(path):
        record = Record.FromString(data)
        for name in [field.name for field, _ in record.ListFields() if field.name == "scalar"]:
            found = getattr(record, name)
            curves.setdefault(found.key, []).append((found.step, found.value.number))
    return curves, None


READ_BACK = {"wandb": of_wandb, "swanlab": of_swanlab}


@pytest.fixture
def offline(monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("SWANLAB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.chdir(tmp_path)  # what a tracker leaves where it is started would lie here


@pytest.mark.parametrize("tracker", READ_BACK)
def test_a_tracker_keeps_what_the_log_has(world, tmp_path, offline, tracker):
    pytest.importorskip(tracker, reason=f"{tracker} is not installed (bash setup.sh dev): nothing to read back")
    result = dpo_run(world, tmp_path / "run", report_to=["tensorboard", tracker], max_steps=3, eval_steps=2)
    curves, config = READ_BACK[tracker](tmp_path / "run" / "logs")
    for prefix, tag, lines in (("", "train/", result.train), ("eval_", "eval/", result.evals)):
        for name in ("loss", "rewards/margins", "logps/chosen"):
            expected = [(line["step"], pytest.approx(line[prefix + name], rel=1e-6)) for line in lines]
            assert curves[tag + name] == expected, name
    assert not [tag for tag in curves if tag.endswith("_ci95")]
    assert config is None or (config["learning_rate"], config["seed"]) == (DPO["learning_rate"], 42)
    assert list((tmp_path / "run" / "logs").glob("events.out.tfevents.*")), "several at once"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_a_resumed_run_gives_a_tracker_all_of_its_history(world, tmp_path, offline):
    pytest.importorskip("swanlab", reason="swanlab is not installed (bash setup.sh dev): nothing to read back")
    dpo_run(world, tmp_path / "run", max_steps=2, save_steps=1)
    shutil.rmtree(tmp_path / "run" / "checkpoint-2")
    dpo_run(world, tmp_path / "run", max_steps=2, resume="auto", report_to="swanlab")
    curves, _ = of_swanlab(tmp_path / "run" / "logs")
    assert [step for step, _ in curves["train/loss"]] == [1, 2]
    assert [step for step, _ in curves["eval/loss"]] == [0, 2]


@pytest.mark.parametrize("tracker", ["tensorboard", "wandb", "swanlab"])
def test_a_tracker_that_is_missing_is_named_with_its_command(world, tmp_path, capsys, monkeypatch, tracker):
    monkeypatch.setattr("sys.argv", ["dpo_hf_run.py"])
    monkeypatch.setitem(sys.modules, tracker, None)  # it is not found
    with pytest.raises(SystemExit) as exit:
        dpo_run(world, tmp_path / "run", report_to=[tracker])
    assert exit.value.code == 2
    line = one_line(capsys)
    assert line == (
        f"dpo_hf_run.py: --report-to {tracker} needs it installed: bash setup.sh {tracker}, or --report-to none"
    )
    extras = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2]
    assert re.search(rf'^{tracker} = \["{tracker}>=', extras, re.MULTILINE)


def test_a_folder_of_runs_is_no_tracker(tmp_path, monkeypatch):
    (tmp_path / "wandb").mkdir()  # which wandb leaves where it was started
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    assert not trackers.is_installed("wandb")


def test_none_goes_alone(capsys):
    with pytest.raises(SystemExit) as exit:
        dpo_hf_run.get_args(["--report-to", "none", "tensorboard"])
    assert exit.value.code == 2 and "--report-to none goes alone" in one_line(capsys)


def test_a_tracker_that_cannot_start_online_is_kept_offline(capsys):
    def start(mode):
        if mode != {"mode": "offline"}:
            raise RuntimeError("no key\n  configured")
        return "started"

    assert trackers.with_or_without_net("wandb", start) == "started"
    assert "wandb does not start online (no key configured): kept offline, `wandb sync`" in capsys.readouterr().out


# -- modes of files ----------------------------------------------------------------------------------------------------


@pytest.fixture(params=[0o022, 0o027, 0o007])
def mode(request):
    """The mode that a new file has."""
    before = os.umask(request.param)
    yield 0o666 & ~request.param
    os.umask(before)


def modes(folder):
    """{path: mode} of the files below a folder."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): stat.S_IMODE(path.stat().st_mode) for path in files}


def test_what_a_run_leaves_is_open_as_umask_says(world, tmp_path, mode):
    dpo_run(world, tmp_path / "lora", save_steps=1, save_merged=True, max_steps=1)
    dpo_run(world, tmp_path / "whole", lora_r=0, max_steps=1)
    found = modes(tmp_path)
    weights = [name for name in found if name.endswith(".safetensors")]
    assert {name.rpartition("/")[2].partition("-")[0] for name in weights} == {
        "adapter_model.safetensors",
        "model.safetensors",
        "training.safetensors",
        "reference",
    }
    assert {name: bits for name, bits in found.items() if bits != mode} == {}


def test_heads_and_caches_are_open_as_umask_says(world, tmp_path, mode):
    model = model_files.load_model(str(world / "model"), torch.float32, "cpu")
    lora.add_adapter(model, "x", 4, 8)
    lora.save_adapter(model, "x", tmp_path / "rm", "base", torch.zeros(1, 32))
    score_cache.save_scores(tmp_path / "cache" / "helpful.safetensors", torch.zeros(2, 2))
    with checkpoints.new_checkpoint(tmp_path, 1, 0) as folder:
        checkpoints.save_state(folder, {"x": torch.zeros(1)}, {"step": 1})
    assert set(modes(tmp_path).values()) == {mode}
