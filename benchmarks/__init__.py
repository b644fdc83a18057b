"""One script a figure: ``python -m benchmarks.NAME [--full]`` from the checkout; `make bench` runs all of them."""
