"""The DALI graph: tar shards -> decoded, resized images and the draws of augmentation. One for CPU and GPU.

`plan` says what to read and checks it against the manifest; `Reader` runs the pipeline. What the draws do to the
images is in `md2.data.augment`: torch does it at a fraction of DALI's cost on a CPU.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import numpy as np
import nvidia.dali.fn
import nvidia.dali.types
import torch
from nvidia.dali.tensors import TensorListGPU
from PIL import Image
from torch import Tensor

from md2.config import DataConfig
from md2.data.augment import FLIP_PROBABILITY, JITTER_PROBABILITY
from md2.data.reader_state import transplant
from shards.dataset import LocalDataset
from shards.errors import DatasetError, UsageError
from shards.manifest import Manifest
from shards.sample import DEPTH, INTRINSICS, STEREO_TRANSLATION, Offset, ppm_header
from shards.tar import parse_index

# DALI's stubs leave out half of what it exports.
dali: Any = nvidia.dali
fn, types = dali.fn, dali.types

READER = "shards"
HEADER_BYTES = 4096
MAX_IMAGE_PIXELS = 1 << 26
"""A larger image is refused before it is decoded: 67 million pixels, 201 MB."""
DECODER_BYTES = 1 << 20
"""nvJPEG's buffers to begin with, on the GPU and on the host, for each thread of each decoder; they grow. DALI's own
16 and 8 MB would be a gigabyte and more with a decoder for each image of a sample and a thread for each core."""
Device = Literal["cpu", "gpu"]


@dataclass(frozen=True)
class Plan:
    """What one pipeline reads and does; the same on every rank and device.

    Attributes:
        tars, indexes: paths of the part's shards.
        offsets: images to decode; `images` are their components, in the same order.
        stereo: read the stereo translation.
        depth: `always` and `sometimes` (not in every sample), or None.
        stored: width and height of the stored images, None where it differs from sample to sample.
        size: width and height of the batch's images.
        header: what every image's file begins with where it is `uncompressed`, else nothing.
        flip, jitter: draw them.
        shuffle: reorder shards and samples; None: read in order.
    """

    tars: tuple[str, ...]
    indexes: tuple[str, ...]
    offsets: tuple[Offset, ...]
    images: tuple[str, ...]
    stereo: bool
    depth: Literal["always", "sometimes"] | None
    stored: tuple[int, int] | None
    size: tuple[int, int]
    header: bytes
    flip: bool
    jitter: bool
    shuffle: int | None

    @property
    def uncompressed(self) -> bool:
        """Whether the pixels follow a header as they are, at the batch's size: they need no decoder."""
        return bool(self.header)

    @property
    def outputs(self) -> list[str]:
        """Names of the pipeline's outputs, in order."""
        names = [f"image {offset}" for offset in self.offsets]
        names += [f"head {offset}" for offset in self.offsets] if self.uncompressed else []
        names += ["source", "intrinsics"]
        names += ["translation"] if self.stereo else []
        names += ["stored"] if self.stored is None else []
        names += ["flip"] if self.flip else []
        names += ["jitter", "draws"] if self.jitter else []
        return names + (["depth", "depth_size"] if self.depth else [])

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of one sample of those outputs that the manifest promises one for."""
        width, height = self.size
        pixels = (height, width, 3)
        stored = (len(self.header) + height * width * 3,) if self.uncompressed else pixels
        images = {f"image {offset}": stored for offset in self.offsets}
        return {**images, "intrinsics": (4,), "translation": (1,)}


@dataclass(frozen=True)
class Seeds:
    """Of everything random, one by one: what is read or decoded besides changes no draw."""

    shards: int
    samples: int
    flip: int
    jitter: int
    draws: int

    @classmethod
    def of(cls, seed: int, rank: int) -> Seeds:
        """The shards' order is the same on all ranks, since they divide it among themselves."""
        own = [int(state) for state in np.random.SeedSequence([seed, rank]).generate_state(4)]
        return cls(seed, *own)


def plan(dataset: LocalDataset, part: str, config: DataConfig, *, train: bool, depth: bool) -> Plan:
    """Check what the configuration asks for against what the dataset has.

    Raises:
        UsageError: frames, the stereo partner or depth that the dataset does not have.
        DatasetError: no such part, or its files are not what the manifest says.
    """
    manifest = dataset.manifest
    offsets: list[Offset] = [*config.frames, *(["s"] if config.stereo else [])]  # type: ignore[list-item]
    images = [manifest.image_component(offset) for offset in offsets]
    wanted = [*images, INTRINSICS, *([STEREO_TRANSLATION] if config.stereo else [])]
    if missing := [name for name in wanted if name not in manifest.components]:
        raise UsageError(
            f"{dataset.url}: not every sample has {', '.join(missing)}, which data.frames {config.frames} and "
            f"data.stereo {str(config.stereo).lower()} ask for; the dataset has {_contents(manifest)}"
        )
    if depth and DEPTH not in [*manifest.components, *manifest.optional_components]:
        raise UsageError(f"{dataset.url}: has no ground truth depth; the dataset has {_contents(manifest)}")
    size = (config.width, config.height)
    return Plan(
        tars=tuple(str(path) for path in dataset.tars(part)),
        indexes=tuple(str(path) for path in dataset.indexes(part)),
        offsets=tuple(offsets),
        images=tuple(images),
        stereo=config.stereo,
        depth=None if not depth else "always" if DEPTH in manifest.components else "sometimes",
        stored=manifest.size,
        size=size,
        header=ppm_header(*size) if manifest.codec == "ppm" and manifest.size == size else b"",
        flip=train and config.flip,
        jitter=train and config.color_jitter,
        shuffle=config.shuffle_buffer if train else None,
    )


def _contents(manifest: Manifest) -> str:
    sometimes = [f"{name} in {count} of them" for name, count in manifest.optional_components.items()]
    return ", ".join([*manifest.components, *sometimes])


class Reader:
    """A pipeline that is running, and what it makes, as tensors.

    Args:
        where: dataset and part, for messages.
        count: samples in one `read`.
        seed: fixes the order of the shards, the same on all ranks; each rank draws its own numbers otherwise.
        rank, world: which share of the samples to read.
        threads, prefetch: decoding threads, and reads that are prepared ahead.
        decode, device: where images are decoded, and where they go.
        checkpoint: go on where another reader's `checkpoint()` was taken.

    Raises:
        UsageError: the checkpoint is of another pipeline.
        DatasetError: files that DALI cannot open.
    """

    def __init__(
        self,
        plan: Plan,
        where: str,
        *,
        count: int,
        seed: int,
        rank: int,
        world: int,
        threads: int,
        prefetch: int,
        decode: Device,
        device: torch.device,
        checkpoint: bytes | None = None,
    ) -> None:
        self.plan, self.where, self.device = plan, where, device
        self._failed: DatasetError | None = None
        seeds = Seeds.of(seed, rank)
        gpu = device.type == "cuda"

        def start(checkpoint: bytes | None) -> Any:
            pipeline = _graph(
                plan,
                _reader_arguments(plan, seeds, rank, world),
                seeds,
                decode,
                "gpu" if gpu else "cpu",
                batch_size=count,
                num_threads=threads,
                device_id=(device.index or 0) if gpu else None,
                prefetch_queue_depth=prefetch,
                enable_checkpointing=True,
                checkpoint=checkpoint,
            )
            pipeline.build()
            return pipeline

        try:
            self.pipeline = start(None) if checkpoint is None else _go_on(start, checkpoint)
        except (RuntimeError, ValueError) as error:
            if checkpoint is not None:
                raise UsageError(f"the loader's state does not fit this set-up: {explain(error, None)}") from error
            raise DatasetError(f"{where} cannot be read: {explain(error, None)}") from error

    @property
    def samples(self) -> int:
        """What DALI found in the part, over all ranks."""
        found: int = self.pipeline.reader_meta(READER)["epoch_size"]
        return found

    def checkpoint(self) -> bytes:
        """Where reading stands: after the last `read`, whatever has been prepared since.

        Raises:
            DatasetError: a `read` failed.
        """
        if self._failed is not None:
            raise self._failed
        state: bytes = self.pipeline.checkpoint()
        return state

    def read(self) -> dict[str, Tensor]:
        """The next samples, by the names of `Plan.outputs`: images on the device, the rest on the host.

        DALI goes on after an error and loses what it was at. Here an error is final, so that no epoch ends early in
        silence.

        Raises:
            DatasetError: a sample that cannot be decoded or is not what the manifest promises, now or before.
        """
        if self._failed is not None:
            raise self._failed
        stream = torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None
        try:
            outputs = dict(zip(self.plan.outputs, self.pipeline.run(stream), strict=True))
            self._check_shapes(outputs)
            tensors = {name: _tensor(output) for name, output in outputs.items()}
            return self._pixels(tensors) if self.plan.uncompressed else tensors
        except (RuntimeError, StopIteration) as error:
            self._failed = DatasetError(f"{self.where}: {explain(error, self.plan)}; verify it with md2 shards verify")
            raise self._failed from error
        except DatasetError as error:
            self._failed = error
            raise

    def _check_shapes(self, outputs: dict[str, Any]) -> None:
        for name, expected in self.plan.shapes.items():
            if name not in outputs:
                continue
            output = outputs[name]
            if output.is_dense_tensor() and tuple(output[0].shape()) == expected:
                continue
            shapes = [tuple(array.shape()) for array in output]
            place = next(place for place, shape in enumerate(shapes) if shape != expected)
            key = sample_keys(_tensor(outputs["source"])[place : place + 1])[0]
            raise DatasetError(
                f"{self.where}: {key}: {name} has the shape {shapes[place]}, the manifest promises {expected}; "
                "pull or pack the dataset again"
            )

    def _pixels(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Images out of files that are a header and pixels, without a copy; the headers are looked at on the host."""
        (width, height), header = self.plan.size, self.plan.header
        expected = torch.frombuffer(bytearray(header), dtype=torch.uint8)
        for offset in self.plan.offsets:
            wrong = (tensors.pop(f"head {offset}") != expected).any(1).nonzero()
            if len(wrong):
                key = sample_keys(tensors["source"][wrong[0]])[0]
                raise DatasetError(
                    f"{self.where}: {key}: image {offset} does not begin with {header!r}, as every image of this "
                    "dataset must; pull or pack it again"
                )
            name = f"image {offset}"
            tensors[name] = tensors[name][:, len(header) :].view(-1, height, width, 3)
        return tensors


def _go_on(start: Callable[[bytes | None], Any], checkpoint: bytes) -> Any:
    """A pipeline that goes on at a checkpoint, also at one of the same reader with images on another device."""
    try:
        return start(checkpoint)
    except RuntimeError:
        return start(transplant(checkpoint, start(None).checkpoint()))


def _tensor(output: Any) -> Tensor:
    """One of the pipeline's outputs, without a copy."""
    dense = output.as_tensor()
    if isinstance(output, TensorListGPU):
        return torch.utils.dlpack.from_dlpack(dense)
    # Through NumPy, for which host memory that DALI has pinned for a GPU is like any other.
    return torch.from_numpy(np.asarray(dense))


def sample_keys(sources: Tensor) -> list[str]:
    """Keys out of DALI's `source_info`: rows of `<tar>:<offset>:<key>.<component>`, zero-padded uint8."""
    padded = np.ascontiguousarray(sources.numpy())
    rows: list[bytes] = padded.view(f"S{padded.shape[1]}")[:, 0].tolist()
    return [row.rpartition(b":")[2].partition(b".")[0].decode() for row in rows]


def _reader_arguments(plan: Plan, seeds: Seeds, rank: int, world: int) -> dict[str, Any]:
    arguments: dict[str, Any] = {"num_shards": world, "shard_id": rank, "pad_last_batch": True, "name": READER}
    if plan.shuffle is None:
        return {**arguments, "stick_to_shard": True}
    return {
        **arguments,
        "random_shuffle": True,
        "initial_fill": plan.shuffle,
        "seed": seeds.samples,
        "shuffle_after_epoch": True,
        "shuffle_after_epoch_seed": seeds.shards,
    }


@dali.pipeline_def(enable_conditionals=True)  # type: ignore[untyped-decorator]
def _graph(plan: Plan, reader: dict[str, Any], seeds: Seeds, decode: Device, target: Device) -> tuple[Any, ...]:
    """Outputs as `Plan.outputs` names them: images uint8 (H, W, 3) on `target`, the rest on the host."""
    read = _read(plan, reader)
    encoded = [read[name] if plan.uncompressed else _bounded(read[name]) for name in plan.images]
    flip = fn.random.coin_flip(probability=FLIP_PROBABILITY, seed=seeds.flip, name="flip") if plan.flip else None
    outputs: list[Any] = (
        _raw_images(plan.header, encoded, target) if plan.uncompressed else _images(plan, encoded, decode, target)
    )
    outputs += [fn.pad(fn.get_property(encoded[0], key="source_info")), read[INTRINSICS]]
    if plan.stereo:
        outputs.append(read[STEREO_TRANSLATION])
    if plan.stored is None:
        outputs.append(fn.peek_image_shape(encoded[0]))
    if plan.flip:
        outputs.append(flip)
    if plan.jitter:
        outputs.append(fn.random.coin_flip(probability=JITTER_PROBABILITY, seed=seeds.jitter, name="jitter"))
        outputs.append(fn.random.uniform(range=[-1.0, 1.0], shape=[4], seed=seeds.draws, name="draws"))
    if plan.depth == "always":
        outputs += _depth(read[DEPTH], flip)
    elif plan.depth == "sometimes":
        if read[DEPTH].shape()[0] > 0:
            depth, size = _depth(read[DEPTH], flip)
        else:
            depth, size = _no_depth()
        outputs += [depth, size]
    if plan.depth:
        outputs[-2] = fn.pad(outputs[-2])
    return tuple(outputs)


def _read(plan: Plan, reader: dict[str, Any]) -> dict[str, Any]:
    """Component name -> its bytes or numbers; an empty tensor where a sample does not have it."""
    names = [*plan.images, INTRINSICS]
    kinds = [types.UINT8] * len(plan.images) + [types.FLOAT]
    if plan.stereo:
        names, kinds = [*names, STEREO_TRANSLATION], [*kinds, types.FLOAT]
    if plan.depth:
        names, kinds = [*names, DEPTH], [*kinds, types.UINT8]
    tars, indexes = list(plan.tars), list(plan.indexes)
    read = fn.readers.webdataset(paths=tars, index_paths=indexes, ext=names, dtypes=kinds, **reader)
    return {name: read[place] for place, name in enumerate(names)}


def _bounded(encoded: Any) -> Any:
    """The image's bytes, or none of them where its header asks for more memory than any camera's image takes.

    A few kB can claim 65,535 x 65,535 pixels, and decoders believe them. Without bytes they refuse.
    """
    shape = fn.peek_image_shape(encoded)
    if shape[0] * shape[1] <= MAX_IMAGE_PIXELS:
        image = encoded
    else:
        image = types.Constant(np.zeros(0, dtype=np.uint8), device="cpu")
    return image


def _images(plan: Plan, encoded: list[Any], decode: Device, target: Device) -> list[Any]:
    """Decode; resize only where the size differs."""
    images = fn.decoders.image(
        encoded,
        device="mixed" if decode == "gpu" else "cpu",
        output_type=types.RGB,
        jpeg_fancy_upsampling=True,
        device_memory_padding=DECODER_BYTES,
        host_memory_padding=DECODER_BYTES,
        affine=False,  # ranks that share a machine would be tied to the same cores
    )
    if plan.stored != plan.size:
        width, height = plan.size
        # Lanczos with antialiasing is what prep resizes with.
        images = fn.resize(images, size=[height, width], interp_type=types.INTERP_LANCZOS3, antialias=True)
    nodes = images if isinstance(images, list) else [images]  # DALI unpacks a list of one
    if decode == "cpu" and target == "gpu":
        nodes = [image.gpu() for image in nodes]
    return nodes


def _raw_images(header: bytes, files: list[Any], target: Device) -> list[Any]:
    """The files as they are, on `target`, and on the host how each begins."""
    heads = [fn.slice(file, start=[0], shape=[len(header)], axes=[0]) for file in files]
    return [*([file.gpu() for file in files] if target == "gpu" else files), *heads]


def _depth(encoded: Any, flip: Any) -> list[Any]:
    """(h, w, 1) float in units of the file, and its shape."""
    depth = fn.decoders.image(_bounded(encoded), device="cpu", output_type=types.ANY_DATA, dtype=types.UINT16)
    depth = fn.cast(depth, dtype=types.FLOAT)
    if flip is not None:
        depth = fn.flip(depth, horizontal=flip)
    return [depth, depth.shape()]


def _no_depth() -> list[Any]:
    """A single pixel without a measurement, of size 0 x 0."""
    nothing = types.Constant(np.zeros((1, 1, 1), dtype=np.float32), layout="HWC", device="cpu")
    return [nothing, fn.cast(types.Constant([0, 0, 0], device="cpu"), dtype=types.INT64)]


def explain(error: BaseException, plan: Plan | None) -> str:
    """What happened, out of DALI's pages of context.

    DALI names the sample that it cannot decode, but not one that it does not even recognise as an image: with a `plan`
    its shards are searched for that one.
    """
    text = str(error)
    for line in text.splitlines():
        if "Failed to decode" in line:
            return line.strip()
    found = find_broken(plan) if plan is not None else None
    told = text.rpartition("encountered:")[2].strip().splitlines()
    return found or (told[0] if told else type(error).__name__)


def find_broken(plan: Plan) -> str | None:
    """The first image whose header cannot be parsed: tar, file name and reason. Reads only the heads of the images."""
    decoded = {*plan.images, *([DEPTH] if plan.depth else [])}
    for tar, index in zip(plan.tars, plan.indexes, strict=True):
        with Path(tar).open("rb") as file:
            for entries in parse_index(Path(index).read_bytes(), index):
                for entry in entries:
                    if entry.component not in decoded:
                        continue
                    file.seek(entry.offset)
                    if problem := _header_problem(file.read(min(entry.size, HEADER_BYTES))):
                        return f"{tar}: {entry.name} {problem}"
    return None


def _header_problem(head: bytes) -> str | None:
    """What is wrong with an image that begins like this, as far as its first bytes tell."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(BytesIO(head)) as image:
                pixels = image.width * image.height
    except (OSError, SyntaxError, ValueError):  # the last by PPM
        return "is not a readable image"
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        pixels = MAX_IMAGE_PIXELS + 1
    return f"claims more than {MAX_IMAGE_PIXELS // 10**6} million pixels" if pixels > MAX_IMAGE_PIXELS else None
