"""`md2 predict`: depth of images, folders, globs, videos, or a camera."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from cli.console import console, errors, progress_bar
from shards.errors import INCOMPLETE


def predict(
    model: Annotated[str, typer.Argument(help="Run, checkpoint or folder of Monodepth2 weights.")],
    inputs: Annotated[list[str], typer.Argument(help="Images, folders, globs, videos; or a camera's index.")],
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("predictions"),
    save: Annotated[
        str | None,
        typer.Option(
            help="Some of side_by_side, disparity, npy, png16 (metres x 256), ply, benchmark (KITTI's upload).  "
            " (default: the first four; of a video side_by_side)"
        ),
    ] = None,
    post_process: Annotated[bool, typer.Option("--post-process", help="Merge with the mirror image's.")] = False,
    cmap: Annotated[str, typer.Option(help="Colour map of matplotlib.")] = "magma",
    scale: Annotated[
        float | None, typer.Option(help="Metres per unit of depth, where you know better than the model.")
    ] = None,
    intrinsics: Annotated[
        str | None, typer.Option(metavar="FX,FY,CX,CY", help="Camera in pixels, for ply. (default: KITTI's, nominal)")
    ] = None,
    max_depth: Annotated[float, typer.Option(help="Points farther than this are left out of ply.")] = 80.0,
    limit: Annotated[int | None, typer.Option(min=1, help="Frames to take of a video or camera.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per pass; a camera is taken one by one.")] = 8,
    device: Annotated[Literal["auto", "cpu", "gpu"], typer.Option()] = "auto",
) -> None:
    """Predict depth, and write pictures, films and depth files. Ctrl-C ends a camera."""
    from md2.inference.output import Progress
    from md2.inference.predictor import load
    from md2.inference.run import PredictOptions, run_predict

    options = PredictOptions(
        out=out,
        save=save,
        flip=post_process,
        cmap=cmap,
        scale=scale,
        intrinsics=intrinsics,
        max_depth=max_depth,
        limit=limit,
        batch_size=batch_size,
    )
    predictor = load(model, device)
    with progress_bar("image") as bar:

        def track(name: str) -> Progress:
            task = bar.add_task(name, total=None, note="")

            def advance(done: int, total: int) -> None:
                bar.update(task, completed=done, total=total or None)

            return advance

        found = run_predict(predictor, inputs, options, track)
    for failure in found.failed:
        errors.print(f"left out: {failure}", highlight=False, markup=False, soft_wrap=True)
    console.print(
        f"{found.images} images, {len(found.written)} files in {out}", highlight=False, markup=False, soft_wrap=True
    )
    if predictor.unit == "unknown" and scale is None:
        console.print(
            "scale unknown: this model learned from one camera, so depth is right up to one factor; .npy and .ply hold "
            "it in the model's own unit, and no 16-bit PNG in metres is written",
            highlight=False,
            soft_wrap=True,
        )
    if found.failed:
        raise typer.Exit(INCOMPLETE)
