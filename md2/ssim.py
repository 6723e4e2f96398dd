"""Photometric error: structural similarity (Wang et al., IEEE TIP 2004) with 3x3 mean windows, and L1.

pe(a, b) = 0.85 clamp((1 - SSIM(a, b)) / 2, 0, 1) + 0.15 |a - b|, each the mean over the colour channels
(section 3.1 of the ICCV 2019 paper).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

C1 = 0.01**2
C2 = 0.03**2
SSIM_WEIGHT = 0.85


def window_mean(image: Tensor) -> Tensor:
    """Mean over the 3x3 window around each pixel of (B, C, H, W), reflected at the border; same shape."""
    return F.avg_pool2d(F.pad(image, (1, 1, 1, 1), mode="reflect"), 3, 1)


@dataclass(frozen=True)
class Target:
    """The image that others are compared with, (B, 3, H, W), and its window mean and variance."""

    image: Tensor
    mean: Tensor
    variance: Tensor

    @classmethod
    def of(cls, image: Tensor) -> Target:
        mean = window_mean(image)
        return cls(image, mean, window_mean(image * image) - mean * mean)


def ssim_error(image: Tensor, target: Target) -> Tensor:
    """clamp((1 - SSIM) / 2, 0, 1) of (B, 3, H, W) and the target, same shape, 0 where they are equal."""
    mean, square, product = window_mean(torch.cat([image, image * image, image * target.image], dim=1)).chunk(3, dim=1)
    variance = square - mean * mean
    covariance = product - mean * target.mean
    numerator = (2 * mean * target.mean + C1) * (2 * covariance + C2)
    denominator = (mean * mean + target.mean * target.mean + C1) * (variance + target.variance + C2)
    return ((1 - numerator / denominator) / 2).clamp(0, 1)


def photometric_error(image: Tensor, target: Target, no_ssim: bool = False) -> Tensor:
    """Error per pixel between images (N B, 3, H, W), stacked source by source, and the target -> (B, N, H, W)."""
    batch = target.image.shape[0]
    errors = []
    for one in torch.split(image, batch):
        error = (one - target.image).abs().mean(dim=1)
        if not no_ssim:
            error = (1 - SSIM_WEIGHT) * error + SSIM_WEIGHT * ssim_error(one, target).mean(dim=1)
        errors.append(error)
    return torch.stack(errors, dim=1)
