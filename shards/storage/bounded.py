"""Answers of servers that are read whole have a bound: a gigabyte of error text or XML would be held in memory."""

from __future__ import annotations

from functools import cache
from typing import Any

import aiohttp
from aiobotocore.httpsession import AIOHTTPSession

from shards.storage.retry import AnswerTooLargeError

MAX_ANSWER = 4 << 20
"""Of S3's own answers. A page of a listing has 1000 names of at most 1024 bytes, which triple when they are escaped."""
MAX_JSON = 17 << 20
"""Of answers of Google's storage, of which ranges of objects and lists of names are read in the same way."""
MAX_CONTENT = 80 << 20
"""Of a raw file, or several ranges of one, which fsspec reads whole."""


class _Body:
    """The body of an answer, which refuses to be read whole beyond a limit."""

    def __init__(self, body: Any, limit: int) -> None:
        self._body, self._limit = body, limit

    def __getattr__(self, name: str) -> Any:
        return getattr(self._body, name)

    async def read(self, size: int = -1) -> bytes:
        if size >= 0:
            piece: bytes = await self._body.read(size)
            return piece
        whole = bytearray()
        while data := await self._body.read(1 << 16):
            whole += data
            if len(whole) > self._limit:
                raise AnswerTooLargeError
        return bytes(whole)


class BoundedSession(AIOHTTPSession):  # type: ignore[misc]
    """aiobotocore's HTTP session, for S3."""

    async def send(self, request: Any) -> Any:
        streams, request.stream_output = request.stream_output, True  # else `send` reads all of it
        try:
            answer = await super().send(request)
        finally:
            request.stream_output = streams
        whole = answer.status_code >= 300 or not streams
        answer.raw.content = _Body(answer.raw.content, MAX_ANSWER if whole else MAX_CONTENT)
        if whole:
            await answer.content
        return answer


@cache
def bounded_response(limit: int) -> type[aiohttp.ClientResponse]:
    """Return aiohttp's response with a bound in bytes, for file systems that make aiohttp's sessions."""

    class BoundedResponse(aiohttp.ClientResponse):
        async def start(self, connection: Any) -> aiohttp.ClientResponse:
            await super().start(connection)
            self.content = _Body(self.content, limit)  # type: ignore[assignment]
            return self

    return BoundedResponse
