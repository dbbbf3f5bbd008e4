"""Commands that print the README's figures, run as `python -m benchmarks.block`."""
