"""Measuring a MODEL."""
