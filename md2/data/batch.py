"""The batch: what the pipeline hands to the networks and the loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from shards.sample import Offset

__all__ = ["Batch", "Offset"]


@dataclass(frozen=True)
class Batch:
    """One batch on its device.

    Attributes:
        images: offset -> (B, 3, H, W) float32 in [0, 1], flipped where the coin said so. The loss
            compares these.
        augmented: the same with colour jitter (one draw per sample, all its frames alike). The
            networks see these. The same tensors as `images` where jitter is off.
        intrinsics: (B, 3, 3) float32 in pixels of (H, W), pixel centres at integers.
        stereo: (B, 4, 4) float32, takes points in target-camera coordinates to the stereo partner's;
            its x translation is in units of `metres_per_unit` metres. None without a partner.
        metres_per_unit: metres in one unit of `stereo`'s translation (5.4 for the paper's unit, 1
            for metres).
        depth: (B, 1, h, w) float32 metres at native resolution, 0 = no measurement, zero-padded at the
            right and the bottom to the largest of the batch. None unless asked for.
        depth_size: (B, 2) int64, height and width of each sample's depth before padding.
        keys: the samples' keys, for messages.
        seeds: (B,) int64, drawn for each sample by the run's seed and the epoch, for the loss's noise. None: no noise.
        flipped: (B,) bool, which samples are mirrored; None: none.
        windows: (B, 4) float32, left, top, width and height of what `images` show, as shares of the whole image as it
            is after the flip. None: all of it.
        distances: temporal offset -> (B,) distance from the target's camera to that frame's, in units of
            `metres_per_unit` metres, NaN if unknown. Empty unless asked for, as is
        poses: temporal offset -> (B, 4, 4), takes points in target-camera coordinates to that frame's.
    """

    images: dict[Offset, Tensor]
    augmented: dict[Offset, Tensor]
    intrinsics: Tensor
    stereo: Tensor | None
    metres_per_unit: float
    depth: Tensor | None
    depth_size: Tensor | None
    keys: list[str]
    seeds: Tensor | None = None
    flipped: Tensor | None = None
    windows: Tensor | None = None
    distances: dict[Offset, Tensor] = field(default_factory=dict)
    poses: dict[Offset, Tensor] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Number of samples."""
        return self.intrinsics.shape[0]

    def map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """The batch with each tensor replaced."""
        return Batch(**tree_map_only(Tensor, change, {field.name: getattr(self, field.name) for field in fields(self)}))

    def use_when(self, ready: torch.cuda.Event) -> None:
        """Let the current CUDA stream wait for another one that makes this batch, and keep its memory from that one."""
        stream = torch.cuda.current_stream()
        stream.wait_event(ready)

        def keep(tensor: Tensor) -> Tensor:
            if tensor.is_cuda:
                tensor.record_stream(stream)
            return tensor

        self.map(keep)
