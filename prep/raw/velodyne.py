"""Ground truth as it is stored: lidar scans and depth maps of other formats as a 16-bit PNG of depth in the camera."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from prep.raw.calibration import Matrix
from shards.errors import SampleError, first_line
from shards.sample import DEPTH_SCALE

Convention = Literal["camera_z", "lidar_x"]
SCAN_POINT_BYTES = 16
_BEYOND = 1 << 16
_FARTHEST = 1000.0
"""Metres; no lidar measures that far."""
_IMPLAUSIBLE = 0.05
_ZERO_TAIL = 4096
"""An interrupted copy ends in whole pages of zeros on a file system that reserves space."""
MAX_PIXELS = 32 << 20
"""Of a frame or depth map, as in 8K video. Pillow holds four bytes a pixel, up to three times while it encodes."""
_BLOCK = 1 << 20
"""Pixels of a depth map to convert at once."""


def read_scan(data: bytes, name: str, typical: int = 0) -> npt.NDArray[np.float32]:
    """Points of a `.bin` file: (N, 4) x forward, y left, z up in metres, reflectance.

    Args:
        name: the file, for messages.
        typical: usual size in bytes of this drive's scans; 0 if unknown.

    Raises:
        SampleError: the file is empty, cut short, ends in zeros, or does not hold four float32 a point.
    """
    again = "fetch the scan again"
    if not data:
        raise SampleError(f"{name}: empty; {again}")
    if len(data) % SCAN_POINT_BYTES:
        raise SampleError(f"{name}: {len(data)} bytes, not a multiple of {SCAN_POINT_BYTES}; {again}")
    if 2 * len(data) < typical:
        # A copy cut at a page boundary has a whole number of points: only its neighbours show that points are missing.
        raise SampleError(
            f"{name}: {len(data) // SCAN_POINT_BYTES:,} points, where this drive's scans have about "
            f"{typical // SCAN_POINT_BYTES:,}: cut short; {again}"
        )
    if len(data) >= _ZERO_TAIL and not any(data[-_ZERO_TAIL:]):
        raise SampleError(f"{name}: ends in zeros: the copy was interrupted; {again}")
    scan = np.frombuffer(data, dtype="<f4").reshape(-1, 4)
    low, high, reflectance = scan.min(), scan.max(), scan[:, 3].min()
    if not (low >= -_FARTHEST and high <= _FARTHEST and reflectance >= 0):  # also if one is not a number
        with np.errstate(invalid="ignore"):
            far = (np.abs(scan[:, :3]) > _FARTHEST) & np.isfinite(scan[:, :3])
            strange = np.count_nonzero(far.any(axis=1) | (scan[:, 3] < 0))
        if strange > _IMPLAUSIBLE * len(scan):
            raise SampleError(
                f"{name}: {strange:,} of {len(scan):,} points are beyond {_FARTHEST:.0f} m or have a negative "
                "reflectance; a scan holds float32 x, y, z, reflectance for each point"
            )
    return scan


@np.errstate(invalid="ignore", over="ignore")
def points_in_view(scan: npt.NDArray[np.float32], projections: Sequence[Matrix], width: int) -> npt.NDArray[np.float64]:
    """(3, n) x, y, z of the points that a camera may see: the lidar's x >= 0, between the images' sides.

    About a quarter of a scan remains, and the cameras share the cost. The test has single precision and slack, so a
    few points beside the images remain. Points with a coordinate that is not finite are dropped.
    """
    # A row as one 16-byte number: numpy selects those four times as fast as rows of four.
    ahead = scan.view(np.complex128)[:, 0][scan[:, 0] >= 0].view(np.float32).reshape(-1, SCAN_POINT_BYTES // 4)
    x, y, z = np.ascontiguousarray(ahead.T[:3])
    finite = np.isfinite(x + y + z)
    if not finite.all():
        ahead, x, y, z = ahead[finite], x[finite], y[finite], z[finite]
    seen = np.ones(len(ahead), dtype=bool)
    for side in ([p[0] for p in projections], [(width + 2) * p[2] - p[0] for p in projections]):
        # The cameras of a rectified pair differ in the last column alone, so one plane holds for both.
        inside = np.zeros(len(ahead), dtype=bool)
        for a, b, c in {tuple(plane[:3].astype(np.float32)) for plane in side}:
            nearest = -1 - max(plane[3] for plane in side)
            inside |= a * x + b * y + c * z > np.float32(nearest)
        seen &= inside
    return np.stack([x[seen], y[seen], z[seen]]).astype(np.float64)


def encode_png(values: npt.NDArray[np.uint16]) -> bytes:
    """16-bit greyscale PNG of (height, width) values.

    zlib's run-length strategy suits a map of nineteen parts zeros: 2 ms and a smaller file than its default's 10 ms.
    """
    height, width = values.shape
    rows = np.zeros((height, 1 + 2 * width), dtype=np.uint8)
    rows[:, 1:] = values.astype(">u2").view(np.uint8)
    deflate = zlib.compressobj(strategy=zlib.Z_RLE)
    body = deflate.compress(rows.data) + deflate.flush()
    chunks = ((b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 0, 0, 0, 0)), (b"IDAT", body), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


def project(
    points: npt.NDArray[np.float64], projection: Matrix, size: tuple[int, int], convention: Convention = "camera_z"
) -> npt.NDArray[np.uint16]:
    """Depth map (height, width) of one scan: metres x 256, 0 = no measurement.

    A point's pixel is round(u) - 1, round(v) - 1, because KITTI's MATLAB development kit counts pixels from 1. The
    nearest point of a pixel counts. Points behind the camera, or 256 m away and more, are left out.

    Args:
        points: (3, n) x, y, z of `points_in_view`.
        projection: (3, 4), `StereoCalibration.lidar_projection`.
        size: (width, height) of the native image, pixels.
        convention: `camera_z`, depth along the camera's axis; or `lidar_x`, the lidar's forward x, as in the
            published Eigen evaluation.
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
    seen = (depth > 0) & (u >= 1) & (u <= width) & (v >= 1) & (v <= height) & (units >= 1) & (units < _BEYOND)
    # 65536 - depth: the nearest point has the largest, 0 stays no measurement, and negating 16 bits gives the depth.
    nearness = np.zeros(height * width, dtype=np.uint16)
    pixels = ((v[seen] - 1) * width + (u[seen] - 1)).astype(np.intp)
    np.maximum.at(nearness, pixels, (_BEYOND - units[seen]).astype(np.uint16))
    return np.negative(nearness).reshape(height, width)


@contextmanager
def open_image(data: bytes, *formats: str) -> Iterator[Image.Image]:
    """Open an image without decoding it, and without Pillow's warning about its size, which callers check."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = Image.open(io.BytesIO(data), formats=formats)
    with image:
        yield image


def _read_map(data: bytes, size: tuple[int, int], name: str, form: str, mode: str, what: str) -> npt.NDArray[Any]:
    """Values of a depth map; its mode and (width, height) are checked before its pixels take memory.

    Raises:
        SampleError: not a whole image of this format, mode (of which `what` is the description) and size.
    """
    try:
        with open_image(data, form) as image:
            if not image.mode.startswith(mode):
                raise SampleError(f"{name}: mode {image.mode}, not {what}")
            if image.size != size:
                raise SampleError(f"{name}: {image.size[0]}x{image.size[1]} pixels, its image has {size[0]}x{size[1]}")
            return np.asarray(image)
    except UnidentifiedImageError as error:  # its message holds the address of a buffer
        raise SampleError(f"{name}: broken depth map (not a {form}); fetch it again") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise SampleError(f"{name}: broken depth map ({first_line(error)}); fetch it again") from error


def check_depth_png(data: bytes, size: tuple[int, int], name: str) -> None:
    """Refuse a ground-truth PNG that is not KITTI's: 16-bit greyscale at the image's native size, whole.

    Raises:
        SampleError: with `name` and what is wrong.
    """
    _read_map(data, size, name, "PNG", "I;16", "a 16-bit greyscale PNG of metres x 256")


def depth_png(data: bytes, size: tuple[int, int], name: str) -> bytes:
    """A ready-made depth map in the stored format: a PNG as it is, an `.npy` or `.tif` of metres converted.

    0, infinity and NaN in these are no measurement. Nor are 256 m and more, which the PNG cannot hold.

    Args:
        data: the file's content.
        size: native (width, height) of its image.
        name: the file, for messages; its extension names the format.

    Raises:
        SampleError: as `check_depth_png`; or not floating-point (height, width), or negative, or not metres.
    """
    if name.lower().endswith(".png"):
        check_depth_png(data, size, name)
        return data
    if name.lower().endswith(".npy"):
        metres = _read_npy(data, size, name)
    else:
        metres = _read_map(data, size, name, "TIFF", "F", "32-bit floats, as a .tif of metres has")
    if np.any(metres < 0):
        raise SampleError(f"{name}: negative depth; write 0 where there is no measurement")
    stored = np.zeros(size[::-1], dtype=np.uint16)
    known = far = 0
    rows = max(1, _BLOCK // size[0])  # double precision takes four times the memory of the map
    for start in range(0, size[1], rows):
        with np.errstate(invalid="ignore", over="ignore"):
            units = np.rint(metres[start : start + rows].astype(np.float64) * DEPTH_SCALE)
        measured = (units >= 1) & np.isfinite(units)
        inside = measured & (units < _BEYOND)
        stored[start : start + rows][inside] = units[inside]
        known += int(measured.sum())
        far += int(measured.sum() - inside.sum())
    if known and 2 * far >= known:
        median = np.median(metres[np.isfinite(metres) & (metres > 0)])
        raise SampleError(
            f"{name}: its median is {median:,.0f}, but metres are needed, below 256; are these millimetres?"
        )
    return encode_png(stored)


def _read_npy(data: bytes, size: tuple[int, int], name: str) -> npt.NDArray[np.floating[Any]]:
    """Floating-point (height, width) of an `.npy`, which may have a channel. The header is checked before the data."""
    try:
        file = io.BytesIO(data)
        version = np.lib.format.read_magic(file)
        header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, kind = header(file)
        if kind.kind != "f" or tuple(side for side in shape if side != 1) != tuple(s for s in size[::-1] if s != 1):
            raise SampleError(
                f"{name}: {kind} {shape}; floating-point metres ({size[1]}, {size[0]}), height and width of its image, "
                "are needed"
            )
        metres: npt.NDArray[np.floating[Any]] = np.load(io.BytesIO(data), allow_pickle=False)
        return metres.reshape(size[::-1])
    except (ValueError, OSError, EOFError, SyntaxError) as error:
        raise SampleError(f"{name}: not an .npy, or damaged ({first_line(error)})") from error
