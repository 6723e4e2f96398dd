"""Small datasets for the storage tests: valid shards whose content is cheap to make and to compare."""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from bench.write_dataset import write_dataset
from shards.manifest import DepthInfo, Manifest, Split
from shards.sample import Sample
from shards.tar import read_samples

SIZE = (64, 32)
SPLIT = Split(name="synthetic", sha256="5" * 64)


def image_bytes(rng: np.random.Generator, size: tuple[int, int] = SIZE) -> bytes:
    """A smooth random picture as JPEG."""
    small = Image.fromarray(rng.integers(0, 256, (4, 8, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    small.resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def depth_bytes(rng: np.random.Generator) -> bytes:
    depth = rng.integers(256, 80 * 256, (SIZE[1], SIZE[0]), dtype=np.uint16)
    depth[rng.random(depth.shape) < 0.8] = 0
    buffer = io.BytesIO()
    Image.fromarray(depth).save(buffer, "PNG")
    return buffer.getvalue()


def make_samples(count: int, seed: int = 0, padding: int = 0) -> Iterator[Sample]:
    """Samples with every kind of component; `padding` random bytes in `meta.json` set their size."""
    rng = np.random.default_rng(seed)
    for number in range(count):
        filler = rng.bytes(padding).hex()
        yield Sample(
            f"drive_{seed:02d}_l_{number:010d}",
            {
                "0.jpg": image_bytes(rng),
                "m1.jpg": image_bytes(rng),
                "p1.jpg": image_bytes(rng),
                "s.jpg": image_bytes(rng),
                "k.f32": struct.pack("<4f", 37.1, 61.4, 31.5, 15.5),
                "t.f32": struct.pack("<f", -0.54),
                "depth.png": depth_bytes(rng),
                "meta.json": json.dumps({"frame": number, "filler": filler}).encode(),
            },
        )


def make_dataset(
    folder: Path, train: int = 12, val: int = 3, per_shard: int = 3, seed: int = 0, padding: int = 0
) -> Manifest:
    return write_dataset(
        folder,
        {"train": make_samples(train, seed, padding), "val": make_samples(val, seed + 50, padding)},
        split=SPLIT,
        frames=[0, -1, 1],
        stereo=True,
        depth=DepthInfo(source="velodyne", convention="camera_z"),
        size=SIZE,
        codec="jpeg",
        quality=90,
        seed=seed,
        samples_per_shard=per_shard,
    )


def all_samples(tars: list[Path]) -> list[Sample]:
    return [sample for tar in tars for sample in read_samples(tar)]
