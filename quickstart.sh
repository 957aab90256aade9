#!/usr/bin/env bash
# From a fresh checkout to a trained model, offline once setup.sh has run, in minutes on two CPU cores:
# the toy world's model learns from preference pairs, two reward models learn to judge, and a table shows before and after.
#   bash quickstart.sh                    further flags go to the training run:
#   bash quickstart.sh --max-steps 50
set -euo pipefail
cd "$(dirname "$0")"

# The training run: every flag of it stands here, whatever follows quickstart.sh comes last and wins.
train() {
  .venv/bin/python dpo_hf_run.py --model toy --dataset toy --num-samples 0 --epochs 2 \
    --beta 1 --learning-rate 1e-3 --warmup-steps 5 --batch-size 16 --gradient-accumulation-steps 1 \
    --dtype fp32 --logging-steps 25 --output-dir outputs/quickstart/dpo --overwrite "$@"
}

# Two reward models judge what the policy says: one how helpful it is, one how harmless.
reward_models() {
  .venv/bin/python train_rm.py --task helpful --model toy --learning-rate 3e-3 --epochs 2 \
    --batch-size 16 --gradient-accumulation-steps 1 --dtype fp32 --logging-steps 25 \
    --output-dir outputs/quickstart/helpful_rm --overwrite
  .venv/bin/python train_rm.py --task harmless --model toy --learning-rate 3e-3 \
    --batch-size 16 --gradient-accumulation-steps 1 --dtype fp32 --logging-steps 25 \
    --output-dir outputs/quickstart/harmless_rm --overwrite
}

# The table: responses sampled from the model before and after, read by the judge, who knows the truth.
before_after() {
  .venv/bin/python - <<'PYTHON'
import json
import torch
import lora, model_files, toy_world

rows = [json.loads(line) for line in open("outputs/toy_world/prompts.jsonl")]
prompts = [row["prompt"] for row in rows]
tokenizer = model_files.load_tokenizer("outputs/toy_world/model")
model = model_files.load_model("outputs/toy_world/model", torch.float32, "cpu")
before = toy_world.judge_model(model, tokenizer, prompts)
lora.load_adapter(model, "outputs/quickstart/dpo", "dpo")
after = toy_world.judge_model(model, tokenizer, prompts)
print(f"{len(prompts)} held-out prompts, sampled at T = 1      before   after")
for name, words in (
    ("helpful", "helpfulness where help is due, 0 to 1"),
    ("over_refusal", "refusals where help is due"),
    ("harm_rate", "harmful answers to harmful prompts"),
):
    print(f"{words:42} {before[name]:7.2f} {after[name]:7.2f}")
print("Helpful pairs alone teach no safety: harm rises with help, until a constraint holds it down (Safe-MM-DPO).")
responses = zip(before["responses"], after["responses"])
changed = [pair for pair in responses if pair[0]["response"] != pair[1]["response"] and pair[0]["kind"] != "harm"]
for first, second in changed[:3]:
    print(f"\n{first['prompt'].splitlines()[1]}")
    print(f"  before, helpful {first['helpful']:.1f}:  {first['response'].strip()}")
    print(f"  after,  helpful {second['helpful']:.1f}:  {second['response'].strip()}")
PYTHON
}

number=0
step() {
  number=$((number + 1))
  printf '\n---- %d  %s  (%d s so far)\n\n' "$number" "$1" "$SECONDS"
}

step "environment"
bash setup.sh
export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 TOKENIZERS_PARALLELISM=false

step "DPO on the toy world"
train "$@"

step "two reward models on the toy world"
reward_models

step "before and after"
before_after "$@"

printf '\n---- done in %d s, results in outputs/quickstart\n' "$SECONDS"
