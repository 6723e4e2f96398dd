"""A step touches nothing but its device: shown on torch's meta device, which stands for any that is not the CPU.

Meta tensors have shapes and no numbers. As on a GPU, most operations refuse tensors of two devices; unlike there,
reading a number back raises instead of waiting.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from md2.config import Config, DataConfig, LossConfig, ModelConfig
from md2.data.augment import Jitter, float_images, jitter_factors
from md2.data.batch import Batch, Offset
from md2.loss import ReprojectionLoss
from md2.model import Networks
from md2.photometric import reprojection
from md2.photometric.ties import _noise_table

META = torch.device("meta")
BATCH, WIDTH, HEIGHT = 2, 96, 64

MODES: dict[str, dict[str, dict[str, Any]]] = {
    "mono": {},
    "stereo": {"data": {"frames": [0], "stereo": True}},
    "mono+stereo": {"data": {"stereo": True}},
    "five frames": {"data": {"frames": [0, -2, -1, 1, 2]}},
    "predictive_mask": {"loss": {"disable_automasking": True, "predictive_mask": True}, "data": {"stereo": True}},
    "v1_multiscale": {"loss": {"v1_multiscale": True}},
    "avg_reprojection": {"loss": {"avg_reprojection": True}},
    "no_ssim": {"loss": {"no_ssim": True}},
    "posecnn": {"model": {"pose_network": "posecnn"}},
    "posecnn, v1_multiscale": {"model": {"pose_network": "posecnn"}, "loss": {"v1_multiscale": True}},
    "shared": {"model": {"pose_network": "shared"}},
    "all frames at once": {"model": {"pose_input": "all"}},
    "resnet50": {"model": {"encoder": "resnet50", "scales": [0]}},
}


class OneDevice(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Refuses every operation on a tensor of another device."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.operations += 1
        for value in tree_leaves((args, kwargs, result)):
            if isinstance(value, torch.Tensor):
                assert value.device == META, f"{func} on {value.device}: {tuple(value.shape)}"
        return result


@pytest.fixture(autouse=True)
def no_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """The meta device has none to switch off."""
    monkeypatch.setattr(torch, "autocast", lambda *arguments, **options: nullcontext())


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device=META)


def make_batch(config: Config) -> Batch:
    """Decoded images, flips and draws of jitter, as `Loader._batch` presents them on a GPU."""
    offsets: list[Offset] = [*config.data.frames, *(["s"] if config.data.stereo else [])]  # type: ignore[list-item]
    jitter = Jitter.of(torch.tensor([1]), jitter_factors(torch.zeros(1, 4))).to(lambda tensor: tensor.to(META))
    with OneDevice():
        flipped = empty(BATCH, dtype=torch.bool)
        made = {o: float_images(empty(BATCH, HEIGHT, WIDTH, 3, dtype=torch.uint8), flipped, jitter) for o in offsets}
    images, augmented = ({offset: both[kind] for offset, both in made.items()} for kind in (0, 1))
    assert all(image.is_contiguous(memory_format=torch.channels_last) for image in augmented.values())
    stereo = empty(BATCH, 4, 4) if config.data.stereo else None
    seeds = empty(BATCH, dtype=torch.int64)
    return Batch(images, augmented, empty(BATCH, 3, 3), stereo, 5.4, None, None, ["a", "b"], seeds)


PLAIN = ["mono+stereo", "predictive_mask", "v1_multiscale"]


@pytest.mark.parametrize(("mode", "engine"), [*((m, "kernels") for m in MODES), *((m, "plain") for m in PLAIN)])
def test_a_training_step_stays_on_its_device(mode: str, engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    launched = watch_kernels(monkeypatch) if engine == "kernels" else []
    tree = MODES[mode]
    config = Config.model_validate({**tree, "data": {"width": WIDTH, "height": HEIGHT, **tree.get("data", {})}})
    with META:
        networks: Any = Networks.of(config).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    batch = make_batch(config)
    sources = 1 if config.loss.avg_reprojection else len(batch.images) - 1
    for level in config.model.scales if config.loss.v1_multiscale else [0]:
        _noise_table(sources * (HEIGHT >> level) * (WIDTH >> level), META)  # made on the CPU, once
    loss = ReprojectionLoss(config.loss, config.model)
    with OneDevice() as watched:
        losses = loss(batch, networks(batch.augmented), panels=True)
        losses.total.backward()  # type: ignore[no-untyped-call]
        gradients = [p.grad for p in networks.parameters() if p.requires_grad]
        finite = torch.isfinite(torch.nn.utils.get_total_norm([g for g in gradients if g is not None]))
    assert watched.operations > 500
    assert all(gradient is not None for gradient in gradients)
    assert finite.device == losses.total.device == META
    # Identity errors of each resolution, and five kernels for each scale.
    scales = len(config.model.scales)
    identity = 0 if config.loss.disable_automasking else scales if config.loss.v1_multiscale else 1
    assert len(launched) == (identity + 5 * scales if engine == "kernels" else 0)


def watch_kernels(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Kernels that are not started; they get contiguous float32 tensors, and an auto-mask of bytes."""
    kernels = pytest.importorskip("md2.photometric.kernels", reason="Triton is not installed")
    launched: list[str] = []

    def launch(kernel: Any, maps: torch.Tensor, programs: int, *arguments: Any, **constants: Any) -> None:
        tensors = [argument for argument in arguments if isinstance(argument, torch.Tensor)]
        for place, tensor in enumerate(tensors):
            # The smoothness is told the strides of its image.
            strided = kernel is kernels._smooth and place == 1
            assert tensor.dtype in (torch.float32, torch.uint8) and (strided or tensor.is_contiguous())
            assert tensor.device == META
        launched.append(str(kernel))

    monkeypatch.setattr(kernels, "_launch", launch)
    monkeypatch.setattr(reprojection, "has_kernels", lambda images: True)
    return launched


def test_a_tensor_of_the_host_is_refused() -> None:
    with OneDevice(), pytest.raises(AssertionError, match="on cpu"):
        torch.zeros(2, 2, device=META).index_select(0, torch.zeros(1, dtype=torch.int64))
    with pytest.raises(RuntimeError, match="item"):
        bool(torch.zeros((), device=META))


def test_a_step_is_counted_without_a_gpu() -> None:
    """Once for all scales: noise, minimum of the identity errors, the pixel map."""
    count = pytest.importorskip("bench.count", reason="Triton is not installed")
    one, two = (count.count_step("mono", batch, WIDTH, HEIGHT) for batch in (2, 4))
    loss = "loss and its gradient"
    assert one[loss].launches == 1 + 4 * 5 and one["networks"].launches == 0
    assert 250 < one[loss].operations == two[loss].operations < 350
    assert one[loss].bytes < two[loss].bytes < 2.01 * one[loss].bytes
    assert one["guard and optimiser"] == two["guard and optimiser"]
    # Gradients are read for the norm; Adam reads them, weights, means and squares, and may write all four.
    parameters = sum(p.numel() for p in Networks(ModelConfig(), DataConfig(), LossConfig()).parameters())
    assert one["guard and optimiser"].bytes == pytest.approx(4 * parameters * (1 + 4 + 4), rel=0.05)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own modules
def test_compiled_the_gradient_of_pooling_is_gathered_with_what_surrounds_it() -> None:
    count = pytest.importorskip("bench.count", reason="Triton is not installed")
    taken = count.Count()
    x = torch.randn(2, 8, 12, 16, requires_grad=True)
    with count.scheduled(taken):
        y = torch.compile(lambda x: torch.nn.functional.max_pool2d((3 * x).relu(), 3, 2, 1))(x)
        before = taken.operations
        y.square().sum().backward()
    assert taken.operations == before + 1, "one kernel, back to x"
    expected = x.detach().requires_grad_()
    torch.nn.functional.max_pool2d((3 * expected).relu(), 3, 2, 1).square().sum().backward()
    torch.testing.assert_close(x.grad, expected.grad)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own modules
def test_of_what_is_compiled_the_fused_kernels_are_counted() -> None:
    count = pytest.importorskip("bench.count", reason="Triton is not installed")
    taken = count.Count()
    x = torch.rand(1000, 8, requires_grad=True)
    with count.scheduled(taken):
        y = torch.compile(lambda x: (2 * x).exp() + 1)(x)
        assert (taken.operations, taken.bytes) == (1, x.nbytes * 2)
        y.sum().backward()
    torch.testing.assert_close(y, (2 * x).exp() + 1)
    assert (taken.operations, taken.bytes) == (2, x.nbytes * (2 + 3))  # backward reads the result and its gradient
