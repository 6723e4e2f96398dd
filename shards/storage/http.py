"""Reading a dataset over `http(s)://`: a public bucket's address, or any web server that serves the files.

Uses aiohttp on fsspec's event loop, as s3fs does, because there a request can be ended at any point: connecting, within
the headers or the body, between redirects.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NoReturn
from urllib.parse import urlsplit

from shards.errors import StorageError, UsageError
from shards.storage import Stat, Storage, check_name
from shards.storage.retry import BeyondEndError, MissingError, Retrier

CHUNK = 1 << 20
"""Bytes that must arrive within the time limit; slower servers are given up."""
_CONNECT, _SILENT = 5.0, 20.0
"""Seconds to connect, and to wait for the next bytes."""
_CREDENTIALS = "it is not public, or not there; a private bucket is read by its s3:// address"


class _Session:
    """aiohttp's session of this process, made at the first request; a forked child makes its own."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Start anew in a forked child: the event loop's thread does not survive a fork, a held lock does."""
        self._guard = threading.Lock()
        self._session: Any = None

    async def get(self) -> Any:
        """Return the session; called on the loop."""
        import aiohttp

        with self._guard:
            if self._session is None:
                self._session = aiohttp.ClientSession(
                    trust_env=True,  # proxies and ~/.netrc
                    auto_decompress=False,
                    headers={"Accept-Encoding": "identity"},
                    timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT, sock_read=_SILENT),
                )
            return self._session


_session = _Session()
os.register_at_fork(after_in_child=_session.forget)


def _loop() -> asyncio.AbstractEventLoop:
    """Return the event loop that all requests run on."""
    from fsspec.asyn import get_loop

    loop: asyncio.AbstractEventLoop = get_loop()
    return loop


class HttpStorage(Storage):
    """Files below a web address; read only. Servers without range requests work, but resume by reading from 0."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        try:
            parts = urlsplit(self.url)
            parts.port  # noqa: B018 - not a number if a password holds a slash
        except ValueError:  # it quotes the part that it cannot read, which may be a password
            raise UsageError(f"{url.partition(':')[0]}://…: not a web address (https://host/path)") from None
        if "@" in parts.netloc or parts.netloc.endswith(":"):
            raise UsageError(f"{parts.scheme}://…: no credentials in a URL; use ~/.netrc or the bucket's s3:// address")
        if parts.query or parts.fragment:
            raise UsageError(f"{parts.scheme}://{parts.netloc}{parts.path}: a dataset's address has no ? and no #")
        if not parts.hostname or ".." in parts.hostname or len(parts.hostname) > 253:
            raise UsageError(f"{url}: no valid host in it; the form is https://host/path")
        self._address = self.url
        self._retry = Retrier(_CREDENTIALS)

    def __reduce__(self) -> tuple[Callable[[str], HttpStorage], tuple[str]]:
        return type(self), (self.url,)

    def cancel(self) -> None:
        self._retry.cancelled.set()

    def _headers(self) -> dict[str, str]:
        """Return what a request to this server carries; aiohttp sends no credentials to the host of a redirect."""
        return {}

    def _check(self, answer: Any) -> None:
        """Raise what the server means, if it says more than its status."""

    def _request(self, name: str) -> _Request:
        return _Request(f"{self.url}/{name}", f"{self._address}/{check_name(name)}", self._headers, self._check)

    def read_range(self, name: str, start: int, size: int) -> bytes:
        parts, left = [], size
        for piece in _stream(self._request(name), start, start + size, self._retry):
            parts.append(piece[:left])
            left -= len(parts[-1])
            if not left:
                break
        return b"".join(parts)

    def stream(self, name: str, start: int = 0) -> Iterator[bytes]:
        """Yield the content from `start`; a cut connection is resumed where it broke."""
        return _stream(self._request(name), start, None, self._retry)

    def stat(self, name: str) -> Stat | None:
        request = self._request(name)

        async def head() -> Stat:
            session = await _session.get()
            async with session.head(request.address, headers=request.headers(), allow_redirects=True) as answer:
                request.check(answer)
                answer.raise_for_status()
                return Stat(int(answer.headers.get("Content-Length", -1)), answer.headers.get("ETag", ""))

        try:
            return self._retry.run(request.shown, _loop(), head)
        except MissingError:
            return None

    def _refuse_listing(self, *_: Any, **__: Any) -> NoReturn:
        raise UsageError(f"{self.url}: a web address cannot be listed; give a dataset's own address, or the s3:// one")

    def _refuse_writing(self, *_: Any, **__: Any) -> NoReturn:
        raise UsageError(f"{self.url}: a web address can only be read; publish to a folder, s3:// or gs://")

    names = children = _refuse_listing
    write = create = create_file = delete = sweep = _refuse_writing


@dataclass(frozen=True)
class _Request:
    """A file's address, as messages show it and as it is asked for, and what `HttpStorage` says of its server."""

    shown: str
    address: str
    headers: Callable[[], dict[str, str]]
    check: Callable[[Any], None]


def _stream(request: _Request, start: int, stop: int | None, retry: Retrier) -> Iterator[bytes]:
    position, body, loop = start, _Body(request), _loop()
    try:
        while stop is None or position < stop:
            piece = retry.run(request.shown, loop, lambda at=position: body.read(at, stop), CHUNK)  # type: ignore[misc]
            if piece is None:
                continue
            if not piece:
                return
            position += len(piece)
            yield piece
    except BeyondEndError:
        return
    finally:
        with suppress(RuntimeError):  # the loop is gone with the process
            loop.call_soon_threadsafe(body.close)


class _Body:
    """A GET in progress, opened anew at the wanted position after each failure. Used on the event loop only."""

    def __init__(self, request: _Request) -> None:
        self._request, self.url = request, request.shown
        self._answer: Any = None
        self._to_skip = 0

    async def read(self, position: int, stop: int | None) -> bytes | None:
        """Return `CHUNK` bytes from `position`; fewer at the end and before a break of the connection; b"" after it.

        None means that a server without ranges has sent `CHUNK` of the bytes before `position`: call again.
        """
        try:
            if self._answer is None:
                await self._open(position, stop)
            if self._to_skip:
                await self._skip()
                return None
            return await self._piece(CHUNK)
        except BaseException:
            self.close()
            raise

    async def _open(self, position: int, stop: int | None) -> None:
        session = await _session.get()
        headers = {**self._request.headers(), "Range": f"bytes={position}-{'' if stop is None else stop - 1}"}
        self._answer = await session.get(self._request.address, headers=headers)
        self._request.check(self._answer)
        self._answer.raise_for_status()
        if self._answer.status != 206:
            self._to_skip = position
        elif not self._answer.headers.get("Content-Range", "").startswith(f"bytes {position}-"):
            raise StorageError(f"{self.url}: the server sends another range than asked for")

    async def _skip(self) -> None:
        skipped = await self._piece(min(self._to_skip, CHUNK))
        if not skipped:
            raise BeyondEndError(self.url)
        self._to_skip -= len(skipped)
        if self._answer is None:
            raise ConnectionError("cut before the position was reached")

    async def _piece(self, size: int) -> bytes:
        """Return `size` bytes; fewer at the end, and if the connection breaks after the first of them."""
        parts: list[bytes] = []
        while size > 0:
            try:
                data = await self._answer.content.read(size)
            except Exception:
                if not parts:
                    raise
                self.close()  # the bytes so far are good; the next piece opens anew behind them
                break
            if not data:
                break
            parts.append(data)
            size -= len(data)
        return b"".join(parts)

    def close(self) -> None:
        """End the request, whatever is still to come of it."""
        if self._answer is not None:
            self._answer.close()
        self._answer, self._to_skip = None, 0
