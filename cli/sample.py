"""`md2 sample`: synthetic drives in KITTI's raw layout."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path
from typing import Annotated

import typer

from cli.console import progress_bar, say
from shards.errors import UsageError


def sample(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to create.")],
    drives: Annotated[
        int, typer.Option(metavar="N", help="Number of streets; the last of several is for validation and test.")
    ] = 2,
    frames: Annotated[int, typer.Option(metavar="N", help="Images per camera and drive, about a metre apart.")] = 60,
    size: Annotated[str, typer.Option(metavar="WxH", help="Size of the images in pixels.")] = "416x128",
    seed: Annotated[int, typer.Option(metavar="N", help="Same seed, same bytes; another seed, other streets.")] = 0,
    lidar: Annotated[bool, typer.Option("--lidar/--no-lidar", help="Also write velodyne scans.")] = True,
    workers: Annotated[int, typer.Option(metavar="N", help="Number of processes that render; 0: one per core.")] = 0,
) -> None:
    """Write synthetic drives in KITTI's raw layout, with exact depth.

    They show a ray-cast street: stereo pairs with calibration, velodyne scans, oxts, split lists, dense true depth.
    """
    from prep.synthetic import write_drives

    with progress_bar("frames") as bar:
        task = bar.add_task("sample", total=drives * frames, note="")

        def advance(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        written = write_drives(
            out,
            drives=drives,
            frames=frames,
            size=_size(size),
            seed=seed,
            lidar=lidar,
            workers=workers or len(os.sched_getaffinity(0)),
            progress=advance,
        )
    word = "drive" if len(written.drives) == 1 else "drives"
    say(f"{out}: {len(written.drives)} {word} of {frames} frames")
    say(shlex.join(["md2", "prep", "--split", str(written.split), "--raw", str(out)]))


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d{1,9})x(\d{1,9})", text)
    if match is None:
        raise UsageError(f"--size {text}: give width and height in pixels, for example 416x128")
    return int(match[1]), int(match[2])
