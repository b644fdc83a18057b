#!/bin/bash
# Multi-view test on Something-Something-v2, 1 clip × 3 crops per video:
#
#   sbatch slurm/eval_ssv2.sh CHECKPOINT [key=value …]
#   sbatch --nodes=2 --partition=gpu slurm/eval_ssv2.sh runs/first
#
# CHECKPOINT is a run's folder, a checkpoint's folder, or a released .pyth; key=value changes its configuration, e.g.
# data.root=/datasets. Results go to $OUT, or a folder of runs/evaluation that is named after the checkpoint.
#
#SBATCH --job-name=eval_ssv2
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gres=gpu:8
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
#SBATCH --signal=USR2@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out

home=${MULTITRAIN_HOME:-${SLURM_SUBMIT_DIR:-$PWD}}
if [ ! -f "$home/slurm/common.sh" ]; then
    echo "error: $home is not the checkout; call sbatch there, or set MULTITRAIN_HOME to it" >&2
    exit 2
fi
. "$home/slurm/common.sh"

evaluate ssv2 "$@"
