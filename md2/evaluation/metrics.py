"""The seven depth metrics as published on KITTI, with crops, caps and median scaling, in batches on any device.

The protocol is that of Eigen et al. (NIPS 2014) as Godard et al. (ICCV 2019, section 4.1) use it. The predicted
*disparity* is resized bilinearly to the ground truth's size, inverted, scaled (by the ratio of the medians, or by
metres per unit if the checkpoint knows its unit), clamped to 1e-3..80 m, and compared at the measurements inside the
crop. Metrics are computed for each image, then averaged over images.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import interpolate

Crop = Literal["garg", "eigen", "none"]

METRICS = ("abs_rel", "sq_rel", "rmse", "rmse_log", "a1", "a2", "a3")
"""Names and order of the metrics; lower is better for the first four, higher for the last three."""

# Fractions of height (top, bottom) and width (left, right). Garg et al. (ECCV 2016), and the crop of
# Eigen et al. (NIPS 2014), both as published with Monodepth's evaluation (Godard et al., CVPR 2017).
_CROPS: dict[Crop, tuple[float, float, float, float]] = {
    "garg": (0.40810811, 0.99189189, 0.03594771, 0.96405229),
    "eigen": (0.3324324, 0.91351351, 0.0359477, 0.96405229),
}


@dataclass(frozen=True)
class Protocol:
    """Which pixels count, and the range of depth.

    Attributes:
        crop: part of the image that counts.
        min_depth, max_depth: metres; predictions are clamped to this range.
        cap_ground_truth: True counts only ground truth strictly inside the range, as for the 697 images with raw
            velodyne; False counts every measurement, as for the 652 with improved ground truth.
    """

    crop: Crop = "garg"
    min_depth: float = 1e-3
    max_depth: float = 80.0
    cap_ground_truth: bool = True


EIGEN = Protocol()
"""Eigen's 697 test images, raw velodyne."""
EIGEN_BENCHMARK = Protocol(crop="none", cap_ground_truth=False)
"""The 652 of them that have improved ground truth."""


class BatchMetrics(NamedTuple):
    """Results for each image of a batch, on the inputs' device.

    Attributes:
        values: (B, 7) float64 in the order of METRICS; NaN for an image without a counted pixel.
        ratios: (B,) float64, the factor applied to predicted depth; with median scaling NaN likewise.
        pixels: (B,) int64, counted pixels.
        resized: (B, 1, h, w) float32, the predicted disparity at the ground truth's size, 0 in the padding.
        mask: (B, 1, h, w) bool, the pixels that count.
    """

    values: Tensor
    ratios: Tensor
    pixels: Tensor
    resized: Tensor
    mask: Tensor


def crop_box(crop: Crop, height: int, width: int) -> tuple[int, int, int, int]:
    """Return top, bottom, left, right (bottom and right exclusive) of a crop in an image of this size."""
    if crop == "none":
        return 0, height, 0, width
    top, bottom, left, right = _CROPS[crop]
    return int(top * height), int(bottom * height), int(left * width), int(right * width)


def valid_mask(ground_truth: Tensor, sizes: Tensor, protocol: Protocol = EIGEN) -> Tensor:
    """Mark the pixels that count.

    Args:
        ground_truth: (B, 1, h, w) metres, 0 = no measurement, zero-padded at the right and the bottom.
        sizes: (B, 2) height and width of each image before padding; the crop is relative to these.

    Returns:
        (B, 1, h, w) bool.
    """
    if protocol.cap_ground_truth:
        mask = (ground_truth > protocol.min_depth) & (ground_truth < protocol.max_depth)
    else:
        mask = ground_truth > 0
    inside = torch.zeros_like(mask)
    for index, (height, width) in enumerate(sizes.tolist()):
        top, bottom, left, right = crop_box(protocol.crop, height, width)
        inside[index, :, top:bottom, left:right] = True
    return mask & inside


def resize_to(maps: Tensor, sizes: Tensor, padded: tuple[int, int]) -> Tensor:
    """Resize each map bilinearly to its own size, zero-padded at the right and the bottom.

    Sampling is at half pixels without antialiasing, like cv2.resize in the published evaluation.

    Args:
        maps: (B, 1, H, W).
        sizes: (B, 2) height and width for each map; (0, 0) leaves it all padding.
        padded: height and width of the result.

    Returns:
        (B, 1, *padded).
    """
    result = maps.new_zeros(maps.shape[0], 1, *padded)
    groups: dict[tuple[int, int], list[int]] = {}
    for index, (height, width) in enumerate(sizes.tolist()):
        groups.setdefault((height, width), []).append(index)
    groups.pop((0, 0), None)  # a sample without ground truth
    for (height, width), members in groups.items():
        resized = interpolate(maps[members], size=(height, width), mode="bilinear", align_corners=False)
        result[members, :, :height, :width] = resized
    return result


def evaluate_batch(
    disparity: Tensor,
    ground_truth: Tensor,
    sizes: Tensor | None = None,
    *,
    scaling: Literal["median"] | float = "median",
    protocol: Protocol = EIGEN,
) -> BatchMetrics:
    """Compute the seven metrics of each image of a batch.

    Args:
        disparity: (B, 1, H, W) predicted 1 / depth (the sigmoid's output after the min/max depth
            conversion), in the network's unit, at any size; 0 is infinitely far.
        ground_truth: (B, 1, h, w) metres, 0 = no measurement, zero-padded at the right and the bottom.
        sizes: (B, 2) height and width of each ground truth before padding; None: (h, w) for all.
        scaling: "median" multiplies each prediction by median(ground truth) / median(prediction) over
            the counted pixels; a number is metres per unit of predicted depth.

    Raises:
        ValueError: the shapes do not fit together.

    Source:
        Eigen et al., NIPS 2014, section 4 (metrics); Godard et al., ICCV 2019, section 4.1 (protocol).
    """
    batch, channels, height, width = ground_truth.shape
    if channels != 1 or disparity.shape[:2] != (batch, 1):
        raise ValueError(f"disparity {tuple(disparity.shape)} and depth {tuple(ground_truth.shape)}: both (B, 1, ., .)")
    if sizes is None:
        sizes = torch.tensor([[height, width]] * batch)
    mask = valid_mask(ground_truth, sizes, protocol)
    resized = resize_to(disparity.detach().float(), sizes, (height, width))
    true, counted = _pack(ground_truth, mask)
    predicted = 1 / _pack(resized, mask)[0]
    if scaling == "median":
        ratios = masked_median(true, counted) / masked_median(predicted, counted)
    else:
        ratios = torch.full((batch,), float(scaling), dtype=torch.float64, device=true.device)
    predicted = (predicted * ratios[:, None]).clamp(protocol.min_depth, protocol.max_depth)
    return BatchMetrics(depth_metrics(true, predicted, counted), ratios, counted.sum(1), resized, mask)


def depth_metrics(true: Tensor, predicted: Tensor, counted: Tensor | None = None) -> Tensor:
    """Compute abs_rel, sq_rel, rmse, rmse_log, a1, a2, a3 of each row.

    Args:
        true: (B, N) metres.
        predicted: (B, N) metres, already scaled and clamped.
        counted: (B, N) bool, pixels that count; None: all.

    Returns:
        (B, 7) float64; NaN in a row without a counted pixel.

    Source:
        Eigen et al., NIPS 2014, section 4.
    """
    if counted is None:
        counted = torch.ones_like(true, dtype=torch.bool)
    one = torch.ones((), dtype=torch.float64, device=true.device)
    true = torch.where(counted, true.double(), one)
    predicted = torch.where(counted, predicted.double(), one)
    error = true - predicted
    ratio = torch.maximum(true / predicted, predicted / true)
    log_error = true.log() - predicted.log()
    # A NaN prediction must not count as merely wrong in the threshold accuracies: keep it NaN.
    within = [torch.where(ratio.isnan(), ratio, (ratio < 1.25**power).double()) for power in (1, 2, 3)]
    terms = torch.stack([error.abs() / true, error**2 / true, error**2, log_error**2, *within], dim=1)
    pixels = counted.sum(1)[:, None]
    means = (terms * counted[:, None]).sum(2) / pixels
    means[:, 2:4] = means[:, 2:4].sqrt()
    return means


def masked_median(values: Tensor, counted: Tensor) -> Tensor:
    """Return the median of each row's counted values; of an even number, the mean of the middle two.

    Args:
        values: (B, N); counted: (B, N) bool.

    Returns:
        (B,) in the values' dtype; NaN in a row without a counted value.
    """
    if values.shape[1] == 0:
        return values.new_full((values.shape[0],), float("nan"))
    # Infinity is a value here (disparity 0), so what does not count becomes NaN, which sorts behind it.
    ordered = torch.where(counted, values, torch.nan).sort(dim=1).values
    pixels = counted.sum(1)
    low = ordered.gather(1, ((pixels - 1) // 2).clamp(min=0)[:, None])
    high = ordered.gather(1, (pixels // 2).clamp(max=values.shape[1] - 1)[:, None])
    return ((low + high) / 2)[:, 0]


def _pack(maps: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Gather the masked pixels of maps (B, 1, h, w), left-aligned in rows.

    Velodyne covers a twentieth of an image, so everything after this costs a twentieth.

    Returns:
        (B, N) float64, N the largest number of masked pixels, filled with 1; (B, N) bool, True for pixels.
    """
    flat = mask.flatten(1)
    pixels = flat.sum(1)
    longest = int(pixels.max()) if pixels.numel() else 0
    counted = torch.arange(longest, device=maps.device)[None] < pixels[:, None]
    packed = torch.ones(counted.shape, dtype=torch.float64, device=maps.device)
    # Both sides are row-major: boolean indexing lists pixels image by image, which is the order of the rows.
    packed[counted] = maps.flatten(1)[flat].double()
    return packed, counted


def mean_metrics(values: Tensor, pixels: Tensor) -> dict[str, float]:
    """Average metrics (N, 7) over the images that have a counted pixel; `pixels` (N,) counts them.

    Returns:
        Metric name -> mean; NaN if no image has a counted pixel, or if a prediction is NaN.
    """
    kept = values[pixels > 0]
    means = kept.mean(0) if len(kept) else torch.full((len(METRICS),), float("nan"))
    return dict(zip(METRICS, means.tolist(), strict=True))
