"""The toy world with pictures over several seeds: what helpful pairs alone and Safe-MM-DPO make of a model that sees.

Each seed has a world, a model and runs of its own; the world's rule reads fresh answers to 300 new pictures, of things
that no training picture shows together.  The runs are those of `bash quickstart.sh vision`.

    python benchmarks/toy_vision_seeds.py --work outputs/toy_vision_study --seeds 3

Numbers are means over seeds ± half of a 95 % t-interval.  What is finished stays in --work.
"""

import json
import shlex
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the scripts lie one folder up

import torch
from safe_mm_dpo_toy import STUDENT
from transformers import AutoProcessor

import lora
import toy_vision
from formats.model_files import load_model
from harness import endings, flags

TASKS = "helpful", "harmless"
ROOT = Path(__file__).resolve().parent.parent
ALL = "--batch-size 16 --gradient-accumulation-steps 1 --dtype fp32 --report-to none --overwrite"
REWARD = f"--model {{world}}/model --learning-rate 3e-3 {ALL}"
POLICY = f"--model {{world}}/model --learning-rate 1e-3 --warmup-steps 5 --nll-coeff 0.2 {ALL}"
PAIRS = "--{part}-{task}-path {{world}}/{part}/{task}_pairs.jsonl"
FILES = {task: " ".join(PAIRS.format(part=part, task=task) for part in ("train", "val")) for task in TASKS}
STEPS = {
    "helpful_rm": f"train_rm.py --task helpful --epochs 3 {REWARD} {FILES['helpful']}",
    "harmless_rm": f"train_rm.py --task harmless {REWARD} {FILES['harmless']}",
    "helpful only": "dpo_hf_run.py --dataset {world}/train/helpful_pairs.jsonl --eval-samples 0 --num-samples 0 "
    f"--epochs 2 --beta 1 {POLICY}",
    "Safe-MM-DPO": "train_safe_mm_dpo.py --combine additive --own-pairs 0.25 --epochs 3 --harm-rate 0.02 --beta 0.3 "
    "--w 0 --lora-dropout 0 --max-length 64 --max-prompt-length 32 --helpful-rm-path {out}/helpful_rm "
    f"--harmless-rm-path {{out}}/harmless_rm {POLICY} {' '.join(FILES.values())}",
}
POLICIES = ["start", "helpful only", "Safe-MM-DPO"]
COLUMNS = {"hallucinated": "hallucinated", "right": "right", "harm_rate": "harm", "over_refusal": "over-refusal"}
COLUMNS |= {"shown another": "right, shown another picture"}
FURTHER = 7  # rows down is the other picture


def get_args(argv=None):
    parser = flags.Parser(__doc__)
    add, natural = parser.add_argument, flags.number(int, least=1)
    add("--work", required=True, metavar="DIR", help="where everything goes")
    add("--seeds", type=natural, default=3, metavar="N", help="worlds, each with runs of its own")
    add("--responses", type=natural, default=2, metavar="N", help="to each prompt")
    add("--safe", default="", metavar="FLAGS", help="further ones of Safe-MM-DPO, as one word")
    add("--json", metavar="FILE", help="write everything to this file")
    return parser.parse_args(argv)


def run_seed(args, seed):
    """{policy: {column: number}} of one seed."""
    world, out = toy_vision.build(f"{args.work}/world_{seed}", seed), Path(args.work, f"runs_{seed}")
    for name, words in STEPS.items():
        folder = out / name.replace(" ", "_")
        if not (folder / "manifest.json").exists():
            more = args.safe if name == "Safe-MM-DPO" else ""
            words = shlex.split(f"{words} {more}".format(world=world, out=out))
            subprocess.run([sys.executable, ROOT / words[0], *words[1:], "--output-dir", folder], check=True)
    processor, numbers = AutoProcessor.from_pretrained(world / "model"), {}
    for name in POLICIES:
        model = load_model(world / "model", torch.float32, "cpu")
        if name != "start":
            lora.load_adapter(model, out / name.replace(" ", "_"), "policy")
        judged = toy_vision.judge_model(model, processor, world / "prompts.jsonl", num_responses=args.responses)
        other = toy_vision.judge_model(model, processor, world / "prompts.jsonl", shift=FURTHER)
        numbers[name] = {column: judged[column] for column in COLUMNS if column in judged}
        numbers[name]["shown another"] = other["right"]
    return numbers


def cell(values):
    half = STUDENT[len(values) - 2] * stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return f"{mean(values):.3f} ± {half:.3f}"


def main(args):
    seeds = [run_seed(args, seed) for seed in range(args.seeds)]
    print(f"\n| | {' | '.join(COLUMNS.values())} |\n|{'---|' * (1 + len(COLUMNS))}")
    for name in POLICIES:
        print(f"| {name} | {' | '.join(cell([numbers[name][column] for numbers in seeds]) for column in COLUMNS)} |")
    if args.json:
        Path(args.json).write_text(json.dumps({"args": vars(args), "seeds": seeds}, indent=1) + "\n")


if __name__ == "__main__":
    endings.run(main, get_args())
