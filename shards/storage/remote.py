"""Object storage through fsspec: `s3://` (s3fs) and `gs://` (gcsfs).

Credentials and endpoint come only from the standard chain (environment, profile, instance role; `AWS_ENDPOINT_URL`).
`shards.storage.retry` limits the time of each attempt and decides about the next.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from shards.errors import StorageError, UsageError
from shards.storage import KINDS, Stat, check_folder, check_name
from shards.storage.retry import BeyondEndError, ExistsError, MissingError, Retrier

CHUNK = 8 << 20
"""Bytes that one request asks for while a whole object is read."""
PART = 16 << 20
"""Bytes in one part of a multipart upload; an object of less than two of them goes up in one request."""
_CONNECT_TIMEOUT, _READ_TIMEOUT = 5.0, 15.0

_S3_OPTIONS = {
    "config_kwargs": {
        "connect_timeout": _CONNECT_TIMEOUT,
        "read_timeout": _READ_TIMEOUT,
        "retries": {"mode": "standard", "total_max_attempts": 2},
        # Some servers return the whole object's checksum with a part of it. The manifest's sha256 covers every byte.
        "response_checksum_validation": "when_required",
        "max_pool_connections": 32,
    },
}
_S3_CREDENTIALS = (
    "check the credentials (AWS_PROFILE, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, instance role) and "
    "AWS_ENDPOINT_URL; a public bucket can be read by its https:// address"
)
_GS_CREDENTIALS = "check the credentials (gcloud auth application-default login, GOOGLE_APPLICATION_CREDENTIALS)"
_CREDENTIALS = {"s3": _S3_CREDENTIALS, "s3a": _S3_CREDENTIALS, "gs": _GS_CREDENTIALS, "gcs": _GS_CREDENTIALS}
_SCHEMES = (*_CREDENTIALS, "memory")
"""`memory` is fsspec's storage within this process, for experiments."""


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


class RemoteStorage:
    """A prefix in object storage. Can be pickled; each process makes its own connections."""

    def __init__(self, url: str, patience: float | None = None) -> None:
        scheme, _, path = url.partition("://")
        self.scheme, self._root = scheme.lower(), path.rstrip("/")
        self.url = f"{self.scheme}://{self._root}"
        bucket = self._root.partition("/")[0]
        # A secret may have a slash in it, so that the @ comes later.
        if "@" in bucket or (":" in bucket and not bucket.startswith("arn:")):
            raise UsageError(f"{self.scheme}://…: no credentials in a URL; they come from the environment or a profile")
        if self.scheme not in _SCHEMES:
            raise UsageError(f"{url}: no such kind of storage ({scheme}://); there are {KINDS}")
        if not bucket:
            raise UsageError(f"{url}: no bucket in it; the form is {self.scheme}://bucket/prefix")
        self._patience = patience
        self._retry = Retrier(patience, _CREDENTIALS.get(self.scheme, ""))

    def __getstate__(self) -> dict[str, Any]:
        return {"url": self.url, "patience": self._patience}

    def __setstate__(self, state: dict[str, Any]) -> None:
        RemoteStorage.__init__(self, state["url"], state["patience"])

    def cancel(self) -> None:
        """Make every call in other threads, and every later call, raise CancelledError."""
        self._retry.cancelled.set()

    def _connect(self) -> Any:
        import fsspec

        options: dict[str, Any] = {"skip_instance_cache": True, "use_listings_cache": False}
        if self.scheme in ("s3", "s3a"):
            options |= _S3_OPTIONS
        try:
            filesystem = fsspec.filesystem(self.scheme, **options)
        except ImportError as error:
            raise UsageError(f"{self.url}: {self.scheme}:// needs a package: pip install 'md2[gcs]'") from error
        if self.scheme in ("s3", "s3a"):
            filesystem.retries = 1  # shards.storage.retry retries, with one clock
        else:
            # gcsfs always retries, within one attempt here, and logs the traceback of each failure.
            logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
        return filesystem

    def _call(self, name: str, method: str, *args: Any, size: int = 0, sends: bool = False, **options: Any) -> Any:
        """Return `fs.method(path of name, *args)`; tried again if that may help, each attempt limited in time."""
        url = f"{self.url}/{name}" if name else self.url
        fs = _connections.get(self.scheme, self._connect)
        if not getattr(fs, "async_impl", False):
            return self._retry.call(url, lambda: getattr(fs, method)(*args, **options))
        request = getattr(fs, f"_{method}")
        return self._retry.run(url, fs.loop, lambda: request(*args, **options), size, sends=sends)

    def _path(self, name: str) -> str:
        return f"{self._root}/{check_name(name)}"

    def read(self, name: str, limit: int) -> bytes | None:
        data = b""
        try:
            while len(data) <= limit:
                size = min(CHUNK, limit + 1 - len(data))
                piece = self.read_range(name, len(data), size)
                data += piece
                if len(piece) < size:
                    return data
        except MissingError:
            return None
        raise StorageError(f"{self.url}/{name}: larger than {limit} bytes, refused")

    def read_range(self, name: str, start: int, size: int) -> bytes:
        """Return at most `size` bytes from `start`.

        Raises:
            MissingError: nothing has that name.
        """
        try:
            data: bytes = self._call(name, "cat_file", self._path(name), start=start, end=start + size, size=size)
        except BeyondEndError:
            return b""
        return data

    def stream(self, name: str, start: int = 0) -> Iterator[bytes]:
        """Yield the content from `start`, in pieces of at most `CHUNK` bytes.

        Raises:
            MissingError: nothing has that name.
        """
        while True:
            data = self.read_range(name, start, CHUNK)
            if data:
                yield data
            if len(data) < CHUNK:
                return
            start += len(data)

    def stat(self, name: str) -> Stat | None:
        path = self._path(name)
        try:
            if self.scheme in ("s3", "s3a"):  # `info` would also list if nothing has the name
                bucket, _, key = path.partition("/")
                head = self._call(name, "call_s3", "head_object", Bucket=bucket, Key=key)
                return Stat(int(head["ContentLength"]), str(head.get("ETag", "")))
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
        if self.scheme in ("s3", "s3a"):
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
        try:
            found = self._call(prefix, "find", self._path(prefix) if prefix else self._root)
        except MissingError:
            return []
        return sorted(path.removeprefix(self._root + "/") for path in found)

    def children(self, prefix: str) -> tuple[list[str], list[str]]:
        try:
            path = f"{self._root}/{check_folder(prefix)}" if prefix else self._root
            listed = self._call(prefix, "ls", path, detail=True)
        except MissingError:
            return [], []
        entries = [(entry["name"].rstrip("/").rpartition("/")[2], entry["type"]) for entry in listed]
        return sorted(n for n, kind in entries if kind == "file"), sorted(n for n, kind in entries if kind != "file")

    def sweep(self) -> None:
        """Do nothing: objects are whole or absent. Parts of a killed upload are removed by the bucket's own rules."""

    def delete(self, names: Iterable[str]) -> None:
        for name in names:
            try:
                self._call(name, "rm_file", self._path(name))
            except MissingError:
                continue
