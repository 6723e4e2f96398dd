"""A dataset: packed into a folder, and opened from a folder or URL as files that DALI can read.

write_dataset(folder, {"train": samples, "val": others}, split=..., frames=[0, -1, 1], ...)
dataset = open_dataset("kitti_shards/eigen_zhou")
dataset.manifest, dataset.tars("train"), dataset.indexes("train")
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from shards.cache.download import disk_error
from shards.cache.fill import Filler, Progress
from shards.cache.folder import Cache
from shards.card import card
from shards.errors import DatasetError, StorageError
from shards.files import open_regular, write_atomic
from shards.manifest import CARD, MANIFEST, DepthInfo, JpegInfo, Manifest, Shard, Split
from shards.publish import require_manifest
from shards.sample import Codec, Sample
from shards.storage import is_local, local_path, open_storage
from shards.tar import MAX_INDEX_BYTES, ShardWriter, parse_index
from shards.version import __version__

SAMPLES_PER_SHARD = 1000
SHARD_BYTES = 256 << 20


def shard_name(part: str, number: int) -> str:
    """`train/000007.tar`."""
    return f"{part}/{number:06d}.tar"


def describe_components(counts: Mapping[str, int], samples: int) -> tuple[list[str], dict[str, int]]:
    """The manifest's `components` (in every sample) and `optional_components`, from how many samples have each."""
    every = sorted(name for name, count in counts.items() if count == samples)
    return every, {name: count for name, count in sorted(counts.items()) if count != samples}


def write_dataset(
    folder: Path,
    parts: Mapping[str, Iterable[Sample]],
    *,
    split: Split,
    frames: Sequence[int],
    stereo: bool,
    depth: DepthInfo | None,
    size: tuple[int, int] | None,
    codec: Codec,
    quality: int | None,
    jpeg: JpegInfo | None = None,
    seed: int,
    samples_per_shard: int = SAMPLES_PER_SHARD,
    shard_bytes: int = SHARD_BYTES,
    skipped: int = 0,
) -> Manifest:
    """Write samples, in the order they come, as a dataset in a local folder; `dataset.json` last.

    A shard ends after `samples_per_shard` samples or once it has `shard_bytes` bytes. The manifest's component
    lists are counted from the samples; the other arguments go into it as they are.

    Raises:
        DatasetError: the folder holds a dataset already, a part is empty or a key comes twice in it.
        ValueError: a sample that cannot be packed (see `ShardWriter.add`).
    """
    if (folder / MANIFEST).exists():
        raise DatasetError(f"{folder}: holds a dataset already; published shards are never overwritten")
    shards: list[Shard] = []
    counts: Counter[str] = Counter()
    for part, samples in parts.items():
        written, part_counts = _write_part(folder, part, samples, samples_per_shard, shard_bytes)
        shards += written
        counts += part_counts
    components, optional = describe_components(counts, sum(shard.samples for shard in shards))
    manifest = Manifest(
        md2_version=__version__,
        split=split,
        frames=list(frames),
        stereo=stereo,
        depth=depth,
        size=size,
        codec=codec,
        quality=quality,
        jpeg=jpeg,
        seed=seed,
        components=components,
        optional_components=optional,
        skipped=skipped,
        shards=shards,
    )
    write_atomic(folder / CARD, card(manifest).encode())
    write_atomic(folder / MANIFEST, manifest.to_json().encode())
    return manifest


def _write_part(
    folder: Path, part: str, samples: Iterable[Sample], samples_per_shard: int, shard_bytes: int
) -> tuple[list[Shard], Counter[str]]:
    """The part's shards, and how many of its samples have each component."""
    shards: list[Shard] = []
    counts: Counter[str] = Counter()
    keys: set[str] = set()
    writer: ShardWriter | None = None
    try:
        for sample in samples:
            if sample.key in keys:
                raise DatasetError(f"{folder}: sample key {sample.key!r} comes twice in part {part!r}")
            writer = writer or ShardWriter(folder / shard_name(part, len(shards)))
            writer.add(sample)
            keys.add(sample.key)
            counts.update(sample.components.keys())
            if writer.samples >= samples_per_shard or writer.bytes >= shard_bytes:
                shards.append(finish_shard(writer, part, len(shards)))
                writer = None
        if writer is not None:
            shards.append(finish_shard(writer, part, len(shards)))
            writer = None
    finally:
        if writer is not None:
            writer.abort()
    if not shards:
        raise DatasetError(f"{folder}: part {part!r} has no samples")
    return shards, counts


def finish_shard(writer: ShardWriter, part: str, number: int) -> Shard:
    """Close the writer; the manifest's entry for what it wrote."""
    info = writer.close()
    return Shard(
        name=shard_name(part, number),
        samples=info.samples,
        bytes=info.bytes,
        sha256=info.sha256,
        index_bytes=info.index_bytes,
        index_sha256=info.index_sha256,
    )


class LocalDataset:
    """A dataset whose files are on this machine, or come to it when a part is asked for.

    Attributes:
        url: where it was asked for.
        folder: where the names in `manifest.shards` are to be found.
        manifest: what it holds.
        manifest_sha256: of the bytes of `dataset.json`; names exactly this dataset.
    """

    def __init__(
        self, url: str, folder: Path, manifest: Manifest, manifest_sha256: str, filler: Filler | None = None
    ) -> None:
        self.url, self.folder = url, folder
        self.manifest, self.manifest_sha256 = manifest, manifest_sha256
        self._filler = filler
        self._checked: set[str] = set()

    def tars(self, part: str) -> list[Path]:
        """The part's tars in reading order, after a check of sizes, indexes and sample counts.

        The first call for a part of a remote dataset fetches what the cache lacks of it; every sha256 is checked then.

        Raises:
            DatasetError: no such part, a file is missing, or is not what the manifest says (DALI itself would
                silently read fewer samples).
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
        """The indexes, in the order of `tars`.

        Raises:
            DatasetError, StorageError: as `tars`.
        """
        return [tar.with_suffix(".idx") for tar in self.tars(part)]


def check_shard(folder: Path, shard: Shard) -> None:
    """Compare a shard's files with its manifest entry: the tar's size, the index's bytes and sample count.

    The tar's content is not read; `md2 shards verify` does that.

    Raises:
        DatasetError: naming the file that is missing or differs.
    """
    tar, index = folder / shard.name, folder / shard.index_name
    again = "pull or pack the dataset again"
    try:
        open_regular(tar).close()
        open_regular(index).close()
        tar_bytes, index_bytes = tar.stat().st_size, index.stat().st_size
        if tar_bytes != shard.bytes:
            raise DatasetError(f"{tar}: {tar_bytes} bytes, the manifest says {shard.bytes}; {again}")
        if index_bytes != shard.index_bytes or index_bytes > MAX_INDEX_BYTES:
            raise DatasetError(f"{index}: {index_bytes} bytes, the manifest says {shard.index_bytes}; {again}")
        data = index.read_bytes()
    except FileNotFoundError as error:
        raise DatasetError(f"{error.filename}: missing, though the manifest lists it; {again}") from error
    except OSError as error:
        raise StorageError(f"{error.filename}: cannot be read ({error.strerror or error})") from error
    if hashlib.sha256(data).hexdigest() != shard.index_sha256:
        raise DatasetError(f"{index}: its sha256 is not the manifest's; {again}")
    samples = parse_index(data, str(index))
    if len(samples) != shard.samples:
        raise DatasetError(f"{index}: {len(samples)} samples, the manifest says {shard.samples}; {again}")
    if any(entry.offset + entry.size > tar_bytes for entries in samples for entry in entries):
        raise DatasetError(f"{index}: points beyond the end of {tar.name}; {again}")


def open_dataset(url: str, *, cache: Cache | None = None, progress: Progress | None = None) -> LocalDataset:
    """Open a packed dataset: a folder in place, anything else through the verified local cache.

    Only the manifest is read here; `LocalDataset.tars` fetches a part when it is first asked for. From here on until
    this process ends, the cache does not evict the dataset.

    Args:
        url: folder, `s3://`, `gs://` or `http(s)://`.
        cache: where remote datasets are kept; None: as `MD2_CACHE` and `MD2_CACHE_LIMIT` say.
        progress: told about the bytes that come.

    Raises:
        DatasetError: nothing is there, it is not committed, or its manifest is broken.
        StorageError: the storage fails, or the cache cannot be written.
        UsageError: a kind of URL that md2 does not know.
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
