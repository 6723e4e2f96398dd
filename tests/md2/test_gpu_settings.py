"""What md2 sets for a GPU, seen without one: options of DALI's decoder, cuDNN, DDP; what errors of a GPU become."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import pytest
import torch
from pipeline_data import HEIGHT, WIDTH, config, make_samples, pack

import cli.doctor
from md2.data import dali
from md2.data.plan import read_plan

# The loader


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
