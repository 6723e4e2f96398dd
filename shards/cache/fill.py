"""Filling the cache: several shards at once, shared between all processes of the machine that want them."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from shards.cache.download import disk_error, fetch
from shards.cache.folder import CachedFolder, format_bytes
from shards.errors import StorageError
from shards.files import sha256_file
from shards.manifest import Shard
from shards.storage import open_storage
from shards.storage.retry import CancelledError, patience_from_environment

Progress = Callable[[int, int], None]
"""Called with the bytes that are there and all bytes that are wanted; from one thread at a time."""

PARALLEL = 8
"""Shards fetched or checked at once by one process."""
_PAUSE = 0.05
_TELL_FIRST, _TELL_EVERY = 2.0, 10.0
_log = logging.getLogger(__name__)
_STALL_GRACE = 60.0
"""Seconds that another process's fetch may stand still, beyond its own patience with the storage."""


class Filler:
    """Makes shards of one dataset present and verified in the cache.

    Args:
        url: where the dataset is published.
        place: its folder in the cache.
        progress: told about bytes.
    """

    def __init__(self, url: str, place: CachedFolder, progress: Progress | None = None) -> None:
        self.url, self.place = url, place
        self._progress = progress
        self._patience = patience_from_environment()

    def fill(self, part: str, shards: list[Shard]) -> None:
        """Return once all of `shards` are on disk, each with the sha256 of the manifest.

        Raises:
            DatasetError: what is published is not what the manifest says.
            StorageError: the storage or the local disk fails, there is no room, or another process that is to fetch
                a shard stands still.
        """
        if all(self.place.is_verified(shard) for shard in shards):
            return
        self.place.reserve(part, shards)
        run = _Run(self, shards)
        began = time.monotonic()
        run.run()
        if run.fetched:
            took = time.monotonic() - began
            rate = format_bytes(run.fetched / max(took, 1e-3))
            _log.info("%s: %s fetched in %.1f s (%s/s)", self.url, format_bytes(run.fetched), took, rate)


class _Run:
    """One filling: a queue of shards and the threads that work it off."""

    def __init__(self, filler: Filler, shards: list[Shard]) -> None:
        self.place, self.progress = filler.place, filler._progress
        self.storage = open_storage(filler.url)
        self.stall = filler._patience + _STALL_GRACE
        # Each process begins elsewhere, so that ranks share the work instead of queueing for the first shard.
        start = os.getpid() % len(shards)
        self.queue = deque(shards[start:] + shards[:start])
        self.total = sum(shard.bytes + shard.index_bytes for shard in shards)
        self.done = 0
        self.fetched = 0
        self.url, self.told = filler.url, time.monotonic() - _TELL_EVERY + _TELL_FIRST
        self.guard = threading.Lock()
        self.stopped = threading.Event()
        self.watch: dict[str, tuple[int, float]] = {}

    def run(self) -> None:
        with ThreadPoolExecutor(PARALLEL) as pool:
            workers = [pool.submit(self._work) for _ in range(min(PARALLEL, len(self.queue)))]
            try:
                for worker in workers:
                    worker.result()
            except BaseException as error:
                self._stop()
                if isinstance(error, CancelledError):  # another worker's failure is the cause
                    raise next(filter(None, (_failure(worker.exception()) for worker in workers)), error) from None
                raise

    def _stop(self) -> None:
        self.stopped.set()
        self.storage.cancel()

    def _work(self) -> None:
        try:
            while not self.stopped.is_set():
                with self.guard:
                    if not self.queue:
                        return
                    shard = self.queue.popleft()
                if not self._settle(shard):
                    with self.guard:
                        self.queue.append(shard)
                    time.sleep(_PAUSE)
        except BaseException:
            self._stop()
            raise

    def _settle(self, shard: Shard) -> bool:
        """Whether the shard is there and verified now; False while another process fetches it."""
        if self.place.is_verified(shard):
            self._advance(shard.bytes + shard.index_bytes)
            return True
        lock = self.place.shard_lock(shard)
        try:
            if not lock.try_acquire():
                self._check_stalled(shard, lock.holder())
                return False
            with lock:
                if self.place.is_verified(shard):
                    self._advance(shard.bytes + shard.index_bytes)
                else:
                    self._get(shard)
        except OSError as error:
            raise disk_error(self.place.folder, error) from error
        return True

    def _get(self, shard: Shard) -> None:
        files = ((shard.index_name, shard.index_bytes, shard.index_sha256), (shard.name, shard.bytes, shard.sha256))
        for name, size, sha256 in files:
            path = self.place.folder / name
            if _is_whole(path, size, sha256):
                self._advance(size)
            else:
                # A damaged file: the jobs that have it open keep the old one until they end.
                path.unlink(missing_ok=True)
                fetch(self.storage, name, path, size=size, sha256=sha256, advance=self._came)
        self.place.mark_verified(shard)

    def _check_stalled(self, shard: Shard, holder: str) -> None:
        """Raise if the process that fetches the shard has not got on for long."""
        now, present = time.monotonic(), self.place.present_bytes(shard)
        with self.guard:
            before, since = self.watch.get(shard.name, (-1, now))
            if before != present:
                self.watch[shard.name] = present, now
            elif now - since > self.stall:
                raise StorageError(
                    f"{self.place.folder / shard.name}: {holder} is to fetch it and has stood still for "
                    f"{now - since:.0f} s; is it stopped? End it, and start this again"
                )

    def _came(self, count: int) -> None:
        """Bytes that came from the storage, as against those that were on the disk."""
        with self.guard:
            self.fetched += count
        self._advance(count)

    def _advance(self, count: int) -> None:
        with self.guard:
            self.done += count
            if self.fetched and time.monotonic() - self.told > _TELL_EVERY:
                self.told = time.monotonic()
                have, total = format_bytes(self.done), format_bytes(self.total)
                _log.info("%s: fetching into %s, %s of %s", self.url, self.place.folder, have, total)
            if self.progress is not None:
                self.progress(self.done, self.total)


def _failure(error: BaseException | None) -> BaseException | None:
    return None if isinstance(error, CancelledError) else error


def _is_whole(path: Path, size: int, sha256: str) -> bool:
    """Whether a file in the cache still is what was fetched."""
    try:
        return path.stat().st_size == size and sha256_file(path) == sha256
    except FileNotFoundError:
        return False
