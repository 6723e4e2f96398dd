"""Measurements: each compares md2 with something named, within one run. Results are in RESULTS.md."""
