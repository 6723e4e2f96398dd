"""Split lists: which frames of which drives make a dataset's parts.

A line is `2011_09_26/2011_09_26_drive_0022_sync 473 r`: drive folder, frame number, side `l` (camera 02) or
`r` (camera 03); for KITTI's odometry `9 12 l`: sequence, frame, side. A split is a name, a file, or a folder
of `train_files.txt`, `val_files.txt`, `test_files.txt`:

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

from shards.errors import InputError, UsageError
from shards.files import cache_folder

Side = Literal["l", "r"]

SPLITS_URL = "https://raw.githubusercontent.com/nianticlabs/monodepth2/master/splits"
"""Public home of the named lists: `<url>/<split>/<file>`."""
SPLITS_URL_ENV = "MD2_SPLITS_URL"
_LINE = re.compile(r"(\S.*?)\s+(\d{1,10})\s+([lr])")
_PART = re.compile(r"[a-z0-9_]+")
_ENCODING = "utf-8-sig"
"""Editors on Windows put a mark in front, which is no part of the first drive's name."""


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
    side: Side
    where: str = field(compare=False, default="")

    @property
    def text(self) -> str:
        return f"{self.drive} {self.frame} {self.side}"


@dataclass(frozen=True)
class BadLine:
    """A line that is not one, with the reason."""

    where: str
    text: str
    reason: str = "is not of the form 'drive frame l|r', for example '2011_09_26/2011_09_26_drive_0022_sync 473 r'"

    def __str__(self) -> str:
        return f"{self.where}: {self.text!r} {self.reason}"


@dataclass(frozen=True)
class SplitLists:
    """A split: part name -> lines, in the lists' order; lines that are not lines; the hash of it all.

    `sha256` is over part names and texts of all lines, good and bad, so it does not depend on line ends.
    """

    name: str
    parts: dict[str, list[SplitLine]]
    bad: dict[str, list[BadLine]]
    sha256: str

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
    files = _find(split, splits_dir)
    if files is None:
        if split not in NAMED:
            raise UsageError(_unknown(split, splits_dir))
        files = _download(split, url or os.environ.get(SPLITS_URL_ENV) or SPLITS_URL)
    name = split if split in NAMED else _split_name(Path(split))
    return _parse(name, files)


def _find(split: str, splits_dir: Path | None) -> list[Path] | None:
    """Files of a split that is on this machine; None if it is not."""
    candidates = [splits_dir / split, splits_dir / f"{split}.txt"] if splits_dir is not None else []
    if splits_dir is not None and not splits_dir.is_dir():
        raise InputError(f"{splits_dir}: no such folder of splits")
    if split not in NAMED or "/" in split:
        candidates.append(Path(split))
    for path in candidates:
        if path.is_dir():
            files = sorted(path.glob("*_files*.txt"))
            if not files:
                raise InputError(f"{path}: no train_files.txt, val_files.txt or test_files.txt there{_inner(path)}")
            return files
        if path.is_file():
            return [path]
    return None


def _inner(folder: Path) -> str:
    """What to do with a folder that holds splits instead of lists, for messages."""
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
        try:
            pooch.get_logger().setLevel("WARNING")
            paths.append(Path(pooch.retrieve(source, known_hash=f"sha256:{sha256}", fname=name, path=folder)))
        except ValueError as error:  # pooch's word for another sha256
            raise InputError(f"{source}: not the published list (sha256 differs from {sha256})") from error
        except OSError as error:
            raise InputError(
                f"{source}: cannot be downloaded ({_cause(error)}); put the lists into DIR/{split}/ and give "
                f"--splits DIR, or set {SPLITS_URL_ENV} to a mirror"
            ) from error
    return paths


def _cause(error: Exception) -> str:
    """Why a download failed: without the connection pool and the retries that urllib3 wraps its reasons in."""
    reason = getattr(error.args[0], "reason", None) if error.args else None
    text = str(error) if reason is None else str(reason).rpartition(": ")[2]
    return (text.splitlines() or [type(error).__name__])[0]


def part_of(path: Path) -> str:
    """Part that a list's file name stands for: `train_files.txt` -> `train`, `test_files_09.txt` -> `test_09`.

    Raises:
        InputError: a name that cannot be a part's.
    """
    part = re.sub(r"[-. ]", "_", path.stem.lower().replace("_files", ""))
    if not _PART.fullmatch(part):
        raise InputError(f"{path}: a list is named after its part: train_files.txt, val_files.txt, test_files.txt")
    return part


def _parse(name: str, files: list[Path]) -> SplitLists:
    parts: dict[str, list[SplitLine]] = {}
    bad: dict[str, list[BadLine]] = {}
    digest = hashlib.sha256()
    for path in files:
        part = part_of(path)
        parts[part], bad[part] = _parse_file(path)
        digest.update(f"{part}\n".encode())
        for line in path.read_text(encoding=_ENCODING, errors="replace").splitlines():
            digest.update(f"{line.strip()}\n".encode())
    if not any(parts.values()) and not any(bad.values()):
        raise InputError(f"{files[0]}: no lines in the split's lists")
    return SplitLists(name, parts, bad, digest.hexdigest())


def _parse_file(path: Path) -> tuple[list[SplitLine], list[BadLine]]:
    try:
        text = path.read_text(encoding=_ENCODING, errors="replace")
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from error
    lines: list[SplitLine] = []
    bad: list[BadLine] = []
    first: dict[SplitLine, int] = {}
    for number, raw in enumerate(text.splitlines(), start=1):
        row = raw.strip()
        where = f"{path}:{number}"
        if not row or row.startswith("#"):
            continue
        match = _LINE.fullmatch(row)
        if match is None:
            bad.append(BadLine(where, row[:120]))
            continue
        line = SplitLine(match[1].rstrip("/"), int(match[2]), "l" if match[3] == "l" else "r", where)
        if line in first:
            bad.append(BadLine(where, row[:120], f"repeats line {first[line]}"))
            continue
        first[line] = number
        lines.append(line)
    return lines, bad
