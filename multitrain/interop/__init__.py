"""Reading and writing weights: those of runs, and checkpoints of other projects."""
