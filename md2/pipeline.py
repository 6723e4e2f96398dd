"""The loader: tar shards in, `Batch`es on the training device out, resumable in the middle of an epoch.

    loader = Loader(open_dataset(url), "train", config.data, batch_size=12, seed=0, train=True, device=device)
    for epoch in range(20):
        for batch in loader:  # len(loader) batches, the same number on every rank
            ...
    torch.save(loader.state(), path)  # later, on any number of ranks: Loader(..., state=torch.load(path))

Training: seed and epoch give an order of all samples (`md2.data.order`). A step of all ranks takes the next
`step_samples` of it, each rank its slice of those; what does not fill a step at an epoch's end is left out, other
samples each time. Evaluation: every sample exactly once, in the dataset's order, unflipped and without jitter; the last
batch may be smaller, and a rank may have none.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future, wait
from contextlib import nullcontext
from itertools import chain, count, islice, repeat
from math import ceil
from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor

from md2.config import DataConfig
from md2.data.augment import (
    Jitter,
    Windows,
    camera_matrices,
    float_images,
    jitter_factors,
    rigid_transforms,
    stereo_transforms,
)
from md2.data.batch import Batch
from md2.data.cpu import batch_thread, default_threads, host_threads
from md2.data.dali import DRAWS, Reader, Request, decode_device
from md2.data.order import WINDOW, Order, uniform_draws
from md2.data.plan import read_plan
from shards.dataset import LocalDataset
from shards.errors import UsageError
from shards.sample import DEPTH_SCALE, DISTANCES, INTRINSICS, POSES, STEREO_TRANSLATION, Offset

SAMPLES_AHEAD = 96
BYTES_AHEAD = 128 << 20
"""Several batches are read at once, up to these samples and bytes of decoded images: DALI's threads wait for one
another at the end of every operator and batch, which in small batches costs a third of the rate."""
_OLD_READER = "reader"


class LoaderState(TypedDict):
    """Where a loader stands, the same on every rank; plain types, so that `torch.load(weights_only=True)` reads it.

    Attributes:
        fingerprint: what decides order and draws, and so must not change between saving and resuming.
        epoch: epochs completed before this one.
        samples: taken of this one by all ranks, in whole steps.
        step_samples: in a step of all ranks.
    """

    fingerprint: dict[str, Any]
    epoch: int
    samples: int
    step_samples: int


_Made = tuple[Batch, dict[str, float], torch.cuda.Event | None]  # seconds that it took, and when it is ready


class Loader:
    """Batches of one part of a dataset.

    Args:
        dataset: an open dataset.
        part: `train`, `val` or `test`.
        config: what to read and how to present it.
        batch_size: samples per batch and rank.
        seed: of order, flips and jitter.
        train: shuffle, and crop, flip and jitter as configured; otherwise evaluation.
        rank, world_size: which share of the samples to read.
        device: where the batches go, and with `config.device` `auto` where JPEGs are decoded.
        depth: decode ground truth as well.
        motion: components of `md2 prep --motion` to read as well.
        accumulate: batches of each rank in a step; an epoch of training has whole steps.
        state: resume from another loader's `state()`.

    Raises:
        UsageError: the dataset lacks what is asked for, the state is of another set-up, or a GPU is asked for and
            there is none.
        StorageError: the cache's limit is less than the shards that are needed at once.
        DatasetError: the dataset's files are not what its manifest says. While iterating: a sample cannot be
            decoded; the loader is of no use after that.
        TrainingError: while iterating: DALI lacks memory.
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
        world_size: int = 1,
        depth: bool = False,
        motion: Sequence[str] = (),
        accumulate: int = 1,
        state: LoaderState | None = None,
    ) -> None:
        self.dataset, self.part, self.config = dataset, part, config
        self.batch_size, self.seed, self.train = batch_size, seed, train
        self.rank, self.world_size, self.device = rank, world_size, device
        self.metres_per_unit = config.metres_per_unit
        self._accumulate = accumulate if train else 1
        self._decode = decode_device(config.device, device)
        self._plan = read_plan(dataset, config, train=train, depth=depth, motion=motion)
        counts = [shard.samples for shard in dataset.manifest.part(part)]
        self._order = Order(counts, seed=seed, shuffle=config.shuffle if train else None)
        self.samples = self._order.samples
        """Samples of the part, over all ranks."""
        self.step_samples = batch_size * world_size * self._accumulate
        """Samples of a step, over all ranks."""
        self.epoch = self.step = self._begin = 0
        self.note: str | None = None
        """What is to be said about the state that it resumed from; None if it continues as if nothing had happened."""
        if state is not None:
            self._resume(state)
        self.waited = {"storage": 0.0, "decoding": 0.0, "conversion": 0.0}
        """Seconds that the batches taken so far were waited for, and for what."""
        self._read_on_gpu: torch.cuda.Event | None = None
        self._keys: list[str] = []
        self._chunk: dict[str, Tensor] = {}
        self._used = 0
        self._next: Future[_Made] | None = None
        self._maker = batch_thread() if (device.type == "cuda" if config.ahead == "auto" else config.ahead) else None
        own = self._maker is not None and device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if own else None  # type: ignore[no-untyped-call]
        self._shards = dataset.stream(part)
        self._reader = self._open() if self._left_of(0) or self._left_of(self._begin) else None

    def __len__(self) -> int:
        """Batches of this rank in a whole epoch. In training the same on every rank."""
        return self._left_of(0)

    @property
    def left(self) -> int:
        """Batches of this rank that are left of this epoch."""
        return self._left_of(self._begin) - self.step

    @property
    def taken(self) -> int:
        """Samples of this epoch that all ranks have taken, in whole steps of training."""
        return self._begin + self.step // self._accumulate * self.step_samples

    @property
    def left_out(self) -> int:
        """Samples at the end of this epoch of training that do not fill a step."""
        return (self.samples - self._begin) % self.step_samples if self.train else 0

    def __iter__(self) -> Iterator[Batch]:
        """The rest of this epoch, or the next one if it is over. In evaluation always a whole pass."""
        if self.left <= 0:
            self.next_epoch()
            if not self.train:
                self._start()
        elif self.step > 0 and not self.train:
            self.step = 0
            self._start()
        while self.left > 0:
            begin = time.perf_counter()
            batch, took = self._make()[:2] if self._maker is None else self._made_ahead(self._maker)
            self.step += 1
            # What was made ahead took time that nobody waited for.
            share = min(1.0, (time.perf_counter() - begin) / max(sum(took.values()), 1e-9))
            self.waited |= {what: self.waited[what] + seconds * share for what, seconds in took.items()}
            yield batch

    def _made_ahead(self, maker: Executor) -> tuple[Batch, dict[str, float]]:
        """The next batch from the thread that makes them and begins the one after it."""
        made = self._next = self._next or maker.submit(self._make)
        wait([made])  # interrupted here, no batch is lost
        self._next = None
        batch, took, ready = made.result()
        self._next = maker.submit(self._make) if self.train or self.left > 1 else None
        if ready is not None:
            batch.use_when(ready)
        return batch, took

    def _drop(self) -> None:
        """Wait for what is made ahead, and forget it."""
        wait([] if self._next is None else [self._next])
        self._next = None

    def next_epoch(self) -> None:
        """Pass on to the next epoch when this one is over."""
        assert self.left <= 0
        self.epoch, self.step, self._begin = self.epoch + 1, 0, 0

    def cancel(self) -> None:
        """End a wait for the storage in another thread, and every later one, with CancelledError."""
        self._shards.cancel()

    def close(self) -> None:
        """End what is made ahead; nothing more can be read from a storage."""
        self.cancel()
        self._drop()

    def state(self) -> LoaderState:
        """Where this loader stands: after the last whole step that was taken, whatever is prefetched already."""
        return LoaderState(
            fingerprint=self._fingerprint(), epoch=self.epoch, samples=self.taken, step_samples=self.step_samples
        )

    def __del__(self) -> None:
        # DALI fills its memory again once it is let go of, which a GPU may still be reading.
        if getattr(self, "_read_on_gpu", None) is not None:
            self._read_on_gpu.synchronize()  # type: ignore[union-attr]

    def _left_of(self, begin: int) -> int:
        """Batches of an epoch whose first `begin` samples are taken."""
        if self.train:
            return (self.samples - begin) // self.step_samples * self._accumulate
        first, last = self._share()
        return ceil((last - first) / self.batch_size)

    def _share(self) -> tuple[int, int]:
        """The samples of this rank in evaluation: the first, and the one behind the last."""
        first, last = (self.samples * cut // self.world_size for cut in (self.rank, self.rank + 1))
        return first, last

    def _open(self) -> Reader:
        sample_bytes = len(self._plan.images) * self.config.width * self.config.height * 3
        self._ahead = batches_ahead(self.batch_size, sample_bytes)
        if self._shards.limit is not None:
            while self._ahead > 1 and self._shards.bytes_of(self._at_once()) > self._shards.limit:
                self._ahead -= 1
            self._shards.require(self._at_once())
        reads = self.config.prefetch
        if not self.train:
            reads = min(reads, ceil(len(self) / self._ahead))
        reader = Reader(
            self._plan,
            self._shards,
            self._order.starts,
            f"{self.dataset.url}: part {self.part!r}",
            count=self._ahead * self.batch_size,
            threads=self.config.threads or default_threads(self._decode),
            prefetch=reads,
            decode=self._decode,
            device=self.device,
        )
        reader.start(self._requests())
        return reader

    def _at_once(self) -> int:
        """Shards that are needed at the same time, by the reads that DALI is at and the one that is handed to it."""
        reads = self.config.prefetch + 1
        spread = reads * self._ahead * self.batch_size * (self.world_size if self.train else 1)
        first, last = map(np.sort, self._order.shard_uses(self.epoch))
        # Most are needed where another one comes: those that have begun by then and had not ended `spread` before.
        ended = np.searchsorted(last, first - spread, side="left")
        return int((np.arange(1, len(first) + 1) - ended).max())

    def _start(self) -> None:
        """From the beginning of a pass; what has been read ahead of an earlier one is dropped."""
        self._drop()
        self._keys, self._used = [], 0
        if self._reader is not None:
            self._reader.start(self._requests())

    def _requests(self) -> Iterator[Request]:
        """What to read from here on: `batches_ahead` at a time. In training without end, over the ends of epochs.

        DALI starts as many reads as it prepares ahead before it gives the first, so these are of one batch.
        """
        self._shards.fetch_ahead(self._upcoming(), reach=self.samples)
        batches = self._batches() if self.train else self._pass()
        sizes = chain(repeat(1, self.config.prefetch), repeat(self._ahead))
        while chunk := list(islice(batches, next(sizes))):
            samples, draws, until, places = zip(*chunk, strict=True)
            merged: dict[int, int] = {}
            for needed in until:
                merged.update(needed)  # later batches need a shard at least as long
            yield Request(np.concatenate(samples), np.concatenate(draws), merged, places[0])

    def _upcoming(self) -> Iterator[tuple[int, int]]:
        """The place at which each shard is first needed from here on, and its number; in training without end."""
        begin, end = (self._begin, self.samples) if self.train else self._share()
        for epoch in count(self.epoch) if self.train else [0]:
            first, last = self._order.shard_uses(epoch)
            for number in np.argsort(first):
                if last[number] >= begin and first[number] < end:
                    yield epoch * self.samples + int(first[number]), int(number)
            begin = 0

    def _batches(self) -> Iterator[Request]:
        epoch, begin = self.epoch, self._begin
        while True:
            order, (_, last) = self._order.epoch(epoch), self._order.shard_uses(epoch)
            passed = epoch * self.samples
            for step in range(begin, self.samples - self.step_samples + 1, self.step_samples):
                mine = step + self.rank * self._accumulate * self.batch_size
                for first in range(mine, mine + self._accumulate * self.batch_size, self.batch_size):
                    samples = order[first : first + self.batch_size]
                    until = {shard: passed + int(last[shard]) for shard in set(self._order.shards(samples).tolist())}
                    draws = uniform_draws(self.seed, epoch, samples, DRAWS)
                    yield Request(samples, draws, until, passed + step)
            epoch, begin = epoch + 1, 0

    def _pass(self) -> Iterator[Request]:
        first, last = self._share()
        for begin in range(first, last, self.batch_size):
            samples = np.arange(begin, min(begin + self.batch_size, last))
            until = {shard: int(self._order.starts[shard + 1]) for shard in set(self._order.shards(samples).tolist())}
            yield Request(samples, uniform_draws(self.seed, 0, samples, DRAWS), until, begin)

    def _make(self) -> _Made:
        """The next batch; read if it has not been read yet."""
        with nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            took = self._read()
            begin = time.perf_counter()
            on_this = self._maker or self.device.type == "cuda"
            batch = self._batch() if on_this else host_threads().batch.submit(self._batch).result()
            took["conversion"] = time.perf_counter() - begin
            return batch, took, None if self._stream is None else self._stream.record_event()

    def _read(self) -> dict[str, float]:
        """Read the next batches if all that were read are made; seconds that this took, by what they went into."""
        if self._used < len(self._keys):
            return {}
        assert self._reader is not None
        before = dict(self._reader.waited)
        read = self._reader.read()
        if self._read_on_gpu is not None:
            # DALI fills memory again that is let go of, in the order of its own stream, without a look at torch's.
            self._read_on_gpu.synchronize()
        self._keys, self._chunk, self._used = read.keys, read.tensors, 0
        return {what: seconds - before[what] for what, seconds in self._reader.waited.items()}

    def _batch(self) -> Batch:
        """The first of the batches that are read and not made."""
        mine = slice(self._used, self._used + self.batch_size)
        self._used += self.batch_size
        host = {name: values[mine] for name, values in self._chunk.items()}
        flipped = host["flip"] if self._plan.flip else None
        mirror = self._to_device(flipped) if flipped is not None else None
        jitter = self._jitter(host) if self._plan.jitter else None
        size, decoding = self._plan.size, not self._plan.uncompressed
        pixels = {offset: host[f"image {offset}"] for offset in self._plan.offsets}
        shown = Windows(host["windows"], size) if self._plan.crop else None
        made = {o: float_images(images, mirror, jitter, shown, decoding=decoding) for o, images in pixels.items()}
        if self.device.type == "cuda":
            self._read_on_gpu = torch.cuda.current_stream(self.device).record_event()
        stored = host["stored"][:, [1, 0]] if self._plan.stored is None else torch.tensor([self._plan.stored])
        nominal = self.config.intrinsics == "nominal"
        windows = self._shown(host["shares"], flipped) if self._plan.crop else None
        cameras = camera_matrices(host[INTRINSICS], stored, size, flipped, nominal=nominal, windows=windows)
        stereo = None
        if self._plan.stereo:
            shift = host[STEREO_TRANSLATION].flatten()
            stereo = self._to_device(stereo_transforms(shift, flipped, self.metres_per_unit))
        depth, depth_size = self._depth(host) if self._plan.depth else (None, None)
        return Batch(
            images={offset: plain for offset, (plain, _) in made.items()},
            augmented={offset: jittered for offset, (_, jittered) in made.items()},
            intrinsics=self._to_device(cameras),
            stereo=stereo,
            metres_per_unit=self.metres_per_unit,
            depth=depth,
            depth_size=depth_size,
            keys=self._keys[mine],
            seeds=self._to_device(host["seeds"]),
            flipped=mirror,
            windows=None if windows is None else self._to_device(windows.float()),
            distances=self._distances(host) if DISTANCES in self._plan.motion else {},
            poses=self._poses(host, flipped) if POSES in self._plan.motion else {},
        )

    @staticmethod
    def _shown(shares: Tensor, flipped: Tensor | None) -> Tensor:
        """Windows as shares of the images after a flip: (n, 4) left, top, width, height."""
        if flipped is None:
            return shares
        left = torch.where(flipped, 1 - shares[:, 0] - shares[:, 2], shares[:, 0])
        return torch.cat([left.unsqueeze(1), shares[:, 1:]], dim=1)

    def _of_temporal(self, numbers: Tensor) -> dict[Offset, Tensor]:
        """Numbers (B, n, ...) of the dataset's temporal frames -> offset -> (B, ...) of the configuration's."""
        places = {offset: place for place, offset in enumerate(f for f in self.dataset.manifest.frames if f)}
        return {offset: self._to_device(numbers[:, places[offset]].contiguous()) for offset in self.config.temporal}

    def _distances(self, host: dict[str, Tensor]) -> dict[Offset, Tensor]:
        return self._of_temporal(host[DISTANCES] / self.metres_per_unit)

    def _poses(self, host: dict[str, Tensor], flipped: Tensor | None) -> dict[Offset, Tensor]:
        poses = rigid_transforms(host[POSES].view(len(host[POSES]), -1, 3, 4), flipped, self.metres_per_unit)
        return self._of_temporal(poses)

    def _jitter(self, host: dict[str, Tensor]) -> Jitter:
        chosen = host["jitter"].nonzero().flatten()
        return Jitter.of(chosen, jitter_factors(host["draws"][chosen])).to(self._to_device)

    def _depth(self, host: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        size = host["depth_size"][:, :2].contiguous()
        height, width = (max(1, int(side)) for side in size.amax(0))
        depth = host["depth"][:, :height, :width].permute(0, 3, 1, 2)
        return self._to_device(depth / DEPTH_SCALE), self._to_device(size)

    def _to_device(self, tensor: Tensor) -> Tensor:
        if self.device.type != "cuda":
            return tensor
        # Not pin_memory(): it takes memory that DALI has pinned as it is, which DALI may fill again while it is copied.
        pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return pinned.copy_(tensor).to(self.device, non_blocking=True)

    def _fingerprint(self) -> dict[str, Any]:
        """What the order of the samples and their draws depend on."""
        shards = self.dataset.manifest.part(self.part)
        read = self._plan
        return {
            "part": self.part,
            "shards": hashlib.sha256("".join(shard.sha256 for shard in shards).encode()).hexdigest(),
            "seed": self.seed,
            "train": self.train,
            "shuffle": f"window of {WINDOW} shards" if self._order.shuffle == "window" else self._order.shuffle,
            "components": [
                *read.images,
                *(["stereo"] if read.stereo else []),
                *([read.depth] if read.depth else []),
                *read.motion,
            ],
            "size": list(read.size),
            "flip": read.flip,
            "color_jitter": read.jitter,
            # None as in the states of earlier versions, which have no such key.
            "crop": read.crop and list(read.crop),
        }

    def _resume(self, state: LoaderState) -> None:
        """Continue at the place of a state.

        Raises:
            UsageError: it is none, or of another set-up.
        """
        now = self._fingerprint()
        old = _OLD_READER in state
        try:
            saved, epoch = dict(state["fingerprint"]), int(state["epoch"])
            # A state of DALI's own reader: its order cannot be continued, but an epoch that was over stays over.
            over = old and state["step"] >= saved["steps"]  # type: ignore[typeddict-item]
            taken = (self.samples if over else 0) if old else int(state["samples"])
            step_samples = self.step_samples if old else int(state["step_samples"])
        except (KeyError, TypeError, ValueError) as error:
            raise UsageError(f"no place in the data can be read from the state ({error!r}); start a new run") from error
        names = now.keys() & saved.keys() if old else now.keys()
        changed = [
            f"{name} was {saved.get(name)}, is {now[name]}"
            for name in now
            if name in names and saved.get(name) != now[name]
        ]
        if changed:
            raise UsageError(
                f"cannot resume in the middle of an epoch, its samples would be others: {'; '.join(changed)}"
            )
        if epoch < 0 or not 0 <= taken <= self.samples:
            raise UsageError(f"the state is at sample {taken} of epoch {epoch}, of {self.samples}; start a new run")
        self.epoch, self._begin = epoch, taken
        if old and not over:
            self.note = (
                f"the checkpoint is of an earlier md2, whose order of samples cannot be continued: epoch {epoch + 1} "
                "starts again from its first sample, with the weights and the optimiser of the checkpoint"
            )
        elif step_samples != self.step_samples and 0 < taken < self.samples:
            self.note = (
                f"a step took {step_samples} samples and now takes {self.step_samples}: epoch {epoch + 1} continues "
                f"behind its first {taken} samples in steps of {self.step_samples}"
            )


def batches_ahead(batch_size: int, sample_bytes: int) -> int:
    """How many batches to read at once, up to `SAMPLES_AHEAD` and `BYTES_AHEAD`, but one at least."""
    return max(1, min(SAMPLES_AHEAD, BYTES_AHEAD // sample_bytes) // batch_size)
