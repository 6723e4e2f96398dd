"""Work per batch, counted and not timed, so that it cannot creep up: decodes, Python calls, tensor operations."""

from __future__ import annotations

import re
import sys
from collections import Counter
from concurrent.futures import Executor, Future
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pipeline_data import Operations, config, loader, make_samples, pack

import md2.pipeline
from md2.data.augment import float_images
from md2.data.batch import Batch
from md2.data.cpu import HostThreads
from md2.pipeline import Loader
from shards.dataset import LocalDataset

MODES = {
    "mono": (config(), 3),
    "stereo": (config(frames=[0], stereo=True), 2),
    "mono+stereo": (config(stereo=True), 4),
    "augmented": (config(stereo=True, flip=True, color_jitter=True), 4),
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> LocalDataset:
    return pack(tmp_path_factory.mktemp("counts") / "data", make_samples(96, stereo=True), stereo=True)


class _Here(Executor):
    """Runs on the calling thread, where calls and tensor operations can be counted."""

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(fn(*args, **kwargs))
        return future


@pytest.fixture(autouse=True)
def on_this_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(md2.pipeline, "host_threads", lambda: HostThreads(_Here(), _Here()))


def later_batch(batches: Loader) -> tuple[Batch, int]:
    """A batch that has been read with the one before, and the Python calls that it took on this thread."""
    calls = 0

    def count(frame: FrameType, event: str, argument: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    iterator = iter(batches)
    for _ in range(batches.config.prefetch + 1):
        next(iterator)
    sys.setprofile(count)
    try:
        batch = next(iterator)
    finally:
        sys.setprofile(None)
    return batch, calls


@pytest.mark.parametrize("mode", MODES)
def test_each_image_of_a_sample_is_decoded_once_and_nothing_else_is(
    dataset: LocalDataset, mode: str, tmp_path: Path
) -> None:
    settings, images = MODES[mode]
    graph = _graph(loader(dataset, settings), tmp_path)
    assert graph["Image"] == images
    assert graph["Resize"] == 0


@pytest.mark.parametrize("mode", MODES)
def test_uncompressed_images_meet_no_decoder(mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What follows the header is copied once, out of the mapped shard, by DALI's threads."""
    settings, images = MODES[mode]
    stored = pack(tmp_path / "data", make_samples(8, stereo=True, codec="ppm"), stereo=True, codec="ppm")
    batches = loader(stored, settings)
    graph = _graph(batches, tmp_path)
    assert (graph["Image"], graph["Resize"], graph["Slice"]) == (0, 0, images)
    told: list[bool] = []
    monkeypatch.setattr(md2.pipeline, "float_images", lambda *a, decoding: told.append(decoding) or float_images(*a))
    next(iter(batches))
    assert told == [False] * images, "nothing else keeps the cores busy"
    assert all(value.is_contiguous() for value in batches._chunk.values() if value.ndim == 4)


def test_native_images_are_resized_once_each(tmp_path: Path) -> None:
    native = pack(tmp_path / "native", make_samples(4, stereo=True), stereo=True, size=None)
    graph = _graph(loader(native, config(stereo=True)), tmp_path)
    assert (graph["Image"], graph["Resize"]) == (4, 4)


@pytest.mark.parametrize("mode", MODES)
def test_an_image_costs_a_few_tensor_operations_on_the_cpu_and_a_batch_a_few_hundred_calls(
    dataset: LocalDataset, mode: str
) -> None:
    """Images are converted one by one on a CPU, where they stay in its cache: (flip), copy, divide; jitter on top."""
    settings, images = MODES[mode]
    calls, operations = {}, {}
    for size in (8, 24):
        batches = loader(dataset, settings, batch_size=size)
        batch, calls[size] = later_batch(batches)
        assert batch.size == size
        with Operations() as counted:
            next(iter(batches))
        operations[size] = counted.names.total()
    more = 16 * images
    assert operations[24] - operations[8] <= (10 if settings.color_jitter else 2) * more
    assert calls[24] - calls[8] <= (10 if settings.color_jitter else 5) * more + 16 * 4
    assert calls[8] < (800 if settings.color_jitter else 400)


@settings(deadline=None)
@given(st.integers(1, 200), st.integers(1, 8 << 20))
def test_reading_ahead_keeps_to_its_limits(batch_size: int, sample_bytes: int) -> None:
    batches = md2.pipeline.batches_ahead(batch_size, sample_bytes)
    fits = lambda count: count * batch_size <= 96 and count * batch_size * sample_bytes <= 128 << 20  # noqa: E731
    assert batches == 1 or fits(batches)
    assert not fits(batches + 1)


def test_kitti_is_read_in_chunks_of_several_batches() -> None:
    """Samples of three and of four 640x192 images, and of four 1024x320 ones."""
    sizes = [(3, 640, 192), (4, 640, 192), (4, 1024, 320)]
    assert [md2.pipeline.batches_ahead(12, n * w * h * 3) for n, w, h in sizes] == [8, 7, 2]


@pytest.mark.parametrize("mode", MODES)
def test_reading_a_sample_takes_a_bounded_number_of_python_calls(
    dataset: LocalDataset, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Handing an image to DALI takes some 20 calls, its header 20, a sample's draws 4: at a microsecond each not a
    fiftieth of its decoding. They do not depend on pixels."""
    settings, images = MODES[mode]
    calls = {}
    for ahead in (16, 48):
        monkeypatch.setattr(md2.pipeline, "SAMPLES_AHEAD", ahead)
        reader = loader(dataset, settings, batch_size=8)._reader
        assert reader is not None
        for _ in range(1 + settings.prefetch):  # the first ones are small
            reader.read()
        calls[ahead] = 0

        def count(frame: FrameType, event: str, argument: object, ahead: int = ahead) -> None:
            calls[ahead] += event in ("call", "c_call")

        sys.setprofile(count)
        try:
            assert len(reader.read().keys) == ahead
        finally:
            sys.setprofile(None)
    assert (calls[48] - calls[16]) / 32 <= 60 * images + 30


def test_small_tensors_alone_are_copied_to_the_device(dataset: LocalDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the batch's size: flips, cameras, seeds, baseline, three of jitter; a copy for each of these tensors."""
    copied: list[torch.Tensor] = []
    monkeypatch.setattr(Loader, "_to_device", lambda self, tensor: copied.append(tensor) or tensor)
    expected = {"mono": 2, "stereo": 3, "mono+stereo": 3, "augmented": 7}
    for mode, (chosen, _) in MODES.items():
        for size in (8, 24):
            copied.clear()
            next(iter(loader(dataset, chosen, batch_size=size)))
            assert len(copied) == expected[mode]
            # The largest are the 24x24 matrices of jitter; an image of 96x64 is 18 kB and more.
            assert sum(tensor.nbytes for tensor in copied) <= 2600 * size


@pytest.mark.gpu
def test_images_are_decoded_on_the_gpu_and_small_tensors_alone_copied_there(
    dataset: LocalDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, images = MODES["augmented"]
    batches = loader(dataset, settings, device=torch.device("cuda"))
    copied: list[torch.Tensor] = []
    move = Loader._to_device
    monkeypatch.setattr(Loader, "_to_device", lambda self, tensor: copied.append(tensor) or move(self, tensor))
    batch = next(iter(batches))
    assert len(copied) == 6
    assert all(value.is_cuda for value in batches._chunk.values() if value.ndim == 4)
    assert len(batch.images) == images and all(image.is_cuda for image in batch.images.values())


class _Watched:
    """In place of a CUDA event: what the loader held each time it was waited for."""

    def __init__(self, batches: Loader) -> None:
        self.batches = batches
        self.held: list[dict[str, torch.Tensor]] = []

    def synchronize(self) -> None:
        self.held.append(self.batches._chunk)


def test_memory_goes_back_to_dali_only_when_the_gpu_has_read_it(
    dataset: LocalDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(md2.pipeline, "SAMPLES_AHEAD", 16)
    batches = loader(dataset, batch_size=8)
    iterator = iter(batches)
    for _ in range(batches.config.prefetch + 1):  # the first reads are small
        next(iterator)
    watched = _Watched(batches)
    monkeypatch.setattr(batches, "_read_on_gpu", watched)
    first = batches._chunk
    next(iterator)
    assert not watched.held
    next(iterator)
    assert len(watched.held) == 1 and watched.held[0] is first is not batches._chunk


def test_nor_is_it_when_the_loader_is_dropped(dataset: LocalDataset) -> None:
    batches = loader(dataset, batch_size=8)
    next(iter(batches))
    batches._read_on_gpu = watched = _Watched(batches)  # type: ignore[assignment]
    batches.__del__()
    assert len(watched.held) == 1
    batches._read_on_gpu = None


@pytest.mark.gpu
def test_images_are_right_however_far_the_gpu_is_behind(dataset: LocalDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """The host asks for all batches while the device is still asleep, and DALI gets its memory back meanwhile."""
    monkeypatch.setattr(md2.pipeline, "SAMPLES_AHEAD", 8)
    expected = [batch.images[0] for batch in loader(dataset, batch_size=4, train=False)]
    batches = loader(dataset, batch_size=4, train=False, device=torch.device("cuda"))
    torch.cuda._sleep(10**9)
    found = [batch.images[0] for batch in batches]
    for image, other in zip(found, expected, strict=True):
        assert (image.cpu() - other).abs().mean() < 0.5 / 255


def _graph(batches: Loader, folder: Path) -> Counter[str]:
    """Operators of the pipeline's graph, by kind; each runs once per sample."""
    file = folder / "graph.dot"
    batches._reader.pipeline.save_graph_to_dot_file(str(file))
    nodes = set(re.findall(r"(?<!\w)__([A-Za-z]+)_(\d+)", file.read_text()))
    return Counter(kind for kind, _ in nodes)
