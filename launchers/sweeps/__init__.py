"""An experiment as a sweep: its axes, checked before anything runs; W&B agents, SLURM jobs."""
