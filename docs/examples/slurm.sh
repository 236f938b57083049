#!/bin/bash
#SBATCH --job-name=puna
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@120
# Two minutes before its time is up, Slurm sends SIGTERM to torchrun on every node: ranks finish their step and save. A
# job that is preempted is queued again, and the same command goes on. `out` must be on a disk that all nodes share.
set -euo pipefail

RECIPE=${1:-recipe.toml}
HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export OMP_NUM_THREADS=8

srun --kill-on-bad-exit=1 torchrun \
    --nnodes="$SLURM_NNODES" --nproc_per_node=8 --max-restarts=3 \
    --rdzv_backend=c10d --rdzv_endpoint="$HEAD:29400" --rdzv_id="$SLURM_JOB_ID" \
    -m puna train "$RECIPE"
