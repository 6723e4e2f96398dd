"""Zips read in place: the central directory once, then one byte range for each member."""

from __future__ import annotations

import re
import struct
import zipfile
import zlib
from dataclasses import dataclass
from typing import Any

from shards.errors import InputError, SampleError
from shards.storage.retry import Retrier

_UNUSED = re.compile(r"/(image_0?[01]|oxts)(/|$)")
_KNOWN_TOP = re.compile(r"(?:^|(?<=/))(\d{4}_\d\d_\d\d/|sequences/|poses/|(train|val)/\d{4}_\d\d_\d\d_drive_)")
"""Where KITTI's own paths begin; what stands in front was added when the data was zipped again."""
_JUNK = re.compile(r"(^|/)(__MACOSX/|\._)")
_LOCAL_HEADER = struct.Struct("<4s22xHH")
_HEADER_SLACK = 64
"""Bytes read beyond a member's expected header: local extra fields may be longer than the directory's."""
_DIRECTORY_BLOCK = 1 << 20
_MAX_DIRECTORY = 24 << 20
"""KITTI's largest directory has 14 MB. Of shorter names than KITTI's, this much becomes 350 MB in memory."""
_TAIL = 1 << 17
MAX_FILE_BYTES = 64 << 20
"""No frame, scan or depth map is larger."""


@dataclass(frozen=True)
class Member:
    """Where a zip member lies, from the central directory.

    Attributes:
        offset: of its local header.
        header: bytes to read for the header.
        packed: bytes of the packed content.
        method: compression method; -1 if encrypted.
        crc: CRC-32 of the content.
    """

    offset: int
    header: int
    packed: int
    method: int
    crc: int


@dataclass(frozen=True)
class Ref:
    """A raw file: its KITTI path, where its bytes lie, and its size in bytes.

    `url` is the file itself, or the zip that `member` is in. Picklable: workers read by it.
    """

    path: str
    url: str
    size: int
    member: Member | None = None

    @property
    def transfer(self) -> int:
        """Bytes to read for it."""
        return self.member.packed if self.member else self.size

    @property
    def place(self) -> str:
        """For messages: the file, or the zip and the file in it."""
        return f"{self.url}: {self.path}" if self.member else self.url


Directory = dict[str, dict[str, Ref]]
"""Files of a zip: folder -> name -> Ref."""


class _Bounded:
    """A file that refuses to be read in pieces larger than any zip directory."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def read(self, size: int = -1) -> bytes:
        if size > _MAX_DIRECTORY:
            raise zipfile.BadZipFile(f"its directory claims {size:,} bytes")
        data: bytes = self._file.read(_TAIL if size < 0 else size)
        return data

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def read_directory(fs: Any, path: str, url: str, **options: Any) -> Directory:
    """Files of a zip by folder: folder -> name -> Ref, under KITTI's own paths.

    Whatever stands in front of those in the zip (`dataset/`, `./`, `kitti_data/`) is left out.

    Args:
        fs: fsspec's file system, and `path` in it.
        url: for messages.

    Raises:
        InputError: the zip is cut short, or no zip.
        StorageError: it cannot be read.
    """

    def members_of() -> list[zipfile.ZipInfo]:
        with (
            fs.open(path, "rb", block_size=_DIRECTORY_BLOCK, **options) as file,
            zipfile.ZipFile(_Bounded(file)) as archive,
        ):
            return archive.infolist()

    try:
        members = Retrier(credentials="check its permissions").call(url, members_of)
    except (zipfile.BadZipFile, struct.error, EOFError, ValueError, NotImplementedError, MemoryError) as error:
        cause = "a name in it is not text" if isinstance(error, UnicodeError) else str(error)[:120] or "malformed"
        raise InputError(f"{url}: cut short or not a zip ({cause}); download it again") from error
    folders: Directory = {}
    for info in members:
        name = info.filename.removeprefix("./")
        if (known := _KNOWN_TOP.search(name)) is not None:
            name = name[known.start() :]
        folder, _, file_name = name.rpartition("/")
        if info.is_dir() or _UNUSED.search(folder) or _JUNK.search(name):
            continue
        header = _LOCAL_HEADER.size + len(info.filename.encode(errors="replace")) + len(info.extra) + _HEADER_SLACK
        method = -1 if info.flag_bits & 1 else info.compress_type
        member = Member(info.header_offset, header, info.compress_size, method, info.CRC)
        folders.setdefault(folder, {})[file_name] = Ref(name, url, info.file_size, member)
    return folders


def unpack(ref: Ref, data: bytes) -> bytes:
    """The member's content from the bytes at its local header, checked; plain files pass through.

    Raises:
        SampleError: damaged, encrypted, or packed in a way that only unzip programs read.
    """
    member = ref.member
    if member is None:
        return data
    if len(data) < _LOCAL_HEADER.size or data[:4] != b"PK\x03\x04":
        raise SampleError(f"{ref.place}: the zip is damaged there (no file header); download it again")
    _, name, extra = _LOCAL_HEADER.unpack_from(data)
    start = _LOCAL_HEADER.size + name + extra
    packed = data[start : start + member.packed]
    try:
        if member.method == zipfile.ZIP_STORED:
            content = packed
        elif member.method == zipfile.ZIP_DEFLATED:
            # One byte more than the directory says, and never more, however much the stream holds.
            content = zlib.decompressobj(-zlib.MAX_WBITS).decompress(packed, ref.size + 1)
        elif member.method < 0:
            raise SampleError(f"{ref.place}: encrypted; unpack this zip yourself")
        else:
            raise SampleError(f"{ref.place}: compression method {member.method}; unpack this zip yourself")
    except zlib.error as error:
        raise SampleError(f"{ref.place}: damaged in the zip ({error}); download it again") from error
    if len(content) != ref.size or zlib.crc32(content) != member.crc:
        raise SampleError(f"{ref.place}: damaged in the zip (checksum differs); download it again")
    return content
