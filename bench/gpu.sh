#!/usr/bin/env bash
# Everything that needs a GPU, in one call under 10 minutes: for a machine with torch, transformers, peft and pytest, without
# network or installation. `bench/gpu.sh --device cpu --model smollm2 --quick` runs the same code on a CPU. Options: gpu.py.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="src${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
exec "${PYTHON:-python3}" bench/gpu.py "$@"
