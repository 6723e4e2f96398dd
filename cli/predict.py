"""`md2 predict`: depth of images, folders, globs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from cli.console import console, errors, progress_bar
from shards.errors import INCOMPLETE


def predict(
    model: Annotated[str, typer.Argument(help="Run, checkpoint or folder of Monodepth2 weights.")],
    inputs: Annotated[list[str], typer.Argument(help="Images, folders, globs.")],
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("predictions"),
    save: Annotated[
        str, typer.Option(help="What to write: side_by_side, disparity, npy, png16, ply.")
    ] = "side_by_side,disparity,npy,png16",
    post_process: Annotated[bool, typer.Option("--post-process", help="Merge with the mirror image's.")] = False,
    cmap: Annotated[str, typer.Option(help="Colour map of matplotlib.")] = "magma",
    intrinsics: Annotated[
        str | None, typer.Option(metavar="FX,FY,CX,CY", help="Camera in pixels, for ply [default: KITTI's, nominal].")
    ] = None,
    max_depth: Annotated[float, typer.Option(help="Points farther than this are left out of ply.")] = 80.0,
    batch_size: Annotated[int, typer.Option(min=1)] = 8,
    device: Annotated[Literal["auto", "cpu", "gpu"], typer.Option()] = "auto",
) -> None:
    """Predict depth, and write pictures and depth files."""
    from md2.predict import intrinsics_option, load
    from md2.predict_command import Output, check_kinds, predict_images

    camera = intrinsics_option(intrinsics) if intrinsics is not None else None
    output = Output(out, check_kinds(save), cmap, max_depth, camera)
    predictor = load(model, device)
    with progress_bar("image") as bar:
        task = bar.add_task("predict", total=None, rate=0.0, note="")

        def advance(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total, rate=bar.tasks[task].speed or 0.0)

        done = predict_images(predictor, inputs, output, batch_size=batch_size, flip=post_process, progress=advance)
    for failure in done.failed:
        errors.print(f"left out: {failure}", highlight=False, markup=False)
    console.print(f"{done.images} images, {len(done.written)} files in {out}", highlight=False, markup=False)
    if predictor.unit == "unknown":
        console.print(
            "scale unknown: this model learned from one camera, so depth is right up to one factor; .npy holds it in "
            "the model's own unit, and no 16-bit PNG in metres was written",
            highlight=False,
        )
    if done.failed:
        raise typer.Exit(INCOMPLETE)
