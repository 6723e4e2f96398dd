"""`md2 eval`: the seven depth metrics of a model, or of saved predictions, over a dataset with ground truth."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from cli.console import Device, PostProcess, Splits, console, progress_bar, say, warn
from shards.errors import INCOMPLETE, UsageError, visible

if TYPE_CHECKING:
    from md2.evaluation.run import EvalReport


def evaluate(
    paths: Annotated[
        list[str],
        typer.Argument(
            metavar="[MODEL] DATASET",
            help="MODEL: run, checkpoint or folder of Monodepth2 weights; none with --predictions. DATASET: packed; "
            "raw KITTI (folder or URL) with --split; with --predictions also gt_depths.npz or a "
            "folder of depth PNGs.",
        ),
    ],
    split: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|PATH",
            help="Split to take of raw KITTI, or that orders --predictions: eigen ..., a file, a folder.",
        ),
    ] = None,
    splits: Splits = None,
    raw: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PLACE",
            help="Further location of raw KITTI, such as data_depth_annotated.zip's folder; repeatable.",
        ),
    ] = None,
    part: Annotated[
        str | None, typer.Option(metavar="PART", help="Part of the dataset to evaluate. (default: test, else val)")
    ] = None,
    protocol: Annotated[
        Literal["auto", "eigen", "eigen_benchmark"],
        typer.Option(help="Published protocol; auto: the one for the dataset's ground truth."),
    ] = "auto",
    crop: Annotated[
        Literal["garg", "eigen", "none"] | None, typer.Option(help="Crop to use instead of the protocol's.")
    ] = None,
    min_depth: Annotated[
        float | None, typer.Option(metavar="METRES", help="Least depth that counts. (default: 0.001)")
    ] = None,
    max_depth: Annotated[
        float | None, typer.Option(metavar="METRES", help="Greatest depth that counts. (default: 80)")
    ] = None,
    scaling: Annotated[
        Literal["auto", "median", "metric"], typer.Option(help="auto: metric if the model knows its unit, else median.")
    ] = "auto",
    scale: Annotated[
        float | None, typer.Option(metavar="METRES", help="Metres per unit of prediction, 5.4 for official stereo.")
    ] = None,
    post_process: PostProcess = False,
    predictions: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH", help="Evaluate saved predictions: .npy of disparities (N, H, W), or a folder of depth PNGs."
        ),
    ] = None,
    save_predictions: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the disparities to this .npy.")
    ] = None,
    save_png: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write 16-bit depth PNGs, as for KITTI's benchmark, to DIR.")
    ] = None,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="Write all numbers as JSON, without those of each image."),
    ] = None,
    csv_file: Annotated[
        Path | None, typer.Option("--csv", metavar="FILE", help="Write the metrics of each image as CSV.")
    ] = None,
    latex: Annotated[bool, typer.Option("--latex", help="Print the row in LaTeX too.")] = False,
    sheet: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a PNG of the worst and the best images.")
    ] = None,
    baselines: Annotated[
        bool, typer.Option("--baselines", help="Also measure a constant depth and the untrained network.")
    ] = False,
    points: Annotated[
        bool, typer.Option("--points", help="Also measure F-scores of the point clouds (a second an image on a CPU).")
    ] = False,
    batch_size: Annotated[int, typer.Option(metavar="N", min=1, help="Images in one pass.")] = 16,
    limit: Annotated[int | None, typer.Option(metavar="N", min=1, help="Evaluate the first N images only.")] = None,
    device: Device = "auto",
) -> None:
    """Evaluate depth with the published protocols and seven metrics."""
    from md2.inference.inputs import require_model
    from prep.evaluation import EvaluationData, evaluation_part, find_evaluation_data, is_packed, line_keys
    from prep.raw.splits import read_split
    from shards.dataset import open_dataset

    # Mistakes in the words are reported before PyTorch is imported.
    model, dataset = _model_and_dataset(paths, predictions)
    if model is not None:
        require_model(model)
    lists = read_split(split, splits) if split is not None else None
    if lists is None and (is_packed(dataset) or not Path(dataset).exists()):
        manifest = open_dataset(dataset).manifest
        if part is not None:
            manifest.part(part)

    from md2.evaluation.predictions import is_ground_truth
    from md2.evaluation.run import EvalOptions, measure, to_latex, write_results
    from md2.inference.predictor import load

    predictor = load(model, device) if model is not None else None
    with progress_bar("images") as bar:
        if is_ground_truth(dataset):
            order = None if lists is None else line_keys(lists, evaluation_part(lists, part))
            data = EvaluationData(dataset, order=order)
        else:
            data = find_evaluation_data(
                dataset,
                lists,
                part,
                raw or [],
                (predictor.width, predictor.height) if predictor is not None else (640, 192),
                for_predictions=predictions is not None,
                progress=_Packing(bar),
            )
        options = EvalOptions(
            model=model,
            dataset=data.url,
            dataset_name=data.name,
            part=data.part,
            protocol=protocol,
            crop=crop,
            min_depth=min_depth,
            max_depth=max_depth,
            scaling=scaling,
            scale=scale,
            post_process=post_process,
            predictions=predictions,
            order=data.order,
            save_predictions=save_predictions,
            save_png=save_png,
            json_file=json_file,
            csv_file=csv_file,
            sheet=sheet,
            baselines=baselines,
            points=points,
            batch_size=batch_size,
            limit=limit,
        )
        task = bar.add_task("evaluate", total=None, note="")
        report = measure(options, predictor, lambda done, total: bar.update(task, completed=done, total=total))
    for warning in report.warnings:
        warn(f"warning: {warning}")
    _print(report)
    if latex:
        name, metrics = next(iter(report.rows.items()))
        print(to_latex(visible(name), metrics))
    # After the table, so that a full disk costs no result.
    for path in write_results(options, report):
        warn(f"wrote {path}", style=None)
    if data.left_out:
        raise typer.Exit(INCOMPLETE)


class _Packing:
    """Shows the packing of raw files as further bars of one display."""

    def __init__(self, bar: Progress) -> None:
        self._bar = bar

    def phase(self, label: str, total: int, unit: str) -> None:
        self._task = self._bar.add_task(label, total=total, note="")

    def advance(self, count: int) -> None:
        self._bar.update(self._task, advance=count)

    def note(self, text: str) -> None:
        warn(f"note: {text}")


def _model_and_dataset(paths: list[str], predictions: Path | None) -> tuple[str | None, str]:
    wanted = 1 if predictions is not None else 2
    if len(paths) != wanted:
        form = "md2 eval DATASET --predictions FILE" if predictions is not None else "md2 eval MODEL DATASET"
        raise UsageError(f"{len(paths)} of {wanted} arguments; the form is: {form}")
    return (None, paths[0]) if predictions is not None else (paths[0], paths[1])


def _print(report: EvalReport) -> None:
    say(report.title, style="bold")
    # Narrow, so that a terminal of 80 columns shows every name and number whole.
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("", overflow="fold")
    names = list(next(iter(report.rows.values())))
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    for label, metrics in report.rows.items():
        cells = [f"{metrics[name]:.3f}" if math.isfinite(metrics[name]) else "nan" for name in names]
        table.add_row(Text(visible(label)), *cells, style="dim" if label in report.published else None)
    console.print(table)
    if report.further:
        say(f"further: {', '.join(f'{name} {value:.3f}' for name, value in report.further.items())}")
    evaluation = report.evaluation
    missing = len(evaluation.images) - len(evaluation.counted)
    if evaluation.scaling == "median":
        say(f"scale factors: median {evaluation.ratio_median:.3f}, std / median {evaluation.ratio_spread:.3f}")
    if missing:
        say(f"{missing} image{'s' * (missing > 1)} not counted: no measurement inside the crop and the range of depths")
    if report.overlap is not None and not report.overlap.seen:
        say(str(report.overlap))
