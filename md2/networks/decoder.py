"""The depth decoder (ICCV 2019 paper, supplementary table 5); the predictive mask has one of its own."""

from __future__ import annotations

from collections.abc import Sequence
from math import log
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTHS = (16, 32, 64, 128, 256)
"""Channels of the five stages, the one at full resolution first."""


def reflect(x: Tensor) -> Tensor:
    """Pad (B, C, H, W) by one pixel, reflected at the border."""
    if x.device.type != "cuda" or torch.compiler.is_compiling():
        return F.pad(x, (1, 1, 1, 1), mode="reflect")
    return Reflect.apply(x)  # type: ignore[no-any-return, no-untyped-call]


class Reflect(torch.autograd.Function):
    """`reflect` that keeps channels_last and sums gradients in a fixed order.

    CUDA's own always returns contiguous memory, which the convolution converts back, and adds gradients with atomics.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        ctx.layout = torch.channels_last if x.is_contiguous(memory_format=torch.channels_last) else None
        layout = ctx.layout or torch.contiguous_format
        out = torch.empty(batch, channels, height + 2, width + 2, dtype=x.dtype, device=x.device, memory_format=layout)
        out[:, :, 1:-1, 1:-1] = x
        out[:, :, 0, 1:-1], out[:, :, -1, 1:-1] = x[:, :, 1], x[:, :, -2]
        out[..., 0], out[..., -1] = out[..., 2], out[..., -3]
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        inner = grad[:, :, 1:-1, 1:-1].clone(memory_format=ctx.layout or torch.contiguous_format)
        inner[:, :, 1] += grad[:, :, 0, 1:-1]
        inner[:, :, -2] += grad[:, :, -1, 1:-1]
        for edge, beside in ((0, 1), (-1, -2)):
            column = grad[:, :, 1:-1, edge].clone()
            column[:, :, 1] += grad[:, :, 0, edge]
            column[:, :, -2] += grad[:, :, -1, edge]
            inner[..., beside] += column
        return inner


def full_precision(layer: nn.Module, x: Tensor) -> Tensor:
    """`layer(x)` in float32 whatever autocast says, or in the precision of `x` if that is higher.

    For the last layers. A disparity in bfloat16, or a logit whose sigmoid becomes one, has so few values that depth
    moves in steps of 2 to 3% (26 values between 5 and 10 m, with depths of 0.1 to 100): the warp would see a
    staircase, and smoothness flat steps.
    """
    with torch.autocast(x.device.type, enabled=False):
        y: Tensor = layer(x.float() if x.dtype.itemsize < 4 else x)
    return y


class Conv3x3(nn.Module):
    """3x3 convolution after reflection padding; `full`: in float32, whatever autocast says."""

    def __init__(self, inputs: int, outputs: int, full: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3)
        self.full = full

    def begin(self, output: float) -> None:
        """Set the bias so that the sigmoids of what this gives begin near `output`."""
        assert self.conv.bias is not None
        nn.init.constant_(self.conv.bias, log(output / (1 - output)))

    def forward(self, x: Tensor) -> Tensor:
        # Padded before it is widened: half the bytes to move.
        x = reflect(x)
        y: Tensor = full_precision(self.conv, x) if self.full else self.conv(x)
        return y


class ConvBlock(nn.Module):
    """3x3 convolution and ELU."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = Conv3x3(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return F.elu(self.conv(x), inplace=True)


class DepthDecoder(nn.Module):
    """Encoder features -> sigmoid maps at the chosen scales.

    Args:
        channels: of the encoder's features at 1/2, 1/4, 1/8, 1/16 and 1/32, 0 where it has none.
        scales: output scales in 0..3, 0 is full resolution. The heads are numbered in this order.
        outputs: channels of each output; 1 for disparity, one per source for the predictive mask.
    """

    def __init__(self, channels: Sequence[int], scales: Sequence[int], outputs: int = 1) -> None:
        super().__init__()
        self.scales = list(scales)
        self.lowest, self.present = min(scales), [level for level, count in enumerate(channels) if count]
        self.deepest = self.present[-1]
        # Stages below the deepest feature are empty, so that the others keep their official numbers.
        blocks: list[nn.Module] = [nn.Identity() for _ in range(2 * (4 - self.deepest))]
        inputs = channels[self.deepest]
        for stage in reversed(range(self.deepest + 1)):
            skip = channels[stage - 1] if stage > 0 else 0
            pair = [ConvBlock(inputs, WIDTHS[stage]), ConvBlock(WIDTHS[stage] + skip, WIDTHS[stage])]
            if stage < self.lowest:
                # Unused, but official files have their names; frozen, so that DDP expects no gradient.
                pair = [block.requires_grad_(False) for block in pair]
            blocks += pair
            inputs = WIDTHS[stage]
        heads = [Conv3x3(WIDTHS[scale], outputs, full=True) for scale in self.scales]
        self.decoder = nn.ModuleList([*blocks, *heads])

    def forward(self, features: Sequence[Tensor]) -> dict[int, Tensor]:
        """The encoder's features -> scale s -> (B, outputs, H / 2^s, W / 2^s) in (0, 1)."""
        maps = {}
        levels = dict(zip(self.present, features, strict=True))
        x = features[-1]
        for stage in range(self.deepest, self.lowest - 1, -1):
            first = 2 * (4 - stage)
            x = F.interpolate(self.decoder[first](x), scale_factor=2.0, mode="nearest")
            if stage - 1 in levels:
                x = torch.cat([x, levels[stage - 1]], dim=1)
            x = self.decoder[first + 1](x)
            if stage in self.scales:
                maps[stage] = torch.sigmoid(self.decoder[10 + self.scales.index(stage)](x))
        return {scale: maps[scale] for scale in self.scales}
