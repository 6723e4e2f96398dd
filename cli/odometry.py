"""`md2 odometry`: camera motion over a sequence, and its error as published."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli.console import Device, bars, say


def odometry(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="Run, checkpoint or folder of Monodepth2 weights; with a pose network."),
    ],
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="KITTI odometry (folder, zips, URL) or a packed dataset, with --sequence; frames; video.",
        ),
    ],
    sequence: Annotated[
        str | None, typer.Option(metavar="NAME", help="09, 10 ..., or a drive of raw KITTI with its date.")
    ] = None,
    part: Annotated[
        str | None, typer.Option(metavar="PART", help="Part of a packed dataset to follow. (default: test_SEQUENCE)")
    ] = None,
    poses: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="File of true poses, in KITTI's or TUM's format. (default: beside SOURCE)"),
    ] = None,
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Folder for the trajectory, its picture and the numbers.")
    ] = Path("odometry"),
    limit: Annotated[int | None, typer.Option(metavar="N", min=2, help="Take the first N frames only.")] = None,
    batch_size: Annotated[int, typer.Option(metavar="N", min=1, help="Motions predicted in one pass.")] = 8,
    device: Device = "auto",
) -> None:
    """Predict the trajectory of a sequence. With ground truth, also measure the error on 5-frame snippets."""
    from md2.inference.inputs import find_inputs, require_model, require_one_sequence
    from prep.evaluation import is_packed
    from prep.raw.kitti import open_sequence
    from prep.raw.poses import read_poses
    from shards.dataset import open_dataset

    # Mistakes in the words are reported before PyTorch is imported.
    require_model(model)
    packed = is_packed(source)
    require_one_sequence(source, packed, sequence, part)
    if packed:
        open_dataset(source).manifest.part(part or f"test_{sequence}")
    elif sequence is not None:
        open_sequence([source], sequence)
    else:
        find_inputs([source])
    truth = read_poses(poses) if poses is not None else None

    from md2.evaluation.run_odometry import OdometryOptions, run_odometry
    from md2.inference.predictor import load

    options = OdometryOptions(model, source, out, packed, sequence, part, truth, limit, batch_size)
    predictor = load(model, device)
    with bars("frames") as bar:
        report = run_odometry(predictor, options, lambda place, name: open_sequence([place], name), bar("odometry"))
    if report.error is not None:
        say(
            f"sequence {report.name}: ATE on {len(report.error.errors)} 5-frame snippets "
            f"{report.error.mean:.3f} ± {report.error.std:.3f} m"
        )
        if report.drift is not None:
            say(
                f"drift over 100 to 800 m: t_rel {report.drift[0]:.2f} %, r_rel {report.drift[1]:.2f} degrees per 100 m"
            )
    else:
        say(f"sequence {report.name}: {report.frames} frames; no ground truth, so no error")
    if report.unit == "unknown":
        fitted = f"; {report.scale:.3g} m per unit fits it to the truth" if report.scale is not None else ""
        say(f"scale unknown: the poses are in the model's own unit{fitted}")
    for path in report.written:
        say(f"wrote {path}")
