"""The same faults in a run of dpo_hf_run.py and in one of TRL's DPOTrainer (transformers' Trainer below it): what each
says, with which exit code, and whether the run that goes on ends with the weights of an uninterrupted one.

    python benchmarks/faults_beside_trl.py outputs/toy_world                  # some minutes on one core; offline
    python benchmarks/faults_beside_trl.py outputs/toy_world --only killed    # of the cases, those with that word

Both train the toy world's model by LoRA with dropout for 12 updates on one thread, with a checkpoint every 4 updates.
Each run is a fork of this process, which has loaded the libraries once.
"""

import argparse
import errno
import os
import shutil
import signal
import sys
import tempfile
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import datasets
import peft
import safetensors.torch
import torch
import transformers
import trl

import dpo_hf_run
from harness import endings

UPDATES, EVERY = 12, 4
LIMIT = 120  # seconds of a run


# -- the two runs ------------------------------------------------------------------------------------------------------


def run_ours(world, rows, resume, changes):
    words = f"--model {world}/model --dataset {rows} --output-dir out --save-steps {EVERY} --max-steps {UPDATES}"
    words += " --batch-size 4 --gradient-accumulation-steps 1 --eval-samples 0 --num-samples 0 --lora-dropout 0.1"
    words += f" --device cpu --dtype fp32 --report-to none --logging-steps 1 --beta {changes.get('beta', 1.0)}"
    words += f" --learning-rate {changes.get('learning_rate', 1e-3)} --resume {'auto' if resume else 'none'}"
    sys.argv = ["dpo_hf_run.py", *words.split()]
    args = dpo_hf_run.get_args()
    endings.run(dpo_hf_run.main, args)


def run_trl(world, rows, resume, changes):
    table = datasets.load_dataset("json", data_files=str(rows), split="train", cache_dir="cache")
    names = {"chosen_response": "chosen", "rejected_response": "rejected"}
    table = table.rename_columns({old: new for old, new in names.items() if old in table.column_names})
    table = table.select_columns([name for name in ("prompt", "chosen", "rejected") if name in table.column_names])
    config = trl.DPOConfig(
        output_dir="out",
        save_steps=EVERY,
        max_steps=UPDATES,
        per_device_train_batch_size=4,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        bf16=False,
        seed=42,
        disable_tqdm=True,
        beta=changes.get("beta", 1.0),
        learning_rate=changes.get("learning_rate", 1e-3),
    )
    trainer = trl.DPOTrainer(
        model=transformers.AutoModelForCausalLM.from_pretrained(world / "model", dtype=torch.float32),
        args=config,
        train_dataset=table,
        processing_class=transformers.AutoTokenizer.from_pretrained(world / "model"),
        peft_config=peft.LoraConfig(r=16, lora_alpha=32, lora_dropout=0.1, task_type="CAUSAL_LM"),
    )
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model("out")


RUNS = {"ours": run_ours, "TRL": run_trl}


def start(which, folder, world, rows, fault=None, resume=False, **changes):
    """A run in a fork that stands in `folder`; its process number."""
    folder.mkdir(parents=True, exist_ok=True)
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        log = os.open(folder / "log.txt", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", 1, closefd=False), os.fdopen(2, "w", 1, closefd=False)
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.alarm(LIMIT)
        os.chdir(folder)
        torch.set_num_threads(1)
        if fault:
            fault()
        RUNS[which](world, rows, resume, changes)
        code = 0
    except SystemExit as end:
        code = end.code or 0
    except KeyboardInterrupt:
        traceback.print_exc()
        code = 130
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def end_of(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


# -- faults ------------------------------------------------------------------------------------------------------------


def signal_in_update(asked, number=10):
    """The signal reaches the run in its update `number`."""

    def fault():
        plain, calls = torch.optim.AdamW.step, []

        def step(*given, **named):
            calls.append(1)
            if len(calls) == number:
                os.kill(os.getpid(), asked)
            return plain(*given, **named)

        torch.optim.AdamW.step = step

    return fault


def at_weights(folder, act):
    """act() once the weights of a checkpoint are written, and before what else it holds."""

    def fault():
        plain = safetensors.torch.serialize_file

        def serialize_file(tensors, path, *given, **named):
            plain(tensors, path, *given, **named)
            if folder in str(path):
                act()

        safetensors.torch.serialize_file = serialize_file

    return fault


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def disk_full():
    raise OSError(errno.ENOSPC, "No space left on device")


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


WEIGHTS = {"ours": "training.safetensors", "TRL": "adapter_model.safetensors"}
STATE = {"ours": "training.safetensors", "TRL": "optimizer.pt"}
DAMAGE = {
    "a flipped bit in the weights of the newest checkpoint": lambda last, which: flip(last / WEIGHTS[which]),
    "the newest checkpoint's optimizer cut to half": lambda last, which: os.truncate(
        last / STATE[which], (last / STATE[which]).stat().st_size // 2
    ),
    "a flipped bit in its optimizer": lambda last, which: flip(last / STATE[which]),
}
BROKEN = {
    "killed (SIGKILL) in update 10": signal_in_update(signal.SIGKILL),
    "killed within the save of checkpoint-8": at_weights("checkpoint-8", kill),
    "killed within the save of checkpoint-4, the first": at_weights("checkpoint-4", kill),
    "SIGTERM in update 10": signal_in_update(signal.SIGTERM),
    "Ctrl-C in update 10": signal_in_update(signal.SIGINT),
    "SIGHUP (the terminal is closed) in update 10": signal_in_update(signal.SIGHUP),
    "disk full within the save of checkpoint-8": at_weights("checkpoint-8", disk_full),
}
OTHERWISE = {
    "going on with another learning rate": {"learning_rate": 5e-4},
    "going on with another beta": {"beta": 0.3},
    "going on with other rows": {},
}
MESSAGES = '{"prompt": [%s], "chosen": [{"role": "assistant", "content": "b"}], "rejected": [%s]}\n'
ASKED, ANSWER = '{"role": "user", "content": "a"}', '{"role": "assistant", "content": "c"}'
ROWS = {
    "a response whose content is null": MESSAGES % (ASKED, '{"role": "assistant", "content": null}'),
    "a role that is none (asshstant)": MESSAGES % (ASKED, '{"role": "asshstant", "content": "c"}'),
    "a key that stands twice": MESSAGES.replace('"chosen"', '"chosen": [], "chosen"') % (ASKED, ANSWER),
}


# -- what came of it ---------------------------------------------------------------------------------------------------


def weights(folder):
    path = folder / "out/adapter_model.safetensors"
    return path.read_bytes() if path.exists() else None


def last_line(folder):
    lines = [line for line in (folder / "log.txt").read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip().replace(f"{folder}/", "")[-160:] if lines else ""


def say(case, which, *parts):
    print(f"{case} | {which} | {' | '.join(map(str, parts))}", flush=True)


def went_on(which, folder, world, rows, whole, **changes):
    """In words: what a run that goes on in the folder ended with."""
    (folder / "log.txt").unlink(missing_ok=True)
    if code := end_of(start(which, folder, world, rows, resume=True, **changes)):
        return f"going on: exit code {code}, {last_line(folder)}"
    return f"going on: {'the same weights' if weights(folder) == whole else 'OTHER WEIGHTS'}"


def main(world, only, temporary):
    rows = temporary / "rows.jsonl"
    lines = (world / "train/helpful_pairs.jsonl").read_text().splitlines(keepends=True)[:64]
    rows.write_text("".join(lines))
    other_rows = temporary / "other.jsonl"
    other_rows.write_text("".join(reversed(lines)))
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, trl {trl.__version__}")
    for which in RUNS:
        base = temporary / which
        wanted = lambda case: only in case

        code = end_of(start(which, base / "whole", world, rows))
        whole = weights(base / "whole")
        say("nothing", which, f"exit code {code}", last_line(base / "whole"))
        again = end_of(start(which, base / "again", world, rows))
        say("nothing, again", which, f"exit code {again}", "same" if weights(base / "again") == whole else "OTHER")

        for n, (case, fault) in enumerate(BROKEN.items()):
            if wanted(case):
                folder = base / f"broken{n}"
                code = end_of(start(which, folder, world, rows, fault))
                said = last_line(folder)
                say(case, which, f"exit code {code}", said, went_on(which, folder, world, rows, whole))
        newest = base / "stopped"
        end_of(start(which, newest, world, rows, signal_in_update(signal.SIGKILL)))
        for n, (case, damage) in enumerate(DAMAGE.items()):
            if wanted(case):
                folder = shutil.copytree(newest, base / f"damaged{n}")
                damage(folder / "out/checkpoint-8", which)
                say(case, which, went_on(which, folder, world, rows, whole))
        for n, (case, changes) in enumerate(OTHERWISE.items()):
            if wanted(case):
                folder = shutil.copytree(newest, base / f"otherwise{n}")
                source = rows if changes else other_rows
                say(case, which, went_on(which, folder, world, source, whole, **changes))
        if wanted("two runs in one folder"):
            folder = base / "two"
            children = [start(which, folder, world, rows), start(which, folder, world, rows)]
            codes = sorted(end_of(child) for child in children)
            same = "the same weights" if weights(folder) == whole else "other weights"
            say("two runs in one folder", which, f"exit codes {codes}", same)
        for n, (case, row) in enumerate(ROWS.items()):
            if wanted(case):
                source = temporary / f"rows{n}.jsonl"
                source.write_text(7 * (MESSAGES % (ASKED, ANSWER)) + row)
                code = end_of(start(which, base / f"rows{n}", world, source))
                say(case, which, f"exit code {code}", last_line(base / f"rows{n}"))
        if wanted("a learning rate of 1e30"):
            code = end_of(start(which, base / "rate", world, rows, learning_rate=1e30))
            saved = weights(base / "rate") and safetensors.torch.load(weights(base / "rate"))
            finite = saved and all(tensor.isfinite().all() for tensor in saved.values())
            what = "no weights" if saved is None else "weights are finite" if finite else "WEIGHTS ARE NOT FINITE"
            say("a learning rate of 1e30", which, f"exit code {code}", last_line(base / "rate"), what)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("world", type=Path, help="a folder that toy_world.py has written")
    parser.add_argument("--only", default="", metavar="WORD", help="cases with this word in them")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        main(arguments.world.resolve(), arguments.only, Path(place))
