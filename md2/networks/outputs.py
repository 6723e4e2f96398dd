"""The networks' last layers: in float32, whatever precision autocast gives the others."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def output_layer(layer: nn.Module, x: Tensor) -> Tensor:
    """`layer(x)` in float32, or in x's precision where that is higher.

    A disparity in bfloat16, or a logit whose sigmoid becomes one, has so few values that depth goes in steps of 2 to 3%
    (26 between 5 and 10 m, with depths of 0.1 to 100): the warp would see a staircase, smoothness flat steps.
    """
    with torch.autocast(x.device.type, enabled=False):
        y: Tensor = layer(x.float() if x.dtype.itemsize < 4 else x)
    return y
