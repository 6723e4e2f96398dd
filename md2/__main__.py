"""The console script, and `python -m md2`: starts `cli.main`, whose imports take a third of a second."""

from __future__ import annotations

import os
import sys

from md2.process import own_path, shortage


def start() -> None:
    """Run `md2`; exit codes as listed in shards/errors.py. Ctrl-C is one line while Python imports, too."""
    own_path()
    if reason := shortage("NumPy"):
        print(f"md2: {reason}", file=sys.stderr)
        sys.exit(1)
    try:
        from cli.main import main
    except KeyboardInterrupt:
        print("md2: interrupted", file=sys.stderr)
        sys.exit(130)
    except (MemoryError, ImportError, OSError) as error:
        if "--debug" in sys.argv or os.environ.get("MD2_DEBUG"):
            raise
        text = " ".join(str(error).split())
        print(f"md2: cannot start: {type(error).__name__}: {text}; md2 --debug shows where", file=sys.stderr)
        sys.exit(1)
    main()


if __name__ == "__main__":
    start()
