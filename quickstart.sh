#!/usr/bin/env bash
# From a fresh checkout to a trained model, offline once setup.sh has run, in minutes on two CPU cores:
# the toy world's model learns from preference pairs, and a table shows it before and after.
#   bash quickstart.sh                    further flags go to the training run:
#   bash quickstart.sh --max-steps 50
set -euo pipefail
cd "$(dirname "$0")"

# The training run: every flag of it stands here, whatever follows quickstart.sh comes last and wins.
train() {
  .venv/bin/python dpo_hf_run.py --model toy --dataset toy \
    --learning-rate 1e-3 --batch-size 8 --gradient-accumulation-steps 1 \
    --output-dir outputs/quickstart/dpo --overwrite "$@"
}

# The table: what the model did before training and what it does after.
before_after() {
  :
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

step "before and after"
before_after "$@"

printf '\n---- done in %d s, results in outputs/quickstart\n' "$SECONDS"
