"""`md2 report`: a run as one HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from cli.console import console, errors, progress_bar


def report(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    out: Annotated[Path | None, typer.Option(help="File to write. (default: RUN/report.html)")] = None,
    dataset: Annotated[str | None, typer.Option(help="Measure on this one. (default: the run's own)")] = None,
    part: Annotated[str | None, typer.Option(help="Its part. (default: test, else val)")] = None,
    limit: Annotated[int, typer.Option(min=0, help="Measure on at most so many images; 0: all.")] = 100,
    evaluate: Annotated[
        bool, typer.Option("--eval/--no-eval", help="Measure, for the table and the worst images.")
    ] = True,
    device: Annotated[Literal["auto", "cpu", "gpu"], typer.Option()] = "auto",
) -> None:
    """Write a self-contained HTML page: numbers, curves, panels, worst images, configuration, dataset."""
    from md2.report.build import write_report

    target = out or run / "report.html"
    with progress_bar("image") as bar:
        task = bar.add_task("report", total=None, note="")

        def advance(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        notes = write_report(
            run,
            target,
            dataset=dataset,
            part=part,
            limit=limit or None,
            measure=evaluate,
            device=device,
            progress=advance,
        )
    for note in notes:
        errors.print(f"warning: {note}", style="yellow", highlight=False, markup=False, soft_wrap=True)
    console.print(f"wrote {target}", highlight=False, markup=False, soft_wrap=True)
