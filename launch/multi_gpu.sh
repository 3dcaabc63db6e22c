#!/usr/bin/env bash
# Trains on the GPUs of one machine: one process drives them all.
#
#   launch/multi_gpu.sh [--dry-run] --config=esvit_swin --workdir=runs/swin …
#
# It checks the machine first. Start it again with the same arguments and it goes on.
set -euo pipefail

# Settings, which the environment may change.
: "${GPUS:=all}"    # or their numbers: 0,1
: "${MEMORY:=0.92}" # share of each GPU's memory that is taken at once
: "${PYTHON:=python3}"

dry_run=false
if [[ ${1:-} == --dry-run ]]; then
    dry_run=true
    shift
fi
settings=(XLA_PYTHON_CLIENT_MEM_FRACTION="$MEMORY")
if [[ $GPUS != all ]]; then
    settings+=(CUDA_VISIBLE_DEVICES="$GPUS")
fi
for command in doctor train; do
    line=(env "${settings[@]}" "$PYTHON" -m esvit_jax "$command" "$@")
    if $dry_run; then
        printf '%q ' "${line[@]}"
        echo
    elif [[ $command == doctor ]]; then
        "${line[@]}"
    else
        exec "${line[@]}" # signals reach it
    fi
done
