"""What is to be said before a training on a dataset."""

from __future__ import annotations

from md2.config import DataConfig
from shards.manifest import Manifest


def data_warnings(manifest: Manifest, config: DataConfig) -> list[str]:
    """All that is to be said, in lines."""
    return [text for warn in (resize_warning, guess_warning) if (text := warn(manifest, config)) is not None]


def guess_warning(manifest: Manifest, config: DataConfig) -> str | None:
    """That the intrinsics to be trained with are a guess; None if they are measured or learned."""
    if manifest.intrinsics is None or config.intrinsics != "calibrated":
        return None
    return (
        "the dataset's intrinsics are a guess (fov in camera.yaml): calibrate the camera, or if it turns enough, learn "
        "them with data.intrinsics=learned (docs/training.md)"
    )


def resize_warning(manifest: Manifest, config: DataConfig) -> str | None:
    """What it costs that images are not stored at the size they are trained at; None if they are."""
    wanted = (config.width, config.height)
    larger = manifest.size is None or (manifest.size[0] >= wanted[0] and manifest.size[1] >= wanted[1])
    if manifest.size == wanted or (config.crop and larger):
        return None
    pack = f"pack them with --size {wanted[0]}x{wanted[1]}"
    if manifest.size is None:
        return f"images of native size are resized in every batch, which makes the loader several times slower: {pack}"
    width, height = manifest.size
    if min(width, height) >= 64 and width % 32 == height % 32 == 0:
        pack = f"train at their size (data.width={width} data.height={height}), or {pack}"
    stored = f"images are stored at {width}x{height}"
    if width < wanted[0] or height < wanted[1]:
        return f"{stored} and enlarged to {wanted[0]}x{wanted[1]}, which adds no detail: {pack}"
    return f"{stored} and resized in every batch, which makes the loader slower: {pack}"
