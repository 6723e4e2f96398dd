"""The curves of a run: which logged numbers belong in one plot, and how matplotlib draws it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Curve:
    """A plot: label -> (step, value) points.

    Attributes:
        from_zero: the value axis starts at 0.
        share: values are shares, so the axis ends at 0 and 1.
    """

    title: str
    series: Mapping[str, Sequence[tuple[float, float]]]
    from_zero: bool = False
    share: bool = False


def curves_of(lines: Sequence[dict[str, Any]]) -> list[Curve]:
    """Return the plots of a run's metrics.jsonl; a plot without a point is left out."""
    train = [line for line in lines if line.get("kind") == "train"]
    val = [line for line in lines if line.get("kind") == "val"]
    scales = sorted({name for line in train for name in line if name.startswith("loss/")})
    within = (("1.25 (a1)", "a1"), ("1.25² (a2)", "a2"), ("1.25³ (a3)", "a3"))
    wanted = [
        ("Loss", [("training", train, "loss"), ("validation", val, "loss")]),
        ("Loss per scale", [(f"scale {name.removeprefix('loss/')}", train, name) for name in scales]),
        ("Depth error", [(name, val, name) for name in ("abs_rel", "rmse_log")]),
        ("Share of pixels within a factor of the truth", [(label, val, name) for label, name in within]),
        ("Learned camera [pixels]", [(axis, train, f"camera/{axis}") for axis in ("fx", "fy", "cx", "cy")]),
        ("Learning rate", [("learning rate", train, "lr")]),
        ("Speed [images / s]", [("training", train, "images_per_second")]),
    ]
    curves = []
    for title, series in wanted:
        drawn = {
            label: points
            for label, source, name in series
            if (points := [(line["step"], line[name]) for line in source if line.get(name) is not None])
        }
        if drawn:
            curves.append(Curve(title, drawn, title.startswith(("Learning", "Speed")), title.startswith("Share")))
    return curves


def draw(axes: Any, curve: Curve) -> None:
    """Draw a plot on matplotlib axes."""
    for label, points in curve.series.items():
        steps, values = zip(*points, strict=True)
        axes.plot(steps, values, linewidth=1.6, marker="o" if len(points) < 25 else "", markersize=3, label=label)
    axes.set_title(curve.title, loc="left", fontsize=9.5, fontweight="bold")
    axes.set_xlabel("step", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 4))
    axes.yaxis.get_offset_text().set_fontsize(8)
    axes.margins(y=0.15)
    if curve.from_zero:
        axes.set_ylim(bottom=0)
    if curve.share:
        axes.set_ylim(0, 1.02)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
