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

from cli.console import console, progress_bar
from shards.errors import INCOMPLETE
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


def prep(
    split: Annotated[
        str | None,
        typer.Option(
            help="eigen_zhou, eigen_full, eigen, eigen_benchmark, odom; a file; a folder (--dataset folder: optional)."
        ),
    ] = None,
    dataset: Annotated[
        Literal["kitti", "folder"], typer.Option(help="kitti, or your own drives: frames and a camera.yaml.")
    ] = "kitti",
    raw: Annotated[
        list[str], typer.Option(help="Folder of drives, folder of KITTI's zips, or base URL; repeat to mix.")
    ] = ["./kitti_data"],  # noqa: B006  (typer copies it)
    out: Annotated[
        str | None, typer.Option(help="Folder or URL of the dataset (default: ./kitti_shards/SPLIT).")
    ] = None,
    size: Annotated[str, typer.Option(metavar="WxH|native", help="Size of the stored images.")] = "640x192",
    frames: Annotated[
        str | None, typer.Option(metavar="N,N,...", help="Frame offsets (default: 0,-1,1; 0 for Eigen's test splits).")
    ] = None,
    stereo: Annotated[
        bool | None, typer.Option("--stereo/--no-stereo", help="The other camera's image (default: yes).")
    ] = None,
    depth: Annotated[bool, typer.Option("--depth/--no-depth", help="Ground truth where there is some.")] = True,
    depth_source: Annotated[
        Literal["velodyne", "improved"] | None,
        typer.Option(help="Scans, or the depth benchmark's maps (default: velodyne; improved for eigen_benchmark)."),
    ] = None,
    depth_convention: Annotated[
        Literal["camera_z", "lidar_x"] | None,
        typer.Option(help="Which depth a lidar point has (default: camera_z; lidar_x for eigen, as published)."),
    ] = None,
    codec: Annotated[
        Literal["jpeg", "png", "ppm"],
        typer.Option(
            help="png: lossless, three times the bytes. ppm: uncompressed, five times, the fastest to train from."
        ),
    ] = "jpeg",
    quality: Annotated[
        int | None, typer.Option(help="JPEG quality, 1 to 100, by the standard tables (default: finer, even ones).")
    ] = None,
    chroma: Annotated[
        Literal["420", "444"] | None,
        typer.Option(help="Colour resolution of JPEGs: smoothed and halved, or full (default: 420)."),
    ] = None,
    part: Annotated[list[str] | None, typer.Option(help="Only this part of the split; repeat for several.")] = None,
    limit: Annotated[int | None, typer.Option(help="At most so many lines of each part.")] = None,
    seed: Annotated[int, typer.Option(help="Of the shuffle.")] = 0,
    shard_mb: Annotated[int, typer.Option(help="Size of a shard, MiB (at most 1000 samples).")] = 256,
    splits: Annotated[Path | None, typer.Option(help="Folder that holds splits by name.")] = None,
    download: Annotated[
        str | None,
        typer.Option(metavar="[URL]", help="Read what --raw lacks from KITTI's public archive, or from URL."),
    ] = None,
    workers: Annotated[int, typer.Option(help="Processes on this machine; 0: one per core.")] = 0,
    scheduler: Annotated[str | None, typer.Option(metavar="tcp://HOST:PORT", help="Work on a dask cluster.")] = None,
    scratch: Annotated[
        Path | None,
        typer.Option(
            help="Where to make the folder for unfinished work (default: beside the dataset; in MD2_CACHE for a URL)."
        ),
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Report what is there and what is missing; pack nothing.")
    ] = False,
    on_error: Annotated[
        Literal["stop", "skip"], typer.Option(help="At broken input: stop, or leave its samples out and list them.")
    ] = "stop",
) -> None:
    """Pack raw KITTI into tar shards, each frame decoded and resized once. Run it again after a crash: it goes on.

    Exit code 4: done, but some of the split's lines gave no sample (missing frames); report.json lists them.
    """
    from prep.check import check as check_plan
    from prep.check import format_check
    from prep.job import make_job
    from prep.packing.pack import pack, scratch_folder
    from prep.workers import start_workers

    job = make_job(
        dataset=dataset,
        split=split,
        splits=splits,
        raw=raw,
        download=download,
        out=out,
        size=size,
        frames=frames,
        stereo=stereo,
        depth=depth,
        depth_source=depth_source,
        depth_convention=depth_convention,
        codec=codec,
        quality=quality,
        chroma=chroma,
        seed=seed,
        limit=limit,
        shard_mb=shard_mb,
    )
    with _bar() as bar:
        bar.phase("looking at drives", job.drives(part), "drives")
        # A check lists what is broken beside what is missing.
        plan = job.plan("skip" if check else on_error, part, progress=lambda drive: bar.advance(1))
        if check:
            bar.stop()
            report = check_plan(plan, job.lists)
            console.print(format_check(report), highlight=False, soft_wrap=True, markup=False)
            sys.exit(0 if report.complete else INCOMPLETE)
        job.refuse_empty(plan)
        with start_workers(workers or len(os.sched_getaffinity(0)), scheduler) as pool:
            packed = pack(
                plan,
                job.lists,
                job.out,
                scratch_folder(job.out, scratch),
                pool,
                skip_broken=on_error == "skip",
                progress=bar,
            )
    _tell(packed, job.out)
    if packed.skipped:
        sys.exit(INCOMPLETE)


class _Bar:
    """One line a phase: how many a second, time left."""

    def __init__(self) -> None:
        self._progress: Progress | None = None
        self._task = TaskID(0)
        self._began = 0.0
        self._done = 0

    def phase(self, label: str, total: int, unit: str) -> None:
        self.stop()
        self._progress = progress_bar(unit)
        self._task = self._progress.add_task(label, total=total, rate=0.0, note="")
        self._began, self._done = time.monotonic(), 0
        self._progress.start()

    def advance(self, count: int) -> None:
        self._done += count
        rate = self._done / max(time.monotonic() - self._began, 1e-3)
        if self._progress is not None:
            self._progress.update(self._task, advance=count, rate=rate)

    def stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


@contextmanager
def _bar() -> Iterator[_Bar]:
    bar = _Bar()
    try:
        yield bar
    finally:
        bar.stop()


def _tell(packed: Packed, asked: str) -> None:
    from prep.packing.pack import summary
    from shards.storage import open_storage

    manifest = packed.manifest
    parts = ", ".join(f"{manifest.samples(part)} {part}" for part in manifest.parts)
    size = sum(shard.bytes for shard in manifest.shards) / 1e6
    state = "was there already" if packed.already else "packed"
    lines = [f"{packed.url}: {state}: {parts} samples, {len(manifest.shards)} shards, {size:.1f} MB"]
    if packed.url != open_storage(asked).url:
        lines.append(f"another dataset is at {asked}, and stays as it is")
    if manifest.optional_components:
        optional = ", ".join(f"{count} with {name}" for name, count in manifest.optional_components.items())
        lines.append(f"not in every sample: {optional}")
    if manifest.depth is not None and DEPTH not in {*manifest.components, *manifest.optional_components}:
        lines.append(f"no sample has ground truth: no {manifest.depth.source} data for these frames at --raw")
    if packed.skipped:
        lines.append(
            f"{len(packed.skipped)} lines left out: {summary(packed.skipped)}; all of them in {packed.url}/{REPORT}"
        )
    console.print("\n".join(lines), highlight=False, soft_wrap=True, markup=False)
