# What a batch script of a job does around its steps; sourced by it, from the run's own copy of the code.
#
#   run       the run's folder
#   python    the Python command of the ranks, as an array of words
#   task      "evaluate" for a test of the run's weights; training otherwise

# For SLURM's commands: an element of an array by both numbers, since SLURM_JOB_ID of the last one names the whole array.
this_job=$SLURM_JOB_ID
[ -z "${SLURM_ARRAY_TASK_ID:-}" ] || this_job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID

signals=
log=$(readlink /dev/fd/2)                     # of this script and of srun
log_before=$(stat -c %s "$log" 2>/dev/null) # what earlier starts of the job wrote
export PYTHONFAULTHANDLER=1

# Ranks start with the stop signals held back, so that none can kill one that is still importing (needs coreutils 8.31).
hold='env --block-signal=TERM,INT,USR1,USR2'
$hold true 2>/dev/null || hold=

# Of the shell that submitted; the tasks' own come from srun.
unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT SLURM_TIME_FORMAT SLURM_CLUSTERS
unset "${!SQUEUE_@}" "${!SCONTROL_@}" "${!SCANCEL_@}" "${!SACCT_@}"
[ -z "${SLURM_MEM_PER_NODE:-}" ] || unset SLURM_MEM_PER_CPU SLURM_MEM_PER_GPU
# srun does not inherit --cpus-per-task since 22.05. The job's own value counts: sbatch --cpus-per-task=4 slurm/train.sh
[ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK

# job_record: what the controller says of this job; nothing when it does not answer.
job_record() { scontrol show job -o "$this_job" 2>/dev/null; }

# srun in the background, so that this script acts on a signal at once; its exit status is srun's.
srun() {
    local step status again
    command srun "$@" &
    step=$!
    while :; do
        wait "$step"
        status=$?
        [ "$status" -gt 128 ] && kill -0 "$step" 2>/dev/null || break # a signal to this script ended the wait
    done
    wait "$step" 2>/dev/null # the same once more, for a signal that came as srun ended
    again=$?
    [ "$again" -eq 127 ] || status=$again
    return "$status"
}

# A signal to this script alone asks for a checkpoint; the ranks get those of preemption and cancellation themselves.
# At its time limit the job has seconds left, whatever the ranks do: it goes back into the queue now.
on_signal() {
    signals="$signals $1"
    [ "${task:-}" = evaluate ] || [ -L "$run/SAVE" ] || touch "$run/SAVE" 2>/dev/null
    if [ "$1" = TERM ] && job_record | grep -q ' Reason=TimeLimit '; then come_back 143 --early; fi
}
for name in TERM INT USR1 USR2; do
    # shellcheck disable=SC2064
    trap "on_signal $name" "$name"
done
trap 'signals="$signals HUP"' HUP # else `scancel --signal=HUP --full` ends script and ranks at once, and nothing brings the job back

# come_back STATUS [--early]: asks the one place that decides, which puts the job back when it is to come back.
come_back() {
    local record
    record=$(job_record)
    PYTHONSAFEPATH=1 $hold "${python[@]}" -m launch.requeue "$run" "$1" ${2:-} ${task:+--task "$task"} --signals "$signals" \
        --record "$record" --failed-on "$(failed_on)"
    case $? in
    0) return ;;
    69) ;; # it is to come back, and there is no scontrol where Python is
    70)
        scancel "$this_job"
        return
        ;;
    *) # Python cannot run on this node, or SLURM ends this script since the job is back in the queue
        record=$(job_record)
        case $record in '' | *' JobState=RUNNING '*) elsewhere ;; esac
        return
        ;;
    esac
    put_back
}

# failed_on: the node on which srun could not start a task, else the one whose task ended first with an exit status of its
# own, as srun reported in this start. Ranks that could not start have reported it nowhere else.
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

# elsewhere: requeue without this node. Where that did not help on three nodes (eight, if the run has made progress),
# it is not the node: the job ends (is held).
elsewhere() {
    local seen=$run/logs/$SLURM_JOB_ID.nodes tried out
    out=$(job_record | sed -n 's/.* ExcNodeList=\([^( ][^ ]*\).*/\1/p')
    out=${out:+$out,}$SLURMD_NODENAME
    if dd status=none conv=notrunc oflag=append,nofollow of="$seen" <<<"$SLURMD_NODENAME" 2>/dev/null; then # no link
        tried=$(sort -u "$seen" | wc -l)
    else
        tried=$(scontrol show hostnames "$out" | wc -l)
    fi
    if [ ! -s "$run/metrics.jsonl" ] && [ "$tried" -ge 3 ]; then
        echo "multitrain: ${python[*]} does not run on $tried nodes ($seen): the job does not come back" >&2
        return
    fi
    echo "multitrain: ${python[*]} does not run on $SLURMD_NODENAME: the job comes back without this node" >&2
    put_back "$out"
    if [ "$tried" -ge 8 ]; then
        echo "multitrain: it does not run on $tried nodes ($seen); the job is held: scontrol release $this_job" >&2
        $hold scontrol hold "$this_job"
    fi
}

# put_back [NODES]: into the queue, or a successor that starts when this job has ended, without some nodes; a controller
# that does not answer is asked until this script is ended.
put_back() {
    local said again=(scontrol requeue "$this_job")
    if grep -q '^  requeue: resubmit' "$run/config.yaml" 2>/dev/null; then
        again=(sbatch "--dependency=afterany:$this_job" ${1:+"--exclude=$1"} "$run/job.sh")
    fi
    until said=$($hold "${again[@]}" 2>&1); do
        case $said in
        *'Unable to contact'* | *'imed out'* | *busy* | *'emporar'*) sleep 5 ;;
        *)
            echo "multitrain: the job could not be put back into the queue: $said" >&2
            return
            ;;
        esac
    done
    [ -z "${1:-}" ] || [ "${again[0]}" = sbatch ] || $hold scontrol update "jobid=$this_job" "excnodelist=$1"
}

# finish STATUS: the end of the script.
finish() {
    come_back "$1"
    exit "$1"
}
