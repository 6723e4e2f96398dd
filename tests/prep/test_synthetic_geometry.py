"""The synthetic drive's images, depth, poses, calibration, lidar and oxts must describe one and the same world.

Everything here goes through the files and formulas of its own (KITTI's papers and development kit), not
through the code that wrote them.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

Array = npt.NDArray[np.float64]

FAR = 1e4  # stands for the sky's infinite depth


def calibration(raw: Path) -> dict[str, Array]:
    values = {}
    for name in ("cam_to_cam", "velo_to_cam", "imu_to_velo"):
        for line in (raw / "2011_09_26" / f"calib_{name}.txt").read_text().splitlines():
            key, text = line.split(":", 1)
            if key != "calib_time":
                values[key if name == "cam_to_cam" else f"{name}.{key}"] = np.array([float(v) for v in text.split()])
    return values


def rigid(turn: Array, shift: npt.ArrayLike = (0, 0, 0)) -> Array:
    matrix = np.eye(4)
    matrix[:3, :3], matrix[:3, 3] = turn.reshape(3, 3), shift
    return matrix


class Scene:
    """The first drive of a raw tree, read back from its files."""

    def __init__(self, raw: Path) -> None:
        self.calibration = calibration(raw)
        self.folder = raw / "2011_09_26" / "2011_09_26_drive_0001_sync"
        self.P = {camera: self.calibration[f"P_rect_{camera:02d}"].reshape(3, 4) for camera in (0, 1, 2, 3)}
        self.K = self.P[2][:, :3]

    def image(self, camera: int, frame: int) -> Array:
        return np.asarray(Image.open(self.folder / f"image_{camera:02d}/data/{frame:010d}.png"), dtype=float) / 255

    def depth(self, camera: int, frame: int) -> Array:
        depth = np.load(self.folder / f"true_depth_{camera:02d}/data/{frame:010d}.npy")
        assert depth.dtype == np.float32
        return depth.astype(float)

    def pose(self, camera: int, frame: int) -> Array:
        row = np.loadtxt(self.folder / f"true_pose_{camera:02d}.txt")[frame]
        return np.vstack([row.reshape(3, 4), [0, 0, 0, 1]])

    def velodyne(self, frame: int) -> Array:
        return (
            np.fromfile(self.folder / f"velodyne_points/data/{frame:010d}.bin", np.float32).reshape(-1, 4).astype(float)
        )

    @property
    def rectified_from_velodyne(self) -> Array:
        c = self.calibration
        return rigid(c["R_rect_00"]) @ rigid(c["velo_to_cam.R"], c["velo_to_cam.T"])


@pytest.fixture(scope="module")
def scene(drive: Path) -> Scene:
    return Scene(drive)


def reproject(depth: Array, K: Array, move: Array) -> tuple[Array, Array, Array]:
    """Pixel coordinates and depth in another camera of every pixel of this one; `move` takes points there."""
    v, u = np.mgrid[: depth.shape[0], : depth.shape[1]]
    z = np.minimum(depth, FAR)
    points = np.stack([(u - K[0, 2]) / K[0, 0] * z, (v - K[1, 2]) / K[1, 1] * z, z, np.ones_like(z)], axis=-1) @ move.T
    x, y, there = (points[..., i] for i in range(3))
    return K[0, 0] * x / there + K[0, 2], K[1, 1] * y / there + K[1, 2], there


def bilinear(image: Array, u: Array, v: Array) -> Array:
    left = np.clip(np.floor(u), 0, image.shape[1] - 2).astype(int)
    top = np.clip(np.floor(v), 0, image.shape[0] - 2).astype(int)
    a, b = (u - left)[..., None], (v - top)[..., None]
    upper = image[top, left] * (1 - a) + image[top, left + 1] * a
    return upper * (1 - b) + (image[top + 1, left] * (1 - a) + image[top + 1, left + 1] * a) * b


def photometric(scene: Scene, target: tuple[int, int], source: tuple[int, int], move: Array) -> tuple[float, float]:
    """Mean absolute difference of target and warped source where the point is in view of both, and that share."""
    depth, other = scene.depth(*target), np.minimum(scene.depth(*source), FAR)
    u, v, there = reproject(depth, scene.K, move)
    seen = (u >= 0) & (u <= depth.shape[1] - 1) & (v >= 0) & (v <= depth.shape[0] - 1) & (there > 0)
    u, v = np.where(seen, u, 0), np.where(seen, v, 0)
    for rows in (np.floor(v), np.ceil(v)):
        for columns in (np.floor(u), np.ceil(u)):
            found = other[rows.astype(int), columns.astype(int)]
            seen &= np.abs(found - there) < 0.08 * there
    difference = np.abs(bilinear(scene.image(*source), u, v) - scene.image(*target)).mean(axis=-1)
    return float(difference[seen].mean()), float(seen.mean())


def stereo_move(scene: Scene, target: int, partner: int) -> Array:
    return rigid(np.eye(3), ((scene.P[partner][0, 3] - scene.P[target][0, 3]) / scene.K[0, 0], 0, 0))


@pytest.mark.parametrize(("target", "partner", "sign"), [(2, 3, -1), (3, 2, 1)])
def test_stereo_partner_reproduces_the_target(scene: Scene, target: int, partner: int, sign: int) -> None:
    move = stereo_move(scene, target, partner)
    assert move[0, 3] == pytest.approx(sign * 0.54, abs=1e-5)
    for frame in (0, 5):
        error, share = photometric(scene, (target, frame), (partner, frame), move)
        assert share > 0.7
        assert error < 0.012
        still = np.abs(scene.image(target, frame) - scene.image(partner, frame)).mean()
        assert still > 5 * error, "the views must differ, or the comparison shows nothing"
        for wrong in (0.9, 1.1):
            off = rigid(np.eye(3), wrong * move[:3, 3])
            assert photometric(scene, (target, frame), (partner, frame), off)[0] > 1.3 * error


@pytest.mark.parametrize(("source_camera", "step"), [(2, -1), (2, 1), (3, -1), (3, 1), (3, 0)])
def test_poses_reproduce_the_target_from_other_frames(scene: Scene, source_camera: int, step: int) -> None:
    frame = 3
    move = np.linalg.inv(scene.pose(source_camera, frame + step)) @ scene.pose(2, frame)
    error, share = photometric(scene, (2, frame), (source_camera, frame + step), move)
    assert share > 0.5
    assert error < 0.022
    still = np.abs(scene.image(2, frame) - scene.image(source_camera, frame + step)).mean()
    assert still > 2.5 * error


def test_depth_of_one_frame_is_the_next_ones_moved(scene: Scene) -> None:
    depth = scene.depth(2, 2)
    u, v, there = reproject(depth, scene.K, np.linalg.inv(scene.pose(3, 4)) @ scene.pose(2, 2))
    column, row = np.rint(u).astype(int), np.rint(v).astype(int)
    seen = np.isfinite(depth) & (there > 0) & (column >= 0) & (column < 192) & (row >= 0) & (row < 64)
    found = scene.depth(3, 4)[row[seen], column[seen]]
    # Half a pixel of rounding moves far ground by metres, so only most points can agree closely.
    assert np.median(np.abs(found / there[seen] - 1)) < 0.01
    assert np.mean(np.abs(found / there[seen] - 1) < 0.1) > 0.8


def test_velodyne_projects_onto_the_dense_depth(scene: Scene) -> None:
    for camera in (2, 3):
        error = lidar_error(scene, camera, scene.rectified_from_velodyne)
        assert np.median(error) < 0.01
        assert np.mean(error < 0.05) > 0.9
        for wrong in (
            rigid(scene.calibration["velo_to_cam.R"], scene.calibration["velo_to_cam.T"]),  # R_rect forgotten
            rigid(scene.calibration["R_rect_00"]) @ rigid(scene.calibration["velo_to_cam.R"]),  # T forgotten
        ):
            assert np.mean(lidar_error(scene, camera, wrong)) > 1.5 * np.mean(error)


def lidar_error(scene: Scene, camera: int, rectified_from_velodyne: Array) -> Array:
    """Relative difference between projected lidar depth and the dense depth at the nearest pixel."""
    points, dense = scene.velodyne(3), scene.depth(camera, 3)
    points = points[points[:, 0] > 0]
    projected = np.column_stack([points[:, :3], np.ones(len(points))]) @ (scene.P[camera] @ rectified_from_velodyne).T
    depth = projected[:, 2]
    column, row = (np.rint(projected[:, i] / depth).astype(int) for i in (0, 1))
    inside = (depth > 0) & (column >= 0) & (column < dense.shape[1]) & (row >= 0) & (row < dense.shape[0])
    assert inside.sum() > 2000
    return np.abs(dense[row[inside], column[inside]] / depth[inside] - 1)


def test_velodyne_is_a_64_beam_revolution(scene: Scene) -> None:
    points = scene.velodyne(0)
    elevation = np.degrees(np.arctan2(points[:, 2], np.hypot(points[:, 0], points[:, 1])))
    assert len(np.unique(np.round(elevation, 2))) == 64
    assert elevation.max() == pytest.approx(2.0, abs=0.01) and elevation.min() == pytest.approx(-24.33, abs=0.01)
    quadrant = np.floor(np.degrees(np.arctan2(points[:, 1], points[:, 0])) / 90)
    assert all(np.mean(quadrant == q) > 0.15 for q in (-2, -1, 0, 1)), "all around, not only ahead"
    assert 20 < np.linalg.norm(points[:, :3], axis=1).max() <= 120
    assert points[:, 3].min() >= 0 and points[:, 3].max() <= 1


def test_calibration_describes_one_rig(scene: Scene) -> None:
    c = scene.calibration
    for camera in range(4):
        K, P = c[f"K_{camera:02d}"].reshape(3, 3), scene.P[camera]
        assert c[f"S_rect_{camera:02d}"].tolist() == [192, 64]
        assert c[f"D_{camera:02d}"].shape == (5,)
        # A point through the physical camera and its own rectification, and through P_rect, is the same point.
        point = np.array([1.3, -0.7, 9.0])
        physical = c[f"R_{camera:02d}"].reshape(3, 3) @ point + c[f"T_{camera:02d}"]
        rectified = c[f"R_rect_{camera:02d}"].reshape(3, 3) @ physical
        through = P @ np.append(c["R_rect_00"].reshape(3, 3) @ point, 1)
        assert K @ rectified == pytest.approx(through, rel=1e-5)
    for name in ("R_rect_00", "R_03", "velo_to_cam.R", "imu_to_velo.R"):
        turn = c[name].reshape(3, 3)
        assert turn @ turn.T == pytest.approx(np.eye(3), abs=1e-5)
        assert np.linalg.det(turn) == pytest.approx(1, abs=1e-5)
        assert np.abs(turn - np.eye(3)).max() > 1e-3, "an identity would hide a forgotten transform"
    assert np.abs(scene.P[2][:, 3]).min() > 0, "zeros would hide that the left camera is not camera 0"
    assert abs(scene.P[3][0, 3] / scene.K[0, 0]) < 0.5, "P_rect_03 alone must not give the baseline"


def test_oxts_gives_the_same_motion_as_the_poses(scene: Scene) -> None:
    """Poses from oxts as in KITTI's development kit: Mercator projection, Rz(yaw) Ry(pitch) Rx(roll)."""
    c = scene.calibration
    camera_from_imu = (
        rigid(np.eye(3), np.linalg.solve(scene.K, scene.P[2][:, 3]))
        @ scene.rectified_from_velodyne
        @ rigid(c["imu_to_velo.R"], c["imu_to_velo.T"])
    )
    records = [np.loadtxt(scene.folder / f"oxts/data/{frame:010d}.txt") for frame in range(8)]
    assert all(record.shape == (30,) for record in records)
    assert len((scene.folder / "oxts/dataformat.txt").read_text().splitlines()) == 30
    scale = math.cos(math.radians(records[0][0]))
    imu = [imu_pose(record, scale) for record in records]
    cameras = [pose @ np.linalg.inv(camera_from_imu) for pose in imu]
    for frame in range(8):
        found = np.linalg.inv(cameras[0]) @ cameras[frame]
        # The longitudes' seven decimals of a metre and the calibration's seven digits bound the agreement.
        assert found == pytest.approx(scene.pose(2, frame), abs=2e-3)
    forward = (imu[5][:3, 3] - imu[3][:3, 3]) / 0.2
    assert records[4][8] == pytest.approx(np.hypot(*forward[:2]), rel=0.01), "vf, m/s at ten frames a second"
    assert records[4][7] == pytest.approx(forward[0], abs=0.1) and records[4][6] == pytest.approx(forward[1], abs=0.1)


def imu_pose(record: Array, scale: float) -> Array:
    latitude, longitude, altitude, roll, pitch, yaw = record[:6]
    radius = 6378137.0
    position = [
        scale * radius * math.radians(longitude),
        scale * radius * math.log(math.tan(math.radians((90 + latitude) / 2))),
        altitude,
    ]
    cr, sr, cp, sp, cy, sy = (f(a) for a in (roll, pitch, yaw) for f in (math.cos, math.sin))
    about_x = np.array([[1, 0, 0], [0, cr, -sr], [0, sr, cr]])
    about_y = np.array([[cp, 0, sp], [0, 1, 0], [-sp, 0, cp]])
    about_z = np.array([[cy, -sy, 0], [sy, cy, 0], [0, 0, 1]])
    return rigid(about_z @ about_y @ about_x, position)


def test_there_is_depth_to_learn(scene: Scene) -> None:
    depth = scene.depth(2, 3)
    finite = depth[np.isfinite(depth)]
    assert finite.min() < 8 and np.quantile(finite, 0.95) > 35
    constant = np.abs(np.median(finite) - finite) / finite
    assert constant.mean() > 0.35, "a constant must not be a good guess"
    image = scene.image(2, 3)
    for factor in (1, 2, 4):  # detail at several scales: each band of the image's pyramid holds contrast
        small = image[: 64 // factor * factor].reshape(64 // factor, factor, 192 // factor, factor, 3).mean(axis=(1, 3))
        steps = np.abs(np.diff(small, axis=1)).mean(axis=-1)
        assert np.mean(steps > 0.02) > 0.2
    move = np.linalg.norm(np.linalg.inv(scene.pose(2, 3))[:3] @ scene.pose(2, 4)[:, 3])
    assert 0.7 < move < 1.4


def test_ground_is_flat_below_the_camera(scene: Scene) -> None:
    """The bottom centre of the image is road: its points lie on one plane 1.65 m below camera 0."""
    depth = scene.depth(2, 4)[50:, 60:110]
    v, u = np.mgrid[50:64, 60:110]
    K = scene.K
    points = np.stack([(u - K[0, 2]) / K[0, 0] * depth, (v - K[1, 2]) / K[1, 1] * depth, depth], axis=-1).reshape(-1, 3)
    normal = np.linalg.svd(points - points.mean(axis=0))[2][2]
    heights = points @ normal
    assert np.ptp(heights) < 1e-3
    assert abs(heights.mean()) == pytest.approx(1.65, abs=0.03)
