"""The work of `md2 predict`: images, videos and cameras in; pictures, videos and depth files out."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

from md2.inference.film import VideoWriter
from md2.inference.images import read_image
from md2.inference.inputs import ImageFile, Inputs, Intrinsics, OutputKind, Progress, unique_names
from md2.inference.predictor import DepthMap, Predictor
from md2.inference.viewer import Viewer
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
"""Written only if the unit is known."""
MP4_KINDS: tuple[OutputKind, ...] = ("side_by_side", "disparity")
"""Become an MP4 for a video; the other kinds become files per frame."""
IMAGE_KINDS: tuple[OutputKind, ...] = ("side_by_side", "disparity", "npy", "png16")
"""Default for images."""
VIDEO_KINDS: tuple[OutputKind, ...] = ("side_by_side",)
"""Default for videos."""
BENCHMARK_CAP = 80.0
"""Metres; the cap of the published evaluation."""
WORKERS = 2
"""Threads that decode the next batch and write the last one while the networks run."""
STEADINESS = 0.9
"""Weight of the past in a video's colour scale."""
FILE_ENDS: dict[OutputKind, str] = {
    "side_by_side": ".png",
    "disparity": "_disparity.png",
    "npy": "_depth.npy",
    "png16": "_depth.png",
    "ply": ".ply",
    "benchmark": ".png",
}


FrameView = Callable[[Image.Image], tuple[Image.Image, Intrinsics]]
"""Turns a camera's frame into a pinhole camera's picture, and gives that picture's intrinsics."""


@dataclass(frozen=True)
class PredictOptions:
    """Options of `md2 predict`; see its help.

    Attributes:
        out: folder of the results.
        kinds: kinds of results; None: IMAGE_KINDS for images, VIDEO_KINDS for videos.
        flip: average with the prediction for the mirrored image.
        cmap: matplotlib's name of the colour map.
        scale: metres per unit of depth; None: the model's own.
        intrinsics: camera for point clouds; None: that of `view`, else the learned one, else KITTI's, nominally.
        view: what the frames go through before they are predicted; None: nothing.
        max_depth: a point cloud leaves farther points out; in depth's unit.
        limit: predict the first frames of a video or camera only, this number.
        batch_size: images in one pass; a camera's frames are predicted one by one.
        viewer: page that shows some of the predictions.
    """

    out: Path
    kinds: tuple[OutputKind, ...] | None = None
    flip: bool = False
    cmap: str = "magma"
    scale: float | None = None
    intrinsics: Intrinsics | None = None
    view: FrameView | None = None
    max_depth: float = 80.0
    limit: int | None = None
    batch_size: int = 8
    viewer: Viewer | None = None


@dataclass(frozen=True)
class Predicted:
    """The result of a prediction: number of images, files in order, inputs that could not be read, with the reason."""

    images: int
    written: list[Path]
    failed: list[str]


def run_predict(
    predictor: Predictor,
    inputs: Inputs,
    options: PredictOptions,
    tracker: Callable[[str], Progress] = lambda name: lambda done, total: None,
) -> Predicted:
    """Predict all inputs.

    Args:
        tracker: called with the label of each progress bar; returns the function that moves it.

    Raises:
        UsageError: options contradict each other, or a result would replace an input.
        InputError: an input or a colour map does not exist, or the folder cannot be written.
    """
    check_color_map(options.cmap)
    if options.scale is not None:
        predictor = predictor.with_unit(options.scale)
    if predictor.unit == "unknown" and (metric := [kind for kind in options.kinds or () if kind in METRIC_KINDS]):
        raise UsageError(
            f"--save {metric[0]} is in metres, and this model's scale is unknown (trained on one camera): give --scale "
            "METRES_PER_UNIT, or save npy"
        )
    require_writable(options.out, folder=True)
    if options.viewer is not None:
        require_writable(options.viewer.path)
    videos = list(zip(inputs.videos, unique_names([path.stem for path in inputs.videos]), strict=True))
    refuse_overwriting(inputs.videos, (out for _, name in videos for out in _mp4s(name, options).values()))
    done: list[Predicted] = []
    if inputs.images:
        done.append(predict_images(predictor, inputs.images, options, tracker("images")))
    for path, name in videos:
        with closing(open_video(path)) as source:
            done.append(predict_video(predictor, source, name, options, progress=tracker(name)))
    for index in inputs.cameras:
        with closing(open_camera(index)) as source:
            name = f"camera{index}"
            done.append(predict_video(predictor, source, name, options, endless=True, progress=tracker(name)))
    written = [path for part in done for path in part.written]
    if options.viewer is not None:
        options.viewer.write()
        written.append(options.viewer.path)
    return Predicted(sum(part.images for part in done), written, [failure for part in done for failure in part.failed])


def predict_images(
    predictor: Predictor,
    images: Sequence[ImageFile],
    options: PredictOptions,
    progress: Progress = lambda done, total: None,
) -> Predicted:
    """Predict image files. One that cannot be read is listed in the result, and the others are predicted.

    Raises:
        UsageError: a result would replace an input.
        InputError: every image is unreadable, or the folder cannot be written.
    """
    kinds = options.kinds or IMAGE_KINDS
    targets = (options.out / f"{image.name}{FILE_ENDS[kind]}" for image in images for kind in kinds)
    refuse_overwriting((image.path for image in images), targets)
    written: list[Path] = []
    failed: list[str] = []
    done = 0
    with ThreadPoolExecutor(WORKERS) as pool:
        writing: list[Future[list[Path]]] = []
        for batch in _read_batches(images, options, pool, failed):
            results = predictor.predict_batch([picture for _, picture in batch], flip=options.flip)
            for (image, picture), result in zip(batch, results, strict=True):
                _view(options, image.name, result, picture)
            # One batch is written while the next is predicted, and no more, so memory stays bounded.
            written += [path for future in writing for path in future.result()]
            writing = [
                pool.submit(_write, image.name, result, kinds, options, picture.info.get("camera"))
                for (image, picture), result in zip(batch, results, strict=True)
            ]
            done += len(batch)
            progress(done + len(failed), len(images))
        written += [path for future in writing for path in future.result()]
    if not done:
        raise InputError(failed[0] if len(failed) == 1 else f"none of {len(failed)} images can be read: {failed[0]}")
    return Predicted(done, written, failed)


def _read_batches(
    images: Sequence[ImageFile], options: PredictOptions, pool: ThreadPoolExecutor, failed: list[str]
) -> Iterator[list[tuple[ImageFile, Image.Image]]]:
    """Yield batches of decoded images, while the next one is decoded; add to `failed` why an image is unreadable."""
    reading = ((image, pool.submit(_read, image.path, options.view)) for image in images)
    ahead = list(islice(reading, options.batch_size))
    while ahead:
        current, ahead = ahead, list(islice(reading, options.batch_size))
        batch = []
        for image, future in current:
            try:
                batch.append((image, future.result()))
            except InputError as error:
                failed.append(str(error))
        if batch:
            yield batch


def _read(path: Path, view: FrameView | None) -> Image.Image:
    return _seen(read_image(path), view, str(path))


def _seen(frame: Image.Image, view: FrameView | None, where: str) -> Image.Image:
    """A frame's picture; `info["camera"]` holds its intrinsics, if they are known."""
    if view is None:
        return frame
    try:
        picture, camera = view(frame)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    picture.info = {**frame.info, "camera": camera}
    return picture


def predict_video(
    predictor: Predictor,
    source: VideoSource,
    name: str,
    options: PredictOptions,
    *,
    endless: bool = False,
    progress: Progress = lambda done, total: None,
) -> Predicted:
    """Predict every frame of a video; frames keep their times.

    Writes NAME.mp4 and NAME_disparity.mp4, and NAME/000000_depth.npy and so on, as `options.kinds` says.

    Args:
        endless: True for a camera: Ctrl-C ends it, and the MP4 so far is completed. A file's MP4 is dropped then.

    Raises:
        InputError: no frame can be read, or the folder cannot be written. Data that are damaged after some frames
            are listed in the result, and the MP4 ends there.
    """
    mp4s = _mp4s(name, options)
    per_frame = [kind for kind in options.kinds or VIDEO_KINDS if kind not in MP4_KINDS]
    written: list[Path] = []
    failed: list[str] = []
    ends: tuple[float, float] | None = None
    done = 0
    with ExitStack() as stack:
        writers = {kind: stack.enter_context(VideoWriter(path, source.rate)) for kind, path in mp4s.items()}
        try:
            for frames in _batches(source, 1 if endless else options.batch_size, options):
                for frame, result in zip(frames, predictor.predict_batch(frames, flip=options.flip), strict=True):
                    ends = next_ends(ends, result.disparity)
                    for kind, writer in writers.items():
                        writer.write(_picture(kind, result, ends, options.cmap), frame.info.get("seconds"))
                    written += _write(f"{name}/{done:06d}", result, per_frame, options, frame.info.get("camera"))
                    _view(options, f"{name}, frame {done}", result, frame)
                    done += 1
                progress(done, min(source.frames or 0, options.limit or source.frames or 0))
        except KeyboardInterrupt:
            if not endless:
                raise
        except DamagedVideoError as error:
            if not done:
                raise
            failed.append(str(error))
    if not done:
        raise InputError(f"{source.name}: not one frame in it")
    return Predicted(done, [*mp4s.values(), *written], failed)


def _batches(source: VideoSource, size: int, options: PredictOptions) -> Iterator[list[Image.Image]]:
    """Yield batches of frames, also those before damaged data."""
    batch: list[Image.Image] = []
    try:
        for frame in islice(source, options.limit):
            batch.append(_seen(frame, options.view, source.name))
            if len(batch) == size:
                yield batch
                batch = []
    except DamagedVideoError:
        if batch:
            yield batch
        raise
    if batch:
        yield batch


def next_ends(ends: tuple[float, float] | None, disparity: Map) -> tuple[float, float]:
    """Ends of a video's colour scale, given those of the frame before.

    They follow the scene slowly: `color_ends` of each frame alone would flicker.
    """
    now = color_ends(disparity)
    low, high = (STEADINESS * old + (1 - STEADINESS) * new for old, new in zip(ends or now, now, strict=True))
    return low, high


def _mp4s(name: str, options: PredictOptions) -> dict[OutputKind, Path]:
    """Paths of a video's MP4s."""
    kinds = [kind for kind in options.kinds or VIDEO_KINDS if kind in MP4_KINDS]
    return {kind: (options.out / f"{name}{FILE_ENDS[kind]}").with_suffix(".mp4") for kind in kinds}


def _write(
    name: str, result: DepthMap, kinds: Iterable[OutputKind], options: PredictOptions, camera: Intrinsics | None
) -> list[Path]:
    """Write one image's files; those in metres only if the unit is known."""
    written = []
    for kind in kinds:
        path = options.out / f"{name}{FILE_ENDS[kind]}"
        if kind in METRIC_KINDS and not result.metric:
            continue
        if kind in MP4_KINDS:
            write_png(path, _picture(kind, result, color_ends(result.disparity), options.cmap))
        elif kind == "npy":
            write_npy(path, result.depth)
        elif kind == "ply":
            write_file(path, _cloud(result, options, camera))
        else:
            cap = BENCHMARK_CAP if kind == "benchmark" else np.inf
            write_png(path, depth_to_uint16(np.minimum(result.depth, cap)))
        written.append(path)
    return written


def _picture(kind: OutputKind, result: DepthMap, ends: tuple[float, float], cmap: str) -> Picture:
    """Colour the disparity between the `ends` of the scale, alone or beside (below) the image."""
    colours = colorize(result.disparity, cmap=cmap, low=ends[0], high=ends[1])
    if kind == "disparity":
        return colours
    return side_by_side(result.image, colours, color_scale(cmap, ends, metric=result.metric))


def _view(options: PredictOptions, name: str, result: DepthMap, picture: Image.Image) -> None:
    if options.viewer is not None:
        options.viewer.add(name, result, _camera(result, options, picture.info.get("camera")))


def _camera(result: DepthMap, options: PredictOptions, camera: Intrinsics | None) -> Intrinsics:
    """The options' camera, else the picture's own, the learned one, KITTI's as the published code approximates it."""
    height, width = result.depth.shape
    fallback = (0.58 * width, 1.92 * height, 0.5 * width, 0.5 * height)
    return options.intrinsics or camera or result.intrinsics or fallback


def _cloud(result: DepthMap, options: PredictOptions, camera: Intrinsics | None) -> bytes:
    points, kept = point_cloud(result.depth, _camera(result, options, camera), options.max_depth)
    unit = "metres" if result.metric else "unknown (right up to one factor)"
    return ply_bytes(points, result.image[kept], f"unit {unit}; x right, y down, z forward")


def refuse_overwriting(inputs: Iterable[Path], results: Iterable[Path]) -> None:
    """Refuse results that would replace their inputs.

    Raises:
        UsageError: a result would have the path of an input.
    """
    sources = {os.path.realpath(path) for path in inputs}
    for path in results:
        if path.exists() and os.path.realpath(path) in sources:
            raise UsageError(f"{path} is an input, and its result would replace it: name another folder with --out")
