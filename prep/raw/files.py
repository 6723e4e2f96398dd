"""Where raw data lies, behind one interface: extracted folders, KITTI's own zips, base URLs, mixes of them.

    raw = RawData(["./kitti_data", "https://host/kitti"])
    listing = raw.files("2011_09_26/2011_09_26_drive_0001_sync/image_02/data")   # name -> Ref
    data = read(listing["0000000005.png"])

Paths are KITTI's own, with `/`. The first raw location that has a file gives it. A folder (local, s3://, any fsspec
file system that can list) may hold extracted drives, zips, or both; a zip may be named itself. An http(s) base URL
cannot list: there the zips are looked up by the names of the public archive, `<base>/raw_data/2011_09_26_drive_0001/
2011_09_26_drive_0001_sync.zip`, with or without `raw_data/` and the drive's folder.

Zips are read in place. What is not needed (the grey cameras, half of every zip) is never read, and a broken zip that
is not needed does not matter.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import fsspec
from fsspec.core import url_to_fs

from prep.raw.zips import MAX_FILE_BYTES, Directory, Ref, read_directory, unpack
from shards.errors import InputError, SampleError, UsageError, first_line
from shards.storage.retry import MissingError, Retrier

PUBLIC_ARCHIVE = "https://s3.eu-central-1.amazonaws.com/avg-kitti"
"""Base URL of KITTI's public archives (CC BY-NC-SA 3.0)."""
ARCHIVES = ("data_odometry_calib", "data_odometry_color", "data_odometry_poses", "data_odometry_velodyne")
"""Of KITTI odometry. The images' one has a `calib.txt` of its own for each sequence, without the lidar's line."""
DEPTH_ARCHIVE = "data_depth_annotated"
MAX_TEXT_BYTES = 1 << 20
"""Of a calibration or camera file."""
FOLLOW_LINKS = "--follow-links"
_CHAINED = re.compile(r"^\w+::|::[\w.+-]+(://|$)")

DATE = r"\d{4}_\d\d_\d\d"
_RAW_ZIP = re.compile(rf"({DATE})_(drive_\d{{4}}_(sync|extract)|calib|drive_\d{{4}}_tracklets)\.zip", re.IGNORECASE)
_ZIP_FOLDER = re.compile(rf"raw_data|downloads?|zips?|{DATE}|{DATE}_drive_\d{{4}}")
"""Folders that zips may lie in, below the raw location or its `raw_data`."""
_ABSENT = (403, 404, 410)
"""HTTP statuses of a file that is not there. S3 says 403 if listing is not allowed."""


class RawData:
    """Raw data from several locations; the first that has a file gives it.

    Args:
        urls: folders and base URLs, in order of preference.
        follow_links: read files and folders that links within a local folder lead to outside of it.

    Raises:
        UsageError: a URL holds credentials, is chained, or is of a kind that fsspec does not know.
    """

    def __init__(self, urls: Sequence[str], follow_links: bool = False) -> None:
        self.urls = list(urls)
        self._locations: list[FolderLocation | HttpLocation] = [
            HttpLocation(url) if url.startswith(("http://", "https://")) else FolderLocation(url, follow_links)
            for url in urls
        ]

    def files(self, folder: str) -> dict[str, Ref]:
        """Files directly in a folder: name -> Ref. Empty if no location has the folder.

        Raises:
            InputError: a folder cannot be listed, or a link leads out of the location.
        """
        files: dict[str, Ref] = {}
        for location in self._locations:
            for name, ref in location.files(folder).items():
                files.setdefault(name, ref)
        return files

    def folders(self, folder: str = "") -> list[str]:
        """Names of the sub-folders that extracted locations hold there, sorted."""
        return sorted({name for location in self._locations for name in location.folders(folder)})

    def zips(self) -> list[str]:
        """All zips that were found by listing."""
        return [path for location in self._locations for path in location.zips()]

    def problem(self, folder: str) -> str | None:
        """Why files of the folder may be missing: the zip that should have them by its name is broken."""
        for location in self._locations:
            for path in location.zips_for(folder, by_name=True):
                if path in location.broken:
                    return location.broken[path]
        return None

    def broken_zips(self) -> list[str]:
        """Messages of all zips that turned out broken."""
        return [message for location in self._locations for message in location.broken.values()]

    def read(self, path: str, limit: int = MAX_TEXT_BYTES) -> bytes:
        """Content of one small file.

        Raises:
            InputError: no location has it, it cannot be read, or it has more than `limit` bytes.
        """
        folder, _, name = path.rpartition("/")
        ref = self.files(folder).get(name)
        if ref is None:
            problem = self.problem(folder)
            raise InputError(problem or f"{path}: not found in {', '.join(self.urls)}{_origin(path)}")
        return read(ref, limit)

    def without_place(self, message: str) -> str:
        """A message without the raw locations' paths: for what is published, and equal wherever the data lies."""
        places = {place for location in self._locations for place in location.places}
        for place in sorted(places, key=len, reverse=True):
            message = re.sub(rf"(?<![^\s,]){re.escape(place)}/", "", message)
            message = re.sub(rf"(?<![^\s,]){re.escape(place)}(?=[,;:\s]|$)", "--raw", message)
        return re.sub(r"--raw(, --raw)+", "--raw", message)


def _open(url: str) -> tuple[Any, str]:
    """fsspec's file system of a raw location, and its path there.

    Raises:
        UsageError: as `RawData`. The message never repeats a part of the URL that may be secret.
    """
    scheme, colon, rest = url.partition("://")
    if _CHAINED.search(url) and not os.path.lexists(url):
        raise UsageError(f"--raw {scheme.split('::')[0][:20]}::…: chained URLs are not read; give the URL itself")
    if colon:
        host = rest.partition("/")[0]
        # A secret may have a slash in it, so that the @ comes later.
        if "@" in host or not re.fullmatch(r"[^:]*(:\d*)?|\[.*\](:\d*)?", host):
            raise UsageError(
                f"--raw {scheme}://…: no credentials in a URL; they come from the environment or a profile"
            )
        if "?" in url or "#" in url:
            raise UsageError(
                f"--raw {scheme}://{host}/…: no ? or # in the URL of a raw location (signed links name a single file); "
                "download the zips into a folder and give that"
            )
    try:
        found: tuple[Any, str] = url_to_fs(url)
    except (ValueError, ImportError, TypeError, OSError) as error:
        raise UsageError(f"--raw {url}: {first_line(error)}") from error
    return found


def _origin(path: str) -> str:
    """Which of KITTI's archives has a calibration file, for messages."""
    date = path.partition("/")[0]
    if re.fullmatch(DATE, date):
        return f"; KITTI has it in {date}_calib.zip"
    return "; KITTI has it in data_odometry_calib.zip" if path.endswith("/calib.txt") else ""


class FolderLocation:
    """A folder on any file system that can list: extracted files, and zips within it; or one zip."""

    def __init__(self, url: str, follow_links: bool = False) -> None:
        self.url = url.rstrip("/") or url
        self._fs, self._root = _open(self.url)
        self.places = (self.url, self._root)
        self._local = self._fs.protocol == "file" or "file" in self._fs.protocol
        self._follow = follow_links
        self._zips: list[str] | None = None
        if self._local and os.path.isfile(self._root):  # noqa: PTH113  (fsspec's paths are strings)
            if not self._root.lower().endswith(".zip"):
                raise InputError(
                    f"{self.url}: a file, and no zip; --raw names a folder of drives or zips, a zip, or a base URL"
                )
            self._zips = [self._root]
        self._real = os.path.realpath(self._root) if self._local else ""
        self._listings: dict[str, dict[str, Ref]] = {}
        self._directories: dict[str, Directory] = {}
        self.broken: dict[str, str] = {}

    def files(self, folder: str) -> dict[str, Ref]:
        if folder not in self._listings:
            files: dict[str, Ref] = {}
            for path in (folder, *_wrapped(folder)):
                files = {**self._list_extracted(path, folder), **files}
            for zip_path in self.zips_for(folder):
                files = {**self._directory(zip_path).get(folder, {}), **files}
            self._listings[folder] = files
        return self._listings[folder]

    def folders(self, folder: str) -> list[str]:
        return sorted(e["name"].rstrip("/").rpartition("/")[2] for e in self._ls(folder) if e["type"] == "directory")

    def _directory(self, zip_path: str) -> Directory:
        """Directory of a zip; empty if it is broken, which `broken` then notes."""
        if zip_path not in self._directories:
            try:
                self._directories[zip_path] = read_directory(self._fs, zip_path, self._url(zip_path))
            except InputError as error:
                self.broken[zip_path] = str(error)
                self._directories[zip_path] = {}
        return self._directories[zip_path]

    def _list_extracted(self, path: str, folder: str) -> dict[str, Ref]:
        """Files of `path` in this location, as files of KITTI's `folder`."""
        files = {}
        for entry in self._ls(path):
            if entry["type"] == "file":
                name = entry["name"].rpartition("/")[2]
                if entry.get("islink"):
                    self._check_link(entry["name"])
                files[name] = Ref(f"{folder}/{name}" if folder else name, self._url(entry["name"]), int(entry["size"]))
        return files

    def _check_link(self, path: str) -> None:
        """Refuse what lies outside: a link in data from elsewhere must not publish other files of this machine."""
        target = os.path.realpath(path)
        if not self._follow and target != self._real and not target.startswith(self._real.rstrip("/") + "/"):
            raise InputError(
                f"{path}: a link leads out of {self.url}, to {target}; give {FOLLOW_LINKS} to pack that, too"
            )

    def _ls(self, folder: str) -> list[dict[str, Any]]:
        path = f"{self._root}/{folder}" if folder else self._root
        if self._local:
            entries = _scan_folder(path)
            if entries:
                self._check_link(path)
            return entries
        try:
            entries = Retrier().call(self.url, partial(self._fs.ls, path, detail=True))
        except MissingError:
            return []
        return [entry for entry in entries if entry["name"].rstrip("/") != path.rstrip("/")]

    def zips_for(self, folder: str, by_name: bool = False) -> list[str]:
        """Zips that may hold files of `folder`: KITTI's names say which; unknown names may hold anything.

        Args:
            by_name: only those whose name says so.
        """
        names = [part for part in folder.split("/") if part]
        if not names:
            return []
        wanted = {f"{part}.zip" for part in names}
        if re.fullmatch(DATE, names[0]):
            wanted |= {f"{names[0]}_calib.zip"} if len(names) == 1 else set()
            known = {f"{name}.zip" for name in ARCHIVES}
        else:
            known = set()
            wanted |= {f"{name}.zip" for name in ARCHIVES} if names[0] in ("sequences", "poses") else set()
        wanted |= {f"{DEPTH_ARCHIVE}.zip"} if "proj_depth" in names else set()
        known |= {f"{DEPTH_ARCHIVE}.zip"} - wanted
        chosen = []
        for path in self.zips():
            name = path.rpartition("/")[2]
            name = name[:-4] + ".zip"
            if name in wanted or not (by_name or name in known or _RAW_ZIP.fullmatch(name)):
                chosen.append(path)
        return chosen

    def zips(self) -> list[str]:
        """Zips in the folder, in folders named for zips or dates, and a level below those."""
        if self._zips is None:
            found: list[str] = []
            folders = [("", 0)]
            for folder, level in folders:
                for entry in self._ls(folder):
                    name = entry["name"].rstrip("/").rpartition("/")[2]
                    if entry["type"] == "directory" and level < 2 and _ZIP_FOLDER.fullmatch(name):
                        folders.append((f"{folder}/{name}" if folder else name, level + 1))
                    elif entry["type"] == "file" and name.lower().endswith(".zip") and not name.startswith("."):
                        if entry.get("islink"):
                            self._check_link(entry["name"])
                        found.append(entry["name"])
            self._zips = sorted(found)
        return self._zips

    def _url(self, path: str) -> str:
        return path if self._local else str(self._fs.unstrip_protocol(path))


def _wrapped(folder: str) -> list[str]:
    """Where a folder of KITTI's lies if each zip was extracted into a folder of its own name."""
    names = folder.split("/")
    if re.fullmatch(DATE, names[0]):
        outer = [f"{names[0]}_calib"] if len(names) == 1 else [names[1]]
    elif "proj_depth" in names:
        outer = [DEPTH_ARCHIVE]
    elif names[0] == "dataset":
        outer = list(ARCHIVES)
    else:
        return []
    return [f"{top}/{folder}" for top in outer]


def _scan_folder(path: str) -> list[dict[str, Any]]:
    """As fsspec's `ls`, but links are what they point to, marked; broken ones are left out."""
    found: list[dict[str, Any]] = []
    try:
        with os.scandir(path) as entries:
            for entry in entries:
                link = entry.is_symlink()
                if entry.is_dir():
                    found.append({"name": entry.path, "type": "directory", "size": 0, "islink": link})
                elif entry.is_file():
                    size = entry.stat().st_size
                    found.append({"name": entry.path, "type": "file", "size": size, "islink": link})
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise InputError(f"{path}: cannot be listed ({error.strerror or error})") from error
    except ValueError as error:  # a NUL in a split's drive name
        raise InputError(f"{path!r}: not a path ({error})") from error
    return found


class HttpLocation:
    """A base URL with KITTI's zips under the public archive's names, read by byte ranges."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._fs, _ = _open(self.url)
        self.places = (self.url,)
        self._directories: dict[str, Directory | None] = {}
        self.broken: dict[str, str] = {}

    def folders(self, folder: str) -> list[str]:
        """None: a web server does not list."""
        return []

    def zips(self) -> list[str]:
        """None: a web server does not list."""
        return []

    def zips_for(self, folder: str, by_name: bool = False) -> list[str]:
        """Addresses that the zip with this folder may have."""
        date, *rest = folder.split("/")
        bases = [f"{self.url}/raw_data", self.url]
        if re.fullmatch(DATE, date) and not rest:
            return [f"{base}/{date}_calib.zip" for base in bases]
        if "proj_depth" in rest:
            return [f"{self.url}/{DEPTH_ARCHIVE}.zip"]
        if re.fullmatch(DATE, date):
            drive = rest[0]
            short = re.sub(r"_(sync|extract)$", "", drive)
            return [f"{base}/{inner}{drive}.zip" for base in bases for inner in (f"{short}/", "")]
        return [f"{self.url}/{name}.zip" for name in ARCHIVES]

    def files(self, folder: str) -> dict[str, Ref]:
        for url in self.zips_for(folder):
            directory = self._directory(url)
            if directory is not None and folder in directory:
                return directory[folder]
        return {}

    def _directory(self, url: str) -> Directory | None:
        """Directory of a zip on the server; None if there is no such file."""
        if url not in self._directories:
            size = _size_if_ranges(self._fs, url)
            try:
                self._directories[url] = None if size is None else read_directory(self._fs, url, url, size=size)
            except InputError as error:
                self.broken[url] = str(error)
                self._directories[url] = None
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

    status, content_range = Retrier().run(url, fs.loop, ask)
    if status in _ABSENT:
        return None
    total = content_range.rpartition("/")[2]
    if status != 206 or not re.fullmatch(r"\d{1,18}", total):
        raise InputError(
            f"{url}: this server does not serve byte ranges, so single frames cannot be read from its zips; download "
            "the zips into a folder (wget -c) and give that folder as --raw"
        )
    return int(total)


def read(ref: Ref, limit: int = MAX_FILE_BYTES) -> bytes:
    """Content of a raw file.

    Raises:
        SampleError: it cannot be read, is larger than `limit` bytes, or (in a zip) is damaged.
        StorageError: the network failed for longer than the time limit of `shards.storage.retry`.
    """
    result = read_many([ref], limit)[0]
    if isinstance(result, SampleError):
        raise result
    return result


def read_many(refs: Sequence[Ref], limit: int = MAX_FILE_BYTES) -> list[bytes | SampleError]:
    """Content of several files, fetched at once if the file system can; what fails is returned in its place.

    Raises:
        StorageError: the network failed for longer than the time limit of `shards.storage.retry`.
    """
    results: dict[Ref, bytes | SampleError] = {}
    for ref in refs:
        if max(ref.size, ref.transfer) > limit:
            size = max(ref.size, ref.transfer)
            results[ref] = SampleError(f"{ref.place}: {size:,} bytes; no such file has more than {limit:,}")
    remaining = [ref for ref in refs if ref not in results]
    for protocol in dict.fromkeys(_protocol(ref.url) for ref in remaining):
        group = [ref for ref in remaining if _protocol(ref.url) == protocol]
        if protocol == "file":
            results |= {ref: _attempt(ref, partial(_read_local, ref)) for ref in group}
        else:
            results |= {ref: _attempt(ref, partial(unpack, ref, data)) for ref, data in _fetch(protocol, group).items()}
    return [results[ref] for ref in refs]


def _attempt(ref: Ref, read_it: Callable[[], bytes]) -> bytes | SampleError:
    try:
        return read_it()
    except SampleError as error:
        return error
    except OSError as error:
        return SampleError(f"{ref.place}: {error.strerror or error}")


def _read_local(ref: Ref) -> bytes:
    with open(ref.url, "rb") as file:  # noqa: PTH123  (a path string from a listing of 100,000)
        if ref.member is None:
            return file.read(ref.size + 1)
        file.seek(ref.member.offset)
        return unpack(ref, file.read(ref.member.header + ref.member.packed))


def _fetch(protocol: str, refs: list[Ref]) -> dict[Ref, bytes]:
    fs = fsspec.filesystem(protocol)
    paths = [fs._strip_protocol(ref.url) for ref in refs]
    starts = [ref.member.offset if ref.member else 0 for ref in refs]
    ends = [ref.member.offset + ref.member.header + ref.member.packed if ref.member else ref.size for ref in refs]
    where = refs[0].url
    try:
        if getattr(fs, "async_impl", False):
            ranges = partial(fs._cat_ranges, paths, starts, ends, on_error="raise")
            parts = Retrier().run(where, fs.loop, ranges, sum(ends) - sum(starts))
        else:
            parts = Retrier().call(where, partial(fs.cat_ranges, paths, starts, ends, on_error="raise"))
    except MissingError as error:
        raise InputError(f"{where}: was there, and is gone") from error
    return dict(zip(refs, parts, strict=True))


def _protocol(url: str) -> str:
    scheme, colon, _ = url.partition("://")
    return scheme if colon else "file"
