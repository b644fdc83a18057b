#!/bin/bash
# Data preparation as a SLURM array: the tasks share the files among them.
#
#   sbatch --array=0-15 slurm/prepare.sh resize /data/k400 /data/k400_320p --fast-decode
#   sbatch --array=0-15 slurm/prepare.sh pack /data/k400_320p /data/k400_packed --annotations k400
#   sbatch --array=0-15 slurm/prepare.sh check data=ssv2 data.root=/datasets --out checked
#
# What follows is a verb of `multitrain data` and its arguments. The last task of `check` to end writes the table, that of `pack` the index. A task that
# is preempted or runs out of time comes back and goes on; so does the whole array when it is submitted again. Nothing is written
# outside the folder of copies or findings, and nothing in it replaced that the same verb did not make (docs/data.md).
#
#SBATCH --job-name=prepare
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=16
#SBATCH --time=12:00:00
#SBATCH --signal=USR2@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%A_%a.out

home=${MULTITRAIN_HOME:-${SLURM_SUBMIT_DIR:-$PWD}}
if [ ! -f "$home/slurm/common.sh" ]; then
    echo "error: $home is not the checkout; call sbatch there, or set MULTITRAIN_HOME to it" >&2
    exit 2
fi
. "$home/slurm/common.sh"

case ${1:-} in
    check | resize | pack | unpack) ;;
    *) echo "usage: sbatch [--array=0-N] slurm/prepare.sh check|resize|pack|unpack …" >&2; exit 2 ;;
esac

# Tasks count from the array's first; without --array there is one.
first=${SLURM_ARRAY_TASK_MIN:-0}
shard=$((${SLURM_ARRAY_TASK_ID:-0} - first))/$((${SLURM_ARRAY_TASK_MAX:-0} - first + 1))
verb=$1
shift
run=$verb
task=evaluate # like a test, it goes on where it was
. "$home/launch/job.sh"
export PYTHONPATH=$home${PYTHONPATH:+:$PYTHONPATH}
"${step[@]}" $hold "$python" -u -m multitrain.cli data "$verb" "$@" --shard "$shard" --workers "${SLURM_CPUS_PER_TASK:-1}"
status=$?
# 1: all done, and some files are wrong. That is a finding, named in the table, and not a failure of the job.
[ "$status" -ne 1 ] || exit 0
finish "$status"
