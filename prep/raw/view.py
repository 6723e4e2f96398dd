"""How frames of a camera become pictures of a pinhole camera: lens distortion and crop.

The formulas are OpenCV's. With x = X/Z, y = Y/Z, r² = x² + y², pixels are u = fx·x' + cx, v = fy·y' + cy, where

    distortion  x' = x·q + 2·p1·x·y + p2·(r² + 2x²),  y' = y·q + p1·(r² + 2y²) + 2·p2·x·y
                q = (1 + k1·r² + k2·r⁴ + k3·r⁶) / (1 + k4·r² + k5·r⁴ + k6·r⁶)
    fisheye     x' = x·t/r, y' = y·t/r,  t = θ·(1 + k1·θ² + k2·θ⁴ + k3·θ⁶ + k4·θ⁸),  θ = atan r

https://docs.opencv.org/4.x/d9/d0c/group__calib3d.html and https://docs.opencv.org/4.x/db/d58/group__calib3d__fisheye.html
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from shards.errors import InputError

Array = npt.NDArray[np.float64]
_WIDEST = 150.0
"""Degrees that a straightened picture may show: beyond, its edges are stretched out of all use."""
_CELLS = (32, 16, 8, 4)
_EXACT = 0.05
"""Pixels by which the piecewise bilinear map of a picture may be off."""
_EDGE_POINTS = 200
_STEP = 1e-6


@dataclass(frozen=True)
class Lens:
    """A lens distortion.

    Attributes:
        kind: which formula.
        coefficients: k1, k2, p1, p2, k3, k4, k5, k6 of `distortion`; k1 to k4 of `fisheye`.
    """

    kind: Literal["distortion", "fisheye"]
    coefficients: tuple[float, ...]

    def distort(self, x: Array, y: Array) -> tuple[Array, Array]:
        """Where the lens shows the pinhole camera's points; both in focal lengths from the centre."""
        r2 = x * x + y * y
        if self.kind == "fisheye":
            r = np.sqrt(r2)
            factor = np.where(r > 0, self._bent(np.arctan(r)) / np.where(r > 0, r, 1), 1.0)
            return x * factor, y * factor
        k1, k2, p1, p2, k3, k4, k5, k6 = self.coefficients
        q = (1 + r2 * (k1 + r2 * (k2 + r2 * k3))) / (1 + r2 * (k4 + r2 * (k5 + r2 * k6)))
        return x * q + 2 * p1 * x * y + p2 * (r2 + 2 * x * x), y * q + p1 * (r2 + 2 * y * y) + 2 * p2 * x * y

    def undistort(self, x: Array, y: Array) -> tuple[Array, Array]:
        """The inverse of `distort`; NaN where no point in front of the camera is shown."""
        return self._from_angle(x, y) if self.kind == "fisheye" else self._by_newton(x, y)

    def _bent(self, angle: Array) -> Array:
        t2 = angle * angle
        k1, k2, k3, k4 = self.coefficients
        return np.asarray(angle * (1 + t2 * (k1 + t2 * (k2 + t2 * (k3 + t2 * k4)))))

    def _from_angle(self, x: Array, y: Array) -> tuple[Array, Array]:
        """By bisection: the angle grows with the distance from the centre."""
        r = np.hypot(x, y)
        low, high = np.zeros_like(r), np.full_like(r, np.pi / 2)
        with np.errstate(invalid="ignore"):
            for _ in range(60):
                middle = (low + high) / 2
                below = self._bent(middle) < r
                low, high = np.where(below, middle, low), np.where(below, high, middle)
            seen = self._bent(np.full_like(r, np.pi / 2 - _STEP)) > r
        factor = np.where(r > 0, np.tan(low) / np.where(r > 0, r, 1), 1.0)
        factor = np.where(seen, factor, np.nan)
        return x * factor, y * factor

    def _by_newton(self, x: Array, y: Array) -> tuple[Array, Array]:
        u, v = x.copy(), y.copy()
        with np.errstate(all="ignore"):
            for _ in range(30):
                dx, dy = self.distort(u, v)
                a, b, c, d = self._slopes(u, v)
                determinant = a * d - b * c
                u, v = u - (d * (dx - x) - b * (dy - y)) / determinant, v - (a * (dy - y) - c * (dx - x)) / determinant
            dx, dy = self.distort(u, v)
            found = (np.hypot(dx - x, dy - y) < 1e-9) & (np.hypot(u, v) < 1e3)
        return np.where(found, u, np.nan), np.where(found, v, np.nan)

    def _slopes(self, x: Array, y: Array) -> tuple[Array, Array, Array, Array]:
        """dx'/dx, dx'/dy, dy'/dx, dy'/dy."""
        right, left = self.distort(x + _STEP, y), self.distort(x - _STEP, y)
        down, up = self.distort(x, y + _STEP), self.distort(x, y - _STEP)
        a, c = ((right[i] - left[i]) / (2 * _STEP) for i in (0, 1))
        b, d = ((down[i] - up[i]) / (2 * _STEP) for i in (0, 1))
        return a, b, c, d

    def folds(self, x: Array, y: Array) -> bool:
        """Whether two of these points are shown at one place: the formula turns back before it reaches them all."""
        a, b, c, d = self._slopes(x, y)
        return bool(np.any(a * d - b * c <= 0))


@dataclass(frozen=True)
class View:
    """What is packed of a camera's frames: a part of them, straightened.

    A straightened picture is as large as the part, and shows the largest upright rectangle of the pinhole camera's
    picture that lies within it (as OpenCV's `getOptimalNewCameraMatrix` with alpha 0): no pixel is invented.

    Attributes:
        frame: (width, height) of the frames.
        camera: fx, fy, cx, cy of the frames, pixels.
        box: left, top, right and bottom edge of the part, pixels.
        lens: None: the frames are a pinhole camera's.
        where: the camera file, for messages.
    """

    frame: tuple[int, int]
    camera: tuple[float, float, float, float]
    box: tuple[int, int, int, int]
    lens: Lens | None
    where: str

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) of the pictures."""
        return self.box[2] - self.box[0], self.box[3] - self.box[1]

    @cached_property
    def intrinsics(self) -> tuple[float, float, float, float]:
        """fx, fy, cx, cy of the pictures, pixels.

        Raises:
            InputError: the lens shows no such rectangle, or one that is too wide.
        """
        fx, fy, cx, cy = self.camera
        left, top, right, bottom = self.box
        if self.lens is None:
            return fx, fy, cx - left, cy - top
        across, along = np.linspace(left, right - 1, _EDGE_POINTS), np.linspace(top, bottom - 1, _EDGE_POINTS)
        edges = []
        for u, v, axis in ((left, along, 0), (right - 1, along, 0), (across, top, 1), (across, bottom - 1, 1)):
            points = np.broadcast_arrays(np.asarray((u - cx) / fx, float), np.asarray((v - cy) / fy, float))
            edges.append(self.lens.undistort(*points)[axis])
        x0, x1, y0, y1 = edges[0].max(), edges[1].min(), edges[2].max(), edges[3].min()
        width, height = self.size
        if not np.isfinite([x0, x1, y0, y1]).all() or not (x0 < x1 and y0 < y1):
            raise InputError(
                f"{self.where}: {self.lens.kind}: a pinhole camera cannot show the frame's edges; check the "
                f"coefficients and that they are for {self.frame[0]}x{self.frame[1]}, or leave the edges out with crop:"
            )
        wide = np.degrees(max(np.arctan(x1) - np.arctan(x0), np.arctan(y1) - np.arctan(y0)))
        if wide > _WIDEST:
            raise InputError(
                f"{self.where}: {self.lens.kind}: straightened, the frames would show {wide:.0f} degrees, of which a "
                f"pinhole camera can use {_WIDEST:.0f}; leave the edges out with crop:"
            )
        if self.lens.folds(*np.meshgrid(np.linspace(x0, x1, 50), np.linspace(y0, y1, 50))):
            raise InputError(
                f"{self.where}: {self.lens.kind}: these coefficients show some points twice; check their order and "
                f"that they are for {self.frame[0]}x{self.frame[1]}"
            )
        new_fx, new_fy = (width - 1) / (x1 - x0), (height - 1) / (y1 - y0)
        return float(new_fx), float(new_fy), float(-x0 * new_fx), float(-y0 * new_fy)

    def apply(self, frame: Image.Image) -> Image.Image:
        """The picture of a frame; straightened by cubic interpolation."""
        if self.lens is None:
            return frame.crop(self.box)
        return frame.transform(self.size, Image.Transform.MESH, _mesh(self), Image.Resampling.BICUBIC)

    def apply_depth(self, depth: npt.NDArray[np.uint16]) -> npt.NDArray[np.uint16]:
        """The same of a depth map, by the nearest pixel: the camera's centre and axis stay, so depth does."""
        left, top, right, bottom = self.box
        if self.lens is None:
            return depth[top:bottom, left:right]
        u, v = self._source(*np.meshgrid(*(np.arange(side, dtype=np.float64) for side in self.size)))
        row, column = np.rint(v).astype(int).clip(top, bottom - 1), np.rint(u).astype(int).clip(left, right - 1)
        return np.asarray(depth[row, column], dtype=np.uint16)

    def _source(self, u: Array, v: Array) -> tuple[Array, Array]:
        """The frame's pixel at the pictures' pixels."""
        assert self.lens is not None
        fx, fy, cx, cy = self.intrinsics
        x, y = self.lens.distort((u - cx) / fx, (v - cy) / fy)
        return x * self.camera[0] + self.camera[2], y * self.camera[1] + self.camera[3]


@lru_cache(maxsize=4)
def _mesh(view: View) -> list[tuple[tuple[int, ...], tuple[float, ...]]]:
    """Pillow's mesh of a view: cells of the picture, and the four corners of each in the frame (pixel areas from 0).

    Corners are rounded, so that machines whose functions differ in the last bit give the same pixels.
    """
    for cell in _CELLS:
        xs, ys = (np.append(np.arange(0, side, cell), side) for side in view.size)
        u, v = view._source(*np.meshgrid(xs - 0.5, ys - 0.5))
        middle = view._source(*np.meshgrid((xs[1:] + xs[:-1]) / 2 - 0.5, (ys[1:] + ys[:-1]) / 2 - 0.5))
        error = (np.abs(_mean_of_corners(c) - m).max() for c, m in zip((u, v), middle, strict=True))
        if max(error) <= _EXACT:
            break
    corners = np.round(np.stack([u, v], axis=-1) + 0.5, 6)
    around = [corners[:-1, :-1], corners[1:, :-1], corners[1:, 1:], corners[:-1, 1:]]
    quads = np.concatenate(around, axis=-1).reshape(-1, 8)
    boxes = [(int(x0), int(y0), int(x1), int(y1)) for y0, y1 in pairwise(ys) for x0, x1 in pairwise(xs)]
    return [(box, tuple(quad)) for box, quad in zip(boxes, quads.tolist(), strict=True)]


def _mean_of_corners(values: Array) -> Array:
    return np.asarray((values[:-1, :-1] + values[1:, :-1] + values[1:, 1:] + values[:-1, 1:]) / 4)
