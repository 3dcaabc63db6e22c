#!/usr/bin/env bash
# Trains on all hosts of a TPU VM slice; run it again after a preemption and it goes on.
#
#   TPU_NAME=my-slice ZONE=us-central2-b DATA_DIR=gs://bucket/tfds WORKDIR=/mnt/bucket/run \
#     launch/tpu_vm.sh esvit_swin:variant=tiny [--config.field=value …]
#
# WORKDIR is a folder that all hosts share, such as a bucket mounted with gcsfuse.
set -euo pipefail
: "${TPU_NAME:?}" "${ZONE:?}" "${DATA_DIR:?}" "${WORKDIR:?}"
config=$1
shift

gcloud compute tpus tpu-vm scp --recurse --worker=all --zone="$ZONE" . "$TPU_NAME:esvit_jax"
gcloud compute tpus tpu-vm ssh "$TPU_NAME" --worker=all --zone="$ZONE" --command="
  cd esvit_jax && pip install --quiet '.[tpu]' &&
  python -m esvit_jax train --distributed --config=$config --workdir=$WORKDIR \
    --config.data.data_dir=$DATA_DIR $*"
