"""What a person sees of runs: status, comparison, and the HTML report."""
