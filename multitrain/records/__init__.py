"""Writers and readers of the files of a run: events, metrics, test results, TensorBoard, log lines. No torch."""
