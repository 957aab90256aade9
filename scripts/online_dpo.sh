#!/usr/bin/env bash
# Online DPO: each round the model answers the prompts, a reward ranks its answers, and DPO trains on best against worst.
#
#   prompts --> the policy answers, several times each --> rewards --> pairs --> DPO --> the policy of the next round
#
#   bash scripts/online_dpo.sh                               offline: the toy world learns a rule, to be polite and brief
#   REWARD=outputs/quickstart/helpful_rm OUTPUT_DIR=outputs/online_helpful bash scripts/online_dpo.sh    a reward model
#   MODEL=Qwen/Qwen3-0.6B PROMPTS=p.jsonl EVAL_PROMPTS=q.jsonl MAX_NEW_TOKENS=256 LEARNING_RATE=1e-4 \
#     bash scripts/online_dpo.sh --gradient-accumulation-steps 8         further flags go to each training run
#   RESUME=1 bash scripts/online_dpo.sh                      goes on with rounds that were interrupted
set -euo pipefail
cd "$(dirname "$0")/.."

# Edit here, or set in the environment.
MODEL=${MODEL:-toy}                                                  # folder, hub id or toy
PROMPTS=${PROMPTS:-outputs/toy_world/train/helpful_pairs.jsonl}      # rows with `prompt`, asked in each round
EVAL_PROMPTS=${EVAL_PROMPTS:-toy}                                    # held-out prompts for before and after; or: none
REWARD=${REWARD:-scripts/reward_polite.py:polite}                    # FILE.py:FUNCTION, or a folder of train_rm.py
OUTPUT_DIR=${OUTPUT_DIR:-outputs/online_dpo}                         # round_1, round_2, ...: pairs and adapter of each
ROUNDS=${ROUNDS:-3}
NUM_SAMPLES=${NUM_SAMPLES:-600}                                      # prompts of a round; 0: all
NUM_RESPONSES=${NUM_RESPONSES:-4}                                    # to each prompt
MAX_NEW_TOKENS=${MAX_NEW_TOKENS:-48}
GENERATION_BATCH=${GENERATION_BATCH:-64}                             # responses sampled at once
BETA=${BETA:-0.3}
LEARNING_RATE=${LEARNING_RATE:-1e-3}
BATCH_SIZE=${BATCH_SIZE:-16}
LORA_R=${LORA_R:-16}                                                 # of the adapter that round 1 starts
DTYPE=${DTYPE:-auto}
RESUME=${RESUME:-}

py=${PYTHON:-.venv/bin/python}
if [ -z "${PYTHON:-}" ] && [ ! -x "$py" ]; then py=python3; fi
case $ROUNDS in # digits alone: what stands in (( )) below is evaluated, $(commands) in it too
  "" | *[!0-9]* | 0* | ?????*)
    echo "online_dpo.sh: ROUNDS is a number of rounds, 1 or more, and not '$ROUNDS'" >&2
    exit 2
    ;;
esac
if [ -z "$RESUME" ] && [ -e "$OUTPUT_DIR/round_1" ]; then
  echo "online_dpo.sh: $OUTPUT_DIR holds rounds: choose another OUTPUT_DIR, remove it, or set RESUME=1 to go on" >&2
  exit 2
fi
if [ "$MODEL" != toy ] && [ "$EVAL_PROMPTS" = toy ]; then EVAL_PROMPTS=none; fi
case $REWARD in
  *.py:*) reward=(--reward-fn "$REWARD") ;;
  *) reward=(--reward-model "$REWARD") ;;
esac
policy=(--model "$MODEL")                  # who answers: the base, then each round's adapter
start=(--lora-r "$LORA_R")                 # where training starts: a fresh adapter, then that of the round before
ask=(--max-new-tokens "$MAX_NEW_TOKENS" --batch-size "$GENERATION_BATCH" --dtype "$DTYPE" "${reward[@]}")
best_against_worst=(--pairs --num-responses "$NUM_RESPONSES" --num-samples "$NUM_SAMPLES")

evaluate() {
  if [ "$EVAL_PROMPTS" = none ]; then return; fi
  echo "---- the reward on $EVAL_PROMPTS, $1"
  "$py" generate.py "${policy[@]}" "${ask[@]}" --prompts "$EVAL_PROMPTS" --output "$OUTPUT_DIR/$1.jsonl" --overwrite
}

mkdir -p "$OUTPUT_DIR"
evaluate before
round=1
while ((round <= ROUNDS)); do
  folder=$OUTPUT_DIR/round_$round
  if ! grep -qs '"finished": true' "$folder/pairs.jsonl.args.json"; then
    echo "---- round $round of $ROUNDS: the policy answers"
    "$py" generate.py "${policy[@]}" "${ask[@]}" "${best_against_worst[@]}" --prompts "$PROMPTS" --seed "$round" \
      --output "$folder/pairs.jsonl"
  fi
  if [ ! -e "$folder/adapter_model.safetensors" ]; then
    echo "---- round $round of $ROUNDS: DPO"
    "$py" dpo_hf_run.py --model "$MODEL" --dataset "$folder/pairs.jsonl" --num-samples 0 --beta "$BETA" \
      --learning-rate "$LEARNING_RATE" --batch-size "$BATCH_SIZE" --gradient-accumulation-steps 1 --dtype "$DTYPE" \
      --seed "$round" --output-dir "$folder" --overwrite "${start[@]}" "$@"
  fi
  policy=(--model "$MODEL" --adapter "$folder")
  start=(--adapter "$folder")
  ((round += 1))
done
evaluate after
echo "saved to $OUTPUT_DIR/round_$ROUNDS"
