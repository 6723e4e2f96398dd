"""Collectors: they gather pictures, predictions and files while an evaluation runs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from md2.data.batch import Batch
from md2.evaluation.metrics import METRICS, BatchMetrics, Protocol
from md2.visualize import Picture, Tile, color_ends, colorize, depth_to_uint16, sheet, write_png

Collector = Callable[[Batch, Tensor, BatchMetrics], None]
"""Called with every batch, its disparity (B, 1, H, W) as predicted, and its metrics."""
ERROR_SHOWN = 0.5
"""Relative error at the end of the colour scale."""
LEGEND = ("image", "disparity, bright is near", "relative error at the measured points, blue 0 to red 0.5 or more")
"""Headings of the columns; the captions give the depths of the brightest and the darkest colour."""


@dataclass
class WorstAndBest:
    """Collects pictures of the `kept` worst and the `kept` best images by abs_rel, at the networks' size."""

    protocol: Protocol
    kept: int = 4
    _worst: list[tuple[float, Tile]] = field(default_factory=list)
    _best: list[tuple[float, Tile]] = field(default_factory=list)

    def __call__(self, batch: Batch, disparity: Tensor, scores: BatchMetrics) -> None:
        for index in scores.pixels.nonzero()[:, 0].tolist():
            error = float(scores.values[index, 0])
            for found, rank in ((self._worst, -error), (self._best, error)):
                if len(found) < self.kept or rank < found[-1][0]:
                    found.append((rank, self._tile(batch, disparity, scores, index)))
                    found.sort(key=lambda entry: entry[0])
                    del found[self.kept :]

    def _tile(self, batch: Batch, disparity: Tensor, scores: BatchMetrics, index: int) -> Tile:
        image = np.asarray((batch.images[0][index].clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu())
        named = dict(zip(METRICS, scores.values[index].tolist(), strict=True))
        values, ratio = disparity[index, 0].float().cpu().numpy(), float(scores.ratios[index])
        dark, bright = (f"{ratio / end:.3g} m" if end > 0 else "infinity" for end in color_ends(values))
        caption = (
            f"{batch.keys[index]}   abs_rel {named['abs_rel']:.3f}   rmse {named['rmse']:.2f} m   "
            f"a1 {named['a1']:.3f}   factor {ratio:.2f}   bright {bright}, dark {dark}"
        )
        return Tile(caption, [image, colorize(values), self._error(batch, scores, index, image)])

    def _error(self, batch: Batch, scores: BatchMetrics, index: int, image: Picture) -> Picture:
        """Relative error at the measured points, as dots over the darkened image."""
        assert batch.depth is not None and batch.depth_size is not None
        mask = scores.mask[index, 0]
        true = batch.depth[index, 0][mask]
        predicted = float(scores.ratios[index]) / scores.resized[index, 0][mask]
        predicted = predicted.clamp(self.protocol.min_depth, self.protocol.max_depth)
        error = ((predicted - true).abs() / true).cpu().numpy()
        rows, columns = (axis.cpu().numpy() for axis in mask.nonzero(as_tuple=True))
        height, width = batch.depth_size[index].tolist()
        grey: Picture = (image.mean(axis=2, keepdims=True) * 0.35).astype(np.uint8).repeat(3, axis=2)
        at = (rows * grey.shape[0] // height, columns * grey.shape[1] // width)
        grey[at] = colorize(error[None], cmap="turbo", low=0.0, high=ERROR_SHOWN)[0]
        return grey

    def picture(self, title: str = "") -> Picture:
        """Draw the worst images, then the best: image, disparity, relative error."""
        worst, best = ([tile for _, tile in found] for found in (self._worst, self._best))
        # Of a few images the worst are also the best: each is shown once, on the half where it belongs.
        different = len({tile.caption for tile in (*worst, *best)})
        halves = {"worst": worst[: (different + 1) // 2], "best": best[: different // 2]}
        rows = [
            Tile(f"{half} {number}:  {tile.caption}", tile.pictures)
            for half, tiles in halves.items()
            for number, tile in enumerate(tiles, start=1)
        ]
        return sheet(title, rows, legend=LEGEND)


@dataclass
class Disparities:
    """Collects every disparity with its key."""

    rows: dict[str, NDArray[np.float32]] = field(default_factory=dict)

    def __call__(self, batch: Batch, disparity: Tensor, scores: BatchMetrics) -> None:
        self.rows |= dict(zip(batch.keys, disparity[:, 0].float().cpu().numpy(), strict=True))


@dataclass
class BenchmarkPngs:
    """Writes each prediction in the form of KITTI's depth benchmark: 16-bit PNG, metres x 256, native size.

    Both the native size and the median scaling come from an image's ground truth. `without` counts the images that
    have none, and therefore get no file.
    """

    folder: Path
    max_depth: float
    without: int = 0

    def __call__(self, batch: Batch, disparity: Tensor, scores: BatchMetrics) -> None:
        assert batch.depth_size is not None
        for index, (key, (height, width)) in enumerate(zip(batch.keys, batch.depth_size.tolist(), strict=True)):
            ratio = float(scores.ratios[index])
            if not height or not math.isfinite(ratio):
                self.without += 1
                continue
            depth: NDArray[Any] = (ratio / scores.resized[index, 0, :height, :width]).cpu().numpy()
            write_png(self.folder / f"{key}.png", depth_to_uint16(np.minimum(depth, self.max_depth)))


@dataclass
class Direction:
    """Measures whether predictions fall as depth rises, as disparities do: depth saved by mistake rises with it.

    `correlations` holds, for each image, Pearson's correlation of the logarithms of prediction and true depth over
    the counted pixels: -1 for a perfect disparity, +1 for perfect depth.
    """

    correlations: list[float] = field(default_factory=list)

    def __call__(self, batch: Batch, disparity: Tensor, scores: BatchMetrics) -> None:
        assert batch.depth is not None
        mask = scores.mask & (scores.resized > 0) & scores.resized.isfinite()
        for true, predicted, counted in zip(batch.depth, scores.resized, mask, strict=True):
            pair = torch.stack([true[counted], predicted[counted]]).double().log()
            if pair.shape[1] > 1 and (pair.std(dim=1) > 1e-6).all():
                self.correlations.append(float(torch.corrcoef(pair)[0, 1]))

    @property
    def is_depth(self) -> bool:
        """Whether most images' predictions rise with depth."""
        return bool(self.correlations) and float(np.median(self.correlations)) > 0.3
