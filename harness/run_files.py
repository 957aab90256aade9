"""What a run leaves in its output folder: metrics.jsonl and a page of its curves while it runs; at the end the weights,
the tokenizer, trainer_state.json (transformers' schema, so its plotting tools read it), args.json (which `--config`
takes, to run the same again), a copy of the script, and a model card.  What --report-to names gets the numbers too.
"""

import argparse
import atexit
import json
import math
import os
import platform
import re
import shutil
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from tqdm import tqdm
from transformers.trainer_callback import TrainerState

from formats import written_files
from formats.tensor_files import open_to_others
from formats.user_errors import UserError
from harness import trackers, training_curves

# What marks a folder as a run's: a run replaces it.  So do epoch_1 and checkpoint-5.
RUN_FILES = """metrics.jsonl args.json trainer_state.json adapter_config.json config.json README.md merged manifest.json
    adapter_model.safetensors model.safetensors model.safetensors.index.json generation_config.json reward_model.json
    prompt_embeddings.pt tokenizer.json tokenizer_config.json chat_template.jinja special_tokens_map.json
    added_tokens.json vocab.json vocab.txt merges.txt tokenizer.model curves.html lambda.jsonl""".split()
# What may differ between the machines of a run: the data and the models count by their content instead.
MAY_DIFFER_BETWEEN_MACHINES = """model tokenizer_name dataset train_helpful_path train_harmless_path val_helpful_path
    val_harmless_path helpful_rm_path harmless_rm_path dataset_path test_dataset_path
    prompt_embedding_path eval_dataset ref_model_path adapter device gradient_checkpointing
    trust_remote_code hub output_dir logging_dir cache_dir report_to resume ddp_timeout
    optimizer_offload""".split()
# What may differ between a run and its continuation too; of the sizes of a pass the product counts, pairs per update.
MAY_DIFFER_ON_RESUME = """num_samples eval_samples max_length max_prompt_length chat_template_strings skip_invalid dtype
    overwrite save_steps save_total_limit save_merged logging_steps eval_steps
    batch_size gradient_accumulation_steps tokens_per_microbatch""".split()
# Of a parsed command line, not to be repeated.
NOT_FLAGS = "config given typed full_rate local_rank estimate_memory".split()


class RunFolderError(UserError):
    """An output folder that cannot be used: one sentence for the user."""


def flags_that_matter(args, ranks):
    """The flags that change what is computed, {name: value}; how an update is split into passes and ranks does not."""
    pairs = args.batch_size * args.gradient_accumulation_steps * ranks
    what = "pairs per update (batch size x accumulation x ranks)"
    return {what: pairs} | {
        name: value for name, value in flags_of_a_run(args).items() if name not in MAY_DIFFER_ON_RESUME
    }


def flags_of_a_run(args):
    """The flags that all machines of a run have to have in common, {name: value}."""
    return {name: value for name, value in vars(args).items() if name not in (*MAY_DIFFER_BETWEEN_MACHINES, *NOT_FLAGS)}


def flags_to_show(args):
    return {key: value for key, value in sorted(vars(args).items()) if key not in NOT_FLAGS}


def goes_on(args, checkpoint):
    """Whether the run continues the one in its output folder: `checkpoint` (a folder or None) lies there."""
    return checkpoint is not None and Path(checkpoint).resolve().parent == Path(args.output_dir).resolve()


def numbered(folder):
    """epoch_N and checkpoint-N of a run; no copy of one with another name."""
    found = [*folder.glob("checkpoint-*"), *folder.glob("epoch_*")]
    return sorted(path for path in found if re.fullmatch(r"(checkpoint-|epoch_)\d+", path.name))


def run_names():
    """Names of what a run of this script writes, its own copy among them."""
    return [name for name in (*RUN_FILES, Path(sys.argv[0]).name) if name]


def not_written_by_a_run(folder):
    """Names in a run's folder that a new run would replace, and that are not as a run's manifest lists them."""
    epochs = [path.name for path in numbered(folder) if path.name.startswith("epoch_")]
    names = [*run_names(), *(f"{below}/{name}" for below in ("merged", *epochs) for name in RUN_FILES)]
    if not (listed := written_files.read(folder)):
        return [name for name in names if (folder / name).is_file()]
    names = [name for name in names if (folder / name).is_file() and name != written_files.NAME]
    return [name for name in names if name not in listed] + written_files.unlike(folder, names)


def is_begun(args):
    """Whether --output-dir holds this very run as it was before its end and its first checkpoint: it may begin anew.

    Its flags say so; of the data and the models, which lie where each machine has them, nothing is known yet.
    """
    folder = Path(args.output_dir)
    if (folder / "trainer_state.json").exists() or any(folder.glob("checkpoint-*")):
        return False
    try:
        flags = json.loads((folder / "args.json").read_text(encoding="utf-8"))
        there = flags_that_matter(argparse.Namespace(**flags), 1)
    except (OSError, ValueError, TypeError, AttributeError):
        return False
    return there == json.loads(json.dumps(flags_that_matter(args, 1)))


def check_output(args, checkpoint=None):
    """Raise RunFolderError when --output-dir holds another run, is what is read, or cannot be written.

    --overwrite replaces what a run has written, and --resume auto what this one wrote before its first checkpoint.
    Changes nothing.
    """
    if getattr(args, "estimate_memory", False):  # nothing will be written
        return
    if sentence := written_files.clash(args, [*run_names(), "epoch_*", "checkpoint-*"]):
        raise RunFolderError(sentence)
    folder = Path(args.output_dir)
    if not goes_on(args, checkpoint):
        found = [name for name in run_names() if (folder / name).exists()] + [path.name for path in numbered(folder)]
        if found and not args.overwrite and not (args.resume == "auto" and is_begun(args)):
            raise RunFolderError(
                f"--output-dir {folder} holds a run ({found[0]}): choose another, or pass --resume auto or --overwrite"
            )
        if found and (names := not_written_by_a_run(folder)):
            raise RunFolderError(
                f"--output-dir {folder} holds {names[0]}, which manifest.json does not list as it is "
                "and may be yours: move it away, or choose another folder"
            )
    parent = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise RunFolderError(f"--output-dir {folder} cannot be written: {parent} is not a folder you can write to")
    if args.logging_dir and Path(args.logging_dir).is_file():
        raise RunFolderError(f"--logging-dir {args.logging_dir} is a file: name a folder")
    for name in trackers.chosen(args):
        if not trackers.is_installed(name):
            raise RunFolderError(f"--report-to {name} needs it installed: bash setup.sh {name}, or --report-to none")


def remove_run(folder):
    """Remove what an earlier run wrote into a folder; returns a sentence about what stays, or None."""
    for path in numbered(folder):
        if path.name.startswith("checkpoint-"):  # which have a manifest of their own; the others are in the folder's
            written_files.remove(path)
    written_files.remove(folder)
    left = sorted(path.name for path in folder.iterdir() if path.name != "cache") if folder.exists() else []
    if not left:
        return None
    return f"left alone: {', '.join(left[:5])}{' ...' * (len(left) > 5)} (not written by a run, or changed since)"


class MetricsLog:
    """metrics.jsonl, curves.html, trackers and the history of trainer_state.json; does nothing but on rank 0.

    Making one starts the run's folder: what an earlier run left there (--overwrite) goes now, and not before.
    A resumed run brings its `history`: metrics.jsonl goes back to where the checkpoint was.
    """

    def __init__(self, args, is_main, checkpoint=None, history=None):
        self.is_main, self.history, self.trackers = is_main, list(history or []), []
        if not is_main:
            return
        self.folder = folder = Path(args.output_dir)
        for path in [*folder.glob(".saving-*"), *folder.glob(".checkpoint-*.unfinished")]:  # what a kill left
            shutil.rmtree(path, ignore_errors=True)
        for path in folder.glob(f".{written_files.NAME}.*"):
            path.unlink()
        begins = not goes_on(args, checkpoint) and (args.overwrite or written_files.read(folder))
        if begins and (left := remove_run(folder)):
            tqdm.write(left)
        folder.mkdir(parents=True, exist_ok=True)
        with whole_files(folder, grows=["metrics.jsonl"]) as draft:
            text = json.dumps(flags_to_show(args), indent=2, ensure_ascii=False) + "\n"
            (draft / "args.json").write_text(text, encoding="utf-8")
            lines = "".join(json.dumps(entry) + "\n" for entry in self.history)
            (draft / "metrics.jsonl").write_text(lines, encoding="utf-8")
        self.path = folder / "metrics.jsonl"
        atexit.register(self.draw)  # however the run ends
        self.logs = Path(args.logging_dir or folder / "logs")
        self.before = set(self.logs.rglob("*"))
        self._start_trackers(args)
        self._list(self._tracked(), grows=True)

    def _start_trackers(self, args):
        if "auto" in args.report_to and not trackers.is_installed("tensorboard"):
            where = "metrics.jsonl and curves.html have the same numbers"
            tqdm.write(f"TensorBoard is not installed (bash setup.sh tensorboard): no event files, {where}")
        for name in trackers.chosen(args):
            self.logs.mkdir(parents=True, exist_ok=True)
            write, _ = tracker = trackers.TRACKERS[name](args, flags_to_show(args), self.logs, self.history)
            self.trackers.append(tracker)
            for entry in self.history if name != "tensorboard" else ():  # which has them from before
                numbers = {key: entry[key] for key in entry if key not in ("step", "epoch")}
                write(trackers.tagged(numbers), step=entry["step"])

    def _tracked(self):
        """The files that the trackers of this run have written so far."""
        found = {path for pattern in trackers.FILES for path in self.logs.glob(pattern)} - self.before
        return [path.resolve() for path in found if path.is_file()]

    def write(self, step, epoch, metrics):
        """One line of metrics {name: float}, which trackers get too; an evaluation draws curves.html."""
        if not self.is_main:
            return
        entry = {"step": step, "epoch": round(epoch, 4)}
        entry |= {name: value if math.isfinite(value) else None for name, value in metrics.items()}  # NaN is not JSON
        self.history.append(entry)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        for write, _ in self.trackers:
            write(trackers.tagged(metrics), step=step)
        if any(name.startswith("eval_") for name in metrics):
            self.draw()

    def write_lambda(self, step, numbers):
        """One line of lambda.jsonl: what moves at each update and costs nothing to know."""
        if self.is_main:
            entry = {"step": step} | {name: value for name, value in numbers.items() if math.isfinite(value)}
            path, line = self.folder / "lambda.jsonl", json.dumps(entry) + "\n"
            if path.exists():
                with open(path, "a", encoding="utf-8") as file:
                    file.write(line)
            else:
                with whole_files(self.folder, grows=[path.name]) as draft:
                    (draft / path.name).write_text(line, encoding="utf-8")

    def draw(self):
        """curves.html, whole or as it was: a page that cannot be written is no reason to end a run."""
        if not self.history:
            return
        last, page = self.history[-1], self.folder / "curves.html"
        lead = f"Up to update {last['step']}, epoch {last['epoch']:g}. The numbers are in metrics.jsonl."
        try:
            if not page.exists():
                tqdm.write(f"curves: {page}, for a browser; drawn anew at each evaluation and at the end")
            curves = training_curves.of_run(self.folder)
            with whole_files(self.folder) as draft:
                text = training_curves.page(self.folder.resolve().name, lead, curves)
                (draft / page.name).write_text(text, encoding="utf-8")
        except OSError as error:
            tqdm.write(f"{page} cannot be written ({error}): training goes on")

    def close(self):
        """At the end of the run.  The logs are as long as they get: they are ours as they are, and no longer."""
        for _, close in self.trackers:
            close()
        if self.is_main:
            self.draw()
            atexit.unregister(self.draw)
            self._list([self.path, self.folder / "lambda.jsonl", *self._tracked()])

    def _list(self, paths, **grows):
        folder = self.folder.resolve()
        paths = [path.resolve() for path in paths]
        inside = {path.relative_to(folder).as_posix(): path for path in paths if path.is_relative_to(folder)}
        new = {name: written_files.entry(path) | grows for name, path in inside.items() if path.exists()}
        written_files.write(folder, written_files.read(folder) | new)


@contextmanager
def whole_files(output_dir, manifest=written_files.NAME, grows=()):
    """A temporary folder on the same disk; what the block writes there moves to `output_dir` when it ends well, and
    the manifest there lists it.  grows: names of logs that will become longer."""
    folder = Path(tempfile.mkdtemp(prefix=".saving-", dir=output_dir))
    try:
        yield folder
        open_to_others(folder)
        for below in [path for path in folder.iterdir() if path.is_dir()]:  # epoch_1, merged: it goes along in a copy
            written_files.write(below, written_files.entries(below))
        written_files.put(folder, Path(output_dir), manifest, grows)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def save_run_record(folder, log, args, script, card):
    """trainer_state.json, the script as it ran, and the model card `card` (README.md)."""
    last = log.history[-1] if log.history else {"epoch": 0, "step": 0}
    state = TrainerState(
        epoch=last["epoch"],
        global_step=last["step"],
        max_steps=last["step"],
        logging_steps=args.logging_steps,
        eval_steps=args.eval_steps,
        train_batch_size=args.batch_size,
        num_train_epochs=args.epochs,
        num_input_tokens_seen=max((entry.get("num_tokens") or 0 for entry in log.history), default=0),
        log_history=log.history,
    )
    state.save_to_json(folder / "trainer_state.json")
    shutil.copyfile(script, folder / Path(script).name)  # not its mode
    (folder / "README.md").write_text(card, encoding="utf-8")


def model_card(args, script, method, history, fingerprint, left_out):
    """A Hugging Face model card: what was trained, on what, with which command, and how it did.

    left_out: sentences on what has no adapter (lora_targets.left_out), None where all weights were trained.
    """
    adapter = left_out is not None
    base, task = f"base_model: {args.model}\n", "text-classification" if method == "reward model" else "text-generation"
    library = "library_name: peft\n" if adapter else "library_name: transformers\n"
    tags = "".join(f"- {tag}\n" for tag in (method.lower(), "preference-alignment", *(["lora"] if adapter else [])))
    table, evaluations = "", [entry for entry in history if any(key.startswith("eval_") for key in entry)]
    if evaluations:
        first, last = evaluations[0], evaluations[-1]
        table = f"\n| held out (with 95 % interval) | step {first['step']} | step {last['step']} |\n|---|---|---|\n"
        for name in (key for key in last if f"{key}_ci95" in last):
            cells = (f"{entry[name]:.4f} ± {entry[name + '_ci95']:.4f}" for entry in (first, last))
            table += f"| {name.removeprefix('eval_')} | {' | '.join(cells)} |\n"
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}"
    return (
        f"---\n{base}{library}pipeline_tag: {task}\ntags:\n{tags}---\n\n"
        f"# {Path(args.output_dir).name}\n\n{args.model}, trained with {method} by `{Path(script).name}`.\n\n"
        f"    {' '.join(['python', Path(script).name, *sys.argv[1:]])}\n{table}\n"
        f"{''.join(f'{sentence}.{chr(10)}{chr(10)}' for sentence in left_out or ())}"
        f"Seed {args.seed}; {versions}; training data sha256 {fingerprint}.\n"
    )
