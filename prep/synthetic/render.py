"""Images, dense depth and lidar scans of a street."""

from __future__ import annotations

from functools import cached_property

import numpy as np
import numpy.typing as npt

from prep.synthetic.cast import GROUND, QUADRIC_FACE, SKY, Hits, Pinhole, RayGrid, Spinning, cast
from prep.synthetic.noise import Floats, Noise
from prep.synthetic.paint import PAINTERS, Surface, paint_ground, paint_sky
from prep.synthetic.rig import Array, CameraRig, inverse
from prep.synthetic.shadow import GroundShadow
from prep.synthetic.street import Street

_LIDAR_RANGE = 120.0
_SHADOW_TEXELS, _FINEST_SHADOW = 20.0, 0.06
"""Metres: a texel of the shadow map is as wide as a pixel at the first distance, and no finer than the second."""
_UPPER, _LOWER = np.linspace(2.0, -8.33, 32), np.linspace(-8.83, -24.33, 32)
"""Degrees above the horizon of the beams of KITTI's HDL-64E."""
_AZIMUTHS_PER_COLUMN, _MOST_AZIMUTHS = 1.7, 2083
"""Samples of a revolution for each column of the image, and at most, as in KITTI."""


class Renderer:
    """Renders frames of one street as one rig sees them."""

    def __init__(self, street: Street, rig: CameraRig) -> None:
        self.street = street
        self.rig = rig
        self.solids = [thing.solid for thing in street.things]
        self.noise = Noise.seeded(street.seed)
        spacing = max(_FINEST_SHADOW, _SHADOW_TEXELS / float(rig.intrinsics[0, 0]))
        self.shadow = GroundShadow.cast(self.solids, street.sun, street.path(), spacing)

    def pose(self, frame: float, camera: int) -> Array:
        """(4,4), rectified camera -> world."""
        rectified = self.street.trajectory.world_from_rectified(frame)
        return np.asarray(rectified @ inverse(self.rig.camera_from_rectified(camera)), dtype=np.float64)

    def image(self, frame: int, camera: int) -> tuple[npt.NDArray[np.uint8], Floats]:
        """RGB image (H,W,3) and depth (H,W) along camera z, metres, inf in the sky.

        A pixel on an edge has the mean colour of four rays. Its depth is that of the ray through its centre.
        """
        pose = self.pose(frame, camera)
        centre, fine = self._grid(pose, 1), self._grid(pose, 2)
        middle, around = cast(self.solids, centre), cast(self.solids, fine)
        colour = self._shade(centre, middle, np.ones(middle.solid.shape, dtype=bool))
        edge = _is_edge(middle, around)
        fine_colour = self._shade(fine, around, edge.repeat(2, axis=0).repeat(2, axis=1))
        colour[edge] = fine_colour.reshape(edge.shape[0], 2, -1, 2, 3).mean(axis=(1, 3))[edge]
        pixels = np.clip(np.rint(colour * 255), 0, 255).astype(np.uint8)
        with np.errstate(divide="ignore"):
            return pixels, (1.0 / middle.inverse).astype(np.float32)

    def scan(self, frame: float) -> Floats:
        """Lidar points (n,4), beam after beam: x, y, z along the velodyne's axes, metres, and reflectance in [0,1]."""
        rectified = self.street.trajectory.world_from_rectified(frame)
        pose = rectified @ self.rig.rectified_from_velodyne
        count = min(_MOST_AZIMUTHS, round(_AZIMUTHS_PER_COLUMN * self.rig.size[0]))
        azimuth = -np.pi + 2 * np.pi * (np.arange(count) + 0.5) / count
        slope = -np.tan(np.radians(np.concatenate([_UPPER, _LOWER])))
        grid = Spinning.at(pose, azimuth, slope)
        hits = cast(self.solids, grid)
        length = np.sqrt(1 + slope**2)[:, None]
        seen = (hits.inverse > 0) & (hits.inverse * _LIDAR_RANGE > length)
        row, column = np.nonzero(seen)
        distance = 1.0 / hits.inverse[seen]
        points = [np.cos(azimuth[column]), np.sin(azimuth[column]), -slope[row]]
        reflectance = self._reflectance[hits.solid[seen]]
        return np.stack([*(axis * distance for axis in points), reflectance], axis=1).astype(np.float32)

    def _grid(self, pose: Array, per_pixel: int) -> Pinhole:
        """Rays through the centres of pixels (1) or of their quarters (2)."""
        K, (width, height) = self.rig.intrinsics, self.rig.size
        u, v = ((np.arange(n * per_pixel) + 0.5) / per_pixel - 0.5 for n in (width, height))
        return Pinhole.at(pose, (u - K[0, 2]) / K[0, 0], (v - K[1, 2]) / K[1, 1])

    @cached_property
    def _reflectance(self) -> Array:
        """Reflectance of each thing; the last two entries, which SKY and GROUND index, are nothing and the ground."""
        return np.array([0.2 + 0.6 * float(np.mean(thing.base)) for thing in self.street.things] + [0.0, 0.3])

    @cached_property
    def _tables(self) -> dict[str, npt.NDArray[np.float64]]:
        """Properties of the things, by name, one row a thing."""
        things, solids = self.street.things, self.solids
        normals = np.zeros((len(things), QUADRIC_FACE + 1, 3))
        for index, solid in enumerate(solids):
            normals[index, : len(solid.normals)] = solid.normals
        names = ("local", "size", "base", "accent", "key", "material")
        flat = np.zeros((3, 3))
        return {name: np.array([getattr(thing, name) for thing in things]) for name in names} | {
            "normal": normals,
            "shape": np.array([flat if s.shape is None else s.shape.T @ s.shape for s in solids]),
            "centre": np.array([solid.centre for solid in solids]),
        }

    def _shade(self, grid: RayGrid, hits: Hits, wanted: npt.NDArray[np.bool_]) -> Floats:
        """Colour (H,W,3) of the wanted rays, 0 elsewhere. A point has the same colour from every side."""
        colour: Floats = np.zeros((*hits.solid.shape, 3), dtype=np.float32)
        sky = wanted & (hits.solid == SKY)
        row, column = np.nonzero(sky)
        direction = grid.rows[row] + grid.cols[column]
        direction = direction / np.linalg.norm(direction, axis=1, keepdims=True)
        colour[sky] = paint_sky(direction.astype(np.float32), self.noise)
        ground = wanted & (hits.solid == GROUND)
        colour[ground] = self._shade_ground(grid, hits, ground)
        row, column = np.nonzero(wanted & (hits.solid >= 0))
        if not len(row):
            return colour
        materials = self._tables["material"][hits.solid[row, column]]
        for material, painter in PAINTERS.items():
            chosen = materials == material
            if chosen.any():
                at = (row[chosen], column[chosen])
                surface, light = self._surface(grid, hits, at)
                colour[at] = painter(surface, self.noise) * light[:, None]
        return colour

    def _footprint(self, distance: Array) -> Floats:
        return np.asarray(distance / self.rig.intrinsics[0, 0], dtype=np.float32)

    def _shade_ground(self, grid: RayGrid, hits: Hits, ground: npt.NDArray[np.bool_]) -> Floats:
        row, column = np.nonzero(ground)
        direction = grid.rows[row] + grid.cols[column]
        distance = 1.0 / hits.inverse[ground]
        point = grid.origin + direction * distance[:, None]
        slant = (np.linalg.norm(direction, axis=1) / direction[:, 1]).astype(np.float32)
        footprint = self._footprint(distance)
        view = direction.astype(np.float32)
        albedo = paint_ground(self.street, point.astype(np.float32), view, footprint, slant, self.noise)
        shadow = self.shadow.at(point[:, 0].astype(np.float32), point[:, 2].astype(np.float32), footprint * slant)
        return albedo * self._light(np.array([[0.0, -1.0, 0.0]]), shadow)[:, None]

    def _surface(self, grid: RayGrid, hits: Hits, at: tuple[npt.NDArray[np.intp], ...]) -> tuple[Surface, Floats]:
        index, face, tables = hits.solid[at], hits.face[at], self._tables
        direction = grid.rows[at[0]] + grid.cols[at[1]]
        distance = 1.0 / hits.inverse[at]
        point = grid.origin + direction * distance[:, None]
        round_normal = np.einsum("nij,nj->ni", tables["shape"][index], point - tables["centre"][index])
        normal = np.where((face == QUADRIC_FACE)[:, None], round_normal, tables["normal"][index, face])
        normal = normal / np.maximum(np.linalg.norm(normal, axis=1, keepdims=True), 1e-12)
        facing = np.abs(np.sum(normal * direction, axis=1)) / np.linalg.norm(direction, axis=1)
        local = np.einsum("nij,nj->ni", tables["local"][index, :3, :3], point) + tables["local"][index, :3, 3]
        size, base, accent = (tables[name][index].astype(np.float32) for name in ("size", "base", "accent"))
        surface = Surface(
            local=local.astype(np.float32),
            face=face,
            footprint=self._footprint(distance),
            slant=(1 / np.maximum(facing, 0.02)).astype(np.float32),
            size=size,
            base=base,
            accent=accent,
            key=tables["key"][index].astype(np.int64),
        )
        return surface, self._light(normal)

    def _light(self, normal: Array, shadow: Floats | float = 0.0) -> Floats:
        """Diffuse light (n,) on surfaces with outward normals (n,3): sun, sky from above, ground from below."""
        sun = np.clip(np.sum(normal * self.street.sun, axis=1), 0, 1) * (1 - shadow)
        sky = 0.5 - 0.5 * normal[:, 1]
        return np.asarray(0.38 + 0.20 * sky + 0.64 * sun, dtype=np.float32)


def _is_edge(middle: Hits, around: Hits) -> npt.NDArray[np.bool_]:
    """Pixels whose four quarters and centre do not all meet the same face of the same solid."""
    edge = np.zeros(middle.solid.shape, dtype=bool)
    for row in (0, 1):
        for column in (0, 1):
            edge |= around.solid[row::2, column::2] != middle.solid
            edge |= around.face[row::2, column::2] != middle.face
    return edge
