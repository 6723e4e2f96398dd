"""The fast engine of the loss: warping, photometric error and the minimum over sources in one differentiable step.

It computes what `md2.loss.Reprojection` does. The mean of a minimum is linear in the errors that it selects, so the
gradient is known as soon as the errors are. It is computed at once, on a CPU for one sample at a time while that is
in the cache, and only the gradient is kept for the backward pass: memory does not grow with the number of sources.

For a target pixel (x, y) of depth d (equation 2 of the ICCV 2019 paper), a source sees the point at q d + p, where
q = K R K^-1 (x, y, 1)^T and p = K t. Divided by the third coordinate (+ 1e-7) this is the place to sample.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from md2.config import LossConfig
from md2.geometry import EPSILON, pixel_axes
from md2.photometric.ssim import Photometric, Target, photometric_error, piece_size


class Reprojection:
    """Compares the target (B, 3, H, W) of one resolution with its N sources, each (B, 3, H, W).

    Same arguments and results as `md2.loss.Reprojection`; differentiable once.
    """

    def __init__(self, target: Tensor, sources: Sequence[Tensor], config: LossConfig) -> None:
        self.target: Tensor | Target
        if has_kernels(target):
            # The networks' images are channels_last; the kernels read one colour behind the other, at every scale.
            batch, *shape = target.shape
            out = target.new_empty(batch, len(sources), *shape)
            self.target, self.sources = target.contiguous(), torch.stack(list(sources), dim=1, out=out)
        else:
            self.target, self.sources = Target.of(target), torch.stack(list(sources), dim=1)
        self.no_ssim, self.average = config.no_ssim, config.avg_reprojection
        self.size = (target.shape[-2], target.shape[-1])
        self._mapped: tuple[Tensor, Tensor] | None = None

    def identity_errors(self) -> Tensor:
        """Errors of the sources as they are, not warped: (B, N, H, W), without gradients."""
        if isinstance(self.target, Tensor):
            from md2.photometric import kernels

            return kernels.photometric_error(self.sources, self.target, self.no_ssim)
        return photometric_error(self.sources, self.target, self.no_ssim)

    def __call__(
        self, depth: Tensor, K: Tensor, transforms: Tensor, identity: Tensor | None, mask: Tensor | None, panels: bool
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Mean error, error (B, 1, H, W), auto-mask (B, 1, H, W) and warped images (B, N, 3, H, W)."""
        if self._mapped is None or self._mapped[0] is not transforms:  # the same for all scales, unless posecnn's
            self._mapped = transforms, pixel_map(K, transforms, self.size)
        maps = self._mapped[1].to(depth)
        return _Reproject.apply(depth, maps, mask, identity, self, panels)  # type: ignore[no-any-return, no-untyped-call]


def pixel_map(K: Tensor, transforms: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, N, 3, 4): takes (d x, d y, d, 1) of a target pixel to its place in each source, in [-1, 1] after division.

    Computed in float64, since the elements differ by orders of magnitude and every pixel shares their rounding.

    Args:
        K: (B, 3, 3) at this resolution.
        transforms: (B, N, 4, 4), target camera to each source's.
        size: height and width.
    """
    height, width = size
    K, T = K.double().unsqueeze(1), transforms.double()
    inverse, _ = torch.linalg.inv_ex(K)
    x, y, z = torch.cat([K @ T[..., :3, :3] @ inverse, K @ T[..., :3, 3:]], dim=-1).unbind(-2)
    z = torch.cat([z[..., :3], z[..., 3:] + EPSILON], dim=-1)
    # No matrix of constants: making one on a GPU waits for all that runs there.
    return torch.stack([x * (2 / (width - 1)) - z, y * (2 / (height - 1)) - z, z], dim=-2).to(transforms.dtype)


class _Reproject(torch.autograd.Function):
    """The loss and, at the same time, its gradients by depth, maps and mask."""

    @staticmethod
    def forward(
        ctx: Any,
        depth: Tensor,
        maps: Tensor,
        mask: Tensor | None,
        identity: Tensor | None,
        views: Reprojection,
        panels: bool,
    ) -> tuple[Tensor | None, ...]:
        gradients = any(ctx.needs_input_grad)
        samples, _ = piece_size(views.sources)
        engine_of = _engine(views.sources)
        workers: list[Photometric] = []
        pieces = []
        for first in range(0, depth.shape[0], samples):
            rows = slice(first, first + samples)
            masked = None if mask is None else mask[rows]
            compared = None if identity is None else identity[rows]
            images = views.sources[rows]
            target = views.target[rows] if isinstance(views.target, Tensor) else views.target.samples(rows)
            engine = engine_of(target, images, views.no_ssim, gradients, workers)
            warped = engine.warp(depth[rows], maps[rows])
            weights, total, *found = engine.choose(engine.error(), masked, compared, views.average)
            pieces.append(
                (total.view(1), *found, warped if panels else None, *(engine.gradient(weights) if gradients else ()))
            )
        totals, error, automask, by_mask, warped, *grads = (_joined(parts) for parts in zip(*pieces, strict=True))
        ctx.mark_non_differentiable(*(kept for kept in (error, automask, warped) if kept is not None))
        if gradients:
            grads.append(by_mask)
            ctx.factor = 1 / error.numel()
            ctx.save_for_backward(*grads)
        return totals.sum() / error.numel(), error, automask, warped

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        factor = grad_loss * ctx.factor
        by_depth, by_maps, by_mask = (None if grad is None else grad * factor for grad in ctx.saved_tensors)
        return by_depth, by_maps, by_mask, None, None, None


def _joined(parts: tuple[Any, ...]) -> Any:
    """A batch from its pieces; one piece is not copied."""
    return parts[0] if parts[0] is None or len(parts) == 1 else torch.cat(parts)


def choose(
    errors: Tensor, mask: Tensor | None, identity: Tensor | None, average: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """The error that counts at each pixel, from the sources' errors (b, N, H, W).

    Returns:
        Derivatives (b, N, H, W) of the sum of errors by each source's error, that sum, the error (b, 1, H, W), the
        auto-mask, and the derivatives (b, N, H, W) by the mask.
    """
    masked = errors if mask is None else errors * mask
    if average:
        error = masked.mean(dim=1, keepdim=True)
        weights = torch.full_like(errors, 1 / errors.shape[1])
    else:
        error, winner = masked.min(dim=1, keepdim=True)
        weights = torch.zeros_like(errors).scatter_(1, winner, 1)
    automask = None
    if identity is not None:
        # Not `error < identity`: an error of NaN must reach the loss, or a broken step would look whole.
        automask = (error >= identity).logical_not_()
        weights.mul_(automask)
        error = torch.where(automask, error, identity)
    if mask is None:
        return weights, error.sum(), error, automask, None
    return weights * mask, error.sum(), error, automask, weights * errors


class Eager:
    """Warp, errors, gradients of one piece of a batch, in plain torch operators.

    Args:
        target: what the sources are compared with.
        images: sources, (b, N, 3, H, W).
        no_ssim: L1 alone.
        gradients: whether `gradient` will be called.
        workers: those of an earlier piece of the same shape, used again; empty at first.
    """

    choose = staticmethod(choose)

    def __init__(
        self, target: Target, images: Tensor, no_ssim: bool, gradients: bool, workers: list[Photometric]
    ) -> None:
        self.target, self.images, self.gradients = target, images, gradients
        self.x, self.y = pixel_axes(images.shape[-2], images.shape[-1], images)
        _, group = piece_size(images)
        self.groups = [slice(first, first + group) for first in range(0, images.shape[1], group)]
        self.workers = workers
        if not workers:
            shapes = [images[:, part].shape for part in self.groups]
            self.workers += [Photometric(shape, images, no_ssim, gradients) for shape in shapes]

    def warp(self, depth: Tensor, maps: Tensor) -> Tensor:
        """Depth (b, 1, H, W) and the pixel map -> warped sources (b, N, 3, H, W)."""
        self.depth = depth
        along_x, along_y, constant, epipole = maps.unsqueeze(-2).unsqueeze(-2).unbind(-1)
        self.directions = along_x * self.x + (along_y * self.y + constant)
        points = torch.addcmul(epipole, self.directions, depth.unsqueeze(1))
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

    def gradient(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients by depth and pixel map of the sum of weights (b, N, H, W) times error."""
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
        parts = [(columns * self.x).sum(-1), (rows * self.y[:, 0]).sum(-1), rows.sum(-1), by_epipoles]
        return by_depth, torch.stack(parts, dim=-1)


def smoothness(disparity: Tensor, image: Tensor) -> Tensor:
    """`md2.loss.smoothness` by its kernel, for what `has_kernels`."""
    from md2.photometric import kernels

    return kernels.Smoothness.apply(disparity.contiguous(), image)  # type: ignore[no-any-return, no-untyped-call]


def has_kernels(images: Tensor) -> bool:
    """Whether the Triton kernels take these images: float32 on a CUDA device where they run."""
    return images.is_cuda and images.dtype == torch.float32 and _kernels_run(images.device)


@cache
def _kernels_run(device: torch.device) -> bool:
    """Whether Triton is installed and works; warns if it is installed and fails.

    Triton compiles a launcher for each kernel with the machine's C compiler and Python's headers, which machines that
    only run programs often lack. Memory that has run out says nothing about the kernels: that error passes through.
    """
    if importlib.util.find_spec("triton") is None:
        return False
    try:
        from md2.photometric import kernels

        kernels.try_out(device)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of compilers, drivers and Triton itself
        reason = (str(error).strip().splitlines() or ["no message"])[0]
        warnings.warn(
            f"the loss's Triton kernels do not run here; plain operators replace them, several times slower and with "
            f"much more memory: {type(error).__name__}: {reason}",
            RuntimeWarning,
            stacklevel=2,
        )
        return False
    return True


def _engine(images: Tensor) -> Any:
    if has_kernels(images):
        from md2.photometric import kernels

        return kernels.Fused
    return Eager
