#!/bin/sh
# Text with vectors that are already there: fitted before, or taken from the released code. As it is: fits one on the demo first.
#   DEVICE=cuda:0 BASE_DIR=. MODEL=gemma-2-9b-it METHOD=spilt FORM=vector MULTIPLIERS="4 8" sh examples/apply_pretrained.sh
# Put layer_20.pt into  BASE_DIR/vectors/MODEL/METHOD/DATASET/METHOD_FORM/  (caa: .../caa_vector/).
set -eu
cd "$(dirname "$0")/.."
DEVICE=${DEVICE:-cpu}
BASE_DIR=${BASE_DIR:-demo-run-small}
MODEL=${MODEL:-demo-qwen2}
DATASET=${DATASET:-psychopathy}
METHOD=${METHOD:-spilt}
FORM=${FORM:-vector}
MULTIPLIERS=${MULTIPLIERS:--10 0 10}
if [ -n "${VENV:-}" ]; then PATH="$PWD/$VENV/bin:$PATH"; fi
PYTHON=${PYTHON:-python}

run() {
    "$PYTHON" run_spilt.py --dataset "$DATASET" --method "$METHOD" --model_name "$MODEL" --intervention_method "$FORM" \
        --device "$DEVICE" --base_dir "$BASE_DIR" "$@"
}

if [ "$MODEL" = demo-qwen2 ]; then
    if [ ! -d "$BASE_DIR/models/demo-qwen2" ]; then
        mkdir -p "$BASE_DIR"
        cp -R examples/demo/. "$BASE_DIR/"
    fi
    run --mode generate
fi
# shellcheck disable=SC2086 - several strengths are several words
run --mode apply --multipliers $MULTIPLIERS
"$PYTHON" -m spilt.look --base_dir "$BASE_DIR" --model_name "$MODEL" --dataset "$DATASET" --method "$METHOD" --intervention_method "$FORM"
