"""Pictures: colour-mapped disparity, side-by-side, 16-bit depth, contact sheets, coloured point clouds.

Pictures are NumPy arrays, (H, W, 3) uint8 RGB; maps are (H, W) float32.
"""

from __future__ import annotations

import errno
import io
import struct
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, UnidentifiedImageError

from shards.errors import InputError, first_line
from shards.files import open_regular, require_replaceable, write_atomic
from shards.sample import DEPTH_SCALE

Picture = NDArray[np.uint8]
Map = NDArray[np.floating[Any]]

MOST_PIXELS = 64 << 20
"""Of an image that is decoded: 201 MB."""
_FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP", "PPM", "GIF")
"""Pillow goes by the content: under any name it would read others, some with another program (EPS)."""
_DAMAGED = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    EOFError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)
"""What Pillow raises at damaged images."""
_CAPTION_HEIGHT = 22
_GAP = 6
_SCALE_ROOM = 240
"""Pixels of width that the labels of a colour scale need."""


@contextmanager
def open_picture(file: Path | IO[bytes], where: str) -> Iterator[Image.Image]:
    """Open an image, of a size and format that md2 reads, and decode it within the block.

    Raises:
        InputError: it cannot be opened or decoded, or has more than `MOST_PIXELS`.
    """
    try:
        opened = open_regular(file) if isinstance(file, Path) else nullcontext(file)
        with opened as content, Image.open(content, formats=_FORMATS) as image:
            if image.width * image.height > MOST_PIXELS:
                raise InputError(f"{where}: {image.width}x{image.height} pixels; at most {MOST_PIXELS:,} are read")
            yield image
    except UnidentifiedImageError:
        raise InputError(f"{where}: not an image, or its beginning is missing") from None
    except _DAMAGED as error:
        raise InputError(f"{where}: cannot be read as an image ({first_line(error)}); it may be cut short") from error


@lru_cache
def _table(name: str) -> Picture:
    """The 256 colours of a matplotlib colour map."""
    # Imported here because it takes a third of a second, which commands that draw nothing need not pay.
    import matplotlib

    try:
        colours = matplotlib.colormaps[name]
    except KeyError:
        raise InputError(f"{name}: no such colour map; give one of matplotlib's, such as magma or turbo") from None
    table: Picture = (colours(np.linspace(0, 1, 256))[:, :3] * 255).round().astype(np.uint8)
    return table


def check_color_map(name: str) -> None:
    """Refuse an unknown colour map, before the work.

    Raises:
        InputError: no colour map of that name.
    """
    _table(name)


def color_ends(values: Map) -> tuple[float, float]:
    """Return the ends of the published pictures' colour scale: minimum and 95th percentile of the finite values."""
    kept = values[np.isfinite(values)]
    return (float(kept.min()), float(np.percentile(kept, 95))) if kept.size else (0.0, 1.0)


def colorize(values: Map, *, cmap: str = "magma", low: float | None = None, high: float | None = None) -> Picture:
    """Colour a map (H, W); by default a disparity as in the published pictures.

    Args:
        values: values that are not finite become black.
        cmap: name of a matplotlib colour map.
        low, high: ends of the scale; None: those of `color_ends`.

    Raises:
        InputError: no colour map of that name.
    """
    finite = np.isfinite(values)
    ends = color_ends(values)
    low, high = ends[0] if low is None else low, ends[1] if high is None else high
    span = high - low if high > low else 1.0
    scaled = np.clip((np.where(finite, values, low) - low) / span, 0, 1)
    colours = _table(cmap)[(scaled * 255).round().astype(np.uint8)]
    colours[~finite] = 0
    return colours


def side_by_side(image: Picture, colours: Picture, scale: Callable[[int], Picture] | None = None) -> Picture:
    """Put image and colour map next to each other; wide ones (driving cameras) above each other.

    Args:
        scale: draws the colour scale below, given the width in pixels; omitted if its labels do not fit.
    """
    height, width = image.shape[:2]
    axis = 0 if width > 1.5 * height else 1
    bar = np.zeros((4, width, 3) if axis == 0 else (height, 4, 3), np.uint8)
    joined = np.concatenate([image, bar, colours], axis=axis)
    if scale is None or joined.shape[1] < _SCALE_ROOM:
        return joined
    return np.concatenate([joined, scale(joined.shape[1])])


def color_scale(cmap: str, ends: tuple[float, float], *, metric: bool) -> Callable[[int], Picture]:
    """Return a function that draws a disparity's colour scale, `width` pixels wide, with the depths of its ends.

    Args:
        ends: smallest and largest disparity of the scale, 1 / depth.
        metric: whether depth is in metres; otherwise the ends read far and near.
    """
    far, near = ((f"{1 / end:.3g} m" if end > 0 else "far") if metric else "" for end in ends)

    def draw(width: int) -> Picture:
        strip = Image.new("RGB", (width, _CAPTION_HEIGHT), "white")
        ramp = np.broadcast_to(np.linspace(0, 1, width // 2), (_CAPTION_HEIGHT - 8, width // 2))
        strip.paste(Image.fromarray(colorize(ramp, cmap=cmap, low=0, high=1)), (width // 4, 4))
        font = ImageFont.load_default(13)
        pen = ImageDraw.Draw(strip)
        pen.text((width // 4 - 6, 3), far or "far", fill="black", font=font, anchor="ra")
        pen.text((width // 4 + width // 2 + 6, 3), near or "near", fill="black", font=font)
        return np.asarray(strip)

    return draw


def depth_to_uint16(metres: Map) -> NDArray[np.uint16]:
    """Convert metres to KITTI's 16-bit convention, metres x 256: 0 is "no depth", 255.996 m the farthest.

    Depths that are not finite and positive become 0.
    """
    good = np.isfinite(metres) & (metres > 0)
    scaled = np.clip(np.where(good, metres, 0) * DEPTH_SCALE, 1, 65535).round()
    return np.where(good, scaled, 0).astype(np.uint16)


def require_writable(path: Path, *, folder: bool = False) -> None:
    """Check before the work that a file or folder can be written; leaves nothing behind.

    Raises:
        InputError: it cannot be written; gives the reason.
    """
    if path.exists() and path.is_dir() != folder:
        raise InputError(f"cannot write {path}: it is a {'file' if folder else 'folder'}; name another place")
    place = path if folder else path.parent
    while not place.exists() and place != place.parent:
        place = place.parent
    try:
        if not place.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, f"{place} is not a folder")
        require_replaceable(path)
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}; name another place") from error


def write_file(path: Path, data: bytes) -> None:
    """Write a file, whole or not at all.

    Raises:
        InputError: the folder cannot be written, or the disk is full.
    """
    try:
        write_atomic(path, data)
    except OSError as error:
        raise InputError(
            f"cannot write {path}: {error.strerror or error}; free space there or name another place"
        ) from error


def write_png(path: Path, picture: Picture | NDArray[np.uint16]) -> None:
    """Write (H, W, 3) uint8 as RGB, or (H, W) uint16 as 16-bit grey.

    Raises:
        InputError: as `write_file`.
    """
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "png")
    write_file(path, buffer.getvalue())


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
        limit: largest depth of a point.

    Returns:
        (N, 3) points, x right, y down, z forward, in depth's unit; (H, W) bool, which pixels they are.
    """
    fx, fy, cx, cy = intrinsics
    rows, columns = np.indices(depth.shape, dtype=np.float32)
    kept = np.isfinite(depth) & (depth > 0) & (depth <= limit)
    points = np.stack([(columns - cx) / fx * depth, (rows - cy) / fy * depth, depth], axis=-1)[kept]
    return points.astype(np.float32), kept


def ply_bytes(points: Map, colours: Picture, comment: str) -> bytes:
    """Encode coloured points, (N, 3) float32 and (N, 3) uint8, as binary PLY; `comment` is one line of its header."""
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
    """A row of a contact sheet: pictures under a caption."""

    caption: str
    pictures: Sequence[Picture]


def sheet(title: str, tiles: Sequence[Tile], width: int = 480, legend: Sequence[str] = ()) -> Picture:
    """Draw rows of captioned pictures, each scaled to `width`, under the columns' headings (`legend`)."""
    full = width * max((len(tile.pictures) for tile in tiles), default=1)
    rows = [_caption(title, full, bold=True)] if title else []
    rows += [np.concatenate([_caption(heading, width) for heading in legend], axis=1)] if legend else []
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
