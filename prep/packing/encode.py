"""One chunk of work: decode, resize and encode each frame of a stretch of a drive once, project its scans.

`encode_chunk` runs in a worker; everything it needs is in the `ChunkJob`, everything it makes is in the chunk file.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFile, ImageFilter, ImageOps, UnidentifiedImageError

from prep.packing.scratch import ChunkWriter
from prep.packing.versions import versions
from prep.raw.calibration import Rig
from prep.raw.sources import Ref, read_many
from prep.raw.splits import Side
from prep.raw.velodyne import Convention, check_depth_png, points_in_view, project, read_scan
from shards.errors import SampleError, StorageError, UsageError
from shards.manifest import JpegInfo
from shards.sample import Chroma, Codec

_END = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}
"""How a whole file ends: one without its end may show every pixel here and fail in another decoder."""
_PNG_DEPTH = 24
"""Where a PNG says how many bits a channel has."""
READ_AHEAD = 4
"""Instants fetched at once, and the same number again while those are encoded: 2 x 4 x (2 images + 1 scan)."""


EVEN_TABLES = [[1 if u + v <= 7 else 2 for v in range(8) for u in range(8)], [6] * 64]
"""Quantisation steps of luma and chroma at frequencies u, v. The standard tables spare what the eye sees; the
photometric loss matches the faint texture of roads and walls too, which steps of 3 and more erase."""
CHROMA_BLUR = 2.0
"""Pixels. The noise of a camera's colours differs from frame to frame, and counts as photometric error."""


@dataclass(frozen=True)
class ImageFormat:
    """How images are stored.

    Attributes:
        size: (width, height), or None for native.
        quality: of JPEG's standard tables; None: `EVEN_TABLES`. Other codecs have none.
        chroma: colour resolution of JPEG; `420` is smoothed before it is halved. Other codecs keep all of it.
    """

    size: tuple[int, int] | None
    codec: Codec
    quality: int | None = None
    chroma: Chroma = "420"

    @property
    def jpeg(self) -> JpegInfo | None:
        """What the manifest records; None for other codecs."""
        if self.codec != "jpeg":
            return None
        return JpegInfo(
            chroma=self.chroma,
            chroma_blur=CHROMA_BLUR if self.chroma == "420" else 0,
            tables="even" if self.quality is None else "standard",
        )


@dataclass(frozen=True)
class Instant:
    """One moment of a drive: the raw files that samples need of it.

    Attributes:
        images: side -> image.
        scan: the lidar scan, needed for `depth_sides`.
        depth_maps: side -> ready-made ground-truth PNG.
    """

    frame: int
    images: dict[Side, Ref]
    scan: Ref | None = None
    depth_sides: tuple[Side, ...] = ()
    depth_maps: dict[Side, Ref] = field(default_factory=dict)

    def refs(self) -> list[Ref]:
        return [*self.images.values(), *([self.scan] if self.scan else []), *self.depth_maps.values()]


@dataclass(frozen=True)
class ChunkJob:
    """A stretch of one drive to encode into one scratch file."""

    drive: str
    instants: tuple[Instant, ...]
    rig: Rig
    format: ImageFormat
    convention: Convention
    skip_broken: bool
    folder: Path
    versions: str
    """Versions of the libraries that decide the bytes."""

    @property
    def images(self) -> int:
        return sum(len(instant.images) for instant in self.instants)

    @property
    def name(self) -> str:
        """File name from everything that decides the content: another input or option is another chunk."""
        files = [(r.path, r.url, r.size, r.member.crc if r.member else 0) for i in self.instants for r in i.refs()]
        wanted = [(i.frame, sorted(i.images), i.depth_sides, sorted(i.depth_maps)) for i in self.instants]
        rig = [self.rig.size, *(matrix.tolist() for _, matrix in sorted(self.rig.projection.items()))]
        rig.append(None if self.rig.velodyne is None else self.rig.velodyne.tolist())
        spec = [self.drive, files, wanted, rig, asdict(self.format), self.convention, self.versions]
        return hashlib.sha256(json.dumps(spec).encode()).hexdigest()[:32] + ".chunk"


def encode_chunk(job: ChunkJob) -> str:
    """Write the chunk of a job; its file name.

    Its index: `images`, "frame side" -> [offset, size, crc, width, height] (native size); `depth`, the same without
    size; `broken`, "image frame side" or "depth frame side" -> message, for `skip_broken`.

    Raises:
        SampleError: a raw file is broken, unless `skip_broken`.
        StorageError: the chunk cannot be written.
        UsageError: this worker has other versions of the libraries that decide the bytes.
    """
    if versions() != job.versions:
        raise UsageError(f"a worker has {versions()}, the main process {job.versions}: install the same versions")
    index: dict[str, dict[str, Any]] = {"images": {}, "depth": {}, "broken": {}}
    try:
        with ChunkWriter(job.folder / job.name) as writer:
            for instant, files in _read_ahead(job.instants):
                _encode_instant(job, instant, files, writer, index)
            writer.finish(index)
    except OSError as error:
        raise StorageError(
            f"{job.folder}: cannot be written ({error.strerror or error}); free some space or give --scratch DIR, then "
            "run the same command again: it goes on from here"
        ) from error
    return job.name


def _read_ahead(instants: tuple[Instant, ...]) -> Iterator[tuple[Instant, dict[Ref, bytes | SampleError]]]:
    """Each instant with its files' content; the next few are fetched while these are worked on."""
    groups = [instants[i : i + READ_AHEAD] for i in range(0, len(instants), READ_AHEAD)]
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(_read_group, groups[0])
        for number, group in enumerate(groups):
            files = coming.result()
            if number + 1 < len(groups):
                coming = thread.submit(_read_group, groups[number + 1])
            for instant in group:
                yield instant, {ref: files.pop(ref) for ref in instant.refs()}


def _read_group(group: tuple[Instant, ...]) -> dict[Ref, bytes | SampleError]:
    refs = [ref for instant in group for ref in instant.refs()]
    return dict(zip(refs, read_many(refs), strict=True))


def _encode_instant(
    job: ChunkJob,
    instant: Instant,
    files: dict[Ref, bytes | SampleError],
    writer: ChunkWriter,
    index: dict[str, dict[str, Any]],
) -> None:
    sizes: dict[Side, tuple[int, int]] = {}
    for side, ref in instant.images.items():
        with _Broken(job, instant, index, f"image {instant.frame} {side}"):
            data, sizes[side] = encode_image(_whole(files[ref]), ref, job.rig.size, job.format)
            blob = writer.add(data)
            index["images"][f"{instant.frame} {side}"] = [blob.offset, blob.size, blob.crc, *sizes[side]]
    points: npt.NDArray[np.float64] | None = None
    for side in (*instant.depth_sides, *instant.depth_maps):
        if side not in sizes:
            continue  # its image is broken, and so is every sample that would have this depth
        with _Broken(job, instant, index, f"depth {instant.frame} {side}"):
            ready = instant.depth_maps.get(side)
            if ready is not None:
                data = _whole(files[ready])
                check_depth_png(data, sizes[side], ready.place)
            else:
                points = _points(job, instant, files, sizes[side]) if points is None else points
                data = project(points, job.rig.lidar_projection(side), sizes[side], job.convention).png()
            blob = writer.add(data)
            index["depth"][f"{instant.frame} {side}"] = [blob.offset, blob.size, blob.crc]


def _points(
    job: ChunkJob, instant: Instant, files: dict[Ref, bytes | SampleError], size: tuple[int, int]
) -> npt.NDArray[np.float64]:
    """The scan's points that the cameras may see; both have images of one size."""
    assert instant.scan is not None
    scan = read_scan(_whole(files[instant.scan]), instant.scan.place)
    return points_in_view(scan, [job.rig.lidar_projection(side) for side in instant.depth_sides], size[0])


class _Broken:
    """Notes a broken raw file in the index where broken ones are skipped; else lets the error through.

    The note names files by their KITTI paths: it goes into the dataset's report, which is the same wherever the raw
    data lies, and is shared.
    """

    def __init__(self, job: ChunkJob, instant: Instant, index: dict[str, dict[str, Any]], name: str) -> None:
        self._notes = index["broken"] if job.skip_broken else None
        self._refs = instant.refs()
        self._name = name

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        if self._notes is None or not isinstance(error, SampleError):
            return False
        note = str(error)
        for ref in self._refs:
            note = note.replace(ref.place, ref.path)
        self._notes[self._name] = note
        return True


def _whole(content: bytes | SampleError) -> bytes:
    if isinstance(content, SampleError):
        raise content
    return content


def _to_rgb(picture: Image.Image) -> Image.Image:
    """Any mode as 8-bit RGB; of 16 bits the upper 8, as Pillow reads 16-bit colour (16-bit grey it would clip)."""
    if picture.mode.startswith("I;16"):
        picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    return picture.convert("RGB")


def encode_image(
    data: bytes, ref: Ref, expected: tuple[int, int] | None, form: ImageFormat
) -> tuple[bytes, tuple[int, int]]:
    """Decode, resize (antialiased, Lanczos) and encode one raw image.

    A whole file that is in the stored codec and at the stored size already goes through untouched.

    Args:
        data: the raw file's content.
        expected: native size by the calibration, where that is known.

    Returns:
        The stored bytes, and the native (width, height).

    Raises:
        SampleError: not a whole image, or not of the size that it was calibrated at.
    """
    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG")) as image:
            image.load()
            kind, mode, oriented = image.format, image.mode, 0x0112 in image.getexif()
            picture = ImageOps.exif_transpose(image) if oriented else image
            picture = picture if mode == "RGB" else _to_rgb(picture)
    except UnidentifiedImageError as error:  # its own words are the address of a buffer
        raise SampleError(f"{ref.place}: broken image (neither PNG nor JPEG); fetch it again") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise SampleError(f"{ref.place}: broken image ({error}); fetch it again") from error
    native = picture.size
    if expected is not None and native != expected:
        raise SampleError(
            f"{ref.place}: {native[0]}x{native[1]} pixels, but the calibration is for {expected[0]}x{expected[1]}; "
            "prep needs the frames at their own size"
        )
    deep = kind == "PNG" and data[_PNG_DEPTH] != 8
    untouched = form.size in (None, native) and mode == "RGB" and not oriented and not deep
    if untouched and kind == form.codec.upper() and data.endswith(_END[kind]):
        return data, native
    if form.size is not None and form.size != native:
        picture = picture.resize(form.size, Image.Resampling.LANCZOS)
    return encode(picture, form), native


def encode(picture: Image.Image, form: ImageFormat) -> bytes:
    """An RGB picture of the stored size, encoded."""
    buffer = io.BytesIO()
    if form.codec != "jpeg":
        picture.save(buffer, form.codec.upper())
        return buffer.getvalue()
    if form.chroma == "420":
        luma, *colours = picture.convert("YCbCr").split()
        smooth = ImageFilter.GaussianBlur(CHROMA_BLUR)
        picture = Image.merge("YCbCr", (luma, *(colour.filter(smooth) for colour in colours)))
    steps: dict[str, Any] = {"qtables": EVEN_TABLES} if form.quality is None else {"quality": form.quality}
    # Huffman tables of the image's own: a twentieth fewer bytes. Pillow then writes into one buffer that must hold all.
    ImageFile.MAXBLOCK = max(ImageFile.MAXBLOCK, 1024 + 6 * picture.width * picture.height)
    picture.save(buffer, "JPEG", subsampling=f"4:{form.chroma[1]}:{form.chroma[2]}", optimize=True, **steps)
    return buffer.getvalue()
