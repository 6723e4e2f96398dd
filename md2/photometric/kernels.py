"""The loss's inner loops as five Triton kernels for NVIDIA GPUs: warp, error, choose, gradient, smooth.

They compute what `reprojection.Eager` does, with the same formulas, without writing every intermediate map to memory:
about 30 numbers per pixel and source cross the bus instead of some 200, and four launches replace a hundred. Sums
over pixels are taken per block and then by torch, without atomics, so equal inputs give equal bits. CUDA builds of
torch bring Triton; `TRITON_INTERPRET=1` runs the kernels on a CPU, as the tests do.
"""

# mypy: disable-error-code="import-not-found,import-untyped,untyped-decorator,no-untyped-def,no-untyped-call"
# ruff: noqa: PLR0124  # a number that differs from itself is NaN

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from md2.photometric.ssim import SSIM_WEIGHT

BLOCK = 256
"""Pixels per program."""
_WARPS = 8
"""One pixel a thread: two take all of its 255 registers in `_gradient`, and an SM holds a third as many threads."""


@triton.jit
def _place(maps, depth, source, x, y, pixel, valid, N, H, W):
    """Direction q, depth, denominator z and place in [-1, 1] of each pixel in one source."""
    base = maps + source * 12
    d = tl.load(depth + (source // N) * H * W + pixel, mask=valid, other=1.0)
    q0 = tl.load(base + 0) * x + (tl.load(base + 1) * y + tl.load(base + 2))
    q1 = tl.load(base + 4) * x + (tl.load(base + 5) * y + tl.load(base + 6))
    q2 = tl.load(base + 8) * x + (tl.load(base + 9) * y + tl.load(base + 10))
    z = q2 * d + tl.load(base + 11)
    return q0, q1, q2, d, z, (q0 * d + tl.load(base + 3)) / z, (q1 * d + tl.load(base + 7)) / z


@triton.jit
def _taps(u, v, H, W):
    """Offsets of the four pixels around a place in pixels, border repeated, and the place within them.

    A place of NaN becomes 0 here: what reads the pixels puts NaN back.
    """
    u = tl.where(u == u, u, 0.0)
    v = tl.where(v == v, v, 0.0)
    u = tl.minimum(tl.maximum(u, 0.0), W - 1.0)
    v = tl.minimum(tl.maximum(v, 0.0), H - 1.0)
    left = tl.floor(u)
    top = tl.floor(v)
    x0 = left.to(tl.int32)
    y0 = top.to(tl.int32)
    x1 = tl.minimum(x0 + 1, W - 1)
    y1 = tl.minimum(y0 + 1, H - 1)
    return y0 * W + x0, y0 * W + x1, y1 * W + x0, y1 * W + x1, u - left, v - top


@triton.jit
def _warp(images, depth, maps, out, N, H, W, BLOCK: tl.constexpr):
    """Warped sources; NaN where a place is NaN."""
    source = tl.program_id(1).to(tl.int64)
    pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = pixel < H * W
    x = (pixel % W).to(tl.float32)
    y = (pixel // W).to(tl.float32)
    _q0, _q1, _q2, _d, _z, gx, gy = _place(maps, depth, source, x, y, pixel, valid, N, H, W)
    a, b, c, d, fx, fy = _taps((gx + 1) / 2 * (W - 1), (gy + 1) / 2 * (H - 1), H, W)
    for channel in tl.static_range(3):
        plane = (source * 3 + channel) * H * W
        top = tl.load(images + plane + a, mask=valid) * (1 - fx) + tl.load(images + plane + b, mask=valid) * fx
        bottom = tl.load(images + plane + c, mask=valid) * (1 - fx) + tl.load(images + plane + d, mask=valid) * fx
        value = top * (1 - fy) + bottom * fy
        tl.store(out + plane + pixel, tl.where((gx == gx) & (gy == gy), value, float("nan")), mask=valid)


@triton.jit
def _error(
    images,
    target,
    errors,
    slopes,
    N,
    H,
    W,
    WEIGHT: tl.constexpr,
    SSIM: tl.constexpr,
    GRADIENTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Photometric error; with GRADIENTS also SSIM's derivatives by the window sums, (B, N, 3 sums, 3, H, W)."""
    source = tl.program_id(1).to(tl.int64)
    pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = pixel < H * W
    x = pixel % W
    y = pixel // W
    difference = tl.zeros([BLOCK], tl.float32)
    similarity = tl.zeros([BLOCK], tl.float32)
    for channel in tl.static_range(3):
        plane = (source * 3 + channel) * H * W
        other = ((source // N) * 3 + channel) * H * W
        here = tl.load(images + plane + pixel, mask=valid, other=0.0)
        there = tl.load(target + other + pixel, mask=valid, other=0.0)
        difference += tl.abs(here - there)
        if SSIM:
            total = tl.zeros([BLOCK], tl.float32)
            squares = tl.zeros([BLOCK], tl.float32)
            products = tl.zeros([BLOCK], tl.float32)
            other_total = tl.zeros([BLOCK], tl.float32)
            other_squares = tl.zeros([BLOCK], tl.float32)
            for dy in tl.static_range(-1, 2):
                row = tl.abs(y + dy)
                row = (H - 1) - tl.abs(H - 1 - row)
                for dx in tl.static_range(-1, 2):
                    column = tl.abs(x + dx)
                    column = (W - 1) - tl.abs(W - 1 - column)
                    a = tl.load(images + plane + row * W + column, mask=valid, other=0.0)
                    b = tl.load(target + other + row * W + column, mask=valid, other=0.0)
                    total += a
                    squares += a * a
                    products += a * b
                    # Not read from memory, as `Target` has them: its pixels are here already.
                    other_total += b
                    other_squares += b * b
            twice = 2 * other_total
            product = twice * total
            n1 = product + 81 * 0.0001
            n2 = 18 * products - product + 81 * 0.0009
            d1 = total * total + (other_total * other_total + 81 * 0.0001)
            d2 = 9 * squares + (9 * other_squares - other_total * other_total + 81 * 0.0009) - total * total
            inverse = 1 / (d1 * d2)
            ssim = n1 * n2 * inverse
            similarity += tl.minimum(tl.maximum(ssim, -1.0), 1.0)
            if GRADIENTS:
                first = slopes + (source * 9 + channel) * H * W + pixel
                slope = (twice * (n2 - n1) - 2 * total * ssim * (d2 - d1)) * inverse
                tl.store(first, slope, mask=valid)
                tl.store(first + 3 * H * W, n1 * inverse, mask=valid)
                tl.store(first + 6 * H * W, ssim / d2, mask=valid)
    error = difference / 3
    if SSIM:
        error = (1 - WEIGHT) * error + WEIGHT / 2 - WEIGHT / 2 * (similarity / 3)
    tl.store(errors + source * H * W + pixel, error, mask=valid)


@triton.jit
def _choose(
    errors,
    mask,
    identity,
    weights,
    error,
    sums,
    automask,
    by_mask,
    N,
    H,
    W,
    AVERAGE: tl.constexpr,
    MASKED: tl.constexpr,
    IDENTITY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`reprojection.choose` for one sample of the batch, and the error's sum per block."""
    sample = tl.program_id(1).to(tl.int64)
    pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = pixel < H * W
    first = sample * N * H * W + pixel
    best = tl.load(errors + first, mask=valid, other=0.0)
    if MASKED:
        best *= tl.load(mask + first, mask=valid, other=0.0)
    winner = tl.zeros([BLOCK], tl.int32)
    for source in range(1, N):
        one = tl.load(errors + first + source * H * W, mask=valid, other=0.0)
        if MASKED:
            one *= tl.load(mask + first + source * H * W, mask=valid, other=0.0)
        if AVERAGE:
            best += one
        else:
            # NaN wins over every number, as in torch.
            less = (one < best) | ((one != one) & (best == best))
            winner = tl.where(less, source, winner)
            best = tl.where(less, one, best)
    if AVERAGE:
        best = best / N
    counts = tl.full([BLOCK], 1.0, tl.float32)
    if IDENTITY:
        unmoved = tl.load(identity + sample * H * W + pixel, mask=valid, other=0.0)
        chosen = (best >= unmoved) == 0  # true for NaN too
        tl.store(automask + sample * H * W + pixel, chosen.to(tl.uint8), mask=valid)
        counts = tl.where(chosen, 1.0, 0.0)
        best = tl.where(chosen, best, unmoved)
    tl.store(error + sample * H * W + pixel, best, mask=valid)
    tl.store(sums + sample * tl.num_programs(0) + tl.program_id(0), tl.sum(tl.where(valid, best, 0.0), axis=0))
    for source in range(N):
        here = first + source * H * W
        weight = counts / N if AVERAGE else tl.where(winner == source, counts, 0.0)
        if MASKED:
            tl.store(by_mask + here, weight * tl.load(errors + here, mask=valid, other=0.0), mask=valid)
            weight *= tl.load(mask + here, mask=valid, other=0.0)
        tl.store(weights + here, weight, mask=valid)


@triton.jit
def _window(slopes, weights, row, column, valid, H, W):
    """Weighted slopes of all windows that a pixel stands in, summed."""
    by_sum = tl.zeros_like(row).to(tl.float32)
    by_product = tl.zeros_like(by_sum)
    by_square = tl.zeros_like(by_sum)
    for dy in tl.static_range(-1, 2):
        r = row + dy
        # How often this pixel stands in the neighbour's window: twice where it was reflected into it.
        rows = 1 + tl.where((row == 1) & (r == 0), 1, 0) + tl.where((row == H - 2) & (r == H - 1), 1, 0)
        for dx in tl.static_range(-1, 2):
            c = column + dx
            columns = 1 + tl.where((column == 1) & (c == 0), 1, 0) + tl.where((column == W - 2) & (c == W - 1), 1, 0)
            inside = valid & (r >= 0) & (r < H) & (c >= 0) & (c < W)
            near = r * W + c
            weight = tl.load(weights + near, mask=inside, other=0.0) * (rows * columns)
            by_sum += weight * tl.load(slopes + near, mask=inside, other=0.0)
            by_product += weight * tl.load(slopes + 3 * H * W + near, mask=inside, other=0.0)
            by_square += weight * tl.load(slopes + 6 * H * W + near, mask=inside, other=0.0)
    return by_sum, by_product, by_square


@triton.jit
def _gradient(
    images,
    depth,
    maps,
    target,
    slopes,
    weights,
    by_depth,
    sums,
    N,
    H,
    W,
    WEIGHT: tl.constexpr,
    SSIM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """From the errors' weights to the depth, and per block the sums for the 3x4 map from pixel to place."""
    source = tl.program_id(1).to(tl.int64)
    pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = pixel < H * W
    column = pixel % W
    row = pixel // W
    x = column.to(tl.float32)
    y = row.to(tl.float32)
    q0, q1, q2, d, z, gx, gy = _place(maps, depth, source, x, y, pixel, valid, N, H, W)
    u = (gx + 1) / 2 * (W - 1)
    v = (gy + 1) / 2 * (H - 1)
    tap_a, tap_b, tap_c, tap_d, fx, fy = _taps(u, v, H, W)
    own = tl.load(weights + source * H * W + pixel, mask=valid, other=0.0)
    by_u = tl.zeros([BLOCK], tl.float32)
    by_v = tl.zeros([BLOCK], tl.float32)
    for channel in tl.static_range(3):
        plane = (source * 3 + channel) * H * W
        va = tl.load(images + plane + tap_a, mask=valid, other=0.0)
        vb = tl.load(images + plane + tap_b, mask=valid, other=0.0)
        vc = tl.load(images + plane + tap_c, mask=valid, other=0.0)
        vd = tl.load(images + plane + tap_d, mask=valid, other=0.0)
        value = (va * (1 - fx) + vb * fx) * (1 - fy) + (vc * (1 - fx) + vd * fx) * fy
        there = tl.load(target + ((source // N) * 3 + channel) * H * W + pixel, mask=valid, other=0.0)
        sign = tl.where(value > there, 1.0, 0.0) - tl.where(value < there, 1.0, 0.0)
        if SSIM:
            first = slopes + (source * 9 + channel) * H * W
            by_sum, by_product, by_square = _window(first, weights + source * H * W, row, column, valid, H, W)
            slope = by_sum + 18 * there * by_product - 18 * value * by_square
            by_value = (1 - WEIGHT) / 3 * own * sign - WEIGHT / 6 * slope
        else:
            by_value = own * sign / 3
        by_u += by_value * ((vb - va) * (1 - fy) + (vd - vc) * fy)
        by_v += by_value * ((vc - va) * (1 - fx) + (vd - vb) * fx)
    # Beyond the border the nearest pixel is repeated: no slope there.
    by_u = tl.where((u > 0) & (u < W - 1), by_u * (W - 1) / 2, 0.0)
    by_v = tl.where((v > 0) & (v < H - 1), by_v * (H - 1) / 2, 0.0)
    # Beyond the last pixel there may be no place, and nothing times NaN would be NaN in the sums.
    p0 = tl.where(valid, by_u / z, 0.0)
    p1 = tl.where(valid, by_v / z, 0.0)
    p2 = tl.where(valid, -(p0 * gx + p1 * gy), 0.0)
    tl.store(by_depth + source * H * W + pixel, p0 * q0 + p1 * q1 + p2 * q2, mask=valid)
    out = sums + (source * tl.num_programs(0) + tl.program_id(0)) * 12
    _store_row(out, p0, d, x, y)
    _store_row(out + 4, p1, d, x, y)
    _store_row(out + 8, p2, d, x, y)


@triton.jit
def _store_row(out, p, d, x, y):
    """A row of the map: gradients by the factors of x, y and 1, and by the epipole."""
    tl.store(out + 0, tl.sum(p * d * x, axis=0))
    tl.store(out + 1, tl.sum(p * d * y, axis=0))
    tl.store(out + 2, tl.sum(p * d, axis=0))
    tl.store(out + 3, tl.sum(p, axis=0))


@triton.jit
def _edge(disparity, image, here, there, pixel, near, valid, S, C: tl.constexpr):
    """Disparity's step from one pixel to a neighbour, and the weight exp(-|step of the image|) of that."""
    step = tl.load(disparity + near, mask=valid, other=0.0) - tl.load(disparity + pixel, mask=valid, other=0.0)
    difference = tl.zeros_like(step)
    for channel in tl.static_range(C):
        a = tl.load(image + here + channel * S, mask=valid, other=0.0)
        difference += tl.abs(tl.load(image + there + channel * S, mask=valid, other=0.0) - a)
    return step, tl.exp(-difference / C)


@triton.jit
def _sign(x):
    return tl.where(x > 0, 1.0, 0.0) - tl.where(x < 0, 1.0, 0.0)


@triton.jit
def _smooth(disparity, image, gradient, sums, SB, SC, SY, SX, H, W, BLOCK: tl.constexpr):
    """Edge-aware smoothness of the disparity as it is, per block its sum and the disparity's, and its gradient.

    Means over the neighbouring pairs of one image; the image's strides are those of batch, colour, row and column.
    """
    sample = tl.program_id(1).to(tl.int64)
    pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = pixel < H * W
    x = pixel % W
    y = pixel // W
    d = disparity + sample * H * W
    i = image + sample * SB
    here = y * SY + x * SX
    right, e = _edge(d, i, here, here + SX, pixel, pixel + 1, valid & (x < W - 1), SC, 3)
    total = tl.abs(right) * e / (H * (W - 1))
    by_pixel = -_sign(right) * e / (H * (W - 1))
    left, e = _edge(d, i, here, here - SX, pixel, pixel - 1, valid & (x > 0), SC, 3)
    by_pixel -= _sign(left) * e / (H * (W - 1))
    down, e = _edge(d, i, here, here + SY, pixel, pixel + W, valid & (y < H - 1), SC, 3)
    total += tl.abs(down) * e / ((H - 1) * W)
    by_pixel -= _sign(down) * e / ((H - 1) * W)
    up, e = _edge(d, i, here, here - SY, pixel, pixel - W, valid & (y > 0), SC, 3)
    by_pixel -= _sign(up) * e / ((H - 1) * W)
    tl.store(gradient + sample * H * W + pixel, by_pixel, mask=valid)
    out = sums + (sample * tl.num_programs(0) + tl.program_id(0)) * 2
    tl.store(out, tl.sum(total, axis=0))
    tl.store(out + 1, tl.sum(tl.load(d + pixel, mask=valid, other=0.0), axis=0))


def _launch(kernel: Any, maps: Tensor, programs: int, *arguments: Any, **constants: Any) -> None:
    """Run for every block of pixels of maps (..., H, W), each as many times as there are `programs`."""
    height, width = maps.shape[-2:]
    with torch.cuda.device_of(maps):
        kernel[(_blocks(maps), programs)](
            *arguments, height, width, **constants, BLOCK=BLOCK, num_warps=_WARPS, enable_fp_fusion=True
        )


def _blocks(maps: Tensor) -> int:
    return int(triton.cdiv(maps.shape[-2] * maps.shape[-1], BLOCK))


def try_out(device: torch.device) -> None:
    """Compile and run a kernel on next to nothing.

    Raises:
        Exception: whatever Triton, its compilers and the driver raise.
    """
    image = torch.zeros(1, 3, 4, 4, device=device)
    photometric_error(image.unsqueeze(1), image, no_ssim=True)


def photometric_error(images: Tensor, target: Tensor, no_ssim: bool) -> Tensor:
    """Errors (B, N, H, W) of images (B, N, 3, H, W) against the target (B, 3, H, W), without gradients."""
    errors, _ = _errors(images, target, no_ssim, gradients=False)
    return errors


def _errors(images: Tensor, target: Tensor, no_ssim: bool, gradients: bool) -> tuple[Tensor, Tensor]:
    batch, sources, _, height, width = images.shape
    images = images.contiguous()
    errors = images.new_empty(batch, sources, height, width)
    slopes = images.new_empty((batch, sources, 9, height, width) if gradients and not no_ssim else (1,))
    constants = {"WEIGHT": SSIM_WEIGHT, "SSIM": not no_ssim, "GRADIENTS": gradients}
    _launch(_error, images, batch * sources, images, target.contiguous(), errors, slopes, sources, **constants)
    return errors, slopes


class Smoothness(torch.autograd.Function):
    """`md2.loss.smoothness` of a contiguous disparity (B, 1, h, w) over an image (B, 3, h, w); differentiable once.

    A sample's smoothness is S / m, m its mean disparity + 1e-7 and S that of the disparity as it is, so its gradient
    is that of S, over m, and -S / m^2 over the number of pixels.
    """

    @staticmethod
    def forward(ctx: Any, disparity: Tensor, image: Tensor) -> Tensor:
        batch, _, height, width = disparity.shape
        gradient = torch.empty_like(disparity)
        sums = disparity.new_empty(batch, _blocks(disparity), 2)
        _launch(_smooth, disparity, batch, disparity, image, gradient, sums, *image.stride())
        total, mean = sums.sum(dim=1).view(batch, 2, 1, 1, 1).unbind(1)
        mean = mean / (height * width) + 1e-7
        value = total / mean
        ctx.save_for_backward(gradient, value, mean)
        return value.mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        gradient, value, mean = ctx.saved_tensors
        scale = grad / (mean * mean.shape[0])
        return torch.addcmul(-value * scale / gradient[0].numel(), gradient, scale), None


class Fused:
    """Warp, errors, gradients of one piece of a batch, as `reprojection.Eager`.

    Args:
        target: (b, 3, H, W) float32.
        images: sources, (b, N, 3, H, W) float32.
        no_ssim: L1 alone.
        gradients: whether `gradient` will be called.
        workers: not used; nothing here is kept from piece to piece.
    """

    def __init__(
        self, target: Tensor, images: Tensor, no_ssim: bool, gradients: bool, workers: list[Any] | None = None
    ) -> None:
        self.target, self.images = target.contiguous(), images.contiguous()
        self.programs = images.shape[0] * images.shape[1]
        self.no_ssim, self.gradients = no_ssim, gradients

    def warp(self, depth: Tensor, maps: Tensor) -> Tensor:
        """Depth (b, 1, H, W) and the pixel map -> warped sources (b, N, 3, H, W)."""
        self.depth, self.maps = depth.contiguous(), maps.contiguous()
        self.warped = torch.empty_like(self.images)
        sources = self.images.shape[1]
        _launch(_warp, self.images, self.programs, self.images, self.depth, self.maps, self.warped, sources)
        return self.warped

    def error(self) -> Tensor:
        """Errors of the warped sources, (b, N, H, W)."""
        errors, self.slopes = _errors(self.warped, self.target, self.no_ssim, self.gradients)
        return errors

    def choose(
        self, errors: Tensor, mask: Tensor | None, identity: Tensor | None, average: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """As `reprojection.choose`."""
        batch, sources, height, width = errors.shape
        weights, error = torch.empty_like(errors), errors.new_empty(batch, 1, height, width)
        sums = errors.new_empty(batch, _blocks(errors))
        automask = None if identity is None else torch.empty_like(error, dtype=torch.bool)
        by_mask = None if mask is None else torch.empty_like(errors)
        _launch(
            _choose,
            errors,
            batch,
            errors,
            errors if mask is None else mask.contiguous(),
            errors if identity is None else identity.contiguous(),
            weights,
            error,
            sums,
            error if automask is None else automask.view(torch.uint8),
            error if by_mask is None else by_mask,
            sources,
            AVERAGE=average,
            MASKED=mask is not None,
            IDENTITY=identity is not None,
        )
        return weights, sums.sum(), error, automask, by_mask

    def gradient(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients by depth and pixel map of the sum of weights (b, N, H, W) times error."""
        batch, sources = weights.shape[:2]
        by_depth = torch.empty_like(weights, memory_format=torch.contiguous_format)
        sums = weights.new_empty(batch, sources, _blocks(weights), 3, 4)
        _launch(
            _gradient,
            weights,
            self.programs,
            self.images,
            self.depth,
            self.maps,
            self.target,
            self.slopes,
            weights.contiguous(),
            by_depth,
            sums,
            sources,
            WEIGHT=SSIM_WEIGHT,
            SSIM=not self.no_ssim,
        )
        return by_depth.sum(dim=1, keepdim=True), sums.sum(dim=2)
