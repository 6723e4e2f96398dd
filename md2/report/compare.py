"""Compares runs: mean and standard deviation over seeds, as text, JSON and a picture.

Runs whose configurations differ in nothing but `train.seed` form a group. A run's figures are those of its validation
with the least abs_rel (`metrics.jsonl`), or those of a file that `md2 eval RUN … --json FILE` wrote.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from md2.config import Config, load_config
from md2.evaluation.metrics import METRICS
from md2.training.runlog import read_metrics
from shards.errors import InputError, UsageError
from shards.files import read_small

_APART = (
    "train.seed",
    "data.url",
    "data.threads",
    "data.prefetch",
    "data.ahead",
    "train.log_every",
    "train.image_every",
)
"""Keys that do not make another experiment."""
_MOST_BYTES = 1 << 20


@dataclass(frozen=True)
class Measured:
    """One run's figures: metric -> value; `settings` by key, and the data that it was measured on."""

    name: str
    seed: int | None
    settings: dict[str, Any]
    data: str
    values: dict[str, float]


@dataclass(frozen=True)
class Group:
    """Runs that differ in the seed alone.

    Attributes:
        name: the keys in which the group differs from others, or the run's name if it is alone.
        runs: number of runs.
        means, deviations: metric -> mean and sample standard deviation; the latter NaN of one run.
        members: names of the runs.
    """

    name: str
    runs: int
    means: dict[str, float]
    deviations: dict[str, float]
    members: list[str]


def read_run(place: str) -> Measured:
    """Read the figures of a run folder, or of a file that `md2 eval --json` wrote.

    Raises:
        InputError: neither of them, or without figures.
    """
    path = Path(place)
    if path.is_dir():
        if not (path / "config.yaml").is_file():
            raise InputError(f"{place}: no run there (config.yaml is missing)")
        config = load_config(path / "config.yaml")
        rows = [row for row in read_metrics(path) if row.get("kind") == "val" and _number(row.get("abs_rel"))]
        if not rows:
            raise InputError(f"{place}: it has not been validated with ground truth; give the file of md2 eval --json")
        best = min(rows, key=lambda row: float(row["abs_rel"]))
        values = {name: float(best[name]) for name in METRICS if _number(best.get(name))}
        return Measured(path.resolve().name, config.train.seed, _settings(config), "validation", values)
    try:
        tree = json.loads(read_small(path, _MOST_BYTES))
        values = {name: float(tree["metrics"][name]) for name in METRICS}
        model, data = tree["model"], f"{tree.get('split')} {tree.get('part')}, {tree['scaling']}"
        further = {name: float(value) for name, value in tree.get("further", {}).items() if _number(value)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{place}: neither a run nor a file of md2 eval --json ({type(error).__name__})") from error
    folder = Path(str(model))
    folder = folder.parent.parent if folder.parent.name == "checkpoints" else folder
    if not (folder / "config.yaml").is_file():
        return Measured(path.stem, None, {"model": str(model)}, data, values | further)
    config = load_config(folder / "config.yaml")
    return Measured(folder.resolve().name, config.train.seed, _settings(config), data, values | further)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _settings(config: Config) -> dict[str, Any]:
    flat = {
        f"{section}.{key}": value
        for section, keys in config.model_dump(mode="json").items()
        for key, value in keys.items()
    }
    return {key: value for key, value in flat.items() if key not in _APART}


def compare(places: Sequence[str]) -> list[Group]:
    """Group runs by their configuration, in the order given.

    Raises:
        UsageError: they were measured on different data, or one is named twice.
        InputError: as `read_run`.
    """
    paths = [Path(place).resolve() for place in places]
    if repeated := [place for place, path in zip(places, paths, strict=True) if paths.count(path) > 1]:
        raise UsageError(f"{repeated[0]}: named twice, which would count as two runs")
    runs = [read_run(place) for place in places]
    if len({run.data for run in runs}) > 1:
        kinds = "; ".join(sorted({run.data for run in runs}))
        raise UsageError(f"the runs were measured on different data ({kinds}): measure all with md2 eval --json")
    keys = sorted({key for run in runs for key in run.settings})
    differing = [key for key in keys if len({json.dumps(run.settings.get(key)) for run in runs}) > 1]
    groups: dict[str, list[Measured]] = {}
    for run in runs:
        name = ", ".join(f"{key.rpartition('.')[2]}={run.settings.get(key)}" for key in differing)
        groups.setdefault(name, []).append(run)
    return [_group(name or members[0].name, members) for name, members in groups.items()]


def _group(name: str, members: list[Measured]) -> Group:
    names = [metric for metric in members[0].values if all(metric in run.values for run in members)]
    columns = {metric: [run.values[metric] for run in members] for metric in names}
    return Group(
        name if len(members) > 1 or "=" in name else members[0].name,
        len(members),
        {metric: mean(values) for metric, values in columns.items()},
        {metric: stdev(values) if len(values) > 1 else math.nan for metric, values in columns.items()},
        [run.name for run in members],
    )


def to_json(groups: Sequence[Group]) -> str:
    """Encode the groups; a deviation of one run is null."""
    tree = [
        {
            "name": group.name,
            "runs": group.members,
            "mean": group.means,
            "std": {name: value if math.isfinite(value) else None for name, value in group.deviations.items()},
        }
        for group in groups
    ]
    return json.dumps(tree, indent=1) + "\n"


def picture(groups: Sequence[Group], metrics: Sequence[str] = ("abs_rel", "rmse", "a1")) -> bytes:
    """Draw means with error bars of one standard deviation, a panel for each metric: PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 1.2 + 0.45 * len(groups)), layout="constrained")
    panels: Any = figure.subplots(1, len(metrics), sharey=True, squeeze=False)
    places = range(len(groups))
    for axes, metric in zip(panels[0], metrics, strict=True):
        spread = [0.0 if math.isnan(group.deviations[metric]) else group.deviations[metric] for group in groups]
        axes.errorbar([group.means[metric] for group in groups], places, xerr=spread, fmt="o", capsize=4, color="C0")
        better = "higher" if metric.startswith("a") and metric[1:].isdigit() else "lower"
        axes.set_title(f"{metric}{' [m]' * (metric in ('rmse', 'sq_rel'))} ({better} is better)")
        axes.grid(axis="x", alpha=0.3)
        axes.margins(y=0.2)
    panels[0][0].set_yticks(places, [f"{group.name} (n = {group.runs})" for group in groups])
    panels[0][0].invert_yaxis()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()
