"""What a command was given: images, folders and globs of them, videos, a camera."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from shards.errors import InputError, UsageError

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm"})
VIDEO_SUFFIXES = frozenset({".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".ts", ".gif"})


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
    """A number that is no file is a camera; a file with a video's suffix a video; the rest are images.

    Raises:
        UsageError: nothing given, or a camera together with anything else (it has no end).
    """
    if not inputs:
        raise UsageError("name at least one image, folder, glob, video or camera index")
    cameras = [int(text) for text in inputs if text.isdecimal() and not Path(text).exists()]
    videos = [Path(text) for text in inputs if Path(text).suffix.lower() in VIDEO_SUFFIXES]
    images = [text for text in inputs if Path(text) not in videos and not (text.isdecimal() and int(text) in cameras)]
    if cameras and len(inputs) > 1:
        raise UsageError(f"camera {cameras[0]} never ends: give it alone")
    return Inputs(images, videos, cameras)


def find_images(inputs: Sequence[str]) -> list[ImageFile]:
    """Files as given; folders with everything below, in the order of names; globs (`**` too).

    Two images never get the same name: folders are kept below a given folder, and names that would collide
    are numbered.

    Raises:
        InputError: something that is not there, a folder or glob without images.
    """
    found: list[ImageFile] = []
    for text in inputs:
        path = Path(text)
        if path.is_dir():
            found += _below(path)
        elif path.is_file():
            found.append(ImageFile(path, path.stem))
        else:
            found += _matching(text)
    return _unique(found)


def _matching(pattern: str) -> list[ImageFile]:
    path = Path(pattern)
    if not any(mark in pattern for mark in "*?["):
        raise InputError(f"{pattern}: no such image, folder or video")
    files = sorted(
        match for match in Path(path.anchor or ".").glob(str(path.relative_to(path.anchor))) if _image(match)
    )
    if not files:
        raise InputError(f"{pattern}: no image matches")
    return [ImageFile(match, match.stem) for match in files]


def _image(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()


def _below(folder: Path) -> list[ImageFile]:
    files = sorted(path for path in folder.rglob("*") if _image(path))
    if not files:
        raise InputError(f"{folder}: no image in this folder (looked for {', '.join(sorted(IMAGE_SUFFIXES))})")
    return [ImageFile(path, str(path.relative_to(folder).with_suffix(""))) for path in files]


def _unique(images: Sequence[ImageFile]) -> list[ImageFile]:
    taken: set[str] = set()
    result = []
    for image in images:
        name, number = image.name, 2
        while name in taken:
            name, number = f"{image.name}_{number}", number + 1
        taken.add(name)
        result.append(ImageFile(image.path, name))
    return result
