"""Camera geometry: disparity to depth, rigid transforms, back-projection, projection, warping.

Conventions: a camera looks along +z, with x to the right and y down. Pixel centres are at integer coordinates, so
the top-left pixel's centre is (0, 0) and the bottom-right one's (W - 1, H - 1). Intrinsics K are (B, 3, 3)
[[fx, 0, cx], [0, fy, cy], [0, 0, 1]] in pixels. A transform T is (B, 4, 4) and takes points in the target camera's
coordinates to the source camera's.

Source: Godard et al., "Digging Into Self-Supervised Monocular Depth Estimation", ICCV 2019, section 3.1.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

EPSILON = 1e-7
"""Added to a rotation's angle and to projected z before dividing."""


def disparity_to_depth(disparity: Tensor, min_depth: float, max_depth: float) -> Tensor:
    """Convert the sigmoid's output in [0, 1] to depth in [min_depth, max_depth], of the same shape (section 3.1).

    depth = 1 / (1/max + (1/min - 1/max) d), so 0 is the farthest.
    """
    nearest, farthest = 1 / min_depth, 1 / max_depth
    scaled: Tensor = farthest + (nearest - farthest) * disparity
    return torch.reciprocal(scaled)


def rotation_from_axis_angle(axis_angle: Tensor) -> Tensor:
    """Convert axis times angle in radians, (B, 3), to rotation matrices (B, 3, 3) by Rodrigues' formula.

    The axis is the vector divided by its norm + 1e-7, which gives the identity and finite gradients at zero.
    """
    angle = torch.linalg.vector_norm(axis_angle, dim=1, keepdim=True)
    axis = axis_angle / (angle + EPSILON)
    sin, cos = (values.unsqueeze(2) for values in (torch.sin(angle), torch.cos(angle)))
    outer = axis.unsqueeze(2) * axis.unsqueeze(1)
    identity = torch.eye(3, dtype=axis.dtype, device=axis.device).expand_as(outer)
    # Row by row: a row of the identity x the axis is that row of the matrix [axis]x, which takes v to axis x v.
    cross = torch.linalg.cross(identity, axis.unsqueeze(1).expand_as(outer))
    rotation: Tensor = cos * identity + (1 - cos) * outer + sin * cross
    return rotation


def transform_from_axis_angle(axis_angle: Tensor, translation: Tensor, invert: bool = False) -> Tensor:
    """Convert axis-angle (B, 3) and translation (B, 3) to a rigid transform (B, 4, 4), which rotates, then translates.

    `invert` gives the inverse motion: the negated translation, then the transposed rotation.
    """
    rotation = rotation_from_axis_angle(axis_angle)
    offset = translation.unsqueeze(2)
    if invert:
        rotation = rotation.transpose(1, 2)
        offset = -(rotation @ offset)
    # Not a tensor of constants: copying one to a GPU waits for everything that runs there.
    bottom = torch.eye(4, dtype=rotation.dtype, device=rotation.device)[3:].expand(rotation.shape[0], 1, 4)
    return torch.cat([torch.cat([rotation, offset], dim=2), bottom], dim=1)


def scale_intrinsics(K: Tensor, scale: int) -> Tensor:
    """Return the intrinsics (B, 3, 3) of images 2^scale times smaller: all four numbers divided by 2^scale.

    This is the official implementation's rule for `v1_multiscale` (which keeps K relative to the image's size). With
    pixel centres at integers the exact rule is cx' = (cx + 0.5) / 2^scale - 0.5. The difference is below half a pixel
    of the small image; for points at infinity it cancels between back-projection and projection.
    """
    return torch.cat([K[..., :2, :] * 0.5**scale, K[..., 2:, :]], dim=-2)


def pixel_axes(height: int, width: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return the coordinates of the pixel centres, x (1, W) and y (H, 1), with `like`'s dtype and device."""
    x = torch.arange(width, dtype=like.dtype, device=like.device).view(1, width)
    y = torch.arange(height, dtype=like.dtype, device=like.device).view(height, 1)
    return x, y


def backproject(depth: Tensor, K: Tensor) -> Tensor:
    """Back-project depth (B, 1, H, W) along z to points (B, 3, H, W) in the camera's coordinates, in depth's unit."""
    x, y = pixel_axes(depth.shape[2], depth.shape[3], depth)
    fx, fy, cx, cy = (K[:, i, j].view(-1, 1, 1) for i, j in ((0, 0), (1, 1), (0, 2), (1, 2)))
    z = depth[:, 0]
    return torch.stack([(x - cx) / fx * z, (y - cy) / fy * z, z], dim=1)


def project(points: Tensor, K: Tensor, T: Tensor) -> Tensor:
    """Project points (B, 3, H, W) in the target camera to pixels (B, H, W, 2), (x, y), of the source camera.

    Divides by z + 1e-7. Points behind the camera are projected by the same formula.
    """
    batch, _, height, width = points.shape
    projection = K @ T[:, :3]
    camera = projection[:, :, :3] @ points.flatten(2) + projection[:, :, 3:]
    pixels = camera[:, :2] / (camera[:, 2:] + EPSILON)
    return pixels.view(batch, 2, height, width).permute(0, 2, 3, 1)


def sample(image: Tensor, pixels: Tensor) -> Tensor:
    """Sample an image (B, C, h, w) bilinearly at pixels (B, H, W, 2): (B, C, H, W).

    Outside the image the value is the nearest border pixel's, with no gradient across the border.
    """
    height, width = image.shape[2:]
    size = pixels.new_tensor([max(width - 1, 1), max(height - 1, 1)])
    return F.grid_sample(image, pixels / size * 2 - 1, mode="bilinear", padding_mode="border", align_corners=True)


def warp(source: Tensor, depth: Tensor, K: Tensor, T: Tensor) -> Tensor:
    """Warp the source image (B, C, H, W) into the target camera, given the target's depth (B, 1, H, W).

    I_{s -> t} = I_s <proj(D_t, T_{t -> s}, K)> (equation 2). Differentiable in source, depth, K and T.
    """
    return sample(source, project(backproject(depth, K), K, T))
