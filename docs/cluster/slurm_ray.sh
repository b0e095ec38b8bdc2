#!/bin/bash
# One Ray cluster for as long as this job runs, and a sweep on it: sbatch docs/cluster/slurm_ray.sh
# A job that has run out of time is submitted again, and goes on where it stopped.
#SBATCH --job-name=openpi-sweep
#SBATCH --nodes=3
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --gpus-per-task=1
#SBATCH --time=08:00:00
set -euo pipefail

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 10000)) # jobs of others may share a machine
export RAY_ADDRESS="$head:$port"

start=(ray start --block --num-cpus "$SLURM_CPUS_PER_TASK" --num-gpus "${SLURM_GPUS_PER_TASK:-0}")
srun --nodes=1 --ntasks=1 --nodelist="$head" "${start[@]}" --head --port="$port" &
until ray status >/dev/null 2>&1; do sleep 2; done
if ((SLURM_JOB_NUM_NODES > 1)); then
  srun --nodes=$((SLURM_JOB_NUM_NODES - 1)) --ntasks=$((SLURM_JOB_NUM_NODES - 1)) --exclude="$head" \
    "${start[@]}" --address="$RAY_ADDRESS" &
fi

openpi sweep --on ray --address "$RAY_ADDRESS" --suite libero_object --trials 50 --out out/sweep
