# Functions of the batch scripts in this folder, which source this file.

if [ -z "${SLURM_JOB_ID:-}" ]; then
    echo "error: this is a job script; give it to sbatch: sbatch $0 …" >&2
    exit 2
fi

# The Python of the environment in which sbatch was called, else that of the checkout's virtual environment.
python=${MULTITRAIN_PYTHON:-python}
if [ -z "${MULTITRAIN_PYTHON:-}${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ] && [ -x "$home/.venv/bin/python" ]; then
    python=$home/.venv/bin/python
fi

# Since 22.05 srun does not inherit --cpus-per-task.
step=(srun --kill-on-bad-exit=1 "--cpus-per-task=${SLURM_CPUS_PER_TASK:-1}")

# evaluate DATASET CHECKPOINT [key=value …]: multi-view scores of one dataset's test split. A restart skips the videos that already
# have scores, so a job that is preempted or reaches its time limit is requeued. The three scripts write to one folder per
# checkpoint, whose table.txt lists the finished datasets and their average.
evaluate() {
    local dataset=$1 checkpoint=${2:-} out
    if [ -z "$checkpoint" ]; then
        echo "usage: sbatch $(basename "$0") CHECKPOINT [key=value …]   (a run's folder, a checkpoint's folder, or a .pyth)" >&2
        exit 2
    fi
    shift 2
    out=${checkpoint#./}
    out=${OUT:-runs/evaluation/$(tr / - <<<"${out#/}")}
    run=$checkpoint
    task=evaluate
    . "$home/launch/job.sh"
    export PYTHONPATH=$home${PYTHONPATH:+:$PYTHONPATH}
    "${step[@]}" $hold "$python" -u -m multitrain.cli evaluate "$checkpoint" --dataset "$dataset" --out "$out" "$@"
    finish $?
}
