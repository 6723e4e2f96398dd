"""Object storage through fsspec: `s3://` (s3fs) and `gs://` (gcsfs).

Credentials and endpoint come only from the standard chain (environment, profile, instance role; `AWS_ENDPOINT_URL`).
`shards.storage.retry` limits the time of each attempt and decides about the next.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from shards.errors import StorageError, UsageError
from shards.storage import KINDS, Stat, Storage, check_folder, check_name
from shards.storage.retry import BeyondEndError, ExistsError, MissingError, Retrier

PART = 16 << 20
"""Bytes in one part of a multipart upload; an object of less than two of them goes up in one request."""
MAX_NAMES = 1_000_000
"""Objects of one listing."""
MAX_LISTING = 200 << 20
"""Bytes of memory that the names of one listing may take."""
_NAMES_A_SECOND = 1000
"""A listing that gives fewer is given up when the time limit has passed."""
_CONNECT_TIMEOUT, _READ_TIMEOUT = 5.0, 15.0

_S3_CONFIG = {
    "connect_timeout": _CONNECT_TIMEOUT,
    "read_timeout": _READ_TIMEOUT,
    "retries": {"mode": "standard", "total_max_attempts": 2},
    # Some servers return the whole object's checksum with a part of it. The manifest's sha256 covers every byte.
    "response_checksum_validation": "when_required",
    "max_pool_connections": 32,
}
_S3_CREDENTIALS = (
    "check the credentials (AWS_PROFILE, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, instance role) and "
    "AWS_ENDPOINT_URL; a public bucket can be read by its https:// address"
)
_GS_CREDENTIALS = "check the credentials (gcloud auth application-default login, GOOGLE_APPLICATION_CREDENTIALS)"
_CREDENTIALS = {"s3": _S3_CREDENTIALS, "s3a": _S3_CREDENTIALS, "gs": _GS_CREDENTIALS, "gcs": _GS_CREDENTIALS}
_SCHEMES = (*_CREDENTIALS, "memory")
"""`memory` is fsspec's storage within this process, for experiments."""


def filesystem_options(scheme: str) -> dict[str, Any]:
    """Return the options with which fsspec's file system of this kind never reads an answer beyond a bound."""
    if scheme in ("s3", "s3a"):
        from shards.storage.bounded import BoundedSession

        return {"config_kwargs": _S3_CONFIG | {"http_session_cls": BoundedSession}}
    if scheme in ("gs", "gcs", "http", "https"):
        from shards.storage.bounded import MAX_CONTENT, MAX_JSON, bounded_response

        name, limit = ("client_kwargs", MAX_CONTENT) if scheme[0] == "h" else ("session_kwargs", MAX_JSON)
        return {name: {"response_class": bounded_response(limit)}}
    return {}


class _Connections:
    """fsspec's file systems of this process, one for each set of credentials, shared by all its storages."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Start anew in a forked child: fsspec's thread does not survive a fork, a held lock does."""
        self._guard = threading.Lock()
        self._known: dict[tuple[str, frozenset[tuple[str, str]]], Any] = {}

    def get(self, scheme: str, connect: Callable[[], Any]) -> Any:
        settings = frozenset((k, v) for k, v in os.environ.items() if k.startswith(("AWS_", "GOOGLE_")))
        with self._guard:
            if (scheme, settings) not in self._known:
                self._known[scheme, settings] = connect()
            return self._known[scheme, settings]


_connections = _Connections()
os.register_at_fork(after_in_child=_connections.forget)


class RemoteStorage(Storage):
    """A prefix in object storage. Can be pickled; each process makes its own connections."""

    def __init__(self, url: str) -> None:
        scheme, _, path = url.partition("://")
        self.scheme, self._root = scheme.lower(), path.rstrip("/")
        self.url = f"{self.scheme}://{self._root}"
        bucket = self._root.partition("/")[0]
        # A secret may have a slash in it, so that the @ comes later.
        if "@" in bucket or (":" in bucket and not bucket.startswith("arn:")):
            raise UsageError(f"{self.scheme}://…: no credentials in a URL; they come from the environment or a profile")
        if re.search("[?#].*=", path):  # a signed link, in which there are credentials
            raise UsageError(f"{self.scheme}://…: a dataset's address has no query (?name=value)")
        if self.scheme not in _SCHEMES:
            raise UsageError(f"{url}: no such kind of storage ({scheme}://); there are {KINDS}")
        if not bucket:
            raise UsageError(f"{url}: no bucket in it; the form is {self.scheme}://bucket/prefix")
        self._is_s3 = self.scheme in ("s3", "s3a")
        self._retry = Retrier(_CREDENTIALS.get(self.scheme, ""))

    def __reduce__(self) -> tuple[Callable[[str], RemoteStorage], tuple[str]]:
        return type(self), (self.url,)

    def cancel(self) -> None:
        self._retry.cancelled.set()

    def _connect(self) -> Any:
        import fsspec

        options = {"skip_instance_cache": True, "use_listings_cache": False}
        try:
            filesystem = fsspec.filesystem(self.scheme, **options, **filesystem_options(self.scheme))
        except ImportError as error:
            raise UsageError(f"{self.url}: {self.scheme}:// needs a package: pip install 'md2[gcs]'") from error
        if self._is_s3:
            filesystem.retries = 1  # shards.storage.retry retries, with one clock
        else:
            # gcsfs always retries, within one attempt here, and logs the traceback of each failure.
            logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
        return filesystem

    def _call(
        self,
        name: str,
        method: str | Callable[..., Coroutine[Any, Any, Any]],
        *args: Any,
        size: int = 0,
        sends: bool = False,
        **options: Any,
    ) -> Any:
        """Return `fs.method(*args)` or `method(fs, *args)`, tried again if that may help.

        Args:
            name: for messages.
            size, sends: see `Retrier.run`.
        """
        url = f"{self.url}/{name}" if name else self.url
        fs = _connections.get(self.scheme, self._connect)
        if isinstance(method, str) and not getattr(fs, "async_impl", False):
            return self._retry.run_blocking(url, lambda: getattr(fs, method)(*args, **options), size)
        request = getattr(fs, f"_{method}") if isinstance(method, str) else partial(method, fs)
        return self._retry.run(url, fs.loop, lambda: request(*args, **options), size, sends=sends)

    def _path(self, name: str) -> str:
        return f"{self._root}/{check_name(name)}"

    def read_range(self, name: str, start: int, size: int) -> bytes:
        path = self._path(name)
        try:
            if self._is_s3:
                data: bytes = self._call(name, _s3_range, path, start, size, size=size)
            else:
                data = self._call(name, "cat_file", path, start=start, end=start + size, size=size)
        except BeyondEndError:
            return b""
        return data

    def stat(self, name: str) -> Stat | None:
        path = self._path(name)
        try:
            if self._is_s3:  # `info` would also list if nothing has the name
                head = self._call(name, _s3_head, path)
                return Stat(int(head.get("ContentLength", -1)), str(head.get("ETag", "")))
            info = self._call(name, "info", path)
        except MissingError:
            return None
        if info.get("type") != "file":
            return None
        return Stat(int(info["size"]), str(info.get("ETag") or info.get("etag") or ""))

    def write(self, name: str, data: bytes) -> None:
        self._put(name, "pipe_file", self._path(name), data, size=len(data))

    def create(self, name: str, data: bytes) -> bool:
        # Servers without conditional writes ignore the condition: look first.
        if self.stat(name) is not None:
            return False
        try:
            self._put(name, "pipe_file", self._path(name), data, size=len(data), **self._exclusive())
        except ExistsError:
            return False
        return True

    def create_file(self, name: str, path: Path, move: bool = False) -> bool:
        if self.stat(name) is not None:
            return False
        size = path.stat().st_size
        options = self._exclusive()
        if self._is_s3:
            options |= {"chunksize": PART}
        try:
            self._put(name, "put_file", str(path), self._path(name), size=size, **options)
        except ExistsError:
            return False
        if move:
            path.unlink()
        return True

    def _put(self, name: str, method: str, *args: Any, **options: Any) -> None:
        """Call a method that writes. Some servers answer 404 to a name that they do not support."""
        try:
            self._call(name, method, *args, sends=True, **options)
        except MissingError as error:
            raise StorageError(f"{self.url}/{name}: the server does not accept this name (404)") from error

    def _exclusive(self) -> dict[str, Any]:
        """Return the options of a write that must not replace anything, if the file system has such a write."""
        return {"mode": "create"} if self.scheme in ("s3", "s3a", "gs", "gcs") else {}

    def names(self, prefix: str) -> list[str]:
        path = self._path(prefix) if prefix else self._root
        if self._is_s3:
            found = self._list(prefix, path, "")[0]
            return sorted(f"{prefix}/{name}" if prefix else name for name in found)
        try:
            return sorted(name.removeprefix(self._root + "/") for name in self._call(prefix, "find", path))
        except MissingError:
            return []

    def children(self, prefix: str) -> tuple[list[str], list[str]]:
        path = f"{self._root}/{check_folder(prefix)}" if prefix else self._root
        if self._is_s3:
            files, folders = self._list(prefix, path, "/")
            return sorted(files), sorted(folders)
        try:
            listed = self._call(prefix, "ls", path, detail=True)
        except MissingError:
            return [], []
        entries = [(entry["name"].rstrip("/").rpartition("/")[2], entry["type"]) for entry in listed]
        return sorted(n for n, kind in entries if kind == "file"), sorted(n for n, kind in entries if kind != "file")

    def _list(self, name: str, path: str, delimiter: str) -> tuple[dict[str, int], list[str]]:
        url = f"{self.url}/{name}" if name else self.url
        return all_pages(url, self._retry.patience, lambda token: self._call(name, s3_page, path, delimiter, token))

    def sweep(self) -> None:
        """Do nothing: objects are whole or absent. Parts of a killed upload are removed by the bucket's own rules."""

    def delete(self, names: Iterable[str]) -> None:
        for name in names:
            try:
                self._call(name, "rm_file", self._path(name))
            except MissingError:
                continue


async def _s3_range(fs: Any, path: str, start: int, size: int) -> bytes:
    """Return at most `size` bytes of an object, whatever the server sends: s3fs would read all of that."""
    bucket, key, _ = fs.split_path(path)
    answer = await fs._call_s3("get_object", Bucket=bucket, Key=key, Range=f"bytes={start}-{start + size - 1}")
    parts, left = [], size
    try:
        if start and not str(answer.get("ContentRange", "")).startswith(f"bytes {start}-"):  # rclone: with status 200
            raise StorageError(f"s3://{path}: the server ignores the range that was asked for")
        while left and (piece := await answer["Body"].read(left)):
            parts.append(piece)
            left -= len(piece)
    finally:
        answer["Body"].close()
    return b"".join(parts)


async def _s3_head(fs: Any, path: str) -> Any:
    bucket, key, _ = fs.split_path(path)
    return await fs._call_s3("head_object", Bucket=bucket, Key=key)


class Page(NamedTuple):
    """A page of a listing: sizes by name, and folders, relative to the listed one; and the next page's token.

    The last page has no token. A name that ends in a slash, or is empty, is another tool's mark of a folder.
    """

    files: dict[str, int]
    folders: list[str]
    next: str


async def s3_page(fs: Any, path: str, delimiter: str, token: str) -> Page:
    """Return a page of what is below a folder, and with a delimiter directly in it; s3fs would list without an end."""
    bucket, key, _ = fs.split_path(path)
    prefix = f"{key}/" if key else ""
    more = {"ContinuationToken": token} if token else {}
    page = await fs._call_s3("list_objects_v2", Bucket=bucket, Prefix=prefix, Delimiter=delimiter, **more)
    return Page(
        {entry["Key"].removeprefix(prefix): int(entry.get("Size", 0)) for entry in page.get("Contents", [])},
        [entry["Prefix"].removeprefix(prefix).rstrip("/") for entry in page.get("CommonPrefixes", [])],
        page.get("NextContinuationToken", "") if page.get("IsTruncated") else "",
    )


def all_pages(url: str, patience: float, get: Callable[[str], Page]) -> tuple[dict[str, int], list[str]]:
    """Return sizes by name, and folders, of all pages of a listing.

    Args:
        url: for messages.
        patience: seconds after which a listing that brings few names is given up.
        get: returns the page that a token stands for, "" for the first.

    Raises:
        StorageError: more names than `MAX_NAMES` or `MAX_LISTING`, or pages without an end.
    """
    files: dict[str, int] = {}
    folders: dict[str, None] = {}
    token, taken, start = "", 0, time.monotonic()
    while True:
        page = get(token)
        files |= page.files
        folders |= dict.fromkeys(page.folders)
        if not page.next:
            return {name: size for name, size in files.items() if name and not name.endswith("/")}, list(folders)
        taken += sum(map(sys.getsizeof, (*page.files, *page.folders)))
        count = len(files) + len(folders)
        if count >= MAX_NAMES or taken > MAX_LISTING:
            raise StorageError(f"{url}: more than {count:,} names below it; give a longer prefix")
        if page.next == token or time.monotonic() - start > patience + count / _NAMES_A_SECOND:
            raise StorageError(f"{url}: the server's list of names does not end")
        token = page.next
