"""What the cluster says of this job: SLURM, signals, exit statuses; and the one decision whether a job comes back. No torch."""
