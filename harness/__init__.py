"""What every run needs, and nobody has to read to learn a method.  A training script talks to the first two.

run               a run around its method: what it reads and loads, what it is, what it leaves behind
data              its pairs, cut into updates and passes
training          its updates: optimiser, gradients of all ranks, log lines, evaluations, checkpoints

checkpoints       whole or not there; exact resume; Ctrl-C, SIGTERM, SIGHUP
score_cache       what a frozen model says of fixed data, computed once
run_files         the output folder: whose it is, the record, the model card
metrics_log       metrics.jsonl, and what --report-to names
locks             one writer per folder
endings           what an exception becomes: a sentence, an exit code
training_curves   a page of the curves, and charts, which draws it; trackers: TensorBoard, wandb, swanlab
device            number type, free memory
compiled          blocks through torch.compile; four_bit: a frozen base in 4 bits
sharding          FSDP2, where all weights are trained on several ranks
optimizers        AdamW; with 8-bit moments; with its moments in the CPU's memory
memory_estimate   what a run will take, before anything is loaded; pass_memory counts a pass, memory_report says it
speed             where the time goes, useful TFLOP/s
flags             both spellings, --config, errors of one sentence; flag_names: other trainers' names
training_flags    the flags that all trainers have
"""

import os
import sys


def is_alone():
    """Whether there are no other ranks."""
    return os.environ.get("WORLD_SIZE", "1") in ("", "1")


def speaks():
    """Whether this process speaks for its machine; one that no launcher started does, whatever LOCAL_RANK says."""
    return is_alone() or os.environ.get("LOCAL_RANK", "0") in ("", "0")


def interrupted(*_):
    """End the process in one line, while nothing is done yet that would have to be saved."""
    if speaks():
        os.write(2, f"{os.path.basename(sys.argv[0])}: interrupted\n".encode("utf-8", "backslashreplace"))
    os._exit(130)


def _uncaught(kind, error, trace):
    if kind is KeyboardInterrupt:
        interrupted()
    sys.__excepthook__(kind, error, trace)


def _is_ours(program):
    """Whether the program that runs is a script beside this folder."""
    root = os.path.dirname(os.path.dirname(__file__))
    return os.path.isfile(program) and os.path.samefile(os.path.dirname(program) or ".", root)


if sys.argv and _is_ours(sys.argv[0]):
    sys.excepthook = _uncaught  # a Ctrl-C before it has read its flags is no fault of it
