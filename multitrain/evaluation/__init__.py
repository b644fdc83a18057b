"""Multi-view testing, validation, metrics, and plots and pages of the results."""
