"""Weights of runs and of other people, in and out."""
