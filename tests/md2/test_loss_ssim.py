"""SSIM and the photometric error against window moments, closed forms and finite differences."""

from __future__ import annotations

import naive
import numpy as np
import pytest
import torch

from md2.photometric.ssim import Photometric, Target, photometric_error, window_sum


def sums(image: torch.Tensor, adjoint: bool = False) -> torch.Tensor:
    return window_sum(image, torch.empty_like(image), torch.empty_like(image), adjoint)


def ssim_error(image: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean over channels of clamp((1 - SSIM) / 2), by taking L1 back out of the photometric error."""
    error = photometric_error(image.unsqueeze(1), Target.of(target))[:, 0]
    return (error - 0.15 * (image - target).abs().mean(1)) / 0.85


def test_window_sum_reflects_without_repeating_the_border() -> None:
    row = torch.tensor([[1.0, 2.0, 4.0], [1.0, 2.0, 4.0]]).view(1, 1, 2, 3)
    # Left border sees 2, 1, 2; right border 2, 4, 2. All three rows of a window are alike.
    expected = torch.tensor([15.0, 21.0, 24.0]).expand(2, 3).view(1, 1, 2, 3)
    torch.testing.assert_close(sums(row), expected)


@pytest.mark.parametrize("size", [(2, 2), (2, 3), (3, 2), (5, 7), (9, 4)])
def test_window_sum_and_its_adjoint(size: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    a, b = (torch.from_numpy(rng.random((2, 3, *size))) for _ in range(2))
    np.testing.assert_allclose(sums(a)[0].numpy(), naive.windows(a[0].numpy()).sum(-1))
    # <S a, b> = <a, S* b> is what a transposed map is.
    torch.testing.assert_close((sums(a) * b).sum(), (a * sums(b, adjoint=True)).sum())


@pytest.mark.parametrize("size", [(2, 2), (5, 7), (9, 4)])
def test_ssim_equals_window_moments(size: tuple[int, int]) -> None:
    rng = np.random.default_rng(1)
    a, b = rng.random((2, 3, *size))
    b = 0.7 * a + 0.3 * b
    found = ssim_error(torch.from_numpy(a)[None], torch.from_numpy(b)[None])
    np.testing.assert_allclose(found[0].numpy(), naive.ssim_error(a, b).mean(0), atol=1e-12)


def test_ssim_of_equal_images_is_one_and_of_opposite_ones_near_its_end() -> None:
    torch.manual_seed(0)
    image = torch.rand(1, 3, 6, 6, dtype=torch.float64)
    assert ssim_error(image, image).abs().max().item() < 1e-12
    board = (torch.arange(36).view(6, 6) + torch.arange(6).view(6, 1)).remainder(2).double().expand(1, 3, 6, 6)
    opposite = ssim_error(1 - board, board)
    assert 0.9 < opposite.mean().item() <= opposite.max().item() <= 1.0


def test_ssim_of_constant_images_is_the_luminance_term() -> None:
    a, b = torch.full((1, 3, 4, 4), 0.2, dtype=torch.float64), torch.full((1, 3, 4, 4), 0.6, dtype=torch.float64)
    expected = (1 - (2 * 0.2 * 0.6 + 1e-4) / (0.04 + 0.36 + 1e-4)) / 2
    torch.testing.assert_close(ssim_error(a, b), torch.full((1, 4, 4), expected, dtype=torch.float64))


def test_single_precision_has_no_bias() -> None:
    """Rounding may move single pixels, but not the mean: the loss is compared to 1e-5."""
    rng = np.random.default_rng(4)
    a, b = (naive.upsample(rng.random((3, 12, 40)), 96, 320) for _ in range(2))
    single, double = (
        photometric_error(torch.from_numpy(a).to(dtype)[None, None], Target.of(torch.from_numpy(b).to(dtype)[None]))
        for dtype in (torch.float32, torch.float64)
    )
    assert single.double().mean().item() == pytest.approx(double.mean().item(), rel=3e-7)


def test_rounding_makes_no_error_negative() -> None:
    """In single precision SSIM comes out above 1 at a third of the pixels of equal images; as an error it is 0."""
    image = torch.rand(1, 3, 40, 60, generator=torch.Generator().manual_seed(0))
    assert photometric_error(image[:, None], Target.of(image)).abs().max().item() < 1e-6
    assert photometric_error(image[:, None], Target.of(image)).min().item() >= 0


def test_photometric_error_weights_and_order_of_sources() -> None:
    rng = np.random.default_rng(2)
    target, first, second = rng.random((3, 2, 3, 5, 6))
    stacked = torch.from_numpy(np.stack([first, second], axis=1))
    found = photometric_error(stacked, Target.of(torch.from_numpy(target)))
    assert found.shape == (2, 2, 5, 6)
    for sample in range(2):
        for source, image in enumerate((first, second)):
            expected = naive.photometric(image[sample], target[sample], no_ssim=False)
            np.testing.assert_allclose(found[sample, source].numpy(), expected, atol=1e-12)
    plain = photometric_error(stacked, Target.of(torch.from_numpy(target)), no_ssim=True)
    np.testing.assert_allclose(plain[1, 0].numpy(), np.abs(first[1] - target[1]).mean(0), atol=1e-12)


@pytest.mark.parametrize("no_ssim", [False, True])
def test_photometric_gradient_equals_finite_differences(no_ssim: bool) -> None:
    torch.manual_seed(3)
    target = Target.of(torch.rand(2, 3, 4, 5, dtype=torch.float64))
    images = torch.rand(2, 2, 3, 4, 5, dtype=torch.float64)
    weights = torch.rand(2, 2, 4, 5, dtype=torch.float64)
    worker = Photometric(images.shape, images, no_ssim, gradients=True)
    worker.error(images, target)
    gradient = worker.gradient(images, target, weights).clone()
    step = 1e-6
    for index in range(0, images.numel(), 7):
        values = []
        for sign in (1, -1):
            moved = images.clone()
            moved.view(-1)[index] += sign * step
            values.append((photometric_error(moved, target, no_ssim) * weights).sum().item())
        slope = (values[0] - values[1]) / (2 * step)
        assert gradient.view(-1)[index].item() == pytest.approx(slope, rel=1e-5, abs=1e-8)
