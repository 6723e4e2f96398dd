"""What md2 sets for a GPU, seen without one: options of DALI's decoder, cuDNN, DDP; what errors of a GPU become."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import pytest
import torch
from pipeline_data import HEIGHT, WIDTH, config, loader, make_samples, pack

import cli.doctor
from md2.data import dali
from md2.data.plan import read_plan
from shards.dataset import LocalDataset
from shards.errors import TrainingError

# The loader


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> LocalDataset:
    return pack(tmp_path_factory.mktemp("small"), make_samples(8))


@pytest.mark.parametrize(
    ("operator", "crop", "stored"),
    [("image", None, True), ("image", None, False), ("image_slice", (0.7, 1.0), True)],
    ids=["stored", "native", "crop"],
)
def test_the_decoder_knows_the_images_size_and_the_share_of_the_jpeg_engines(
    operator: str, crop: tuple[float, float] | None, stored: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DALI itself checks the names: graphs for a GPU are made without one, and not built."""
    # A stored size that is not the batch's: the decoder sees the stored one.
    large = (2 * WIDTH, HEIGHT)
    samples = make_samples(2, size=lambda number: large)
    plan = read_plan(
        pack(tmp_path, samples, size=large if stored else None), config(crop=crop), train=True, depth=False
    )
    given: dict[str, Any] = {}
    real = getattr(dali.fn.decoders, operator)

    def decoder(*files: Any, **options: Any) -> Any:
        given.update(options)
        return real(*files, **options)

    monkeypatch.setattr(dali.fn.decoders, operator, decoder)
    monkeypatch.setattr(dali, "JPEG_ENGINES", 0.8)
    making: dict[str, int] = {"batch_size": 2, "num_threads": 1, "prefetch_queue_depth": 1}
    dali._graph(plan, "gpu", "gpu", device_id=0, **making)
    names = ("device", "hw_decoder_load", "preallocate_width_hint", "preallocate_height_hint")
    assert [given.get(name) for name in names] == ["mixed", 0.8, *(large if stored else (None, None))]
    given.clear()
    dali._graph(plan, "cpu", "gpu", device_id=0, **making)
    assert [given.get(name) for name in names] == ["cpu", None, None, None]


@pytest.mark.parametrize("there", [True, False])
def test_doctor_says_what_jpeg_engines_need(there: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def open_library(name: str) -> object:
        assert name == "libnvcuvid.so.1"
        if not there:
            raise OSError(f"{name}: cannot open shared object file")
        return object()

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA A100")
    monkeypatch.setattr(torch, "zeros", lambda *shape, device: device)
    monkeypatch.setattr("md2.photometric.reprojection.has_kernels", lambda images: True)
    monkeypatch.setattr(ctypes, "CDLL", open_library)
    line = cli.doctor._gpu()
    assert line.startswith("NVIDIA A100") and "Triton kernels run" in line
    assert ("NVIDIA_DRIVER_CAPABILITIES=compute,utility,video" in line) is not there


DALI_SAYS = (
    "Critical error in pipeline:\nError in MIXED operator `nvidia.dali.fn.decoders.image`,\nwhich was used in the "
    "pipeline definition with the following traceback:\n\n  File ...\n\nencountered:\n\n{}\nCurrent pipeline object is "
    "no longer valid."
)


@pytest.mark.parametrize("when", ["build", "schedule_run", "share_outputs"])
@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(DALI_SAYS.format("CUDA runtime API error cudaErrorMemoryAllocation (2):\nout of memory")),
        RuntimeError(DALI_SAYS.format("Can't allocate 4294967296 bytes on device 0.")),
        RuntimeError(DALI_SAYS.format("CUDA allocation failed")),
        RuntimeError(DALI_SAYS.format("std::bad_alloc")),
        MemoryError("Can't allocate 1024 bytes on host."),
    ],
    ids=["cuda", "device", "plain", "host", "python"],
)
def test_too_little_memory_is_not_the_datasets_fault(
    error: Exception, when: str, small: LocalDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> None:
        raise error

    monkeypatch.setattr(dali.dali.Pipeline, when, fail)
    monkeypatch.setattr(dali, "image_problem", lambda file: pytest.fail("the images are innocent"))
    with pytest.raises(TrainingError, match=r"^DALI is out of memory \(.+\); lower train\.batch_size, data\.prefetch"):
        next(iter(loader(small)))


def test_another_error_of_the_gpu_is_not_the_datasets_fault(
    small: LocalDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is one whose images are whole, once they have been looked at."""

    def fail(*arguments: Any) -> None:
        raise RuntimeError(DALI_SAYS.format("CUDA driver API error CUDA_ERROR_ILLEGAL_ADDRESS (700)"))

    monkeypatch.setattr(dali.dali.Pipeline, "share_outputs", fail)
    with pytest.raises(
        TrainingError, match=r"DALI fails at samples drive_00\d.*: CUDA driver API error CUDA_ERROR_ILL"
    ):
        next(iter(loader(small)))
