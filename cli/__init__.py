"""The `md2` command: argument parsing, progress bars and exit codes."""

import md2  # noqa: F401  # how threads wait, and how many fit, must be set before anything here imports torch
