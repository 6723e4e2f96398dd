"""A run as one HTML page that needs nothing else: no network, no other file.

    write_report(Path("runs/mono"), Path("runs/mono/report.html"))

It holds the numbers beside the published ones, curves, panels of target / warped / disparity / mask, the worst and
best images, the configuration and the dataset's card. `page.html` beside this module is its template.
"""

from __future__ import annotations

import base64
import io
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from md2.checkpoint import resolve
from md2.config import Config, load_config
from md2.evaluation.collectors import WorstAndBest
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
from md2.inference.inputs import Progress
from md2.inference.predictor import DeviceChoice, load
from md2.training.curves import Curve, curves_of, draw
from md2.training.runlog import ENVIRONMENT, read_metrics
from md2.visualize import Picture, require_writable, write_file
from shards.dataset import LocalDataset, open_dataset
from shards.errors import InputError, Md2Error, first_line, visible
from shards.manifest import CARD

LOWER_IS_BETTER = ("abs_rel", "sq_rel", "rmse", "rmse_log")
MOST_BYTES = 16 << 20
"""Size up to which a dataset's card and a run's environment are shown."""
PANEL_WIDTH = 1600
"""Wider panels are scaled down."""
PANELS_SHOWN = 3
"""First, middle and last of each kind."""


@dataclass(frozen=True)
class Figure:
    """A JPEG with its size and caption; `columns` are the headings of its equally wide columns."""

    jpeg: bytes
    width: int
    height: int
    caption: str
    columns: Sequence[str] = ()


@dataclass(frozen=True)
class Measured:
    """The evaluation of a report, with its picture."""

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
    device: DeviceChoice = "auto",
    progress: Progress = lambda done, total: None,
) -> list[str]:
    """Write the page.

    Args:
        dataset: dataset to measure on; None: the run's own.
        part: its part; None: `test`, else `val`.
        limit: measure on the first images only, this number; None: on all.
        measure: False: show only what the run has logged.

    Returns:
        What is missing from the page, and why; the page says so too.

    Raises:
        InputError: no run there, or the page cannot be written.
    """
    require_writable(out)
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
    page = _render(
        title=run.resolve().name,
        subtitle=_subtitle(config, lines),
        facts=_facts(config, lines),
        metrics=METRICS,
        lower_is_better=LOWER_IS_BETTER,
        table=_table(lines, measured),
        table_note=_table_note(measured),
        curves=[(curve, _svg(curve)) for curve in curves_of(lines)],
        panels=_panels(run, _columns(config), notes),
        extremes=_figure(measured.sheet, f"Measured on {measured.where}.") if measured is not None else None,
        settings=_settings(config),
        card=_card(opened),
        environment=_environment(run),
        notes=[*notes, *(measured.warnings if measured is not None else [])],
    )
    write_file(out, page.encode(errors="replace"))
    return notes


def _render(**parts: Any) -> str:
    """Fill the template; every text is escaped, and its unseen characters are written out."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup, escape

    def shown(value: Any) -> Any:
        return value if hasattr(value, "__html__") else escape(visible(str(value)))

    environment = Environment(
        loader=PackageLoader("md2.report", ""), autoescape=True, undefined=StrictUndefined, finalize=shown
    )
    environment.filters["base64"] = lambda data: base64.b64encode(data).decode()
    environment.filters["markdown"] = lambda text: Markup(_markdown(text))
    environment.filters["plain"] = _plain
    return environment.get_template("page.html").render(**parts)


def _markdown(text: str) -> str:
    """A card as HTML. It comes from whoever packed the dataset: tags are shown as text, links not followed."""
    from markdown_it import MarkdownIt

    plain = MarkdownIt("commonmark", {"html": False}).enable("table").disable(["link", "autolink", "image"])
    rendered: str = plain.render("\n".join(visible(line) for line in text.splitlines()))
    return rendered


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {inner}" for name, inner in value.items())
    if isinstance(value, list):
        return shlex.join(str(word) for word in value)
    return "" if value is None else str(value)


def _svg(curve: Curve) -> bytes:
    """Draw one plot. As an image of its own, its element ids cannot clash with another's."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure as Canvas

    with matplotlib.rc_context({"svg.fonttype": "none", "font.family": "sans-serif", "svg.hashsalt": "md2"}):
        figure = Canvas(figsize=(4.6, 2.9), layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure.add_subplot(), curve)
        if len(curve.series) > 1:
            figure.legend(loc="outside lower center", ncols=len(curve.series), frameon=False, fontsize=8)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def _measure(
    run: Path, dataset: LocalDataset, part: str | None, limit: int | None, device: DeviceChoice, progress: Progress
) -> Measured:
    predictor = load(resolve(run), device)
    chosen = choose_part(dataset.manifest, part)
    protocol = choose_protocol(dataset.manifest)
    scaling, warnings = choose_scaling(predictor.metres_per_unit)
    collected = WorstAndBest(protocol)
    total = dataset.manifest.samples(chosen)
    total = min(total, limit or total)
    done = 0

    def batches() -> Any:
        nonlocal done
        for batch in evaluation_batches(dataset, chosen, predictor, limit=limit):
            yield batch
            done += batch.size
            progress(done, total)

    evaluation = evaluate(network_disparity(predictor), batches(), protocol, scaling, [collected])
    how = "median scaling" if scaling == "median" else f"metric, {scaling:g} m per unit"
    cut = f"first {total} images" if total < dataset.manifest.samples(chosen) else f"{total} images"
    where = f"{dataset.manifest.split.name} {chosen}, {cut}, crop {protocol.crop}, {how}"
    whole = not dataset.manifest.skipped and total == dataset.manifest.samples(chosen)
    return Measured(
        evaluation,
        where,
        comparable=dataset.manifest.split.name == "eigen" and whole,
        warnings=[*warnings, *dataset_warnings(dataset.manifest, protocol, predictor)],
        sheet=collected.picture(""),
    )


def _subtitle(config: Config, lines: list[dict[str, Any]]) -> str:
    modes = [*(["mono"] if config.data.temporal else []), *(["stereo"] if config.data.stereo else [])]
    step = max((line["step"] for line in lines), default=0)
    size = f"{config.data.width}x{config.data.height}"
    return f"{' + '.join(modes)}, {config.model.encoder}, {size}, {step:,} steps"


def _facts(config: Config, lines: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """The few numbers that a reader looks for first."""
    found = []
    scored = [line for line in _of(lines, "val") if line.get("abs_rel") is not None]
    if scored:
        best = min(scored, key=lambda line: line["abs_rel"])
        found.append(("best validation abs_rel", f"{best['abs_rel']:.3f}"))
        found.append(("reached at step", f"{best['step']:,}"))
    trained = _of(lines, "train")
    losses = [line["loss"] for line in trained if isinstance(line.get("loss"), int | float)]
    if losses:
        found.append(("last training loss", f"{losses[-1]:.4f}"))
    if trained:
        rates = [line["images_per_second"] for line in trained if line.get("images_per_second") is not None]
        waits = [line["data_wait"] for line in trained if line.get("data_wait") is not None]
        if rates:
            found.append(("images / s, median", f"{np.median(rates):.1f}"))
        if waits:
            found.append(("waiting for data", f"{100 * float(np.median(waits)):.1f} %"))
    unit = config.metres_per_unit
    found.append(("one unit of depth is", "unknown (one camera)" if unit is None else f"{unit:g} m"))
    return found


def _table(lines: list[dict[str, Any]], measured: Measured | None) -> list[tuple[str, dict[str, float], bool]]:
    """Rows (name, metrics, published): the measurement, the run's own best validation, the paper."""
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


def _of(lines: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [line for line in lines if line.get("kind") == kind]


def _columns(config: Config) -> list[str]:
    """Headings of a panel's columns (`md2.training.panels.panel`)."""
    sources = [f"frame {offset:+d}" for offset in config.data.temporal] + ["other camera"] * config.data.stereo
    masks = [] if config.loss.disable_automasking else ["auto-mask"]
    if config.loss.predictive_mask:
        masks = [f"mask of {source}" for source in sources]
    return ["target", *(f"{source}, warped" for source in sources), "disparity", *masks]


def _panels(run: Path, columns: list[str], notes: list[str]) -> list[Figure]:
    """First, middle and last panel of validation and of training, latest first; unreadable ones go into `notes`."""
    figures = []
    for kind, label in (("val", "Validation"), ("train", "Training")):
        files = sorted(path for path in (run / "panels").glob(f"{kind}-*.png") if path.is_file())
        places = sorted({0, len(files) // 2, len(files) - 1})[-PANELS_SHOWN:] if files else []
        for place in reversed(places):
            step = files[place].stem.rpartition("-")[2]
            try:
                with Image.open(files[place]) as image:
                    picture: Picture = np.asarray(image.convert("RGB"))
            except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
                notes.append(f"{files[place].name} is left out: it cannot be read ({first_line(error)})")
                continue
            shown = f"{int(step):,}" if step.isdecimal() else step
            figures.append(replace(_figure(picture, f"{label}, step {shown}"), columns=columns))
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
    if not path.is_file() or path.stat().st_size > MOST_BYTES:
        return None
    return path.read_text(encoding="utf-8", errors="replace")


def _environment(run: Path) -> dict[str, Any]:
    path = run / ENVIRONMENT
    try:
        small = path.is_file() and path.stat().st_size <= MOST_BYTES
        found = json.loads(path.read_text(encoding="utf-8")) if small else {}
    except (OSError, ValueError, RecursionError):
        return {"unreadable": str(path)}
    return found if isinstance(found, dict) else {"unreadable": str(path)}
