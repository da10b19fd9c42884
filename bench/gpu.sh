#!/usr/bin/env bash
# Everything that needs a GPU, in one call of under ten minutes: for a machine with torch, transformers, peft and pytest, without
# network or installation. --smoke: the first three parts, in two minutes. `bench/gpu.sh --device cpu --model smollm2 --quick`
# runs the same code on a CPU. Options, files and exit codes: gpu.py.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD/src:$PWD/bench:$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
exec "${PYTHON:-python3}" bench/gpu.py "$@"
