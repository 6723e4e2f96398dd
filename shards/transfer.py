"""Copying a published dataset anywhere, and checking it byte by byte: `md2 shards pull|push|copy|verify`."""

from __future__ import annotations

import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from shards.cache.download import fetch
from shards.card import card, licence_of
from shards.dataset import describe_components, read_index
from shards.errors import DatasetError, StorageError, UsageError
from shards.files import disk_errors, read_small, scratch_folder, sha256_file
from shards.locks import FileLock
from shards.manifest import CARD, MANIFEST, REPORT, Manifest, Shard
from shards.parallel import run_threads
from shards.publish import SCRATCH, Committed, Store, plan_sha256, require_manifest
from shards.storage import Storage, is_local, local_path, open_storage
from shards.stream import check_index_file, check_shard, check_size
from shards.tar import IndexEntry, build_index

Progress = Callable[[int, int], None]
"""Called with the bytes that are done and all bytes; from one thread at a time."""

PARALLEL = 4
"""Shards in transfer at once; the temporary folder holds at most as many."""
_MAX_TEXT_BYTES = 16 << 20
_GIVE_UP = 3
"""Failures of a remote storage in a row after which `verify` stops: the storage is down, not one object."""


@dataclass(frozen=True)
class Copied:
    """Result of a copy.

    Attributes:
        url: where the dataset is now.
        sent: number of shards that were missing there; the others were there already.
        already: whether exactly this dataset was committed there before.
    """

    url: str
    manifest: Manifest
    sent: int
    already: bool


@dataclass(frozen=True)
class Verified:
    """Result of `verify`.

    Attributes:
        broken: the problem of each broken or unreadable shard, by its name; if all are sound, that of `dataset.json`.
    """

    url: str
    manifest: Manifest
    broken: dict[str, str]


def _counter(shards: list[Shard], progress: Progress | None) -> Callable[[int], None]:
    """Return a function that adds up bytes for the callback; it takes a negative number if some must come again."""
    total, done, guard = sum(shard.total_bytes for shard in shards), 0, threading.Lock()

    def advance(count: int) -> None:
        nonlocal done
        with guard:
            done += count
            if progress is not None:
                progress(done, total)

    return advance


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
        UsageError: `url` cannot be written, or lies inside another dataset.
    """
    source = open_storage(source_url)
    committed = require_manifest(source)
    if parts is not None:
        committed = _select(source, committed, parts)
    manifest = committed.manifest
    if is_local(source_url):
        _refuse_links(local_path(source_url), manifest)
    if is_local(url):
        if not local_path(url).resolve().name:
            raise UsageError(f"{url}: the root folder holds no dataset; name a folder in it")
        inside = next((p for p in local_path(url).resolve().parents[:2] if (p / MANIFEST).is_file()), None)
        if inside is not None:
            raise UsageError(f"{url} lies inside the dataset at {inside}: name another place")
    store = Store(url)
    receipts = store.begin({"manifest_sha256": committed.sha256}, committed)
    if store.published is not None:
        return Copied(store.url, manifest, 0, already=True)
    missing = [s for s in manifest.shards if s.name not in receipts or receipts[s.name].shard != s]
    advance = _counter(manifest.shards, progress)
    advance(sum(shard.total_bytes for shard in manifest.shards if shard not in missing))
    sent = sum(_send(source_url, source, store, missing, advance))
    for name in (CARD, REPORT):
        data = source.read(name, _MAX_TEXT_BYTES)
        if data is not None:
            text = _decoded(data, f"{source.url}/{name}")
            if name == CARD and parts is not None:
                text = card(manifest, licence=licence_of(text))
            store.put_text(name, text)
    store.commit(manifest)
    return Copied(store.url, manifest, sent, already=False)


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


def _send(
    source_url: str, source: Storage, store: Store, shards: list[Shard], advance: Callable[[int], None]
) -> list[bool]:
    """Publish the shards; return for each whether it had to be sent."""

    def cancel() -> None:
        source.cancel()
        store.storage.cancel()

    def from_folder(shard: Shard) -> bool:
        folder = local_path(source_url)
        check_shard(folder, shard)
        sent = store.put_shard(shard, folder / shard.name, folder / shard.index_name)
        advance(shard.total_bytes)
        return sent

    if is_local(source_url):
        return run_threads(from_folder, shards, PARALLEL, cancel)
    with _scratch(store) as scratch:

        def through_scratch(shard: Shard) -> bool:
            _bring(source, shard, scratch, advance)
            return store.put_shard(shard, scratch / shard.name, scratch / shard.index_name, move=True)

        return run_threads(through_scratch, shards, PARALLEL, cancel)


def _bring(source: Storage, shard: Shard, folder: Path, advance: Callable[[int], None]) -> None:
    """Fetch a shard's two files."""
    _all_of(
        partial(fetch, source, name, folder / name, size=size, sha256=sha256, advance=advance)
        for name, size, sha256 in shard.files
    )


def _all_of(steps: Iterable[Callable[[], object]]) -> None:
    """Run all steps, and then raise one error with the problems of all; a storage that fails ends it at once."""
    problems: list[str] = []
    for step in steps:
        try:
            step()
        except StorageError as error:
            raise StorageError("; ".join([*problems, str(error)])) from error
        except DatasetError as error:
            problems.append(str(error))
    if problems:
        raise DatasetError("; ".join(problems))


@contextmanager
def _scratch(store: Store) -> Iterator[Path]:
    """A folder for shards in transfer: within a target folder, where the next run resumes them, or a temporary one."""
    if not is_local(store.url):
        with scratch_folder("md2-copy") as scratch:
            yield scratch
        return
    folder = local_path(store.url)
    lock = FileLock(folder / f"{SCRATCH}.lock")
    with disk_errors(folder):
        taken = lock.try_acquire()
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
        StorageError: a remote storage or the local disk fails for several shards in a row.
    """
    storage = open_storage(url)
    manifest = require_manifest(storage).manifest
    advance = _counter(manifest.shards, progress)
    broken: dict[str, str] = {}
    failures: list[StorageError] = []

    def check(shard: Shard) -> Counter[str]:
        """Return how many samples have each component."""
        try:
            if is_local(url):
                counts = _check(local_path(url), shard)
                advance(shard.total_bytes)
            else:
                with scratch_folder("md2-verify") as scratch:
                    _bring(storage, shard, scratch, advance)
                    counts = _check(scratch, shard)
        except DatasetError as error:
            broken[shard.name] = str(error)
            if isinstance(error, StorageError) and not is_local(url):
                failures.append(error)
                if len(failures) >= _GIVE_UP:
                    raise StorageError(f"{error}; broken or unreadable so far: {', '.join(sorted(broken))}") from error
            return Counter()
        failures.clear()
        return counts

    counts = sum(run_threads(check, manifest.shards, PARALLEL, storage.cancel), Counter[str]())
    if not broken:
        every, optional = describe_components(counts, sum(shard.samples for shard in manifest.shards))
        if sorted(manifest.components) != every:
            broken[MANIFEST] = (
                f"every sample has {', '.join(every)}; the manifest says {', '.join(sorted(manifest.components))}"
            )
        elif manifest.optional_components != optional:
            broken[MANIFEST] = f"some samples have {optional}; the manifest says {manifest.optional_components}"
    return Verified(storage.url, manifest, dict(sorted(broken.items())))


def _check(folder: Path, shard: Shard) -> Counter[str]:
    tar, index = folder / shard.name, folder / shard.index_name
    samples: list[list[IndexEntry]] = []

    def check_tar() -> None:
        check_size(tar, shard.bytes)
        with disk_errors(tar):
            if sha256_file(tar) != shard.sha256:
                raise DatasetError(f"{tar}: its sha256 is not the manifest's")

    _all_of((check_tar, lambda: samples.extend(check_index_file(folder, shard))))
    if build_index(tar) != read_small(index, shard.index_bytes):
        raise DatasetError(f"{index}: is not the index of {tar.name}")
    return Counter(entry.component for entries in samples for entry in entries)
