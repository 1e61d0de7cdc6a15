#!/usr/bin/env bash
# Builds the documentation strictly: a broken link, a missing page or a docstring that does not parse fails.
# The site is written to build/site. The tools live in a virtual environment of their own, .venv-docs: sources are read
# without importing them, so neither torch nor the package is installed there. Arguments go to mkdocs build.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/_env.sh
source scripts/_env.sh

python="$PWD/.venv-docs/bin/python"
state=".venv-docs/installed-$(cksum < pyproject.toml | tr ' ' '-')"
if [ ! -e "$state" ]; then
    base=$(clover_find_python) || exit 1
    say "making .venv-docs with $("$base" --version)"
    "$base" -m venv --clear .venv-docs
    # The extra's requirements, read from pyproject.toml: installing the package itself would bring torch.
    "$python" -m pip install --disable-pip-version-check --quiet tomli
    "$python" -c 'import tomli; print(*tomli.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"], sep="\n")' \
        >.venv-docs/requirements.txt
    "$python" -m pip install --disable-pip-version-check --quiet -r .venv-docs/requirements.txt
    touch "$state"
fi
say "mkdocs build --strict"
"$python" -m mkdocs build --strict "$@"
