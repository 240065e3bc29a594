#!/bin/bash
#SBATCH --job-name=spilt
#SBATCH --gres=gpu:1
#SBATCH --time=04:00:00
#SBATCH --requeue
# The cells of one request, dealt out to the tasks of a SLURM array; safe on a shared file system, and to requeue: what is done is found done.
#   sbatch --array=0-3 examples/slurm_array.sh --dataset psychopathy --model_name gemma-2-9b-it --method all --intervention_method all \
#       --mode generate --base_dir /shared/steering
#   sbatch --array=0-3 --dependency=afterok:JOB examples/slurm_array.sh ... --mode loss --multipliers sweep ...
#   and when all are done, once:  python -m spilt report --base_dir /shared/steering
# Fits first, then losses: how far a sweep of caa goes is taken from the trained vectors that are stored.
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"
PYTHON=${PYTHON:-python}
export TASK=${SLURM_ARRAY_TASK_ID:-0} TASKS=${SLURM_ARRAY_TASK_COUNT:-1}

# the plan says which cells there are; each task takes every TASKS-th of them
"$PYTHON" run_spilt.py "$@" --dry_run --json | "$PYTHON" -c '
import json, os, sys
cells = dict.fromkeys((s["method"], s["intervention"]) for s in json.load(sys.stdin)["steps"])
for cell in list(cells)[int(os.environ["TASK"])::int(os.environ["TASKS"])]: print(*cell)
' | while read -r method form; do
    "$PYTHON" run_spilt.py "$@" --method "$method" --intervention_method "$form" --no_report < /dev/null
done
