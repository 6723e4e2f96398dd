"""Which files a predicted image gives."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from md2.inference.predictor import DepthMap, nominal_intrinsics
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
from shards.errors import UsageError

Kind = Literal["side_by_side", "disparity", "npy", "png16", "ply", "benchmark"]
KINDS: tuple[Kind, ...] = ("side_by_side", "disparity", "npy", "png16", "ply", "benchmark")
METRIC_KINDS: tuple[Kind, ...] = ("png16", "benchmark")
"""Written only where the unit is known."""
BENCHMARK_CAP = 80.0
"""Metres; what the published evaluation caps depth at."""
IMAGE_KINDS: tuple[Kind, ...] = ("side_by_side", "disparity", "npy", "png16")
"""What an image gives unless asked otherwise."""
VIDEO_KINDS: tuple[Kind, ...] = ("side_by_side",)
"""What a video gives unless asked otherwise."""
Progress = Callable[[int, int], None]
"""Told how many images are done, of how many (0: unknown)."""


@dataclass(frozen=True)
class Output:
    """Which files each image gives, and where.

    NAME.png            the image beside (above) its disparity (side_by_side)
    NAME_disparity.png  the colour-mapped disparity alone, 95th percentile (disparity)
    NAME_depth.npy      (H, W) float32 depth, metres where the unit is known (npy)
    NAME_depth.png      16-bit, metres x 256; only where the unit is known (png16)
    NAME.ply            coloured points (ply)
    NAME.png            16-bit, capped at 80 m: what KITTI's depth benchmark takes (benchmark)

    Attributes:
        cmap: matplotlib's name of the colour map.
        max_depth: farther points are left out of a point cloud, in depth's unit.
        intrinsics: fx, fy, cx, cy in pixels for point clouds; None: KITTI's, nominally.
    """

    folder: Path
    kinds: Sequence[Kind] = IMAGE_KINDS
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
            path = self.path(kind, name)
            if kind in METRIC_KINDS and not result.metric:
                continue
            if kind == "side_by_side":
                write_png(path, side_by_side(result.image, color_disparity(result.disparity, self.cmap)))
            elif kind == "disparity":
                write_png(path, color_disparity(result.disparity, self.cmap))
            elif kind == "npy":
                write_npy(path, result.depth)
            elif kind == "png16":
                write_png(path, depth_to_uint16(result.depth))
            elif kind == "benchmark":
                write_png(path, depth_to_uint16(np.minimum(result.depth, BENCHMARK_CAP)))
            else:
                write_file(path, self._cloud(result))
            written.append(path)
        return written

    def path(self, kind: Kind, name: str) -> Path:
        """Where an image of this name gets its file of this kind."""
        suffix = {"disparity": "_disparity.png", "npy": "_depth.npy", "png16": "_depth.png", "ply": ".ply"}
        return self.folder / f"{name}{suffix.get(kind, '.png')}"

    def _cloud(self, result: DepthMap) -> bytes:
        height, width = result.depth.shape
        points, kept = point_cloud(result.depth, self.intrinsics or nominal_intrinsics(width, height), self.max_depth)
        unit = "metres" if result.metric else "unknown (right up to one factor)"
        return ply_bytes(points, result.image[kept], f"unit {unit}; x right, y down, z forward")


def refuse_overwriting(inputs: Iterable[Path], results: Iterable[Path]) -> None:
    """Results must not replace what they are predicted from.

    Raises:
        UsageError: a result would have the path of an input.
    """
    sources = {os.path.realpath(path) for path in inputs}
    for path in results:
        if path.exists() and os.path.realpath(path) in sources:
            raise UsageError(f"{path} is an input, and its result would replace it: name another folder with --out")


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
    if {"side_by_side", "benchmark"} <= set(names):
        raise UsageError("--save: side_by_side and benchmark both write NAME.png: choose one of them")
    return tuple(kind for kind in KINDS if kind in names)
