"""The pose networks: a decoder on ResNet features, and the plain convolutional one of Zhou et al. (CVPR 2017).

Both predict an axis-angle vector and a translation for each of n motions, as (B, n, 6) times 0.01, so that training
starts from almost no motion.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from md2.networks.decoder import full_precision

OUTPUT_SCALE = 0.01


def _motions(maps: Tensor) -> Tensor:
    """(B, 6 n, h, w) -> (B, n, 6), the mean over the image, scaled."""
    return OUTPUT_SCALE * maps.mean(dim=(2, 3)).view(maps.shape[0], -1, 6)


class PoseDecoder(nn.Module):
    """Last encoder features of one or several inputs -> motions.

    Args:
        channels: the encoder's five channel counts; the last that is not 0 is read.
        inputs: feature maps that are stacked (1 after a pose encoder, the number of frames with `shared`).
        motions: motions predicted.
    """

    def __init__(self, channels: Sequence[int], inputs: int, motions: int) -> None:
        super().__init__()
        self.net = nn.ModuleList(
            [
                nn.Conv2d(next(count for count in reversed(channels) if count), 256, 1),
                nn.Conv2d(256 * inputs, 256, 3, padding=1),
                nn.Conv2d(256, 256, 3, padding=1),
                nn.Conv2d(256, 6 * motions, 1),
            ]
        )

    def begin(self, z: Sequence[float]) -> None:
        """Set the last biases so that the motions' translations begin near these along the camera's axis."""
        biases = cast(Tensor, cast(nn.Conv2d, self.net[-1]).bias)
        with torch.no_grad():
            biases[5::6] = torch.tensor([z[place % len(z)] / OUTPUT_SCALE for place in range(len(biases) // 6)])

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """`inputs` deepest feature maps (B, C, h, w) -> (B, motions, 6)."""
        squeeze, first, second, last = self.net
        x = torch.cat([F.relu(squeeze(feature)) for feature in features], dim=1)
        x = F.relu(second(F.relu(first(x))))
        return _motions(full_precision(last, x))


class PoseCNN(nn.Module):
    """Seven strided convolutions on stacked images, without an encoder and without input normalisation.

    Args:
        images: stacked RGB images; one motion fewer is predicted.
    """

    def __init__(self, images: int) -> None:
        super().__init__()
        widths = (3 * images, 16, 32, 64, 128, 256, 256, 256)
        kernels = (7, 5, 3, 3, 3, 3, 3)
        self.net = nn.ModuleList(
            nn.Conv2d(widths[i], widths[i + 1], kernel, 2, kernel // 2) for i, kernel in enumerate(kernels)
        )
        self.pose_conv = nn.Conv2d(256, 6 * (images - 1), 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3 * images, H, W) in [0, 1] -> (B, images - 1, 6)."""
        for conv in self.net:
            x = F.relu(conv(x))
        return _motions(full_precision(self.pose_conv, x))
