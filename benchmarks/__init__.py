"""Every figure, reproducible with one command each."""
