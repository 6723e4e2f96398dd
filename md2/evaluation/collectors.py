"""Collectors: what is gathered while an evaluation goes through a dataset, to look at or to keep."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from md2.data.batch import Batch
from md2.evaluation.metrics import METRICS, BatchMetrics, Protocol, resize_to, valid_mask
from md2.visualize import Picture, Tile, color_disparity, colorize, depth_to_uint16, sheet, write_png

Collector = Callable[[Batch, Tensor, BatchMetrics], None]
"""Called with every batch, its disparity (B, 1, H, W) as predicted, and its metrics."""
ERROR_SHOWN = 0.5
"""Relative error that gets the last colour."""
LEGEND = "image; disparity (bright is near); relative error at the measured points (blue 0, red a half or more)"
"""The columns of the worst and the best images."""


@dataclass
class WorstAndBest:
    """Collects pictures of the worst and the best images: at most 2 x `kept`, at the networks' size."""

    protocol: Protocol
    kept: int = 4
    _worst: list[tuple[float, int, Tile]] = field(default_factory=list)
    _best: list[tuple[float, int, Tile]] = field(default_factory=list)
    # Breaks ties, so that two equal scores never lead to comparing pictures.
    _order: count[int] = field(default_factory=count)

    def __call__(self, batch: Batch, disparity: Tensor, scores: BatchMetrics) -> None:
        for index in range(batch.size):
            if not scores.pixels[index]:
                continue
            error = float(scores.values[index, 0])
            for heap, rank in ((self._worst, error), (self._best, -error)):
                if len(heap) < self.kept or rank > heap[0][0]:
                    heapq.heappush(heap, (rank, next(self._order), self._tile(batch, disparity, scores, index)))
                    if len(heap) > self.kept:
                        heapq.heappop(heap)

    def _tile(self, batch: Batch, disparity: Tensor, scores: BatchMetrics, index: int) -> Tile:
        image = np.asarray((batch.images[0][index].clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu())
        named = dict(zip(METRICS, scores.values[index].tolist(), strict=True))
        caption = (
            f"{batch.keys[index]}   abs_rel {named['abs_rel']:.3f}   rmse {named['rmse']:.2f} m   "
            f"a1 {named['a1']:.3f}   factor {float(scores.ratios[index]):.2f}"
        )
        colours = color_disparity(disparity[index, 0].float().cpu().numpy())
        return Tile(caption, [image, colours, self._error(batch, disparity, scores, index, image)])

    def _error(self, batch: Batch, disparity: Tensor, scores: BatchMetrics, index: int, image: Picture) -> Picture:
        """Relative error at the measured points, as dots over the darkened image."""
        assert batch.depth is not None and batch.depth_size is not None
        one, size = batch.depth[index : index + 1], batch.depth_size[index : index + 1]
        mask = valid_mask(one, size, self.protocol)[0, 0]
        resized = resize_to(disparity[index : index + 1].float(), size, (one.shape[2], one.shape[3]))[0, 0]
        true = one[0, 0][mask]
        low, high = self.protocol.min_depth, self.protocol.max_depth
        predicted = (float(scores.ratios[index]) / resized[mask]).clamp(low, high)
        error = ((predicted - true).abs() / true).cpu().numpy()
        rows, columns = (axis.cpu().numpy() for axis in mask.nonzero(as_tuple=True))
        height, width = (int(side) for side in size[0])
        grey: Picture = (image.mean(axis=2, keepdims=True) * 0.35).astype(np.uint8).repeat(3, axis=2)
        at = (rows * grey.shape[0] // height, columns * grey.shape[1] // width)
        grey[at] = colorize(error[None], cmap="turbo", low=0.0, high=ERROR_SHOWN)[0]
        return grey

    def picture(self, title: str, legend: str = "") -> Picture:
        """Draw the worst images, then the best: image, disparity, relative error."""
        worst = [tile for _, _, tile in sorted(self._worst, reverse=True)]
        best = [tile for _, _, tile in sorted(self._best, reverse=True)]
        # Of a few images the worst are also the best: each is shown once, on the half where it belongs.
        different = len({tile.caption for tile in (*worst, *best)})
        worst, best = worst[: (different + 1) // 2], best[: different // 2]
        named = [Tile(f"worst {i + 1}:  {t.caption}", t.pictures) for i, t in enumerate(worst)]
        named += [Tile(f"best {i + 1}:  {t.caption}", t.pictures) for i, t in enumerate(best)]
        return sheet(title, named, legend=legend)


@dataclass
class Disparities:
    """Collects every disparity with its key."""

    keys: list[str] = field(default_factory=list)
    rows: list[NDArray[np.float32]] = field(default_factory=list)

    def __call__(self, batch: Batch, disparity: Tensor, scores: BatchMetrics) -> None:
        self.keys += batch.keys
        self.rows += list(disparity[:, 0].float().cpu().numpy())

    def stacked(self, order: list[str] | None = None) -> tuple[NDArray[np.float32], list[str]]:
        """Return (N, H, W) and the keys, in `order` (which may name more than was seen), else as seen."""
        row_of = dict(zip(self.keys, self.rows, strict=True))
        keys = self.keys if order is None else [key for key in order if key in row_of]
        return np.stack([row_of[key] for key in keys]), keys


@dataclass
class BenchmarkPngs:
    """Writes each prediction as KITTI's depth benchmark takes it: 16-bit PNG, metres x 256, native size.

    Both the native size and the median scaling come from an image's ground truth: `without` counts the images that
    have none, and get no file.
    """

    folder: Path
    max_depth: float
    without: int = 0

    def __call__(self, batch: Batch, disparity: Tensor, scores: BatchMetrics) -> None:
        assert batch.depth is not None and batch.depth_size is not None
        padded = (batch.depth.shape[2], batch.depth.shape[3])
        resized = resize_to(disparity.float(), batch.depth_size, padded)
        for index, key in enumerate(batch.keys):
            height, width = (int(side) for side in batch.depth_size[index])
            if not height or not math.isfinite(float(scores.ratios[index])):
                self.without += 1
                continue
            depth: NDArray[Any] = (float(scores.ratios[index]) / resized[index, 0, :height, :width]).cpu().numpy()
            write_png(self.folder / f"{key}.png", depth_to_uint16(np.minimum(depth, self.max_depth)))


@dataclass
class Direction:
    """Measures whether predictions fall as depth rises, as disparities do: depth saved by mistake rises with it.

    `correlations` holds, for each image, Pearson's correlation of the logarithms of prediction and true depth over
    the counted pixels: -1 for a perfect disparity, +1 for perfect depth.
    """

    protocol: Protocol
    correlations: list[float] = field(default_factory=list)

    def __call__(self, batch: Batch, disparity: Tensor, scores: BatchMetrics) -> None:
        assert batch.depth is not None and batch.depth_size is not None
        mask = valid_mask(batch.depth, batch.depth_size, self.protocol)
        resized = resize_to(disparity.float(), batch.depth_size, (batch.depth.shape[2], batch.depth.shape[3]))
        mask &= (resized > 0) & resized.isfinite()
        for true, predicted, counted in zip(batch.depth, resized, mask, strict=True):
            pair = torch.stack([true[counted], predicted[counted]]).double().log()
            if pair.shape[1] > 1 and (pair.std(dim=1) > 1e-6).all():
                self.correlations.append(float(torch.corrcoef(pair)[0, 1]))

    @property
    def is_depth(self) -> bool:
        """Whether most images' predictions rise with depth."""
        return bool(self.correlations) and float(np.median(self.correlations)) > 0.3
