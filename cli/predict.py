"""`md2 predict`: depth of images, folders, globs, videos, or a camera."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli.console import Device, PostProcess, bars, counted, say, warn
from shards.errors import INCOMPLETE


def predict(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Run, checkpoint or folder of Monodepth2 weights.")],
    inputs: Annotated[
        list[str], typer.Argument(metavar="INPUT", help="Images, folders, globs, videos; or a camera's index.")
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the results.")] = Path("predictions"),
    save: Annotated[
        str | None,
        typer.Option(
            metavar="KIND,...",
            help="Some of side_by_side, disparity, npy, png16 (metres x 256), ply, benchmark (KITTI's upload).  "
            " (default: the first four; side_by_side for a video)",
        ),
    ] = None,
    post_process: PostProcess = False,
    cmap: Annotated[str, typer.Option(metavar="NAME", help="Colour map of matplotlib.")] = "magma",
    scale: Annotated[
        float | None, typer.Option(metavar="METRES", help="Metres per unit of depth; overrides the model's own.")
    ] = None,
    intrinsics: Annotated[
        str | None,
        typer.Option(metavar="FX,FY,CX,CY", help="Camera in pixels, for point clouds. (default: learned, or KITTI's)"),
    ] = None,
    camera: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="camera.yaml of your own drives: undistort and crop frames as md2 prep does."
        ),
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Page for a browser: depth under the pointer, a point cloud to turn."),
    ] = None,
    max_depth: Annotated[
        float, typer.Option(metavar="METRES", help="Leave farther points out of point clouds.")
    ] = 80.0,
    limit: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Take the first N frames of a video or camera only.")
    ] = None,
    batch_size: Annotated[int, typer.Option(metavar="N", min=1, help="Images in one pass; a camera's go singly.")] = 8,
    device: Device = "auto",
) -> None:
    """Predict depth as pictures, videos and depth files. Ctrl-C stops a camera and completes its video."""
    from md2.inference.inputs import find_inputs, parse_intrinsics, parse_kinds, require_model
    from md2.visualize import check_color_map

    # Mistakes in the words are reported before PyTorch is imported.
    require_model(model)
    found = find_inputs(inputs, out)
    kinds = parse_kinds(save) if save is not None else None
    check_color_map(cmap)
    pinhole = parse_intrinsics(intrinsics) if intrinsics is not None else None
    view = None
    if camera is not None:
        from prep.raw.camera import read_view

        view = read_view(camera)

    from md2.inference.predict import PredictOptions, run_predict
    from md2.inference.predictor import load
    from md2.inference.viewer import Viewer

    page = Viewer(html, cmap, max_depth) if html is not None else None
    options = PredictOptions(out, kinds, post_process, cmap, scale, pinhole, view, max_depth, limit, batch_size, page)
    predictor = load(model, device)
    with bars("images") as bar:
        done = run_predict(predictor, found, options, bar)
    for failure in done.failed:
        warn(f"skipped: {failure}", style=None)
    say(f"{counted(done.images, 'image')}, {counted(len(done.written) - (html is not None), 'file')} in {out}")
    if html is not None:
        say(f"open {html} in a browser")
    clouds = html is not None or "ply" in (kinds or ())
    if clouds and not (pinhole or view or predictor.intrinsics((1, 1))):
        say("point clouds are those of KITTI's camera; --camera FILE or --intrinsics FX,FY,CX,CY gives yours")
    if predictor.unit == "unknown" and scale is None:
        say(
            "scale unknown: this model learned from one camera, so depth is right up to one factor; .npy and .ply hold "
            "it in the model's own unit, and no 16-bit PNG in metres is written"
        )
    if done.failed:
        raise typer.Exit(INCOMPLETE)
