"""Video files and cameras as frames, and frames as MP4 (by PyAV, FFmpeg's libraries; `pip install 'md2[video]'`)."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from PIL import Image

from md2.visualize import Picture
from shards.errors import InputError, UsageError
from shards.files import replace, temporary

CAMERAS = {"linux": ("/dev/video{}", "v4l2"), "darwin": ("{}", "avfoundation")}
"""sys.platform -> (device name, FFmpeg input format) of the camera with an index."""
DEFAULT_RATE = Fraction(25)


TICKS = 90_000
"""Units of time in a second of the films that are written."""


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
            DamagedVideoError: the rest cannot be read, or its pictures have another size.
        """
        av = _av()
        stream = self._container.streams.video[0]
        number = 0
        size: tuple[int, int] | None = None
        try:
            for frame in self._container.decode(stream):
                turns = round(frame.rotation / 90) % 4
                image = Image.fromarray(np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), turns)))
                size = size or image.size
                if image.size != size:
                    raise DamagedVideoError(
                        f"{self.name}: after {number} frames the size changes from {size[0]}x{size[1]} to "
                        f"{image.width}x{image.height}; the rest is left out (split the film there)"
                    )
                if frame.time is not None:
                    image.info["seconds"] = frame.time
                yield image
                number += 1
        except av.error.FFmpegError as error:
            raise DamagedVideoError(f"{self.name}: damaged after {number} frames ({error.strerror})") from error
        # Containers count a frame or so wrong now and then; a file cut short lacks many.
        if self.frames is not None and number < self.frames - 1 - self.frames // 100:
            raise DamagedVideoError(f"{self.name}: cut short, it ends after {number} of {self.frames} frames")

    def close(self) -> None:
        self._container.close()


def open_video(path: Path) -> VideoSource:
    """Open a video file.

    Raises:
        InputError: missing, not a video, or without pictures.
        UsageError: PyAV is not installed.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such video")
    return _open(str(path), None, str(path))


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


def _open(device: str, kind: str | None, name: str) -> VideoSource:
    av = _av()
    try:
        container = av.open(device, format=kind)
    except (av.error.FFmpegError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{name}: cannot be opened ({reason}); is {device} there, whole and not in use?") from error
    if not container.streams.video:
        container.close()
        raise InputError(f"{name}: no pictures in it")
    stream = container.streams.video[0]
    stream.thread_type = "AUTO"
    rate = stream.average_rate or stream.guessed_rate or DEFAULT_RATE
    return VideoSource(name, Fraction(rate), stream.frames or None, container)


class VideoWriter:
    """Writes H.264 in MP4, which browsers and phones play; the file appears whole or not at all.

    Args:
        path: the MP4.
        rate: frames per second, for frames that are written without a time.

    Raises:
        InputError: the folder cannot be written.
        UsageError: PyAV is not installed.
    """

    def __init__(self, path: Path, rate: Fraction) -> None:
        self._av = _av()
        self.path, self._rate = path, rate
        self._stream: Any = None
        self._size = (0, 0)
        self._first: float | None = None
        self._next = 0
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._beside = temporary(path)
            self._container = self._av.open(str(self._beside), "w", format="mp4", options={"movflags": "faststart"})
        except OSError as error:
            raise InputError(f"cannot write {path}: {error.strerror}") from error

    def write(self, picture: Picture, seconds: float | None = None) -> None:
        """Add a frame; all are of one size. An odd last row or column is left out (4:2:0 needs pairs).

        Args:
            picture: (H, W, 3) uint8.
            seconds: when it is shown, from any origin; None, or not after the one before: 1 / rate later.

        Raises:
            InputError: another size than the first frame's, or the disk is full.
        """
        height, width = picture.shape[0] // 2 * 2, picture.shape[1] // 2 * 2
        if self._stream is None:
            self._stream = self._container.add_stream("libx264", rate=self._rate, options={"crf": "18"})
            self._stream.width, self._stream.height, self._stream.pix_fmt = width, height, "yuv420p"
            self._stream.codec_context.time_base = Fraction(1, TICKS)
            self._size = (height, width)
        if (height, width) != self._size:
            raise InputError(f"{self.path}: a frame of {width}x{height} after one of {self._size[1]}x{self._size[0]}")
        frame = self._av.VideoFrame.from_ndarray(np.ascontiguousarray(picture[:height, :width]), format="rgb24")
        frame.pts, frame.time_base = self._place(seconds), Fraction(1, TICKS)
        self._mux(frame)

    def _place(self, seconds: float | None) -> int:
        """Time of the next frame in ticks."""
        step = round(TICKS / self._rate)
        place = self._next
        if seconds is not None:
            self._first = seconds if self._first is None else self._first
            place = max(round((seconds - self._first) * TICKS), self._next - step + 1, 0)
        self._next = place + step
        return place

    def _mux(self, frame: Any) -> None:
        try:
            for packet in self._stream.encode(frame):
                self._container.mux(packet)
        except OSError as error:
            raise InputError(f"cannot write {self.path}: {error.strerror}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None and self._stream is not None:
                self._mux(None)
            self._container.close()
            if kind is None and self._stream is not None:
                replace(self._beside, self.path)
        finally:
            with contextlib.suppress(OSError):  # must not hide the first error
                self._beside.unlink(missing_ok=True)


def _av() -> Any:
    try:
        import av
    except ImportError as error:
        raise UsageError("video needs PyAV: pip install 'md2[video]'") from error
    return av
