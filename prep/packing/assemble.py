"""From encoded frames to shards: samples in shuffled order, cut into shards, their bytes copied together."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from prep.packing.encode import SCRATCH_ADVICE, Extent, read_chunk
from prep.packing.plan import PackingPlan, PlannedSample, Skipped, component_sources
from prep.raw.kitti import Drive
from prep.raw.splits import CameraSide
from prep.raw.text import printable
from shards.dataset import SAMPLES_PER_SHARD, shard_name
from shards.errors import DatasetError, StorageError
from shards.manifest import Shard
from shards.publish import Store
from shards.sample import (
    DEPTH,
    INTRINSICS,
    META,
    STEREO_TRANSLATION,
    Sample,
    image_component,
    image_extension,
)
from shards.tar import ShardWriter

SHARD_SPEC = "spec"
"""Name in a shard's receipt of the hash of what went into it."""
_BLOCK = 512


Key = tuple[str, int, CameraSide]
"""Drive, frame, side."""


@dataclass
class Encoded:
    """All encoded files of a plan: where they lie, native (width, height) of images, and what is broken."""

    images: dict[Key, Extent] = field(default_factory=dict)
    native: dict[Key, tuple[int, int]] = field(default_factory=dict)
    depth: dict[Key, Extent] = field(default_factory=dict)
    broken: dict[tuple[str, str, int, CameraSide], str] = field(default_factory=dict)

    def add(self, drive: str, folder: Path, name: str) -> None:
        """Take in a finished chunk.

        Raises:
            DatasetError: it is gone, or damaged.
        """
        chunk = read_chunk(folder / name)
        if chunk is None:
            raise DatasetError(f"{folder / name}: scratch file is gone or damaged; run the same command again")
        for label, extent in chunk.files.items():
            kind, key = _key(label, drive)
            (self.images if kind == "image" else self.depth)[key] = extent
        self.native |= {_key(label, drive)[1]: size for label, size in chunk.sizes.items()}
        for label, message in chunk.broken.items():
            kind, key = _key(label, drive)
            self.broken[kind, *key] = message


def _key(label: str, drive: str) -> tuple[str, Key]:
    kind, frame, side = label.split(" ")
    return kind, (drive, int(frame), "l" if side == "l" else "r")


@dataclass(frozen=True)
class SampleJob:
    """One sample: its small components' bytes, and where the encoded ones lie."""

    key: str
    small: dict[str, bytes]
    encoded: dict[str, Extent]

    @property
    def tar_bytes(self) -> int:
        """Bytes that it takes in a tar."""
        sizes = [len(data) for data in self.small.values()] + [extent.size for extent in self.encoded.values()]
        return sum(_BLOCK + -(-size // _BLOCK) * _BLOCK for size in sizes)


@dataclass(frozen=True)
class ShardJob:
    """One shard: what goes into it, from which scratch folder, to which store."""

    part: str
    number: int
    samples: list[SampleJob]
    folder: Path
    store: Store

    @property
    def name(self) -> str:
        return shard_name(self.part, self.number)

    @property
    def spec(self) -> str:
        """Hash of everything that goes into the shard."""
        digest = hashlib.sha256()
        for sample in self.samples:
            digest.update(sample.key.encode())
            for name, data in sorted(sample.small.items()):
                digest.update(f" {name} ".encode() + data)
            for name, extent in sorted(sample.encoded.items()):
                digest.update(f" {name} {extent.size} {extent.crc}".encode())
        return digest.hexdigest()


def write_shard(job: ShardJob) -> Shard:
    """Pack a shard in the scratch folder, hand it to the store, remove it from scratch. Runs in a worker.

    Raises:
        StorageError: scratch or store cannot be written.
        DatasetError: a scratch file is damaged.
    """
    tar = job.folder / "shards" / job.name
    try:
        writer = ShardWriter(tar)
        try:
            for sample in job.samples:
                large = {name: extent.read(job.folder) for name, extent in sample.encoded.items()}
                writer.add(Sample(sample.key, sample.small | large))
            shard = writer.close()
        finally:
            writer.abort()
        job.store.put_shard(shard, tar, writer.index_path, note={SHARD_SPEC: job.spec}, move=True)
    except OSError as error:
        raise StorageError(
            f"{job.folder}: cannot be used ({error.strerror or error}); free some space or {SCRATCH_ADVICE}, then run "
            "the same command again: it resumes from here"
        ) from error
    return shard


def sample_jobs(plan: PackingPlan, encoded: Encoded, part: str) -> tuple[list[PlannedSample], list[Skipped]]:
    """The part's samples in packing order, and those left out because a raw file is broken.

    The order is that of a hash of seed and key: a global shuffle that does not depend on the list's order, and in
    which one sample more or less leaves the order of the others as it is.
    """
    good, bad = [], []
    for sample in plan.samples[part]:
        problem = _problem(sample, plan, encoded)
        if problem is None:
            good.append(sample)
        else:
            bad.append(Skipped(part, sample.line, *problem))
    seed = plan.content.seed
    good.sort(key=lambda sample: hashlib.sha256(f"{seed} {sample.key}".encode()).digest())
    return good, bad


def _problem(sample: PlannedSample, plan: PackingPlan, encoded: Encoded) -> tuple[str, str] | None:
    for offset in plan.content.offsets:
        message = encoded.broken.get(("image", sample.drive, *sample.image(offset)))
        if message is not None:
            return "broken frame", message
    message = encoded.broken.get(("depth", sample.drive, sample.frame, sample.side)) if sample.depth else None
    return None if message is None else ("broken depth", message)


def cut_shards(
    plan: PackingPlan,
    encoded: Encoded,
    part: str,
    samples: list[PlannedSample],
    folder: Path,
    store: Store,
) -> Iterator[ShardJob]:
    """Jobs for a part's shards; one ends after `SAMPLES_PER_SHARD` samples or once it has the bytes asked for."""
    batch: list[SampleJob] = []
    size = number = 0
    for sample in samples:
        batch.append(_sample_job(plan, encoded, sample))
        size += batch[-1].tar_bytes
        if len(batch) >= SAMPLES_PER_SHARD or size >= plan.content.shard_bytes:
            yield ShardJob(part, number, batch, folder, store)
            batch, size, number = [], 0, number + 1
    if batch:
        yield ShardJob(part, number, batch, folder, store)


def _sample_job(plan: PackingPlan, encoded: Encoded, sample: PlannedSample) -> SampleJob:
    content, drive = plan.content, plan.drives[sample.drive]
    key = (sample.drive, sample.frame, sample.side)
    native = encoded.native[key]
    small = {
        INTRINSICS: drive.calibration.intrinsics(sample.side, native, content.format.size or native)
        .astype("<f4")
        .tobytes(),
        META: _meta(plan, sample, drive, native),
    }
    if content.stereo:
        small[STEREO_TRANSLATION] = np.array(drive.calibration.stereo_translation(sample.side), dtype="<f4").tobytes()
    files = {
        image_component(offset, content.format.codec): encoded.images[sample.drive, *sample.image(offset)]
        for offset in content.offsets
    }
    if sample.depth:
        files[DEPTH] = encoded.depth[key]
    return SampleJob(sample.key, small, files)


def _meta(plan: PackingPlan, sample: PlannedSample, drive: Drive, native: tuple[int, int]) -> bytes:
    """`meta.json`: where the sample comes from; for odometry also the target camera's pose, 3x4 row-major, metres."""
    meta: dict[str, Any] = {
        "drive": printable(sample.drive),
        "frame": sample.frame,
        "side": sample.side,
        "native_size": native,
        "sources": component_sources(sample, drive, plan.content.offsets, image_extension(plan.content.format.codec)),
    }
    if drive.poses is not None and sample.frame < len(drive.poses):
        meta["pose"] = drive.poses[sample.frame].ravel().tolist()
    return json.dumps(meta, sort_keys=True, separators=(",", ":")).encode()


def count_components(plan: PackingPlan, packed: dict[str, list[PlannedSample]]) -> Counter[str]:
    """How many of the packed samples have each component."""
    content = plan.content
    total = sum(len(samples) for samples in packed.values())
    names = [image_component(offset, content.format.codec) for offset in content.offsets] + [INTRINSICS, META]
    counts = Counter({name: total for name in [*names, *([STEREO_TRANSLATION] if content.stereo else [])]})
    with_depth = sum(sample.depth for samples in packed.values() for sample in samples)
    if with_depth:
        counts[DEPTH] = with_depth
    return counts
