"""Damaged and hostile input for every reader: what it is made from, who reads it, and how the outcome is judged."""
