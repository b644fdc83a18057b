"""Fuzzing: damaged and hostile input for every reader, made from valid input, and the classification of each outcome."""
