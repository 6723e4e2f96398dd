"""Flip post-processing: merge the prediction for an image with that for its mirror image."""

from __future__ import annotations

import torch
from torch import Tensor


def post_process(disparity: Tensor, flipped: Tensor) -> Tensor:
    """Merge the disparities of an image and of its mirror image: fewer artefacts at the sides.

    The mean in the middle; at the left border (5 %, blending over another 5 %) the mirrored one, at the
    right border the plain one.

    Args:
        disparity: (B, 1, H, W) of the image.
        flipped: (B, 1, H, W) of the mirrored image, as the network gives it (still mirrored).

    Source:
        Godard et al., CVPR 2017, section 3.4 ("post-processing").
    """
    width = disparity.shape[-1]
    other = flipped.flip(-1)
    across = torch.linspace(0, 1, width, dtype=disparity.dtype, device=disparity.device)
    left = 1 - (20 * (across - 0.05)).clamp(0, 1)
    right = left.flip(0)
    return right * disparity + left * other + (1 - left - right) * (disparity + other) / 2
