"""Where a dataset lies: a local folder or an object-storage prefix, behind the few operations that md2 needs.

Names are relative to the storage's URL, have `/` between parts, and may not leave it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote, urlsplit

from shards.errors import StorageError, UsageError
from shards.files import expanded
from shards.storage.retry import MissingError

CHUNK = 8 << 20
"""Bytes that one request asks for while a whole object is read."""
_NAME = re.compile(r"[A-Za-z0-9_.-]+(/[A-Za-z0-9_.-]+)*")
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_TYPO = re.compile(r"(s3a?|gs|gcs|hf|https?|file):(?!//)", re.IGNORECASE)
KINDS = "folders, s3://, gs://, hf://, http(s)://"


@dataclass(frozen=True)
class Stat:
    """Size in bytes, and a tag that changes with the content ("" if the storage has none)."""

    size: int
    tag: str


class Storage(Protocol):
    """A folder, prefix or web address. Every failure but absence is a `StorageError` with the URL and the cause."""

    url: str

    def read(self, name: str, limit: int) -> bytes | None:
        """Return the whole content, None if absent; raise StorageError beyond `limit` bytes."""
        try:
            data = self.read_range(name, 0, limit + 1)
        except MissingError:
            return None
        if len(data) > limit:
            raise StorageError(f"{self.url}/{name}: larger than {limit} bytes, refused")
        return data

    def read_range(self, name: str, start: int, size: int) -> bytes:
        """Return at most `size` bytes from `start`, b"" behind the end; raise MissingError if absent."""

    def stream(self, name: str, start: int = 0) -> Iterator[bytes]:
        """Yield the content from `start`, in pieces of `CHUNK` bytes; raise MissingError if absent."""
        while data := self.read_range(name, start, CHUNK):
            yield data
            start += len(data)
            if len(data) < CHUNK:
                return

    def stat(self, name: str) -> Stat | None:
        """Return size and tag, None if absent."""

    def write(self, name: str, data: bytes) -> None:
        """Create or replace, in one step."""

    def create(self, name: str, data: bytes) -> bool:
        """Create in one step unless present; return False if present."""

    def create_file(self, name: str, path: Path, move: bool = False) -> bool:
        """As `create`, with a local file's content; `move` gives up the local file."""

    def names(self, prefix: str) -> list[str]:
        """Return all names below the folder `prefix` ("" for all), sorted."""

    def children(self, prefix: str) -> tuple[list[str], list[str]]:
        """Return the names of files and of folders directly in the folder `prefix`, each sorted."""

    def delete(self, names: Iterable[str]) -> None:
        """Delete those that are present."""

    def sweep(self) -> None:
        """Remove half-written files of killed processes, if the storage can recognise them."""

    def cancel(self) -> None:
        """Make every call that waits in another thread, and every later call, raise CancelledError."""


def is_local(url: str) -> bool:
    """Return whether `url` is a folder of this machine: a path, or `file://`."""
    scheme = _SCHEME.match(url)
    return scheme[1].lower() == "file" if scheme else "://" not in url


def local_path(url: str) -> Path:
    """Return the folder of a local URL.

    Raises:
        UsageError: a file URL with a host, no home folder for `~`, or a NUL.
    """
    if "\0" in unquote(url):
        raise UsageError(f"{url!r}: no path can hold a NUL character")
    if not _SCHEME.match(url):
        return expanded(Path(url))
    parts = urlsplit(url)
    if parts.netloc not in ("", "localhost"):
        raise UsageError(f"{url}: a file URL has three slashes: file:///folder")
    return Path(unquote(parts.path))


def open_storage(url: str) -> Storage:
    """Return the storage behind a path or URL; nothing is contacted yet.

    Raises:
        UsageError: an unknown or chained kind of URL, or one with credentials in it.
    """
    from shards.storage.http import HttpStorage
    from shards.storage.hub import HubStorage, is_hub
    from shards.storage.local import LocalStorage
    from shards.storage.remote import RemoteStorage

    if is_local(url):
        if _TYPO.match(url):
            raise UsageError(f"{url}: a URL has two slashes after its colon: s3://bucket/prefix")
        return LocalStorage(local_path(url))
    scheme = _SCHEME.match(url)
    if scheme is None or "::" in url.partition("/")[0] or re.search(r"::[A-Za-z0-9+.-]+://", url):
        raise UsageError(f"{url}: chained URLs are not supported; the kinds are {KINDS}")
    if scheme[1].lower() in ("http", "https"):
        return HttpStorage(url)
    if is_hub(url):
        return HubStorage(url)
    return RemoteStorage(url)


def check_name(name: str) -> str:
    """Return `name` if it stays inside the storage.

    Raises:
        StorageError: an absolute name, `..`, or a character that some storage reads differently.
    """
    if not _NAME.fullmatch(name) or any(part in (".", "..") for part in name.split("/")):
        raise StorageError(f"name {name!r} would leave the dataset; refused")
    return name


def check_folder(name: str) -> str:
    """As `check_name`, for a folder found by listing: a bucket may hold folders of any other name as well.

    Raises:
        StorageError: it leaves the storage.
    """
    if any(part in ("", ".", "..") for part in name.split("/")):
        raise StorageError(f"folder {name!r} would leave the storage; refused")
    return name
