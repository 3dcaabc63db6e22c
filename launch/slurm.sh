#!/usr/bin/env bash
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gres=gpu:8
#SBATCH --requeue
#SBATCH --signal=TERM@120
# Trains on GPU nodes: one process a node; requeued after a preemption, it goes on.
#
#   sbatch launch/slurm.sh --config=esvit_swin --workdir=/shared/run …
set -euo pipefail
srun python -m esvit_jax train --distributed "$@"
