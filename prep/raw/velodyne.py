"""Lidar scans to depth maps in the camera, and the 16-bit PNG they are stored in."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from prep.raw.calibration import Matrix
from prep.raw.depth_png import encode_sparse
from shards.errors import SampleError
from shards.sample import DEPTH_SCALE

Convention = Literal["camera_z", "lidar_x"]
_POINT_BYTES = 16
_BEYOND = 1 << 16


def read_scan(data: bytes, name: str) -> npt.NDArray[np.float32]:
    """(N, 4) x forward, y left, z up in metres, reflectance, from a `.bin` file's content.

    Raises:
        SampleError: its length is 0 or not a multiple of 16 bytes; `name` goes into the message.
    """
    if not data:
        raise SampleError(f"{name}: empty; fetch the scan again")
    if len(data) % _POINT_BYTES:
        raise SampleError(f"{name}: {len(data)} bytes, not a multiple of {_POINT_BYTES}; fetch the scan again")
    return np.frombuffer(data, dtype="<f4").reshape(-1, 4)


def points_in_view(scan: npt.NDArray[np.float32], projections: Sequence[Matrix], width: int) -> npt.NDArray[np.float64]:
    """(3, n) x, y, z of the points that any of the cameras may see: the lidar's x >= 0, between the images' sides.

    About a quarter of a scan; what it costs is shared by the cameras. Single precision with slack decides, so that
    some points beside the images are left.
    """
    # A row as one 16-byte number: numpy takes those four times as fast as rows of four.
    ahead = scan.view(np.complex128)[:, 0][scan[:, 0] >= 0].view(np.float32).reshape(-1, _POINT_BYTES // 4)
    x, y, z = np.ascontiguousarray(ahead.T[:3])
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
        return encode_sparse(self.pixels, self.values, self.size)


def project(
    points: npt.NDArray[np.float64], projection: Matrix, size: tuple[int, int], convention: Convention = "camera_z"
) -> SparseDepth:
    """Depth map of one scan.

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
        with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            image.load()
            found, mode = image.size, image.mode
    except UnidentifiedImageError as error:  # its own words are the address of a buffer
        raise SampleError(f"{name}: broken depth map (not a PNG); fetch it again") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise SampleError(f"{name}: broken depth PNG ({error}); fetch it again") from error
    if not mode.startswith("I;16"):
        raise SampleError(f"{name}: mode {mode}, not a 16-bit greyscale PNG of metres x 256")
    if found != size:
        raise SampleError(f"{name}: {found[0]}x{found[1]} pixels, its image has {size[0]}x{size[1]}")
