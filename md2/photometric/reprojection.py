"""Warping, photometric error and the minimum over sources as one differentiable step.

The mean of a minimum is linear in what it selects, so the gradient is known as soon as the errors are: it is
taken at once, a piece of the batch at a time while the piece is in the cache, and nothing but the gradient
itself waits for the backward pass. Memory does not grow with scales or sources.

The chain, per source, for a target pixel (x, y) with depth d (equation 2 of the ICCV 2019 paper): a point's image
in the source is q d + p with q = K R K^-1 (x, y, 1)^T, affine in the pixel, and p = K t; divided by its third
coordinate (+ 1e-7) it is the place to sample.
"""

from __future__ import annotations

import importlib.util
import warnings
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from md2.geometry import EPSILON, pixel_axes
from md2.photometric.ssim import Photometric, Target, photometric_error, piece_size


class Views(NamedTuple):
    """The images of one resolution: the target, and all sources (B, N, 3, H, W)."""

    target: Target
    sources: Tensor


class PixelMap(NamedTuple):
    """Pixel (x, y) and depth d -> q d + p with q = homography (x, y, 1)^T, p the epipole.

    The first two numbers over the third are the place in the source, in [-1, 1].
    """

    homographies: Tensor
    """(B, N, 3, 3)"""
    epipoles: Tensor
    """(B, N, 3)"""


class Rule(NamedTuple):
    """How errors become the loss; names as in the configuration."""

    no_ssim: bool = False
    average: bool = False


@dataclass(frozen=True)
class Outcome:
    """Attributes:
    loss: scalar, the mean of `error`.
    error: (B, 1, H, W), after the minimum (or the mean) over the sources and the auto-mask.
    automask: (B, 1, H, W) bool, where a warped source won; None without `unwarped`.
    warped: (B, N, 3, H, W) if asked for.
    """

    loss: Tensor
    error: Tensor
    automask: Tensor | None
    warped: Tensor | None


def reproject(
    views: Views,
    depth: Tensor,
    maps: PixelMap,
    rule: Rule,
    *,
    unwarped: Tensor | None = None,
    mask: Tensor | None = None,
    keep_warped: bool = False,
) -> Outcome:
    """Mean photometric error of the sources warped into the target. Differentiable (once) in depth, maps, mask.

    Args:
        views: images.
        depth: (B, 1, H, W) of the target.
        maps: where each target pixel lies in each source, from `pixel_map`.
        rule: options.
        unwarped: (B, 1, H, W), error of the best unwarped source; pixels that it fits better do not count.
        mask: (B, N, H, W), factor on each source's error.
        keep_warped: also return the warped images.
    """
    loss, error, automask, warped = _Reproject.apply(  # type: ignore[no-untyped-call]
        depth, maps.homographies.to(depth), maps.epipoles.to(depth), mask, unwarped, views, rule, keep_warped
    )
    return Outcome(loss, error, automask if unwarped is not None else None, warped if keep_warped else None)


def pixel_map(K: Tensor, transforms: Tensor, size: tuple[int, int]) -> PixelMap:
    """The map of each source for images of a size.

    Computed in float64, since the elements differ by orders of magnitude and every pixel shares their rounding.

    Args:
        K: (B, 3, 3) at this resolution.
        transforms: (B, N, 4, 4), target camera to each source's.
        size: height and width.
    """
    height, width = size
    K = K.double().unsqueeze(1)
    T = transforms.double()
    inverse, _ = torch.linalg.inv_ex(K)

    def to_grid(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        # No matrix of constants: on a GPU making one waits for all that runs there.
        rows = torch.stack([x * (2 / (width - 1)) - z, y * (2 / (height - 1)) - z, z], dim=-2)
        return rows.to(transforms.dtype)

    homographies = to_grid(*(K @ T[..., :3, :3] @ inverse).unbind(-2))
    x, y, z = (K @ T[..., :3, 3:]).unbind(-2)
    return PixelMap(homographies, to_grid(x, y, z + EPSILON).squeeze(-1))


class _Reproject(torch.autograd.Function):
    """Loss and, at the same time, its gradients by depth, homographies, epipoles and mask."""

    @staticmethod
    def forward(
        ctx: Any,
        depth: Tensor,
        homographies: Tensor,
        epipoles: Tensor,
        mask: Tensor | None,
        unwarped: Tensor | None,
        views: Views,
        rule: Rule,
        keep_warped: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        gradients = any(ctx.needs_input_grad)
        run = _Run(views, rule, gradients, keep_warped)
        for first in range(0, depth.shape[0], run.samples):
            piece = slice(first, first + run.samples)
            run.piece(
                piece,
                depth[piece],
                homographies[piece],
                epipoles[piece],
                None if mask is None else mask[piece],
                None if unwarped is None else unwarped[piece],
            )
        error = torch.cat(run.error)
        automask = torch.cat(run.automask) if unwarped is not None else error.new_empty(0, dtype=torch.bool)
        warped = torch.cat(run.warped) if keep_warped else error.new_empty(0)
        ctx.mark_non_differentiable(error, automask, warped)
        ctx.masked = mask is not None
        if gradients:
            ctx.save_for_backward(*(torch.cat(parts) for parts in run.gradients if parts))
        return error.mean(), error, automask, warped

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        by_depth, by_homographies, by_epipoles, *by_mask = (grad * grad_loss for grad in ctx.saved_tensors)
        return by_depth, by_homographies, by_epipoles, by_mask[0] if ctx.masked else None, None, None, None, None


class _Run:
    """One forward pass over the pieces of a batch; collects results and gradients."""

    def __init__(self, views: Views, rule: Rule, gradients: bool, keep_warped: bool) -> None:
        self.views, self.rule = views, rule
        self.wants_gradients, self.keep_warped = gradients, keep_warped
        images = views.sources
        self.pixels = images.shape[0] * images.shape[-2] * images.shape[-1]
        self.samples, _ = piece_size(images)
        self.engine = _engine(images)
        self.spare: list[Photometric] = []
        self.error: list[Tensor] = []
        self.automask: list[Tensor] = []
        self.warped: list[Tensor] = []
        self.gradients: tuple[list[Tensor], ...] = ([], [], [], [])
        """By depth, homographies, epipoles, mask."""

    def piece(
        self,
        samples: slice,
        depth: Tensor,
        homographies: Tensor,
        epipoles: Tensor,
        mask: Tensor | None,
        unwarped: Tensor | None,
    ) -> None:
        """Some samples: b of them, all their sources."""
        target, images = self.views.target.samples(samples), self.views.sources[samples]
        engine = self.engine(target, images, self.rule.no_ssim, self.wants_gradients, self.spare)
        warped = engine.warp(depth, homographies, epipoles)
        weights = self._choose(engine.error(), mask, unwarped)
        if self.keep_warped:
            self.warped.append(warped)
        if self.wants_gradients:
            for collected, gradient in zip(self.gradients, engine.gradient(weights), strict=False):
                collected.append(gradient)

    def _choose(self, errors: Tensor, mask: Tensor | None, unwarped: Tensor | None) -> Tensor:
        """Record the error that counts at each pixel; weights (b, n, H, W) of the sources' errors in the loss."""
        masked = errors if mask is None else errors * mask
        if self.rule.average:
            error = masked.mean(dim=1, keepdim=True)
            weights = torch.full_like(errors, 1 / (errors.shape[1] * self.pixels))
        else:
            error, winner = masked.min(dim=1, keepdim=True)
            weights = torch.zeros_like(errors).scatter_(1, winner, 1 / self.pixels)
        if unwarped is not None:
            # Not `error < unwarped`: an error that is NaN must come through, or a broken step would look whole.
            automask = (error >= unwarped).logical_not_()
            self.automask.append(automask)
            weights.mul_(automask)
            error = torch.where(automask, error, unwarped)
        self.error.append(error)
        if mask is not None:
            self.gradients[3].append(weights * errors)
            weights = weights * mask
        return weights


class Eager:
    """Warp, errors, gradients of one piece of a batch, in plain torch operators.

    Args:
        target: what the sources are compared with.
        images: sources, (b, N, 3, H, W).
        no_ssim: L1 alone.
        gradients: whether `gradient` will be called.
        spare: workers of an earlier piece of the same shape, to be used again.
    """

    def __init__(
        self, target: Target, images: Tensor, no_ssim: bool, gradients: bool, spare: list[Photometric] | None = None
    ) -> None:
        self.target, self.images, self.gradients = target, images, gradients
        self.x, self.y = pixel_axes(images.shape[-2], images.shape[-1], images)
        _, group = piece_size(images)
        self.groups = [slice(first, first + group) for first in range(0, images.shape[1], group)]
        self.workers = [] if spare is None else spare
        if not self.workers:
            shapes = [images[:, part].shape for part in self.groups]
            self.workers += [Photometric(shape, images, no_ssim, gradients) for shape in shapes]

    def warp(self, depth: Tensor, homographies: Tensor, epipoles: Tensor) -> Tensor:
        """Depth (b, 1, H, W) and the pixel map -> warped sources (b, N, 3, H, W)."""
        self.depth = depth
        along_x, along_y, constant = homographies.unsqueeze(-2).unsqueeze(-2).unbind(-1)
        self.directions = along_x * self.x + (along_y * self.y + constant)
        points = torch.addcmul(epipoles[..., None, None], self.directions, depth.unsqueeze(1))
        self.z = points[:, :, 2]
        self.grid = torch.empty(*self.z.shape, 2, dtype=self.z.dtype, device=self.z.device)
        for axis in (0, 1):
            torch.div(points[:, :, axis], self.z, out=self.grid[..., axis])
        images = self.images.flatten(0, 1)
        with torch.set_grad_enabled(self.gradients):
            self.grid.requires_grad_(self.gradients)
            places = self.grid.flatten(0, 1)
            self.sampled = F.grid_sample(images, places, mode="bilinear", padding_mode="border", align_corners=True)
        self.warped = self.sampled.detach().view(self.images.shape)
        return self.warped

    def error(self) -> Tensor:
        """Errors of the warped sources, (b, N, H, W)."""
        workers = zip(self.groups, self.workers, strict=True)
        return torch.cat([worker.error(self.warped[:, part], self.target) for part, worker in workers], dim=1)

    def gradient(self, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients by depth, homographies and epipoles of the sum of weights (b, N, H, W) times error."""
        by_image = torch.empty_like(self.warped)
        for part, worker in zip(self.groups, self.workers, strict=True):
            by_image[:, part] = worker.gradient(self.warped[:, part], self.target, weights[:, part])
        (by_grid,) = torch.autograd.grad(self.sampled, self.grid, by_image.flatten(0, 1))
        grid = self.grid.detach()
        by_points = torch.empty_like(self.directions)
        for axis in (0, 1):
            torch.div(by_grid[..., axis], self.z, out=by_points[:, :, axis])
        torch.mul(by_points[:, :, 0], grid[..., 0], out=by_points[:, :, 2])
        by_points[:, :, 2].addcmul_(by_points[:, :, 1], grid[..., 1]).neg_()
        by_depth = (by_points * self.directions).sum(dim=(1, 2)).unsqueeze(1)
        by_epipoles = by_points.sum(dim=(3, 4))
        by_directions = by_points.mul_(self.depth.unsqueeze(1))
        columns, rows = by_directions.sum(dim=3), by_directions.sum(dim=4)
        parts = [(columns * self.x).sum(-1), (rows * self.y[:, 0]).sum(-1), rows.sum(-1)]
        return by_depth, torch.stack(parts, dim=-1), by_epipoles


def unwarped_error(images: Tensor, target: Target, no_ssim: bool) -> Tensor:
    """Photometric error (B, N, H, W) of images (B, N, 3, H, W) as they are, without gradients."""
    if has_kernels(images):
        from md2.photometric import kernels

        return kernels.photometric_error(images, target, no_ssim)
    return photometric_error(images, target, no_ssim)


def has_kernels(images: Tensor) -> bool:
    """Whether the Triton kernels take these images: float32 on a CUDA device where they run."""
    return images.is_cuda and images.dtype == torch.float32 and _kernels_run(images.device)


@cache
def _kernels_run(device: torch.device) -> bool:
    """Whether Triton is installed and works; a warning if it is and does not.

    It compiles what launches a kernel with the machine's C compiler and Python's headers, which machines made for
    running programs often lack.
    """
    if importlib.util.find_spec("triton") is None:
        return False
    try:
        from md2.photometric import kernels

        kernels.try_out(device)
    except Exception as error:  # of compilers, drivers and Triton itself
        reason = (str(error).strip().splitlines() or ["no message"])[0]
        warnings.warn(
            f"the loss's Triton kernels do not run here, plain operators take several times as long and much more "
            f"memory: {type(error).__name__}: {reason}",
            RuntimeWarning,
            stacklevel=2,
        )
        return False
    return True


def planar(images: Tensor) -> Tensor:
    """Images (..., 3, H, W) as the engine reads them again and again: for the kernels, one colour behind the other.

    Images for the networks are channels_last, and so are their stack and all that is computed from them.
    """
    return images.contiguous() if has_kernels(images) else images


def _engine(images: Tensor) -> Any:
    if has_kernels(images):
        from md2.photometric import kernels

        return kernels.Fused
    return Eager
