"""`md2 prep --check`: reports what packing would need, find, read and write, without packing."""

from __future__ import annotations

from collections import Counter

from prep.packing.encode import depth_map, encode_image
from prep.packing.plan import BROKEN_DRIVE, Content, PackingPlan
from prep.raw.calibration import other
from prep.raw.files import PUBLIC_ARCHIVE, read
from prep.raw.splits import CameraSide, SplitLists
from prep.raw.velodyne import encode_png, points_in_view, project, read_scan
from shards.cache.folder import format_bytes
from shards.errors import SampleError

_BYTES_PER_PIXEL = {"jpeg": 0.68, "png": 1.8, "ppm": 3.0}
"""Of KITTI's frames at 640x192 (JPEG as packed by default), if there is no frame to measure."""
_DEPTH_BYTES = 56_000
_NATIVE = (1242, 375)
_RAW_IMAGE, _RAW_SCAN = 830_000, 1_930_000
"""Mean bytes of a colour PNG and of a scan of KITTI."""
_OVERHEAD = 8 * 1024
"""Tar headers, padding and the small components of a sample."""
_TRIED = 6
_SHOWN = 20
_SHOWN_DRIVES = 4


def check(plan: PackingPlan, lists: SplitLists) -> str:
    """Report of a plan, in lines of text: needed, present, broken, and estimated sizes.

    The estimate encodes a few frames. It includes what `whole` data would give, and the scratch folder at its fullest.

    Args:
        lists: the split that the plan was made from.

    Raises:
        StorageError: the network failed while frames were fetched.
    """
    content = plan.content
    lines = [line for part in plan.samples for line in lists.parts[part][: content.limit]]
    bad = [line for part in plan.samples for line in lists.bad[part]]
    needed: set[tuple[str, int, CameraSide]] = set()
    for line in lines:
        needed.update((line.drive, line.frame + offset, line.side) for offset in content.frames)
        if content.stereo:
            needed.add((line.drive, line.frame, other(line.side)))
    present = sum(name in plan.found and frame in plan.found[name].images[side] for name, frame, side in needed)
    image, depth, measured, broken = _measure(plan)
    broken = [*map(str, bad), *dict.fromkeys(s.detail for s in plan.skipped if s.reason == BROKEN_DRIVE), *broken]
    with_depth = sum(sample.depth for samples in plan.samples.values() for sample in samples)
    per_sample = len(content.offsets) * image + _OVERHEAD
    whole = len(lines) * (per_sample + (depth if content.depth else 0))
    parts = ", ".join(f"{len(samples):,} {part}" for part, samples in plan.samples.items())
    drives, missing = len({line.drive for line in lines}), plan.missing_drives
    reasons = Counter(skip.reason for skip in plan.skipped).most_common()
    basis = "measured on some of these frames" if measured else "by KITTI's usual figures"
    text = [
        f"drives   {drives:,} needed, {drives - len(missing):,} found, {len(missing):,} missing",
        f"frames   {len(needed):,} needed, {present:,} present, {len(needed) - present:,} missing",
        f"samples  {len(lines) + len(bad):,} lines, {plan.total:,} can be packed ({parts}), {with_depth:,} with depth",
        *(f"         {count:,} cannot: {reason}" for reason, count in reasons),
        f"to read  {format_bytes(plan.input_bytes)}",
        f"shards   about {format_bytes(plan.total * per_sample + with_depth * depth)}, {basis}",
        f"         about {format_bytes(whole)} if nothing were missing",
        f"scratch  about {format_bytes(plan.images * image + with_depth * depth)}, and one shard for each worker",
        *(f"broken   {message}" for message in broken[:_SHOWN]),
        *([f"         and {len(broken) - _SHOWN:,} more"] if len(broken) > _SHOWN else []),
        *(f"note     {note}" for note in plan.notes[:_SHOWN]),
    ]
    if missing:
        more = f" and {len(missing) - _SHOWN_DRIVES:,} more drives" if len(missing) > _SHOWN_DRIVES else ""
        text.append(f"missing  {' '.join(missing[:_SHOWN_DRIVES])}{more}")
        if "/" in missing[0] or missing[0].isdecimal():
            scans = len({(line.drive, line.frame) for line in lines if line.drive in missing}) if content.depth else 0
            amount = format_bytes((len(needed) - present) * _RAW_IMAGE + scans * _RAW_SCAN)
            text.append(f"         put them at --raw, or give --download to read about {amount} from {PUBLIC_ARCHIVE}")
    return "\n".join(text)


def _measure(plan: PackingPlan) -> tuple[int, int, bool, list[str]]:
    """Mean bytes of an encoded image and of a depth map, whether images were measured, and messages of broken frames.

    A few time steps spread over the plan are encoded; what none of them has is estimated by KITTI's usual figures.
    """
    steps = [(name, step) for name, steps in sorted(plan.time_steps.items()) for step in steps]
    images, maps, broken = list[int](), list[int](), list[str]()
    for name, time_step in steps[:: max(1, len(steps) // _TRIED)][:_TRIED]:
        drive = plan.drives[name]
        calibration = drive.calibration
        try:
            side, ref = next(iter(time_step.images.items()))
            data, native = encode_image(read(ref), ref, calibration.size, plan.content.format, drive.levels, drive.view)
            images.append(len(data))
            scan = time_step.scan
            if scan is not None and side in time_step.depth_sides:
                matrix = calibration.lidar_projection(side)
                points = read_scan(read(scan), scan.place, time_step.typical_scan)
                seen = points_in_view(points, [matrix], native[0])
                maps.append(len(encode_png(project(seen, matrix, native))))
            maps += [len(depth_map(read(ready), ready, native, drive.view)) for ready in time_step.depth_maps.values()]
        except SampleError as error:
            broken.append(str(error))
    image = sum(images) // len(images) if images else _usual_image_bytes(plan.content)
    return image, sum(maps) // len(maps) if maps else _DEPTH_BYTES, bool(images), broken


def _usual_image_bytes(content: Content) -> int:
    width, height = content.format.size or _NATIVE
    return int(width * height * _BYTES_PER_PIXEL[content.format.codec])
