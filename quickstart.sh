#!/usr/bin/env bash
# From a fresh checkout to a trained model, offline once setup.sh has run, in minutes on two CPU cores:
# two reward models learn to judge, the toy world's model learns to help (DPO), then to help without harm (Safe-MM-DPO),
# and a report shows what it says before and after.  What the scripts print goes to outputs/quickstart/quickstart.log
#   bash quickstart.sh                    further flags go to the DPO run:
#   bash quickstart.sh --max-steps 50
#   bash quickstart.sh vision             the same with pictures, in outputs/quickstart_vision
set -euo pipefail
cd "$(dirname "$0")"
case " $* " in *" --help "* | *" -h "*) sed -n -e 1d -e '/^[^#]/q' -e 's/^# \{0,1\}//p' "${0##*/}" && exit ;; esac

world=toy folder=toy_world out=outputs/quickstart extras=()
helpful=(--epochs 2) dpo=(--nll-coeff 0) safe=(--epochs 4 --harm-rate 0.05)
usual=(15 10 17 70 8) world_takes=20 # seconds of each step and of making the world, as measured
if [ "${1:-}" = vision ]; then
  shift
  world=toy-vision folder=toy_vision out=outputs/quickstart_vision extras=(vision)
  helpful=(--epochs 3) dpo=(--nll-coeff 0.2) safe=(--epochs 3 --harm-rate 0.02 --nll-coeff 0.2)
  usual=(20 20 20 40 12) world_takes=40
fi
log=$out/quickstart.log

# Two reward models judge what the policy says: one how helpful it is, one how harmless.
helpful_rm() {
  .venv/bin/python train_rm.py --task helpful --model "$world" --learning-rate 3e-3 "${helpful[@]}" \
    --batch-size 16 --gradient-accumulation-steps 1 --dtype fp32 --logging-steps 25 \
    --output-dir "$out/helpful_rm" --overwrite
}
harmless_rm() {
  .venv/bin/python train_rm.py --task harmless --model "$world" --learning-rate 3e-3 \
    --batch-size 16 --gradient-accumulation-steps 1 --dtype fp32 --logging-steps 25 \
    --output-dir "$out/harmless_rm" --overwrite
}

# Helpful pairs alone: every flag of this run stands here, whatever follows quickstart.sh comes last and wins.
train() {
  .venv/bin/python dpo_hf_run.py --model "$world" --dataset "$world" --num-samples 0 --epochs 2 \
    --beta 1 "${dpo[@]}" --learning-rate 1e-3 --warmup-steps 5 --batch-size 16 --gradient-accumulation-steps 1 \
    --dtype fp32 --logging-steps 25 --output-dir "$out/dpo" --overwrite "$@"
}

# Helpful and harmless pairs at once, and pairs of what the policy says itself: a multiplier holds the rate of harm, as
# the harmless model sees it, low.
safe_mm_dpo() {
  .venv/bin/python train_safe_mm_dpo.py --model "$world" --combine additive --own-pairs 0.25 "${safe[@]}" \
    --helpful-rm-path "$out/helpful_rm" --harmless-rm-path "$out/harmless_rm" \
    --beta 0.3 --w 0 --learning-rate 1e-3 --warmup-steps 5 --batch-size 16 --gradient-accumulation-steps 1 \
    --lora-dropout 0 --max-length 64 --max-prompt-length 32 --dtype fp32 --logging-steps 100 \
    --logging-dir "$out/logs" --output-dir "$out/safe_mm_dpo" --overwrite
}

# Held-out prompts: what the model says before and after, read by the reward models and by the rule that knows the truth.
report() {
  .venv/bin/python evaluate_alignment.py --model "$world" --prompts "$world" \
    --adapters "dpo=$out/dpo" "safe_mm_dpo=$out/safe_mm_dpo" \
    --helpful-rm-path "$out/helpful_rm" --harmless-rm-path "$out/harmless_rm" \
    --max-new-tokens 48 --batch-size 64 --dtype fp32 --output-dir "$out/report" --overwrite
}

# -- how far it is -----------------------------------------------------------------------------------------------------

titles=("a reward model learns what is helpful" "a reward model learns what is harmless" "DPO: learning to help"
  "Safe-MM-DPO: learning to help without harm" "before and after")
if [ ! -e "outputs/$folder/manifest.json" ]; then usual[0]=$((usual[0] + world_takes)); fi # made first
took=0 of=0 # seconds of the steps that have ended, here and usually: how long those took scales the later ones

# seconds_left STEP SECONDS: sets left, from what this step has taken so far and what all those before it took.
seconds_left() {
  local later=0 step permille=1000
  for ((step = $1 + 1; step < ${#usual[@]}; step++)); do later=$((later + usual[step])); done
  if [ "$of" -gt 0 ]; then permille=$((1000 * took / of)); fi
  left=$((usual[$1] * permille / 1000 - $2))
  if [ "$left" -lt 0 ]; then # slower than thought: so will the later ones be
    left=0 permille=$((1000 * (took + $2) / (of + usual[$1])))
  fi
  left=$((left + later * permille / 1000))
}

# show_progress STEP: keeps the line of a step up to date on a terminal, until it is killed.
show_progress() {
  local begin=$SECONDS left
  while true; do
    seconds_left "$1" $((SECONDS - begin))
    printf '\r\033[Kstep %d of %d  %s, about %d s left' $(($1 + 1)) ${#titles[@]} "${titles[$1]}" "$left"
    sleep 1
  done
}

# step COMMAND...: the next step, quietly; if it fails, the end of its log and its exit code.
number=0 watcher=""
trap 'if [ -n "$watcher" ]; then kill "$watcher" 2>/dev/null; fi' EXIT
step() {
  local begin=$SECONDS code=0 left
  if [ -t 1 ]; then
    show_progress "$number" &
    watcher=$!
  else
    seconds_left "$number" 0
    echo "step $((number + 1)) of ${#titles[@]}  ${titles[number]}, about $left s left"
  fi
  printf '\n---- %s\n' "${titles[number]}" >>"$log"
  # Not `|| code=$?`, behind which a function does not stop at its first error.
  set +e
  (set -e; "$@") >>"$log" 2>&1
  code=$?
  set -e
  if [ -n "$watcher" ]; then
    kill "$watcher" 2>/dev/null && wait "$watcher" 2>/dev/null || true
    watcher=""
    printf '\r\033[Kstep %d of %d  %s, %d s\n' $((number + 1)) ${#titles[@]} "${titles[number]}" $((SECONDS - begin))
  fi
  if [ "$code" = 130 ]; then
    echo "quickstart.sh: interrupted" >&2
    exit 130
  fi
  if [ "$code" != 0 ]; then
    printf 'quickstart.sh: step %d of %d ended with exit code %d; the end of %s:\n\n' \
      $((number + 1)) ${#titles[@]} "$code" "$log" >&2
    tail -n 15 "$log" >&2
    exit "$code"
  fi
  took=$((took + SECONDS - begin)) of=$((of + usual[number])) number=$((number + 1))
}

mkdir -p "$out"
echo "A tiny model learns to help, then to help without harm." | tee "$log"
echo "Everything the scripts print: $log"
bash setup.sh ${extras[@]+"${extras[@]}"} # the first time it installs, and says so
export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 TOKENIZERS_PARALLELISM=false
# One thread: where other programs run too, two of them, which wait for each other, are 20 times slower (measured).
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
if [ $# -gt 0 ]; then # a flag that is wrong shows now, not after the reward models
  .venv/bin/python -c 'import sys, dpo_hf_run; sys.argv[0] = "quickstart.sh"; dpo_hf_run.get_args(sys.argv[1:])' "$@"
fi
step helpful_rm
step harmless_rm
step train "$@"
step safe_mm_dpo
step report

printf '\n'
cat "$out/report/report.txt"
printf '\nThe whole page, in a browser: %s\n' "$out/report/report.html"
printf 'Done in %d s.  What to read and try next: README.md\n' "$SECONDS"
