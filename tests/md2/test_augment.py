"""Colour jitter against Pillow, DALI and closed forms; cameras and baselines against hand-computed numbers."""

from __future__ import annotations

import colorsys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import nvidia.dali.fn
import nvidia.dali.types
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance
from pipeline_data import Array, Operations, as_floats, config, loader, make_samples, pack, smooth

import md2.data.augment
import md2.data.cpu
from md2.data.augment import (
    FLIP_PROBABILITY,
    JITTER_PROBABILITY,
    Jitter,
    camera_matrices,
    float_images,
    jitter_factors,
    jitter_matrices,
    stereo_transforms,
)
from md2.data.batch import Batch
from md2.data.cpu import HostMemory, over_images

dali: Any = nvidia.dali
UNCHANGED = [1.0, 1.0, 1.0, 0.0]
NAMES = ["brightness", "contrast", "saturation", "hue"]


def factors(**changes: float) -> torch.Tensor:
    return torch.tensor([[changes.get(name, usual) for name, usual in zip(NAMES, UNCHANGED, strict=True)]])


def jittered(images: torch.Tensor, chosen: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
    return Jitter.of(chosen, drawn)(images)


def test_images_one_by_one_on_the_host_are_those_all_at_once() -> None:
    """The GPU's way, on the CPU; and what it needs there has been moved before: it makes no constants of its own."""
    pixels = torch.stack([torch.from_numpy(picture(seed)) for seed in range(5)])
    drawn = jitter_factors(2 * torch.rand(3, 4, generator=torch.Generator().manual_seed(1)) - 1)
    jitter = Jitter.of(torch.tensor([0, 2, 4]), drawn)
    flipped = torch.tensor([True, True, False, False, True])
    plain, one_by_one = float_images(pixels, flipped, jitter)
    expected = torch.stack(
        [as_floats(image[:, ::-1] if f else image) for image, f in zip(pixels.numpy(), flipped, strict=True)]
    )
    assert torch.equal(plain, expected)
    with Operations() as count:
        all_at_once = jitter(expected)
    torch.testing.assert_close(one_by_one, all_at_once, rtol=0, atol=2e-6)
    for place in range(5):
        assert torch.equal(one_by_one[place], plain[place]) == (place in (1, 3))
    assert count.names["baddbmm"] == 1
    assert count.names["lift_fresh"] == count.names["_local_scalar_dense"] == 0
    assert count.names.total() < 20


def test_a_large_batch_is_shared_among_threads_and_no_image_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(md2.data.cpu, "cores", lambda: 3)
    md2.data.cpu.host_threads.cache_clear()
    pixels = torch.randint(1, 256, (7, 192, 320, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    jitter = Jitter.of(torch.tensor([1, 4, 6]), jitter_factors(torch.rand(3, 4)))
    together = float_images(pixels, None, jitter)
    assert together[0].nbytes >= md2.data.cpu.SHARED_FROM
    apart = [float_images(pixels[place : place + 1], None, alone(jitter, place)) for place in range(7)]
    for kind in (0, 1):
        assert torch.equal(together[kind], torch.cat([images[kind] for images in apart]))
    shares: list[slice] = []
    monkeypatch.setattr(md2.data.augment, "over_images", lambda work, out: over_images(noted(work, shares), out))
    flipped = torch.tensor([True, False, True, False, False, True, True])
    # Beside threads that decode on one alone; where they rest, on all: the same images, mirrored or not.
    alone_again, _ = float_images(pixels, flipped, None)
    assert not shares
    plain, _ = float_images(pixels, flipped, None, decoding=False)
    assert torch.equal(plain, alone_again)
    assert torch.equal(plain, torch.where(flipped.view(-1, 1, 1, 1), together[0].flip(3), together[0]))
    assert sorted((share.start, share.stop) for share in shares) == [(0, 2), (2, 4), (4, 7)]
    with pytest.raises(ZeroDivisionError):
        over_images(lambda mine: 1 // 0, together[0])
    md2.data.cpu.host_threads.cache_clear()


def noted(work: Callable[[slice], None], shares: list[slice]) -> Callable[[slice], None]:
    def noting(mine: slice) -> None:
        shares.append(mine)
        work(mine)

    return noting


def alone(jitter: Jitter, place: int) -> Jitter:
    """That of a batch of one."""
    chosen = jitter.chosen == place
    return Jitter(jitter.chosen[chosen] * 0, jitter.blocks[chosen], jitter.pivots[chosen])


def test_a_batch_of_which_nothing_is_jittered_is_unchanged() -> None:
    """Of twelve samples that is one batch in 4096: the GPU's way and the CPU's."""
    pixels = torch.stack([torch.from_numpy(picture(seed)) for seed in range(2)])
    jitter = Jitter.of(torch.zeros(0, dtype=torch.int64), jitter_factors(torch.zeros(0, 4)))
    images, jittered = float_images(pixels, None, jitter)
    assert torch.equal(jittered, images)
    assert jittered.data_ptr() != images.data_ptr()
    assert torch.equal(jitter(images), images)


def apply(pixels: Array, **changes: float) -> torch.Tensor:
    return jittered(as_floats(pixels)[None], torch.tensor([0]), factors(**changes))[0]


def picture(seed: int = 0) -> Array:
    return smooth(np.random.default_rng(seed))


@pytest.mark.parametrize("factor", [0.8, 0.93, 1.0, 1.2])
@pytest.mark.parametrize(
    ("name", "enhance"),
    [
        ("brightness", ImageEnhance.Brightness),
        ("contrast", ImageEnhance.Contrast),
        ("saturation", ImageEnhance.Color),
    ],
)
def test_each_factor_does_what_pillow_does(name: str, enhance: Any, factor: float) -> None:
    pixels = picture()
    expected = as_floats(np.asarray(enhance(Image.fromarray(pixels)).enhance(factor)))
    # Pillow rounds the grey it blends with and the result, to whole levels.
    assert (apply(pixels, **{name: factor}) - expected).abs().max() < 1.6 / 255


def test_all_at_once_is_one_after_the_other_where_nothing_is_clamped() -> None:
    pixels = (picture() // 4 + 96).astype(np.uint8)
    changes = {"brightness": 0.9, "contrast": 1.15, "saturation": 0.85, "hue": 0.06}
    together = apply(pixels, **changes)
    for order in (NAMES, NAMES[::-1], ["hue", "contrast", "brightness", "saturation"]):
        image = as_floats(pixels)[None]
        for name in order:
            image = jittered(image, torch.tensor([0]), factors(**{name: changes[name]}))
        torch.testing.assert_close(image[0], together, rtol=0, atol=1e-5)


def test_hue_and_saturation_are_those_of_dali() -> None:
    pixels = (picture(3) // 2 + 64).astype(np.uint8)

    @dali.pipeline_def(batch_size=1, num_threads=1, device_id=None)  # type: ignore[untyped-decorator]
    def twist(hue: float, saturation: float) -> Any:
        image = dali.types.Constant(pixels, layout="HWC", device="cpu")
        return dali.fn.color_twist(image, hue=hue, saturation=saturation, dtype=dali.types.FLOAT)

    for hue, saturation in ((0.0, 0.8), (0.1, 1.0), (-0.07, 1.2)):
        pipeline = twist(360 * hue, saturation)
        expected = torch.from_numpy(np.array(pipeline.run()[0][0])).permute(2, 0, 1) / 255
        found = apply(pixels, hue=hue, saturation=saturation)
        # DALI's YIQ matrix is rounded to three digits.
        assert (found - expected.clamp(0, 1)).abs().max() < 0.004


@pytest.mark.parametrize("turn", [0.1, 0.05, -0.1])
def test_hue_turns_the_colour_circle_the_way_hsv_does(turn: float) -> None:
    for colour in ((150, 100, 100), (100, 150, 100), (100, 100, 150), (150, 150, 100)):
        pixels = np.full((8, 8, 3), colour, np.uint8)
        turned = apply(pixels, hue=turn)[:, 0, 0].tolist()
        before, after = colorsys.rgb_to_hsv(*colour)[0], colorsys.rgb_to_hsv(*turned)[0]
        difference = (after - before - turn + 0.5) % 1 - 0.5
        assert abs(difference) < 0.05


@settings(max_examples=50, deadline=None)
@given(st.tuples(*[st.floats(0.8, 1.2)] * 3, st.floats(-0.1, 0.1)))
def test_grey_stays_grey_and_luma_is_only_brightened(drawn: tuple[float, float, float, float]) -> None:
    matrix = jitter_matrices(torch.tensor([drawn], dtype=torch.float64))[0].double()
    gain = drawn[0] * drawn[1]
    weights = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64)
    torch.testing.assert_close(matrix.sum(1), torch.full((3,), gain, dtype=torch.float64), rtol=0, atol=1e-6)
    torch.testing.assert_close(weights @ matrix, gain * weights, rtol=0, atol=1e-6)


def test_contrast_pivots_at_each_images_own_grey_and_the_result_is_clamped() -> None:
    images = torch.stack([torch.full((3, 4, 6), 0.2), torch.full((3, 4, 6), 0.9)])
    flat = jittered(images, torch.tensor([0, 1]), factors(contrast=0.5).repeat(2, 1))
    torch.testing.assert_close(flat, images)
    bright = jittered(images, torch.tensor([1]), factors(brightness=1.2))
    assert torch.equal(bright[0], images[0])
    assert torch.equal(bright[1], torch.ones(3, 4, 6))


def test_in_a_batch_jitter_is_one_draw_for_all_frames_of_half_of_the_samples(tmp_path: Path) -> None:
    samples = make_samples(64, stereo=True)
    dataset = pack(tmp_path, samples, stereo=True)
    chosen, seen, coins = 0, [], set()
    for batch in loader(dataset, config(stereo=True, flip=True, color_jitter=True), batch_size=8):
        assert batch.stereo is not None
        for place in range(batch.size):
            same = torch.equal(batch.images[0][place], batch.augmented[0][place])
            coins.add((bool(batch.stereo[place, 0, 3] > 0), same))
            fits = [_fit(batch.images[offset][place], batch.augmented[offset][place]) for offset in batch.images]
            if all(fit is None for fit in fits):
                continue
            chosen += 1
            for matrix in fits:
                assert matrix is not None
                torch.testing.assert_close(matrix, fits[0], rtol=0, atol=0.01)
            gain = float(fits[0].sum(1).mean())  # type: ignore[union-attr]
            assert 0.8 * 0.8 - 0.01 < gain < 1.2 * 1.2 + 0.01
            seen.append(gain)
    # 64 fair coins: outside of this once in 10,000 seeds.
    assert 17 <= chosen <= 47
    assert np.ptp(seen) > 0.2
    assert len({round(gain, 4) for gain in seen}) > chosen * 0.9
    assert len(coins) == 4, "one coin decides on both flip and jitter"


def _fit(image: torch.Tensor, jittered_image: torch.Tensor) -> torch.Tensor | None:
    """The matrix between two images, by least squares over what was not clamped; None if they are the same."""
    if torch.equal(image, jittered_image):
        return None
    source, target = image.reshape(3, -1).T.double(), jittered_image.reshape(3, -1).T.double()
    inside = ((target > 0) & (target < 1)).all(1)
    ones = torch.ones(int(inside.sum()), 1, dtype=torch.float64)
    solved = torch.linalg.lstsq(torch.cat([source[inside], ones], 1), target[inside])
    assert (torch.cat([source[inside], ones], 1) @ solved.solution - target[inside]).abs().max() < 1e-4
    matrix: torch.Tensor = solved.solution[:3].T
    return matrix


def test_the_losses_images_are_never_jittered(tmp_path: Path) -> None:
    dataset = pack(tmp_path, make_samples(16))
    plain = loader(dataset, config(color_jitter=False), train=False)
    by_key = {key: batch.images[0][place] for batch in plain for place, key in enumerate(batch.keys)}
    seen = 0
    for batch in loader(dataset, config(color_jitter=True)):
        seen += sum(not torch.equal(*pair) for pair in zip(batch.images[0], batch.augmented[0], strict=True))
        for place, key in enumerate(batch.keys):
            assert torch.equal(batch.images[0][place], by_key[key])
    assert seen > 0


def test_cameras_are_scaled_and_mirrored_about_pixel_centres() -> None:
    calibrated = torch.tensor([[700.0, 720.0, 600.0, 180.0], [700.0, 720.0, 600.0, 180.0]])
    stored = torch.tensor([[1242, 375]])
    flipped = torch.tensor([False, True])
    found = camera_matrices(calibrated, stored, (621, 125), flipped, nominal=False)
    # Half as wide: the pixel centre 600 lies 600.5 pixels from the left edge, so at 300.25 - 0.5. A third as high.
    plain = [[350, 0, 299.75], [0, 240, 180.5 / 3 - 0.5], [0, 0, 1]]
    mirrored = [[350, 0, 620 - 299.75], [0, 240, 180.5 / 3 - 0.5], [0, 0, 1]]
    torch.testing.assert_close(found, torch.tensor([plain, mirrored]))


def test_the_baselines_sign_turns_with_the_flip() -> None:
    found = stereo_transforms(torch.tensor([-0.54, -0.54, 0.54]), torch.tensor([False, True, True]), 5.4)
    torch.testing.assert_close(found[:, 0, 3], torch.tensor([-0.1, 0.1, -0.1]))
    rest = found.clone()
    rest[:, 0, 3] = 0
    assert torch.equal(rest, torch.eye(4).expand(3, 4, 4))


def test_memory_comes_back_only_when_nothing_holds_it() -> None:
    memory = HostMemory()
    first = memory.take((2, 3))
    first.fill_(1)
    place = first.data_ptr()
    view = first[1:]
    del first
    assert memory.take((2, 3)).data_ptr() != place, "a view still holds it"
    weight = torch.ones(1, requires_grad=True)
    product = (view * weight).sum()
    del view
    assert memory.take((2, 3)).data_ptr() != place, "the gradient still needs it"
    product.backward()  # type: ignore[no-untyped-call]
    assert weight.grad == 3
    del product
    assert place in {tensor.data_ptr() for tensor in [memory.take((2, 3)) for _ in range(3)]}
    assert memory.take((3, 2)).shape == (3, 2)


def test_batches_held_on_to_keep_their_values(tmp_path: Path) -> None:
    """Whatever memory the loader or DALI uses again, it is not that of a batch that somebody still has."""

    def tensors(batch: Batch) -> list[torch.Tensor]:
        assert batch.depth is not None
        assert batch.depth_size is not None
        whole = [*batch.images.values(), *batch.augmented.values()]
        return [*whole, batch.intrinsics, batch.depth, batch.depth_size]

    rng = np.random.default_rng(0)
    samples = make_samples(24, depth=lambda number: rng.integers(0, 9999, (40, 60), dtype=np.uint16))
    batches = loader(pack(tmp_path, samples, depth=True), config(color_jitter=True, flip=True), depth=True)
    held = list(batches)
    copies = [[tensor.clone() for tensor in tensors(batch)] for batch in held]
    for _ in range(3):
        list(batches)
    for batch, copy in zip(held, copies, strict=True):
        assert all(torch.equal(now, before) for now, before in zip(tensors(batch), copy, strict=True))


def test_drawn_factors_fill_their_ranges_and_no_more(tmp_path: Path) -> None:
    assert jitter_factors(torch.tensor([[-1.0, 1, -1, 1], [0, 0, 0, 0]])).tolist() == [
        pytest.approx([0.8, 1.2, 0.8, 0.1]),
        UNCHANGED,
    ]
    assert (JITTER_PROBABILITY, FLIP_PROBABILITY) == (0.5, 0.5)
    dataset = pack(tmp_path, make_samples(64))
    outputs = loader(dataset, config(color_jitter=True), batch_size=32)._reader.read().tensors
    found = jitter_factors(outputs["draws"][:32])
    assert found.shape == (32, 4)
    assert ((found - torch.tensor(UNCHANGED)).abs().amax(0) <= torch.tensor([0.2, 0.2, 0.2, 0.1])).all()
    assert (found.amax(0) - found.amin(0) > torch.tensor([0.3, 0.3, 0.3, 0.15])).all()
    assert torch.corrcoef(found.T).fill_diagonal_(0).abs().max() < 0.6, "the factors are drawn independently"


def test_draws_are_others_for_each_seed_rank_and_epoch(tmp_path: Path) -> None:
    """The same on all ranks, and a batch of four GPUs would hold four samples that are flipped and coloured alike."""
    dataset = pack(tmp_path, make_samples(8))
    settings = config(flip=True, color_jitter=True)
    found = []
    for seed, rank in ((0, 0), (0, 1), (1, 0)):
        reader = loader(dataset, settings, seed=seed, rank=rank, world_size=2, batch_size=4)._reader
        found += [(reader.read().tensors["draws"].numpy().tobytes()) for _ in range(2)]
    assert len(set(found)) == 6
