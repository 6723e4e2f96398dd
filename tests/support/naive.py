"""The method once more, for tests: numpy, float64, one formula at a time, nothing shared with md2.

Rotations come from the matrix exponential, windows from explicit neighbour lists, resampling from the
definition of bilinear interpolation.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def exponential(matrix: Array) -> Array:
    """Matrix exponential by its power series (for small matrices)."""
    total, term = np.eye(len(matrix)), np.eye(len(matrix))
    for k in range(1, 40):
        term = term @ matrix / k
        total = total + term
    return total


def rigid(axis_angle: Array, translation: Array, invert: bool) -> Array:
    """4x4 transform: rotate, then translate; or the inverse of that."""
    x, y, z = axis_angle
    T = np.eye(4)
    T[:3, :3] = exponential(np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]], dtype=np.float64))
    T[:3, 3] = translation
    return np.linalg.inv(T) if invert else T


def bilinear(image: Array, x: Array, y: Array) -> Array:
    """Values of image (C, H, W) at x, y (any shape), border repeated -> (C, *shape)."""
    height, width = image.shape[1:]
    x, y = np.clip(x, 0, width - 1), np.clip(y, 0, height - 1)
    x0, y0 = np.floor(x).astype(int), np.floor(y).astype(int)
    x1, y1 = np.minimum(x0 + 1, width - 1), np.minimum(y0 + 1, height - 1)
    fx, fy = x - x0, y - y0
    top = image[:, y0, x0] * (1 - fx) + image[:, y0, x1] * fx
    bottom = image[:, y1, x0] * (1 - fx) + image[:, y1, x1] * fx
    return np.asarray(top * (1 - fy) + bottom * fy)


def upsample(maps: Array, height: int, width: int) -> Array:
    """(C, h, w) -> (C, height, width), bilinear with pixel areas aligned (align_corners=False)."""
    y = (np.arange(height) + 0.5) * maps.shape[1] / height - 0.5
    x = (np.arange(width) + 0.5) * maps.shape[2] / width - 0.5
    return bilinear(maps, *np.meshgrid(x, y))


def warp(source: Array, depth: Array, K: Array, T: Array) -> Array:
    """Source (C, H, W) seen from the target with depth (H, W)."""
    height, width = depth.shape
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    rays = np.linalg.inv(K) @ np.stack([x, y, np.ones_like(x)]).reshape(3, -1).astype(np.float64)
    points = T[:3, :3] @ (rays * depth.reshape(1, -1)) + T[:3, 3:]
    pixels = K @ points
    u, v = pixels[:2] / (pixels[2:] + 1e-7)
    return bilinear(source, u.reshape(height, width), v.reshape(height, width))


def windows(image: Array) -> Array:
    """(C, H, W) -> (C, H, W, 9) neighbours, mirrored at the border without repeating it."""
    height, width = image.shape[1:]

    def mirror(i: int, n: int) -> int:
        return -i if i < 0 else 2 * (n - 1) - i if i >= n else i

    rows = np.array([[mirror(i + d, height) for d in (-1, 0, 1)] for i in range(height)])
    columns = np.array([[mirror(j + d, width) for d in (-1, 0, 1)] for j in range(width)])
    picked = image[:, rows[:, None, :, None], columns[None, :, None, :]]
    return picked.reshape(*image.shape, 9)


def ssim_error(a: Array, b: Array) -> Array:
    """clamp((1 - SSIM) / 2) per channel and pixel, from population moments of the windows."""
    wa, wb = windows(a), windows(b)
    ma, mb = wa.mean(-1), wb.mean(-1)
    covariance = ((wa - ma[..., None]) * (wb - mb[..., None])).mean(-1)
    luminance = (2 * ma * mb + 1e-4) / (ma**2 + mb**2 + 1e-4)
    structure = (2 * covariance + 9e-4) / (wa.var(-1) + wb.var(-1) + 9e-4)
    return np.clip((1 - luminance * structure) / 2, 0, 1)


def photometric(a: Array, b: Array, no_ssim: bool) -> Array:
    """(H, W) error between two images (3, H, W)."""
    difference = np.abs(a - b).mean(0)
    return difference if no_ssim else 0.85 * ssim_error(a, b).mean(0) + 0.15 * difference


def smoothness(disparity: Array, image: Array) -> tuple[Array, Array]:
    """Weighted steps along x (H, W-1) and y (H-1, W) of one (H, W) disparity over its image (3, H, W)."""
    d = disparity / (disparity.mean() + 1e-7)
    dx = np.abs(d[:, 1:] - d[:, :-1]) * np.exp(-np.abs(image[:, :, 1:] - image[:, :, :-1]).mean(0))
    dy = np.abs(d[1:] - d[:-1]) * np.exp(-np.abs(image[:, 1:] - image[:, :-1]).mean(0))
    return dx, dy


@dataclass
class Scene:
    """Inputs of one sample's loss.

    images[offset][level] (3, h, w); K[level] (3, 3); disparities[scale] (h, w); motions[offset] =
    (axis_angle, translation, invert); masks[scale] (sources, h, w); noise[scale] (sources or 1, h, w).
    """

    images: dict[Any, dict[int, Array]]
    K: dict[int, Array]
    disparities: dict[int, Array]
    motions: dict[int, tuple[Array, Array, bool]]
    stereo: Array | None = None
    masks: dict[int, Array] = field(default_factory=dict)
    noise: dict[int, Array] = field(default_factory=dict)
    relative: bool = False


@dataclass
class Options:
    v1_multiscale: bool = False
    avg_reprojection: bool = False
    disable_automasking: bool = False
    predictive_mask: bool = False
    no_ssim: bool = False
    disparity_smoothness: float = 1e-3
    min_depth: float = 0.1
    max_depth: float = 100.0


def loss(scenes: list[Scene], options: Options) -> tuple[float, dict[int, float]]:
    """Total and per-scale loss of a batch."""
    per_scale = {}
    for scale in scenes[0].disparities:
        parts = [_scale_terms(scene, scale, options) for scene in scenes]
        reprojection, mask_entropy, dx, dy = (np.concatenate([part[i].ravel() for part in parts]) for i in range(4))
        value = reprojection.mean() + options.disparity_smoothness / 2**scale * (dx.mean() + dy.mean())
        if options.predictive_mask:
            value += 0.2 * mask_entropy.mean()
        per_scale[scale] = float(value)
    return float(np.mean(list(per_scale.values()))), per_scale


def _scale_terms(scene: Scene, scale: int, options: Options) -> tuple[Array, Array, Array, Array]:
    level = scale if options.v1_multiscale else 0
    target = scene.images[0][level]
    height, width = target.shape[1:]
    disparity = upsample(scene.disparities[scale][None], height, width)[0]
    depth = 1 / (1 / options.max_depth + (1 / options.min_depth - 1 / options.max_depth) * disparity)
    sources = [offset for offset in scene.images if offset != 0]
    errors, unwarped = [], []
    for source in sources:
        image = scene.images[source][level]
        if source == "s":
            T = scene.stereo
        else:
            axis_angle, translation, invert = scene.motions[source]
            T = rigid(axis_angle, translation * ((1 / depth).mean() if scene.relative else 1.0), invert)
        assert T is not None
        errors.append(photometric(warp(image, depth, scene.K[level], T), target, options.no_ssim))
        unwarped.append(photometric(image, target, options.no_ssim))
    entropy = np.zeros(0)
    if options.predictive_mask:
        mask = upsample(scene.masks[scale], height, width)
        errors = [error * m for error, m in zip(errors, mask, strict=True)]
        entropy = -np.log(mask)
    if options.avg_reprojection:
        errors, unwarped = [np.mean(errors, axis=0)], [np.mean(unwarped, axis=0)]
    if not options.disable_automasking:
        noise = scene.noise.get(scale, np.zeros((len(unwarped), 1, 1)))
        errors = errors + [u + 1e-5 * n for u, n in zip(unwarped, noise, strict=True)]
    dx, dy = smoothness(scene.disparities[scale], scene.images[0][scale])
    return np.min(errors, axis=0), entropy, dx, dy
