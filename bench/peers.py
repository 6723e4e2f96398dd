"""Loaders on the same shards, with the same batches: the rows of `md2 bench loader`.

Every loader gives float32 images in [0, 1] of all frames, mirrored with probability 0.5, as (B, 3, H, W) in
channels_last memory; jittered copies of them (one draw a sample, probability 0.5); and the intrinsics, mirrored
likewise. Each is written as its documentation shows, with what makes it faster here:

    md2         md2.pipeline.Loader
    spdl        SPDL's thread pipeline: a thread decodes a whole batch, from md2's index of the mapped shards
    litdata     LitData's StreamingDataLoader, on the same files in its own format, since it does not read tars
    webdataset  the webdataset library in PyTorch's DataLoader; workers batch, and uint8 goes through the pipe
    dali        DALI's own `fn.readers.webdataset` and decoder, `fn.color_twist`, and DALIGenericIterator
    floor       libjpeg-turbo on threads; the pixels are dropped (JPEG only)
    plain       PyTorch's DataLoader and Pillow on the full-size PNGs: decoded, resized and jittered for every sample

SPDL, LitData and webdataset decode with simplejpeg (libjpeg-turbo), straight into the batch. They mirror and jitter
with OpenCV, the jitter by md2's colour map: one call an image, where torchvision's and Pillow's take four steps.
torchcodec's package is linked against CUDA and does not load beside a CPU build of torch.
"""

from __future__ import annotations

import os
import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import count
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from shards.dataset import open_dataset
from shards.sample import image_extension
from shards.stream import MappedShard
from shards.tar import read_samples

SHUFFLED = 256
"""Samples in the shuffle buffer of webdataset and DALI."""
Pixels = np.ndarray[Any, np.dtype[np.uint8]]


@dataclass(frozen=True)
class Task:
    """What a row loads.

    Attributes:
        folder: of the packed dataset.
        lit: of the same files as LitData stores them.
        pngs: full-size images of each sample, for `plain`.
        stereo, jitter: load the stereo partner too; jitter colours.
        batch: samples in a batch.
        threads: decoding threads or workers.
        rank, world_size: which share of the samples.
        state: resume from it.
    """

    folder: str
    lit: str = ""
    pngs: tuple[tuple[str, ...], ...] = ()
    stereo: bool = False
    jitter: bool = False
    batch: int = 12
    threads: int = 2
    rank: int = 0
    world_size: int = 1
    state: Any = None

    @property
    def stems(self) -> list[str]:
        return ["0", "m1", "p1", *(["s"] if self.stereo else [])]


class Loaded(NamedTuple):
    """A batch: per frame a (B, 3, H, W) float32 tensor, plain and jittered; (B, 3, 3) intrinsics."""

    images: list[Tensor]
    augmented: list[Tensor]
    intrinsics: Tensor


Opened = tuple[Iterator[Any], Callable[[], Any] | None]
"""Batches without end, and what gives the state to resume from: None if the library has nothing for that."""


# --- what SPDL, LitData and webdataset share


class Decoder:
    """Files of a batch in, uint8 images out: decoded, mirrored and jittered. Works in threads and in workers."""

    def __init__(self, task: Task) -> None:
        about = open_dataset(task.folder).manifest
        assert about.size is not None
        self.width, self.height = about.size
        self.jpeg, self.jitter = about.codec == "jpeg", task.jitter
        self.names = [f"{stem}.{image_extension(about.codec)}" for stem in task.stems] + ["k.f32"]

    def __call__(self, samples: Sequence[Sequence[Any]]) -> tuple[Tensor, Tensor | None, Tensor]:
        """Files of each sample in the order of `names` -> plain and jittered (frames, B, H, W, 3) uint8, intrinsics."""
        import cv2

        size = (len(self.names) - 1, len(samples), self.height, self.width, 3)
        plain = np.empty(size, np.uint8)
        jittered = np.empty(size, np.uint8) if self.jitter else None
        mirrored = [random.random() < 0.5 for _ in samples]
        drawn = self._draw(len(samples)) if self.jitter else {}
        scratch = np.empty(size[2:], np.uint8)
        for place, (*files, _) in enumerate(samples):
            for frame, file in enumerate(files):
                target = plain[frame, place]
                image = self._decode(file, scratch if mirrored[place] else target)
                if mirrored[place]:
                    cv2.flip(image, 1, dst=target)
                elif image is not target:
                    target[:] = image
                if jittered is not None and place in drawn:
                    cv2.transform(target, self._colours(target, *drawn[place]), dst=jittered[frame, place])
                elif jittered is not None:
                    jittered[frame, place] = target
        numbers = np.array([np.frombuffer(files[-1], "<f4") for files in samples])
        seen = None if jittered is None else torch.from_numpy(jittered)
        return torch.from_numpy(plain), seen, intrinsics(numbers, np.array(mirrored), self.width)

    def collate(self, samples: Sequence[dict[str, Any]]) -> tuple[Tensor, Tensor | None, Tensor]:
        """The same of samples as libraries give them: component -> file."""
        return self([[sample[name] for name in self.names] for sample in samples])

    def _decode(self, file: Any, buffer: Pixels) -> Pixels:
        import simplejpeg

        if self.jpeg:
            return simplejpeg.decode_jpeg(file, buffer=buffer)  # type: ignore[no-any-return]
        return np.frombuffer(file, np.uint8)[-buffer.size :].reshape(buffer.shape)  # behind a PPM's header

    def _draw(self, samples: int) -> dict[int, tuple[Any, float]]:
        """Sample -> matrix of its colours, and the share of the mean grey that is added to them."""
        from md2.data.augment import jitter_factors, jitter_matrices

        chosen = [place for place in range(samples) if random.random() < 0.5]
        factors = jitter_factors(torch.tensor([[random.uniform(-1, 1) for _ in range(4)] for _ in chosen]).view(-1, 4))
        pivots = (factors[:, 0] * (1 - factors[:, 1])).tolist()
        return dict(zip(chosen, zip(jitter_matrices(factors).numpy(), pivots, strict=True), strict=True))

    @staticmethod
    def _colours(image: Pixels, matrix: Any, pivot: float) -> Any:
        import cv2

        from md2.data.augment import GREY

        offset = pivot * float(np.dot(cv2.mean(image)[:3], GREY))
        return np.column_stack([matrix, np.full(3, offset, np.float32)])


def intrinsics(numbers: Any, mirrored: Any, width: int) -> Tensor:
    """(B, 3, 3) camera matrices of fx, fy, cx, cy (B, 4), mirrored where that holds; pixel centres at integers."""
    K = np.zeros((len(numbers), 3, 3), np.float32)
    K[:, 0, 0], K[:, 1, 1], K[:, 1, 2], K[:, 2, 2] = numbers[:, 0], numbers[:, 1], numbers[:, 3], 1
    K[:, 0, 2] = np.where(mirrored, width - 1 - numbers[:, 2], numbers[:, 2])
    return torch.from_numpy(K)


def to_float(decoded: tuple[Tensor, Tensor | None, Tensor]) -> Loaded:
    """What `Decoder` returns, as float images; one operation a frame."""
    images, augmented = (
        None if pixels is None else [torch.mul(frame, 1 / 255).permute(0, 3, 1, 2) for frame in pixels]
        for pixels in decoded[:2]
    )
    assert images is not None
    return Loaded(images, images if augmented is None else augmented, decoded[2])


# --- the rows


def md2(task: Task) -> Opened:
    from md2.config import DataConfig
    from md2.pipeline import Loader

    dataset = open_dataset(task.folder)
    assert dataset.manifest.size is not None
    width, height = dataset.manifest.size
    config = DataConfig(
        width=width,
        height=height,
        stereo=task.stereo,
        color_jitter=task.jitter,
        threads=task.threads,
        intrinsics="calibrated",
    )
    loader = Loader(
        dataset,
        "train",
        config,
        batch_size=task.batch,
        seed=0,
        train=True,
        device=torch.device("cpu"),
        rank=task.rank,
        world_size=task.world_size,
        state=task.state,
    )

    def batches() -> Iterator[Loaded]:
        while True:
            for found in loader:
                yield Loaded([*found.images.values()], [*found.augmented.values()], found.intrinsics)

    return batches(), loader.state


def spdl(task: Task) -> Opened:
    from spdl.pipeline import PipelineBuilder
    from spdl.source import DistributedRandomSampler

    dataset, decoder = open_dataset(task.folder), Decoder(task)
    shards = [MappedShard.open(dataset.folder, shard) for shard in dataset.manifest.part("train")]
    places = [(shard, place) for shard in shards for place in range(len(shard.keys))]
    sampler = DistributedRandomSampler(len(places), rank=task.rank, world_size=task.world_size)

    def numbers() -> Iterator[list[int]]:
        for epoch in count():
            sampler.shuffle(seed=epoch)
            order = list(sampler)
            for first in range(0, len(order) - task.batch + 1, task.batch):
                yield order[first : first + task.batch]

    def load(chosen: list[int]) -> Loaded:
        files = [[places[n][0].component(places[n][1], name) for name in decoder.names] for n in chosen]
        return to_float(decoder(files))

    def batches() -> Iterator[Loaded]:
        pipeline = (
            PipelineBuilder()
            .add_source(numbers())
            .pipe(load, concurrency=task.threads)
            .add_sink(task.threads)
            .build(num_threads=task.threads)
        )
        with pipeline.auto_stop():
            yield from pipeline

    return batches(), None


def litdata(task: Task) -> Opened:
    from litdata import StreamingDataLoader, StreamingDataset

    decoder = Decoder(task)
    # How LitData learns of ranks where torch.distributed does not run.
    os.environ |= {"WORLD_SIZE": str(task.world_size), "GLOBAL_RANK": str(task.rank), "NNODES": "1"}
    loader = StreamingDataLoader(
        StreamingDataset(task.lit, shuffle=True, drop_last=True, seed=0),
        batch_size=task.batch,
        num_workers=task.threads,
        collate_fn=decoder.collate,
        persistent_workers=True,
    )
    if task.state is not None:
        loader.load_state_dict(task.state)

    def batches() -> Iterator[Loaded]:
        while True:
            yield from map(to_float, loader)

    return batches(), loader.state_dict


def store_for_litdata(folder: str, lit: str) -> None:
    """Write the training samples in LitData's own format: the same files, in chunks of 64 MB."""
    from litdata.streaming import Cache

    cache = Cache(lit, chunk_bytes="64MB")
    number = count()
    for tar in open_dataset(folder).tars("train"):
        for sample in read_samples(tar):
            cache[next(number)] = {name: data for name, data in sample.components.items() if name != "meta.json"}
    cache.done()
    cache.merge()


def webdataset(task: Task) -> Opened:
    import webdataset as wds

    decoder = Decoder(task)
    urls = [str(tar) for tar in open_dataset(task.folder).tars("train")]
    source = (
        wds.WebDataset(urls, resampled=True, shardshuffle=False)
        .shuffle(SHUFFLED)
        .batched(task.batch, collation_fn=decoder.collate, partial=False)
    )
    return map(to_float, wds.WebLoader(source, batch_size=None, num_workers=task.threads)), None


def dali(task: Task) -> Opened:
    from nvidia.dali import fn, pipeline_def, types
    from nvidia.dali.plugin.base_iterator import LastBatchPolicy
    from nvidia.dali.plugin.pytorch import DALIGenericIterator

    dataset = open_dataset(task.folder)
    assert dataset.manifest.size is not None
    names = [f"{stem}.{image_extension(dataset.manifest.codec)}" for stem in task.stems]
    tars, indexes = ([str(path) for path in paths] for paths in (dataset.tars("train"), dataset.indexes("train")))

    @pipeline_def(
        batch_size=task.batch,
        num_threads=task.threads,
        device_id=None,
        seed=0,
        enable_conditionals=True,
        enable_checkpointing=True,
        checkpoint=task.state,
    )
    def graph() -> Any:
        *files, numbers = fn.readers.webdataset(
            paths=tars,
            index_paths=indexes,
            ext=[*names, "k.f32"],
            dtypes=[types.UINT8] * len(names) + [types.FLOAT],
            missing_component_behavior="error",
            random_shuffle=True,
            initial_fill=SHUFFLED,
            shard_id=task.rank,
            num_shards=task.world_size,
            name="reader",
        )
        images = fn.decoders.image(files, output_type=types.RGB)
        mirrored = fn.random.coin_flip()
        shown = images
        if task.jitter:
            brightness, contrast, saturation = (fn.random.uniform(range=[0.8, 1.2]) for _ in range(3))
            hue = fn.random.uniform(range=[-36.0, 36.0])
            if fn.random.coin_flip(dtype=types.BOOL):
                shown = fn.color_twist(images, brightness=brightness, contrast=contrast, saturation=saturation, hue=hue)
        made = [images, *([shown] if task.jitter else [])]
        floats = [
            fn.crop_mirror_normalize(these, mirror=mirrored, dtype=types.FLOAT, output_layout="HWC", std=255.0)
            for these in made
        ]
        return *(image for these in floats for image in these), numbers, mirrored

    outputs = [f"{kind} {name}" for kind in ("plain", "jittered")[: 1 + task.jitter] for name in names]
    iterator = DALIGenericIterator(
        [graph()],
        [*outputs, "k", "mirrored"],
        reader_name="reader",
        last_batch_policy=LastBatchPolicy.DROP,
        auto_reset=True,
    )

    def batches() -> Iterator[Loaded]:
        while True:
            for (found,) in iterator:
                images = [found[name].permute(0, 3, 1, 2) for name in outputs]
                K = intrinsics(found["k"].numpy(), found["mirrored"].numpy().ravel(), dataset.manifest.size[0])
                yield Loaded(images[: len(names)], images[-len(names) :], K)

    return batches(), lambda: iterator.checkpoints()[0]


def floor(task: Task) -> Opened:
    import simplejpeg

    samples = [
        [sample.components[f"{stem}.jpg"] for stem in task.stems]
        for tar in open_dataset(task.folder).tars("train")
        for sample in read_samples(tar)
    ]

    def decode(images: list[bytes]) -> None:
        for image in images:
            simplejpeg.decode_jpeg(image, colorspace="RGB")

    def batches() -> Iterator[Loaded]:
        with ThreadPoolExecutor(task.threads) as pool:
            under_way: deque[list[Future[None]]] = deque()
            for begin in count(step=task.batch):
                chosen = [samples[(begin + place) % len(samples)] for place in range(task.batch)]
                under_way.append([pool.submit(decode, images) for images in chosen])
                if len(under_way) > 2:  # batches ahead, so that no thread waits for the others at a batch's end
                    wait(under_way.popleft())
                    yield Loaded([], [], torch.empty(task.batch, 0))

    return batches(), None


class FullSize(torch.utils.data.Dataset[tuple[list[Tensor], list[Tensor], Tensor]]):
    """Full-size image files, decoded, resized, mirrored and jittered by Pillow for every sample."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.size = open_dataset(task.folder).manifest.size

    def __len__(self) -> int:
        return 1 << 30

    def __getitem__(self, number: int) -> tuple[list[Tensor], list[Tensor], Tensor]:
        from PIL import Image

        from bench.plain import LANCZOS, Colours, to_tensor

        images = []
        mirror, colours = random.random() < 0.5, Colours.draw(random)  # type: ignore[arg-type]
        for path in self.task.pngs[number % len(self.task.pngs)][: len(self.task.stems)]:
            with Image.open(path) as image:
                images.append(image.convert("RGB").resize(self.size, LANCZOS))
        if mirror:
            images = [image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for image in images]
        plain = [to_tensor(image) for image in images]
        jittered = self.task.jitter and random.random() < 0.5
        return plain, [to_tensor(colours(image)) for image in images] if jittered else plain, torch.eye(3)


def plain(task: Task) -> Opened:
    loader = torch.utils.data.DataLoader(FullSize(task), task.batch, num_workers=task.threads, drop_last=True)
    return (Loaded(*found) for found in loader), None


ROWS: dict[str, Callable[[Task], Opened]] = {
    row.__name__: row for row in (md2, spdl, litdata, webdataset, dali, floor, plain)
}
