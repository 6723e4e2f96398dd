"""From split lines to work: which samples can be made, which cannot and why, which raw frames they need."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from prep.packing.encode import ChunkJob, ImageFormat, Instant
from prep.raw.calibration import other
from prep.raw.drives import Drive, Layout
from prep.raw.splits import BadLine, Side, SplitLine, SplitLists
from prep.raw.velodyne import Convention
from shards.dataset import SHARD_BYTES
from shards.errors import InputError
from shards.sample import DEPTH, Offset, offset_name

DepthSource = Literal["velodyne", "improved", "dense"]
OnError = Literal["stop", "skip"]

BROKEN_DRIVE = "broken drive"
INSTANTS_PER_CHUNK = 24
"""Moments of a drive in one unit of work: about a second, so that a killed run loses little."""


@dataclass(frozen=True)
class Content:
    """What a sample holds; with the split and the raw data it decides the dataset's bytes.

    Attributes:
        frames: offsets, 0 first.
        depth: ground truth to pack where it is present, or None.
        convention: which depth a lidar point has.
        seed: of the global shuffle.
        limit: at most so many lines of each part.
        shard_bytes: a shard ends once it has so many.
    """

    frames: tuple[int, ...]
    stereo: bool
    depth: DepthSource | None
    convention: Convention
    format: ImageFormat
    seed: int = 0
    limit: int | None = None
    shard_bytes: int = SHARD_BYTES

    @property
    def offsets(self) -> list[Offset]:
        return [*self.frames, "s"] if self.stereo else [*self.frames]


@dataclass(frozen=True)
class Skipped:
    """A split line that gave no sample. `detail` names the raw file or the drive, independent of where they lie."""

    part: str
    line: str
    reason: str
    detail: str


@dataclass(frozen=True)
class PlannedSample:
    """A sample whose raw files are all there."""

    key: str
    part: str
    drive: str
    frame: int
    side: Side
    depth: bool

    @property
    def line(self) -> str:
        return f"{self.drive} {self.frame} {self.side}"

    def image(self, offset: Offset) -> tuple[int, Side]:
        """Frame and side of one of its images."""
        return (self.frame, other(self.side)) if offset == "s" else (self.frame + offset, self.side)


@dataclass
class Plan:
    """What will be packed.

    Attributes:
        samples: part -> samples, in the lists' order.
        skipped: lines that give no sample.
        drives: by name as in the lists; those that samples come from.
        found: all drives of the lists that are there.
        missing_drives: names without data.
        instants: drive -> moments needed, by frame number.
    """

    content: Content
    samples: dict[str, list[PlannedSample]] = field(default_factory=dict)
    skipped: list[Skipped] = field(default_factory=list)
    drives: dict[str, Drive] = field(default_factory=dict)
    found: dict[str, Drive] = field(default_factory=dict)
    missing_drives: list[str] = field(default_factory=list)
    instants: dict[str, list[Instant]] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return sum(len(samples) for samples in self.samples.values())

    @property
    def images(self) -> int:
        """Unique raw images to decode."""
        return sum(len(i.images) for instants in self.instants.values() for i in instants)

    @property
    def input_bytes(self) -> int:
        """Bytes to read (packed, where they lie in a zip)."""
        return sum(ref.transfer for instants in self.instants.values() for i in instants for ref in i.refs())

    @property
    def samples_sha256(self) -> str:
        """Hash over the samples and which of them have depth: with other raw data present, another dataset."""
        digest = hashlib.sha256()
        for part, samples in sorted(self.samples.items()):
            for sample in samples:
                digest.update(f"{part} {sample.key} {sample.depth}\n".encode())
        return digest.hexdigest()

    @property
    def inputs_sha256(self) -> str:
        """Hash over the KITTI paths and sizes of the raw files: tells files that were mended or converted since."""
        digest = hashlib.sha256()
        for _, instants in sorted(self.instants.items()):
            for ref in (ref for instant in instants for ref in instant.refs()):
                digest.update(f"{ref.path} {ref.size}\n".encode())
        return digest.hexdigest()

    def jobs(self, folder: Path, skip_broken: bool, versions: str) -> Iterable[ChunkJob]:
        """The work in chunks, drive by drive, in the order of frames."""
        for name, instants in sorted(self.instants.items()):
            for start in range(0, len(instants), INSTANTS_PER_CHUNK):
                yield ChunkJob(
                    drive=name,
                    instants=tuple(instants[start : start + INSTANTS_PER_CHUNK]),
                    rig=self.drives[name].rig,
                    format=self.content.format,
                    convention=self.content.convention,
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
) -> Plan:
    """Look up every line's files.

    A frame or drive that is not there leaves its samples out, listed in `skipped`. What is there but broken (a line
    that is none, a calibration, an archive) stops, or with `on_error="skip"` is listed too.

    Args:
        parts: only these parts of the split.
        progress: called with the name of each drive before it is looked at.

    Raises:
        InputError: see above; or the split has none of `parts`; or two drives have one key.
    """
    plan = Plan(content)
    chosen = list(lists.parts) if parts is None else list(parts)
    for part in chosen:
        if part not in lists.parts:
            raise InputError(f"split {lists.name} has no part {part!r}; it has {', '.join(lists.parts)}")
        _note_bad_lines(plan, part, lists.bad[part], on_error)
    lines = {part: lists.parts[part][: content.limit] for part in chosen}
    broken: dict[str, str] = {}
    keys: dict[str, str] = {}
    for name in sorted({line.drive for rows in lines.values() for line in rows}):
        progress(name)
        try:
            drive = layout.open(name)
        except InputError as error:
            if on_error == "stop":
                raise
            broken[name] = layout.raw.without_place(str(error))
            continue
        if drive is None:
            plan.missing_drives.append(name)
        elif (twin := keys.setdefault(drive.key, name)) != name:
            raise InputError(f"drives {twin!r} and {name!r} would both be {drive.key} in the dataset; rename one")
        else:
            plan.found[name] = drive
    for part, rows in lines.items():
        plan.samples[part] = []
        for line in rows:
            _plan_line(plan, part, line, broken)
    _collect_instants(plan)
    return plan


def _note_bad_lines(plan: Plan, part: str, bad: list[BadLine], on_error: OnError) -> None:
    for line in bad:
        if on_error == "stop":
            raise InputError(f"{line}; correct it, or give --on-error skip")
        plan.skipped.append(Skipped(part, line.text, "not a split line", line.reason))


def _plan_line(plan: Plan, part: str, line: SplitLine, broken: dict[str, str]) -> None:
    drive = plan.found.get(line.drive)
    if drive is None:
        reason = BROKEN_DRIVE if line.drive in broken else "missing drive"
        plan.skipped.append(Skipped(part, line.text, reason, broken.get(line.drive, line.drive)))
        return
    sample = PlannedSample(
        key=f"{drive.key}_{line.side}_{line.frame:010d}",
        part=part,
        drive=line.drive,
        frame=line.frame,
        side=line.side,
        depth=_has_depth(drive, line),
    )
    for offset in plan.content.offsets:
        frame, side = sample.image(offset)
        if frame not in drive.images[side]:
            plan.skipped.append(Skipped(part, line.text, _missing(offset), f"{line.drive} {frame} {side}"))
            return
    plan.samples[part].append(sample)


def _missing(offset: Offset) -> str:
    if offset == "s":
        return "missing stereo partner"
    return "missing frame" if offset == 0 else f"missing neighbour {offset:+d}"


def _has_depth(drive: Drive, line: SplitLine) -> bool:
    return line.frame in drive.scans or line.frame in drive.depth_maps.get(line.side, {})


def _collect_instants(plan: Plan) -> None:
    """What the samples need of each drive, every raw file once."""
    images: dict[str, set[tuple[int, Side]]] = {}
    depth: dict[str, set[tuple[int, Side]]] = {}
    for sample in (s for samples in plan.samples.values() for s in samples):
        images.setdefault(sample.drive, set()).update(sample.image(o) for o in plan.content.offsets)
        if sample.depth:
            depth.setdefault(sample.drive, set()).add((sample.frame, sample.side))
    for name, wanted in images.items():
        drive, with_depth = plan.found[name], depth.get(name, set())
        plan.drives[name] = drive
        plan.instants[name] = [_instant(drive, frame, wanted, with_depth) for frame in sorted({f for f, _ in wanted})]


def _instant(drive: Drive, frame: int, images: set[tuple[int, Side]], depth: set[tuple[int, Side]]) -> Instant:
    sides: list[Side] = ["l", "r"]
    depth_sides = [side for side in sides if (frame, side) in depth]
    ready = {side: drive.depth_maps[side][frame] for side in depth_sides if frame in drive.depth_maps.get(side, {})}
    projected = tuple(side for side in depth_sides if side not in ready)
    return Instant(
        frame=frame,
        images={side: drive.images[side][frame] for side in sides if (frame, side) in images},
        scan=drive.scans[frame] if projected else None,
        depth_sides=projected,
        depth_maps=ready,
    )


def component_sources(sample: PlannedSample, drive: Drive, offsets: Iterable[Offset], extension: str) -> dict[str, str]:
    """Component name -> KITTI path of the raw file that it came from."""
    sources = {}
    for offset in offsets:
        frame, side = sample.image(offset)
        sources[f"{offset_name(offset)}.{extension}"] = drive.images[side][frame].path
    if sample.depth:
        ready = drive.depth_maps.get(sample.side, {}).get(sample.frame)
        sources[DEPTH] = (ready or drive.scans[sample.frame]).path
    return sources
