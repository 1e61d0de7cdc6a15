# Sourced by the other scripts, from the repository root: one virtual environment, .venv, for all of them, and thin ones
# over it for the tests at other versions.

say() { printf '\n== %s\n' "$*"; }

die() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

# Prints the first interpreter that is Python 3.10 or newer: $PYTHON alone when it is set, else the usual names.
clover_find_python() {
    local candidates=(python3 python python3.14 python3.13 python3.12 python3.11 python3.10) candidate
    if [ -n "${PYTHON:-}" ]; then candidates=("$PYTHON"); fi
    for candidate in "${candidates[@]}"; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1; then
            echo "$candidate"
            return
        fi
    done
    die "no Python 3.10 or newer among: ${candidates[*]}; install one, or name it: PYTHON=/path/to/python $0"
}

# clover_env EXTRA...: makes .venv when it is missing or broken, installs the package with the extras at the versions
# of constraints.txt, and sets VENV_PYTHON. An installed extra is left alone until pyproject.toml, constraints.txt or
# the place of the checkout changes.
clover_env() {
    local extra missing="" state
    VENV_PYTHON="$PWD/.venv/bin/python"
    if ! "$VENV_PYTHON" -c 'import sys, pip; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1; then
        local python
        python=$(clover_find_python) || exit 1
        say "making .venv with $("$python" --version)"
        "$python" -m venv --clear .venv || die "could not make .venv; on Debian and Ubuntu: apt install python3-venv"
    fi
    state=$( (cat pyproject.toml constraints.txt && pwd && "$VENV_PYTHON" --version) | cksum | tr ' ' '-')
    for extra in "$@"; do
        if [ ! -e ".venv/installed-$state-$extra" ]; then missing="${missing:+$missing,}$extra"; fi
    done
    if [ -z "$missing" ]; then return; fi
    say "installing torch into .venv"
    "$VENV_PYTHON" -m pip install --disable-pip-version-check -c constraints.txt torch
    say "installing clover-peft[$missing] into .venv"
    "$VENV_PYTHON" -m pip install --disable-pip-version-check --quiet -c constraints.txt -e ".[$missing]"
    for extra in "$@"; do touch ".venv/installed-$state-$extra"; done
}

# clover_env_at oldest|newest: makes an environment that holds other versions and finds everything else in .venv, which
# clover_env has made, and sets VENV_PYTHON to it.
#   oldest   .venv-oldest: those of constraints-oldest.txt
#   newest   .venv-newest: the newest of transformers, trl, peft, accelerate and datasets on PyPI. torch stays that of
#            constraints.txt: PyPI's own wheel brings gigabytes of CUDA. NEWEST_TORCH="torch==2.14.1" asks for another.
clover_env_at() {
    local below="$VENV_PYTHON" venv=".venv-$1" wanted
    case "$1" in
        oldest) wanted=(-r constraints-oldest.txt) ;;
        newest) wanted=(--upgrade transformers trl peft accelerate datasets ${NEWEST_TORCH:+"$NEWEST_TORCH"}) ;;
        *) die "--versions $1: expected pinned, oldest or newest" ;;
    esac
    VENV_PYTHON="$PWD/$venv/bin/python"
    if [ ! -x "$VENV_PYTHON" ] || ! "$VENV_PYTHON" -c 'import pip' >/dev/null 2>&1; then
        "$below" -m venv --clear --without-pip "$venv"
    fi
    # pip installs into $venv and leaves what it finds in .venv as it is; Python looks in $venv first.
    "$VENV_PYTHON" - "$("$below" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" <<'PYTHON'
import pathlib, sys, sysconfig
line = f"import site; site.addsitedir({sys.argv[1]!r})\n"
pathlib.Path(sysconfig.get_path("purelib"), "over.pth").write_text(line, encoding="utf-8")
PYTHON
    say "installing the $1 versions into $venv"
    "$VENV_PYTHON" -m pip install --disable-pip-version-check --quiet "${wanted[@]}"
    "$VENV_PYTHON" -m pip list --disable-pip-version-check 2>/dev/null |
        grep -E '^(torch|transformers|peft|trl|accelerate|datasets) '
}
