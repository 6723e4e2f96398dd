"""`md2 eval`: the seven depth metrics of a model, or of saved disparities, over a dataset with ground truth."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.table import Table

from cli.console import console, errors, progress_bar
from shards.errors import UsageError

if TYPE_CHECKING:
    from md2.eval_command import EvalReport


def evaluate(
    paths: Annotated[
        list[str],
        typer.Argument(
            metavar="[MODEL] DATASET",
            help="MODEL: run, checkpoint or folder of Monodepth2 weights; not with --predictions. DATASET: packed.",
        ),
    ],
    part: Annotated[str | None, typer.Option(help="Part of the dataset [default: test, else val].")] = None,
    protocol: Annotated[
        Literal["auto", "eigen", "eigen_benchmark"], typer.Option(help="auto: what belongs to the ground truth.")
    ] = "auto",
    crop: Annotated[Literal["garg", "eigen", "none"] | None, typer.Option(help="Instead of the protocol's.")] = None,
    min_depth: Annotated[float | None, typer.Option(help="Metres [default: 0.001].")] = None,
    max_depth: Annotated[float | None, typer.Option(help="Metres [default: 80].")] = None,
    scaling: Annotated[
        Literal["auto", "median", "metric"], typer.Option(help="auto: metric where the model knows its unit.")
    ] = "auto",
    scale: Annotated[
        float | None, typer.Option(help="Metres per unit of prediction, e.g. 5.4 for disparities of other projects.")
    ] = None,
    post_process: Annotated[bool, typer.Option("--post-process", help="Merge with the mirror image's.")] = False,
    predictions: Annotated[
        Path | None, typer.Option(help="Evaluate disparities (N, H, W) saved as .npy instead of a model.")
    ] = None,
    save_predictions: Annotated[Path | None, typer.Option(help="Write the disparities to this .npy.")] = None,
    save_png: Annotated[Path | None, typer.Option(help="Write 16-bit depth PNGs (as KITTI's benchmark) here.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write everything but the images as JSON.")] = None,
    csv_file: Annotated[Path | None, typer.Option("--csv", help="Write per-image metrics.")] = None,
    latex: Annotated[bool, typer.Option("--latex", help="Print the row in LaTeX too.")] = False,
    sheet: Annotated[Path | None, typer.Option(help="Write a PNG of the worst and the best images.")] = None,
    baselines: Annotated[
        bool, typer.Option("--baselines", help="Also measure a constant depth and the untrained network.")
    ] = False,
    batch_size: Annotated[int, typer.Option(min=1)] = 16,
    limit: Annotated[int | None, typer.Option(min=1, help="Only so many images.")] = None,
    device: Annotated[Literal["auto", "cpu", "gpu"], typer.Option()] = "auto",
) -> None:
    """Evaluate depth as published: a table of the seven metrics."""
    from md2.eval_command import EvalOptions, run_eval
    from md2.scores import to_latex

    model, dataset = _model_and_dataset(paths, predictions)
    options = EvalOptions(
        model=model,
        dataset=dataset,
        part=part,
        protocol=protocol,
        crop=crop,
        min_depth=min_depth,
        max_depth=max_depth,
        scaling=scaling,
        scale=scale,
        post_process=post_process,
        predictions=predictions,
        save_predictions=save_predictions,
        save_png=save_png,
        json_file=json_file,
        csv_file=csv_file,
        sheet=sheet,
        baselines=baselines,
        batch_size=batch_size,
        limit=limit,
        device=device,
    )
    with progress_bar("image") as bar:
        task = bar.add_task("evaluate", total=None, rate=0.0, note="")

        def advance(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total, rate=bar.tasks[task].speed or 0.0)

        report = run_eval(options, advance)
    for warning in report.warnings:
        errors.print(f"warning: {warning}", style="yellow", highlight=False, markup=False)
    _print(report)
    if latex:
        name, metrics = next(iter(report.rows.items()))
        print(to_latex(name, metrics))
    for path in report.written:
        errors.print(f"wrote {path}", highlight=False, markup=False)


def _model_and_dataset(paths: list[str], predictions: Path | None) -> tuple[str | None, str]:
    wanted = 1 if predictions is not None else 2
    if len(paths) != wanted:
        form = "md2 eval DATASET --predictions FILE" if predictions is not None else "md2 eval MODEL DATASET"
        raise UsageError(f"{len(paths)} arguments; the form is: {form}")
    return (None, paths[0]) if predictions is not None else (paths[0], paths[1])


def _print(report: EvalReport) -> None:
    table = Table(title=report.title, title_justify="left", title_style="bold", show_edge=False)
    table.add_column("")
    names = list(next(iter(report.rows.values())))
    for name in names:
        table.add_column(name, justify="right")
    for label, metrics in report.rows.items():
        style = "dim" if label in report.published else None
        cells = [f"{metrics[name]:.3f}" if math.isfinite(metrics[name]) else "nan" for name in names]
        table.add_row(label, *cells, style=style)
    console.print(table)
    evaluation = report.evaluation
    missing = len(evaluation.images) - len(evaluation.counted)
    if evaluation.scaling == "median":
        console.print(
            f"scale factors: median {evaluation.ratio_median:.3f}, std / median {evaluation.ratio_spread:.3f}",
            highlight=False,
        )
    if missing:
        console.print(f"{missing} images without a measurement that counts, left out", highlight=False)
