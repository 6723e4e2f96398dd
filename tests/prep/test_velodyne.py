"""Lidar to depth maps: closed forms, the synthetic drive's exact depth, and the PNG read by another library."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from prep.raw.calibration import read_raw_calibration
from prep.raw.velodyne import Convention, check_depth_png, encode_png, points_in_view, read_scan
from prep.raw.velodyne import project as project_points
from shards.errors import SampleError

SIZE = (40, 20)
# Lidar x forward, y left, z up: camera x = -y, camera y = -z, camera z = x - 0.5. Focal length 10, centre (20, 10).
P = np.array([[20, -10, 0, -10], [10, 0, -10, -5], [1, 0, 0, -0.5]], dtype=np.float64)


def project(
    points: np.ndarray, projection: np.ndarray, size: tuple[int, int], convention: Convention = "camera_z"
) -> np.ndarray:
    return project_points(points_in_view(points, [projection], size[0]), projection, size, convention)


def scan(*points: tuple[float, float, float]) -> np.ndarray:
    return np.array([[*point, 0.3] for point in points], dtype=np.float32)


def test_one_point_by_hand() -> None:
    # z = 8 m; u = 10 · 2/8 + 20 = 22.5 -> even 22, minus 1; v = 10 · 1/8 + 10 = 11.25 -> 11, minus 1.
    depth = project(scan((8.5, -2, -1)), P, SIZE)
    assert depth.shape == (20, 40)
    assert depth.dtype == np.uint16
    assert {(int(y), int(x)): int(depth[y, x]) for y, x in zip(*np.nonzero(depth), strict=True)} == {(10, 21): 8 * 256}


def test_lidar_x_keeps_the_pixel_and_takes_the_lidars_forward_distance() -> None:
    depth = project(scan((8.5, -2, -1)), P, SIZE, "lidar_x")
    assert depth[10, 21] == 8.5 * 256
    assert np.count_nonzero(depth) == 1


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0], [1, 0, 2]])
def test_the_nearest_point_wins_a_pixel(order: list[int]) -> None:
    points = [(6.5, 0.0, 0.0), (4.5, 0.0, 0.0), (9.5, 0.0, 0.0)]
    depth = project(scan(*(points[i] for i in order)), P, SIZE)
    assert depth[9, 19] == 4 * 256
    assert np.count_nonzero(depth) == 1


def test_what_is_not_in_view_is_left_out() -> None:
    behind_lidar, behind_camera = (-3.0, 0.0, 0.0), (0.2, 0.0, 0.0)
    left, right, above = (8.5, 17.0, 0.0), (8.5, -17.0, 0.0), (8.5, 0.0, 9.0)
    far, nan = (300.0, 0.0, 0.0), (np.nan, np.nan, np.nan)
    assert not project(scan(behind_lidar, behind_camera, left, right, above, far, nan), P, SIZE).any()
    assert not project(np.zeros((0, 4), np.float32), P, SIZE).any()


@pytest.mark.parametrize(("u", "v"), [(1, 1), (40, 20)])
def test_border_pixels_count_from_one(u: int, v: int) -> None:
    inside = (10.5, -(u - 20), -(v - 10))
    assert project(scan(inside), P, SIZE)[v - 1, u - 1] == 10 * 256
    step_u, step_v = (-1, 0) if u == 1 else (1, 0), (0, -1) if v == 1 else (0, 1)
    for du, dv in (step_u, step_v):
        assert not project(scan((10.5, -(u + du - 20), -(v + dv - 10))), P, SIZE).any()


@settings(max_examples=50, deadline=None)
@given(
    hnp.arrays(np.float32, st.tuples(st.integers(0, 60), st.just(4)), elements=st.floats(-90, 90, width=32)),
    st.integers(0, 100),
)
def test_a_loop_over_points_gives_the_same_map_in_any_order(points: np.ndarray, seed: int) -> None:
    """The definition, point by point, against the vectorised form."""
    expected = np.zeros((SIZE[1], SIZE[0]), np.uint16)
    for x, y, z, _ in points.astype(np.float64):
        # Summed in the same order, so that the last bit and with it a rounding at .5 agrees.
        depth = P[2, 0] * x + P[2, 1] * y + P[2, 2] * z + P[2, 3]
        if x < 0 or depth <= 0:
            continue
        u = np.rint((P[0, 0] * x + P[0, 1] * y + P[0, 2] * z + P[0, 3]) / depth) - 1
        v = np.rint((P[1, 0] * x + P[1, 1] * y + P[1, 2] * z + P[1, 3]) / depth) - 1
        if 0 <= u < SIZE[0] and 0 <= v < SIZE[1]:
            old, new = expected[int(v), int(u)], np.rint(depth * 256)
            if new > 0:
                expected[int(v), int(u)] = new if old == 0 else min(old, new)
    shuffled = np.random.default_rng(seed).permutation(points)
    np.testing.assert_array_equal(project(shuffled, P, SIZE), expected)


def test_a_ground_truth_png_of_another_kind_is_refused() -> None:
    def png(image: Image.Image) -> bytes:
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        return buffer.getvalue()

    good = encode_png(np.full(SIZE[::-1], 256, np.uint16))
    check_depth_png(good, SIZE, "gt.png")
    with pytest.raises(SampleError, match=r"gt\.png: 40x20 pixels, its image has 41x20"):
        check_depth_png(good, (41, 20), "gt.png")
    with pytest.raises(SampleError, match="not a 16-bit"):
        check_depth_png(png(Image.new("RGB", SIZE)), SIZE, "gt.png")
    with pytest.raises(SampleError, match=r"gt\.png: broken"):
        check_depth_png(good[: len(good) // 2], SIZE, "gt.png")
    with pytest.raises(SampleError, match=r"gt\.png: broken depth map \(not a PNG\)"):  # the same words each time
        check_depth_png(b"GIF89a", SIZE, "gt.png")
    huge = good[:16] + struct.pack(">II", 60_000, 60_000) + good[24:29]
    with pytest.raises(SampleError, match=r"gt\.png: broken.*3600000000 pixels"):
        check_depth_png(huge + struct.pack(">I", zlib.crc32(huge[12:])) + good[33:], SIZE, "gt.png")


@pytest.mark.parametrize("size", [1, 15, 17, 31])
def test_a_scan_cut_short_is_named(size: int) -> None:
    with pytest.raises(SampleError, match=r"0000000005\.bin: empty"):
        read_scan(b"", "0000000005.bin")
    with pytest.raises(SampleError, match=rf"0000000005\.bin: {size} bytes, not a multiple of 16"):
        read_scan(bytes(size), "0000000005.bin")


@pytest.mark.parametrize(("side", "camera"), [("l", "02"), ("r", "03")])
def test_against_the_synthetic_drives_true_depth(drive: Path, side: str, camera: str) -> None:
    """The same surfaces by two routes: lidar rays through the calibration files, and the camera's own ray casting.

    KITTI's convention counts pixels from 1 and the synthetic cameras from 0, so truth is one pixel down and right.
    Everything that is out by a pixel or by a swapped camera fits worse.
    """
    calibration = read_raw_calibration("2011_09_26", lambda path: (drive / path).read_bytes(), depth=True)
    folder = drive / "2011_09_26" / "2011_09_26_drive_0001_sync"
    errors: dict[tuple[int, int], list[np.ndarray]] = {}
    for frame in range(0, 8, 3):
        points = read_scan((folder / "velodyne_points" / "data" / f"{frame:010d}.bin").read_bytes(), "scan")
        assert calibration.size is not None
        depth = project(points, calibration.lidar_projection(side), calibration.size) / 256.0  # type: ignore[arg-type]
        truth = np.load(folder / f"true_depth_{camera}" / "data" / f"{frame:010d}.npy").astype(np.float64)
        inner = depth[3:-3, 3:-3]
        assert np.count_nonzero(inner) > 300
        for dy in range(-2, 3):
            for dx in range(-2, 3):
                there = truth[3 + dy : truth.shape[0] - 3 + dy, 3 + dx : truth.shape[1] - 3 + dx]
                relative = np.abs(inner - there)[inner > 0] / inner[inner > 0]
                errors.setdefault((dy, dx), []).append(relative)
    close = {shift: np.mean(np.concatenate(all_) < 0.02) for shift, all_ in errors.items()}
    # The rest are points that the lidar sees past an edge and the camera does not, and ground a row up or down:
    # a pixel of these small images is 3% of the distance there.
    assert close[1, 1] > 0.8
    assert max(close, key=lambda shift: close[shift]) == (1, 1)
    assert np.median(np.concatenate(errors[1, 1])) < 0.01


@pytest.mark.kitti
def test_a_real_scan_is_where_kittis_scene_is(kitti: Path) -> None:
    raw = kitti / "raw"
    calibration = read_raw_calibration("2011_09_26", lambda path: (raw / path).read_bytes(), depth=True)
    path = raw / "2011_09_26" / "2011_09_26_drive_0002_sync" / "velodyne_points" / "data" / "0000000005.bin"
    points = read_scan(path.read_bytes(), "scan")
    left, right = (project(points, calibration.lidar_projection(side), (1242, 375)) for side in ("l", "r"))
    for depth in (left, right):
        assert 15_000 < np.count_nonzero(depth) < 25_000
        assert not depth[:100].any()  # the scanner looks no higher than 2 degrees up
        ground = depth[340:, 500:700]
        assert 5 < np.median(ground[ground > 0]) / 256 < 8  # camera 1.65 m above the road, 15 degrees down
    # The same points in the other camera stand fx · 0.5327 / z further left.
    rows, columns = np.nonzero(left[200:300])
    z = left[200:300][rows, columns] / 256.0
    shifted = np.rint(columns - 721.5377 * 0.5327254 / z).astype(int)
    seen = shifted >= 1
    around = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
    neighbours = np.stack([right[200 + rows[seen] + dy, shifted[seen] + dx] for dy, dx in around]) / 256.0
    assert np.mean(np.any(np.abs(neighbours - z[seen]) < 0.02, axis=0)) > 0.9


@pytest.mark.kitti
def test_against_the_published_procedure(kitti: Path) -> None:
    """Eigen's ground truth as everybody makes it: matrix product, round, minus one, minimum of duplicates."""
    raw = kitti / "raw"
    calibration = read_raw_calibration("2011_09_26", lambda path: (raw / path).read_bytes(), depth=True)
    path = raw / "2011_09_26" / "2011_09_26_drive_0002_sync" / "velodyne_points" / "data" / "0000000003.bin"
    points = np.fromfile(path, np.float32).reshape(-1, 4)
    front = points[points[:, 0] >= 0].astype(np.float64)
    pixels = np.hstack([front[:, :3], np.ones((len(front), 1))]) @ calibration.lidar_projection("l").T
    order = np.argsort(-front[:, 0], kind="stable")  # the last to be written, the nearest, stays
    expected = np.zeros((375, 1242))
    for (u, v, w), x in zip(pixels[order], front[order, 0], strict=True):
        column, row = round(u / w) - 1, round(v / w) - 1
        if 0 <= column < 1242 and 0 <= row < 375 and w > 0:
            expected[row, column] = x
    found = project(points, calibration.lidar_projection("l"), (1242, 375), "lidar_x") / 256.0
    np.testing.assert_allclose(found, expected, atol=0.5 / 256 + 1e-9)
