"""What the loss compares, from a batch: images of each level, and cameras."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from md2.data.batch import Batch, Offset
from md2.networks.camera import matrices

Pyramids = Mapping[Offset, Mapping[int, Tensor]]
"""Offset -> level s -> image (B, 3, H / 2^s, W / 2^s) in [0, 1]."""


def image_pyramid(images: Mapping[Offset, Tensor], scales: Iterable[int], v1_multiscale: bool = False) -> Pyramids:
    """Images (B, 3, H, W) and their halvings, each pixel the mean of 2x2 of the level before.

    Level 0 of every image, and the levels in `scales` of the target, for smoothness; with `v1_multiscale` of every
    image. (The official implementation resizes with Pillow's antialiasing filter.)
    """
    wanted = {0, *scales}
    pyramids: dict[Offset, dict[int, Tensor]] = {}
    for offset, image in images.items():
        levels = {0: image}
        for level in range(1, max(wanted) + 1 if offset == 0 or v1_multiscale else 1):
            levels[level] = F.avg_pool2d(levels[level - 1], 2)
        pyramids[offset] = {level: levels[level] for level in levels if level in wanted}
    return pyramids


def full(values: Tensor) -> Tensor:
    """float32 where autocast left less; float64 stays."""
    return values if values.dtype == torch.float64 else values.float()


def resize(maps: Tensor, image: Tensor) -> Tensor:
    """Maps (B, C, h, w) at the size of an image (B, 3, H, W), bilinear."""
    if maps.shape[2:] == image.shape[2:]:
        return maps
    return F.interpolate(maps, image.shape[2:], mode="bilinear", align_corners=False)


def camera_matrices(batch: Batch, camera: Tensor | None) -> Tensor:
    """Intrinsics (B, 3, 3) of the batch's images: its own, or those of a learned camera (4,)."""
    if camera is None:
        return batch.intrinsics
    height, width = batch.images[0].shape[2:]
    return matrices(camera, (height, width), batch.flipped, batch.size, batch.windows)
