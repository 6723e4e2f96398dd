"""Band-limited procedural texture: value noise in three dimensions whose octaves fade with the pixel's footprint."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from prep.synthetic.rig import dot, rotation

Floats = npt.NDArray[np.float32]

_PERIOD = 64
_TURN = rotation(0.5, 0.9, 0.3).astype(np.float32)
"""Turns each octave's lattice, so that the octaves do not line up with the axes."""


def resolved(spacing: float, footprint: Floats) -> Floats:
    """Weight in [0,1] of detail `spacing` metres apart, seen with a pixel footprint in metres.

    It is 0 if a pixel is wider than the spacing and 1 if two pixels fit into it. So a frame holds next to nothing
    above the sampling limit and does not shimmer as the camera moves.
    """
    ramp = np.clip(np.float32(spacing) / footprint - 0.9, 0.0, 1.0)
    return np.asarray(ramp * ramp * (3.0 - 2.0 * ramp), dtype=np.float32)


def _lattice(value: Floats, shift: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32], Floats]:
    """Table offsets of the lattice points below and above, and the smoothed share of the one above."""
    floor = np.floor(value)
    part = value - floor
    low = floor.astype(np.int32) & (_PERIOD - 1)
    return low << shift, ((low + 1) & (_PERIOD - 1)) << shift, part * part * (np.float32(3) - np.float32(2) * part)


@dataclass(frozen=True)
class Noise:
    """Seeded value noise. `table` (64^3,) holds the lattice's values in [-1,1]."""

    table: Floats

    @classmethod
    def seeded(cls, seed: int) -> Noise:
        """Noise whose lattice is drawn from a seed."""
        return cls(np.random.default_rng(seed).uniform(-1, 1, _PERIOD**3).astype(np.float32))

    def cell(self, *indices: npt.NDArray[np.integer]) -> Floats:
        """A value in [-1,1] for each cell of an integer grid (two or three indices)."""
        mixed = indices[0].astype(np.int64) * 7919
        for factor, index in zip((104729, 15485863), indices[1:], strict=False):
            mixed = mixed + index.astype(np.int64) * factor
        return np.asarray(self.table[(mixed ^ (mixed >> 13)) & (_PERIOD**3 - 1)], dtype=np.float32)

    def smooth(self, x: Floats, y: Floats, z: Floats) -> Floats:
        """Noise (n,) in [-1,1] at points in lattice units: trilinear, with smoothed weights."""
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
        """Sum (n,) of octaves at points (n,3) in metres, without those that a pixel cannot resolve.

        Args:
            footprint: (n,) width of a pixel, metres.
            scales: lattice spacing in metres -> amplitude.
        """
        total = np.zeros(len(points), dtype=np.float32)
        for spacing, amplitude in scales.items():
            weight = resolved(spacing, footprint)
            seen = np.flatnonzero(weight)
            if len(seen):
                place = points if len(seen) == len(points) else points[seen]
                shift = np.float32(97.3 * spacing)
                lattice = [dot(place, row / np.float32(spacing)) + shift for row in _TURN]
                total[seen] += amplitude * weight[seen] * self.smooth(*lattice)
        return total
