"""Reads zips in place: the central directory once, then one byte range for each member."""

from __future__ import annotations

import os
import re
import struct
import zipfile
import zlib
from dataclasses import dataclass
from functools import partial
from typing import Any

from shards.errors import InputError, SampleError
from shards.files import BoundedReader
from shards.storage.retry import Retrier

_UNUSED = re.compile(r"/image_0?[01](/|$)")
_KNOWN_TOP = re.compile(r"(?:^|(?<=/))(\d{4}_\d\d_\d\d/|sequences/|poses/|(train|val)/\d{4}_\d\d_\d\d_drive_)")
"""Begin of KITTI's own paths; anything in front was added when the data was zipped again."""
_JUNK = re.compile(r"(^|/)(__MACOSX/|\._)")
_LOCAL_HEADER = struct.Struct("<4s22xHH")
_HEADER_SLACK = 64
"""Bytes read beyond a member's expected header: local extra fields may be longer than the directory's."""
_DIRECTORY_BLOCK = 1 << 20
_MAX_DIRECTORY = 16 << 20
"""KITTI's largest directory has 14 MB. With shorter names than KITTI's, this much becomes 230 MB in memory."""
_MAX_FILES = 300_000
"""Files that are kept of all zips together, in 170 MB. Those of KITTI raw and of the depth benchmark are 285,000."""
_MAX_NAME = 250
MAX_FILE_BYTES = 64 << 20
"""Largest frame, scan or depth map."""


@dataclass(frozen=True, slots=True)
class Member:
    """Extent of a zip member, by the central directory.

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


@dataclass(frozen=True, slots=True)
class Ref:
    """Reference to a raw file: its KITTI path, its URL or that of the zip with `member`, and its size in bytes."""

    path: str
    url: str
    size: int
    member: Member | None = None

    @property
    def transfer(self) -> int:
        """Bytes to read for it."""
        return self.member.packed if self.member else self.size

    @property
    def crc(self) -> int:
        """Checksum of the content; 0 if it is not known."""
        return self.member.crc if self.member else 0

    @property
    def place(self) -> str:
        """The file for messages; of a zip member also the zip."""
        return f"{self.url}: {self.path}" if self.member else self.url


Directory = dict[str, dict[str, Ref]]
"""Files of a zip: folder -> name -> Ref."""


class Directories:
    """Central directories of zips, each read once. `broken` has a message for each zip that cannot be read."""

    def __init__(self) -> None:
        self.broken: dict[str, str] = {}
        self._known: dict[str, Directory] = {}
        self._files = 0

    def read(self, fs: Any, url: str, size: int | None = None) -> Directory:
        """Files of a zip by folder, under KITTI's own paths; none if it is broken.

        Anything in front of those paths in the zip (`dataset/`, `./`, `kitti_data/`) is left out.

        Args:
            fs: fsspec's file system of the URL.
            size: of the zip in bytes; None: it is asked for.

        Raises:
            InputError: the zips together hold too many files.
            StorageError: it cannot be read.
        """
        if url not in self._known:
            try:
                retry = Retrier(credentials="check its permissions")
                if getattr(fs, "async_impl", False):
                    members = _members(_Ranges(fs, url, size, retry))
                elif "file" in fs.protocol:
                    members = retry.call(url, partial(_local_members, fs, url))
                else:
                    members = retry.run_blocking(url, partial(_local_members, fs, url), _MAX_DIRECTORY)
            except _BROKEN as error:
                text = isinstance(error, UnicodeError)
                cause = "a name in it is not text" if text else str(error)[:120] or "malformed"
                self.broken[url] = f"{url}: cut short or not a zip ({cause}); download it again"
                members = []
            folders: Directory = {}
            while members:  # each takes more memory than what is kept of it
                self._keep(members.pop(), url, folders)
            self._known[url] = folders
        return self._known[url]

    def _keep(self, info: zipfile.ZipInfo, url: str, folders: Directory) -> None:
        name = info.filename.removeprefix("./")
        if (known := _KNOWN_TOP.search(name)) is not None:
            name = name[known.start() :]
        folder, _, file_name = name.rpartition("/")
        if info.is_dir() or len(name) > _MAX_NAME or _UNUSED.search(folder) or _JUNK.search(name):
            return
        self._files += 1
        if self._files > _MAX_FILES:
            raise InputError(f"{url}: with it, the zips at --raw hold more than {_MAX_FILES:,} files; name fewer zips")
        header = _LOCAL_HEADER.size + len(info.filename.encode(errors="replace")) + len(info.extra) + _HEADER_SLACK
        method = -1 if info.flag_bits & 1 else info.compress_type
        member = Member(info.header_offset, header, info.compress_size, method, info.CRC)
        folders.setdefault(folder, {}).setdefault(file_name, Ref(name, url, info.file_size, member))


_BROKEN = (zipfile.BadZipFile, struct.error, EOFError, ValueError, NotImplementedError, MemoryError)
"""Exceptions of zipfile at malformed directories."""


class _Ranges:
    """A file of a server, for zipfile: each read is a request that the time limit ends."""

    def __init__(self, fs: Any, url: str, size: int | None, retry: Retrier) -> None:
        self._fs, self._url, self._path, self._retry = fs, url, fs._strip_protocol(url), retry
        self._size = int(retry.run(url, fs.loop, partial(fs._info, self._path))["size"] if size is None else size)
        self._position = 0

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        begin = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        if begin + offset < 0:
            raise ValueError("before the begin of the file")
        self._position = begin + offset
        return self._position

    def read(self, size: int) -> bytes:
        start, stop = self._position, min(self._position + size, self._size)
        if start >= stop:
            return b""
        ranges = partial(self._fs._cat_file, self._path, start=start, end=stop)
        data: bytes = self._retry.run(self._url, self._fs.loop, ranges, stop - start)[: stop - start]
        self._position += len(data)
        return data


def _local_members(fs: Any, url: str) -> list[zipfile.ZipInfo]:
    with fs.open(url, "rb", block_size=_DIRECTORY_BLOCK) as file:
        return _members(file)


def _members(file: Any) -> list[zipfile.ZipInfo]:
    with zipfile.ZipFile(BoundedReader(file, _MAX_DIRECTORY)) as archive:
        return archive.infolist()


def unpack(ref: Ref, data: bytes) -> bytes:
    """Content of a member, checked, from the bytes at its local header; other files are returned as they are.

    Raises:
        SampleError: damaged, encrypted, or packed by a method that only unzip programs read.
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
            # At most one byte more than the directory says, however much the stream holds.
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
