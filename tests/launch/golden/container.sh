# run    /shared/runs/golden
# batch  512 videos an update = 4 × 4 ranks × 4 videos × 8 accumulated
# memory 9.4 GB per GPU at the peak, estimated: 8 clips × 0.93 GB + 1.9 GB (activation_checkpointing=none)
# loader 3.8 clips/s from each of 8 cores per GPU, which trains on 30 clips/s, estimated; set cluster.gpu_clips=N if you know it; a core delivers about 14 (multitrain data bench measures yours)
#!/bin/bash

# Parameters
#SBATCH --account=lab
#SBATCH --cpus-per-task=8
#SBATCH --gres=gpu:a100:4
#SBATCH --job-name=golden
#SBATCH --mem=480G
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=4
#SBATCH --open-mode=append
#SBATCH --output=/shared/runs/golden/logs/%j.log
#SBATCH --partition=gpu
#SBATCH --requeue
#SBATCH --signal=USR2@300
#SBATCH --time=720

# setup
run=/shared/runs/golden
python=(apptainer exec --nv image.sif python)
export PYTHONPATH="$run/code${PYTHONPATH:+:$PYTHONPATH}"
. "$run/code/launch/job.sh"
cd "$run/code"
export PYTHONSAFEPATH=1
srun --kill-on-bad-exit=1 $hold apptainer exec --nv image.sif python -u -m launch.preflight --dir "$run" || finish $?

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output /shared/runs/golden/logs/submitit/%j_%t_log.out --kill-on-bad-exit=1 --output /shared/runs/golden/logs/%j-rank%t.log $hold apptainer exec --nv image.sif python -u -m submitit.core._submit /shared/runs/golden/logs/submitit


# teardown
finish $?
