"""Your own drives: folders of frames and a small YAML with the camera.

drives/camera.yaml              one for all drives, or one in each (prep/raw/camera.py)
drives/tuesday.mp4              a drive that is a video, of one camera
drives/monday/left/000001.png   frames of the (left) camera, .png or .jpg, in the order of their names
drives/monday/right/000001.png  optional, the right camera of a rectified pair, under the same names
drives/monday/depth/000001.png  optional ground truth of the left frames: 16-bit PNG, metres x 256, 0 = none;
                                or .npy or .tif of metres, floating-point
drives/monday/poses.txt         optional, with --motion: the left camera's pose of each frame (prep/raw/poses.py)
drives/monday/speed.txt         or SECONDS METRES_PER_SECOND of each frame
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterator
from typing import Literal

from PIL import Image

from prep.raw.calibration import other
from prep.raw.camera import CAMERA_FILE, Camera, parse_camera
from prep.raw.clips import clip_starts, counter_of, natural
from prep.raw.files import MAX_TEXT_BYTES, RawData, read
from prep.raw.kitti import Drive, FrameRefs
from prep.raw.levels import find_levels, levels_note
from prep.raw.poses import MAX_POSE_BYTES, Motion, parse_poses, pose_motion, speed_motion
from prep.raw.splits import CameraSide, SplitLine, SplitLists
from prep.raw.velodyne import open_image
from prep.raw.video import find_frames
from prep.raw.view import View
from prep.raw.zips import Ref
from prep.workers import Progress, Quiet
from shards.errors import InputError, first_line
from shards.storage import is_local, local_path
from shards.video import VIDEO_SUFFIXES

_IMAGE = re.compile(r"(.+)\.(png|jpg|jpeg)", re.IGNORECASE)
_DEPTH = re.compile(r"(.+)\.(png|npy|tiff?)", re.IGNORECASE)
_OTHER_IMAGE = re.compile(r".+\.(bmp|tiff?|pgm|ppm|webp|gif|heic|exr|npy|npz|raw)", re.IGNORECASE)
_CAMERA_LIKE = re.compile(r"(cam|calib|intrinsic)\w*\.(ya?ml|txt|json|xml)", re.IGNORECASE)
_MOST_FOLDERS = 500
_FEW_DRIVES = 3
_SIDE_WORD = re.compile(r"left|right|(?:(?<=[_\-. \d])|^)(?:l|r|cam[01]|image_?0?[0-3])(?=[_\-. ]|$)", re.IGNORECASE)
_NOTES = ("txt", "csv", "json", "yaml", "yml", "md", "db")
"""Files that may lie anywhere."""
_DEEPEST = 4
_USUAL_AREAS = (640 * 192, 640 * 320, 1024 * 320)
_MOST_SQUEEZE = 1.3
_TURNED = 5
"""EXIF orientations from here on swap width and height."""
_LONGEST_KEY = 70
"""A tar's names are below 100 characters, of which side, frame and component take 24."""
_FORMS = "frames are read as PNG or JPEG"
_DEPTH_FORMS = (
    "ground truth is read as 16-bit PNG (metres x 256, 0 = no measurement), or as .npy or .tif of metres in "
    "floating point"
)
_RIGHT_WORD = re.compile(r"(.*[_\-. ])?(right|image_?0?[13]|cam1)([_\-. ].*)?", re.IGNORECASE)
_DEPTH_WORD = re.compile(
    r"(.*[_\-. ])?(depths?|disp(arity|arities)?|gt|ground_?truth|lidar)([_\-. ].*)?", re.IGNORECASE
)


class FolderLayout:
    """Drives in folders, found by their camera file and frames.

    Args:
        raw: folders that hold the drives.
        depth: whether ground truth is wanted.
        stereo: False ignores the right camera.
        progress: of videos, which are decoded to choose their frames.
        motion: look for poses and speeds.
    """

    def __init__(
        self,
        raw: RawData,
        depth: bool = True,
        stereo: bool | None = None,
        progress: Progress | None = None,
        motion: bool = False,
    ) -> None:
        self.raw = raw
        self._progress = progress or Quiet()
        self._depth = depth
        self._stereo = stereo
        self._motion = motion
        self._cameras: dict[str, Camera | None] = {}
        self._drives: dict[str, Drive | None] = {}

    def drives(self) -> list[str]:
        """Names of all drives, sorted: folders that hold frames, and videos, relative to the raw location.

        Of several names that links give to one drive, it is the first.

        Raises:
            InputError: no drive was found, with what was found instead; or a camera file is malformed.
        """
        found = self._below("", 0)
        if not found:
            raise InputError(f"{', '.join(self.raw.urls)}: no drives; {next(self._what_is_there())}")
        once: dict[str, str] = {}
        for name in found:
            once.setdefault(self.raw.real_path(name), name)
        return list(once.values())

    def _below(self, folder: str, level: int) -> list[str]:
        camera = self._camera(folder)
        if camera is not None and folder and self._images(folder, camera.left):
            return [folder]
        found = [_join(folder, name) for name in self.raw.files(folder) if camera is not None and _is_video(name)]
        if level < _DEEPEST:
            found += [name for path in self._inner(folder) for name in self._below(path, level + 1)]
        return sorted(found)

    def _inner(self, folder: str) -> list[str]:
        names = [name for name in self.raw.folders(folder) if not name.startswith(".")]
        return [f"{folder}/{name}" if folder else name for name in names]

    def _what_is_there(self) -> Iterator[str]:
        """Likely reasons why no drive was found, and what to do; the likeliest first."""
        yield from (f"{url} does not exist" for url in self.raw.urls if is_local(url) and not local_path(url).exists())
        cameras, strange, flat = list[str](), list[str](), list[str]()
        folders = [("", 0)]
        for folder, level in folders:
            names = [name for name in self.raw.files(folder) if not name.startswith(".")]
            cameras += [_join(folder, name) for name in names if _CAMERA_LIKE.fullmatch(name) and name != CAMERA_FILE]
            strange += [_join(folder, name) for name in names if _OTHER_IMAGE.fullmatch(name)]
            flat += [folder] if any(_IMAGE.fullmatch(name) for name in names) else []
            if level < _DEEPEST + 4 and len(folders) < _MOST_FOLDERS:
                folders += [(path, level + 1) for path in self._inner(folder)]
        if not any(CAMERA_FILE in self.raw.files(folder) for folder, _ in folders):
            renamed = f"; rename {cameras[0]} to {CAMERA_FILE}" if cameras else ""
            yield (
                f"there is no {CAMERA_FILE}{renamed}; it holds width, height, fx, fy, cx, cy, or only fov: 90 if no "
                "more is known, and lies above the drives or in each of them (docs/camera.md)"
            )
        if flat and flat[0].count("/") > _DEEPEST:
            yield f"frames lie too deep, in {flat[0]}; give a folder nearer to them as --raw"
        if flat == [""]:
            yield f"frames lie in --raw itself; give its parent folder as --raw, and write left: . in {CAMERA_FILE}"
        if flat:
            drive, _, last = flat[0].rpartition("/")
            inner = f"left: {last} in {CAMERA_FILE} if {drive} is the drive, or " if drive else ""
            yield f"frames lie in {flat[0]}: write {inner}left: . if {flat[0]} is the drive"
        if strange:
            yield f"{strange[0]}: {_FORMS}; convert them"
        yield (
            f"expected: {CAMERA_FILE} with width, height, fx, fy, cx, cy (or fov), and for each drive a video or a "
            "folder with its frames in left/, for example drives/monday/left/000001.png"
        )

    def open(self, name: str) -> Drive | None:
        if name not in self._drives:
            self._drives[name] = self._open(name)
        return self._drives[name]

    def _open(self, name: str) -> Drive | None:
        if name.startswith(("/", "~")) or not {"", ".", ".."}.isdisjoint(name.split("/")):
            raise InputError(f"drive {name!r}: a drive is a folder inside --raw, without .. or /")
        camera = self._camera(name)
        if camera is None:
            raise InputError(f"{name}: no {CAMERA_FILE} in this drive's folder or above it")
        folder, _, file = name.rpartition("/")
        if _is_video(file) and file in self.raw.files(folder):
            return self._open_video(name, camera, self.raw.files(folder)[file])
        left = self._images(name, camera.left)
        if not left:
            return None
        notes: list[str] = []
        right = self._right(name, camera, left, notes) if self._stereo is not False else {}
        depth = self._depth_maps(name, camera, left) if self._depth else {}
        stems = sorted(left, key=natural)
        numbers = _numbers(stems, camera.numbering, name)
        starts = [numbers[stems[i]] for i in clip_starts(stems)]
        if starts:
            notes.append(
                f"{name}: by their names the frames are {len(starts) + 1} clips (the second begins with "
                f"{next(stem for stem in stems if numbers[stem] == starts[0])}); no sample reaches across"
            )
        levels = find_levels([left[stem] for stem in stems])
        notes += levels_note(name, levels)
        if camera.lens is not None and right:
            raise InputError(
                f"{name}: frames of a pair must be rectified and undistorted (cv2.stereoRectify), or give --no-stereo"
            )
        view = self._view(name, camera, (0, 0) if camera.width else _frame_size(left[stems[0]]))
        return Drive(
            name=name,
            key=drive_key(name),
            images={"l": _frames(left, numbers), "r": _frames(right, numbers)},
            depth_maps={"l": _frames(depth, numbers)},
            calibration=camera.calibration(view, view.where),
            kitti=False,
            motion=self._find_motion(name, [numbers[stem] for stem in stems], notes) if self._motion else None,
            levels=levels,
            view=_needed(view),
            clip_starts=tuple(starts),
            notes=tuple(notes),
        )

    def _open_video(self, name: str, camera: Camera, ref: Ref) -> Drive:
        self._progress.phase(f"looking at {name}", 0, "frames")
        video = find_frames(ref, name, camera.rate, self._progress.advance)
        view = self._view(name, camera, video.size)
        if view.frame != video.size:
            raise InputError(
                f"{ref.place}: {video.size[0]}x{video.size[1]} pixels, but {view.where} is for "
                f"{view.frame[0]}x{view.frame[1]}"
            )
        return Drive(
            name=name,
            key=drive_key(name),
            images={"l": dict[int, Ref](enumerate(video.frames)), "r": {}},
            calibration=camera.calibration(view, view.where),
            kitti=False,
            view=_needed(view),
            digest=hashlib.sha256(repr([frame.crc for frame in video.frames]).encode()).hexdigest(),
            clip_starts=tuple(video.starts),
            notes=tuple(video.notes),
        )

    def _view(self, name: str, camera: Camera, frame: tuple[int, int]) -> View:
        """What is packed of a drive's frames of this size."""
        folder = name
        while CAMERA_FILE not in self.raw.files(folder):
            folder = folder.rpartition("/")[0]
        return camera.view(frame, self.raw.files(folder)[CAMERA_FILE].place)

    def _images(self, drive: str, folder: str) -> dict[str, Ref]:
        return matching(self.raw.files(_join(drive, folder)), _IMAGE)

    def _right(self, drive: str, camera: Camera, left: dict[str, Ref], notes: list[str]) -> dict[str, Ref]:
        """Right frames by the left frames' stems.

        Raises:
            InputError: there are some, but without a baseline, in another format, or under names that do not match.
        """
        folder = _join(drive, camera.right)
        right = self._images(drive, camera.right) if camera.right != camera.left else {}
        if not right:
            self._refuse_others(folder, _FORMS, "--no-stereo")
            self._refuse_elsewhere(drive, camera, _RIGHT_WORD, "right", "--no-stereo")
            if camera.baseline is not None:
                notes.append(f"{drive}: {CAMERA_FILE} has a baseline, but there are no right frames in {folder}")
            return {}
        if camera.baseline is None:
            raise InputError(
                f"{folder}: there are right frames, but {CAMERA_FILE} has no baseline; add it (metres between the "
                "cameras), or give --no-stereo"
            )
        if left.keys() & right.keys():
            return right
        bare = {_without_side(stem): ref for stem, ref in right.items()}
        pairs = {stem: bare[key] for stem in left if (key := _without_side(stem)) in bare}
        if pairs and len(bare) == len(right) and len({_without_side(stem) for stem in left}) == len(left):
            notes.append(f"{drive}: pairs by name without left and right, as {min(left)} with {min(right)}")
            return pairs
        raise InputError(
            f"{folder}: none of its {len(right)} frames has a left frame's name ({min(right)}, {min(left)}); rename "
            "them, or give --no-stereo"
        )

    def _depth_maps(self, drive: str, camera: Camera, left: dict[str, Ref]) -> dict[str, Ref]:
        """Ground truth by the left frames' stems.

        Raises:
            InputError: there are files, but none that can be read, or none under a frame's name.
        """
        folder = _join(drive, camera.depth)
        maps = matching(self.raw.files(folder), _DEPTH) if camera.depth not in (camera.left, camera.right) else {}
        if not maps:
            self._refuse_others(folder, _DEPTH_FORMS, "--no-depth")
            self._refuse_elsewhere(drive, camera, _DEPTH_WORD, "depth", "--no-depth")
        elif not left.keys() & maps.keys():
            raise InputError(
                f"{folder}: none of its {len(maps)} maps has a frame's name ({min(maps)}, {min(left)}); rename them, "
                "or give --no-depth"
            )
        return maps

    def _find_motion(self, drive: str, frames: list[int], notes: list[str]) -> Motion | None:
        """Motion of the frames, out of a line for each frame.

        Raises:
            InputError: the file is malformed, or has not one line for each frame.
        """
        files = self.raw.files(drive)
        if (ref := files.get("poses.txt")) is not None:
            poses = parse_poses(read(ref, MAX_POSE_BYTES), ref.place)
            if len(poses) != len(frames):
                raise InputError(f"{ref.place}: {len(poses)} poses for {len(frames)} frames; one for each is needed")
            return pose_motion(poses, frames)
        if (ref := files.get("speed.txt")) is not None:
            return speed_motion(read(ref, MAX_POSE_BYTES), frames, ref.place)
        notes.append(f"{drive}: no poses.txt or speed.txt, so its samples have no motion")
        return None

    def _refuse_others(self, folder: str, forms: str, option: str) -> None:
        names = [name for name in self.raw.files(folder) if not name.startswith(".")]
        kinds = Counter(match[1].lower() for name in names if (match := re.fullmatch(r".+\.(\w+)", name)))
        kinds = Counter(
            {kind: n for kind, n in kinds.items() if kind not in ("txt", "csv", "json", "yaml", "md", "db")}
        )
        if kinds:
            kind, count = kinds.most_common(1)[0]
            raise InputError(f"{folder}: {count} files .{kind}; {forms}; convert them, or give {option}")

    def _refuse_elsewhere(self, drive: str, camera: Camera, word: re.Pattern[str], key: str, option: str) -> None:
        """Refuse to ignore a folder that by its name holds what `key` stands for."""
        used = {camera.left.partition("/")[0], camera.right.partition("/")[0], camera.depth.partition("/")[0]}
        for name in self.raw.folders(drive):
            if name not in used and word.fullmatch(name) and self.raw.files(f"{drive}/{name}"):
                raise InputError(
                    f"{drive}/{name}: this folder would be ignored; write {key}: {name} in {CAMERA_FILE}, or give "
                    f"{option}"
                )

    def _camera(self, folder: str) -> Camera | None:
        """The camera file of the folder or the nearest one above it."""
        if folder not in self._cameras:
            ref = self.raw.files(folder).get(CAMERA_FILE)
            above = None if not folder else self._camera(folder.rpartition("/")[0])
            self._cameras[folder] = above if ref is None else parse_camera(read(ref, MAX_TEXT_BYTES), ref.place)
        return self._cameras[folder]


def _is_video(name: str) -> bool:
    return not name.startswith(".") and name.lower().endswith(tuple(VIDEO_SUFFIXES))


def _needed(view: View) -> View | None:
    """The view, unless it is the frames as they are, which can be copied."""
    return None if view.lens is None and view.size == view.frame else view


def _frame_size(ref: Ref) -> tuple[int, int]:
    """(width, height) of a frame, upright.

    Raises:
        InputError: it cannot be read.
    """
    try:
        with open_image(read(ref), "PNG", "JPEG") as image:
            return image.size[::-1] if image.getexif().get(0x0112, 1) >= _TURNED else image.size
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"{ref.place}: broken image ({first_line(error)}); fetch it again") from error


def fitting_sizes(frame: tuple[float, float]) -> list[tuple[int, int]]:
    """Sizes to pack frames of this shape at: multiples of 32, squeezed least, near the usual numbers of pixels."""
    found = []
    for area in _USUAL_AREAS:
        sizes = [(w, h) for w in range(128, 1281, 32) for h in range(128, 1281, 32) if 0.7 < w * h / area < 1.4]
        found += [min(sizes, key=lambda size: (round(squeeze(frame, size), 2), abs(size[0] * size[1] - area)))]
    return list(dict.fromkeys(found))


def squeeze(frame: tuple[float, float], stored: tuple[int, int]) -> float:
    """How much more one side is reduced than the other, 1 or more."""
    ratio = frame[0] * stored[1] / (frame[1] * stored[0])
    return max(ratio, 1 / ratio)


def size_note(drives: list[Drive], stored: tuple[int, int] | None) -> list[str]:
    """A note if the stored size has another shape than what the frames show."""
    for drive in drives:
        frame, p = drive.calibration.size or (0, 0), drive.calibration.projection["l"]
        shape = frame[0] * p[1, 1] / p[0, 0], frame[1]
        if stored is not None and (much := squeeze(shape, stored)) > _MOST_SQUEEZE:
            sizes = " or ".join(f"{width}x{height}" for width, height in fitting_sizes(shape))
            return [
                f"{drive.name}: pictures of {frame[0]}x{frame[1]} become {stored[0]}x{stored[1]}, which squeezes them "
                f"{much:.2f} times; --size {sizes} keeps their shape"
            ]
    return []


def _without_side(stem: str) -> str:
    """A frame's name without what says which camera it is from."""
    return re.sub(r"[_\-. ]+", "_", _SIDE_WORD.sub("", stem)).strip("_")


def drive_key(name: str) -> str:
    """A drive's name in sample keys: letters, digits, `_`, `-`, and short enough for a tar.

    Names in other scripts and long ones are told apart by a hash.
    """
    key = re.sub(r"[^A-Za-z0-9_-]+", "_", name)
    if name.isascii() and len(key) <= _LONGEST_KEY:
        return key
    digest = hashlib.sha256(name.encode(errors="surrogateescape")).hexdigest()
    return f"{key[: _LONGEST_KEY - 9]}_{digest[:8]}"


def matching(files: dict[str, Ref], pattern: re.Pattern[str]) -> dict[str, Ref]:
    """Files that match, by the pattern's first group (the stem); `.png` before other formats."""
    found: dict[str, Ref] = {}
    for name in sorted(files, key=lambda name: (name.lower().endswith(".png"), name), reverse=True):
        match = pattern.fullmatch(name)
        if match is not None and not name.startswith("."):  # macOS writes `._frame.png` beside each frame
            found.setdefault(match[1], files[name])
    return found


def _numbers(stems: list[str], numbering: Literal["order", "names"], drive: str) -> dict[str, int]:
    """Frame number of each stem.

    Raises:
        InputError: by names, and a name has no number, or two have the same.
    """
    if numbering == "order":
        return {stem: number for number, stem in enumerate(stems)}
    counters = counter_of(stems)
    seen: dict[int, str] = {}
    for stem, number in zip(stems, counters, strict=True):
        if number is None or number in seen:
            cause = "no number in its name" if number is None else f"the same number as {seen[number]!r}"
            raise InputError(
                f"{drive}: frame {stem!r}: {cause}; give numbering: order in {CAMERA_FILE}, or each clip a folder"
            )
        seen[number] = stem
    return {stem: number for number, stem in seen.items()}


def _frames(files: dict[str, Ref], numbers: dict[str, int]) -> FrameRefs:
    return {numbers[stem]: ref for stem, ref in files.items() if stem in numbers}


def _join(folder: str, name: str) -> str:
    return "/".join(part for part in (folder, name) if part not in ("", "."))


def split_drives(drives: list[Drive], name: str, frames: tuple[int, ...], stereo: bool, val: float = 0.1) -> SplitLists:
    """Lists for all drives: the last tenth of each is for validation, the rest for training.

    Frames at the ends of drives and clips, and those around the border whose neighbours the other part holds, are left
    out: they give no sample. A drive whose last tenth would give none is for training as a whole; if that is true of
    all of three or more drives, the last tenth of the drives is for validation.

    Args:
        val: share of each drive's frames that goes to `val`.

    Raises:
        InputError: no drive is long enough for a training sample.
    """
    chosen: dict[str, dict[str, list[SplitLine]]] = {}
    for drive in drives:
        usable = _usable(drive, frames, stereo)
        numbers = sorted(drive.images["l"])
        held = round(len(numbers) * val)
        border = numbers[-held] if held else numbers[-1] + 1
        before, after = max(0, *(-f for f in frames)), max(0, *frames)
        last = [line for line in usable if line.frame - before >= border]
        first = [line for line in usable if line.frame + after < border] if last else usable
        if first or last:
            chosen[drive.name] = {"train": first, "val": last}
    if val and chosen and not any(lines["val"] for lines in chosen.values()):
        held = max(1, round(len(chosen) * val)) if len(chosen) >= _FEW_DRIVES else 0
        for drive_name in list(chosen)[len(chosen) - held :]:
            chosen[drive_name] = {"train": [], "val": chosen[drive_name]["train"]}
    parts = {part: [line for lines in chosen.values() for line in lines[part]] for part in ("train", "val")}
    if not parts["train"]:
        names, offsets = ", ".join(drive.name for drive in drives[:5]), ",".join(map(str, frames))
        raise InputError(f"{names}: too few frames for --frames {offsets}")
    notes: tuple[str, ...] = ()
    if val and not parts["val"]:
        notes = (
            f"no val part: a tenth of {len(drives[0].images['l'])} frames holds none with its neighbours, so training "
            "has no validation; add frames or drives, or give --split",
        )
    parts = {part: lines for part, lines in parts.items() if lines}
    text = "".join(f"{part}\n" + "".join(f"{line.text}\n" for line in lines) for part, lines in sorted(parts.items()))
    digest = hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()
    return SplitLists(name, parts, {part: [] for part in parts}, digest, notes)


def _usable(drive: Drive, frames: tuple[int, ...], stereo: bool) -> list[SplitLine]:
    """Lines of all frames that have their neighbours, in order."""
    sides: list[CameraSide] = ["l", other("l")] if stereo and drive.images["r"] else ["l"]
    return [
        SplitLine(drive.name, number, side)
        for number in sorted(drive.images["l"])
        for side in sides
        if all(number + f in drive.images[side] and not drive.crosses(number, number + f) for f in frames)
    ]
