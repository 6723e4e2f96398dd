"""`md2 bench`: the measurements of bench/, each a module that also runs alone (`python -m bench.loader`)."""

from __future__ import annotations

import difflib
import sys
from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer

from cli.console import console
from shards.errors import UsageError

WHAT = {
    "loader": "the loader against others; --what-if: what limits a training",
    "step": "a training step, part by part, against a plain one",
    "count": "operations, launches and bytes of a GPU's step, without a GPU",
    "waiting": "how OpenMP threads should wait, on a quiet and on a busy machine",
    "codec": "ways of storing images: what the photometric error still sees",
    "prep": "md2 prep against decoding, resizing and encoding alone",
    "rehearsal": "KITTI at full size: check, pack, publish, an epoch from S3",
    "scale": "the loader with 10 to 10,000 shards, and over 10,000 steps",
    "parity": "whether md2 learns as well as the method trained the plain way",
    "variants": "crop, HR-Depth and known motion against the published method",
    "camera": "own cameras: what distortion and a wrong focal length cost",
    "intrinsics": "learned intrinsics: how near they come, by how much one turns",
    "storage": "reading from object storage, with latency and faults",
    "gpu": "every check and measurement that needs a GPU",
}
SETTINGS = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


def bench(
    context: typer.Context,
    what: Annotated[str, typer.Argument(metavar="WHAT", show_default=False, help="Measurement to run.")] = "--help",
) -> None:
    """Measure md2 on this machine. `md2 bench WHAT --help` shows the options."""
    if what in ("--help", "-h"):
        console.print(context.get_help(), markup=False, highlight=False)
        for name, about in WHAT.items():
            console.print(f"  {name:12}{about}", highlight=False, soft_wrap=True)
        raise typer.Exit
    if what not in WHAT:
        near = difflib.get_close_matches(what, WHAT, n=1)
        hint = f"; did you mean {near[0]}?" if near else f"; choose from {', '.join(WHAT)}"
        raise UsageError(f"md2 bench {what}: no such measurement{hint}")
    checkout = Path(__file__).resolve().parents[1]
    if not (checkout / "bench" / "__init__.py").is_file():
        raise UsageError(f"md2 bench {what}: the measurements are not installed; run it from a checkout of md2")
    sys.path.insert(0, str(checkout))
    sys.argv = [f"md2 bench {what}", *context.args]
    try:
        module = import_module(f"bench.{what}")
    except ModuleNotFoundError as error:
        raise UsageError(f"md2 bench {what} needs {error.name}: pip install -e '.[dev]'") from error
    raise typer.Exit(module.main() or 0)
