"""Pictures: colour-mapped disparity, side-by-side, 16-bit depth, contact sheets, coloured point clouds.

Images here are NumPy arrays, (H, W, 3) uint8 RGB; maps are (H, W) float32.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from shards.errors import InputError
from shards.files import write_atomic
from shards.sample import DEPTH_SCALE

Picture = NDArray[np.uint8]
Map = NDArray[np.floating[Any]]

_CAPTION_HEIGHT = 22
_GAP = 6


@lru_cache
def _table(name: str) -> Picture:
    """The 256 colours of a matplotlib colour map."""
    # matplotlib takes a third of a second to import, which commands that draw nothing must not pay.
    import matplotlib

    try:
        colours = matplotlib.colormaps[name]
    except KeyError:
        raise InputError(f"{name}: no such colour map; matplotlib's magma, viridis, turbo ... are known") from None
    table: Picture = (colours(np.linspace(0, 1, 256))[:, :3] * 255).round().astype(np.uint8)
    return table


def check_color_map(name: str) -> None:
    """Known before any work is done.

    Raises:
        InputError: no colour map of that name.
    """
    _table(name)


def color_disparity(disparity: Map, cmap: str = "magma") -> Picture:
    """Disparity (H, W) -> colours as in the published pictures: from the minimum to the 95th percentile."""
    return colorize(disparity, cmap=cmap, percentile=95.0)


def colorize(
    values: Map,
    *,
    cmap: str = "magma",
    percentile: float = 95.0,
    low: float | None = None,
    high: float | None = None,
) -> Picture:
    """Map (H, W) -> colours.

    Args:
        values: not finite values are drawn black.
        cmap: name of a matplotlib colour map.
        percentile: of the values, what gets the last colour.
        low, high: fixed ends of the scale; None: the minimum, and the percentile.

    Raises:
        InputError: no colour map of that name.
    """
    finite = np.isfinite(values)
    kept = values[finite]
    low = low if low is not None else float(kept.min(initial=np.inf)) if kept.size else 0.0
    high = high if high is not None else float(np.percentile(kept, percentile)) if kept.size else 1.0
    span = high - low if high > low else 1.0
    scaled = np.clip((np.where(finite, values, low) - low) / span, 0, 1)
    colours = _table(cmap)[(scaled * 255).round().astype(np.uint8)]
    colours[~finite] = 0
    return colours


def side_by_side(image: Picture, colours: Picture) -> Picture:
    """Image and colour map next to each other; wide ones (driving cameras) above each other."""
    height, width = image.shape[:2]
    axis = 0 if width > 1.5 * height else 1
    bar = np.zeros((4, width, 3) if axis == 0 else (height, 4, 3), np.uint8)
    return np.concatenate([image, bar, colours], axis=axis)


def depth_to_uint16(metres: Map) -> NDArray[np.uint16]:
    """Metres -> KITTI's 16-bit convention, metres x 256; 0 is kept for "no depth", 255.996 m is the farthest.

    Not finite and non-positive depths become 0.
    """
    good = np.isfinite(metres) & (metres > 0)
    scaled = np.clip(np.where(good, metres, 0) * DEPTH_SCALE, 1, 65535).round()
    return np.where(good, scaled, 0).astype(np.uint16)


def write_file(path: Path, data: bytes) -> None:
    """Write, whole or not at all.

    Raises:
        InputError: the folder cannot be written, or the disk is full.
    """
    try:
        write_atomic(path, data)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}; free the place or name another") from error


def png_bytes(picture: Picture | NDArray[np.uint16]) -> bytes:
    """Encoded PNG: (H, W, 3) uint8 or (H, W) uint16."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "png")
    return buffer.getvalue()


def write_png(path: Path, picture: Picture | NDArray[np.uint16]) -> None:
    """Write (H, W, 3) uint8 as RGB, or (H, W) uint16 as 16-bit grey.

    Raises:
        InputError: as `write_file`.
    """
    write_file(path, png_bytes(picture))


def write_npy(path: Path, values: NDArray[Any]) -> None:
    """Write a plain .npy (never an object array).

    Raises:
        InputError: as `write_file`.
    """
    buffer = io.BytesIO()
    np.save(buffer, values, allow_pickle=False)
    write_file(path, buffer.getvalue())


def point_cloud(depth: Map, intrinsics: Sequence[float], limit: float = np.inf) -> tuple[Map, NDArray[np.bool_]]:
    """Back-project a depth map: X = (x - cx) / fx * z, Y = (y - cy) / fy * z, Z = z.

    Args:
        depth: (H, W) along the camera's z.
        intrinsics: fx, fy, cx, cy in pixels of the depth map, pixel centres at integers.
        limit: farther points are left out.

    Returns:
        (N, 3) points, x right, y down, z forward, in depth's unit; (H, W) bool, which pixels they are.
    """
    fx, fy, cx, cy = intrinsics
    rows, columns = np.indices(depth.shape, dtype=np.float32)
    kept = np.isfinite(depth) & (depth > 0) & (depth <= limit)
    points = np.stack([(columns - cx) / fx * depth, (rows - cy) / fy * depth, depth], axis=-1)[kept]
    return points.astype(np.float32), kept


def ply_bytes(points: Map, colours: Picture, comment: str) -> bytes:
    """A binary PLY of coloured points: (N, 3) float32 and (N, 3) uint8; `comment` is one line of its header."""
    layout = [("xyz", "<f4", 3), ("rgb", "u1", 3)]
    vertices = np.empty(len(points), dtype=layout)
    vertices["xyz"], vertices["rgb"] = points, colours
    header = [
        "ply",
        "format binary_little_endian 1.0",
        f"comment {comment}",
        f"element vertex {len(points)}",
        *(f"property float {axis}" for axis in "xyz"),
        *(f"property uchar {colour}" for colour in ("red", "green", "blue")),
        "end_header\n",
    ]
    return "\n".join(header).encode("ascii") + vertices.tobytes()


@dataclass(frozen=True)
class Tile:
    """One row of a contact sheet: a caption over pictures of equal height."""

    caption: str
    pictures: Sequence[Picture]


def sheet(title: str, tiles: Sequence[Tile], width: int = 480, legend: str = "") -> Picture:
    """Rows of captioned pictures, each picture scaled to `width`; under the title what the columns are."""
    full = width * max((len(tile.pictures) for tile in tiles), default=1)
    rows = [_caption(title, full, bold=True)] if title else []
    rows += [_caption(legend, full)] if legend else []
    for tile in tiles:
        scaled = [_scale_to(picture, width) for picture in tile.pictures]
        height = max(picture.shape[0] for picture in scaled)
        padded = [np.pad(p, ((0, height - p.shape[0]), (0, 0), (0, 0)), constant_values=255) for p in scaled]
        row = np.concatenate(padded, axis=1)
        rows += [_caption(tile.caption, row.shape[1]), row, np.full((_GAP, row.shape[1], 3), 255, np.uint8)]
    return np.concatenate(
        [np.pad(row, ((0, 0), (0, full - row.shape[1]), (0, 0)), constant_values=255) for row in rows]
    )


def _scale_to(picture: Picture, width: int) -> Picture:
    height = max(1, round(picture.shape[0] * width / picture.shape[1]))
    return np.asarray(Image.fromarray(picture).resize((width, height), Image.Resampling.BILINEAR))


def _caption(text: str, width: int, *, bold: bool = False) -> Picture:
    size = 16 if bold else 13
    strip = Image.new("RGB", (width, _CAPTION_HEIGHT + (6 if bold else 0)), "white")
    ImageDraw.Draw(strip).text((4, 3), text, fill="black", font=ImageFont.load_default(size))
    return np.asarray(strip)
