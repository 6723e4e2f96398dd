"""Your own drives: folders of frames and a small YAML with the camera.

    drives/camera.yaml              one for all drives, or one in each
    drives/monday/left/000001.png   frames of the (left) camera, .png or .jpg, in the order of their names
    drives/monday/right/000001.png  optional, the right camera of a rectified pair, under the same names
    drives/monday/depth/000001.png  optional ground truth of the left frames: 16-bit PNG, metres x 256, 0 = none

camera.yaml, in pixels of the frames as they are, pixel centres at integers:

    width: 1280
    height: 720
    fx: 912.4
    fy: 912.4
    cx: 639.5
    cy: 359.5
    baseline: 0.12     # metres between the cameras; only with a right camera
"""

from __future__ import annotations

import hashlib
import re
from typing import Literal

import numpy as np
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from prep.raw.calibration import Rig
from prep.raw.drives import Drive, Frames
from prep.raw.sources import RawData, Ref, read
from prep.raw.splits import Side, SplitLine, SplitLists
from shards.errors import InputError

CAMERA_FILE = "camera.yaml"
_IMAGE = re.compile(r"(.+)\.(png|jpg|jpeg)", re.IGNORECASE)
_DEPTH = re.compile(r"(.+)\.png", re.IGNORECASE)
_DIGITS = re.compile(r"(\d+)")
_DEEPEST = 4
_LONGEST_KEY = 70
"""A tar's names are below 100 characters, of which side, frame and component take 24."""


class Camera(BaseModel):
    """`camera.yaml`. Folders are relative to a drive's; `left: .` where frames lie in the drive's folder itself.

    `numbering` says what makes two frames neighbours: `order`, that their names follow each other (timestamps do);
    `names`, that the last number in their names does, so that a dropped frame is a gap.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    width: int = Field(gt=0)
    height: int = Field(gt=0)
    fx: float = Field(gt=0)
    fy: float = Field(gt=0)
    cx: float
    cy: float
    baseline: float | None = Field(None, gt=0)
    left: str = "left"
    right: str = "right"
    depth: str = "depth"
    numbering: Literal["order", "names"] = "order"

    def rig(self, where: str) -> Rig:
        """A rectified pair: the right camera is `baseline` metres to the right, with the same intrinsics."""
        left = np.array([[self.fx, 0, self.cx, 0], [0, self.fy, self.cy, 0], [0, 0, 1, 0]], dtype=np.float64)
        right = left.copy()
        right[0, 3] = -self.fx * (self.baseline or 0.0)
        return Rig({"l": left, "r": right}, (self.width, self.height), None, where)


class FolderLayout:
    """Drives in folders, found by their camera file and frames.

    Args:
        raw: folders that hold the drives.
        depth: whether ground truth is wanted.
    """

    def __init__(self, raw: RawData, depth: bool = True) -> None:
        self.raw = raw
        self._depth = depth
        self._cameras: dict[str, Camera | None] = {}

    def drives(self) -> list[str]:
        """Names of all drives, sorted: folders, relative to the raw data's, that hold frames.

        Raises:
            InputError: there is none; or a camera file is broken.
        """
        found = self._below("", 0)
        if not found:
            raise InputError(
                f"{', '.join(self.raw.urls)}: no drives; expected: {CAMERA_FILE} with width, height, fx, fy, cx, "
                "cy, and a folder for each drive with its frames in left/, for example drives/monday/left/000001.png"
            )
        return found

    def _below(self, folder: str, level: int) -> list[str]:
        camera = self._camera(folder)
        if camera is not None and folder and self._images(folder, camera.left):
            return [folder]
        if level == _DEEPEST:
            return []
        inner = [
            f"{folder}/{name}" if folder else name for name in self.raw.folders(folder) if not name.startswith(".")
        ]
        return sorted(name for path in inner for name in self._below(path, level + 1))

    def open(self, name: str) -> Drive | None:
        camera = self._camera(name)
        if camera is None:
            raise InputError(f"{name}: no {CAMERA_FILE} in this drive's folder or above it")
        left = self._images(name, camera.left)
        if not left:
            return None
        right = self._images(name, camera.right) if camera.baseline is not None else {}
        depth = matching(self.raw.files(_join(name, camera.depth)), _DEPTH) if self._depth else {}
        numbers = _numbers(sorted(left, key=natural), camera.numbering, name)
        return Drive(
            name=name,
            key=drive_key(name),
            images={"l": _frames(left, numbers), "r": _frames(right, numbers)},
            scans={},
            depth_maps={"l": _frames(depth, numbers), "r": {}},
            rig=camera.rig(_join(name, CAMERA_FILE)),
            kitti=False,
        )

    def _images(self, drive: str, folder: str) -> dict[str, Ref]:
        return matching(self.raw.files(_join(drive, folder)), _IMAGE)

    def _camera(self, folder: str) -> Camera | None:
        """The camera file of the folder or the nearest one above it."""
        if folder not in self._cameras:
            ref = self.raw.files(folder).get(CAMERA_FILE)
            above = None if not folder else self._camera(folder.rpartition("/")[0])
            self._cameras[folder] = above if ref is None else parse_camera(read(ref), ref.place)
        return self._cameras[folder]


def drive_key(name: str) -> str:
    """A drive's name in sample keys: letters, digits, `_`, `-`, and short enough for a tar.

    What that takes away from names in other scripts, or from long ones, comes back as a hash.
    """
    key = re.sub(r"[^A-Za-z0-9_-]+", "_", name)
    if name.isascii() and len(key) <= _LONGEST_KEY:
        return key
    return f"{key[: _LONGEST_KEY - 9]}_{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def parse_camera(content: bytes, where: str) -> Camera:
    """A camera file's content; `where` goes into the message.

    Raises:
        InputError: not YAML, or a field missing, unknown or impossible; names it.
    """
    try:
        data = yaml.safe_load(content.decode())
    except (yaml.YAMLError, ValueError) as error:  # also: not UTF-8, or a date that there is not
        raise InputError(f"{where}: not YAML ({' '.join(str(error).split())})") from error
    try:
        return Camera.model_validate(data if data is not None else {})
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "file"
        raise InputError(f"{where}: {field}: {first['msg']}; needed are width, height, fx, fy, cx, cy") from error


def matching(files: dict[str, Ref], pattern: re.Pattern[str]) -> dict[str, Ref]:
    """Files that match, by the pattern's first group (the stem); `.png` before `.jpg`."""
    found: dict[str, Ref] = {}
    for name in sorted(files, reverse=True):
        match = pattern.fullmatch(name)
        if match is not None and not name.startswith("."):  # macOS puts `._frame.png` beside each frame
            found.setdefault(match[1], files[name])
    return found


def natural(stem: str) -> list[tuple[int, int | str]]:
    """Sort key: `frame2` before `frame10`."""
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in _DIGITS.split(stem) if part]


def _numbers(stems: list[str], numbering: Literal["order", "names"], drive: str) -> dict[str, int]:
    """Frame number of each stem.

    Raises:
        InputError: by names, and a name has no number, or two have the same.
    """
    if numbering == "order":
        return {stem: number for number, stem in enumerate(stems)}
    numbers: dict[str, int] = {}
    for stem in stems:
        digits = _DIGITS.findall(stem)
        if not digits or int(digits[-1]) in numbers.values():
            raise InputError(
                f"{drive}: frame {stem!r}: no number, or another frame's; give numbering: order in {CAMERA_FILE}"
            )
        numbers[stem] = int(digits[-1])
    return numbers


def _frames(files: dict[str, Ref], numbers: dict[str, int]) -> Frames:
    return {numbers[stem]: ref for stem, ref in files.items() if stem in numbers}


def _join(folder: str, name: str) -> str:
    return "/".join(part for part in (folder, name) if part not in ("", "."))


def split_drives(drives: list[Drive], name: str, frames: tuple[int, ...], stereo: bool, val: float = 0.1) -> SplitLists:
    """Lists for all drives: the last tenth of each is for validation, the rest for training.

    Frames at a drive's ends, and those around the border whose neighbours the other part holds, are left out: they
    give no sample.

    Args:
        val: share of each drive's frames that goes to `val`.

    Raises:
        InputError: no drive is long enough for a training sample.
    """
    before, after = max(0, *(-f for f in frames)), max(0, *frames)
    parts: dict[str, list[SplitLine]] = {"train": [], "val": []}
    for drive in drives:
        sides: list[Side] = ["l", "r"] if stereo and drive.images["r"] else ["l"]
        numbers = sorted(drive.images["l"])
        border = numbers[len(numbers) - round(len(numbers) * val)] if round(len(numbers) * val) else numbers[-1] + 1
        for number in numbers:
            neighbours = [number + f for f in frames]
            for side in sides:
                if any(n not in drive.images[side] for n in neighbours):
                    continue
                if number + after < border:
                    parts["train"].append(SplitLine(drive.name, number, side, drive.name))
                elif number - before >= border:
                    parts["val"].append(SplitLine(drive.name, number, side, drive.name))
    if not parts["train"]:
        names, offsets = ", ".join(drive.name for drive in drives), ",".join(map(str, frames))
        raise InputError(f"{names}: too few frames for --frames {offsets}")
    parts = {part: lines for part, lines in parts.items() if lines}
    text = "".join(f"{part}\n" + "".join(f"{line.text}\n" for line in lines) for part, lines in sorted(parts.items()))
    return SplitLists(name, parts, {part: [] for part in parts}, hashlib.sha256(text.encode()).hexdigest())
