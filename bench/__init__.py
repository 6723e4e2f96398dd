"""Measurements: each compares md2 with something named, within one run. Results are in RESULTS.md."""

import md2  # noqa: F401  # how OpenMP's threads wait must be set before anything here imports torch
