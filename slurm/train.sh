#!/bin/bash
# Train with plain sbatch:
#
#   sbatch slurm/train.sh name=first experiment=k400_mit_ssv2
#   sbatch --partition=gpu --nodes=4 --time=12:00:00 slurm/train.sh name=first
#
# Nodes, GPUs and time are options of sbatch; everything else is key=value as for launch/submit.py. The same name again
# resumes the run. The ranks' logs are in RUN/logs; the first line of this job's output names RUN.
#
#SBATCH --job-name=multitrain
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gres=gpu:8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=USR2@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out

unset SLURM_CLUSTERS "${!SQUEUE_@}" "${!SCONTROL_@}" # set in the shell that submitted, they change what these commands print

# The first start of the job prepares the run's folder from the checkout. Every later start finds it by the job's id, in
# RUNS/.jobs or in the job's comment, and does not read the checkout.
run=
if [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ]; then
    runs=runs
    for word in "$@"; do
        case $word in runs=*) runs=${word#runs=} ;; esac
    done
    run=$(cat "$runs/.jobs/$SLURM_JOB_ID" 2>/dev/null) ||
        run=$(squeue --noheader --format=%k "--jobs=$SLURM_JOB_ID" | sed -n 's/^multitrain run \//\//p')
fi
if [ -z "$run" ]; then
    home=${MULTITRAIN_HOME:-${SLURM_SUBMIT_DIR:-$PWD}}
    if [ ! -f "$home/slurm/common.sh" ]; then
        echo "error: $home is not the checkout; call sbatch there, or set MULTITRAIN_HOME to it" >&2
        exit 2
    fi
    . "$home/slurm/common.sh"
    run=$("$python" "$home/launch/submit.py" --prepare "$@") || exit
    scontrol update "jobid=$SLURM_JOB_ID" "name=$(basename "$run")" "comment=multitrain run $run"
fi
echo "run $run"
if [ ! -r "$run/job.sh" ]; then # the file system is not mounted here
    out=$(scontrol show job -o "$SLURM_JOB_ID" | sed -n 's/.* ExcNodeList=\([^( ][^ ]*\).*/\1/p')
    again=requeue
    [ "$(scontrol show hostnames "$out" 2>/dev/null | wc -l)" -lt 8 ] || again=requeuehold
    echo "error: $run/job.sh cannot be read on $SLURMD_NODENAME: $again, without this node" >&2
    scontrol "$again" "$SLURM_JOB_ID"
    scontrol update "jobid=$SLURM_JOB_ID" "excnodelist=${out:+$out,}$SLURMD_NODENAME"
    exit 1
fi
exec bash "$run/job.sh"
