"""The verified local cache: a dataset's shards fetched once per machine, and local from then on.

    CACHE/<manifest's sha256>/      a dataset as it was published, as far as its parts were asked for
        dataset.json, train/000000.tar, train/000000.idx, …
        train/000000.tar.part       on its way; whoever comes next goes on from here
        .verified/train-000000      what the files looked like when their sha256 was last checked
    CACHE/locks/                    file locks; the kernel frees them when a process dies

`MD2_CACHE` names the folder (default `~/.cache/md2`), `MD2_CACHE_LIMIT` the bytes it may hold (`200GB`; default: what
the disk has). Any number of processes and ranks may open one dataset at once: each shard is fetched by one of them,
and they share the work. Where room is needed, the datasets that were not used for longest go, whole, but never
one that a running process has open.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from shards.cache.download import disk_error
from shards.errors import StorageError, UsageError
from shards.files import CACHE_FOLDER, cache_folder
from shards.locks import FileLock
from shards.manifest import Shard

LIMIT_VARIABLE = "MD2_CACHE_LIMIT"
VERIFY_EVERY = 24 * 3600.0
"""Seconds after which a file's sha256 is computed again even if the file looks untouched (a disk may rot)."""
_SPARE = 64 << 20
"""Bytes of the disk that are left free."""
_LOCK_PATIENCE = 600.0
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}

_log = logging.getLogger(__name__)
_in_use: dict[Path, FileLock] = {}
"""Datasets that this process has open: held until it ends, for DALI reads the files for as long as it likes."""


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
            self._use()
            (self.folder / ".verified").mkdir(parents=True, exist_ok=True)
            (self.folder / ".used").touch()
        except OSError as error:
            where = f"set {CACHE_FOLDER} to a folder that can be written"
            raise StorageError(f"{cache.folder}: no cache can be kept there ({error.strerror}); {where}") from error

    def _use(self) -> None:
        key = self.folder.absolute()
        if key in _in_use:
            return
        lock = self.cache.lock(f"{self.identity}.use")
        if lock.try_acquire():  # nobody else has it open: what earlier jobs wanted does not count any more
            with lock:
                for wanted in self.folder.glob(".wanted-*"):
                    wanted.unlink()
        # Only eviction excludes a shared holder, and it is done with a folder in seconds.
        _in_use[key] = lock.acquire(_LOCK_PATIENCE, shared=True)

    def close(self) -> None:
        """Let the dataset be evicted again, before this process ends."""
        lock = _in_use.pop(self.folder.absolute(), None)
        if lock is not None:
            lock.release()

    def shard_lock(self, shard: Shard) -> FileLock:
        """Held by the one who fetches the shard."""
        return self.cache.lock(f"{self.identity}.{_flat(shard)}")

    def is_verified(self, shard: Shard) -> bool:
        """Whether both files are there, untouched since their sha256 was checked, and that not long ago."""
        try:
            stamp = json.loads(self._stamp(shard).read_bytes())
            age = time.time() - stamp["at"]
            return bool(0 <= age < VERIFY_EVERY and stamp["files"] == self._look(shard))
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def mark_verified(self, shard: Shard) -> None:
        """Note down what the files look like now; their sha256 has just been checked."""
        stamp = self._stamp(shard)
        tmp = stamp.with_name(f"{stamp.name}.{os.getpid()}.tmp")
        tmp.write_text(json.dumps({"at": time.time(), "files": self._look(shard)}))
        tmp.replace(stamp)

    def _stamp(self, shard: Shard) -> Path:
        return self.folder / ".verified" / _flat(shard)

    def _look(self, shard: Shard) -> list[list[int]]:
        """Size, times of change and inode of both files. No program can set ctime back."""
        stats = [(self.folder / name).stat() for name in (shard.name, shard.index_name)]
        return [[s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino] for s in stats]

    def present_bytes(self, shard: Shard) -> int:
        """How many of the shard's bytes are on the disk already."""
        return sum(_size(self.folder / name) or _size(self.folder / f"{name}.part") for name in _files(shard))

    def reserve(self, part: str, shards: list[Shard]) -> None:
        """Make sure the shards fit, and that nobody else takes their room.

        Raises:
            StorageError: they do not fit, even without all that no process uses.
        """
        total = sum(shard.bytes + shard.index_bytes for shard in shards)
        missing = total - sum(min(self.present_bytes(s), s.bytes + s.index_bytes) for s in shards)
        with self.cache.lock("room").acquire(_LOCK_PATIENCE):
            try:
                others = sum(count for name, count in _coming(self.folder).items() if name != part)
                make_room(self.cache, self.identity, missing + others)
                (self.folder / f".wanted-{part}").write_text(str(total))
            except OSError as error:
                raise disk_error(self.folder, error) from error


def _files(shard: Shard) -> tuple[str, str]:
    return shard.name, shard.index_name


def _flat(shard: Shard) -> str:
    return shard.name.removesuffix(".tar").replace("/", "-")


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


@dataclass(frozen=True)
class _Resident:
    """A dataset in the cache, as it counts against the limit."""

    folder: Path
    used: float
    present: int
    """Bytes on the disk."""
    coming: int
    """Bytes that are still to come of the parts that were asked for."""


def _present(folder: Path) -> int:
    return sum(_size(path) for path in folder.rglob("*") if path.suffix in (".tar", ".idx", ".part"))


def _coming(folder: Path) -> dict[str, int]:
    """Bytes still to come of each part that was asked for."""
    coming = {}
    for path in folder.glob(".wanted-*"):
        try:
            wanted = int(path.read_text())
        except (FileNotFoundError, ValueError):  # a job that begins has removed it; a full disk has cut it short
            continue
        part = path.name.removeprefix(".wanted-")
        coming[part] = max(wanted - _present(folder / part), 0)
    return coming


def residents(cache: Cache) -> list[_Resident]:
    """The datasets in the cache, the one that was not used for longest first."""
    found = []
    for folder in cache.folder.iterdir():
        if re.fullmatch(r"[0-9a-f]{32}", folder.name):
            marker = folder / ".used"
            used = marker.stat().st_mtime if marker.exists() else 0.0
            found.append(_Resident(folder, used, _present(folder), sum(_coming(folder).values())))
    return sorted(found, key=lambda resident: resident.used)


def make_room(cache: Cache, identity: str, missing: int) -> None:
    """Evict until `missing` more bytes fit; the caller holds the lock on the cache's room."""
    everyone = residents(cache)
    others = [resident for resident in everyone if resident.folder.name != identity]
    own = sum(resident.present for resident in everyone if resident.folder.name == identity)
    idle = {resident.folder for resident in others if not _busy(cache, resident)}

    def lacking() -> int:
        """Bytes to free still. What a running process is still fetching counts as if it were there."""
        coming = sum(resident.coming for resident in others if resident.folder not in idle)
        lack = missing + coming + _SPARE - shutil.disk_usage(cache.folder).free
        if cache.limit is not None:
            held = own + sum(resident.present for resident in others)
            lack = max(lack, held + coming + missing - cache.limit)
        return lack

    for resident in list(others):
        if lacking() <= 0:
            return
        if resident.folder in idle and _evict(cache, resident):
            others.remove(resident)
    if lacking() > 0:
        limit = f"limit {format_bytes(cache.limit)} ({LIMIT_VARIABLE})" if cache.limit is not None else "no limit set"
        busy = sum(resident.present + resident.coming for resident in others)
        raise StorageError(
            f"{cache.folder}: no room for {format_bytes(missing)} more: {limit}, {format_bytes(own)} of this dataset "
            f"are there, {format_bytes(busy)} are in use by running jobs, the disk has "
            f"{format_bytes(shutil.disk_usage(cache.folder).free)} free; set {CACHE_FOLDER} to a larger disk or "
            f"raise {LIMIT_VARIABLE}"
        )


def _busy(cache: Cache, resident: _Resident) -> bool:
    lock = cache.lock(f"{resident.folder.name}.use")
    free = lock.try_acquire()
    lock.release()
    return not free


def _evict(cache: Cache, resident: _Resident) -> bool:
    """Remove a dataset unless a process uses it (or has just begun to)."""
    lock = cache.lock(f"{resident.folder.name}.use")
    if not lock.try_acquire():
        return False
    with lock:
        _log.info("evicting %s (%s) from the cache", resident.folder, format_bytes(resident.present))
        shutil.rmtree(resident.folder)
    return True
