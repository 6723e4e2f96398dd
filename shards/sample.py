"""A sample: the named components under one key in a tar shard.

0.jpg / 0.png / .ppm target frame, RGB
m1.jpg, p1.jpg       frames t-1 and t+1 (mN / pN for any offset)
s.jpg                stereo partner: the same time step from the other camera
k.f32                fx, fy, cx, cy of the stored images, float32, pixel centres at integers
t.f32                x translation, metres, that takes target-camera coordinates to the partner's
poses.f32            of each temporal frame, in the manifest's order: 3x4, row-major, metres, takes target-camera
                     coordinates to that frame's; only with `md2 prep --motion`
distances.f32        of each temporal frame: metres between its camera's position and the target's; likewise
depth.png            16-bit, metres x 256, 0 = no measurement, native resolution
meta.json            drive, frame, side, native size, source of each component
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Codec = Literal["jpeg", "png", "ppm"]
"""`ppm` is uncompressed: several times the bytes, but no decoder is needed."""
Chroma = Literal["420", "444"]
"""Colour resolution of a JPEG: halved both ways, or full."""
Offset = int | Literal["s"]
"""Which image of a sample: 0 the target, -1 / 1 ... its neighbours in time, "s" the stereo partner."""

INTRINSICS = "k.f32"
STEREO_TRANSLATION = "t.f32"
POSES = "poses.f32"
DISTANCES = "distances.f32"
DEPTH = "depth.png"
META = "meta.json"
DEPTH_SCALE = 256.0
"""Units of `depth.png` per metre (KITTI's own convention)."""

MAX_FRAMES = 100
"""Frames of a sample, the target included: manifests with more are refused."""

_KEY = re.compile(r"[A-Za-z0-9_-]+")
_PLACE = re.compile(r"(.+)_([lr])_(\d{1,18})")


def image_extension(codec: Codec) -> str:
    """Return the file extension of an image component: `jpg`, `png` or `ppm`."""
    return "jpg" if codec == "jpeg" else codec


def ppm_header(width: int, height: int) -> bytes:
    """Return the header of a `ppm` image: binary PPM, as Pillow writes it. Only rows of RGB bytes follow."""
    return f"P6\n{width} {height}\n255\n".encode()


def offset_name(offset: Offset) -> str:
    """Return the stem of an image component: 0 -> `0`, -1 -> `m1`, 2 -> `p2`, "s" -> `s`."""
    if offset == "s":
        return "s"
    if offset == 0:
        return "0"
    return f"m{-offset}" if offset < 0 else f"p{offset}"


def image_component(offset: Offset, codec: Codec) -> str:
    """Return the name of an image component, such as `m1.jpg` for the frame before the target."""
    return f"{offset_name(offset)}.{image_extension(codec)}"


def place_of(key: str) -> tuple[str, str, int]:
    """Split a sample's key into drive, side (`l` or `r`) and frame; a key of another form is a drive of its own."""
    match = _PLACE.fullmatch(key)
    return (match[1], match[2], int(match[3])) if match else (key, "", 0)


@dataclass(frozen=True)
class Sample:
    """One training example: `key` (letters, digits, `_`, `-`; no dot) and component name -> bytes.

    Raises:
        ValueError: the key holds a character that DALI's index or tar readers would misread.
    """

    key: str
    components: dict[str, bytes]

    def __post_init__(self) -> None:
        if not _KEY.fullmatch(self.key):
            raise ValueError(f"sample key {self.key!r}: only letters, digits, '_' and '-' are allowed")
