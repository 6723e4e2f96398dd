"""The DALI graph: files of a batch in, decoded and resized images out. One for CPU and GPU.

`md2.data.plan` says what to read; `Reader` hands DALI the files of whole reads, as views of the mapped shards, and
returns tensors. What the draws do to the images is in `md2.data.augment`: on a CPU torch does it at a fraction of
DALI's cost.
"""

from __future__ import annotations

import time
import warnings
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import nvidia.dali.fn
import nvidia.dali.types
import torch
from nvidia.dali.tensors import TensorListGPU
from torch import Tensor

from md2.data.augment import FLIP_PROBABILITY, JITTER_PROBABILITY, crop_windows
from md2.data.headers import MAX_IMAGE_PIXELS, depth_problem, image_problem, image_size, no_depth, size_problem
from md2.data.plan import ReadPlan
from shards.errors import DatasetError, TrainingError, UsageError
from shards.sample import DEPTH, POSES
from shards.stream import Bytes, ShardStream

# DALI's stubs leave out half of what it exports.
dali: Any = nvidia.dali
fn, types = dali.fn, dali.types

DECODER_BYTES = 1 << 20
"""nvJPEG's first buffers, on the GPU and on the host, for each thread of each decoder; they grow. DALI's own 16 and
8 MB would be a gigabyte and more with a decoder for each image of a sample and a thread for each core."""
JPEG_ENGINES = 0.65
"""Share of the images that a GPU's JPEG engines decode, if it has any, and its multiprocessors the rest; the value is
DALI's default."""
DRAWS = 10
"""Uniform numbers of a sample: coins for flip and jitter, brightness, contrast, saturation, hue, the noise's seed, the
window's scale and place."""
_FLIP, _SHARES = "flip", "shares"
DecodeDevice = Literal["cpu", "gpu"]


class Request(NamedTuple):
    """Samples to read at once.

    Attributes:
        samples: (n,) their numbers in the part.
        draws: (n, `DRAWS`) uniform numbers of each.
        until: for each shard that they are in, the place at which it is no longer needed.
        place: where in the order of all epochs they are; shards that are needed until before it are closed.
    """

    samples: npt.NDArray[np.int64]
    draws: npt.NDArray[np.float64]
    until: dict[int, int]
    place: int


class Read(NamedTuple):
    """Samples that have been read.

    Attributes:
        keys: of the samples.
        tensors: `ReadPlan.outputs` (images uint8 (n, H, W, 3) on the device, the rest on the host; with `crop` whole,
            padded if they differ), `windows` and `shares` (n, 4) of the stored image, in pixels and as shares, `flip`
            and `jitter` (n,) bool, `draws` (n, 4) from [-1, 1), `seeds` (n,) int64, and `ReadPlan.numbers`.
    """

    keys: list[str]
    tensors: dict[str, Tensor]


class _Fed(NamedTuple):
    """Samples whose files have been handed to DALI: `files` must stay until it is done with them."""

    keys: list[str]
    tars: list[Path]
    files: dict[str, list[Bytes]]
    host: dict[str, Tensor]
    requests: Iterator[Request]
    place: int


class Reader:
    """A pipeline that is running, and what it makes, as tensors.

    Args:
        shards: the part's shards.
        starts: number of each shard's first sample.
        where: dataset and part, for messages.
        count: samples in one `read`, at most.
        threads, prefetch: decoding threads, and reads that are prepared ahead.
        decode, device: where images are decoded, and where they go.

    Raises:
        DatasetError: DALI cannot build its graph.
        TrainingError: it lacks the memory for that.
    """

    def __init__(
        self,
        plan: ReadPlan,
        shards: ShardStream,
        starts: npt.NDArray[np.int64],
        where: str,
        *,
        count: int,
        threads: int,
        prefetch: int,
        decode: DecodeDevice,
        device: torch.device,
    ) -> None:
        self.plan, self.shards, self.where, self.device = plan, shards, where, device
        self._starts, self._prefetch, self._first = starts, prefetch, True
        self._requests: Iterator[Request] = iter(())
        self._in_flight: deque[_Fed] = deque()
        self._done: deque[_Fed] = deque(maxlen=2 if device.type == "cuda" else 0)
        """What a GPU may still be reading when its results are asked for."""
        self._failed: DatasetError | TrainingError | None = None
        self.waited = {"storage": 0.0, "decoding": 0.0}
        """Seconds that `read` has waited, and for what."""
        gpu = device.type == "cuda"
        with warnings.catch_warnings():
            # cuFFT and NPP, which pip does not bring and nothing here uses.
            warnings.filterwarnings("ignore", "(?s).*(cuFFT|NPP|nppc|cufft)")
            try:
                self.pipeline = _graph(
                    plan,
                    decode,
                    "gpu" if gpu else "cpu",
                    batch_size=count,
                    num_threads=threads,
                    device_id=(device.index or 0) if gpu else None,
                    prefetch_queue_depth=prefetch,
                )
                self.pipeline.build()
            except (RuntimeError, ValueError, MemoryError) as error:
                raise _memory_problem(error) or DatasetError(f"{where} cannot be read: {_reason(error)}") from error

    def start(self, requests: Iterator[Request]) -> None:
        """Read these from now on, of which there are as many as `prefetch` or more; what was being read is dropped."""
        self._requests = requests

    def read(self) -> Read:
        """The next samples.

        DALI continues after an error and loses what it was at. Here an error is final, so that no epoch ends early in
        silence.

        Raises:
            DatasetError: a sample that cannot be decoded or is not what the manifest promises, now or before.
            TrainingError: DALI lacks memory.
        """
        if self._failed is not None:
            raise self._failed
        try:
            return self._read()
        except (DatasetError, TrainingError) as error:
            self._failed = error
            raise

    def _read(self) -> Read:
        while len(self._in_flight) < self._prefetch and self._feed():
            pass
        while self._in_flight[0].requests is not self._requests:
            self._outputs(self._in_flight[0])
            self._feed()
        fed = self._in_flight[0]
        outputs = dict(zip(self.plan.outputs, self._outputs(fed), strict=True))
        self._feed()
        self._check_shapes(outputs, fed)
        tensors = {name: _tensor(output) for name, output in outputs.items()} | fed.host
        if self.plan.depth == "sometimes":
            tensors["depth_size"] = tensors["depth_size"].masked_fill(tensors["no depth"].unsqueeze(1), 0)
        return Read(fed.keys, tensors)

    def _outputs(self, fed: _Fed) -> Any:
        """What DALI made of the oldest files that it was given."""
        stream = torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None
        begin = time.perf_counter()
        try:
            outputs = self.pipeline.share_outputs(stream)
            self.pipeline.release_outputs()
        except (RuntimeError, StopIteration, MemoryError) as error:
            raise self._explained(error, fed) from error
        finally:
            self.waited["decoding"] += time.perf_counter() - begin
        self._done.append(self._in_flight.popleft())
        return outputs

    def _feed(self) -> bool:
        """Hand the files of the next request to DALI; False if that was the last."""
        request = next(self._requests, None)
        if request is None:
            return False
        fed = self._collect(request)
        names = [*self.plan.images, *([DEPTH] if self.plan.depth else [])]
        for name in names:
            self.pipeline.feed_input(name, fed.files[name])
        if self.plan.depth and self.plan.flip:
            self.pipeline.feed_input(_FLIP, fed.host["flip"].int().numpy())
        if self.plan.depth and self.plan.crop:
            # (height, width), as DALI counts axes.
            self.pipeline.feed_input(_SHARES, fed.host["shares"].numpy()[:, [1, 0, 3, 2]].astype(np.float32, "C"))
        self._in_flight.append(fed)
        # DALI's first run starts as many as it prepares ahead, each of which must have its files.
        if self._first and len(self._in_flight) < self._prefetch:
            return True
        self._first = False
        try:
            self.pipeline.schedule_run()
        except (RuntimeError, MemoryError) as error:
            raise self._explained(error, fed) from error
        return True

    def _collect(self, request: Request) -> _Fed:
        """Views of the request's files, after a look at what no decoder checks."""
        plan = self.plan
        oldest = next(iter([*self._done, *self._in_flight]), None)
        self.shards.close_before(min(request.place, request.place if oldest is None else oldest.place))
        begin = time.perf_counter()
        opened = {number: self.shards.get(number, until) for number, until in request.until.items()}
        self.waited["storage"] += time.perf_counter() - begin
        shards = np.searchsorted(self._starts, request.samples, side="right") - 1
        places = (request.samples - self._starts[shards]).tolist()
        found = [(opened[shard], place) for shard, place in zip(shards.tolist(), places, strict=True)]
        keys, tars = [shard.keys[place] for shard, place in found], [shard.tar for shard, _ in found]
        names = [*plan.images, *plan.numbers, *([DEPTH] if plan.depth else [])]
        files = {name: [shard.component(place, name) for shard, place in found] for name in names}
        host = self._drawn(request.draws)
        if plan.depth == "sometimes":
            host["no depth"] = torch.tensor([view is None for view in files[DEPTH]])
            files[DEPTH] = [no_depth() if view is None else view for view in files[DEPTH]]
        for name, count in plan.motion.items():
            unknown = np.full(count, np.nan, "<f4").view(np.uint8)
            files[name] = [unknown if view is None and name != POSES else view for view in files[name]]
        for name, views in files.items():
            if any(view is None for view in views):
                key = keys[next(place for place, view in enumerate(views) if view is None)]
                raise self._wrong(key, f"has no {name}, which the manifest promises")
        fed = _Fed(keys, tars, files, host, self._requests, request.place)  # type: ignore[arg-type]
        self._check_files(fed)
        if plan.crop:
            host |= self._windows(request.draws[:, 7:], fed)
        for name, count in plan.numbers.items():
            host[name] = self._numbers(keys, name, count, fed.files.pop(name))
        return fed

    def _drawn(self, draws: npt.NDArray[np.float64]) -> dict[str, Tensor]:
        uniform = torch.from_numpy(draws)
        found = {"seeds": (uniform[:, 6] * 2**53).long()}
        if self.plan.flip:
            found["flip"] = uniform[:, 0] < FLIP_PROBABILITY
        if self.plan.jitter:
            found |= {"jitter": uniform[:, 1] < JITTER_PROBABILITY, "draws": (2 * uniform[:, 2:6] - 1).float()}
        return found

    def _windows(self, draws: npt.NDArray[np.float64], fed: _Fed) -> dict[str, Tensor]:
        """The window of each sample, in pixels and in shares; all images of a sample must have one size."""
        assert self.plan.crop is not None
        sizes = np.array([image_size(file.data) for file in fed.files[self.plan.images[0]]], np.int64)
        for name in self.plan.images:
            for place, file in enumerate(fed.files[name]):
                expected = self.plan.stored or tuple(sizes[place].tolist())
                if (found := image_size(file.data)) != expected:
                    what = f"{fed.tars[place]}: {fed.keys[place]}.{name}"
                    raise self._wrong(what, f"is {found} pixels large instead of {expected}")
        windows = torch.from_numpy(crop_windows(draws, sizes, self.plan.crop))
        return {"windows": windows, "shares": windows / torch.from_numpy(np.tile(sizes, 2))}

    def _numbers(self, keys: list[str], name: str, count: int, files: list[Bytes]) -> Tensor:
        """(n, count) float32 out of files that are nothing else."""
        sizes = [len(file) for file in files]
        if sizes.count(4 * count) < len(sizes):
            place = next(place for place, size in enumerate(sizes) if size != 4 * count)
            raise self._wrong(keys[place], f"{name} has {sizes[place]} bytes instead of {4 * count}")
        return torch.from_numpy(np.concatenate(files).view("<f4").reshape(len(files), count))

    def _check_files(self, fed: _Fed) -> None:
        """Look at the beginnings of the files: decoders believe what they claim, and take memory for it."""
        stored = self.plan.stored
        most = MAX_IMAGE_PIXELS if stored is None else stored[0] * stored[1]
        for name in [*self.plan.images, *([DEPTH] if self.plan.depth else [])]:
            for place, file in enumerate(fed.files[name]):
                if name == DEPTH:
                    problem = depth_problem(file)
                else:
                    problem = self._pixels_problem(file) if self.plan.uncompressed else size_problem(file, most)
                if problem:
                    raise self._wrong(f"{fed.tars[place]}: {fed.keys[place]}.{name}", problem)

    def _pixels_problem(self, file: Bytes) -> str | None:
        """Why a file is not the header and pixels that it must be, which no decoder looks at."""
        header = self.plan.header
        size = len(header) + 3 * self.plan.size[0] * self.plan.size[1]
        if len(file) != size:
            return f"has {len(file)} bytes, an image of this dataset's size has {size}"
        return None if file[: len(header)].tobytes() == header else f"does not begin with {header!r}"

    def _check_shapes(self, outputs: dict[str, Any], fed: _Fed) -> None:
        if self.plan.crop:
            return  # `_windows` looked at them
        width, height = self.plan.size
        for offset in self.plan.offsets:
            output = outputs[f"image {offset}"]
            if output.is_dense_tensor() and tuple(output[0].shape()) == (height, width, 3):
                continue
            shapes = [tuple(array.shape()) for array in output]
            place = next(place for place, shape in enumerate(shapes) if shape != (height, width, 3))
            raise self._wrong(
                fed.keys[place],
                f"image {offset} has the shape {shapes[place]}, the manifest promises {(height, width, 3)}",
            )

    def _wrong(self, what: str, problem: str) -> DatasetError:
        return DatasetError(f"{self.where}: {what} {problem}; pull or pack the dataset again")

    def _explained(self, error: BaseException, fed: _Fed) -> DatasetError | TrainingError:
        """What stopped DALI: memory, or an image, which is looked for among those that it was given."""
        if lacking := _memory_problem(error):
            return lacking
        for name in [*self.plan.images, *([DEPTH] if self.plan.depth else [])]:
            for key, tar, file in zip(fed.keys, fed.tars, fed.files[name], strict=True):
                if problem := image_problem(file):
                    return DatasetError(
                        f"{self.where}: {tar}: {key}.{name} {problem}; verify it with md2 shards verify"
                    )
        return TrainingError(f"{self.where}: DALI fails at samples {fed.keys[0]} to {fed.keys[-1]}: {_reason(error)}")


def _tensor(output: Any) -> Tensor:
    """One of the pipeline's outputs, without a copy."""
    dense = output.as_tensor()
    if isinstance(output, TensorListGPU):
        return torch.utils.dlpack.from_dlpack(dense)
    # Through NumPy, for which host memory that DALI has pinned for a GPU is like any other.
    return torch.from_numpy(np.asarray(dense))


@dali.pipeline_def  # type: ignore[untyped-decorator]
def _graph(plan: ReadPlan, decode: DecodeDevice, target: DecodeDevice) -> tuple[Any, ...]:
    """Outputs as `ReadPlan.outputs` names them: images uint8 (H, W, 3) on `target`, the rest on the host."""
    files = [_files(name) for name in plan.images]
    outputs = _raw_images(plan, files, target) if plan.uncompressed else _images(plan, files, decode, target)
    if plan.stored is None:
        outputs.append(fn.peek_image_shape(files[0]))
    if plan.depth is None:
        return tuple(outputs)
    depth = fn.decoders.image(_files(DEPTH), device="cpu", output_type=types.ANY_DATA, dtype=types.UINT16)
    depth = fn.cast(depth, dtype=types.FLOAT)
    if plan.crop:
        shares = fn.external_source(name=_SHARES, dtype=types.FLOAT, ndim=1)
        depth = fn.slice(depth, rel_start=shares[:2], rel_shape=shares[2:], axes=[0, 1])
    if plan.flip:
        depth = fn.flip(depth, horizontal=fn.external_source(name=_FLIP, dtype=types.INT32, ndim=0))
    return (*outputs, fn.pad(depth), depth.shape())


def _files(name: str) -> Any:
    """Files of one component as Python hands them in: no copy, so that they are read by the threads that decode."""
    return fn.external_source(name=name, dtype=types.UINT8, ndim=1, no_copy=True)


def _images(plan: ReadPlan, encoded: list[Any], decode: DecodeDevice, target: DecodeDevice) -> list[Any]:
    """Decode; resize if the size differs and no windows are cut out later."""
    options = {
        "device": "mixed" if decode == "gpu" else "cpu",
        "output_type": types.RGB,
        "jpeg_fancy_upsampling": True,
        "device_memory_padding": DECODER_BYTES,
        "host_memory_padding": DECODER_BYTES,
        "affine": False,  # ranks that share a machine would be tied to the same cores
    }
    if decode == "gpu":
        options["hw_decoder_load"] = JPEG_ENGINES
        if plan.stored is not None:
            # Their buffers are made at once: to grow them later halts the GPU.
            options["preallocate_width_hint"], options["preallocate_height_hint"] = plan.stored
    images = fn.decoders.image(encoded, **options)
    if plan.crop and plan.stored is None:
        # Of one shape, to be one tensor. To cut the windows out here would cost half as much again as decoding.
        images = fn.pad(images, axes=[0, 1])
    elif plan.stored != plan.size and not plan.crop:
        width, height = plan.size
        # Lanczos with antialiasing is what prep resizes with.
        images = fn.resize(images, size=[height, width], interp_type=types.INTERP_LANCZOS3, antialias=True)
    nodes = images if isinstance(images, list) else [images]  # DALI unpacks a list of one
    if decode == "cpu" and target == "gpu":
        nodes = [image.gpu() for image in nodes]
    return nodes


def _raw_images(plan: ReadPlan, files: list[Any], target: DecodeDevice) -> list[Any]:
    """What follows the header, in one piece for the whole read."""
    width, height = plan.size
    start, shape = [len(plan.header)], [3 * width * height]
    pixels = [fn.slice(file, start=start, shape=shape, axes=[0]) for file in files]
    images = [fn.reshape(image, shape=[height, width, 3], layout="HWC") for image in pixels]
    return [image.gpu() for image in images] if target == "gpu" else images


def _memory_problem(error: BaseException) -> TrainingError | None:
    """What to say if DALI failed for lack of memory, on the GPU or the host."""
    signs = ("out of memory", "bad_alloc", "CUDA allocation failed", "Can't allocate")
    if not isinstance(error, MemoryError) and not any(sign in str(error) for sign in signs):
        return None
    return TrainingError(
        f"DALI is out of memory ({_reason(error)}); lower train.batch_size, data.prefetch or data.threads"
    )


def _reason(error: BaseException) -> str:
    """What happened, out of DALI's pages of context."""
    text = str(error)
    for line in text.splitlines():
        if "Failed to decode" in line:
            return line.strip()
    lines = text.rpartition("encountered:")[2].strip().splitlines()
    return lines[0] if lines else type(error).__name__


def decode_device(wanted: str, device: torch.device) -> DecodeDevice:
    """Where to decode: `data.device` `auto` is the GPU if the batches go to one.

    Raises:
        UsageError: `gpu`, but the batches go to the CPU.
    """
    if wanted == "gpu" and device.type != "cuda":
        raise UsageError(f"data.device gpu needs training on a GPU, but train.device is {device.type}")
    return "gpu" if wanted != "cpu" and device.type == "cuda" else "cpu"
