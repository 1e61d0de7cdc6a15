#!/usr/bin/env bash
# Lint, types and tests in the project's own virtual environment.
#
#   ./scripts/test.sh [--versions pinned|oldest|newest] [pytest arguments]
#   ./scripts/test.sh tests/io -k atomic      with arguments, coverage is shown but has no floor
#   ./scripts/test.sh -m slow
#   ./scripts/test.sh --versions oldest       the tests alone, at the lowest versions that pyproject.toml allows
#   ./scripts/test.sh --versions newest       the tests alone, at the newest versions on PyPI
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/_env.sh
VERSIONS=pinned
if [ "${1:-}" = "--versions" ]; then
    VERSIONS="${2:-}"
    shift 2 || die "--versions: expected pinned, oldest or newest after it"
fi
clover_env train quant plots bench dev
if [ "$VERSIONS" != pinned ]; then clover_env_at "$VERSIONS"; fi

# One process a core with one thread each: tiny models gain nothing from a second thread.
workers=$("$VENV_PYTHON" -c 'import os; print(min(4, os.cpu_count() or 1))')
options=(-m "not slow" --durations=10)
if [ "$workers" -gt 1 ]; then options+=(-n "$workers" --dist worksteal); fi
if [ "$VERSIONS" = pinned ]; then
    say "ruff check" && "$VENV_PYTHON" -m ruff check .
    say "ruff format --check" && "$VENV_PYTHON" -m ruff format --check .
    say "mypy" && "$VENV_PYTHON" -m mypy clover_peft clover_command.py scripts benchmarks
    options+=(--cov --cov-report=term)
    if [ $# -eq 0 ]; then options+=(--cov-fail-under=90); fi
fi
say "pytest ${options[*]} $*"
OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false "$VENV_PYTHON" -m pytest "${options[@]}" "$@"
