#!/bin/sh
# Fit and apply every method and form on one dataset, then look at the texts. As it is: the demo, on the CPU.
#   DEVICE=cuda:0 BASE_DIR=. MODEL=gemma-2-9b-it DATASET=psychopathy MULTIPLIERS="-1 0 1" sh examples/run_spilt.sh
#   MODE=loss MULTIPLIERS=sweep sh examples/run_spilt.sh        measures instead: curves and a report
set -eu
cd "$(dirname "$0")/.."
DEVICE=${DEVICE:-cpu}
BASE_DIR=${BASE_DIR:-demo-run-small}
MODEL=${MODEL:-demo-qwen2}
DATASETS=${DATASET:-psychopathy powerseeking}
METHOD=${METHOD:-all}
FORM=${FORM:-all}
MODE=${MODE:-both}
if [ -n "${VENV:-}" ]; then PATH="$PWD/$VENV/bin:$PATH"; fi
PYTHON=${PYTHON:-python}

# the demo keeps its results out of the checkout's own files
if [ "$MODEL" = demo-qwen2 ] && [ ! -d "$BASE_DIR/models/demo-qwen2" ]; then
    mkdir -p "$BASE_DIR"
    cp -R examples/demo/. "$BASE_DIR/"
fi

for dataset in $DATASETS; do
    "$PYTHON" run_spilt.py --dataset "$dataset" --method "$METHOD" --model_name "$MODEL" --intervention_method "$FORM" \
        --mode "$MODE" --device "$DEVICE" --base_dir "$BASE_DIR" ${MULTIPLIERS:+--multipliers $MULTIPLIERS}
    [ "$MODE" = loss ] || "$PYTHON" -m spilt.look --base_dir "$BASE_DIR" --model_name "$MODEL" --dataset "$dataset"
done
