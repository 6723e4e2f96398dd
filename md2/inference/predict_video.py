"""Depth of a video or of what a camera sees: MP4s of the pictures, files per frame for the rest."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

from md2.inference.output import Kind, Output, Predicted, Progress
from md2.inference.predictor import DepthMap, Predictor
from md2.inference.video import DamagedVideoError, VideoSource, VideoWriter
from md2.visualize import Map, Picture, colorize, side_by_side
from shards.errors import InputError

FILM_KINDS: tuple[Kind, ...] = ("side_by_side", "disparity")
"""What becomes an MP4; the other kinds become files per frame."""
STEADINESS = 0.9
"""Weight of the past in the colour scale."""


class SteadyScale:
    """Ends of the colour scale that follow the scene slowly: frame by frame they would make the film flicker."""

    def __init__(self) -> None:
        self._ends: tuple[float, float] | None = None

    def next(self, disparity: Map) -> tuple[float, float]:
        """Minimum and 95th percentile, blended with those of the frames before."""
        now = float(disparity.min()), float(np.percentile(disparity, 95))
        if self._ends is None:
            self._ends = now
        else:
            low, high = (STEADINESS * old + (1 - STEADINESS) * new for old, new in zip(self._ends, now, strict=True))
            self._ends = low, high
        return self._ends


def predict_video(
    predictor: Predictor,
    source: VideoSource,
    name: str,
    output: Output,
    *,
    batch_size: int = 8,
    flip: bool = False,
    limit: int | None = None,
    endless: bool = False,
    progress: Progress = lambda done, total: None,
) -> Predicted:
    """Predict every frame; write NAME.mp4, NAME_disparity.mp4 and NAME/000000_depth.npy ... as `output.kinds` says.

    Args:
        limit: stop after so many frames.
        endless: a camera: Ctrl-C is its end, and what was written until then is finished. Of a file, it
            leaves no film behind.

    Raises:
        InputError: no frame can be read, or the folder cannot be written. Damaged data after some frames are
            listed in the result, and the film ends there.
    """
    films = film_paths(name, output)
    per_frame = replace(output, kinds=[kind for kind in output.kinds if kind not in FILM_KINDS])
    written: list[Path] = []
    failed: list[str] = []
    done = 0
    scale = SteadyScale()
    with ExitStack() as stack:
        writers = {kind: stack.enter_context(VideoWriter(path, source.rate)) for kind, path in films.items()}
        try:
            for frames in _batches(source, batch_size, limit):
                for result in predictor.predict_batch(frames, flip=flip):
                    for kind, picture in _pictures(result, scale, output.cmap).items():
                        if kind in writers:
                            writers[kind].write(picture)
                    written += per_frame.write(f"{name}/{done:06d}", result)
                    done += 1
                progress(done, min(source.frames or 0, limit or source.frames or 0))
        except KeyboardInterrupt:
            if not endless:
                raise
        except DamagedVideoError as error:
            if not done:
                raise
            failed.append(str(error))
    if not done:
        raise InputError(f"{source.name}: not one frame in it")
    return Predicted(done, [*films.values(), *written], failed)


def film_paths(name: str, output: Output) -> dict[Kind, Path]:
    """Where the MP4s of a video of this name go."""
    suffixes: dict[Kind, str] = {"side_by_side": ".mp4", "disparity": "_disparity.mp4"}
    return {kind: output.folder / f"{name}{suffixes[kind]}" for kind in FILM_KINDS if kind in output.kinds}


def _pictures(result: DepthMap, scale: SteadyScale, cmap: str) -> dict[Kind, Picture]:
    low, high = scale.next(result.disparity)
    colours = colorize(result.disparity, cmap=cmap, low=low, high=high)
    return {"side_by_side": side_by_side(result.image, colours), "disparity": colours}


def _batches(source: VideoSource, size: int, limit: int | None) -> Iterator[list[Image.Image]]:
    """Batches of frames; those before damaged data are still given."""
    frames = iter(source)
    left = limit
    while left is None or left > 0:
        batch: list[Image.Image] = []
        problem: DamagedVideoError | None = None
        try:
            batch.extend(islice(frames, size if left is None else min(size, left)))
        except DamagedVideoError as error:
            problem = error
        if batch:
            yield batch
        if problem is not None:
            raise problem
        if not batch:
            return
        left = None if left is None else left - len(batch)
