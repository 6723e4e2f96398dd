"""A contact sheet of a dataset: one picture with a row for each of some samples, all their images and the depth."""

from __future__ import annotations

import io
import json
import struct
import warnings
from pathlib import PurePosixPath

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, UnidentifiedImageError

from shards.dataset import read_index
from shards.errors import DatasetError, visible
from shards.manifest import Manifest, Shard
from shards.publish import require_manifest
from shards.sample import DEPTH, DEPTH_SCALE, INTRINSICS, META, STEREO_TRANSLATION, Offset, Sample, offset_name
from shards.storage import Storage, open_storage
from shards.storage.retry import MissingError
from shards.tar import MAX_SAMPLE_BYTES, IndexEntry

NEAR, FAR = 2.0, 80.0
"""Metres at the two ends of the colour map."""
CELL = 320
"""Width of a cell in pixels."""
MAX_PIXELS = 64 << 20
"""Images with more pixels are not decoded."""
_TALLEST = 4 * CELL
"""Height of a cell in pixels: an image one pixel wide would otherwise be stretched to gigabytes."""
_LONGEST_WORD = 120
_GAP, _TEXT = 6, 18
_Picture = NDArray[np.uint8]


def read_some(url: str, part: str | None = None, count: int = 6) -> tuple[Manifest, list[Sample]]:
    """Return the manifest, and `count` samples evenly spread over a part; only their own bytes are fetched.

    If only some samples of the dataset have depth, and none of those, the last one is replaced by one that has it.

    Args:
        part: None: the first that the dataset has of train, val, test; the sample with depth may be of another part.

    Raises:
        DatasetError: no dataset, no such part, or a broken index.
        StorageError: the storage fails.
    """
    storage = open_storage(url)
    manifest = require_manifest(storage).manifest
    shown = part or next((p for p in ("train", "val", "test") if p in manifest.parts), manifest.parts[0])
    total = manifest.samples(shown)
    wanted = sorted({int((i + 0.5) * total / count) for i in range(min(count, total))})
    chosen: list[tuple[Shard, list[IndexEntry]]] = []
    first = 0
    for shard in manifest.part(shown):
        here = [number - first for number in wanted if first <= number < first + shard.samples]
        if here:
            index = read_index(storage, shard)
            chosen += [(shard, index[number]) for number in here]
        first += shard.samples
    if DEPTH in manifest.optional_components and not any(map(_has_depth, chosen)):
        parts = [part] if part else sorted(manifest.parts, key=lambda name: name == "train")  # the smaller parts first
        shards = (shard for name in parts for shard in manifest.part(name))
        found = ((shard, entries) for shard in shards for entries in read_index(storage, shard))
        chosen[-1] = next(filter(_has_depth, found), chosen[-1])
    return manifest, [_read_sample(storage, shard, entries) for shard, entries in chosen]


def _has_depth(place: tuple[Shard, list[IndexEntry]]) -> bool:
    return any(entry.component == DEPTH for entry in place[1])


def _read_sample(storage: Storage, shard: Shard, entries: list[IndexEntry]) -> Sample:
    start = min(entry.offset for entry in entries)
    size = max(entry.offset + entry.size for entry in entries) - start
    where = f"{storage.url}/{shard.name}"
    if size > min(MAX_SAMPLE_BYTES, shard.bytes):
        raise DatasetError(f"{where}: a sample of {size} bytes, refused")
    try:
        data = storage.read_range(shard.name, start, size)
    except MissingError as error:
        raise DatasetError(f"{where}: missing, though the manifest lists it") from error
    if len(data) != size:
        raise DatasetError(f"{where}: ends too early; md2 shards verify checks all of it")
    key = PurePosixPath(entries[0].name).name.partition(".")[0]
    try:
        return Sample(key, {e.component: data[e.offset - start : e.offset - start + e.size] for e in entries})
    except ValueError as error:
        raise DatasetError(f"{where}: {error}") from error


def contact_sheet(manifest: Manifest, samples: list[Sample]) -> bytes:
    """Return a PNG with a row for each sample: target, source frames, stereo partner, depth over the darkened target.

    Depth is coloured by its logarithm, from red (2 m) to blue (80 m); measured pixels are enlarged.

    Raises:
        DatasetError: an image that cannot be decoded.
    """
    titles = [_title(offset) for offset in manifest.offsets] + (["depth"] if manifest.depth else [])
    rows = [_row(manifest, sample) for sample in samples]
    heights = [max(cell.shape[0] for cell in row) for row in rows]
    width = len(titles) * (CELL + _GAP) + _GAP
    sheet = Image.new("RGB", (width, _TEXT + sum(heights) + len(rows) * (_TEXT + _GAP) + _GAP), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for column, title in enumerate(titles):
        draw.text((_GAP + column * (CELL + _GAP), 2), title, fill="black", font=font)
    top = _TEXT
    for sample, row, height in zip(samples, rows, heights, strict=True):
        for column, cell in enumerate(row):
            sheet.paste(Image.fromarray(cell), (_GAP + column * (CELL + _GAP), top))
        draw.text((_GAP, top + height + 1), _caption(sample), fill="black", font=font)
        if manifest.depth and DEPTH not in sample.components:
            draw.text((width - CELL, top + 2), "no depth", fill="white", font=font)
        top += height + _TEXT + _GAP
    if manifest.depth:
        _legend(draw, width, font)
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    return buffer.getvalue()


def _title(offset: Offset) -> str:
    if offset == "s":
        return "stereo partner (s)"
    if offset == 0:
        return "target (0)"
    return f"frame t{offset:+d} ({offset_name(offset)})"


def _caption(sample: Sample) -> str:
    words = [sample.key]
    if len(sample.components.get(INTRINSICS, b"")) == 16:
        fx, fy, cx, cy = struct.unpack("<4f", sample.components[INTRINSICS])
        words.append(f"fx {fx:.1f}  fy {fy:.1f}  cx {cx:.1f}  cy {cy:.1f}")
    if len(sample.components.get(STEREO_TRANSLATION, b"")) == 4:
        words.append(f"baseline {struct.unpack('<f', sample.components[STEREO_TRANSLATION])[0]:+.3f} m")
    try:
        drive = visible(str(json.loads(sample.components.get(META, b"{}")).get("drive", "")))[:_LONGEST_WORD]
        words += [drive] if drive.rpartition("/")[2] not in sample.key else []
    except (ValueError, AttributeError, RecursionError) as error:
        raise DatasetError(f"sample {sample.key}: {META} is not JSON ({error})") from error
    return "   ".join(words)


def _row(manifest: Manifest, sample: Sample) -> list[_Picture]:
    cells = [_image(sample, manifest.image_component(offset)) for offset in manifest.offsets]
    if manifest.depth:
        cells.append(_depth_cell(sample, cells[0]))
    return cells


def _open(sample: Sample, component: str, mode: str | None) -> Image.Image:
    """Decode one component; check its size before its pixels are allocated."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit here is the stricter one
            image = Image.open(io.BytesIO(sample.components[component]), formats=("JPEG", "PNG", "PPM"))
        if image.width * image.height > MAX_PIXELS:
            raise DatasetError(f"sample {sample.key}: {component} claims {image.width}x{image.height} pixels, refused")
        return image.convert(mode) if mode else image
    except UnidentifiedImageError as error:  # its own words are the address of a buffer
        raise DatasetError(f"sample {sample.key}: {component} cannot be decoded (no JPEG, PNG or PPM)") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DatasetError(f"sample {sample.key}: {component} cannot be decoded ({error})") from error


def _image(sample: Sample, component: str) -> _Picture:
    if component not in sample.components:
        return np.full((CELL // 4, CELL, 3), 230, np.uint8)
    image = _open(sample, component, "RGB")
    height = min(max(1, round(image.height * CELL / image.width)), _TALLEST)
    return np.asarray(image.resize((CELL, height), Image.Resampling.BILINEAR))


def _depth_cell(sample: Sample, target: _Picture) -> _Picture:
    """Draw the measured depths in colour over the target in dark grey."""
    grey = np.repeat((target.mean(axis=2, keepdims=True) * 0.35).astype(np.uint8), 3, axis=2)
    if DEPTH not in sample.components:
        return grey
    stored = np.asarray(_open(sample, DEPTH, None))
    if stored.ndim != 2:
        raise DatasetError(f"sample {sample.key}: {DEPTH} is not a 16-bit grey image")
    depth = _nearest(stored.astype(np.float64) / DEPTH_SCALE, *grey.shape[:2])
    return np.where((depth > 0)[..., None], depth_colours(depth), grey).astype(np.uint8)


def _nearest(depth: NDArray[np.float64], height: int, width: int) -> NDArray[np.float64]:
    """Scale depth to a cell: each cell pixel shows the nearest measurement within one pixel of it, 0 = none."""
    rows, columns = np.nonzero(depth)
    y, x = rows * height // depth.shape[0], columns * width // depth.shape[1]
    scaled = np.full((height + 2, width + 2), np.inf)
    for dy in (0, 1, 2):
        for dx in (0, 1, 2):
            np.minimum.at(scaled, (y + dy, x + dx), depth[rows, columns])
    inside = scaled[1:-1, 1:-1]
    return np.where(np.isinf(inside), 0.0, inside)


def depth_colours(depth: NDArray[np.float64]) -> _Picture:
    """Return RGB of depths in metres, on a logarithmic scale between `NEAR` and `FAR`; not defined for 0."""
    import matplotlib

    position = np.log(np.clip(depth, NEAR, FAR) / NEAR) / np.log(FAR / NEAR)
    return np.asarray(matplotlib.colormaps["turbo"](1.0 - position, bytes=True)[..., :3])


def _legend(draw: ImageDraw.ImageDraw, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> None:
    """Draw a strip of the depth colours above the depth column."""
    left, length = width - _GAP - 200, 120
    colours = depth_colours(np.geomspace(NEAR, FAR, length))
    for x, colour in enumerate(colours.tolist(), left + 30):
        draw.line([(x, 4), (x, _TEXT - 5)], fill=tuple(colour))
    draw.text((left, 2), f"{NEAR:.0f} m", fill="black", font=font)
    draw.text((left + 35 + length, 2), f"{FAR:.0f} m", fill="black", font=font)
