"""The adapters that are measured: how they are named, in which folder of a run they lie, how they were trained."""

import re
from pathlib import Path

from formats import json_files
from harness import training_curves

# What to draw of an adapter's training, with the unit; `eval_...` of a name goes into the same picture.
CURVES = {
    "loss_H": "nats per helpful pair",
    "loss_S": "nats per harmless pair",
    "KL": "nats per token",
    "lambda": "weight of safety",
    "J_C": "expected cost above the threshold",
    "E_cost": "expected cost, score",
    "loss": "nats per pair",
    "rewards/margins": "chosen - rejected, nats",
    "rewards/accuracies": "share of pairs",
    "logps/chosen_change": "nats per response",
}


def named_folder(word):
    """NAME=DIR, or DIR named after itself (an epoch_N after its run too) -> (name, folder)."""
    name, equals, folder = word.partition("=")
    if equals and name and not Path(word).exists():
        return name, folder
    path = Path(word).resolve()
    return (f"{path.parent.name}/{path.name}" if is_part_of_run(path) else path.name), word


def is_part_of_run(path):
    return re.fullmatch(r"(epoch_|checkpoint-)\d+", path.name) is not None


def adapter_folder(folder):
    """The folder itself, or its newest epoch_N where the run of Safe-MM-DPO keeps its adapters there alone."""
    epochs = [path for path in Path(folder).glob("epoch_*/adapter_config.json") if is_part_of_run(path.parent)]
    if (Path(folder) / "adapter_config.json").exists() or not epochs:
        return Path(folder)
    return max(epochs, key=lambda path: int(path.parent.name.removeprefix("epoch_"))).parent


def trained_on(folder, model):
    """The base model that an adapter's folder names; `model` where it names none."""
    return json_files.read_object(folder / "adapter_config.json").get("base_model_name_or_path") or model


def training(folder):
    """The curves of the run that an adapter is from: one in epoch_N has it in the folder above."""
    path = folder.resolve()
    curves = training_curves.of_run(path.parent if is_part_of_run(path) else folder)
    wanted = [prefix + name for name in CURVES for prefix in ("", "eval_")] + ["cost_threshold"]
    return {name: curves[name] for name in wanted if name in curves}


def other_bases(adapters, model):
    """Sentences on adapters [(name, folder)] that were trained on another base than `model`."""
    for name, folder in adapters:
        base = trained_on(folder, model)
        if Path(base).name != Path(model).name:
            yield f"{name} was trained on {base}, and is measured on {model}"
