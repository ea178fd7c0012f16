"""Measurements: ratios against comparators, taken in one run on one machine. `python -m benchmarks.NAME`."""
