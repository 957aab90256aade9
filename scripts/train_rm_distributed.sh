#!/usr/bin/env bash
# A reward model on N GPUs of this machine, or on those of GPU_NODES: train_rm.py with configs/rm_config.yaml.
#   bash scripts/train_rm_distributed.sh helpful 8
#   bash scripts/train_rm_distributed.sh harmless 8 --model Qwen/Qwen3-0.6B      further flags come last and win
#   bash scripts/train_rm_distributed.sh helpful 8 --dry-run                     prints the exact command, runs nothing
#   bash scripts/train_rm_distributed.sh --help                                  prints these lines
#   GPU_NODES=localhost:1,2 bash scripts/train_rm_distributed.sh helpful         gpu_nodes.sh has all forms
#   bash scripts/train_rm_distributed.sh helpful 2 --device cpu --model toy      no GPU: two processes, the toy world
# What it prints goes to logs/training/rm/TASK/train.log too.  More: docs/multi_gpu.md.  Flags: docs/train_rm.md
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/gpu_nodes.sh disable=SC1091
. scripts/gpu_nodes.sh

flags=()
read_flags "$@"
# Bash 3.2 (macOS) calls an empty array unset.
set -- ${flags[@]+"${flags[@]}"}
case ${1-} in
  helpful | harmless) task=$1 && shift ;;
  *) fail "the first word is the task, helpful or harmless, and not '${1-}'" ;;
esac
read_ranks "$@"

if starts_something; then
  bash setup.sh
  log_to "logs/training/rm/$task/train.log"
fi
on_nodes train_rm.py --task "$task" --config configs/rm_config.yaml ${flags[@]+"${flags[@]}"}
