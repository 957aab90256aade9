"""What a run leaves in its output folder: metrics.jsonl and a page of its curves while it runs; at the end the weights,
the tokenizer, trainer_state.json (transformers' schema, so its plotting tools read it), args.json (which `--config`
takes, to run the same again), a copy of the script, and a model card.  What --report-to names gets the numbers too.
"""

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
from importlib.util import find_spec
from pathlib import Path

import torch
import transformers
from tqdm import tqdm
from transformers.trainer_callback import TrainerState

import score_cache
import training_curves
from tensor_files import open_to_others

# What marks a folder as a run's and would be replaced, and what goes with it under --overwrite; nothing else goes.
RUN_FILES = "metrics.jsonl args.json trainer_state.json adapter_config.json config.json README.md merged".split()
WITH_THEM = """adapter_model.safetensors model.safetensors model-*-of-*.safetensors model.safetensors.index.json
    generation_config.json curves.html lambda.jsonl logs/events.out.tfevents.*
    .checkpoint-*.unfinished .saving-*""".split()
# What may differ between the machines of a run: the data and the models count by their content instead.
OF_A_MACHINE = """model tokenizer_name dataset train_helpful_path train_harmless_path val_helpful_path
    val_harmless_path helpful_rm_path harmless_rm_path dataset_path test_dataset_path
    prompt_embedding_path eval_dataset ref_model_path adapter device gradient_checkpointing
    trust_remote_code output_dir logging_dir cache_dir report_to resume ddp_timeout
    optimizer_offload""".split()
# What may differ between a run and its continuation too; of the sizes of a pass the product counts, pairs per update.
HARMLESS = """num_samples eval_samples max_length max_prompt_length chat_template_strings skip_invalid dtype
    overwrite save_steps save_total_limit save_merged logging_steps eval_steps
    batch_size gradient_accumulation_steps tokens_per_microbatch""".split()
AS_THEY_ARE = "loss", "loss_components", "rewards_train", "preference_metrics"  # groups of tags
PROJECT = "preference-alignment"  # for trackers that sort runs by one, unless their variable names another
NOT_FLAGS = "config given typed local_rank estimate_memory".split()  # of a parsed command line, not to be repeated


class RunFolderError(ValueError):
    """An output folder that cannot be used: one sentence for the user."""


def identity(script, args, world, dtype, data, model, adapter_state=None):
    """What a run is, {name: value}: a checkpoint of a run that was another in any of it is refused.

    data: fingerprint of the pairs to train on; model: the base of what is trained, as it was loaded; adapter_state: of
    the adapter that training starts from, {name: tensor}.  The sha256 of the base is known to rank 0 alone.
    """
    base = world.is_main and score_cache.frozen_sha256(model, adapter_state)
    what = {"script": Path(script).name, "dtype": str(dtype)} | flags_that_matter(args, world.size)
    return what | {"data": data, "base model": base}


def flags_that_matter(args, ranks):
    """The flags that change what is computed, {name: value}; how an update is split into passes and ranks does not."""
    pairs = args.batch_size * args.gradient_accumulation_steps * ranks
    what = "pairs per update (batch size x accumulation x ranks)"
    return {what: pairs} | {name: value for name, value in flags_of_a_run(args).items() if name not in HARMLESS}


def flags_of_a_run(args):
    """The flags that all machines of a run have to have in common, {name: value}."""
    return {name: value for name, value in vars(args).items() if name not in (*OF_A_MACHINE, *NOT_FLAGS)}


def goes_on(args, checkpoint):
    """Whether the run continues the one in its output folder: `checkpoint` (a folder or None) lies there."""
    return checkpoint is not None and Path(checkpoint).resolve().parent == Path(args.output_dir).resolve()


def check_output(args, checkpoint=None):
    """Raise RunFolderError when --output-dir holds another run or cannot be written.  Changes nothing."""
    if getattr(args, "estimate_memory", False):  # nothing will be written
        return
    folder = Path(args.output_dir)
    found = [name for name in RUN_FILES if (folder / name).exists()]
    if found and not args.overwrite and not goes_on(args, checkpoint):
        raise RunFolderError(
            f"--output-dir {folder} holds a run ({found[0]}): choose another, or pass --resume auto or --overwrite"
        )
    parent = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise RunFolderError(f"--output-dir {folder} cannot be written: {parent} is not a folder you can write to")
    if args.logging_dir and Path(args.logging_dir).is_file():
        raise RunFolderError(f"--logging-dir {args.logging_dir} is a file: name a folder")
    for name in chosen_trackers(args):
        if not is_installed(name):
            raise RunFolderError(f"--report-to {name} needs it installed: bash setup.sh {name}, or --report-to none")


# -- trackers: each opens as a pair of functions, write({tag: number}, step) and close() -------------------------------


def chosen_trackers(args):
    """The trackers that --report-to names, each once; `auto` takes TensorBoard where it is, `none` nothing."""
    words = [args.report_to] if isinstance(args.report_to, str) else args.report_to  # `auto` where none were given
    if "auto" in words and is_installed("tensorboard"):
        words = ["tensorboard", *words]
    return [name for name in dict.fromkeys(words) if name in TRACKERS]


def is_installed(name):
    spec = find_spec(name)
    return spec is not None and spec.origin is not None  # a folder ./wandb of some run is no package


def open_tensorboard(args, folder, history):
    from torch.utils.tensorboard import SummaryWriter

    steps = [entry["step"] + 1 for entry in history[-1:]]  # what an interrupted run wrote from there on goes
    board = SummaryWriter(str(folder), purge_step=max(steps, default=None))

    def write(numbers, step):
        for tag, value in numbers.items():
            board.add_scalar(tag, value, step)

    return write, board.close


def open_wandb(args, folder, history):
    import wandb

    names = dict(project=os.environ.get("WANDB_PROJECT", PROJECT), name=Path(args.output_dir).resolve().name)
    run = with_or_without_net("wandb", lambda mode: wandb.init(**names, **mode, dir=folder, config=flags_to_show(args)))
    return run.log, run.finish


def open_swanlab(args, folder, history):
    import swanlab

    names = dict(project=os.environ.get("SWANLAB_PROJ_NAME", PROJECT), name=Path(args.output_dir).resolve().name)
    settings = dict(logdir=str(folder / "swanlog"), config=flags_to_show(args))
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


def flags_to_show(args):
    return {key: value for key, value in sorted(vars(args).items()) if key not in NOT_FLAGS}


# -- the log -----------------------------------------------------------------------------------------------------------


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
        folder.mkdir(parents=True, exist_ok=True)
        if args.overwrite and not goes_on(args, checkpoint):
            old = [path for pattern in RUN_FILES + WITH_THEM for path in folder.glob(pattern)]
            numbered = [*folder.glob("checkpoint-*"), *folder.glob("epoch_*")]
            old += [path for path in numbered if re.fullmatch(r"\D+[-_]\d+", path.name)]
            for path in old:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        flags = json.dumps(flags_to_show(args), indent=2, ensure_ascii=False) + "\n"
        (folder / "args.json").write_text(flags, encoding="utf-8")
        atexit.register(self.draw)  # however the run ends
        self.path = folder / "metrics.jsonl"
        self.path.write_text("".join(json.dumps(entry) + "\n" for entry in self.history), encoding="utf-8")
        if "auto" in args.report_to and not is_installed("tensorboard"):
            where = "metrics.jsonl and curves.html have the same numbers"
            tqdm.write(f"TensorBoard is not installed (bash setup.sh tensorboard): no event files, {where}")
        logs = Path(args.logging_dir or folder / "logs")
        for name in chosen_trackers(args):
            logs.mkdir(parents=True, exist_ok=True)
            write, _ = tracker = TRACKERS[name](args, logs, self.history)
            self.trackers.append(tracker)
            for entry in self.history if name != "tensorboard" else ():  # which has them from before
                write(tagged({key: entry[key] for key in entry if key not in ("step", "epoch")}), step=entry["step"])

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
            write(tagged(metrics), step=step)
        if any(name.startswith("eval_") for name in metrics):
            self.draw()

    def write_lambda(self, step, numbers):
        """One line of lambda.jsonl: what moves at each update and costs nothing to know."""
        if self.is_main:
            entry = {"step": step} | {name: value for name, value in numbers.items() if math.isfinite(value)}
            with open(self.folder / "lambda.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")

    def draw(self):
        """curves.html, whole or as it was: a page that cannot be written is no reason to end a run."""
        if not self.history:
            return
        last, draft, page = self.history[-1], self.folder / ".saving-curves.html", self.folder / "curves.html"
        lead = f"Up to update {last['step']}, epoch {last['epoch']:g}. The numbers are in metrics.jsonl."
        try:
            if not page.exists():
                tqdm.write(f"curves: {page}, for a browser; drawn anew at each evaluation and at the end")
            curves = training_curves.of_run(self.folder)
            draft.write_text(training_curves.page(self.folder.resolve().name, lead, curves), encoding="utf-8")
            os.replace(draft, page)
        except OSError as error:
            tqdm.write(f"{page} cannot be written ({error}): training goes on")

    def close(self):
        """At the end of the run."""
        if self.is_main:
            self.draw()
            atexit.unregister(self.draw)
        for _, close in self.trackers:
            close()


def tagged(metrics):
    """{tag: value} for trackers: eval_x is eval/x, a name in AS_THEY_ARE itself, and any other x train/x.

    The widths of intervals would be charts of their own there: they are in metrics.jsonl and curves.html.
    """
    found = {}
    for name, value in metrics.items():
        tag = f"eval/{name[5:]}" if name.startswith("eval_") else f"train/{name}"
        in_group = "/" in name and name.partition("/")[0] in AS_THEY_ARE
        if value is not None and math.isfinite(value) and not name.endswith("_ci95"):
            found[name if in_group else tag] = value
    return found


@contextmanager
def whole_files(output_dir):
    """A temporary folder on the same disk; what the block writes there moves to `output_dir` when it ends well."""
    output_dir = Path(output_dir)
    folder = Path(tempfile.mkdtemp(prefix=".saving-", dir=output_dir))
    try:
        yield folder
        open_to_others(folder)
        for path in sorted(folder.iterdir()):
            target = output_dir / path.name
            if target.is_dir():
                shutil.rmtree(target)
            os.replace(path, target)
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
