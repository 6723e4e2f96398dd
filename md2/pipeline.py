"""The loader: tar shards in, `Batch`es on the training device out, resumable in the middle of an epoch.

    loader = Loader(open_dataset(url), "train", config.data, batch_size=12, seed=0, train=True, device=device)
    for epoch in range(20):
        for batch in loader:  # len(loader) batches, the same number on every rank
            ...
    torch.save(loader.state(), path)  # later: Loader(..., state=torch.load(path))

Training: an epoch is `len(loader)` full batches. Every rank reads its own share of the samples, another
one each epoch; what does not fill a batch on every rank is left out, and since shards and samples are
reordered each epoch, it is other samples each time. Evaluation: every sample exactly once, in the
dataset's order, unflipped and without jitter; the last batch may be smaller.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from functools import cache
from math import ceil
from typing import Any, TypedDict

import numpy as np
import torch
from nvidia.dali.tensors import TensorListGPU
from torch import Tensor

from md2.augment import Jitter, camera_matrices, float_images, jitter_factors, sample_keys, stereo_transforms
from md2.batch import Batch, Offset
from md2.config import DataConfig
from md2.reader import READER, Device, build, explain, plan, source_strings
from shards.dataset import LocalDataset
from shards.errors import DatasetError, UsageError
from shards.sample import DEPTH_SCALE

PAPER_METRES_PER_UNIT = 5.4
"""The paper's stereo baseline is 0.1 for KITTI's 0.54 m."""


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
        self._steps, self._taken_by_reader = self._count(accumulate)
        self.epoch, self.step = 0, 0
        self._failed: DatasetError | None = None
        if state is not None:
            self._check(state)
            self.epoch, self.step = state["epoch"], state["step"]
        self._pipeline = self._build(state["reader"] if state is not None else None)

    def __len__(self) -> int:
        """Batches per epoch. In training the same on every rank; in evaluation of this rank's share."""
        return self._steps

    def __iter__(self) -> Iterator[Batch]:
        """The rest of this epoch, or the next one if it is over. In evaluation always a whole pass."""
        if self.step >= self._steps:
            self._finish_epoch()
        elif self.step > 0 and not self.train:
            self._pipeline = self._build(None)
            self.step = 0
        while self.step < self._steps:
            outputs = self._run()
            self.step += 1
            yield (
                self._batch(outputs)
                if self.device.type == "cuda"
                else host_thread().submit(self._batch, outputs).result()
            )

    def state(self) -> LoaderState:
        """Where this loader stands: after the batch last taken, whatever is prefetched already."""
        if self._failed is not None:
            raise self._failed
        return LoaderState(
            fingerprint=self._fingerprint(), epoch=self.epoch, step=self.step, reader=self._pipeline.checkpoint()
        )

    def _count(self, accumulate: int) -> tuple[int, int]:
        """Batches per epoch that are handed out, and that DALI's reader makes of it (padded, alike on all ranks)."""
        made = ceil(ceil(self.samples / self.world) / self.batch_size)
        if self.train:
            whole = self.samples // self.world // self.batch_size
            return whole // accumulate * accumulate, made
        return ceil(self._share() / self.batch_size), made

    def _share(self) -> int:
        """Samples of this rank in evaluation; the reader cuts the dataset at these places."""
        begin, end = (self.samples * cut // self.world for cut in (self.rank, self.rank + 1))
        return end - begin

    def _build(self, checkpoint: bytes | None) -> Any:
        gpu = self.device.type == "cuda"
        target: Device = "gpu" if gpu else "cpu"
        cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        try:
            pipeline = build(
                self._plan,
                batch_size=self.batch_size,
                seed=self.seed,
                rank=self.rank,
                world=self.world,
                threads=self.config.threads or max(1, cores),
                prefetch=self.config.prefetch,
                decode=self._decode,
                target=target,
                device_id=(self.device.index or 0) if gpu else None,
                checkpoint=checkpoint,
            )
        except RuntimeError as error:
            if checkpoint is not None:
                raise UsageError(f"the loader's state does not fit this set-up: {explain(error, None)}") from error
            raise DatasetError(
                f"{self.dataset.url}: part {self.part!r} cannot be read: {explain(error, None)}"
            ) from error
        found = pipeline.reader_meta(READER)["epoch_size"]
        if found != self.samples:
            raise DatasetError(
                f"{self.dataset.url}: part {self.part!r} has {found} readable samples, its manifest says "
                f"{self.samples}; verify it with md2 shards verify"
            )
        return pipeline

    def _run(self) -> dict[str, Any]:
        """The next batch of the pipeline, by output name.

        DALI goes on after an error and loses the batch: here an error is final, so that no epoch ends early in silence.
        """
        if self._failed is not None:
            raise self._failed
        stream = torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None
        try:
            outputs = self._pipeline.run(stream)
        except (RuntimeError, StopIteration) as error:
            self._failed = DatasetError(
                f"{self.dataset.url}: part {self.part!r}, epoch {self.epoch}, batch {self.step}: "
                f"{explain(error, self._plan)}; verify it with md2 shards verify"
            )
            raise self._failed from error
        return dict(zip(self._plan.outputs, outputs, strict=True))

    def _finish_epoch(self) -> None:
        """Pass over what the reader made beyond the epoch's batches: padding, and what fills no batch."""
        for _ in range(self._taken_by_reader - self._steps):
            self._run()
        self.epoch, self.step = self.epoch + 1, 0

    def _batch(self, outputs: dict[str, Any]) -> Batch:
        count = self._valid()
        keys = sample_keys(source_strings(_tensor(outputs["source"]).numpy()[:count]))
        host = {name: self._dense(name, value, keys) for name, value in outputs.items()}
        flipped = host["flip"].bool().flatten() if self._plan.flip else None
        mirror = self._to_device(flipped) if flipped is not None else None
        images: dict[Offset, Tensor] = {
            offset: float_images(host[f"image {offset}"], mirror) for offset in self._plan.offsets
        }
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
            images=images,
            augmented=self._jitter(images, host) if self._plan.jitter else images,
            intrinsics=self._to_device(cameras),
            stereo=stereo,
            metres_per_unit=self.metres_per_unit,
            depth=depth,
            depth_size=depth_size,
            keys=keys,
        )

    def _dense(self, name: str, output: Any, keys: list[str]) -> Tensor:
        """An output of the batch's samples as one tensor.

        Raises:
            DatasetError: a sample's image, intrinsics or translation is not of the size that the manifest promises.
        """
        expected = self._plan.shapes.get(name)
        if expected is not None and (not output.is_dense_tensor() or tuple(output[0].shape()) != expected):
            for key, array in zip(keys, output, strict=False):
                if tuple(array.shape()) != expected:
                    self._failed = DatasetError(
                        f"{self.dataset.url}: part {self.part!r}: {key}: {name} has the shape {tuple(array.shape())}, "
                        f"the manifest promises {expected}; pull or pack the dataset again"
                    )
                    raise self._failed
        return _tensor(output)[: len(keys)]

    def _valid(self) -> int:
        """Samples of the batch just taken that are no padding."""
        if self.train:
            return self.batch_size
        return min(self.batch_size, self._share() - (self.step - 1) * self.batch_size)

    def _jitter(self, images: dict[Offset, Tensor], host: dict[str, Tensor]) -> dict[Offset, Tensor]:
        chosen = host["jitter"].flatten().nonzero().flatten()
        jitter = Jitter.of(chosen, jitter_factors(host["draws"][chosen])).to(self._to_device)
        return {offset: jitter(image) for offset, image in images.items()}

    def _depth(self, host: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        size = host["depth_size"][:, :2].contiguous()
        height, width = (max(1, int(side)) for side in size.amax(0))
        depth = host["depth"][:, :height, :width].permute(0, 3, 1, 2).contiguous()
        return self._to_device(depth).div_(DEPTH_SCALE), self._to_device(size)

    def _to_device(self, tensor: Tensor) -> Tensor:
        if self.device.type != "cuda":
            return tensor
        return tensor.pin_memory().to(self.device, non_blocking=True)

    def _fingerprint(self) -> dict[str, Any]:
        """What the order of the samples and the draws depend on. Threads, queue depth and paths do not matter."""
        shards = self.dataset.manifest.part(self.part)
        read = self._plan
        return {
            "part": self.part,
            "shards": hashlib.sha256("".join(shard.sha256 for shard in shards).encode()).hexdigest(),
            "batch_size": self.batch_size,
            "steps": self._steps,
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


def decode_device(wanted: str, device: torch.device) -> Device:
    """Where to decode: `data.device` `auto` is the GPU if the batches go to one.

    Raises:
        UsageError: `gpu`, but the batches go to the CPU.
    """
    if wanted == "gpu" and device.type != "cuda":
        raise UsageError(f"data.device gpu needs training on a GPU, but train.device is {device.type}")
    return "gpu" if wanted != "cpu" and device.type == "cuda" else "cpu"


def _tensor(output: Any) -> Tensor:
    """One of the pipeline's outputs, without a copy."""
    dense = output.as_tensor()
    if isinstance(output, TensorListGPU):
        return torch.utils.dlpack.from_dlpack(dense)
    # Through NumPy, for which host memory that DALI has pinned for a GPU is like any other.
    return torch.from_numpy(np.asarray(dense))


@cache
def host_thread() -> Executor:
    """A thread whose tensor operations do not fan out over the cores, which DALI's threads keep busy.

    An operation that is spread over OpenMP threads ends with the slowest of them: beside decoding, a product of
    microseconds was seen to take ten milliseconds. torch's setting holds for the thread that makes it, and for
    threads that start later, so it is put back for those.
    """
    threads = torch.get_num_threads()
    executor = ThreadPoolExecutor(1, "md2-loader", initializer=torch.set_num_threads, initargs=(1,))
    executor.submit(torch.get_num_threads).result()
    torch.set_num_threads(threads)
    return executor
