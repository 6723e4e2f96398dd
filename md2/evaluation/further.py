"""Further numbers as papers print them: KITTI's depth benchmark, point clouds, and drift along a trajectory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from md2.data.batch import Batch
from md2.evaluation.metrics import BatchMetrics, Protocol

BENCHMARK = {"SILog": "log(m) x 100", "sqErrorRel": "%", "absErrorRel": "%", "iRMSE": "1/km"}
"""Metrics of KITTI's depth benchmark, and their units; lower is better."""
NEAR = (0.1, 0.2)
"""Metres within which two points count as the same (Spencer et al., TMLR 2022)."""
LENGTHS = tuple(range(100, 900, 100))
"""Metres of the stretches over which KITTI's odometry benchmark measures drift."""
_EVERY = 10
"""Frames between the starts of two stretches."""
_ROWS = 1024


def benchmark_metrics(true: Tensor, predicted: Tensor) -> tuple[float, ...]:
    """Return KITTI's depth benchmark's metrics of one image, in the order and units of BENCHMARK.

    Args:
        true, predicted: (N,) metres, positive.

    Source:
        Uhrig et al., "Sparsity Invariant CNNs", 3DV 2017, and the benchmark's development kit (readme.txt).
    """
    true, predicted = true.double(), predicted.double()
    log_error = predicted.log() - true.log()
    relative = (predicted - true).abs() / true
    silog = (log_error.square().mean() - log_error.mean().square()).clamp(min=0).sqrt()
    inverse = (1 / predicted - 1 / true).square().mean().sqrt()
    return tuple(float(v) for v in (100 * silog, 100 * relative.square().mean(), 100 * relative.mean(), 1000 * inverse))


def f_scores(true: Tensor, predicted: Tensor, distances: Sequence[float] = NEAR) -> list[float]:
    """Return the F-scores of two point clouds: harmonic means of precision and recall, in [0, 1].

    Precision is the share of predicted points with a true point nearer than the distance, recall the share of true
    points with such a predicted one.

    Args:
        true: (N, 3); predicted: (M, 3); metres.

    Source:
        Ornek et al., "From 2D to 3D: Re-thinking Benchmarking of Monocular Depth Prediction", 2022; Spencer et al.,
        "Deconstructing Self-Supervised Monocular Reconstruction", TMLR 2022, section 3.
    """
    to_true, to_predicted = _nearest(predicted, true), _nearest(true, predicted)
    scores = []
    for distance in distances:
        precision, recall = (float((gaps < distance).double().mean()) for gaps in (to_true, to_predicted))
        scores.append(2 * precision * recall / (precision + recall) if precision + recall else 0.0)
    return scores


def _nearest(points: Tensor, cloud: Tensor) -> Tensor:
    """(N,) distance of each point (N, 3) to the nearest of a cloud (M, 3)."""
    # Not by the product of matrices, which loses centimetres at 80 m in float32.
    exact = "donot_use_mm_for_euclid_dist"
    return torch.cat([torch.cdist(part, cloud, compute_mode=exact).amin(1) for part in torch.split(points, _ROWS)])


def back_project(depth: Tensor, rows: Tensor, columns: Tensor, camera: Tensor) -> Tensor:
    """Points (N, 3) at pixels with depth (N,); `camera` (3, 3) in pixels, centres at integers."""
    x = (columns - camera[0, 2]) / camera[0, 0] * depth
    y = (rows - camera[1, 2]) / camera[1, 1] * depth
    return torch.stack([x, y, depth], dim=1)


@dataclass
class FurtherMetrics:
    """Collects the metrics of KITTI's depth benchmark, and with `points` F-scores, over the counted pixels.

    Depth is scaled and clamped as for the seven metrics. Point clouds are those at the counted pixels.
    """

    protocol: Protocol
    points: bool = False
    _values: list[list[float]] = field(default_factory=list)

    def __call__(self, batch: Batch, disparity: Tensor, scores: BatchMetrics) -> None:
        assert batch.depth is not None and batch.depth_size is not None
        for index in scores.pixels.nonzero()[:, 0].tolist():
            mask = scores.mask[index, 0]
            true = batch.depth[index, 0][mask]
            predicted = float(scores.ratios[index]) / scores.resized[index, 0][mask]
            predicted = predicted.clamp(self.protocol.min_depth, self.protocol.max_depth)
            found = list(benchmark_metrics(true, predicted))
            if self.points:
                size = batch.images[0].shape[2:]
                scale = batch.depth_size[index].double() / torch.tensor(size, device=mask.device)
                camera = batch.intrinsics[index].double().clone()
                for row, factor in ((0, scale[1]), (1, scale[0])):
                    camera[row, row] *= factor
                    camera[row, 2] = (camera[row, 2] + 0.5) * factor - 0.5
                rows, columns = mask.nonzero(as_tuple=True)
                cloud, guess = (back_project(d.float(), rows, columns, camera.float()) for d in (true, predicted))
                found += f_scores(cloud, guess)
            self._values.append(found)

    @property
    def means(self) -> dict[str, float]:
        """Means over the images, by name."""
        names = [*BENCHMARK, *(f"F-score {near * 100:g} cm" for near in NEAR if self.points)]
        return dict(zip(names, np.mean(self._values, axis=0).tolist(), strict=True)) if self._values else {}


def drift(true: NDArray[np.float64], predicted: NDArray[np.float64]) -> tuple[float, float] | None:
    """Return KITTI's odometry errors: t_rel in per cent, r_rel in degrees per 100 m; None for a way of less than 100 m.

    Means over all stretches of 100, 200, ... 800 m that start at every tenth frame. A stretch ends at the first frame
    at which the true way along it is longer than its length.

    Args:
        true, predicted: poses (n, 4, 4), metres.

    Source:
        Geiger et al., "Are we ready for Autonomous Driving?", CVPR 2012, and the benchmark's development kit.
    """
    steps = np.linalg.norm(np.diff(true[:, :3, 3], axis=0), axis=1)
    way = np.concatenate([[0.0], np.cumsum(steps)])
    errors = []
    for first in range(0, len(true), _EVERY):
        for length in LENGTHS:
            last = int(np.searchsorted(way, way[first] + length, side="right"))
            if last == len(way):
                break
            a, b = (np.linalg.inv(poses[first]) @ poses[last] for poses in (true, predicted))
            error = np.linalg.inv(b) @ a
            angle = float(np.arccos(np.clip((np.trace(error[:3, :3]) - 1) / 2, -1, 1)))
            errors.append((float(np.linalg.norm(error[:3, 3])) / length, angle / length))
    if not errors:
        return None
    moved, turned = np.mean(errors, axis=0).tolist()
    return 100 * moved, float(np.degrees(turned)) * 100
