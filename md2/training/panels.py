"""The picture of a step: target, warped sources, disparity, auto-mask or predictive masks, each column labelled."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn.functional import interpolate

from md2.data.batch import Batch, Offset
from md2.loss import LossOutput
from md2.model import Prediction
from md2.visualize import Picture, colorize

SHOWN = 4
"""Samples per picture."""
HEADER = 14
"""Least height of the labels' row, in pixels; it grows with the images, since large panels are shown scaled down."""


@torch.no_grad()
def panel(batch: Batch, prediction: Prediction, losses: LossOutput, shown: int = SHOWN) -> Picture:
    """One row per sample under a row of labels.

    Columns: the target, each warped source, disparity, then the auto-mask (white: the pixel counts) or each source's
    predictive mask. Needs losses computed with `panels=True`. Returns (header + rows H, columns W, 3) uint8.
    """
    looks = losses.panels[0]
    height, width = batch.images[0].shape[2:]
    named = {source: _name(source) for source in looks.warped}
    labels = ["target", *(f"{name} warped" for name in named.values()), "disparity"]
    labels += ["auto-mask: white counts"] * (looks.automask is not None)
    labels += [f"mask {name}" for name in named.values()] * (looks.mask is not None)
    rows = [_header(labels, width)]
    for index in range(min(shown, batch.size)):
        cells = [_rgb(batch.images[0][index])]
        cells += [_rgb(_fit(warped, height, width)[index]) for warped in looks.warped.values()]
        cells.append(colorize(_fit(prediction.disparities[0].float(), height, width)[index, 0].cpu().numpy()))
        if looks.automask is not None:
            cells.append(_rgb(_fit(looks.automask.float(), height, width)[index].expand(3, -1, -1)))
        if looks.mask is not None:
            cells += [_rgb(mask.expand(3, -1, -1)) for mask in _fit(looks.mask, height, width)[index].unbind()]
        rows.append(np.concatenate(cells, axis=1))
    return np.concatenate(rows, axis=0)


def _name(source: Offset) -> str:
    return "partner" if source == "s" else f"frame {source:+d}"


def _header(labels: list[str], width: int) -> Picture:
    """White labels on black, each cut to its column."""
    height = max(HEADER, width // 16)
    font = ImageFont.load_default(height - 3)
    cells = []
    for label in labels:
        cell = Image.new("RGB", (width, height))
        ImageDraw.Draw(cell).text((2, 0), label, "white", font)
        cells.append(np.asarray(cell))
    return np.concatenate(cells, axis=1)


def _fit(maps: Tensor, height: int, width: int) -> Tensor:
    return maps if maps.shape[2:] == (height, width) else interpolate(maps, (height, width), mode="nearest")


def _rgb(image: Tensor) -> Picture:
    return np.asarray((image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy())
