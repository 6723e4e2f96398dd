"""What the loss returns."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from md2.data.batch import Offset
from md2.model import Prediction


@dataclass(frozen=True)
class Panels:
    """What one scale's loss compared, without gradients.

    Attributes:
        warped: source -> (B, 3, h, w), the source as seen from the target.
        error: (B, 1, h, w), the error that the mean is taken over.
        automask: (B, 1, h, w) bool, true where a warped source fits better than every unwarped one, which is where
            the pixel counts. None with `disable_automasking`.
        mask: (B, sources, h, w) in [0, 1], the predictive mask, or None.
    """

    warped: dict[Offset, Tensor]
    error: Tensor
    automask: Tensor | None
    mask: Tensor | None = None


@dataclass(frozen=True)
class LossOutput:
    """Attributes:
    total: scalar, the mean of `per_scale`, and the weighted velocity error if distances are known.
    per_scale: scale -> scalar: reprojection, mask's cross-entropy and weighted smoothness.
    panels: scale -> panels; empty unless asked for.
    """

    total: Tensor
    per_scale: dict[int, Tensor]
    panels: dict[int, Panels]


def diverged(prediction: Prediction) -> LossOutput | None:
    """NaN for a prediction on the CPU that is not finite, else None.

    torch's CPU sampler would turn a NaN coordinate into a wild index and end in a segmentation fault. A GPU's sampler
    checks its bounds, and asking there would make the host wait.
    """
    tensors = prediction.tensors()
    if tensors[0].device.type != "cpu" or all(bool(tensor.isfinite().all()) for tensor in tensors):
        return None
    # It depends on every output, so that backward reaches each parameter on each rank.
    nan = torch.stack([tensor.float().sum() for tensor in tensors]).sum() * torch.nan
    return LossOutput(nan, dict.fromkeys(prediction.disparities, nan), {})
