"""The loss of Godard et al., "Digging Into Self-Supervised Monocular Depth Estimation", ICCV 2019, section 3.

    loss = ReprojectionLoss(config.loss, config.model)
    loss(batch, prediction).total.backward()

This is the method in plain operators, with the options of the official implementation. Training runs
`photometric.reprojection`, which computes the same in fewer passes over memory: `fast` is the switch, and tests hold
the two to equal values and gradients. All of it is float32 (float64 if the inputs are), whatever autocast says.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from md2.config import LossConfig, ModelConfig
from md2.data.batch import Batch
from md2.geometry import disparity_to_depth, scale_intrinsics, warp
from md2.model import GivenPose, Prediction
from md2.photometric import reprojection
from md2.photometric.inputs import Pyramids, camera_matrices, full, image_pyramid, resize
from md2.photometric.output import LossOutput, Panels, diverged
from md2.photometric.ssim import C1, C2, SSIM_WEIGHT
from md2.photometric.ties import Noise, least_identity
from md2.photometric.velocity import velocity_error

__all__ = ["LossOutput", "ReprojectionLoss", "image_pyramid", "reprojection_loss"]
MASK_WEIGHT = 0.2


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
        """Mean error of the sources, warped by depth (B, 1, H, W), K (B, 3, 3) and transforms (B, N, 4, 4).

        `identity` (B, 1, H, W) is the least identity error, for auto-masking, `mask` (B, N, H, W) the predictive mask.
        Returns the mean, the error and the auto-mask (B, 1, H, W), and the warped images (B, N, 3, H, W) if `panels`.
        """
        pairs = zip(self.sources, transforms.unbind(1), strict=True)
        warped = [warp(source, depth, K, transform) for source, transform in pairs]  # equation 2
        errors = self._errors(warped) if mask is None else self._errors(warped) * mask
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
    intrinsics: Tensor,
    stereo: Tensor | None,
    config: LossConfig,
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
        intrinsics, stereo: (B, 3, 3) at level 0; (B, 4, 4), target camera to partner, needed with the source "s".
        min_depth, max_depth: depth at disparity 1 and 0.
        noise, panels: breaks ties between warped and unwarped sources; also return images to look at.
        fast: the engine of `md2/photometric/`; False: `Reprojection` above.

    Raises:
        ValueError: no source, or no transform for the stereo partner.
    """
    sources = prediction.sources(pyramids, stereo)
    scales, T = list(prediction.disparities), None
    # Every scale is compared at full resolution (section 3.3), with `v1_multiscale` at its own.
    levels = {scale: [scale] for scale in scales} if config.v1_multiscale else {0: scales}
    per_scale, looks = {}, {}
    with torch.autocast(prediction.disparities[scales[0]].device.type, enabled=False):
        for level, at_level in levels.items():
            target, images = pyramids[0][level], [pyramids[source][level] for source in sources]
            K = scale_intrinsics(intrinsics, level)
            compare = (reprojection.Reprojection if fast else Reprojection)(target, images, config)
            identity = {}
            if not config.disable_automasking:
                identity = least_identity(compare.identity_errors(), at_level, noise, config.avg_reprojection)
            for scale in at_level:
                disparity = full(prediction.disparities[scale])
                depth = disparity_to_depth(resize(disparity, target), min_depth, max_depth)
                if T is None or prediction.relative:
                    T = prediction.transforms(sources, stereo, depth)
                mask = resize(full(prediction.masks[scale]), target) if config.predictive_mask else None
                loss, error, automask, warped = compare(depth, K, T, identity.get(scale), mask, panels)
                if mask is not None:
                    loss = loss + MASK_WEIGHT * F.binary_cross_entropy(mask, torch.ones_like(mask))
                    mask = mask.detach()
                smooth = reprojection.smoothness if fast and reprojection.has_kernels(disparity) else smoothness
                per_scale[scale] = loss + config.disparity_smoothness / 2**scale * smooth(disparity, pyramids[0][scale])
                if warped is not None:
                    looks[scale] = Panels(dict(zip(sources, warped.unbind(1), strict=True)), error, automask, mask)
    return LossOutput(torch.stack(list(per_scale.values())).mean(), per_scale, looks)


class ReprojectionLoss:
    """`reprojection_loss` of batches, with a run's options."""

    def __init__(self, config: LossConfig, model: ModelConfig) -> None:
        self.config, self.depths = config, (model.min_depth, model.max_depth)

    def __call__(self, batch: Batch, prediction: Prediction, panels: bool = False) -> LossOutput:
        """The loss of one batch, ties broken by its seeds; with the velocity error if it has distances."""
        if (failed := diverged(prediction)) is not None:
            return failed
        if batch.poses:
            prediction = replace(prediction, poses={o: GivenPose(pose) for o, pose in batch.poses.items()})
        pyramids = image_pyramid(batch.images, prediction.disparities, self.config.v1_multiscale)
        K = camera_matrices(batch, prediction.camera)
        output = reprojection_loss(
            prediction, pyramids, K, batch.stereo, self.config, *self.depths, noise=batch.seeds, panels=panels
        )
        if batch.distances:
            velocity = velocity_error(prediction.poses, batch.distances) * batch.metres_per_unit
            output = replace(output, total=output.total + self.config.velocity * velocity)
        return output
