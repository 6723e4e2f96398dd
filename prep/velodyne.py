"""Lidar scans to depth maps in the camera, and the 16-bit PNG they are stored in."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from prep.calibration import Matrix
from shards.errors import SampleError
from shards.sample import DEPTH_SCALE

Convention = Literal["camera_z", "lidar_x"]
_POINT_BYTES = 16
_MOST = np.iinfo(np.uint16).max
_EMPTY_STEP = 16
_PNG_MAGIC = b"\x89PNG\r\n\x1a\n"


def read_scan(data: bytes, name: str) -> npt.NDArray[np.float32]:
    """(N, 4) x forward, y left, z up in metres, reflectance, from a `.bin` file's content.

    Raises:
        SampleError: its length is not a multiple of 16 bytes; `name` goes into the message.
    """
    if len(data) % _POINT_BYTES:
        raise SampleError(f"{name}: {len(data)} bytes, not a multiple of {_POINT_BYTES}; fetch the scan again")
    return np.frombuffer(data, dtype="<f4").reshape(-1, 4)


def points_in_view(scan: npt.NDArray[np.float32], projections: Sequence[Matrix], width: int) -> npt.NDArray[np.float64]:
    """(3, n) x, y, z of the points that any of the cameras may see: the lidar's x >= 0, between the image's sides.

    About a quarter of a scan; what it costs is shared by the cameras. Single precision with slack decides, so that
    some points beside the images are left.
    """
    # A row as one 16-byte number: numpy takes those four times as fast as rows of four.
    ahead = scan.view(np.complex128)[:, 0][scan[:, 0] >= 0].view(np.float32).reshape(-1, _POINT_BYTES // 4)
    x, y, z = np.ascontiguousarray(ahead.T[:3])
    seen = np.zeros(len(ahead), dtype=bool)
    for p in projections:
        left, right = p[0].astype(np.float32), ((width + 2) * p[2] - p[0]).astype(np.float32)
        inside = left[0] * x + left[1] * y + left[2] * z > -left[3] - 1
        inside &= right[0] * x + right[1] * y + right[2] * z > -right[3] - 1
        seen |= inside
    return np.stack([x[seen], y[seen], z[seen]]).astype(np.float64)


def project(
    points: npt.NDArray[np.float64], projection: Matrix, size: tuple[int, int], convention: Convention = "camera_z"
) -> npt.NDArray[np.uint16]:
    """Depth map of one scan: (height, width) uint16, metres x 256, 0 = no measurement.

    A point's pixel is round(u) - 1, round(v) - 1 (KITTI's MATLAB development kit counts pixels from 1); the
    nearest point wins a pixel. Points behind the camera, or 256 m away and more, are left out.

    Args:
        points: (3, n) as `points_in_view` gives them.
        projection: (3, 4), `Rig.lidar_projection`.
        size: (width, height) of the native image, pixels.
        convention: `camera_z`, the depth along the camera's axis; or `lidar_x`, the lidar's forward x, which
            the published Eigen evaluation uses.
    """
    width, height = size
    x, y, z = points
    p = projection
    # Written out rather than as a matrix product: BLAS libraries differ in the last bit, the dataset must not.
    depth = p[2, 0] * x + p[2, 1] * y + p[2, 2] * z + p[2, 3]
    with np.errstate(divide="ignore", invalid="ignore"):
        u = np.rint((p[0, 0] * x + p[0, 1] * y + p[0, 2] * z + p[0, 3]) / depth)
        v = np.rint((p[1, 0] * x + p[1, 1] * y + p[1, 2] * z + p[1, 3]) / depth)
    units = np.rint((depth if convention == "camera_z" else x) * DEPTH_SCALE)
    seen = (depth > 0) & (u >= 1) & (u <= width) & (v >= 1) & (v <= height) & (units >= 1) & (units <= _MOST)
    pixel = ((v[seen] - 1) * width + (u[seen] - 1)).astype(np.intp)
    # Less one, so that "none" is the largest number, which the minimum leaves, and comes out as 0.
    image = np.full(height * width, _MOST, dtype=np.uint16)
    np.minimum.at(image, pixel, units[seen].astype(np.uint16) - np.uint16(1))
    return (image + np.uint16(1)).reshape(height, width)


def encode_depth(depth: npt.NDArray[np.uint16]) -> bytes:
    """16-bit greyscale PNG of a sparse (height, width) depth map.

    Written here and not by Pillow: unfiltered rows with run-length matching are the smallest for maps that are
    nineteen parts empty, and cost a third of the time of Pillow's, which tries five filters a row.
    """
    height, width = depth.shape
    rows = np.zeros((height, 1 + 2 * width), dtype=np.uint8)
    rows[:, 1:] = depth.astype(">u2").view(np.uint8)
    measured = np.flatnonzero(depth.any(axis=1))
    empty = int(measured[0]) // _EMPTY_STEP * _EMPTY_STEP if len(measured) else 0
    body, deflate = _after_empty_rows(1 + 2 * width, empty)
    deflate = deflate.copy()
    body += deflate.compress(rows[empty:].data) + deflate.flush()
    header = struct.pack(">IIBBBBB", width, height, 16, 0, 0, 0, 0)
    return _PNG_MAGIC + _chunk(b"IHDR", header) + _chunk(b"IDAT", body) + _chunk(b"IEND", b"")


@lru_cache(maxsize=64)
def _after_empty_rows(row_bytes: int, rows: int) -> tuple[bytes, zlib._Compress]:
    """Output and state of a compressor after so many empty rows: the sky of every map, compressed once."""
    deflate = zlib.compressobj(6, zlib.DEFLATED, 15, 8, zlib.Z_RLE)
    return deflate.compress(bytes(row_bytes * rows)), deflate


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(data, zlib.crc32(kind)))


def check_depth_png(data: bytes, size: tuple[int, int], name: str) -> None:
    """Refuse a ground-truth PNG that is not KITTI's: 16-bit greyscale at the image's native size, whole.

    Raises:
        SampleError: with `name` and what is wrong.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            found, mode, kind = image.size, image.mode, image.format
    except (OSError, SyntaxError, ValueError) as error:
        raise SampleError(f"{name}: broken depth PNG ({error}); fetch it again") from error
    if kind != "PNG" or not mode.startswith("I;16"):
        raise SampleError(f"{name}: {kind} in mode {mode}, not a 16-bit greyscale PNG of metres x 256")
    if found != size:
        raise SampleError(f"{name}: {found[0]}x{found[1]} pixels, its image has {size[0]}x{size[1]}")
