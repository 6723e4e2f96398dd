"""Velocity supervision: Guizilini et al., "3D Packing for Self-Supervised Monocular Depth Estimation", CVPR 2020."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from md2.data.batch import Offset
from md2.model import GivenPose, Pose
from md2.photometric.inputs import full


def velocity_error(
    poses: Mapping[Offset, Pose] | Mapping[Offset, GivenPose], distances: Mapping[Offset, Tensor]
) -> Tensor:
    """| |t| - d |, the mean over samples and temporal frames, where t is a predicted translation and d the distance.

    Equation 6, with the distance in place of speed x time.

    Args:
        distances: offset -> (B,), in the translation's unit; NaN where it is not known.
    """
    predicted = {offset: full(pose.translation) for offset, pose in poses.items() if isinstance(pose, Pose)}
    known = torch.stack([distances[offset] for offset in predicted])
    lengths = torch.stack([translation.norm(dim=1) for translation in predicted.values()])
    errors = torch.where(known.isnan(), 0, (lengths - known.nan_to_num()).abs())
    return errors.sum() / (~known.isnan()).sum().clamp(min=1)
