"""HR-Depth's decoder (Lyu et al., "HR-Depth: High Resolution Self-Supervised Monocular Depth Estimation", AAAI 2021).

Dense skip connections: row i of a triangle of nodes has the resolution of encoder feature i, and node (i, j) joins all
nodes before it in its row with the upsampled node (i + 1, j - 1). The last node of a row fuses them by squeeze and
excitation; the disparity at the row's resolution is read from it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from md2.networks.decoder import WIDTHS, Conv3x3, ConvBlock

REDUCTION = 16
"""Channels of a squeeze and excitation block to those of its bottleneck, as in Hu et al., CVPR 2018."""


class FusionSE(nn.Module):
    """Feature fusion squeeze and excitation: weighs channels by their means, then fuses them by a 1x1 convolution."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.squeeze = nn.Linear(inputs, inputs // REDUCTION)
        self.excite = nn.Linear(inputs // REDUCTION, inputs)
        self.fuse = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        weights = torch.sigmoid(self.excite(F.relu(self.squeeze(x.mean(dim=(2, 3))))))
        return F.relu(self.fuse(x * weights[:, :, None, None]))


def _joined(inputs: int, outputs: int, first: bool) -> nn.Module:
    """A node inside the triangle; from the second on, a 1x1 convolution reduces its channels first."""
    if first:
        return ConvBlock(inputs, outputs)
    return nn.Sequential(nn.Conv2d(inputs, 2 * outputs, 1), ConvBlock(2 * outputs, outputs))


class HRDepthDecoder(nn.Module):
    """Encoder features -> sigmoid maps at the chosen scales.

    Args:
        channels: of the encoder's features at 1/2, 1/4, 1/8, 1/16 and 1/32, 0 where it has none.
        scales: output scales in 0..3, 0 is full resolution.
        outputs: channels of each output.
    """

    def __init__(self, channels: Sequence[int], scales: Sequence[int], outputs: int = 1) -> None:
        super().__init__()
        self.scales, self.present = list(scales), [row for row, count in enumerate(channels) if count]
        self.deepest = self.present[-1]
        self.up, self.nodes, self.heads = nn.ModuleDict(), nn.ModuleDict(), nn.ModuleDict()
        for row in range(self.deepest):
            width, joined = WIDTHS[row + 1], channels[row]
            # Node (i, j) begins with encoder feature i + j.
            columns = [level - row for level in self.present if level > row]
            for column in columns:
                self.up[f"{row}{column}"] = ConvBlock(channels[row + 1] if column == 1 else WIDTHS[row + 2], width)
                joined += width
                last = column == columns[-1]
                node = FusionSE(joined, width) if last else _joined(joined, width, column == columns[0])
                self.nodes[f"{row}{column}"] = node
        self.last = nn.ModuleList([ConvBlock(WIDTHS[1], WIDTHS[0]), ConvBlock(WIDTHS[0], WIDTHS[0])])
        for scale in self.scales:
            self.heads[str(scale)] = Conv3x3(WIDTHS[scale], outputs, full=True)

    def forward(self, features: Sequence[Tensor]) -> dict[int, Tensor]:
        """The encoder's features -> scale s -> (B, outputs, H / 2^s, W / 2^s) in (0, 1)."""
        rows: list[list[Tensor]] = [[] for _ in range(self.deepest + 1)]
        for row, feature in zip(self.present, features, strict=True):
            rows[row].append(feature)
        for column in range(1, self.deepest + 1):
            for row in [level - column for level in self.present if level >= column]:
                name = f"{row}{column}"
                # The row below has no node of this column yet.
                upsampled = _upsampled(self.up[name](rows[row + 1][-1]))
                rows[row].append(self.nodes[name](torch.cat([*rows[row], upsampled], dim=1)))
        first, second = self.last
        tops = [second(_upsampled(first(rows[0][-1]))), *(nodes[-1] for nodes in rows)]
        return {scale: torch.sigmoid(self.heads[str(scale)](tops[scale])) for scale in self.scales}


def _upsampled(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2.0, mode="nearest")
