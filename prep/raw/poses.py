"""Pose files: KITTI's 12 numbers a line, with a frame index, 4x4 matrices, and TUM's format."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from prep.raw.text import decode_text
from shards.errors import InputError

Matrix = npt.NDArray[np.float64]
MAX_POSE_BYTES = 64 << 20
_FORMS = (
    "12 numbers a line (3x4, row-major), 16 (4x4), either after a frame index, or 8 (TUM: time tx ty tz qx qy qz qw)"
)
_TOLERANCE = 0.01


def read_poses(path: Path) -> Matrix:
    """(N, 3, 4) poses of a file on this machine; see `parse_poses`.

    Raises:
        InputError: it cannot be read, is larger than 64 MiB, or is malformed.
    """
    if path.exists() and not path.is_file():
        raise InputError(f"{path}: not a file")
    try:
        with path.open("rb") as file:
            data = file.read(MAX_POSE_BYTES + 1)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    return parse_poses(data, str(path))


def parse_poses(data: bytes, where: str) -> Matrix:
    """(N, 3, 4) camera-to-world poses, metres, from a pose file's content.

    Blank lines and lines that begin with `#` are skipped; numbers may be separated by commas.

    Args:
        where: the file, for messages.

    Raises:
        InputError: a line is malformed, an index is out of sequence, or a matrix is not a rigid transform.
    """
    if len(data) > MAX_POSE_BYTES:
        raise InputError(f"{where}: larger than {MAX_POSE_BYTES >> 20} MiB; this is not a pose file")
    rows, lines = _rows(decode_text(data), where)
    if not rows:
        raise InputError(f"{where}: no poses in it; {_FORMS}")
    columns = len(rows[0])
    odd = next((i for i, row in enumerate(rows) if len(row) != columns), None)
    if odd is not None:
        raise InputError(f"{where}:{lines[odd]}: {len(rows[odd])} numbers, but {columns} in the first line; {_FORMS}")
    values = np.array(rows, dtype=np.float64)
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


def _rows(text: str, where: str) -> tuple[list[list[float]], list[int]]:
    """Numbers of each line that has some, and the lines' numbers."""
    rows: list[list[float]] = []
    lines: list[int] = []
    for number, line in enumerate(text.splitlines(), start=1):
        words = line.partition("#")[0].replace(",", " ").split()
        if words:
            try:
                rows.append([float(word) for word in words])
            except ValueError:
                raise InputError(f"{where}:{number}: not numbers; {_FORMS}") from None
            lines.append(number)
    return rows, lines


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
    # A quaternion far from unit length is no rotation: NaN, which `parse_poses` refuses.
    x, y, z, w = (values[:, 4:] / np.where(np.abs(norm - 1) < 0.1, norm, np.nan)).T
    poses[:, 0, :3] = np.stack([1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)], axis=1)
    poses[:, 1, :3] = np.stack([2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)], axis=1)
    poses[:, 2, :3] = np.stack([2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)], axis=1)
    poses[:, :, 3] = values[:, 1:4]
    return poses


_CONVERTERS: dict[int, Callable[[Matrix], Matrix]] = {
    12: _from_3x4, 13: _from_3x4, 16: _from_4x4, 17: _from_4x4, 4: _from_4x4, 8: _from_tum,
}  # fmt: skip
