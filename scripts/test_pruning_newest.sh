#!/usr/bin/env bash
# Runs the tests of pruning on the newest transformers, which is laid over .venv from .newest-transformers.
# Arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/_env.sh
clover_env train quant plots bench dev

folder="$PWD/.newest-transformers"
say "installing the newest transformers into $folder"
"$VENV_PYTHON" -m pip install --disable-pip-version-check --quiet --no-deps --upgrade --target "$folder" transformers
export PYTHONPATH="$folder"
"$VENV_PYTHON" -c 'import transformers; print("transformers", transformers.__version__)'
workers=$("$VENV_PYTHON" -c 'import os; print(min(4, os.cpu_count() or 1))')
OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false \
    "$VENV_PYTHON" -m pytest -n "$workers" --dist worksteal -m "not slow" tests/pruning "$@"
