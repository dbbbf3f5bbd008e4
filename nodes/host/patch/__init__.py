"""Putting mixers on a MODEL, and everything that has to be known while they run."""
