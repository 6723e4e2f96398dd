"""Finds drives in KITTI's layouts, raw and odometry: the files of each by frame number, and its calibration."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from prep.raw.calibration import (
    CAMERA_NUMBER,
    Matrix,
    StereoCalibration,
    read_odometry_calibration,
    read_raw_calibration,
)
from prep.raw.files import MAX_TEXT_BYTES, RawData, read, read_many
from prep.raw.levels import find_levels, levels_note
from prep.raw.poses import MAX_POSE_BYTES, Motion, oxts_motion, parse_poses, pose_motion
from prep.raw.splits import CameraSide
from prep.raw.view import View
from prep.raw.zips import Ref
from shards.errors import InputError, SampleError

KITTI_LICENCE = """\
Made from the KITTI raw data: Geiger, Lenz, Stiller, Urtasun, "Vision meets Robotics: The KITTI Dataset", IJRR 2013,
https://www.cvlibs.net/datasets/kitti/. Those data, and therefore these shards, are published under
Creative Commons Attribution-NonCommercial-ShareAlike 3.0 (CC BY-NC-SA 3.0): name the source, no commercial use,
share alike.
"""
"""For the README.md of datasets that are made from KITTI."""

FrameRefs = dict[int, Ref]
"""Frame number -> file."""

_IMAGE = re.compile(r"(\d{1,18})\.(png|jpg|jpeg)", re.IGNORECASE)
_SCAN = re.compile(r"(\d{1,18})\.bin", re.IGNORECASE)
_OXTS = re.compile(r"(\d{1,18})\.txt", re.IGNORECASE)
_DEPTH = re.compile(r"(\d{1,18})\.png", re.IGNORECASE)
_RAW_DRIVE = re.compile(r"(\d{4}_\d\d_\d\d)/(\1_drive_\d{4}_(?:sync|extract))")
_BARE_DRIVE = re.compile(r"(\d{4}_\d\d_\d\d)_drive_\d{4}_(?:sync|extract)")
_NOT_KITTI = "true_pose_02.txt"
"""A file in drives of `md2 sample`, and not in KITTI's."""
_SEQUENCE = re.compile(r"\d{1,2}")


@dataclass(frozen=True)
class Drive:
    """One drive (a sequence, in KITTI odometry).

    Attributes:
        name: its name in split lines.
        key: its name in sample keys: letters, digits, `_`, `-`.
        images: side -> frames.
        scans: lidar scans by frame; empty if depth is not wanted.
        depth_maps: side -> ready-made ground truth by frame (improved or dense); empty if not wanted.
        kitti: whether KITTI's licence applies to the images.
        poses: (N, 3, 4) camera-to-world poses by frame, metres, of KITTI odometry; None without poses.
        motion: how the camera moves; None if not wanted or not known.
        levels: lowest and highest value of frames with more than 8 bits; they become 0 and 255.
        view: what is packed of the frames; None: all of them, as they are.
        digest: of what paths and sizes of the files do not tell; empty if they do.
        clip_starts: first frames of clips; no sample reaches from one clip into another.
        problems: side -> why frames may be missing (a broken zip).
        notes: remarks for the user.
    """

    name: str
    key: str
    images: dict[CameraSide, FrameRefs]
    calibration: StereoCalibration
    scans: FrameRefs = field(default_factory=dict)
    depth_maps: dict[CameraSide, FrameRefs] = field(default_factory=dict)
    kitti: bool = True
    poses: Matrix | None = None
    motion: Motion | None = None
    levels: tuple[int, int] | None = None
    view: View | None = None
    digest: str = ""
    clip_starts: tuple[int, ...] = ()
    problems: dict[CameraSide, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def is_end(self, frame: int, neighbour: int, side: CameraSide) -> bool:
        """Whether a missing neighbour lies beyond the ends of the drive or clip: nobody could have it."""
        if self.crosses(frame, neighbour):
            return True
        frames = self.images[side]
        return frame in frames and (neighbour < min(frames) or neighbour > max(frames))

    def crosses(self, frame: int, neighbour: int) -> bool:
        """Whether a clip begins between two frames."""
        low, high = sorted((frame, neighbour))
        return any(low < start <= high for start in self.clip_starts)


class Layout(Protocol):
    """Layout of drives in the raw data."""

    raw: RawData

    def open(self, name: str) -> Drive | None:
        """The drive; None if it does not exist.

        Raises:
            InputError: its calibration or its archive is missing or broken.
        """


class Kitti:
    """KITTI raw (`2011_09_26/2011_09_26_drive_0001_sync`) and KITTI odometry (`9`); the drive's name decides which.

    Args:
        depth: ground truth to look for, or None.
        motion: look for OXTS records.
        advice: about a drive of another layout, for messages.
    """

    def __init__(self, raw: RawData, depth: str | None, advice: str = "", *, motion: bool = False) -> None:
        self.raw = raw
        self._advice = advice
        self._motion = motion
        self._depth = depth
        self._calibrations: dict[tuple[str, bool], StereoCalibration] = {}

    def open(self, name: str) -> Drive | None:
        match = _RAW_DRIVE.fullmatch(name)
        if match is not None:
            return self._open_raw(date=match[1], drive=match[2])
        if _SEQUENCE.fullmatch(name):
            return self._open_sequence(name)
        bare = _BARE_DRIVE.fullmatch(name)
        hint = f"; did you mean {bare[1]}/{name}?" if bare else self._advice
        raise InputError(
            f"drive {name!r} is neither KITTI raw's (2011_09_26/2011_09_26_drive_0001_sync) nor odometry's (09){hint}"
        )

    def _open_raw(self, date: str, drive: str) -> Drive | None:
        folder = f"{date}/{drive}"
        folders = {side: f"{folder}/image_{number}/data" for side, number in CAMERA_NUMBER.items()}
        images = {side: numbered(self.raw.files(path), _IMAGE) for side, path in folders.items()}
        if not any(images.values()):
            if (problem := self.raw.problem(folders["l"])) is not None:
                raise InputError(problem)
            return None
        scans = self._scans(f"{folder}/velodyne_points/data")
        maps = {side: self._improved(date, drive, number) for side, number in CAMERA_NUMBER.items()}
        known = (date, bool(scans))
        if known not in self._calibrations:
            self._calibrations[known] = read_raw_calibration(date, self.raw.read, bool(scans), self._motion)
        levels = _levels(images)
        motion, notes = self._oxts(folder, self._calibrations[known].imu)
        return Drive(
            name=folder,
            key=drive,
            images=images,
            scans=scans,
            depth_maps=maps,
            calibration=self._calibrations[known],
            kitti=_NOT_KITTI not in self.raw.files(folder),
            motion=motion,
            levels=levels,
            notes=(*notes, *levels_note(folder, levels)),
            problems=self._problems(folders),
        )

    def _scans(self, folder: str) -> FrameRefs:
        if self._depth != "velodyne":
            return {}
        scans = numbered(self.raw.files(folder), _SCAN)
        if not scans and (problem := self.raw.problem(folder)) is not None:
            raise InputError(problem)
        return scans

    def _oxts(self, folder: str, imu: Matrix | None) -> tuple[Motion | None, list[str]]:
        """Motion by a drive's OXTS records, and notes on what is missing; images and depth do not need it."""
        if imu is None:
            return None, []
        refs = numbered(self.raw.files(f"{folder}/oxts/data"), _OXTS)
        found = dict(zip(refs, read_many(list(refs.values()), MAX_TEXT_BYTES), strict=True))
        records = {frame: data for frame, data in found.items() if not isinstance(data, SampleError)}
        if not records:
            return None, [f"{folder}: no oxts/data, so its samples have no motion"]
        motion, bad = oxts_motion(records, imu)
        bad += found.keys() - records.keys()
        return motion, [f"{folder}: {len(bad)} broken OXTS records (first: frame {min(bad)})"] if bad else []

    def _problems(self, folders: dict[CameraSide, str]) -> dict[CameraSide, str]:
        found = {side: self.raw.problem(folder) for side, folder in folders.items()}
        return {side: problem for side, problem in found.items() if problem is not None}

    def _improved(self, date: str, drive: str, camera: str) -> FrameRefs:
        """The depth benchmark's maps, as in its zip or moved into the raw folders."""
        if self._depth != "improved":
            return {}
        inner = f"{drive}/proj_depth/groundtruth/image_{camera}"
        frames: FrameRefs = {}
        for top in ("train", "val", date, ""):
            frames = numbered(self.raw.files(f"{top}/{inner}" if top else inner), _DEPTH) | frames
        if not frames and (problem := self.raw.problem(f"train/{inner}")) is not None:
            raise InputError(problem)
        return frames

    def _open_sequence(self, name: str) -> Drive | None:
        number = f"{int(name):02d}"
        for top in ("sequences", "dataset/sequences"):
            folder = f"{top}/{number}"
            folders: dict[CameraSide, str] = {"l": f"{folder}/image_2", "r": f"{folder}/image_3"}
            images = {side: numbered(self.raw.files(path), _IMAGE) for side, path in folders.items()}
            if any(images.values()):
                break
        else:
            if (problem := self.raw.problem(f"sequences/{number}/image_2")) is not None:
                raise InputError(problem)
            return None
        scans = self._scans(f"{folder}/velodyne")
        levels = _levels(images)
        poses, notes = self._poses(folder.replace(f"sequences/{number}", "poses"), f"{number}.txt")
        return Drive(
            name=name,
            key=f"odom_{number}",
            images=images,
            scans=scans,
            calibration=read_odometry_calibration(folder, self.raw.read, depth=bool(scans)),
            poses=poses,
            motion=pose_motion(poses) if self._motion and poses is not None else None,
            levels=levels,
            problems=self._problems(folders),
            notes=(*notes, *levels_note(f"sequence {number}", levels)),
        )

    def _poses(self, folder: str, name: str) -> tuple[Matrix | None, tuple[str, ...]]:
        """The sequence's poses; None and a note if they cannot be used, because images and depth do not need them."""
        ref = self.raw.files(folder).get(name)
        if ref is None:
            return None, ()
        try:
            return parse_poses(read(ref, MAX_POSE_BYTES), ref.place), ()
        except InputError as error:
            return None, (str(error),)


def _levels(images: dict[CameraSide, FrameRefs]) -> tuple[int, int] | None:
    """`find_levels` of the left frames. Frames on a server are not read for it and keep their upper 8 bits."""
    frames = images["l"] or images["r"]
    refs = [frames[number] for number in sorted(frames)]
    return None if "://" in refs[0].url else find_levels(refs)


def numbered(files: dict[str, Ref], pattern: re.Pattern[str]) -> FrameRefs:
    """Files named by a frame number, by that number. Of several with one number the last by name counts.

    So `.png` is preferred to `.jpg`, which was made from it.
    """
    frames: FrameRefs = {}
    for name in sorted(files, reverse=True):
        match = pattern.fullmatch(name)
        if match is not None:
            frames.setdefault(int(match[1]), files[name])
    return frames


@dataclass(frozen=True)
class FrameSequence:
    """Consecutive frames of one camera, for odometry.

    Attributes:
        frames: number -> file, in order, without a gap.
        poses: (N, 3, 4) camera-to-world, metres, of all frames; None without poses.
    """

    name: str
    frames: FrameRefs
    poses: Matrix | None

    def read(self) -> Iterator[tuple[str, bytes]]:
        """Name and content of each frame's file.

        Raises:
            InputError: a file cannot be read.
        """
        for number, ref in self.frames.items():
            yield f"{self.name} frame {number}", read(ref)


def open_sequence(raw: Sequence[str], name: str, side: CameraSide = "l") -> FrameSequence:
    """Find a sequence in raw data.

    Args:
        raw: folders or URLs, as for `md2 prep --raw`.
        name: `09` (KITTI odometry), or `2011_09_26/2011_09_26_drive_0002_sync` (raw).
        side: camera.

    Raises:
        InputError: it does not exist, a frame is missing between others, or its calibration or poses are broken.
    """
    drive = Kitti(RawData(list(raw), follow_links=True), None).open(name)
    found = drive.images[side] if drive is not None else {}
    if drive is None or not found:
        raise InputError(
            f"sequence {name} is not at {', '.join(raw)}; expected there: sequences/{name}/image_2/000000.png (or "
            f".jpg), sequences/{name}/calib.txt and, for the error, poses/{name}.txt"
        )
    if drive.poses is None and len(drive.notes) > (drive.levels is not None):
        raise InputError(drive.notes[0])  # it has poses that cannot be used
    numbers = sorted(found)
    gap = next((number for number in range(numbers[0], numbers[-1]) if number not in found), None)
    if gap is not None:
        raise InputError(f"sequence {name}: frame {gap} is missing; a trajectory needs every frame")
    return FrameSequence(name, {number: found[number] for number in numbers}, drive.poses)
