"""Depth of images, folders and globs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path

from PIL import Image

from md2.inference.inputs import ImageFile, find_images
from md2.inference.output import Output, Predicted, Progress, refuse_overwriting
from md2.inference.predictor import Predictor, read_image
from shards.errors import InputError

WORKERS = 2
"""Threads that decode ahead and write behind while the networks run."""


def predict_images(
    predictor: Predictor,
    inputs: Sequence[str],
    output: Output,
    *,
    batch_size: int = 8,
    flip: bool = False,
    progress: Progress = lambda done, total: None,
) -> Predicted:
    """Predict images, folders and globs; an unreadable image is listed, and the others go on.

    Raises:
        UsageError: a result would replace an input.
        InputError: nothing there, every image unreadable, or the folder cannot be written.
    """
    images = find_images(inputs, output.folder)
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
    """Batches of decoded images, one batch ahead; what cannot be read goes into `failed`."""
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
