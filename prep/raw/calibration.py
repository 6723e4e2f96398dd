"""Camera and lidar calibration of a drive: KITTI raw (one set of files a date), KITTI odometry, your own.

Conventions: camera coordinates x right, y down, z forward, metres; pixel centres at integers. "Rectified"
coordinates are those of the rectified grey camera 0, which KITTI's P_rect matrices start from.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from prep.raw.splits import Side
from shards.errors import InputError

Matrix = npt.NDArray[np.float64]
Read = Callable[[str], bytes]
"""Content of a raw file by its KITTI path; raises InputError where there is none."""

CAMERA_NUMBER: dict[Side, str] = {"l": "02", "r": "03"}


def other(side: Side) -> Side:
    """The stereo partner's side."""
    return "r" if side == "l" else "l"


@dataclass(frozen=True)
class Rig:
    """The calibrated cameras of one drive.

    Attributes:
        projection: side -> (3, 4), pixels = projection · rectified point (homogeneous), at native size.
        size: native (width, height) in pixels; None where the calibration does not say (odometry).
        velodyne: (4, 4), lidar coordinates -> rectified coordinates; None without lidar calibration.
        where: the calibration's files, for messages.
    """

    projection: dict[Side, Matrix]
    size: tuple[int, int] | None
    velodyne: Matrix | None
    where: str

    def intrinsics(self, side: Side, native: tuple[int, int], stored: tuple[int, int]) -> npt.NDArray[np.float32]:
        """fx, fy, cx, cy in pixels of the stored image.

        Resizing maps pixel areas, so with centres at integers cx' = (cx + 0.5) · w'/w - 0.5.

        Args:
            native: (width, height) that the calibration is for.
            stored: (width, height) of the stored image.
        """
        p = self.projection[side]
        sx, sy = stored[0] / native[0], stored[1] / native[1]
        k = [p[0, 0] * sx, p[1, 1] * sy, (p[0, 2] + 0.5) * sx - 0.5, (p[1, 2] + 0.5) * sy - 0.5]
        return np.array(k, dtype=np.float32)

    def stereo_translation(self, side: Side) -> float:
        """x translation in metres that takes coordinates of camera `side` to its partner's.

        Negative for the left camera (its partner stands to the right), positive for the right one.
        """
        target, partner = self.projection[side], self.projection[other(side)]
        return float((partner[0, 3] - target[0, 3]) / target[0, 0])

    def lidar_projection(self, side: Side) -> Matrix:
        """(3, 4): pixels (homogeneous, native size) = result · lidar point; the third row is camera z.

        Raises:
            InputError: the drive has no lidar calibration.
        """
        if self.velodyne is None:
            raise InputError(f"{self.where}: no lidar calibration; pack with --no-depth")
        return _product(self.projection[side], self.velodyne)


def read_raw_rig(date: str, read: Read, depth: bool) -> Rig:
    """Rig of a date of KITTI raw, from `calib_cam_to_cam.txt` and, for depth, `calib_velo_to_cam.txt`.

    Raises:
        InputError: a file is missing, or lacks a line, or a line is not numbers; names file and line.
    """
    cameras = _Calibration(f"{date}/calib_cam_to_cam.txt", read)
    velodyne = None
    if depth:
        lidar = _Calibration(f"{date}/calib_velo_to_cam.txt", read)
        rectify = _homogeneous(cameras.matrix("R_rect_00", 3, 3))
        velodyne = _product(rectify, _homogeneous(np.hstack([lidar.matrix("R", 3, 3), lidar.matrix("T", 3, 1)])))
    width, height = (int(v) for v in cameras.matrix("S_rect_02", 1, 2)[0])
    projection: dict[Side, Matrix] = {side: cameras.camera(f"P_rect_{n}") for side, n in CAMERA_NUMBER.items()}
    return Rig(projection, (width, height), velodyne, cameras.path)


def read_odometry_rig(folder: str, read: Read, depth: bool) -> Rig:
    """Rig of a sequence of KITTI odometry (`sequences/09`), from its `calib.txt` (P2, P3 and, for depth, Tr).

    Raises:
        InputError: as `read_raw_rig`.
    """
    calibration = _Calibration(f"{folder}/calib.txt", read)
    missing = "unpack data_odometry_calib.zip last, whose calib.txt has it unlike that beside the images; or --no-depth"
    velodyne = _homogeneous(calibration.matrix("Tr", 3, 4, missing)) if depth else None
    projection: dict[Side, Matrix] = {"l": calibration.camera("P2"), "r": calibration.camera("P3")}
    return Rig(projection, None, velodyne, calibration.path)


def read_poses(path: str, content: bytes) -> Matrix:
    """(N, 3, 4) camera-to-world poses of a sequence, metres: 12 numbers a line, row-major.

    Raises:
        InputError: a line is not 12 numbers; names it.
    """
    rows = []
    for number, line in enumerate(content.decode("ascii", errors="replace").splitlines(), start=1):
        rows.append(_numbers(line, 12, f"{path}:{number}"))
    return np.array(rows, dtype=np.float64).reshape(-1, 3, 4)


class _Calibration:
    """A calibration file: lines `name: numbers`."""

    def __init__(self, path: str, read: Read) -> None:
        self.path = path
        text = read(path).decode("ascii", errors="replace")
        self._lines = {
            name.strip(): rest for name, colon, rest in (row.partition(":") for row in text.splitlines()) if colon
        }

    def matrix(self, name: str, rows: int, columns: int, missing: str = "fetch the calibration again") -> Matrix:
        if name not in self._lines:
            raise InputError(f"{self.path}: line '{name}:' is missing; {missing}")
        values = _numbers(self._lines[name], rows * columns, f"{self.path}: line '{name}:'")
        return np.array(values, dtype=np.float64).reshape(rows, columns)

    def camera(self, name: str) -> Matrix:
        p = self.matrix(name, 3, 4)
        if not (p[0, 0] > 0 and p[1, 1] > 0):
            raise InputError(f"{self.path}: line '{name}:' has no positive focal length; fetch the calibration again")
        return p


def _numbers(text: str, count: int, where: str) -> list[float]:
    try:
        values = [float(word) for word in text.split()]
    except ValueError as error:
        raise InputError(f"{where} is not numbers ({error}); fetch the file again") from error
    if len(values) != count or not np.isfinite(values).all():
        raise InputError(f"{where} has {len(values)} numbers, not {count} finite ones; fetch the file again")
    return values


def _product(a: Matrix, b: Matrix) -> Matrix:
    """Matrix product, term by term: BLAS libraries differ in the last bit, the dataset must not."""
    total = a[:, :1] * b[:1]
    for k in range(1, len(b)):
        total = total + a[:, k : k + 1] * b[k : k + 1]
    return total


def _homogeneous(m: npt.NDArray[Any]) -> Matrix:
    """(3, 3) or (3, 4) -> (4, 4)."""
    full = np.eye(4)
    full[: m.shape[0], : m.shape[1]] = m
    return full
