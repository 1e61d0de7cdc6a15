#!/usr/bin/env bash
# Runs peft's own generic tests, from the source distribution of the installed version, with CLOVER's configs.
#
#   ./scripts/peft_conformance.sh [--newest] [--full] [pytest arguments]
#
# --newest takes the newest peft on PyPI instead, kept in .newest/. --full runs all four configs on every test; without
# it the variants run on custom models and decoders. Nothing of peft's is kept in this repository.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/_env.sh
clover_env train dev
if [ "${1:-}" = "--newest" ]; then
    shift
    say "installing the newest peft into .newest"
    "$VENV_PYTHON" -m pip install --disable-pip-version-check --quiet --no-deps --upgrade --target .newest peft
    export PYTHONPATH="$PWD/.newest"
fi
OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false "$VENV_PYTHON" scripts/peft_conformance.py "$@"
