"""Writes a run as one HTML page that needs no network and no other file.

    write_report(Path("runs/mono"), Path("runs/mono/report.html"))

The page shows the numbers beside the published ones, curves, panels of target / warped / disparity / mask, the worst
and best images, a few with the depth under the pointer and a point cloud, the configuration and the dataset's card.
`page.html` beside this module is its template.
"""

from __future__ import annotations

import base64
import io
import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import escape
from PIL import Image
from torch import Tensor

from md2.checkpoint import resolve
from md2.config import Config, load_config
from md2.data.batch import Batch
from md2.evaluation.evaluate import choose_part
from md2.evaluation.metrics import METRICS, BatchMetrics
from md2.evaluation.run import EvalOptions, EvalReport, measure, published_rows
from md2.inference.inputs import Progress
from md2.inference.predictor import DepthMap, DeviceChoice, load
from md2.inference.viewer import Viewer, script
from md2.training.curves import Curve, curves_of, draw
from md2.training.runlog import ENVIRONMENT, read_metrics
from md2.visualize import Picture, open_picture, require_writable, write_file
from shards.card import without_front_matter
from shards.dataset import LocalDataset, open_dataset
from shards.errors import InputError, Md2Error, visible
from shards.manifest import CARD

LOWER_IS_BETTER = ("abs_rel", "sq_rel", "rmse", "rmse_log")
MOST_BYTES = 16 << 20
"""Largest dataset card or environment file that is shown."""
VIEWED = 6
"""Images with the depth under the pointer and a point cloud."""
PANEL_WIDTH = 1600
"""Wider panels are scaled down."""


@dataclass(frozen=True)
class Figure:
    """A JPEG with its size and caption."""

    jpeg: bytes
    width: int
    height: int
    caption: str


def write_report(
    run: Path,
    out: Path,
    *,
    dataset: str | None = None,
    part: str | None = None,
    limit: int | None = 100,
    evaluate: bool = True,
    device: DeviceChoice = "auto",
    progress: Progress = lambda done, total: None,
) -> list[str]:
    """Write the page.

    Args:
        dataset: dataset to measure on; None: the run's own.
        part: its part; None: `test`, else `val`.
        limit: measure on the first images only, this number; None: on all.
        evaluate: False shows only the figures that the run has logged.

    Returns:
        Notes on missing parts of the page, with the reasons; the page shows them too.

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
    measured: EvalReport | None = None
    viewer = Viewer(out, "magma", 80.0, VIEWED)
    url = dataset or config.data.url
    try:
        opened = open_dataset(url)
        if evaluate:
            chosen = choose_part(opened.manifest, part)
            name = f"{opened.manifest.split.name} {chosen}"
            # The sheet of worst and best images becomes a part of the page.
            options = EvalOptions(str(run), url, name, chosen, limit=limit, sheet=out)
            measured = measure(options, load(resolve(run), device), progress, [partial(_view, viewer)])
    except Md2Error as error:
        notes.append(f"not measured: {error}" if opened is not None else f"the dataset cannot be shown: {error}")
    page = _render(
        title=run.resolve().name,
        subtitle=_subtitle(config, lines),
        facts=_facts(config, lines),
        metrics=METRICS,
        lower_is_better=LOWER_IS_BETTER,
        table=_table(lines, measured),
        table_note=_table_note(opened, measured),
        curves=[(curve, _svg(curve)) for curve in curves_of(lines)],
        panels=_panels(run, notes),
        extremes=_figure(measured.worst_and_best.picture(), f"{measured.title}.") if measured is not None else None,
        viewer=escape(viewer.html()) if measured is not None else None,
        viewer_script=script()[1],
        settings=_settings(config),
        card=_card(opened),
        environment=_environment(run),
        notes=[*notes, *(measured.warnings if measured is not None else [])],
    )
    write_file(out, page.encode(errors="replace"))
    return notes


def _view(viewer: Viewer, batch: Batch, disparity: Tensor, scores: BatchMetrics) -> None:
    """Show images as they were measured: at the networks' size, depth in metres by the metrics' scale."""
    images = (batch.images[0].clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    for index in scores.pixels.nonzero()[:, 0].tolist():
        depth = (scores.ratios[index] / disparity[index, 0].float()).cpu().numpy()
        (fx, _, cx), (_, fy, cy), _ = batch.intrinsics[index].tolist()
        viewer.add(batch.keys[index], DepthMap(images[index], depth, "metres"), (fx, fy, cx, cy))


def _render(**parts: Any) -> str:
    """Fill the template; every text is escaped, and its invisible characters are spelled out."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

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
    """Render a card as HTML. It may come from a stranger, so tags become text, and links are not followed."""
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
    """Draw a plot as an image of its own, whose element ids cannot clash with another's."""
    import matplotlib
    from matplotlib.figure import Figure as Canvas

    with matplotlib.rc_context({"svg.fonttype": "none", "font.family": "sans-serif", "svg.hashsalt": "md2"}):
        figure = Canvas(figsize=(4.6, 2.9), layout="constrained")
        draw(figure.add_subplot(), curve)
        if len(curve.series) > 1:
            figure.legend(loc="outside lower center", ncols=len(curve.series), frameon=False, fontsize=8)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def _subtitle(config: Config, lines: list[dict[str, Any]]) -> str:
    modes = [*(["mono"] if config.data.temporal else []), *(["stereo"] if config.data.stereo else [])]
    step = max((line["step"] for line in lines), default=0)
    size = f"{config.data.width}x{config.data.height}"
    return f"{' + '.join(modes)}, {config.model.encoder}, {size}, {step:,} steps"


def _facts(config: Config, lines: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """The few numbers that a reader looks for first."""

    def logged(name: str) -> list[float]:
        return [line[name] for line in lines if line.get("kind") == "train" and line.get(name) is not None]

    found = []
    if (best := _best(lines)) is not None:
        found += [("best validation abs_rel", f"{best['abs_rel']:.3f}"), ("reached at step", f"{best['step']:,}")]
    if losses := logged("loss"):
        found.append(("last training loss", f"{losses[-1]:.4f}"))
    if rates := logged("images_per_second"):
        found.append(("images / s, median", f"{np.median(rates):.1f}"))
    if waits := logged("data_wait"):
        found.append(("waiting for data", f"{100 * float(np.median(waits)):.1f} %"))
    unit = config.metres_per_unit
    found.append(("one unit of depth is", "unknown (one camera)" if unit is None else f"{unit:g} m"))
    return found


def _best(lines: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The validation with the lowest abs_rel, of those with all metrics."""
    scored = (line for line in lines if line.get("kind") == "val")
    whole = [line for line in scored if all(line.get(name) is not None for name in METRICS)]
    return min(whole, key=lambda line: float(line["abs_rel"]), default=None)


def _table(lines: list[dict[str, Any]], measured: EvalReport | None) -> list[tuple[str, dict[str, float], bool]]:
    """Rows (name, metrics, published): the measurement, the run's own best validation, the paper."""
    rows: list[tuple[str, dict[str, float], bool]] = []
    if measured is not None:
        rows.append((f"this run, {measured.title}", measured.evaluation.metrics, False))
    if (best := _best(lines)) is not None:
        name = f"this run, best validation (step {best['step']:,})"
        rows.append((name, {metric: best[metric] for metric in METRICS}, False))
    return [*rows, *((name, metrics, True) for name, metrics in published_rows().items())]


def _table_note(dataset: LocalDataset | None, measured: EvalReport | None) -> str:
    if (
        dataset is not None
        and measured is not None
        and measured.published
        and not dataset.manifest.skipped
        and len(measured.evaluation.images) == dataset.manifest.samples(measured.about["part"])
    ):
        return "Measured on all of Eigen's test images, as the published rows were."
    return (
        "The published rows (Godard et al., ICCV 2019, table 1) are over Eigen's 697 test images. This run's are over "
        "other images, so compare orders of magnitude, not digits."
    )


def _panels(run: Path, notes: list[str]) -> list[Figure]:
    """First, middle and last panel of validation and of training, latest first; `notes` gets unreadable ones."""
    figures = []
    for kind, label in (("val", "Validation"), ("train", "Training")):
        files = sorted(path for path in (run / "panels").glob(f"{kind}-*.png") if path.is_file())
        places = sorted({0, len(files) // 2, len(files) - 1}) if files else []
        for place in reversed(places):
            step = files[place].stem.rpartition("-")[2]
            try:
                with open_picture(files[place], files[place].name) as image:
                    picture: Picture = np.asarray(image.convert("RGB"))
            except InputError as error:
                notes.append(f"a panel is not shown: {error}")
                continue
            shown = f"{int(step):,}" if step.isdecimal() else step
            figures.append(_figure(picture, f"{label}, step {shown}"))
    return figures


def _figure(picture: Picture, caption: str) -> Figure:
    """Encode as JPEG, no wider than a page."""
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
    return without_front_matter(path.read_text(encoding="utf-8", errors="replace"))


def _environment(run: Path) -> dict[str, Any]:
    path = run / ENVIRONMENT
    try:
        small = path.is_file() and path.stat().st_size <= MOST_BYTES
        found = json.loads(path.read_text(encoding="utf-8")) if small else {}
    except (OSError, ValueError, RecursionError):
        return {"unreadable": str(path)}
    return found if isinstance(found, dict) else {"unreadable": str(path)}
