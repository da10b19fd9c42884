#!/usr/bin/env bash
# Everything that needs a GPU, in one call: for a machine with torch, transformers, peft and pytest, without network.
# So far: the GPU tests. Run from the repository's root.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHONPATH=src python3 -m pytest -p no:cacheprovider -m gpu tests/gpu -v
