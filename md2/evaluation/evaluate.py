"""Depth evaluation over a dataset with ground truth: networks, or disparities that others saved.

evaluation = evaluate(network_disparity(predictor), batches, EIGEN, scaling="median")
evaluation.metrics["abs_rel"]
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from md2.config import Config
from md2.data.batch import Batch
from md2.evaluation.metrics import (
    EIGEN,
    EIGEN_BENCHMARK,
    METRICS,
    BatchMetrics,
    Crop,
    Protocol,
    evaluate_batch,
    mean_metrics,
)
from md2.inference.predictor import Predictor
from shards.dataset import LocalDataset
from shards.errors import DatasetError, InputError, UsageError
from shards.manifest import Manifest

Scaling = Literal["median"] | float
Source = Callable[[Batch], Tensor]
"""Batch -> (B, 1, H, W) predicted 1 / depth."""
Watcher = Callable[[Batch, Tensor, BatchMetrics], None]
"""Told about every batch: its disparity as given, and its metrics."""


@dataclass(frozen=True)
class ImageScore:
    """One image: its key, the seven metrics in the order of METRICS, its scale factor, counted pixels."""

    key: str
    values: tuple[float, ...]
    ratio: float
    pixels: int


@dataclass(frozen=True)
class Evaluation:
    """Scores of all images, and how they were measured.

    Attributes:
        scaling: "median", or metres per unit of prediction.
    """

    images: tuple[ImageScore, ...]
    protocol: Protocol
    scaling: Scaling

    @property
    def counted(self) -> list[ImageScore]:
        """Images with at least one counted pixel; the others have no part in the means."""
        return [image for image in self.images if image.pixels > 0]

    @property
    def metrics(self) -> dict[str, float]:
        """The seven metrics, means over images."""
        values = torch.tensor([image.values for image in self.images], dtype=torch.float64).view(-1, len(METRICS))
        return mean_metrics(values, torch.tensor([image.pixels for image in self.images]))

    @property
    def ratio_median(self) -> float:
        """Median over images of the factor between prediction and ground truth."""
        return float(np.median([image.ratio for image in self.counted])) if self.counted else float("nan")

    @property
    def ratio_spread(self) -> float:
        """Standard deviation of the factors divided by their median: how consistent the scale is."""
        ratios = np.array([image.ratio for image in self.counted])
        return float(np.std(ratios / np.median(ratios))) if self.counted else float("nan")

    def ranked(self) -> list[ImageScore]:
        """Counted images from the worst abs_rel to the best."""
        return sorted(self.counted, key=lambda image: image.values[0], reverse=True)


def evaluate(
    source: Source, batches: Iterable[Batch], protocol: Protocol, scaling: Scaling, watchers: Sequence[Watcher] = ()
) -> Evaluation:
    """Measure predictions against the batches' ground truth.

    Raises:
        DatasetError: a batch has no ground truth, or there is no image with a counted pixel.
        InputError: a prediction that is NaN or negative, or too much of it infinitely far to be scaled by its
            median, by the sample's key.
    """
    images: list[ImageScore] = []
    for batch in batches:
        if batch.depth is None or batch.depth_size is None:
            raise DatasetError("the dataset has no ground truth (depth.png): pack it with md2 prep --depth")
        disparity = source(batch)
        _check_disparity(disparity, batch.keys)
        scores = evaluate_batch(
            disparity,
            batch.depth,
            batch.depth_size,
            scaling=scaling,
            crop=protocol.crop,
            min_depth=protocol.min_depth,
            max_depth=protocol.max_depth,
            cap_ground_truth=protocol.cap_ground_truth,
        )
        rows = zip(batch.keys, scores.values.tolist(), scores.ratios.tolist(), scores.pixels.tolist(), strict=True)
        for key, values, ratio, pixels in rows:
            if pixels and not 0 < ratio < math.inf:
                raise InputError(f"sample {key}: half of its predicted disparities or more are 0, so it has no scale")
            images.append(ImageScore(key, tuple(values), ratio, pixels))
        for watcher in watchers:
            watcher(batch, disparity, scores)
    if not any(image.pixels for image in images):
        raise DatasetError(f"no measurement counts in any of {len(images)} images: look at depth.png and the crop")
    return Evaluation(tuple(images), protocol, scaling)


def _check_disparity(disparity: Tensor, keys: Sequence[str]) -> None:
    bad = ~(disparity >= 0).flatten(1).all(1)
    if bad.any():
        raise InputError(f"sample {keys[int(bad.nonzero()[0])]}: its predicted disparity is NaN or negative")


def network_disparity(predictor: Predictor, *, flip: bool = False) -> Source:
    """Predictions of the networks; `flip` merges those of the mirror image (post-processing)."""
    return lambda batch: predictor.disparity(batch.augmented[0], flip=flip)


def constant_disparity(batch: Batch) -> Tensor:
    """The same depth everywhere: what a network has to beat. Only with median scaling does it mean anything."""
    return torch.ones(batch.size, 1, 2, 2, device=batch.intrinsics.device)


def saved_disparity(rows: NDArray[np.floating[Any]], order: Sequence[str]) -> Source:
    """Disparities that were saved, found by sample key.

    Args:
        rows: (N, H, W).
        order: key of each row. May name more than the dataset has: disparities of Eigen's 697 images serve
            the 652 with improved ground truth.

    Raises:
        InputError: another number of rows than of keys; when called, a sample that is not among them.
    """
    if len(rows) != len(order):
        raise InputError(f"{len(rows)} predictions for {len(order)} images: they must be one a line of the split")
    row_of = {key: index for index, key in enumerate(order)}

    def find(batch: Batch) -> Tensor:
        missing = [key for key in batch.keys if key not in row_of]
        if missing:
            raise InputError(
                f"sample {missing[0]} is not in the list that orders the predictions: name the right split"
            )
        chosen = np.stack([np.asarray(rows[row_of[key]], dtype=np.float32) for key in batch.keys])
        return torch.from_numpy(chosen)[:, None].to(batch.intrinsics.device)

    return find


def read_predictions(path: Path) -> NDArray[np.floating[Any]]:
    """An `.npy` of disparities, (N, H, W) or (N, 1, H, W), memory-mapped; object arrays are refused (they run code).

    Raises:
        InputError: missing, damaged, of another shape or kind.
    """
    try:
        rows = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (ValueError, OSError, EOFError) as error:
        # NumPy would advise to unpickle, which is what must not be done.
        reason = "it holds Python objects, or is no .npy at all" if "pickle" in str(error) else str(error)
        raise InputError(f"{path}: not an .npy of plain numbers ({reason})") from error
    if not isinstance(rows, np.ndarray):
        raise InputError(f"{path}: an archive of arrays; one .npy with all disparities, (N, H, W), is needed")
    if rows.ndim == 4 and rows.shape[1] == 1:
        rows = rows[:, 0]
    if rows.ndim != 3 or not np.issubdtype(rows.dtype, np.floating):
        raise InputError(f"{path}: {rows.dtype} {rows.shape}; floating-point (N, H, W) is needed")
    disparities: NDArray[np.floating[Any]] = rows
    return disparities


def evaluation_batches(
    dataset: LocalDataset,
    part: str,
    predictor: Predictor | None,
    *,
    batch_size: int = 16,
    limit: int | None = None,
) -> Iterator[Batch]:
    """Target images and ground truth of one part, once and in the dataset's order, at the networks' size.

    Args:
        predictor: whose size and device to use; None: the stored size (640x192 where native), on the CPU.
        limit: stop after so many samples.

    Raises:
        DatasetError: no such part, or no ground truth.
    """
    if dataset.manifest.depth is None:
        raise DatasetError(f"{dataset.url}: no ground truth in this dataset: pack it with md2 prep --depth")
    return _limited(single_part_loader(dataset, part, predictor, [0], batch_size, depth=True), limit)


def single_part_loader(
    dataset: LocalDataset,
    part: str,
    predictor: Predictor | None,
    frames: Sequence[int],
    batch_size: int,
    *,
    depth: bool = False,
) -> Iterator[Batch]:
    """One part as it is, once and in the dataset's order: the frames named, nothing else.

    Raises:
        UsageError, DatasetError: as `md2.pipeline.Loader`.
    """
    # DALI takes a second to import, which reading saved files or `md2 predict` need not wait for.
    from md2.pipeline import Loader

    config = (predictor.config if predictor else Config()).data
    stored = dataset.manifest.size if predictor is None else None
    width, height = stored or (config.width, config.height)
    plain = {"stereo": False, "flip": False, "color_jitter": False, "device": "auto"}
    data = config.model_copy(update={**plain, "frames": list(frames), "width": width, "height": height})
    device = predictor.device if predictor else torch.device("cpu")
    return iter(Loader(dataset, part, data, batch_size=batch_size, seed=0, train=False, depth=depth, device=device))


def _limited(batches: Iterator[Batch], limit: int | None) -> Iterator[Batch]:
    """Whole batches until `limit` samples are reached; the last one is cut."""
    left = limit
    for batch in batches:
        if left is not None and batch.size >= left:
            yield first_samples(batch, left)
            return
        yield batch
        left = left - batch.size if left is not None else None


def first_samples(batch: Batch, count: int) -> Batch:
    """The first samples of a batch."""

    def cut(images: Mapping[Any, Tensor]) -> dict[Any, Tensor]:
        return {offset: image[:count] for offset, image in images.items()}

    return Batch(
        images=cut(batch.images),
        augmented=cut(batch.augmented),
        intrinsics=batch.intrinsics[:count],
        stereo=None if batch.stereo is None else batch.stereo[:count],
        metres_per_unit=batch.metres_per_unit,
        depth=None if batch.depth is None else batch.depth[:count],
        depth_size=None if batch.depth_size is None else batch.depth_size[:count],
        keys=list(islice(batch.keys, count)),
    )


def choose_part(manifest: Manifest, part: str | None) -> str:
    """The part asked for; else `test`, else `val`.

    Raises:
        DatasetError: no such part.
        UsageError: only training data: to be evaluated on, it must be asked for by name.
    """
    if part is not None:
        manifest.part(part)
        return part
    for candidate in ("test", "val"):
        if candidate in manifest.parts:
            return candidate
    raise UsageError(f"the dataset has only {', '.join(manifest.parts)}: name the part to evaluate with --part")


def choose_protocol(
    manifest: Manifest,
    name: Literal["auto", "eigen", "eigen_benchmark"] = "auto",
    *,
    crop: Crop | None = None,
    min_depth: float | None = None,
    max_depth: float | None = None,
) -> Protocol:
    """The published protocol that belongs to a dataset's ground truth, with what is given instead.

    Raises:
        UsageError: a range of depths that is empty.
    """
    improved = manifest.depth is not None and manifest.depth.source == "improved"
    base = EIGEN_BENCHMARK if name == "eigen_benchmark" or (name == "auto" and improved) else EIGEN
    given = {"crop": crop, "min_depth": min_depth, "max_depth": max_depth}
    protocol = replace(base, **{key: value for key, value in given.items() if value is not None})  # type: ignore[arg-type]
    if not 0 < protocol.min_depth < protocol.max_depth:
        raise UsageError(f"depths from {protocol.min_depth:g} to {protocol.max_depth:g} m: 0 < min < max is needed")
    return protocol


def choose_scaling(
    metres_per_unit: float | None, wanted: Literal["auto", "median", "metric"] = "auto", scale: float | None = None
) -> tuple[Scaling, list[str]]:
    """How predictions become metres, and what is wrong with the combination.

    Args:
        metres_per_unit: of the checkpoint; None: unknown (trained on one camera alone).
        wanted: "auto": metric where the unit is known, else median.
        scale: metres per unit given by hand (predictions of other projects); means metric.

    Raises:
        UsageError: a scale together with median scaling, or one that is not positive.
    """
    if scale is not None:
        if not 0 < scale < math.inf:
            raise UsageError(f"--scale {scale:g}: a positive number of metres per unit is needed")
        if wanted == "median":
            raise UsageError("a scale in metres per unit and median scaling exclude each other: give one of them")
        return scale, []
    if wanted == "median" or (wanted == "auto" and metres_per_unit is None):
        if metres_per_unit is None:
            return "median", []
        return "median", [
            "this checkpoint learned from stereo and knows its unit: median scaling hides errors of scale, and the "
            "published stereo numbers are metric (leave --scaling out)"
        ]
    if metres_per_unit is None:
        return 1.0, [
            "this checkpoint learned from one camera: its depth has no unit, and metric evaluation takes it as "
            "metres; the published mono numbers use median scaling (leave --scaling out)"
        ]
    return metres_per_unit, []


def dataset_warnings(manifest: Manifest, protocol: Protocol, predictor: Predictor | None = None) -> list[str]:
    """Why numbers on this dataset with this protocol (of these networks) cannot be compared with published ones."""
    found = []
    if predictor is not None and manifest.size is not None:
        width, height = manifest.size
        if width < predictor.width or height < predictor.height:
            wanted = f"{predictor.width}x{predictor.height}"
            found.append(
                f"the images are stored at {width}x{height} and enlarged to the networks' {wanted}, which costs "
                f"accuracy: pack them with --size {wanted}"
            )
    depth = manifest.depth
    if manifest.skipped:
        found.append(
            f"{manifest.skipped} lines of split {manifest.split.name} are not in the dataset: published numbers are "
            "over all of them"
        )
    if manifest.split.name == "eigen" and depth is not None and depth.convention != "lidar_x":
        found.append(
            "this eigen dataset has the camera's z as depth; the published numbers use the lidar's forward x: "
            "they differ in the third digit (pack it with lidar x to compare)"
        )
    improved = depth is not None and depth.source == "improved"
    if improved and protocol != EIGEN_BENCHMARK:
        found.append("the published numbers on improved ground truth use no crop (protocol eigen_benchmark)")
    if not improved and not protocol.cap_ground_truth:
        found.append("protocol eigen_benchmark belongs to improved ground truth, and this dataset has raw points")
    return found
