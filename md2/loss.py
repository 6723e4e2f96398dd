"""The self-supervised loss: per-pixel reprojection error over the sources, and edge-aware smoothness.

    loss = ReprojectionLoss(config.loss, config.model)
    loss(batch, prediction, noise=generator).total.backward()

`reprojection_loss` is the same with everything given from outside: image pyramids, intrinsics, noise.

Source: Godard et al., ICCV 2019, section 3; the options are the ones of its official implementation. What
does not depend on the scale is computed once: the unwarped sources' error, the target's window statistics,
the stacking of the sources. `reprojection.py` does the rest. Everything is float32 (or
float64, if the inputs are), whatever autocast is on.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from md2.config import LossConfig, ModelConfig
from md2.data.batch import Batch, Offset
from md2.geometry import disparity_to_depth, scale_intrinsics
from md2.photometric.reprojection import PixelMap, Rule, Views, pixel_map, planar, reproject, unwarped_error
from md2.photometric.ssim import Target
from md2.prediction import Prediction

Pyramids = Mapping[Offset, Mapping[int, Tensor]]
"""Offset -> level s -> image (B, 3, H / 2^s, W / 2^s) in [0, 1]."""

Noise = torch.Generator | Tensor | Mapping[int, Tensor] | None
"""Where ties between auto-mask and reprojection are broken, see `reprojection_loss`."""

NOISE_SCALE = 1e-5
MASK_WEIGHT = 0.2


@dataclass(frozen=True)
class Panels:
    """What one scale's loss looked at, without gradients.

    Attributes:
        warped: source -> (B, 3, h, w), the source as seen from the target.
        error: (B, 1, h, w), what the mean was taken over: the minimum over sources (and unwarped sources).
        automask: (B, 1, h, w) bool, true where a warped source won over all unwarped ones and the pixel
            counts. None with `disable_automasking`.
        mask: (B, sources, h, w), the predictive mask, what each source's error was multiplied with; in [0, 1], or None.
    """

    warped: dict[Offset, Tensor]
    error: Tensor
    automask: Tensor | None
    mask: Tensor | None = None


@dataclass(frozen=True)
class LossOutput:
    """Attributes:
    total: scalar, the mean of `per_scale`.
    per_scale: scale -> scalar: reprojection, plus the mask's cross-entropy, plus weighted smoothness.
    panels: scale -> panels, empty unless asked for.
    """

    total: Tensor
    per_scale: dict[int, Tensor]
    panels: dict[int, Panels]


def image_pyramid(images: Mapping[Offset, Tensor], scales: Iterable[int], v1_multiscale: bool = False) -> Pyramids:
    """Images (B, 3, H, W) and their halvings, each the mean of 2x2 pixels of the level before.

    Level 0 of every image, and the levels in `scales` of the target, for smoothness; with `v1_multiscale`
    of every image. (The official implementation resizes on the CPU with Pillow's antialiasing filter; to
    compare numbers with it, give the loss its images.)
    """
    wanted = {0, *scales}
    pyramids: dict[Offset, dict[int, Tensor]] = {}
    for offset, image in images.items():
        levels = {0: image}
        for level in range(1, max(wanted) + 1 if offset == 0 or v1_multiscale else 1):
            levels[level] = F.avg_pool2d(levels[level - 1], 2)
        pyramids[offset] = {level: levels[level] for level in levels if level in wanted}
    return pyramids


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


class _Level(NamedTuple):
    """All that one resolution's reprojection needs and that no disparity scale changes."""

    views: Views
    K: Tensor
    identity: Tensor | None
    """(B, N, h, w), error of the unwarped sources, or (B, 1, h, w) with avg_reprojection."""
    maps: PixelMap | None
    """Where the sources are; None if that hangs on each scale's depth (posecnn)."""


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
) -> LossOutput:
    """The loss of one batch. The scales are the prediction's; the sources its poses', then the stereo partner if there.

    Args:
        prediction: the networks' outputs. Each temporal source needs a pose, "s" the `stereo` transform.
        pyramids: images; `image_pyramid` says which levels are needed.
        intrinsics: (B, 3, 3) at level 0 (`v1_multiscale` derives the others by `scale_intrinsics`), or
            level -> (B, 3, 3).
        stereo: (B, 4, 4), target-camera to partner; only with the source "s".
        config: the options.
        min_depth, max_depth: range of depth that disparity 1 and 0 stand for.
        noise: standard normal numbers, times 1e-5, are added to the error of the unwarped sources, so
            that they do not always win where nothing differs. Drawn from a generator (one draw for all
            scales of a resolution), or given: (B, N, H, W) for all scales or scale -> (B, N, h, w), N the
            number of sources, 1 with avg_reprojection. None: none.
        panels: also return images to look at.
    """
    pose_sources = [offset for offset in prediction.poses if offset in pyramids]
    sources: list[Offset] = [*pose_sources, "s"] if "s" in pyramids else pose_sources
    if not sources:
        raise ValueError("no source to reproject: the pyramids hold neither a posed frame nor the stereo partner")
    context = _Context(prediction, pyramids, intrinsics, stereo, sources, config, (min_depth, max_depth), panels)
    with torch.autocast(next(iter(prediction.disparities.values())).device.type, enabled=False):
        levels = {size: context.level(size) for size in ({*prediction.disparities} if config.v1_multiscale else {0})}
        if isinstance(noise, torch.Generator):
            drawn = {size: _draw(level, noise) for size, level in sorted(levels.items())}
            noise = {scale: drawn[scale if config.v1_multiscale else 0] for scale in prediction.disparities}
        per_scale, looks = {}, {}
        for scale, disparity in prediction.disparities.items():
            given = noise[scale] if isinstance(noise, Mapping) else noise
            loss, look = context.scale_loss(scale, levels[scale if config.v1_multiscale else 0], given)
            smooth = smoothness(_full(disparity), pyramids[0][scale])
            per_scale[scale] = loss + config.disparity_smoothness / 2**scale * smooth
            if look is not None:
                looks[scale] = look
        total = torch.stack(list(per_scale.values())).mean()
    return LossOutput(total, per_scale, looks)


class ReprojectionLoss:
    """`reprojection_loss` on batches, with a run's options."""

    def __init__(self, config: LossConfig, model: ModelConfig) -> None:
        self.config, self.min_depth, self.max_depth = config, model.min_depth, model.max_depth

    def __call__(
        self, batch: Batch, prediction: Prediction, *, noise: Noise = None, panels: bool = False
    ) -> LossOutput:
        """The loss of one batch; `noise` and `panels` as in `reprojection_loss`.

        NaN, and no panels, where a prediction is not finite on the CPU.
        """
        if not _usable(prediction):
            return _not_finite(prediction)
        pyramids = image_pyramid(batch.images, prediction.disparities, self.config.v1_multiscale)
        return reprojection_loss(
            prediction,
            pyramids,
            batch.intrinsics,
            batch.stereo,
            self.config,
            min_depth=self.min_depth,
            max_depth=self.max_depth,
            noise=noise,
            panels=panels,
        )


def _usable(prediction: Prediction) -> bool:
    """Whether the sampler can take the prediction.

    torch's CPU grid_sample turns a NaN coordinate into a wild index, and its backward pass writes there:
    a diverged run would end in a segmentation fault. On the GPU it is bounds-checked, and asking would
    make the host wait.
    """
    tensors = prediction.tensors()
    return tensors[0].device.type != "cpu" or all(bool(tensor.isfinite().all()) for tensor in tensors)


def _not_finite(prediction: Prediction) -> LossOutput:
    """A loss of NaN that still hangs on every output, so that backward reaches each parameter on each rank."""
    nan = torch.stack([tensor.float().sum() for tensor in prediction.tensors()]).sum() * torch.nan
    return LossOutput(nan, dict.fromkeys(prediction.disparities, nan), {})


def _draw(level: _Level, generator: torch.Generator) -> Tensor:
    """One tie-break draw for a resolution; on the generator's device, so that a seed means one thing."""
    if level.identity is None:
        return level.K.new_zeros(())
    draw = torch.randn(level.identity.shape, generator=generator, device=generator.device)
    return draw.to(level.identity.device)


@dataclass(frozen=True)
class _Context:
    """The arguments of `reprojection_loss`, for the steps below."""

    prediction: Prediction
    pyramids: Pyramids
    intrinsics: Tensor | Mapping[int, Tensor]
    stereo: Tensor | None
    sources: list[Offset]
    config: LossConfig
    depths: tuple[float, float]
    panels: bool

    def level(self, size: int) -> _Level:
        if isinstance(self.intrinsics, Tensor):
            K = scale_intrinsics(self.intrinsics, size) if size else self.intrinsics
        else:
            K = self.intrinsics[size]
        target = Target.of(planar(_full(self.pyramids[0][size])))
        images = planar(torch.stack([_full(self.pyramids[source][size]) for source in self.sources], dim=1))
        identity = None
        if not self.config.disable_automasking:
            identity = unwarped_error(images, target, self.config.no_ssim)
            if self.config.avg_reprojection:
                identity = identity.mean(dim=1, keepdim=True)
        K, views = _full(K), Views(target, images)
        maps = None if self.fixed is None else pixel_map(K, self.fixed, _size(images))
        return _Level(views, K, identity, maps)

    def scale_loss(self, scale: int, level: _Level, noise: Tensor | None) -> tuple[Tensor, Panels | None]:
        """Reprojection part of one scale's loss."""
        height, width = _size(level.views.sources)
        depth = disparity_to_depth(_resize(_full(self.prediction.disparities[scale]), height, width), *self.depths)
        maps = level.maps or pixel_map(level.K, self.transforms(depth), (height, width))
        unwarped = None
        if level.identity is not None:
            identity = level.identity if noise is None else level.identity + NOISE_SCALE * noise
            unwarped = identity.amin(dim=1, keepdim=True)
        mask, entropy = None, depth.new_zeros(())
        if self.config.predictive_mask:
            mask = _resize(_full(self.prediction.masks[scale]), height, width)
            entropy = F.binary_cross_entropy(mask, torch.ones_like(mask))
        rule = Rule(self.config.no_ssim, self.config.avg_reprojection)
        outcome = reproject(level.views, depth, maps, rule, unwarped=unwarped, mask=mask, keep_warped=self.panels)
        look = None
        if outcome.warped is not None:
            warped = dict(zip(self.sources, outcome.warped.unbind(1), strict=True))
            look = Panels(warped, outcome.error, outcome.automask, None if mask is None else mask.detach())
        return outcome.loss + MASK_WEIGHT * entropy, look

    @cached_property
    def fixed(self) -> Tensor | None:
        """The transforms, if no pose is relative to the depth."""
        relative = any(self.prediction.poses[source].relative for source in self.sources if source != "s")
        return None if relative else self.transforms(None)

    def transforms(self, depth: Tensor | None) -> Tensor:
        """(B, N, 4, 4), target camera to each source's."""
        return torch.stack([self.transform(source, depth) for source in self.sources], dim=1)

    def transform(self, source: Offset, depth: Tensor | None) -> Tensor:
        if source != "s":
            return _full(self.prediction.poses[source].transform(depth))
        if self.stereo is None:
            raise ValueError('the source "s" needs the stereo transform')
        return _full(self.stereo)


def _size(images: Tensor) -> tuple[int, int]:
    """Height and width."""
    return images.shape[-2], images.shape[-1]


def _resize(maps: Tensor, height: int, width: int) -> Tensor:
    if maps.shape[2:] == (height, width):
        return maps
    return F.interpolate(maps, (height, width), mode="bilinear", align_corners=False)


def _full(values: Tensor) -> Tensor:
    """float32 where autocast left less; float64 stays."""
    return values if values.dtype == torch.float64 else values.float()
