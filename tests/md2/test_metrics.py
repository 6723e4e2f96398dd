"""Depth metrics, crops, scaling and post-processing, against values worked out by hand and a plain NumPy loop."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from md2.evaluation.metrics import (
    EIGEN,
    EIGEN_BENCHMARK,
    METRICS,
    Protocol,
    crop_box,
    depth_metrics,
    evaluate_batch,
    masked_median,
    mean_metrics,
    resize_to,
    valid_mask,
)
from md2.inference.predictor import post_process

UNCROPPED = Protocol(crop="none")


def test_metrics_of_three_pixels_by_hand() -> None:
    """true 2, 4, 8 against predicted 1, 4, 10."""
    found = depth_metrics(torch.tensor([[2.0, 4.0, 8.0]]), torch.tensor([[1.0, 4.0, 10.0]]))[0]
    by_hand = {
        "abs_rel": (1 / 2 + 0 + 2 / 8) / 3,
        "sq_rel": (1 / 2 + 0 + 4 / 8) / 3,
        "rmse": math.sqrt((1 + 0 + 4) / 3),
        "rmse_log": math.sqrt((math.log(2) ** 2 + math.log(1.25) ** 2) / 3),
        # Ratios 2, 1, 1.25: the threshold itself is not within it.
        "a1": 1 / 3,
        "a2": 2 / 3,
        "a3": 2 / 3,
    }
    assert dict(zip(METRICS, found.tolist(), strict=True)) == pytest.approx(by_hand, rel=1e-12)


def test_only_counted_pixels_enter_and_rows_stay_apart() -> None:
    true = torch.tensor([[2.0, 4.0, 99.0], [10.0, 10.0, 10.0]])
    predicted = torch.tensor([[1.0, 4.0, 1.0], [10.0, 10.0, 10.0]])
    counted = torch.tensor([[True, True, False], [True, False, True]])
    found = depth_metrics(true, predicted, counted)
    assert found[0, 0].item() == pytest.approx(0.25)
    assert found[1].tolist() == [0, 0, 0, 0, 1, 1, 1]


def test_crops_at_kittis_size() -> None:
    """375 x 1242: floor(0.40810811 * 375) = 153 and so on (Garg's crop as every paper states it)."""
    assert crop_box("garg", 375, 1242) == (153, 371, 44, 1197)
    assert crop_box("eigen", 375, 1242) == (124, 342, 44, 1197)
    assert crop_box("none", 375, 1242) == (0, 375, 0, 1242)


def test_crop_is_relative_to_each_images_own_size_and_padding_never_counts() -> None:
    depth = torch.full((2, 1, 40, 100), 5.0)
    sizes = torch.tensor([[40, 100], [20, 50]])
    mask = valid_mask(depth, sizes)
    assert mask[0, 0].nonzero().min(0).values.tolist() == [16, 3]
    assert mask[0, 0].nonzero().max(0).values.tolist() == [38, 95]
    assert mask[1, 0].nonzero().min(0).values.tolist() == [8, 1]
    assert mask[1, 0].nonzero().max(0).values.tolist() == [18, 47]
    assert valid_mask(depth, sizes, EIGEN_BENCHMARK)[1].sum() == 20 * 50


def test_ground_truth_at_the_cap_counts_only_where_it_is_not_capped() -> None:
    depth = torch.tensor([[[[0.0, 1e-3, 5.0, 79.99, 80.0, 85.0]]]])
    size = torch.tensor([[1, 6]])
    assert valid_mask(depth, size, UNCROPPED).flatten().tolist() == [False, False, True, True, False, False]
    assert valid_mask(depth, size, EIGEN_BENCHMARK).flatten().tolist() == [False, True, True, True, True, True]


def test_disparity_is_resized_at_half_pixel_positions() -> None:
    """Two values to four: 0, 1/4, 3/4, 1 (corner-aligned sampling would give 0, 1/3, 2/3, 1)."""
    resized = resize_to(torch.tensor([[[[0.0, 1.0]]]]), torch.tensor([[1, 4]]), (2, 5))
    assert resized[0, 0].tolist() == [[0.0, 0.25, 0.75, 1.0, 0.0], [0.0] * 5]
    # Downwards it samples and does not average: 8 values to 2 read between 2nd and 3rd, 6th and 7th.
    ramp = torch.tensor([0.0, 0, 0, 8, 8, 0, 4, 4]).view(1, 1, 1, 8)
    assert resize_to(ramp, torch.tensor([[1, 2]]), (1, 2)).flatten().tolist() == [0.0, 2.0]


def test_disparity_and_not_depth_is_resized() -> None:
    """Disparities 1 and 1/3 meet at 2/3, depth 1.5; resizing depth would give (1 + 3) / 2 = 2."""
    disparity = torch.tensor([[[[1.0, 1 / 3]]]])
    depth = torch.tensor([[[[0.0, 1.5, 0.0]]]])
    found = evaluate_batch(disparity, depth, scaling=1.0, protocol=UNCROPPED)
    assert found.values[0, 0].item() == pytest.approx(0, abs=1e-6)


def test_median_scaling_by_hand() -> None:
    """Even number of pixels: the median is the mean of the middle two, on both sides."""
    depth = torch.tensor([[[[2.0, 4.0, 10.0, 40.0]]]])
    disparity = 1 / torch.tensor([[[[1.0, 2.0, 4.0, 20.0]]]])
    found = evaluate_batch(disparity, depth, protocol=UNCROPPED)
    assert found.ratios.item() == pytest.approx(7 / 3)
    predicted = [7 / 3, 14 / 3, 28 / 3, 140 / 3]
    by_hand = sum(abs(t - p) / t for t, p in zip([2, 4, 10, 40], predicted, strict=True)) / 4
    assert found.values[0, 0].item() == pytest.approx(by_hand)
    assert found.pixels.tolist() == [4]


def test_ratio_comes_before_the_clamp() -> None:
    """Unit depth 100 with factor 0.5 is 50 m, not 80 * 0.5; and 100 with factor 5.4 is capped at 80."""
    disparity = torch.full((1, 1, 1, 1), 0.01)
    depth = torch.full((1, 1, 1, 1), 50.0)
    halved = evaluate_batch(disparity, depth, scaling=0.5, protocol=UNCROPPED)
    assert halved.values[0, 2].item() == pytest.approx(0, abs=1e-5)
    capped = evaluate_batch(disparity, depth, scaling=5.4, protocol=UNCROPPED)
    assert capped.values[0, 2].item() == pytest.approx(30)
    assert capped.ratios.tolist() == [5.4]


def test_zero_disparity_is_the_farthest_depth() -> None:
    found = evaluate_batch(torch.zeros(1, 1, 1, 1), torch.full((1, 1, 1, 1), 40.0), scaling=1.0, protocol=UNCROPPED)
    assert found.values[0, 2].item() == pytest.approx(40)


def test_scaling_is_per_image_and_an_empty_image_is_left_out_of_the_mean() -> None:
    depth = torch.stack([torch.full((1, 4, 4), 6.0), torch.full((1, 4, 4), 12.0), torch.zeros(1, 4, 4)])
    disparity = torch.stack([torch.full((1, 4, 4), 1.0), torch.full((1, 4, 4), 0.25), torch.ones(1, 4, 4)])
    found = evaluate_batch(disparity, depth, protocol=UNCROPPED)
    assert found.ratios[:2].tolist() == pytest.approx([6, 3])
    assert found.pixels.tolist() == [16, 16, 0]
    assert found.values[2].isnan().all()
    assert mean_metrics(found.values, found.pixels)["abs_rel"] == 0
    assert math.isnan(mean_metrics(found.values[2:], found.pixels[2:])["abs_rel"])


def test_a_sample_without_ground_truth_has_size_zero_and_counts_nothing() -> None:
    depth = torch.zeros(2, 1, 4, 6)
    depth[0] = 3.0
    found = evaluate_batch(torch.ones(2, 1, 2, 3), depth, torch.tensor([[4, 6], [0, 0]]), protocol=UNCROPPED)
    assert found.pixels.tolist() == [24, 0]
    assert found.ratios[0].item() == pytest.approx(3)


def test_a_nan_prediction_is_not_averaged_away() -> None:
    disparity = torch.ones(2, 1, 2, 2)
    disparity[1, 0, 0, 0] = torch.nan
    found = evaluate_batch(disparity, torch.full((2, 1, 2, 2), 5.0), scaling=5.0, protocol=UNCROPPED)
    assert all(math.isnan(value) for value in mean_metrics(found.values, found.pixels).values())


def test_unless_told_otherwise_a_batch_is_measured_as_eigens_images_are() -> None:
    """Validation during training asks for nothing else, and its numbers stand beside the published ones."""
    depth = torch.full((1, 1, 375, 1242), 40.0)
    disparity = torch.rand(1, 1, 24, 80, generator=torch.Generator().manual_seed(0)) / 20 + 1e-3
    depth[..., ::7] = 80.0  # at the cap
    depth[..., 3::7] = 1e-3
    found = evaluate_batch(disparity, depth)
    # Garg's crop: rows 153 to 370, columns 44 to 1196; of seven columns five are inside the range.
    columns = sum(column % 7 not in (0, 3) for column in range(44, 1197))
    assert found.pixels.tolist() == [(371 - 153) * columns]


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="disparity"):
        evaluate_batch(torch.ones(2, 1, 4, 4), torch.ones(1, 1, 4, 4))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.floats(1e-3, 1e3), st.booleans()), min_size=1, max_size=20))
def test_masked_median_is_numpys(pairs: list[tuple[float, bool]]) -> None:
    values = torch.tensor([[value for value, _ in pairs]], dtype=torch.float64)
    counted = torch.tensor([[flag for _, flag in pairs]])
    kept = [value for value, flag in pairs if flag]
    expected = np.median(kept) if kept else np.nan
    np.testing.assert_allclose(masked_median(values, counted).item(), expected)


def _numpy_reference(disparity: np.ndarray[Any, Any], true: np.ndarray[Any, Any], protocol: Protocol) -> list[float]:
    """One image, step by step, resized by its own two-tap interpolation."""
    height, width = true.shape

    def taps(size: int, source: int) -> tuple[Any, Any, Any]:
        at = np.clip((np.arange(size) + 0.5) * source / size - 0.5, 0, source - 1)
        low = np.floor(at).astype(int)
        return low, np.minimum(low + 1, source - 1), at - low

    top, bottom, down = taps(height, disparity.shape[0])
    left, right, across = taps(width, disparity.shape[1])
    upper = disparity[top][:, left] * (1 - across) + disparity[top][:, right] * across
    lower = disparity[bottom][:, left] * (1 - across) + disparity[bottom][:, right] * across
    depth = 1 / (upper * (1 - down[:, None]) + lower * down[:, None])
    mask = (true > 1e-3) & (true < 80) if protocol.cap_ground_truth else true > 0
    rows, cols = np.arange(height)[:, None], np.arange(width)[None]
    r0, r1, c0, c1 = crop_box(protocol.crop, height, width)
    mask &= (rows >= r0) & (rows < r1) & (cols >= c0) & (cols < c1)
    true, depth = true[mask], depth[mask]
    depth = np.clip(depth * np.median(true) / np.median(depth), 1e-3, 80)
    ratio = np.maximum(true / depth, depth / true)
    return [
        float(np.mean(np.abs(true - depth) / true)),
        float(np.mean((true - depth) ** 2 / true)),
        float(np.sqrt(np.mean((true - depth) ** 2))),
        float(np.sqrt(np.mean((np.log(true) - np.log(depth)) ** 2))),
        *(float(np.mean(ratio < 1.25**power)) for power in (1, 2, 3)),
    ]


@pytest.mark.parametrize("protocol", [EIGEN, EIGEN_BENCHMARK, Protocol(crop="eigen")])
def test_a_padded_batch_of_two_sizes_equals_a_loop_over_images(protocol: Protocol) -> None:
    rng = np.random.default_rng(3)
    sizes = [(37, 124), (36, 120), (37, 124)]
    disparity = rng.uniform(0.01, 0.5, (3, 19, 64)).astype(np.float32)
    padded = np.zeros((3, 1, 37, 124), np.float32)
    expected = []
    for index, (height, width) in enumerate(sizes):
        true = (rng.uniform(1, 95, (height, width)) * (rng.random((height, width)) < 0.2)).astype(np.float32)
        padded[index, 0, :height, :width] = true
        expected.append(_numpy_reference(disparity[index].astype(np.float64), true.astype(np.float64), protocol))
    found = evaluate_batch(
        torch.from_numpy(disparity)[:, None],
        torch.from_numpy(padded),
        torch.tensor(sizes),
        protocol=protocol,
    )
    np.testing.assert_allclose(found.values.numpy(), expected, rtol=2e-5)


def test_post_processing_by_hand() -> None:
    """21 columns, so 0.05 a column: mirrored at column 0 and 1, blended to column 2, the mean between."""
    plain = torch.full((1, 1, 1, 21), 2.0)
    mirrored = torch.full((1, 1, 1, 21), 4.0)
    merged = post_process(plain, mirrored).flatten()
    assert merged[:2].tolist() == pytest.approx([4, 4], abs=1e-5)
    assert merged[2:19].tolist() == pytest.approx([3] * 17, abs=1e-5)
    assert merged[19:].tolist() == pytest.approx([2, 2], abs=1e-5)
    # Half-way down the ramp (7.5 % of the width) the mirrored one weighs 1/2 + 1/4.
    wide = post_process(torch.full((1, 1, 1, 41), 2.0), torch.full((1, 1, 1, 41), 4.0)).flatten()
    assert wide[3].item() == pytest.approx(3.5, abs=1e-5)


def test_post_processing_of_a_mirror_symmetric_network_changes_nothing() -> None:
    disparity = torch.rand(2, 1, 3, 30, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(post_process(disparity, disparity.flip(-1)), disparity)


@pytest.mark.gpu
def test_the_gpu_gives_the_same_metrics() -> None:
    generator = torch.Generator().manual_seed(0)
    disparity = torch.rand(2, 1, 12, 40, generator=generator) + 0.02
    depth = torch.rand(2, 1, 30, 90, generator=generator) * 90
    depth *= torch.rand(2, 1, 30, 90, generator=generator) < 0.3
    sizes = torch.tensor([[30, 90], [28, 85]])
    here = evaluate_batch(disparity, depth, sizes)
    there = evaluate_batch(disparity.cuda(), depth.cuda(), sizes.cuda())
    torch.testing.assert_close(there.values.cpu(), here.values, rtol=1e-5, atol=1e-7)
    assert there.pixels.tolist() == here.pixels.tolist()


@settings(max_examples=25, deadline=None)
@given(st.floats(0.01, 100))
def test_median_scaling_forgets_the_predictions_unit(factor: float) -> None:
    generator = torch.Generator().manual_seed(1)
    disparity = torch.rand(1, 1, 6, 9, generator=generator, dtype=torch.float64) + 0.1
    depth = torch.rand(1, 1, 12, 18, generator=generator) * 60 + 1
    plain, scaled = (evaluate_batch(d, depth, protocol=UNCROPPED) for d in (disparity, disparity * factor))
    torch.testing.assert_close(scaled.values, plain.values, rtol=1e-4, atol=1e-4)
    assert scaled.ratios.item() == pytest.approx(plain.ratios.item() * factor, rel=1e-4)
