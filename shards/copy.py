"""Copying a finished dataset between folders and object storage: `md2 shards pull`, `push` and `copy`.

The copy is published like any other dataset: shard by shard, the manifest last and byte for byte the source's, nothing
overwritten. An interrupted copy goes on with what is missing, and within a shard where the bytes stopped if it goes to
a folder.
"""

from __future__ import annotations

import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from shards.cache.download import fetch
from shards.errors import DatasetError, StorageError
from shards.locks import FileLock
from shards.manifest import CARD, REPORT, Manifest, Shard
from shards.publish import SCRATCH, Store, open_store, require_manifest
from shards.storage import Storage, is_local, local_path, open_storage
from shards.storage.retry import CancelledError
from shards.stream import check_shard

Progress = Callable[[int, int], None]
"""Called with the bytes that are done and all bytes; from one thread at a time."""

PARALLEL = 4
"""Shards on their way at once; as many fit into the temporary folder at most."""
_MAX_TEXT_BYTES = 64 << 20
T = TypeVar("T")
Item = TypeVar("Item")


@dataclass(frozen=True)
class Copied:
    """What a copy did."""

    url: str
    """Where the dataset is now."""
    manifest: Manifest
    sent: int
    """Shards that were missing there."""
    found: int
    """Shards that were there from an earlier run, or another writer."""
    already: bool
    """The very same dataset was committed there before."""


class ByteCount:
    """Adds up the bytes of several threads for one progress callback."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self.total, self._progress = total, progress
        self._done = 0
        self._guard = threading.Lock()

    def advance(self, count: int) -> None:
        with self._guard:
            self._done += count
            if self._progress is not None:
                self._progress(self._done, self.total)


def shard_bytes(shards: list[Shard]) -> int:
    """Bytes of the shards' two files."""
    return sum(shard.bytes + shard.index_bytes for shard in shards)


def run_parallel(work: Callable[[Item], T], items: list[Item], storages: list[Storage], threads: int) -> list[T]:
    """`work` on every item, the results in order; the first failure ends the calls of all the others.

    Raises:
        Whatever `work` raised first.
    """
    first: list[BaseException] = []

    def guarded(item: Item) -> T:
        try:
            return work(item)
        except BaseException as error:
            if not isinstance(error, CancelledError):
                first.append(error)
            for storage in storages:
                storage.cancel()
            raise

    with ThreadPoolExecutor(threads) as pool:
        futures = [pool.submit(guarded, item) for item in items]
        try:
            return [future.result() for future in futures]
        except BaseException as error:
            for storage in storages:
                storage.cancel()
            pool.shutdown(cancel_futures=True)
            if first and first[0] is not error:
                raise first[0] from None
            raise


def copy_dataset(source_url: str, url: str, progress: Progress | None = None) -> Copied:
    """Publish at `url` what is published at `source_url`.

    Where `url` holds another dataset, the copy goes beside it (`…-v2`, see `shards.publish`).

    Args:
        progress: told about bytes.

    Raises:
        DatasetError: there is no dataset at the source, or its bytes are not what its manifest says.
        StorageError: either storage fails, or another dataset is being published at `url`.
        UsageError: `url` cannot be written.
    """
    source = open_storage(source_url)
    committed = require_manifest(source)
    manifest = committed.manifest
    store = open_store(url)
    receipts = store.begin_copy(committed)
    if store.published is not None:
        return Copied(store.url, manifest, 0, len(manifest.shards), already=True)
    missing = [s for s in manifest.shards if s.name not in receipts or receipts[s.name].shard != s]
    count = ByteCount(shard_bytes(manifest.shards), progress)
    count.advance(shard_bytes([s for s in manifest.shards if s not in missing]))
    sent = sum(_send(source_url, source, store, missing, count))
    for name in (CARD, REPORT):
        text = source.read(name, _MAX_TEXT_BYTES)
        if text is not None:
            store.put_text(name, _decoded(text, f"{source.url}/{name}"))
    store.commit(manifest)
    return Copied(store.url, manifest, sent, len(manifest.shards) - sent, already=False)


def _decoded(data: bytes, where: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise DatasetError(f"{where}: not UTF-8 text") from error


def _send(source_url: str, source: Storage, store: Store, shards: list[Shard], count: ByteCount) -> list[bool]:
    """Publish the shards; for each whether it had to be sent."""

    def from_folder(shard: Shard) -> bool:
        folder = local_path(source_url)
        check_shard(folder, shard)
        sent = store.put_shard(shard, folder / shard.name, folder / shard.index_name)
        count.advance(shard.bytes + shard.index_bytes)
        return sent

    def through(scratch: Path, shard: Shard) -> bool:
        tar, index = scratch / shard.name, scratch / shard.index_name
        for path, name, size, sha256 in (
            (index, shard.index_name, shard.index_bytes, shard.index_sha256),
            (tar, shard.name, shard.bytes, shard.sha256),
        ):
            fetch(source, name, path, size=size, sha256=sha256, advance=count.advance)
        return store.put_shard(shard, tar, index, move=True)

    if is_local(source_url):
        return run_parallel(from_folder, shards, [store.storage], PARALLEL)
    with _scratch(store) as scratch:
        return run_parallel(lambda shard: through(scratch, shard), shards, [source, store.storage], PARALLEL)


@contextmanager
def _scratch(store: Store) -> Iterator[Path]:
    """A folder for shards on their way: in the target if that is a folder (it stays for the next run to go on)."""
    if is_local(store.url):
        folder = local_path(store.url)
        lock = FileLock(folder / f"{SCRATCH}.lock")
        if not lock.try_acquire():
            raise StorageError(f"{folder}: {lock.holder()} is copying the same dataset to it; wait for it, or stop it")
        with lock:
            yield folder / SCRATCH
            if (folder / SCRATCH).exists():
                shutil.rmtree(folder / SCRATCH)  # all shards have left it; only empty folders are in it
    else:
        with tempfile.TemporaryDirectory(prefix="md2-copy-") as temporary:
            yield Path(temporary)
