#!/bin/sh
# The whole table on a CPU, in minutes: every method and form, baselines and a prompt, with chosen strengths and those of equal KL, and SPLIT
# against the others at equal KL, preference and utility. Few prompts and rows, so wide intervals: ROWS=24 takes more (12 by default). The
# page of the curves: run_spilt.py report --base_dir table-run
#   sh examples/main_table_small.sh         SmolLM2-135M (tools/real_model.py brings it), block 15, the data of examples/real
#   sh examples/main_table_small.sh toy     the synthetic model of examples/demo
set -eu
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python}
JOBS=${JOBS:-$("$PYTHON" -c 'import os; print(os.cpu_count())')} # one thread each: twice as fast as one process with all cores
case ${1:-real} in
real) BASE_DIR=${BASE_DIR:-table-run} MODEL=smollm2-135m-it DATASET=${DATASET:-sea} FROM=examples/real ;;
toy) BASE_DIR=${BASE_DIR:-table-run-toy} MODEL=demo-qwen2 DATASET=${DATASET:-psychopathy} FROM=examples/demo ;;
*) echo "wanted real or toy, not $1" >&2; exit 2 ;;
esac
if [ ! -d "$BASE_DIR/data" ]; then
    mkdir -p "$BASE_DIR/hparams"
    cp -R examples/demo/hparams/. "$BASE_DIR/hparams/"
    cp "$FROM/hparams/Steer/dataset_format.yaml" "$BASE_DIR/hparams/Steer/"
    cp -R "$FROM/data" "$BASE_DIR/data"
fi
if [ "$FROM" = examples/real ]; then # the same settings for all methods of a form: those of the synthetic model
    "$PYTHON" tools/real_model.py --base_dir "$BASE_DIR"
    "$PYTHON" run_spilt.py settings --like psychopathy/demo-qwen2 --for "$DATASET/$MODEL" --layers 15 --set n_epochs=1 --base_dir "$BASE_DIR"
else
    mkdir -p "$BASE_DIR/models"
    cp -R examples/demo/models/. "$BASE_DIR/models/"
fi
printf 'Answer in one sentence, and let it be about the sea.\n' >"$BASE_DIR/asked.txt"
exec "$PYTHON" examples/main_table.py --base_dir "$BASE_DIR" --model_name "$MODEL" --dataset "$DATASET" --method caa sft reps spilt pca lda \
    --device cpu --kl 0.5 --prompts 4 --max_new_tokens 16 --prompt_baseline asked="$BASE_DIR/asked.txt" --output "$BASE_DIR/tables" \
    --jobs "$JOBS" --control_pairs 0 --limit "${ROWS:-12}" --words --no_report --set sweep_points=5 --set generation_data_size=4
