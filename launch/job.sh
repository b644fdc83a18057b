# Functions and settings of a job's batch script around its steps; the script sources this file from the run's own code.
#
#   run       the run's folder
#   python    the Python command of the ranks, as an array of words
#   task      "evaluate" for a test of the run's weights; training otherwise

# The job for SLURM's commands: a task of an array by both numbers, since SLURM_JOB_ID of its last task names the whole array.
this_job=$SLURM_JOB_ID
[ -z "${SLURM_ARRAY_TASK_ID:-}" ] || this_job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID

signals=
log=$(readlink /dev/fd/2)                     # of this script and of srun
log_before=$(stat -c %s "$log" 2>/dev/null) # what earlier starts of the job wrote
export PYTHONFAULTHANDLER=1

# Ranks start with the stop signals blocked, so that no signal kills a rank that still imports (needs coreutils 8.31).
hold='env --block-signal=TERM,INT,USR1,USR2'
$hold true 2>/dev/null || hold=

# Drop the variables of the shell that submitted; srun sets those of each task.
unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT SLURM_TIME_FORMAT SLURM_CLUSTERS
unset "${!SQUEUE_@}" "${!SCONTROL_@}" "${!SCANCEL_@}" "${!SACCT_@}"
[ -z "${SLURM_MEM_PER_NODE:-}" ] || unset SLURM_MEM_PER_CPU SLURM_MEM_PER_GPU
# Since 22.05 srun does not inherit --cpus-per-task; pass on the job's value, e.g. of sbatch --cpus-per-task=4 slurm/train.sh
[ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK

# job_record: the controller's record of this job; nothing when it does not answer.
job_record() { scontrol show job -o "$this_job" 2>/dev/null; }

# srun: run it in the background, so that this script handles a signal at once; the exit status is srun's.
srun() {
    local step status again
    command srun "$@" &
    step=$!
    while :; do
        wait "$step"
        status=$?
        [ "$status" -gt 128 ] && kill -0 "$step" 2>/dev/null || break # a signal to this script ended the wait
    done
    wait "$step" 2>/dev/null # wait once more: a signal may have arrived as srun ended
    again=$?
    [ "$again" -eq 127 ] || status=$again
    return "$status"
}

# on_signal NAME: request a checkpoint, since a signal may reach this script alone; preemption and cancellation signal the ranks too.
# At the time limit the job has only seconds left, whatever the ranks do: requeue it now.
on_signal() {
    signals="$signals $1"
    [ "${task:-}" = evaluate ] || [ -L "$run/SAVE" ] || touch "$run/SAVE" 2>/dev/null
    if [ "$1" = TERM ] && job_record | grep -q ' Reason=TimeLimit '; then requeue_if_due 143 --early; fi
}
for name in TERM INT USR1 USR2; do
    # shellcheck disable=SC2064
    trap "on_signal $name" "$name"
done
trap 'signals="$signals HUP"' HUP # otherwise `scancel --signal=HUP --full` ends script and ranks, and nothing requeues the job

# requeue_if_due STATUS [--early]: call launch/requeue.py, which decides whether the job is requeued and requeues it.
requeue_if_due() {
    local record
    record=$(job_record)
    PYTHONSAFEPATH=1 $hold "${python[@]}" -m launch.requeue "$run" "$1" ${2:-} ${task:+--task "$task"} --signals "$signals" \
        --record "$record" --failed-on "$(failed_on)"
    case $? in
    0) return ;;
    69) ;; # requeue it here: there is no scontrol where Python runs
    70)
        scancel "$this_job"
        return
        ;;
    *) # Python cannot run on this node, or SLURM ends this script because the job is requeued
        record=$(job_record)
        case $record in '' | *' JobState=RUNNING '*) requeue_without_this_node ;; esac
        return
        ;;
    esac
    requeue_job
}

# failed_on: the node on which srun could not start a task, else the node of the first task that failed by itself, from srun's
# messages of this start. Ranks that could not start are reported nowhere else.
failed_on() {
    local said node task
    said=$(tail -c "+$((${log_before:-0} + 1))" "$log" 2>/dev/null)
    node=$(sed -n 's/^srun: error: Task launch for .* failed on node \([^: ]*\): .*/\1/p' <<<"$said" | head -n 1)
    task=$(sed -n 's/^srun: error: tasks\{0,1\} \([0-9]*\)[0-9,-]* launch failed: .*/\1/p' <<<"$said" | head -n 1)
    if [ -n "$node" ]; then
        echo "$node"
    elif [ -n "$task" ]; then
        scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n "$((task / ${SLURM_NTASKS_PER_NODE:-1} + 1))p"
    else
        sed -n '/exit code 75$/d; s/^srun: error: \([^: ]*\): tasks\{0,1\} [0-9,-]*: Exited with exit code .*/\1/p' <<<"$said" |
            head -n 1
    fi
}

# requeue_without_this_node: after three nodes that failed alike the cause is not the node, and the job ends; a run with progress
# is held after eight.
requeue_without_this_node() {
    local seen=$run/logs/$SLURM_JOB_ID.nodes tried out
    out=$(job_record | sed -n 's/.* ExcNodeList=\([^( ][^ ]*\).*/\1/p')
    out=${out:+$out,}$SLURMD_NODENAME
    if dd status=none conv=notrunc oflag=append,nofollow of="$seen" <<<"$SLURMD_NODENAME" 2>/dev/null; then # no link
        tried=$(sort -u "$seen" | wc -l)
    else
        tried=$(scontrol show hostnames "$out" | wc -l)
    fi
    if [ ! -s "$run/metrics.jsonl" ] && [ "$tried" -ge 3 ]; then
        echo "multitrain: ${python[*]} does not run on $tried nodes ($seen): the job is not requeued" >&2
        return
    fi
    echo "multitrain: ${python[*]} does not run on $SLURMD_NODENAME: the job is requeued without this node" >&2
    requeue_job "$out"
    if [ "$tried" -ge 8 ]; then
        echo "multitrain: it does not run on $tried nodes ($seen); the job is held: scontrol release $this_job" >&2
        $hold scontrol hold "$this_job"
    fi
}

# requeue_job [NODES]: requeue the job, or submit a successor that starts when this job has ended, without these nodes. While the
# controller does not answer, try again until SLURM ends this script.
requeue_job() {
    local said again=(scontrol requeue "$this_job")
    if grep -q '^  requeue: resubmit' "$run/config.yaml" 2>/dev/null; then
        again=(sbatch "--dependency=afterany:$this_job" ${1:+"--exclude=$1"} "$run/job.sh")
    fi
    until said=$($hold "${again[@]}" 2>&1); do
        case $said in
        *'Unable to contact'* | *'imed out'* | *busy* | *'emporar'*) sleep 5 ;;
        *)
            echo "multitrain: the job could not be requeued: $said" >&2
            return
            ;;
        esac
    done
    [ -z "${1:-}" ] || [ "${again[0]}" = sbatch ] || $hold scontrol update "jobid=$this_job" "excnodelist=$1"
}

# finish STATUS: requeue the job if it is due, and exit.
finish() {
    requeue_if_due "$1"
    exit "$1"
}
