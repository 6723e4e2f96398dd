"""`RUN/summary.png`: a run at a glance, curves above its newest panels; drawn after each validation and at the end."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from md2.training.curves import curves_of, draw
from md2.training.runlog import METRICS, read_metrics
from md2.visualize import Picture, open_picture
from shards.errors import InputError
from shards.files import temporary

SUMMARY = "summary.png"


def run_figure(run: Path) -> Path | None:
    """Draw the curves of metrics.jsonl and the newest training and validation panels, if anything is new.

    Returns the picture's path; None if the run has logged nothing yet.
    """
    lines = read_metrics(run)
    if not lines:
        return None
    drawn = run / SUMMARY
    if drawn.exists() and drawn.stat().st_mtime_ns > (run / METRICS).stat().st_mtime_ns:
        return drawn  # a run that ends with a validation has been drawn, which takes a second
    # matplotlib takes a second to import. The object API keeps pyplot's global state (and any display) out of a
    # training process.
    from matplotlib.figure import Figure

    panels = [found for kind in ("train", "val") if (found := _newest_panel(run, kind)) is not None]
    figure = Figure(figsize=(12, 3.4 + sum(_inches(panel) for _, panel in panels)), layout="constrained")
    heights = [3.4, *(_inches(panel) for _, panel in panels)]
    grid = figure.add_gridspec(1 + len(panels), 3, height_ratios=heights)
    curves = [curve for curve in curves_of(lines) if curve.title.startswith(("Loss", "Depth", "Share"))]
    for place, curve in enumerate(curve for curve in curves if curve.title != "Loss per scale"):
        axes = figure.add_subplot(grid[0, place])
        draw(axes, curve)
        if len(curve.series) > 1:
            axes.legend(fontsize=8, frameon=False)
    for row, (name, picture) in enumerate(panels, start=1):
        axes = figure.add_subplot(grid[row, :])
        axes.imshow(picture)
        kind, _, step = name.replace("val", "validation").replace("train", "training").partition("-")
        axes.set_title(f"{kind}, step {step.lstrip('0')}", fontsize=9, loc="left")
        axes.axis("off")
    figure.suptitle(f"{run.name}, step {lines[-1]['step']}", fontsize=11)
    beside = temporary(run / SUMMARY)
    figure.savefig(beside, format="png", dpi=110)
    beside.replace(drawn)
    return drawn


def _newest_panel(run: Path, kind: str) -> tuple[str, Picture] | None:
    """Its name and picture; panels that cannot be read are skipped."""
    for file in sorted((run / "panels").glob(f"{kind}-*.png"), reverse=True):
        try:
            with open_picture(file, str(file)) as image:
                return file.stem, np.asarray(image.convert("RGB"))
        except InputError:
            continue
    return None


def _inches(panel: Picture) -> float:
    """Height at the figure's full width of 12 inches."""
    height, width = panel.shape[:2]
    return float(12 * height / width + 0.3)
