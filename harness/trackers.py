"""Where the numbers of a run go besides its own files: TensorBoard, wandb, swanlab, whichever --report-to names.

A tracker opens as a pair of functions: write({tag: number}, step) and close().
"""

import math
import os
from importlib.util import find_spec
from pathlib import Path

from tqdm import tqdm

FILES = "events.out.tfevents.*", "wandb/**/*", "swanlog/**/*"  # in the logging folder
UNCHANGED_GROUPS = "loss", "loss_components", "rewards_train", "preference_metrics"  # groups of tags
PROJECT = "preference-alignment"  # for trackers that sort runs by one, unless their variable names another


def chosen(args):
    """The trackers that --report-to names, each once; `auto` takes TensorBoard where it is, `none` nothing."""
    words = [args.report_to] if isinstance(args.report_to, str) else args.report_to  # `auto` where none were given
    if "auto" in words and is_installed("tensorboard"):
        words = ["tensorboard", *words]
    return [name for name in dict.fromkeys(words) if name in TRACKERS]


def is_installed(name):
    spec = find_spec(name)
    return spec is not None and spec.origin is not None  # a folder ./wandb of some run is no package


def open_tensorboard(args, config, folder, history):
    from torch.utils.tensorboard import SummaryWriter

    steps = [entry["step"] + 1 for entry in history[-1:]]  # what an interrupted run wrote from there on goes
    board = SummaryWriter(str(folder), purge_step=max(steps, default=None))

    def write(numbers, step):
        for tag, value in numbers.items():
            board.add_scalar(tag, value, step)

    return write, board.close


def open_wandb(args, config, folder, history):
    import wandb

    names = dict(project=os.environ.get("WANDB_PROJECT", PROJECT), name=Path(args.output_dir).resolve().name)
    run = with_or_without_net("wandb", lambda mode: wandb.init(**names, **mode, dir=folder, config=config))
    return run.log, run.finish


def open_swanlab(args, config, folder, history):
    import swanlab

    names = dict(project=os.environ.get("SWANLAB_PROJ_NAME", PROJECT), name=Path(args.output_dir).resolve().name)
    settings = dict(logdir=str(folder / "swanlog"), config=config)
    with_or_without_net("swanlab", lambda mode: swanlab.init(**names, **mode, **settings))
    return swanlab.log, swanlab.finish


def with_or_without_net(name, start):
    """start({}), as the tracker's own settings have it; where that fails (no login, no network), start offline."""
    try:
        return start({})
    except Exception as error:  # each tracker has its own
        reason = " ".join(str(error).split())[:200]
        tqdm.write(f"{name} does not start online ({reason}): kept offline, `{name} sync` sends it later")
        return start({"mode": "offline"})


TRACKERS = {"tensorboard": open_tensorboard, "wandb": open_wandb, "swanlab": open_swanlab}


def tagged(metrics):
    """{tag: value} for trackers: eval_x is eval/x, a name in UNCHANGED_GROUPS itself, and any other x train/x.

    The widths of intervals would be charts of their own there: they are in metrics.jsonl and curves.html.
    """
    tags = {}
    for name, value in metrics.items():
        if value is None or not math.isfinite(value) or name.endswith("_ci95"):
            continue
        if "/" in name and name.partition("/")[0] in UNCHANGED_GROUPS:
            tag = name
        elif name.startswith("eval_"):
            tag = f"eval/{name.removeprefix('eval_')}"
        else:
            tag = f"train/{name}"
        tags[tag] = value
    return tags
