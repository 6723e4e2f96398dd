"""ResNet encoders (He et al., CVPR 2016) with torchvision's parameter names, for one or several stacked images."""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

CLASSES = 1000
WIDTH = 64
"""Channels after the first convolution; each stage after the first has twice as many as the one before."""


class BatchNorm(nn.BatchNorm2d):
    """Batch normalisation that does not count its batches.

    PyTorch's counts them in `num_batches_tracked`, which official files hold and nothing reads at a fixed momentum. On
    a GPU that is a kernel a layer: 40 launches a step (bench/RESULTS.md).
    """

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(
            x,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            self.training,
            self.momentum,  # type: ignore[arg-type]  # never None here
            self.eps,
        )


class _Basic(nn.Module):
    """Two 3x3 convolutions; ResNet-18 and -34."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
        self.bn1 = BatchNorm(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = BatchNorm(width)
        self.downsample = _shortcut(inputs, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = self.bn2(self.conv2(y))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)), inplace=True)


class _Bottleneck(nn.Module):
    """1x1, 3x3 (which carries the stride, as torchvision's do), 1x1; ResNet-50 and deeper."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = width * self.expansion
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = BatchNorm(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = BatchNorm(width)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.bn3 = BatchNorm(outputs)
        self.downsample = _shortcut(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = F.relu(self.bn2(self.conv2(y)), inplace=True)
        y = self.bn3(self.conv3(y))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)), inplace=True)


def _shortcut(inputs: int, outputs: int, stride: int) -> nn.Sequential | None:
    if stride == 1 and inputs == outputs:
        return None
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), BatchNorm(outputs))


class Architecture(NamedTuple):
    """Block kind and number of blocks of the four stages."""

    block: type[_Basic] | type[_Bottleneck]
    blocks: tuple[int, int, int, int]


ARCHITECTURES = {
    "resnet18": Architecture(_Basic, (2, 2, 2, 2)),
    "resnet34": Architecture(_Basic, (3, 4, 6, 3)),
    "resnet50": Architecture(_Bottleneck, (3, 4, 6, 3)),
    "resnet101": Architecture(_Bottleneck, (3, 4, 23, 3)),
    "resnet152": Architecture(_Bottleneck, (3, 8, 36, 3)),
}


class ResNet(nn.Module):
    """The network itself, under torchvision's names.

    The classifier `fc` is never run. It is kept, frozen, because published files hold it: what is loaded
    can be written back whole, and a frozen parameter costs the optimiser and DDP nothing.
    """

    def __init__(self, name: str, images: int) -> None:
        super().__init__()
        block, blocks = ARCHITECTURES[name]
        self.conv1 = nn.Conv2d(3 * images, WIDTH, 7, 2, 3, bias=False)
        self.bn1 = BatchNorm(WIDTH)
        self.channels = [WIDTH]
        for index, count in enumerate(blocks):
            width, inputs = WIDTH * 2**index, self.channels[-1]
            outputs = width * block.expansion
            stride = 1 if index == 0 else 2
            stage = [block(inputs, width, stride), *(block(outputs, width, 1) for _ in range(count - 1))]
            self.add_module(f"layer{index + 1}", nn.Sequential(*stage))
            self.channels.append(outputs)
        self.fc = nn.Linear(self.channels[-1], CLASSES).requires_grad_(False)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> list[Tensor]:
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        features = [x]
        x = F.max_pool2d(x, 3, 2, 1)
        for index in range(1, 5):
            x = self.get_submodule(f"layer{index}")(x)
            features.append(x)
        return features


class ResNetEncoder(nn.Module):
    """Feature pyramid of one or several images.

    Args:
        name: `resnet18`, `resnet34`, `resnet50`, `resnet101` or `resnet152`.
        images: how many RGB images are stacked along the channels (2 or more in the pose encoder).
    """

    def __init__(self, name: str, images: int = 1) -> None:
        super().__init__()
        self.name = name
        self.encoder = ResNet(name, images)
        self.channels = self.encoder.channels

    def forward(self, x: Tensor) -> list[Tensor]:
        """(B, 3 * images, H, W) in [0, 1] -> five features, at 1/2, 1/4, 1/8, 1/16 and 1/32 of the size."""
        features: list[Tensor] = self.encoder((x - 0.45) / 0.225)
        return features
