"""The loader: tar shards in, `Batch`es on the training device out, resumable in the middle of an epoch.

    loader = Loader(open_dataset(url), "train", config.data, batch_size=12, seed=0, train=True, device=device)
    for epoch in range(20):
        for batch in loader:  # len(loader) batches, the same number on every rank
            ...
    torch.save(loader.state(), path)  # later: Loader(..., state=torch.load(path, weights_only=True))

Training: an epoch is `len(loader)` full batches. Every rank reads its own share of the samples, another
one each epoch; what does not fill a batch on every rank is left out, and since shards and samples are
reordered each epoch, it is other samples each time. Evaluation: every sample exactly once, in the
dataset's order, unflipped and without jitter; the last batch may be smaller.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from math import ceil
from typing import Any, TypedDict

import torch
from torch import Tensor

from md2.config import PAPER_METRES_PER_UNIT, DataConfig
from md2.data.augment import Jitter, camera_matrices, float_images, jitter_factors, stereo_transforms
from md2.data.batch import Batch
from md2.data.cpu import cores, host_threads
from md2.data.dali import Device, Reader, plan, sample_keys
from shards.dataset import LocalDataset
from shards.errors import DatasetError, UsageError
from shards.manifest import Manifest
from shards.sample import DEPTH_SCALE

SAMPLES_AHEAD = 96
BYTES_AHEAD = 128 << 20
"""So many samples are read at once, but not more bytes of decoded images: DALI's threads wait for one another at the
end of every operator and batch, which in small batches costs a third of the rate."""


GPU_DECODER_THREADS = 8


class LoaderState(TypedDict):
    """Where a loader stands; plain types, so that `torch.load(weights_only=True)` reads it.

    Attributes:
        fingerprint: what must not change between saving and going on.
        epoch: epochs completed before this one.
        step: batches taken of this one.
        reader: DALI's checkpoint.
    """

    fingerprint: dict[str, Any]
    epoch: int
    step: int
    reader: bytes


class Loader:
    """Batches of one part of a dataset.

    Args:
        dataset: shards on this machine.
        part: `train`, `val` or `test`.
        config: what to read and how to present it.
        batch_size: samples per batch and rank.
        seed: of order, flips and jitter.
        train: shuffle, and flip and jitter as configured; otherwise evaluation.
        rank, world: which share of the samples to read.
        device: where the batches go, and with `config.device` `auto` where JPEGs are decoded.
        depth: decode ground truth as well.
        accumulate: in training, make the number of batches per epoch a multiple of this.
        state: go on where another loader's `state()` was taken.

    Raises:
        UsageError: the dataset lacks what is asked for, the state is of another set-up, or a GPU is asked for where
            there is none.
        DatasetError: the dataset's files are not what its manifest says. While iterating: a sample cannot be
            decoded; the loader is of no use after that.
    """

    def __init__(
        self,
        dataset: LocalDataset,
        part: str,
        config: DataConfig,
        *,
        batch_size: int,
        seed: int,
        train: bool,
        device: torch.device,
        rank: int = 0,
        world: int = 1,
        depth: bool = False,
        accumulate: int = 1,
        state: LoaderState | None = None,
    ) -> None:
        self.dataset, self.part, self.config = dataset, part, config
        self.batch_size, self.seed, self.train = batch_size, seed, train
        self.rank, self.world, self.device = rank, world, device
        self.metres_per_unit = PAPER_METRES_PER_UNIT if config.baseline == "paper" else 1.0
        self._decode = decode_device(config.device, device)
        self._plan = plan(dataset, part, config, train=train, depth=depth)
        self.samples = dataset.manifest.samples(part)
        """Samples of the part, over all ranks."""
        sample_bytes = len(self._plan.images) * config.width * config.height * 3
        self._ahead = batches_ahead(batch_size, ceil(self.samples / world), sample_bytes)
        self._steps = self._count(accumulate)
        self.epoch, self.step = 0, 0
        self._chunk: dict[str, Tensor] = {}
        self._before_chunk = b""
        self._read_on_gpu: torch.cuda.Event | None = None
        if state is not None:
            self._check(state)
            self.epoch, self.step = state["epoch"], state["step"]
        self._reader = self._open(state["reader"] if state is not None else None)
        if self.step % self._ahead:
            self._read_chunk()

    def __len__(self) -> int:
        """Batches per epoch. In training the same on every rank; in evaluation of this rank's share."""
        return self._steps

    def __iter__(self) -> Iterator[Batch]:
        """The rest of this epoch, or the next one if it is over. In evaluation always a whole pass."""
        if self.step >= self._steps:
            self._finish_epoch()
        elif self.step > 0 and not self.train:
            self._reader = self._open(None)
            self.step = 0
        while self.step < self._steps:
            if self.step % self._ahead == 0:
                self._read_chunk()
            self.step += 1
            on_gpu = self.device.type == "cuda"
            yield self._batch() if on_gpu else host_threads().batch.submit(self._batch).result()

    def state(self) -> LoaderState:
        """Where this loader stands: after the batch last taken, whatever is prefetched already."""
        reader = self._before_chunk if self.step % self._ahead else self._reader.checkpoint()
        return LoaderState(fingerprint=self._fingerprint(), epoch=self.epoch, step=self.step, reader=reader)

    def _count(self, accumulate: int) -> int:
        """Batches per epoch."""
        if self.train:
            return self.samples // self.world // self.batch_size // accumulate * accumulate
        return ceil(self._share() / self.batch_size)

    def _share(self) -> int:
        """Samples of this rank in evaluation; the reader cuts the dataset at these places."""
        begin, end = (self.samples * cut // self.world for cut in (self.rank, self.rank + 1))
        return end - begin

    def _open(self, checkpoint: bytes | None) -> Reader:
        where = f"{self.dataset.url}: part {self.part!r}"
        reader = Reader(
            self._plan,
            where,
            count=self._ahead * self.batch_size,
            seed=self.seed,
            rank=self.rank,
            world=self.world,
            threads=self.config.threads or default_threads(self._decode),
            prefetch=self.config.prefetch,
            decode=self._decode,
            device=self.device,
            checkpoint=checkpoint,
        )
        if reader.samples != self.samples:
            raise DatasetError(
                f"{where} has {reader.samples} readable samples, its manifest says {self.samples}; "
                "verify it with md2 shards verify"
            )
        return reader

    def _read_chunk(self) -> None:
        """The next batches; what is needed to read them once more, if a state is taken in their middle, is kept."""
        self._before_chunk = self._reader.checkpoint()
        chunk = self._reader.read()
        if self._read_on_gpu is not None:
            # DALI fills memory again that is let go of, in the order of its own stream: it does not wait for torch's.
            self._read_on_gpu.synchronize()
        self._chunk = chunk

    def _finish_epoch(self) -> None:
        """Pass over what the reader makes beyond the epoch's batches: padding, and what fills no batch.

        DALI pads each rank's share to as many reads as the largest takes.
        """
        made = ceil(ceil(self.samples / self.world) / (self._ahead * self.batch_size))
        for _ in range(made - ceil(self._steps / self._ahead)):
            self._reader.read()
        self.epoch, self.step = self.epoch + 1, 0

    def _batch(self) -> Batch:
        """The batch that `step` has just been counted for, out of the chunk."""
        begin = (self.step - 1) % self._ahead * self.batch_size
        host = {name: values[begin : begin + self._valid()] for name, values in self._chunk.items()}
        flipped = host["flip"].bool().flatten() if self._plan.flip else None
        mirror = self._to_device(flipped) if flipped is not None else None
        jitter = self._jitter(host) if self._plan.jitter else None
        decoding = not self._plan.uncompressed
        made = {o: float_images(host[f"image {o}"], mirror, jitter, decoding=decoding) for o in self._plan.offsets}
        if self.device.type == "cuda":
            self._read_on_gpu = torch.cuda.current_stream(self.device).record_event()
        size = self._plan.size
        stored = host["stored"][:, [1, 0]] if self._plan.stored is None else torch.tensor([self._plan.stored])
        cameras = camera_matrices(
            host["intrinsics"], stored, size, flipped, nominal=self.config.intrinsics == "nominal"
        )
        stereo = None
        if self._plan.stereo:
            stereo = self._to_device(stereo_transforms(host["translation"].flatten(), flipped, self.metres_per_unit))
        depth, depth_size = self._depth(host) if self._plan.depth else (None, None)
        return Batch(
            images={offset: plain for offset, (plain, _) in made.items()},
            augmented={offset: jittered for offset, (_, jittered) in made.items()},
            intrinsics=self._to_device(cameras),
            stereo=stereo,
            metres_per_unit=self.metres_per_unit,
            depth=depth,
            depth_size=depth_size,
            keys=sample_keys(host["source"]),
        )

    def _valid(self) -> int:
        """Samples of the batch just taken that are no padding."""
        if self.train:
            return self.batch_size
        return min(self.batch_size, self._share() - (self.step - 1) * self.batch_size)

    def _jitter(self, host: dict[str, Tensor]) -> Jitter:
        chosen = host["jitter"].flatten().nonzero().flatten()
        return Jitter.of(chosen, jitter_factors(host["draws"][chosen])).to(self._to_device)

    def _depth(self, host: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        size = host["depth_size"][:, :2].contiguous()
        height, width = (max(1, int(side)) for side in size.amax(0))
        depth = host["depth"][:, :height, :width].permute(0, 3, 1, 2).contiguous()
        return self._to_device(depth).div_(DEPTH_SCALE), self._to_device(size)

    def _to_device(self, tensor: Tensor) -> Tensor:
        if self.device.type != "cuda":
            return tensor
        # Not pin_memory(): it takes memory that DALI has pinned as it is, which DALI may fill again while it is copied.
        pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return pinned.copy_(tensor).to(self.device, non_blocking=True)

    def _fingerprint(self) -> dict[str, Any]:
        """What the order of the samples and the draws depend on. Threads, queue depth and paths do not matter."""
        shards = self.dataset.manifest.part(self.part)
        read = self._plan
        return {
            "part": self.part,
            "shards": hashlib.sha256("".join(shard.sha256 for shard in shards).encode()).hexdigest(),
            "batch_size": self.batch_size,
            "steps": self._steps,
            "batches_ahead": self._ahead,
            "seed": self.seed,
            "train": self.train,
            "rank": self.rank,
            "world": self.world,
            "shuffle_buffer": read.shuffle,
            "components": [*read.images, *(["stereo"] if read.stereo else []), *([read.depth] if read.depth else [])],
            "size": list(read.size),
            "flip": read.flip,
            "color_jitter": read.jitter,
        }

    def _check(self, state: LoaderState) -> None:
        saved, now = state["fingerprint"], self._fingerprint()
        changed = [f"{name} was {saved.get(name)}, is {now[name]}" for name in now if saved.get(name) != now[name]]
        if changed:
            raise UsageError(
                f"cannot go on in the middle of an epoch, the samples would come in another order: {'; '.join(changed)}"
            )


def resize_warning(manifest: Manifest, config: DataConfig) -> str | None:
    """What is lost where images are not stored at the size they are trained at; None where they are."""
    wanted = (config.width, config.height)
    if manifest.size == wanted:
        return None
    pack = f"pack them with --size {wanted[0]}x{wanted[1]}"
    if manifest.size is None:
        return f"images of native size are resized in every batch, which makes the loader several times slower: {pack}"
    stored = f"images are stored at {manifest.size[0]}x{manifest.size[1]}"
    if manifest.size[0] < wanted[0] or manifest.size[1] < wanted[1]:
        return f"{stored} and enlarged to {wanted[0]}x{wanted[1]}, which adds no detail: {pack}"
    return f"{stored} and resized in every batch, which makes the loader slower: {pack}"


def default_threads(decode: Device) -> int:
    """A thread a core; but few where the GPU decodes: each of its decoders has as many of its own, with buffers."""
    return min(cores(), GPU_DECODER_THREADS) if decode == "gpu" else cores()


def decode_device(wanted: str, device: torch.device) -> Device:
    """Where to decode: `data.device` `auto` is the GPU if the batches go to one.

    Raises:
        UsageError: `gpu`, but the batches go to the CPU.
    """
    if wanted == "gpu" and device.type != "cuda":
        raise UsageError(f"data.device gpu needs training on a GPU, but train.device is {device.type}")
    return "gpu" if wanted != "cpu" and device.type == "cuda" else "cpu"


def batches_ahead(batch_size: int, samples: int, sample_bytes: int) -> int:
    """How many batches to read at once, up to `SAMPLES_AHEAD` and `BYTES_AHEAD`.

    Only as many as divide a rank's `samples` well: what is decoded for nothing at an epoch's end is at most a
    sixteenth, unless single batches leave more.
    """

    def padding(batches: int) -> int:
        return -samples % (batches * batch_size)

    most = min(SAMPLES_AHEAD, BYTES_AHEAD // sample_bytes) // batch_size
    allowed = max(padding(1), samples // 16)
    return max(batches for batches in range(1, max(1, most) + 1) if padding(batches) <= allowed)
