#!/usr/bin/env bash
# Lint, types and tests in the project's own virtual environment. Arguments go to pytest, for example
#   ./scripts/test.sh tests/io/test_run_record.py -k whole (with arguments, coverage is shown but has no floor)
#   ./scripts/test.sh -m slow
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/_env.sh
clover_env train quant plots bench dev

say "ruff check" && "$VENV_PYTHON" -m ruff check .
say "ruff format --check" && "$VENV_PYTHON" -m ruff format --check .
say "mypy" && "$VENV_PYTHON" -m mypy clover_peft scripts benchmarks

# One process a core with one thread each: tiny models gain nothing from a second thread.
workers=$("$VENV_PYTHON" -c 'import os; print(min(4, os.cpu_count() or 1))')
options=(-m "not slow" --durations=10 --cov --cov-report=term)
if [ "$workers" -gt 1 ]; then options+=(-n "$workers" --dist worksteal); fi
if [ $# -eq 0 ]; then options+=(--cov-fail-under=90); fi
say "pytest ${options[*]} $*"
OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false "$VENV_PYTHON" -m pytest "${options[@]}" "$@"
