"""Exact ray casting of convex solids over a ground plane, in inverse depth.

Rays of a pinhole camera and of a spinning lidar are both sums `rows[i] + cols[j]`, so that a plane's inverse
distance along every ray of a window is one outer sum, and a solid's entry is the smallest of the planes' that
face the sensor. Nothing is divided, nothing is approximated.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import combinations

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

GROUND, SKY = -1, -2
QUADRIC_FACE = 6
"""Number of the curved face; planes are 0..5 (right, left, front, back, top, bottom)."""

_NEAR = 0.05
_SLACK = 1e-6


def _dot(vectors: Array, vector: Array) -> Array:
    """vectors (n,3) · vector (3,), term by term: a matrix product may round differently with the number of threads."""
    return np.asarray(vectors[:, 0] * vector[0] + vectors[:, 1] * vector[1] + vectors[:, 2] * vector[2])


@dataclass(frozen=True)
class Solid:
    """Intersection of half-spaces and at most one quadric, in world coordinates.

    Attributes:
        normals, distances: (n,3), (n,): inside is normals · p <= distances, for faces 0..n-1.
        corners: (8,3) of a box that contains it.
        shape, centre: (3,3), (3,): inside is |shape · (p - centre)| <= 1; None for a plain polyhedron.
    """

    normals: Array
    distances: Array
    corners: Array
    shape: Array | None = None
    centre: Array = field(default_factory=lambda: np.zeros(3))

    def enter(self, grid: RayGrid, area: tuple[slice, slice]) -> tuple[Array, npt.NDArray[np.int8]]:
        """Inverse ray parameter at which each ray of an area enters, <= 0 where it misses, and through which face."""
        offsets = self.distances - self.normals @ grid.origin
        offsets = np.where(np.abs(offsets) < 1e-9, 1e-9, offsets)
        shape = (len(grid.rows[area[0]]), len(grid.cols[area[1]]))
        entry = np.full(shape, np.inf)
        face = np.zeros(shape, dtype=np.int8)
        leave: Array | float = 0.0
        if self.shape is not None:
            entry, leave = self._quadric(grid, area, self.shape)
            face[:] = QUADRIC_FACE
        for number, (normal, offset) in enumerate(zip(self.normals, offsets, strict=True)):
            inverse = grid.dot(normal / offset, area)
            if offset > 0:  # the sensor is on the inner side: rays can only leave through this face
                leave = np.maximum(leave, inverse)
            else:
                face[inverse < entry] = number
                np.minimum(entry, inverse, out=entry)
        entry[(entry <= leave) | np.isinf(entry)] = 0.0  # infinite: the sensor is inside
        return entry, face

    def _quadric(self, grid: RayGrid, area: tuple[slice, slice], shape: Array) -> tuple[Array, Array]:
        start = shape @ (grid.origin - self.centre)
        outside = float(start @ start) - 1.0
        linear = grid.dot(shape.T @ start, area)
        square = np.zeros_like(linear)
        for axis in shape:
            if axis.any():
                square += grid.dot(axis, area) ** 2
        discriminant = linear**2 - square * outside
        root = np.sqrt(np.maximum(discriminant, 0.0))
        leave = (-linear - root) / outside
        if outside < 0:
            return np.full_like(linear, np.inf), leave
        return np.where(discriminant > 0, (-linear + root) / outside, 0.0), leave


@dataclass(frozen=True)
class Window:
    """The part of a ray grid that a solid can appear in, and the largest inverse parameter it can have there."""

    solid: int
    rows: slice
    cols: slice
    nearest: float


@dataclass(frozen=True)
class RayGrid(ABC):
    """Rays origin + t · (rows[i] + cols[j]) in world coordinates.

    Attributes:
        origin: (3,) sensor position.
        rows, cols: (H,3), (W,3).
    """

    origin: Array
    rows: Array
    cols: Array

    def dot(self, vector: Array, area: tuple[slice, slice]) -> Array:
        """Scalar product of the directions in an area with a vector: (h,w)."""
        return np.asarray(_dot(self.rows[area[0]], vector)[:, None] + _dot(self.cols[area[1]], vector)[None, :])

    @abstractmethod
    def windows(self, solids: list[Solid]) -> Iterator[Window]:
        """Windows of all solids, nearest first; a solid may have none or more than one."""


@dataclass(frozen=True)
class Pinhole(RayGrid):
    """A camera's rays, with t = camera z.

    Attributes:
        x, y: ascending normalised image coordinates (u - cx) / fx and (v - cy) / fy of the columns and rows.
        camera_from_world: (4,4).
    """

    x: Array
    y: Array
    camera_from_world: Array

    @classmethod
    def at(cls, world_from_camera: Array, camera_from_world: Array, x: Array, y: Array) -> Pinhole:
        """Rays of a camera with the given pose through all pairs of normalised coordinates."""
        turn = world_from_camera[:3, :3]
        cols = np.stack([x, np.zeros_like(x), np.ones_like(x)], axis=1) @ turn.T
        rows = np.stack([np.zeros_like(y), y, np.zeros_like(y)], axis=1) @ turn.T
        return cls(world_from_camera[:3, 3], rows, cols, x, y, camera_from_world)

    def windows(self, solids: list[Solid]) -> Iterator[Window]:
        corners = np.stack([solid.corners for solid in solids]) @ self.camera_from_world[:3, :3].T
        corners = corners + self.camera_from_world[:3, 3]
        first, second = (corners[:, index] for index in np.array(list(combinations(range(8), 2))).T)
        # Where an edge or diagonal of the bounding box crosses the near plane stands in for the corner behind it.
        depth = first[..., 2] - second[..., 2]
        part = (first[..., 2] - _NEAR) / np.where(depth == 0, 1.0, depth)
        crossing = first + part[..., None] * (second - first)
        crosses = (first[..., 2] - _NEAR) * (second[..., 2] - _NEAR) < 0
        points = np.concatenate([corners, crossing], axis=1)
        usable = np.concatenate([corners[..., 2] >= _NEAR, crosses], axis=1)
        z = np.where(usable, points[..., 2], 1.0)
        bounds = []
        for axis, lines in ((1, self.y), (0, self.x)):
            value = points[..., axis] / z
            bounds.append(np.searchsorted(lines, np.where(usable, value, np.inf).min(axis=1) - _SLACK))
            bounds.append(np.searchsorted(lines, np.where(usable, value, -np.inf).max(axis=1) + _SLACK))
        nearest = 1.0 / np.where(usable, points[..., 2], np.inf).min(axis=1).clip(_NEAR)
        for index in np.argsort(-nearest, kind="stable"):
            top, bottom, left, right = (int(bound[index]) for bound in bounds)
            if top < bottom and left < right:
                yield Window(int(index), slice(top, bottom), slice(left, right), float(nearest[index]) * (1 + _SLACK))


@dataclass(frozen=True)
class Spinning(RayGrid):
    """A lidar's rays, with t = distance in the plane of the lidar's own x and y.

    Attributes:
        azimuth: ascending angles in (-pi, pi] of the columns, from x towards y.
        slope: ascending tangents of the angle below that plane, of the rows (beams).
        lidar_from_world: (4,4).
    """

    azimuth: Array
    slope: Array
    lidar_from_world: Array

    @classmethod
    def at(cls, world_from_lidar: Array, lidar_from_world: Array, azimuth: Array, slope: Array) -> Spinning:
        """Rays of a lidar with the given pose for all pairs of azimuth and slope."""
        turn = world_from_lidar[:3, :3]
        flat = np.zeros_like(azimuth)
        cols = np.stack([np.cos(azimuth), np.sin(azimuth), flat], axis=1) @ turn.T
        rows = np.stack([np.zeros_like(slope), np.zeros_like(slope), -slope], axis=1) @ turn.T
        return cls(world_from_lidar[:3, 3], rows, cols, azimuth, slope, lidar_from_world)

    def windows(self, solids: list[Solid]) -> Iterator[Window]:
        corners = np.stack([solid.corners for solid in solids]) @ self.lidar_from_world[:3, :3].T
        corners = corners + self.lidar_from_world[:3, 3]
        middle = corners.mean(axis=1)
        distance = np.hypot(middle[:, 0], middle[:, 1])
        radius = np.hypot(corners[..., 0] - middle[:, None, 0], corners[..., 1] - middle[:, None, 1]).max(axis=1)
        closest = (distance - radius).clip(_NEAR)
        around = distance <= radius  # may stand above, below or beside the lidar: no bounds
        height = -corners[..., 2]
        # The slope's extremes need not be at corners, so the nearest and farthest distances bound them.
        low, high = height.min(axis=1), height.max(axis=1)
        lowest = np.where(around, -np.inf, np.where(low < 0, low / closest, low / (distance + radius)))
        highest = np.where(around, np.inf, np.where(high > 0, high / closest, high / (distance + radius)))
        first = np.searchsorted(self.slope, lowest - _SLACK)
        last = np.searchsorted(self.slope, highest + _SLACK)
        centre = np.arctan2(middle[:, 1], middle[:, 0])
        angles = np.arctan2(corners[..., 1], corners[..., 0]) - centre[:, None]
        angles = (angles + np.pi) % (2 * np.pi) - np.pi
        start = np.where(around, -np.pi, centre + angles.min(axis=1) - _SLACK)
        stop = np.where(around, np.pi, centre + angles.max(axis=1) + _SLACK)
        nearest = np.where(around, np.inf, 1 / closest + _SLACK)
        for index in np.argsort(closest, kind="stable"):
            if first[index] >= last[index]:
                continue
            for turn in (-2 * np.pi, 0.0, 2 * np.pi):
                left, right = np.searchsorted(self.azimuth, [start[index] + turn, stop[index] + turn])
                if left < right:
                    rows = slice(int(first[index]), int(last[index]))
                    yield Window(int(index), rows, slice(int(left), int(right)), float(nearest[index]))


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
    """First surface along every ray: the ground plane y = 0 and the solids. The sensor must be above the ground."""
    everything = (slice(None), slice(None))
    inverse = np.maximum(grid.dot(np.array([0.0, -1.0, 0.0]) / grid.origin[1], everything), 0.0)
    solid = np.where(inverse > 0, np.int32(GROUND), np.int32(SKY))
    face = np.zeros(inverse.shape, dtype=np.int8)
    for window in grid.windows(solids):
        area = (window.rows, window.cols)
        if inverse[area].min() >= window.nearest:
            continue
        entry, through = solids[window.solid].enter(grid, area)
        first = entry > inverse[area]
        inverse[area][first] = entry[first]
        solid[area][first] = window.solid
        face[area][first] = through[first]
    return Hits(inverse, solid, face)
