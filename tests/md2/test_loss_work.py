"""How much work a step is: equal to the straightforward baseline in value, and counted (never timed)."""

from __future__ import annotations

import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from bench import reference
from md2.config import DataConfig, LossConfig, ModelConfig
from md2.data.batch import Offset
from md2.loss import image_pyramid, reprojection_loss
from md2.model import Networks, Pose, Prediction
from md2.photometric import ssim

BATCH, SOURCES, SCALES = 2, 3, 4


@pytest.fixture
def step(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The benchmark, which is a script beside the package."""
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2]))
    import bench.step

    return bench.step


@pytest.mark.parametrize("mode", ["mono", "stereo", "mono+stereo"])
def test_loss_and_every_gradient_equal_the_baselines(step: Any, mode: str) -> None:
    difference, worst = step.check(mode)
    assert difference < 1e-9 and worst < 1e-9


OPTIONS = [
    {},
    {"v1_multiscale": True},
    {"avg_reprojection": True},
    {"disable_automasking": True},
    {"disable_automasking": True, "predictive_mask": True},
    {"no_ssim": True},
    {"disparity_smoothness": 0.5},
    {"v1_multiscale": True, "avg_reprojection": True, "no_ssim": True},
    {"v1_multiscale": True, "avg_reprojection": True, "disable_automasking": True, "predictive_mask": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "+".join(options) or "default")
@pytest.mark.parametrize("sources", [[-1, 1], ["s"], [-1, 1, "s"], [-2, -1, 1, "s"]], ids=str)
def test_loss_and_gradients_equal_the_baselines_with_every_option(sources: list[Offset], options: Any) -> None:
    """The readable loss and the fast one, by every output of the networks, in float64.

    With places beyond the border and poses of both kinds.
    """
    config, generator = LossConfig(**options), torch.Generator().manual_seed(4)

    def rand(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    images = {o: F.interpolate(rand(BATCH, 3, 6, 8), (32, 48), mode="bicubic").clamp(0, 1) for o in [0, *sources]}
    pyramids = image_pyramid(images, range(SCALES), config.v1_multiscale)
    sizes = {scale: (32 >> scale, 48 >> scale) for scale in range(SCALES)}
    leaves = {f"disparity {s}": 0.02 + 0.2 * rand(BATCH, 1, *size) for s, size in sizes.items()}
    leaves |= {f"mask {s}": 0.1 + 0.8 * rand(BATCH, len(sources), *size) for s, size in sizes.items()}
    posed = [source for source in sources if source != "s"]
    leaves |= {f"{part} {o}": 0.1 * rand(BATCH, 3) - 0.05 for o in posed for part in ("angle", "move")}
    level = {scale: scale if config.v1_multiscale else 0 for scale in range(SCALES)}
    drawn = 1 if config.avg_reprojection else len(sources)
    noise = {scale: 2 * rand(BATCH, drawn, *sizes[level[scale]]) - 1 for scale in range(SCALES)}
    K = torch.tensor([[28.0, 0, 24], [0, 30, 16], [0, 0, 1]], dtype=torch.float64).expand(BATCH, 3, 3)
    stereo = torch.eye(4, dtype=torch.float64).repeat(BATCH, 1, 1)
    stereo[:, 0, 3] = 0.1
    partner = stereo if "s" in sources else None
    results = []
    for engine in ("fast", "readable", "baseline"):
        own = {name: value.clone().requires_grad_() for name, value in leaves.items()}
        prediction = Prediction(
            {s: own[f"disparity {s}"] for s in sizes},
            {o: Pose(own[f"angle {o}"], own[f"move {o}"], o < 0, relative=o == -2) for o in posed},
            {s: own[f"mask {s}"] for s in sizes} if config.predictive_mask else {},
        )
        if engine != "baseline":
            fast = engine == "fast"
            total = reprojection_loss(prediction, pyramids, K, partner, config, noise=noise, fast=fast).total
        else:
            total = reference.loss(prediction, pyramids, K, partner, noise, config)
        total.backward()
        results.append((total.item(), {name: leaf.grad for name, leaf in own.items() if leaf.grad is not None}))
    *ours, (expected, expected_grads) = results
    assert len(expected_grads) == SCALES * (2 if config.predictive_mask else 1) + 2 * len(posed)
    for total, grads in ours:
        assert total == pytest.approx(expected, rel=1e-9)
        assert grads.keys() == expected_grads.keys()
        for name, grad in grads.items():
            assert (grad - expected_grads[name]).norm() <= 1e-7 * expected_grads[name].norm(), name
            assert expected_grads[name].norm() > 0


def test_the_check_notices_another_method(step: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    right = step.reference_loss
    monkeypatch.setattr(step, "reference_loss", lambda *arguments: right(*arguments) * 1.0001)
    with pytest.raises(SystemExit, match="not the same method"):
        step.check("stereo")


def test_benchmark_prints_its_table_and_appends_it(step: Any, tmp_path: Path) -> None:
    said: list[str] = []
    results = tmp_path / "RESULTS.md"
    small = "--mode stereo --batch 1 --width 96 --height 64 --repeats 1 --threads 1 --device cpu --variants contiguous"
    assert step.main([*small.split(), "--append", str(results)], said.append) == 0
    assert results.read_text() == f"\n{said[0]}"
    for part in ("forward", "loss", "backward", "optimiser", "whole step", "loss, peak memory"):
        assert f"| {part} |" in said[0]


class _Count(TorchDispatchMode):
    """All operations by name, and how many images the sampler works on."""

    def __init__(self) -> None:
        super().__init__()
        self.images = Counter[str]()
        self.operations = Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.operations[name] += 1
        if name.startswith("grid_sampler"):
            self.images[name] += (args[1] if "backward" in name else args[0]).shape[0]
        return func(*args, **(kwargs or {}))


def scene() -> tuple[Prediction, dict[Offset, torch.Tensor], torch.Tensor]:
    torch.manual_seed(0)
    offsets: list[Offset] = [0, -1, 1, "s"]
    images = {offset: torch.rand(BATCH, 3, 16, 24) for offset in offsets}
    zeros = torch.zeros(BATCH, 3)
    poses: dict[Offset, Pose] = {
        o: Pose((zeros + 0.01).requires_grad_(), (zeros + 0.01).requires_grad_()) for o in (-1, 1)
    }
    disparities = {s: torch.rand(BATCH, 1, 16 >> s, 24 >> s).requires_grad_() for s in range(SCALES)}
    return Prediction(disparities, poses), images, torch.eye(4).repeat(BATCH, 1, 1)


def test_each_image_is_warped_once_per_scale_and_compared_unwarped_once(monkeypatch: pytest.MonkeyPatch) -> None:
    sums = Counter[str]()
    original = ssim.window_sum

    def counted(image: torch.Tensor, out: torch.Tensor, scratch: torch.Tensor, adjoint: bool = False) -> torch.Tensor:
        sums["adjoint" if adjoint else "forward"] += image.numel() // (3 * 16 * 24)
        return original(image, out, scratch, adjoint)

    monkeypatch.setattr(ssim, "window_sum", counted)
    prediction, images, stereo = scene()
    K = torch.tensor([[20.0, 0, 12], [0, 20, 8], [0, 0, 1]]).expand(BATCH, 3, 3)
    with _Count() as count:
        pyramids = image_pyramid(images, range(SCALES))
        reprojection_loss(prediction, pyramids, K, stereo, LossConfig()).total.backward()
    warps = SCALES * BATCH * SOURCES
    assert count.images == {"grid_sampler_2d": warps, "grid_sampler_2d_backward": warps}
    # Two of the target; three per unwarped source; three per warped source and their transposes.
    assert sums == {"forward": 2 * BATCH + 3 * BATCH * SOURCES + 3 * warps, "adjoint": 3 * warps}


def test_nothing_is_differentiated_where_no_gradient_is_wanted() -> None:
    prediction, images, stereo = scene()
    K = torch.tensor([[20.0, 0, 12], [0, 20, 8], [0, 0, 1]]).expand(BATCH, 3, 3)
    with torch.no_grad(), _Count() as count:
        pyramids = image_pyramid(images, range(SCALES))
        total = reprojection_loss(prediction, pyramids, K, stereo, LossConfig()).total
    assert not total.requires_grad
    assert list(count.images) == ["grid_sampler_2d"]


def test_a_step_neither_reads_a_number_back_nor_makes_a_tensor_of_python_numbers() -> None:
    """On a GPU each of them makes the host wait for all that runs there, and the GPU then for the host."""
    networks = Networks(ModelConfig(), DataConfig(stereo=True), LossConfig())
    images: dict[Offset, torch.Tensor] = {offset: torch.rand(1, 3, 64, 64) for offset in (0, -1, 1, "s")}
    K = torch.tensor([[40.0, 0, 32], [0, 40, 32], [0, 0, 1]]).expand(1, 3, 3)
    stereo, seeds = torch.eye(4).repeat(1, 1, 1), torch.tensor([7])
    for config in (LossConfig(), LossConfig(v1_multiscale=True)):
        with _Count() as count:
            prediction = networks(images)
            pyramids = image_pyramid(images, range(SCALES), config.v1_multiscale)
            reprojection_loss(prediction, pyramids, K, stereo, config, noise=seeds).total.backward()
        assert count.operations["convolution"] > 40  # it is counted at all
        assert count.operations["lift_fresh"] == 0
        assert count.operations["_local_scalar_dense"] == 0
        assert count.operations["nonzero"] == 0
        # Each pose becomes a rotation once, not once per scale: on a GPU such small work costs launches.
        assert count.operations["linalg_vector_norm"] == 2
        assert count.operations["linalg_inv_ex"] == (SCALES if config.v1_multiscale else 1)


def test_all_pairs_go_through_the_pose_network_at_once() -> None:
    networks = Networks(ModelConfig(), DataConfig(frames=[0, -2, -1, 1], stereo=True), LossConfig())
    batches: list[int] = []
    networks.pose_encoder.register_forward_hook(lambda module, inputs, output: batches.append(inputs[0].shape[0]))
    with torch.no_grad():
        networks({o: torch.rand(1, 3, 64, 64) for o in (0, -2, -1, 1)})
    assert batches == [3]


def test_loss_keeps_only_gradients_for_the_backward_pass() -> None:
    """What autograd saves for the reprojection is one map per scale and some small matrices."""
    prediction, images, stereo = scene()
    K = torch.tensor([[20.0, 0, 12], [0, 20, 8], [0, 0, 1]]).expand(BATCH, 3, 3)
    saved: list[weakref.ref[torch.Tensor]] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept = tensor.detach()
        saved.append(weakref.ref(kept))
        return kept

    pyramids = image_pyramid(images, range(SCALES))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        total = reprojection_loss(prediction, pyramids, K, stereo, LossConfig()).total
    alive = [tensor.shape for reference in saved if (tensor := reference()) is not None]
    assert alive and total.requires_grad
    # One number per pixel at most, never a colour image or a source's map.
    assert max(shape.numel() for shape in alive) <= BATCH * 16 * 24
