"""report.json: what was measured, of which policies, by whom; and the folder that it goes to."""

import hashlib
import json
import os
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch
import transformers

import lora
from formats import written_files
from formats.json_files import read_object
from harness import endings, locks, run_files, score_cache
from packing import digests
from tools import evaluate_adapters, evaluate_page, evaluate_text

SAMPLED = "sampled.jsonl"  # until all of the following are there
FILES = "report.json", "report.html", "report.txt", "responses.jsonl"
MANIFEST = "report.manifest.json"  # of these, for the folder may be a run's, which has one of its own
NOT_SETTINGS = "output_dir", "overwrite", "device", "hub"  # of the flags: what changes no number, or is resolved below
IN_LOG = "helpful_reward cost harm_rate rule_helpful rule_harm_rate over_refusal kl_per_token implicit_accuracy".split()


class Policy(NamedTuple):
    """The base, or the base with an adapter."""

    name: str  # in the report
    adapter: str | None = None  # its name on the model; None: the base
    folder: Path | None = None  # of the adapter


def settings_entries(args, dtype, device):
    """What of the flags and of the machine the numbers depend on."""
    not_settings = *run_files.NOT_FLAGS, *NOT_SETTINGS
    settings = {name: value for name, value in vars(args).items() if name not in not_settings}
    return {
        "settings": settings | {"dtype": str(dtype).removeprefix("torch."), "device": device.type},
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }


def prompts_sha256(prompts):
    asked = [(prompt.text, prompt.fields["category"], *digests(prompt)) for prompt in prompts]
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()


def count_categories(prompts):
    return dict(Counter(prompt.fields["category"] for prompt in prompts))


def judge_entry(folder, judge, model):
    """A reward model in the report."""
    return {
        "folder": folder,
        "calibrated": bool(judge.record.get("calibrated")),
        "shares_the_base": judge.model is model,
        "sha256": judge_sha256(judge),
        "validation_accuracy": (judge.record.get("validation") or {}).get("accuracy"),
    }


def judge_sha256(judge):
    """sha256 of what a reward model adds to its base, or of all of it."""
    weights = lora.adapter_state(judge.model, judge.adapter) if judge.adapter else judge.model.state_dict()
    return score_cache.weights_sha256([("head", judge.head), *weights.items()])


def adapter_sha256(model, adapter):
    return score_cache.weights_sha256(lora.adapter_state(model, adapter).items())


def policy_entry(policy, model, base):
    """A policy in the report, before its numbers; base: what --model names."""
    if policy.adapter is None:
        return {"name": policy.name}
    return {
        "name": policy.name,
        "folder": str(policy.folder),
        "trained_on": evaluate_adapters.trained_on(policy.folder, base),
        "sha256": adapter_sha256(model, policy.adapter),
        "training": evaluate_adapters.training(policy.folder),
    }


def log_line(entry):
    """The first numbers of a policy as a line of the log; nothing for a base that nothing judges."""
    estimates = entry["estimates"]
    numbers = [
        f"{name}={estimates[name]['mean']:.4f} [{estimates[name]['low']:.4f}, {estimates[name]['high']:.4f}]"
        for name in IN_LOG
        if name in estimates
    ]
    return f"{entry['name']}: {' '.join(numbers)}" if numbers else ""


# -- files -----------------------------------------------------------------------------------------------------------


def take_output(args):
    """Lock --output-dir, and remove what a kill left.  Raises LockedError, and RunFolderError where it holds a report
    or an input, or cannot be written.
    """
    folder = Path(args.output_dir)
    if sentence := written_files.clash(args, FILES):
        raise run_files.RunFolderError(sentence)
    there = [name for name in FILES if (folder / name).exists()]
    if there and not args.overwrite and not _was_saving(folder):
        raise run_files.RunFolderError(f"{folder} holds a report ({there[0]}): choose another, or pass --overwrite")
    listed = written_files.read(folder, MANIFEST)
    for name in there:
        if name not in listed or not written_files.is_as_listed(folder / name, listed[name]):
            raise run_files.RunFolderError(
                f"{folder / name} is not as this script wrote it ({MANIFEST}): move it away, or choose another folder"
            )
    parent = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise run_files.RunFolderError(f"--output-dir {folder} cannot be written: {parent} is no writable folder")
    locks.hold(folder / ".lock", f"--output-dir {folder}", endings.say)
    run_files.remove_drafts(folder)


def _was_saving(folder):
    """Whether the files there are of an evaluation that was killed while it saved them."""
    try:
        return bool(read_object(folder / f"{SAMPLED}.args.json")["progress"]["saving"])
    except (OSError, ValueError, KeyError, TypeError):
        return False


def save(output_dir, report, rows, kept):
    """Write the rows of all responses and the report, then as a page too: what cannot be drawn costs no response.

    kept: the responses as they were sampled, which nobody needs any more then.
    """
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    as_json = json.dumps(report, indent=1, ensure_ascii=False) + "\n"
    kept.note_saving()
    with run_files.whole_files(output_dir, MANIFEST) as folder:
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / "responses.jsonl").write_text("".join(lines), encoding="utf-8")
        (folder / "report.json").write_text(as_json, encoding="utf-8")
    for name in ("report.html", "report.txt"):
        (output_dir / name).unlink(missing_ok=True)  # of an earlier report
    with run_files.whole_files(output_dir, MANIFEST) as folder:
        (folder / "report.txt").write_text(evaluate_text.text(report), encoding="utf-8")
        (folder / "report.html").write_text(evaluate_page.page(json.loads(as_json)), encoding="utf-8")
    kept.remove()
