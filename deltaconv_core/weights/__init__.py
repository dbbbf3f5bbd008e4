"""Trained blocks as files: our own form, the authors', records of published ones, and fetching them."""
