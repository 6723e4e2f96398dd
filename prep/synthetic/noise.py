"""Band-limited procedural texture: value noise in three dimensions whose octaves fade with the pixel's footprint."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from prep.synthetic.rig import rotation

Floats = npt.NDArray[np.float32]

_PERIOD = 64
_TURN = rotation(0.5, 0.9, 0.3).astype(np.float32)  # keeps the lattices of the octaves from lining up


def resolved(spacing: float, footprint: Floats) -> Floats:
    """Weight in [0,1] of detail `spacing` metres apart seen with a pixel footprint in metres: 0 where it would alias.

    Detail vanishes where a pixel is wider than the spacing and is whole where two pixels fit between neighbours,
    so that a frame holds next to nothing above the sampling limit and does not shimmer as the camera moves.
    """
    ramp = np.clip(np.float32(spacing) / footprint - 0.9, 0.0, 1.0)
    return np.asarray(ramp * ramp * (3.0 - 2.0 * ramp), dtype=np.float32)


def scaled_dot(points: Floats, vector: Floats) -> Floats:
    """points (n,3) · vector (3,), term by term: a matrix product may round differently with the number of threads."""
    return np.asarray(points[:, 0] * vector[0] + points[:, 1] * vector[1] + points[:, 2] * vector[2], dtype=np.float32)


def _lattice(value: Floats, shift: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32], Floats]:
    """Table offsets of the lattice points below and above, and the smoothed share of the one above."""
    floor = np.floor(value)
    part = value - floor
    low = floor.astype(np.int32) & (_PERIOD - 1)
    return low << shift, ((low + 1) & (_PERIOD - 1)) << shift, part * part * (np.float32(3) - np.float32(2) * part)


@dataclass(frozen=True)
class Noise:
    """Seeded value noise.

    Attributes:
        table: (64^3,) lattice values in [-1,1].
    """

    table: Floats

    @classmethod
    def seeded(cls, seed: int) -> Noise:
        """Noise whose lattice is drawn from a seed."""
        return cls(np.random.default_rng(seed).uniform(-1, 1, _PERIOD**3).astype(np.float32))

    def cell(self, *indices: npt.NDArray[np.integer]) -> Floats:
        """A value in [-1,1] for each cell of an integer grid (two or three indices)."""
        mixed = indices[0].astype(np.int64) * 7919
        for number, index in enumerate(indices[1:]):
            mixed = mixed + index.astype(np.int64) * (104729, 15485863)[number]
        return np.asarray(self.table[(mixed ^ (mixed >> 13)) & (_PERIOD**3 - 1)], dtype=np.float32)

    def smooth(self, x: Floats, y: Floats, z: Floats) -> Floats:
        """Noise at points in lattice units, coordinate by coordinate: (n,) in [-1,1], trilinear, smoothed weights."""
        (x0, x1, px), (y0, y1, py), (z0, z1, pz) = (_lattice(v, shift) for v, shift in ((x, 12), (y, 6), (z, 0)))

        def along_z(base: npt.NDArray[np.int32]) -> Floats:
            first = self.table[base + z0]
            return np.asarray(first + pz * (self.table[base + z1] - first), dtype=np.float32)

        def along_y(base: npt.NDArray[np.int32]) -> Floats:
            first = along_z(base + y0)
            return np.asarray(first + py * (along_z(base + y1) - first), dtype=np.float32)

        first = along_y(x0)
        return np.asarray(first + px * (along_y(x1) - first), dtype=np.float32)

    def octaves(self, points: Floats, footprint: Floats, scales: dict[float, float]) -> Floats:
        """Sum of octaves at points (n,3) in metres: `scales` maps lattice spacing in metres to amplitude.

        Octaves that a pixel cannot resolve are left out pixel by pixel (`footprint` (n,), metres).
        """
        total = np.zeros(len(points), dtype=np.float32)
        for spacing, amplitude in scales.items():
            weight = resolved(spacing, footprint)
            seen = np.flatnonzero(weight)
            if len(seen):
                place = points if len(seen) == len(points) else points[seen]
                shift = np.float32(97.3 * spacing)
                lattice = [scaled_dot(place, row / np.float32(spacing)) + shift for row in _TURN]
                total[seen] += amplitude * weight[seen] * self.smooth(*lattice)
        return total
