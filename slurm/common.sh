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

# srun does not inherit --cpus-per-task since 22.05.
step=(srun --kill-on-bad-exit=1 "--cpus-per-task=${SLURM_CPUS_PER_TASK:-1}")

# evaluate DATASET CHECKPOINT [key=value …]: multi-view scores of one dataset's test split. A restart skips the videos that
# are scored already, so a job that is preempted or runs out of time simply comes back. The three scripts write into one
# folder a checkpoint, whose table.txt has the datasets that are finished, and their average.
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
