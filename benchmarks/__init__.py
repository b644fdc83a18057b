"""One script per measurement: ``python -m benchmarks.NAME [--full]`` in the checkout; `make bench` runs all."""
