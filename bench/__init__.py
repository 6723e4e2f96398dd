"""Measurements: ratios taken in one run against something named. Results are in RESULTS.md."""
