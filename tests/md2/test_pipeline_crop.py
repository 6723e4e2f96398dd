"""Random windows: the same for all of a sample, resized as Pillow does, with intrinsics that follow exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pipeline_data import HEIGHT, WIDTH, as_floats, config, decode, encode, loader, make_samples, pack

from bench.matching import find_poses
from md2.data.augment import crop_windows
from md2.data.order import uniform_draws
from md2.data.warnings import resize_warning
from md2.networks.camera import matrices
from prep.raw.calibration import read_raw_calibration
from shards.errors import DatasetError, UsageError
from shards.sample import Sample

SCALE = [0.6, 0.9]
SIZES = [(120, 80), (97, 66), (150, 90)]
STEMS = {0: "0", -1: "m1", 1: "p1", "s": "s"}


def window(number: int, size: tuple[int, int], seed: int = 0, epoch: int = 0) -> tuple[int, int, int, int]:
    """What a sample's draws mean: the share of both sides, then the place of the window in what is left over."""
    share, left, top = uniform_draws(seed, epoch, np.array([number]), 10)[0, 7:]
    share = SCALE[0] + share * (SCALE[1] - SCALE[0])
    width, height = (round(share * side) for side in size)
    return int(left * (size[0] - width + 1)), int(top * (size[1] - height + 1)), width, height


@pytest.mark.parametrize(("codec", "native"), [("png", True), ("jpeg", False), ("ppm", False)])
def test_all_images_of_a_sample_show_one_window_as_pillow_resizes_it(tmp_path: Path, codec: Any, native: bool) -> None:
    sizes = SIZES if native else [(120, 80)]
    truth = np.arange(1, 40 * 60 + 1, dtype=np.uint16).reshape(40, 60)
    samples = make_samples(
        8, stereo=True, codec=codec, size=lambda number: sizes[number % len(sizes)], depth=lambda number: truth
    )
    numbers = {sample.key: number for number, sample in enumerate(samples)}
    size = None if native else sizes[0]
    dataset = pack(tmp_path, samples, stereo=True, codec=codec, size=size, depth=True)
    settings = config(stereo=True, flip=True, color_jitter=True, crop=SCALE, baseline="metres")
    seen = set()
    for batch in loader(dataset, settings, depth=True):
        assert batch.stereo is not None and batch.depth is not None and batch.depth_size is not None
        for place, key in enumerate(batch.keys):
            number, flipped = numbers[key], bool(batch.stereo[place, 0, 3] > 0)
            stored = sizes[number % len(sizes)]
            left, top, width, height = window(number, stored)
            for offset, stem in STEMS.items():
                image = Image.fromarray(decode(samples[number].components[f"{stem}.{codec.replace('jpeg', 'jpg')}"]))
                shown = image.crop((left, top, left + width, top + height))
                expected = as_floats(np.asarray(shown.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)))
                found = batch.images[offset][place]  # type: ignore[index]
                difference = (found.flip(2) if flipped else found) - expected
                assert difference.abs().max() <= 2 / 255
                assert difference.abs().mean() < 0.3 / 255
            across, down = WIDTH / width, HEIGHT / height
            cx, cy = (40 + number + 0.5 - left) * across - 0.5, (31.5 + 0.5 - top) * down - 0.5
            camera = [[50 * across, 0, WIDTH - 1 - cx if flipped else cx], [0, 48 * down, cy], [0, 0, 1]]
            torch.testing.assert_close(batch.intrinsics[place], torch.tensor(camera), rtol=1e-6, atol=1e-5)
            # Ground truth is cut at its own resolution, to the nearest of its pixels.
            rows, columns = (int(side) for side in batch.depth_size[place])
            depth = (batch.depth[place, 0, :rows, :columns] * 256).round().long()
            first = int(depth[0, -1 if flipped else 0]) - 1
            assert abs(first % 60 - left * 60 / stored[0]) <= 0.5 and abs(first // 60 - top * 40 / stored[1]) <= 0.5
            assert abs(columns - width * 60 / stored[0]) <= 1 and abs(rows - height * 40 / stored[1]) <= 1
            seen.add(flipped)
    assert seen == {True, False}


def test_reprojection_with_exact_depth_and_poses_is_right_under_the_cropped_camera(drive: Path, tmp_path: Path) -> None:
    """True depth and motion of the synthetic drive: a pixel of the stored target goes to the same place of the source,

    whether it is projected by the stored camera and followed into the window, or projected by the window's camera.
    """
    date = next(path for path in drive.iterdir() if path.name.startswith("20"))
    folder = next(path for path in sorted(date.iterdir()) if path.is_dir())
    calibration = read_raw_calibration(date.name, lambda path: (drive / path).read_bytes(), depth=False)
    poses = find_poses(drive, folder, calibration)
    images = {frame: np.asarray(Image.open(folder / "image_02/data" / f"{frame:010d}.png")) for frame in range(5)}
    height, width = images[0].shape[:2]
    camera = [float(number) for number in calibration.intrinsics("l", (width, height), (width, height))]
    samples = []
    for frame in range(1, 4):
        parts = {f"{stem}.png": encode(images[frame + o], "png") for o, stem in ((0, "0"), (-1, "m1"), (1, "p1"))}
        samples.append(
            Sample(f"frame_{frame}", {**parts, "k.f32": np.array(camera, "<f4").tobytes(), "meta.json": b"{}"})
        )
    dataset = pack(tmp_path, samples, size=(width, height), codec="png")
    both, largest = set(), 0.0
    for epoch in range(8):
        batches = loader(dataset, config(flip=True, crop=SCALE), batch_size=3, seed=epoch)
        (batch,) = batches
        assert batch.flipped is not None
        for place, key in enumerate(batch.keys):
            frame, flipped = int(key[-1]), bool(batch.flipped[place])
            left, top, across, down = window(frame - 1, (width, height), seed=epoch)
            depth = np.load(folder / "true_depth_02/data" / f"{frame:010d}.npy").astype(float)
            v, u = np.nonzero(np.isfinite(depth) & (depth > 0))

            def shown(x: np.ndarray, y: np.ndarray) -> np.ndarray:
                """Coordinates of the stored image -> those of the batch's image, from edge to edge."""
                x, y = (x + 0.5 - left) / across * WIDTH - 0.5, (y + 0.5 - top) / down * HEIGHT - 0.5  # noqa: B023
                return np.stack([WIDTH - 1 - x if flipped else x, y])  # noqa: B023

            mirror = np.diag([-1.0 if flipped else 1.0, 1, 1, 1])
            for offset in (-1, 1):
                motion = np.linalg.inv(poses[frame + offset]) @ poses[frame]
                fx, fy, cx, cy = camera
                z = depth[v, u]
                points = np.stack([(u - cx) / fx * z, (v - cy) / fy * z, z, np.ones_like(z)])
                moved = motion @ points
                ahead = moved[2] > 1
                expected = shown(*(np.stack([fx * moved[0], fy * moved[1]]) / moved[2] + [[cx], [cy]]))
                K = batch.intrinsics[place].double().numpy()
                pixels = np.concatenate([shown(u.astype(float), v.astype(float)), np.ones((1, len(z)))])
                there = (
                    mirror @ motion @ mirror @ np.concatenate([z * (np.linalg.inv(K) @ pixels), np.ones((1, len(z)))])
                )
                found = (K @ there[:3])[:2] / there[2]
                largest = max(largest, float(np.abs(found - expected)[:, ahead].max()))
            both.add(flipped)
    assert both == {True, False}
    assert 0 < largest < 1e-3, f"{largest:.2e} px"


def test_nominal_and_learned_cameras_follow_the_window_of_the_flipped_image(tmp_path: Path) -> None:
    """The nominal camera is the same for the whole image, flipped or not; a window of it has its part."""
    samples = make_samples(16, size=lambda number: (120, 80))
    numbers = {sample.key: number for number, sample in enumerate(samples)}
    dataset = pack(tmp_path, samples, size=(120, 80))
    seen = set()
    for batch in loader(dataset, config(flip=True, crop=SCALE, intrinsics="nominal")):
        assert batch.flipped is not None and batch.windows is not None
        shares = torch.tensor([0.58, 1.92, (0.5 * WIDTH + 0.5) / WIDTH, (0.5 * HEIGHT + 0.5) / HEIGHT])
        learned = matrices(shares, (HEIGHT, WIDTH), None, batch.size, batch.windows)
        torch.testing.assert_close(learned, batch.intrinsics, rtol=1e-5, atol=1e-4)
        for place, key in enumerate(batch.keys):
            left, top, width, height = window(numbers[key], (120, 80))
            if batch.flipped[place]:
                left = 120 - left - width
            cx = (0.5 * WIDTH + 0.5) * 120 / width - left * WIDTH / width - 0.5
            cy = (0.5 * HEIGHT + 0.5) * 80 / height - top * HEIGHT / height - 0.5
            camera = [[0.58 * WIDTH * 120 / width, 0, cx], [0, 1.92 * HEIGHT * 80 / height, cy], [0, 0, 1]]
            torch.testing.assert_close(batch.intrinsics[place], torch.tensor(camera), rtol=1e-5, atol=1e-4)
            seen.add(bool(batch.flipped[place]))
    assert seen == {True, False}


def test_windows_fill_the_image_and_their_scales() -> None:
    draws = np.random.default_rng(0).random((4000, 3))
    found = crop_windows(draws, np.tile([200, 100], (4000, 1)), (0.5, 1.0))
    left, top, width, height = found.T
    assert (width.min(), width.max(), height.min(), height.max()) == (100, 200, 50, 100)
    assert abs(width.mean() - 150) < 1.5 and np.abs(width - 2 * height).max() <= 1
    assert (left + width).max() == 200 and (top + height).max() == 100 and left.min() == top.min() == 0
    assert (crop_windows(draws, np.tile([200, 100], (4000, 1)), (1.0, 1.0)) == [0, 0, 200, 100]).all()


def test_evaluation_shows_whole_images_and_draws_stay_as_without_windows(tmp_path: Path) -> None:
    dataset = pack(tmp_path, make_samples(8))
    plain, cropped = config(flip=True), config(flip=True, crop=SCALE)
    for less, more in zip(loader(dataset, plain, train=False), loader(dataset, cropped, train=False), strict=True):
        assert torch.equal(less.images[0], more.images[0]) and more.windows is None
    for less, more in zip(loader(dataset, plain), loader(dataset, cropped), strict=True):
        assert less.keys == more.keys and less.flipped is not None and more.flipped is not None
        assert torch.equal(less.flipped, more.flipped) and not torch.equal(less.images[0], more.images[0])
    state = loader(dataset, plain).state()
    del state["fingerprint"]["crop"]
    assert len(loader(dataset, plain, state=state)) == 2, "a state from before there were windows"
    with pytest.raises(UsageError, match=r"crop was None, is \[0\.6, 0\.9\]"):
        loader(dataset, cropped, state=state)


def test_larger_images_are_no_mistake_with_windows(tmp_path: Path) -> None:
    manifest = pack(tmp_path, make_samples(4, size=lambda number: (120, 80)), size=(120, 80)).manifest
    assert "slower" in (resize_warning(manifest, config()) or "")
    assert resize_warning(manifest, config(crop=SCALE)) is None
    assert "enlarged" in (resize_warning(manifest, config(crop=SCALE, width=256)) or "")


def test_an_image_of_another_size_than_promised_is_named(tmp_path: Path) -> None:
    dataset = pack(tmp_path, make_samples(4, size=lambda number: (96, 64) if number else (64, 40)), size=(96, 64))
    with pytest.raises(DatasetError, match=r"drive_000\.0\.jpg is \(64, 40\) pixels large instead of \(96, 64\)"):
        list(loader(dataset, config(crop=SCALE)))
