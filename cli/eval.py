"""`md2 eval`: the seven depth metrics of a model, or of saved disparities, over a dataset with ground truth."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from cli.console import console, errors, progress_bar
from shards.errors import INCOMPLETE, UsageError

if TYPE_CHECKING:
    from md2.evaluation.run import EvalReport


def evaluate(
    paths: Annotated[
        list[str],
        typer.Argument(
            metavar="[MODEL] DATASET",
            help="MODEL: run, checkpoint or folder of Monodepth2 weights; none with --predictions. DATASET: packed, "
            "or raw KITTI (folder or URL, as for md2 prep --raw) with --split.",
        ),
    ],
    split: Annotated[
        str | None,
        typer.Option(help="eigen, eigen_benchmark, a file, a folder: what to take of raw KITTI, or of PREDICTIONS."),
    ] = None,
    splits: Annotated[Path | None, typer.Option(help="Folder that holds splits by name.")] = None,
    raw: Annotated[
        list[str] | None, typer.Option(help="Where else raw KITTI lies, such as data_depth_annotated.zip's folder.")
    ] = None,
    part: Annotated[str | None, typer.Option(help="Part of the dataset (default: test, else val).")] = None,
    protocol: Annotated[
        Literal["auto", "eigen", "eigen_benchmark"], typer.Option(help="auto: what belongs to the ground truth.")
    ] = "auto",
    crop: Annotated[Literal["garg", "eigen", "none"] | None, typer.Option(help="Instead of the protocol's.")] = None,
    min_depth: Annotated[float | None, typer.Option(help="Metres (default: 0.001).")] = None,
    max_depth: Annotated[float | None, typer.Option(help="Metres (default: 80).")] = None,
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
    from md2.evaluation.run import EvalOptions, run_eval
    from md2.evaluation.scores import to_latex
    from md2.inference.predictor import load
    from prep.evaluation import evaluation_part, is_packed, line_keys, pack_for_evaluation
    from prep.raw.splits import read_split

    model, dataset = _model_and_dataset(paths, predictions)
    lists = read_split(split, splits) if split is not None else None
    predictor = load(model, device) if model is not None else None
    with progress_bar("image") as bar:
        left_out, called = 0, None
        packed_already = is_packed(dataset)
        if lists is None and not packed_already and Path(dataset).is_dir():
            raise UsageError(f"{dataset}: no packed dataset there; of raw KITTI, name what to take: --split eigen")
        if raw and packed_already:
            raise UsageError(f"{dataset}: packed already; --raw goes with raw KITTI")
        if lists is not None and not packed_already:
            size = (predictor.width, predictor.height) if predictor is not None else (640, 192)
            places = [dataset, *(raw or [])]
            packed = pack_for_evaluation(places, lists, evaluation_part(lists, part), size, progress=_Packing(bar))
            called = f"{lists.name} of {dataset}"
            dataset, left_out = packed.url, len(packed.skipped)
        options = EvalOptions(
            model=model,
            dataset=dataset,
            dataset_name=called,
            part=part,
            protocol=protocol,
            crop=crop,
            min_depth=min_depth,
            max_depth=max_depth,
            scaling=scaling,
            scale=scale,
            post_process=post_process,
            predictions=predictions,
            order=line_keys(lists, evaluation_part(lists, part)) if lists is not None else None,
            save_predictions=save_predictions,
            save_png=save_png,
            json_file=json_file,
            csv_file=csv_file,
            sheet=sheet,
            baselines=baselines,
            batch_size=batch_size,
            limit=limit,
        )
        task = bar.add_task("evaluate", total=None, note="")

        def advance(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        report = run_eval(options, predictor, advance)
    for warning in report.warnings:
        errors.print(f"warning: {warning}", style="yellow", highlight=False, markup=False, soft_wrap=True)
    _print(report)
    if latex:
        name, metrics = next(iter(report.rows.items()))
        print(to_latex(name, metrics))
    for path in report.written:
        errors.print(f"wrote {path}", highlight=False, markup=False, soft_wrap=True)
    if left_out:
        raise typer.Exit(INCOMPLETE)


class _Packing:
    """Shows the packing of raw files as further bars of one display."""

    def __init__(self, bar: Progress) -> None:
        self._bar = bar

    def phase(self, label: str, total: int, unit: str) -> None:
        self._task = self._bar.add_task(label, total=total, note="")

    def advance(self, count: int) -> None:
        self._bar.update(self._task, advance=count)


def _model_and_dataset(paths: list[str], predictions: Path | None) -> tuple[str | None, str]:
    wanted = 1 if predictions is not None else 2
    if len(paths) != wanted:
        form = "md2 eval DATASET --predictions FILE" if predictions is not None else "md2 eval MODEL DATASET"
        raise UsageError(f"{len(paths)} of {wanted} arguments; the form is: {form}")
    return (None, paths[0]) if predictions is not None else (paths[0], paths[1])


def _print(report: EvalReport) -> None:
    console.print(report.title, style="bold", highlight=False, markup=False, soft_wrap=True)
    # Narrow, so that a terminal of 80 columns shows every name and number whole.
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("", overflow="fold")
    names = list(next(iter(report.rows.values())))
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    for label, metrics in report.rows.items():
        style = "dim" if label in report.published else None
        cells = [f"{metrics[name]:.3f}" if math.isfinite(metrics[name]) else "nan" for name in names]
        table.add_row(escape(label), *cells, style=style)
    console.print(table)
    evaluation = report.evaluation
    missing = len(evaluation.images) - len(evaluation.counted)
    if evaluation.scaling == "median":
        console.print(
            f"scale factors: median {evaluation.ratio_median:.3f}, std / median {evaluation.ratio_spread:.3f}",
            highlight=False,
            soft_wrap=True,
        )
    if missing:
        console.print(f"{missing} images without a measurement that counts, left out", highlight=False, soft_wrap=True)
