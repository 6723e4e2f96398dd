"""Camera geometry against closed forms, a per-pixel numpy reference, and finite differences."""

from __future__ import annotations

import math

import naive
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from md2 import geometry
from md2.photometric.reprojection import pixel_map

F64 = torch.float64


def intrinsics(fx: float, fy: float, cx: float, cy: float) -> torch.Tensor:
    return torch.tensor([[[fx, 0.0, cx], [0.0, fy, cy], [0.0, 0.0, 1.0]]], dtype=F64)


def test_disparity_to_depth_ends_and_middle() -> None:
    depth = geometry.disparity_to_depth(torch.tensor([0.0, 0.5, 1.0], dtype=F64), 0.1, 100.0)
    # 1/100 = 0.01 and 1/0.1 = 10; half way between is 5.005.
    torch.testing.assert_close(depth, torch.tensor([100.0, 1 / 5.005, 0.1], dtype=F64))


def test_rotation_of_a_quarter_turn_about_each_axis() -> None:
    rotation = geometry.rotation_from_axis_angle(torch.eye(3, dtype=F64) * math.pi / 2)
    about_x, about_y, about_z = rotation
    # Right-handed: x takes y to z, y takes z to x, z takes x to y.
    torch.testing.assert_close(about_x @ torch.tensor([0.0, 1, 0], dtype=F64), torch.tensor([0.0, 0, 1], dtype=F64))
    torch.testing.assert_close(about_y @ torch.tensor([0.0, 0, 1], dtype=F64), torch.tensor([1.0, 0, 0], dtype=F64))
    torch.testing.assert_close(about_z @ torch.tensor([1.0, 0, 0], dtype=F64), torch.tensor([0.0, 1, 0], dtype=F64))


@given(st.lists(st.floats(-3, 3), min_size=3, max_size=3))
@settings(max_examples=50, deadline=None)
def test_rotation_is_the_matrix_exponential(vector: list[float]) -> None:
    x, y, z = vector
    skew = torch.tensor([[0, -z, y], [z, 0, -x], [-y, x, 0]], dtype=F64)
    found = geometry.rotation_from_axis_angle(torch.tensor([vector], dtype=F64))[0]
    # The axis is divided by angle + 1e-7, so it is a unit vector to 1e-7 / angle only.
    angle = math.sqrt(x * x + y * y + z * z)
    torch.testing.assert_close(found, torch.matrix_exp(skew), atol=4e-7 * max(1.0, angle), rtol=0)


def test_rotation_at_zero_is_the_identity_with_finite_gradients() -> None:
    zero = torch.zeros(1, 3, requires_grad=True)
    rotation = geometry.rotation_from_axis_angle(zero)
    torch.testing.assert_close(rotation, torch.eye(3)[None])
    rotation[0, 0, 1].backward()
    assert zero.grad is not None and zero.grad.isfinite().all()


def test_small_rotation_divides_by_angle_plus_epsilon() -> None:
    """At angle = 1e-7 the axis is half a unit long: the formula of the official implementation."""
    rotation = geometry.rotation_from_axis_angle(torch.tensor([[0.0, 0.0, 1e-7]], dtype=F64))
    assert rotation[0, 1, 0].item() == pytest.approx(0.5e-7, rel=1e-6)


def test_transform_rotates_then_translates_and_inverts() -> None:
    axis_angle = torch.tensor([[0.0, 0.0, math.pi / 2]], dtype=F64)
    translation = torch.tensor([[1.0, 2.0, 3.0]], dtype=F64)
    point = torch.tensor([1.0, 0.0, 0.0, 1.0], dtype=F64)
    T = geometry.transform_from_axis_angle(axis_angle, translation)[0]
    torch.testing.assert_close(T @ point, torch.tensor([1.0, 3.0, 3.0, 1.0], dtype=F64), atol=1e-6, rtol=0)
    inverse = geometry.transform_from_axis_angle(axis_angle, translation, invert=True)[0]
    torch.testing.assert_close(inverse @ T, torch.eye(4, dtype=F64), atol=1e-6, rtol=0)


def test_backproject_by_hand() -> None:
    depth = torch.full((1, 1, 3, 4), 2.0, dtype=F64)
    points = geometry.backproject(depth, intrinsics(4.0, 5.0, 1.0, 2.0))
    # Pixel (3, 0): x = (3 - 1) / 4 * 2, y = (0 - 2) / 5 * 2, z = 2.
    torch.testing.assert_close(points[0, :, 0, 3], torch.tensor([1.0, -0.8, 2.0], dtype=F64))


def test_project_by_hand() -> None:
    points = torch.tensor([1.0, -0.8, 2.0], dtype=F64).view(1, 3, 1, 1)
    T = torch.eye(4, dtype=F64)[None].clone()
    T[0, :3, 3] = torch.tensor([0.5, 0.8, 1.0], dtype=F64)
    pixels = geometry.project(points, intrinsics(4.0, 5.0, 1.0, 2.0), T)
    # (1.5, 0, 3): u = 4 * 1.5 / 3 + 1, v = 0 + 2.
    torch.testing.assert_close(pixels[0, 0, 0], torch.tensor([3.0, 2.0], dtype=F64), atol=1e-6, rtol=0)


def test_projection_divides_by_z_plus_epsilon() -> None:
    points = torch.tensor([1.0, 0.0, 0.0], dtype=F64).view(1, 3, 1, 1)
    pixels = geometry.project(points, intrinsics(1.0, 1.0, 0.0, 0.0), torch.eye(4, dtype=F64)[None])
    assert pixels[0, 0, 0, 0].item() == pytest.approx(1e7)


def test_points_behind_the_camera_are_divided_as_any_other() -> None:
    points = torch.tensor([1.0, -3.0, -2.0], dtype=F64).view(1, 3, 1, 1)
    pixels = geometry.project(points, intrinsics(4.0, 5.0, 1.0, 2.0), torch.eye(4, dtype=F64)[None])
    # u = 4 * 1 / -2 + 1, v = 5 * -3 / -2 + 2.
    torch.testing.assert_close(pixels[0, 0, 0], torch.tensor([-1.0, 9.5], dtype=F64), atol=1e-5, rtol=0)


def test_identity_warp_returns_the_image() -> None:
    torch.manual_seed(0)
    image = torch.rand(2, 3, 6, 9)
    K = intrinsics(7.0, 6.0, 4.0, 2.5).float().expand(2, 3, 3)
    depth = torch.rand(2, 1, 6, 9) + 1
    torch.testing.assert_close(geometry.warp(image, depth, K, torch.eye(4).expand(2, 4, 4)), image, atol=1e-5, rtol=0)


def test_stereo_shift_by_whole_pixels_repeats_the_border() -> None:
    """fx * tx / z = 10 * 0.2 / 1 = 2 pixels to the right; beyond the border the last column is repeated."""
    image = torch.rand(1, 3, 4, 8, dtype=F64)
    T = torch.eye(4, dtype=F64)[None].clone()
    T[0, 0, 3] = 0.2
    warped = geometry.warp(image, torch.ones(1, 1, 4, 8, dtype=F64), intrinsics(10.0, 10.0, 3.5, 1.5), T)
    expected = torch.cat([image[..., 2:], image[..., -1:], image[..., -1:]], dim=3)
    torch.testing.assert_close(warped, expected, atol=1e-5, rtol=0)


def test_warp_equals_per_pixel_reference() -> None:
    rng = np.random.default_rng(3)
    image = rng.random((2, 3, 10, 14))
    depth = rng.uniform(0.5, 4.0, (2, 1, 10, 14))
    K = np.array([[9.0, 0, 6.2], [0, 8.0, 4.7], [0, 0, 1]])
    T = np.stack([naive.rigid(rng.normal(0, 0.2, 3), rng.normal(0, 0.4, 3), invert) for invert in (False, True)])
    found = geometry.warp(*(torch.from_numpy(a) for a in (image, depth, np.stack([K, K]), T)))
    expected = np.stack([naive.warp(image[i], depth[i, 0], K, T[i]) for i in range(2)])
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)


def test_warp_gradients_equal_finite_differences() -> None:
    torch.manual_seed(1)
    image = torch.rand(1, 2, 5, 6, dtype=F64)
    depth = (torch.rand(1, 1, 5, 6, dtype=F64) + 1.5).requires_grad_()
    axis_angle = torch.tensor([[0.013, -0.021, 0.017]], dtype=F64, requires_grad=True)
    translation = torch.tensor([[0.11, -0.07, 0.05]], dtype=F64, requires_grad=True)

    def warped(depth: torch.Tensor, axis_angle: torch.Tensor, translation: torch.Tensor) -> torch.Tensor:
        T = geometry.transform_from_axis_angle(axis_angle, translation, invert=True)
        return geometry.warp(image, depth, intrinsics(5.0, 5.0, 2.4, 1.9), T)

    assert torch.autograd.gradcheck(warped, (depth, axis_angle, translation), eps=1e-7, atol=1e-5)


def test_the_map_of_pixels_is_rounded_once() -> None:
    """From numbers in single precision as if they were exact: every pixel of the image shares its error."""
    K = intrinsics(0.58 * 640, 1.92 * 192, 319.7, 95.9).float()
    T = geometry.transform_from_axis_angle(torch.tensor([[0.01, -0.02, 0.03]]), torch.tensor([[0.3, -0.1, 0.9]]))[
        :, None
    ]
    single, double = pixel_map(K, T, (192, 640)), pixel_map(K.double(), T.double(), (192, 640))
    assert single.dtype == torch.float32
    assert torch.equal(single, double.float())


def test_scaled_intrinsics_are_all_divided() -> None:
    K = intrinsics(40.0, 50.0, 20.0, 10.0)
    torch.testing.assert_close(geometry.scale_intrinsics(K, 2), intrinsics(10.0, 12.5, 5.0, 2.5))
    torch.testing.assert_close(geometry.scale_intrinsics(K, 0), K)
