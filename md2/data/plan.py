"""What a loader reads of each sample, checked against the dataset's manifest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from md2.config import DataConfig
from shards.dataset import LocalDataset
from shards.errors import UsageError
from shards.manifest import Manifest
from shards.sample import DEPTH, INTRINSICS, POSES, STEREO_TRANSLATION, Offset, ppm_header


@dataclass(frozen=True)
class ReadPlan:
    """What a loader reads of each sample; the same on every rank and device.

    Attributes:
        offsets: images to decode; `images` are their components, in the same order.
        stereo: read the stereo translation.
        depth: `always` and `sometimes` (not in every sample), or None.
        stored: width and height of the stored images, None if it differs from sample to sample.
        size: width and height of the batch's images.
        header: what the file of each image begins with if it is `uncompressed`, else nothing.
        flip, jitter: draw them.
        crop: draw windows of this least and largest share of the images, which are decoded whole; None: none.
        motion: components that say how the camera moves, and how many numbers each has; NaN where a sample lacks one.
    """

    offsets: tuple[Offset, ...]
    images: tuple[str, ...]
    stereo: bool
    depth: Literal["always", "sometimes"] | None
    stored: tuple[int, int] | None
    size: tuple[int, int]
    header: bytes
    flip: bool
    jitter: bool
    crop: tuple[float, float] | None = None
    motion: dict[str, int] = field(default_factory=dict)

    @property
    def uncompressed(self) -> bool:
        """Whether the pixels follow a header as they are, at the batch's size: they need no decoder."""
        return bool(self.header)

    @property
    def numbers(self) -> dict[str, int]:
        """Components that are float32 numbers, and how many of them."""
        return {INTRINSICS: 4, **({STEREO_TRANSLATION: 1} if self.stereo else {}), **self.motion}

    @property
    def outputs(self) -> list[str]:
        """Names of the graph's outputs, in order."""
        names = [f"image {offset}" for offset in self.offsets]
        names += ["stored"] if self.stored is None else []
        return names + (["depth", "depth_size"] if self.depth else [])


def read_plan(
    dataset: LocalDataset, config: DataConfig, *, train: bool, depth: bool, motion: Sequence[str] = ()
) -> ReadPlan:
    """Compare what the configuration asks for with what the dataset has.

    Args:
        motion: components that say how the camera moves.

    Raises:
        UsageError: frames, the stereo partner, motion or depth that the dataset does not have.
    """
    manifest = dataset.manifest
    offsets: list[Offset] = [*config.frames, *(["s"] if config.stereo else [])]  # type: ignore[list-item]
    images = [manifest.image_component(offset) for offset in offsets]
    wanted = [*images, INTRINSICS, *([STEREO_TRANSLATION] if config.stereo else [])]
    if missing := [name for name in wanted if name not in manifest.components]:
        raise UsageError(
            f"{dataset.url}: not every sample has {', '.join(missing)}, which data.frames {config.frames} and "
            f"data.stereo {str(config.stereo).lower()} ask for; the dataset has {_contents(manifest)}: "
            f"{_remedy(manifest, config)}"
        )
    if depth and DEPTH not in [*manifest.components, *manifest.optional_components]:
        raise UsageError(f"{dataset.url}: has no ground truth depth; the dataset has {_contents(manifest)}")
    for name in motion:
        # Every sample must have poses to be warped; one without distances still has its reprojection error.
        if name not in manifest.components and (name == POSES or name not in manifest.optional_components):
            raise UsageError(
                f"{dataset.url}: not every sample has {name}: pack it with md2 prep --motion; the dataset has "
                f"{_contents(manifest)}"
            )
    temporal = len(manifest.frames) - 1
    size = (config.width, config.height)
    crop = (config.crop[0], config.crop[1]) if train and config.crop else None
    return ReadPlan(
        offsets=tuple(offsets),
        images=tuple(images),
        stereo=config.stereo,
        depth=None if not depth else "always" if DEPTH in manifest.components else "sometimes",
        stored=manifest.size,
        size=size,
        header=ppm_header(*size) if manifest.codec == "ppm" and manifest.size == size and not crop else b"",
        flip=train and config.flip,
        jitter=train and config.color_jitter,
        crop=crop,
        motion={name: temporal * (12 if name == POSES else 1) for name in motion},
    )


def _remedy(manifest: Manifest, config: DataConfig) -> str:
    """How to train on a dataset that lacks frames which the configuration asks for."""
    frames = ",".join(map(str, config.frames))
    pack = f"pack it with md2 prep --frames {frames}{' --stereo' * config.stereo}"
    if len(manifest.frames) == 1 and not manifest.stereo:
        return pack
    there = ",".join(map(str, manifest.frames))
    return f"train with data.frames=[{there}] data.stereo={str(manifest.stereo).lower()}, or {pack}"


def _contents(manifest: Manifest) -> str:
    sometimes = [f"{name} in {count} of them" for name, count in manifest.optional_components.items()]
    return ", ".join([*manifest.components, *sometimes])
