"""Reading a dataset over `http(s)://`: a public bucket's address, or any web server with the files on it."""

from __future__ import annotations

import concurrent.futures
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from shards.errors import StorageError, UsageError
from shards.storage.base import Stat, check_name
from shards.storage.retry import BeyondEndError, MissingError, Retrier

CHUNK = 1 << 20
_TIMEOUTS = (5.0, 20.0)
"""Seconds to connect, and to wait for the next bytes."""
_SLOWEST = 100e3
_GRACE = 60.0
"""A piece of CHUNK bytes may take this long, plus what it needs at _SLOWEST bytes/s."""
T = TypeVar("T")
_HEADERS = {"Accept-Encoding": "identity"}


class HttpStorage:
    """Files below a web address; read only. Servers without range requests work, at the price of reading from 0."""

    def __init__(self, url: str, patience: float | None = None) -> None:
        self.url = url.rstrip("/")
        try:
            parts = urlsplit(self.url)
            parts.port  # noqa: B018 - no number where there is a password with a slash in it
        except ValueError as error:
            raise UsageError(f"{url.partition(':')[0]}://…: not a web address (https://host/path)") from error
        if "@" in parts.netloc or parts.netloc.endswith(":"):
            raise UsageError(f"{parts.scheme}://…: no credentials in a URL; use ~/.netrc or the bucket's s3:// address")
        if parts.query or parts.fragment:
            raise UsageError(f"{parts.scheme}://{parts.netloc}{parts.path}: a dataset's address has no ? and no #")
        if not parts.netloc:
            raise UsageError(f"{url}: no host in it; the form is https://host/path")
        self._patience = patience
        self._retry = Retrier(patience, "it is not public, or not there; a private bucket is read by its s3:// address")

    def __getstate__(self) -> dict[str, Any]:
        return {"url": self.url, "patience": self._patience}

    def __setstate__(self, state: dict[str, Any]) -> None:
        HttpStorage.__init__(self, state["url"], state["patience"])

    def cancel(self) -> None:
        self._retry.cancelled.set()

    def _url(self, name: str) -> str:
        return f"{self.url}/{check_name(name)}"

    def read(self, name: str, limit: int) -> bytes | None:
        try:
            data = self.read_range(name, 0, limit + 1)
        except MissingError:
            return None
        if len(data) > limit:
            raise StorageError(f"{self._url(name)}: larger than {limit} bytes, refused")
        return data

    def read_range(self, name: str, start: int, size: int) -> bytes:
        """At most `size` bytes from `start`.

        Raises:
            MissingError: nothing has that name.
        """
        parts = []
        for piece in self.stream(name, start, stop=start + size):
            parts.append(piece)
            size -= len(piece)
            if size <= 0:
                break
        data = b"".join(parts)
        return data[: len(data) + min(size, 0)]

    def stream(self, name: str, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
        """The content from `start` on, in pieces of about `CHUNK` bytes; a cut connection is taken up where it broke.

        Raises:
            MissingError: nothing has that name.
        """
        position, body = start, _Body(self._url(name))
        try:
            while stop is None or position < stop:
                at = position
                piece = self._call(body.url, lambda at=at: body.read(at, stop))  # type: ignore[misc]
                if not piece:
                    return
                position += len(piece)
                yield piece
        except BeyondEndError:
            return
        finally:
            body.give_up()

    def _call(self, url: str, request: Callable[[], T]) -> T:
        """`request` in a thread of its own, for none of requests' calls can be ended from outside."""

        def attempt() -> T:
            future = concurrent.futures.Future[T]()

            def work() -> None:
                try:
                    future.set_result(request())
                except BaseException as error:
                    future.set_exception(error)

            threading.Thread(target=work, daemon=True, name="md2-http").start()
            return self._retry.wait(future)

        return self._retry.call(url, attempt)

    def stat(self, name: str) -> Stat | None:
        import requests

        def head() -> Stat:
            with requests.head(self._url(name), headers=_HEADERS, timeout=_TIMEOUTS, allow_redirects=True) as answer:
                answer.raise_for_status()
                return Stat(int(answer.headers.get("Content-Length", -1)), answer.headers.get("ETag", ""))

        try:
            return self._call(self._url(name), head)
        except MissingError:
            return None

    def names(self, prefix: str) -> list[str]:
        raise UsageError(f"{self.url}: a web address cannot be listed; give a dataset's own address, or the s3:// one")

    def children(self, prefix: str) -> tuple[list[str], list[str]]:
        raise UsageError(f"{self.url}: a web address cannot be listed; give a dataset's own address, or the s3:// one")

    def write(self, name: str, data: bytes) -> None:
        raise UsageError(f"{self.url}: a web address can only be read; publish to a folder, s3:// or gs://")

    def create(self, name: str, data: bytes) -> bool:
        raise UsageError(f"{self.url}: a web address can only be read; publish to a folder, s3:// or gs://")

    def create_file(self, name: str, path: Path, move: bool = False) -> bool:
        raise UsageError(f"{self.url}: a web address can only be read; publish to a folder, s3:// or gs://")

    def sweep(self) -> None:
        raise UsageError(f"{self.url}: a web address can only be read")

    def delete(self, names: Iterable[str]) -> None:
        raise UsageError(f"{self.url}: a web address can only be read")


class _Body:
    """A GET in progress, opened anew at the position wanted after each failure."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._answer: Any = None
        self._guard = threading.Lock()
        self._reading, self._given_up = False, False

    def read(self, position: int, stop: int | None) -> bytes:
        """About CHUNK bytes from `position`; less at the end of what the server sends, b"" behind it."""
        self._reading = True
        try:
            if self._answer is None:
                self._open(position, stop)
            return self._piece(CHUNK)
        except BaseException:
            self.close()
            raise
        finally:
            with self._guard:
                self._reading = False
            if self._given_up:
                self.close()

    def give_up(self) -> None:
        """Close it; if a thread is still reading (closing would wait for it), that thread does it in the end."""
        with self._guard:
            self._given_up = True
            if self._reading:
                return
        self.close()

    def _open(self, position: int, stop: int | None) -> None:
        import requests

        headers = _HEADERS | {"Range": f"bytes={position}-{'' if stop is None else stop - 1}"}
        self._answer = requests.get(self.url, headers=headers, timeout=_TIMEOUTS, stream=True)
        self._answer.raise_for_status()
        if self._answer.status_code == 206:
            if not self._answer.headers.get("Content-Range", "").startswith(f"bytes {position}-"):
                raise StorageError(f"{self.url}: the server sends another range than asked for")
            return
        left = position  # no ranges here: the answer starts at 0
        while left and (skipped := self._piece(min(left, CHUNK))):
            left -= len(skipped)
            if self._answer is None:
                raise ConnectionError("cut before the position was reached")
        if left:
            raise BeyondEndError(self.url)

    def _piece(self, size: int) -> bytes:
        """`size` bytes; less at the end, and where the connection breaks behind the first of them.

        Raises:
            TimeoutError: they trickle.
        """
        parts: list[bytes] = []
        deadline = time.monotonic() + _GRACE + size / _SLOWEST
        while size > 0:
            try:
                data = self._answer.raw.read1(size)
            except Exception:
                if not parts:
                    raise
                self.close()  # what came is good; the next piece opens anew behind it
                break
            if not data:
                break
            parts.append(data)
            size -= len(data)
            if time.monotonic() > deadline:
                raise TimeoutError
        return b"".join(parts)

    def close(self) -> None:
        if self._answer is not None:
            self._answer.close()
            self._answer = None
