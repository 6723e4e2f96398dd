"""Augmentation in torch, on the batch's device: left-right flips and colour jitter, drawn by the pipeline.

Colour jitter has the meaning of torchvision's `ColorJitter` (Monodepth2, section 4 "data augmentation"):
brightness multiplies, contrast blends with the image's mean grey, saturation with each pixel's grey, hue
turns the colour circle. Hue is a rotation in YIQ, as in DALI's `color_twist`, where torchvision turns
HSV's hexagon. With it all four are one affine map of RGB, and they commute: the grey weights are YIQ's
Y, which neither saturation nor hue changes, so the order that torchvision draws at random makes no
difference. One clamp to [0, 1] comes at the end, where torchvision clamps after each step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

BRIGHTNESS = CONTRAST = SATURATION = 0.2
"""Factors are drawn from 1 ± this."""
HUE = 0.1
"""Hue turns by ± this, as a fraction of the colour circle."""
JITTER_PROBABILITY = FLIP_PROBABILITY = 0.5

GREY = (0.299, 0.587, 0.114)
"""ITU-R BT.601 luma, Pillow's grey."""
_YIQ = (GREY, (0.595716, -0.274453, -0.321263), (0.211456, -0.522591, 0.311135))


def jitter_matrices(factors: Tensor) -> Tensor:
    """The linear part of colour jitter.

    Args:
        factors: (n, 4): brightness, contrast, saturation (1 = unchanged), hue (fraction of the colour circle,
            0 = unchanged).

    Returns:
        (n, 3, 3) float32 A, so that jittered = A @ rgb + `jitter_offsets`.
    """
    brightness, contrast, saturation, hue = factors.double().unbind(1)
    to_yiq = torch.tensor(_YIQ, dtype=torch.float64, device=factors.device)
    turn = torch.zeros(len(factors), 3, 3, dtype=torch.float64, device=factors.device)
    cos, sin = saturation * torch.cos(2 * torch.pi * hue), saturation * torch.sin(2 * torch.pi * hue)
    turn[:, 0, 0] = 1
    turn[:, 1, 1], turn[:, 1, 2] = cos, sin
    turn[:, 2, 1], turn[:, 2, 2] = -sin, cos
    linear = torch.linalg.inv(to_yiq) @ turn @ to_yiq
    matrices: Tensor = (brightness * contrast).view(-1, 1, 1) * linear
    return matrices.float()


def jitter_offsets(factors: Tensor, means: Tensor) -> Tensor:
    """The constant part of colour jitter: contrast pivots at the mean grey of the (brightened) image.

    Args:
        factors: (n, 4) as for `jitter_matrices`.
        means: (n, 3) mean RGB of each image.

    Returns:
        (n, 3, 1) float32, the same for all three channels.
    """
    grey = means.double() @ torch.tensor(GREY, dtype=torch.float64, device=means.device)
    return (factors[:, 0] * (1 - factors[:, 1]) * grey).float().view(-1, 1, 1).expand(-1, 3, 1)


def jittered(images: Tensor, chosen: Tensor, factors: Tensor) -> Tensor:
    """A copy of the images with colour jitter on the chosen ones.

    Args:
        images: (B, 3, H, W) float32 in [0, 1].
        chosen: (n,) int64 indices into the batch, on its device.
        factors: (n, 4), of the chosen samples; on the batch's device.

    Returns:
        (B, 3, H, W) float32 in [0, 1], in the memory format of `images`; what is not chosen is equal bit for bit.
    """
    out = images.clone()
    if len(chosen) == 0:
        return out
    # Planar: a 3x3 matrix times (3, H * W) is several times faster than (H * W, 3) times a 3x3 matrix on a CPU.
    rgb = images.index_select(0, chosen).reshape(len(chosen), 3, -1).contiguous()
    offsets = jitter_offsets(factors, rgb.mean(2))
    turned = torch.baddbmm(offsets, jitter_matrices(factors), rgb).clamp_(0, 1)
    return out.index_copy_(0, chosen, turned.view(len(chosen), *images.shape[1:]))


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


def sample_keys(sources: Sequence[bytes]) -> list[str]:
    """Keys out of DALI's `source_info`, `<tar>:<offset>:<key>.<component>`."""
    return [source.rpartition(b":")[2].partition(b".")[0].decode() for source in sources]
