"""`md2 prep --check`: what packing would need, find, read and write, without packing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from prep.packing.encode import encode_image
from prep.packing.plan import BROKEN_DRIVE, Content, PackingPlan
from prep.raw.calibration import other
from prep.raw.files import PUBLIC_ARCHIVE, read
from prep.raw.splits import CameraSide, SplitLists
from prep.raw.velodyne import depth_png, points_in_view, project, read_scan
from shards.errors import SampleError

_BYTES_PER_PIXEL = {"jpeg": 0.68, "png": 1.8, "ppm": 3.0}
"""Of KITTI's frames at 640x192 (JPEG as packed by default), used if there is no frame to measure."""
_DEPTH_BYTES = 56_000
_NATIVE = (1242, 375)
_OVERHEAD = 8 * 1024
"""Tar headers, padding and the small components of a sample."""
_TRIED = 6
_SHOWN = 20
_SHOWN_DRIVES = 4


@dataclass
class Check:
    """What the split's lines need, and what is present.

    Attributes:
        lines: number of split lines looked at; samples: those that can be packed, by part.
        images: number of unique raw images that all lines need; images_present: how many of them are present.
        samples_with_depth: of the samples, those with ground truth.
        read_bytes: bytes to read to pack `samples`.
        shard_bytes: estimated size of the shards.
        whole_shard_bytes: the same if nothing was missing.
        scratch_bytes: estimated size of the scratch folder at its fullest.
        measured: whether the estimate is from frames of this data, or from KITTI's usual figures.
        broken: malformed lines, broken drives, and broken frames found while measuring.
        notes: odd data that can be packed.
        complete: whether every line gives a sample that can; drives' ends cannot.
    """

    drives: int
    missing_drives: list[str]
    lines: int
    samples: dict[str, int]
    images: int
    images_present: int
    samples_with_depth: int
    skipped_by_reason: dict[str, int]
    read_bytes: int
    shard_bytes: int
    whole_shard_bytes: int
    scratch_bytes: int
    measured: bool
    broken: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    complete: bool = True


def check(plan: PackingPlan, lists: SplitLists) -> Check:
    """Count what is needed and present, and estimate the dataset's size from a few frames, which are encoded for it.

    Raises:
        StorageError: the network failed while frames were fetched.
    """
    content = plan.content
    lines = [line for part in plan.samples for line in lists.parts[part][: content.limit]]
    needed: set[tuple[str, int, CameraSide]] = set()
    for line in lines:
        needed.update((line.drive, line.frame + offset, line.side) for offset in content.frames)
        if content.stereo:
            needed.add((line.drive, line.frame, other(line.side)))
    present = sum(_present(plan, drive, frame, side) for drive, frame, side in needed)
    image_bytes, depth_bytes, broken_frames = _measure(plan)
    bad = [line for part in plan.samples for line in lists.bad[part]]
    broken = [str(line) for line in bad]
    broken += dict.fromkeys(skip.detail for skip in plan.skipped if skip.reason == BROKEN_DRIVE)
    measured = image_bytes is not None
    image = image_bytes or _usual_image_bytes(content)
    depth = depth_bytes or _DEPTH_BYTES
    with_depth = sum(sample.depth for samples in plan.samples.values() for sample in samples)
    per_sample = len(content.offsets) * image + _OVERHEAD
    return Check(
        drives=len({line.drive for line in lines}),
        missing_drives=plan.missing_drives,
        lines=len(lines) + len(bad),
        samples={part: len(samples) for part, samples in plan.samples.items()},
        images=len(needed),
        images_present=present,
        samples_with_depth=with_depth,
        skipped_by_reason=dict(Counter(skip.reason for skip in plan.skipped).most_common()),
        read_bytes=plan.input_bytes,
        shard_bytes=plan.total * per_sample + with_depth * depth,
        whole_shard_bytes=len(lines) * (per_sample + (depth if content.depth else 0)),
        scratch_bytes=plan.images * image + with_depth * depth,
        measured=measured,
        broken=broken + broken_frames,
        notes=plan.notes,
        complete=not any(skip.wanted for skip in plan.skipped),
    )


def _present(plan: PackingPlan, drive: str, frame: int, side: CameraSide) -> bool:
    found = plan.found.get(drive)
    return found is not None and frame in found.images[side]


def _usual_image_bytes(content: Content) -> int:
    width, height = content.format.size or _NATIVE
    return int(width * height * _BYTES_PER_PIXEL[content.format.codec])


def _measure(plan: PackingPlan) -> tuple[int | None, int | None, list[str]]:
    """Mean encoded bytes of an image and of a depth map, from a few time steps spread over the plan; broken frames."""
    steps = [(name, step) for name, steps in sorted(plan.time_steps.items()) for step in steps]
    images, maps, broken = [], [], list[str]()
    for name, time_step in steps[:: max(1, len(steps) // _TRIED)][:_TRIED]:
        calibration = plan.drives[name].calibration
        try:
            side, ref = next(iter(time_step.images.items()))
            data, native = encode_image(read(ref), ref, calibration.size, plan.content.format, plan.drives[name].levels)
            images.append(len(data))
            scan = time_step.scan
            if scan is not None and side in time_step.depth_sides:
                matrix = calibration.lidar_projection(side)
                points = read_scan(read(scan), scan.place, time_step.typical_scan)
                seen = points_in_view(points, [matrix], native[0])
                maps.append(len(project(seen, matrix, native).png()))
            maps += [len(depth_png(read(ready), native, ready.place)) for ready in time_step.depth_maps.values()]
        except SampleError as error:
            broken.append(str(error))
    return _mean(images), _mean(maps), broken


def _mean(values: Iterable[int]) -> int | None:
    numbers = list(values)
    return sum(numbers) // len(numbers) if numbers else None


def format_check(report: Check) -> str:
    """The report as lines of text."""
    total = sum(report.samples.values())
    parts = ", ".join(f"{count:,} {part}" for part, count in report.samples.items())
    found = report.drives - len(report.missing_drives)
    lines = [
        f"drives   {report.drives:,} needed, {found:,} found, {len(report.missing_drives):,} missing",
        f"frames   {report.images:,} needed, {report.images_present:,} present, "
        f"{report.images - report.images_present:,} missing",
        f"samples  {report.lines:,} lines, {total:,} can be packed ({parts}), {report.samples_with_depth:,} with depth",
    ]
    lines += [f"         {count:,} cannot: {reason}" for reason, count in report.skipped_by_reason.items()]
    basis = "measured on some of these frames" if report.measured else "by KITTI's usual figures"
    lines += [
        f"to read  {_size(report.read_bytes)}",
        f"shards   about {_size(report.shard_bytes)}, {basis}",
        f"         about {_size(report.whole_shard_bytes)} if nothing were missing",
        f"scratch  about {_size(report.scratch_bytes)}, and one shard for each worker",
    ]
    lines += [f"broken   {message}" for message in report.broken[:_SHOWN]]
    if len(report.broken) > _SHOWN:
        lines.append(f"         and {len(report.broken) - _SHOWN:,} more")
    lines += [f"note     {note}" for note in report.notes[:_SHOWN]]
    if report.missing_drives:
        more = len(report.missing_drives) - _SHOWN_DRIVES
        names = " ".join(report.missing_drives[:_SHOWN_DRIVES])
        lines.append(f"missing  {names}" + (f" and {more:,} more drives" if more > 0 else ""))
        if "/" in report.missing_drives[0] or report.missing_drives[0].isdecimal():
            lines.append(f"         put them at --raw, or give --download to read them from {PUBLIC_ARCHIVE}")
    return "\n".join(lines)


def _size(count: int) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count / 1e3:.0f} kB"
