#!/bin/bash
# Without Ray: each task of a job array plays its part of every cell. sbatch docs/cluster/slurm_array.sh
# Afterwards, once, anywhere: openpi sweep --suite libero_object --trials 50 --out out/sweep --report-only
#SBATCH --job-name=openpi-sweep
#SBATCH --array=1-8
#SBATCH --cpus-per-task=8
#SBATCH --gpus-per-task=1
#SBATCH --time=08:00:00
set -euo pipefail

openpi sweep --shard slurm --suite libero_object --trials 50 --out out/sweep \
  --evaluate "policy:embedded --workers $((SLURM_CPUS_PER_TASK - 1))"
