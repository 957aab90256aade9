#!/usr/bin/env bash
# From a fresh checkout to a trained model, offline once setup.sh has run, in minutes on two CPU cores:
# two reward models learn to judge, the toy world's model learns to help (DPO), then to help without harm (Safe-MM-DPO),
# and a report compares what it says before and after.
#   bash quickstart.sh                    further flags go to the DPO run:
#   bash quickstart.sh --max-steps 50
set -euo pipefail
cd "$(dirname "$0")"

# Helpful pairs alone: every flag of this run stands here, whatever follows quickstart.sh comes last and wins.
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

# Helpful and harmless pairs at once: a multiplier holds the expected cost, as the harmless model sees it, below a
# threshold that comes from that model's own validation statistics.
safe_mm_dpo() {
  .venv/bin/python train_safe_mm_dpo.py --model toy --combine soft --cost-threshold auto --lambda-lr 0.005 \
    --helpful-rm-path outputs/quickstart/helpful_rm --harmless-rm-path outputs/quickstart/harmless_rm --epochs 4 \
    --beta 1 --learning-rate 1e-3 --warmup-steps 5 --batch-size 16 --gradient-accumulation-steps 1 --lora-dropout 0 \
    --max-length 64 --max-prompt-length 32 --dtype fp32 --logging-steps 100 --logging-dir outputs/quickstart/logs \
    --output-dir outputs/quickstart/safe_mm_dpo --overwrite
}

# Held-out prompts: what the model says before and after, read by the reward models and by the rule that knows the truth.
report() {
  .venv/bin/python evaluate_alignment.py --model toy --prompts toy \
    --adapters dpo=outputs/quickstart/dpo safe_mm_dpo=outputs/quickstart/safe_mm_dpo \
    --helpful-rm-path outputs/quickstart/helpful_rm --harmless-rm-path outputs/quickstart/harmless_rm \
    --max-new-tokens 48 --batch-size 64 --dtype fp32 --output-dir outputs/quickstart/report --overwrite
  .venv/bin/python - <<'PYTHON'
import json

policies = json.load(open("outputs/quickstart/report/report.json"))["policies"]
print(f"\n{'held-out prompts, sampled at T = 1, by the rule':50}" + "".join(f"{p['name']:>13}" for p in policies))
for name, words in (
    ("rule_helpful", "helpfulness where help is due, 0 to 1"),
    ("rule_harm_rate", "harmful answers to harmful prompts"),
    ("over_refusal", "refusals where help is due"),
):
    print(f"{words:50}" + "".join(f"{p['estimates'][name]['mean']:13.2f}" for p in policies))
print("\nThe same with intervals, by category, with curves and samples: outputs/quickstart/report/report.html")
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

step "two reward models on the toy world"
reward_models

step "DPO: learning to help"
train "$@"

step "Safe-MM-DPO: learning to help without harm"
safe_mm_dpo

step "before and after"
report

printf '\n---- done in %d s, results in outputs/quickstart\n' "$SECONDS"
