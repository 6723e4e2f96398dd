"""Packs a plan: encodes each raw frame once into a scratch folder, assembles shards from it, publishes them.

    plan = make_plan(read_split("eigen_zhou"), Kitti(RawData(["kitti_data"]), "velodyne"), content)
    with start_workers(2) as workers:
        result = pack(plan, lists, "kitti_shards/eigen_zhou", scratch, workers)

Each step leaves whole files or none, under names from all that decides their content. So the same call resumes after
a SIGKILL: existing chunks and shards are not made again, and the dataset has the bytes of an uninterrupted run, with
any number of workers and either engine.

Memory: about 75 MB a worker for frames of KITTI's size, besides the interpreter, and about 1 kB a sample in the main
process. The scratch folder holds each needed frame once, encoded, and one shard for each worker. It is removed when
the dataset is committed.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from prep.packing.assemble import SHARD_SPEC, ShardJob, count_components, cut_shards, sample_jobs, write_shard
from prep.packing.encode import SCRATCH_ADVICE, ChunkJob, Encoded, encode_chunk, read_chunk, scratch_error, versions
from prep.packing.plan import PackingPlan, PlannedSample, Skipped
from prep.raw.kitti import KITTI_LICENCE
from prep.raw.splits import SplitLists
from prep.workers import Progress, Quiet, Workers, run
from shards.card import card
from shards.dataset import describe_components
from shards.errors import InputError, StorageError
from shards.files import cache_folder
from shards.locks import FileLock
from shards.manifest import CARD, REPORT, DepthInfo, Manifest, Shard, Split
from shards.publish import MAX_MANIFEST_BYTES, Receipt, Store
from shards.storage import is_local, local_path
from shards.version import __version__

_LOCK = "lock"


@dataclass(frozen=True)
class Packed:
    """A committed dataset, the lines without a sample, and whether it was published before this call."""

    url: str
    manifest: Manifest
    skipped: list[Skipped]
    already: bool


def scratch_folder(out: str, within: Path | None = None) -> Path:
    """Folder for a dataset's unfinished work. It is removed in the end, so it is never a folder of the user's.

    Args:
        within: its parent; None: beside a local dataset, in the user's cache for others.
    """
    where = str(local_path(out).absolute()) if is_local(out) else out
    name = hashlib.sha256(where.encode(errors="surrogateescape")).hexdigest()[:16]
    if within is not None:
        return within.absolute() / f"{name}.prep"
    if is_local(out):
        folder = Path(where)
        return folder.with_name(f".{folder.name}.prep")
    return cache_folder() / "prep" / name


def pack(
    plan: PackingPlan,
    lists: SplitLists,
    out: str,
    scratch: Path,
    workers: Workers,
    *,
    skip_broken: bool = False,
    progress: Progress | None = None,
) -> Packed:
    """Pack the plan's samples and publish them at `out`.

    Args:
        lists: the split that the plan was made from.
        out: folder or URL.
        scratch: folder for this dataset's unfinished work; workers on other machines must see it, too.
        skip_broken: leave out samples with broken raw files and list them, instead of stopping.

    Raises:
        InputError: no sample can be made, or a raw file is broken, unless `skip_broken`.
        StorageError: `scratch` or `out` cannot be written, or another run is at work there.
    """
    if plan.total == 0:
        raise InputError(_nothing(plan, plan.skipped))
    store = Store(out)
    progress = progress or Quiet()
    for note in plan.notes:
        progress.note(note)
    with _locked(scratch):
        identity = _identity(plan, lists)
        receipts = store.begin(identity)
        if store.published is not None and _published_report(store).inputs_sha256 not in (None, plan.inputs_sha256):
            # The same samples from files that have changed: a new version beside the published one.
            store = Store(out)
            receipts = store.begin({**identity, "inputs_sha256": plan.inputs_sha256})
        if store.published is not None:
            shutil.rmtree(scratch, ignore_errors=True)
            lines = _published_report(store).skipped_lines
            return Packed(store.url, store.published, plan.skipped if lines is None else lines, already=True)
        if store.url != store.asked_url:
            progress.note(f"another dataset is at {store.asked_url} and stays as it is; this one goes to {store.url}")
        jobs = list(plan.jobs(scratch, skip_broken, versions()))
        _encode(jobs, scratch, workers, progress)
        encoded = Encoded()
        for job in jobs:
            chunk = read_chunk(scratch / job.name)
            if chunk is None:
                raise StorageError(f"{scratch / job.name}: gone or damaged; run the same command again")
            encoded.add(chunk)
        manifest, skipped = _assemble(plan, lists, encoded, store, receipts, scratch, workers, progress)
        licence = KITTI_LICENCE if any(drive.kitti for drive in plan.drives.values()) else None
        store.put_text(CARD, card(manifest, licence=licence))
        store.put_text(REPORT, report(plan, manifest, skipped))
        manifest = store.commit(manifest)
        shutil.rmtree(scratch, ignore_errors=True)
    return Packed(store.url, manifest, skipped, already=False)


def _identity(plan: PackingPlan, lists: SplitLists) -> dict[str, Any]:
    """All that decides the dataset's bytes."""
    return {
        "split": {"name": lists.name, "sha256": lists.sha256},
        "parts": sorted(plan.samples),
        "content": asdict(plan.content),
        "samples_sha256": plan.samples_sha256,
        "versions": versions(),
    }


@contextmanager
def _locked(scratch: Path) -> Iterator[None]:
    """Lock the scratch folder for this process. The lock of a killed process ends with it."""
    lock = FileLock(scratch / _LOCK, f"{SCRATCH_ADVICE} on another")
    try:
        taken = lock.try_acquire()
    except OSError as error:
        raise StorageError(
            f"{scratch}: cannot be written ({error.strerror or error}); this folder for unfinished work is beside "
            f"--out by default: give another --out, or {SCRATCH_ADVICE}"
        ) from error
    if not taken:
        raise StorageError(f"{scratch}: another md2 prep is at work there; wait for it, or stop it")
    with lock:
        yield


def _encode(jobs: list[ChunkJob], scratch: Path, workers: Workers, progress: Progress) -> None:
    """Make the chunks that do not exist yet, and remove those of earlier runs with other options or input."""
    names = {job.name: job for job in jobs}
    try:
        for path in scratch.iterdir():
            if path.is_file() and path.name not in names and path.name != _LOCK:
                path.unlink()
    except OSError as error:
        raise scratch_error(scratch, error) from error
    progress.phase("encoding frames", sum(job.images for job in jobs), "images")
    missing = []
    for name, job in names.items():
        chunk = read_chunk(scratch / name)
        if chunk is None or chunk.broken:  # a broken file may have been mended
            missing.append(job)
        else:
            progress.advance(job.images)
    for name in run(workers, encode_chunk, missing):
        progress.advance(names[name].images)


def _assemble(
    plan: PackingPlan,
    lists: SplitLists,
    encoded: Encoded,
    store: Store,
    receipts: Mapping[str, Receipt],
    scratch: Path,
    workers: Workers,
    progress: Progress,
) -> tuple[Manifest, list[Skipped]]:
    skipped, packed = list(plan.skipped), dict[str, list[PlannedSample]]()
    for part in sorted(plan.samples):
        packed[part], bad = sample_jobs(plan, encoded, part)
        skipped += bad
    if not any(packed.values()):
        raise InputError(_nothing(plan, skipped))
    progress.phase("writing shards", sum(map(len, packed.values())), "samples")

    shards: list[Shard] = []

    def shard_jobs() -> Iterator[ShardJob]:
        for part, samples in packed.items():
            for job in cut_shards(plan, encoded, part, samples, scratch, store):
                receipt = receipts.get(job.name)
                if receipt is not None and receipt.note.get(SHARD_SPEC) == job.spec:
                    shards.append(receipt.shard)
                    progress.advance(receipt.shard.samples)
                else:
                    yield job

    for shard in run(workers, write_shard, shard_jobs()):
        shards.append(shard)
        progress.advance(shard.samples)
    content = plan.content
    total = sum(len(samples) for samples in packed.values())
    components, optional = describe_components(count_components(plan, packed), total)
    manifest = Manifest(
        md2_version=__version__,
        split=Split(name=lists.name, sha256=lists.sha256),
        frames=list(content.frames),
        stereo=content.stereo,
        depth=None if content.depth is None else DepthInfo(source=content.depth, convention=content.convention),
        size=content.format.size,
        codec=content.format.codec,
        quality=content.format.quality,
        jpeg=content.format.jpeg,
        seed=content.seed,
        components=components,
        optional_components=optional,
        skipped=len(skipped),
        shards=sorted(shards, key=lambda shard: shard.name),
    )
    return manifest, skipped


def report(plan: PackingPlan, manifest: Manifest, skipped: list[Skipped]) -> str:
    """`report.json`: the number of samples, a hash of the raw files, and each split line without a sample, with why."""
    content = {
        "inputs_sha256": plan.inputs_sha256,
        "samples": {part: manifest.samples(part) for part in manifest.parts},
        "optional_components": manifest.optional_components,
        "skipped": len(skipped),
        "skipped_by_reason": dict(sorted(Counter(s.reason for s in skipped).items())),
        "skipped_lines": [asdict(s) for s in skipped],
    }
    return json.dumps(content, indent=1) + "\n"


def summary(skipped: list[Skipped]) -> str:
    """`3 missing neighbour +1 (first: 2011_09_26/… 107 l), …`, and for broken files the fault."""
    texts = []
    for reason, count in Counter(skip.reason for skip in skipped).most_common():
        first = next(skip for skip in skipped if skip.reason == reason)
        broken = f": {first.detail}" if reason.startswith("broken") else ""
        texts.append(f"{count} {reason} (first: {first.line}{broken})")
    return ", ".join(texts)


def _nothing(plan: PackingPlan, skipped: list[Skipped]) -> str:
    """Message if no line gives a sample, with advice if no drive has a right camera."""
    message = "none of the split's lines can be packed: " + summary(skipped)
    if plan.content.stereo and not any(drive.images["r"] for drive in plan.found.values()):
        message += "; there is no right camera (image_03): give --no-stereo to pack without it"
    return message


class _Report(BaseModel):
    """The fields of a published `report.json` that are read again."""

    inputs_sha256: str | None = None
    skipped_lines: list[Skipped] | None = None


def _published_report(store: Store) -> _Report:
    """Report of the published dataset; empty if it is missing, damaged or foreign."""
    text = store.storage.read(REPORT, MAX_MANIFEST_BYTES)
    try:
        return _Report() if text is None else _Report.model_validate_json(text)
    except ValidationError:
        return _Report()
