"""Camera and lidar calibration: KITTI raw (one set of files a date) and KITTI odometry (one file a sequence).

Camera coordinates: x right, y down, z forward, metres; pixel centres at integers. "Rectified" coordinates are those of
the rectified grey camera 0, the origin of KITTI's P_rect matrices.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from prep.raw.splits import CameraSide
from prep.raw.text import decode_text
from shards.errors import InputError

Matrix = npt.NDArray[np.float64]
Read = Callable[[str], bytes]
"""Content of a raw file by its KITTI path; raises InputError if it does not exist."""

CAMERA_NUMBER: dict[CameraSide, str] = {"l": "02", "r": "03"}
_WIDEST, _LONGEST = 1 / 20, 20
"""Bounds of a focal length, in image widths: fields of view of 168 and 2.9 degrees."""
_NORMALISED = 10
"""Focal lengths below are in image widths, not in pixels."""


def other(side: CameraSide) -> CameraSide:
    """The stereo partner's side."""
    return "r" if side == "l" else "l"


@dataclass(frozen=True)
class StereoCalibration:
    """Calibration of one drive's cameras.

    Attributes:
        projection: side -> (3, 4), pixels = projection · rectified point (homogeneous), at native size.
        size: native (width, height) in pixels; None if not known (odometry).
        velodyne: (4, 4), lidar coordinates -> rectified coordinates; None without lidar calibration.
        imu: (4, 4), coordinates of the GPS/IMU unit -> rectified coordinates; None unless asked for.
        where: the calibration's file, for messages.
        guessed: the intrinsics are a guess from a field of view.
    """

    projection: dict[CameraSide, Matrix]
    size: tuple[int, int] | None
    velodyne: Matrix | None
    where: str
    imu: Matrix | None = None
    guessed: bool = False

    def intrinsics(self, side: CameraSide, native: tuple[int, int], stored: tuple[int, int]) -> npt.NDArray[np.float32]:
        """(4,) fx, fy, cx, cy in pixels of the stored image.

        Resizing maps pixel areas, so with centres at integers cx' = (cx + 0.5) · w'/w - 0.5.

        Args:
            native: (width, height) of the calibration.
            stored: (width, height) of the stored image.
        """
        p = self.projection[side]
        sx, sy = stored[0] / native[0], stored[1] / native[1]
        k = [p[0, 0] * sx, p[1, 1] * sy, (p[0, 2] + 0.5) * sx - 0.5, (p[1, 2] + 0.5) * sy - 0.5]
        return np.array(k, dtype=np.float32)

    def stereo_translation(self, side: CameraSide) -> float:
        """Translation along x in metres from the coordinates of camera `side` to its partner's.

        Negative for the left camera, whose partner is to its right, and positive for the right one.
        """
        target, partner = self.projection[side], self.projection[other(side)]
        return float((partner[0, 3] - target[0, 3]) / target[0, 0])

    def shift(self, side: CameraSide) -> Matrix:
        """(3,) metres: camera coordinates of a side = rectified coordinates + shift."""
        p = self.projection[side]
        z = p[2, 3]
        return np.array([(p[0, 3] - p[0, 2] * z) / p[0, 0], (p[1, 3] - p[1, 2] * z) / p[1, 1], z])

    def lidar_projection(self, side: CameraSide) -> Matrix:
        """(3, 4), pixels (homogeneous, native size) = result · lidar point; the third row gives camera z.

        Raises:
            InputError: the drive has no lidar calibration.
        """
        if self.velodyne is None:
            raise InputError(f"{self.where}: no lidar calibration; pack with --no-depth")
        return _product(self.projection[side], self.velodyne)


def read_raw_calibration(date: str, read: Read, depth: bool, imu: bool = False) -> StereoCalibration:
    """Calibration of a date of KITTI raw, from `calib_cam_to_cam.txt`.

    Args:
        depth: also read `calib_velo_to_cam.txt`.
        imu: also read that and `calib_imu_to_velo.txt`.

    Raises:
        InputError: a file or a line is missing or malformed; names both.
    """
    cameras = _CalibrationFile(f"{date}/calib_cam_to_cam.txt", read)
    velodyne = unit = None
    if depth or imu:
        rectify = _homogeneous(cameras.matrix("R_rect_00", 3, 3))
        velodyne = _product(rectify, _CalibrationFile(f"{date}/calib_velo_to_cam.txt", read).transform())
    if imu:
        assert velodyne is not None
        unit = _product(velodyne, _CalibrationFile(f"{date}/calib_imu_to_velo.txt", read).transform())
    width, height = cameras.matrix("S_rect_02", 1, 2)[0]
    size = (int(min(width, 1e6)), int(min(height, 1e6)))
    projection: dict[CameraSide, Matrix] = {
        side: cameras.camera(f"P_rect_{number}", size) for side, number in CAMERA_NUMBER.items()
    }
    return StereoCalibration(projection, size, velodyne, cameras.path, unit)


def read_odometry_calibration(folder: str, read: Read, depth: bool) -> StereoCalibration:
    """Calibration of a sequence of KITTI odometry (`sequences/09`), from its `calib.txt`: P2, P3 and, for depth, Tr.

    Raises:
        InputError: as `read_raw_calibration`.
    """
    file = _CalibrationFile(f"{folder}/calib.txt", read)
    remedy = "unpack data_odometry_calib.zip last: its calib.txt has the line, the one beside the images has not"
    velodyne = _homogeneous(file.matrix("Tr", 3, 4, f"{remedy}; or pack with --no-depth")) if depth else None
    projection: dict[CameraSide, Matrix] = {"l": file.camera("P2", None), "r": file.camera("P3", None)}
    return StereoCalibration(projection, None, velodyne, file.path)


def check_intrinsics(
    fx: float, fy: float, cx: float, cy: float, size: tuple[int, int] | None, where: str, remedy: str
) -> None:
    """Refuse intrinsics that cannot be in pixels of the image.

    Args:
        size: (width, height) of the image; None if unknown.
        remedy: advice for the message.

    Raises:
        InputError: a focal length or principal point is out of bounds. The message converts normalised intrinsics (in
            image widths and heights, as in Monodepth2's own code) to pixels.
    """
    if not (fx > 0 and fy > 0):
        raise InputError(f"{where}: no positive focal length; {remedy}")
    width, height = size or (1242, 375)
    if fx < _NORMALISED and fy < _NORMALISED and width >= 2 * _NORMALISED:
        if abs(cx) <= 2 and abs(cy) <= 2 and fx > _WIDEST and size is not None:
            remedy = (
                f"these look normalised; in pixels they are fx: {fx * width:g}, fy: {fy * height:g}, "
                f"cx: {cx * width:g}, cy: {cy * height:g}"
            )
        raise InputError(f"{where}: fx = {fx:g} cannot be pixels of an image {width} wide; {remedy}")
    for name, focal in (("fx", fx), ("fy", fy)):
        if not _WIDEST * min(width, height) <= focal <= _LONGEST * max(width, height):
            raise InputError(
                f"{where}: {name} = {focal:g} is not a focal length in pixels of a {width}x{height} image; {remedy}"
            )
    for name, centre, extent in (("cx", cx, size and size[0]), ("cy", cy, size and size[1])):
        if extent is not None and not -0.5 <= centre <= extent - 0.5:
            raise InputError(f"{where}: {name} = {centre:g} lies outside the {width}x{height} image; {remedy}")
    if size is not None and 0 < cx <= 1 and 0 < cy <= 1 and min(size) >= _NORMALISED:
        raise InputError(
            f"{where}: cx = {cx:g}, cy = {cy:g} is a corner of the {width}x{height} image; these look normalised; in "
            f"pixels they are cx: {cx * width:g}, cy: {cy * height:g}"
        )


class _CalibrationFile:
    """A calibration file of lines `name: numbers`."""

    def __init__(self, path: str, read: Read) -> None:
        self.path = path
        rows = (row.partition(":") for row in decode_text(read(path)).splitlines())
        self._lines = {name.strip(): rest for name, colon, rest in rows if colon}

    def matrix(self, name: str, rows: int, columns: int, remedy: str = "fetch the calibration again") -> Matrix:
        """Numbers of a line."""
        where = f"{self.path}: line '{name}:'"
        if name not in self._lines:
            raise InputError(f"{where} is missing; {remedy}")
        try:
            values = [float(word) for word in self._lines[name].split()]
        except ValueError as error:
            raise InputError(f"{where} is not numbers ({str(error)[:80]}); {remedy}") from error
        if len(values) != rows * columns or not np.isfinite(values).all():
            raise InputError(f"{where} has {len(values)} numbers, not {rows * columns} finite ones; {remedy}")
        return np.array(values, dtype=np.float64).reshape(rows, columns)

    def transform(self) -> Matrix:
        """(4, 4) from the lines R and T."""
        return _homogeneous(np.hstack([self.matrix("R", 3, 3), self.matrix("T", 3, 1)]))

    def camera(self, name: str, size: tuple[int, int] | None) -> Matrix:
        """A projection matrix, whose intrinsics are checked against the image's size."""
        p = self.matrix(name, 3, 4)
        where = f"{self.path}: line '{name}:'"
        check_intrinsics(p[0, 0], p[1, 1], p[0, 2], p[1, 2], size, where, "fetch the calibration again")
        return p


def _product(a: Matrix, b: Matrix) -> Matrix:
    """Matrix product, term by term: BLAS libraries differ in the last bit, the dataset must not."""
    total = a[:, :1] * b[:1]
    for k in range(1, len(b)):
        total = total + a[:, k : k + 1] * b[k : k + 1]
    return total


def _homogeneous(m: Matrix) -> Matrix:
    """(3, 3) or (3, 4) -> (4, 4)."""
    full = np.eye(4)
    full[: m.shape[0], : m.shape[1]] = m
    return full
