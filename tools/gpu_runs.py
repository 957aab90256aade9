"""Do the scripts run: whole runs on the toy world, this device beside a CPU; resume; two ranks beside one."""

import json
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file

HERE = Path(__file__).resolve().parents[1]
QUIET = "--model toy --report-to none --eval-samples 20".split()
DPO = "dpo_hf_run.py --dataset toy --beta 1 --learning-rate 1e-3 --num-samples 116 --logging-steps 1".split()
SHORT = "--max-steps 3 --num-samples 100 --report-to none".split()
FP32 = "--dtype", "fp32"
LONGEST = 280  # seconds of a run


def run(words, ranks=1):
    """A script in a process of its own.  Raises RuntimeError with the end of what it said."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    words = [sys.executable, *launch, *map(str, words)]
    try:
        done = subprocess.run(words, cwd=HERE, capture_output=True, text=True, timeout=LONGEST)
    except subprocess.TimeoutExpired:  # ranks that wait for each other would wait for ever
        raise RuntimeError(f"no end after {LONGEST} s: {' '.join(words[1:])[:200]}") from None
    if done.returncode:
        raise RuntimeError(" | ".join((done.stdout + done.stderr).splitlines()[-8:])[-800:])


@contextmanager
def tried(report, what):
    """A block of runs, which is a FAIL where one of them fails."""
    try:
        yield
    except RuntimeError as error:
        report.line("FAIL", what, str(error))


def losses_of(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def furthest(one, other):
    """The largest difference of two runs' weights."""
    one, other = (load_file(next(folder.glob("*model.safetensors"))) for folder in (one, other))
    return max((one[name].double() - other[name].double()).abs().max().item() for name in one)


def scripts(report, device):
    """Trainers and generate.py once; DPO on this device and on the CPU; a run that goes on from a checkpoint."""
    here = ["--device", device.type]
    with tempfile.TemporaryDirectory() as folder:
        out = {name: Path(folder) / name for name in "cpu here whole again helpful harmless safe snis".split()}
        to = lambda name: ["--output-dir", out.setdefault(name, Path(folder) / name)]
        with tried(report, "dpo_hf_run.py"):
            run([*DPO, *QUIET, *FP32, "--device", "cpu", *to("cpu")])
            run([*DPO, *QUIET, *FP32, *here, *to("here")])
            apart = max(abs(x - y) for x, y in zip(losses_of(out["cpu"]), losses_of(out["here"]), strict=True))
            report.judge("dpo_hf_run.py fp32, losses from a CPU's", apart, 1e-4)
            # AdamW's first steps are as large as the rate whatever the gradient: of one near 0, the sign is chance.
            report.judge("dpo_hf_run.py fp32, adapter from a CPU's", furthest(out["cpu"], out["here"]), 2e-3)
        with tried(report, "resume"):
            run([*DPO, *QUIET, *FP32, *here, *to("whole"), "--save-steps", 6])
            run([*DPO, *QUIET, *FP32, *here, *to("again"), "--resume", out["whole"] / "checkpoint-6"])
            report.judge("resume", furthest(out["whole"], out["again"]), 1e-4 if device.type == "cuda" else 0)
        judges = ["--helpful-rm-path", out["helpful"], "--harmless-rm-path", out["harmless"]]
        polite = ["--preference-text", "Please answer politely."]
        said = ["--prompts", "toy", "--max-new-tokens", 32, "--reward-model", out["helpful"]]
        others = {
            "train_rm.py helpful": ["train_rm.py", "--task", "helpful", *QUIET, *SHORT, *to("helpful")],
            "train_rm.py harmless": ["train_rm.py", "--task", "harmless", *QUIET, *SHORT, *to("harmless")],
            "train_safe_mm_dpo.py": ["train_safe_mm_dpo.py", *QUIET, *SHORT, *judges, *to("safe")],
            "train_safe_mm_dpo.py snis": [
                "train_safe_mm_dpo.py",
                *QUIET,
                *SHORT,
                *judges,
                "--cost-estimate",
                "snis",
                *to("snis"),
            ],
            "train_with_preference_prompt.py": [
                "train_with_preference_prompt.py",
                *QUIET,
                *SHORT,
                *polite,
                *to("text"),
            ],
            "learn_prompt.py": ["learn_prompt.py", *QUIET, *SHORT, *polite, *to("soft")],
            "all weights, offloaded": [*DPO, *QUIET, *SHORT, "--lora-r", 0, "--optimizer-offload", *to("full")],
            "generate.py": [
                "generate.py",
                "--model",
                "toy",
                "--num-samples",
                32,
                *said,
                "--output",
                Path(folder) / "said.jsonl",
            ],
        }
        for what, words in others.items():
            began = time.time()
            with tried(report, what):
                run([*words, *here])
                report.line("ok", what, f"{time.time() - began:.0f} s")


def ranks(report, device):
    """Two ranks against one, in fp32: LoRA (one all-reduce an update), all weights (FSDP2), and with offload."""
    if device.type == "cuda" and torch.cuda.device_count() < 2:
        report.line("note", "two ranks", "not tried: one GPU here")
        return
    whole = ["--lora-r", 0]
    with tempfile.TemporaryDirectory() as folder:
        kinds = {"LoRA": [], "all weights": whole, "all weights, offloaded": [*whole, "--optimizer-offload"]}
        for number, (what, flags) in enumerate(kinds.items()):
            one, two = (Path(folder) / f"{number}_{ranks}" for ranks in (1, 2))
            words = [*DPO, *QUIET, *FP32, "--device", device.type, "--learning-rate", "1e-4", *flags]
            with tried(report, f"two ranks, {what}"):
                run([*words, "--batch-size", 4, "--gradient-accumulation-steps", 2, "--output-dir", one])
                run([*words, "--batch-size", 2, "--gradient-accumulation-steps", 2, "--output-dir", two], ranks=2)
                report.judge(f"two ranks, {what}", furthest(one, two), 2e-4)
