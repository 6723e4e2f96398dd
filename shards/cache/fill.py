"""Fetching shards into the cache: each by one process of the machine, some ahead of their use."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from shards.cache.download import fetch
from shards.cache.folder import CachedFolder, NoRoomError
from shards.errors import DatasetError, StorageError
from shards.files import disk_error, sha256_file
from shards.locks import FileLock
from shards.manifest import Shard
from shards.storage import open_storage
from shards.storage.retry import CancelledError, patience_from_environment

PARALLEL = 8
"""Shards fetched or checked at once by one process."""
_PAUSE = 0.05
_ROOM_PAUSE = 0.25
_LOG_AFTER = 10.0
_STALL_GRACE = 60.0
"""Seconds without progress of another process, beyond its own time limit with the storage: it is taken for stopped."""
_log = logging.getLogger(__name__)


class Fetcher:
    """Makes shards of one dataset present and verified in the cache.

    Args:
        url: where the dataset is published.
        place: its folder in the cache.
    """

    def __init__(self, url: str, place: CachedFolder) -> None:
        self.url, self.place = url, place
        self.storage = open_storage(url)
        self._stall = patience_from_environment() + _STALL_GRACE
        self._cancelled = False

    def cancel(self) -> None:
        """Make every call that waits, and every later one, raise CancelledError."""
        self._cancelled = True
        self.storage.cancel()

    def hold(self, shard: Shard) -> FileLock:
        """Return once the shard is on disk with the sha256 of the manifest; it stays until the lock is released.

        Raises:
            DatasetError: what is published is not what the manifest says.
            StorageError: the storage or the local disk fails, there is no room, or another process that fetches the
                shard makes no progress.
            CancelledError: `cancel` was called.
        """
        held = self.place.read_lock(shard).acquire(self._stall, shared=True)
        try:
            self._wait_for(shard)
        except BaseException:
            held.release()
            raise
        return held

    def _wait_for(self, shard: Shard) -> None:
        began = moved = time.monotonic()
        present, logged = -1, False
        while not self.place.is_verified(shard):
            if self._cancelled:
                raise CancelledError
            problem: StorageError | None = None
            try:
                claim = self.claim(shard, urgent=True)
            except NoRoomError as error:
                claim, problem = None, error
            if claim is not None:
                self.fetch(shard, claim)
                return
            now, before, present = time.monotonic(), present, self.place.present_bytes(shard)
            moved = moved if present == before else now
            if now - moved > self._stall:
                holder = self.place.fetch_lock(shard).holder()
                raise problem or StorageError(
                    f"{self.place.folder / shard.name}: {holder} fetches it and has stood still for "
                    f"{now - moved:.0f} s; is it stopped? End it, and start this again"
                )
            if not logged and now - began > _LOG_AFTER:
                logged = True
                _log.info("%s: waiting for %s", self.url, problem or shard.name)
            time.sleep(_PAUSE)

    def claim(self, shard: Shard, *, urgent: bool) -> FileLock | None:
        """The right to fetch a shard, and room for it; None if it is there, or another thread or process fetches it.

        Args:
            urgent: take the room of shards that others have fetched ahead, if need be.

        Raises:
            NoRoomError: no room for it now.
            StorageError: the local disk fails.
        """
        if self.place.is_verified(shard):
            self.place.will_need(shard)
            return None
        lock = self.place.fetch_lock(shard)
        if not lock.try_acquire():
            return None
        try:
            if not self.place.is_verified(shard):
                self.place.take_room(shard, urgent=urgent)
                return lock
            lock.release()
            return None
        except OSError as error:
            lock.release()
            raise disk_error(self.place.folder, error) from error
        except BaseException:
            lock.release()
            raise

    def fetch(self, shard: Shard, claim: FileLock) -> None:
        """Fetch a shard that was claimed.

        Raises:
            DatasetError, StorageError: as `hold`.
        """
        with claim:
            try:
                for name, size, sha256 in shard.files:
                    path = self.place.folder / name
                    if not _is_whole(path, size, sha256):
                        # A damaged file: the jobs that have it open keep the old one until they end.
                        path.unlink(missing_ok=True)
                        fetch(self.storage, name, path, size=size, sha256=sha256)
                self.place.mark_verified(shard)
            except OSError as error:
                raise disk_error(self.place.folder, error) from error
            finally:
                self.place.give_room_back(shard)


class Ahead:
    """Threads that fetch shards before they are needed, as far as there is room.

    Args:
        upcoming: the shards in the order in which they are needed, each with the place at which it is.
        reach: how far ahead of the reader's place to fetch.
    """

    def __init__(self, fetcher: Fetcher, upcoming: Iterator[tuple[int, Shard]], reach: int) -> None:
        self._fetcher, self._upcoming, self._reach = fetcher, upcoming, reach
        self.place = 0
        """The reader's."""
        self._turn = threading.Lock()
        self._stopped = threading.Event()
        for _ in range(PARALLEL):
            threading.Thread(target=self._work, name="md2-fetch", daemon=True).start()

    def stop(self) -> None:
        """End soon; what has come so far of a shard stays."""
        self._stopped.set()
        self._fetcher.storage.cancel()

    def _work(self) -> None:
        while not self._stopped.is_set():
            try:
                with self._turn:  # so that room is taken in the order of need
                    claimed = self._next()
                if claimed is None:
                    return
                self._fetcher.fetch(*claimed)
            except CancelledError:
                return
            except DatasetError as error:
                # Whoever needs the shard meets the same error; until then it may pass.
                _log.debug("fetching ahead: %s", error)
                self._stopped.wait(1.0)

    def _next(self) -> tuple[Shard, FileLock] | None:
        for place, shard in self._upcoming:
            while not self._stopped.is_set():
                if place <= self.place + self._reach:
                    try:
                        claim = self._fetcher.claim(shard, urgent=False)
                    except NoRoomError:
                        if place <= self.place:
                            break  # the reader is there already, and fetches it itself
                    else:
                        if claim is not None:
                            return shard, claim
                        break
                self._stopped.wait(_ROOM_PAUSE)
            if self._stopped.is_set():
                return None
        return None


def _is_whole(path: Path, size: int, sha256: str) -> bool:
    """Whether a file in the cache still is what was fetched."""
    try:
        return path.stat().st_size == size and sha256_file(path) == sha256
    except FileNotFoundError:
        return False
