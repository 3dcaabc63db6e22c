#!/usr/bin/env bash
# Times the training step on one GPU in under ten minutes, ours and PyTorch's, eager and compiled,
# and prints tables for docs/measurements.md, also into FOLDER/report.md.
#
#   launch/measure_gpu.sh FOLDER [--train] [--small] [--dry-run]
#
#   --train    trains for that time instead
#   --small    the same in miniature, for a CPU
#   --dry-run  prints the commands
#
# A measurement is a process of its own: one that runs out of memory ends no other. Small batches
# come first; where one fails or finds no time left, larger ones of its kind are not tried. Run
# again with the same folder it goes on with what is not there yet, and with the training too.
# It needs the extras `cuda` and `torch`.
set -euo pipefail

folder='' train=false small=false dry_run=false
for argument in "$@"; do
    case $argument in
        --train) train=true ;;
        --small) small=true ;;
        --dry-run) dry_run=true ;;
        -*) echo "$0: $argument is no flag; there are --train, --small, --dry-run" >&2; exit 2 ;;
        *) folder=$argument ;;
    esac
done
: "${folder:?name a folder for the results}"

# Settings, which the environment may change.
: "${PYTHON:=python3}" "${BUDGET:=570}" "${LIMIT:=200}" # seconds: for all, for one measurement
if $small; then
    : "${BATCHES:=2 4}" "${DTYPES:=float32}" "${WHO:=ours torch}" "${ROUNDS:=2}"
    : "${MODEL:=--config=quickstart
        --config.backbone.depths=(1,1) --config.backbone.embed_dim=12 --config.views.num_local=2
        --config.head.num_prototypes=32}"
    : "${TRAINING:=$MODEL --config.batch_size=4 --config.total_steps=4 --config.log_every_steps=2
        --config.data.train_split=train[:200] --config.data.test_split=test[:40]}"
else
    : "${BATCHES:=32 64 128 256}" "${DTYPES:=bfloat16 float32}"
    : "${WHO:=ours torch torch-compiled}" "${ROUNDS:=15}" "${MODEL:=--config=esvit_swin}"
    # The quickstart with twice its batch, and its learning rate.
    : "${TRAINING:=--config=quickstart --config.dtype=bfloat16 --config.batch_size=128
        --config.optimizer.learning_rate=3e-3 --config.total_epochs=200
        --config.log_every_steps=100 --config.checkpoint_every_steps=500
        --config.knn_every_steps=2000 --config.data.num_threads=16}"
fi
read -ra model <<<"${MODEL//$'\n'/ }"
read -ra training <<<"${TRAINING//$'\n'/ }"

# A process may have all of the memory, and takes what it needs.
export XLA_PYTHON_CLIENT_PREALLOCATE=false XLA_PYTHON_CLIENT_MEM_FRACTION=0.95
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$folder/cache}
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$folder/inductor}

esvit=("$PYTHON" -m esvit_jax)
declare -A failed=()

# NAME COMMAND…: keeps its output as NAME.json, what it says as NAME.log, and its exit status as
# NAME.status: 124 is that of timeout, for want of time.
measure() {
    local name=$1 kind=${1#*-} left=$((BUDGET - SECONDS)) status=0
    shift
    if $dry_run; then
        echo "$@"
        return
    fi
    if [[ -e $folder/$name.json ]]; then
        return
    fi
    if [[ ${failed[$kind]:-} ]]; then
        status=not-tried
    elif ((left < 10)); then
        status=124
    else
        timeout --kill-after=5 "$((left < LIMIT ? left : LIMIT))" "$@" \
            >"$folder/$name.part" 2>"$folder/$name.log" || status=$?
    fi
    echo "$status" >"$folder/$name.status"
    if [[ $status == 0 ]]; then
        mv "$folder/$name.part" "$folder/$name.json"
        echo "$name: measured, $SECONDS s after the start"
    else
        failed[$kind]=1
        echo "$name: no result (status $status), $SECONDS s after the start"
    fi
}

if ! $dry_run; then
    mkdir -p "$folder"
    "${esvit[@]}" bench "${model[@]}" --parts= --json >"$folder/where.json"
fi

if $train; then
    run=("${esvit[@]}" train "${training[@]}" --workdir="$folder/train")
    if $dry_run; then
        echo "${run[@]}"
    else # a signal ends it with a checkpoint
        timeout --kill-after=15 "$((BUDGET - SECONDS - 20))" "${run[@]}" 2>&1 |
            tee -a "$folder/train.log" || echo "the training ended early; see $folder/train.log"
    fi
else
    for batch in $BATCHES; do
        for dtype in $DTYPES; do
            bench=("${esvit[@]}" bench "${model[@]}" "--config.dtype=$dtype"
                "--config.batch_size=$batch" "--rounds=$ROUNDS" --json)
            for who in $WHO; do
                if [[ $who == ours ]]; then
                    measure "$batch-$dtype-ours" "${bench[@]}" --parts=step
                else # jax only cuts the views, and then leaves the memory to PyTorch
                    measure "$batch-$dtype-$who" env XLA_PYTHON_CLIENT_ALLOCATOR=platform \
                        "${bench[@]}" --parts= "--peer=$who" --alone
                fi
            done
        done
    done
fi

if $dry_run; then
    echo "$PYTHON -m esvit_jax.bench.report $folder"
else
    "$PYTHON" -m esvit_jax.bench.report "$folder" | tee "$folder/report.md"
fi
