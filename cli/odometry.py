"""`md2 odometry`: camera motion over a sequence, and its error as published."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Annotated, Literal

import typer

from cli.console import console, progress_bar


def odometry(
    model: Annotated[str, typer.Argument(help="Run, checkpoint or folder of Monodepth2 weights; with a pose network.")],
    source: Annotated[
        str, typer.Argument(help="KITTI odometry (folder, zips, URL) with --sequence; packed; or frames or a video.")
    ],
    sequence: Annotated[str | None, typer.Option(help="09, 10, ..., or a drive of KITTI raw.")] = None,
    part: Annotated[str | None, typer.Option(help="Part of a packed dataset. (default: test_<sequence>)")] = None,
    poses: Annotated[Path | None, typer.Option(help="True poses in KITTI's format. (default: beside SOURCE)")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the trajectory, its picture and the numbers.")] = Path(
        "odometry"
    ),
    limit: Annotated[int | None, typer.Option(min=2, help="Only so many frames.")] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 8,
    device: Annotated[Literal["auto", "cpu", "gpu"], typer.Option()] = "auto",
) -> None:
    """Predict the trajectory of a sequence; with ground truth, the error on 5-frame snippets."""
    from md2.evaluation.run_odometry import (
        dataset_motions,
        decode_frames,
        open_frames,
        predict_motions,
        report_motions,
        true_poses,
    )
    from md2.inference.predictor import load
    from prep.evaluation import is_packed
    from prep.raw.sequence import open_sequence
    from shards.dataset import open_dataset

    predictor = load(model, device)
    found = None
    with progress_bar("frame") as bar:
        task = bar.add_task("odometry", total=None, note="")

        def advance(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total or None)

        if sequence is not None and not is_packed(source):
            found = open_sequence([source], sequence)
            frames = decode_frames(sequence, found.read(), len(found.frames))
        elif sequence is None and part is None:
            frames = open_frames(source)
        else:
            frames = None
        if frames is None:
            part = part or f"test_{sequence}"
            motions = dataset_motions(
                predictor, open_dataset(source), part, limit=limit, batch_size=batch_size, progress=advance
            )
        else:
            motions = predict_motions(
                predictor,
                islice(frames.images, limit),
                batch_size=batch_size,
                total=min(frames.total, limit or frames.total),
                progress=advance,
            )
    truth = true_poses(poses, found.poses if found is not None else None, limit)
    name = frames.name if frames is not None else sequence or part or source
    report = report_motions(motions, name, predictor.metres_per_unit, truth, out, model)
    if report.error is not None:
        console.print(
            f"sequence {name}: ATE on {len(report.error.errors)} 5-frame snippets "
            f"{report.error.mean:.3f} ± {report.error.std:.3f} m",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
    else:
        console.print(
            f"sequence {name}: {report.frames} frames; no ground truth, so no error",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
    if report.unit == "unknown":
        fitted = f"; {report.scale:.3g} m per unit fits it to the truth" if report.scale is not None else ""
        console.print(f"scale unknown: the poses are in the model's own unit{fitted}", highlight=False, soft_wrap=True)
    for path in report.written:
        console.print(f"wrote {path}", highlight=False, markup=False, soft_wrap=True)
