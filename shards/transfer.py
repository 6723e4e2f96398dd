"""Copying a published dataset anywhere, and checking it byte by byte: `md2 shards pull|push|copy|verify`."""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from shards.cache.download import fetch
from shards.card import card
from shards.dataset import describe_components, read_index
from shards.errors import DatasetError, StorageError
from shards.files import open_regular, scratch_folder
from shards.locks import FileLock
from shards.manifest import CARD, MANIFEST, REPORT, Manifest, Shard
from shards.publish import SCRATCH, Committed, Store, open_store, plan_sha256, require_manifest
from shards.storage import Storage, is_local, local_path, open_storage
from shards.storage.local import local_error
from shards.storage.retry import CancelledError
from shards.stream import check_shard
from shards.tar import build_index, parse_index

Progress = Callable[[int, int], None]
"""Called with the bytes that are done and all bytes; from one thread at a time."""

PARALLEL = 4
"""Shards in transfer at once; the temporary folder holds at most as many."""
_MAX_TEXT_BYTES = 16 << 20
_GIVE_UP = 3
"""Storage failures in a row after which `verify` stops: the storage is down, not one object."""
_LICENCE = "## Licence\n\n"
T = TypeVar("T")
Item = TypeVar("Item")


@dataclass(frozen=True)
class Copied:
    """Result of a copy."""

    url: str
    """Where the dataset is now."""
    manifest: Manifest
    sent: int
    """Shards that were missing there."""
    found: int
    """Shards that were there already: from an earlier run, or from another writer."""
    already: bool
    """Whether exactly this dataset was committed there before."""


@dataclass(frozen=True)
class Broken:
    """A shard that differs from the manifest, or that cannot be read."""

    name: str
    problem: str


@dataclass(frozen=True)
class Verified:
    """Result of `verify`."""

    url: str
    manifest: Manifest
    broken: list[Broken]
    problems: list[str] = field(default_factory=list)
    """Errors in the manifest's totals, if every shard is sound."""

    @property
    def sound(self) -> bool:
        return not self.broken and not self.problems


class ByteCount:
    """Adds up the bytes of several threads for one progress callback."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self.total, self._progress = total, progress
        self._done = 0
        self._guard = threading.Lock()

    def advance(self, count: int) -> None:
        """Count more bytes; fewer than none if some must come again."""
        with self._guard:
            self._done += count
            if self._progress is not None:
                self._progress(self._done, self.total)


def shard_bytes(shards: list[Shard]) -> int:
    """Return the bytes of the shards' files, tars and indexes."""
    return sum(shard.bytes + shard.index_bytes for shard in shards)


def run_parallel(work: Callable[[Item], T], items: list[Item], storages: list[Storage], threads: int) -> list[T]:
    """Return `work` of every item, in order; the first failure cancels the calls of all others.

    Raises:
        Exception: the first that `work` raised.
    """
    first: list[BaseException] = []

    def cancel() -> None:
        for storage in storages:
            storage.cancel()

    def guarded(item: Item) -> T:
        try:
            return work(item)
        except BaseException as error:
            if not isinstance(error, CancelledError):
                first.append(error)
            cancel()
            raise

    with ThreadPoolExecutor(threads) as pool:
        futures = [pool.submit(guarded, item) for item in items]
        try:
            return [future.result() for future in futures]
        except BaseException as error:
            cancel()
            pool.shutdown(cancel_futures=True)
            if first and first[0] is not error:
                raise first[0] from None
            raise


def copy_dataset(
    source_url: str, url: str, progress: Progress | None = None, parts: Sequence[str] | None = None
) -> Copied:
    """Publish at `url` the dataset that is published at `source_url`.

    If `url` holds another dataset, the copy goes beside it (`…-v2`, see `shards.publish`).

    Args:
        source_url, url: folders or URLs.
        progress: called with the bytes done and all bytes.
        parts: copy only these; None: all.

    Raises:
        DatasetError: no dataset or part at the source, its bytes differ from its manifest, or a link in it leads out.
        StorageError: either storage fails, or another dataset is being published at `url`.
        UsageError: `url` cannot be written.
    """
    source = open_storage(source_url)
    committed = require_manifest(source)
    if parts is not None:
        committed = _select(source, committed, parts)
    manifest = committed.manifest
    if is_local(source_url):
        _refuse_links(local_path(source_url), manifest)
    store = open_store(url)
    receipts = store.begin_copy(committed)
    if store.published is not None:
        return Copied(store.url, manifest, 0, len(manifest.shards), already=True)
    missing = [s for s in manifest.shards if s.name not in receipts or receipts[s.name].shard != s]
    count = ByteCount(shard_bytes(manifest.shards), progress)
    count.advance(shard_bytes([s for s in manifest.shards if s not in missing]))
    sent = sum(_send(source_url, source, store, missing, count))
    for name in (CARD, REPORT):
        data = source.read(name, _MAX_TEXT_BYTES)
        if data is not None:
            text = _decoded(data, f"{source.url}/{name}")
            if name == CARD and parts is not None:
                text = card(manifest, licence=text.partition(_LICENCE)[2] or None)
            store.put_text(name, text)
    store.commit(manifest)
    return Copied(store.url, manifest, sent, len(manifest.shards) - sent, already=False)


def _select(source: Storage, committed: Committed, parts: Sequence[str]) -> Committed:
    """Return the manifest of some parts of a dataset: its component counts are those of their indexes."""
    manifest = committed.manifest
    if set(parts) == set(manifest.parts):
        return committed
    shards = [shard for part in dict.fromkeys(parts) for shard in manifest.part(part)]
    counts = Counter(entry.component for shard in shards for entries in read_index(source, shard) for entry in entries)
    every, optional = describe_components(counts, sum(shard.samples for shard in shards))
    plan = {"manifest_sha256": committed.sha256, "parts": sorted(set(parts))}
    changes = {"shards": shards, "components": every, "optional_components": optional}
    chosen = manifest.model_copy(update={**changes, "plan_sha256": plan_sha256(plan)})
    return Committed(chosen, chosen.to_json().encode())


def _refuse_links(folder: Path, manifest: Manifest) -> None:
    """Refuse a dataset with a link to elsewhere: whoever made it could have any file of this machine published."""
    root = folder.resolve()
    names = [name for shard in manifest.shards for name in (shard.name, shard.index_name)]
    for name in (MANIFEST, CARD, REPORT, *names):
        try:
            target = (folder / name).resolve()
        except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle, before Python 3.13
            raise DatasetError(f"{folder / name}: a link in a circle, or one that cannot be followed") from error
        if not target.is_relative_to(root):
            raise DatasetError(
                f"{folder / name}: a link that leads out of the dataset, to {target}; put the file itself there"
            )


def _decoded(data: bytes, where: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise DatasetError(f"{where}: not UTF-8 text") from error


def _send(source_url: str, source: Storage, store: Store, shards: list[Shard], count: ByteCount) -> list[bool]:
    """Publish the shards; return for each whether it had to be sent."""

    def from_folder(shard: Shard) -> bool:
        folder = local_path(source_url)
        check_shard(folder, shard)
        sent = store.put_shard(shard, folder / shard.name, folder / shard.index_name)
        count.advance(shard_bytes([shard]))
        return sent

    def through(scratch: Path, shard: Shard) -> bool:
        _bring(source, shard, scratch, count)
        return store.put_shard(shard, scratch / shard.name, scratch / shard.index_name, move=True)

    if is_local(source_url):
        return run_parallel(from_folder, shards, [store.storage], PARALLEL)
    with _scratch(store) as scratch:
        return run_parallel(lambda shard: through(scratch, shard), shards, [source, store.storage], PARALLEL)


def _bring(source: Storage, shard: Shard, folder: Path, count: ByteCount) -> None:
    """Fetch a shard's two files."""
    for name, size, sha256 in (
        (shard.index_name, shard.index_bytes, shard.index_sha256),
        (shard.name, shard.bytes, shard.sha256),
    ):
        fetch(source, name, folder / name, size=size, sha256=sha256, advance=count.advance)


@contextmanager
def _scratch(store: Store) -> Iterator[Path]:
    """A folder for shards in transfer: within a target folder, where the next run resumes them, or a temporary one."""
    if not is_local(store.url):
        with scratch_folder("md2-copy") as scratch:
            yield scratch
        return
    folder = local_path(store.url)
    lock = FileLock(folder / f"{SCRATCH}.lock")
    try:
        taken = lock.try_acquire()
    except OSError as error:
        raise local_error(folder, error) from error
    if not taken:
        raise StorageError(f"{folder}: {lock.holder()} is copying the same dataset to it; wait for it, or stop it")
    with lock:
        yield folder / SCRATCH
        shutil.rmtree(folder / SCRATCH, ignore_errors=True)  # all shards have left it; only empty folders are in it


def verify(url: str, progress: Progress | None = None) -> Verified:
    """Check every shard: both sha256, the index against the tar's headers, sample and component counts.

    A broken shard, or one that cannot be read, does not end the check. A remote dataset is fetched through a temporary
    folder, a few shards at a time.

    Raises:
        DatasetError: no dataset, or a broken manifest.
        StorageError: the storage or the local disk fails for several shards in a row.
    """
    storage = open_storage(url)
    manifest = require_manifest(storage).manifest
    count = ByteCount(shard_bytes(manifest.shards), progress)
    failures: list[StorageError] = []

    def judge(shard: Shard) -> Counter[str] | Broken:
        """Return how many samples have each component, or the problem."""
        try:
            if is_local(url):
                counts = _check(local_path(url), shard)
                count.advance(shard_bytes([shard]))
            else:
                with scratch_folder("md2-verify") as scratch:
                    _bring(storage, shard, scratch, count)
                    counts = _check(scratch, shard)
        except StorageError as error:
            failures.append(error)
            if len(failures) >= _GIVE_UP:
                raise
            return Broken(shard.name, str(error))
        except DatasetError as error:
            return Broken(shard.name, str(error))
        failures.clear()
        return counts

    results = run_parallel(judge, manifest.shards, [storage], PARALLEL)
    broken = [result for result in results if isinstance(result, Broken)]
    totals = sum((result for result in results if isinstance(result, Counter)), Counter[str]())
    return Verified(storage.url, manifest, broken, [] if broken else _compare_components(manifest, totals))


def _check(folder: Path, shard: Shard) -> Counter[str]:
    tar, index = folder / shard.name, folder / shard.index_name
    _check_file(tar, shard.bytes, shard.sha256)
    _check_file(index, shard.index_bytes, shard.index_sha256)
    data = index.read_bytes()
    samples = parse_index(data, str(index))
    if len(samples) != shard.samples:
        raise DatasetError(f"{index}: {len(samples)} samples, the manifest says {shard.samples}")
    if build_index(tar) != data:
        raise DatasetError(f"{index}: is not the index of {tar.name}")
    return Counter(entry.component for entries in samples for entry in entries)


def _check_file(path: Path, size: int, sha256: str) -> None:
    try:
        with open_regular(path) as file:
            found = os.fstat(file.fileno()).st_size
            if found != size:
                raise DatasetError(f"{path}: {found} bytes, the manifest says {size}")
            if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                raise DatasetError(f"{path}: its sha256 is not the manifest's")
    except FileNotFoundError as error:
        raise DatasetError(f"{path}: missing, though the manifest lists it") from error
    except OSError as error:
        raise DatasetError(f"{path}: cannot be read ({error.strerror or error})") from error


def _compare_components(manifest: Manifest, counts: Counter[str]) -> list[str]:
    every, optional = describe_components(counts, sum(shard.samples for shard in manifest.shards))
    if sorted(manifest.components) != every:
        return [f"every sample has {', '.join(every)}; the manifest says {', '.join(sorted(manifest.components))}"]
    if manifest.optional_components != optional:
        return [f"some samples have {optional}; the manifest says {manifest.optional_components}"]
    return []
