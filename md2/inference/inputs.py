"""Resolves the words of a command line: models, images, folders, globs, videos, cameras. Needs no PyTorch."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import takewhile
from pathlib import Path
from typing import Literal, get_args

from md2.config import recipes
from shards.errors import InputError, UsageError
from shards.manifest import MANIFEST
from shards.storage import is_local
from shards.video import VIDEO_SUFFIXES

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm"})
RESULT_SUFFIXES = ("_disparity", "_depth")
"""Ends of the names of an image's results, before the file type (`md2.inference.predict.FILE_ENDS`)."""

Progress = Callable[[int, int], None]
"""Called with the number of images done, and of all images (0: unknown)."""
Intrinsics = tuple[float, float, float, float]
"""fx, fy, cx, cy in pixels."""
OutputKind = Literal["side_by_side", "disparity", "npy", "png16", "ply", "benchmark"]
OUTPUT_KINDS: tuple[OutputKind, ...] = get_args(OutputKind)


@dataclass(frozen=True)
class ImageFile:
    """One image, and the name (without suffix, may hold folders) that its results get."""

    path: Path
    name: str


@dataclass(frozen=True)
class Inputs:
    """Inputs by kind; cameras by index."""

    images: list[ImageFile]
    videos: list[Path]
    cameras: list[int]


def require_model(model: str) -> None:
    """Refuse a path that cannot be a model, before PyTorch is imported.

    Raises:
        InputError: no such path, a recipe's name, an image, or a dataset.
    """
    if not is_local(model):
        return  # `md2.checkpoint.resolve` fetches it
    path = Path(model)
    if not path.exists():
        if model in recipes():
            raise InputError(
                f"{model} is a recipe, not a trained model: train it first (md2 train {model}), or give a folder of "
                "official Monodepth2 weights (docs/prediction.md)"
            )
        raise InputError(f"{model}: no such run, checkpoint or folder of Monodepth2 weights")
    if path.is_file() and path.suffix.lower() in IMAGE_SUFFIXES | VIDEO_SUFFIXES:
        raise InputError(f"{model} is an image or video, not a model: the model comes first, then its inputs")
    if (path / MANIFEST).is_file():
        raise InputError(f"{model} is a packed dataset, not a model: the model comes first, then its inputs")


def require_one_sequence(source: str, packed: bool, sequence: str | None, part: str | None) -> None:
    """Refuse words of `md2 odometry` that do not say which sequence, before PyTorch is imported.

    Raises:
        UsageError: a part of something that is not packed, or a packed dataset without one.
    """
    if part is not None and not packed:
        raise UsageError(f"{source}: --part names a part of a packed dataset, and this is not one")
    if packed and part is None and sequence is None:
        raise UsageError(f"{source} is a packed dataset: name a sequence with --sequence, or a --part")


def find_inputs(inputs: Sequence[str], out: Path | None = None) -> Inputs:
    """Find images, videos and cameras.

    A number that is not a file is a camera, and a path with a video's suffix is a video. Everything else is images: a
    file, everything below a folder (links are followed), or the matches of a glob (`**` too). `._NAME` files, which
    macOS writes beside others, are skipped. Names are in natural order, 2 before 10. Results keep the folders below a
    given folder or below a glob's first wildcard. Names whose results could be the same file are numbered.

    Args:
        out: folder of the results. It is skipped when a folder above it is searched.

    Raises:
        UsageError: no input, or a camera (which never ends) together with anything else.
        InputError: an image does not exist, a folder or glob has no match, or a folder cannot be listed.
    """
    if not inputs:
        raise UsageError("name at least one image, folder, glob, video or camera index")
    cameras = [text for text in inputs if text.isdecimal() and not Path(text).exists()]
    if cameras and len(inputs) > 1:
        raise UsageError(f"camera {cameras[0]} never ends: give it alone")
    images: list[ImageFile] = []
    videos: list[Path] = []
    for text in inputs if not cameras else ():
        path = Path(text)
        base = Path(*takewhile(lambda part: not _is_glob(part), path.parent.parts))
        if path.is_dir():
            images += _named(_below(path, out), path)
        elif path.suffix.lower() in VIDEO_SUFFIXES:
            videos += _matching(text, VIDEO_SUFFIXES, "video") if _is_glob(text) and not path.exists() else [path]
        elif path.is_file():
            images.append(ImageFile(path, path.stem))
        else:
            images += _named(_matching(text, IMAGE_SUFFIXES, "image"), base)
    names = unique_names([image.name for image in images])
    numbered = [ImageFile(image.path, name) for image, name in zip(images, names, strict=True)]
    return Inputs(numbered, videos, [int(text) for text in cameras])


def _named(paths: Sequence[Path], base: Path) -> list[ImageFile]:
    return [ImageFile(path, str(path.relative_to(base).with_suffix(""))) for path in sorted(paths, key=by_number)]


def unique_names(names: Sequence[str]) -> list[str]:
    """Number names (`a`, `a_2`) whose results could be the same files.

    `a` gives a.png, a_disparity.png and a_depth.png; an image called `a_depth` would give the last one, too.
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


def parse_kinds(text: str) -> tuple[OutputKind, ...]:
    """Parse `side_by_side,npy`.

    Raises:
        UsageError: an unknown kind, no kind, or two that write the same file.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in OUTPUT_KINDS]
    if unknown or not names:
        wrong = f"no such output {unknown[0]!r}" if unknown else "no output named"
        raise UsageError(f"--save {text}: {wrong}; choose from {', '.join(OUTPUT_KINDS)}")
    if {"side_by_side", "benchmark"} <= set(names):
        raise UsageError("--save: side_by_side and benchmark both write NAME.png: choose one of them")
    return tuple(kind for kind in OUTPUT_KINDS if kind in names)


def parse_intrinsics(text: str) -> Intrinsics:
    """Parse `721.5,721.5,609.6,172.9`: fx, fy, cx, cy in pixels.

    Raises:
        UsageError: not four finite numbers, or a focal length that is not positive.
    """
    try:
        fx, fy, cx, cy = (float(number) for number in text.split(","))
    except ValueError:
        raise UsageError(f"intrinsics {text!r}: four numbers fx,fy,cx,cy in pixels of the image are needed") from None
    if not (0 < fx < 1e6 and 0 < fy < 1e6 and abs(cx) < 1e6 and abs(cy) < 1e6):
        raise UsageError(f"intrinsics {text!r}: focal lengths must be positive, and all numbers pixels")
    return fx, fy, cx, cy


def _is_glob(text: str) -> bool:
    return any(mark in text for mark in "*?[")


def _matching(pattern: str, suffixes: frozenset[str], what: str) -> list[Path]:
    if "://" in pattern:
        raise InputError(f"{pattern}: images and videos are read from files, not from URLs")
    if not _is_glob(pattern):
        raise InputError(f"{pattern}: no such image, folder or video")
    path = Path(pattern)
    parts = path.parts[1:] if path.anchor else path.parts
    matches = {match for match in _glob(Path(path.anchor), parts) if _is_file(match, suffixes)}
    if not matches:
        raise InputError(f"{pattern}: no {what} matches")
    return sorted(matches, key=by_number)


def _glob(folder: Path, parts: Sequence[str]) -> Iterator[Path]:
    """Yield what `Path.glob` yields, but let `**` follow links (which Python does from 3.13 on)."""
    if not parts:
        yield folder
        return
    head, rest = parts[0], parts[1:]
    if head == "**":
        for inner in _folders(folder):
            yield from _glob(inner, rest or ("*",))
    elif _is_glob(head):
        if folder.is_dir():
            for name in _names(folder):
                if fnmatchcase(name, head):
                    yield from _glob(folder / name, rest)
    elif (folder / head).exists():
        yield from _glob(folder / head, rest)


def _folders(top: Path) -> Iterator[Path]:
    """Yield a folder and all below it, through links; each once, so that circles of links end."""
    seen: set[str] = set()
    for folder, names, _ in os.walk(top, followlinks=True, onerror=_unlisted):
        real = os.path.realpath(folder)
        if real in seen:
            names.clear()
            continue
        seen.add(real)
        # Real folders come first, so that one that is linked to from beside it keeps its own name.
        names.sort(key=lambda name, at=folder: (Path(at, name).is_symlink(), name))  # type: ignore[misc]
        yield Path(folder)


def _names(folder: Path) -> list[str]:
    try:
        return [path.name for path in folder.iterdir()]
    except OSError as error:
        _unlisted(error)
        return []


def _unlisted(error: OSError) -> None:
    raise InputError(f"{error.filename}: cannot be listed ({error.strerror})") from error


def _is_file(path: Path, suffixes: frozenset[str]) -> bool:
    return path.suffix.lower() in suffixes and not path.name.startswith("._") and path.is_file()


def _below(folder: Path, out: Path | None) -> list[Path]:
    everything = list(_glob(folder, ("**", "*")))
    files = [path for path in everything if _is_file(path, IMAGE_SUFFIXES)]
    results = out.resolve() if out is not None else folder.resolve()
    if folder.resolve() in results.parents:
        files = [path for path in files if not path.resolve().is_relative_to(results)]
    if not files:
        video = next((path for path in everything if _is_file(path, VIDEO_SUFFIXES)), None)
        hint = f"; it holds videos: give {folder}/*{video.suffix}" if video is not None else ""
        raise InputError(f"{folder}: no image in this folder (of {', '.join(sorted(IMAGE_SUFFIXES))}){hint}")
    return files


def by_number(path: Path) -> tuple[list[tuple[str, int]], str]:
    """Sort key for natural order: by folder, then by the value of the numbers in names, frame2 before frame10."""
    pieces = [piece for part in path.parts for piece in (*re.split(r"(\d+)", part), "/")]
    return [("", int(piece)) if piece.isdecimal() else (piece, -1) for piece in pieces], str(path)
