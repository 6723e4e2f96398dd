"""`RUN/summary.png`: a run at a glance, curves above and its last sample panels below."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from md2.training.runlog import read_metrics

SUMMARY = "summary.png"


def run_figure(run: Path) -> Path | None:
    """Draw the curves of metrics.jsonl and the newest training and validation panels.

    Returns the picture's path; None if the run has logged nothing yet.
    """
    lines = read_metrics(run)
    if not lines:
        return None
    # matplotlib takes a second to import; only the end of a run needs it. The object API keeps
    # pyplot's global state (and any display) out of a training process.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = [found for kind in ("train", "val") if (found := _newest_panel(run, kind)) is not None]
    figure = Figure(figsize=(12, 3.4 + sum(_inches(panel) for _, panel in panels)), layout="constrained")
    FigureCanvasAgg(figure)
    heights = [3.4, *(_inches(panel) for _, panel in panels)]
    grid = figure.add_gridspec(1 + len(panels), 3, height_ratios=heights)
    _curve(figure.add_subplot(grid[0, 0]), lines, "loss", [("train", "loss"), ("val", "loss")])
    _curve(figure.add_subplot(grid[0, 1]), lines, "depth error", [("val", "abs_rel"), ("val", "rmse_log")])
    _curve(figure.add_subplot(grid[0, 2]), lines, "a1 (share within 25 %)", [("val", "a1")])
    for row, (name, picture) in enumerate(panels, start=1):
        axes = figure.add_subplot(grid[row, :])
        axes.imshow(picture)
        axes.set_title(f"{name}: target, warped sources, disparity, mask", fontsize=9, loc="left")
        axes.axis("off")
    figure.suptitle(run.name, fontsize=11)
    beside = run / (SUMMARY + ".tmp")
    figure.savefig(beside, format="png", dpi=110)
    beside.replace(run / SUMMARY)
    return run / SUMMARY


def _curve(axes: Any, lines: list[dict[str, Any]], title: str, series: list[tuple[str, str]]) -> None:
    for kind, name in series:
        points = [(line["step"], line[name]) for line in lines if line["kind"] == kind and line.get(name) is not None]
        if points:
            steps, values = zip(*points, strict=True)
            axes.plot(steps, values, marker="o" if len(points) < 30 else "", markersize=3, label=f"{kind} {name}")
    if axes.has_data():
        axes.legend(fontsize=8, frameon=False)
    else:
        axes.text(0.5, 0.5, "no ground truth in val", ha="center", va="center", transform=axes.transAxes, color="0.5")
    axes.set_title(title, fontsize=9, loc="left")
    axes.set_xlabel("step", fontsize=8)
    axes.grid(alpha=0.25)


def _newest_panel(run: Path, kind: str) -> tuple[str, np.ndarray[Any, np.dtype[np.uint8]]] | None:
    files = sorted((run / "panels").glob(f"{kind}-*.png"))
    if not files:
        return None
    with Image.open(files[-1]) as image:
        return files[-1].stem, np.asarray(image.convert("RGB"))


def _inches(panel: np.ndarray[Any, np.dtype[np.uint8]]) -> float:
    """Height at the figure's full width of 12 inches."""
    height, width = panel.shape[:2]
    return float(12 * height / width + 0.3)
