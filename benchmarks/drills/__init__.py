"""Interruptions at random moments over real processes, and what they cost."""
