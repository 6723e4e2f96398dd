"""What `md2 predict` does: sort the inputs, predict each kind, collect what came out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

from md2.inference.images import predict_images
from md2.inference.inputs import sort_inputs, unique_names
from md2.inference.output import (
    IMAGE_KINDS,
    METRIC_KINDS,
    VIDEO_KINDS,
    Output,
    Predicted,
    Progress,
    check_kinds,
    refuse_overwriting,
)
from md2.inference.predict_video import film_paths, predict_video
from md2.inference.predictor import Predictor, intrinsics_option
from md2.inference.video import VideoSource, open_camera, open_video
from md2.visualize import check_color_map
from shards.errors import UsageError


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


def run_predict(
    predictor: Predictor,
    inputs: Sequence[str],
    options: PredictOptions,
    tracker: Callable[[str], Progress] = lambda name: lambda done, total: None,
) -> Predicted:
    """Predict everything that was given.

    Args:
        tracker: called with a name for each input that is shown on its own; gives what is told its progress.

    Raises:
        UsageError: options that make no sense, or a result that would replace an input.
        InputError: an input or a colour map that is not there, or the folder cannot be written.
    """
    given = sort_inputs(inputs)
    check_color_map(options.cmap)
    kinds = check_kinds(options.save) if options.save is not None else None
    camera = intrinsics_option(options.intrinsics) if options.intrinsics is not None else None
    output = Output(options.out, kinds or IMAGE_KINDS, options.cmap, options.max_depth, camera)
    films = replace(output, kinds=kinds or VIDEO_KINDS)
    if options.scale is not None:
        predictor = predictor.with_unit(options.scale)
    if predictor.unit == "unknown" and kinds is not None and (metric := [k for k in kinds if k in METRIC_KINDS]):
        raise UsageError(
            f"--save {metric[0]} is in metres, and this model's scale is unknown (trained on one camera): give --scale "
            "METRES_PER_UNIT, or save npy"
        )

    videos = list(zip(given.videos, unique_names([path.stem for path in given.videos]), strict=True))
    refuse_overwriting(given.videos, (path for _, name in videos for path in film_paths(name, films).values()))

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
        done.append(
            predict_images(
                predictor,
                given.images,
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
