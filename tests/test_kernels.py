"""The Triton kernels against the plain operators: on a CPU by Triton's interpreter, on a GPU compiled."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from md2 import reprojection
from md2.batch import Offset
from md2.config import LossConfig
from md2.loss import LossOutput, reprojection_loss
from md2.prediction import Pose, Prediction
from md2.ssim import Target, photometric_error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytest.importorskip("triton", reason="Triton is not installed: it has no wheel for this platform")
if DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("no CUDA device, and Triton's interpreter is off (TRITON_INTERPRET=1)", allow_module_level=True)
kernels = importlib.import_module("md2.kernels")


SIZES = [(2, 3), (3, 2), (9, 14), (19, 31)]


def scene(size: tuple[int, int], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Target (2, 3, H, W), sources (2, 2, 3, H, W), depth, and transforms with places beyond every border."""
    torch.manual_seed(seed)
    target, sources = torch.rand(2, 3, *size), torch.rand(2, 2, 3, *size)
    depth = 1 + torch.rand(2, 1, *size)
    angles, moves = 0.1 * torch.randn(4, 3), 0.3 * torch.randn(4, 3)
    poses = [Pose(angles[i : i + 2], moves[i : i + 2], bool(i)).transform() for i in (0, 2)]
    return target, sources, depth, torch.stack(poses, dim=1)


def pixel_map(size: tuple[int, int], transforms: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    height, width = size
    K = torch.tensor([[0.8 * width, 0, 0.5 * width], [0, 0.9 * height, 0.5 * height], [0, 0, 1]]).expand(2, 3, 3)
    return reprojection.pixel_map(K, transforms, size)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("no_ssim", [False, True])
def test_kernels_equal_plain_operators(size: tuple[int, int], no_ssim: bool) -> None:
    image, sources, depth, transforms = scene(size)
    target = Target.of(image)
    places = (depth, *pixel_map(size, transforms))
    weights = torch.rand(2, 2, *size) * (torch.rand(2, 2, *size) > 0.3)
    there = Target.of(image.to(DEVICE))
    torch.testing.assert_close(
        kernels.photometric_error(sources.to(DEVICE), there, no_ssim).cpu(),
        photometric_error(sources, target, no_ssim),
        rtol=1e-4,
        atol=1e-5,
    )
    fused = kernels.Fused(there, sources.to(DEVICE), no_ssim, True)
    warped = fused.warp(*(place.to(DEVICE) for place in places))
    found = [t.cpu() for t in (warped, fused.error(), *fused.gradient(weights.to(DEVICE)))]
    # One sample at a time, as the plain engine works on a CPU.
    plain = []
    for i in range(2):
        rows = slice(i, i + 1)
        engine = reprojection.Eager(target.samples(rows), sources[rows], no_ssim, True)
        plain.append((engine.warp(*(p[rows] for p in places)), engine.error(), *engine.gradient(weights[rows])))
    for name, one, parts in zip(
        ("warped", "error", "depth", "maps", "epipoles"), found, zip(*plain, strict=True), strict=True
    ):
        other = torch.cat(parts)
        scale = other.abs().max().item()
        torch.testing.assert_close(one, other, rtol=2e-4, atol=2e-5 * max(scale, 1), msg=lambda m, n=name: f"{n}: {m}")


def loss(config: LossConfig, device: str = "cpu") -> tuple[LossOutput, list[torch.Tensor]]:
    torch.manual_seed(2)
    offsets: list[Offset] = [0, -1, 1, "s"]
    images = {o: {0: torch.rand(2, 3, 12, 20).to(device), 1: torch.rand(2, 3, 6, 10).to(device)} for o in offsets}
    leaves = [
        (0.2 * torch.rand(2, 1, 12, 20)).to(device).requires_grad_(),
        (0.2 * torch.rand(2, 1, 6, 10)).to(device).requires_grad_(),
        *((0.05 * torch.randn(2, 3)).to(device).requires_grad_() for _ in range(4)),
        torch.rand(2, 3, 12, 20).to(device).requires_grad_(),
        torch.rand(2, 3, 6, 10).to(device).requires_grad_(),
    ]
    prediction = Prediction(
        {0: leaves[0], 1: leaves[1]},
        {-1: Pose(leaves[2], leaves[3], True), 1: Pose(leaves[4], leaves[5])},
        {0: leaves[6], 1: leaves[7]} if config.predictive_mask else {},
    )
    K = torch.tensor([[16.0, 0, 10], [0, 18, 6], [0, 0, 1]]).expand(2, 3, 3).to(device)
    stereo = torch.eye(4).repeat(2, 1, 1)
    stereo[:, 0, 3] = 0.1
    output = reprojection_loss(prediction, images, K, stereo.to(device), config, panels=True)
    output.total.backward()
    return output, [leaf.grad for leaf in leaves if leaf.grad is not None]


OPTIONS = {
    "default": LossConfig(),
    "v1_multiscale": LossConfig(v1_multiscale=True),
    "average": LossConfig(avg_reprojection=True, no_ssim=True),
    "mask": LossConfig(disable_automasking=True, predictive_mask=True),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_loss_through_kernels_equals_loss_without(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the plain engine on the CPU, for the options that the kernels are told of and those they are not."""
    expected, grads = loss(OPTIONS[name])
    monkeypatch.setattr(reprojection, "has_kernels", lambda images: True)
    monkeypatch.setattr(reprojection, "piece_size", lambda images: tuple(images.shape[:2]))
    found, found_grads = loss(OPTIONS[name], DEVICE)
    assert found.total.item() == pytest.approx(expected.total.item(), rel=1e-5)
    for one, other in zip(found_grads, grads, strict=True):
        assert ((one.cpu() - other).norm() / other.norm()).item() < 1e-3
    torch.testing.assert_close(found.panels[0].warped[-1].cpu(), expected.panels[0].warped[-1], rtol=1e-4, atol=1e-5)


COMPILE = """
import sys
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from md2 import kernels

for name, constants in (("_warp", {}), ("_error", {"SSIM": True, "GRADIENTS": True}), ("_gradient", {"SSIM": True})):
    kernel = getattr(kernels, name)
    fixed = {**constants, "BLOCK": kernels.BLOCK, **({} if name == "_warp" else {"WEIGHT": 0.85})}
    kinds = {a: "constexpr" if a in fixed else "i32" if a in ("N", "H", "W") else "*fp32" for a in kernel.arg_names}
    source = ASTSource(kernel, kinds, {(kernel.arg_names.index(a),): value for a, value in fixed.items()})
    built = compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": kernels._WARPS})
    print(name, len(built.asm["cubin"]))
"""


def test_kernels_compile_for_a_gpu_without_one(tmp_path: Path) -> None:
    """The interpreter takes Python that the compiler does not; a Hopper binary can be made anywhere."""
    variables = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE],
        cwd=Path(__file__).resolve().parents[1],
        env={**variables, "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    sizes = dict(line.split() for line in done.stdout.splitlines())
    assert list(sizes) == ["_warp", "_error", "_gradient"]
    assert all(int(size) > 5000 for size in sizes.values())


@pytest.mark.gpu
def test_plain_operators_on_the_gpu_equal_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    expected, grads = loss(LossConfig(), "cuda")
    monkeypatch.setattr(reprojection, "has_kernels", lambda images: False)
    found, found_grads = loss(LossConfig(), "cuda")
    assert found.total.item() == pytest.approx(expected.total.item(), rel=1e-5)
    for one, other in zip(found_grads, grads, strict=True):
        assert ((one - other).norm() / other.norm()).item() < 1e-3


@pytest.mark.gpu
def test_equal_inputs_give_equal_bits_on_the_gpu() -> None:
    """All but the gradient by the coarse disparity: torch's upsampling adds to it in no fixed order."""
    first, second = loss(LossConfig(), "cuda"), loss(LossConfig(), "cuda")
    assert torch.equal(first[0].total, second[0].total)
    for place, (one, other) in enumerate(zip(first[1], second[1], strict=True)):
        if place == 1:
            torch.testing.assert_close(one, other)
        else:
            assert torch.equal(one, other)
