"""Finds out why a KITTI drive was not found: looks one step away from its place."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from prep.raw.files import DATE, RawData

_SEQUENCES = ("sequences", "dataset")
_ARCHIVE = re.compile(r".+\.(tar|tgz|tar\.gz|tar\.bz2|7z|rar|zip\.\d+|zip\.part|part)", re.IGNORECASE)
_MOST_FOLDERS = 200


def what_is_there(raw: RawData, drive: str) -> str | None:
    """Likeliest reason why `drive` was not found in `raw`, and what to do; None if nothing suggests one.

    Args:
        drive: as in a split line: `2011_09_26/2011_09_26_drive_0001_sync`, or a sequence's number.
    """
    return next(_reasons(raw, drive), None)


def _reasons(raw: RawData, drive: str) -> Iterator[str]:
    yield from _grey(raw, drive)
    for url in raw.urls:
        local = Path(url.removeprefix("file://"))
        if "://" in url.removeprefix("file://"):
            continue
        if not os.path.lexists(local):
            yield f"{url} does not exist"
        elif local.is_dir():
            yield from _in_folder(local, drive)
    yield from raw.broken_zips()


def _grey(raw: RawData, drive: str) -> Iterator[str]:
    if drive.isdecimal():
        folders = [f"{top}sequences/{int(drive):02d}/image_0" for top in ("", "dataset/")]
        names = "image_0 and image_1; colour is image_2 and image_3, in data_odometry_color.zip"
    else:
        folders = [f"{drive}/image_00/data"]
        names = "image_00 and image_01; colour is image_02 and image_03"
    zips = [path.rpartition("/")[2].lower() for path in raw.zips()]
    if any(raw.files(folder) for folder in folders) or (
        zips and all("gray" in name or "grey" in name for name in zips)
    ):
        yield f"only the grey cameras are there ({names})"


def _holds_drives(folder: Path, drive: str) -> bool:
    """Whether a folder looks like the raw location of this drive."""
    if drive.isdecimal():
        return any((folder / name / ("" if name == "sequences" else "sequences")).is_dir() for name in _SEQUENCES)
    return (folder / drive).is_dir() or (folder / drive.partition("/")[0]).is_dir()


def _in_folder(root: Path, drive: str) -> Iterator[str]:
    real = root.resolve()
    if _holds_drives(real.parent, drive) and re.fullmatch(rf"{DATE}|sequences|dataset", real.name):
        yield f"{root} is a folder inside of what is needed: give --raw {real.parent}"
    if _holds_drives(real.parent.parent, drive) and re.fullmatch(rf"{DATE}|sequences", real.parent.name):
        yield f"{root} is a single drive: give --raw {real.parent.parent}"
    entries = _entries(real)
    for folder in entries:
        if not folder.is_dir():
            continue
        if _holds_drives(folder, drive):
            yield f"drives are one folder deeper: give --raw {root / folder.name}"
        for inner in _entries(folder):
            if inner.is_dir() and _holds_drives(inner, drive):
                yield f"drives are two folders deeper: give --raw {root / folder.name / inner.name}"
            if inner.suffix.lower() == ".zip":
                yield f"zips are one folder deeper: give --raw {root / folder.name}"
    archives = [entry.name for entry in entries if _ARCHIVE.fullmatch(entry.name)]
    if archives:
        yield f"{archives[0]} is not read: unpack it there, or rename it if it is a whole .zip"


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())[:_MOST_FOLDERS]
    except OSError:
        return []
