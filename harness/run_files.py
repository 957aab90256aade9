"""The output folder of a run: whose it is, whether a run may begin there, and what it holds at the end: the weights,
the tokenizer, trainer_state.json (transformers' schema, so its plotting tools read it), args.json (which `--config`
takes, to run the same again), a copy of the script, and a model card.  Its logs: metrics_log.py.
"""

import argparse
import hashlib
import json
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
from transformers.trainer_callback import TrainerState

from formats import written_files
from formats.json_files import read_object
from formats.tensor_files import open_to_others
from formats.user_errors import UserError
from harness import endings, trackers

# What marks a folder as a run's: a run replaces it.  So do epoch_1 and checkpoint-5.
RUN_FILES = """metrics.jsonl args.json trainer_state.json adapter_config.json config.json README.md merged manifest.json
    adapter_model.safetensors model.safetensors model.safetensors.index.json generation_config.json reward_model.json
    prompt_embeddings.pt tokenizer.json tokenizer_config.json chat_template.jinja special_tokens_map.json
    added_tokens.json vocab.json vocab.txt merges.txt tokenizer.model curves.html lambda.jsonl""".split()
# What may differ between the machines of a run: the data and the models count by their content instead.
MAY_DIFFER_BETWEEN_MACHINES = """model tokenizer_name dataset train_helpful_path train_harmless_path val_helpful_path
    val_harmless_path helpful_rm_path harmless_rm_path dataset_path test_dataset_path
    prompt_embedding_path eval_dataset ref_model_path adapter device gradient_checkpointing compile
    trust_remote_code hub output_dir logging_dir cache_dir report_to resume ddp_timeout
    optimizer_offload""".split()
# What may differ between a run and its continuation too; of the sizes of a pass the product counts, pairs per update.
MAY_DIFFER_ON_RESUME = """num_samples eval_samples max_length max_prompt_length chat_template_strings skip_invalid dtype
    overwrite save_steps save_total_limit save_merged logging_steps eval_steps
    batch_size gradient_accumulation_steps tokens_per_microbatch""".split()
# Flags that name a model, the files in it that make its numbers, and how much of a large one's ends is read (bytes).
MODELS = "model ref_model_path adapter helpful_rm_path harmless_rm_path prompt_embedding_path".split()
WEIGHTS = "config.json", "adapter_config.json", "reward_model.json", "*.safetensors", "*.bin", "*.pt"
ENDS = 2**23
# Of a parsed command line, not to be repeated.
NOT_FLAGS = "config given typed as_begun full_rate local_rank estimate_memory".split()


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


def weights_of_flags(args):
    """{what a flag reads: sha256} of the models on this machine, for ranks to compare before gigabytes are read.

    It is of what small files hold, and of the sizes and both ends of larger ones.
    """
    found = {}
    for name in MODELS:
        place = Path(getattr(args, name, None) or "")
        files = [place] if place.is_file() else [path for kind in WEIGHTS for path in place.glob(kind)]
        digest = hashlib.sha256()
        for path in sorted(files) if place.name else ():
            size = path.stat().st_size
            digest.update(f"{path.name} {size}".encode())
            with open(path, "rb") as file:
                digest.update(file.read(ENDS))
                file.seek(max(size - ENDS, file.tell()))
                digest.update(file.read())
        found[f"the model of --{name.replace('_', '-')}"] = digest.hexdigest()
    return found


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


def is_begun(args, found):
    """Whether --output-dir, which holds files of these names, holds this very run as it was before its end and its
    first checkpoint: it may begin anew.

    Its flags say so; of the data and the models, which lie where each machine has them, nothing is known yet.
    """
    folder = Path(args.output_dir)
    has_ended = (folder / "trainer_state.json").exists() and not any(folder.glob(".saving-*"))  # no kill in that save
    if has_ended or any(folder.glob("checkpoint-*")):
        return False
    if "args.json" not in found:  # killed between two of its first files
        return set(found) <= {"manifest.json", "metrics.jsonl", "lambda.jsonl", "curves.html"}
    try:
        there = flags_that_matter(argparse.Namespace(**read_object(folder / "args.json")), 1)
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
        if found and not args.overwrite and not (args.resume == "auto" and is_begun(args, found)):
            held, advice = f"a run ({found[0]})", "pass --resume auto or --overwrite"
            if args.resume == "auto":
                held, advice = f"a run and no checkpoint of it to go on from ({found[0]})", "pass --overwrite"
            raise RunFolderError(f"--output-dir {folder} holds {held}: choose another, or {advice}")
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
    left = sorted({path.name for path in folder.iterdir()} - {"cache", ".lock"}) if folder.exists() else []
    if not left:
        return None
    return f"left alone: {', '.join(left[:5])}{' ...' * (len(left) > 5)} (not written by a run, or changed since)"


def remove_drafts(folder):
    """Remove what a kill has left half written in a run's folder."""
    for pattern in (".saving-*", ".checkpoint-*.unfinished", f".{written_files.NAME}.*"):
        for path in folder.glob(pattern):
            path.unlink() if path.is_file() else shutil.rmtree(path, ignore_errors=True)


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
        with endings.held():
            written_files.put(folder, Path(output_dir), manifest, grows)
    except OSError as error:
        error.filename = error.filename or output_dir  # a full disk names none
        raise
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
