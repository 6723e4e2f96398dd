"""All networks of a run as one module: images in, `Prediction` out.

    networks = Networks(config.model, config.data, config.loss)
    prediction = networks(batch.augmented)

The children are named as official checkpoint files are: `encoder`, `depth`, `pose_encoder`, `pose`,
`predictive_mask`. Their state dicts have the official key names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from md2.config import DataConfig, LossConfig, ModelConfig
from md2.data.batch import Offset
from md2.networks.decoder import DepthDecoder
from md2.networks.pose import PoseCNN, PoseDecoder
from md2.networks.resnet import ResNetEncoder
from md2.networks.states import load_states
from md2.prediction import Pose, Prediction

__all__ = ["Networks", "Pose", "Prediction"]


class Networks(nn.Module):
    """Depth, pose and mask networks as the configuration asks for.

    With frames [0] and stereo there is no pose network: the stereo transform is known.

    Frames enter the pose network as the official implementation has them. `pairs`: target and one source in
    temporal order, the transform inverted for negative offsets. `all`: every temporal frame at once in the
    order of `frames`, one motion per source, none inverted.

    All pairs go through the pose network as one batch, while the official implementation runs one after the
    other. With frozen batch norm (and at inference) that is the same function. In training it means that
    the batch statistics are taken over all pairs together, and the running ones updated once per step.

    Args:
        model: which networks.
        data: its `frames` and `stereo` say which source images there are.
        loss: its `predictive_mask` adds the mask decoder.
    """

    def __init__(self, model: ModelConfig, data: DataConfig, loss: LossConfig) -> None:
        super().__init__()
        self.frames = list(data.frames)
        self.temporal = data.temporal
        self.sources: list[Offset] = [*self.temporal, "s"] if data.stereo else [*self.temporal]
        self.encoder_name = model.encoder
        self.pose_network = model.pose_network
        self.pairs = model.pose_input == "pairs"
        self.encoder = ResNetEncoder(model.encoder)
        self.depth = DepthDecoder(self.encoder.channels, model.scales)
        if self.temporal:
            self._add_pose_network(model)
        if loss.predictive_mask:
            self.predictive_mask = DepthDecoder(self.encoder.channels, model.scales, len(self.sources))

    def _add_pose_network(self, model: ModelConfig) -> None:
        images = 2 if self.pairs else len(self.frames)
        if model.pose_network == "posecnn":
            self.pose: nn.Module = PoseCNN(images)
        elif model.pose_network == "shared":
            self.pose = PoseDecoder(self.encoder.channels, inputs=images, motions=images - 1)
        else:
            self.pose_encoder = ResNetEncoder(model.encoder, images)
            # Two motions although a pair needs one: official checkpoints have 12 channels here.
            self.pose = PoseDecoder(self.pose_encoder.channels, inputs=1, motions=max(2, images - 1))

    def forward(self, augmented: Mapping[Offset, Tensor]) -> Prediction:
        """Offset -> images (B, 3, H, W) in [0, 1], H and W multiples of 32.

        The target and all temporal sources are needed; the stereo partner is not looked at.
        """
        features: dict[Offset, list[Tensor]]
        if self.temporal and self.pose_network == "shared":
            features = self._encode_all(augmented)
        else:
            features = {0: self.encoder(augmented[0])}
        disparities = self.depth(features[0])
        masks = self.predictive_mask(features[0]) if hasattr(self, "predictive_mask") else {}
        return Prediction(disparities, self._poses(augmented, features), masks)

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
        """Take over the state dicts of exactly these sub-networks; `where` goes into the message.

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
        if not self.temporal:
            return {}
        relative = self.pose_network == "posecnn"
        if self.pairs:
            # (first, second) in time: one row per source, stacked along the batch.
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
