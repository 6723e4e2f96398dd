"""Videos as drives: which of their frames are packed, and those frames' pixels.

A video is decoded once to choose its frames, and once more to pack them, from the key frame before each chunk.
"""

from __future__ import annotations

import threading
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from prep.raw.zips import Ref
from shards.errors import InputError, SampleError, first_line
from shards.video import DamagedVideoError, VideoSource, open_video, upright, upright_size

_THUMBNAIL = 32
"""Cells of a frame, across and along, that are compared."""
_SAME = 2.0
"""Grey levels. Frames none of whose cells differ by more show one picture; noise and coding move a cell's mean by 1."""
_PAUSE = 3
"""Times the usual distance of two frames (or of two that are packed) after which a recording had stopped."""
_EARLY = 1e-3
"""Seconds. Time stamps are rounded, often to milliseconds."""
_NEAR = 300
"""Frames up to which the next one wanted is reached by decoding on."""
_BACK = 10.0
"""Seconds to go back where a search by time ended behind its frame, as in transport streams."""


@dataclass(frozen=True)
class VideoFrame(Ref):
    """A frame of a video: `url` is the video, `size` the bytes of its pixels.

    Attributes:
        number: of the frames before it.
        pts: its time stamp in the stream's units; None: the file has none.
        per_second: those units in a second.
        crc: of its pixels, so that a search by time cannot end at another frame.
        packed: its share of the video's bytes.
    """

    number: int = 0
    pts: int | None = None
    per_second: float = 1.0
    crc: int = 0
    packed: int = 0

    @property
    def transfer(self) -> int:
        return self.packed

    @property
    def place(self) -> str:
        return f"{self.url}: frame {self.number}"


@dataclass(frozen=True)
class Video:
    """The frames of a video that are packed.

    Attributes:
        frames: in order.
        starts: positions in it where the recording had paused.
        size: (width, height), upright.
        notes: what the user should know.
    """

    frames: list[VideoFrame]
    starts: list[int]
    size: tuple[int, int]
    notes: list[str]


def find_frames(ref: Ref, name: str, rate: float, progress: Callable[[int], None] = lambda frames: None) -> Video:
    """Choose a video's frames by their times: at most `rate` a second, and none that shows the picture before it.

    Args:
        ref: the file.
        name: of the drive, which begins the frames' paths.
        progress: called with a number of further frames looked at.

    Raises:
        InputError: not a video that can be read, or not a file of this machine.
        UsageError: PyAV is not installed.
    """
    if "://" in ref.url or ref.member is not None:
        raise InputError(f"{ref.place}: videos are read from folders of this machine; copy it there")
    source = open_video(Path(ref.url))
    try:
        return _Chooser(ref, name, source, rate).run(progress)
    finally:
        source.close()


class _Chooser:
    """Goes through a video once."""

    def __init__(self, ref: Ref, name: str, source: VideoSource, rate: float) -> None:
        self._ref, self._name, self._source, self._rate = ref, name, source, rate
        self._pause = _PAUSE * max(1 / rate, float(1 / source.rate))
        self._kept: list[VideoFrame] = []
        self._starts: list[int] = []
        self._seen: npt.NDArray[np.float32] | None = None
        self._same = self._broken = 0

    def run(self, progress: Callable[[int], None]) -> Video:
        notes, size, count = [], (0, 0), 0
        before = due = -np.inf
        try:
            for count, frame in enumerate(self._source.decode(), 1):
                seconds = (count - 1) / float(self._source.rate) if frame.time is None else float(frame.time)
                size = upright_size(frame)
                if frame.is_corrupt:
                    self._broken += 1
                    continue
                if self._kept and (seconds - before > self._pause or seconds < before):
                    self._starts.append(len(self._kept))
                    self._seen, due = None, seconds
                before = seconds
                if seconds >= due - _EARLY and self._keep(frame, count - 1, seconds):
                    due = (due if seconds - due < 1 / self._rate else seconds) + 1 / self._rate
                progress(1)
        except DamagedVideoError as error:
            notes.append(str(error))
        if not self._kept:
            raise InputError(notes[0] if notes else f"{self._ref.url}: no picture in it can be read")
        share = self._ref.size // max(count, 1)
        frames = [replace(frame, packed=share) for frame in self._kept]
        if self._starts:
            notes.append(f"{self._name}: the recording pauses {len(set(self._starts))} times; no sample reaches across")
        if self._same:
            notes.append(f"{self._name}: {self._same} frames show the picture before them and are left out")
        if self._broken:
            notes.append(f"{self._name}: {self._broken} damaged frames are left out")
        return Video(frames, sorted(set(self._starts) - {len(frames)}), size, notes)

    def _keep(self, frame: Any, number: int, seconds: float) -> bool:
        """Take a frame whose time has come, unless it shows the last one's picture."""
        small = frame.reformat(_THUMBNAIL, _THUMBNAIL, format="gray", interpolation="AREA").to_ndarray()
        small = small.astype(np.float32)
        if self._seen is not None and np.abs(small - self._seen).max() <= _SAME:
            self._same += 1
            return False
        self._seen = small
        pixels = _ppm(frame)
        per_second = 1.0 if frame.time_base is None else float(1 / frame.time_base)
        self._kept.append(
            VideoFrame(
                path=f"{self._name}@{seconds:.3f}s",
                url=self._ref.url,
                size=len(pixels),
                number=number,
                pts=frame.pts,
                per_second=per_second,
                crc=zlib.crc32(pixels),
            )
        )
        return True


def _ppm(frame: Any) -> bytes:
    """A frame's pixels, upright, as a file that Pillow reads."""
    image = upright(frame)
    return b"P6\n%d %d\n255\n" % image.size + image.tobytes()


class _Reader:
    """A video that is open at some frame; the next one wanted is mostly a few further on."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._source = open_video(Path(url), threads=1)
        self._frames: Iterator[Any] = iter(())
        self._at: VideoFrame | None = None

    def read(self, wanted: VideoFrame) -> bytes:
        """The frame's pixels.

        Raises:
            SampleError: the video is not the one that `wanted` was found in.
        """
        ahead = -1 if self._at is None else wanted.number - self._at.number
        if 0 < ahead <= _NEAR and (pixels := self._search(wanted)) is not None:
            return pixels
        for back in (0.0, _BACK):
            pts = None if wanted.pts is None else wanted.pts - round(back * wanted.per_second)
            if pts is not None and (pixels := self._search(wanted, pts)) is not None:
                return pixels
        self._source.close()
        self._source = open_video(Path(self.url), threads=1)
        if (pixels := self._search(wanted, counted=True)) is not None:
            return pixels
        raise SampleError(f"{wanted.place}: cannot be read again; was the video changed meanwhile?")

    def _search(self, wanted: VideoFrame, seek: int | None = None, counted: bool = False) -> bytes | None:
        """Decode on to the frame, from a time stamp if one is given; None if it does not come.

        Args:
            counted: the video was opened anew, and frames are counted.
        """
        try:
            if seek is not None:
                self._source.seek(seek)
            if seek is not None or counted:
                self._frames = self._source.decode()
            for number, frame in enumerate(self._frames):
                if number == wanted.number if counted else frame.pts == wanted.pts:
                    pixels = _ppm(frame)
                    self._at = wanted if zlib.crc32(pixels) == wanted.crc else None
                    return pixels if self._at else None
                if not counted and None not in (frame.pts, wanted.pts) and frame.pts > wanted.pts:
                    break
        except DamagedVideoError:
            pass  # read from the beginning, or named as a frame that is gone
        self._at = None
        return None

    def close(self) -> None:
        self._source.close()


_open = threading.local()


def read_frames(frames: list[VideoFrame]) -> dict[Ref, bytes | SampleError]:
    """Pixels of frames, as PPM; what fails is returned in its place. The last video stays open in this thread."""
    results: dict[Ref, bytes | SampleError] = {}
    for url, group in groupby(sorted(frames, key=lambda frame: (frame.url, frame.number)), key=lambda frame: frame.url):
        for frame in group:
            try:
                reader = getattr(_open, "reader", None)
                if reader is None or reader.url != url:
                    if reader is not None:
                        reader.close()
                    _open.reader = reader = _Reader(url)
                results[frame] = reader.read(frame)
            except SampleError as error:
                results[frame] = error
            except InputError as error:
                results[frame] = SampleError(first_line(error))
    return results
