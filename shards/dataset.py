"""A dataset, opened from a folder or URL as local files that DALI can read.

dataset = open_dataset("kitti_shards/eigen_zhou")
dataset.manifest, dataset.tars("train"), dataset.indexes("train")
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from shards.cache.download import disk_error
from shards.cache.fill import Filler, Progress
from shards.cache.folder import Cache
from shards.files import write_atomic
from shards.manifest import MANIFEST, Manifest
from shards.publish import require_manifest
from shards.storage import is_local, local_path, open_storage
from shards.stream import ShardStream, check_shard

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
        self, url: str, folder: Path, manifest: Manifest, manifest_sha256: str, filler: Filler | None = None
    ) -> None:
        self.url, self.folder = url, folder
        self.manifest, self.manifest_sha256 = manifest, manifest_sha256
        self._filler = filler
        self._checked: set[str] = set()

    def stream(self, part: str) -> ShardStream:
        """The part's shards, to be opened one by one as they are needed.

        Raises:
            DatasetError, StorageError: as `tars`.
        """
        shards = self.manifest.part(part)
        if self._filler is not None:
            self._filler.fill(part, shards)
        return ShardStream(self.folder, shards)

    def tars(self, part: str) -> list[Path]:
        """Return the part's tars in reading order, after a check of sizes, indexes and sample counts.

        The first call for a part of a remote dataset fetches the shards that the cache lacks, and checks every sha256.

        Raises:
            DatasetError: no such part, or a file is missing or differs from the manifest (DALI itself would silently
                read fewer samples).
            StorageError: the storage fails, or the cache has no room.
        """
        shards = self.manifest.part(part)
        if part not in self._checked:
            if self._filler is not None:
                self._filler.fill(part, shards)
            for shard in shards:
                check_shard(self.folder, shard)
            self._checked.add(part)
        return [self.folder / shard.name for shard in shards]

    def indexes(self, part: str) -> list[Path]:
        """Return the indexes, in the order of `tars`.

        Raises:
            DatasetError, StorageError: as `tars`.
        """
        return [tar.with_suffix(".idx") for tar in self.tars(part)]


def open_dataset(url: str, *, cache: Cache | None = None, progress: Progress | None = None) -> LocalDataset:
    """Open a packed dataset: a folder in place, anything else through the verified local cache.

    Reads only the manifest; `LocalDataset.tars` fetches a part when it is first used. The cache does not evict the
    dataset until this process ends.

    Args:
        url: folder, `s3://`, `gs://` or `http(s)://`.
        cache: where remote datasets are kept; None: as `MD2_CACHE` and `MD2_CACHE_LIMIT` say.
        progress: called with the bytes fetched so far and all bytes.

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
    try:
        write_atomic(place.folder / MANIFEST, found.data)
    except OSError as error:
        raise disk_error(place.folder, error) from error
    return LocalDataset(storage.url, place.folder, found.manifest, found.sha256, Filler(storage.url, place, progress))
