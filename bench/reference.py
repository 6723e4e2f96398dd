"""The baseline of `step.py`: the same method, written straight down from its equations.

Everything is computed where an equation mentions it: the unwarped sources' error again at every scale, SSIM by
five average pools for every pair of images, each temporal pair through the pose network by itself, each
source warped by itself. Autograd keeps what it likes. `step.py` checks that loss and gradients equal md2's, the tests
that they do with every option.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from md2.config import LossConfig
from md2.data.batch import Offset
from md2.model import Networks, Pose, Prediction


def predict(networks: Networks, images: Mapping[Offset, Tensor]) -> Prediction:
    """Forward pass of depth and (separate, pairwise) pose networks, a pair at a time."""
    disparities = networks.depth(networks.encoder(images[0]))
    poses: dict[Offset, Pose] = {}
    for offset in networks.temporal:
        pair = [images[offset], images[0]] if offset < 0 else [images[0], images[offset]]
        motion = networks.pose([networks.pose_encoder(torch.cat(pair, dim=1))[-1]])
        poses[offset] = Pose(motion[:, 0, :3], motion[:, 0, 3:], invert=offset < 0)
    return Prediction(disparities, poses)


def ssim_error(x: Tensor, y: Tensor) -> Tensor:
    """clamp((1 - SSIM) / 2, 0, 1), five average pools."""
    x, y = F.pad(x, (1, 1, 1, 1), mode="reflect"), F.pad(y, (1, 1, 1, 1), mode="reflect")
    mean_x, mean_y = F.avg_pool2d(x, 3, 1), F.avg_pool2d(y, 3, 1)
    variance_x = F.avg_pool2d(x**2, 3, 1) - mean_x**2
    variance_y = F.avg_pool2d(y**2, 3, 1) - mean_y**2
    covariance = F.avg_pool2d(x * y, 3, 1) - mean_x * mean_y
    numerator = (2 * mean_x * mean_y + 0.01**2) * (2 * covariance + 0.03**2)
    denominator = (mean_x**2 + mean_y**2 + 0.01**2) * (variance_x + variance_y + 0.03**2)
    return torch.clamp((1 - numerator / denominator) / 2, 0, 1)


def photometric(image: Tensor, target: Tensor, no_ssim: bool = False) -> Tensor:
    """0.85 SSIM error + 0.15 L1, or L1 alone, (B, 1, H, W)."""
    difference = (target - image).abs().mean(1, keepdim=True)
    return difference if no_ssim else 0.85 * ssim_error(image, target).mean(1, keepdim=True) + 0.15 * difference


def warp(source: Tensor, depth: Tensor, K: Tensor, T: Tensor) -> Tensor:
    """The source as seen from the target, by homogeneous coordinates and matrix products."""
    batch, _, height, width = depth.shape
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    pixels = torch.stack([x, y, torch.ones_like(x)]).flatten(1).to(depth)
    points = depth.flatten(2) * (torch.inverse(K) @ pixels)
    points = torch.cat([points, torch.ones(batch, 1, height * width).to(depth)], dim=1)
    camera = (K @ T[:, :3]) @ points
    projected = (camera[:, :2] / (camera[:, 2:] + 1e-7)).view(batch, 2, height, width).permute(0, 2, 3, 1)
    grid = (projected / torch.tensor([width - 1, height - 1]).to(depth) - 0.5) * 2
    return F.grid_sample(source, grid, padding_mode="border", align_corners=True)


def smoothness(disparity: Tensor, image: Tensor) -> Tensor:
    """Edge-aware smoothness of the mean-normalised disparity."""
    disparity = disparity / (disparity.mean(2, True).mean(3, True) + 1e-7)
    step_x = (disparity[:, :, :, :-1] - disparity[:, :, :, 1:]).abs()
    step_y = (disparity[:, :, :-1] - disparity[:, :, 1:]).abs()
    edge_x = (image[:, :, :, :-1] - image[:, :, :, 1:]).abs().mean(1, keepdim=True)
    edge_y = (image[:, :, :-1] - image[:, :, 1:]).abs().mean(1, keepdim=True)
    return (step_x * torch.exp(-edge_x)).mean() + (step_y * torch.exp(-edge_y)).mean()


def loss(
    prediction: Prediction,
    pyramids: Mapping[Offset, Mapping[int, Tensor]],
    K: Tensor,
    stereo: Tensor | None,
    noise: Tensor | Mapping[int, Tensor] | None,
    config: LossConfig | None = None,
) -> Tensor:
    """Total loss; by default minimum over sources, auto-mask, SSIM, full-resolution warping.

    `pyramids`: offset -> level -> image. `noise` (B, sources, H, W) standard normal is used at every scale, or at the
    scale that it is given for; None draws it anew at each.
    """
    config = config or LossConfig()
    sources = [*prediction.poses]
    if stereo is not None:
        sources.append("s")
    total = K.new_zeros(())
    for scale, disparity in prediction.disparities.items():
        level = scale if config.v1_multiscale else 0
        target = pyramids[0][level]
        shrunk = torch.cat([K[:, :2] / 2**level, K[:, 2:]], dim=1)
        full = F.interpolate(disparity, target.shape[2:], mode="bilinear", align_corners=False)
        depth = 1 / (1 / 100 + (1 / 0.1 - 1 / 100) * full)
        warped, unwarped = [], []
        for source in sources:
            T = stereo if source == "s" else prediction.poses[source].transform(depth)
            assert T is not None
            image = pyramids[source][level]
            warped.append(photometric(warp(image, depth, shrunk, T), target, config.no_ssim))
            unwarped.append(photometric(image, target, config.no_ssim))
        errors, entropy = torch.cat(warped, dim=1), K.new_zeros(())
        if config.predictive_mask:
            mask = F.interpolate(prediction.masks[scale], target.shape[2:], mode="bilinear", align_corners=False)
            errors, entropy = errors * mask, -mask.log().mean()
        identity = torch.cat(unwarped, dim=1)
        if config.avg_reprojection:
            errors, identity = errors.mean(1, keepdim=True), identity.mean(1, keepdim=True)
        if not config.disable_automasking:
            given = noise[scale] if isinstance(noise, Mapping) else noise
            identity = identity + 1e-5 * (torch.randn_like(identity) if given is None else given)
            errors = torch.cat([identity, errors], dim=1)
        smooth = config.disparity_smoothness / 2**scale * smoothness(disparity, pyramids[0][scale])
        total = total + errors.min(dim=1)[0].mean() + 0.2 * entropy + smooth
    return total / len(prediction.disparities)
