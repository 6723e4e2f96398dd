"""Where raw data lies, behind one interface: extracted folders, KITTI's own zips, base URLs, mixes of them.

    raw = RawData(["./kitti_data", "https://host/kitti"])
    listing = raw.files("2011_09_26/2011_09_26_drive_0001_sync/image_02/data")   # name -> Ref
    data = read(listing["0000000005.png"])

Paths are KITTI's own, with `/`. The first source that has a file gives it. A folder (local, s3://, any fsspec
file system that can list) may hold extracted drives, zips, or both. An http(s) base URL cannot list: there the
zips are looked up by the names of the public archive, `<base>/raw_data/2011_09_26_drive_0001/
2011_09_26_drive_0001_sync.zip`, with or without `raw_data/` and the drive's folder.

Zips are read in place: the central directory once, then one byte range for each file that is needed. What is not
needed (the grey cameras, half of every zip) is never read.
"""

from __future__ import annotations

import os
import re
import struct
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import fsspec
from fsspec.asyn import sync
from fsspec.core import url_to_fs

from shards.errors import InputError, SampleError, UsageError
from shards.storage.retry import MissingError, Retrier

PUBLIC_ARCHIVE = "https://s3.eu-central-1.amazonaws.com/avg-kitti"
"""Base URL of KITTI's public archives (CC BY-NC-SA 3.0)."""
ARCHIVES = ("data_odometry_calib", "data_odometry_color", "data_odometry_poses", "data_odometry_velodyne")
"""Of KITTI odometry. The images' one has a `calib.txt` of its own for each sequence, without the lidar's line."""
DEPTH_ARCHIVE = "data_depth_annotated"
_NO_CREDENTIALS = ("http", "https", "s3", "s3a", "gs", "gcs")
"""Schemes whose URLs begin with a host or bucket and nothing else."""

_DATE = r"\d{4}_\d\d_\d\d"
_RAW_ZIP = re.compile(rf"({_DATE})_(drive_\d{{4}}_(sync|extract)|calib|drive_\d{{4}}_tracklets)\.zip")
_UNUSED = re.compile(r"/(image_0?[01]|oxts)(/|$)")
_LOCAL_HEADER = struct.Struct("<4s22xHH")
_HEADER_SLACK = 64
"""Bytes asked for beyond a member's expected header: local extra fields may be longer than the directory's."""
_DIRECTORY_BLOCK = 1 << 20
_ABSENT = (403, 404, 410)
"""HTTP statuses of a file that is not there. S3 says 403 where listing is not allowed."""


@dataclass(frozen=True)
class Member:
    """A zip member's place, as the central directory tells it."""

    offset: int
    header: int
    packed: int
    method: int
    crc: int


@dataclass(frozen=True)
class Ref:
    """A raw file: its KITTI path, where its bytes are, and its size in bytes.

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


class RawData:
    """Raw data from several sources; the first that has a file gives it.

    Args:
        urls: folders and base URLs, in order of preference.

    Raises:
        UsageError: a URL with credentials in it, or of a kind that fsspec does not know.
    """

    def __init__(self, urls: Sequence[str]) -> None:
        self.urls = list(urls)
        self._sources: list[FolderSource | HttpSource] = [
            HttpSource(url) if url.startswith(("http://", "https://")) else FolderSource(url) for url in urls
        ]

    def files(self, folder: str) -> dict[str, Ref]:
        """Files directly in a folder: name -> Ref. Empty where no source has the folder.

        Raises:
            InputError: a zip that should have them is cut short or not a zip, or a server cannot be used.
        """
        files: dict[str, Ref] = {}
        for source in self._sources:
            for name, ref in source.files(folder).items():
                files.setdefault(name, ref)
        return files

    def folders(self, folder: str = "") -> list[str]:
        """Names of the sub-folders that extracted sources hold there, sorted."""
        return sorted({name for source in self._sources for name in source.folders(folder)})

    def read(self, path: str) -> bytes:
        """Content of one file.

        Raises:
            InputError: no source has it, or it cannot be read.
        """
        folder, _, name = path.rpartition("/")
        ref = self.files(folder).get(name)
        if ref is None:
            raise InputError(f"{path}: not found in {', '.join(self.urls)}{_origin(path)}")
        return read(ref)

    def without_place(self, message: str) -> str:
        """A message without where the sources lie: for what is published, and the same wherever the data lies."""
        places = {place for source in self._sources for place in source.places}
        for place in sorted(places, key=len, reverse=True):
            message = re.sub(rf"(?<![^\s,]){re.escape(place)}/", "", message)
            message = re.sub(rf"(?<![^\s,]){re.escape(place)}(?=[,;:\s]|$)", "--raw", message)
        return re.sub(r"--raw(, --raw)+", "--raw", message)


def _open(url: str) -> tuple[Any, str]:
    """fsspec's file system of a source, and the path of it there."""
    scheme, colon, rest = url.partition("://")
    host = rest.partition("/")[0]
    # A secret may have a slash in it, so that the @ comes later.
    secret = "@" in host or not re.fullmatch(r"[^:]*(:\d*)?|\[.*\](:\d*)?", host)
    if colon and scheme.lower() in _NO_CREDENTIALS and secret:
        raise UsageError(f"--raw {scheme}://…: no credentials in a URL; they come from the environment or a profile")
    try:
        found: tuple[Any, str] = url_to_fs(url)
    except (ValueError, ImportError) as error:
        raise UsageError(f"--raw {url}: {error}") from error
    return found


def _origin(path: str) -> str:
    """Which of KITTI's archives has a calibration file, for messages."""
    date = path.partition("/")[0]
    if re.fullmatch(_DATE, date):
        return f"; KITTI has it in {date}_calib.zip"
    return "; KITTI has it in data_odometry_calib.zip" if path.endswith("/calib.txt") else ""


class FolderSource:
    """A folder on any file system that can list: extracted files, and zips within it."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/") or url
        self._fs, self._root = _open(self.url)
        self.places = (self.url, self._root)
        self._local = self._fs.protocol == "file" or "file" in self._fs.protocol
        self._zips: list[str] | None = None
        self._listings: dict[str, dict[str, Ref]] = {}
        self._directories: dict[str, Directory] = {}

    def files(self, folder: str) -> dict[str, Ref]:
        if folder not in self._listings:
            files = self._list_extracted(folder)
            for zip_path in self._zips_for(folder):
                if zip_path not in self._directories:
                    self._directories[zip_path] = read_directory(self._fs, zip_path, self._url(zip_path))
                files = {**self._directories[zip_path].get(folder, {}), **files}
            self._listings[folder] = files
        return self._listings[folder]

    def folders(self, folder: str) -> list[str]:
        return sorted(e["name"].rstrip("/").rpartition("/")[2] for e in self._ls(folder) if e["type"] == "directory")

    def _list_extracted(self, folder: str) -> dict[str, Ref]:
        files = {}
        for entry in self._ls(folder):
            if entry["type"] == "file":
                name = entry["name"].rpartition("/")[2]
                path = f"{folder}/{name}" if folder else name
                files[name] = Ref(path, self._url(entry["name"]), int(entry["size"]))
        return files

    def _ls(self, folder: str) -> list[dict[str, Any]]:
        path = f"{self._root}/{folder}" if folder else self._root
        if self._local:
            return _scan_folder(path)
        try:
            entries: list[dict[str, Any]] = Retrier().call(self.url, partial(self._fs.ls, path, detail=True))
        except MissingError:
            return []
        return [entry for entry in entries if entry["name"].rstrip("/") != path.rstrip("/")]

    def _zips_for(self, folder: str) -> list[str]:
        """Zips that may hold files of `folder`: KITTI's names say which; unknown names may hold anything."""
        names = [part for part in folder.split("/") if part]
        chosen = []
        for path in self._find_zips():
            name = path.rpartition("/")[2]
            match = _RAW_ZIP.fullmatch(name)
            wanted = {f"{part}.zip" for part in names} | ({f"{names[0]}_calib.zip"} if len(names) == 1 else set())
            if match is None or name in wanted:
                chosen.append(path)
        return chosen

    def _find_zips(self) -> list[str]:
        """Zips in the folder, in `raw_data/` and in one more level below either, as the public archive has them."""
        if self._zips is None:
            found: list[str] = []
            for folder in ("", "raw_data"):
                entries = self._ls(folder)
                inner = [e["name"].rstrip("/").rpartition("/")[2] for e in entries if e["type"] == "directory"]
                for name in inner:
                    if re.fullmatch(rf"{_DATE}_drive_\d{{4}}", name):
                        entries += self._ls(f"{folder}/{name}" if folder else name)
                found += [e["name"] for e in entries if e["type"] == "file" and e["name"].endswith(".zip")]
            self._zips = sorted(found)
        return self._zips

    def _url(self, path: str) -> str:
        return path if self._local else str(self._fs.unstrip_protocol(path))


def _scan_folder(path: str) -> list[dict[str, Any]]:
    """As fsspec's `ls`, but links are what they point to: raw data is often linked together from several disks."""
    found: list[dict[str, Any]] = []
    try:
        with os.scandir(path) as entries:
            for entry in entries:
                if entry.is_dir():
                    found.append({"name": entry.path, "type": "directory", "size": 0})
                elif entry.is_file():
                    found.append({"name": entry.path, "type": "file", "size": entry.stat().st_size})
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise InputError(f"{path}: cannot be listed ({error.strerror or error})") from error
    return found


class HttpSource:
    """A base URL with KITTI's zips under the public archive's names, read by byte ranges."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._fs, _ = _open(self.url)
        self.places = (self.url,)
        self._directories: dict[str, Directory | None] = {}

    def folders(self, folder: str) -> list[str]:
        return []

    def files(self, folder: str) -> dict[str, Ref]:
        for url in self._candidates(folder):
            directory = self._directory(url)
            if directory is not None and folder in directory:
                return directory[folder]
        return {}

    def _candidates(self, folder: str) -> Iterable[str]:
        date, *rest = folder.split("/")
        bases = [f"{self.url}/raw_data", self.url]
        if re.fullmatch(_DATE, date) and not rest:
            return [f"{base}/{date}_calib.zip" for base in bases]
        if "proj_depth" in rest:
            return [f"{self.url}/{DEPTH_ARCHIVE}.zip"]
        if re.fullmatch(_DATE, date):
            drive = rest[0]
            short = re.sub(r"_(sync|extract)$", "", drive)
            return [f"{base}/{inner}{drive}.zip" for base in bases for inner in (f"{short}/", "")]
        return [f"{self.url}/{name}.zip" for name in ARCHIVES]

    def _directory(self, url: str) -> Directory | None:
        """Directory of a zip on the server; None where there is no such file."""
        if url not in self._directories:
            size = Retrier().call(url, partial(_size_if_ranges, self._fs, url))
            self._directories[url] = None if size is None else read_directory(self._fs, url, url, size=size)
        return self._directories[url]


def _size_if_ranges(fs: Any, url: str) -> int | None:
    """Size of a file on a web server, from asking for two bytes of it; None if it is not there.

    Raises:
        InputError: the server sends the whole file instead.
    """

    async def ask() -> tuple[int, str]:
        session = await fs.set_session()
        async with session.get(url, headers={"Range": "bytes=0-1", "Accept-Encoding": "identity"}) as response:
            if response.status not in (200, 206, *_ABSENT):
                response.raise_for_status()
            return response.status, response.headers.get("Content-Range", "")

    status, content_range = sync(fs.loop, ask)
    if status in _ABSENT:
        return None
    total = content_range.rpartition("/")[2]
    if status != 206 or not total.isdecimal():
        raise InputError(
            f"{url}: this server does not serve byte ranges, so single frames cannot be read from its zips; download "
            "the zips into a folder (wget -c) and give that folder as --raw"
        )
    return int(total)


def read_directory(fs: Any, path: str, url: str, **options: Any) -> Directory:
    """Files of a zip by folder: folder -> name -> Ref, with a leading `dataset/` (odometry's zips) taken off.

    Raises:
        InputError: cut short, or not a zip.
        StorageError: it cannot be read.
    """

    def members_of() -> list[zipfile.ZipInfo]:
        with fs.open(path, "rb", block_size=_DIRECTORY_BLOCK, **options) as file, zipfile.ZipFile(file) as archive:
            return archive.infolist()

    try:
        members = Retrier(credentials="check its permissions").call(url, members_of)
    except (zipfile.BadZipFile, struct.error, EOFError, NotImplementedError) as error:
        raise InputError(f"{url}: cut short or not a zip ({error}); download it again") from error
    folders: Directory = {}
    for info in members:
        folder, _, name = info.filename.removeprefix("dataset/").rpartition("/")
        if info.is_dir() or _UNUSED.search(folder):
            continue
        header = _LOCAL_HEADER.size + len(info.filename.encode()) + len(info.extra) + _HEADER_SLACK
        member = Member(info.header_offset, header, info.compress_size, info.compress_type, info.CRC)
        path_in = f"{folder}/{name}" if folder else name
        folders.setdefault(folder, {})[name] = Ref(path_in, url, info.file_size, member)
    return folders


def read(ref: Ref) -> bytes:
    """Content of a raw file.

    Raises:
        SampleError: it cannot be read, or (in a zip) is damaged.
        StorageError: the network failed for longer than the patience of `shards.storage.retry`.
    """
    result = read_many([ref])[0]
    if isinstance(result, SampleError):
        raise result
    return result


def read_many(refs: Sequence[Ref]) -> list[bytes | SampleError]:
    """Content of several files, fetched at once where the file system can; what fails is returned in its place.

    Raises:
        StorageError: the network failed for longer than the patience of `shards.storage.retry`.
    """
    results: dict[Ref, bytes | SampleError] = {}
    for fs_key in dict.fromkeys(_protocol(ref.url) for ref in refs):
        group = [ref for ref in refs if _protocol(ref.url) == fs_key]
        if fs_key == "file":
            results |= {ref: _attempt(ref, partial(_read_local, ref)) for ref in group}
        else:
            results |= {ref: _attempt(ref, partial(_unpack, ref, data)) for ref, data in _fetch(fs_key, group).items()}
    return [results[ref] for ref in refs]


def _attempt(ref: Ref, read_it: Any) -> bytes | SampleError:
    try:
        data: bytes = read_it()
    except SampleError as error:
        return error
    except OSError as error:
        return SampleError(f"{ref.place}: {error.strerror or error}")
    return data


def _read_local(ref: Ref) -> bytes:
    with open(ref.url, "rb") as file:  # noqa: PTH123  (a path string from a listing of 100,000)
        if ref.member is None:
            return file.read()
        file.seek(ref.member.offset)
        return _unpack(ref, file.read(ref.member.header + ref.member.packed))


def _fetch(protocol: str, refs: list[Ref]) -> dict[Ref, bytes]:
    fs = fsspec.filesystem(protocol)
    paths = [fs._strip_protocol(ref.url) for ref in refs]
    starts = [ref.member.offset if ref.member else 0 for ref in refs]
    ends = [ref.member.offset + ref.member.header + ref.member.packed if ref.member else ref.size for ref in refs]
    where = refs[0].url
    try:
        parts = Retrier().call(where, partial(fs.cat_ranges, paths, starts, ends, on_error="raise"))
    except MissingError as error:
        raise InputError(f"{where}: was there, and is gone") from error
    return dict(zip(refs, parts, strict=True))


def _unpack(ref: Ref, data: bytes) -> bytes:
    """The member's content from the bytes at its local header, checked; plain files pass through."""
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
            content = zlib.decompress(packed, -zlib.MAX_WBITS, ref.size)
        else:
            raise SampleError(f"{ref.place}: compression method {member.method}; unpack this zip yourself")
    except zlib.error as error:
        raise SampleError(f"{ref.place}: damaged in the zip ({error}); download it again") from error
    if len(content) != ref.size or zlib.crc32(content) != member.crc:
        raise SampleError(f"{ref.place}: damaged in the zip (checksum differs); download it again")
    return content


def _protocol(url: str) -> Literal["file"] | str:
    scheme, colon, _ = url.partition("://")
    return scheme if colon else "file"
