"""A shard in memory: its tar mapped, and where each component lies in it by its index.

with MappedShard.open(folder, shard) as mapped:
    mapped.component(17, "0.jpg")  # bytes of the file, not copied; None if the sample lacks it
"""

from __future__ import annotations

import mmap
import stat
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from shards.cache.fill import Ahead, Fetcher
from shards.cache.folder import LIMIT_VARIABLE, format_bytes
from shards.errors import DatasetError, StorageError
from shards.files import disk_errors, open_regular
from shards.locks import FileLock
from shards.manifest import Shard
from shards.tar import IndexEntry, check_index

Bytes = npt.NDArray[np.uint8]
_AGAIN = "pull or pack the dataset again"


class MappedShard:
    """A shard that is open for reading. Views of it stay valid after `close`, which lets go of the map itself.

    Args:
        tar: path of the tar, for messages.
        samples: the index's entries.
        data: the tar's bytes.
    """

    def __init__(self, tar: Path, samples: list[list[IndexEntry]], data: Bytes) -> None:
        self.tar, self._data = tar, data
        self.keys = [entries[0].name.removeprefix("./").partition(".")[0] for entries in samples]
        self._extents = [{entry.component: (entry.offset, entry.size) for entry in entries} for entries in samples]

    @classmethod
    def open(cls, folder: Path, shard: Shard) -> Self:
        """Map a shard of the dataset in `folder`, after a comparison of its index and sizes with the manifest.

        Raises:
            DatasetError: naming the file that is missing or differs.
            StorageError: a file that cannot be read.
        """
        samples = check_shard(folder, shard)
        tar = folder / shard.name
        try:
            with open_regular(tar) as file:
                mapped = mmap.mmap(file.fileno(), shard.bytes, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise StorageError(f"{tar}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
        return cls(tar, samples, np.frombuffer(mapped, np.uint8))

    def component(self, sample: int, name: str) -> Bytes | None:
        """A view of one file of a sample; None if the sample does not have it."""
        extent = self._extents[sample].get(name)
        return None if extent is None else self._data[extent[0] : extent[0] + extent[1]]

    def close(self) -> None:
        """Let go of the map: it goes once the last view of it is gone."""
        del self._data

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def check_sizes(folder: Path, shard: Shard) -> None:
    """Compare the sizes of a shard's two files with its manifest entry, without opening them.

    Raises:
        DatasetError: naming the file that is missing or differs.
        StorageError: a file that cannot be looked at.
    """
    check_size(folder / shard.name, shard.bytes)
    check_size(folder / shard.index_name, shard.index_bytes)


def check_size(path: Path, expected: int) -> None:
    """As `check_sizes`, of one file."""
    with disk_errors(path):
        try:
            found = path.stat()
        except FileNotFoundError as error:
            raise DatasetError(f"{path}: missing, though the manifest lists it; {_AGAIN}") from error
    if not stat.S_ISREG(found.st_mode):
        raise StorageError(f"{path}: not a regular file; {_AGAIN}")
    if found.st_size != expected:
        raise DatasetError(f"{path}: {found.st_size} bytes, the manifest says {expected}; {_AGAIN}")


def check_shard(folder: Path, shard: Shard) -> list[list[IndexEntry]]:
    """Compare a shard's files with its manifest entry: both sizes, the index's bytes and sample count.

    The tar's content is not read; `md2 shards verify` does that.

    Returns:
        The index's entries.

    Raises:
        DatasetError: naming the file that is missing or differs.
        StorageError: a file that cannot be read.
    """
    check_size(folder / shard.name, shard.bytes)
    return check_index_file(folder, shard)


def check_index_file(folder: Path, shard: Shard) -> list[list[IndexEntry]]:
    """As `check_shard`, without a look at the tar."""
    index = folder / shard.index_name
    check_size(index, shard.index_bytes)
    with disk_errors(index), open_regular(index) as file:
        return check_index(file.read(shard.index_bytes + 1), shard, str(index))


class ShardStream:
    """Open shards of one part: in a folder, or fetched into the cache as they are needed.

    Args:
        folder: where they are, or come to.
        shards: in the manifest's order.
        fetcher: brings them; None: they are there.

    Raises:
        DatasetError: a file is missing or has another size than the manifest says.
        StorageError: a file that cannot be looked at.
    """

    def __init__(self, folder: Path, shards: list[Shard], fetcher: Fetcher | None = None) -> None:
        self.folder, self.shards, self._fetcher = folder, shards, fetcher
        self._open: dict[int, MappedShard] = {}
        self._until: dict[int, int] = {}
        self._locks: dict[int, FileLock] = {}
        self._ahead: Ahead | None = None
        self.limit = fetcher.place.cache.limit if fetcher is not None else None
        """Bytes of shards that the cache may hold; None: no limit."""
        for shard in shards if fetcher is None else ():
            check_sizes(folder, shard)

    def bytes_of(self, at_once: int) -> int:
        """Bytes of the largest `at_once` shards."""
        return sum(sorted((shard.total_bytes for shard in self.shards), reverse=True)[:at_once])

    def require(self, at_once: int) -> None:
        """Compare the cache's limit with the shards that are needed at the same time.

        Raises:
            StorageError: it is less.
        """
        needed = self.bytes_of(at_once)
        if self._fetcher is not None and self.limit is not None and needed > self.limit:
            raise StorageError(
                f"{self._fetcher.place.cache.folder}: no room: {min(at_once, len(self.shards))} shards of "
                f"{self._fetcher.url} are needed at once, {format_bytes(needed)}, and {LIMIT_VARIABLE} is "
                f"{format_bytes(self.limit)}; raise it"
            )

    def fetch_ahead(self, upcoming: Iterator[tuple[int, int]], reach: int) -> None:
        """From now on, fetch shards before they are needed; without effect for those in a folder.

        Args:
            upcoming: place at which a shard is first needed and its number, in ascending order of the places.
            reach: how far ahead of the last `close_before` to fetch.
        """
        if self._fetcher is None:
            return
        if self._ahead is not None:
            self._ahead.stop()
            self._fetcher = Fetcher(self._fetcher.url, self._fetcher.place)
        self._ahead = Ahead(self._fetcher, ((place, self.shards[number]) for place, number in upcoming), reach)
        weakref.finalize(self, self._ahead.stop).atexit = False

    def get(self, number: int, until: int) -> MappedShard:
        """One of the part's shards, which stays open at least until `close_before` passes the place `until`.

        Raises:
            DatasetError: it is not what the manifest says.
            StorageError: it cannot be read or fetched.
        """
        if number not in self._open:
            shard = self.shards[number]
            if self._fetcher is not None:
                self._locks[number] = self._fetcher.hold(shard)
            self._open[number] = MappedShard.open(self.folder, shard)
        self._until[number] = max(until, self._until.get(number, until))
        return self._open[number]

    def cancel(self) -> None:
        """Make a `get` that waits for the storage, and every later one that would, raise CancelledError."""
        if self._fetcher is not None:
            self._fetcher.cancel()

    def close_before(self, place: int) -> None:
        """Close what was needed until before `place`; in the cache it may then be evicted."""
        if self._ahead is not None:
            self._ahead.place = place
        for number in [number for number, until in self._until.items() if until < place]:
            self._open.pop(number).close()
            del self._until[number]
            if self._fetcher is not None:
                self._fetcher.place.done_with(self.shards[number])
                self._locks.pop(number).release()

    def __del__(self) -> None:
        for lock in self._locks.values():
            lock.release()
