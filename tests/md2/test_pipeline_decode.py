"""What comes out of the loader is what lies in the shards: images, sizes, intrinsics, baseline, depth."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pipeline_data import HEIGHT, WIDTH, as_floats, config, decode, encode, loader, make_samples, pack

from md2.data.warnings import resize_warning
from shards.errors import DatasetError, UsageError
from shards.sample import Codec, Sample, image_extension

STEMS = {0: "0", -1: "m1", 1: "p1", "s": "s"}


@pytest.mark.parametrize(
    ("codec", "options"),
    [("jpeg", {"quality": 90}), ("jpeg", {"quality": 95, "subsampling": 0}), ("png", {}), ("ppm", {})],
    ids=["jpeg420", "jpeg444", "png", "ppm"],
)
def test_evaluation_gives_every_image_bit_for_bit_as_pillow_decodes_it(
    tmp_path: Path, codec: Codec, options: dict[str, Any]
) -> None:
    samples = make_samples(11, stereo=True, codec=codec, **options)
    dataset = pack(tmp_path, samples, stereo=True, codec=codec)
    extension = image_extension(codec)
    # Augmentation that is switched on in the configuration must not touch evaluation.
    batches = list(loader(dataset, config(stereo=True, flip=True, color_jitter=True), train=False))

    assert [batch.size for batch in batches] == [4, 4, 3]
    assert [key for batch in batches for key in batch.keys] == [sample.key for sample in samples]
    for offset, stem in STEMS.items():
        images = torch.cat([batch.images[offset] for batch in batches])  # type: ignore[index]
        expected = torch.stack([as_floats(decode(sample.components[f"{stem}.{extension}"])) for sample in samples])
        assert images.dtype == torch.float32
        assert torch.equal(images, expected)
    for batch in batches:
        assert batch.augmented == batch.images


def test_a_second_evaluation_pass_and_one_after_an_early_stop_start_at_the_beginning(tmp_path: Path) -> None:
    batches = loader(pack(tmp_path, make_samples(11)), train=False)
    first = [batch.keys for batch in batches]
    assert [batch.keys for batch in batches] == first
    next(iter(batches))
    assert [batch.keys for batch in batches] == first


def test_only_the_frames_asked_for_are_read(tmp_path: Path) -> None:
    dataset = pack(tmp_path, make_samples(4, stereo=True), stereo=True)
    (batch,) = loader(dataset, config(frames=[0], stereo=True))
    assert set(batch.images) == {0, "s"}
    (batch,) = loader(dataset, config(frames=[0, 1]))
    assert set(batch.images) == {0, 1}
    assert batch.stereo is None
    assert batch.depth is None


def test_what_the_dataset_lacks_is_refused_with_what_it_has(tmp_path: Path) -> None:
    dataset = pack(tmp_path, make_samples(4, frames=[0, 1]), frames=[0, 1])
    with pytest.raises(UsageError, match=r"m1\.jpg.*the dataset has 0\.jpg, k\.f32, meta\.json, p1\.jpg"):
        loader(dataset, config(frames=[0, -1, 1]))
    with pytest.raises(UsageError, match=r"s\.jpg, t\.f32.*data\.stereo true"):
        loader(dataset, config(frames=[0, 1], stereo=True))
    with pytest.raises(UsageError, match="no ground truth depth"):
        loader(dataset, config(frames=[0, 1]), depth=True)
    with pytest.raises(DatasetError, match="no part 'val'; it has train"):
        loader(dataset, config(frames=[0, 1]), part="val")


def test_a_partner_that_only_some_samples_have_is_refused(tmp_path: Path) -> None:
    whole = make_samples(4, stereo=True)
    partial = Sample("drive_999", {k: v for k, v in whole[0].components.items() if k not in ("s.jpg", "t.f32")})
    dataset = pack(tmp_path, [*whole, partial], stereo=True)
    with pytest.raises(UsageError, match=r"not every sample has s\.jpg.*s\.jpg in 4 of them"):
        loader(dataset, config(stereo=True))


@pytest.mark.parametrize("codec", ["png", "ppm"])
def test_native_sizes_are_resized_with_lanczos_and_the_intrinsics_follow(tmp_path: Path, codec: Codec) -> None:
    sizes = [(310, 94), (306, 92), (WIDTH, HEIGHT), (64, 40), (310, 94), (305, 92)]
    samples = make_samples(6, size=lambda number: sizes[number], codec=codec)
    dataset = pack(tmp_path, samples, size=None, codec=codec)
    batches = list(loader(dataset, train=False))
    images = torch.cat([batch.images[-1] for batch in batches])
    cameras = torch.cat([batch.intrinsics for batch in batches])
    for number, (sample, (width, height)) in enumerate(zip(samples, sizes, strict=True)):
        stored = Image.fromarray(decode(sample.components[f"m1.{codec}"]))
        expected = as_floats(np.asarray(stored.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS)))
        assert (images[number] - expected).abs().mean() < 0.5 / 255
        across, down = WIDTH / width, HEIGHT / height
        expected_camera = [
            [50 * across, 0, (40 + number + 0.5) * across - 0.5],
            [0, 48 * down, (31.5 + 0.5) * down - 0.5],
            [0, 0, 1],
        ]
        torch.testing.assert_close(cameras[number], torch.tensor(expected_camera), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("codec", ["png", "ppm"])
def test_resizing_moves_a_point_where_the_intrinsics_say(tmp_path: Path, codec: Codec) -> None:
    """Pixel centres at integers: on a ramp, grey = x + 2 y, the resized image must read the scaled coordinates."""
    width, height = 2 * WIDTH, HEIGHT // 2
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    ramp = np.repeat((x + 2 * y).astype(np.uint8)[..., None], 3, axis=2)
    parts = {f"{stem}.{codec}": encode(ramp, codec) for stem in ("0", "m1", "p1")}
    camera = {"k.f32": np.array([1, 1, 0, 0], "<f4").tobytes(), "meta.json": b"{}"}
    dataset = pack(tmp_path, [Sample("ramp", {**parts, **camera})], size=(width, height), codec=codec)
    (batch,) = loader(dataset, train=False, batch_size=1)
    fx, fy = batch.intrinsics[0, 0, 0], batch.intrinsics[0, 1, 1]
    cx, cy = batch.intrinsics[0, 0, 2], batch.intrinsics[0, 1, 2]
    rows, columns = torch.meshgrid(torch.arange(HEIGHT), torch.arange(WIDTH), indexing="ij")
    # The camera above maps (x, y, 1) to itself: inverting the batch's gives coordinates in the stored image.
    expected = (columns - cx) / fx + 2 * (rows - cy) / fy
    found = batch.images[0][0, 1] * 255
    inside = (slice(8, -8), slice(8, -8))
    assert (found[inside] - expected[inside]).abs().max() <= 1.0
    assert (found[inside] - expected[inside]).mean().abs() < 0.02


def test_nominal_intrinsics_and_both_units_of_the_baseline(tmp_path: Path) -> None:
    dataset = pack(tmp_path, make_samples(4, stereo=True), stereo=True)
    (batch,) = loader(dataset, config(stereo=True, intrinsics="nominal"), train=False)
    nominal = torch.tensor([[0.58 * WIDTH, 0, WIDTH / 2], [0, 1.92 * HEIGHT, HEIGHT / 2], [0, 0, 1]])
    torch.testing.assert_close(batch.intrinsics, nominal.expand(4, 3, 3))
    assert batch.stereo is not None
    expected = torch.eye(4)
    expected[0, 3] = -0.1
    torch.testing.assert_close(batch.stereo, expected.expand(4, 4, 4))
    assert batch.metres_per_unit == 5.4
    (batch,) = loader(dataset, config(stereo=True, baseline="metres"), train=False)
    assert batch.stereo is not None
    expected[0, 3] = -0.54
    torch.testing.assert_close(batch.stereo, expected.expand(4, 4, 4))
    assert batch.metres_per_unit == 1


def test_depth_keeps_its_native_size_and_value_and_is_padded_with_nothing(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    sizes = [(94, 310), (92, 306), (95, 300), (94, 310), (20, 40)]
    truths = [rng.integers(0, 65536, size, dtype=np.uint16) for size in sizes]
    dataset = pack(tmp_path, make_samples(5, depth=lambda number: truths[number]), depth=True)
    first, second = loader(dataset, train=False, depth=True)
    assert first.depth is not None
    assert first.depth_size is not None
    assert first.depth.shape == (4, 1, 95, 310)
    assert first.depth_size.tolist() == [list(size) for size in sizes[:4]]
    for number in range(4):
        height, width = sizes[number]
        expected = torch.from_numpy(truths[number].astype(np.float32) / 256)
        assert torch.equal(first.depth[number, 0, :height, :width], expected)
        assert first.depth[number].count_nonzero() == expected.count_nonzero()
    assert second.depth is not None
    assert second.depth.shape == (1, 1, 20, 40)


def test_samples_without_ground_truth_have_an_empty_one(tmp_path: Path) -> None:
    truth = np.full((30, 50), 256 * 7, np.uint16)
    samples = make_samples(12, depth=lambda number: truth if number in (1, 6) else None)
    dataset = pack(tmp_path, samples, depth=True)
    assert dataset.manifest.optional_components["depth.png"] == 2
    batches = list(loader(dataset, train=False, depth=True))
    for start, batch in zip((0, 4, 8), batches, strict=True):
        assert batch.depth is not None
        assert batch.depth_size is not None
        for place in range(4):
            has = start + place in (1, 6)
            assert batch.depth_size[place].tolist() == ([30, 50] if has else [0, 0])
            assert batch.depth[place].sum() == (7 * 30 * 50 if has else 0)


def test_a_gpu_is_asked_for_where_there_is_none(tmp_path: Path) -> None:
    dataset = pack(tmp_path, make_samples(4))
    with pytest.raises(UsageError, match=r"data\.device gpu"):
        loader(dataset, config(device="gpu"))


@pytest.mark.gpu
@pytest.mark.parametrize("codec", ["jpeg", "png", "ppm"])
def test_the_gpu_decodes_what_pillow_decodes_to_rounding(tmp_path: Path, codec: Codec) -> None:
    # Full chroma: halved one may be interpolated by each decoder in its own way (tests/md2/test_matching.py).
    samples = make_samples(8, stereo=True, codec=codec, **({"subsampling": 0} if codec == "jpeg" else {}))
    dataset = pack(tmp_path, samples, stereo=True, codec=codec)
    for batch in loader(dataset, config(stereo=True), train=False, device=torch.device("cuda")):
        assert batch.images[0].is_cuda
        assert batch.intrinsics.is_cuda
        for place, key in enumerate(batch.keys):
            sample = next(sample for sample in samples if sample.key == key)
            difference = batch.images["s"][place].cpu() - as_floats(
                decode(sample.components[f"s.{image_extension(codec)}"])
            )
            assert difference.abs().mean() < (0.5 / 255 if codec == "jpeg" else 1e-6)
            assert difference.abs().max() < (6 / 255 if codec == "jpeg" else 1e-6)


@pytest.mark.parametrize(
    ("stored", "told"),
    [
        ((WIDTH, HEIGHT), None),
        (None, r"native size are resized in every batch.*--size 96x64"),
        ((2 * WIDTH, 2 * HEIGHT), r"stored at 192x128 and resized in every batch.*--size 96x64"),
        ((2 * WIDTH, HEIGHT // 2), r"stored at 192x32 and enlarged to 96x64.*--size 96x64"),
        ((WIDTH // 2, 2 * HEIGHT), r"stored at 48x128 and enlarged to 96x64"),
    ],
)
def test_images_of_another_size_than_trained_at_are_told(
    tmp_path: Path, stored: tuple[int, int] | None, told: str | None
) -> None:
    width, height = stored or (WIDTH, HEIGHT)
    dataset = pack(tmp_path, make_samples(2, size=lambda number: (width, height)), size=stored)
    warning = resize_warning(dataset.manifest, config())
    assert (warning is None) if told is None else re.search(told, str(warning))
