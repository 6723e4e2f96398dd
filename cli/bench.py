"""`md2 bench`: the measurements of bench/, each a module that also runs alone (`python -m bench.loader`)."""

from __future__ import annotations

import sys
from enum import StrEnum
from importlib import import_module

import typer


class What(StrEnum):
    """Modules of bench/."""

    loader = "loader"
    step = "step"
    prep = "prep"
    storage = "storage"
    scale = "scale"
    gpu = "gpu"


SETTINGS = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


def bench(context: typer.Context, what: What) -> None:
    """Measure the loader, a training step, prep, storage, cost at scale, or all on a GPU.

    `md2 bench WHAT --help` has the options.
    """
    sys.argv = [f"md2 bench {what}", *context.args]
    raise typer.Exit(import_module(f"bench.{what}").main() or 0)
