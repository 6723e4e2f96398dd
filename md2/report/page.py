"""The report's HTML: everything inline, nothing fetched, nothing that could run from a dataset's card."""

from __future__ import annotations

import base64
import io
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

LOWER_IS_BETTER = ("abs_rel", "sq_rel", "rmse", "rmse_log")

_STYLE = """
:root { color-scheme: light dark; --ink: #1d2430; --soft: #5b6677; --line: #dfe4ea; --wash: #f6f8fa;
  --paper: #fff; --link: #0b57d0; --note: #fff8e6; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ee; --soft: #a3adba; --line: #363c45; --wash: #1f242b; --paper: #14181d; --link: #8ab4f8;
    --note: #3a3115; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1180px; padding: 32px 28px 64px; color: var(--ink); background: var(--paper);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { margin: 0; font-size: 30px; letter-spacing: -0.01em; }
h2 { margin: 44px 0 12px; padding-bottom: 6px; border-bottom: 1px solid var(--line); font-size: 20px; }
h3 { font-size: 16px; margin: 22px 0 6px; }
.subtitle, figcaption, .note { color: var(--soft); }
.subtitle { margin: 4px 0 0; font-size: 16px; }
nav { margin: 14px 0 0; font-size: 14px; }
nav a { display: inline-block; margin-right: 16px; color: var(--link); text-decoration: none; }
.facts { display: flex; flex-wrap: wrap; gap: 12px; margin: 22px 0 0; padding: 0; }
.facts div { flex: 1 1 150px; padding: 12px 14px; background: var(--wash); border-radius: 8px; }
.facts dt { color: var(--soft); font-size: 13px; }
.facts dd { margin: 2px 0 0; font-size: 20px; font-variant-numeric: tabular-nums; }
.warning { margin: 14px 0 0; padding: 10px 14px; border-left: 4px solid #e3a008; background: var(--note); }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 6px 10px; border-bottom: 1px solid var(--line); text-align: right; }
th:first-child, td:first-child { text-align: left; }
thead th { color: var(--soft); font-weight: 600; font-size: 13px; white-space: nowrap; }
tr.own td { font-weight: 600; }
tr.published td { color: var(--soft); }
.scroll { overflow-x: auto; }
.curves { display: grid; grid-template-columns: repeat(auto-fill, minmax(340px, 1fr)); gap: 14px; }
.curves img, figure img { width: 100%; height: auto; display: block; }
figure { margin: 0 0 22px; }
.curves img { border-radius: 4px; background: #fff; }
.columns { display: flex; margin-bottom: 4px; color: var(--soft); font-size: 13px; }
.columns span { flex: 1 1 0; padding-left: 2px; }
figcaption { margin-top: 5px; font-size: 14px; }
pre { padding: 14px 16px; background: var(--wash); border-radius: 8px; overflow-x: auto;
  font-size: 13px; line-height: 1.45; }
.settings { display: grid; grid-template-columns: repeat(auto-fill, minmax(260px, 1fr)); gap: 4px 26px; }
.settings table { font-size: 13.5px; }
.settings td { padding: 3px 4px; overflow-wrap: anywhere; }
.settings tr.changed td { font-weight: 600; background: var(--note); }
.environment td { text-align: left; overflow-wrap: anywhere; }
.environment td:first-child { color: var(--soft); white-space: nowrap; }
.card h1 { font-size: 19px; margin: 14px 0 0; }
.card h2 { font-size: 16px; margin: 18px 0 6px; padding: 0; border: 0; }
.card { padding: 2px 18px; border: 1px solid var(--line); border-radius: 8px; overflow-x: auto; }
.card th, .card td { text-align: left; }
@media (max-width: 700px) {
  body { padding: 20px 16px 48px; }
  .metrics th, .metrics td { padding: 5px 3px; font-size: 11.5px; }
  .metrics .arrow { display: none; }
  .wide { min-width: 860px; }
}
@media print { nav { display: none; } }
"""


@dataclass(frozen=True)
class Curve:
    """A plot: label -> (step, value) points; `from_zero`: the axis starts there."""

    title: str
    series: Mapping[str, Sequence[tuple[float, float]]]
    from_zero: bool = False


@dataclass(frozen=True)
class Figure:
    """A JPEG with its size and caption; `columns`: what its equally wide columns are, written above."""

    jpeg: bytes
    width: int
    height: int
    caption: str
    columns: Sequence[str] = ()


@dataclass(frozen=True)
class Page:
    """Everything that a report shows, already measured and drawn.

    Attributes:
        table: (name, metrics, whether it is a published row).
        config: section -> (key, value, whether it is not the default).
        card: Markdown of the dataset's card.
        notes: warnings above everything else.
    """

    title: str
    subtitle: str
    facts: Sequence[tuple[str, str]]
    table: Sequence[tuple[str, Mapping[str, float], bool]]
    table_note: str
    curves: Sequence[Curve]
    panels: Sequence[Figure]
    extremes: Figure | None
    config: Mapping[str, Sequence[tuple[str, str, bool]]]
    card: str | None
    environment: Mapping[str, Any]
    notes: Sequence[str]


def render(page: Page) -> str:
    """The whole document."""
    sections = [
        ("metrics", "Metrics", _metrics(page)),
        ("curves", "Curves", _curves(page.curves)),
        ("panels", "Panels", _panels(page.panels)),
        ("images", "Worst and best images", _extremes(page.extremes)),
        ("configuration", "Configuration", _config(page.config)),
        ("dataset", "Dataset", _card(page.card)),
        ("environment", "Environment", _environment(page.environment)),
    ]
    links = "".join(f'<a href="#{name}">{title}</a>' for name, title, _ in sections)
    body = "".join(f'<section id="{name}"><h2>{title}</h2>{content}</section>' for name, title, content in sections)
    facts = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in page.facts)
    notes = "".join(f'<p class="warning">{escape(note)}</p>' for note in page.notes)
    # The policy makes the browser itself refuse anything that is not in this file.
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{escape(page.title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<header><h1>{escape(page.title)}</h1><p class="subtitle">{escape(page.subtitle)}</p><nav>{links}</nav></header>
{notes}
<dl class="facts">{facts}</dl>
{body}
</body>
</html>
"""


def _metrics(page: Page) -> str:
    names = list(page.table[0][1]) if page.table else []
    arrows = {name: "↓" if name in LOWER_IS_BETTER else "↑" for name in names}
    head = "".join(f'<th>{escape(name)}<span class="arrow"> {arrows[name]}</span></th>' for name in names)
    rows = []
    for label, metrics, published in page.table:
        cells = "".join(f"<td>{metrics[name]:.3f}</td>" for name in names)
        rows.append(f'<tr class="{"published" if published else "own"}"><td>{escape(label)}</td>{cells}</tr>')
    table = f'<table class="metrics"><thead><tr><th></th>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>'
    return f'<div class="scroll">{table}</div><p class="note">{escape(page.table_note)}</p>'


def _curves(curves: Sequence[Curve]) -> str:
    if not curves:
        return '<p class="note">The run has logged nothing yet.</p>'
    images = (
        f'<img alt="{escape(curve.title)}" src="data:image/svg+xml;base64,{base64.b64encode(_svg(curve)).decode()}">'
        for curve in curves
    )
    return f'<div class="curves">{"".join(images)}</div>'


def _svg(curve: Curve) -> bytes:
    """One plot. As an image of its own, its element ids cannot clash with another's."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure as Canvas

    with matplotlib.rc_context({"svg.fonttype": "none", "font.family": "sans-serif", "svg.hashsalt": "md2"}):
        figure = Canvas(figsize=(4.6, 2.9), layout="constrained")
        FigureCanvasSVG(figure)
        axes: Any = figure.add_subplot()
        for label, points in curve.series.items():
            steps, values = zip(*points, strict=True)
            axes.plot(steps, values, linewidth=1.6, marker="o" if len(points) < 25 else "", markersize=3, label=label)
        axes.set_title(curve.title, loc="left", fontsize=11, fontweight="bold")
        axes.set_xlabel("step", fontsize=9)
        axes.tick_params(labelsize=8)
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 4))
        axes.yaxis.get_offset_text().set_fontsize(8)
        axes.margins(y=0.15)
        if curve.from_zero:
            axes.set_ylim(bottom=0)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if len(curve.series) > 1:
            figure.legend(loc="outside lower center", ncols=len(curve.series), frameon=False, fontsize=8)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def _panels(figures: Sequence[Figure]) -> str:
    if not figures:
        return '<p class="note">The run has drawn no panels (train.image_every).</p>'
    note = (
        "One row a sample: the target; its sources warped into it, which should look like it; disparity (bright is "
        "near); auto-mask (white counts in the loss)."
    )
    return f'<p class="note">{note}</p>' + "".join(_image(figure) for figure in figures)


def _extremes(figure: Figure | None) -> str:
    if figure is None:
        return '<p class="note">Not measured: see the warning above, or md2 report --dataset.</p>'
    note = (
        '<p class="note">Image; disparity (bright is near); relative error at the measured points, blue 0 to red '
        "half or more.</p>"
    )
    return note + _image(figure)


def _image(figure: Figure) -> str:
    data = base64.b64encode(figure.jpeg).decode()
    size = f'width="{figure.width}" height="{figure.height}"'
    caption = escape(figure.caption)
    names = "".join(f"<span>{escape(column)}</span>" for column in figure.columns)
    heads = f'<div class="columns">{names}</div>' if names else ""
    return (
        f'<figure><div class="scroll"><div class="wide">{heads}'
        f'<img alt="{caption}" {size} src="data:image/jpeg;base64,{data}"></div></div>'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _config(sections: Mapping[str, Sequence[tuple[str, str, bool]]]) -> str:
    tables = []
    for name, rows in sections.items():
        cells = "".join(
            f'<tr class="{"changed" if changed else "default"}"><td>{escape(key)}</td><td>{escape(value)}</td></tr>'
            for key, value, changed in rows
        )
        tables.append(f"<div><h3>{escape(name)}</h3><table>{cells}</table></div>")
    return f'<p class="note">Bold: not the default.</p><div class="settings">{"".join(tables)}</div>'


def _environment(facts: Mapping[str, Any]) -> str:
    rows = "".join(f"<tr><td>{escape(name)}</td><td>{escape(_plain(value))}</td></tr>" for name, value in facts.items())
    return f'<table class="environment">{rows}</table>'


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {inner}" for name, inner in value.items())
    if isinstance(value, list):
        return shlex.join(str(word) for word in value)
    return "" if value is None else str(value)


def _card(markdown: str | None) -> str:
    if markdown is None:
        return '<p class="note">The dataset could not be opened, or has no card.</p>'
    from markdown_it import MarkdownIt

    # A card comes from whoever packed the dataset: its tags are shown and not obeyed, its links not followed.
    text = MarkdownIt("commonmark", {"html": False}).enable("table").disable(["link", "autolink", "image"])
    return f'<div class="card">{text.render(markdown)}</div>'
