"""Calibration: hand-computed rigs, the pixel-centre convention, the stereo sign, and broken files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from prep.raw.calibration import StereoCalibration, read_odometry_calibration, read_raw_calibration
from shards.errors import InputError

CAMERAS = """\
calib_time: 09-Jan-2012 13:57:47
corner_dist: 9.950000e-02
S_rect_02: 1.242000e+03 3.750000e+02
R_rect_00: 0 -1 0 1 0 0 0 0 1
P_rect_02: 700 0 600 42 0 710 170 0.2 0 0 1 0.003
P_rect_03: 700 0 600 -343 0 710 170 2.1 0 0 1 0.003
"""
# Lidar x forward, y left, z up to camera x right, y down, z forward, and a shift.
LIDAR = """\
calib_time: 15-Mar-2012 11:37:16
R: 0 -1 0 0 0 -1 1 0 0
T: 0.1 -0.2 -0.3
delta_f: 0.000000e+00 0.000000e+00
"""


def files(cameras: str = CAMERAS, lidar: str = LIDAR) -> Callable[[str], bytes]:
    content = {"2011_09_26/calib_cam_to_cam.txt": cameras, "2011_09_26/calib_velo_to_cam.txt": lidar}
    return lambda path: content[path].encode()


def calibration() -> StereoCalibration:
    return read_raw_calibration("2011_09_26", files(), depth=True)


def test_intrinsics_at_native_size_are_those_of_the_file() -> None:
    k = calibration().intrinsics("l", (1242, 375), (1242, 375))
    np.testing.assert_array_equal(k, np.array([700, 710, 600, 170], np.float32))
    assert k.dtype == np.float32


def test_intrinsics_of_a_resized_image_keep_pixel_areas() -> None:
    # Halving: the centre of the new pixel 0 lies between the old pixels 0 and 1, at 0.5; so cx' = (cx - 0.5) / 2.
    np.testing.assert_allclose(
        calibration().intrinsics("l", (1242, 376), (621, 188)), [350, 355, (600 - 0.5) / 2, (170 - 0.5) / 2]
    )


@given(st.integers(50, 2000), st.integers(50, 2000))
def test_the_image_centre_stays_the_image_centre(width: int, height: int) -> None:
    native = (1242, 375)
    p = np.array([[700, 0, (native[0] - 1) / 2, 0], [0, 700, (native[1] - 1) / 2, 0], [0, 0, 1, 0]])
    k = StereoCalibration({"l": p, "r": p}, native, None, "").intrinsics("l", native, (width, height))
    np.testing.assert_allclose(k[2:], [(width - 1) / 2, (height - 1) / 2], rtol=1e-6)


def test_intrinsics_follow_what_pillow_does_to_pixels() -> None:
    """A bright spot at the principal point is, after resizing, at the new principal point (sub-pixel centroid)."""
    native, stored = (400, 120), (160, 48)
    p = np.array([[300.0, 0, 150, 0], [0, 300, 70, 0], [0, 0, 1, 0]])
    y, x = np.mgrid[: native[1], : native[0]]
    spot = np.exp(-((x - 150) ** 2 + (y - 70) ** 2) / (2 * 8.0**2)).astype(np.float32)
    small = np.asarray(Image.fromarray(spot).resize(stored, Image.Resampling.LANCZOS), np.float64)
    y, x = np.mgrid[: stored[1], : stored[0]]
    k = StereoCalibration({"l": p, "r": p}, native, None, "").intrinsics("l", native, stored)
    np.testing.assert_allclose([(small * x).sum() / small.sum(), (small * y).sum() / small.sum()], k[2:], atol=0.01)


def test_the_stereo_translation_is_signed() -> None:
    # A point straight ahead of the left camera appears left of the centre in the right one: x decreases.
    assert calibration().stereo_translation("l") == pytest.approx((-343 - 42) / 700)
    assert calibration().stereo_translation("r") == pytest.approx((343 + 42) / 700)


def test_the_lidar_projection_by_hand() -> None:
    # Lidar point (10, 2, -1): T_velo_cam gives (-2 + 0.1, 1 - 0.2, 10 - 0.3); R_rect_00 turns (x, y) to (-y, x).
    x, y, z = -(1 - 0.2), -2 + 0.1, 10 - 0.3
    expected = np.array([700 * x + 600 * z + 42, 710 * y + 170 * z + 0.2, z + 0.003])
    np.testing.assert_allclose(calibration().lidar_projection("l") @ [10, 2, -1, 1], expected)


def test_the_lidar_projection_does_not_depend_on_the_blas_library() -> None:
    """Every number is its four products added up in order, each rounded, as any machine does it."""
    random = np.random.default_rng(0)
    projection, velodyne = random.normal(size=(3, 4)), random.normal(size=(4, 4))
    found = StereoCalibration({"l": projection, "r": projection}, None, velodyne, "x").lidar_projection("l")
    for row in range(3):
        for column in range(4):
            a, b, c, d = (float(projection[row, k]) * float(velodyne[k, column]) for k in range(4))
            assert found[row, column] == ((a + b) + c) + d


def test_without_depth_the_lidar_file_is_not_needed() -> None:
    content = {"2011_09_26/calib_cam_to_cam.txt": CAMERAS.encode()}
    assert read_raw_calibration("2011_09_26", content.__getitem__, depth=False).size == (1242, 375)


@pytest.mark.parametrize("name", ["S_rect_02", "R_rect_00", "P_rect_02", "P_rect_03"])
def test_a_missing_line_is_named(name: str) -> None:
    without = "".join(line for line in CAMERAS.splitlines(keepends=True) if not line.startswith(name))
    with pytest.raises(InputError, match=rf"2011_09_26/calib_cam_to_cam\.txt: line '{name}:' is missing"):
        read_raw_calibration("2011_09_26", files(cameras=without), depth=True)


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        (CAMERAS.replace("700 0 600 42 0", "700 0 600 42"), "11 numbers, not 12"),
        (CAMERAS.replace("P_rect_02: 700", "P_rect_02: 7OO"), "not numbers"),
        (CAMERAS.replace("P_rect_02: 700", "P_rect_02: 0"), "focal"),
        (CAMERAS.replace("P_rect_02: 700", "P_rect_02: nan"), "finite"),
        (CAMERAS[:-20], "P_rect_03"),
    ],
)
def test_a_broken_line_is_named(broken: str, says: str) -> None:
    with pytest.raises(InputError, match=says) as caught:
        read_raw_calibration("2011_09_26", files(cameras=broken), depth=False)
    assert "calib_cam_to_cam.txt" in str(caught.value)


def test_odometry_calibration() -> None:
    text = "P0: 1 0 0 0 0 1 0 0 0 0 1 0\nP2: 700 0 600 42 0 700 170 0 0 0 1 0\nP3: 700 0 600 -343 0 700 170 0 0 0 1 0\n"
    tr = "Tr: 0 -1 0 0.1 0 0 -1 -0.2 1 0 0 -0.3\n"
    odometry = read_odometry_calibration("sequences/09", lambda path: (text + tr).encode(), depth=True)
    assert odometry.size is None
    assert odometry.stereo_translation("l") == pytest.approx(-385 / 700)
    np.testing.assert_allclose(odometry.lidar_projection("r")[2] @ [10, 2, -1, 1], 10 - 0.3)
    with pytest.raises(InputError, match=r"sequences/09/calib\.txt: line 'Tr:' is missing"):
        read_odometry_calibration("sequences/09", lambda path: text.encode(), depth=True)


@pytest.mark.kitti
def test_the_real_baseline(kitti: Path) -> None:
    real = read_raw_calibration("2011_09_26", lambda path: (kitti / "raw" / path).read_bytes(), depth=True)
    assert real.size == (1242, 375)
    # From the file: (-3.395242e+02 - 4.485728e+01) / 7.215377e+02.
    assert real.stereo_translation("l") == pytest.approx(-0.5327254, abs=1e-6)
    # Known of KITTI's car: camera 02 is 0.27 m before, 0.06 m left of and 0.08 m below the lidar.
    origin = np.linalg.inv(
        np.vstack([np.linalg.inv(real.projection["l"][:, :3]) @ real.lidar_projection("l"), [0, 0, 0, 1]])
    )
    np.testing.assert_allclose(origin[:3, 3], [0.27, 0.06, -0.08], atol=0.02)
