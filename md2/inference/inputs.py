"""What a command was given: images, folders and globs of them, videos, a camera."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from shards.errors import InputError, UsageError

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm"})
VIDEO_SUFFIXES = frozenset({".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".ts", ".gif"})

RESULT_SUFFIXES = ("_disparity", "_depth")
"""What the names of an image's results may end with, before the file type (`md2.inference.output.Output`)."""


@dataclass(frozen=True)
class ImageFile:
    """One image, and the name (without suffix, may hold folders) that its results get."""

    path: Path
    name: str


@dataclass(frozen=True)
class Inputs:
    """Sorted by kind; cameras by index."""

    images: list[str]
    videos: list[Path]
    cameras: list[int]


def sort_inputs(inputs: Sequence[str]) -> Inputs:
    """A number that is no file is a camera; a file or glob with a video's suffix is video; the rest are images.

    Raises:
        UsageError: nothing given, or a camera together with anything else (it has no end).
        InputError: a glob without videos.
    """
    if not inputs:
        raise UsageError("name at least one image, folder, glob, video or camera index")
    cameras = [text for text in inputs if text.isdecimal() and not Path(text).exists()]
    films = [text for text in inputs if Path(text).suffix.lower() in VIDEO_SUFFIXES and not Path(text).is_dir()]
    images = [text for text in inputs if text not in films and text not in cameras]
    if cameras and len(inputs) > 1:
        raise UsageError(f"camera {cameras[0]} never ends: give it alone")
    videos = [path for text in films for path in _videos(text)]
    return Inputs(images, videos, [int(text) for text in cameras])


def find_images(inputs: Sequence[str], out: Path | None = None) -> list[ImageFile]:
    """Files as given; folders with everything below, in the order of names; globs (`**` too).

    Names are ordered as people count, 2 before 10. No two images get names whose results could be the same file:
    folders are kept below a given folder or a glob's first mark, and names that would collide are numbered.

    Args:
        out: where results go; what lies there is not taken when a folder above it is searched.

    Raises:
        InputError: something that is not there, a folder or glob without images.
    """
    found: list[ImageFile] = []
    for text in inputs:
        path = Path(text)
        if path.is_dir():
            found += _below(path, out)
        elif path.is_file():
            found.append(ImageFile(path, path.stem))
        else:
            base = Path(*takewhile(lambda part: not _is_glob(part), path.parent.parts))
            matches = _matching(text, IMAGE_SUFFIXES, "image")
            found += [ImageFile(match, str(match.relative_to(base).with_suffix(""))) for match in matches]
    names = unique_names([image.name for image in found])
    return [ImageFile(image.path, name) for image, name in zip(found, names, strict=True)]


def unique_names(names: Sequence[str]) -> list[str]:
    """The names, numbered (`a`, `a_2`) where the files of two of them could be the same.

    `a` gives a.png, a_disparity.png and a_depth.png, which would be the pictures of an `a_depth`, too.
    """
    taken: set[str] = set()
    result = []
    for name in names:
        free, number = name, 2
        while not taken.isdisjoint(stems := {free, *(free + suffix for suffix in RESULT_SUFFIXES)}):
            free, number = f"{name}_{number}", number + 1
        taken |= stems
        result.append(free)
    return result


def _videos(text: str) -> list[Path]:
    path = Path(text)
    return _matching(text, VIDEO_SUFFIXES, "video") if _is_glob(text) and not path.exists() else [path]


def _is_glob(text: str) -> bool:
    return any(mark in text for mark in "*?[")


def _matching(pattern: str, suffixes: frozenset[str], what: str) -> list[Path]:
    path = Path(pattern)
    if not _is_glob(pattern):
        raise InputError(f"{pattern}: no such image, folder or video")
    matches = Path(path.anchor or ".").glob(str(path.relative_to(path.anchor)))
    files = sorted((match for match in matches if _is_file(match, suffixes)), key=_counting)
    if not files:
        raise InputError(f"{pattern}: no {what} matches")
    return files


def _is_file(path: Path, suffixes: frozenset[str]) -> bool:
    return path.suffix.lower() in suffixes and path.is_file()


def _below(folder: Path, out: Path | None) -> list[ImageFile]:
    results = out.resolve() if out is not None and out.resolve() != folder.resolve() else None
    files = [path for path in folder.rglob("*") if _is_file(path, IMAGE_SUFFIXES)]
    if results is not None and results.is_relative_to(folder.resolve()):
        files = [path for path in files if not path.resolve().is_relative_to(results)]
    if not files:
        raise InputError(f"{folder}: no image in this folder (looked for {', '.join(sorted(IMAGE_SUFFIXES))})")
    return [ImageFile(path, str(path.relative_to(folder).with_suffix(""))) for path in sorted(files, key=_counting)]


def _counting(path: Path) -> tuple[list[tuple[str, int]], str]:
    """Sorts by folder, and by the value of the numbers in names: frame2, frame10."""
    pieces = [piece for part in path.parts for piece in (*re.split(r"(\d+)", part), "/")]
    return [("", int(piece)) if piece.isdecimal() else (piece, -1) for piece in pieces], str(path)
