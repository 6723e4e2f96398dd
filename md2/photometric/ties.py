"""The least identity error of each pixel, with noise that decides between images that fit equally well."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache

import torch
from torch import Tensor

Noise = Tensor | Mapping[int, Tensor] | None
"""Standard normal numbers: by seeds (B,) int64, once for all scales of a resolution, (B, N, H, W) for all scales, or
scale -> (B, N, h, w); N is the number of sources, 1 with `avg_reprojection`. None: no noise."""
NOISE_SCALE = 1e-5
NOISE_STARTS = 1 << 20


def least_identity(errors: Tensor, scales: Sequence[int], noise: Noise, average: bool) -> dict[int, Tensor]:
    """Scale -> (B, 1, h, w), the least (or mean, if `average`) of a resolution's identity errors (B, N, h, w)."""
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
