"""One chunk of work: decode, resize and encode each frame of a stretch of a drive once, project its scans.

`encode_chunk` runs in a worker; everything it needs is in the `ChunkJob`. What it makes is a chunk: a zip in the
scratch folder, stored, with the encoded files and an index. It appears whole or not at all, and every file in it has
a checksum, so that a killed run, a power cut or a failing disk is noticed.
"""

from __future__ import annotations

import hashlib
import io
import json
import struct
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import PIL
from PIL import Image, ImageFile, ImageFilter, ImageOps, UnidentifiedImageError, features

from prep.raw.calibration import StereoCalibration
from prep.raw.files import read_many
from prep.raw.splits import CameraSide
from prep.raw.text import printable
from prep.raw.velodyne import Convention, depth_png, points_in_view, project, read_scan
from prep.raw.zips import Ref
from shards.errors import DatasetError, SampleError, StorageError, UsageError
from shards.files import temporary
from shards.manifest import JpegInfo
from shards.sample import Chroma, Codec
from shards.version import __version__

_END = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}
"""How a whole file ends: one without its end may show every pixel here and fail in another decoder."""
_PNG_DEPTH = 24
"""Where a PNG says how many bits a channel has."""
_MAX_PIXELS = 64 << 20
"""Of a raw frame; decoded it takes three bytes a pixel."""
READ_AHEAD = 4
"""Time steps fetched at once, and the same number again while those are encoded: 2 x 4 x (2 images + 1 scan)."""
_READ_AHEAD_BYTES = 64 << 20
_INDEX = "index.json"
_LOCAL_HEADER = 30
"""Bytes of a zip's local header before the name; `zipfile` writes no extra field for stored files of this size."""
SCRATCH_ADVICE = "give --scratch DIR"


@cache
def versions() -> str:
    """Versions of what decides a dataset's bytes: `md2 0.1.0, pillow 12.0, pillow's libjpeg_turbo 3.1, …, zlib 1.3`.

    With others the same input is another dataset.
    """
    codecs = {name: features.version(name) for name in ("libjpeg_turbo", "zlib", "zlib_ng")}
    words = [f"md2 {__version__}", f"pillow {PIL.__version__}"]
    words += [f"pillow's {name} {number}" for name, number in codecs.items() if number]
    return ", ".join([*words, f"zlib {zlib.ZLIB_RUNTIME_VERSION}"])


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
class TimeStep:
    """The raw files of one time step of a drive that samples need.

    Attributes:
        images: side -> image.
        scan: the lidar scan, needed for `depth_sides`.
        typical_scan: usual size in bytes of the drive's scans; 0 without one.
        depth_maps: side -> ready-made ground truth.
    """

    frame: int
    images: dict[CameraSide, Ref]
    scan: Ref | None = None
    depth_sides: tuple[CameraSide, ...] = ()
    depth_maps: dict[CameraSide, Ref] = field(default_factory=dict)
    typical_scan: int = 0

    def refs(self) -> list[Ref]:
        """All of them."""
        return [*self.images.values(), *([self.scan] if self.scan else []), *self.depth_maps.values()]


@dataclass(frozen=True)
class ChunkJob:
    """A stretch of one drive to encode into one chunk.

    Attributes:
        levels: values that become 0 and 255, for frames with more than 8 bits; see `Drive.levels`.
        versions: of the libraries that decide the bytes.
    """

    drive: str
    time_steps: tuple[TimeStep, ...]
    calibration: StereoCalibration
    format: ImageFormat
    convention: Convention
    skip_broken: bool
    folder: Path
    versions: str
    levels: tuple[int, int] | None = None

    @property
    def images(self) -> int:
        """Number of images to encode."""
        return sum(len(step.images) for step in self.time_steps)

    @property
    def name(self) -> str:
        """File name from everything that decides the content: another input or option is another chunk."""
        files = [(r.path, r.url, r.size, r.member.crc if r.member else 0) for i in self.time_steps for r in i.refs()]
        wanted = [(i.frame, sorted(i.images), i.depth_sides, sorted(i.depth_maps)) for i in self.time_steps]
        calibration = [self.calibration.size, *(m.tolist() for _, m in sorted(self.calibration.projection.items()))]
        calibration.append(None if self.calibration.velodyne is None else self.calibration.velodyne.tolist())
        spec = [
            self.drive,
            files,
            wanted,
            calibration,
            asdict(self.format),
            self.convention,
            self.versions,
            self.levels,
        ]
        return hashlib.sha256(json.dumps(spec).encode()).hexdigest()[:32] + ".chunk"


@dataclass(frozen=True, slots=True)
class Extent:
    """Where an encoded file lies: its chunk, offset and size in it, and the CRC-32 of its bytes."""

    chunk: str
    offset: int
    size: int
    crc: int

    def read(self, folder: Path) -> bytes:
        """The bytes.

        Raises:
            DatasetError: they are not what was written.
        """
        with (folder / self.chunk).open("rb") as file:
            file.seek(self.offset)
            data = file.read(self.size)
        if len(data) != self.size or zlib.crc32(data) != self.crc:
            raise DatasetError(f"{folder / self.chunk}: damaged scratch file; remove it and run the same command again")
        return data


@dataclass(frozen=True)
class Chunk:
    """Contents of a finished chunk.

    Attributes:
        files: "image FRAME SIDE" or "depth FRAME SIDE" -> where it lies.
        sizes: "image FRAME SIDE" -> native (width, height).
        broken: the same names -> what is broken about the raw file.
    """

    files: dict[str, Extent]
    sizes: dict[str, tuple[int, int]]
    broken: dict[str, str]


def read_chunk(path: Path) -> Chunk | None:
    """A finished chunk; None if there is none, or a damaged one."""
    try:
        with zipfile.ZipFile(path) as archive:
            index = json.loads(archive.read(_INDEX))
            members = [info for info in archive.infolist() if info.filename != _INDEX]
    except (FileNotFoundError, zipfile.BadZipFile, KeyError, ValueError, EOFError, NotImplementedError, struct.error):
        return None
    files = {
        info.filename: Extent(
            path.name, info.header_offset + _LOCAL_HEADER + len(info.filename), info.file_size, info.CRC
        )
        for info in members
    }
    return Chunk(files, {name: (size[0], size[1]) for name, size in index["sizes"].items()}, index["broken"])


def encode_chunk(job: ChunkJob) -> str:
    """Write the chunk of a job; returns its file name.

    Raises:
        SampleError: a raw file is broken, unless `skip_broken`.
        StorageError: the chunk cannot be written.
        UsageError: this worker has other versions of the libraries that decide the bytes.
    """
    if versions() != job.versions:
        raise UsageError(f"a worker has {versions()}, the main process {job.versions}: install the same versions")
    path = job.folder / job.name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tmp = temporary(path)
        try:
            with zipfile.ZipFile(tmp, "w") as archive:
                _Encoder(job, archive).run()
            tmp.replace(path)
        finally:
            tmp.unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(
            f"{job.folder}: cannot be written ({error.strerror or error}); free some space or {SCRATCH_ADVICE}, then "
            "run the same command again: it resumes from here"
        ) from error
    return job.name


class _Encoder:
    """Encodes a job's time steps into an archive.

    With `skip_broken`, what is broken is noted in the index. The note names files by their KITTI paths: it goes into
    the dataset's report, which is shared, and is the same wherever the raw data lies.
    """

    def __init__(self, job: ChunkJob, archive: zipfile.ZipFile) -> None:
        self._job = job
        self._archive = archive
        self._sizes: dict[str, tuple[int, int]] = {}
        self._broken: dict[str, str] = {}

    def run(self) -> None:
        for step, files in _read_ahead(self._job.time_steps):
            self._encode(step, files)
        self._archive.writestr(_INDEX, json.dumps({"sizes": self._sizes, "broken": self._broken}))

    def _encode(self, step: TimeStep, files: dict[Ref, bytes | SampleError]) -> None:
        job, native = self._job, dict[CameraSide, tuple[int, int]]()
        for side, ref in step.images.items():
            name = f"image {step.frame} {side}"
            try:
                data, size = encode_image(_whole(files[ref]), ref, job.calibration.size, job.format, job.levels)
            except SampleError as error:
                self._note(step, name, error)
                continue
            self._archive.writestr(name, data)
            self._sizes[name] = native[side] = size
        points: npt.NDArray[np.float64] | None = None
        for side in (*step.depth_sides, *step.depth_maps):
            if side not in native:
                continue  # its image is broken, and so is every sample that would have this depth
            try:
                if side in step.depth_maps:
                    ready = step.depth_maps[side]
                    data = depth_png(_whole(files[ready]), native[side], ready.place)
                else:
                    points = self._points(step, files, native[side]) if points is None else points
                    projection = job.calibration.lidar_projection(side)
                    data = project(points, projection, native[side], job.convention).png()
            except SampleError as error:
                self._note(step, f"depth {step.frame} {side}", error)
                continue
            self._archive.writestr(f"depth {step.frame} {side}", data)

    def _points(
        self, step: TimeStep, files: dict[Ref, bytes | SampleError], size: tuple[int, int]
    ) -> npt.NDArray[np.float64]:
        """The scan's points that the cameras may see; both have images of one size."""
        assert step.scan is not None
        scan = read_scan(_whole(files[step.scan]), step.scan.place, step.typical_scan)
        projections = [self._job.calibration.lidar_projection(side) for side in step.depth_sides]
        return points_in_view(scan, projections, size[0])

    def _note(self, step: TimeStep, name: str, error: SampleError) -> None:
        if not self._job.skip_broken:
            raise error
        note = str(error)
        for ref in step.refs():
            note = note.replace(ref.place, ref.path)
        self._broken[name] = printable(note)


def _read_ahead(steps: tuple[TimeStep, ...]) -> Iterator[tuple[TimeStep, dict[Ref, bytes | SampleError]]]:
    """Each time step with its files' content; the next few are fetched while these are worked on."""
    groups: list[list[TimeStep]] = []
    room = 0
    for step in steps:
        size = sum(max(ref.size, ref.transfer) for ref in step.refs())
        if not groups or len(groups[-1]) == READ_AHEAD or size > room:
            groups.append([])
            room = _READ_AHEAD_BYTES
        groups[-1].append(step)
        room -= size
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(_read_group, groups[0])
        for number, group in enumerate(groups):
            files = coming.result()
            if number + 1 < len(groups):
                coming = thread.submit(_read_group, groups[number + 1])
            for step in group:
                yield step, {ref: files.pop(ref) for ref in step.refs()}


def _read_group(group: list[TimeStep]) -> dict[Ref, bytes | SampleError]:
    refs = [ref for step in group for ref in step.refs()]
    return dict(zip(refs, read_many(refs), strict=True))


def _whole(content: bytes | SampleError) -> bytes:
    if isinstance(content, SampleError):
        raise content
    return content


def _to_rgb(picture: Image.Image, levels: tuple[int, int] | None) -> Image.Image:
    """Any mode as 8-bit RGB.

    Of 16 bits the upper 8 remain, as Pillow reads 16-bit colour (16-bit grey it would clip); with `levels`, that range
    of grey values becomes 0 to 255.
    """
    if picture.mode.startswith("I;16"):
        values = np.asarray(picture)
        if levels is None:
            grey = values >> 8
        else:
            low, high = levels
            grey = np.rint((values.clip(low, high).astype(np.float32) - low) * (255 / (high - low)))
        picture = Image.fromarray(grey.astype(np.uint8))
    return picture.convert("RGB")


def encode_image(
    data: bytes,
    ref: Ref,
    expected: tuple[int, int] | None,
    form: ImageFormat,
    levels: tuple[int, int] | None = None,
) -> tuple[bytes, tuple[int, int]]:
    """Decode, resize (antialiased, Lanczos) and encode one raw image.

    A whole file that already has the stored codec and size goes through untouched.

    Args:
        data: the raw file's content.
        expected: native size by the calibration, if that is known.
        levels: as `Drive.levels`.

    Returns:
        The stored bytes, and the native (width, height).

    Raises:
        SampleError: not a whole image, too large, or not of the size that it was calibrated at.
    """
    try:
        with warnings.catch_warnings():  # Pillow's own limit would print one
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            opened = Image.open(io.BytesIO(data), formats=("PNG", "JPEG"))
        with opened as image:
            oriented = 0x0112 in image.getexif()
            # Before the pixels take memory; one that is to be turned may have its sides swapped.
            _check_size(image.size[::-1] if oriented and expected == image.size[::-1] else image.size, expected, ref)
            image.load()
            kind, mode = image.format, image.mode
            picture = ImageOps.exif_transpose(image) if oriented else image
            picture = picture if mode == "RGB" else _to_rgb(picture, levels)
    except UnidentifiedImageError as error:  # its own words are the address of a buffer
        raise SampleError(f"{ref.place}: broken image (neither PNG nor JPEG); fetch it again") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise SampleError(f"{ref.place}: broken image ({error}); fetch it again") from error
    native = picture.size
    _check_size(native, expected, ref)
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
        picture = smooth_chroma(picture, CHROMA_BLUR)
    steps: dict[str, Any] = {"qtables": EVEN_TABLES} if form.quality is None else {"quality": form.quality}
    # Huffman tables of the image's own: a twentieth fewer bytes. Pillow then writes into one buffer that must hold all.
    ImageFile.MAXBLOCK = max(ImageFile.MAXBLOCK, 1024 + 6 * picture.width * picture.height)
    picture.save(buffer, "JPEG", subsampling=f"4:{form.chroma[1]}:{form.chroma[2]}", optimize=True, **steps)
    return buffer.getvalue()


def _check_size(native: tuple[int, int], expected: tuple[int, int] | None, ref: Ref) -> None:
    if expected is not None and native != expected:
        raise SampleError(
            f"{ref.place}: {native[0]}x{native[1]} pixels, but the calibration is for {expected[0]}x{expected[1]}; "
            "prep needs the frames at their own size"
        )
    if native[0] * native[1] > _MAX_PIXELS:
        raise SampleError(f"{ref.place}: {native[0]}x{native[1]} pixels; more than {_MAX_PIXELS:,} are not read")


def smooth_chroma(picture: Image.Image, blur: float) -> Image.Image:
    """A picture in YCbCr whose colours are halved, smoothed and blown up again: halving them again changes nothing.

    Args:
        picture: RGB.
        blur: standard deviation of the Gaussian, pixels of the picture.
    """
    luma, *colours = picture.convert("YCbCr").split()
    halves = (colour.reduce(2).filter(ImageFilter.GaussianBlur(blur / 2)) for colour in colours)
    whole = (half.resize((2 * half.width, 2 * half.height), Image.Resampling.NEAREST) for half in halves)
    return Image.merge("YCbCr", (luma, *(colour.crop((0, 0, *picture.size)) for colour in whole)))
