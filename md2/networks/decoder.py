"""The depth decoder (ICCV 2019 paper, supplementary table 5), which also draws the predictive mask."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from md2.networks.outputs import output_layer

WIDTHS = (16, 32, 64, 128, 256)
"""Channels of the five stages, the one at full resolution first."""


class _Conv3x3(nn.Module):
    """3x3 convolution behind reflection padding."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(F.pad(x, (1, 1, 1, 1), mode="reflect"))
        return y


class _ConvBlock(nn.Module):
    """3x3 convolution and ELU."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = _Conv3x3(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return F.elu(self.conv(x), inplace=True)


class DepthDecoder(nn.Module):
    """Encoder features -> sigmoid maps at the wanted scales.

    Args:
        channels: the encoder's five channel counts.
        scales: output scales within 0..3, 0 is full resolution. The heads are numbered in this order.
        outputs: channels of each output; 1 for disparity, one per source for the predictive mask.
    """

    def __init__(self, channels: Sequence[int], scales: Sequence[int], outputs: int = 1) -> None:
        super().__init__()
        self.scales = list(scales)
        self.lowest = min(scales)
        blocks: list[nn.Module] = []
        inputs = channels[-1]
        for stage in reversed(range(5)):
            skip = channels[stage - 1] if stage > 0 else 0
            pair = [_ConvBlock(inputs, WIDTHS[stage]), _ConvBlock(WIDTHS[stage] + skip, WIDTHS[stage])]
            if stage < self.lowest:
                # Nothing reads these; they stay so that the names do, frozen so that DDP expects no gradient.
                pair = [block.requires_grad_(False) for block in pair]
            blocks += pair
            inputs = WIDTHS[stage]
        heads = [_Conv3x3(WIDTHS[scale], outputs) for scale in self.scales]
        self.decoder = nn.ModuleList([*blocks, *heads])

    def forward(self, features: Sequence[Tensor]) -> dict[int, Tensor]:
        """Five features -> scale s -> (B, outputs, H / 2^s, W / 2^s) in (0, 1)."""
        maps = {}
        x = features[-1]
        for stage in range(4, self.lowest - 1, -1):
            first = 2 * (4 - stage)
            x = F.interpolate(self.decoder[first](x), scale_factor=2.0, mode="nearest")
            if stage > 0:
                x = torch.cat([x, features[stage - 1]], dim=1)
            x = self.decoder[first + 1](x)
            if stage in self.scales:
                maps[stage] = torch.sigmoid(output_layer(self.decoder[10 + self.scales.index(stage)], x))
        return {scale: maps[scale] for scale in self.scales}
