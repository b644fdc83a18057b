"""Views become scores, scores become tables."""
