"""Packs a plan: encodes each raw frame once into a scratch folder, assembles shards from it, publishes them.

    plan = make_plan(read_split("eigen_zhou"), Kitti(RawData(["kitti_data"]), "velodyne"), content)
    with start_workers(2) as workers:
        result = pack(plan, lists, "kitti_shards/eigen_zhou", scratch, workers)

Each step leaves whole files or none, under names from all that decides their content. So the same call resumes after
a SIGKILL: existing chunks and shards are not made again, and the dataset has the bytes of an uninterrupted run, with
any number of workers and either engine.

Memory: about 75 MB a worker for frames of KITTI's size, besides the interpreter, and about 1 kB a sample in the main
process. Several processes may pack one dataset together, each with its share of the chunks: see `prep.packing.tasks`.
The scratch folder holds each needed frame once, encoded, and one shard for each worker. It is removed when
the dataset is committed.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from prep.packing.assemble import SHARD_SPEC, ShardJob, count_components, cut_shards, sample_jobs, write_shard
from prep.packing.encode import SCRATCH_ADVICE, ChunkJob, Encoded, read_chunk, scratch_error, versions
from prep.packing.plan import PackingPlan, PlannedSample, Skipped
from prep.packing.tasks import Chunks, Task, Unfinished, owners
from prep.raw.kitti import KITTI_LICENCE
from prep.raw.splits import SplitLists
from prep.workers import Progress, Quiet, Workers, run
from shards.card import card
from shards.dataset import describe_components
from shards.errors import InputError, Md2Error, StorageError, UsageError
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


@dataclass(frozen=True)
class _Run:
    """What the steps of one call of `pack` share."""

    plan: PackingPlan
    lists: SplitLists
    store: Store
    scratch: Path
    workers: Workers
    progress: Progress
    task: Task


def scratch_folder(out: str, within: Path | None = None) -> Path:
    """Folder for a dataset's unfinished work. It is removed in the end, so it is never a folder of the user's.

    Args:
        within: its parent; None: beside a local dataset, in the user's cache for others.

    Raises:
        UsageError: `out` is the root folder.
    """
    where = str(local_path(out).absolute()) if is_local(out) else out
    name = hashlib.sha256(where.encode(errors="surrogateescape")).hexdigest()[:16]
    if within is not None:
        return within.absolute() / f"{name}.prep"
    if is_local(out):
        folder = Path(where)
        if not folder.name:
            raise UsageError(f"{out}: the root folder holds no dataset; name a folder in it")
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
    packed = pack_share(plan, lists, out, scratch, workers, Task(), skip_broken=skip_broken, progress=progress)
    assert isinstance(packed, Packed)
    return packed


def pack_share(
    plan: PackingPlan,
    lists: SplitLists,
    out: str,
    scratch: Path,
    workers: Workers,
    task: Task,
    *,
    skip_broken: bool = False,
    progress: Progress | None = None,
) -> Packed | Unfinished:
    """As `pack`, for one of several processes: it encodes its share, and does the rest if all shares are encoded.

    Raises:
        InputError, StorageError: as `pack`.
    """
    if plan.total == 0:
        raise InputError(_nothing(plan, plan.skipped))
    store = Store(out)
    progress = progress or Quiet()
    for note in plan.notes:
        progress.note(note)
    with _locked(scratch, task):
        identity = _identity(plan, lists)
        receipts = store.begin(identity)
        if store.published is not None and _published_report(store).inputs_sha256 not in (None, plan.inputs_sha256):
            # The same samples from files that have changed: a new version beside the published one.
            store = Store(out)
            receipts = store.begin({**identity, "inputs_sha256": plan.inputs_sha256})
        if store.published is not None:
            return _published(plan, store, scratch)
        if store.url != store.asked_url:
            progress.note(f"another dataset is at {store.asked_url} and stays as it is; this one goes to {store.url}")
        step = _Run(plan, lists, store, scratch, workers, progress, task)
        try:
            jobs = list(plan.jobs(scratch, skip_broken, versions()))
            late = _encode(step, jobs)
            packed = None if late else _publish(step, jobs, receipts)
        except Md2Error:
            # Another task that found all chunks commits, and then removes what this one reads.
            if task.alone or not store.is_published():
                raise
            packed = None
        if packed is None and store.is_published():
            return _published(plan, store, scratch)
        if packed is not None:
            shutil.rmtree(scratch, ignore_errors=True)
    return packed or Unfinished(store.url, late)


def _published(plan: PackingPlan, store: Store, scratch: Path) -> Packed:
    """The dataset that is published at the store's URL, by an earlier run or another task."""
    assert store.published is not None
    shutil.rmtree(scratch, ignore_errors=True)
    lines = _published_report(store).skipped_lines
    return Packed(store.url, store.published, plan.skipped if lines is None else lines, already=True)


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
def _locked(scratch: Path, task: Task) -> Iterator[None]:
    """Lock the scratch folder for this process, or for this task and its like. A killed process's lock ends with it."""
    names = [_LOCK] if task.alone else [_LOCK, f"{_LOCK}-{task.number}"]
    with ExitStack() as stack:
        for name in names:
            lock = FileLock(scratch / name, f"{SCRATCH_ADVICE} on another")
            try:
                taken = lock.try_acquire(shared=name == _LOCK and not task.alone)
            except OSError as error:
                raise StorageError(
                    f"{scratch}: cannot be written ({error.strerror or error}); this folder for unfinished work is "
                    f"beside --out by default: give another --out, or {SCRATCH_ADVICE}"
                ) from error
            if not taken:
                what = "another md2 prep" if name == _LOCK else f"another md2 prep --task {task}"
                raise StorageError(f"{scratch}: {what} is at work there; wait for it, or stop it")
            stack.enter_context(lock)
        yield


def _encode(this: _Run, jobs: list[ChunkJob]) -> list[int]:
    """Make the task's chunks that do not exist yet; return the tasks whose chunks are not there.

    Alone, also remove the chunks of earlier runs with other options or input.
    """
    scratch, store, task = this.scratch, this.store, this.task
    names = {job.name for job in jobs}
    try:
        for path in scratch.iterdir() if task.alone else ():
            if path.is_file() and path.name not in names and path.name != _LOCK:
                path.unlink()
    except OSError as error:
        raise scratch_error(scratch, error) from error
    through_bucket = not is_local(store.url) and (store.resumed or not task.alone)
    chunks = Chunks(scratch, store.storage if through_bucket else None, sends=not task.alone)
    owner = owners(jobs, task.count)
    own = [job for job, number in zip(jobs, owner, strict=True) if number == task.number]
    chunks.encode(own, this.workers, this.progress)
    late = chunks.late(jobs, owner)
    if not late:
        chunks.fetch(jobs)
    return late


def _publish(this: _Run, jobs: list[ChunkJob], receipts: Mapping[str, Receipt]) -> Packed:
    """Assemble the shards from the chunks, and commit the dataset."""
    plan, store, encoded = this.plan, this.store, Encoded()
    for job in jobs:
        chunk = read_chunk(this.scratch / job.name)
        if chunk is None:
            path = this.scratch / job.name
            raise StorageError(f"{path}: gone or damaged; remove it if it is there, and run the same command again")
        encoded.add(chunk)
    manifest, skipped = _assemble(this, encoded, receipts)
    licence = KITTI_LICENCE if any(drive.kitti for drive in plan.drives.values()) else None
    store.put_text(CARD, card(manifest, licence=licence))
    store.put_text(REPORT, report(plan, manifest, skipped))
    return Packed(store.url, store.commit(manifest), skipped, already=False)


def _assemble(this: _Run, encoded: Encoded, receipts: Mapping[str, Receipt]) -> tuple[Manifest, list[Skipped]]:
    plan = this.plan
    skipped, packed = list(plan.skipped), dict[str, list[PlannedSample]]()
    for part in sorted(plan.samples):
        packed[part], bad = sample_jobs(plan, encoded, part)
        skipped += bad
    if not any(packed.values()):
        raise InputError(_nothing(plan, skipped))
    total = sum(map(len, packed.values()))
    this.progress.phase("writing shards", total, "samples")

    shards: list[Shard] = []
    for shard in run(this.workers, write_shard, _shard_jobs(this, encoded, receipts, packed, shards)):
        shards.append(shard)
        this.progress.advance(shard.samples)
    content = plan.content
    components, optional = describe_components(count_components(plan, packed), total)
    manifest = Manifest(
        md2_version=__version__,
        split=Split(name=this.lists.name, sha256=this.lists.sha256),
        frames=list(content.frames),
        stereo=content.stereo,
        depth=None if content.depth is None else DepthInfo(source=content.depth, convention=content.convention),
        size=content.format.size,
        codec=content.format.codec,
        quality=content.format.quality,
        jpeg=content.format.jpeg,
        intrinsics="guessed" if any(drive.calibration.guessed for drive in plan.drives.values()) else None,
        seed=content.seed,
        components=components,
        optional_components=optional,
        skipped=len(skipped),
        shards=sorted(shards, key=lambda shard: shard.name),
    )
    return manifest, skipped


def _shard_jobs(
    this: _Run,
    encoded: Encoded,
    receipts: Mapping[str, Receipt],
    packed: Mapping[str, list[PlannedSample]],
    shards: list[Shard],
) -> Iterator[ShardJob]:
    """Jobs for the shards that are not published yet; adds those that are to `shards`.

    Tasks that end at the same moment begin at different shards, and each leaves alone what another has published.
    """
    plan, task = this.plan, this.task
    begin = sum(map(len, packed.values())) * (task.number - 1) // task.count
    for behind in (True,) if task.alone else (True, False):
        seen = 0
        for part, samples in packed.items():
            for job in cut_shards(plan, encoded, part, samples, this.scratch, this.store, task.number):
                seen += len(job.samples)
                if (seen > begin) != behind:
                    continue
                receipt = receipts.get(job.name) if task.alone else this.store.arrived(job.name)
                if receipt is not None and receipt.note.get(SHARD_SPEC) == job.spec:
                    shards.append(receipt.shard)
                    this.progress.advance(receipt.shard.samples)
                else:
                    yield job


def report(plan: PackingPlan, manifest: Manifest, skipped: list[Skipped]) -> str:
    """`report.json`: the number of samples, a hash of the raw files, and each split line without a sample, with why."""
    content = {
        "inputs_sha256": plan.inputs_sha256,
        "samples": {part: manifest.samples(part) for part in manifest.parts},
        "optional_components": manifest.optional_components,
        "skipped": len(skipped),
        "skipped_by_reason": dict(sorted(Counter(s.reason for s in skipped).items())),
        "skipped_lines": [vars(line) for line in skipped],
    }
    text = io.StringIO()  # json.dumps takes five times the memory: a list may have 500,000 lines
    text.writelines(json.JSONEncoder(indent=1).iterencode(content))
    return text.getvalue() + "\n"


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
