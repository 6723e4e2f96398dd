"""What a drive holds, whatever the layout: KITTI raw and KITTI odometry (your own folders: prep/folder.py)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Protocol

from prep.raw.calibration import CAMERA_NUMBER, Matrix, Rig, read_odometry_rig, read_poses, read_raw_rig
from prep.raw.sources import RawData, Ref
from prep.raw.splits import Side
from shards.errors import InputError

Frames = dict[int, Ref]
"""Frame number -> file."""

_IMAGE = re.compile(r"(\d+)\.(png|jpg|jpeg)", re.IGNORECASE)
_SCAN = re.compile(r"(\d+)\.bin", re.IGNORECASE)
_DEPTH = re.compile(r"(\d+)\.png", re.IGNORECASE)
_RAW_DRIVE = re.compile(r"(\d{4}_\d\d_\d\d)/(\1_drive_\d{4}_(?:sync|extract))")
_NOT_KITTI = "true_pose_02.txt"
"""A file that `md2 sample` puts into its drives, and KITTI never does."""
_SEQUENCE = re.compile(r"\d{1,2}")


@dataclass(frozen=True)
class Drive:
    """One drive (a sequence, in KITTI odometry): its files by frame number, and its calibration.

    Attributes:
        name: as the split's lines have it.
        key: the same for sample keys: letters, digits, `_`, `-`.
        images: side -> frames.
        scans: lidar scans by frame; empty where depth was not asked for.
        depth_maps: side -> ground-truth PNGs by frame (improved or dense); empty where not asked for.
        rig: the cameras.
        kitti: whether the images are KITTI's, whose licence goes with them.
        poses: (N, 3, 4) camera-to-world poses by frame, metres, where the sequence has them.
    """

    name: str
    key: str
    images: dict[Side, Frames]
    scans: Frames
    depth_maps: dict[Side, Frames]
    rig: Rig
    kitti: bool = True
    poses: Matrix | None = None


class Layout(Protocol):
    """How drives lie in the raw data."""

    raw: RawData

    def open(self, name: str) -> Drive | None:
        """The drive; None where there is no such drive.

        Raises:
            InputError: its calibration or the archive it is in is missing or broken.
        """


class Kitti:
    """KITTI raw (`2011_09_26/2011_09_26_drive_0001_sync`) and KITTI odometry (`9`), told apart by the drive's name.

    Args:
        raw: where the files are.
        depth: None, or which ground truth to look for.
    """

    def __init__(self, raw: RawData, depth: str | None) -> None:
        self.raw = raw
        self._depth = depth
        self._rigs: dict[tuple[str, bool], Rig] = {}

    def open(self, name: str) -> Drive | None:
        match = _RAW_DRIVE.fullmatch(name)
        if match is not None:
            return self._open_raw(date=match[1], drive=match[2])
        if _SEQUENCE.fullmatch(name):
            return self._open_sequence(name)
        raise InputError(
            f"drive {name!r} is neither KITTI raw's (2011_09_26/2011_09_26_drive_0001_sync) nor odometry's (09); for "
            "your own drives give --dataset folder"
        )

    def _open_raw(self, date: str, drive: str) -> Drive | None:
        folder = f"{date}/{drive}"
        images = {
            side: numbered(self.raw.files(f"{folder}/image_{n}/data"), _IMAGE) for side, n in CAMERA_NUMBER.items()
        }
        if not any(images.values()):
            return None
        velodyne = self._depth == "velodyne"
        scans = numbered(self.raw.files(f"{folder}/velodyne_points/data"), _SCAN) if velodyne else {}
        maps = {side: self._improved(date, drive, number) for side, number in CAMERA_NUMBER.items()}
        rig = self._rigs.get((date, bool(scans)))
        if rig is None:
            rig = self._rigs[date, bool(scans)] = read_raw_rig(date, self.raw.read, depth=bool(scans))
        return Drive(folder, drive, images, scans, maps, rig, kitti=_NOT_KITTI not in self.raw.files(folder))

    def _improved(self, date: str, drive: str, camera: str) -> Frames:
        """The depth benchmark's maps, as its zip has them or moved into the raw folders."""
        if self._depth != "improved":
            return {}
        inner = f"{drive}/proj_depth/groundtruth/image_{camera}"
        frames: Frames = {}
        for top in ("train", "val", date, ""):
            frames = numbered(self.raw.files(f"{top}/{inner}" if top else inner), _DEPTH) | frames
        return frames

    def _open_sequence(self, name: str) -> Drive | None:
        number = f"{int(name):02d}"
        for top in ("sequences", "dataset/sequences"):
            folder = f"{top}/{number}"
            images: dict[Side, Frames] = {
                "l": numbered(self.raw.files(f"{folder}/image_2"), _IMAGE),
                "r": numbered(self.raw.files(f"{folder}/image_3"), _IMAGE),
            }
            if any(images.values()):
                break
        else:
            return None
        velodyne = self._depth == "velodyne"
        scans = numbered(self.raw.files(f"{folder}/velodyne"), _SCAN) if velodyne else {}
        rig = read_odometry_rig(folder, self.raw.read, depth=bool(scans))
        poses_folder = folder.replace(f"sequences/{number}", "poses")
        poses = self.raw.files(poses_folder).get(f"{number}.txt")
        matrices = None if poses is None else read_poses(poses.path, self.raw.read(poses.path))
        return Drive(name, f"odom_{number}", images, scans, {"l": {}, "r": {}}, rig, poses=matrices)


def numbered(files: dict[str, Ref], pattern: re.Pattern[str]) -> Frames:
    """Files whose name is a frame number by that number; of two with the same one the first by name, reversed.

    That is: `.png` before `.jpg`, which is what was made from it.
    """
    frames: Frames = {}
    for name in sorted(files, reverse=True):
        match = pattern.fullmatch(name)
        if match is not None:
            frames.setdefault(int(match[1]), files[name])
    return frames
