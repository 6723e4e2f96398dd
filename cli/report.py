"""`md2 report`: a run as one HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli.console import Device, bars, say, warn
from shards.errors import InputError


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder.")],
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="File to write. (default: RUN/report.html)")] = None,
    dataset: Annotated[
        str | None, typer.Option(metavar="URL", help="Dataset to measure on. (default: the run's own)")
    ] = None,
    part: Annotated[
        str | None, typer.Option(metavar="PART", help="Part of the dataset to measure on. (default: test, else val)")
    ] = None,
    limit: Annotated[
        int, typer.Option(metavar="N", min=0, help="Measure on the first N images only; 0: on all.")
    ] = 100,
    evaluate: Annotated[
        bool, typer.Option("--eval/--no-eval", help="Measure the model, for the table and the worst images.")
    ] = True,
    device: Device = "auto",
) -> None:
    """Write a self-contained HTML page about a run.

    It shows numbers, curves, panels, the worst images, depth and point clouds, the configuration and the dataset.
    """
    if not (run / "config.yaml").is_file():
        raise InputError(f"{run}: no run there (config.yaml is missing)")

    from md2.config import load_config
    from shards.dataset import open_dataset

    if dataset is not None or part is not None:  # a mistake in the words, which costs no import of PyTorch
        manifest = open_dataset(dataset or load_config(run / "config.yaml").data.url).manifest
        if part is not None:
            manifest.part(part)

    from md2.report.build import write_report

    target = out or run / "report.html"
    with bars("images") as bar:
        notes = write_report(
            run,
            target,
            dataset=dataset,
            part=part,
            limit=limit or None,
            evaluate=evaluate,
            device=device,
            progress=bar("report"),
        )
    for note in notes:
        warn(f"warning: {note}")
    say(f"wrote {target}")
