"""What a run leaves in its output folder: metrics.jsonl while it runs; at the end the weights, the tokenizer,
trainer_state.json (transformers' schema, so its plotting tools read it), args.json (which `--config` takes, to run the
same again), a copy of the script, and a model card.  TensorBoard events go to the logging folder where it is installed.
"""

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
from transformers.trainer_callback import TrainerState

from chat_text import turn_end

# What marks a folder as a run's and would be replaced, and what goes with it under --overwrite; nothing else goes.
RUN_FILES = "metrics.jsonl args.json trainer_state.json adapter_config.json config.json README.md merged".split()
WITH_THEM = """adapter_model.safetensors model.safetensors model-*-of-*.safetensors model.safetensors.index.json
    generation_config.json logs/events.out.tfevents.* .checkpoint-*.unfinished .saving-*""".split()
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
AS_THEY_ARE = "loss", "loss_components", "rewards_train", "preference_metrics"  # groups of TensorBoard tags
NOT_FLAGS = "config given typed local_rank estimate_memory".split()  # of a parsed command line, not to be repeated


class RunFolderError(ValueError):
    """An output folder that cannot be used: one sentence for the user."""


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
    if args.report_to == "tensorboard" and not find_spec("tensorboard"):
        raise RunFolderError("--report-to tensorboard needs it installed: pip install tensorboard, or --report-to none")


class MetricsLog:
    """metrics.jsonl, TensorBoard events and the history of trainer_state.json; does nothing but on rank 0.

    Making one starts the run's folder: what an earlier run left there (--overwrite) goes now, and not before.
    A resumed run brings its `history`: metrics.jsonl goes back to where the checkpoint was.
    """

    def __init__(self, args, is_main, checkpoint=None, history=None):
        self.is_main, self.history, self.board = is_main, list(history or []), None
        if not is_main:
            return
        folder = Path(args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        if args.overwrite and not goes_on(args, checkpoint):
            old = [path for pattern in RUN_FILES + WITH_THEM for path in folder.glob(pattern)]
            numbered = [*folder.glob("checkpoint-*"), *folder.glob("epoch_*")]
            old += [path for path in numbered if re.fullmatch(r"\D+[-_]\d+", path.name)]
            for path in old:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        flags = {key: value for key, value in sorted(vars(args).items()) if key not in NOT_FLAGS}
        (folder / "args.json").write_text(json.dumps(flags, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        self.path = folder / "metrics.jsonl"
        self.path.write_text("".join(json.dumps(entry) + "\n" for entry in self.history), encoding="utf-8")
        if args.report_to != "none":
            if find_spec("tensorboard"):
                from torch.utils.tensorboard import SummaryWriter

                steps = [entry["step"] + 1 for entry in self.history[-1:]]
                self.board = SummaryWriter(
                    args.logging_dir or str(folder / "logs"), purge_step=max(steps, default=None)
                )
            else:
                print("TensorBoard is not installed: no event files, metrics.jsonl has the same numbers")

    def write(self, step, epoch, metrics):
        """One line of metrics {name: float}; in TensorBoard eval_x is eval/x, a name in AS_THEY_ARE itself, and any
        other x train/x."""
        if not self.is_main:
            return
        entry = {"step": step, "epoch": round(epoch, 4)}
        entry |= {name: value if math.isfinite(value) else None for name, value in metrics.items()}  # NaN is not JSON
        self.history.append(entry)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        for name, value in metrics.items() if self.board else ():
            tag = f"eval/{name[5:]}" if name.startswith("eval_") else f"train/{name}"
            in_group = "/" in name and name.partition("/")[0] in AS_THEY_ARE
            self.board.add_scalar(name if in_group else tag, value, step)

    def close(self):
        if self.board:
            self.board.close()


@contextmanager
def whole_files(output_dir):
    """A temporary folder on the same disk; what the block writes there moves to `output_dir` when it ends well."""
    output_dir = Path(output_dir)
    folder = Path(tempfile.mkdtemp(prefix=".saving-", dir=output_dir))
    try:
        yield folder
        for path in sorted(folder.iterdir()):
            target = output_dir / path.name
            if target.is_dir():
                shutil.rmtree(target)
            os.replace(path, target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def save_tokenizer(tokenizer, folder):
    """Write the tokenizer; and where a whole model stands in `folder`, let `generate` stop at the end of a turn too."""
    tokenizer.save_pretrained(folder)
    if (Path(folder) / "generation_config.json").exists():
        settings = transformers.GenerationConfig.from_pretrained(folder)
        ends = settings.eos_token_id if isinstance(settings.eos_token_id, list) else [settings.eos_token_id]
        if turn_end(tokenizer) not in ends:
            settings.eos_token_id = [*(end for end in ends if end is not None), turn_end(tokenizer)]
            settings.save_pretrained(folder)


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
    shutil.copy(script, folder / Path(script).name)
    (folder / "README.md").write_text(card, encoding="utf-8")


def model_card(args, script, method, history, fingerprint, adapter):
    """A Hugging Face model card: what was trained, on what, with which command, and how it did."""
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
        f"Seed {args.seed}; {versions}; training data sha256 {fingerprint}.\n"
    )
