"""Exact ray casting of convex solids over a ground plane, in inverse depth.

The rays of a pinhole camera and of a spinning lidar are sums `rows[i] + cols[j]`. So a plane's inverse distance along
all rays of a window is one outer sum, and a solid's entry is the smallest of those of the planes that face the sensor.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import combinations
from typing import Self

import numpy as np
import numpy.typing as npt

from prep.synthetic.rig import Array, dot, inverse

GROUND, SKY = -1, -2
QUADRIC_FACE = 6
"""Number of the curved face; planes are 0 to 5 (right, left, front, back, top, bottom)."""
Area = tuple[slice, slice]
"""Rows and columns of a ray grid."""
_Index = npt.NDArray[np.intp]
Bounds = tuple[_Index, _Index, list[tuple[_Index, _Index]], Array]
"""First row, end of rows, spans of columns, and largest inverse t of n solids, (n,) each."""

_NEAR = 0.05
_SLACK = 1e-6


@dataclass(frozen=True)
class Solid:
    """Intersection of half-spaces and at most one quadric, in world coordinates.

    Attributes:
        normals, distances: (n,3), (n,): inside is normals · p <= distances, for faces 0 to n-1.
        corners: (8,3) of a box around it.
        shape, centre: (3,3), (3,): inside is |shape · (p - centre)| <= 1; None for a polyhedron.
    """

    normals: Array
    distances: Array
    corners: Array
    shape: Array | None = None
    centre: Array = field(default_factory=lambda: np.zeros(3))

    def enter(self, grid: RayGrid, area: Area) -> tuple[Array, npt.NDArray[np.int8]]:
        """Inverse ray parameter at which each ray of an area enters, <= 0 if it misses, and the face it enters by."""
        offsets = self.distances - self.normals @ grid.origin
        offsets = np.where(np.abs(offsets) < 1e-9, 1e-9, offsets)
        products = grid.dot(self.normals / offsets[:, None], area)
        entry = np.full((len(grid.rows[area[0]]), len(grid.cols[area[1]])), np.inf)
        face = np.zeros(entry.shape, dtype=np.int8)
        leave: Array | float = 0.0
        if self.shape is not None:
            entry, leave = self._quadric(grid, area, self.shape)
            face[:] = QUADRIC_FACE
        for number, (offset, inverse_t) in enumerate(zip(offsets, products, strict=True)):
            if offset > 0:  # the sensor is on the inner side: rays can only leave by this face
                leave = np.maximum(leave, inverse_t)
            else:
                face[inverse_t < entry] = number
                np.minimum(entry, inverse_t, out=entry)
        entry[(entry <= leave) | np.isinf(entry)] = 0.0  # infinite: the sensor is inside
        return entry, face

    def _quadric(self, grid: RayGrid, area: Area, shape: Array) -> tuple[Array, Array]:
        start = shape @ (grid.origin - self.centre)
        outside = float(start @ start) - 1.0
        linear, *axes = grid.dot(np.stack([shape.T @ start, *(axis for axis in shape if axis.any())]), area)
        square = np.zeros_like(linear)
        for axis in axes:
            square += axis**2
        discriminant = linear**2 - square * outside
        root = np.sqrt(np.maximum(discriminant, 0.0))
        leave = (-linear - root) / outside
        if outside < 0:
            return np.full_like(linear, np.inf), leave
        return np.where(discriminant > 0, (-linear + root) / outside, 0.0), leave


@dataclass(frozen=True)
class RayGrid(ABC):
    """Rays origin + t · (rows[i] + cols[j]) in world coordinates.

    Attributes:
        origin: (3,) sensor position.
        rows, cols: (H,3), (W,3).
        u, v: (W,), (H,) ascending coordinates of columns and rows, of a kind that the subclass names.
        from_world: (4,4), world -> sensor.
    """

    origin: Array
    rows: Array
    cols: Array
    u: Array
    v: Array
    from_world: Array

    @classmethod
    def at(cls, pose: Array, u: Array, v: Array) -> Self:
        """Rays of a sensor with a (4,4) pose, sensor -> world, through all pairs of coordinates."""
        rows, cols = (vectors @ pose[:3, :3].T for vectors in cls.directions(u, v))
        return cls(pose[:3, 3], rows, cols, u, v, inverse(pose))

    def dot(self, vectors: Array, area: Area) -> Iterator[Array]:
        """Scalar products (h,w) of the directions in an area with each of some vectors (n,3)."""
        rows, cols = (dot(lines, vectors[:, None]) for lines in (self.rows[area[0]], self.cols[area[1]]))
        return (row[:, None] + col for row, col in zip(rows, cols, strict=True))

    def windows(self, solids: list[Solid]) -> Iterator[tuple[int, Area, float]]:
        """Areas that each solid can appear in, nearest first: its index, the area, the largest inverse t there.

        A solid may have no area or several.
        """
        corners = np.stack([solid.corners for solid in solids]) @ self.from_world[:3, :3].T + self.from_world[:3, 3]
        top, bottom, spans, nearest = self.bounds(corners)
        for i in np.argsort(-nearest, kind="stable"):
            for left, right in spans:
                if top[i] < bottom[i] and left[i] < right[i]:
                    area = (slice(int(top[i]), int(bottom[i])), slice(int(left[i]), int(right[i])))
                    yield int(i), area, float(nearest[i])

    @staticmethod
    @abstractmethod
    def directions(u: Array, v: Array) -> tuple[Array, Array]:
        """Rows (H,3) and columns (W,3) in the sensor's coordinates."""

    @abstractmethod
    def bounds(self, corners: Array) -> Bounds:
        """Bounds of boxes, whose corners (n,8,3) are in the sensor's coordinates."""


class Pinhole(RayGrid):
    """A camera's rays: u, v are (column - cx) / fx and (row - cy) / fy, and t is camera z."""

    @staticmethod
    def directions(u: Array, v: Array) -> tuple[Array, Array]:
        rows = np.stack([np.zeros_like(v), v, np.zeros_like(v)], axis=1)
        return rows, np.stack([u, np.zeros_like(u), np.ones_like(u)], axis=1)

    def bounds(self, corners: Array) -> Bounds:
        first, second = (corners[:, index] for index in np.array(list(combinations(range(8), 2))).T)
        # A corner behind the near plane is replaced by the points where edges and diagonals cross that plane.
        depth = first[..., 2] - second[..., 2]
        part = (first[..., 2] - _NEAR) / np.where(depth == 0, 1.0, depth)
        crossing = first + part[..., None] * (second - first)
        crosses = (first[..., 2] - _NEAR) * (second[..., 2] - _NEAR) < 0
        points = np.concatenate([corners, crossing], axis=1)
        usable = np.concatenate([corners[..., 2] >= _NEAR, crosses], axis=1)
        z = np.where(usable, points[..., 2], 1.0)
        ends = []
        for axis, lines in ((0, self.u), (1, self.v)):
            value = points[..., axis] / z
            ends.append(np.searchsorted(lines, np.where(usable, value, np.inf).min(axis=1) - _SLACK))
            ends.append(np.searchsorted(lines, np.where(usable, value, -np.inf).max(axis=1) + _SLACK))
        left, right, top, bottom = ends
        nearest = 1.0 / np.where(usable, points[..., 2], np.inf).min(axis=1).clip(_NEAR)
        return top, bottom, [(left, right)], nearest * (1 + _SLACK)


class Spinning(RayGrid):
    """A lidar's rays: u is the azimuth in (-pi, pi] from x towards y, v the tangent of the angle below the x-y plane.

    t is the distance in that plane.
    """

    @staticmethod
    def directions(u: Array, v: Array) -> tuple[Array, Array]:
        rows = np.stack([np.zeros_like(v), np.zeros_like(v), -v], axis=1)
        return rows, np.stack([np.cos(u), np.sin(u), np.zeros_like(u)], axis=1)

    def bounds(self, corners: Array) -> Bounds:
        middle = corners.mean(axis=1)
        distance = np.hypot(middle[:, 0], middle[:, 1])
        radius = np.hypot(corners[..., 0] - middle[:, None, 0], corners[..., 1] - middle[:, None, 1]).max(axis=1)
        closest = (distance - radius).clip(_NEAR)
        around = distance <= radius  # may be above, below or beside the lidar: no bounds
        # The slope's extremes need not be at corners, so the nearest and farthest distances bound them.
        low, high = (-corners[..., 2]).min(axis=1), (-corners[..., 2]).max(axis=1)
        lowest = np.where(around, -np.inf, np.where(low < 0, low / closest, low / (distance + radius)))
        highest = np.where(around, np.inf, np.where(high > 0, high / closest, high / (distance + radius)))
        top, bottom = np.searchsorted(self.v, lowest - _SLACK), np.searchsorted(self.v, highest + _SLACK)
        centre = np.arctan2(middle[:, 1], middle[:, 0])
        angles = np.arctan2(corners[..., 1], corners[..., 0]) - centre[:, None]
        angles = (angles + np.pi) % (2 * np.pi) - np.pi
        start = np.where(around, -np.pi, centre + angles.min(axis=1) - _SLACK)
        stop = np.where(around, np.pi, centre + angles.max(axis=1) + _SLACK)
        turns = (-2 * np.pi, 0.0, 2 * np.pi)
        spans = [(np.searchsorted(self.u, start + turn), np.searchsorted(self.u, stop + turn)) for turn in turns]
        return top, bottom, spans, np.where(around, np.inf, 1 / closest + _SLACK)


@dataclass(frozen=True)
class Hits:
    """What each ray of a grid meets first.

    Attributes:
        inverse: (H,W) 1 / t; 0 in the sky.
        solid: (H,W) index of the solid, `GROUND` or `SKY`.
        face: (H,W) face number of that solid.
    """

    inverse: Array
    solid: npt.NDArray[np.int32]
    face: npt.NDArray[np.int8]


def cast(solids: list[Solid], grid: RayGrid) -> Hits:
    """First surface along every ray: the ground plane y = 0 or a solid. The sensor must be above the ground."""
    everything = (slice(None), slice(None))
    (ground,) = grid.dot(np.array([[0.0, -1.0, 0.0]]) / grid.origin[1], everything)
    inverse_t = np.maximum(ground, 0.0)
    solid = np.where(inverse_t > 0, np.int32(GROUND), np.int32(SKY))
    face = np.zeros(inverse_t.shape, dtype=np.int8)
    for index, area, nearest in grid.windows(solids):
        if inverse_t[area].min() >= nearest:
            continue
        entry, through = solids[index].enter(grid, area)
        first = entry > inverse_t[area]
        inverse_t[area][first] = entry[first]
        solid[area][first] = index
        face[area][first] = through[first]
    return Hits(inverse_t, solid, face)
