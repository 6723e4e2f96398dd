"""What the user asks for, with the split's own defaults filled in, and the source of it all."""

from __future__ import annotations

from prep.packing.encode import ImageFormat
from prep.packing.plan import Content, DepthSource, Plan
from prep.raw.sources import PUBLIC_ARCHIVE
from prep.raw.splits import NamedSplit, SplitLists
from prep.raw.velodyne import Convention
from shards.errors import InputError, UsageError
from shards.sample import Chroma, Codec

DEFAULT_SHARD_MB = 256
_MAX_SIDE = 16_384
_MAX_OFFSET = 1000


def parse_size(text: str) -> tuple[int, int] | None:
    """`640x192` -> (640, 192), width first; `native` -> None.

    Raises:
        UsageError: anything else, or a side outside 8 … 16384.
    """
    if text == "native":
        return None
    width, _, height = text.partition("x")
    if not (width.isdecimal() and height.isdecimal()):
        raise UsageError(f"--size {text}: give width and height in pixels, for example 640x192, or native")
    size = int(width), int(height)
    if not all(8 <= side <= _MAX_SIDE for side in size):
        raise UsageError(f"--size {text}: each side must be 8 to {_MAX_SIDE} pixels")
    return size


def parse_frames(text: str) -> tuple[int, ...]:
    """`0,-1,1` -> (0, -1, 1): the target first, then the others as given.

    Raises:
        UsageError: not whole numbers, 0 missing, a repeated or far-off one.
    """
    try:
        frames = [int(word) for word in text.split(",")]
    except ValueError:
        raise UsageError(f"--frames {text}: give offsets with commas, for example 0,-1,1") from None
    if 0 not in frames or len(set(frames)) != len(frames) or max(map(abs, frames)) > _MAX_OFFSET:
        raise UsageError(f"--frames {text}: offsets must hold 0 (the target itself), and each only once")
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
    codec: Codec = "jpeg",
    quality: int | None = None,
    chroma: Chroma | None = None,
    seed: int = 0,
    limit: int | None = None,
    shard_mb: int = DEFAULT_SHARD_MB,
) -> Content:
    """What a sample holds. None takes the named split's default: everything that mono, stereo and validation need.

    Raises:
        UsageError: a value that is not possible, or options that contradict each other.
    """
    default = lists.named or NamedSplit({})
    if quality is not None and not 1 <= quality <= 100:
        raise UsageError(f"--quality {quality}: 1 to 100; without it, steps chosen for training")
    if quality is not None and codec != "jpeg":
        raise UsageError(f"--quality {quality} goes with --codec jpeg; {codec} keeps every pixel as it is")
    if chroma is not None and codec != "jpeg":
        raise UsageError(f"--chroma {chroma} goes with --codec jpeg; {codec} keeps every pixel as it is")
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
        seed=seed,
        limit=limit,
        shard_bytes=shard_mb << 20,
    )


def refuse_empty(plan: Plan, urls: list[str]) -> None:
    """Tell what is expected at `--raw` where not one drive of the split is there.

    Raises:
        InputError: that message.
    """
    if plan.found or not plan.missing_drives:
        return
    missing = plan.missing_drives
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
        f"none of the split's {len(missing)} drives (first: {missing[0]}) is at {', '.join(urls)}; expected there: "
        f"{expected}; give their folder or base URL as --raw, or --download to read them from {PUBLIC_ARCHIVE} "
        f"(or see {page})"
    )
