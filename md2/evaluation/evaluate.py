"""Evaluates depth over a dataset with ground truth.

evaluation = evaluate(network_disparity(predictor), batches, EIGEN, scaling="median")
evaluation.metrics["abs_rel"]
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from md2.config import Config
from md2.data.batch import Batch
from md2.evaluation.collectors import Collector
from md2.evaluation.metrics import EIGEN, EIGEN_BENCHMARK, METRICS, Crop, Protocol, evaluate_batch, mean_metrics
from md2.inference.predictor import Predictor
from shards.dataset import LocalDataset
from shards.errors import DatasetError, InputError, UsageError
from shards.manifest import Manifest

Scaling = Literal["median"] | float
PredictDisparity = Callable[[Batch], Tensor]
"""Batch -> (B, 1, H, W) predicted 1 / depth."""


@dataclass(frozen=True)
class ImageScore:
    """Scores of one image: the metrics in the order of METRICS, the scale factor, the number of counted pixels."""

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
        """Images with at least one counted pixel; the means are over these."""
        return [image for image in self.images if image.pixels > 0]

    @property
    def metrics(self) -> dict[str, float]:
        """Means of the seven metrics over the counted images."""
        values = torch.tensor([image.values for image in self.images], dtype=torch.float64).view(-1, len(METRICS))
        return mean_metrics(values, torch.tensor([image.pixels for image in self.images]))

    @property
    def ratio_median(self) -> float:
        """Median over images of the factor between prediction and ground truth."""
        return float(np.median([image.ratio for image in self.counted])) if self.counted else float("nan")

    @property
    def ratio_spread(self) -> float:
        """Standard deviation of the factors divided by their median; it is small if the scale is consistent."""
        ratios = np.array([image.ratio for image in self.counted])
        return float(np.std(ratios / np.median(ratios))) if self.counted else float("nan")

    def ranked(self) -> list[ImageScore]:
        """Return the counted images, from the worst abs_rel to the best."""
        return sorted(self.counted, key=lambda image: image.values[0], reverse=True)


def evaluate(
    predict: PredictDisparity,
    batches: Iterable[Batch],
    protocol: Protocol,
    scaling: Scaling,
    collectors: Sequence[Collector] = (),
) -> Evaluation:
    """Measure predictions against the batches' ground truth.

    Raises:
        DatasetError: a batch has no ground truth, or no image has a counted pixel.
        InputError: a prediction is NaN or negative, or has no median because half of it is infinitely far; names
            the sample.
    """
    images: list[ImageScore] = []
    measured = 0
    for batch in batches:
        if batch.depth is None or batch.depth_size is None:
            raise DatasetError(
                "the dataset has no ground truth (depth.png): pack it from raw data with depth maps or scans"
            )
        measured += int((batch.depth_size[:, 0] > 0).sum())
        disparity = predict(batch)
        bad = ~(disparity >= 0).flatten(1).all(1)
        if bad.any():
            key = batch.keys[int(bad.nonzero()[0])]
            raise InputError(f"sample {key}: its predicted disparity is NaN or negative")
        scores = evaluate_batch(disparity, batch.depth, batch.depth_size, scaling=scaling, protocol=protocol)
        rows = zip(batch.keys, scores.values.tolist(), scores.ratios.tolist(), scores.pixels.tolist(), strict=True)
        for key, values, ratio, pixels in rows:
            if pixels and not 0 < ratio < math.inf:
                raise InputError(f"sample {key}: at least half of its predicted disparities are 0, so it has no scale")
            images.append(ImageScore(key, tuple(values), ratio, pixels))
        for collect in collectors:
            collect(batch, disparity, scores)
    if not measured:
        raise DatasetError(
            f"none of the {len(images)} images has ground truth: pack them with depth, or choose another --part"
        )
    if not any(image.pixels for image in images):
        raise DatasetError(
            f"no measurement counts in any of {len(images)} images: none lies inside the crop and the range of depths"
        )
    return Evaluation(tuple(images), protocol, scaling)


def network_disparity(predictor: Predictor, *, flip: bool = False) -> PredictDisparity:
    """Return the networks' prediction; `flip` averages it with that for the mirrored image (post-processing)."""
    return lambda batch: predictor.disparity(batch.augmented[0], flip=flip)


def constant_disparity(batch: Batch) -> Tensor:
    """Predict the same depth everywhere, for median scaling: the least that a network has to beat."""
    return torch.ones(batch.size, 1, 2, 2, device=batch.intrinsics.device)


def evaluation_batches(
    dataset: LocalDataset, part: str, predictor: Predictor | None, *, batch_size: int = 16, limit: int | None = None
) -> Iterator[Batch]:
    """Read target images and ground truth of one part, once and in the dataset's order, at the networks' size.

    Args:
        predictor: its size and device are used; None: the stored size (640x192 where native), on the CPU.
        limit: read the first samples only, this number.

    Raises:
        DatasetError: no such part, or no ground truth.
    """
    if dataset.manifest.depth is None:
        raise DatasetError(
            f"{dataset.url}: no ground truth in this dataset: pack it from raw data with depth maps or scans"
        )
    return first_samples(single_part_loader(dataset, part, predictor, [0], batch_size, depth=True), limit)


def single_part_loader(
    dataset: LocalDataset,
    part: str,
    predictor: Predictor | None,
    frames: Sequence[int],
    batch_size: int,
    *,
    depth: bool = False,
) -> Iterator[Batch]:
    """Read the named frames of one part, once and in the dataset's order, without augmentation.

    Raises:
        UsageError, DatasetError: as `md2.pipeline.Loader`.
    """
    # DALI takes a second to import; saved predictions and `md2 predict` do without.
    from md2.pipeline import Loader

    config = (predictor.config if predictor else Config()).data
    stored = dataset.manifest.size if predictor is None else None
    width, height = stored or (config.width, config.height)
    plain = {"stereo": False, "flip": False, "color_jitter": False, "device": "auto"}
    data = config.model_copy(update={**plain, "frames": list(frames), "width": width, "height": height})
    device = predictor.device if predictor else torch.device("cpu")
    return iter(Loader(dataset, part, data, batch_size=batch_size, seed=0, train=False, depth=depth, device=device))


def first_samples(batches: Iterator[Batch], limit: int | None) -> Iterator[Batch]:
    """Yield batches until `limit` samples are reached (None: all); the last one is cut."""
    left = math.inf if limit is None else limit
    for batch in batches:
        if batch.size >= left:
            yield _cut(batch, int(left))
            return
        yield batch
        left -= batch.size


def _cut(batch: Batch, count: int) -> Batch:
    def first(value: Any) -> Any:
        if isinstance(value, dict):
            return {offset: image[:count] for offset, image in value.items()}
        return value[:count] if isinstance(value, Tensor | list) else value

    return Batch(**{name: first(value) for name, value in vars(batch).items()})


def choose_part(manifest: Manifest, part: str | None) -> str:
    """Return the given part; None: `test`, else `val`.

    Raises:
        DatasetError: no such part.
        UsageError: the dataset has neither, so the part must be named.
    """
    if part is not None:
        manifest.part(part)
        return part
    for candidate in ("test", "val"):
        if candidate in manifest.parts:
            return candidate
    raise UsageError(f"the dataset has only {', '.join(manifest.parts)}: name the part to evaluate with --part")


def choose_protocol(
    manifest: Manifest | None,
    name: Literal["auto", "eigen", "eigen_benchmark"] = "auto",
    *,
    crop: Crop | None = None,
    min_depth: float | None = None,
    max_depth: float | None = None,
) -> Protocol:
    """Return the published protocol for a dataset's ground truth, with the given values in the place of its own.

    Raises:
        UsageError: an empty range of depths.
    """
    depth = manifest.depth if manifest is not None else None
    improved = depth is not None and depth.source == "improved"
    base = EIGEN_BENCHMARK if name == "eigen_benchmark" or (name == "auto" and improved) else EIGEN
    given = {"crop": crop, "min_depth": min_depth, "max_depth": max_depth}
    protocol = replace(base, **{key: value for key, value in given.items() if value is not None})  # type: ignore[arg-type]
    if not 0 < protocol.min_depth < protocol.max_depth:
        raise UsageError(f"depths from {protocol.min_depth:g} to {protocol.max_depth:g} m: 0 < min < max is needed")
    return protocol


def choose_scaling(
    metres_per_unit: float | None, wanted: Literal["auto", "median", "metric"] = "auto", scale: float | None = None
) -> tuple[Scaling, list[str]]:
    """Return how predictions become metres, and the reasons why the result may mislead.

    Args:
        metres_per_unit: the checkpoint's unit; None: unknown (trained on one camera alone).
        wanted: "auto": metric if the unit is known, else median.
        scale: metres per unit as the user gives them (predictions of other projects); implies metric.

    Raises:
        UsageError: a scale together with median scaling, or one that is not positive.
    """
    if scale is not None:
        if not 0 < scale < math.inf:
            raise UsageError(f"--scale {scale:g}: a positive number of metres per unit is needed")
        if wanted == "median":
            raise UsageError("--scale and --scaling median exclude each other: give one of them")
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
    """List the reasons why numbers on this dataset cannot be compared with published ones."""
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
        others = f" (of its parts {', '.join(manifest.parts)})" if len(manifest.parts) > 1 else ""
        found.append(
            f"{manifest.skipped} lines of split {manifest.split.name}{others} are not in the dataset: published "
            "numbers are over all of them"
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
