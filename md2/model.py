"""The networks of a run as one module: images in, `Prediction` out.

    networks = Networks.of(config)
    prediction = networks(batch.augmented)

The children are named as official checkpoint files are: `encoder`, `depth`, `pose_encoder`, `pose`,
`predictive_mask`. Their state dicts have the official key names. Learned intrinsics are one more child, `camera`.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from md2.config import Config, DataConfig, LossConfig, ModelConfig
from md2.data.batch import Offset
from md2.geometry import transform_from_axis_angle
from md2.networks.camera import LearnedCamera
from md2.networks.decoder import Conv3x3, DepthDecoder
from md2.networks.hrdepth import HRDepthDecoder
from md2.networks.pose import PoseCNN, PoseDecoder
from md2.networks.resnet import ResNetEncoder
from md2.networks.states import load_states
from md2.networks.timm_encoder import PREFIX, TimmEncoder


@dataclass(frozen=True)
class Pose:
    """Motion between the target and one source frame, as the pose network predicts it.

    Attributes:
        axis_angle: (B, 3) radians.
        translation: (B, 3) in the depth's unit, or relative to the depth.
        invert: the transform is the inverse of the motion: the network saw (source, target), in temporal order.
        relative: posecnn only (Wang et al., "Learning Depth from Monocular Videos using Direct Methods", CVPR
            2018): the translation is multiplied by the mean inverse depth of the image.
    """

    axis_angle: Tensor
    translation: Tensor
    invert: bool = False
    relative: bool = False

    def transform(self, depth: Tensor | None = None) -> Tensor:
        """(B, 4, 4), takes points in target-camera coordinates to the source's.

        `depth` (B, 1, H, W) of the target scales the translation of a `relative` pose; without it that stays as it is.
        """
        translation = self.translation
        if self.relative and depth is not None:
            translation = translation * depth.reciprocal().mean(dim=(2, 3))
        return transform_from_axis_angle(self.axis_angle, translation, self.invert)


@dataclass(frozen=True)
class GivenPose:
    """Motion between the target and one source frame, as the dataset has it: (B, 4, 4), in the depth's unit."""

    matrix: Tensor
    relative: ClassVar[bool] = False

    def transform(self, depth: Tensor | None = None) -> Tensor:
        """(B, 4, 4), takes points in target-camera coordinates to the source's."""
        return self.matrix


@dataclass(frozen=True)
class Prediction:
    """Outputs of the networks for one batch.

    Attributes:
        disparities: scale s -> (B, 1, H / 2^s, W / 2^s), sigmoid, in (0, 1).
        poses: temporal source offset -> pose; empty from the networks if poses are given. The stereo partner has none,
            since its transform is known.
        masks: scale s -> (B, sources, H / 2^s, W / 2^s) in (0, 1), one channel per source in the order of
            the configuration, the stereo partner last. Empty unless `predictive_mask`.
        camera: (4,), the learned intrinsics as shares of the image's size (`LearnedCamera`); None unless learned.
    """

    disparities: dict[int, Tensor]
    poses: dict[Offset, Pose] | dict[Offset, GivenPose] = field(default_factory=dict)
    masks: dict[int, Tensor] = field(default_factory=dict)
    camera: Tensor | None = None

    @property
    def relative(self) -> bool:
        """Whether a pose's transform depends on the depth."""
        return any(pose.relative for pose in self.poses.values())

    def sources(self, images: Container[Offset], stereo: Tensor | None) -> list[Offset]:
        """Offsets that are compared with the target, of images at hand: those with a pose, then the stereo partner.

        Raises:
            ValueError: there is none, or the stereo partner has no transform.
        """
        found: list[Offset] = [offset for offset in (*self.poses, "s") if offset in images]
        if not found:
            raise ValueError("no source to reproject: the images hold neither a posed frame nor the stereo partner")
        if "s" in found and stereo is None:
            raise ValueError('the source "s" needs the stereo transform')
        return found

    def transforms(self, sources: Sequence[Offset], stereo: Tensor | None, depth: Tensor) -> Tensor:
        """(B, N, 4, 4), target camera to each source's; `depth` (B, 1, H, W) as for a pose, `stereo` the partner's."""
        found = [stereo if source == "s" else self.poses[source].transform(depth) for source in sources]
        return torch.stack([transform.to(depth.dtype) for transform in found if transform is not None], dim=1)

    def tensors(self) -> list[Tensor]:
        """All tensors in it."""
        learned = [pose for pose in self.poses.values() if isinstance(pose, Pose)]
        motions = [part for pose in learned for part in (pose.axis_angle, pose.translation)]
        camera = [] if self.camera is None else [self.camera]
        return [*self.disparities.values(), *motions, *self.masks.values(), *camera]


class Networks(nn.Module):
    """Depth, pose and mask networks as configured.

    Frames [0] with stereo need no pose network, since the stereo transform is known.

    Frames enter the pose network as in the official implementation. `pairs`: target and one source in temporal
    order, the transform inverted for negative offsets. `all`: every temporal frame at once in the order of
    `frames`, one motion per source, none inverted.

    All pairs form one batch of the pose network; the official implementation runs them one after the other. With
    batch norm's running statistics (inference) the two are the same function. In training, batch statistics are
    taken over all pairs together, and the running ones are updated once per step.

    Args:
        model: which networks.
        data: `frames` and `stereo` set the source images; `intrinsics: learned` adds the camera.
        loss: `predictive_mask` adds the mask decoder.
        pose: False leaves out the pose network, because poses are given.

    Raises:
        UsageError: a timm encoder that is not to be had.
    """

    def __init__(self, model: ModelConfig, data: DataConfig, loss: LossConfig, *, pose: bool = True) -> None:
        super().__init__()
        self.frames = list(data.frames)
        self.temporal = data.temporal
        self.sources: list[Offset] = [*self.temporal, "s"] if data.stereo else [*self.temporal]
        self.pose_network = model.pose_network
        self.pairs = model.pose_input == "pairs"
        self.size = (data.height, data.width)
        self.encoder = self._encoder(model.encoder)
        decoder = HRDepthDecoder if model.decoder == "hrdepth" else DepthDecoder
        self.depth = decoder(self.encoder.channels, model.scales)
        self.learns_poses = bool(self.temporal) and pose
        if self.learns_poses:
            self._add_pose_network(model)
        if loss.predictive_mask:
            self.predictive_mask = DepthDecoder(self.encoder.channels, model.scales, len(self.sources))
        self.camera = LearnedCamera(data.width, data.height, data.fov) if data.intrinsics == "learned" else None
        if model.start is not None:
            self._begin(model, *(metres / data.metres_per_unit for metres in model.start))

    @classmethod
    def of(cls, config: Config) -> Networks:
        """The networks of a run's configuration."""
        return cls(config.model, config.data, config.loss, pose=config.train.poses == "learned")

    def _encoder(self, name: str, images: int = 1) -> ResNetEncoder | TimmEncoder:
        return TimmEncoder(name, self.size, images) if name.startswith(PREFIX) else ResNetEncoder(name, images)

    @property
    def encoders(self) -> dict[str, ResNetEncoder | TimmEncoder]:
        """The sub-networks that are encoders."""
        return {name: one for name, one in self.named_children() if isinstance(one, (ResNetEncoder, TimmEncoder))}

    def _add_pose_network(self, model: ModelConfig) -> None:
        images = 2 if self.pairs else len(self.frames)
        if model.pose_network == "posecnn":
            self.pose: nn.Module = PoseCNN(images)
        elif model.pose_network == "shared":
            self.pose = PoseDecoder(self.encoder.channels, inputs=images, motions=images - 1)
        else:
            self.pose_encoder = self._encoder(model.pose_encoder_name, images)
            # Two motions although a pair needs one: official checkpoints have 12 channels here.
            self.pose = PoseDecoder(self.pose_encoder.channels, inputs=1, motions=max(2, images - 1))

    def _begin(self, model: ModelConfig, depth: float, forward: float) -> None:
        """Set the last biases, so that random weights see about this depth and motion."""
        for layer in self.depth.modules():
            if isinstance(layer, Conv3x3) and layer.full:
                layer.begin((1 / depth - 1 / model.max_depth) / (1 / model.min_depth - 1 / model.max_depth))
        if self.learns_poses and isinstance(self.pose, PoseDecoder):
            # Points come closer. A pair's frames are in order of time; of all frames, the target is the first.
            self.pose.begin([-forward] if self.pairs else [-forward * offset for offset in self.temporal])

    def hold_camera(self, held: bool) -> None:
        """Keep learned intrinsics, if there are any, as they are while `held`."""
        if self.camera is not None:
            self.camera.hold(held)

    def drop_poses(self) -> None:
        """Remove the pose network: depth alone is predicted from here on."""
        for name in ("pose_encoder", "pose"):
            if hasattr(self, name):
                delattr(self, name)
        self.frames, self.temporal, self.learns_poses = [0], [], False

    def forward(self, augmented: Mapping[Offset, Tensor]) -> Prediction:
        """Offset -> images (B, 3, H, W) in [0, 1], H and W multiples of 32.

        The target and all temporal sources are needed; the stereo partner is ignored.
        """
        features: dict[Offset, list[Tensor]]
        if self.learns_poses and self.pose_network == "shared":
            features = self._encode_all(augmented)
        else:
            features = {0: self.encoder(augmented[0])}
        disparities = self.depth(features[0])
        masks = self.predictive_mask(features[0]) if hasattr(self, "predictive_mask") else {}
        camera = None if self.camera is None else self.camera()
        return Prediction(disparities, self._poses(augmented, features), masks, camera)

    def disparities(self, images: Tensor) -> dict[int, Tensor]:
        """Depth network alone: images (B, 3, H, W) -> scale s -> disparity (B, 1, H / 2^s, W / 2^s)."""
        disparities: dict[int, Tensor] = self.depth(self.encoder(images))
        return disparities

    def poses(self, images: Mapping[Offset, Tensor]) -> dict[Offset, Pose]:
        """Pose network alone, for odometry: offset -> images (B, 3, H, W), the target and all sources."""
        features = self._encode_all(images) if self.pose_network == "shared" else {}
        return self._poses(images, features)

    def state_dicts(self) -> dict[str, dict[str, Tensor]]:
        """Sub-network name -> its state dict, under the official key names."""
        return {name: child.state_dict() for name, child in self.named_children()}

    def load_networks(self, states: Mapping[str, Mapping[str, Tensor]], where: str = "checkpoint") -> None:
        """Load the state dicts of exactly these sub-networks; `where` goes into the message.

        Raises:
            InputError: a sub-network or key is missing or extra, or a shape differs; all by name.
        """
        load_states(self, states, where)

    def _encode_all(self, images: Mapping[Offset, Tensor]) -> dict[Offset, list[Tensor]]:
        """Features of every temporal frame, from one pass of the depth encoder."""
        stacked = self.encoder(torch.cat([images[offset] for offset in self.frames]))
        split = [feature.chunk(len(self.frames)) for feature in stacked]
        return {offset: [feature[i] for feature in split] for i, offset in enumerate(self.frames)}

    def _poses(self, images: Mapping[Offset, Tensor], features: Mapping[Offset, list[Tensor]]) -> dict[Offset, Pose]:
        if not self.learns_poses:
            return {}
        relative = self.pose_network == "posecnn"
        if self.pairs:
            # (first, second) in time; the sources are stacked along the batch.
            order = [(offset, 0) if offset < 0 else (0, offset) for offset in self.temporal]
            motions = self._motions(images, features, order).chunk(len(self.temporal))
            rows = [(offset, motion[:, 0], offset < 0) for offset, motion in zip(self.temporal, motions, strict=True)]
        else:
            motion = self._motions(images, features, [tuple(self.frames)])
            rows = [(offset, motion[:, i], False) for i, offset in enumerate(self.temporal)]
        return {offset: Pose(row[:, :3], row[:, 3:], invert, relative) for offset, row, invert in rows}

    def _motions(
        self,
        images: Mapping[Offset, Tensor],
        features: Mapping[Offset, list[Tensor]],
        groups: Sequence[tuple[int, ...]],
    ) -> Tensor:
        """Motions (len(groups) * B, n, 6) of groups of frames, all in one pass."""
        if self.pose_network == "shared":
            positions = range(len(groups[0]))
            deepest = [torch.cat([features[group[i]][-1] for group in groups]) for i in positions]
            motions: Tensor = self.pose(deepest)
            return motions
        stacked = torch.cat([torch.cat([images[offset] for offset in group], dim=1) for group in groups])
        motions = self.pose(stacked if self.pose_network == "posecnn" else [self.pose_encoder(stacked)[-1]])
        return motions
