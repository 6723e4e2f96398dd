"""What the networks hand to the loss: disparities, relative poses, predictive masks."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from md2.data.batch import Offset
from md2.geometry import transform_from_axis_angle


@dataclass(frozen=True)
class Pose:
    """Motion between the target and one source frame, as the pose network gives it.

    Attributes:
        axis_angle: (B, 3) radians.
        translation: (B, 3) in the depth's unit; relative to the depth where `relative` is set.
        invert: the network saw (source, target), because frames go in in temporal order; the transform is
            the inverse of the motion.
        relative: posecnn only (Wang et al., "Learning Depth from Monocular Videos using Direct Methods", CVPR
            2018): the translation is multiplied by the mean inverse depth of the image.
    """

    axis_angle: Tensor
    translation: Tensor
    invert: bool = False
    relative: bool = False

    def transform(self, depth: Tensor | None = None) -> Tensor:
        """(B, 4, 4), takes points in target-camera coordinates to the source's.

        `depth` (B, 1, H, W), the target's, is used only where the pose is `relative` (without it, the bare
        translation is).
        """
        translation = self.translation
        if self.relative and depth is not None:
            translation = translation * depth.reciprocal().mean(dim=(2, 3))
        return transform_from_axis_angle(self.axis_angle, translation, self.invert)


@dataclass(frozen=True)
class Prediction:
    """All outputs of the networks for one batch.

    Attributes:
        disparities: scale s -> (B, 1, H / 2^s, W / 2^s), sigmoid, in (0, 1).
        poses: temporal source offset -> pose. The stereo partner has none: its transform is known.
        masks: scale s -> (B, sources, H / 2^s, W / 2^s) in (0, 1), one channel per source in the order of
            the configuration, the stereo partner last. Empty unless `predictive_mask`.
    """

    disparities: dict[int, Tensor]
    poses: dict[Offset, Pose] = field(default_factory=dict)
    masks: dict[int, Tensor] = field(default_factory=dict)

    def tensors(self) -> list[Tensor]:
        """All of them."""
        motions = [part for pose in self.poses.values() for part in (pose.axis_angle, pose.translation)]
        return [*self.disparities.values(), *motions, *self.masks.values()]
