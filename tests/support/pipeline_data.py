"""Small datasets with random images for the tests of the loader, and what Pillow makes of their bytes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from bench.write_dataset import write_dataset
from md2.config import DataConfig
from md2.pipeline import Loader
from shards.dataset import LocalDataset, open_dataset
from shards.manifest import DepthInfo, Split
from shards.sample import Codec, Sample, image_extension

WIDTH, HEIGHT = 96, 64
CPU = torch.device("cpu")
Array = np.ndarray[Any, np.dtype[Any]]


def encode(pixels: Array, codec: Codec = "jpeg", **options: Any) -> bytes:
    buffer = BytesIO()
    Image.fromarray(pixels).save(buffer, codec.upper(), **options)
    return buffer.getvalue()


def decode(data: bytes) -> Array:
    """Pillow's RGB (H, W, 3), or the raw values of a 16-bit PNG."""
    with Image.open(BytesIO(data)) as image:
        return np.asarray(image if image.mode.startswith("I") else image.convert("RGB"))


def smooth(rng: np.random.Generator, width: int = WIDTH, height: int = HEIGHT) -> Array:
    """An image with structure at several scales, which JPEG keeps: noise that was enlarged."""
    coarse = rng.integers(0, 256, (max(2, height // 8), max(2, width // 8), 3), dtype=np.uint8)
    fine = rng.integers(0, 40, (height, width, 3))
    large = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    return np.clip(large + fine - 20, 0, 255).astype(np.uint8)


def make_samples(
    count: int,
    *,
    seed: int = 0,
    frames: Sequence[int] = (0, -1, 1),
    stereo: bool = False,
    codec: Codec = "jpeg",
    size: Callable[[int], tuple[int, int]] = lambda number: (WIDTH, HEIGHT),
    depth: Callable[[int], Array | None] = lambda number: None,
    prefix: str = "drive",
    **options: Any,
) -> list[Sample]:
    """Samples `drive_000`, `drive_001` ...; cx is 40 + the sample's number, fx 50.

    `size` and `depth` say for each sample's number how large its images are and what ground truth it has.
    """
    rng = np.random.default_rng(seed)
    names = {0: "0", -1: "m1", 1: "p1"}
    stems = [names[frame] for frame in frames] + (["s"] if stereo else [])
    extension = image_extension(codec)
    samples = []
    for number in range(count):
        parts = {f"{stem}.{extension}": encode(smooth(rng, *size(number)), codec, **options) for stem in stems}
        parts["k.f32"] = np.array([50, 48, 40 + number, 31.5], "<f4").tobytes()
        parts["meta.json"] = b"{}"
        if stereo:
            parts["t.f32"] = np.array([-0.54], "<f4").tobytes()
        if (truth := depth(number)) is not None:
            parts["depth.png"] = encode(truth, "png")
        samples.append(Sample(f"{prefix}_{number:03d}", parts))
    return samples


def pack(
    folder: Path,
    samples: Iterable[Sample],
    *,
    part: str = "train",
    frames: Sequence[int] = (0, -1, 1),
    stereo: bool = False,
    codec: Codec = "jpeg",
    size: tuple[int, int] | None = (WIDTH, HEIGHT),
    depth: bool = False,
    samples_per_shard: int = 5,
) -> LocalDataset:
    write_dataset(
        folder,
        {part: samples},
        split=Split(name="random", sha256="0" * 64),
        frames=frames,
        stereo=stereo,
        depth=DepthInfo(source="dense", convention="camera_z") if depth else None,
        size=size,
        codec=codec,
        quality=90 if codec == "jpeg" else None,
        seed=0,
        samples_per_shard=samples_per_shard,
    )
    return open_dataset(str(folder))


def config(**changes: Any) -> DataConfig:
    """Two threads, images of the stored size, no augmentation unless asked for."""
    settings = {"width": WIDTH, "height": HEIGHT, "threads": 2, "flip": False, "color_jitter": False}
    return DataConfig(**{**settings, **changes})


def loader(dataset: LocalDataset, data: DataConfig | None = None, **arguments: Any) -> Loader:
    settings: dict[str, Any] = {"batch_size": 4, "seed": 0, "train": True, "device": CPU}
    part = arguments.pop("part", "train")
    return Loader(dataset, part, data or config(), **{**settings, **arguments})


def as_floats(pixels: Array) -> torch.Tensor:
    """(H, W, 3) uint8 -> (3, H, W) in [0, 1]."""
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255


class Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the tensor operations that run under it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names[str(func).split(".")[1]] += 1
        return func(*args, **(kwargs or {}))
