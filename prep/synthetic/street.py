"""A street as a list of convex solids: buildings, parked cars, trees, lamps, signs, hedges, distant hills."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from prep.synthetic.cast import Solid
from prep.synthetic.rig import Array, Place, Road, Trajectory, inverse

ROAD_HALF_WIDTH = 5.8
PAVEMENT_EDGE = 8.6
_BEHIND, _AHEAD = 45.0, 190.0


Material = IntEnum("Material", "FACADE ROOF PAINT CABIN RUBBER BARK LEAVES METAL SIGN HILL WOOD")
"""What a surface is made of, which decides how it is painted."""
Colour = tuple[float, float, float]
"""Red, green, blue in [0,1]."""


@dataclass(frozen=True)
class Thing:
    """A solid and its appearance.

    Attributes:
        local: (4,4), world -> the thing's own axes: x to its right, y down from the ground, z along it.
        size: extent along those axes, metres.
        key: number that makes its texture differ from that of others.
    """

    solid: Solid
    material: Material
    local: Array
    size: tuple[float, float, float]
    base: Colour
    accent: Colour
    key: int


@dataclass(frozen=True)
class Street:
    """The world of one synthetic drive.

    Attributes:
        crossings: z of the middle of each zebra crossing.
        sun: unit vector (3,) towards it.
        end: z at which a building closes the street.
        seed: of the textures.
    """

    road: Road
    trajectory: Trajectory
    things: list[Thing]
    crossings: tuple[float, ...]
    sun: Array
    end: float
    seed: int

    def path(self) -> Array:
        """Points (n,2) of the centre line: x, z in metres."""
        z = np.arange(-_BEHIND, self.end, 5.0)
        return np.stack([self.road.centre(z), z], axis=1)


Rectangle = tuple[float, float, float]
"""Horizontal, symmetric in x: half its width, and the z of its back and front, metres."""


def _frustum(place: Place, bottom: float, top: float, lower: Rectangle, upper: Rectangle) -> Solid:
    """The solid between two rectangles at two heights above the ground."""
    height, (wide, back, front), (wide_top, back_top, front_top) = top - bottom, lower, upper
    lean, lean_back, lean_front = wide_top - wide, back_top - back, front_top - front
    normals = np.array(
        [
            [height, lean, 0],
            [-height, lean, 0],
            [0, lean_front, height],
            [0, -lean_back, -height],
            [0, -1, 0],
            [0, 1, 0],
        ]
    )
    on_face = np.array(
        [
            [wide, -bottom, 0],
            [-wide, -bottom, 0],
            [0, -bottom, front],
            [0, -bottom, back],
            [0, -top, 0],
            [0, -bottom, 0],
        ]
    )
    half, first, last = max(wide, wide_top), min(back, back_top), max(front, front_top)
    corners = np.array([[x, -y, z] for x in (-half, half) for y in (bottom, top) for z in (first, last)])
    normals = normals / np.linalg.norm(normals, axis=1, keepdims=True)
    frame = place.frame()
    world_normals = normals @ frame[:3, :3].T
    distances = np.sum(normals * on_face, axis=1) + world_normals @ frame[:3, 3]
    return Solid(world_normals, distances, corners @ frame[:3, :3].T + frame[:3, 3])


def _box(place: Place, width: float, length: float, bottom: float, top: float) -> Solid:
    rectangle = (width / 2, -length / 2, length / 2)
    return _frustum(place, bottom, top, rectangle, rectangle)


def _ellipsoid(place: Place, height: float, radii: tuple[float, float, float]) -> Solid:
    turn = place.frame()[:3, :3]
    centre = np.array([place.x, -height, place.z])
    signs = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)], dtype=np.float64)
    shape = np.diag(1.0 / np.array(radii)) @ turn.T
    return Solid(np.zeros((0, 3)), np.zeros(0), (signs * radii) @ turn.T + centre, shape, centre)


def _cylinder(place: Place, radius: float, bottom: float, top: float) -> Solid:
    box = _box(place, 2 * radius, 2 * radius, bottom, top)
    shape = np.diag([1 / radius, 0.0, 1 / radius])
    return Solid(box.normals[4:], box.distances[4:], box.corners, shape, np.array([place.x, 0.0, place.z]))


def _wheel(place: Place, radius: float, width: float) -> Solid:
    box = _box(place, width, 2 * radius, 0.0, 2 * radius)
    turn = place.frame()[:3, :3]
    shape = np.diag([0.0, 1 / radius, 1 / radius]) @ turn.T
    return Solid(box.normals[:2], box.distances[:2], box.corners, shape, np.array([place.x, -radius, place.z]))


class _Builder:
    """Adds the things of a street at random places along its road."""

    def __init__(self, road: Road, rng: np.random.Generator) -> None:
        self.road = road
        self.rng = rng
        self.things: list[Thing] = []

    def add(
        self,
        solid: Solid,
        material: Material,
        place: Place,
        size: tuple[float, float, float],
        base: npt.ArrayLike,
        accent: npt.ArrayLike = (0.5, 0.5, 0.5),
    ) -> None:
        (r, g, b), (r2, g2, b2) = (np.clip(np.asarray(c, dtype=float), 0, 1).tolist() for c in (base, accent))
        key = int(self.rng.integers(1 << 16))
        self.things.append(Thing(solid, material, inverse(place.frame()), size, (r, g, b), (r2, g2, b2), key))

    def uniform(self, low: float, high: float) -> float:
        return float(self.rng.uniform(low, high))

    def pick(self, colours: list[Colour], spread: float = 0.05) -> Array:
        colour = np.array(colours[self.rng.integers(len(colours))])
        return np.asarray(colour + self.rng.uniform(-spread, spread, 3), dtype=np.float64)

    def building(self, z: float, side: int, length: float) -> None:
        rng = self.uniform
        setback, deep, tall = rng(9.0, 11.5), rng(9, 13), rng(2, 5.99) // 1 * 3.0 + rng(0.6, 1.2)
        place = self.road.place(z, side * (setback + deep / 2))
        walls = [(0.62, 0.36, 0.28), (0.78, 0.70, 0.55), (0.66, 0.64, 0.62), (0.55, 0.44, 0.34), (0.80, 0.78, 0.74)]
        walls += [(0.48, 0.52, 0.58), (0.70, 0.50, 0.38)]
        base, trim = self.pick(walls), self.pick([(0.85, 0.85, 0.82), (0.35, 0.28, 0.24), (0.30, 0.36, 0.40)])
        size = (deep, tall, length)
        self.add(_box(place, deep, length, 0.0, tall), Material.FACADE, place, size, base, trim)
        if rng(0, 1) < 0.55:
            half, end, rise = deep / 2 + 0.35, length / 2 + 0.1, rng(1.8, 3.2)
            roof = _frustum(place, tall, tall + rise, (half, -end, end), (0.05, -end, end))
            self.add(roof, Material.ROOF, place, size, self.pick([(0.45, 0.22, 0.17), (0.28, 0.27, 0.29)]))
        else:
            edge = _box(place, deep + 0.5, length + 0.1, tall, tall + 0.35)
            self.add(edge, Material.ROOF, place, size, base * 0.7)
        if rng(0, 1) < 0.45:  # a porch or bay that stands out of the front
            out, wide, high = rng(0.6, 1.3), rng(2.0, 3.5), rng(2.6, min(5.5, tall))
            bay = place.offset(-side * (deep / 2 + out / 2 - 0.05), rng(-0.3, 0.3) * length)
            size = (out, high, wide)
            self.add(_box(bay, out, wide, 0.0, high), Material.FACADE, bay, size, self.pick(walls), trim)

    def car(self, z: float, lateral: float, turn: float) -> None:
        rng = self.uniform
        place = self.road.place(z, lateral, turn + rng(-0.03, 0.03))
        length, wide, scale = rng(3.9, 4.8), rng(0.84, 0.93), rng(0.96, 1.12)
        van = rng(0, 1) < 0.2
        paints = [(0.75, 0.75, 0.77), (0.12, 0.12, 0.14), (0.60, 0.10, 0.10), (0.14, 0.22, 0.45), (0.88, 0.88, 0.86)]
        paints += [(0.36, 0.38, 0.40), (0.20, 0.34, 0.26), (0.72, 0.60, 0.30)]
        base = self.pick(paints, 0.03)
        half, size = length / 2, (2 * wide, 1.45 * scale, length)
        waist, top = 0.88 * scale, (1.95 if van else 1.45) * scale
        middle = (wide, -half - 0.03, half + 0.03)
        lower = _frustum(place, 0.22, 0.55 * scale, (wide, -half, half), middle)
        upper = _frustum(place, 0.55 * scale, waist, middle, (wide * 0.95, -half + 0.08, half - 0.1))
        if van:
            sill, roof = (wide * 0.95, -half + 0.1, half - 0.6), (wide * 0.86, -half + 0.15, half - 1.3)
        else:
            sill, roof = (wide * 0.93, -half + 0.25, half - 1.05), (wide * 0.72, -half + 0.85, half - 1.85)
        for body in (lower, upper):
            self.add(body, Material.PAINT, place, size, base)
        self.add(_frustum(place, waist, top, sill, roof), Material.CABIN, place, (size[0], top, waist), base)
        for side in (-1, 1):
            for axle in (-0.31, 0.30):
                wheel = place.offset(side * (wide - 0.09), axle * length)
                self.add(_wheel(wheel, 0.31 * scale, 0.2), Material.RUBBER, wheel, size, (0.06, 0.06, 0.07))

    def tree(self, z: float, lateral: float) -> None:
        rng = self.uniform
        place, tall, radius = self.road.place(z, lateral), rng(2.2, 3.2), rng(0.14, 0.26)
        size = (2 * radius, tall, 2 * radius)
        self.add(_cylinder(place, radius, 0, tall + 1), Material.BARK, place, size, self.pick([(0.32, 0.25, 0.19)]))
        leaves = self.pick([(0.20, 0.36, 0.12), (0.30, 0.40, 0.14), (0.42, 0.38, 0.12), (0.16, 0.30, 0.16)])
        crown = rng(1.1, 1.6)
        for lump in range(4):
            angle, away = rng(0, 2 * math.pi), 0.0 if lump == 0 else crown * rng(0.45, 0.75)
            centre = place.offset(away * math.sin(angle), away * math.cos(angle), rng(0, 3))
            radii = (crown * rng(0.65, 0.95), crown * rng(0.6, 0.9), crown * rng(0.65, 0.95))
            height = tall + 0.75 * crown + (0.6 * crown if lump == 0 else rng(-0.1, 0.5) * crown)
            self.add(_ellipsoid(centre, height, radii), Material.LEAVES, centre, radii, leaves)

    def lamp(self, z: float, side: int) -> None:
        place, tall = self.road.place(z, side * 6.15), self.uniform(5.5, 7.0)
        grey, size = self.pick([(0.38, 0.40, 0.40), (0.22, 0.25, 0.24)], 0.02), (0.2, tall, 0.2)
        self.add(_cylinder(place, 0.09, 0, tall), Material.METAL, place, size, grey)
        arm = place.offset(-side * 0.7, 0)
        self.add(_box(arm, 1.6, 0.14, tall - 0.12, tall), Material.METAL, arm, size, grey)

    def sign(self, z: float, side: int) -> None:
        place, tall = self.road.place(z, side * 6.3), self.uniform(2.2, 2.8)
        grey, size = (0.55, 0.56, 0.56), (0.7, 0.7, tall)
        self.add(_cylinder(place, 0.04, 0, tall), Material.METAL, place, size, grey)
        colour = self.pick([(0.75, 0.12, 0.10), (0.10, 0.25, 0.60), (0.85, 0.70, 0.10)], 0.02)
        plate = _box(place.offset(0, -0.06), 0.68, 0.04, tall - 0.66, tall)
        self.add(plate, Material.SIGN, place, size, colour, (0.92, 0.92, 0.9))

    def hedge(self, z: float, side: int, length: float) -> None:
        place, tall = self.road.place(z, side * self.uniform(8.7, 9.3)), self.uniform(0.8, 1.7)
        green = self.pick([(0.18, 0.32, 0.12), (0.25, 0.36, 0.14)])
        size = (0.9, tall, length)
        if self.uniform(0, 1) < 0.6:
            self.add(_box(place, 0.9, length, 0, tall), Material.LEAVES, place, size, green)
        else:
            wood = self.pick([(0.45, 0.34, 0.24), (0.62, 0.60, 0.56)])
            self.add(_box(place, 0.12, length, 0, tall), Material.WOOD, place, size, wood)

    def side(self, side: int, end: float) -> None:
        rng = self.uniform
        z = -_BEHIND
        while z < end:
            length = rng(8, 17)
            if rng(0, 1) < 0.78:
                self.building(z + length / 2, side, length)
            else:
                self.hedge(z + length / 2, side, length - 0.5)
                for _ in range(2):
                    self.tree(z + rng(1, length - 1), side * rng(11, 15))
            z += length + (rng(0.0, 1.0) if rng(0, 1) < 0.7 else rng(2, 5))
        z = -_BEHIND + rng(0, 6)
        while z < end:
            if rng(0, 1) < 0.72:
                self.car(z, side * rng(4.45, 4.7), 0.0 if side > 0 else math.pi)
            z += rng(5.6, 8.5)
        z = -_BEHIND + rng(0, 12)
        while z < end:
            what = rng(0, 1)
            if what < 0.5:
                self.tree(z, side * rng(6.7, 7.2))
            elif what < 0.85:
                self.lamp(z, side)
            else:
                self.sign(z, side)
            z += rng(6, 14)

    def distance(self, end: float) -> None:
        """Add the building that closes the street, and hills all around."""
        place = self.road.place(end + 14, 0)
        wall = self.pick([(0.62, 0.50, 0.42), (0.70, 0.68, 0.64)])
        self.add(_box(place, 46, 14, 0, 11), Material.FACADE, place, (46, 11, 14), wall, self.pick([(0.85, 0.85, 0.8)]))
        for hill in range(14):
            angle, away = (hill + self.uniform(0, 1)) / 14 * 2 * math.pi, self.uniform(450, 650) + end / 2
            place = Place(away * math.sin(angle), end / 2 + away * math.cos(angle), angle)
            radii = (self.uniform(120, 260), self.uniform(30, 75), 80.0)
            green = self.pick([(0.34, 0.42, 0.36), (0.40, 0.46, 0.44)], 0.03)
            self.add(_ellipsoid(place, 0.0, radii), Material.HILL, place, radii, green)


def build_street(seed: int, drive: int, frames: int) -> Street:
    """Street of one drive, long enough for its frames. The same arguments give the same street."""
    rng = np.random.default_rng([seed, drive])
    waves = tuple(
        (float(rng.uniform(*size)), float(rng.uniform(*length)), float(rng.uniform(0, 2 * math.pi)))
        for size, length in (((2.0, 5.0), (150, 220)), ((0.3, 0.9), (70, 110)))
    )
    road = Road(waves)
    trajectory = Trajectory(road, float(rng.uniform(0.9, 1.15)), float(rng.uniform(0, 2 * math.pi)))
    end = trajectory.speed * frames + _AHEAD
    builder = _Builder(road, rng)
    for side in (-1, 1):
        builder.side(side, end)
    builder.distance(end)
    crossings = np.arange(rng.uniform(8, 30), end, rng.uniform(45, 70))
    # The sun stands over an end of the street, high enough to reach the road between the buildings.
    height, around = math.radians(rng.uniform(38, 58)), rng.choice([0, math.pi]) + math.radians(rng.uniform(-40, 40))
    sun = np.array([math.cos(height) * math.sin(around), -math.sin(height), math.cos(height) * math.cos(around)])
    stripes = tuple(float(z) for z in crossings)
    return Street(road, trajectory, builder.things, stripes, sun, end, int(rng.integers(1 << 31)))
