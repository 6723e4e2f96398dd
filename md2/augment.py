"""Augmentation in torch, on the batch's device: left-right flips and colour jitter, drawn by the pipeline.

Colour jitter has the meaning of torchvision's `ColorJitter` (Monodepth2, section 4 "data augmentation"):
brightness multiplies, contrast blends with the image's mean grey, saturation with each pixel's grey, hue
turns the colour circle. Hue is a rotation in YIQ, as in DALI's `color_twist`, where torchvision turns
HSV's hexagon. With it all four are one affine map of RGB, and they commute: the grey weights are YIQ's
Y, which neither saturation nor hue changes, so the order that torchvision draws at random makes no
difference. One clamp to [0, 1] comes at the end, where torchvision clamps after each step.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from itertools import repeat

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

BRIGHTNESS = CONTRAST = SATURATION = 0.2
"""Factors are drawn from 1 ± this."""
HUE = 0.1
"""Hue turns by ± this, as a fraction of the colour circle."""
JITTER_PROBABILITY = FLIP_PROBABILITY = 0.5

GREY = (0.299, 0.587, 0.114)
"""ITU-R BT.601 luma, Pillow's grey."""
_PIXELS = 8
_YIQ = np.array([GREY, (0.595716, -0.274453, -0.321263), (0.211456, -0.522591, 0.311135)])
_TO_YIQ, _FROM_YIQ = torch.from_numpy(_YIQ), torch.from_numpy(np.linalg.inv(_YIQ))


def jitter_factors(draws: Tensor) -> Tensor:
    """(n, 4) draws from [-1, 1) -> brightness, contrast, saturation (1 = unchanged), hue (fraction of the circle)."""
    return torch.tensor([1.0, 1, 1, 0]) + draws * torch.tensor([BRIGHTNESS, CONTRAST, SATURATION, HUE])


def jitter_matrices(factors: Tensor) -> Tensor:
    """The linear part of colour jitter.

    Args:
        factors: (n, 4), as `jitter_factors` makes them.

    Returns:
        (n, 3, 3) float32 A, so that jittered = A @ rgb + brightness * (1 - contrast) * (mean grey of the image).
    """
    brightness, contrast, saturation, hue = factors.double().unbind(1)
    cos, sin = saturation * torch.cos(2 * torch.pi * hue), saturation * torch.sin(2 * torch.pi * hue)
    turn = torch.zeros(len(factors), 3, 3, dtype=torch.float64)
    turn[:, 0, 0] = 1
    turn[:, 1, 1], turn[:, 1, 2] = cos, sin
    turn[:, 2, 1], turn[:, 2, 2] = -sin, cos
    matrices: Tensor = (brightness * contrast).view(-1, 1, 1) * (_FROM_YIQ @ turn @ _TO_YIQ)
    return matrices.float()


def float_images(pixels: Tensor, flipped: Tensor | None) -> Tensor:
    """Images as the networks take them.

    Args:
        pixels: (B, H, W, 3) uint8.
        flipped: (B,) bool on the same device, which to mirror; None: nothing.

    Returns:
        (B, 3, H, W) float32 in [0, 1], channels_last in memory.
    """
    if pixels.device.type != "cpu":
        if flipped is not None:
            pixels = torch.where(flipped.view(-1, 1, 1, 1), pixels.flip(2), pixels)
        return pixels.permute(0, 3, 1, 2).float().div_(255)
    out = _host_memory.take(tuple(pixels.shape))
    mirrored = repeat(False) if flipped is None else flipped.tolist()
    # One image at a time stays in the cache from the flip to the division; the whole batch at once takes twice as long.
    for target, source, mirror in zip(out.unbind(), pixels.unbind(), mirrored, strict=False):
        target.copy_(source.flip(1) if mirror else source).div_(255)
    return out.permute(0, 3, 1, 2)


@dataclass(frozen=True)
class Jitter:
    """One draw of colour jitter for a batch, to be applied to each of its frames.

    Attributes:
        chosen: (n,) int64, which samples of the batch are jittered.
        blocks: (n, 24, 24), transposed `jitter_matrices` in blocks for 8 pixels: the product of all pixels with a 3x3
            matrix is too thin for any BLAS.
        pivots: (n, 24), what the means over every eighth pixel are multiplied with and added, for contrast: the grey
            weights times how much of the mean grey it leaves, brightened.
    """

    chosen: Tensor
    blocks: Tensor
    pivots: Tensor

    @classmethod
    def of(cls, chosen: Tensor, factors: Tensor) -> Jitter:
        """`factors` (n, 4), as `jitter_factors` makes them, are those of the chosen samples; both on the host."""
        blocks = torch.kron(torch.eye(_PIXELS), jitter_matrices(factors).mT.contiguous())
        grey = torch.tensor(GREY).repeat(_PIXELS) / _PIXELS
        return cls(chosen, blocks, (factors[:, 0] * (1 - factors[:, 1])).unsqueeze(1) * grey)

    def to(self, move: Callable[[Tensor], Tensor]) -> Jitter:
        """The same where `move` puts tensors: it must be on the device of the images."""
        return Jitter(move(self.chosen), move(self.blocks), move(self.pivots))

    def __call__(self, images: Tensor) -> Tensor:
        """A jittered copy of (B, 3, H, W) float32 images in [0, 1]; H * W is a multiple of 8.

        Returns:
            The same shape, in [0, 1], channels_last in memory; what is not chosen is equal bit for bit.
        """
        rgb = images.permute(0, 2, 3, 1).contiguous()
        turned = self._on_cpu(rgb) if images.device.type == "cpu" else self._on_gpu(rgb)
        return turned.permute(0, 3, 1, 2)

    def _on_gpu(self, rgb: Tensor) -> Tensor:
        """All chosen images at once, and nothing that the host would have to wait for. None may be chosen."""
        out = rgb.clone()
        groups = rgb.shape[1] * rgb.shape[2] // _PIXELS
        flat = rgb.index_select(0, self.chosen).view(len(self.chosen), groups, 3 * _PIXELS)
        offsets = (flat.mean(1) * self.pivots).sum(1).view(-1, 1, 1)
        turned = torch.baddbmm(offsets, flat, self.blocks).clamp_(0, 1)
        return out.index_copy_(0, self.chosen, turned.view(len(self.chosen), *rgb.shape[1:]))

    def _on_cpu(self, rgb: Tensor) -> Tensor:
        out = _host_memory.take(tuple(rgb.shape))
        rows = zip(self.chosen.tolist(), self.blocks.unbind(), self.pivots.unbind(), strict=True)
        drawn = {place: (block, pivot) for place, block, pivot in rows}
        for place, (target, source) in enumerate(zip(out.unbind(), rgb.unbind(), strict=True)):
            if place not in drawn:
                target.copy_(source)
                continue
            block, pivot = drawn[place]
            flat = source.view(-1, 3 * _PIXELS)
            offset = torch.dot(flat.mean(0), pivot)
            torch.addmm(offset, flat, block, out=target.view(-1, 3 * _PIXELS)).clamp_(0, 1)
        return out


class _HostMemory:
    """Float buffers of the host that come back when the last tensor on them is gone.

    The kernel clears every page of new memory, which takes about as long as filling it with an image; so memory is
    used again, but never while a tensor, a view or the autograd graph still holds it. What was of another size
    is let go.
    """

    def __init__(self) -> None:
        self._free: dict[tuple[int, ...], list[npt.NDArray[np.float32]]] = {}

    def take(self, shape: tuple[int, ...]) -> Tensor:
        """An uninitialised float32 tensor."""
        if shape not in self._free:
            self._free = {shape: []}
        free = self._free[shape]
        # pop() instead of a look and a pop: buffers may come back, or be taken, on another thread in between.
        try:
            memory = free.pop()
        except IndexError:
            memory = np.empty(shape, np.float32)
        lent = memory.view()
        weakref.finalize(lent, free.append, memory).atexit = False
        return torch.from_numpy(lent)  # holds `lent` as long as anything uses its storage


_host_memory = _HostMemory()


def camera_matrices(
    calibrated: Tensor, stored: Tensor, size: tuple[int, int], flipped: Tensor | None, *, nominal: bool
) -> Tensor:
    """Camera matrices of the batch's images: scaled to their size, mirrored where they are.

    Pixel centres are at integers, so cx' = (cx + 0.5) w'/w - 0.5 for a resize and cx' = w' - 1 - cx for a
    flip. The nominal camera is what the published numbers were trained with: the same for every image and
    not mirrored (its cx lies half a pixel beside the image's centre).

    Args:
        calibrated: (B, 4) float32: fx, fy, cx, cy in pixels of the stored images.
        stored: (B, 2) width and height of the stored images.
        size: width and height of the batch's images.
        flipped: (B,) bool, or None where nothing is.
        nominal: fx = 0.58 w, fy = 1.92 h, cx = 0.5 w, cy = 0.5 h instead.

    Returns:
        (B, 3, 3) float32.
    """
    width, height = size
    if nominal:
        rows = torch.tensor([0.58 * width, 1.92 * height, 0.5 * width, 0.5 * height]).expand(len(calibrated), 4)
    else:
        scale = torch.tensor([width, height], dtype=torch.float64) / stored
        focal = calibrated[:, :2] * scale
        centre = (calibrated[:, 2:].double() + 0.5) * scale - 0.5
        if flipped is not None:
            centre[:, 0] = torch.where(flipped, width - 1 - centre[:, 0], centre[:, 0])
        rows = torch.cat([focal, centre], dim=1).float()
    matrices = torch.zeros(len(calibrated), 3, 3)
    matrices[:, 0, 0], matrices[:, 1, 1], matrices[:, 2, 2] = rows[:, 0], rows[:, 1], 1
    matrices[:, :2, 2] = rows[:, 2:]
    return matrices


def stereo_transforms(translation: Tensor, flipped: Tensor | None, metres_per_unit: float) -> Tensor:
    """Target camera to stereo partner: a shift along x, whose sign turns with the flip.

    Args:
        translation: (B,) float32 metres.
        flipped: (B,) bool, or None where nothing is.
        metres_per_unit: metres in one unit of the result.

    Returns:
        (B, 4, 4) float32.
    """
    shift = translation / metres_per_unit
    if flipped is not None:
        shift = torch.where(flipped, -shift, shift)
    transforms = torch.eye(4).repeat(len(translation), 1, 1)
    transforms[:, 0, 3] = shift
    return transforms
