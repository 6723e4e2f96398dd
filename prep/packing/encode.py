"""One chunk of work: decodes, resizes and encodes each frame of a stretch of a drive once, and projects its scans.

`encode_chunk` runs in a worker; all that it needs is in the `ChunkJob`. It writes a chunk: a stored zip in the scratch
folder, with the encoded files and an index. A chunk appears whole or not at all, and each file in it has a checksum,
so a killed run, a power cut or a failing disk is noticed.

A worker holds at most `_READ_AHEAD_BYTES` of raw files twice, or one larger file, and one decoded image or depth map.
"""

from __future__ import annotations

import hashlib
import io
import json
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import PIL
from PIL import Image, ImageFile, ImageFilter, ImageOps, UnidentifiedImageError, features

from prep.raw.calibration import StereoCalibration
from prep.raw.files import read, read_many
from prep.raw.splits import CameraSide
from prep.raw.text import printable
from prep.raw.velodyne import (
    MAX_PIXELS,
    Convention,
    depth_png,
    encode_png,
    open_image,
    points_in_view,
    project,
    read_scan,
)
from prep.raw.video import VideoFrame
from prep.raw.view import View
from prep.raw.zips import Ref
from shards.errors import DatasetError, SampleError, StorageError, UsageError
from shards.files import bounded_zip, remove_quietly, temporary
from shards.manifest import JpegInfo
from shards.sample import Chroma, Codec
from shards.version import __version__

_END = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}
"""End of a whole file. One without it may decode here and fail in another decoder."""
_PNG_DEPTH = 24
"""Offset of the bits of a channel in a PNG."""
READ_AHEAD = 4
"""Time steps to fetch at once; as many are fetched while those are encoded: 2 x 4 x (2 images + 1 scan)."""
_READ_AHEAD_BYTES = 64 << 20
_INDEX = "index.json"
_LONGEST_INDEX = 4 << 20
_DAMAGED = (
    OSError, zipfile.BadZipFile, KeyError, ValueError, TypeError, AttributeError, EOFError, NotImplementedError,
    RuntimeError, struct.error, zlib.error,
)  # fmt: skip
"""What a file that is no chunk of md2's raises, or one that another process has damaged."""
_LOCAL_HEADER = 30
"""Bytes of a zip's local header before the name; `zipfile` adds no extra field to stored files of this size."""
SCRATCH_ADVICE = "give --scratch DIR"


@cache
def versions() -> str:
    """Versions of md2 and of the libraries that decide a dataset's bytes, in one line."""
    codecs = {name: features.version(name) for name in ("libjpeg_turbo", "zlib", "zlib_ng")}
    words = [f"md2 {__version__}", f"pillow {PIL.__version__}"]
    words += [f"pillow's {name} {number}" for name, number in codecs.items() if number]
    return ", ".join([*words, f"zlib {zlib.ZLIB_RUNTIME_VERSION}"])


EVEN_TABLES = [[1 if u + v <= 7 else 2 for v in range(8) for u in range(8)], [6] * 64]
"""Quantisation steps of luma and chroma at frequencies u, v. The standard tables keep what the eye sees; the
photometric loss also matches the faint texture of roads and walls, which steps of 3 and more erase."""
CHROMA_BLUR = 2.0
"""Standard deviation in pixels. The noise of a camera's colours changes from frame to frame and counts as error."""


@dataclass(frozen=True)
class ImageFormat:
    """Format of the stored images.

    Attributes:
        size: (width, height), or None for native.
        quality: of JPEG's standard tables; None for `EVEN_TABLES` and for other codecs.
        chroma: colour resolution of JPEG; `420` is smoothed before it is halved. Other codecs keep all of it.
    """

    size: tuple[int, int] | None
    codec: Codec
    quality: int | None = None
    chroma: Chroma = "420"

    @property
    def jpeg(self) -> JpegInfo | None:
        """The manifest's entry; None for other codecs."""
        if self.codec != "jpeg":
            return None
        blur = CHROMA_BLUR if self.chroma == "420" else 0
        tables: Literal["even", "standard"] = "even" if self.quality is None else "standard"
        return JpegInfo(chroma=self.chroma, chroma_blur=blur, tables=tables)


@dataclass(frozen=True)
class TimeStep:
    """Raw files of one time step of a drive, as far as samples need them.

    Attributes:
        scan: the lidar scan, for the ground truth of `depth_sides`.
        typical_scan: usual size in bytes of the drive's scans; 0 without a scan.
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
    """A stretch of the drive with the key `drive` to encode into one chunk.

    `versions` are the main process's; `levels` and `view` are those of the `Drive`.
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
    view: View | None = None

    @property
    def images(self) -> int:
        """Number of images to encode."""
        return sum(len(step.images) for step in self.time_steps)

    @property
    def name(self) -> str:
        """File name from everything that decides the content: another input or option is another chunk."""
        steps, projection, velodyne = self.time_steps, self.calibration.projection, self.calibration.velodyne
        spec = [
            self.drive,
            [(r.path, r.url, r.size, r.crc) for step in steps for r in step.refs()],
            [(step.frame, sorted(step.images), step.depth_sides, sorted(step.depth_maps)) for step in steps],
            [self.calibration.size, *(matrix.tolist() for _, matrix in sorted(projection.items()))],
            None if velodyne is None else velodyne.tolist(),
            asdict(self.format),
            self.convention,
            self.versions,
            self.levels,
            self.view and asdict(self.view),
        ]
        return hashlib.sha256(json.dumps(spec).encode()).hexdigest()[:32] + ".chunk"


@dataclass(frozen=True, slots=True)
class Extent:
    """Extent of an encoded file: its chunk, offset and size in bytes, and the CRC-32 of its content."""

    chunk: str
    offset: int
    size: int
    crc: int

    def read(self, folder: Path) -> bytes:
        """Content of the file.

        Raises:
            DatasetError: it is not what was written.
        """
        with (folder / self.chunk).open("rb") as file:
            file.seek(self.offset)
            data = file.read(self.size)
        if len(data) != self.size or zlib.crc32(data) != self.crc:
            raise DatasetError(f"{folder / self.chunk}: damaged scratch file; remove it and run the same command again")
        return data


@dataclass
class Encoded:
    """Index of one finished chunk or of several, by `label`.

    Attributes:
        sizes: native (width, height) of images.
        broken: faults of raw files.
    """

    files: dict[str, Extent] = field(default_factory=dict)
    sizes: dict[str, tuple[int, int]] = field(default_factory=dict)
    broken: dict[str, str] = field(default_factory=dict)

    def add(self, chunk: Encoded) -> None:
        """Add another chunk's index."""
        self.files |= chunk.files
        self.sizes |= chunk.sizes
        self.broken |= chunk.broken


def label(kind: Literal["image", "depth"], drive: str, frame: int, side: CameraSide) -> str:
    """Name of a file in a chunk. `drive` is the drive's key."""
    return f"{kind} {drive} {frame} {side}"


def read_chunk(path: Path) -> Encoded | None:
    """Index of a chunk; None if there is no such chunk, or it is damaged."""
    try:
        with bounded_zip(path) as archive:
            with archive.open(_INDEX) as file:
                index = json.loads(file.read(_LONGEST_INDEX))
            members = [info for info in archive.infolist() if info.filename != _INDEX]
        sizes = {str(name): (int(width), int(height)) for name, (width, height) in index["sizes"].items()}
        broken = {str(name): str(fault) for name, fault in index["broken"].items()}
    except _DAMAGED:
        return None
    files = {}
    for info in members:
        offset = info.header_offset + _LOCAL_HEADER + len(info.filename)
        files[info.filename] = Extent(path.name, offset, info.file_size, info.CRC)
    return Encoded(files, sizes, broken)


def encode_chunk(job: ChunkJob) -> str:
    """Write a job's chunk and return its file name.

    Raises:
        SampleError: a raw file is broken, unless `skip_broken`.
        StorageError: the chunk cannot be written.
        UsageError: this worker has other versions than the main process.
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
            remove_quietly(tmp)
    except OSError as error:
        raise scratch_error(job.folder, error) from error
    return job.name


def scratch_error(folder: Path, error: OSError) -> StorageError:
    """The error to raise if the scratch folder cannot be used."""
    return StorageError(
        f"{folder}: cannot be used ({error.strerror or error}); free some space or {SCRATCH_ADVICE}, then run the same "
        "command again: it resumes from here"
    )


class _Encoder:
    """Encodes a job's time steps into an archive.

    With `skip_broken`, faults of raw files are noted in the index. The notes name files by their KITTI paths: they
    go into the dataset's report, which is shared and does not depend on where the raw data lies.
    """

    def __init__(self, job: ChunkJob, archive: zipfile.ZipFile) -> None:
        self._job = job
        self._archive = archive
        self._sizes: dict[str, tuple[int, int]] = {}
        self._broken: dict[str, str] = {}

    def run(self) -> None:
        for step, content in _read_ahead(self._job.time_steps):
            self._encode(step, content)
        self._archive.writestr(_INDEX, json.dumps({"sizes": self._sizes, "broken": self._broken}))

    def _encode(self, step: TimeStep, content: Callable[[Ref], bytes]) -> None:
        job, native = self._job, dict[CameraSide, tuple[int, int]]()
        for side, ref in step.images.items():
            name = label("image", job.drive, step.frame, side)
            try:
                data, size = encode_image(content(ref), ref, job.calibration.size, job.format, job.levels, job.view)
            except SampleError as error:
                self._note(step, name, error)
                continue
            self._archive.writestr(name, data)
            self._sizes[name] = native[side] = size
        points: npt.NDArray[np.float64] | None = None
        for side in (*step.depth_sides, *step.depth_maps):
            if side not in native:
                continue  # its image is broken, and so is each sample with this depth
            name = label("depth", job.drive, step.frame, side)
            try:
                if side in step.depth_maps:
                    ready = step.depth_maps[side]
                    data = depth_map(content(ready), ready, native[side], job.view)
                else:
                    if points is None:  # both cameras have images of one size
                        assert step.scan is not None
                        scan = read_scan(content(step.scan), step.scan.place, step.typical_scan)
                        projections = [job.calibration.lidar_projection(side) for side in step.depth_sides]
                        points = points_in_view(scan, projections, native[side][0])
                    projection = job.calibration.lidar_projection(side)
                    data = encode_png(project(points, projection, native[side], job.convention))
            except SampleError as error:
                self._note(step, name, error)
                continue
            self._archive.writestr(name, data)

    def _note(self, step: TimeStep, name: str, error: SampleError) -> None:
        if not self._job.skip_broken:
            raise error
        note = str(error)
        for ref in step.refs():
            note = note.replace(ref.place, ref.path)
        self._broken[name] = printable(note)


def _read_ahead(steps: tuple[TimeStep, ...]) -> Iterator[tuple[TimeStep, Callable[[Ref], bytes]]]:
    """Each time step, and a function that returns the content of its files or raises SampleError.

    A thread fetches the next few steps meanwhile. Files of a step that is too large for that are read one by one, and
    so are all files if no thread can be started.
    """
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
        coming = _fetch(thread, groups[0])
        for number, group in enumerate(groups):
            files = None if coming is None else coming.result()
            coming = _fetch(thread, groups[number + 1]) if number + 1 < len(groups) else None
            for step in group:
                yield step, read if files is None else partial(_take, {ref: files.pop(ref) for ref in step.refs()})


def _fetch(thread: ThreadPoolExecutor, group: list[TimeStep]) -> Future[dict[Ref, bytes | SampleError]] | None:
    """Begin to read a group's files; None if they are to be read one by one."""
    refs = [ref for step in group for ref in step.refs()]
    if sum(max(ref.size, ref.transfer) for ref in refs) > _READ_AHEAD_BYTES:
        return None
    try:
        return thread.submit(lambda: dict(zip(refs, read_many(refs), strict=True)))
    except RuntimeError:  # a limit on threads
        return None


def _take(files: dict[Ref, bytes | SampleError], ref: Ref) -> bytes:
    content = files[ref]
    if isinstance(content, SampleError):
        raise content
    return content


def depth_map(data: bytes, ref: Ref, size: tuple[int, int], view: View | None) -> bytes:
    """Ready-made ground truth as it is stored; as `depth_png`, of the view's part of the frames."""
    if view is None:
        return depth_png(data, size, ref.place)
    with Image.open(io.BytesIO(depth_png(data, view.frame, ref.place))) as image:
        depth = np.asarray(image).astype(np.uint16)
    return encode_png(view.apply_depth(depth))


def _to_rgb(picture: Image.Image, levels: tuple[int, int] | None) -> Image.Image:
    """Any mode as 8-bit RGB.

    Of 16 bits the upper 8 remain, as Pillow reads 16-bit colour (16-bit grey it would clip). With `levels`, that range
    of grey values becomes 0 to 255.
    """
    if picture.mode.startswith("I;16"):
        table = np.arange(1 << 16) >> 8
        if levels is not None:
            low, high = levels
            table = np.rint((np.arange(1 << 16).clip(low, high).astype(np.float32) - low) * (255 / (high - low)))
        picture = Image.fromarray(table.astype(np.uint8)[np.asarray(picture)])
    return picture.convert("RGB")


def encode_image(
    data: bytes,
    ref: Ref,
    expected: tuple[int, int] | None,
    form: ImageFormat,
    levels: tuple[int, int] | None = None,
    view: View | None = None,
) -> tuple[bytes, tuple[int, int]]:
    """Decode, resize (antialiased, Lanczos) and encode one raw image.

    A whole file that already has the stored codec and size is kept as it is.

    Args:
        data: the raw file's content.
        expected: native size by the calibration, if known.
        levels, view: as `Drive`.

    Returns:
        The stored bytes, and the native (width, height), of the view if there is one.

    Raises:
        SampleError: not a whole image, too large, or not of the size of the calibration.
    """
    expected = view.frame if view else expected
    try:
        with open_image(data, *(("PPM",) if isinstance(ref, VideoFrame) else ("PNG", "JPEG"))) as image:
            oriented = 0x0112 in image.getexif()
            # Before the pixels take memory. An image to be turned may have its sides swapped.
            _check_size(image.size[::-1] if oriented and expected == image.size[::-1] else image.size, expected, ref)
            image.load()
            kind, mode = image.format, image.mode
            picture = ImageOps.exif_transpose(image) if oriented else image
            picture = picture if mode == "RGB" else _to_rgb(picture, levels)
    except UnidentifiedImageError as error:  # its message holds the address of a buffer
        raise SampleError(f"{ref.place}: broken image (neither PNG nor JPEG); fetch it again") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise SampleError(f"{ref.place}: broken image ({error}); fetch it again") from error
    native = picture.size
    _check_size(native, expected, ref)
    if view is not None:
        picture, native = view.apply(picture), view.size
    deep = kind == "PNG" and data[_PNG_DEPTH] != 8
    untouched = form.size in (None, native) and mode == "RGB" and not oriented and not deep and view is None
    if untouched and kind == form.codec.upper() and data.endswith(_END.get(kind, b"")):
        return data, native
    if form.size is not None and form.size != native:
        picture = picture.resize(form.size, Image.Resampling.LANCZOS)
    return encode(picture, form), native


def encode(picture: Image.Image, form: ImageFormat) -> bytes:
    """Encode an RGB picture of the stored size."""
    buffer = io.BytesIO()
    if form.codec != "jpeg":
        picture.save(buffer, form.codec.upper())
        return buffer.getvalue()
    if form.chroma == "420":
        picture = smooth_chroma(picture, CHROMA_BLUR)
    steps: dict[str, Any] = {"qtables": EVEN_TABLES} if form.quality is None else {"quality": form.quality}
    # Huffman tables of the image's own save a twentieth of the bytes. Pillow needs one buffer for the whole file then.
    ImageFile.MAXBLOCK = max(ImageFile.MAXBLOCK, 1024 + 6 * picture.width * picture.height)
    picture.save(buffer, "JPEG", subsampling=f"4:{form.chroma[1]}:{form.chroma[2]}", optimize=True, **steps)
    return buffer.getvalue()


def _check_size(native: tuple[int, int], expected: tuple[int, int] | None, ref: Ref) -> None:
    if expected is not None and native != expected:
        raise SampleError(
            f"{ref.place}: {native[0]}x{native[1]} pixels, but the calibration is for {expected[0]}x{expected[1]}; "
            "prep needs the frames at their own size"
        )
    if native[0] * native[1] > MAX_PIXELS:
        raise SampleError(f"{ref.place}: {native[0]}x{native[1]} pixels; at most {MAX_PIXELS:,} are read")


def smooth_chroma(picture: Image.Image, blur: float) -> Image.Image:
    """A picture in YCbCr with its colours halved, smoothed and enlarged again: halving them again changes nothing.

    Args:
        picture: RGB.
        blur: standard deviation of the Gaussian, pixels of the picture.
    """
    bands = list(picture.convert("YCbCr").split())
    for number in (1, 2):
        half = bands[number].reduce(2).filter(ImageFilter.GaussianBlur(blur / 2))
        whole = half.resize((2 * half.width, 2 * half.height), Image.Resampling.NEAREST)
        bands[number] = whole if whole.size == picture.size else whole.crop((0, 0, *picture.size))
    return Image.merge("YCbCr", bands)
