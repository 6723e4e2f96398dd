"""Lidar scans and depth maps of other formats as what is stored: a 16-bit PNG of depth in the camera."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
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
"""A copy that was interrupted on a file system that reserves space ends in zeros, whole pages of them."""


def read_scan(data: bytes, name: str, typical: int = 0) -> npt.NDArray[np.float32]:
    """(N, 4) x forward, y left, z up in metres, reflectance, from a `.bin` file's content.

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
        # A copy cut at a page boundary has a whole number of points: only its neighbours show that most are missing.
        raise SampleError(
            f"{name}: {len(data) // SCAN_POINT_BYTES:,} points, where this drive's scans have about "
            f"{typical // SCAN_POINT_BYTES:,}: cut short; {again}"
        )
    if len(data) >= _ZERO_TAIL and not any(data[-_ZERO_TAIL:]):
        raise SampleError(f"{name}: ends in zeros: the copy was interrupted; {again}")
    scan = np.frombuffer(data, dtype="<f4").reshape(-1, 4)
    with np.errstate(invalid="ignore"):
        far = (np.abs(scan[:, :3]) > _FARTHEST) & np.isfinite(scan[:, :3])
        strange = far.any(axis=1) | (scan[:, 3] < 0)
    if np.count_nonzero(strange) > _IMPLAUSIBLE * len(scan):
        raise SampleError(
            f"{name}: {np.count_nonzero(strange):,} of {len(scan):,} points are beyond {_FARTHEST:.0f} m or have a "
            "negative reflectance; a scan holds float32 x, y, z, reflectance for each point"
        )
    return scan


@np.errstate(invalid="ignore", over="ignore")
def points_in_view(scan: npt.NDArray[np.float32], projections: Sequence[Matrix], width: int) -> npt.NDArray[np.float64]:
    """(3, n) x, y, z of the points that any of the cameras may see: the lidar's x >= 0, between the images' sides.

    About a quarter of a scan remains, and the cameras share the cost. The test is in single precision with slack, so
    a few points beside the images remain, too. Points with a coordinate that is not finite are dropped.
    """
    # A row as one 16-byte number: numpy takes those four times as fast as rows of four.
    ahead = scan.view(np.complex128)[:, 0][scan[:, 0] >= 0].view(np.float32).reshape(-1, SCAN_POINT_BYTES // 4)
    x, y, z = np.ascontiguousarray(ahead.T[:3])
    finite = np.isfinite(x + y + z)
    if not finite.all():
        ahead, x, y, z = ahead[finite], x[finite], y[finite], z[finite]
    seen = np.ones(len(ahead), dtype=bool)
    for side in ([p[0] for p in projections], [(width + 2) * p[2] - p[0] for p in projections]):
        # The cameras of a rectified pair differ in the last column alone: then one plane holds for both.
        inside = np.zeros(len(ahead), dtype=bool)
        for a, b, c in {tuple(plane[:3].astype(np.float32)) for plane in side}:
            nearest = -1 - max(plane[3] for plane in side)
            inside |= a * x + b * y + c * z > np.float32(nearest)
        seen &= inside
    return np.stack([x[seen], y[seen], z[seen]]).astype(np.float64)


@dataclass(frozen=True)
class SparseDepth:
    """A depth map of which few pixels are measured.

    Attributes:
        pixels: row · width + column of the measured ones, int64, ascending.
        values: uint16, metres x 256, at least 1.
        size: (width, height).
    """

    pixels: npt.NDArray[np.int64]
    values: npt.NDArray[np.uint16]
    size: tuple[int, int]

    def dense(self) -> npt.NDArray[np.uint16]:
        """(height, width), 0 = no measurement."""
        width, height = self.size
        image = np.zeros(height * width, dtype=np.uint16)
        image[self.pixels] = self.values
        return image.reshape(height, width)

    def png(self) -> bytes:
        """16-bit greyscale PNG."""
        return _encode_png(self.dense())


def _encode_png(values: npt.NDArray[np.uint16]) -> bytes:
    """16-bit greyscale PNG of (height, width) values.

    Written with zlib's run-length strategy, which suits a map that is nineteen parts zeros: 5 ms, where a general
    compressor takes 14.
    """
    height, width = values.shape
    rows = np.zeros((height, 1 + 2 * width), dtype=np.uint8)
    rows[:, 1:] = values.astype(">u2").view(np.uint8)
    deflate = zlib.compressobj(9, zlib.DEFLATED, zlib.MAX_WBITS, 9, zlib.Z_RLE)
    body = deflate.compress(rows.tobytes()) + deflate.flush()
    chunks = ((b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 0, 0, 0, 0)), (b"IDAT", body), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


def project(
    points: npt.NDArray[np.float64], projection: Matrix, size: tuple[int, int], convention: Convention = "camera_z"
) -> SparseDepth:
    """Depth map of one scan.

    A point's pixel is round(u) - 1, round(v) - 1 (KITTI's MATLAB development kit counts pixels from 1); the
    nearest point wins a pixel. Points behind the camera, or 256 m away and more, are left out.

    Args:
        points: (3, n) as `points_in_view` gives them.
        projection: (3, 4), `StereoCalibration.lidar_projection`.
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
    seen = (depth > 0) & (u >= 1) & (u <= width) & (v >= 1) & (v <= height) & (units >= 1) & (units < _BEYOND)
    # Pixel and depth as one number: sorted, the nearest point comes first in each pixel.
    keys = np.sort((((v[seen] - 1) * width + (u[seen] - 1)) * _BEYOND + units[seen]).astype(np.int64))
    pixels = keys >> 16
    nearest = np.flatnonzero(np.diff(pixels, prepend=-1))
    return SparseDepth(pixels[nearest], (keys[nearest] & 0xFFFF).astype(np.uint16), size)


def check_depth_png(data: bytes, size: tuple[int, int], name: str) -> None:
    """Refuse a ground-truth PNG that is not KITTI's: 16-bit greyscale at the image's native size, whole.

    Raises:
        SampleError: with `name` and what is wrong.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=("PNG",))
        with image:
            found, mode = image.size, image.mode
            if not mode.startswith("I;16"):
                raise SampleError(f"{name}: mode {mode}, not a 16-bit greyscale PNG of metres x 256")
            if found != size:  # before its pixels take any memory
                raise SampleError(f"{name}: {found[0]}x{found[1]} pixels, its image has {size[0]}x{size[1]}")
            image.load()
    except UnidentifiedImageError as error:  # its own words are the address of a buffer
        raise SampleError(f"{name}: broken depth map (not a PNG); fetch it again") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise SampleError(f"{name}: broken depth PNG ({error}); fetch it again") from error


def depth_png(data: bytes, size: tuple[int, int], name: str) -> bytes:
    """A ready-made depth map as it is stored: a PNG as it is, an `.npy` or `.tif` of metres converted.

    In these, 0, infinity and NaN are no measurement; neither are 256 m and more, which the PNG cannot hold.

    Args:
        data: the file's content.
        size: native (width, height) of its image.
        name: the file, whose extension decides, and for messages.

    Raises:
        SampleError: as `check_depth_png`; or not floating-point (height, width), or negative, or no metres.
    """
    if name.lower().endswith(".png"):
        check_depth_png(data, size, name)
        return data
    metres = _read_npy(data, size, name) if name.lower().endswith(".npy") else _read_tiff(data, size, name)
    if np.any(metres < 0):
        raise SampleError(f"{name}: negative depth; write 0 where there is no measurement")
    with np.errstate(invalid="ignore", over="ignore"):
        units = np.rint(metres.astype(np.float64) * DEPTH_SCALE)
    known = (units >= 1) & np.isfinite(units)
    if known.any() and np.median(units[known]) >= _BEYOND:
        raise SampleError(
            f"{name}: its median is {np.median(metres[known]):,.0f}, but metres are needed, below 256; are these "
            "millimetres?"
        )
    return _encode_png(np.where(known & (units < _BEYOND), units, 0).astype(np.uint16))


def _read_npy(data: bytes, size: tuple[int, int], name: str) -> npt.NDArray[np.floating[Any]]:
    """Floating-point (height, width) of an `.npy`, which may have a channel; checks its header before its data."""
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


def _read_tiff(data: bytes, size: tuple[int, int], name: str) -> npt.NDArray[np.floating[Any]]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data), formats=("TIFF",))
        with image:
            if image.mode != "F":
                raise SampleError(f"{name}: mode {image.mode}; a .tif of depth holds metres as 32-bit floats")
            if image.size != size:
                raise SampleError(f"{name}: {image.size[0]}x{image.size[1]} pixels, its image has {size[0]}x{size[1]}")
            return np.asarray(image)
    except UnidentifiedImageError as error:
        raise SampleError(f"{name}: broken depth map (not a TIFF)") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise SampleError(f"{name}: broken depth map ({first_line(error)})") from error
