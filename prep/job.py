"""One `md2 prep` from its options: which data, which split, which layout; then the plan."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from prep.options import make_content, refuse_empty
from prep.packing.plan import Content, OnError, Plan, make_plan
from prep.raw.drives import Kitti, Layout
from prep.raw.folder import FolderLayout, split_drives
from prep.raw.sources import PUBLIC_ARCHIVE, RawData
from prep.raw.splits import SplitLists, read_split
from shards.errors import InputError, UsageError

_SHOWN = 5
PUBLIC = "public"
"""Value of `--download` that stands for KITTI's public archive."""


@dataclass(frozen=True)
class Job:
    """What to pack, and where to: the split's lists, the layout of the raw data, what a sample holds."""

    lists: SplitLists
    layout: Layout
    content: Content
    urls: list[str]
    out: str

    def drives(self, parts: Sequence[str] | None) -> int:
        """Drives that the lists of these parts name (None: of all)."""
        chosen = self.lists.parts if parts is None else parts
        lines = (self.lists.parts.get(part, [])[: self.content.limit] for part in chosen)
        return len({line.drive for rows in lines for line in rows})

    def plan(
        self, on_error: OnError, parts: Sequence[str] | None, progress: Callable[[str], None] = lambda drive: None
    ) -> Plan:
        """Look up every line's files; as `make_plan`."""
        return make_plan(self.lists, self.layout, self.content, on_error, parts, progress)

    def refuse_empty(self, plan: Plan) -> None:
        """Tell what was expected where not one drive of the split is there.

        Raises:
            InputError: that message.
        """
        if isinstance(self.layout, FolderLayout) and plan.missing_drives and not plan.found:
            raise InputError(
                f"none of the split's {len(plan.missing_drives)} drives (first: {plan.missing_drives[0]}) is at "
                f"{', '.join(self.urls)}; drives there: {', '.join(self.layout.drives()[:_SHOWN])}"
            )
        refuse_empty(plan, self.urls)


def make_job(
    *,
    dataset: Literal["kitti", "folder"],
    split: str | None,
    splits: Path | None,
    raw: Sequence[str],
    download: str | None,
    out: str | None,
    **content: Any,
) -> Job:
    """Put the options together; `content` are those of `make_content`.

    Raises:
        UsageError: options that are impossible or contradict each other.
        InputError: a split or a camera file cannot be read, or there are no drives.
    """
    urls = [*raw, *([] if download is None else [PUBLIC_ARCHIVE if download == PUBLIC else download])]
    if dataset == "folder":
        return _folder_job(split, splits, urls, download, out, content)
    if split is None:
        raise UsageError("--split is missing: eigen_zhou, eigen_full, eigen, eigen_benchmark, odom, a file or a folder")
    lists = read_split(split, splits)
    what = make_content(lists, **content)
    return Job(lists, Kitti(RawData(urls), what.depth), what, urls, out or f"./kitti_shards/{lists.name}")


def _folder_job(
    split: str | None,
    splits: Path | None,
    urls: list[str],
    download: str | None,
    out: str | None,
    content: dict[str, Any],
) -> Job:
    """Own drives: stereo and ground truth default to whether there are any."""
    for option, value in (("--download", download), ("--depth-source", content.get("depth_source"))):
        if value is not None:
            raise UsageError(f"{option} is for KITTI; --dataset folder takes what lies at --raw")
    layout = FolderLayout(RawData(urls), depth=bool(content["depth"]))
    drives = [drive for name in layout.drives() if (drive := layout.open(name)) is not None]
    pairs = any(drive.images["r"] for drive in drives)
    if content["stereo"] and not pairs:
        raise UsageError(f"--stereo: no drive at {', '.join(urls)} has a right camera with baseline in camera.yaml")
    content["stereo"] = pairs if content["stereo"] is None else content["stereo"]
    content["depth"] = content["depth"] and any(drive.depth_maps["l"] for drive in drives)
    name = re.sub(r"[^A-Za-z0-9_-]+", "_", Path(urls[0].rstrip("/")).resolve().name) or "drives"
    unsplit = SplitLists(name, {}, {}, "")
    what = make_content(unsplit, **{**content, "depth_source": "dense" if content["depth"] else None})
    lists = split_drives(drives, name, what.frames, what.stereo) if split is None else read_split(split, splits)
    return Job(lists, layout, what, urls, out or f"./shards/{lists.name}")
