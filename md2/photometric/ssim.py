"""Photometric error and its gradient: structural similarity (Wang et al., IEEE TIP 2004) and L1.

    pe(a, b) = 0.85 clamp((1 - SSIM(a, b)) / 2, 0, 1) + 0.15 |a - b|

each the mean over the colour channels, SSIM with 3x3 mean windows, reflected at the border (section 3.1 of the
ICCV 2019 paper). This is where training spends its time outside of convolutions, so it is written as few
passes over memory as possible, into buffers that are used again, with the gradient derived by hand.

With sums s over a window instead of means, every moment times 81, and x the target, y the other image:

    SSIM = n1 n2 / (d1 d2)
    n1 = 2 sx sy + 81 C1            n2 = 18 sxy - 2 sx sy + 81 C2
    d1 = sx^2 + sy^2 + 81 C1        d2 = 9 sxx - sx^2 + 9 syy - sy^2 + 81 C2
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

C1 = 0.01**2
C2 = 0.03**2
SSIM_WEIGHT = 0.85


def window_sum(image: Tensor, out: Tensor, scratch: Tensor, adjoint: bool = False) -> Tensor:
    """Sum over the 3x3 window around each pixel of (..., H, W), reflected at the border, into `out`.

    `adjoint` is the transposed map, which carries gradients back. H and W at least 2; all three tensors
    have the same shape and are different.
    """
    _sum_of_three(image, scratch, -2, adjoint)
    return _sum_of_three(scratch, out, -1, adjoint)


def _sum_of_three(x: Tensor, out: Tensor, dim: int, adjoint: bool) -> Tensor:
    inner = x.shape[dim] - 2
    middle = out.narrow(dim, 1, inner)
    torch.add(x.narrow(dim, 0, inner), x.narrow(dim, 2, inner), out=middle)
    middle.add_(x.narrow(dim, 1, inner))
    for end, beside in ((0, 1), (-1, -2)):
        torch.add(x.select(dim, end), x.select(dim, beside), alpha=1 if adjoint else 2, out=out.select(dim, end))
    if adjoint:
        # The reflected neighbour: pixel 1 also stood to the left of pixel 0.
        for end, beside in ((0, 1), (-1, -2)):
            out.select(dim, beside).add_(x.select(dim, end))
    return out


@dataclass(frozen=True)
class Target:
    """The image that others are compared with and its share of SSIM; all (B, 1, 3, H, W)."""

    image: Tensor
    times_18: Tensor
    sum_twice: Tensor
    """2 sx"""
    luminance: Tensor
    """sx^2 + 81 C1"""
    contrast: Tensor
    """9 sxx - sx^2 + 81 C2"""

    @classmethod
    def of(cls, image: Tensor) -> Target:
        """From (B, 3, H, W)."""
        image = image.unsqueeze(1)
        scratch = torch.empty_like(image)
        total = window_sum(image, torch.empty_like(image), scratch)
        squares = window_sum(image * image, torch.empty_like(image), scratch)
        square = total * total
        return cls(image, 18 * image, 2 * total, square + 81 * C1, 9 * squares - square + 81 * C2)

    def samples(self, rows: slice) -> Target:
        """Some samples of the batch."""
        return Target(*(getattr(self, field.name)[rows] for field in fields(self)))


class Photometric:
    """Errors of images (b, n, 3, H, W) against a target (b, 1, 3, H, W), and gradients after that.

    Its buffers are made once, for one shape, and hold the last call's intermediate values.
    """

    def __init__(self, shape: torch.Size, like: Tensor, no_ssim: bool, gradients: bool) -> None:
        self.no_ssim = no_ssim

        def buffer(needed: bool) -> Tensor:
            return torch.empty(shape if needed else (0,), dtype=like.dtype, device=like.device)

        self.gradients = gradients
        self._first, self._second = buffer(True), buffer(True)
        ssim = not no_ssim
        self._sum, self._squares, self._products, self._third = (buffer(ssim) for _ in range(4))
        self._by_sum, self._by_product, self._by_square = (buffer(ssim and gradients) for _ in range(3))

    def error(self, image: Tensor, target: Target) -> Tensor:
        """(b, n, 3, H, W) -> (b, n, H, W)."""
        difference = torch.sub(image, target.image, out=self._first)
        error = difference.abs_().mean(dim=-3)
        if self.no_ssim:
            return error
        similarity = self._ssim(image, target).clamp_(-1, 1).mean(dim=-3)
        # The mean of (1 - SSIM) / 2 is taken in the other order: fewer passes.
        weight = SSIM_WEIGHT / 2
        return error.mul_(1 - SSIM_WEIGHT).add_(similarity, alpha=-weight).add_(weight)

    def _ssim(self, image: Tensor, target: Target) -> Tensor:
        spare = self._first
        total = window_sum(image, self._sum, spare)
        torch.mul(image, image, out=self._second)
        squares = window_sum(self._second, self._squares, spare)
        torch.mul(target.times_18, image, out=self._second)
        n2 = window_sum(self._second, self._products, spare)
        n1 = torch.mul(target.sum_twice, total, out=self._second)
        n2.sub_(n1).add_(81 * C2)
        n1.add_(81 * C1)
        square = torch.mul(total, total, out=self._third)
        d1 = torch.add(square, target.luminance, out=spare)
        d2 = squares.mul_(9).add_(target.contrast).sub_(square)
        if not self.gradients:
            return torch.mul(n1, n2, out=square).div_(d1.mul_(d2))
        return self._ssim_and_derivatives(target, total, n1, n2, d1, d2)

    def _ssim_and_derivatives(
        self, target: Target, total: Tensor, n1: Tensor, n2: Tensor, d1: Tensor, d2: Tensor
    ) -> Tensor:
        """SSIM, and into the buffers its derivatives by the window sums sy, 18 sxy and (times -1/9) syy."""
        inverse = torch.mul(d1, d2, out=self._third).reciprocal_()
        torch.mul(n1, inverse, out=self._by_product)
        ssim = torch.mul(self._by_product, n2, out=self._by_square)
        # 2 sx (n2 - n1) - 2 sy SSIM (d2 - d1), over d1 d2.
        slope = torch.sub(n2, n1, out=self._by_sum).mul_(target.sum_twice)
        other = torch.sub(d2, d1, out=d1).mul_(ssim).mul_(total)
        slope.sub_(other, alpha=2).mul_(inverse)
        result = n1.copy_(ssim)
        ssim.div_(d2)
        return result

    def gradient(self, image: Tensor, target: Target, weights: Tensor) -> Tensor:
        """Gradient by the last image of the sum of weights (b, n, H, W) times error. Overwritten by the next call.

        SSIM's clamp has no part in it: |SSIM| <= 1, so the clamp only trims rounding.
        """
        sign = torch.sub(image, target.image, out=self._first).sgn_()
        weights = weights.unsqueeze(-3)
        if self.no_ssim:
            return sign.mul_(weights / 3)
        gradient = sign.mul_(weights * ((1 - SSIM_WEIGHT) / 3))
        weights = weights * (-SSIM_WEIGHT / 6)
        spare, summed = self._second, self._third
        gradient.add_(window_sum(self._by_sum.mul_(weights), summed, spare, adjoint=True))
        gradient.addcmul_(target.times_18, window_sum(self._by_product.mul_(weights), summed, spare, adjoint=True))
        return gradient.addcmul_(
            image, window_sum(self._by_square.mul_(weights), summed, spare, adjoint=True), value=-18
        )


def photometric_error(images: Tensor, target: Target, no_ssim: bool = False) -> Tensor:
    """Errors (B, N, H, W) of images (B, N, 3, H, W), without gradients."""
    batch, sources = images.shape[:2]
    samples, group = piece_size(images)
    worker = Photometric(images[:samples, :group].shape, images, no_ssim, gradients=False)
    errors = images.new_empty(batch, sources, *images.shape[3:])
    for sample in range(0, batch, samples):
        rows = slice(sample, sample + samples)
        for source in range(0, sources, group):
            columns = slice(source, source + group)
            errors[rows, columns] = worker.error(images[rows, columns], target.samples(rows))
    return errors


def piece_size(images: Tensor) -> tuple[int, int]:
    """How many samples and sources of (B, N, 3, H, W) are worked on at a time.

    On a CPU one image, so that all of its buffers stay in the cache together; elsewhere all of them.
    """
    return (1, 1) if images.device.type == "cpu" else (images.shape[0], images.shape[1])
