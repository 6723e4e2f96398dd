"""The ray caster against the textbook: every solid against every ray, by division, with no windows and no order."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from prep.synthetic.cast import GROUND, QUADRIC_FACE, SKY, Hits, Pinhole, RayGrid, Solid, Spinning, cast

Array = npt.NDArray[np.float64]

AXES = np.array([[1, 0, 0], [-1, 0, 0], [0, 0, 1], [0, 0, -1], [0, -1, 0], [0, 1, 0]], dtype=float)
SIGNS = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)], dtype=float)


def box(centre: Array, half: Array, turn: Array) -> Solid:
    normals = AXES @ turn.T
    return Solid(normals, normals @ centre + np.abs(AXES) @ half, (SIGNS * half) @ turn.T + centre)


def ellipsoid(centre: Array, half: Array, turn: Array) -> Solid:
    return Solid(np.zeros((0, 3)), np.zeros(0), (SIGNS * half) @ turn.T + centre, np.diag(1 / half) @ turn.T, centre)


def capped_cylinder(centre: Array, half: Array, turn: Array) -> Solid:
    """An elliptic cylinder along its own y, closed by two planes."""
    block = box(centre, half, turn)
    shape = np.diag([1 / half[0], 0, 1 / half[2]]) @ turn.T
    return Solid(block.normals[4:], block.distances[4:], block.corners, shape, centre)


def textbook(solids: list[Solid], origin: Array, directions: Array) -> tuple[Array, npt.NDArray[np.int64]]:
    """Smallest positive ray parameter (n,) and the index of what is there, for each of (n,3) directions."""
    with np.errstate(divide="ignore"):
        nearest = np.where(directions[:, 1] > 0, -origin[1] / directions[:, 1], np.inf)
    what = np.where(np.isfinite(nearest), GROUND, SKY)
    for index, solid in enumerate(solids):
        enter, leave = np.full(len(directions), -np.inf), np.full(len(directions), np.inf)
        for normal, distance in zip(solid.normals, solid.distances, strict=True):
            slope = directions @ normal
            at = (distance - origin @ normal) / slope
            enter = np.where(slope < 0, np.maximum(enter, at), enter)
            leave = np.where(slope > 0, np.minimum(leave, at), leave)
        if solid.shape is not None:
            start, ahead = solid.shape @ (origin - solid.centre), directions @ solid.shape.T
            a, b, c = (ahead**2).sum(axis=1), ahead @ start, start @ start - 1
            root = np.sqrt(np.maximum(b * b - a * c, 0))
            miss = b * b < a * c
            enter = np.where(miss, np.inf, np.maximum(enter, (-b - root) / a))
            leave = np.where(miss, -np.inf, np.minimum(leave, (-b + root) / a))
        hit = (enter < leave) & (enter > 0) & (enter < nearest)
        nearest, what = np.where(hit, enter, nearest), np.where(hit, index, what)
    return nearest, what


def orthogonal(rng: np.random.Generator) -> Array:
    turn = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    return turn * np.linalg.det(turn)


def clutter(rng: np.random.Generator, origin: Array, count: int) -> list[Solid]:
    """Solids of all kinds and directions around the sensor, near and far, none around it."""
    solids = []
    while len(solids) < count:
        half, turn = rng.uniform(0.1, 1.5, 3), orthogonal(rng)
        distance = rng.uniform(0.3, 25) if len(solids) % 10 == 0 else rng.uniform(5, 25)
        direction = rng.normal(size=3) * [1, 0.3, 1]
        centre = origin + distance * direction / np.linalg.norm(direction)
        if (np.abs((origin - centre) @ turn) < half + 0.2).all():
            continue
        solids.append((box, ellipsoid, capped_cylinder)[len(solids) % 3](centre, half, turn))
    return solids


def pose(rng: np.random.Generator, axes: Array) -> Array:
    """Any heading, tilted by some ten degrees; `axes` are the sensor's in the world when it looks along z."""
    heading = rng.uniform(0, 2 * np.pi)
    sine, cosine = np.sin(heading), np.cos(heading)
    tilt = np.linalg.qr(np.eye(3) + 0.15 * rng.normal(size=(3, 3)))[0]
    tilt = tilt * np.sign(np.diag(tilt))
    world = np.eye(4)
    world[:3, :3] = np.array([[cosine, 0, sine], [0, 1, 0], [-sine, 0, cosine]]) @ tilt @ axes
    world[:3, 3] = [rng.uniform(-3, 3), rng.uniform(-3, -1), rng.uniform(-3, 3)]
    return world


def same_as_textbook(solids: list[Solid], grid: RayGrid) -> Hits:
    hits = cast(solids, grid)
    directions = (grid.rows[:, None] + grid.cols[None]).reshape(-1, 3)
    nearest, what = textbook(solids, grid.origin, directions)
    # Grazing rays may fall on either side of an edge by rounding; anything else must agree.
    agree = hits.solid.ravel() == what
    assert agree.mean() > 0.999
    assert hits.inverse.ravel()[agree] == pytest.approx(1 / nearest[agree], rel=1e-9, abs=1e-12)
    return hits


@pytest.mark.parametrize("seed", range(8))
def test_camera_sees_what_the_textbook_says(seed: int) -> None:
    rng = np.random.default_rng(seed)
    world = pose(rng, np.eye(3))
    grid = Pinhole.at(world, np.linspace(-1.1, 1.4, 83), np.linspace(-0.7, 0.5, 41))
    hits = same_as_textbook(clutter(rng, world[:3, 3], 60), grid)
    assert len(np.unique(hits.solid)) > 8, "the scene must test something"


@pytest.mark.parametrize("seed", range(8))
def test_lidar_sees_what_the_textbook_says(seed: int) -> None:
    rng = np.random.default_rng(100 + seed)
    world = pose(rng, np.array([[0.0, -1, 0], [0, 0, -1], [1, 0, 0]]))
    azimuth = -np.pi + 2 * np.pi * (np.arange(180) + 0.5) / 180
    grid = Spinning.at(world, azimuth, np.linspace(-0.3, 0.5, 24))
    hits = same_as_textbook(clutter(rng, world[:3, 3], 60), grid)
    assert len(np.unique(hits.solid)) > 15


def test_faces_are_the_ones_that_are_hit() -> None:
    turn = np.eye(3)
    solids = [
        box(np.array([0.0, -1, 10]), np.array([1.0, 1, 2]), turn),
        ellipsoid(np.array([6.0, -1, 10]), np.ones(3), turn),
        capped_cylinder(np.array([-6.0, -0.5, 10]), np.array([1, 0.5, 1]), turn),
    ]
    world = np.eye(4)
    world[1, 3] = -3.0  # lids of the box and the cylinder are 1 and 2 m lower
    x, y = np.array([-0.6, 0.0, 0.6]), np.array([-0.5, 0.1, 0.2, 0.21])
    hits = cast(solids, Pinhole.at(world, x, y))
    front, top = 3, 4
    assert hits.solid[0].tolist() == [SKY] * 3
    assert hits.solid[1, 1] == 0 and hits.face[1, 1] == top  # 1 m below the camera, at y = 0.1: 10 m ahead
    assert 1 / hits.inverse[1, 1] == pytest.approx(10.0)
    assert hits.solid[2, 1] == 0 and hits.face[2, 1] == front
    assert 1 / hits.inverse[2, 1] == pytest.approx(8.0)
    assert hits.solid[2, 2] == 1 and hits.face[2, 2] == QUADRIC_FACE
    assert hits.solid[3, 0] == 2 and hits.face[3, 0] == 0  # the first of the cylinder's two planes
    assert 1 / hits.inverse[3, 0] == pytest.approx(2 / 0.21)
    below = cast(solids, Pinhole.at(world, np.array([0.0]), np.array([0.5])))
    assert below.solid[0, 0] == GROUND and 1 / below.inverse[0, 0] == pytest.approx(6.0)
