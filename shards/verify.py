"""Checking a published dataset byte by byte against its manifest: `md2 shards verify`."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from shards.cache.download import fetch
from shards.copy import PARALLEL, ByteCount, Progress, run_parallel, shard_bytes
from shards.dataset import describe_components
from shards.errors import DatasetError, StorageError
from shards.files import open_regular, sha256_file
from shards.manifest import Manifest, Shard
from shards.publish import require_manifest
from shards.storage import is_local, local_path, open_storage
from shards.tar import build_index, parse_index


@dataclass(frozen=True)
class Broken:
    """A shard that differs from the manifest, or that cannot be read."""

    name: str
    problem: str


@dataclass(frozen=True)
class Verified:
    """What `verify` found."""

    url: str
    manifest: Manifest
    broken: list[Broken]
    problems: list[str] = field(default_factory=list)
    """What is wrong with the manifest's totals where every shard is sound."""

    @property
    def sound(self) -> bool:
        return not self.broken and not self.problems


def verify(url: str, progress: Progress | None = None) -> Verified:
    """Check every shard: both sha256, the index against the tar's headers, sample and component counts.

    A remote dataset is fetched through a temporary folder, a few shards at a time; nothing stays there.

    Raises:
        DatasetError: no dataset, or a manifest that cannot be read.
        StorageError: the storage or the local disk fails.
    """
    storage = open_storage(url)
    manifest = require_manifest(storage).manifest
    count = ByteCount(shard_bytes(manifest.shards), progress)

    def local(shard: Shard) -> Counter[str] | Broken:
        result = _judge(local_path(url), shard)
        count.advance(shard_bytes([shard]))
        return result

    def remote(shard: Shard) -> Counter[str] | Broken:
        with tempfile.TemporaryDirectory(prefix="md2-verify-") as scratch:
            return _judge(Path(scratch), shard, lambda: _bring(Path(scratch), shard))

    def _bring(scratch: Path, shard: Shard) -> None:
        for name, size, sha256 in (
            (shard.index_name, shard.index_bytes, shard.index_sha256),
            (shard.name, shard.bytes, shard.sha256),
        ):
            fetch(storage, name, scratch / name, size=size, sha256=sha256, advance=count.advance)

    results = run_parallel(local if is_local(url) else remote, manifest.shards, [storage], PARALLEL)
    broken = [result for result in results if isinstance(result, Broken)]
    counts = sum((result for result in results if isinstance(result, Counter)), Counter[str]())
    return Verified(storage.url, manifest, broken, [] if broken else _compare_components(manifest, counts))


def _judge(folder: Path, shard: Shard, bring: Callable[[], None] | None = None) -> Counter[str] | Broken:
    """How many samples have each component, or what is wrong."""
    try:
        if bring is not None:
            bring()
        return _check(folder, shard)
    except DatasetError as error:
        return Broken(shard.name, str(error))


def _check(folder: Path, shard: Shard) -> Counter[str]:
    tar, index = folder / shard.name, folder / shard.index_name
    for path, size, sha256 in (
        (tar, shard.bytes, shard.sha256),
        (index, shard.index_bytes, shard.index_sha256),
    ):
        _check_file(path, size, sha256)
    data = index.read_bytes()
    samples = parse_index(data, str(index))
    if len(samples) != shard.samples:
        raise DatasetError(f"{index}: {len(samples)} samples, the manifest says {shard.samples}")
    if hashlib.sha256(build_index(tar)).digest() != hashlib.sha256(data).digest():
        raise DatasetError(f"{index}: is not the index of {tar.name}")
    return Counter(entry.component for entries in samples for entry in entries)


def _check_file(path: Path, size: int, sha256: str) -> None:
    try:
        with open_regular(path) as file:
            found = os.fstat(file.fileno()).st_size
        if found != size:
            raise DatasetError(f"{path}: {found} bytes, the manifest says {size}")
        if sha256_file(path) != sha256:
            raise DatasetError(f"{path}: its sha256 is not the manifest's")
    except FileNotFoundError as error:
        raise DatasetError(f"{path}: missing, though the manifest lists it") from error
    except OSError as error:
        raise StorageError(f"{path}: {error.strerror or error}") from error


def _compare_components(manifest: Manifest, counts: Counter[str]) -> list[str]:
    every, optional = describe_components(counts, sum(shard.samples for shard in manifest.shards))
    if sorted(manifest.components) != every:
        return [f"every sample has {', '.join(every)}; the manifest says {', '.join(sorted(manifest.components))}"]
    if manifest.optional_components != optional:
        return [f"some samples have {optional}; the manifest says {manifest.optional_components}"]
    return []
