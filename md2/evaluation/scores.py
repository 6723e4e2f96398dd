"""An evaluation as JSON, CSV and LaTeX."""

from __future__ import annotations

import csv
import io
import json
import math
from typing import Any

from md2.evaluation.evaluate import Evaluation
from md2.evaluation.metrics import METRICS


def to_dict(evaluation: Evaluation, **about: Any) -> dict[str, Any]:
    """Everything but the per-image scores; `about` (model, dataset, part ...) goes in first."""
    protocol = evaluation.protocol
    return {
        **about,
        "protocol": {
            "crop": protocol.crop,
            "min_depth": protocol.min_depth,
            "max_depth": protocol.max_depth,
            "cap_ground_truth": protocol.cap_ground_truth,
        },
        "scaling": evaluation.scaling,
        "images": len(evaluation.images),
        "images_without_ground_truth": len(evaluation.images) - len(evaluation.counted),
        "metrics": {name: _finite(value) for name, value in evaluation.metrics.items()},
        "scale_ratio": {"median": _finite(evaluation.ratio_median), "std": _finite(evaluation.ratio_spread)},
    }


def to_json(evaluation: Evaluation, **about: Any) -> str:
    """As `to_dict`; numbers that are not finite become null."""
    return json.dumps(to_dict(evaluation, **about), indent=1, allow_nan=False) + "\n"


def to_csv(evaluation: Evaluation) -> str:
    """One line per image, sorted by key: the seven metrics, scale factor, counted pixels; empty where none counted."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["key", *METRICS, "scale_ratio", "pixels"])
    for image in sorted(evaluation.images, key=lambda image: image.key):
        cells = [f"{value:.6g}" if math.isfinite(value) else "" for value in (*image.values, image.ratio)]
        writer.writerow([image.key, *cells, image.pixels])
    return buffer.getvalue()


def to_latex(name: str, metrics: dict[str, float]) -> str:
    """A table row as papers print it: name and the seven metrics, three decimals each."""
    safe = "".join("\\" + char if char in "_&%#$" else char for char in name)
    return " & ".join([safe, *(f"{metrics[metric]:.3f}" for metric in METRICS)]) + r" \\"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
