"""The sun's shadows on the ground, cast once per street into a map that is then looked up like a texture."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from prep.synthetic.cast import Pinhole, Solid, cast
from prep.synthetic.noise import Floats
from prep.synthetic.rig import Array

_MARGIN = 14.0
_LEVELS = 6
_DISTANCE = 1e6
"""Metres to an eye in the place of the sun: far enough for parallel rays, near enough for double precision."""
_STRIP = 1024
"""Rows of the map to cast at once."""


@dataclass(frozen=True)
class GroundShadow:
    """Share of sunlight that is blocked, on the plane y = 0.

    Attributes:
        levels: maps (rows along z, columns along x) in [0,1], each half as fine as the one before.
        corner: world x and z of the middle of the finest map's first texel, metres.
        spacing: metres between the finest map's texels.
    """

    levels: tuple[Floats, ...]
    corner: tuple[float, float]
    spacing: float

    @classmethod
    def cast(cls, solids: list[Solid], sun: Array, path: Array, spacing: float) -> GroundShadow:
        """Shadows around a path of (n,2) world x, z, from a sun in the unit direction (3,)."""
        low, high = path.min(axis=0) - _MARGIN, path.max(axis=0) + _MARGIN
        x, z = (np.arange(low[i], high[i], spacing) for i in (0, 1))
        # A point of the ground is in shadow if a solid hides it from an eye at the sun. The eye looks straight down, so
        # that the map's points are its pixels.
        eye = _DISTANCE * sun
        pose = np.array([[1, 0, 0, eye[0]], [0, 0, 1, eye[1]], [0, -1, 0, eye[2]], [0, 0, 0, 1]])
        u, v = (x - eye[0]) / -eye[1], (z[::-1] - eye[2]) / eye[1]
        strips = [cast(solids, Pinhole.at(pose, u, v[i : i + _STRIP])).solid >= 0 for i in range(0, len(v), _STRIP)]
        blocked = np.concatenate(strips)[::-1].astype(np.float32)
        for _ in range(2):  # half-shadow one texel wide: the filter [1 2 1] along z, then along x
            padded = np.pad(blocked, ((1, 1), (0, 0)), mode="edge")
            blocked = (0.5 * blocked + 0.25 * (padded[2:] + padded[:-2])).astype(np.float32).T
        levels = [np.ascontiguousarray(blocked)]
        while len(levels) < _LEVELS:
            height, width = (side // 2 for side in levels[-1].shape)
            quarters = levels[-1][: 2 * height, : 2 * width].reshape(height, 2, width, 2)
            levels.append(quarters.mean(axis=(1, 3)).astype(np.float32))
        return cls(tuple(levels), (float(low[0]), float(low[1])), spacing)

    def at(self, x: Floats, z: Floats, spread: Floats) -> Floats:
        """Blocked share (n,) at world x, z for pixels `spread` metres long; 0 outside the map."""
        level = np.clip(np.log2(np.maximum(spread / self.spacing, 1.0)), 0, _LEVELS - 1.001)
        lower = level.astype(np.int32)
        share = (level - lower).astype(np.float32)
        result = np.zeros(len(x), dtype=np.float32)
        for number in range(_LEVELS):
            weight = np.where(lower == number, 1 - share, np.where(lower == number - 1, share, np.float32(0)))
            seen = np.flatnonzero(weight)
            if len(seen):
                result[seen] += weight[seen] * self._bilinear(number, x[seen], z[seen])
        return result

    def _bilinear(self, number: int, x: Floats, z: Floats) -> Floats:
        grid, scale = self.levels[number], self.spacing * 2**number
        # Texel 0 of a level is the mean of the first 2^level of the finest, so its middle lies further in.
        inset = 0.5 * (2**number - 1) * self.spacing
        column = (x.astype(np.float64) - self.corner[0] - inset) / scale
        row = (z.astype(np.float64) - self.corner[1] - inset) / scale
        inside = (column >= 0) & (column <= grid.shape[1] - 1) & (row >= 0) & (row <= grid.shape[0] - 1)
        left = np.clip(column, 0, grid.shape[1] - 2).astype(np.int32)
        top = np.clip(row, 0, grid.shape[0] - 2).astype(np.int32)
        a, b = (column - left).astype(np.float32), (row - top).astype(np.float32)
        upper = grid[top, left] * (1 - a) + grid[top, left + 1] * a
        under = grid[top + 1, left] * (1 - a) + grid[top + 1, left + 1] * a
        return np.asarray(np.where(inside, upper * (1 - b) + under * b, 0), dtype=np.float32)
