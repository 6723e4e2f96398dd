"""What md2 sets for a GPU, seen without one: options of DALI's decoder, cuDNN, DDP; what errors of a GPU become."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import train_data
from nvidia.dali import backend
from pipeline_data import HEIGHT, WIDTH, config, loader, make_samples, pack
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

import cli.doctor
from md2.data import dali
from md2.data.batch import Batch
from md2.data.plan import read_plan
from md2.distributed import Ranks
from md2.loss import LossOutput
from md2.model import Networks, Prediction
from md2.networks import decoder
from md2.training.amp import AmpSettings
from md2.training.trainer import Trainer
from shards.dataset import LocalDataset, open_dataset
from shards.errors import TrainingError

# Networks and training


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_last_layers_are_padded_before_they_are_widened(kind: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half the bytes to move; the convolution itself is in float32, of the same numbers."""
    padded: list[torch.dtype] = []
    real = decoder.reflect
    monkeypatch.setattr(decoder, "reflect", lambda x: (padded.append(x.dtype), real(x))[1])
    head = decoder.Conv3x3(4, 2, full=True)
    x = torch.rand(1, 4, 6, 8).to(kind)
    with torch.autocast("cpu", torch.bfloat16):
        found = head(x)
    assert padded == [kind] and found.dtype is torch.float32
    torch.testing.assert_close(found, head(x.float()))


@pytest.fixture
def gloo() -> Iterator[None]:
    """A process group of this process alone."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("narrow", "gloo")
@pytest.mark.parametrize("kept", [False, True], ids=["", "accumulated by graphs"])
def test_ranks_exchange_gradients_alone_in_place_and_while_the_backward_pass_runs(
    kept: bool, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No buffers; compiled around DDP, whose hooks are then part of what is compiled."""
    compiled: list[torch.nn.Module] = []
    monkeypatch.setattr(torch, "compile", lambda module, mode: (compiled.append(module), Compiled(module))[1])
    amp = AmpSettings(torch.device("cpu"), None, True, "graphs" if kept else True)
    monkeypatch.setattr(AmpSettings, "of", lambda train, device: amp)
    settings = train_data.config(dataset, "stereo", ["train.accumulate=2", "train.batch_size=1"])
    one = Trainer(settings, open_dataset(str(dataset)), tmp_path, Ranks(0, 2, amp.device), train_data.Silent())
    (model,) = compiled
    assert isinstance(model, DistributedDataParallel) and model.module is one.networks
    assert isinstance(one.model, Compiled)
    assert not model.broadcast_buffers
    # What graphs accumulate must stay where it is.
    assert model.gradient_as_bucket_view is not kept
    with one._without_sync(True):
        assert not model.require_backward_grad_sync
    with one._without_sync(False):
        assert model.require_backward_grad_sync


class Compiled(torch.nn.Module):
    """In place of what `torch.compile` makes."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.inner = module


@pytest.mark.usefixtures("narrow")
def test_on_a_gpu_cudnn_looks_for_the_fastest_convolutions_and_adam_is_fused(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    one = train_data.trainer(dataset, tmp_path / "run", [], "stereo")
    assert not torch.backends.cudnn.benchmark and not one.optimizer.defaults["fused"]
    one.ranks = Ranks(0, 1, torch.device("cuda"))
    monkeypatch.setattr(Networks, "to", lambda self, *arguments, **options: self)
    for wanted in (True, False):
        train = one.config.train.model_copy(update={"cudnn_benchmark": wanted})
        one.config = one.config.model_copy(update={"train": train})
        one._build(None)
        assert torch.backends.cudnn.benchmark == wanted and one.optimizer.defaults["fused"]


@pytest.mark.usefixtures("narrow")
def test_one_pipeline_serves_every_validation(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Making one takes seconds on a GPU, and memory for decoders each time."""
    made: list[str] = []
    keys: list[list[str]] = []

    class Counted(dali.Reader):
        def __init__(self, plan: Any, shards: Any, starts: Any, where: str, **options: Any) -> None:
            made.append(where.rpartition("part ")[2])
            super().__init__(plan, shards, starts, where, **options)

    def measure(networks: Any, loss: Any, batches: Iterator[Batch], *rest: Any) -> tuple[dict[str, float], None]:
        keys.append([key for batch in batches for key in batch.keys])
        return {}, None

    monkeypatch.setattr("md2.pipeline.Reader", Counted)
    monkeypatch.setattr("md2.training.trainer.validate", measure)
    monkeypatch.setattr(Trainer, "_step", lambda self, group: (self.optimizer.step(), stepped)[1])
    stepped = (Prediction({}), LossOutput(torch.zeros(()), {}, {}))
    monkeypatch.setattr(Trainer, "_report", lambda self, batch, output: None)
    one = train_data.trainer(dataset, tmp_path / "run", ["train.epochs=3"], "stereo")
    one.fit()
    assert sorted(made) == ["'train'", "'val'"]
    assert len(keys) == 3 and keys[0] and keys[0] == keys[1] == keys[2]


# The loader


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> LocalDataset:
    return pack(tmp_path_factory.mktemp("small"), make_samples(8))


@pytest.mark.parametrize(
    ("operator", "crop", "stored"),
    [("image", None, True), ("image", None, False), ("image", (0.7, 1.0), True)],
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


def test_libraries_that_nothing_uses_are_not_asked_for(small: LocalDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """pip brings neither cuFFT nor NPP; DALI warns of it at its first GPU pipeline, and warnings are errors here."""
    build, seen = dali.dali.Pipeline.build, list[str]()
    for name, version in (("GetCudaVersion", 12090), ("GetCufftVersion", -1), ("GetNppVersion", -1)):
        monkeypatch.setattr(backend, name, lambda name=name, version=version: seen.append(name) or version)
    monkeypatch.setattr(backend, "cuda_checked", False)
    monkeypatch.setattr(dali.dali.Pipeline, "build", lambda self: (backend.check_cuda_runtime(), build(self)))
    assert next(iter(loader(small))).size == 4
    assert seen == ["GetCudaVersion", "GetCufftVersion", "GetNppVersion"]


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
