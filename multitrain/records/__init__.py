"""The files that a run writes while it trains, with their readers: events, metrics, test results, TensorBoard, log lines. No torch."""
