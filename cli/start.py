"""Console script: starts `cli.main`, whose imports take a third of a second; Ctrl-C is quiet in that time, too."""

from __future__ import annotations

import sys


def start() -> None:
    """`md2`; exit codes as listed in shards/errors.py."""
    try:
        from cli.main import main
    except KeyboardInterrupt:
        print("md2: interrupted", file=sys.stderr)
        sys.exit(130)
    main()
