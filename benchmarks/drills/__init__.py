"""Interrupt real runs at random moments, and measure what each interruption costs."""
