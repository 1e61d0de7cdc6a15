#!/usr/bin/env bash
# What a user does, in a user's order, from the wheel in a clean environment: see scripts/odyssey.py.
#   ./scripts/odyssey.sh OUT [options of odyssey.py]
# OUT is a new folder for the environment (about 1.7 GB), the models and log.md. It takes about eight minutes of
# the processor after the installation.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
out="${1:?usage: scripts/odyssey.sh OUT [options of odyssey.py]}"
shift
mkdir -p "$out"
out="$(cd "$out" && pwd)"
python3 -m venv "$out/environment"
python="$out/environment/bin/python"
"$python" -m pip wheel --quiet --no-deps --wheel-dir "$out/wheel" "$root"
wheel="$(echo "$out"/wheel/clover_peft-*.whl)"
"$python" -m pip install --quiet -c "$root/constraints.txt" torch "$wheel[train,plots]" "transformers[serving]"
cp "$root"/scripts/odyssey*.py "$root/benchmarks/real_models.py" "$out"
cd "$out" # nothing of the checkout is on the path
exec env -u PYTHONPATH OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}" "$python" odyssey.py "$out/runs" "$@"
