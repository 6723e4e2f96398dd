"""What `md2 bench parity` makes of its runs: verdicts, a table, a picture."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.plain import Setting
from shards.errors import InputError, first_line
from shards.files import open_regular

SETTINGS = {
    "stereo": Setting((0,), True),
    "mono": Setting((0, -1, 1), False, epochs=3, drop=2),
    "real": Setting((0,), True, epochs=10, drop=8, every=18),
}
REFERENCE = "reference"
SHARDS: dict[str, list[str]] = {
    "md2": [],
    "md2 png": ["--codec", "png"],
    "md2 jpeg 93 4:4:4": ["--quality", "93", "--chroma", "444"],
}
"""md2 from shards as prep packs them with these options."""
LARGEST = 16 << 20
"""Bytes that are read of the file of runs, thousands of which fit."""
SIGMAS, FLOOR = 2.5, 0.03
"""Worse is what lies above the reference by so many standard errors, and by this share of it."""


@dataclass(frozen=True)
class Verdict:
    """How one variant's abs_rel (or loss) compares with the reference's.

    Attributes:
        difference: of the means; positive is worse.
        error: its standard error.
        reference: the reference's mean.
    """

    difference: float
    error: float
    reference: float

    @classmethod
    def of(cls, ours: Sequence[float], theirs: Sequence[float]) -> Verdict:
        """From the results of at least two runs each (Welch's standard error)."""
        error = math.sqrt(sum(statistics.variance(values) / len(values) for values in (ours, theirs)))
        reference = statistics.fmean(theirs)
        return cls(statistics.fmean(ours) - reference, error, reference)

    @property
    def sigmas(self) -> float:
        return self.difference / self.error if self.error else math.copysign(math.inf, self.difference)

    @property
    def worse(self) -> bool:
        """Measurably, and by more than trifles. What is not a number is worse than any."""
        return not (self.difference <= FLOOR * self.reference or self.sigmas <= SIGMAS)

    def __str__(self) -> str:
        share = 100 / self.reference
        word = "**worse**" if self.worse else "better" if self.sigmas < -SIGMAS else "no difference seen"
        return f"{share * self.difference:+.1f} ± {share * self.error:.1f} % | {self.sigmas:+.1f} | {word}"


def final(run: dict[str, Any], what: str = "abs_rel") -> float:
    """A run's result: its last evaluation, or the mean loss since the one before."""
    return float(run[what][-1])


def read_runs(path: Path) -> list[dict[str, Any]]:
    """Return the runs in a file of JSON lines; none if there is no file.

    Raises:
        InputError: it cannot be read, or a line is no run.
    """
    if not path.exists():
        return []
    try:
        with open_regular(path) as file:
            runs = [json.loads(line) for line in file.read(LARGEST).decode().splitlines()]
        for run in runs:
            if not all(key in run for key in ("setting", "variant", "seed", "steps")):
                raise ValueError("a line is no run")
            final(run), final(run, "loss")
    except (OSError, ValueError, TypeError, LookupError, RecursionError) as error:
        raise InputError(f"{path}: damaged ({first_line(error)}); remove it to train again") from error
    return runs


def by_variant(runs: Sequence[dict[str, Any]], setting: str) -> dict[str, list[dict[str, Any]]]:
    """Variant -> its runs, the reference first."""
    found: dict[str, list[dict[str, Any]]] = {REFERENCE: []}
    for run in runs:
        if run["setting"] == setting:
            found.setdefault(run["variant"], []).append(run)
    return {variant: lines for variant, lines in found.items() if len(lines) > 1}


def verdicts(runs: Sequence[dict[str, Any]], setting: str, what: str = "abs_rel") -> dict[str, Verdict]:
    """Variant -> how its abs_rel (or loss) compares, for all with at least two runs beside two of the reference."""
    found = by_variant(runs, setting)
    if REFERENCE not in found:
        return {}
    results = {variant: [final(run, what) for run in lines] for variant, lines in found.items()}
    theirs = results.pop(REFERENCE)
    return {variant: Verdict.of(ours, theirs) for variant, ours in results.items()}


def table(runs: Sequence[dict[str, Any]]) -> str:
    """Markdown: each variant's result over its seeds, and its verdict."""
    lines = []
    for setting in dict.fromkeys(run["setting"] for run in runs):
        shown, found = SETTINGS[setting], by_variant(runs, setting)
        scaled = "in its own metres" if shown.stereo else "median-scaled"
        steps = next(iter(found.values()))[0]["steps"][-1] if found else 0
        lines += [
            f"**{setting}**: {shown.size[0]}x{shown.size[1]}, batch {shown.batch}, {steps} steps, Adam {shown.rate:g}, "
            f"a tenth of it after epoch {shown.drop} of {shown.epochs}, widths 1/{shown.narrow}; abs_rel {scaled}",
            "",
            "| | seeds | abs_rel | loss | abs_rel against the reference | in standard errors | |",
            "|---|---|---|---|---|---|---|",
        ]
        judged = verdicts(runs, setting)
        for variant, group in found.items():
            cells = []
            for what, digits in (("abs_rel", 4), ("loss", 5)):
                values = [final(run, what) for run in group]
                cells.append(f"{statistics.fmean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}")
            verdict = judged.get(variant, " | |")
            lines.append(f"| {variant} | {len(group)} | {' | '.join(cells)} | {verdict} |")
        lines.append("")
    return "\n".join(lines)


def picture(runs: Sequence[dict[str, Any]], path: Path) -> None:
    """Curves of the reference and md2 (mean, and a band of one standard deviation), and each difference."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    settings = [name for name in dict.fromkeys(run["setting"] for run in runs) if by_variant(runs, name)]
    figure = Figure(figsize=(13, 3.6 * len(settings)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(settings), 3, squeeze=False)
    for row, setting in zip(axes, settings, strict=True):
        found = by_variant(runs, setting)
        for axis, what in zip(row, ("abs_rel", "loss"), strict=False):
            for variant in (REFERENCE, *SHARDS):
                if variant not in found:
                    continue
                curves = np.array([run[what] for run in found[variant]])
                steps, mean, spread = found[variant][0]["steps"], curves.mean(0), curves.std(0, ddof=1)
                axis.plot(steps, mean, label=f"{variant}, {len(curves)} seeds")
                axis.fill_between(steps, mean - spread, mean + spread, alpha=0.2)
            axis.set(title=f"{setting}: {what}", xlabel="step")
            axis.legend()
        judged = verdicts(runs, setting)
        percent = [(100 * v.difference / v.reference, 200 * v.error / v.reference) for v in judged.values()]
        row[2].errorbar(
            [middle for middle, _ in percent], range(len(judged)), xerr=[twice for _, twice in percent], fmt="o"
        )
        row[2].set_yticks(range(len(judged)), list(judged))
        row[2].axvline(0, color="grey", linewidth=0.8)
        row[2].set(title=f"{setting}: abs_rel, % (± 2 standard errors)")
        row[2].invert_yaxis()
    figure.savefig(path, dpi=80)
