#!/usr/bin/env bash
# Safe-MM-DPO on N GPUs of this machine, or on those of GPU_NODES: train_safe_mm_dpo.py with configs/dpo_config.yaml.
#   bash scripts/train_dpo_distributed.sh 8
#   bash scripts/train_dpo_distributed.sh 8 --max-steps 100                 further flags come last and win
#   bash scripts/train_dpo_distributed.sh 8 --dry-run                       prints the exact command, runs nothing
#   bash scripts/train_dpo_distributed.sh --help                            prints these lines
#   GPU_NODES=localhost:1,2 bash scripts/train_dpo_distributed.sh           gpu_nodes.sh has all forms
# What it prints goes to logs/training/safe_mm_dpo/train.log too.  More: docs/multi_gpu.md.  Flags: docs/safe_mm_dpo.md
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/gpu_nodes.sh disable=SC1091
. scripts/gpu_nodes.sh

flags=()
read_flags "$@"
# Bash 3.2 (macOS) calls an empty array unset.
read_ranks ${flags[@]+"${flags[@]}"}

if starts_something; then
  bash setup.sh
  log_to logs/training/safe_mm_dpo/train.log
fi
on_nodes train_safe_mm_dpo.py --config configs/dpo_config.yaml ${flags[@]+"${flags[@]}"}
