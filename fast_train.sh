#!/usr/bin/env bash
# Preference-guided DPO, edit and run: what a preference prompt does to a model goes into its weights.
#   bash fast_train.sh                    the run below; further flags go to the script, come last and win
#   bash fast_train.sh --dry-run          prints the exact command and runs nothing; --help prints these lines
#   BETA=0.1 GPU_NODES=localhost:1,2 bash fast_train.sh --max-steps 20
# On a machine without GPUs, with MODEL_PATH and GPU_NODES as they are, it trains the toy world: offline, in minutes.
# What each setting means: docs/preference_prompt.md.  Flags: .venv/bin/python train_with_preference_prompt.py --help
set -euo pipefail
cd "$(dirname "$0")"
# shellcheck source=scripts/gpu_nodes.sh disable=SC1091
. scripts/gpu_nodes.sh
flags=()
read_flags "$@" # they come last and win

settings="MODEL_PATH DATASET_PATH TEST_DATASET_PATH OUTPUT_DIR LOGGING_DIR PREFERENCE_TEXT LEARNING_RATE BATCH_SIZE
  GRADIENT_ACCUM_STEPS LORA_DROPOUT DTYPE"
given=" " # those of them that come from the environment
for name in $settings; do
  if [ -n "${!name:-}" ]; then given="$given$name "; fi
done

# -- edit here, or set in the environment ------------------------------------------------------------------------------

GPU_NODES="${GPU_NODES:-localhost}"   # localhost        all GPUs of this machine
                                      # localhost:1,2    two of them
                                      # node1:0,1@node2:0,1 (or node1:0,1,node2:0,1)   two machines

TRAINING_MODE="${TRAINING_MODE:-text}" # text or embedding
PREFERENCE_TEXT="${PREFERENCE_TEXT:-请提供一个有用、诚实、无害且简洁的回答。}"
PROMPT_EMBEDDING_PATH="${PROMPT_EMBEDDING_PATH:-}" # for embedding: what learn_prompt.py wrote, or a .pt file

MODEL_PATH="${MODEL_PATH:-Qwen/Qwen2.5-1.5B-Instruct}"            # folder, hub id or toy
DATASET_PATH="${DATASET_PATH:-data/train/helpful_pairs.jsonl}"    # your pairs: docs/data.md has the shapes
TEST_DATASET_PATH="${TEST_DATASET_PATH:-}"                        # empty: some of the pairs are held out
OUTPUT_DIR="${OUTPUT_DIR:-model_output/Preference_Guided_DPO}"
LOGGING_DIR="${LOGGING_DIR:-logs/Preference_Guided_DPO}"

BETA="${BETA:-0.05}"                   # DPO: smaller lets the policy go further from the reference
ALPHA="${ALPHA:-0.1}"                  # pull to the margin that the preference brings about
LEARNING_RATE="${LEARNING_RATE:-5e-4}"
NUM_EPOCHS="${NUM_EPOCHS:-1}"
BATCH_SIZE="${BATCH_SIZE:-1}"          # pairs per GPU and pass: this takes memory
GRADIENT_ACCUM_STEPS="${GRADIENT_ACCUM_STEPS:-512}" # passes per update: this does not
DTYPE="${DTYPE:-auto}"

LORA_R="${LORA_R:-16}"                 # 0: train all weights
LORA_ALPHA="${LORA_ALPHA:-32}"
LORA_DROPOUT="${LORA_DROPOUT:-0.1}"

MAX_LENGTH="${MAX_LENGTH:-300}"
MAX_PROMPT_LENGTH="${MAX_PROMPT_LENGTH:-128}"

# ----------------------------------------------------------------------------------------------------------------------

# toy NAME DOCUMENTED VALUE: for the toy world a setting has VALUE, unless it was edited above or set from outside.
toy() {
  case $given in *" $1 "*) return ;; esac
  if [ "${!1}" = "$2" ]; then printf -v "$1" '%s' "$3"; fi
}

case $TRAINING_MODE in
  text) [ -n "$PREFERENCE_TEXT" ] || fail "TRAINING_MODE=text needs a PREFERENCE_TEXT" ;;
  embedding)
    [ -n "$PROMPT_EMBEDDING_PATH" ] ||
      fail "TRAINING_MODE=embedding needs PROMPT_EMBEDDING_PATH, a soft prompt: learn_prompt.py makes one"
    ;;
  *) fail "TRAINING_MODE is text or embedding, not $TRAINING_MODE" ;;
esac
read_gpu_nodes "$GPU_NODES"

if [ "$GPU_NODES" = localhost ] && [ "${gpus:-0}" = 0 ]; then toy MODEL_PATH Qwen/Qwen2.5-1.5B-Instruct toy; fi
overwrite=()
if [ "$MODEL_PATH" = toy ]; then
  toy DATASET_PATH data/train/helpful_pairs.jsonl toy
  toy TEST_DATASET_PATH "" toy
  toy PREFERENCE_TEXT "请提供一个有用、诚实、无害且简洁的回答。" "Please answer politely and briefly."
  toy BATCH_SIZE 1 16
  toy GRADIENT_ACCUM_STEPS 512 1
  toy LEARNING_RATE 5e-4 1e-3
  toy LORA_DROPOUT 0.1 0
  toy DTYPE auto fp32
  toy OUTPUT_DIR model_output/Preference_Guided_DPO outputs/fast_train_toy
  toy LOGGING_DIR logs/Preference_Guided_DPO outputs/fast_train_toy/logs
  if [ "$OUTPUT_DIR" = outputs/fast_train_toy ]; then overwrite=(--overwrite); fi
  case $given in
    *" MODEL_PATH "*) ;;
    *) echo "${0##*/}: no GPU here, MODEL_PATH is as it was: the toy world, with settings that it learns from" >&2 ;;
  esac
fi

command=(train_with_preference_prompt.py --model "$MODEL_PATH" --dataset-path "$DATASET_PATH")
if [ -n "$TEST_DATASET_PATH" ]; then command+=(--test-dataset-path "$TEST_DATASET_PATH"); fi
case $TRAINING_MODE in
  text) command+=(--preference-text "$PREFERENCE_TEXT") ;;
  embedding) command+=(--use-prompt-embedding --prompt-embedding-path "$PROMPT_EMBEDDING_PATH") ;;
esac
command+=(--beta "$BETA" --alpha "$ALPHA" --learning-rate "$LEARNING_RATE" --num-epochs "$NUM_EPOCHS"
  --batch-size "$BATCH_SIZE" --gradient-accumulation-steps "$GRADIENT_ACCUM_STEPS" --dtype "$DTYPE" --lora-r "$LORA_R")
if [ "$LORA_R" != 0 ]; then command+=(--lora-alpha "$LORA_ALPHA" --lora-dropout "$LORA_DROPOUT"); fi
command+=(--max-length "$MAX_LENGTH" --max-prompt-length "$MAX_PROMPT_LENGTH"
  --output-dir "$OUTPUT_DIR" --logging-dir "$LOGGING_DIR")
# Bash 3.2 (macOS) calls an empty array unset.
command+=(${overwrite[@]+"${overwrite[@]}"} ${flags[@]+"${flags[@]}"})

if starts_something; then bash setup.sh; fi
on_nodes "${command[@]}"
