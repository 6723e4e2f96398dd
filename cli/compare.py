"""`md2 compare`: runs side by side, with mean and standard deviation over seeds."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from cli.console import console, say
from shards.errors import InputError, visible


def compare(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="Run folders, or files of md2 eval --json.")],
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the numbers as JSON.")] = None,
    png: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a picture with error bars.")] = None,
) -> None:
    """Compare runs. Those that differ in the seed alone are averaged, with their standard deviation."""
    if missing := [run for run in runs if not Path(run).exists()]:
        raise InputError(f"{missing[0]}: no such run folder, or file of md2 eval --json")

    from md2.report.compare import compare as grouped
    from md2.report.compare import picture, to_json
    from md2.visualize import require_writable, write_file

    for path in (json_file, png):
        if path is not None:
            require_writable(path)
    groups = grouped(runs)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("", overflow="fold")
    table.add_column("runs", justify="right")
    names = list(groups[0].means)
    shown = [name for name in ("abs_rel", "sq_rel", "rmse", "a1") if name in names]
    for name in shown:
        table.add_column(name, justify="right", no_wrap=True)
    for group in groups:
        cells = [_cell(group.means[name], group.deviations[name]) for name in shown]
        table.add_row(Text(visible(group.name)), str(group.runs), *cells)
    console.print(table)
    if any(group.runs > 1 for group in groups):
        say("mean ± standard deviation over the runs of a line")
    if json_file is not None:
        write_file(json_file, to_json(groups).encode())
        say(f"wrote {json_file}")
    if png is not None:
        write_file(png, picture(groups))
        say(f"wrote {png}")


def _cell(value: float, deviation: float) -> str:
    return f"{value:.3f}" if math.isnan(deviation) else f"{value:.3f} ± {deviation:.3f}"
