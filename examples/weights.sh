#!/bin/sh
# Weight steering on the real model, small sizes: two adapters on what the model itself answers as an optimist and as a pessimist, dW, and
# beside it caa, sft and the persona as a prompt, at equal KL. Killed at any moment, the same command goes on from there.
#   BEHAVIOR=honesty sh examples/weights.sh        another behaviour of spilt/weight_steering/shipped
#   ADAPTER="lora dora" SIZES="" sh examples/weights.sh        other kinds beside each other, at the default sizes (hours on a CPU)
set -eu
cd "$(dirname "$0")/.."
DEVICE=${DEVICE:-cpu}
BASE_DIR=${BASE_DIR:-demo-run}
BEHAVIOR=${BEHAVIOR:-optimism}
MODEL=${MODEL:-smollm2-135m-it}
ADAPTER=${ADAPTER:-lora}
SIZES=${SIZES-"--n-topics 12 --n-personas 1 --n-samples 2 --n-audit 16 --n-audit-samples 4 --max-new-tokens 20 --rank 16 --lora-alpha 32
    --lr 1e-3 --layers 15 16 17 18 19 20 --grad-accum 1 --epochs 3 --warmup 2 --eval-steps 6 --n-calibration 3 --n-kl-audit 3 --n-tokens 10
    --vector-epochs 1 --limit 4"}
if [ -n "${VENV:-}" ]; then PATH="$PWD/$VENV/bin:$PATH"; fi
PYTHON=${PYTHON:-python}

if [ "$MODEL" = smollm2-135m-it ] && [ ! -d "$BASE_DIR/models/$MODEL" ]; then
    "$PYTHON" tools/real_model.py --base_dir "$BASE_DIR"
fi
# shellcheck disable=SC2086 - several words each
"$PYTHON" -m spilt weights run --behavior "$BEHAVIOR" --model "$MODEL" --base_dir "$BASE_DIR" --device "$DEVICE" --adapter $ADAPTER $SIZES \
    --methods caa sft prompt
