"""The curves of a run: what it leaves in metrics.jsonl (a row per log line and evaluation) and lambda.jsonl (a row per
update of Safe-MM-DPO's constraint), and curves.html, one page that shows them without a network.
"""

import math
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from formats.json_files import parse_json
from harness import charts

POINTS = 300  # of a curve: more cannot be told apart
# Several curves in one picture: {caption: (unit, {metric: what it is called there})}; `eval_...` of a metric goes there
# too.  What stands nowhere here gets a picture of its own.
TOGETHER = {
    "loss": ("nats per pair", {"loss": "loss", "loss_H": "helpful", "loss_S": "harmless", "ranking_loss": "ranking"}),
    "accuracy": (
        "share of pairs",
        {
            "rewards/accuracies": "rewards",
            "logps/accuracies": "log-probs",
            "accuracy": "reward model",
            "accuracy_H": "helpful",
            "accuracy_S": "harmless",
        },
    ),
    "lambda": ("weight of safety; it rises where shaded, J_C > 0", {"lambda": "lambda"}),
    "J_C": ("expected cost above the threshold, smoothed", {"J_C": "J_C"}),
    "E_cost": ("expected cost, score", {"E_cost": "E[cost]"}),
    "rewards": (
        "nats",
        {"rewards/chosen": "chosen", "rewards/rejected": "rejected", "rewards/margins": "margin"},
    ),
    "scores": ("score", {"chosen_score": "chosen", "rejected_score": "rejected", "margin": "margin"}),
    "logps": ("nats per response", {"logps/chosen": "chosen", "logps/rejected": "rejected"}),
    "logps, change": (
        "nats per response",
        {"logps/chosen_change": "chosen", "logps/rejected_change": "rejected"},
    ),
    "nll_loss": ("nats per token of a chosen response", {"nll_loss": "nll_loss"}),
    "KL": ("nats per token", {"KL": "KL to the reference", "loss_components/kl_div": "KL to the reference"}),
}
NO_CHART = {"step", "epoch", "num_tokens", "cost_threshold"}


def points_of(rows):
    """{metric: [[step, value], ...]} of rows {step, metric: value}, [step, value, half] where the row has
    `METRIC_ci95` too.  What is no finite number is left out; a row of a step that was before (a run that went on from
    a checkpoint) takes the place of all from there on.
    """
    curves = {}
    for row in rows:
        with suppress(AttributeError, KeyError, TypeError, ValueError, OverflowError):  # a line of some other program
            step = int(row["step"])
            numbers = {name: float(value) for name, value in row.items() if type(value) in (int, float)}
            for name, value in numbers.items():
                if math.isfinite(value) and not name.endswith("_ci95") and step >= 0:
                    points = curves.setdefault(name, [])
                    while points and points[-1][0] >= step:
                        points.pop()
                    half = numbers.get(f"{name}_ci95", math.nan)
                    points.append([step, value, half] if math.isfinite(half) else [step, value])
    return {name: thinned(points) for name, points in curves.items()}


def thinned(points):
    """At most POINTS of them, evenly, and the last."""
    every = math.ceil(len(points) / POINTS)
    return points[:-1:every] + points[-1:]


def read_rows(path):
    """The rows of a file of JSON lines, without those that are none; nothing where there is no such file."""
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ():
        with suppress(ValueError):
            yield parse_json(line)


def of_run(folder):
    """points_of a run's folder: lambda and what moves it of each update, where the run kept that."""
    logged, dense = (points_of(read_rows(Path(folder) / name)) for name in ("metrics.jsonl", "lambda.jsonl"))
    before = {name: [point for point in logged.get(name, ()) if point[0] < dense[name][0][0]] for name in dense}
    return logged | {name: before[name] + points for name, points in dense.items()}


def threshold(name, curves):
    """What E_cost is held to; None for any other curve."""
    return curves["cost_threshold"][-1][1] if name == "E_cost" and "cost_threshold" in curves else None


def above(curves):
    """[(first, last)] updates through which the smoothed cost was above the threshold, so that lambda rose."""
    spans, start, step = [], None, None
    for step, violation in curves.get("J_C", ()):
        if violation > 0:
            start = step if start is None else start
        elif start is not None:
            spans, start = [*spans, (start, step)], None
    return spans if start is None else [*spans, (start, step)]


class Picture(NamedTuple):
    caption: str
    unit: str
    names: dict  # metric -> what it is called in the legend


def pictures(curves):
    """The Pictures that there are to draw, in order."""
    placed = {metric for _, names in TOGETHER.values() for metric in names} | NO_CHART
    metrics = dict.fromkeys(name.removeprefix("eval_") for name in curves)
    result = []
    for caption, (unit, names) in TOGETHER.items():
        result.append(Picture(caption, unit, {metric: name for metric, name in names.items() if metric in metrics}))
    for metric in metrics:
        values = {point[1] for name in (metric, f"eval_{metric}") for point in curves.get(name, ())}
        if metric not in placed and len(values) > 1:  # a constant is a setting
            result.append(Picture(metric, "", {metric: metric}))
    return [picture for picture in result if picture.names]


def page(title, lead, curves):
    """The page of one run.  A picture that cannot be drawn is left out."""
    drawn = []
    for caption, unit, names in pictures(curves):
        with suppress(ArithmeticError, ValueError, StopIteration):  # numbers too large to plot
            lines = [
                charts.Curve(place, name, bool(prefix), curves[prefix + metric], threshold(metric, curves))
                for place, (metric, name) in enumerate(names.items(), 1)
                for prefix in ("", "eval_")
                if prefix + metric in curves
            ]
            shades = above(curves) if caption == "lambda" else ()
            drawn.append(charts.curve_chart(caption, unit, lines, shades, named=len(names) > 1))
    words = ""
    if any(name.startswith("eval_") for name in curves):
        words = "<p>Lines with points are of held-out pairs, with 95 % intervals.</p>"
    return charts.document(title, lead, words + charts.grid(drawn))
