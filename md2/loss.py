"""The self-supervised loss, as the paper has it: Godard et al., "Digging Into Self-Supervised Monocular Depth
Estimation", ICCV 2019, section 3. The options are those of its official implementation.

    loss = ReprojectionLoss(config.loss, config.model)
    loss(batch, prediction).total.backward()

`Reprojection` below is the method in plain operators. Training runs `photometric.reprojection.Reprojection`, which
computes the same in fewer passes over memory; the tests hold the two to equal values and gradients. `fast=False` is
the switch. All of it is float32 (float64 if the inputs are), whatever autocast says.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from md2.config import LossConfig, ModelConfig
from md2.data.batch import Batch, Offset
from md2.geometry import disparity_to_depth, scale_intrinsics, warp
from md2.model import GivenPose, Pose, Prediction
from md2.networks.camera import matrices
from md2.photometric import reprojection
from md2.photometric.ssim import C1, C2, SSIM_WEIGHT

Pyramids = Mapping[Offset, Mapping[int, Tensor]]
"""Offset -> level s -> image (B, 3, H / 2^s, W / 2^s) in [0, 1]."""
Noise = Tensor | Mapping[int, Tensor] | None

NOISE_SCALE = 1e-5
NOISE_STARTS = 1 << 20
MASK_WEIGHT = 0.2


@dataclass(frozen=True)
class Panels:
    """What one scale's loss compared, without gradients.

    Attributes:
        warped: source -> (B, 3, h, w), the source as seen from the target.
        error: (B, 1, h, w), the error that the mean is taken over.
        automask: (B, 1, h, w) bool, true where a warped source fits better than every unwarped one, which is where
            the pixel counts. None with `disable_automasking`.
        mask: (B, sources, h, w) in [0, 1], the predictive mask, or None.
    """

    warped: dict[Offset, Tensor]
    error: Tensor
    automask: Tensor | None
    mask: Tensor | None = None


@dataclass(frozen=True)
class LossOutput:
    """Attributes:
    total: scalar, the mean of `per_scale`, and the weighted velocity error if distances are known.
    per_scale: scale -> scalar: reprojection, mask's cross-entropy and weighted smoothness.
    panels: scale -> panels; empty unless asked for.
    """

    total: Tensor
    per_scale: dict[int, Tensor]
    panels: dict[int, Panels]


def image_pyramid(images: Mapping[Offset, Tensor], scales: Iterable[int], v1_multiscale: bool = False) -> Pyramids:
    """Images (B, 3, H, W) and their halvings, each pixel the mean of 2x2 of the level before.

    Level 0 of every image, and the levels in `scales` of the target, for smoothness; with `v1_multiscale` of every
    image. (The official implementation resizes with Pillow's antialiasing filter.)
    """
    wanted = {0, *scales}
    pyramids: dict[Offset, dict[int, Tensor]] = {}
    for offset, image in images.items():
        levels = {0: image}
        for level in range(1, max(wanted) + 1 if offset == 0 or v1_multiscale else 1):
            levels[level] = F.avg_pool2d(levels[level - 1], 2)
        pyramids[offset] = {level: levels[level] for level in levels if level in wanted}
    return pyramids


def ssim(x: Tensor, y: Tensor) -> Tensor:
    """Structural similarity of images (B, 3, H, W) with 3x3 mean windows, reflected at the border; in [-1, 1]."""
    x, y = (F.pad(image, (1, 1, 1, 1), mode="reflect") for image in (x, y))
    mean_x, mean_y = F.avg_pool2d(x, 3, 1), F.avg_pool2d(y, 3, 1)
    variance_x = F.avg_pool2d(x**2, 3, 1) - mean_x**2
    variance_y = F.avg_pool2d(y**2, 3, 1) - mean_y**2
    covariance = F.avg_pool2d(x * y, 3, 1) - mean_x * mean_y
    similar = (2 * mean_x * mean_y + C1) * (2 * covariance + C2)
    return similar / ((mean_x**2 + mean_y**2 + C1) * (variance_x + variance_y + C2))


def photometric_error(image: Tensor, target: Tensor, no_ssim: bool = False) -> Tensor:
    """pe = 0.85 (1 - SSIM) / 2 + 0.15 |image - target|, the mean over colours: (B, 1, H, W)."""
    difference = (target - image).abs().mean(dim=1, keepdim=True)
    if no_ssim:
        return difference
    dissimilar = ((1 - ssim(image, target)) / 2).clamp(0, 1).mean(dim=1, keepdim=True)
    return SSIM_WEIGHT * dissimilar + (1 - SSIM_WEIGHT) * difference


def smoothness(disparity: Tensor, image: Tensor) -> Tensor:
    """Edge-aware smoothness of the mean-normalised disparity (B, 1, h, w) over the image (B, 3, h, w) (equation 3).

    |dx d*| exp(-|dx I|) + |dy d*| exp(-|dy I|), d* = d / (its mean over the image + 1e-7), |I| the mean over
    colours; the mean over all neighbouring pairs of each direction. Scalar.
    """
    disparity = disparity / (disparity.mean(dim=(2, 3), keepdim=True) + 1e-7)
    terms = []
    for dim in (3, 2):
        steps = disparity.diff(dim=dim).abs()
        edges = image.diff(dim=dim).abs().mean(dim=1, keepdim=True)
        terms.append((steps * torch.exp(-edges)).mean())
    return terms[0] + terms[1]


class Reprojection:
    """Compares the target (B, 3, H, W) of one resolution with its N sources, each (B, 3, H, W)."""

    def __init__(self, target: Tensor, sources: Sequence[Tensor], config: LossConfig) -> None:
        self.target, self.sources, self.config = target, sources, config

    def _errors(self, images: Iterable[Tensor]) -> Tensor:
        return torch.cat([photometric_error(image, self.target, self.config.no_ssim) for image in images], dim=1)

    def identity_errors(self) -> Tensor:
        """Errors of the sources as they are, not warped: (B, N, H, W)."""
        return self._errors(self.sources)

    def __call__(
        self, depth: Tensor, K: Tensor, transforms: Tensor, identity: Tensor | None, mask: Tensor | None, panels: bool
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """The mean error of the sources warped into the target, differentiable in depth, transforms and mask.

        Args:
            depth: (B, 1, H, W) of the target.
            K: (B, 3, 3) at this resolution.
            transforms: (B, N, 4, 4), target camera to each source's.
            identity: (B, 1, H, W), the least identity error, for auto-masking; None without.
            mask: (B, N, H, W), predictive mask; None without.
            panels: return the warped images too.

        Returns:
            The mean, the error (B, 1, H, W), the auto-mask (B, 1, H, W), the warped images (B, N, 3, H, W).
        """
        pairs = zip(self.sources, transforms.unbind(1), strict=True)
        warped = [warp(source, depth, K, transform) for source, transform in pairs]
        errors = self._errors(warped)
        if mask is not None:
            errors = errors * mask
        average = self.config.avg_reprojection
        error = errors.mean(dim=1, keepdim=True) if average else errors.amin(dim=1, keepdim=True)  # equation 4
        automask = None
        if identity is not None:
            automask = ~(error >= identity)  # equation 5; not `<`: an error of NaN must reach the loss
            error = torch.where(automask, error, identity)
        return error.mean(), error.detach(), automask, torch.stack(warped, dim=1).detach() if panels else None


def reprojection_loss(
    prediction: Prediction,
    pyramids: Pyramids,
    intrinsics: Tensor | Mapping[int, Tensor],
    stereo: Tensor | None,
    config: LossConfig,
    *,
    min_depth: float = 0.1,
    max_depth: float = 100.0,
    noise: Noise = None,
    panels: bool = False,
    fast: bool = True,
) -> LossOutput:
    """The loss of one batch: minimum reprojection error, auto-mask and smoothness, averaged over the scales.

    Args:
        prediction: the networks' outputs. Its disparities set the scales, its poses the temporal sources.
        pyramids: images, as from `image_pyramid`; the stereo partner "s" is a source if it is among them.
        intrinsics: (B, 3, 3) at level 0, or level -> (B, 3, 3).
        stereo: (B, 4, 4), target camera to partner; needed with the source "s".
        config: the options.
        min_depth, max_depth: depth at disparity 1 and 0.
        noise: standard normal numbers; times 1e-5 they break ties between warped and unwarped sources. Seeds (B,) int64
            (`seeded_noise`, once for all scales of a resolution), (B, N, H, W) for all scales or scale -> (B, N, h, w);
            N is the number of sources, 1 with `avg_reprojection`. None: no noise.
        panels: also return images to look at.
        fast: the engine of `md2/photometric/`; False: `Reprojection` above.

    Raises:
        ValueError: no source, or no transform for the stereo partner.
    """
    sources: list[Offset] = [offset for offset in (*prediction.poses, "s") if offset in pyramids]
    if not sources:
        raise ValueError("no source to reproject: the pyramids hold neither a posed frame nor the stereo partner")
    if "s" in sources and stereo is None:
        raise ValueError('the source "s" needs the stereo transform')
    engine = reprojection.Reprojection if fast else Reprojection
    relative = any(pose.relative for pose in prediction.poses.values())

    def transforms(depth: Tensor | None) -> Tensor:
        found = [stereo if s == "s" else prediction.poses[s].transform(depth) for s in sources]
        return torch.stack([_full(transform) for transform in found if transform is not None], dim=1)

    with torch.autocast(prediction.tensors()[0].device.type, enabled=False):
        compare, K = {}, {}
        identity: dict[int, Tensor] = {}
        for level in sorted(prediction.disparities) if config.v1_multiscale else [0]:
            K[level] = intrinsics[level] if isinstance(intrinsics, Mapping) else scale_intrinsics(intrinsics, level)
            images = [_full(pyramids[source][level]) for source in sources]
            compare[level] = engine(_full(pyramids[0][level]), images, config)
            if not config.disable_automasking:
                scales = [level] if config.v1_multiscale else [*prediction.disparities]
                identity |= _least_identity(compare[level].identity_errors(), scales, noise, config.avg_reprojection)
        fixed = None if relative else transforms(None)
        per_scale, looks = {}, {}
        for scale, disparity in prediction.disparities.items():
            level = scale if config.v1_multiscale else 0
            size = pyramids[0][level].shape[2:]
            depth = disparity_to_depth(_resize(_full(disparity), size), min_depth, max_depth)
            T = transforms(depth) if fixed is None else fixed
            mask = _resize(_full(prediction.masks[scale]), size) if config.predictive_mask else None
            loss, error, automask, warped = compare[level](depth, _full(K[level]), T, identity.get(scale), mask, panels)
            if mask is not None:
                loss = loss + MASK_WEIGHT * F.binary_cross_entropy(mask, torch.ones_like(mask))
            compared_with = _full(disparity), pyramids[0][scale]
            smooth = reprojection.smoothness(*compared_with) if fast else None
            if smooth is None:
                smooth = smoothness(*compared_with)
            per_scale[scale] = loss + config.disparity_smoothness / 2**scale * smooth
            if warped is not None:
                by_source = dict(zip(sources, warped.unbind(1), strict=True))
                looks[scale] = Panels(by_source, error, automask, None if mask is None else mask.detach())
        total = torch.stack(list(per_scale.values())).mean()
    return LossOutput(total, per_scale, looks)


def velocity_error(poses: Mapping[Offset, Pose], distances: Mapping[Offset, Tensor]) -> Tensor:
    """| |t| - d |, the mean over samples and temporal frames, where t is the predicted translation and d the distance.

    Velocity supervision (Guizilini et al., "3D Packing for Self-Supervised Monocular Depth Estimation", CVPR 2020,
    equation 6), with the distance in place of speed x time.

    Args:
        distances: offset -> (B,), in the translation's unit; NaN where it is not known.
    """
    known = torch.stack([distances[offset] for offset in poses])
    lengths = torch.stack([_full(pose.translation).norm(dim=1) for pose in poses.values()])
    errors = torch.where(known.isnan(), 0, (lengths - known.nan_to_num()).abs())
    return errors.sum() / (~known.isnan()).sum().clamp(min=1)


def _least_identity(errors: Tensor, scales: list[int], noise: Noise, average: bool) -> dict[int, Tensor]:
    """Scale -> (B, 1, h, w), the least of a resolution's identity errors (B, N, h, w), ties broken by noise."""
    if average:
        errors = errors.mean(dim=1, keepdim=True)
    if isinstance(noise, Mapping):
        return {scale: (errors + NOISE_SCALE * noise[scale]).amin(dim=1, keepdim=True) for scale in scales}
    if noise is not None and noise.dim() == 1:
        noise = seeded_noise(noise, errors[0].shape)
    least = (errors if noise is None else errors + NOISE_SCALE * noise).amin(dim=1, keepdim=True)
    return dict.fromkeys(scales, least)


def seeded_noise(seeds: Tensor, shape: torch.Size) -> Tensor:
    """Standard normal numbers (B, *shape) of samples with these seeds (B,) int64, whatever else is in the batch.

    Each sample has a stretch of one fixed table, which begins where its seed says: one of a million places, the same
    on every device. Fresh numbers for 12 samples of 640x192 take a CPU 15 ms, these 1 ms.
    """
    table = _noise_table(shape.numel(), seeds.device)
    return table.unfold(0, shape.numel(), 1)[seeds % NOISE_STARTS].view(-1, *shape)


@lru_cache(maxsize=8)
def _noise_table(length: int, device: torch.device) -> Tensor:
    return torch.randn(NOISE_STARTS + length, generator=torch.Generator().manual_seed(0)).to(device)


class ReprojectionLoss:
    """`reprojection_loss` of batches, with a run's options."""

    def __init__(self, config: LossConfig, model: ModelConfig) -> None:
        self.config, self.min_depth, self.max_depth = config, model.min_depth, model.max_depth

    def __call__(
        self, batch: Batch, prediction: Prediction, *, noise: Noise = None, panels: bool = False
    ) -> LossOutput:
        """The loss of one batch; `noise` (default: by the batch's seeds) and `panels` as in `reprojection_loss`.

        A prediction on the CPU that is not finite gives NaN and no panels: torch's CPU sampler would turn a NaN
        coordinate into a wild index and end in a segmentation fault. A GPU's sampler checks its bounds, and asking
        there would make the host wait.
        """
        tensors = prediction.tensors()
        if tensors[0].device.type == "cpu" and not all(bool(tensor.isfinite().all()) for tensor in tensors):
            # It depends on every output, so that backward reaches each parameter on each rank.
            nan = torch.stack([tensor.float().sum() for tensor in tensors]).sum() * torch.nan
            return LossOutput(nan, dict.fromkeys(prediction.disparities, nan), {})
        if batch.poses:
            prediction = replace(prediction, poses={o: GivenPose(pose) for o, pose in batch.poses.items()})
        pyramids = image_pyramid(batch.images, prediction.disparities, self.config.v1_multiscale)
        intrinsics = batch.intrinsics
        if prediction.camera is not None:
            size = batch.images[0].shape[2:]
            intrinsics = matrices(prediction.camera, (size[0], size[1]), batch.flipped, batch.size, batch.windows)
        output = reprojection_loss(
            prediction,
            pyramids,
            intrinsics,
            batch.stereo,
            self.config,
            min_depth=self.min_depth,
            max_depth=self.max_depth,
            noise=batch.seeds if noise is None else noise,
            panels=panels,
        )
        if not batch.distances:
            return output
        poses = {offset: pose for offset, pose in prediction.poses.items() if isinstance(pose, Pose)}
        error = velocity_error(poses, batch.distances) * batch.metres_per_unit
        return replace(output, total=output.total + self.config.velocity * error)


def _resize(maps: Tensor, size: torch.Size) -> Tensor:
    if maps.shape[2:] == size:
        return maps
    return F.interpolate(maps, size, mode="bilinear", align_corners=False)


def _full(values: Tensor) -> Tensor:
    """float32 where autocast left less; float64 stays."""
    return values if values.dtype == torch.float64 else values.float()
