"""`md2 prep`: raw KITTI, or your own drives, to tar shards."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.progress import Progress, TaskID
from typer.core import TyperCommand

from cli.console import Splits, counted, progress_bar, say, warn
from shards.errors import INCOMPLETE, UsageError
from shards.manifest import REPORT
from shards.sample import DEPTH

if TYPE_CHECKING:
    from prep.packing.pack import Packed


class PrepCommand(TyperCommand):
    """`--download` stands alone (the public archive) or has a base URL after it."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        args = list(args)
        for i, word in enumerate(args):
            if word == "--download" and (i + 1 == len(args) or args[i + 1].startswith("-")):
                args[i] = "--download=public"
        return super().parse_args(ctx, args)


_HOW = ("part", "workers", "scheduler", "task", "scratch", "check", "on_error")
"""Options that say how the work is done; the others say what the dataset holds."""


def prep(
    split: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|PATH",
            help="eigen_zhou, eigen_full, eigen, eigen_benchmark, odom; a file; a folder (--dataset folder: optional).",
        ),
    ] = None,
    dataset: Annotated[
        Literal["kitti", "folder"], typer.Option(help="kitti, or your own drives: videos or frames, and a camera.yaml.")
    ] = "kitti",
    raw: Annotated[
        list[str],
        typer.Option(
            metavar="PLACE",
            help="Folder of drives, folder of KITTI's zips, one zip, or base URL; repeat to combine several.",
        ),
    ] = ["./kitti_data"],  # noqa: B006  (typer copies it)
    out: Annotated[
        str | None, typer.Option(metavar="URL", help="Folder or URL of the dataset (default: ./kitti_shards/SPLIT).")
    ] = None,
    size: Annotated[str, typer.Option(metavar="WxH|native", help="Size of the stored images.")] = "640x192",
    frames: Annotated[
        str | None, typer.Option(metavar="N,N,...", help="Frame offsets (default: 0,-1,1; 0 for Eigen's test splits).")
    ] = None,
    stereo: Annotated[
        bool | None, typer.Option("--stereo/--no-stereo", help="Pack the other camera's image (default: yes).")
    ] = None,
    depth: Annotated[bool, typer.Option("--depth/--no-depth", help="Pack ground truth if present.")] = True,
    depth_source: Annotated[
        Literal["velodyne", "improved"] | None,
        typer.Option(help="Scans, or the depth benchmark's maps (default: velodyne; improved for eigen_benchmark)."),
    ] = None,
    depth_convention: Annotated[
        Literal["camera_z", "lidar_x"] | None,
        typer.Option(help="Which depth a lidar point has (default: camera_z; lidar_x for eigen, as published)."),
    ] = None,
    motion: Annotated[
        bool, typer.Option("--motion", help="Pack how the camera moves (OXTS, poses or speeds): docs/prep.md.")
    ] = False,
    codec: Annotated[
        Literal["jpeg", "png", "ppm"],
        typer.Option(
            help="png: lossless, three times the bytes. ppm: uncompressed, five times, the fastest to train from."
        ),
    ] = "jpeg",
    quality: Annotated[
        int | None,
        typer.Option(metavar="N", help="JPEG quality, 1 to 100, by the standard tables (default: finer, even ones)."),
    ] = None,
    chroma: Annotated[
        Literal["420", "444"] | None,
        typer.Option(help="Colour resolution of JPEGs: smoothed and halved, or full (default: 420)."),
    ] = None,
    part: Annotated[
        list[str] | None, typer.Option(metavar="PART", help="Pack only this part of the split; repeat for several.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(metavar="N", help="Number of lines to take of each part (default: all).")
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Seed of the shuffle.")] = 0,
    shard_mb: Annotated[int, typer.Option(metavar="N", help="Size of a shard in MiB (at most 1000 samples).")] = 256,
    splits: Splits = None,
    download: Annotated[
        str | None,
        typer.Option(metavar="[URL]", help="Read what --raw lacks from KITTI's public archive, or from URL."),
    ] = None,
    follow_links: Annotated[
        bool, typer.Option("--follow-links", help="Pack files that links in --raw lead to outside of it.")
    ] = False,
    workers: Annotated[
        int, typer.Option(metavar="N", help="Number of processes on this machine; 0: one per core.")
    ] = 0,
    scheduler: Annotated[
        str | None, typer.Option(metavar="tcp://HOST:PORT", help="Let a dask cluster do the work.")
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(metavar="I/N", help="Do share I of N processes, such as a job array's; the last one commits."),
    ] = None,
    scratch: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Parent of the folder for unfinished work (default: beside the dataset; for a URL MD2_CACHE).",
        ),
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Report what is present and what is missing; pack nothing.")
    ] = False,
    on_error: Annotated[
        Literal["stop", "skip"], typer.Option(help="At broken input: stop, or leave out its samples and list them.")
    ] = "stop",
) -> None:
    """Pack raw KITTI or your own drives into tar shards. Each frame is decoded once; after a crash, run it again.

    Exit code 4: done, but some of the split's lines gave no sample (missing frames); report.json lists them.
    """
    asked = {name: value for name, value in locals().items() if name not in _HOW}
    from prep.check import check as check_plan
    from prep.packing.pack import pack_share, scratch_folder
    from prep.packing.tasks import Task, Unfinished, parse_task
    from prep.request import make_request
    from prep.workers import start_workers

    share = Task() if task is None else parse_task(task)
    if task is not None and scheduler is not None:
        raise UsageError("--task and --scheduler divide the work in different ways: give one of them")
    with _bar() as bar:
        request = make_request(**asked, progress=bar)
        bar.phase("looking at drives", request.drives(part), "drives")
        # A check lists what is broken beside what is missing.
        plan = request.plan("skip" if check else on_error, part, progress=lambda drive: bar.advance(1))
        if check:
            bar.stop()
            for line in check_plan(plan, request.lists).splitlines():
                say(line)
            sys.exit(INCOMPLETE if any(skip.wanted for skip in plan.skipped) else 0)
        request.refuse_empty(plan)
        with start_workers(workers or len(os.sched_getaffinity(0)), scheduler) as pool:
            packed = pack_share(
                plan,
                request.lists,
                request.out,
                scratch_folder(request.out, scratch),
                pool,
                share,
                skip_broken=on_error == "skip",
                progress=bar,
            )
    if isinstance(packed, Unfinished):
        late = ", ".join(map(str, packed.late))
        say(f"{packed.url}: share {task} is encoded, but not those of {counted(len(packed.late), 'task')}: {late}")
        say(f"the last one to finish commits; run a lost one again, such as --task {packed.late[0]}/{share.count}")
        return
    _summarise(packed, request.out)
    if any(skip.wanted for skip in packed.skipped):
        sys.exit(INCOMPLETE)


class _Bar:
    """One progress bar a phase, with rate and time left."""

    def __init__(self) -> None:
        self._progress: Progress | None = None
        self._task = TaskID(0)
        self._began = 0.0
        self._done = 0

    def phase(self, label: str, total: int, unit: str) -> None:
        self.stop()
        self._progress = progress_bar(unit)
        self._task = self._progress.add_task(label, total=total or None, rate=0.0, note="")
        self._began, self._done = time.monotonic(), 0
        self._progress.start()

    def advance(self, count: int) -> None:
        self._done += count
        rate = self._done / max(time.monotonic() - self._began, 1e-3)
        if self._progress is not None:
            self._progress.update(self._task, advance=count, rate=rate)

    def note(self, text: str) -> None:
        warn(f"note: {text}")

    def stop(self, *, wiped: bool = False) -> None:
        if self._progress is not None:
            self._progress.live.transient = wiped
            self._progress.stop()
            self._progress = None


@contextmanager
def _bar() -> Iterator[_Bar]:
    bar = _Bar()
    try:
        yield bar
    except BaseException:
        bar.stop(wiped=True)  # so that the message stands alone
        raise
    bar.stop()


def _summarise(packed: Packed, asked: str) -> None:
    from prep.packing.pack import summary
    from shards.storage import open_storage

    manifest = packed.manifest
    parts = ", ".join(f"{manifest.samples(part)} {part}" for part in manifest.parts)
    size = sum(shard.bytes for shard in manifest.shards) / 1e6
    state = "was there already" if packed.already else "packed"
    say(f"{packed.url}: {state}: {parts} samples, {counted(len(manifest.shards), 'shard')}, {size:.1f} MB")
    if packed.url != open_storage(asked).url:
        say(f"another dataset is at {asked}, and stays as it is")
    if manifest.optional_components:
        optional = ", ".join(f"{count} with {name}" for name, count in manifest.optional_components.items())
        say(f"not in every sample: {optional}")
    if manifest.depth is not None and DEPTH not in {*manifest.components, *manifest.optional_components}:
        say(f"no sample has ground truth: no {manifest.depth.source} data for these frames at --raw")
    if packed.skipped:
        number = counted(len(packed.skipped), "line")
        say(f"{number} left out: {summary(packed.skipped)}; all of them in {packed.url}/{REPORT}")
