# run    /shared/runs/golden
# batch  512 videos an update = 2 ranks × 4 videos × 64 accumulated
# memory 9.2 GB per rank at the peak, estimated: 8 clips × 0.93 GB + 1.7 GB (activation_checkpointing=none)
# loader the ranks compute on CPU cores, which is slower than loading: a core delivers about 14 (multitrain data bench measures yours)
#!/bin/bash

# Parameters
#SBATCH --constraint=avx512
#SBATCH --cpus-per-task=4
#SBATCH --exclude=bad1
#SBATCH --exclusive
#SBATCH --job-name=golden
#SBATCH --mail-user=me@lab.org
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=2
#SBATCH --open-mode=append
#SBATCH --output=/shared/runs/golden/logs/%j.log
#SBATCH --qos=low
#SBATCH --requeue
#SBATCH --signal=USR2@120
#SBATCH --time=1440

# setup
run=/shared/runs/golden
python=(/venv/bin/python)
export PYTHONPATH="$run/code${PYTHONPATH:+:$PYTHONPATH}"
. "$run/code/launch/job.sh"
module load ffmpeg
cd "$run/code"
export PYTHONSAFEPATH=1

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output /shared/runs/golden/logs/submitit/%j_%t_log.out --kill-on-bad-exit=1 '--container-image=a b' --output /shared/runs/golden/logs/%j-rank%t.log $hold /venv/bin/python -u -m submitit.core._submit /shared/runs/golden/logs/submitit


# teardown
finish $?
