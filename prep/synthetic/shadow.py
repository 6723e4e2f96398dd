"""The sun's shadows on the ground, cast once per street into a map that is then looked up like a texture."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from prep.synthetic.cast import Array, Solid
from prep.synthetic.noise import Floats

_MARGIN = 14.0
_LEVELS = 6


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
        blocked = np.zeros((len(z), len(x)), dtype=np.float32)
        for solid in solids:
            ground = solid.corners - solid.corners[:, 1:2] / sun[1] * sun
            rows, cols = (
                slice(*np.searchsorted(line, [ground[:, i].min(), ground[:, i].max()])) for i, line in ((2, z), (0, x))
            )
            if rows.start < rows.stop and cols.start < cols.stop:
                blocked[rows, cols] = np.maximum(blocked[rows, cols], _blocks(solid, sun, x[cols], z[rows]))
        levels = [_soften(blocked)]
        while len(levels) < _LEVELS:
            levels.append(_halve(levels[-1]))
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


def _blocks(solid: Solid, sun: Array, x: Array, z: Array) -> npt.NDArray[np.bool_]:
    """Whether the line from each ground point (rows z, columns x) to the sun goes through the solid."""
    enter: Array = np.zeros((len(z), len(x)))
    leave: Array = np.full((len(z), len(x)), np.inf)
    for normal, distance in zip(solid.normals, solid.distances, strict=True):
        room = distance - normal[2] * z[:, None] - normal[0] * x[None, :]
        slope = float(normal @ sun)
        if abs(slope) < 1e-9:
            leave[room < 0] = -1.0
        elif slope < 0:
            np.maximum(enter, room / slope, out=enter)
        else:
            np.minimum(leave, room / slope, out=leave)
    if solid.shape is not None:
        ahead = solid.shape @ sun
        square = float(ahead @ ahead)
        linear, constant = np.zeros_like(enter), np.full_like(enter, -1.0)
        for axis, step, middle in zip(solid.shape, ahead, solid.shape @ solid.centre, strict=True):
            start = axis[2] * z[:, None] + axis[0] * x[None, :] - middle
            linear += step * start
            constant += start**2
        discriminant = linear**2 - square * constant
        root = np.sqrt(np.maximum(discriminant, 0))
        enter, leave = np.maximum(enter, (-linear - root) / square), np.minimum(leave, (-linear + root) / square)
        leave[discriminant < 0] = -1.0
    return np.asarray(enter < leave)


def _soften(grid: Floats) -> Floats:
    """Half-shadow one texel wide: the [1 2 1] filter both ways."""
    for axis in (0, 1):
        padded = np.pad(grid, [(1, 1) if i == axis else (0, 0) for i in (0, 1)], mode="edge")
        ahead, behind = (slice(2, None), slice(None)), (slice(None, -2), slice(None))
        if axis == 1:
            ahead, behind = ahead[::-1], behind[::-1]
        grid = np.asarray(0.5 * grid + 0.25 * (padded[ahead] + padded[behind]), dtype=np.float32)
    return grid


def _halve(grid: Floats) -> Floats:
    rows, cols = grid.shape[0] // 2 * 2, grid.shape[1] // 2 * 2
    quarters = grid[:rows, :cols].reshape(rows // 2, 2, cols // 2, 2)
    return np.asarray(quarters.mean(axis=(1, 3)), dtype=np.float32)
