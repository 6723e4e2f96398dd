"""A dataset, opened from a folder or URL as local files that DALI can read.

dataset = open_dataset("kitti_shards/eigen_zhou")
dataset.manifest, dataset.tars("train"), dataset.indexes("train")
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from shards.cache.fill import PARALLEL, Fetcher
from shards.cache.folder import Cache, CachedFolder
from shards.files import disk_errors, write_atomic
from shards.locks import FileLock
from shards.manifest import MANIFEST, Manifest, Shard
from shards.parallel import run_threads
from shards.publish import require_manifest
from shards.storage import Storage, is_local, local_path, open_storage
from shards.stream import ShardStream, check_shard
from shards.tar import IndexEntry, check_index

SAMPLES_PER_SHARD = 1000
SHARD_BYTES = 256 << 20


def shard_name(part: str, number: int) -> str:
    """Return the name of a part's shard, such as `train/000007.tar`."""
    return f"{part}/{number:06d}.tar"


def describe_components(counts: Mapping[str, int], samples: int) -> tuple[list[str], dict[str, int]]:
    """Return the manifest's `components` (in every sample) and `optional_components`, from the count of each."""
    every = sorted(name for name, count in counts.items() if count == samples)
    return every, {name: count for name, count in sorted(counts.items()) if count != samples}


class LocalDataset:
    """A dataset whose files are on this machine, or are fetched when a part is first used.

    Attributes:
        url: where the dataset lies.
        folder: the names in `manifest.shards` are relative to it.
        manifest: the content of `dataset.json`.
        manifest_sha256: of the bytes of `dataset.json`; identifies exactly this dataset.
    """

    def __init__(
        self, url: str, folder: Path, manifest: Manifest, manifest_sha256: str, place: CachedFolder | None = None
    ) -> None:
        self.url, self.folder = url, folder
        self.manifest, self.manifest_sha256 = manifest, manifest_sha256
        self._place = place
        self._checked: set[str] = set()
        self._held: list[FileLock] = []

    def stream(self, part: str) -> ShardStream:
        """The part's shards, to be fetched and opened one by one as they are needed.

        Raises:
            DatasetError: no such part, or a file of a local dataset is missing or has another size.
            StorageError: a file that cannot be looked at.
        """
        fetcher = Fetcher(self.url, self._place) if self._place is not None else None
        return ShardStream(self.folder, self.manifest.part(part), fetcher)

    def tars(self, part: str) -> list[Path]:
        """Return the part's tars in reading order, after a check of sizes, indexes and sample counts.

        The first call for a part of a remote dataset fetches the shards that the cache lacks, and checks every sha256.
        They stay in the cache as long as this object does.

        Raises:
            DatasetError: no such part, or a file is missing or differs from the manifest (DALI itself would silently
                read fewer samples).
            StorageError: the storage fails, or the cache has no room.
        """
        shards = self.manifest.part(part)
        if part not in self._checked:
            if self._place is not None:
                self._hold(Fetcher(self.url, self._place), shards)
            for shard in shards:
                check_shard(self.folder, shard)
            self._checked.add(part)
        return [self.folder / shard.name for shard in shards]

    def _hold(self, fetcher: Fetcher, shards: list[Shard]) -> None:
        ShardStream(self.folder, shards, fetcher).require(len(shards))
        try:
            run_threads(lambda shard: self._held.append(fetcher.hold(shard)), shards, PARALLEL, fetcher.cancel)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let the cache evict what `tars` has fetched."""
        while self._held:
            self._held.pop().release()

    __del__ = close

    def indexes(self, part: str) -> list[Path]:
        """Return the indexes, in the order of `tars`.

        Raises:
            DatasetError, StorageError: as `tars`.
        """
        return [tar.with_suffix(".idx") for tar in self.tars(part)]


def read_index(storage: Storage, shard: Shard) -> list[list[IndexEntry]]:
    """Return the entries of a published shard's index, after a comparison with the manifest.

    Raises:
        DatasetError: it is missing, or differs from the manifest.
        StorageError: the storage fails.
    """
    where = f"{storage.url}/{shard.index_name}"
    return check_index(storage.read(shard.index_name, shard.index_bytes), shard, where)


def open_dataset(url: str, *, cache: Cache | None = None) -> LocalDataset:
    """Open a packed dataset: a folder in place, anything else through the verified local cache.

    Reads only the manifest; shards are fetched when they are needed.

    Args:
        url: folder, `s3://`, `gs://`, `hf://` or `http(s)://`.
        cache: where remote datasets are kept; None: as `MD2_CACHE` and `MD2_CACHE_LIMIT` say.

    Raises:
        DatasetError: no dataset, or a broken manifest.
        StorageError: the storage fails, or the cache cannot be written.
        UsageError: an unknown kind of URL.
    """
    storage = open_storage(url)
    found = require_manifest(storage)
    if is_local(url):
        return LocalDataset(url, local_path(url), found.manifest, found.sha256)
    place = (cache or Cache.from_environment()).dataset(found.sha256)
    with disk_errors(place.folder):
        write_atomic(place.folder / MANIFEST, found.data)
    return LocalDataset(storage.url, place.folder, found.manifest, found.sha256, place)
