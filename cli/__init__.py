"""The `md2` command: argument parsing, progress bars and exit codes."""

import md2  # noqa: F401  # how OpenMP's threads wait must be set before anything here imports torch
