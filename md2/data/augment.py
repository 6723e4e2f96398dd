"""Augmentation in torch, on the batch's device: windows, left-right flips and colour jitter, drawn by the pipeline.

Colour jitter has the meaning of torchvision's `ColorJitter` (Monodepth2, section 4 "data augmentation"):
brightness multiplies, contrast blends with the image's mean grey, saturation with each pixel's grey, hue
turns the colour circle. Hue is a rotation in YIQ, as in DALI's `color_twist`, where torchvision turns
HSV's hexagon. With it all four are one affine map of RGB, and they commute: the grey weights are YIQ's
Y, which neither saturation nor hue changes, so the order that torchvision draws at random makes no
difference. One clamp to [0, 1] comes at the end, where torchvision clamps after each step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from math import ceil

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from md2.data.cpu import host_memory, over_images

BRIGHTNESS = CONTRAST = SATURATION = 0.2
"""Factors are drawn from 1 ± this."""
HUE = 0.1
"""Hue turns by ± this, as a fraction of the colour circle."""
JITTER_PROBABILITY = FLIP_PROBABILITY = 0.5

GREY = (0.299, 0.587, 0.114)
"""ITU-R BT.601 luma, Pillow's grey."""
_PIXELS = 4
_STRIP_BYTES = 384 << 10
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


@dataclass(frozen=True)
class Jitter:
    """One draw of colour jitter for a batch, to be applied to each of its frames.

    Attributes:
        chosen: (n,) int64, which samples of the batch are jittered.
        blocks: (n, 12, 12), transposed `jitter_matrices` in blocks for 4 pixels: the product of all pixels with a 3x3
            matrix is too thin for any BLAS.
        pivots: (n, 12), what the means over every fourth pixel are multiplied with and added, for contrast: the grey
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

    def by_place(self) -> dict[int, tuple[Tensor, Tensor]]:
        """Block and pivot of each chosen sample, by its place in the batch. Waits for a GPU if they are on one."""
        return dict(zip(self.chosen.tolist(), zip(self.blocks, self.pivots, strict=True), strict=True))

    def __call__(self, images: Tensor) -> Tensor:
        """A jittered copy of (B, 3, H, W) float32 images in [0, 1]; H * W is a multiple of 4. None may be chosen.

        All chosen images at once, and nothing that the host would have to wait for.

        Returns:
            The same shape, in [0, 1], channels_last in memory; what is not chosen is equal bit for bit.
        """
        rgb = images.permute(0, 2, 3, 1).contiguous()
        groups = rgb.shape[1] * rgb.shape[2] // _PIXELS
        flat = rgb.index_select(0, self.chosen).view(len(self.chosen), groups, 3 * _PIXELS)
        offsets = (flat.mean(1) * self.pivots).sum(1).view(-1, 1, 1)
        turned = torch.baddbmm(offsets, flat, self.blocks).clamp_(0, 1)
        out = rgb.clone().index_copy_(0, self.chosen, turned.view(len(self.chosen), *rgb.shape[1:]))
        return out.permute(0, 3, 1, 2)


@dataclass(frozen=True)
class Windows:
    """Windows of a batch's images, and the size that they are resized to.

    Attributes:
        places: (B, 4) on the host, as `crop_windows` makes them.
        size: width and height.
    """

    places: Tensor
    size: tuple[int, int]

    def cut(self, pixels: Tensor, place: int) -> Tensor:
        """One window of (B, H, W, 3) uint8, resized by antialiased bicubic interpolation (Pillow's BICUBIC)."""
        left, top, width, height = self.places[place].tolist()
        # Sliced, not indexed: the stride of the batch's axis says channels_last, which torch resizes at twice the rate.
        window = pixels[place : place + 1, top : top + height, left : left + width].permute(0, 3, 1, 2)
        # CUDA resizes no bytes.
        window = window.float() if window.is_cuda else window
        resized = F.interpolate(window, self.size[::-1], mode="bicubic", antialias=True)
        resized = resized.round_().clamp_(0, 255).byte() if window.is_cuda else resized
        return resized[0].permute(1, 2, 0)


def float_images(
    pixels: Tensor,
    flipped: Tensor | None,
    jitter: Jitter | None,
    windows: Windows | None = None,
    *,
    decoding: bool = True,
) -> tuple[Tensor, Tensor]:
    """Images as the loss takes them, and as the networks do.

    Args:
        pixels: (B, H, W, 3) uint8; with `windows` padded at the right and the bottom if they differ in size.
        flipped: (B,) bool, which to mirror; None: nothing.
        jitter: of colours; None: no jitter. All on the same device.
        windows: what of them to show; None: whole images.
        decoding: other threads of the host decode images meanwhile, so that its cores are busy.

    Returns:
        Two of (B, 3, H, W) float32 in [0, 1], channels_last in memory; the same tensor where there is no jitter.
    """
    if pixels.device.type == "cpu":
        return _one_by_one(pixels, flipped, jitter, windows, decoding)
    if windows is not None:
        pixels = torch.stack([windows.cut(pixels, place) for place in range(len(pixels))])
    if flipped is not None:
        pixels = torch.where(flipped.view(-1, 1, 1, 1), pixels.flip(2), pixels)
    images = pixels.permute(0, 3, 1, 2).float().div_(255)
    return images, images if jitter is None else jitter(images)


def _one_by_one(
    pixels: Tensor, flipped: Tensor | None, jitter: Jitter | None, windows: Windows | None, decoding: bool
) -> tuple[Tensor, Tensor]:
    """`float_images` on the host, where memory is what takes time: an image stays in the cache until it is done."""
    height, width = pixels.shape[1:3] if windows is None else windows.size[::-1]
    plain = host_memory.take((len(pixels), height, width, 3))
    batch = plain.permute(0, 3, 1, 2)
    mirrored = [False] * len(pixels) if flipped is None else flipped.tolist()
    source = pixels.unbind().__getitem__ if windows is None else partial(windows.cut, pixels)
    targets = plain.unbind()
    if jitter is None:

        def convert(mine: slice) -> None:
            for place in range(len(pixels))[mine]:
                _convert(source(place), mirrored[place], targets[place])

        if decoding and windows is None:
            # Not on several threads: it is so little work that they would only take memory's bandwidth from DALI's.
            convert(slice(len(pixels)))
        else:
            over_images(convert, plain)
        return batch, batch
    jittered = host_memory.take(tuple(plain.shape))
    drawn = jitter.by_place()
    count = ceil(plain.nbytes / len(plain) / _STRIP_BYTES)
    # In strips of rows: one of floats and its copy fit a core's own cache.
    rows, targets_in_strips, copies = (list(_strips(part, count)) for part in (pixels, plain, jittered))
    flat = plain.view(len(plain), -1, 3 * _PIXELS)
    to_turn = list(zip(flat.unbind(), _strips(flat, count), _strips(jittered.view(flat.shape), count), strict=True))

    def fill(mine: slice) -> None:
        for place in range(len(pixels))[mine]:
            if place in drawn:
                _convert(source(place), mirrored[place], targets[place])
                _turn_colours(*to_turn[place], *drawn[place])
                continue
            strips = rows[place] if windows is None else source(place).chunk(count)
            for strip, target, copy in zip(strips, targets_in_strips[place], copies[place], strict=True):
                copy.copy_(_convert(strip, mirrored[place], target))

    over_images(fill, plain)
    return batch, jittered.permute(0, 3, 1, 2)


def _convert(source: Tensor, mirror: bool, target: Tensor) -> Tensor:
    return target.copy_(source.flip(1) if mirror else source).div_(255)


def _turn_colours(
    image: Tensor, strips: tuple[Tensor, ...], out: tuple[Tensor, ...], block: Tensor, pivot: Tensor
) -> None:
    """`Jitter` of one image, (pixels / 4, 12) and the same in strips, into the strips of another."""
    offset = torch.dot(image.mean(0), pivot)
    for strip, turned in zip(strips, out, strict=True):
        # Not addmm, which fills the target with the offset first.
        torch.mm(strip, block, out=turned).add_(offset).clamp_(0, 1)


def _strips(images: Tensor, count: int) -> Iterable[tuple[Tensor, ...]]:
    """Each image of (B, rows, ...) cut into strips of its rows."""
    return zip(*(strip.unbind() for strip in images.chunk(count, 1)), strict=True)


def crop_windows(
    draws: npt.NDArray[np.float64], sizes: npt.NDArray[np.int64], scale: tuple[float, float]
) -> npt.NDArray[np.int64]:
    """The windows that draws choose, in whole pixels of the stored images.

    Args:
        draws: (n, 3) from [0, 1): of the window's share of both sides, and of its place from left and top.
        sizes: (n, 2) width and height of the stored images.
        scale: the least and the largest share.

    Returns:
        (n, 4) left, top, width, height.
    """
    share = scale[0] + draws[:, :1] * (scale[1] - scale[0])
    extents = np.maximum(np.rint(share * sizes), 1).astype(np.int64)
    corners = (draws[:, 1:] * (sizes - extents + 1)).astype(np.int64)
    return np.concatenate([corners, extents], axis=1)


def camera_matrices(
    calibrated: Tensor,
    stored: Tensor,
    size: tuple[int, int],
    flipped: Tensor | None,
    *,
    nominal: bool,
    windows: Tensor | None = None,
) -> Tensor:
    """Camera matrices of the batch's images: scaled to their size, mirrored where they are, moved with their windows.

    Pixel centres are at integers, so cx' = (cx + 0.5) w'/w - 0.5 for a resize, cx' = w' - 1 - cx for a flip, and
    cx' = (cx + 0.5 - x) / s - 0.5 for a window from x with the share s of the width. The nominal camera is what the
    published numbers were trained with: the same for every image and not mirrored (its cx lies half a pixel beside the
    image's centre).

    Args:
        calibrated: (B, 4) float32: fx, fy, cx, cy in pixels of the stored images.
        stored: (B, 2) width and height of the stored images.
        size: width and height of the batch's images.
        flipped: (B,) bool, or None where nothing is.
        nominal: fx = 0.58 w, fy = 1.92 h, cx = 0.5 w, cy = 0.5 h instead, of the whole image.
        windows: (B, 4) float64 left, top, width and height as shares of the image, after a flip. None: all of it.

    Returns:
        (B, 3, 3) float32.
    """
    width, height = size
    if nominal:
        shares = torch.tensor([[0.58, 1.92], [0.5, 0.5]], dtype=torch.float64)
        focal, centre = (shares * torch.tensor(size)).unsqueeze(1).expand(2, len(calibrated), 2)
    else:
        scale = torch.tensor([width, height], dtype=torch.float64) / stored
        focal = calibrated[:, :2] * scale
        centre = (calibrated[:, 2:].double() + 0.5) * scale - 0.5
        if flipped is not None:
            centre[:, 0] = torch.where(flipped, width - 1 - centre[:, 0], centre[:, 0])
    if windows is not None:
        corner, share = windows.chunk(2, dim=1)
        focal = focal / share
        centre = (centre + 0.5 - corner * torch.tensor(size)) / share - 0.5
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
    transforms = torch.eye(3, 4).repeat(len(translation), 1, 1)
    transforms[:, 0, 3] = translation
    return rigid_transforms(transforms, flipped, metres_per_unit)


def rigid_transforms(transforms: Tensor, flipped: Tensor | None, metres_per_unit: float) -> Tensor:
    """Motions as they are in the batch's unit, and between mirrored images.

    Mirroring turns the x axis, so a motion T becomes M T M with M = diag(-1, 1, 1).

    Args:
        transforms: (B, ..., 3, 4) float32, metres.
        flipped: (B,) bool, or None where nothing is.
        metres_per_unit: metres in one unit of the result.

    Returns:
        (B, ..., 4, 4) float32.
    """
    scaled = torch.cat([transforms[..., :3], transforms[..., 3:] / metres_per_unit], dim=-1)
    if flipped is not None:
        mirror = torch.ones(3, 4)
        mirror[0, 1:] = mirror[1:, 0] = -1
        scaled = torch.where(flipped.view(-1, *[1] * (scaled.dim() - 1)), scaled * mirror, scaled)
    last = torch.tensor([0.0, 0, 0, 1]).expand(*scaled.shape[:-2], 1, 4)
    return torch.cat([scaled, last], dim=-2)
