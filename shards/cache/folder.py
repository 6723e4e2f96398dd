"""The verified local cache: shards fetched once per machine, and local from then on while there is room.

    CACHE/<manifest's sha256>/      a dataset as it was published, as far as its shards were needed
        dataset.json, train/000000.tar, train/000000.idx, …
        train/000000.tar.part       on its way; the next process continues from here
        .verified/train-000000      what the files looked like when their sha256 was last checked
        .claims/train-000000        bytes that a process is about to fetch
    CACHE/locks/                    file locks; the kernel frees them when a process dies

`MD2_CACHE` names the folder (default `~/.cache/md2`), `MD2_CACHE_LIMIT` the bytes it may hold (`200GB`; default: what
the disk has). Any number of processes and ranks may read one dataset at once: each shard is fetched by one of them.
Whoever reads a shard holds a shared lock on it, and a shard that is locked is never evicted. If room is needed, these
go, in this order: datasets that no process has open, the least recently used first; shards that a running process is
done with for this epoch; and, for a shard that a reader waits for, those that were fetched ahead, the latest first.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from shards.errors import StorageError, UsageError
from shards.files import CACHE_FOLDER, cache_folder, disk_errors, read_small, sweep, temporary
from shards.locks import FileLock
from shards.manifest import Shard

LIMIT_VARIABLE = "MD2_CACHE_LIMIT"
VERIFY_EVERY = 24 * 3600.0
"""Seconds after which a file's sha256 is computed again even if the file looks untouched (a disk may rot)."""
_SPARE = 64 << 20
"""Bytes of the disk that are left free."""
_LOCK_PATIENCE = 600.0
_ENDINGS = (".tar", ".idx", ".tar.part", ".idx.part")
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}

_log = logging.getLogger(__name__)
_in_use: dict[Path, FileLock] = {}
"""Datasets that this process has open: held until it ends."""


def parse_bytes(text: str) -> int:
    """`200GB`, `1.5 TiB`, `5000000`: bytes.

    Raises:
        ValueError: not a size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(I?)B?\s*", text.upper())
    if not match or (match[3] and not match[2]):
        raise ValueError(f"{text!r} is not a size such as 200GB")
    power = "KMGT".find(match[2]) + 1 if match[2] else 0
    return int(float(match[1]) * (1024**power if match[3] else _UNITS[match[2]]))


def format_bytes(count: float) -> str:
    """`5.2 GB`."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


class NoRoomError(StorageError):
    """The cache has no room now; there may be some when running jobs have finished with shards."""


@dataclass(frozen=True)
class Cache:
    """A cache folder and how many bytes it may hold (None: as many as the disk has)."""

    folder: Path
    limit: int | None = None

    @classmethod
    def from_environment(cls) -> Cache:
        """As `MD2_CACHE` and `MD2_CACHE_LIMIT` say.

        Raises:
            UsageError: the limit is not a size.
        """
        text = os.environ.get(LIMIT_VARIABLE)
        try:
            return cls(cache_folder(), parse_bytes(text) if text else None)
        except ValueError as error:
            raise UsageError(f"{LIMIT_VARIABLE}: {error}") from error

    def dataset(self, manifest_sha256: str) -> CachedFolder:
        """The place of one dataset, from now on in use by this process.

        Raises:
            StorageError: the cache folder cannot be written.
        """
        return CachedFolder(self, manifest_sha256[:32])

    def lock(self, name: str) -> FileLock:
        return FileLock(self.folder / "locks" / name)


class CachedFolder:
    """One dataset's folder in the cache."""

    def __init__(self, cache: Cache, identity: str) -> None:
        self.cache, self.identity = cache, identity
        self.folder = cache.folder / identity
        try:
            # What is in it may be private: nobody else of the machine may read it.
            cache.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._use()
            for name in (".verified", ".claims"):
                (self.folder / name).mkdir(mode=0o700, parents=True, exist_ok=True)
            (self.folder / ".used").touch()
            sweep(self.folder)
            for claim in (self.folder / ".claims").iterdir():
                _drop_if_left(cache, claim)
        except OSError as error:
            where = f"set {CACHE_FOLDER} to a folder that can be written"
            raise StorageError(f"{cache.folder}: no cache can be kept there ({error.strerror}); {where}") from error

    def _use(self) -> None:
        key = self.folder.absolute()
        if key not in _in_use:
            # Only eviction excludes a shared holder, and it is done with a folder in seconds.
            _in_use[key] = self.cache.lock(f"{self.identity}.use").acquire(_LOCK_PATIENCE, shared=True)

    def close(self) -> None:
        """Let the dataset be evicted again, before this process ends."""
        lock = _in_use.pop(self.folder.absolute(), None)
        if lock is not None:
            lock.release()

    def fetch_lock(self, shard: Shard) -> FileLock:
        """Held by the one who fetches the shard, or evicts it."""
        return self.cache.lock(f"{self.identity}.{_flat(shard.name)}")

    def read_lock(self, shard: Shard) -> FileLock:
        """Shared by all who read the shard; held by the one who evicts it."""
        return self.cache.lock(f"{self.identity}.{_flat(shard.name)}.read")

    def done_with(self, shard: Shard) -> None:
        """Note that a reader needs the shard no more in this epoch: it may be the first to go."""
        with suppress(FileNotFoundError):
            os.utime(self._stamp(shard), (0, 0))

    def will_need(self, shard: Shard) -> None:
        """Take back what `done_with` noted."""
        with suppress(FileNotFoundError):
            os.utime(self._stamp(shard))

    def is_verified(self, shard: Shard) -> bool:
        """Whether both files are there, untouched since their sha256 was checked, and that not long ago."""
        try:
            stamp = json.loads(read_small(self._stamp(shard)))
            age = time.time() - stamp["at"]
            return bool(0 <= age < VERIFY_EVERY and stamp["files"] == self._look(shard))
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return False

    def mark_verified(self, shard: Shard) -> None:
        """Note down what the files look like now; their sha256 has just been checked."""
        stamp = self._stamp(shard)
        tmp = temporary(stamp)
        tmp.write_text(json.dumps({"at": time.time(), "files": self._look(shard)}))
        tmp.replace(stamp)

    def _stamp(self, shard: Shard) -> Path:
        return self.folder / ".verified" / _flat(shard.name)

    def _look(self, shard: Shard) -> list[list[int]]:
        """Size, times of change and inode of both files. No program can set ctime back."""
        stats = [(self.folder / name).stat() for name in (shard.name, shard.index_name)]
        return [[s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino] for s in stats]

    def present_bytes(self, shard: Shard) -> int:
        """How many of the shard's bytes are on the disk already."""
        return sum(_size(self.folder / name) or _size(self.folder / f"{name}.part") for name, _, _ in shard.files)

    def take_room(self, shard: Shard, *, urgent: bool) -> None:
        """Evict what must go for the shard, and claim its room until `give_room_back`; the fetch lock is held.

        Raises:
            NoRoomError: too little can go.
        """
        wanted = shard.total_bytes
        with self.cache.lock("room").acquire(_LOCK_PATIENCE):
            make_room(self.cache, wanted - min(self.present_bytes(shard), wanted), urgent=urgent)
            self._claim(shard).write_text(str(wanted))

    def give_room_back(self, shard: Shard) -> None:
        """The shard has been fetched, or will not be."""
        self._claim(shard).unlink(missing_ok=True)

    def _claim(self, shard: Shard) -> Path:
        return self.folder / ".claims" / _flat(shard.name)


def _flat(name: str) -> str:
    return name.removesuffix(".tar").replace("/", "-")


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


@dataclass(frozen=True)
class Resident:
    """A dataset in the cache.

    Attributes:
        used: when it was last opened, seconds.
        idle: no process has it open.
        present: bytes on the disk.
        coming: bytes that running processes are about to add.
    """

    folder: Path
    used: float
    idle: bool
    present: int
    coming: int


def residents(cache: Cache) -> list[Resident]:
    """The datasets in the cache, the least recently used first."""
    found = []
    for folder in cache.folder.iterdir() if cache.folder.is_dir() else ():
        if re.fullmatch(r"[0-9a-f]{32}", folder.name):
            marker = folder / ".used"
            used = marker.stat().st_mtime if marker.exists() else 0.0
            sizes = _file_sizes(folder)
            idle = _is_free(cache.lock(f"{folder.name}.use"))
            coming = sum(_coming(cache, folder, claim, sizes) for claim in folder.glob(".claims/*"))
            found.append(Resident(folder, used, idle, sum(sizes.values()), coming))
    return sorted(found, key=lambda resident: resident.used)


def _file_sizes(folder: Path) -> dict[str, int]:
    """Bytes of each file of a dataset's parts. Of 10,000 shards they are looked up for every shard that is fetched."""
    found = {}
    for part in _entries(folder):
        if part.is_dir() and not part.name.startswith("."):
            for file in _entries(part):
                with suppress(FileNotFoundError):
                    found[f"{part.name}/{file.name}"] = file.stat().st_size
    return found


def _entries(folder: str | os.PathLike[str]) -> list[os.DirEntry[str]]:
    """What is in a folder; nothing if it is gone."""
    try:
        return list(os.scandir(folder))
    except FileNotFoundError:
        return []


def _coming(cache: Cache, folder: Path, claim: Path, sizes: dict[str, int]) -> int:
    """Bytes of a claim that are not there yet; none if the process that made it has ended."""
    if _drop_if_left(cache, claim):
        return 0
    stem = "/".join(claim.name.rsplit("-", 1))
    return max(0, _claimed_bytes(claim) - sum(sizes.get(stem + ending, 0) for ending in _ENDINGS))


def _drop_if_left(cache: Cache, claim: Path) -> bool:
    """Remove a claim whose process has ended, which freed the fetch lock; return whether it has."""
    with cache.lock(f"{claim.parents[1].name}.{claim.name}") as lock:
        left = lock.try_acquire()
        if left:
            claim.unlink(missing_ok=True)
    return left


def _claimed_bytes(claim: Path) -> int:
    try:
        return int(read_small(claim, 100))
    except (OSError, ValueError):  # just fetched; a full disk has cut the note short
        return 0


def make_room(cache: Cache, missing: int, *, urgent: bool) -> None:
    """Evict until `missing` more bytes fit; the caller holds the lock on the cache's room.

    Raises:
        NoRoomError: too little can go.
    """
    claimed = sum(map(_claimed_bytes, cache.folder.glob("*/.claims/*")))
    if cache.limit is None and missing + claimed + _SPARE <= shutil.disk_usage(cache.folder).free:
        return
    everyone = residents(cache)
    held, coming = sum(r.present for r in everyone), sum(r.coming for r in everyone)

    def lacking() -> int:
        """Bytes still to free. What running processes fetch counts as if it were there."""
        lack = missing + coming + _SPARE - shutil.disk_usage(cache.folder).free
        return lack if cache.limit is None else max(lack, held + coming + missing - cache.limit)

    going = _to_evict(cache, everyone, urgent)
    while lacking() > 0:
        freed = next(going, None)
        if freed is None:
            break
        held -= freed
    if lacking() > 0:
        limit = f"limit {format_bytes(cache.limit)} ({LIMIT_VARIABLE})" if cache.limit is not None else "no limit set"
        raise NoRoomError(
            f"{cache.folder}: no room for {format_bytes(missing)} more: {limit}, {format_bytes(held + coming)} are in "
            f"use by running jobs, the disk has {format_bytes(shutil.disk_usage(cache.folder).free)} free; set "
            f"{CACHE_FOLDER} to a larger disk or raise {LIMIT_VARIABLE}"
        )


def clear(cache: Cache) -> int:
    """Remove the datasets that no process has open; returns the bytes that this freed.

    Raises:
        StorageError: a file cannot be removed.
    """
    with disk_errors(cache.folder), cache.lock("room").acquire(_LOCK_PATIENCE):
        freed = sum(_evict_idle(cache, residents(cache)))
        _remove_locks(cache)
        return freed


def _evict_idle(cache: Cache, everyone: list[Resident]) -> Iterator[int]:
    for resident in everyone:
        lock = cache.lock(f"{resident.folder.name}.use")
        if resident.idle and lock.try_acquire():
            with lock:
                _log.info("evicting %s (%s) from the cache", resident.folder, format_bytes(resident.present))
                shutil.rmtree(resident.folder)
            _remove_locks(cache)
            yield resident.present


def _remove_locks(cache: Cache) -> None:
    """Remove the locks of datasets that are not in the cache any more."""
    for entry in _entries(cache.folder / "locks"):
        identity, dot, _ = entry.name.partition(".")
        if dot and not (cache.folder / identity).exists():
            cache.lock(entry.name).remove()


def _to_evict(cache: Cache, everyone: list[Resident], urgent: bool) -> Iterator[int]:
    """Evict one thing after the other, in the order that the module's docstring gives; yields the bytes of each."""
    yield from _evict_idle(cache, everyone)
    shards = []
    for resident in everyone:
        for entry in _entries(resident.folder / ".verified"):
            with suppress(FileNotFoundError):  # beside the stamps: those that are being written
                if entry.name.startswith("."):
                    continue
                shards.append((entry.stat().st_mtime, resident.folder, Path(entry.path)))
    done = [shard for shard in shards if shard[0] == 0]
    ahead = sorted((shard for shard in shards if shard[0] > 0), key=lambda shard: -shard[0])
    for _, folder, stamp in [*done, *(ahead if urgent else [])]:
        yield _evict(cache, folder, stamp)


def _evict(cache: Cache, folder: Path, stamp: Path) -> int:
    """Remove a shard unless a process reads or fetches it; how many bytes that freed."""
    fetching = cache.lock(f"{folder.name}.{stamp.name}")
    reading = cache.lock(f"{folder.name}.{stamp.name}.read")
    try:
        if not (fetching.try_acquire() and reading.try_acquire()):
            return 0
        stamp.unlink(missing_ok=True)
        part, number = stamp.name.rsplit("-", 1)
        paths = [folder / part / f"{number}{ending}" for ending in (".tar", ".idx")]
        freed = sum(map(_size, paths))
        for path in paths:
            path.unlink(missing_ok=True)
        return freed
    finally:
        reading.release()
        fetching.release()


def _is_free(lock: FileLock) -> bool:
    free = lock.try_acquire()
    lock.release()
    return free
