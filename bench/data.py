"""The benchmarks' data: a raw tree, packed with the defaults of `md2 prep`; and small synthetic samples.

The raw tree is the user's (KITTI's layout, both cameras) or a synthetic drive rendered at KITTI's size.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from bench.write_dataset import write_dataset
from prep.packing.pack import pack
from prep.packing.plan import make_plan
from prep.raw.files import RawData
from prep.raw.kitti import Kitti
from prep.raw.splits import read_split
from prep.request import make_content
from prep.workers import start_workers
from shards.dataset import LocalDataset, open_dataset
from shards.errors import InputError
from shards.manifest import Split
from shards.sample import Codec, Sample
from shards.tar import read_samples

FULL_SIZE = (1242, 375)
SIZE = (640, 192)
INSTANTS = 24
"""Length of a synthetic drive, in time steps."""
SAMPLES_PER_SHARD = 120


def raw_tree(
    given: Path | None,
    folder: Path,
    *,
    size: tuple[int, int] = FULL_SIZE,
    frames: int = INSTANTS,
    lidar: bool = False,
) -> Path:
    """Return the raw tree `given`, or render a synthetic one below `folder`."""
    if given is not None:
        return given.resolve()
    if (folder / "synthetic").exists():
        return folder / "synthetic"
    from prep.synthetic import write_drives  # not in the worker processes of a benchmark on real frames

    workers = len(os.sched_getaffinity(0))
    return write_drives(
        folder / "synthetic", drives=1, frames=frames, size=size, lidar=lidar, workers=min(workers, frames // 4)
    ).root


def find_samples(raw: Path) -> list[list[Path]]:
    """Find every left frame that has both temporal frames and a stereo partner: paths of t, t-1, t+1 and the right t.

    Raises:
        InputError: no frame has them.
    """
    found = []
    for target in sorted(raw.glob("*/*_sync/image_02/data/*.png")):
        number, other = int(target.stem), target.parents[2] / "image_03" / "data" / target.name
        near = [target.with_name(f"{number + step:010d}.png") for step in (-1, 1)]
        if all(path.exists() for path in (*near, other)):
            found.append([target, *near, other])
    if not found:
        raise InputError(
            f"{raw}: no PNG of both cameras with three frames in a row; expected there: "
            "2011_09_26/2011_09_26_drive_0001_sync/image_02/data/0000000000.png and image_03"
        )
    return found


def pack_samples(
    found: list[list[Path]],
    raw: Path,
    folder: Path,
    samples: int,
    *,
    size: tuple[int, int] = SIZE,
    codec: Codec = "jpeg",
) -> LocalDataset:
    """Pack the samples of `find_samples` with prep's default options, and repeat them until there are `samples`.

    There are no depth maps, because training does not read them. Each repetition gets its own keys.
    """
    folder = folder / codec
    folder.mkdir()
    lists_file = folder / "train_files.txt"
    lines = [f"{t.parents[3].name}/{t.parents[2].name} {int(t.stem)} l" for t, *_ in found]
    lists_file.write_text("".join(f"{line}\n" for line in lines))
    lists = read_split(str(lists_file))
    content = make_content(lists, size=f"{size[0]}x{size[1]}", depth=False, codec=codec)
    plan = make_plan(lists, Kitti(RawData([str(raw)]), content.depth), content)
    with start_workers(1) as workers:
        pack(plan, lists, str(folder / "once"), folder / "scratch", workers)
    once = open_dataset(str(folder / "once"))
    different = [sample for tar in once.tars("train") for sample in read_samples(tar)]

    def repeated() -> Iterator[Sample]:
        for number in range(samples):
            sample = different[number % len(different)]
            yield replace(sample, key=f"{sample.key}_{number // len(different):05d}")

    about = once.manifest
    write_dataset(
        folder / "shards",
        {"train": repeated()},
        split=about.split,
        frames=about.frames,
        stereo=about.stereo,
        depth=about.depth,
        size=about.size,
        codec=about.codec,
        quality=about.quality,
        jpeg=about.jpeg,
        seed=about.seed,
        samples_per_shard=SAMPLES_PER_SHARD,
    )
    return open_dataset(str(folder / "shards"))


def time_steps(raw: Path) -> list[tuple[Path, Path, Path]]:
    """RAW's time steps that have both images and a scan: those three files of each."""
    found = [
        (left, left.parents[2] / "image_03" / "data" / left.name, scan)
        for left in sorted(raw.glob("*/*_sync/image_02/data/*.png"))
        if (scan := left.parents[2] / "velodyne_points" / "data" / f"{left.stem}.bin").exists()
    ]
    if not found:
        raise InputError(f"{raw}: no drive with images and velodyne")
    return found


def numbered_dataset(folder: Path, shards: int, per_shard: int, size: tuple[int, int] = (96, 64)) -> None:
    """Write a dataset of small mono samples, whose images are eight different ones and whose fx is 1, 2, 3, …"""
    rng = np.random.default_rng(0)
    images = []
    for _ in range(8):
        coarse = Image.fromarray(rng.integers(0, 256, (8, 12, 3), dtype=np.uint8))
        buffer = BytesIO()
        coarse.resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
        images.append(buffer.getvalue())

    def samples() -> Iterator[Sample]:
        for number in range(shards * per_shard):
            frames = {f"{stem}.jpg": images[(number + place) % 8] for place, stem in enumerate(("0", "m1", "p1"))}
            camera = np.array([number + 1, 50, 40, 31.5], "<f4").tobytes()
            yield Sample(f"{number:07d}", {**frames, "k.f32": camera, "meta.json": b"{}"})

    write_dataset(
        folder,
        {"train": samples()},
        split=Split(name="numbered", sha256="0" * 64),
        frames=[0, -1, 1],
        stereo=False,
        depth=None,
        size=size,
        codec="jpeg",
        quality=90,
        seed=0,
        samples_per_shard=per_shard,
    )


def image_bytes(dataset: LocalDataset) -> float:
    """Mean size of the encoded images in the first shard."""
    sizes = [
        len(data)
        for sample in read_samples(dataset.tars("train")[0])
        for name, data in sample.components.items()
        if name.endswith((".jpg", ".png", ".ppm")) and not name.startswith("depth")
    ]
    return sum(sizes) / len(sizes)
