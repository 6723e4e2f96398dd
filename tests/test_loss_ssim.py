"""SSIM and the photometric error against window moments, closed forms and finite differences."""

from __future__ import annotations

import naive
import numpy as np
import pytest
import torch

from md2.ssim import Target, photometric_error, ssim_error, window_mean


def test_window_mean_reflects_without_repeating_the_border() -> None:
    row = torch.tensor([[1.0, 2.0, 4.0], [1.0, 2.0, 4.0]]).view(1, 1, 2, 3)
    # Left border sees 2, 1, 2; right border 2, 4, 2. Rows are alike, so only columns count.
    expected = torch.tensor([5 / 3, 7 / 3, 8 / 3]).expand(2, 3).view(1, 1, 2, 3)
    torch.testing.assert_close(window_mean(row), expected)


@pytest.mark.parametrize("size", [(2, 2), (5, 7), (9, 4)])
def test_ssim_equals_window_moments(size: tuple[int, int]) -> None:
    rng = np.random.default_rng(1)
    a, b = rng.random((2, 3, *size))
    b = 0.7 * a + 0.3 * b
    found = ssim_error(torch.from_numpy(a)[None], Target.of(torch.from_numpy(b)[None]))
    np.testing.assert_allclose(found[0].numpy(), naive.ssim_error(a, b), atol=1e-12)


def test_ssim_of_equal_images_is_one_and_of_opposite_ones_is_clamped() -> None:
    torch.manual_seed(0)
    image = torch.rand(1, 3, 6, 6, dtype=torch.float64)
    assert ssim_error(image, Target.of(image)).abs().max().item() < 1e-12
    board = (torch.arange(36).view(6, 6) + torch.arange(6).view(6, 1)).remainder(2).double().expand(1, 3, 6, 6)
    opposite = ssim_error(1 - board, Target.of(board))
    assert opposite.max().item() <= 1.0
    assert opposite.mean().item() > 0.9


def test_ssim_of_constant_images_is_the_luminance_term() -> None:
    a, b = torch.full((1, 3, 4, 4), 0.2, dtype=torch.float64), torch.full((1, 3, 4, 4), 0.6, dtype=torch.float64)
    expected = (1 - (2 * 0.2 * 0.6 + 1e-4) / (0.04 + 0.36 + 1e-4)) / 2
    torch.testing.assert_close(ssim_error(a, Target.of(b)), torch.full_like(a, expected))


def test_photometric_error_weights_and_order_of_sources() -> None:
    rng = np.random.default_rng(2)
    target, first, second = rng.random((3, 2, 3, 5, 6))
    stacked = torch.from_numpy(np.concatenate([first, second]))
    found = photometric_error(stacked, Target.of(torch.from_numpy(target)))
    assert found.shape == (2, 2, 5, 6)
    for sample in range(2):
        for source, image in enumerate((first, second)):
            expected = naive.photometric(image[sample], target[sample], no_ssim=False)
            np.testing.assert_allclose(found[sample, source].numpy(), expected, atol=1e-12)
    plain = photometric_error(stacked, Target.of(torch.from_numpy(target)), no_ssim=True)
    np.testing.assert_allclose(plain[1, 0].numpy(), np.abs(first[1] - target[1]).mean(0), atol=1e-12)


def test_photometric_gradient_equals_finite_differences() -> None:
    torch.manual_seed(3)
    target = Target.of(torch.rand(2, 3, 4, 5, dtype=torch.float64))
    stacked = torch.rand(4, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda images: photometric_error(images, target), (stacked,), eps=1e-7, atol=1e-5)
