"""Validation during training: the loss and, with ground truth, the depth metrics."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch

from md2.config import Config
from md2.data.batch import Batch
from md2.distributed import Ranks
from md2.evaluation.metrics import METRICS, evaluate_batch
from md2.geometry import disparity_to_depth
from md2.loss import ReprojectionLoss
from md2.model import Networks, Prediction
from md2.training.amp import AmpSettings
from md2.training.panels import panel
from md2.visualize import Picture


@torch.no_grad()
def validate(
    networks: Networks, loss: ReprojectionLoss, batches: Iterable[Batch], config: Config, ranks: Ranks, amp: AmpSettings
) -> tuple[dict[str, float], Picture | None]:
    """Mean over all ranks' batches, and a picture of the first batch (main rank only).

    Depth is scaled by the ratio of medians if its unit is unknown (mono), else by the metres in the unit. Images
    without a measurement inside the crop are left out of the metrics' mean.

    Returns:
        `loss`, and with ground truth the seven metrics; empty without batches.
    """
    networks.eval()
    sums = torch.zeros(2 + 1 + len(METRICS), dtype=torch.float64, device=ranks.device)
    picture: Picture | None = None
    for batch in batches:
        with amp.autocast():
            prediction: Prediction = networks(amp.inputs(batch.augmented))
        wanted = picture is None and ranks.main
        losses = loss(batch, prediction, panels=wanted)
        if losses.panels:
            picture = panel(batch, prediction, losses)
        sums[:2] += torch.stack([losses.total.double() * batch.size, losses.total.new_tensor(batch.size).double()])
        if batch.depth is not None:
            sums[2:] += _metric_sums(prediction, batch, config)
    networks.train()
    total, images, measured, *metrics = ranks.sum(sums).tolist()
    if not images:
        return {}, None
    found = {"loss": total / images}
    if measured:
        found |= {name: value / measured for name, value in zip(METRICS, metrics, strict=True)}
    return found, picture


def _metric_sums(prediction: Prediction, batch: Batch, config: Config) -> torch.Tensor:
    """Number of images with a measurement, then the sums of their metrics."""
    assert batch.depth is not None
    depth = disparity_to_depth(prediction.disparities[0].float(), config.model.min_depth, config.model.max_depth)
    scaling: Literal["median"] | float = config.metres_per_unit if config.metres_per_unit is not None else "median"
    values = evaluate_batch(depth.reciprocal(), batch.depth, batch.depth_size, scaling=scaling).values
    values = values[~values.isnan().any(dim=1)]
    return torch.cat([values.new_tensor([len(values)]), values.sum(dim=0)])
