"""Writes frames as MP4 (by PyAV, FFmpeg's libraries; `pip install 'md2[video]'`)."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any, Self

import numpy as np

from md2.visualize import Picture
from shards.errors import InputError
from shards.files import remove_quietly, replace, temporary
from shards.video import import_av

TICKS = 90_000
"""Units of time in a second of a written video."""


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
        self._av = import_av()
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
        """Add a frame. All frames have one size; an odd last row or column is dropped (4:2:0 needs pairs).

        Args:
            picture: (H, W, 3) uint8.
            seconds: its time, from any origin. If None or not after the last frame's, it is shown 1 / rate later.

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

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        try:
            if kind is None and self._stream is not None:
                self._mux(None)
            self._container.close()
            if kind is None and self._stream is not None:
                replace(self._beside, self.path)
        except OSError as error:
            if kind is None:  # else it must not hide the first error
                raise InputError(f"cannot write {self.path}: {error.strerror}") from error
        finally:
            remove_quietly(self._beside)
