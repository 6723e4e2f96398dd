"""The `md2` command: argument parsing, progress bars and exit codes."""
