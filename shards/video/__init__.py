"""Video files and cameras as frames, by PyAV (FFmpeg's libraries; `pip install 'md2[video]'`)."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from shards.errors import InputError, UsageError

_KINDS = (
    "mp4",
    "avi",
    "mov",
    "mkv",
    "webm",
    "m4v",
    "mpg",
    "mpeg",
    "ts",
    "gif",
    "flv",
    "wmv",
    "3gp",
    "ogv",
    "mts",
    "m2ts",
)
VIDEO_SUFFIXES = frozenset(f".{kind}" for kind in _KINDS)
CAMERAS = {"linux": ("/dev/video{}", "v4l2"), "darwin": ("{}", "avfoundation")}
"""sys.platform -> (device name, FFmpeg input format) of the camera with an index."""
DEFAULT_RATE = Fraction(25)
_FORMATS = "mov,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,asf,ogg,gif,h264,hevc,m4v,mjpeg,mxf,ivf"
"""FFmpeg's readers of files that hold their own pictures. A playlist under a video's name could name any other file."""
_MAX_PIXELS = 64 << 20


class DamagedVideoError(InputError):
    """The rest of a video cannot be read; the frames before that were given."""


@dataclass(frozen=True)
class VideoSource:
    """An opened stream of frames.

    Attributes:
        name: the file or camera, for messages.
        rate: frames per second, on average.
        frames: their number as the container gives it; None: unknown (cameras, some files).
    """

    name: str
    rate: Fraction
    frames: int | None
    _container: Any

    def __iter__(self) -> Iterator[Image.Image]:
        """Yield frames, upright, RGB; `info["seconds"]` is a frame's time, if the film gives one.

        Raises:
            DamagedVideoError: as `decode`.
        """
        for frame in self.decode():
            image = upright(frame)
            if frame.time is not None:
                image.info["seconds"] = frame.time
            yield image

    def decode(self) -> Iterator[Any]:
        """Yield PyAV's frames, as they are stored; `upright` turns them.

        Raises:
            DamagedVideoError: the rest cannot be read, or its pictures have another size.
        """
        # Looked up before: a generator that is still open when Python ends is closed after imports have ceased to work.
        failure = import_av().error.FFmpegError
        number = 0
        size: tuple[int, int] | None = None
        try:
            for frame in self._container.decode(self._container.streams.video[0]):
                now = upright_size(frame)
                size = size or now
                if now != size:
                    raise DamagedVideoError(
                        f"{self.name}: after {number} frames the size changes from {size[0]}x{size[1]} to "
                        f"{now[0]}x{now[1]}; the rest is left out (split the film there)"
                    )
                yield frame
                number += 1
        except failure as error:
            raise DamagedVideoError(f"{self.name}: damaged after {number} frames ({error.strerror})") from error
        # Containers count a frame or so wrong now and then; a file cut short lacks many.
        if self.frames is not None and number < self.frames - 1 - self.frames // 100:
            raise DamagedVideoError(f"{self.name}: cut short, it ends after {number} of {self.frames} frames")

    def seek(self, pts: int) -> None:
        """Let `decode` begin at the last key frame before a time stamp of the stream's.

        Raises:
            DamagedVideoError: the file cannot be searched.
        """
        try:
            self._container.seek(pts, stream=self._container.streams.video[0])
        except import_av().error.FFmpegError as error:
            raise DamagedVideoError(f"{self.name}: cannot be searched by time ({error.strerror})") from error

    def close(self) -> None:
        self._container.close()


def upright_size(frame: Any) -> tuple[int, int]:
    """Width and height of a frame once it is turned as the film says."""
    return (frame.height, frame.width) if _turns(frame) % 2 else (frame.width, frame.height)


def upright(frame: Any) -> Image.Image:
    """A frame as RGB, turned as the film says."""
    return Image.fromarray(np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), _turns(frame))))


def _turns(frame: Any) -> int:
    turns: int = round(frame.rotation / 90) % 4
    return turns


def open_video(path: Path, threads: int = 0) -> VideoSource:
    """Open a video file.

    Args:
        threads: that decode; 0: one per core.

    Raises:
        InputError: missing, not a video, or without pictures.
        UsageError: PyAV is not installed.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such video")
    return _open(str(path), None, str(path), threads)


def open_camera(index: int) -> VideoSource:
    """Open the camera with this index (Linux: /dev/video<index>).

    Raises:
        InputError: no such camera, or it is in use.
        UsageError: an operating system whose cameras have no index, or PyAV is not installed.
    """
    if sys.platform not in CAMERAS:
        raise UsageError(f"cameras by index are known on Linux and macOS, not on {sys.platform}: give a video file")
    device, kind = CAMERAS[sys.platform]
    return _open(device.format(index), kind, f"camera {index}")


def _open(device: str, kind: str | None, name: str, threads: int = 0) -> VideoSource:
    av = import_av()
    try:
        container = av.open(device, format=kind, options={} if kind else {"format_whitelist": _FORMATS})
    except (av.error.FFmpegError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{name}: cannot be opened ({reason}); is {device} there, whole and not in use?") from error
    if not container.streams.video:
        container.close()
        raise InputError(f"{name}: no pictures in it")
    stream = container.streams.video[0]
    if stream.codec_context is None:
        container.close()
        raise InputError(f"{name}: its pictures are coded in a way that FFmpeg does not know, or its header is damaged")
    stream.thread_type = "AUTO"
    stream.codec_context.thread_count = threads
    stream.codec_context.options = {"max_pixels": str(_MAX_PIXELS)}
    rate = stream.average_rate or stream.guessed_rate or DEFAULT_RATE
    return VideoSource(name, Fraction(rate), stream.frames or None, container)


def import_av() -> Any:
    """PyAV.

    Raises:
        UsageError: it is not installed.
    """
    try:
        import av
    except ImportError as error:
        raise UsageError("video needs PyAV: pip install 'md2[video]'") from error
    return av
