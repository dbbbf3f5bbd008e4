"""Commands that print the figures of the documentation, run as `python -m benchmarks.block`."""
