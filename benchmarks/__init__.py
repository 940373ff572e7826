"""Side-by-side comparisons, each run by `python -m benchmarks.NAME`."""
