"""The work of `md2 predict`: images, videos and cameras in; pictures, films and depth files out."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

from md2.inference.film import VideoWriter
from md2.inference.images import read_image
from md2.inference.inputs import (
    ImageFile,
    OutputKind,
    Progress,
    find_images,
    parse_intrinsics,
    parse_kinds,
    sort_inputs,
    unique_names,
)
from md2.inference.predictor import DepthMap, Predictor
from md2.visualize import (
    Map,
    Picture,
    check_color_map,
    color_ends,
    color_scale,
    colorize,
    depth_to_uint16,
    ply_bytes,
    point_cloud,
    require_writable,
    side_by_side,
    write_file,
    write_npy,
    write_png,
)
from shards.errors import InputError, UsageError
from shards.video import DamagedVideoError, VideoSource, open_camera, open_video

METRIC_KINDS: tuple[OutputKind, ...] = ("png16", "benchmark")
"""Written only where the unit is known."""
FILM_KINDS: tuple[OutputKind, ...] = ("side_by_side", "disparity")
"""Become an MP4 for a video; the other kinds become files per frame."""
IMAGE_KINDS: tuple[OutputKind, ...] = ("side_by_side", "disparity", "npy", "png16")
"""Default for images."""
VIDEO_KINDS: tuple[OutputKind, ...] = ("side_by_side",)
"""Default for videos."""
BENCHMARK_CAP = 80.0
"""Metres; the cap of the published evaluation."""
WORKERS = 2
"""Threads that decode ahead and write behind while the networks run."""
STEADINESS = 0.9
"""Weight of the past in a film's colour scale."""
FILE_ENDS: dict[OutputKind, str] = {
    "side_by_side": ".png",
    "disparity": "_disparity.png",
    "npy": "_depth.npy",
    "png16": "_depth.png",
    "ply": ".ply",
    "benchmark": ".png",
}


@dataclass(frozen=True)
class PredictOptions:
    """Options of `md2 predict`; see its help."""

    out: Path
    save: str | None = None
    flip: bool = False
    cmap: str = "magma"
    scale: float | None = None
    intrinsics: str | None = None
    max_depth: float = 80.0
    limit: int | None = None
    batch_size: int = 8


@dataclass(frozen=True)
class Predicted:
    """The result of a prediction.

    Attributes:
        images: number of images predicted.
        written: files, in order.
        failed: inputs that could not be read to their end, with the reason.
    """

    images: int
    written: list[Path] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Output:
    """The files that each image gives, and their folder (`FILE_ENDS`).

    Attributes:
        cmap: matplotlib's name of the colour map.
        max_depth: farther points are left out of a point cloud, in depth's unit.
        intrinsics: fx, fy, cx, cy in pixels for point clouds; None: KITTI's, nominally.
    """

    folder: Path
    kinds: Sequence[OutputKind] = IMAGE_KINDS
    cmap: str = "magma"
    max_depth: float = 80.0
    intrinsics: tuple[float, float, float, float] | None = None

    def write(self, name: str, result: DepthMap) -> list[Path]:
        """Write one image's files.

        Raises:
            InputError: the folder cannot be written.
        """
        written = []
        for kind in self.kinds:
            path = self.path(kind, name)
            if kind in METRIC_KINDS and not result.metric:
                continue
            if kind in FILM_KINDS:
                write_png(path, self.picture(kind, result, color_ends(result.disparity)))
            elif kind == "npy":
                write_npy(path, result.depth)
            elif kind == "ply":
                write_file(path, self._cloud(result))
            else:
                cap = BENCHMARK_CAP if kind == "benchmark" else np.inf
                write_png(path, depth_to_uint16(np.minimum(result.depth, cap)))
            written.append(path)
        return written

    def path(self, kind: OutputKind, name: str) -> Path:
        """Path of an image's file of this kind."""
        return self.folder / f"{name}{FILE_ENDS[kind]}"

    def films(self, name: str) -> dict[OutputKind, Path]:
        """Paths of a video's MP4s."""
        return {kind: self.path(kind, name).with_suffix(".mp4") for kind in FILM_KINDS if kind in self.kinds}

    def picture(self, kind: OutputKind, result: DepthMap, ends: tuple[float, float]) -> Picture:
        """Colour the disparity between the `ends` of the scale, alone or beside (below) the image."""
        colours = colorize(result.disparity, cmap=self.cmap, low=ends[0], high=ends[1])
        if kind == "disparity":
            return colours
        return side_by_side(result.image, colours, color_scale(self.cmap, ends, metric=result.metric))

    def _cloud(self, result: DepthMap) -> bytes:
        height, width = result.depth.shape
        camera = self.intrinsics or nominal_intrinsics(width, height)
        points, kept = point_cloud(result.depth, camera, self.max_depth)
        unit = "metres" if result.metric else "unknown (right up to one factor)"
        return ply_bytes(points, result.image[kept], f"unit {unit}; x right, y down, z forward")


def run_predict(
    predictor: Predictor,
    inputs: Sequence[str],
    options: PredictOptions,
    tracker: Callable[[str], Progress] = lambda name: lambda done, total: None,
) -> Predicted:
    """Predict all inputs.

    Args:
        tracker: called with a label for each bar that is to be shown; returns what moves it.

    Raises:
        UsageError: options that contradict each other, or a result that would replace an input.
        InputError: an input or a colour map does not exist, or the folder cannot be written.
    """
    given = sort_inputs(inputs)
    check_color_map(options.cmap)
    kinds = parse_kinds(options.save) if options.save is not None else None
    camera = parse_intrinsics(options.intrinsics) if options.intrinsics is not None else None
    output = Output(options.out, kinds or IMAGE_KINDS, options.cmap, options.max_depth, camera)
    films = replace(output, kinds=kinds or VIDEO_KINDS)
    if options.scale is not None:
        predictor = predictor.with_unit(options.scale)
    if predictor.unit == "unknown" and kinds is not None and (metric := [k for k in kinds if k in METRIC_KINDS]):
        raise UsageError(
            f"--save {metric[0]} is in metres, and this model's scale is unknown (trained on one camera): give --scale "
            "METRES_PER_UNIT, or save npy"
        )
    require_writable(options.out, folder=True)
    videos = list(zip(given.videos, unique_names([path.stem for path in given.videos]), strict=True))
    refuse_overwriting(given.videos, (path for _, name in videos for path in films.films(name).values()))

    def film(source: VideoSource, name: str, *, live: bool) -> Predicted:
        with closing(source):
            return predict_video(
                predictor,
                source,
                name,
                films,
                batch_size=1 if live else options.batch_size,
                flip=options.flip,
                limit=options.limit,
                endless=live,
                progress=tracker(name),
            )

    done: list[Predicted] = []
    if given.images:
        images = find_images(given.images, options.out)
        done.append(
            predict_images(
                predictor,
                images,
                output,
                batch_size=options.batch_size,
                flip=options.flip,
                progress=tracker("images"),
            )
        )
    done += [film(open_video(path), name, live=False) for path, name in videos]
    done += [film(open_camera(index), f"camera{index}", live=True) for index in given.cameras]
    return Predicted(
        sum(part.images for part in done),
        [path for part in done for path in part.written],
        [failure for part in done for failure in part.failed],
    )


def predict_images(
    predictor: Predictor,
    images: Sequence[ImageFile],
    output: Output,
    *,
    batch_size: int = 8,
    flip: bool = False,
    progress: Progress = lambda done, total: None,
) -> Predicted:
    """Predict image files; one that cannot be read is listed in the result, and the rest are predicted.

    Raises:
        UsageError: a result would replace an input.
        InputError: every image is unreadable, or the folder cannot be written.
    """
    targets = (output.path(kind, image.name) for image in images for kind in output.kinds)
    refuse_overwriting((image.path for image in images), targets)
    written: list[Path] = []
    failed: list[str] = []
    done = 0
    with ThreadPoolExecutor(WORKERS) as pool:
        writing: list[Future[list[Path]]] = []
        for batch in _read_batches(images, batch_size, pool, failed):
            results = predictor.predict_batch([picture for _, picture in batch], flip=flip)
            # One batch is written while the next is predicted, and no more, so memory stays bounded.
            written += [path for future in writing for path in future.result()]
            writing = [
                pool.submit(output.write, image.name, result) for (image, _), result in zip(batch, results, strict=True)
            ]
            done += len(batch)
            progress(done + len(failed), len(images))
        written += [path for future in writing for path in future.result()]
    if not done:
        raise InputError(failed[0] if len(failed) == 1 else f"none of {len(failed)} images can be read: {failed[0]}")
    return Predicted(done, written, failed)


def _read_batches(
    images: Sequence[ImageFile], batch_size: int, pool: ThreadPoolExecutor, failed: list[str]
) -> Iterator[list[tuple[ImageFile, Image.Image]]]:
    """Batches of decoded images, one batch ahead; the reasons of unreadable ones go into `failed`."""
    rest = iter(images)
    ahead = [(image, pool.submit(read_image, image.path)) for image in islice(rest, batch_size)]
    while ahead:
        current, ahead = ahead, [(i, pool.submit(read_image, i.path)) for i in islice(rest, batch_size)]
        batch = []
        for image, future in current:
            try:
                batch.append((image, future.result()))
            except InputError as error:
                failed.append(str(error))
        if batch:
            yield batch


class SteadyScale:
    """Ends of a film's colour scale; they follow the scene slowly, since frame by frame they would flicker."""

    def __init__(self) -> None:
        self._ends: tuple[float, float] | None = None

    def next(self, disparity: Map) -> tuple[float, float]:
        """Minimum and 95th percentile, blended with those of the frames before."""
        now = color_ends(disparity)
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
    """Predict every frame of a video.

    Writes NAME.mp4 and NAME_disparity.mp4, and NAME/000000_depth.npy and so on, as `output.kinds` asks. Frames keep
    their times.

    Args:
        limit: stop after this number of frames.
        endless: a camera: Ctrl-C is its end, and the film so far is finished. A file's film is left out then.

    Raises:
        InputError: no frame can be read, or the folder cannot be written. Data that are damaged after some frames
            are listed in the result, and the film ends there.
    """
    films = output.films(name)
    per_frame = replace(output, kinds=[kind for kind in output.kinds if kind not in FILM_KINDS])
    written: list[Path] = []
    failed: list[str] = []
    done = 0
    scale = SteadyScale()
    with ExitStack() as stack:
        writers = {kind: stack.enter_context(VideoWriter(path, source.rate)) for kind, path in films.items()}
        try:
            for frames in _batches(source, batch_size, limit):
                for frame, result in zip(frames, predictor.predict_batch(frames, flip=flip), strict=True):
                    ends = scale.next(result.disparity)
                    for kind, writer in writers.items():
                        writer.write(output.picture(kind, result, ends), frame.info.get("seconds"))
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


def refuse_overwriting(inputs: Iterable[Path], results: Iterable[Path]) -> None:
    """Refuse results that would replace what they are predicted from.

    Raises:
        UsageError: a result would have the path of an input.
    """
    sources = {os.path.realpath(path) for path in inputs}
    for path in results:
        if path.exists() and os.path.realpath(path) in sources:
            raise UsageError(f"{path} is an input, and its result would replace it: name another folder with --out")


def nominal_intrinsics(width: int, height: int) -> tuple[float, float, float, float]:
    """KITTI's camera as the published code approximates it: 0.58 and 1.92 of the size, centred."""
    return 0.58 * width, 1.92 * height, 0.5 * width, 0.5 * height
