"""Plans the work of a split: which samples can be made, which cannot and why, and which raw files they need."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from prep.packing.encode import ChunkJob, ImageFormat, TimeStep
from prep.raw.calibration import other
from prep.raw.kitti import Drive, Layout
from prep.raw.splits import CameraSide, SplitLine, SplitLists, eigen_overlap
from prep.raw.text import printable
from prep.raw.velodyne import SCAN_POINT_BYTES, Convention
from shards.dataset import SHARD_BYTES
from shards.errors import InputError
from shards.sample import DEPTH, Offset, offset_name

DepthSource = Literal["velodyne", "improved", "dense"]
OnError = Literal["stop", "skip"]

BROKEN_DRIVE = "broken drive"
DRIVE_END = "drive's end"
"""Begins the reason of lines whose neighbour lies beyond the ends of a drive or clip: nobody could have it."""
_FEW_POINTS = 0.8
"""Of the points of the scans before and after, which differ by a few hundredths."""
TIME_STEPS_PER_CHUNK = 24
"""Time steps of a drive in one unit of work: a few seconds, so that a killed run loses little."""


@dataclass(frozen=True)
class Content:
    """Content of the samples. With the split and the raw data it decides the dataset's bytes.

    Attributes:
        frames: offsets, 0 first.
        depth: ground truth to pack if present, or None.
        convention: depth of a lidar point.
        motion: pack how the camera moves, where it is known.
        seed: seed of the global shuffle.
        limit: number of lines to take of each part; None: all.
        shard_bytes: size at which a shard ends.
    """

    frames: tuple[int, ...]
    stereo: bool
    depth: DepthSource | None
    convention: Convention
    format: ImageFormat
    motion: bool = False
    seed: int = 0
    limit: int | None = None
    shard_bytes: int = SHARD_BYTES

    @property
    def temporal(self) -> tuple[int, ...]:
        return tuple(frame for frame in self.frames if frame)

    @property
    def offsets(self) -> list[Offset]:
        return [*self.frames, "s"] if self.stereo else [*self.frames]


@dataclass(frozen=True)
class Skipped:
    """A split line without a sample. `detail` names the raw file or the drive, without the raw location."""

    part: str
    line: str
    reason: str
    detail: str

    @property
    def wanted(self) -> bool:
        """Whether the line could have given a sample: at a drive's ends nobody has the neighbours."""
        return not self.reason.startswith(DRIVE_END)


@dataclass(frozen=True)
class PlannedSample:
    """A sample whose raw files are all present."""

    key: str
    part: str
    drive: str
    frame: int
    side: CameraSide
    depth: bool

    @property
    def line(self) -> str:
        return printable(f"{self.drive} {self.frame} {self.side}")

    def image(self, offset: Offset) -> tuple[int, CameraSide]:
        """Frame and side of its image at an offset."""
        return (self.frame, other(self.side)) if offset == "s" else (self.frame + offset, self.side)


@dataclass
class PackingPlan:
    """The samples to pack, and the raw files that they need.

    Attributes:
        samples: part -> samples, in the lists' order.
        skipped: lines without a sample.
        drives: drives of the samples, by their names in the lists.
        found: all drives of the lists that have data.
        missing_drives: names of the others.
        time_steps: drive -> time steps needed, by frame number.
        notes: remarks for the user about unusual data.
    """

    content: Content
    samples: dict[str, list[PlannedSample]] = field(default_factory=dict)
    skipped: list[Skipped] = field(default_factory=list)
    drives: dict[str, Drive] = field(default_factory=dict)
    found: dict[str, Drive] = field(default_factory=dict)
    missing_drives: list[str] = field(default_factory=list)
    time_steps: dict[str, list[TimeStep]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def total(self) -> int:
        return sum(len(samples) for samples in self.samples.values())

    @property
    def images(self) -> int:
        """Number of unique raw images to decode."""
        return sum(len(step.images) for steps in self.time_steps.values() for step in steps)

    @property
    def input_bytes(self) -> int:
        """Bytes to read; of zip members the packed size."""
        return sum(ref.transfer for steps in self.time_steps.values() for step in steps for ref in step.refs())

    @property
    def samples_sha256(self) -> str:
        """Hash of the samples, of which of them have depth, and of the poses."""
        digest = hashlib.sha256()
        for part, samples in sorted(self.samples.items()):
            for sample in samples:
                digest.update(f"{part} {sample.key} {sample.depth}\n".encode())
        for name, drive in sorted(self.drives.items()):
            if drive.poses is not None:
                digest.update(f"{name} {hashlib.sha256(drive.poses.tobytes()).hexdigest()}\n".encode())
            for values in (drive.motion.poses, drive.motion.travelled) if drive.motion is not None else ():
                digest.update(b"" if values is None else hashlib.sha256(values.tobytes()).digest())
        return digest.hexdigest()

    @property
    def inputs_sha256(self) -> str:
        """Hash of the KITTI paths and sizes of the raw files. It changes if files are mended or converted.

        Of own drives also of the camera, which is corrected more often than frames are.
        """
        digest = hashlib.sha256()
        for name, steps in sorted(self.time_steps.items()):
            drive = self.drives[name]
            if not drive.kitti:
                digest.update(f"{drive.calibration.projection} {drive.view} {drive.digest}\n".encode())
            for ref in (ref for step in steps for ref in step.refs()):
                digest.update(f"{ref.path} {ref.size}\n".encode(errors="surrogateescape"))
        return digest.hexdigest()

    def jobs(self, folder: Path, skip_broken: bool, versions: str) -> Iterable[ChunkJob]:
        """Jobs of all chunks, drive by drive, in the order of frames."""
        for name, steps in sorted(self.time_steps.items()):
            drive, content = self.drives[name], self.content
            for start in range(0, len(steps), TIME_STEPS_PER_CHUNK):
                yield ChunkJob(
                    drive=drive.key,
                    time_steps=tuple(steps[start : start + TIME_STEPS_PER_CHUNK]),
                    calibration=drive.calibration,
                    levels=drive.levels,
                    view=drive.view,
                    format=content.format,
                    convention=content.convention,
                    skip_broken=skip_broken,
                    folder=folder,
                    versions=versions,
                )


def make_plan(
    lists: SplitLists,
    layout: Layout,
    content: Content,
    on_error: OnError = "stop",
    parts: Iterable[str] | None = None,
    progress: Callable[[str], None] = lambda drive: None,
) -> PackingPlan:
    """Look up the files of each line.

    Lines with a missing frame or drive go into `skipped`. A malformed line, a broken calibration or an archive that is
    needed and broken raises an error; with `on_error="skip"` its lines go into `skipped`, too.

    Args:
        parts: parts of the split to plan; None: all.
        progress: called with the name of each drive before it is opened.

    Raises:
        InputError: see above; or the split lacks one of `parts`; or two drives have one key.
    """
    plan = PackingPlan(content, notes=list(lists.notes))
    chosen = list(lists.parts) if parts is None else list(parts)
    for part in chosen:
        if part not in lists.parts:
            raise InputError(f"split {lists.name} has no part {part!r}; it has {', '.join(lists.parts)}")
        for bad in lists.bad[part]:
            if on_error == "stop":
                raise InputError(f"{bad}; correct it, or give --on-error skip")
            plan.skipped.append(Skipped(part, printable(bad.text), "not a split line", bad.reason))
    lines = {part: lists.parts[part][: content.limit] for part in chosen}
    names = sorted({line.drive for rows in lines.values() for line in rows})
    broken = _open_drives(plan, layout, names, on_error, progress)
    for part, rows in lines.items():
        plan.samples[part] = []
        for line in rows:
            problem = _plan_line(plan, part, line, broken)
            if problem is not None and on_error == "stop":
                raise InputError(problem)
            if problem is not None:
                plan.skipped.append(Skipped(part, line.text, "broken frame", layout.raw.without_place(problem)))
    _collect_time_steps(plan)
    # Synthetic drives have KITTI's names.
    real = [line for line in lines.get("train", []) if line.drive not in plan.found or plan.found[line.drive].kitti]
    plan.notes += leaks(real, content.frames)
    if content.depth == "velodyne":
        plan.notes += [note for drive in plan.drives.values() for note in short_scans(drive)]
    return plan


def leaks(train: list[SplitLine], frames: tuple[int, ...]) -> list[str]:
    """A note if training would see Eigen's test frames."""
    targets, loaded = eigen_overlap(train, frames)
    if not loaded:
        return []
    return [
        f"{targets} of Eigen's 697 test frames are targets of part train, {loaded} with its neighbours: "
        "published numbers on them are of models that have not seen them"
    ]


def short_scans(drive: Drive) -> list[str]:
    """A note if scans have far fewer points than those a tenth of a second before and after."""
    sizes = {frame: ref.size for frame, ref in drive.scans.items()}
    found = []
    for frame, size in sorted(sizes.items()):
        neighbours = [sizes[f] for f in (frame - 1, frame + 1) if f in sizes]
        if neighbours and size < _FEW_POINTS * min(neighbours):
            found.append((frame, size // SCAN_POINT_BYTES, min(neighbours) // SCAN_POINT_BYTES))
    if not found:
        return []
    frame, points, usual = found[0]
    return [
        f"{printable(drive.name)}: {len(found)} scans with far fewer points than their neighbours (first: frame "
        f"{frame}, {points:,} points beside {usual:,}): cut short? if so, fetch them again"
    ]


def _open_drives(
    plan: PackingPlan, layout: Layout, names: list[str], on_error: OnError, progress: Callable[[str], None]
) -> dict[str, str]:
    """Open the drives into `plan`; return the broken ones with the reason."""
    broken: dict[str, str] = {}
    keys: dict[str, str] = {}
    for name in names:
        progress(name)
        try:
            drive = layout.open(name)
        except InputError as error:
            if on_error == "stop":
                raise
            broken[name] = printable(layout.raw.without_place(str(error)))
            continue
        if drive is None:
            plan.missing_drives.append(name)
        elif (twin := keys.setdefault(drive.key, name)) != name:
            raise InputError(f"drives {twin!r} and {name!r} would both be {drive.key} in the dataset; rename one")
        else:
            plan.found[name] = drive
            plan.notes += drive.notes
    return broken


def _plan_line(plan: PackingPlan, part: str, line: SplitLine, broken: dict[str, str]) -> str | None:
    """Plan a line's sample, or list the line as skipped; return a message if a broken zip should hold its frame."""
    drive = plan.found.get(line.drive)
    text = printable(line.text)
    if drive is None:
        reason = BROKEN_DRIVE if line.drive in broken else "missing drive"
        plan.skipped.append(Skipped(part, text, reason, broken.get(line.drive, printable(line.drive))))
        return None
    sample = PlannedSample(
        key=f"{drive.key}_{line.side}_{line.frame:010d}",
        part=part,
        drive=line.drive,
        frame=line.frame,
        side=line.side,
        depth=line.frame in drive.scans or line.frame in drive.depth_maps.get(line.side, {}),
    )
    for offset in plan.content.offsets:
        frame, side = sample.image(offset)
        present = frame in drive.images[side]
        if present and not drive.crosses(line.frame, frame):
            continue
        if not present and side in drive.problems:
            return drive.problems[side]
        if offset == "s":
            reason = "missing stereo partner"
        elif offset == 0:
            reason = "missing frame"
        elif drive.is_end(line.frame, frame, line.side):
            reason = f"{DRIVE_END}, no neighbour {offset:+d}"
        else:
            reason = f"missing neighbour {offset:+d}"
        plan.skipped.append(Skipped(part, text, reason, f"{printable(line.drive)} {frame} {side}"))
        return None
    plan.samples[part].append(sample)
    return None


def _collect_time_steps(plan: PackingPlan) -> None:
    """Collect the raw files that the samples need of each drive, each file once."""
    images: dict[str, set[tuple[int, CameraSide]]] = {}
    depth: dict[str, set[tuple[int, CameraSide]]] = {}
    for sample in (s for samples in plan.samples.values() for s in samples):
        images.setdefault(sample.drive, set()).update(sample.image(o) for o in plan.content.offsets)
        if sample.depth:
            depth.setdefault(sample.drive, set()).add((sample.frame, sample.side))
    for name, wanted in images.items():
        drive, with_depth = plan.found[name], depth.get(name, set())
        plan.drives[name] = drive
        typical = sorted(ref.size for ref in drive.scans.values())[len(drive.scans) // 2] if drive.scans else 0
        frames = sorted({frame for frame, _ in wanted})
        plan.time_steps[name] = [_time_step(drive, frame, wanted, with_depth, typical) for frame in frames]


def _time_step(
    drive: Drive, frame: int, images: set[tuple[int, CameraSide]], depth: set[tuple[int, CameraSide]], typical_scan: int
) -> TimeStep:
    sides: list[CameraSide] = ["l", "r"]
    depth_sides = [side for side in sides if (frame, side) in depth]
    ready = {side: drive.depth_maps[side][frame] for side in depth_sides if frame in drive.depth_maps.get(side, {})}
    projected = tuple(side for side in depth_sides if side not in ready)
    return TimeStep(
        frame=frame,
        images={side: drive.images[side][frame] for side in sides if (frame, side) in images},
        scan=drive.scans[frame] if projected else None,
        typical_scan=typical_scan if projected else 0,
        depth_sides=projected,
        depth_maps=ready,
    )


def component_sources(sample: PlannedSample, drive: Drive, offsets: Iterable[Offset], extension: str) -> dict[str, str]:
    """Component name -> KITTI path of its raw file."""
    sources = {}
    for offset in offsets:
        frame, side = sample.image(offset)
        sources[f"{offset_name(offset)}.{extension}"] = printable(drive.images[side][frame].path)
    if sample.depth:
        ready = drive.depth_maps.get(sample.side, {}).get(sample.frame)
        sources[DEPTH] = printable((ready or drive.scans[sample.frame]).path)
    return sources
