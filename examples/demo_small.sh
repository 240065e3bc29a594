#!/bin/sh
# The small demo: all ten combinations of method and form on the synthetic model of examples/demo: texts, then curves and a report.
set -eu
cd "$(dirname "$0")/.."
export BASE_DIR="${BASE_DIR:-demo-run-small}"
sh examples/run_spilt.sh
MODE=loss MULTIPLIERS=sweep sh examples/run_spilt.sh
