"""Turns the options of `md2 prep` into a request: the split's lists, the layout of the raw data, the content."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from prep.packing.encode import ImageFormat
from prep.packing.plan import Content, DepthSource, OnError, PackingPlan, make_plan
from prep.raw.files import PUBLIC_ARCHIVE, RawData
from prep.raw.folder import FolderLayout, size_note, split_drives
from prep.raw.kitti import Kitti, Layout
from prep.raw.missing import what_is_there
from prep.raw.splits import NamedSplit, SplitLists, read_split
from prep.raw.velodyne import Convention
from prep.workers import Progress
from shards.errors import InputError, UsageError
from shards.sample import Chroma, Codec

DEFAULT_SHARD_MB = 256
PUBLIC = "public"
"""Value of `--download` for KITTI's public archive."""
_MAX_SIDE = 16_384
_MAX_OFFSET = 1000
_MAX_OFFSETS = 100
"""The manifest's limit."""
_SHOWN = 5
_SIDES, _LEAST_SIDE = 32, 64


def parse_size(text: str) -> tuple[int, int] | None:
    """`640x192` -> (640, 192), width first; `native` -> None.

    Raises:
        UsageError: another form, or a side outside 8 to 16384.
    """
    if text == "native":
        return None
    match = re.fullmatch(r"(\d{1,9})x(\d{1,9})", text)
    if match is None:
        raise UsageError(f"--size {text}: give width and height in pixels, for example 640x192, or native")
    size = int(match[1]), int(match[2])
    if not all(8 <= side <= _MAX_SIDE for side in size):
        raise UsageError(f"--size {text}: each side must be 8 to {_MAX_SIDE} pixels")
    return size


def parse_frames(text: str) -> tuple[int, ...]:
    """`0,-1,1` -> (0, -1, 1): the target first, then the others as given.

    Raises:
        UsageError: not whole numbers, no 0, a repeated or too large offset, or too many.
    """
    try:
        frames = [int(word) for word in text.split(",")]
    except ValueError:
        raise UsageError(f"--frames {text[:80]}: give offsets with commas, for example 0,-1,1") from None
    shown = text if len(text) <= 80 else text[:80] + "…"
    if 0 not in frames:
        raise UsageError(f"--frames {shown}: offsets must hold 0, the target itself")
    if len(set(frames)) != len(frames):
        raise UsageError(f"--frames {shown}: an offset is repeated")
    if far := [frame for frame in frames if abs(frame) > _MAX_OFFSET]:
        raise UsageError(f"--frames {shown}: {far[0]} is too far; offsets are -{_MAX_OFFSET} to {_MAX_OFFSET}")
    if len(frames) > _MAX_OFFSETS:
        raise UsageError(f"--frames {shown}: {len(frames)} offsets; at most {_MAX_OFFSETS}")
    return (0, *(frame for frame in frames if frame))


def make_content(
    lists: SplitLists,
    *,
    size: str = "640x192",
    frames: str | None = None,
    stereo: bool | None = None,
    depth: bool = True,
    depth_source: DepthSource | None = None,
    depth_convention: Convention | None = None,
    motion: bool = False,
    codec: Codec = "jpeg",
    quality: int | None = None,
    chroma: Chroma | None = None,
    seed: int = 0,
    limit: int | None = None,
    shard_mb: int = DEFAULT_SHARD_MB,
) -> Content:
    """Content of the samples. None is the named split's default: all that mono, stereo and validation need.

    Raises:
        UsageError: an impossible value, or options that contradict each other.
    """
    default = lists.named or NamedSplit({})
    if quality is not None and not 1 <= quality <= 100:
        raise UsageError(f"--quality {quality}: 1 to 100; without it, steps chosen for training")
    for option, value in (("--quality", quality), ("--chroma", chroma)):
        if value is not None and codec != "jpeg":
            raise UsageError(f"{option} {value} goes with --codec jpeg; {codec} keeps every pixel as it is")
    if limit is not None and limit < 1:
        raise UsageError(f"--limit {limit}: at least 1")
    if not 1 <= shard_mb <= 10_000:
        raise UsageError(f"--shard-mb {shard_mb}: 1 to 10000")
    source = depth_source or default.depth_source
    convention = depth_convention or (default.depth_convention if source == "velodyne" else "camera_z")
    if source != "velodyne" and convention == "lidar_x":
        raise UsageError(
            "--depth-convention lidar_x goes with --depth-source velodyne only; improved maps are camera_z"
        )
    return Content(
        frames=default.frames if frames is None else parse_frames(frames),
        stereo=default.stereo if stereo is None else stereo,
        depth=source if depth else None,
        convention=convention,
        format=ImageFormat(parse_size(size), codec, quality, chroma or "420"),
        motion=motion,
        seed=seed,
        limit=limit,
        shard_bytes=shard_mb << 20,
    )


@dataclass(frozen=True)
class Request:
    """The data to pack: the split's lists, the layout of the raw data at `urls`, the content; and the target `out`."""

    lists: SplitLists
    layout: Layout
    content: Content
    urls: list[str]
    out: str

    def drives(self, parts: Sequence[str] | None) -> int:
        """Number of drives that the lists of these parts name; None: of all parts."""
        chosen = self.lists.parts if parts is None else parts
        lines = (self.lists.parts.get(part, [])[: self.content.limit] for part in chosen)
        return len({line.drive for rows in lines for line in rows})

    def plan(
        self, on_error: OnError, parts: Sequence[str] | None, progress: Callable[[str], None] = lambda drive: None
    ) -> PackingPlan:
        """Look up the files of each line; as `make_plan`."""
        return make_plan(self.lists, self.layout, self.content, on_error, parts, progress)

    def refuse_empty(self, plan: PackingPlan) -> None:
        """Refuse a plan in which no drive of the split has data.

        Raises:
            InputError: says what was expected and what is at the raw location.
        """
        if isinstance(self.layout, FolderLayout) and plan.missing_drives and not plan.found:
            raise InputError(
                f"none of the split's {len(plan.missing_drives)} drives (first: {plan.missing_drives[0]}) is at "
                f"{', '.join(self.urls)}; drives there: {', '.join(self.layout.drives()[:_SHOWN])}"
            )
        refuse_empty(plan, self.layout.raw, f", or --download to read them from {PUBLIC_ARCHIVE}")


def make_request(
    *,
    dataset: Literal["kitti", "folder"],
    split: str | None,
    splits: Path | None,
    raw: Sequence[str],
    download: str | None,
    out: str | None,
    follow_links: bool = False,
    progress: Progress | None = None,
    **content: Any,
) -> Request:
    """The request of a command line; `content` are the options of `make_content`.

    Args:
        progress: of videos, which are decoded to choose their frames.

    Raises:
        UsageError: options that are impossible or contradict each other.
        InputError: a split or a camera file cannot be read, or there are no drives.
    """
    urls = [*raw, *([] if download is None else [PUBLIC_ARCHIVE if download == PUBLIC else download])]
    if dataset == "folder":
        for option, value in (("--download", download), ("--depth-source", content.get("depth_source"))):
            if value is not None:
                raise UsageError(f"{option} is for KITTI; --dataset folder takes what lies at --raw")
        return _own_drives(split, splits, RawData(urls, follow_links), out, content, progress)
    if split is None:
        raise UsageError("--split is missing: eigen_zhou, eigen_full, eigen, eigen_benchmark, odom, a file or a folder")
    lists = read_split(split, splits)
    what = make_content(lists, **content)
    lists = replace(lists, notes=(*lists.notes, *_size_notes(what.format.size)))
    layout = Kitti(
        RawData(urls, follow_links), what.depth, "; for your own drives give --dataset folder", motion=what.motion
    )
    return Request(lists, layout, what, urls, out or f"./kitti_shards/{lists.name}")


def _own_drives(
    split: str | None,
    splits: Path | None,
    raw: RawData,
    out: str | None,
    content: dict[str, Any],
    progress: Progress | None,
) -> Request:
    """The request for own drives. Stereo and ground truth default to whether the drives have them."""
    layout = FolderLayout(raw, bool(content["depth"]), content["stereo"], progress, content.get("motion", False))
    drives = [drive for name in layout.drives() if (drive := layout.open(name)) is not None]
    pairs = any(drive.images["r"] for drive in drives)
    if content["stereo"] and not pairs:
        raise UsageError(f"--stereo: no drive at {', '.join(raw.urls)} has a right camera with baseline in camera.yaml")
    content["stereo"] = pairs if content["stereo"] is None else content["stereo"]
    content["depth"] = content["depth"] and any(drive.depth_maps.get("l") for drive in drives)
    name = re.sub(r"[^A-Za-z0-9_-]+", "_", Path(raw.urls[0].rstrip("/")).resolve().name) or "drives"
    unsplit = SplitLists(name, {}, {}, "")
    what = make_content(unsplit, **{**content, "depth_source": "dense" if content["depth"] else None})
    lists = split_drives(drives, name, what.frames, what.stereo) if split is None else read_split(split, splits)
    size = what.format.size
    lists = replace(lists, notes=(*lists.notes, *_size_notes(size), *size_note(drives, size)))
    return Request(lists, layout, what, raw.urls, out or f"./shards/{lists.name}")


def _size_notes(size: tuple[int, int] | None) -> list[str]:
    """A note if no network takes images of this size as they are."""
    if size is None or (min(size) >= _LEAST_SIDE and not any(side % _SIDES for side in size)):
        return []
    width, height = (max(_LEAST_SIDE, round(side / _SIDES) * _SIDES) for side in size)
    return [
        f"networks take multiples of {_SIDES} from {_LEAST_SIDE} on, so training would resize {size[0]}x{size[1]} in "
        f"every batch; --size {width}x{height} avoids that"
    ]


def refuse_empty(plan: PackingPlan, raw: RawData, download: str = "") -> None:
    """Refuse a plan in which no drive of a split of KITTI has data.

    Args:
        download: advice of a command that can download, for the message.

    Raises:
        InputError: says what is expected at `--raw`, and what is there instead.
    """
    if plan.found or not plan.missing_drives:
        return
    missing = plan.missing_drives
    there = what_is_there(raw, missing[0])
    if missing[0].isdecimal():
        expected = (
            "KITTI odometry: sequences/00/image_2/000000.png (or .jpg), image_3, calib.txt, and poses/00.txt; or its "
            "zips as downloaded, data_odometry_color.zip and data_odometry_calib.zip"
        )
        page = "https://www.cvlibs.net/datasets/kitti/eval_odometry.php"
    else:
        expected = (
            "2011_09_26/2011_09_26_drive_0001_sync/image_02/data/0000000000.png (or .jpg), image_03, velodyne_points, "
            "and 2011_09_26/calib_cam_to_cam.txt; or KITTI's zips as downloaded, 2011_09_26_drive_0001_sync.zip and "
            "2011_09_26_calib.zip"
        )
        page = "https://www.cvlibs.net/datasets/kitti/raw_data.php"
    raise InputError(
        f"none of the split's {len(missing)} drives (first: {missing[0]}) is at {', '.join(raw.urls)}"
        f"{'; ' + there if there else ''}; expected there: {expected}; give their folder or base URL as --raw"
        f"{download} (or see {page})"
    )
