# Shared by the scripts in this folder, which are given to sbatch: sourced, never run.

if [ -z "${SLURM_JOB_ID:-}" ]; then
    echo "error: this is a job script; give it to sbatch: sbatch $0 …" >&2
    exit 2
fi

# Of the environment that sbatch was called in; else the checkout's own.
python=${MULTITRAIN_PYTHON:-python}
if [ -z "${MULTITRAIN_PYTHON:-}${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ] && [ -x "$home/.venv/bin/python" ]; then
    python=$home/.venv/bin/python
fi
export PYTHONFAULTHANDLER=1

# Of the shell that submitted; the tasks' own come from srun.
unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT

# Tasks start with the stop signals held back, so that none can kill one that is still importing (needs coreutils 8.31).
hold='env --block-signal=TERM,USR1,USR2'
$hold true 2>/dev/null || hold=

# srun does not inherit --cpus-per-task since 22.05.
step=(srun --kill-on-bad-exit=1 "--cpus-per-task=${SLURM_CPUS_PER_TASK:-1}")

# this_start: what the controller says while it is this start of the job that runs, and none after it on other nodes.
this_start() { scontrol show job -o "$SLURM_JOB_ID" | grep " JobState=RUNNING .* Restarts=${SLURM_RESTART_COUNT:-0} "; }

# preempted: SLURM is taking the nodes away, and the job has not been put back into the queue.
preempted() { this_start | grep -q ' PreemptTime=2'; }

# running: nobody has cancelled the job.
running() { this_start | grep -q .; }

# evaluate DATASET CHECKPOINT [key=value …]: multi-view scores of one dataset's test split. A restart skips the videos that
# are scored already, so a job that is preempted or runs out of time simply comes back. The three scripts write into one
# folder a checkpoint, whose table.txt has the datasets that are finished, and their average.
evaluate() {
    local dataset=$1 checkpoint=${2:-} out status
    if [ -z "$checkpoint" ]; then
        echo "usage: sbatch $(basename "$0") CHECKPOINT [key=value …]   (a run's folder, a checkpoint's folder, or a .pyth)" >&2
        exit 2
    fi
    shift 2
    out=${checkpoint#./}
    out=${OUT:-runs/evaluation/$(tr / - <<<"${out#/}")}
    PYTHONPATH=$home${PYTHONPATH:+:$PYTHONPATH} \
        "${step[@]}" "$python" -u -m multitrain.cli evaluate "$checkpoint" --dataset "$dataset" --out "$out" "$@"
    status=$?
    # 75: interrupted, without a scontrol of its own; 140: ended by SIGUSR2, SLURM's warning of the time limit.
    if { { [ "$status" -eq 75 ] || [ "$status" -eq 140 ]; } && running; } || { [ "$status" -ne 0 ] && preempted; }; then
        scontrol requeue "$SLURM_JOB_ID"
    fi
    exit "$status"
}
