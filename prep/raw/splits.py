"""Split lists: which frames of which drives make a dataset's parts.

A line is `2011_09_26/2011_09_26_drive_0022_sync 473 r`: drive folder, frame number, side `l` (camera 02) or
`r` (camera 03); for KITTI's odometry `9 12 l`: sequence, frame, side. The lists of other projects are read, too:
paths of images or depth maps (Monodepth, BTS, PackNet) and `2011_09_26_drive_0022_sync_03 473` (SfMLearner). A split
is a name, a file, or a folder of `train_files.txt`, `val_files.txt`, `test_files.txt`:

    lists = read_split("eigen_zhou", splits_dir=None)   # downloaded once, checked, cached
    lists = read_split("my_split/train_files.txt")      # a file is the part that it is named after
"""

from __future__ import annotations

import difflib
import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from prep.raw.text import decode_text
from shards.errors import InputError, UsageError, first_line
from shards.files import cache_folder, open_regular

CameraSide = Literal["l", "r"]

SPLITS_URL = "https://raw.githubusercontent.com/nianticlabs/monodepth2/master/splits"
"""Public home of the named lists: `<url>/<split>/<file>`."""
SPLITS_URL_ENV = "MD2_SPLITS_URL"
_FRAME = re.compile(r"\d{1,10}")
_SIDES: Mapping[str, CameraSide] = MappingProxyType({"l": "l", "r": "r", "2": "l", "3": "r"})
"""Monodepth2's own code takes the camera's number as well."""
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
_MAX_LINE = 1000
_SHOWN = 120


@dataclass(frozen=True)
class NamedSplit:
    """A published split: its files with their sha256, and what its packed dataset holds unless asked otherwise.

    Attributes:
        files: file name -> sha256 of the published bytes.
        frames: frame offsets; Eigen's test images have no neighbours at drives' ends, and need none.
        depth_source: `velodyne` or `improved` (the depth benchmark's accumulated ground truth).
        depth_convention: `lidar_x` where the published numbers were made with it.
    """

    files: Mapping[str, str]
    frames: tuple[int, ...] = (0, -1, 1)
    stereo: bool = True
    depth_source: Literal["velodyne", "improved"] = "velodyne"
    depth_convention: Literal["camera_z", "lidar_x"] = "camera_z"


NAMED: Mapping[str, NamedSplit] = MappingProxyType(
    {
        "eigen_zhou": NamedSplit(
            {
                "train_files.txt": "00173a231642151c4693274e701ddd4cae7916520a757c7a94eae8e1173f7b0c",
                "val_files.txt": "64a868b8d2c66c3979a2d74c22ea2e9146850d5b9f5786ed8e5f92201ba1ad04",
            }
        ),
        "eigen_full": NamedSplit(
            {
                "train_files.txt": "1b491141d87b7af9e6706609b7ce858c198c3a4ca61d180c7dc90815d5f2a986",
                "val_files.txt": "9c4446772ec58aaa60acbeef0fa6d1e8ef1b346ad4f78272d056d10cf1993af9",
            }
        ),
        "eigen": NamedSplit(
            {"test_files.txt": "e226d4ca16e0e6e9695435014347dcf973588531330536fd8a68d298ef091a6b"},
            frames=(0,),
            depth_convention="lidar_x",
        ),
        "eigen_benchmark": NamedSplit(
            {"test_files.txt": "d56e5e509e6960a01fb93795f85028ac6e4a82ad40e64b6e968988e4db95b9be"},
            frames=(0,),
            depth_source="improved",
        ),
        "odom": NamedSplit(
            {
                "train_files.txt": "ced6c5fd1b0b76e2a28d68e046421c1f0df08de8fb713ca305684d263af6d0e2",
                "val_files.txt": "9cf46e1b873d6f9883015b1f77fcace51db424a1f0a765324957f46399b6db99",
                "test_files_09.txt": "8b999b6f974041663ba2f8aa6456ea338089a272119b7edd702f352278f43d26",
                "test_files_10.txt": "f39c47e0c21f65d4503476375f2a786def34f54bd5d1cabf28c7e68f002986a1",
            }
        ),
    }
)


@dataclass(frozen=True)
class SplitLine:
    """One line of a list: drive as written, frame number, side; `where` is `file:line` for messages."""

    drive: str
    frame: int
    side: CameraSide
    where: str = field(compare=False, default="")

    @property
    def text(self) -> str:
        return f"{self.drive} {self.frame} {self.side}"


@dataclass(frozen=True)
class BadLine:
    """A malformed or repeated line, with the reason."""

    where: str
    text: str
    reason: str = "is not of the form 'drive frame l|r', for example '2011_09_26/2011_09_26_drive_0022_sync 473 r'"

    def __str__(self) -> str:
        return f"{self.where}: {self.text!r} {self.reason}"


@dataclass(frozen=True)
class SplitLists:
    """A split: part name -> lines, in the lists' order; malformed lines; and a hash of both.

    `sha256` is over part names and texts of all lines, good and bad, so it does not depend on line ends. `notes` are
    what the user should know about it.
    """

    name: str
    parts: dict[str, list[SplitLine]]
    bad: dict[str, list[BadLine]]
    sha256: str
    notes: tuple[str, ...] = ()

    @property
    def named(self) -> NamedSplit | None:
        """Defaults of the published split of this name."""
        return NAMED.get(self.name)


def read_split(split: str, splits_dir: Path | None = None, url: str | None = None) -> SplitLists:
    """Resolve and parse a split.

    Args:
        split: a name (`eigen_zhou`), a file, or a folder with `*_files*.txt`.
        splits_dir: folder that holds folders or files of splits by name; looked at first.
        url: where named splits are downloaded from (default `SPLITS_URL`, or the environment's MD2_SPLITS_URL).

    Raises:
        UsageError: no such name, file or folder; the nearest names are listed.
        InputError: a list cannot be read, downloaded or verified, or holds no lines at all.
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
    """Files of a split on this machine; None if it is not here."""
    candidates = [splits_dir / split, splits_dir / f"{split}.txt"] if splits_dir is not None else []
    if splits_dir is not None and not splits_dir.is_dir():
        raise InputError(f"{splits_dir}: no such folder of splits")
    if split not in NAMED or "/" in split:
        candidates.append(Path(split))
    for path in candidates:
        if path.is_dir():
            # macOS writes `._NAME` beside each file on other file systems.
            files = sorted(file for file in path.glob("*_files*.txt") if not file.name.startswith("."))
            if not files:
                raise InputError(f"{path}: no train_files.txt, val_files.txt or test_files.txt there{_inner(path)}")
            return files
        if path.is_file():
            return [path]
    return None


def _inner(folder: Path) -> str:
    """Advice for a folder that holds splits instead of lists, for messages."""
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
    import pooch

    folder = cache_folder() / "splits" / split
    paths = []
    for name, sha256 in NAMED[split].files.items():
        source = f"{url.rstrip('/')}/{split}/{name}"
        shown = f"{_without_secrets(url)}/{split}/{name}"
        try:
            pooch.get_logger().setLevel("WARNING")
            paths.append(Path(pooch.retrieve(source, known_hash=f"sha256:{sha256}", fname=name, path=folder)))
        except OSError as error:
            # An error's text repeats the address, secrets included.
            cause = _cause(error) if shown == source else type(error).__name__
            raise InputError(
                f"{shown}: cannot be downloaded ({cause}); put the lists into DIR/{split}/ and give --splits DIR, or "
                f"set {SPLITS_URL_ENV} to a mirror"
            ) from None
        except ValueError as error:
            if "hash" not in str(error):  # not pooch's own: a malformed address
                raise InputError(f"{shown}: not a web address; set {SPLITS_URL_ENV} to one") from None
            raise InputError(f"{shown}: not the published list (sha256 differs from {sha256})") from None
    return paths


def _without_secrets(url: str) -> str:
    """A URL without user, password and query."""
    scheme, colon, rest = url.partition("://")
    rest = rest.partition("?")[0].partition("#")[0].rstrip("/")
    host, slash, path = rest.partition("/")
    if "@" in rest:  # a password may have a slash in it
        return f"{scheme}://…"
    return f"{scheme}{colon}{host}{slash}{path}"


def _cause(error: Exception) -> str:
    """Why a download failed: without the connection pool and the retries that urllib3 wraps its reasons in."""
    reason = getattr(error.args[0], "reason", None) if error.args else None
    return first_line(error if reason is None else OSError(str(reason).rpartition(": ")[2]))


def part_of(path: Path) -> str:
    """Part that a list's file name stands for.

    `train_files.txt` -> `train`, `test_files_09.txt` -> `test_09`, `eigen_train_files.txt` -> `train`.

    Raises:
        InputError: a name that cannot be a part's.
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
    for path in files:
        part = part_of(path)
        if part in parts:
            raise InputError(f"{path}: a second list for the part {part}; keep one, or give one file as --split")
        text = _read(path)
        parts[part], bad[part] = _parse_list(text, path)
        digest.update(f"{part}\n".encode())
        for line in text.splitlines():
            digest.update(f"{line.strip()}\n".encode(errors="surrogateescape"))
    if not any(parts.values()) and not any(bad.values()):
        raise InputError(f"{files[0]}: no lines in the split's lists")
    return SplitLists(name, parts, bad, digest.hexdigest())


def _read(path: Path) -> str:
    try:
        with open_regular(path) as file:  # reading from a pipe may never end
            data = file.read(_MAX_LIST_BYTES + 1)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from error
    if len(data) > _MAX_LIST_BYTES:
        raise InputError(f"{path}: larger than {_MAX_LIST_BYTES >> 20} MiB; this is not a split list")
    return decode_text(data)


def _parse_list(text: str, path: Path) -> tuple[list[SplitLine], list[BadLine]]:
    lines: list[SplitLine] = []
    bad: list[BadLine] = []
    first: dict[SplitLine, int] = {}
    for number, raw in enumerate(text.splitlines(), start=1):
        row = raw.strip()
        if not row or row.startswith("#"):
            continue
        where, shown = f"{path}:{number}", row[:_SHOWN]
        line = parse_line(row, where)
        if line is None:
            bad.append(BadLine(where, shown))
        elif line in first:
            bad.append(BadLine(where, shown, f"repeats line {first[line]}"))
        else:
            first[line] = number
            lines.append(line)
    return lines, bad


def parse_line(row: str, where: str = "") -> SplitLine | None:
    """A split line in any of the forms that are read; None if it is malformed.

    Split at white space rather than matched by a pattern, which would try every space of a line of a million.
    """
    if len(row) > _MAX_LINE:
        return None
    words = row.rsplit(maxsplit=2)
    if len(words) == 3 and words[2] in _SIDES and _FRAME.fullmatch(words[1]):
        return SplitLine(words[0].rstrip("/"), int(words[1]), _SIDES[words[2]], where)
    words = row.split()
    path = words[0].partition(",")[0].replace("\\", "/")
    if (image := _IMAGE_PATH.fullmatch(path)) is not None:
        return SplitLine(f"{image[2]}/{image[1]}", int(image[4]), _SIDES[image[3]], where)
    if (image := _SEQUENCE_PATH.fullmatch(path)) is not None:
        return SplitLine(str(int(image[1])), int(image[3]), _SIDES[image[2]], where)
    if len(words) == 2 and _FRAME.fullmatch(words[1]) and (drive := _DRIVE_AND_CAMERA.fullmatch(words[0])) is not None:
        return SplitLine(f"{drive[2]}/{drive[1]}", int(words[1]), _SIDES[drive[3]], where)
    return None
