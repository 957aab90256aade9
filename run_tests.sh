#!/usr/bin/env bash
# Makes the environment and runs the tests, offline; arguments go to pytest: bash run_tests.sh -k losses -x
# bash run_tests.sh --faults [-k kills]: kills, signals, damage and odd input by the thousand, under 30 minutes.
set -euo pipefail
cd "$(dirname "$0")"
bash setup.sh dev
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TRANSFORMERS_OFFLINE=1 TOKENIZERS_PARALLELISM=false
if [ "${1:-}" = --faults ]; then
  shift
  set -- -n 2 --dist worksteal tests/faults "$@"
  export OMP_NUM_THREADS=1 FAULTS_SEED="${FAULTS_SEED:-$RANDOM}" # other points each time; a failure says the seed
elif [ $# = 0 ]; then # all of them, in two processes, on one thread each; by file xdist would wait for a dead one for ever
  set -- -n 2 --dist worksteal
  export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
fi
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}" # tiny models are slower on many threads
exec .venv/bin/python -m pytest -q "$@"
