"""SLURM, signals and exit statuses, and the one decision whether a job is requeued. No torch."""
