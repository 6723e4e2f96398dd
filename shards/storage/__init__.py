"""Where a dataset lies: a local folder or an object-storage prefix, behind the few operations md2 needs.

Names are relative to the storage's URL, with `/` between parts, and may not leave it.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote, urlsplit

from shards.errors import StorageError, UsageError
from shards.files import create_from, is_abandoned, temporary, write_atomic
from shards.storage.base import Stat, check_folder, check_name
from shards.storage.retry import MissingError

_CHUNK = 8 << 20
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_TYPO = re.compile(r"(s3a?|gs|gcs|https?|file):(?!//)", re.IGNORECASE)


class Storage(Protocol):
    """A folder or prefix. Every failure but absence is a `StorageError` with the URL and the cause."""

    url: str

    def read(self, name: str, limit: int) -> bytes | None:
        """Whole content, None if absent; a StorageError beyond `limit` bytes."""

    def read_range(self, name: str, start: int, size: int) -> bytes:
        """At most `size` bytes from `start` on; MissingError if absent."""

    def stream(self, name: str, start: int = 0) -> Iterator[bytes]:
        """The content from `start` on, in pieces of some MiB; MissingError if absent."""

    def stat(self, name: str) -> Stat | None:
        """None if absent."""

    def write(self, name: str, data: bytes) -> None:
        """Create or replace, in one step."""

    def create(self, name: str, data: bytes) -> bool:
        """Create in one step unless present; False if it is present."""

    def create_file(self, name: str, path: Path, move: bool = False) -> bool:
        """As `create`, with a local file's content; with `move` the local file is given up."""

    def names(self, prefix: str) -> list[str]:
        """All names below the folder `prefix` ("" for all), sorted."""

    def children(self, prefix: str) -> tuple[list[str], list[str]]:
        """Names of the files and of the folders right in the folder `prefix`, each sorted."""

    def delete(self, names: Iterable[str]) -> None:
        """Delete those that are present."""

    def sweep(self) -> None:
        """Remove what processes that were killed have left half-written, where that can be seen."""

    def cancel(self) -> None:
        """End every call that other threads are waiting in, and every later one, with CancelledError."""


def is_local(url: str) -> bool:
    """Whether `url` is a folder of this machine: a path, or `file://`."""
    return not _SCHEME.match(url) or url.startswith("file://")


def local_path(url: str) -> Path:
    """The folder of a local URL."""
    if not url.startswith("file://"):
        return Path(url).expanduser()
    parts = urlsplit(url)
    if parts.netloc not in ("", "localhost"):
        raise UsageError(f"{url}: a file URL has three slashes: file:///folder")
    return Path(unquote(parts.path))


def open_storage(url: str) -> Storage:
    """The storage behind a path or URL; nothing is contacted yet.

    Raises:
        UsageError: a kind of URL that md2 does not know.
    """
    if is_local(url):
        if _TYPO.match(url):
            raise UsageError(f"{url}: a URL has two slashes after its colon: s3://bucket/prefix")
        return LocalStorage(local_path(url))
    if re.match(r"https?://", url, re.IGNORECASE):
        from shards.storage.http import HttpStorage

        return HttpStorage(url)
    from shards.storage.remote import RemoteStorage

    return RemoteStorage(url)


class LocalStorage:
    """A folder of this machine."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.url = str(folder)

    def _path(self, name: str) -> Path:
        return self.folder / check_name(name)

    def read(self, name: str, limit: int) -> bytes | None:
        path = self._path(name)
        try:
            with path.open("rb") as file:
                data = file.read(limit + 1)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise _local_error(path, error) from error
        if len(data) > limit:
            raise StorageError(f"{path}: larger than {limit} bytes, refused")
        return data

    def read_range(self, name: str, start: int, size: int) -> bytes:
        path = self._path(name)
        try:
            with path.open("rb") as file:
                file.seek(start)
                return file.read(size)
        except FileNotFoundError as error:
            raise MissingError(str(path)) from error
        except OSError as error:
            raise _local_error(path, error) from error

    def stream(self, name: str, start: int = 0) -> Iterator[bytes]:
        while data := self.read_range(name, start, _CHUNK):
            start += len(data)
            yield data

    def stat(self, name: str) -> Stat | None:
        path = self._path(name)
        try:
            found = path.stat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise _local_error(path, error) from error
        return Stat(found.st_size, f"{found.st_ino}-{found.st_mtime_ns}")

    def write(self, name: str, data: bytes) -> None:
        path = self._path(name)
        try:
            write_atomic(path, data)
        except OSError as error:
            raise _local_error(path, error) from error

    def create(self, name: str, data: bytes) -> bool:
        path = self._path(name)
        return self._create(path, lambda tmp: tmp.write_bytes(data))

    def create_file(self, name: str, path: Path, move: bool = False) -> bool:
        def fill(tmp: Path) -> None:
            if not move or not _linked(path, tmp):
                shutil.copyfile(path, tmp)

        created = self._create(self._path(name), fill)
        if created and move:
            path.unlink()
        return created

    def _create(self, path: Path, fill: Callable[[Path], object]) -> bool:
        tmp = temporary(path)
        try:
            if path.exists():
                return False
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                fill(tmp)
                return create_from(tmp, path)
            finally:
                tmp.unlink(missing_ok=True)
        except OSError as error:
            raise _local_error(path, error) from error

    def names(self, prefix: str) -> list[str]:
        folder = self._path(prefix) if prefix else self.folder
        try:
            files = [path for path in folder.rglob("*") if path.is_file() and not path.name.endswith(".tmp")]
        except OSError as error:
            raise _local_error(folder, error) from error
        return sorted(path.relative_to(self.folder).as_posix() for path in files)

    def children(self, prefix: str) -> tuple[list[str], list[str]]:
        folder = self.folder / check_folder(prefix) if prefix else self.folder
        try:
            entries = sorted(folder.iterdir())
        except (FileNotFoundError, NotADirectoryError):
            return [], []
        except OSError as error:
            raise _local_error(folder, error) from error
        return [e.name for e in entries if e.is_file()], [e.name for e in entries if e.is_dir()]

    def cancel(self) -> None:
        """Nothing here waits."""

    def delete(self, names: Iterable[str]) -> None:
        for name in names:
            path = self._path(name)
            try:
                path.unlink(missing_ok=True)
                self._remove_empty(path.parent)
            except OSError as error:
                raise _local_error(path, error) from error

    def sweep(self) -> None:
        try:
            abandoned = [path for path in self.folder.rglob(".*.tmp") if is_abandoned(path)]
        except OSError as error:
            raise _local_error(self.folder, error) from error
        self.delete(path.relative_to(self.folder).as_posix() for path in abandoned)

    def _remove_empty(self, folder: Path) -> None:
        """Object storage has no empty folders; neither does this."""
        while folder != self.folder and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
            folder = folder.parent


def _linked(path: Path, tmp: Path) -> bool:
    """Whether `tmp` is now another name of `path`: not across file systems, nor where there are no hard links."""
    try:
        os.link(path, tmp)
    except OSError:
        return False
    return True


_ADVICE = {
    errno.ENOSPC: "free some space and run it again: what is whole is kept",
    errno.EDQUOT: "free some space and run it again: what is whole is kept",
    errno.EACCES: "check its permissions, or choose another folder",
    errno.EROFS: "choose another folder",
    errno.ENOTDIR: "choose another folder",
}
"""What to do about an error of the local disk."""


def _local_error(path: Path, error: OSError) -> StorageError:
    cause, advice = error.strerror or str(error), _ADVICE.get(error.errno or 0)
    return StorageError(f"{path}: {cause}; {advice}" if advice else f"{path}: {cause}")
