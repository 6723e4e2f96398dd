"""Pictures, dense depth and lidar scans of a street."""

from __future__ import annotations

from functools import cached_property

import numpy as np
import numpy.typing as npt

from prep.synthetic.cast import GROUND, QUADRIC_FACE, SKY, Array, Hits, Pinhole, RayGrid, Spinning, cast
from prep.synthetic.noise import Floats, Noise
from prep.synthetic.paint import PAINTERS, Surface, paint_ground, paint_sky
from prep.synthetic.rig import CameraRig, inverse
from prep.synthetic.shadow import GroundShadow
from prep.synthetic.street import Street

_LIDAR_RANGE = 120.0
# The shadow map is as fine as pixels 20 m away, within reason.
_SHADOW_TEXELS, _FINEST_SHADOW = 20.0, 0.06
_UPPER, _LOWER = np.linspace(2.0, -8.33, 32), np.linspace(-8.83, -24.33, 32)
# Revolutions are sampled as finely, compared with the picture's columns, as KITTI's HDL-64E is.
_AZIMUTHS_PER_COLUMN, _MOST_AZIMUTHS = 1.7, 2083


class Renderer:
    """Renders frames of one street as one rig sees it.

    Args:
        street: what there is.
        rig: the cameras and the lidar.
    """

    def __init__(self, street: Street, rig: CameraRig) -> None:
        self.street = street
        self.rig = rig
        self.solids = [thing.solid for thing in street.things]
        self.noise = Noise.seeded(street.seed)
        spacing = max(_FINEST_SHADOW, _SHADOW_TEXELS / float(rig.intrinsics[0, 0]))
        self.shadow = GroundShadow.cast(self.solids, street.sun, street.path(), spacing)

    def pose(self, frame: float, camera: int) -> Array:
        """(4,4) pose of a rectified camera: camera -> world."""
        rectified = self.street.trajectory.world_from_rectified(frame)
        return np.asarray(rectified @ inverse(self.rig.camera_from_rectified(camera)), dtype=np.float64)

    def image(self, frame: int, camera: int) -> tuple[npt.NDArray[np.uint8], Floats]:
        """RGB image (H,W,3) and dense depth (H,W) along camera z through the pixel centres, metres, inf in the sky.

        A pixel on an edge is the mean of four rays; its depth is that of the ray through its centre.
        """
        pose = self.pose(frame, camera)
        centre = self._grid(pose, 1)
        fine = self._grid(pose, 2)
        middle, around = cast(self.solids, centre), cast(self.solids, fine)
        colour = self._shade(centre, middle, np.ones(middle.solid.shape, dtype=bool))
        edge = _is_edge(middle, around)
        wanted = np.repeat(np.repeat(edge, 2, axis=0), 2, axis=1)
        fine_colour = self._shade(fine, around, wanted)
        height, width = edge.shape
        blocks = fine_colour.reshape(height, 2, width, 2, 3).mean(axis=(1, 3))
        colour[edge] = blocks[edge]
        pixels = np.clip(np.rint(colour * 255), 0, 255).astype(np.uint8)
        with np.errstate(divide="ignore"):
            return pixels, (1.0 / middle.inverse).astype(np.float32)

    def scan(self, frame: float) -> Floats:
        """Lidar points (n,4): x, y, z in the velodyne's frame, metres, and reflectance in [0,1]; beam after beam."""
        rectified = self.street.trajectory.world_from_rectified(frame)
        pose = rectified @ self.rig.rectified_from_velodyne
        count = min(_MOST_AZIMUTHS, round(_AZIMUTHS_PER_COLUMN * self.rig.size[0]))
        azimuth = -np.pi + 2 * np.pi * (np.arange(count) + 0.5) / count
        slope = -np.tan(np.radians(np.concatenate([_UPPER, _LOWER])))
        grid = Spinning.at(pose, inverse(pose), azimuth, slope)
        hits = cast(self.solids, grid)
        length = np.sqrt(1 + slope**2)[:, None]
        seen = (hits.inverse > 0) & (hits.inverse * _LIDAR_RANGE > length)
        row, column = np.nonzero(seen)
        distance = 1.0 / hits.inverse[seen]
        points = [np.cos(azimuth[column]), np.sin(azimuth[column]), -slope[row]]
        reflectance = self._reflectance[hits.solid[seen]]
        return np.stack([*(axis * distance for axis in points), reflectance], axis=1).astype(np.float32)

    def _grid(self, pose: Array, per_pixel: int) -> Pinhole:
        """Rays through a pixel's centre (1) or the centres of its quarters (2)."""
        K, (width, height) = self.rig.intrinsics, self.rig.size
        u, v = ((np.arange(n * per_pixel) + 0.5) / per_pixel - 0.5 for n in (width, height))
        return Pinhole.at(pose, inverse(pose), (u - K[0, 2]) / K[0, 0], (v - K[1, 2]) / K[1, 1])

    @cached_property
    def _reflectance(self) -> Array:
        """Per thing; the last two entries, which GROUND and SKY index, are the ground and nothing."""
        return np.array([0.2 + 0.6 * float(np.mean(thing.base)) for thing in self.street.things] + [0.0, 0.3])

    @cached_property
    def _tables(self) -> dict[str, npt.NDArray[np.float64]]:
        things = self.street.things
        normals = np.zeros((len(things), QUADRIC_FACE + 1, 3))
        shapes, centres = np.zeros((len(things), 3, 3)), np.zeros((len(things), 3))
        for index, thing in enumerate(things):
            normals[index, : len(thing.solid.normals)] = thing.solid.normals
            if thing.solid.shape is not None:
                shapes[index] = thing.solid.shape.T @ thing.solid.shape
                centres[index] = thing.solid.centre
        return {
            "normal": normals,
            "shape": shapes,
            "centre": centres,
            "local": np.stack([thing.local for thing in things]),
            "size": np.array([thing.size for thing in things]),
            "base": np.array([thing.base for thing in things]),
            "accent": np.array([thing.accent for thing in things]),
            "key": np.array([thing.key for thing in things]),
            "material": np.array([thing.material for thing in things]),
        }

    def _shade(self, grid: RayGrid, hits: Hits, wanted: npt.NDArray[np.bool_]) -> Floats:
        """Colour (H,W,3) of the wanted rays; zero elsewhere. Depends on the point alone, never on the viewer."""
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
        kinds = self._tables["material"][hits.solid[row, column]]
        for kind, painter in PAINTERS.items():
            chosen = kinds == kind
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
        light = self._light(np.array([[0.0, -1.0, 0.0]]), shadow)
        return albedo * light[:, None]

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
        names = ("size", "base", "accent")
        size, base, accent = (tables[name][index].astype(np.float32) for name in names)
        surface = Surface(
            point=point.astype(np.float32),
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
