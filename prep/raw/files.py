"""Raw data behind one interface: extracted folders, KITTI's own zips, base URLs, mixes of them.

    raw = RawData(["./kitti_data", "https://host/kitti"])
    listing = raw.files("2011_09_26/2011_09_26_drive_0001_sync/image_02/data")   # name -> Ref
    data = read(listing["0000000005.png"])

Paths are KITTI's own, with `/`. The first raw location with a file provides it. A folder (local, s3://, any fsspec file
system that can list) may hold extracted drives, zips, or both; a zip may be named itself. An http(s) base URL cannot
list: its zips are looked up by the names of the public archive, `<base>/raw_data/2011_09_26_drive_0001/
2011_09_26_drive_0001_sync.zip`, with or without `raw_data/` and the drive's folder.

Zips are read in place. Files that are not needed (the grey cameras, half of each zip) are never read, and a broken zip
that is not needed does not matter.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import fsspec
from fsspec.core import url_to_fs

from prep.raw.video import VideoFrame, read_frames
from prep.raw.zips import MAX_FILE_BYTES, Directories, Ref, unpack
from shards.errors import InputError, SampleError, UsageError, first_line
from shards.storage.remote import Page, all_pages, filesystem_options, s3_page
from shards.storage.retry import MissingError, Retrier
from shards.video import VIDEO_SUFFIXES

PUBLIC_ARCHIVE = "https://s3.eu-central-1.amazonaws.com/avg-kitti"
"""Base URL of KITTI's public archives (CC BY-NC-SA 3.0)."""
ARCHIVES = ("data_odometry_calib", "data_odometry_color", "data_odometry_poses", "data_odometry_velodyne")
"""Of KITTI odometry. The zip of the images has another `calib.txt` for each sequence, without the lidar's line."""
DEPTH_ARCHIVE = "data_depth_annotated"
MAX_TEXT_BYTES = 1 << 20
"""Largest calibration or camera file."""
_CHAINED = re.compile(r"^\w+::|::[\w.+-]+(://|$)")

DATE = r"\d{4}_\d\d_\d\d"
_RAW_ZIP = re.compile(rf"({DATE})_(drive_\d{{4}}_(sync|extract)|calib|drive_\d{{4}}_tracklets)\.zip", re.IGNORECASE)
_ZIP_FOLDER = re.compile(rf"raw_data|downloads?|zips?|{DATE}|{DATE}_drive_\d{{4}}")
"""Folders that may hold zips, below the raw location or its `raw_data`."""
_ABSENT = (403, 404, 410)
"""HTTP statuses of a missing file. S3 sends 403 if listing is not allowed."""


class RawData:
    """Raw data from several locations; the first location with a file provides it.

    Args:
        urls: folders and base URLs, in order of preference.
        follow_links: also read files outside a local folder that links within it lead to.

    Raises:
        UsageError: a URL holds credentials, is chained, or is of a kind that fsspec does not know.
    """

    def __init__(self, urls: Sequence[str], follow_links: bool = False) -> None:
        self.urls = list(urls)
        self._directories = Directories()
        self._locations: list[FolderLocation | HttpLocation] = [
            HttpLocation(url, self._directories)
            if url.startswith(("http://", "https://"))
            else FolderLocation(url, self._directories, follow_links)
            for url in urls
        ]
        self._folders = [location for location in self._locations if isinstance(location, FolderLocation)]

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
        """Names of the folders in a folder of extracted data, sorted."""
        return sorted({name for location in self._folders for name in location.folders(folder)})

    def real_path(self, path: str) -> str:
        """Where a file or folder lies once links are followed; `path` itself if it is not on this machine."""
        places = (location.real_path(path) for location in self._folders)
        return next((place for place in places if place is not None), path)

    def zips(self) -> list[str]:
        """URLs of all zips that were found by listing."""
        return [url for location in self._folders for url in location.zips()]

    def problem(self, folder: str) -> str | None:
        """Why files of the folder may be missing: the zip that should have them, by its name, is broken."""
        urls = (url for location in self._locations for url in location.zips_for(folder, by_name=True))
        return next((self._directories.broken[url] for url in urls if url in self._directories.broken), None)

    def broken_zips(self) -> list[str]:
        """Messages of all broken zips."""
        return list(self._directories.broken.values())

    def read(self, path: str, limit: int = MAX_TEXT_BYTES) -> bytes:
        """Content of one small file.

        Raises:
            InputError: no location has it, it cannot be read, or it has more than `limit` bytes.
        """
        folder, _, name = path.rpartition("/")
        ref = self.files(folder).get(name)
        if ref is None:
            raise InputError(self.problem(folder) or f"{path}: not found in {', '.join(self.urls)}{_origin(path)}")
        return read(ref, limit)

    def without_place(self, message: str) -> str:
        """A message without the raw locations' paths, for publication: it does not depend on where the data lies."""
        places = {place for location in self._locations for place in location.places}
        for place in sorted(places, key=len, reverse=True):
            message = re.sub(rf"(?<![^\s,]){re.escape(place)}/", "", message)
            message = re.sub(rf"(?<![^\s,]){re.escape(place)}(?=[,;:\s]|$)", "--raw", message)
        return re.sub(r"--raw(, --raw)+", "--raw", message)


def _open(url: str) -> tuple[Any, str]:
    """fsspec's file system of a raw location, and the path in it.

    Raises:
        UsageError: as `RawData`. The message repeats no part of the URL that may be secret.
    """
    scheme, colon, rest = url.partition("://")
    host = rest.partition("/")[0]
    if _CHAINED.search(url) and not os.path.lexists(url):
        raise UsageError(f"--raw {scheme.split('::')[0][:20]}::…: chained URLs are not read; give the URL itself")
    # A secret may have a slash in it, so that the @ comes later.
    if colon and ("@" in host or not re.fullmatch(r"[^:]*(:\d*)?|\[.*\](:\d*)?", host)):
        raise UsageError(f"--raw {scheme}://…: no credentials in a URL; they come from the environment or a profile")
    if colon and ("?" in url or "#" in url):
        raise UsageError(
            f"--raw {scheme}://{host}/…: no ? or # in the URL of a raw location (signed links name a single file); "
            "download the zips into a folder and give that"
        )
    if not colon:
        return fsspec.filesystem("file"), str(fsspec.filesystem("file")._strip_protocol(url))
    try:
        fs = _file_system(url)
    except (ValueError, ImportError, TypeError) as error:
        raise UsageError(f"--raw {url}: {first_line(error)}") from error
    return fs, fs._strip_protocol(url)


_connected: dict[tuple[int, str, str], Any] = {}


def _file_system(url: str) -> Any:
    """fsspec's file system of a URL. One that blocks, and connects at once (sftp, ftp), is made once in a process.

    Raises:
        ValueError, ImportError, TypeError: fsspec does not know this kind of URL, or lacks a package for it.
        StorageError: no connection within the time limit.
    """
    scheme, _, rest = url.partition("://")
    connect = partial(url_to_fs, url, **filesystem_options(scheme.lower()))
    if fsspec.get_filesystem_class(scheme).async_impl:
        return connect()[0]
    known = os.getpid(), scheme, rest.partition("/")[0]
    if known not in _connected:
        _connected[known] = Retrier().run_blocking(url, connect)[0]
    return _connected[known]


def _origin(path: str) -> str:
    """Advice which of KITTI's archives holds a calibration file."""
    date = path.partition("/")[0]
    if re.fullmatch(DATE, date):
        return f"; KITTI has it in {date}_calib.zip"
    return "; KITTI has it in data_odometry_calib.zip" if path.endswith("/calib.txt") else ""


class FolderLocation:
    """A folder of extracted files and zips on any file system that can list; or one zip."""

    def __init__(self, url: str, directories: Directories, follow_links: bool) -> None:
        self.url = url.rstrip("/") or url
        self._fs, self._root = _open(self.url)
        self._directories = directories
        self.places = (self.url, self._root)
        self._local = self._fs.protocol == "file" or "file" in self._fs.protocol
        self._follow = follow_links
        self._zips: list[str] | None = None
        if self._local and os.path.isfile(self._root):  # noqa: PTH113  (fsspec's paths are strings)
            if not self._root.lower().endswith(".zip"):
                if self._root.lower().endswith(tuple(VIDEO_SUFFIXES)):
                    raise InputError(f"{self.url}: a video; give its folder as --raw, with a camera.yaml in it")
                raise InputError(f"{self.url}: not a zip; --raw is a folder of drives or zips, a zip, or a base URL")
            self._zips = [self._root]
        self._real = os.path.realpath(self._root) if self._local else ""
        self._listings: dict[str, dict[str, Ref]] = {}

    def files(self, folder: str) -> dict[str, Ref]:
        if folder not in self._listings:
            files: dict[str, Ref] = {}
            for path in (folder, *_wrapped(folder)):
                files = {**self._list_extracted(path, folder), **files}
            for url in self.zips_for(folder):
                files = {**self._directories.read(self._fs, url).get(folder, {}), **files}
            self._listings[folder] = files
        return self._listings[folder]

    def folders(self, folder: str) -> list[str]:
        return sorted(e["name"].rstrip("/").rpartition("/")[2] for e in self._ls(folder) if e["type"] == "directory")

    def real_path(self, path: str) -> str | None:
        place = f"{self._root}/{path}"
        return os.path.realpath(place) if self._local and os.path.exists(place) else None  # noqa: PTH110

    def _list_extracted(self, path: str, folder: str) -> dict[str, Ref]:
        """Files of `path` in this location, under the paths of KITTI's `folder`."""
        files = {}
        for entry in self._ls(path):
            if entry["type"] == "file":
                name = entry["name"].rpartition("/")[2]
                if entry.get("islink"):
                    self._check_link(entry["name"])
                files[name] = Ref(f"{folder}/{name}" if folder else name, self._url(entry["name"]), int(entry["size"]))
        return files

    def _check_link(self, path: str) -> None:
        """Refuse a path outside: a link in data from elsewhere must not publish other files of this machine."""
        target = os.path.realpath(path)
        if not self._follow and target != self._real and not target.startswith(self._real.rstrip("/") + "/"):
            raise InputError(f"{path}: a link leads out of {self.url}, to {target}; give --follow-links to pack it")

    def _ls(self, folder: str) -> list[dict[str, Any]]:
        path = f"{self._root}/{folder}" if folder else self._root
        if self._local:
            entries = _scan_folder(path)
            if entries:
                self._check_link(path)
            inside = f"{os.path.realpath(path)}/"
            return [entry for entry in entries if not (entry["islink"] and _holds(entry["name"], inside))]
        retry = Retrier()
        try:
            if "s3" in self._fs.protocol:

                def page(token: str) -> Page:
                    return retry.run(self.url, self._fs.loop, lambda: s3_page(self._fs, path, "/", token))

                files, folders = all_pages(self.url, retry.patience, page)
                found = [{"name": f"{path}/{name}", "type": "directory", "size": 0} for name in folders]
                return found + [{"name": f"{path}/{name}", "type": "file", "size": n} for name, n in files.items()]
            if getattr(self._fs, "async_impl", False):
                entries = retry.run(self.url, self._fs.loop, partial(self._fs._ls, path, detail=True))
            else:
                entries = retry.run_blocking(self.url, partial(self._fs.ls, path, detail=True))
        except MissingError:
            return []
        return [entry for entry in entries if entry["name"].rstrip("/") != path.rstrip("/")]

    def zips_for(self, folder: str, by_name: bool = False) -> list[str]:
        """Zips that may hold files of `folder`: by KITTI's names, and those with unknown names.

        Args:
            by_name: leave out those with unknown names.
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

        def may_hold(url: str) -> bool:
            name = url.rpartition("/")[2][:-4] + ".zip"
            return name in wanted or not (by_name or name in known or _RAW_ZIP.fullmatch(name))

        return [url for url in self.zips() if may_hold(url)]

    def zips(self) -> list[str]:
        """URLs of zips in the folder, in folders named for zips or dates, and a level below those."""
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
            self._zips = [self._url(path) for path in sorted(found)]
        return self._zips

    def _url(self, path: str) -> str:
        return path if self._local else str(self._fs.unstrip_protocol(path))


def _wrapped(folder: str) -> list[str]:
    """Paths of a folder of KITTI's if each zip was extracted into a folder of its own name."""
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


def _holds(link: str, inside: str) -> bool:
    """Return whether a link leads to a folder above it: a circle, in which every drive would be found again."""
    return inside.startswith(f"{os.path.realpath(link)}/")


def _scan_folder(path: str) -> list[dict[str, Any]]:
    """Entries as of fsspec's `ls`. Links have the type of their targets and a mark; broken ones are left out."""
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

    def __init__(self, url: str, directories: Directories) -> None:
        self.url = url.rstrip("/")
        self._fs, _ = _open(self.url)
        self._directories = directories
        self.places = (self.url,)
        self._sizes: dict[str, int | None] = {}

    def zips_for(self, folder: str, by_name: bool = False) -> list[str]:
        """Possible URLs of the zip with this folder."""
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
            if url not in self._sizes:
                self._sizes[url] = _size_if_ranges(self._fs, url)
            size = self._sizes[url]
            if size is not None and (found := self._directories.read(self._fs, url, size=size).get(folder)):
                return found
        return {}


def _size_if_ranges(fs: Any, url: str) -> int | None:
    """Size of a file on a web server, by a request for two bytes of it; None if it does not exist.

    Raises:
        InputError: the server would send the whole file.
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
    """Content of several files, fetched at once if the file system can. Errors are returned in the files' places.

    Raises:
        StorageError: the network failed for longer than the time limit of `shards.storage.retry`.
    """
    results: dict[Ref, bytes | SampleError] = {}
    groups: dict[str, list[Ref]] = {}
    for ref in refs:
        if (size := max(ref.size, ref.transfer)) > limit:
            results[ref] = SampleError(f"{ref.place}: {size:,} bytes; no such file has more than {limit:,}")
        elif not isinstance(ref, VideoFrame):
            scheme, colon, _ = ref.url.partition("://")
            groups.setdefault(scheme if colon else "file", []).append(ref)
    results |= read_frames([ref for ref in refs if isinstance(ref, VideoFrame) and ref not in results])
    for protocol, group in groups.items():
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
    with open(ref.url, "rb") as file:  # noqa: PTH123  (listings of 100,000 hold path strings)
        if ref.member is None:
            return file.read(ref.size + 1)
        file.seek(ref.member.offset)
        return unpack(ref, file.read(ref.member.header + ref.member.packed))


def _fetch(protocol: str, refs: list[Ref]) -> dict[Ref, bytes]:
    where = refs[0].url
    fs = _file_system(where)
    paths = [fs._strip_protocol(ref.url) for ref in refs]
    starts = [ref.member.offset if ref.member else 0 for ref in refs]
    ends = [ref.member.offset + ref.member.header + ref.member.packed if ref.member else ref.size for ref in refs]
    try:
        if getattr(fs, "async_impl", False):
            ranges = partial(fs._cat_ranges, paths, starts, ends, on_error="raise")
            parts = Retrier().run(where, fs.loop, ranges, sum(ends) - sum(starts))
        else:
            ranges = partial(fs.cat_ranges, paths, starts, ends, on_error="raise")
            parts = Retrier().run_blocking(where, ranges, sum(ends) - sum(starts))
    except MissingError as error:
        raise InputError(f"{where}: was there, and is gone") from error
    return dict(zip(refs, parts, strict=True))
