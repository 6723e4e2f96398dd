"""How the camera of a drive moves: pose files, KITTI's OXTS records and speeds in; transforms and distances out.

Pose files are KITTI's (12 numbers a line), with a frame index, 4x4 matrices, or TUM's. What is packed is computed with
Python's own sines and term by term: BLAS and vectorised sines differ between machines in the last bit, bytes must not.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt

from prep.raw.text import text_lines
from shards.errors import InputError
from shards.files import open_regular

Matrix = npt.NDArray[np.float64]
MAX_POSE_BYTES = 32 << 20
"""Of 200,000 frames; KITTI's longest file has 0.8 MB."""
_MAX_LINES = 1_000_000
_MAX_LINE = 2000
_FORMS = (
    "12 numbers a line (3x4, row-major), 16 (4x4), either after a frame index, or 8 (TUM: time tx ty tz qx qy qz qw)"
)
_TOLERANCE = 0.01
_EARTH_RADIUS = 6378137.0
_OXTS_VALUES = 6
"""Latitude, longitude, altitude, roll, pitch and yaw come first."""
_FASTEST = 120.0
"""Metres per second; more is another unit."""


def read_poses(path: Path) -> Matrix:
    """Poses (N, 3, 4) of a local file; see `parse_poses`.

    Raises:
        InputError: it cannot be read, is larger than 32 MiB, or is malformed.
    """
    try:
        with open_regular(path) as file:
            data = file.read(MAX_POSE_BYTES + 1)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    return parse_poses(data, str(path))


def parse_poses(data: bytes, where: str) -> Matrix:
    """Camera-to-world poses (N, 3, 4), metres, of a pose file's content.

    Blank lines and lines that begin with `#` are skipped; numbers may be separated by commas.

    Args:
        where: the file, for messages.

    Raises:
        InputError: a line is malformed, an index is out of sequence, or a matrix is not a rigid transform.
    """
    if len(data) > MAX_POSE_BYTES:
        raise InputError(f"{where}: larger than {MAX_POSE_BYTES >> 20} MiB; this is not a pose file")
    values, lines = _rows(data, where)
    columns = values.shape[1]
    bad = np.flatnonzero(~np.isfinite(values).all(axis=1))
    if len(bad):
        raise InputError(f"{where}:{lines[bad[0]]}: a number is not finite")
    convert = _CONVERTERS.get(columns)
    if convert is None or (columns == 4 and len(values) % 4):
        raise InputError(f"{where}:{lines[0]}: {columns} numbers; a pose has {_FORMS}")
    if columns in (13, 17):
        _check_index(values[:, 0], where, lines)
        values = values[:, 1:]
    poses = convert(values)
    turn = poses[:, :, :3]
    error = np.abs(turn @ turn.transpose(0, 2, 1) - np.eye(3)).max(axis=(1, 2))
    wrong = np.flatnonzero(~(error < _TOLERANCE))
    if len(wrong):
        line = lines[wrong[0] * (4 if columns == 4 else 1)]
        raise InputError(f"{where}:{line}: its rotation is not a rotation matrix; {_FORMS}")
    return poses


def _rows(data: bytes, where: str) -> tuple[Matrix, list[int]]:
    """Numbers (N, columns) of the lines that have some, and the lines' numbers."""
    values = array("d")  # a list of floats takes four times the memory
    lines: list[int] = []
    columns = 0
    for number, line in enumerate(text_lines(data, where, _MAX_LINES), start=1):
        words = line[:_MAX_LINE].partition("#")[0].replace(",", " ").split()
        if not words:
            continue
        columns = columns or len(words)
        if len(words) != columns:
            raise InputError(f"{where}:{number}: {len(words)} numbers, but {columns} in the first line; {_FORMS}")
        try:
            values.extend(map(float, words))
        except ValueError:
            raise InputError(f"{where}:{number}: not numbers; {_FORMS}") from None
        lines.append(number)
    if not lines:
        raise InputError(f"{where}: no poses in it; {_FORMS}")
    return np.array(values).reshape(-1, columns), lines


def _check_index(index: Matrix, where: str, lines: list[int]) -> None:
    gaps = np.flatnonzero(np.diff(index) != 1)
    if len(gaps):
        raise InputError(
            f"{where}:{lines[gaps[0] + 1]}: frame {index[gaps[0] + 1]:g} follows frame {index[gaps[0]]:g}; poses are "
            "needed for every frame, in order"
        )


def _from_3x4(values: Matrix) -> Matrix:
    return values.reshape(-1, 3, 4)


def _from_4x4(values: Matrix) -> Matrix:
    return values.reshape(-1, 4, 4)[:, :3]


def _from_tum(values: Matrix) -> Matrix:
    """Time, translation, unit quaternion (x, y, z, w): the format of the TUM RGB-D benchmark."""
    poses = np.empty((len(values), 3, 4))
    norm = np.linalg.norm(values[:, 4:], axis=1, keepdims=True)
    # A quaternion far from unit length becomes NaN, which `parse_poses` refuses.
    x, y, z, w = (values[:, 4:] / np.where(np.abs(norm - 1) < 0.1, norm, np.nan)).T
    poses[:, 0, :3] = np.stack([1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)], axis=1)
    poses[:, 1, :3] = np.stack([2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)], axis=1)
    poses[:, 2, :3] = np.stack([2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)], axis=1)
    poses[:, :, 3] = values[:, 1:4]
    return poses


_CONVERTERS: dict[int, Callable[[Matrix], Matrix]] = {
    12: _from_3x4, 13: _from_3x4, 16: _from_4x4, 17: _from_4x4, 4: _from_4x4, 8: _from_tum,
}  # fmt: skip


@dataclass(frozen=True)
class Motion:
    """Motion of a drive, from poses or from speeds alone.

    Attributes:
        rows: row of each frame number.
        poses: (N, 3, 4), rectified camera coordinates to the world's, metres; NaN for frames without a pose.
        travelled: (N,), metres driven up to each frame.
    """

    rows: Mapping[int, int]
    poses: Matrix | None = None
    travelled: Matrix | None = None

    def transform(self, target: int, other: int, shift: Matrix) -> Matrix | None:
        """(3, 4), takes target-camera coordinates to those of the same camera at another frame; None if unknown.

        Args:
            shift: (3,), camera coordinates minus rectified coordinates.
        """
        if self.poses is None or target not in self.rows or other not in self.rows:
            return None
        a, b = self.poses[self.rows[target]], self.poses[self.rows[other]]
        # world = A x + a = B y + b, so y = B^T A x + B^T (a - b), and both x and y are shifted.
        turn = np.einsum("ki,kj->ij", b[:, :3], a[:, :3])
        move = np.einsum("ki,k->i", b[:, :3], a[:, 3] - b[:, 3])
        move = move + shift - np.einsum("ij,j->i", turn, shift)
        found = np.column_stack([turn, move])
        return found if np.isfinite(found).all() else None

    def distance(self, target: int, other: int, shift: Matrix) -> float | None:
        """Metres between the camera's positions at two frames; by speeds, along the way. None if unknown."""
        if self.travelled is None:
            transform = self.transform(target, other, shift)
            return None if transform is None else math.sqrt(float((transform[:, 3] ** 2).sum()))
        if target not in self.rows or other not in self.rows:
            return None
        return float(abs(self.travelled[self.rows[other]] - self.travelled[self.rows[target]]))


def pose_motion(poses: Matrix, frames: Sequence[int] | None = None) -> Motion:
    """Motion by the poses (N, 3, 4) of frames; None: of frames 0, 1, 2, ..."""
    return Motion(_row_of(frames or range(len(poses))), poses)


def _row_of(frames: Sequence[int]) -> dict[int, int]:
    return {frame: row for row, frame in enumerate(frames)}


def oxts_motion(records: Mapping[int, bytes], imu: Matrix) -> tuple[Motion, list[int]]:
    """Motion of a raw KITTI drive, and the frames whose record is malformed.

    Args:
        records: OXTS file by frame number; at least one.
        imu: (4, 4), coordinates of the GPS/IMU unit to rectified camera coordinates.
    """
    frames, bad = sorted(records), []
    poses = np.full((len(frames), 3, 4), np.nan)
    turn = imu[:3, :3].T  # rectified to the unit's coordinates
    move = -np.einsum("ij,j->i", turn, imu[:3, 3])
    latitude: float | None = None
    for row, frame in enumerate(frames):
        try:
            values = [float(word) for word in records[frame].split()[:_OXTS_VALUES]]
            if len(values) < _OXTS_VALUES or not all(map(math.isfinite, values)) or not abs(values[0]) < 90:
                raise ValueError
        except ValueError:
            bad.append(frame)
            continue
        latitude = values[0] if latitude is None else latitude
        unit = unit_pose(values, latitude)
        poses[row, :, :3] = np.einsum("ik,kj->ij", unit[:, :3], turn)
        poses[row, :, 3] = np.einsum("ik,k->i", unit[:, :3], move) + unit[:, 3]
    return Motion(_row_of(frames), poses), bad


def unit_pose(values: list[float], latitude: float) -> Matrix:
    """(3, 4), the GPS/IMU unit's coordinates to the world's, metres.

    Mercator projection at a latitude, Euler angles about z, y, x: as in KITTI's development kit (readme.txt).

    Args:
        values: latitude and longitude in degrees, altitude in metres, roll, pitch and yaw in radians.
    """
    lat, lon, altitude, roll, pitch, yaw = values
    scale = math.cos(math.radians(latitude)) * _EARTH_RADIUS
    (sr, cr), (sp, cp), (sy, cy) = ((math.sin(angle), math.cos(angle)) for angle in (roll, pitch, yaw))
    north = scale * math.log(math.tan(math.radians(90 + lat) / 2))
    return np.array(
        [
            [cy * cp, cy * sp * sr - sy * cr, cy * sp * cr + sy * sr, scale * math.radians(lon)],
            [sy * cp, sy * sp * sr + cy * cr, sy * sp * cr - cy * sr, north],
            [-sp, cp * sr, cp * cr, altitude],
        ]
    )


def speed_motion(data: bytes, frames: Sequence[int], where: str) -> Motion:
    """Motion out of a drive's `speed.txt`: a line `SECONDS METRES_PER_SECOND` for each frame, in order.

    Between two frames the car drives at the mean of their speeds.

    Raises:
        InputError: a line is malformed, time does not increase, or there is not one line for each frame.
    """
    rows: list[tuple[float, float]] = []
    for number, line in enumerate(text_lines(data, where, _MAX_LINES), start=1):
        words = line.partition("#")[0].replace(",", " ").split()
        if not words:
            continue
        try:
            seconds, speed = map(float, words)
        except ValueError:
            raise InputError(f"{where}:{number}: expected two numbers, SECONDS METRES_PER_SECOND") from None
        if not abs(speed) <= _FASTEST or not math.isfinite(seconds):
            raise InputError(f"{where}:{number}: {speed:g} is not a speed in metres per second")
        if rows and seconds <= rows[-1][0]:
            raise InputError(f"{where}:{number}: its time does not follow the line before")
        rows.append((seconds, speed))
    if len(rows) != len(frames):
        raise InputError(f"{where}: {len(rows)} lines for {len(frames)} frames; one for each, in order, is needed")
    travelled = [0.0]
    for (before, v), (after, w) in pairwise(rows):
        travelled.append(travelled[-1] + (after - before) * (abs(v) + abs(w)) / 2)
    return Motion(_row_of(frames), travelled=np.array(travelled))
