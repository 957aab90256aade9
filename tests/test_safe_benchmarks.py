"""The arithmetic of benchmarks/safe_mm_dpo_toy.py and safe_mm_dpo_on_texts.py, what safe_mm_dpo_roles.py computes and
where own_pairs_on_a_bandit.py ends: numbers by hand.

The studies themselves take much longer than a test may.
"""

import json
import math
import sys
import xml.etree.ElementTree as ElementTree

import pytest
import torch
import torch.nn.functional as F
from helpers import ROOT
from tiny_models import tiny_model

sys.path.insert(0, str(ROOT / "benchmarks"))

import own_pairs_on_a_bandit as bandit
import safe_mm_dpo_on_texts as texts
import safe_mm_dpo_roles as roles
import safe_mm_dpo_toy as study

import dpo_hf_run
import train_rm
import train_safe_mm_dpo


def row(helpful, harm_rate, **others):
    return {"helpful": helpful, "harm_rate": harm_rate, "over_refusal": 0.1} | others


def example_seeds():
    """Two seeds by hand; the second has no run with a fixed lambda."""
    rows = dict.fromkeys(study.MODES, row(0.7, 0.04, **{"lambda": 1.5, "at_cap": 0, "cost": -5, "threshold": -4.5}))
    first = {"start": row(0.5, 0.5), "helpful-only": row(0.7, 0.9), "helpful-only, beta 0.3": row(0.8, 0.9)} | rows
    first |= {"lambda 0.1": row(0.75, 0.6), "lambda 3": row(0.65, 0.02)}
    first |= {"lambda 0.1, files alone": row(0.74, 0.7), "lambda 3, files alone": row(0.6, 0.05)}
    second = {"start": row(0.6, 0.4), "helpful-only": row(0.75, 0.8), "helpful-only, beta 0.3": row(0.9, 0.8)} | rows
    return json.loads(json.dumps([first, second]))  # no row is shared


# -- numbers of the study --------------------------------------------------------------------------------------------


def test_interval_is_students():
    # t at 97.5 % with 2 degrees of freedom is 4.303; the values' deviation is 1, so of their mean 1 / sqrt(3).
    assert study.interval([1.0, 2.0, 3.0]) == pytest.approx((2.0, 4.303 / math.sqrt(3)))
    assert study.interval([0.25] * 5) == (0.25, 0.0)
    middle, half = study.interval([0.3])
    assert middle == 0.3
    assert math.isnan(half)


def test_points_of_t_by_numeric_integration():
    for freedom, point in enumerate(study.STUDENT, 1):
        x = torch.linspace(0, point, 200_001, dtype=torch.float64)
        scale = math.gamma((freedom + 1) / 2) / math.gamma(freedom / 2) / math.sqrt(freedom * math.pi)
        inside = 2 * torch.trapezoid(scale * (1 + x**2 / freedom) ** (-(freedom + 1) / 2), x).item()
        assert inside == pytest.approx(0.95, abs=5e-5), freedom


def test_gain_is_the_share_of_the_same_seeds_helpful_only_gain():
    seeds = example_seeds()
    study.add_gains(seeds)  # both start from the mean of the two starts, 0.55
    assert [rows["helpful-only"]["gain"] for rows in seeds] == [1.0, 1.0]
    assert seeds[0]["soft"]["gain"] == pytest.approx(0.15 / 0.15)
    assert seeds[1]["soft"]["gain"] == pytest.approx(0.15 / 0.20)
    assert seeds[0]["additive"]["gain"] == pytest.approx(0.15 / 0.25)  # at its own beta and KL
    assert seeds[0]["lambda 3"]["gain"] == pytest.approx(0.10 / 0.15)
    assert "gain" not in seeds[0]["start"]


def test_table_has_means_and_intervals_over_seeds():
    seeds = example_seeds()
    study.add_gains(seeds)
    means = study.summary(seeds)
    # Two values 0.05 and 0.025 away from their mean: half an interval is 12.706 times that.
    assert means["start"]["helpful"] == pytest.approx((0.55, 12.706 * 0.05))
    assert means["lambda 3"]["helpful"][0] == 0.65
    lines = study.table(means, study.ROWS, study.COLUMNS)
    assert len(lines) == 2 + len(study.ROWS)
    assert {line.count("|") for line in lines} == {len(study.COLUMNS) + 2}
    start, helpful_only, soft = (
        next(x for x in lines if x.startswith(f"| {n} |")) for n in ("start", "helpful-only", "soft")
    )
    assert "| 0.550 ± 0.635 | 45.0 ± 63.5 % |" in start
    assert "| 0.725 ± 0.318 | 85.0 ± 63.5 % |" in helpful_only
    assert "| 0.700 ± 0.000 | 4.0 ± 0.0 % | 10.0 ± 0.0 % | 87.5 ± 158.8 % | 1.50 ± 0.00 | 0.0 ± 0.0 % |" in soft
    assert soft.endswith("| -5.00 ± 0.00 | -4.50 ± 0.00 |")


def test_constraint_is_of_the_whole_run_and_its_end(tmp_path):
    lines = [{"lambda": min(10.0, 0.5 * n), "E_cost": float(n % 2), "cost_threshold": -5.5} for n in range(1, 31)]
    lines[-12]["E_cost"], lines[-13]["E_cost"] = 1.0, 99.0  # the 13th from the end does not count
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "args.json").write_text(json.dumps({"lambda_max": 10.0}))
    # At the cap from line 20 on; of lines 19 to 30 the odd six cost 1.
    assert study.constraint(tmp_path) == {"lambda": 10.0, "at_cap": 11 / 30, "cost": 0.5, "threshold": -5.5}


def test_height_of_the_line_of_fixed_lambdas():
    line = [(0.6, 0.8), (0.0, 0.5), (0.2, 0.7)]
    assert study.height(line, 0.1) == pytest.approx(0.6)
    assert study.height(line, 0.4) == pytest.approx(0.75)
    assert (study.height(line, 0.9), study.height(line[1:], -1)) == (0.8, 0.5)


def test_figure_has_a_point_per_run():
    seeds = example_seeds()
    means = study.summary(seeds)
    picture = ElementTree.fromstring(study.figure(seeds, means))  # well-formed, or this raises
    space = "{http://www.w3.org/2000/svg}"
    circles = list(picture.iter(f"{space}circle"))
    points = [circle for circle in circles if circle.get("class").startswith("seed")]
    assert len(points) == sum(map(len, seeds))
    assert len(circles) - len(points) == len(means)
    words = [text.text for text in picture.iter(f"{space}text")]
    assert {*study.ROWS, "lambda 0.1", "lambda 3"} <= set(words)
    assert {"harmful answers to harmful prompts", "helpfulness where help is due"} <= set(words)
    # From no harm to all of it over the width, from 0.5 up to 1.0 over the height, in the picture's own units.
    start = next(c for c in circles if c.get("class") == "mean start")
    assert float(start.get("cx")) == pytest.approx(study.LEFT + 0.45 * study.WIDE, abs=0.06)
    assert float(start.get("cy")) == pytest.approx(study.TOP + study.HIGH * 0.45 / 0.5, abs=0.06)
    lines = picture.findall(f"{space}polyline")
    assert [(line.get("class"), len(line.get("points").split())) for line in lines] == [("fixed", 2), ("alone", 2)]
    style = picture.find(f"{space}style").text
    assert "prefers-color-scheme: dark" in style
    assert style.count(".soft") == 2
    assert ElementTree.fromstring(study.figure(seeds[1:], study.summary(seeds[1:]))).find(f"{space}polyline") is None


def test_finished_work_is_not_repeated(tmp_path):
    done, file = [], tmp_path / "new/run.json"
    make = lambda: done.append(1) or {"harm_rate": 0.5}
    assert [study.kept(file, ["--seed", "1"], make) for _ in range(2)] == [{"harm_rate": 0.5}] * 2
    assert len(done) == 1
    study.kept(file, ["--seed", "2"], make)  # another command in the same place
    assert len(done) == 2
    with pytest.raises(ZeroDivisionError):
        study.kept(tmp_path / "broken.json", [], lambda: 1 / 0)
    assert not (tmp_path / "broken.json").exists()


def test_commands_are_ones_that_the_scripts_take():
    dpo_hf_run.get_args(study.HELPFUL_ONLY)
    for task in study.EPOCHS:
        train_rm.get_args([*study.REWARD, "--task", task])
    for mode, words in study.MODES.items():
        args = train_safe_mm_dpo.get_args([*study.SAFE, *words])
        assert mode.startswith(args.combine)
        asked = {"additive": 0.08, "additive, files alone": 0.08, "additive, harm rate 0.05": 0.05}.get(mode, 0.02)
        assert (args.cost_estimate, args.harm_rate, args.seed) == ("policy", asked, 42)  # of the child: --seed


# -- safe_mm_dpo_on_texts.py -----------------------------------------------------------------------------------------


def test_pku_rows_are_split_by_the_md5_of_their_prompt(tmp_path):
    prompts = [" How do I pick a lock?\n", "Hello", "Who is there?", "Hello"]
    rows = [{"prompt": prompt, "chosen_response": "No.", "safety_labels": {"chosen": -1}} for prompt in prompts]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts.split_pku(tmp_path / "rows.jsonl", tmp_path / "pku")
    read = lambda part: [json.loads(line) for line in (tmp_path / f"pku/harmless_{part}.jsonl").open()]
    # Modulo 100 what `printf %s Hello | md5sum` and its like say is 75, 3, 49 and 3.
    assert read("train") == [rows[1], rows[3]]
    assert read("test") == [rows[0], rows[2]]


def text_settings(tmp_path, *words):
    needed = ["--model", "m", "--work", str(tmp_path)]
    for name in ("helpful", "harmless"):
        needed += [f"--{name}-rm", f"{name}_rm", f"--{name}-train", "train.jsonl"]
        needed += [f"--{name}-test", str(tmp_path / f"{name}.jsonl")]
    return texts.get_args([*needed, *words])


def test_runs_on_texts_differ_in_lambda_alone_and_the_script_takes_them(tmp_path):
    args = text_settings(tmp_path, "--lambdas", "0", "2", "--free", "--harm-rate 0.2", "--shared", "--seed 7")
    runs = texts.policies(args)
    assert list(runs) == ["lambda 0", "lambda 2", "free, harm-rate 0.2"]
    found = []
    for words in runs.values():
        words = [*map(str, [*texts.words_of_all(args), *words])]
        found.append(vars(train_safe_mm_dpo.get_args(words)))
    assert [run["lambda_init"] for run in found] == [1e-6, 2, 1]
    assert [run["lambda_lr"] for run in found] == [0, 0, 0.05]
    differ = {key for run in found[1:] for key in run if run[key] != found[0][key]}
    assert differ == {"lambda_init", "lambda_lr", "harm_rate", "given", "typed"}  # the last two: what was said
    assert found[0]["seed"] == 7


def test_held_out_prompts_are_different_ones_of_both_files(tmp_path):
    for name in ("helpful", "harmless"):
        rows = [{"prompt": f"{name} {n}"} for n in (0, 0, 1, 2)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = texts.held_out_prompts(text_settings(tmp_path, "--prompts", "2"))
    asked = [json.loads(line) for line in file.open()]
    wanted = [
        ("helpful 0", "helpful"),
        ("helpful 1", "helpful"),
        ("harmless 0", "harmless"),
        ("harmless 1", "harmless"),
    ]
    assert [(row["prompt"], row["category"]) for row in asked] == wanted


def test_a_row_of_the_table_on_texts_is_of_the_prompts_that_are_its_own():
    def rows(reward, cost):
        both = (("helpful", 0, reward, 9.0), ("harmless", 1, 99.0, cost))
        numbers = [
            {"category": c, "prompt_index": n, "helpful_reward": r, "cost": x, "tokens": 5} for c, n, r, x in both
        ]
        return [row | {"harms": True, "kl": 0.5} for row in numbers]

    lines = texts.table(
        {"lambda 0": rows(1.0, 3.0), "lambda 1": rows(1.5, -1.0)}, ["lambda 0", "lambda 1"], "lambda 0", {}
    )
    one = lambda number: f"{number} [{number}, {number}]"  # of one prompt all resamples are alike
    assert [cell.strip() for cell in lines[-1].split("|")[1:-1]] == [
        "lambda 1", one("1.50"), one("-1.00"), one("1.00"), one("0.10"), one("5.00"), one("0.50"), one("-4.00"), "0",
    ]  # fmt: skip
    assert lines[-2].endswith("|  |  | 0 |")  # what the others are measured by


# -- own_pairs_on_a_bandit.py ----------------------------------------------------------------------------------------


def test_own_pairs_on_a_bandit_end_at_the_best_policy_and_the_files_alone_do_not(monkeypatch):
    monkeypatch.setattr(bandit, "UPDATES", 1500)
    lambda_, best = bandit.optimum()
    assert bandit.cost(best) == pytest.approx(bandit.THRESHOLD, abs=1e-9)
    rewards = (best - bandit.REFERENCE) * bandit.BETA + lambda_ * bandit.COSTS  # up to one constant
    assert (rewards - bandit.REWARDS).std().item() < 1e-9
    far = lambda logps: (best.exp() * (best - logps)).sum().item()
    found, with_own = bandit.trained(0.5)
    assert found == pytest.approx(lambda_, rel=0.01) and far(with_own) < 1e-4
    found, alone = bandit.trained(0)
    assert found > 2 * lambda_ and far(alone) > 1
    picture = ElementTree.fromstring(bandit.figure({"files alone": alone, "the best policy": best}))
    heights = [
        float(x.get("height")) for x in picture.iter("{http://www.w3.org/2000/svg}rect") if x.get("width") == "21"
    ]
    assert max(heights) == bandit.HIGH and len(heights) == 10
    assert heights[1] / heights[3] == pytest.approx((best[0] - best[1]).exp().item(), rel=0.01)


# -- the plain computation that roles compares with ------------------------------------------------------------------


PAIRS = [([5, 6, 7], [8, 9], [10]), ([11], [12, 13, 14, 15], [16, 17])]


def test_padded_batches_mark_the_response():
    ids, mask, response = roles.padded(PAIRS, 1, 0, "cpu")
    assert ids.tolist() == [[5, 6, 7, 8, 9], [11, 12, 13, 14, 15]]
    assert roles.padded(PAIRS, 2, 0, "cpu")[0].tolist() == [[5, 6, 7, 10], [11, 16, 17, 0]]
    assert mask.tolist() == [[1] * 5] * 2
    assert response.int().tolist() == [[0, 0, 0, 1, 1], [0, 1, 1, 1, 1]]
    ids, mask, response = roles.padded(PAIRS, 2, 0, "cpu", least=6)
    assert ids.tolist() == [[5, 6, 7, 10, 0, 0], [11, 16, 17, 0, 0, 0]]
    assert mask.sum(1).tolist() == [4, 3] and response.shape == (2, 6)


def test_log_probs_and_kl_of_padded_batches():
    model, other = (tiny_model("qwen3", torch.float64, seed) for seed in (0, 1))
    batch = roles.padded(PAIRS, 2, 0, "cpu")
    expected, divergences = [], []
    with torch.no_grad():
        for prompt, _, rejected in PAIRS:
            ids = torch.tensor([prompt + rejected])
            log_p, log_q = (m(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1) for m in (model, other))
            expected.append(log_p[range(len(rejected)), rejected].sum())
            divergences += F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1).tolist()
        assert torch.allclose(roles.logps(model, batch), torch.stack(expected).float(), atol=1e-5)
        assert roles.vocabulary_kl(model, other, batch).item() == pytest.approx(sum(divergences) / 3, rel=1e-5)
        assert roles.vocabulary_kl(model, model, batch).item() == 0


def test_labels_turn_a_pair():
    assert roles.turned(([1], [2], [3], None), 1) == ([1], [2], [3])
    assert roles.turned(([1], [2], [3], None), -1) == ([1], [3], [2])
