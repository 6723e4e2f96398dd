"""A run as one HTML page that needs nothing else: no network, no other file.

    write_report(Path("runs/mono"), Path("runs/mono/report.html"))

It holds the numbers beside the published ones, curves, panels of target / warped / disparity / mask, the worst and
best images, the configuration and the dataset's card.
"""

from __future__ import annotations

import io
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from md2.checkpoint import resolve
from md2.config import Config, load_config
from md2.evaluation.evaluate import (
    Evaluation,
    choose_part,
    choose_protocol,
    choose_scaling,
    dataset_warnings,
    evaluate,
    evaluation_batches,
    network_disparity,
)
from md2.evaluation.metrics import METRICS
from md2.evaluation.run import published_rows
from md2.evaluation.sheets import Extremes
from md2.inference.output import Progress
from md2.inference.predictor import Device, load
from md2.report.page import Curve, Figure, Page, render
from md2.training.runlog import ENVIRONMENT, read_metrics
from md2.visualize import Picture, write_file
from shards.dataset import LocalDataset, open_dataset
from shards.errors import InputError, Md2Error
from shards.manifest import CARD

PANEL_WIDTH = 1600
"""Wider panels are scaled down."""
PANELS_SHOWN = 3
"""First, middle and last of each kind."""


@dataclass(frozen=True)
class Measured:
    """The evaluation that a report makes, with its picture."""

    evaluation: Evaluation
    where: str
    comparable: bool
    warnings: list[str]
    sheet: Picture


def write_report(
    run: Path,
    out: Path,
    *,
    dataset: str | None = None,
    part: str | None = None,
    limit: int | None = 100,
    measure: bool = True,
    device: Device = "auto",
    progress: Progress = lambda done, total: None,
) -> list[str]:
    """Write the page.

    Args:
        dataset: to measure on; None: the run's own. Its part `test`, else `val`, unless `part` names another.
        limit: at most so many images are measured; None: all.
        measure: False: only what the run has logged.

    Returns:
        What could not be shown, and why; it stands in the page too.

    Raises:
        InputError: no run there, or the page cannot be written.
    """
    if not (run / "config.yaml").is_file():
        raise InputError(f"{run}: no run there (config.yaml is missing)")
    config = load_config(run / "config.yaml")
    lines = read_metrics(run)
    notes: list[str] = []
    opened: LocalDataset | None = None
    measured: Measured | None = None
    try:
        opened = open_dataset(dataset or config.data.url)
        if measure:
            measured = _measure(run, opened, part, limit, device, progress)
    except Md2Error as error:
        notes.append(f"not measured: {error}" if opened is not None else f"the dataset cannot be shown: {error}")
    page = Page(
        title=run.resolve().name,
        subtitle=_subtitle(config, lines),
        facts=_facts(run, config, lines),
        table=_table(run, config, lines, measured),
        table_note=_table_note(measured),
        curves=curves_of(lines),
        panels=_panels(run, _columns(config)),
        extremes=_figure(measured.sheet, f"Measured on {measured.where}.") if measured is not None else None,
        config=_settings(config),
        card=_card(opened),
        environment=_environment(run),
        notes=[*notes, *(measured.warnings if measured is not None else [])],
    )
    write_file(out, render(page).encode())
    return notes


def _measure(
    run: Path, dataset: LocalDataset, part: str | None, limit: int | None, device: Device, progress: Progress
) -> Measured:
    predictor = load(resolve(run), device)
    chosen = choose_part(dataset.manifest, part)
    protocol = choose_protocol(dataset.manifest)
    scaling, warnings = choose_scaling(predictor.metres_per_unit)
    extremes = Extremes(protocol)
    total = dataset.manifest.samples(chosen)
    total = min(total, limit or total)
    done = 0

    def batches() -> Any:
        nonlocal done
        for batch in evaluation_batches(dataset, chosen, predictor, limit=limit):
            yield batch
            done += batch.size
            progress(done, total)

    evaluation = evaluate(network_disparity(predictor), batches(), protocol, scaling, [extremes])
    how = "median scaling" if scaling == "median" else f"metric, {scaling:g} m per unit"
    cut = f"first {total} images" if total < dataset.manifest.samples(chosen) else f"{total} images"
    where = f"{dataset.manifest.split.name} {chosen}, {cut}, crop {protocol.crop}, {how}"
    whole = not dataset.manifest.skipped and total == dataset.manifest.samples(chosen)
    return Measured(
        evaluation,
        where,
        comparable=dataset.manifest.split.name == "eigen" and whole,
        warnings=[*warnings, *dataset_warnings(dataset.manifest, protocol, predictor)],
        sheet=extremes.picture(""),
    )


def _subtitle(config: Config, lines: list[dict[str, Any]]) -> str:
    modes = [*(["mono"] if config.data.temporal else []), *(["stereo"] if config.data.stereo else [])]
    step = max((line["step"] for line in lines), default=0)
    size = f"{config.data.width}x{config.data.height}"
    return f"{' + '.join(modes)}, {config.model.encoder}, {size}, {step:,} steps"


def _facts(run: Path, config: Config, lines: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """The few numbers that a reader looks for first."""
    found = []
    scored = [line for line in _of(lines, "val") if line.get("abs_rel") is not None]
    if scored:
        best = min(scored, key=lambda line: line["abs_rel"])
        found.append(("best validation abs_rel", f"{best['abs_rel']:.3f}"))
        found.append(("reached at step", f"{best['step']:,}"))
    trained = _of(lines, "train")
    if trained:
        found.append(("last training loss", f"{trained[-1]['loss']:.4f}"))
        rates = [line["images_per_second"] for line in trained if line.get("images_per_second") is not None]
        waits = [line["data_wait"] for line in trained if line.get("data_wait") is not None]
        if rates:
            found.append(("images / s, median", f"{np.median(rates):.1f}"))
        if waits:
            found.append(("waiting for data", f"{100 * float(np.median(waits)):.1f} %"))
    unit = config.metres_per_unit
    found.append(("depth unit", "unknown" if unit is None else f"{unit:g} m"))
    return found


def _table(
    run: Path, config: Config, lines: list[dict[str, Any]], measured: Measured | None
) -> list[tuple[str, dict[str, float], bool]]:
    """(name, metrics, published) rows: what was measured, the run's own best validation, the paper."""
    rows: list[tuple[str, dict[str, float], bool]] = []
    if measured is not None:
        rows.append((f"this run, {measured.where}", measured.evaluation.metrics, False))
    scored = [line for line in _of(lines, "val") if all(line.get(name) is not None for name in METRICS)]
    if scored:
        best = min(scored, key=lambda line: float(line["abs_rel"]))
        rows.append(
            (f"this run, best validation (step {best['step']:,})", {name: best[name] for name in METRICS}, False)
        )
    return [*rows, *((name, metrics, True) for name, metrics in published_rows().items())]


def _table_note(measured: Measured | None) -> str:
    if measured is not None and measured.comparable:
        return "Measured on all of Eigen's test images, as the published rows were."
    return (
        "The published rows (Godard et al., ICCV 2019, table 1) are over Eigen's 697 test images; this run's are over "
        "other images, so compare orders of magnitude and not digits."
    )


def curves_of(lines: list[dict[str, Any]]) -> list[Curve]:
    train, val = _of(lines, "train"), _of(lines, "val")
    scales = sorted({name for line in train for name in line if name.startswith("loss/")})
    wanted = [
        ("Loss", [("training", train, "loss"), ("validation", val, "loss")]),
        ("Loss per scale", [(f"scale {name.removeprefix('loss/')}", train, name) for name in scales]),
        ("Depth error", [(name, val, name) for name in ("abs_rel", "rmse_log")]),
        ("Pixels within a factor", [(label, val, name) for label, name in _THRESHOLDS]),
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
            curves.append(Curve(title, drawn, from_zero=title.startswith(("Learning", "Speed"))))
    return curves


_THRESHOLDS = (("1.25 (a1)", "a1"), ("1.25² (a2)", "a2"), ("1.25³ (a3)", "a3"))


def _of(lines: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [line for line in lines if line.get("kind") == kind]


def _columns(config: Config) -> list[str]:
    """What the columns of a panel are (`md2.training.panels.panel`)."""
    sources = [f"frame {offset:+d}" for offset in config.data.temporal] + ["other camera"] * config.data.stereo
    masks = [] if config.loss.disable_automasking else ["auto-mask"]
    if config.loss.predictive_mask:
        masks = [f"mask of {source}" for source in sources]
    return ["target", *(f"{source}, warped" for source in sources), "disparity", *masks]


def _panels(run: Path, columns: list[str]) -> list[Figure]:
    """First, middle and last panel of training and of validation, latest first."""
    figures = []
    for kind, label in (("val", "Validation"), ("train", "Training")):
        files = sorted((run / "panels").glob(f"{kind}-*.png"))
        places = sorted({0, len(files) // 2, len(files) - 1})[-PANELS_SHOWN:] if files else []
        for place in reversed(places):
            step = int(files[place].stem.rpartition("-")[2])
            try:
                with Image.open(files[place]) as image:
                    picture: Picture = np.asarray(image.convert("RGB"))
            except OSError as error:
                raise InputError(f"{files[place]}: cannot be read ({error}); delete it and try again") from error
            figures.append(replace(_figure(picture, f"{label}, step {step:,}"), columns=columns))
    return figures


def _figure(picture: Picture, caption: str) -> Figure:
    """As JPEG, no wider than a page."""
    image = Image.fromarray(picture)
    if image.width > PANEL_WIDTH:
        height = round(image.height * PANEL_WIDTH / image.width)
        image = image.resize((PANEL_WIDTH, height), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "jpeg", quality=90)
    return Figure(buffer.getvalue(), image.width, image.height, caption)


def _settings(config: Config) -> dict[str, list[tuple[str, str, bool]]]:
    """Section -> (key, value, changed from the default)."""
    default = Config().model_dump(mode="json")
    return {
        section: [(key, str(value), value != default[section][key]) for key, value in values.items()]
        for section, values in config.model_dump(mode="json").items()
    }


def _card(dataset: LocalDataset | None) -> str | None:
    """The dataset's README, Markdown."""
    if dataset is None:
        return None
    path = dataset.folder / CARD
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None


def _environment(run: Path) -> dict[str, Any]:
    path = run / ENVIRONMENT
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except json.JSONDecodeError:
        return {"unreadable": str(path)}
    return found if isinstance(found, dict) else {"unreadable": str(path)}
