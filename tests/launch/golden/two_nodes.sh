# run    /shared/runs/golden
# batch  512 videos an update = 2 × 8 ranks × 4 videos × 8 accumulated
# memory 9.4 GB per GPU at the peak, estimated: 8 clips × 0.93 GB + 1.9 GB (activation_checkpointing=none)
# loader 3.8 clips/s from each of 8 cores per GPU, which trains on 30 clips/s, estimated; set cluster.gpu_clips=N if you know it; a core delivers about 14 (multitrain data bench measures yours)
#!/bin/bash

# Parameters
#SBATCH --cpus-per-task=8
#SBATCH --gres=gpu:8
#SBATCH --job-name=golden
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --open-mode=append
#SBATCH --output=/shared/runs/golden/logs/%j.log
#SBATCH --requeue
#SBATCH --signal=USR2@120
#SBATCH --time=1440

# setup
run=/shared/runs/golden
python=(/venv/bin/python)
export PYTHONPATH="$run/code${PYTHONPATH:+:$PYTHONPATH}"
. "$run/code/launch/job.sh"
cd "$run/code"
export PYTHONSAFEPATH=1

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output /shared/runs/golden/logs/submitit/%j_%t_log.out --kill-on-bad-exit=1 --output /shared/runs/golden/logs/%j-rank%t.log $hold /venv/bin/python -u -m submitit.core._submit /shared/runs/golden/logs/submitit


# teardown
finish $?
