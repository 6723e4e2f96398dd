"""What `md2 predict` does: images in, pictures and depth files out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from md2.inputs import ImageFile, find_images
from md2.predict import DepthMap, Predictor, nominal_intrinsics, read_image
from md2.visualize import (
    color_disparity,
    depth_to_uint16,
    ply_bytes,
    point_cloud,
    side_by_side,
    write_file,
    write_npy,
    write_png,
)
from shards.errors import InputError, UsageError

Kind = Literal["side_by_side", "disparity", "npy", "png16", "ply"]
KINDS: tuple[Kind, ...] = ("side_by_side", "disparity", "npy", "png16", "ply")
DEFAULT_KINDS: tuple[Kind, ...] = ("side_by_side", "disparity", "npy", "png16")
Progress = Callable[[int, int], None]

WORKERS = 2
"""Threads that decode ahead and write behind while the networks run."""


@dataclass(frozen=True)
class Output:
    """Which files each image gives, and where.

    NAME.png            the image beside (above) its disparity (side_by_side)
    NAME_disparity.png  the colour-mapped disparity alone, 95th percentile (disparity)
    NAME_depth.npy      (H, W) float32 depth, metres where the unit is known (npy)
    NAME_depth.png      16-bit, metres x 256; only where the unit is known (png16)
    NAME.ply            coloured points (ply)

    Attributes:
        cmap: matplotlib's name of the colour map.
        max_depth: farther points are left out of a point cloud, in depth's unit.
        intrinsics: fx, fy, cx, cy in pixels for point clouds; None: KITTI's, nominally.
    """

    folder: Path
    kinds: Sequence[Kind] = DEFAULT_KINDS
    cmap: str = "magma"
    max_depth: float = 80.0
    intrinsics: tuple[float, float, float, float] | None = None

    def write(self, name: str, result: DepthMap) -> list[Path]:
        """Write one image's files.

        Raises:
            InputError: the folder cannot be written.
        """
        written = []
        for kind in self.kinds:
            path = self._path(kind, name)
            if kind == "png16" and not result.metric:
                continue
            if kind == "side_by_side":
                write_png(path, side_by_side(result.image, color_disparity(result.disparity, self.cmap)))
            elif kind == "disparity":
                write_png(path, color_disparity(result.disparity, self.cmap))
            elif kind == "npy":
                write_npy(path, result.depth)
            elif kind == "png16":
                write_png(path, depth_to_uint16(result.depth))
            else:
                write_file(path, self._cloud(result))
            written.append(path)
        return written

    def _path(self, kind: Kind, name: str) -> Path:
        suffix = {"side_by_side": ".png", "disparity": "_disparity.png", "npy": "_depth.npy", "png16": "_depth.png"}
        return self.folder / f"{name}{suffix.get(kind, '.ply')}"

    def _cloud(self, result: DepthMap) -> bytes:
        height, width = result.depth.shape
        points, kept = point_cloud(result.depth, self.intrinsics or nominal_intrinsics(width, height), self.max_depth)
        unit = "metres" if result.metric else "unknown (right up to one factor)"
        return ply_bytes(points, result.image[kept], f"unit {unit}; x right, y down, z forward")


@dataclass(frozen=True)
class Predicted:
    """What came out.

    Attributes:
        images: number of images predicted.
        written: files, in order.
        failed: images that could not be read, with the reason.
    """

    images: int
    written: list[Path] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)


def check_kinds(text: str) -> tuple[Kind, ...]:
    """`side_by_side,npy` -> kinds.

    Raises:
        UsageError: a name that is none.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in KINDS]
    if unknown or not names:
        raise UsageError(f"--save {text}: {', '.join(unknown) or 'nothing'}; choose from {', '.join(KINDS)}")
    return tuple(kind for kind in KINDS if kind in names)


def predict_images(
    predictor: Predictor,
    inputs: Sequence[str],
    output: Output,
    *,
    batch_size: int = 8,
    flip: bool = False,
    progress: Progress = lambda done, total: None,
) -> Predicted:
    """Predict images, folders and globs; an unreadable image is listed, and the others go on.

    Raises:
        InputError: nothing there, every image unreadable, or the folder cannot be written.
    """
    images = find_images(inputs)
    written: list[Path] = []
    failed: list[str] = []
    done = 0
    with ThreadPoolExecutor(WORKERS) as pool:
        writing: list[Future[list[Path]]] = []
        for batch in _read_batches(images, batch_size, pool, failed):
            results = predictor.predict_batch([picture for _, picture in batch], flip=flip)
            # One batch is written while the next is predicted, and no more, so memory stays bounded.
            written += [path for future in writing for path in future.result()]
            writing = [
                pool.submit(output.write, image.name, result) for (image, _), result in zip(batch, results, strict=True)
            ]
            done += len(batch)
            progress(done + len(failed), len(images))
        written += [path for future in writing for path in future.result()]
    if not done:
        raise InputError(failed[0] if len(failed) == 1 else f"none of {len(failed)} images can be read: {failed[0]}")
    return Predicted(done, written, failed)


def _read_batches(
    images: Sequence[ImageFile], batch_size: int, pool: ThreadPoolExecutor, failed: list[str]
) -> Iterator[list[tuple[ImageFile, Image.Image]]]:
    """Batches of decoded images, one batch ahead; what cannot be read goes into `failed`."""
    rest = iter(images)
    ahead = [(image, pool.submit(read_image, image.path)) for image in islice(rest, batch_size)]
    while ahead:
        current, ahead = ahead, [(i, pool.submit(read_image, i.path)) for i in islice(rest, batch_size)]
        batch = []
        for image, future in current:
            try:
                batch.append((image, future.result()))
            except InputError as error:
                failed.append(str(error))
        if batch:
            yield batch


def depth_summary(result: DepthMap) -> str:
    """Nearest, median and farthest depth, for a line on the terminal."""
    low, middle, high = np.percentile(result.depth, [1, 50, 99])
    unit = "m" if result.metric else "units of unknown scale"
    return f"depth {low:.1f} / {middle:.1f} / {high:.1f} {unit} (1st, 50th, 99th percentile)"
