"""Writes synthetic drives in KITTI's raw layout, with true depth, poses and split lists.

OUT/2011_09_26/calib_cam_to_cam.txt, calib_velo_to_cam.txt, calib_imu_to_velo.txt
OUT/2011_09_26/2011_09_26_drive_0001_sync/
    image_02/data/0000000000.png, image_03/...   the rectified colour pair, baseline 0.54 m
    velodyne_points/data/0000000000.bin          float32 x, y, z, reflectance
    oxts/data/0000000000.txt
    true_depth_02/data/0000000000.npy, _03/...   float32 (H,W), camera z in metres, inf in the sky (not KITTI's)
    true_pose_02.txt, true_pose_03.txt           3x4, a line a frame: camera -> camera 02 of frame 0 (not KITTI's)
OUT/splits/sample/train_files.txt, val_files.txt, test_files.txt
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import numpy as np
from PIL import Image

from prep.synthetic.oxts import FORMAT, oxts_line
from prep.synthetic.render import Renderer
from prep.synthetic.rig import COLOUR_CAMERAS, DATE, FRAME_SECONDS, CameraRig, inverse
from prep.synthetic.street import build_street
from prep.workers import run, start_workers
from shards.errors import InputError, UsageError
from shards.files import temporary

SPLIT = "sample"


@dataclass(frozen=True)
class SyntheticRaw:
    """The folders that `write_drives` wrote.

    Attributes:
        root: folder for `--raw`.
        drives: names of the drives' folders, within the date's.
        split: folder for `--split`.
        frames: frames of each drive.
    """

    root: Path
    drives: tuple[str, ...]
    split: Path
    frames: int


@dataclass(frozen=True)
class _Drive:
    number: int
    frames: int
    size: tuple[int, int]
    seed: int
    lidar: bool

    @property
    def name(self) -> str:
        return f"{DATE}_drive_{self.number:04d}_sync"


def write_drives(
    out: Path,
    *,
    drives: int = 2,
    frames: int = 60,
    size: tuple[int, int] = (416, 128),
    seed: int = 0,
    lidar: bool = True,
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> SyntheticRaw:
    """Write synthetic drives to `out`. The same arguments give the same bytes, with any number of workers.

    Args:
        out: folder to create; it appears whole or not at all.
        drives: number of streets, one a drive. `split_lines` says which are for training, validation and test.
        frames: images of each camera and drive, about one metre apart.
        size: width and height of the images; the focal length follows the width.
        seed: another seed gives other streets.
        lidar: also write velodyne scans.
        workers: number of processes.
        progress: called with the number of frames done and the total.

    Raises:
        UsageError: a number is out of range.
        InputError: `out` exists and is not an empty folder, or it cannot be written.
    """
    _check(drives, frames, size, seed, workers)
    jobs = [_Drive(number + 1, frames, size, seed, lidar) for number in range(drives)]
    with _appearing(out) as partial:
        date = partial / DATE
        date.mkdir()
        for name, text in CameraRig(size).calibration_files().items():
            (date / name).write_text(text)
        for drive in jobs:
            _write_small_files(date / drive.name, drive)
        work = [(date / drive.name, drive, frame) for drive in jobs for frame in range(drive.frames)]
        with start_workers(workers) as pool:
            for done, _ in enumerate(run(pool, _write_frame, work), 1):
                if progress:
                    progress(done, len(work))
        split = partial / "splits" / SPLIT
        split.mkdir(parents=True)
        for part, lines in split_lines([drive.name for drive in jobs], frames).items():
            (split / f"{part}_files.txt").write_text("".join(f"{line}\n" for line in lines))
    return SyntheticRaw(out, tuple(drive.name for drive in jobs), out / "splits" / SPLIT, frames)


def split_lines(drives: list[str], frames: int) -> dict[str, list[str]]:
    """Split lines of each part, for frames with both neighbours: train and val with both sides, test with the left.

    Of several drives the last one is held out: its first half is val, its second half test. A single drive is cut
    70 : 15 : 15.
    """
    usable = range(1, frames - 1)
    runs: dict[str, list[tuple[str, range]]]
    if len(drives) > 1:
        val, test = _cut(usable, [0.5, 0.5])
        runs = {"train": [(drive, usable) for drive in drives[:-1]], "val": [(drives[-1], val)]}
    else:
        train, val, test = _cut(usable, [0.7, 0.15, 0.15])
        runs = {"train": [(drives[0], train)], "val": [(drives[0], val)]}
    runs["test"] = [(drives[-1], test)]
    sides = {"train": "lr", "val": "lr", "test": "l"}
    return {
        part: [f"{DATE}/{drive} {frame} {side}" for drive, chosen in run for frame in chosen for side in sides[part]]
        for part, run in runs.items()
    }


def _cut(usable: range, shares: list[float]) -> list[range]:
    """Consecutive runs of frames. Long ones lose their last two, so that no image is a neighbour in two parts."""
    lengths = [max(1, round(share * len(usable))) for share in shares[1:]]
    ends = np.cumsum([0, len(usable) - sum(lengths), *lengths])
    gap = 2 if len(usable) >= 20 else 0
    runs = [usable[start:stop] for start, stop in pairwise(ends)]
    return [run[: len(run) - gap] for run in runs[:-1]] + [runs[-1]]


def _check(drives: int, frames: int, size: tuple[int, int], seed: int, workers: int) -> None:
    limits = [("drives", drives, 1, 9999), ("frames", frames, 6, 100_000), ("seed", seed, 0, 2**63 - 1)]
    limits += [("width", size[0], 32, 8192), ("height", size[1], 32, 8192), ("workers", workers, 1, 1024)]
    for name, value, low, high in limits:
        if not low <= value <= high:
            raise UsageError(f"{name} is {value}; it must be from {low} to {high}")


@contextmanager
def _appearing(out: Path) -> Iterator[Path]:
    """A folder beside `out` to write into. It becomes `out` at the end, and is removed on an error."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out}: exists already; remove it or choose another folder")
    partial = temporary(out)
    try:
        partial.mkdir(parents=True)
        yield partial
        partial.rename(out)
    except OSError as error:
        raise InputError(f"{out}: cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@lru_cache(maxsize=2)
def _renderer(drive: _Drive) -> Renderer:
    return Renderer(build_street(drive.seed, drive.number, drive.frames), CameraRig(drive.size))


def _write_frame(job: tuple[Path, _Drive, int]) -> None:
    folder, drive, frame = job
    renderer = _renderer(drive)
    for camera in COLOUR_CAMERAS:
        image, depth = renderer.image(frame, camera)
        Image.fromarray(image).save(folder / f"image_{camera:02d}" / "data" / f"{frame:010d}.png")
        np.save(folder / f"true_depth_{camera:02d}" / "data" / f"{frame:010d}.npy", depth)
    if drive.lidar:
        renderer.scan(frame).tofile(folder / "velodyne_points" / "data" / f"{frame:010d}.bin")


def _write_small_files(folder: Path, drive: _Drive) -> None:
    """Write a drive's folders, time stamps, oxts and poses."""
    renderer, rig = _renderer(drive), CameraRig(drive.size)
    sensors = ["oxts", "image_02", "image_03"] + (["velodyne_points"] if drive.lidar else [])
    for name in [*sensors, "true_depth_02", "true_depth_03"]:
        (folder / name / "data").mkdir(parents=True)
    for name in sensors:
        (folder / name / "timestamps.txt").write_text(_time_stamps(drive.frames, 0.0))
    if drive.lidar:
        for name, shift in (("start", -FRAME_SECONDS / 2), ("end", FRAME_SECONDS / 2)):
            (folder / "velodyne_points" / f"timestamps_{name}.txt").write_text(_time_stamps(drive.frames, shift))
    shutil.copyfile(FORMAT, folder / "oxts" / "dataformat.txt")
    for frame in range(drive.frames):
        record = oxts_line(renderer.street.trajectory, rig, frame)
        (folder / "oxts" / "data" / f"{frame:010d}.txt").write_text(record)
    start = inverse(renderer.pose(0, 2))
    for camera in COLOUR_CAMERAS:
        poses = [(start @ renderer.pose(frame, camera))[:3].ravel() for frame in range(drive.frames)]
        lines = [" ".join(f"{value:.9e}" for value in pose) for pose in poses]
        (folder / f"true_pose_{camera:02d}.txt").write_text("\n".join(lines) + "\n")


def _time_stamps(frames: int, shift: float) -> str:
    start = np.datetime64("2011-09-26T13:00:00", "ns")
    step = np.timedelta64(round(FRAME_SECONDS * 1e9), "ns")
    times = start + np.timedelta64(round(shift * 1e9), "ns") + step * np.arange(frames)
    return "".join(f"{str(time).replace('T', ' ')}\n" for time in times)
