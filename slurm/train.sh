#!/bin/bash
# Train, for people who say sbatch:
#
#   sbatch slurm/train.sh name=first experiment=k400_mit_ssv2
#   sbatch --partition=gpu --nodes=4 --time=12:00:00 slurm/train.sh name=first
#
# Nodes, GPUs and time are sbatch's options, everything else is key=value as for launch/submit.py. The same name again
# resumes the run. The ranks' logs are in RUN/logs; this file's output tells where RUN is.
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

home=${MULTITRAIN_HOME:-${SLURM_SUBMIT_DIR:-$PWD}}
if [ ! -f "$home/slurm/common.sh" ]; then
    echo "error: $home is not the checkout; call sbatch there, or set MULTITRAIN_HOME to it" >&2
    exit 2
fi
. "$home/slurm/common.sh"

# Chosen once: a requeued job finds the same folder, with the configuration and the code that it started with.
run=$("$python" "$home/launch/submit.py" --prepare "$@") || exit
echo "run $run"
scontrol update "jobid=$SLURM_JOB_ID" "name=$(basename "$run")"

export PYTHONPATH=$run/code${PYTHONPATH:+:$PYTHONPATH}
restarts=$(sed -n 's/^  restarts_in_place: //p' "$run/config.yaml")
"${step[@]}" --chdir="$run/code" --output="$run/logs/%j-rank%t.log" \
    $hold "$python" -u -m launch.supervisor "$run" "${restarts:-0}" -m multitrain.train "$run"
status=$?

# The run requeues itself when SLURM takes its nodes; this is for ranks that died, or could not.
if [ "$status" -ne 0 ] && [ "$status" -ne 75 ] && running; then
    preempted && reason=preempted
    "$python" -m launch.again "$run" "$status" ${reason:-} && scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
