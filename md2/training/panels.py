"""The picture that shows what training does: target, warped sources, disparity, auto-mask or predictive masks."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from md2.data.batch import Batch
from md2.loss import LossOutput
from md2.model import Prediction
from md2.visualize import color_disparity

Picture = np.ndarray[Any, np.dtype[np.uint8]]
SHOWN = 4
"""Samples per picture."""


@torch.no_grad()
def panel(batch: Batch, prediction: Prediction, losses: LossOutput, shown: int = SHOWN) -> Picture:
    """One row per sample: target, each warped source, disparity, auto-mask or each source's mask (white: counts).

    Needs losses computed with `panels=True`. Returns (rows H, columns W, 3) uint8.
    """
    looks = losses.panels[0]
    height, width = batch.images[0].shape[2:]
    rows = []
    for index in range(min(shown, batch.size)):
        cells = [_rgb(batch.images[0][index])]
        cells += [_rgb(_fit(warped, height, width)[index]) for warped in looks.warped.values()]
        cells.append(color_disparity(_fit(prediction.disparities[0].float(), height, width)[index, 0].cpu().numpy()))
        if looks.automask is not None:
            cells.append(_rgb(_fit(looks.automask.float(), height, width)[index].expand(3, -1, -1)))
        if looks.mask is not None:
            cells += [_rgb(mask.expand(3, -1, -1)) for mask in _fit(looks.mask, height, width)[index].unbind()]
        rows.append(np.concatenate(cells, axis=1))
    return np.concatenate(rows, axis=0)


def _fit(maps: Tensor, height: int, width: int) -> Tensor:
    return maps if maps.shape[2:] == (height, width) else interpolate(maps, (height, width), mode="nearest")


def _rgb(image: Tensor) -> Picture:
    return np.asarray((image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy())
