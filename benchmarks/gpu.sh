#!/usr/bin/env bash
# Everything that is to be measured on a GPU, in at most nine minutes of one: see docs/how_to/measure_on_a_gpu.md.
#
#   benchmarks/gpu.sh OUT                    $PYTHON (by default python) has the package with its extra train
#   benchmarks/gpu.sh OUT --fast --grid GRID tiny shapes, to see that it runs; times mean nothing
#
# OUT gets records, logs and a file in done/ for each step that is finished, with its command. Run the command again to
# go on; a step with another command is made anew. The exit status is 1 if a step failed, 75 if one is not finished, and
# 2 if nothing could be started.
set -uo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
python="${PYTHON:-python}"
out="${1:?usage: benchmarks/gpu.sh OUT [--fast] [--grid CONFIG] [--suite FOLDER] [--minutes N]}"
shift
fast="" grid="" minutes="" suite=()
while [ $# -gt 0 ]; do
    case "$1" in
        --fast) fast=--fast && shift ;;
        --grid) grid="${2:?--grid: expected a configuration after it}" && shift 2 ;;
        --suite) suite=("data.source=folder:${2:?--suite: expected a folder after it}") && shift 2 ;;
        --minutes) minutes="${2:?--minutes: expected a number after it}" && shift 2 ;;
        *) echo "error: $1: expected --fast, --grid CONFIG, --suite FOLDER or --minutes N" >&2 && exit 2 ;;
    esac
done
if [ -z "$fast" ]; then grid="${grid:-smollm2_10k}"; fi
minutes="${minutes:-$([ -z "$fast" ] && echo 9 || echo 60)}" # with --fast, a slow machine is no failure
case "$minutes" in *[!0-9]* | "") number=0 ;; *) number=$((10#$minutes)) ;; esac # 08 is 8, not octal
if [ "$number" = 0 ]; then echo "error: --minutes: expected a whole number from 1 on, found $minutes" >&2 && exit 2; fi
minutes=$number
if [ -z "$fast" ] && ! why="$("$python" -c 'import torch; torch.zeros(1, device="cuda")' 2>&1)"; then
    echo "error: $python: expected torch with a usable GPU, found none (${why##*$'\n'}); --fast needs none" >&2 && exit 2
fi
if ! mkdir -p "$out/logs" "$out/done" "$out/records"; then
    echo "error: $out: expected a folder that can be written to, found none; choose another" >&2 && exit 2
fi
out="$(cd "$out" && pwd)"
export PYTHONPATH="$(dirname "$here")${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
failed=0 unfinished=0 goes_on=

# step NAME SECONDS COMMAND...: a step that is not finished yet, for so many seconds or as many as are left. A step that
# is cut off goes on the next time, if its command does ($goes_on). Otherwise it begins anew, and gets all the time that
# is left if its own was too short.
step() {
    local name="$1" seconds="$2" code=0 left start=$SECONDS
    shift 2
    left=$((minutes * 60 - SECONDS))
    if [ -n "$fast" ] || { [ -z "$goes_on" ] && [ "$(cat "$out/logs/$name.cut" 2>/dev/null)" = "$*" ]; }; then
        seconds=$left
    fi
    if [ "$(cat "$out/done/$name" 2>/dev/null)" = "$*" ]; then
        echo "$name: done before"
    elif [ "$left" -lt 5 ]; then
        unfinished=1 && echo "$name: no time left; run the command again"
    else
        if [ "$seconds" -gt "$left" ]; then seconds=$left; fi
        timeout --foreground --kill-after=10 "$seconds" "$@" >>"$out/logs/$name.log" 2>&1 || code=$?
        # Not by `timeout`, but for instance by the system, which ran out of memory.
        if [ "$code" = 137 ] && [ $((SECONDS - start)) -lt $((seconds - 1)) ]; then code=killed; fi
        case $code in
            0) echo "$*" >"$out/done/$name" && echo "$name: done at $SECONDS s" ;;
            124 | 137)
                unfinished=1 && echo "$name: cut off at $SECONDS s; run the command again"
                if [ "$seconds" -lt "$left" ]; then echo "$*" >"$out/logs/$name.cut"; fi
                ;;
            killed) failed=1 && echo "$name: killed at $SECONDS s, see $out/logs/$name.log" >&2 ;;
            *) failed=1 && echo "$name: failed, see $out/logs/$name.log" >&2 ;;
        esac
    fi
}

benchmark() {
    local name="$1" seconds="$2" script="$3"
    shift 3
    step "$name" "$seconds" "$python" "$here/$script.py" $fast --out "$out/records/$name.json" "$@"
}

benchmark train_step_4096 90 train_step --tokens 4096 --rounds 9
benchmark train_step_512 45 train_step --tokens 512 --rounds 15
benchmark train_step_compiled 90 train_step --tokens 4096 --rounds 9 --compile --methods dora
benchmark train_step_checkpointing 60 train_step --tokens 4096 --rounds 9 --gradient-checkpointing
benchmark init_time 40 init_time --skip-exact-pissa
benchmark decode 60 decode --batch-sizes 1 64
benchmark pruned_decode 40 pruned_decode
# The grid and the experiment go on where they were cut off. They share what is left, so each gets at most half of it.
half=$(((minutes * 60 - SECONDS) / 2)) goes_on=1
if [ -n "$grid" ]; then
    step commonsense "$half" "$python" -m clover_peft ablate --config "$grid" --out "$out/commonsense" --jobs 6 \
        ${suite[@]+"${suite[@]}"}
else
    echo "commonsense: left out, because --fast has no --grid CONFIG beside it"
fi
adaptation=(--config adaptation_gpu --jobs 6)
if [ -n "$fast" ]; then adaptation=(--config adaptation_tiny --jobs 2); fi
step adaptation $((minutes * 60)) "$python" -m clover_peft ablate "${adaptation[@]}" --out "$out/adaptation"
for name in commonsense adaptation; do # tables of what has been measured
    if compgen -G "$out/$name/records/*.json" >/dev/null; then
        # The table of an earlier call stays where a new one cannot be made.
        "$python" -m clover_peft ablate --table "$out/$name/records" >"$out/$name.md.new" &&
            mv "$out/$name.md.new" "$out/$name.md" || failed=1
    fi
done
if [ "$failed" = 0 ] && [ "$unfinished" = 1 ]; then exit 75; fi
exit $failed
