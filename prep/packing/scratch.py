"""Scratch files of encoded frames: blobs one after the other, then their index. Whole, or not there.

A chunk is written under another name and renamed when it is complete, so that a killed run leaves no half of one
under its own name. Each blob carries its CRC: a chunk that a power cut or a disk damaged is noticed when it is read.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from shards.errors import DatasetError
from shards.files import temporary

_FOOTER = struct.Struct("<QI8s")
_MAGIC = b"MD2CHNK1"


@dataclass(frozen=True, slots=True)
class Blob:
    """Where an encoded file lies in its chunk, and the CRC-32 of its bytes."""

    offset: int
    size: int
    crc: int


class ChunkWriter:
    """Writes one chunk. Leaves nothing behind when the block ends with an exception.

    Args:
        path: the finished chunk; its folder is created.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._tmp = temporary(path)
        self._file = self._tmp.open("wb")
        self._offset = 0

    def add(self, data: bytes) -> Blob:
        """Append one encoded file."""
        self._file.write(data)
        blob = Blob(self._offset, len(data), zlib.crc32(data))
        self._offset += len(data)
        return blob

    def finish(self, index: dict[str, Any]) -> None:
        """Append the index (JSON values) and give the file its name."""
        text = json.dumps(index, separators=(",", ":")).encode()
        self._file.write(text)
        self._file.write(_FOOTER.pack(len(text), zlib.crc32(text), _MAGIC))
        self._file.close()
        self._tmp.replace(self._path)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._file.close()  # on a full disk this fails, too
        finally:
            self._tmp.unlink(missing_ok=True)


def read_chunk_index(path: Path) -> dict[str, Any] | None:
    """The index of a finished chunk; None where there is none, or one that is damaged."""
    try:
        with path.open("rb") as file:
            end = file.seek(0, os.SEEK_END)
            if end < _FOOTER.size:
                return None
            file.seek(end - _FOOTER.size)
            size, crc, magic = _FOOTER.unpack(file.read(_FOOTER.size))
            if magic != _MAGIC or size > end - _FOOTER.size:
                return None
            file.seek(end - _FOOTER.size - size)
            text = file.read(size)
    except FileNotFoundError:
        return None
    if zlib.crc32(text) != crc:
        return None
    index: dict[str, Any] = json.loads(text)
    return index


class ChunkReader:
    """Reads blobs of many chunks with few open files.

    Args:
        folder: where the chunks are.
        limit: files open at a time.
    """

    def __init__(self, folder: Path, limit: int = 64) -> None:
        self._folder = folder
        self._limit = limit
        self._open: dict[str, int] = {}

    def read(self, chunk: str, blob: Blob) -> bytes:
        """A blob's bytes.

        Raises:
            DatasetError: they are not what was written.
        """
        descriptor = self._open.pop(chunk, None)
        if descriptor is None:
            while len(self._open) >= self._limit:
                os.close(self._open.pop(next(iter(self._open))))
            descriptor = os.open(self._folder / chunk, os.O_RDONLY)
        self._open[chunk] = descriptor
        data = os.pread(descriptor, blob.size, blob.offset)
        if len(data) != blob.size or zlib.crc32(data) != blob.crc:
            raise DatasetError(
                f"{self._folder / chunk}: damaged scratch file; remove it and run the same command again"
            )
        return data

    def close(self) -> None:
        while self._open:
            os.close(self._open.popitem()[1])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
