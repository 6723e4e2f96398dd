"""Pose files: KITTI's 12 numbers a line, with a frame index, 4x4 matrices, and TUM's format."""

from __future__ import annotations

from array import array
from collections.abc import Callable
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
