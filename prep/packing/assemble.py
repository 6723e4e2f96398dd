"""Assembles shards from encoded frames: samples in shuffled order, cut into shards, their bytes copied together."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from prep.packing.encode import Encoded, Extent, label, scratch_error
from prep.packing.plan import PackingPlan, PlannedSample, Skipped, component_sources
from prep.raw.kitti import Drive
from prep.raw.text import printable
from shards.dataset import SAMPLES_PER_SHARD, shard_name
from shards.errors import StorageError
from shards.manifest import Shard
from shards.publish import Store
from shards.sample import (
    DEPTH,
    DISTANCES,
    INTRINSICS,
    META,
    POSES,
    STEREO_TRANSLATION,
    Sample,
    image_component,
    image_extension,
)
from shards.tar import ShardWriter

SHARD_SPEC = "spec"
"""Name, in a shard's receipt, of the hash of its content."""
_BLOCK = 512


@dataclass(frozen=True)
class SampleJob:
    """One sample: the content of its small components, and the extents of the encoded ones."""

    key: str
    small: dict[str, bytes]
    encoded: dict[str, Extent]

    @property
    def tar_bytes(self) -> int:
        """Its bytes in a tar."""
        sizes = [len(data) for data in self.small.values()] + [extent.size for extent in self.encoded.values()]
        return sum(_BLOCK + -(-size // _BLOCK) * _BLOCK for size in sizes)


@dataclass(frozen=True)
class ShardJob:
    """One shard: its samples, the scratch folder that holds them, the store to write it to, and whose work it is."""

    part: str
    number: int
    samples: list[SampleJob]
    folder: Path
    store: Store
    task: int = 1

    @property
    def name(self) -> str:
        return shard_name(self.part, self.number)

    @property
    def spec(self) -> str:
        """Hash of the shard's content."""
        digest = hashlib.sha256()
        for sample in self.samples:
            digest.update(sample.key.encode())
            for name, data in sorted(sample.small.items()):
                digest.update(f" {name} ".encode() + data)
            for name, extent in sorted(sample.encoded.items()):
                digest.update(f" {name} {extent.size} {extent.crc}".encode())
        return digest.hexdigest()


def write_shard(job: ShardJob) -> Shard:
    """Write a shard in the scratch folder and move it to the store. Runs in a worker.

    Raises:
        StorageError: the scratch folder or the store cannot be written.
        DatasetError: a scratch file is damaged.
    """
    tar = job.folder / "shards" / str(job.task) / job.name
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
        raise scratch_error(job.folder, error) from error
    return shard


def sample_jobs(plan: PackingPlan, encoded: Encoded, part: str) -> tuple[list[PlannedSample], list[Skipped]]:
    """The part's samples in packing order, and the lines left out because a raw file is broken.

    The order is that of a hash of seed and key: a global shuffle that does not depend on the list's order, and in
    which one sample more or less keeps the order of the others.
    """
    problems = [(sample, _problem(sample, plan, encoded)) for sample in plan.samples[part]]
    good = [sample for sample, problem in problems if problem is None]
    seed = plan.content.seed
    good.sort(key=lambda sample: hashlib.sha256(f"{seed} {sample.key}".encode()).digest())
    return good, [Skipped(part, sample.line, *problem) for sample, problem in problems if problem is not None]


def _problem(sample: PlannedSample, plan: PackingPlan, encoded: Encoded) -> tuple[str, str] | None:
    """Reason and detail if a raw file of a sample is broken."""
    drive = plan.drives[sample.drive].key
    labels = [("broken frame", label("image", drive, *sample.image(offset))) for offset in plan.content.offsets]
    if sample.depth:
        labels.append(("broken depth", label("depth", drive, sample.frame, sample.side)))
    return next(((reason, encoded.broken[name]) for reason, name in labels if name in encoded.broken), None)


def cut_shards(
    plan: PackingPlan, encoded: Encoded, part: str, samples: list[PlannedSample], folder: Path, store: Store, task: int
) -> Iterator[ShardJob]:
    """Jobs for a part's shards. One ends after `SAMPLES_PER_SHARD` samples, or when it has `shard_bytes`."""
    batch: list[SampleJob] = []
    size = number = 0
    for sample in samples:
        try:
            batch.append(_sample_job(plan, encoded, sample))
        except KeyError as error:
            advice = "remove the folder and run the same command again"
            raise StorageError(f"{folder}: its scratch files lack {error.args[0]!r}; {advice}") from error
        size += batch[-1].tar_bytes
        if len(batch) >= SAMPLES_PER_SHARD or size >= plan.content.shard_bytes:
            yield ShardJob(part, number, batch, folder, store, task)
            batch, size, number = [], 0, number + 1
    if batch:
        yield ShardJob(part, number, batch, folder, store, task)


def _sample_job(plan: PackingPlan, encoded: Encoded, sample: PlannedSample) -> SampleJob:
    content, drive = plan.content, plan.drives[sample.drive]
    native = encoded.sizes[label("image", drive.key, sample.frame, sample.side)]
    intrinsics = drive.calibration.intrinsics(sample.side, native, content.format.size or native)
    small = {INTRINSICS: intrinsics.astype("<f4").tobytes(), META: _meta(plan, sample, drive, native)}
    if content.stereo:
        small[STEREO_TRANSLATION] = np.array(drive.calibration.stereo_translation(sample.side), dtype="<f4").tobytes()
    small |= motion_components(content.temporal, sample, drive)
    labels = {
        image_component(offset, content.format.codec): label("image", drive.key, *sample.image(offset))
        for offset in content.offsets
    }
    if sample.depth:
        labels[DEPTH] = label("depth", drive.key, sample.frame, sample.side)
    files = {component: encoded.files[name] for component, name in labels.items()}
    return SampleJob(sample.key, small, files)


def motion_components(temporal: Sequence[int], sample: PlannedSample, drive: Drive) -> dict[str, bytes]:
    """`poses.f32` and `distances.f32`, each if the motion to all temporal frames is known."""
    if drive.motion is None or not temporal:
        return {}
    shift = drive.calibration.shift(sample.side)
    places = [(sample.frame, sample.frame + offset, shift) for offset in temporal]
    found: dict[str, list[Any]] = {
        POSES: [drive.motion.transform(*place) for place in places],
        DISTANCES: [drive.motion.distance(*place) for place in places],
    }
    known = {name: values for name, values in found.items() if all(value is not None for value in values)}
    return {name: np.array(values, dtype="<f4").tobytes() for name, values in known.items()}


def _meta(plan: PackingPlan, sample: PlannedSample, drive: Drive, native: tuple[int, int]) -> bytes:
    """`meta.json`: the sample's origin; for odometry also the target camera's pose, 3x4 row-major, metres."""
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
    """Number of packed samples with each component."""
    content = plan.content
    total = sum(len(samples) for samples in packed.values())
    names = [image_component(offset, content.format.codec) for offset in content.offsets] + [INTRINSICS, META]
    counts = Counter({name: total for name in [*names, *([STEREO_TRANSLATION] if content.stereo else [])]})
    with_depth = sum(sample.depth for samples in packed.values() for sample in samples)
    if with_depth:
        counts[DEPTH] = with_depth
    for sample in (sample for samples in packed.values() for sample in samples):
        counts.update(motion_components(content.temporal, sample, plan.drives[sample.drive]).keys())
    return counts
