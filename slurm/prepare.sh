#!/bin/bash
# Prepare data as a SLURM array, whose tasks divide the files among them.
#
#   sbatch --array=0-15 slurm/prepare.sh resize /data/k400 /data/k400_320p --fast-decode
#   sbatch --array=0-15 slurm/prepare.sh resize /data/k400 /data/k400_packed --annotations k400 --pack
#   sbatch --array=0-15 slurm/prepare.sh pack /data/k400_320p /data/k400_packed --annotations k400
#   sbatch --array=0-15 slurm/prepare.sh check data=ssv2 data.root=/datasets --out checked
#
# The arguments are a verb of `multitrain data` and its arguments. The last task of `check` to end writes the table, the last one
# of `pack` and `resize --pack` the index. A task that is preempted or reaches its time limit is requeued and resumes; the whole array resumes when it
# is submitted again. The tasks write only to the folder of copies or findings, and replace only files that the same verb has
# created there (docs/data.md).
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

# Tasks are numbered from the array's first one; without --array there is one task.
first=${SLURM_ARRAY_TASK_MIN:-0}
shard=$((${SLURM_ARRAY_TASK_ID:-0} - first))/$((${SLURM_ARRAY_TASK_MAX:-0} - first + 1))
verb=$1
shift
run=$verb
task=evaluate # requeued like a test, since it resumes where it stopped
. "$home/launch/job.sh"
export PYTHONPATH=$home${PYTHONPATH:+:$PYTHONPATH}
"${step[@]}" $hold "$python" -u -m multitrain.cli data "$verb" "$@" --shard "$shard" --workers "${SLURM_CPUS_PER_TASK:-1}"
status=$?
# 1: all files were processed, and some are wrong. The table names them; the job itself has not failed.
[ "$status" -ne 1 ] || exit 0
finish "$status"
