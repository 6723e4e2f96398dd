"""Intrinsics that are learned with depth and motion, for recordings without a calibration.

Gordon et al., "Depth from Videos in the Wild: Unsupervised Monocular Depth Learning from Unknown Cameras", ICCV 2019.
There a network predicts the intrinsics of each pair of frames. Here one camera recorded everything, so that four
numbers are enough, and every sample of the training says something about them.
"""

from __future__ import annotations

from math import radians, tan

import torch
from torch import Tensor, nn

GAINS = (20.0, 1.0, 0.3, 0.3)
"""Of the logarithms of fx and of fy / fx, and of the centre. Adam moves each parameter by about the learning rate a
step. With these, 1e-4 moves fx by up to 0.2 % a step, fy / fx by 0.01 % and the centre by 0.003 % of the image's size.
Pixels are nearly square and the centre is near the middle, and noise in those would move fx as well."""


class LearnedCamera(nn.Module):
    """One camera for all samples: focal lengths and principal point as shares of the image's size.

    It begins as a camera of square pixels that looks through the image's centre. The second parameter is the
    logarithm of fy / fx: only roll and pitch tell it, so fy follows fx where nothing does.

    Args:
        width, height: of the networks' input, in pixels.
        fov: horizontal field of view of the first guess, in degrees.
    """

    start: Tensor
    moving: Tensor

    def __init__(self, width: int, height: int, fov: float) -> None:
        super().__init__()
        focal = 0.5 / tan(radians(fov) / 2)
        self.register_buffer("start", torch.tensor([focal, focal * width / height, 0.5, 0.5]))
        self.register_buffer("moving", torch.ones(()), persistent=False)
        self.offsets = nn.Parameter(torch.zeros(4))

    def forward(self) -> Tensor:
        """(4,): fx / W, fy / H, (cx + 0.5) / W, (cy + 0.5) / H."""
        offsets = self.offsets.detach() + self.moving * (self.offsets - self.offsets.detach())
        fx, ratio, cx, cy = (gain * offset for gain, offset in zip(GAINS, offsets.unbind(), strict=True))
        focal = self.start[:2] * torch.exp(torch.stack([fx, fx + ratio]))
        return torch.cat([focal, self.start[2:] + torch.stack([cx, cy])])

    def hold(self, held: bool) -> None:
        """Keep the camera as it is while `held`: its gradient is 0, which every rank computes all the same."""
        self.moving.fill_(0.0 if held else 1.0)


def matrices(
    camera: Tensor, size: tuple[int, int], flipped: Tensor | None, count: int, windows: Tensor | None = None
) -> Tensor:
    """Camera matrices of a batch, differentiable in the camera.

    Args:
        camera: (4,), as `LearnedCamera` gives it.
        size: height and width of the images.
        flipped: (B,) bool, which images are mirrored: their cx is W - 1 - cx. None: none.
        count: B.
        windows: (B, 4) left, top, width and height of what the images show, as shares of the whole. None: all of it.

    Returns:
        (B, 3, 3) in pixels, pixel centres at integers.
    """
    height, width = size
    fx, fy, cx, cy = camera.expand(count, 4).unbind(1)
    if flipped is not None:
        cx = torch.where(flipped, 1 - cx, cx)
    if windows is not None:
        left, top, across, down = windows.unbind(1)
        fx, fy, cx, cy = fx / across, fy / down, (cx - left) / across, (cy - top) / down
    zero = torch.zeros_like(fx)
    rows = [fx * width, zero, cx * width - 0.5, zero, fy * height, cy * height - 0.5, zero, zero, zero + 1]
    return torch.stack(rows, dim=1).view(count, 3, 3)


def figures(camera: Tensor | None, size: tuple[int, int]) -> dict[str, float]:
    """The learned camera in pixels of images of this height and width, by the names in a run's metrics; {} of None."""
    if camera is None:
        return {}
    return dict(zip(("camera/fx", "camera/fy", "camera/cx", "camera/cy"), in_pixels(camera, size), strict=True))


def in_pixels(camera: Tensor, size: tuple[int, int]) -> tuple[float, float, float, float]:
    """fx, fy, cx, cy in pixels of images of this height and width; waits for a GPU."""
    height, width = size
    fx, fy, cx, cy = camera.tolist()
    return fx * width, fy * height, cx * width - 0.5, cy * height - 0.5
