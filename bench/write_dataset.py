"""A dataset from samples in memory, without raw data: for benchmarks and tests."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from shards.card import card
from shards.dataset import SAMPLES_PER_SHARD, SHARD_BYTES, describe_components, shard_name
from shards.errors import DatasetError
from shards.files import write_atomic
from shards.manifest import CARD, MANIFEST, DepthInfo, JpegInfo, Manifest, Shard, Split
from shards.sample import Codec, Sample
from shards.tar import ShardWriter
from shards.version import __version__


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
    """Write samples, in the given order, as a dataset in a local folder; `dataset.json` last.

    A shard ends after `samples_per_shard` samples or once it has `shard_bytes` bytes. The manifest's component lists
    are counted from the samples; the other arguments go into it unchanged.

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
    """Return the part's shards, and how many of its samples have each component."""
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
                shards.append(writer.close())
                writer = None
        if writer is not None:
            shards.append(writer.close())
            writer = None
    finally:
        if writer is not None:
            writer.abort()
    if not shards:
        raise DatasetError(f"{folder}: part {part!r} has no samples")
    return shards, counts
