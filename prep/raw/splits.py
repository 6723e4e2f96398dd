"""Split lists: the frames of the drives that make a dataset's parts.

A line is `2011_09_26/2011_09_26_drive_0022_sync 473 r`: drive folder, frame number, side `l` (camera 02) or
`r` (camera 03); for KITTI odometry `9 12 l`: sequence, frame, side. Lists of other projects are read, too: paths of
images or depth maps (Monodepth, BTS, PackNet) and `2011_09_26_drive_0022_sync_03 473` (SfMLearner). A split is a name,
a file, or a folder of `train_files.txt`, `val_files.txt`, `test_files.txt`:

    lists = read_split("eigen_zhou")                 # downloaded once, checked, cached
    lists = read_split("my_split/train_files.txt")   # the part has the file's name
"""

from __future__ import annotations

import base64
import difflib
import hashlib
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Literal, NamedTuple

from pydantic import TypeAdapter

from prep.raw.text import text_lines
from shards.errors import InputError, StorageError, UsageError, first_line
from shards.files import cache_folder, disk_errors, open_regular, sha256_file, write_atomic

CameraSide = Literal["l", "r"]

SPLITS_URL = "https://raw.githubusercontent.com/nianticlabs/monodepth2/master/splits"
"""Public home of the named lists: `<url>/<split>/<file>`."""
SPLITS_URL_ENV = "MD2_SPLITS_URL"
_FRAME = re.compile(r"\d{1,10}")
_SIDES: Mapping[str, CameraSide] = MappingProxyType({"l": "l", "r": "r", "2": "l", "3": "r"})
"""Monodepth2's own code also accepts the camera's number."""
_IMAGE_PATH = re.compile(
    r"(?:.*/)?((\d{4}_\d\d_\d\d)_drive_\d{4}_(?:sync|extract))/(?:proj_depth/\w+/)?image_0([23])/(?:data/)?(\d{1,10})"
    r"(?:\.(?:png|jpe?g|npz))?",
    re.IGNORECASE,
)
_SEQUENCE_PATH = re.compile(r"(?:.*/)?(\d\d)/image_([23])/(\d{1,10})\.(?:png|jpe?g)", re.IGNORECASE)
_DRIVE_AND_CAMERA = re.compile(r"((\d{4}_\d\d_\d\d)_drive_\d{4}_(?:sync|extract))_0([23])")
_PART = re.compile(r"[a-z0-9_]+")
_ENDS_IN_PART = re.compile(r".*_(train|val|test)")
_MAX_LIST_BYTES = 64 << 20
_MAX_LINES = 500_000
"""Of a split; KITTI raw has 96,000 frames of both cameras."""
_MAX_LINE = 1000
_SHOWN = 120


@dataclass(frozen=True)
class NamedSplit:
    """A published split: its files, and the default content of its packed dataset.

    Attributes:
        files: file name -> sha256 of the published bytes.
        frames: frame offsets; Eigen's test images have no neighbours at drives' ends, and need none.
        depth_source: `velodyne` or `improved` (the depth benchmark's accumulated ground truth).
        depth_convention: `lidar_x` if the published numbers use it.
        test_frames: base64 of five bytes for each test frame, the beginnings of sha256 of `DRIVE FRAME`.
    """

    files: Mapping[str, str]
    frames: tuple[int, ...] = (0, -1, 1)
    stereo: bool = True
    depth_source: Literal["velodyne", "improved"] = "velodyne"
    depth_convention: Literal["camera_z", "lidar_x"] = "camera_z"
    test_frames: str = ""


NAMED: Mapping[str, NamedSplit] = MappingProxyType(
    TypeAdapter(dict[str, NamedSplit]).validate_json(Path(__file__).with_name("named_splits.json").read_bytes())
)


class SplitLine(NamedTuple):
    """One line of a list: drive as written, frame number, side."""

    drive: str
    frame: int
    side: CameraSide

    @property
    def text(self) -> str:
        return f"{self.drive} {self.frame} {self.side}"


class BadLine(NamedTuple):
    """A malformed or repeated line, with the reason. `where` is `file:line`."""

    where: str
    text: str
    reason: str = "is not of the form 'drive frame l|r', for example '2011_09_26/2011_09_26_drive_0022_sync 473 r'"

    def __str__(self) -> str:
        return f"{self.where}: {self.text!r} {self.reason}"


def eigen_overlap(lines: Iterable[SplitLine], frames: Iterable[int]) -> tuple[int, int]:
    """Return how many of Eigen's 697 test frames are targets of these lines, and how many are loaded at these offsets.

    Lists with 451 of them are in use under the name eigen_zhou.
    """
    packed = base64.b64decode(NAMED["eigen"].test_frames)
    tested = {packed[i : i + 5] for i in range(0, len(packed), 5)}
    places = {(line.drive.rpartition("/")[2], line.frame) for line in lines}
    loaded = {(drive, frame + offset) for drive, frame in places for offset in {0, *frames}}

    def count(chosen: set[tuple[str, int]]) -> int:
        return len(tested & {hashlib.sha256(f"{drive} {frame}".encode()).digest()[:5] for drive, frame in chosen})

    return count(places), count(loaded)


@dataclass(frozen=True)
class SplitLists:
    """A split.

    Attributes:
        parts: part -> lines, in the lists' order.
        bad: part -> malformed and repeated lines.
        sha256: hash of part names and all lines; it does not depend on line ends.
        notes: remarks for the user.
    """

    name: str
    parts: dict[str, list[SplitLine]]
    bad: dict[str, list[BadLine]]
    sha256: str
    notes: tuple[str, ...] = ()

    @property
    def named(self) -> NamedSplit | None:
        """The published split of this name."""
        return NAMED.get(self.name)


def read_split(split: str, splits_dir: Path | None = None, url: str | None = None) -> SplitLists:
    """Find and parse a split.

    Args:
        split: a name (`eigen_zhou`), a file, or a folder with `*_files*.txt`.
        splits_dir: folder of splits by name, folders or files; searched first.
        url: home of the named splits; None: the environment's MD2_SPLITS_URL, else `SPLITS_URL`.

    Raises:
        UsageError: no such name, file or folder; the message has the nearest name.
        InputError: a list cannot be read, downloaded or verified, is too long, or the lists hold no lines.
    """
    try:
        files = _find(split, splits_dir)
    except (OSError, ValueError) as error:  # a name too long, or with a NUL in it
        raise UsageError(f"--split {split[:_SHOWN]!r}: not a name or path ({first_line(error)})") from error
    if files is None:
        if split not in NAMED:
            raise UsageError(_unknown(split, splits_dir))
        files = _download(split, url or os.environ.get(SPLITS_URL_ENV) or SPLITS_URL)
    name = split if split in NAMED else _split_name(Path(split))
    return _parse(name, files)


def _find(split: str, splits_dir: Path | None) -> list[Path] | None:
    """Files of a split on this machine; None if there are none."""
    candidates = [splits_dir / split, splits_dir / f"{split}.txt"] if splits_dir is not None else []
    if splits_dir is not None and not splits_dir.is_dir():
        raise InputError(f"{splits_dir}: no such folder of splits")
    if split not in NAMED or "/" in split:
        candidates.append(Path(split))
    for path in candidates:
        if path.is_dir():
            # macOS writes `._NAME` beside each file on foreign file systems.
            files = sorted(file for file in path.glob("*_files*.txt") if not file.name.startswith("."))
            if not files:
                raise InputError(f"{path}: no train_files.txt, val_files.txt or test_files.txt there{_inner(path)}")
            return files
        if path.is_file():
            return [path]
    return None


def _inner(folder: Path) -> str:
    """Advice if a folder holds splits instead of lists."""
    names = sorted(path.parent.name for path in folder.glob("*/*_files*.txt"))
    return f"; it holds splits by name: give --split {names[0]} --splits {folder}" if names else ""


def _unknown(split: str, splits_dir: Path | None) -> str:
    theirs = {path.name for path in splits_dir.iterdir() if path.is_dir()} if splits_dir else set()
    names = sorted({*NAMED, *theirs})
    near = difflib.get_close_matches(split, names, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"--split {split}: neither a file, nor a folder, nor a known name ({', '.join(names)}){hint}"


def _split_name(path: Path) -> str:
    return re.sub(r"[^A-Za-z0-9_-]+", "_", path.resolve().stem) or "split"


def _download(split: str, url: str) -> list[Path]:
    """Fetch a named split's files into the user's cache, each checked against its pinned sha256."""
    from shards.storage.http import HttpStorage

    folder = cache_folder() / "splits" / split
    advice = f"put the lists into DIR/{split}/ and give --splits DIR, or set {SPLITS_URL_ENV} to a mirror"
    paths = []
    for name, sha256 in NAMED[split].files.items():
        path = folder / name
        paths.append(path)
        with disk_errors(path):
            if path.is_file() and sha256_file(path) == sha256:
                continue
        if not url.startswith(("https://", "http://")):
            raise InputError(f"{url}: not a web address; {advice}")
        try:
            data = HttpStorage(url).read(f"{split}/{name}", _MAX_LIST_BYTES)
        except StorageError as error:
            raise InputError(f"{error}; {advice}") from None
        source = f"{url.rstrip('/')}/{split}/{name}"
        if data is None:
            raise InputError(f"{source}: nothing there; {advice}")
        if hashlib.sha256(data).hexdigest() != sha256:
            raise InputError(f"{source}: not the published list (its sha256 is not {sha256})")
        with disk_errors(path):
            write_atomic(path, data)
    return paths


def part_of(path: Path) -> str:
    """Part of a list by its file name.

    `train_files.txt` -> `train`, `test_files_09.txt` -> `test_09`, `eigen_train_files.txt` -> `train`.

    Raises:
        InputError: the name has other characters than a part's.
    """
    part = re.sub(r"[-. ]", "_", path.stem.lower().replace("_files", ""))
    if not _PART.fullmatch(part):
        raise InputError(f"{path}: a list is named after its part: train_files.txt, val_files.txt, test_files.txt")
    other = _ENDS_IN_PART.fullmatch(part)
    return other[1] if other else part


def _parse(name: str, files: list[Path]) -> SplitLists:
    parts: dict[str, list[SplitLine]] = {}
    bad: dict[str, list[BadLine]] = {}
    digest = hashlib.sha256()
    room = _MAX_LINES
    for path in files:
        part = part_of(path)
        if part in parts:
            raise InputError(f"{path}: a second list for the part {part}; keep one, or give one file as --split")
        rows = [row.strip() for row in text_lines(_read(path), str(path), room)]
        room -= len(rows)
        parts[part], bad[part] = _parse_list(rows, path)
        digest.update(f"{part}\n".encode())
        for row in rows:
            digest.update(f"{row}\n".encode(errors="surrogateescape"))
    if not any(parts.values()) and not any(bad.values()):
        raise InputError(f"{files[0]}: no lines in the split's lists")
    return SplitLists(name, parts, bad, digest.hexdigest())


def _read(path: Path) -> bytes:
    try:
        with open_regular(path) as file:  # reading from a pipe may never end
            data = file.read(_MAX_LIST_BYTES + 1)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from error
    if len(data) > _MAX_LIST_BYTES:
        raise InputError(f"{path}: larger than {_MAX_LIST_BYTES >> 20} MiB; this is not a split list")
    return data


def _parse_list(rows: list[str], path: Path) -> tuple[list[SplitLine], list[BadLine]]:
    lines: dict[SplitLine, int] = {}
    bad: list[BadLine] = []
    for number, row in enumerate(rows, start=1):
        if not row or row.startswith("#"):
            continue
        line = parse_line(row)
        if line is None:
            bad.append(BadLine(f"{path}:{number}", row[:_SHOWN]))
        elif line in lines:
            bad.append(BadLine(f"{path}:{number}", row[:_SHOWN], f"repeats line {lines[line]}"))
        else:
            lines[line] = number
    return list(lines), bad


def parse_line(row: str) -> SplitLine | None:
    """A split line in any of the forms above; None if it is malformed.

    It is split at white space: a pattern for the whole line would try each space of a line of a million.
    """
    if len(row) > _MAX_LINE:
        return None
    words = row.rsplit(maxsplit=2)
    if len(words) == 3 and words[2] in _SIDES and _FRAME.fullmatch(words[1]):
        return SplitLine(words[0].rstrip("/"), int(words[1]), _SIDES[words[2]])
    words = row.split()
    path = words[0].partition(",")[0].replace("\\", "/")
    if (image := _IMAGE_PATH.fullmatch(path)) is not None:
        return SplitLine(f"{image[2]}/{image[1]}", int(image[4]), _SIDES[image[3]])
    if (image := _SEQUENCE_PATH.fullmatch(path)) is not None:
        return SplitLine(str(int(image[1])), int(image[3]), _SIDES[image[2]])
    if len(words) == 2 and _FRAME.fullmatch(words[1]) and (drive := _DRIVE_AND_CAMERA.fullmatch(words[0])) is not None:
        return SplitLine(f"{drive[2]}/{drive[1]}", int(words[1]), _SIDES[drive[3]])
    return None
