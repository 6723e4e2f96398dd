"""One coin flips a sample: all frames, depth, intrinsics and baseline together, checked by exact geometry."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from pipeline_data import HEIGHT, WIDTH, Array, as_floats, config, decode, encode, loader, make_samples, pack

from shards.sample import Sample

FOCAL, CENTRE, BASELINE = (50.0, 48.0), (41.0, 30.0), -0.5


def test_every_frame_of_a_sample_and_its_depth_are_mirrored_or_none_is(tmp_path: Path) -> None:
    truth = np.arange(1, 31 * 45 + 1, dtype=np.uint16).reshape(31, 45)
    samples = make_samples(32, stereo=True, depth=lambda number: truth)
    by_key = {sample.key: sample for sample in samples}
    numbers = {sample.key: number for number, sample in enumerate(samples)}
    dataset = pack(tmp_path, samples, stereo=True, depth=True)
    coins = []
    for batch in loader(dataset, config(stereo=True, flip=True, baseline="metres"), depth=True):
        assert batch.stereo is not None
        assert batch.depth is not None
        for place, key in enumerate(batch.keys):
            flipped = bool(batch.stereo[place, 0, 3] > 0)
            coins.append(flipped)
            for offset, stem in ((0, "0"), (-1, "m1"), (1, "p1"), ("s", "s")):
                expected = as_floats(decode(by_key[key].components[f"{stem}.jpg"]))
                found = batch.images[offset][place]  # type: ignore[index]
                assert torch.equal(found, expected.flip(2) if flipped else expected)
            depth = torch.from_numpy(truth.astype(np.float32) / 256)
            assert torch.equal(batch.depth[place, 0], depth.flip(1) if flipped else depth)
            cx = 40 + numbers[key]
            expected_camera = [[50, 0, WIDTH - 1 - cx if flipped else cx], [0, 48, 31.5], [0, 0, 1]]
            assert batch.intrinsics[place].tolist() == expected_camera
            assert batch.stereo[place, 0, 3] == np.float32(0.54 if flipped else -0.54)
    # 32 fair coins: fewer than 6 of a kind come once in 10,000 seeds, and the seed is fixed.
    assert 6 <= sum(coins) <= 26


def test_a_point_seen_in_the_target_lies_where_the_partner_sees_it_flipped_or_not(tmp_path: Path) -> None:
    """Back-project by the batch's depth and camera, move by its stereo transform, project: the spot must be there."""
    rng = np.random.default_rng(4)
    dataset = pack(tmp_path, [_spot(rng, number) for number in range(24)], stereo=True, codec="png", depth=True)
    both = set()
    settings = config(frames=[0], stereo=True, flip=True, baseline="paper")
    for batch in loader(dataset, settings, depth=True):
        assert batch.stereo is not None
        assert batch.depth is not None
        for place in range(batch.size):
            target = batch.images[0][place, 0]
            v, u = divmod(int(target.argmax()), WIDTH)
            z = batch.depth[place, 0, v, u].double() / batch.metres_per_unit
            assert z > 0
            camera = batch.intrinsics[place].double()
            point = z * torch.linalg.inv(camera) @ torch.tensor([u, v, 1], dtype=torch.float64)
            moved = batch.stereo[place].double() @ torch.cat([point, torch.ones(1, dtype=torch.float64)])
            projected = camera @ moved[:3]
            pixel = projected[:2] / projected[2]
            row, column = divmod(int(batch.images["s"][place, 0].argmax()), WIDTH)
            torch.testing.assert_close(pixel, torch.tensor([column, row], dtype=torch.float64), rtol=0, atol=0.01)
            both.add(bool(batch.stereo[place, 0, 3] > 0))
    assert both == {True, False}


def test_nominal_intrinsics_stay_as_they_are(tmp_path: Path) -> None:
    dataset = pack(tmp_path, make_samples(16))
    plain = {batch.keys[0]: batch.images[0] for batch in loader(dataset, config(flip=False), batch_size=1)}
    mirrored = []
    for batch in loader(dataset, config(flip=True, intrinsics="nominal"), batch_size=1):
        mirrored.append(not torch.equal(batch.images[0], plain[batch.keys[0]]))
        expected = [[0.58 * WIDTH, 0, 0.5 * WIDTH], [0, 1.92 * HEIGHT, 0.5 * HEIGHT], [0, 0, 1]]
        torch.testing.assert_close(batch.intrinsics[0], torch.tensor(expected))
    assert set(mirrored) == {True, False}


def test_without_flips_nothing_is_mirrored(tmp_path: Path) -> None:
    samples = make_samples(8, stereo=True)
    by_key = {sample.key: sample for sample in samples}
    seen = set()
    for batch in loader(pack(tmp_path, samples, stereo=True), config(flip=False, stereo=True)):
        assert batch.stereo is not None
        assert (batch.stereo[:, 0, 3] < 0).all()
        for key, image in zip(batch.keys, batch.images["s"], strict=True):
            assert torch.equal(image, as_floats(decode(by_key[key].components["s.jpg"])))
            seen.add(key)
    assert len(seen) == 8


def test_what_is_read_besides_changes_neither_order_nor_flips(tmp_path: Path) -> None:
    truth = np.ones((8, 8), np.uint16)
    dataset = pack(tmp_path, make_samples(24, stereo=True, depth=lambda number: truth), stereo=True, depth=True)
    mono = loader(dataset, config(flip=True))
    whole = loader(dataset, config(flip=True, stereo=True, color_jitter=True), depth=True)
    assert len(mono) == 6
    for less, more in zip(mono, whole, strict=True):
        assert less.keys == more.keys
        assert torch.equal(less.images[0], more.images[0])


def _spot(rng: np.random.Generator, number: int) -> Sample:
    """A black stereo pair with one white pixel: a point whose disparity is a whole number of pixels.

    Depth is rounded to 1/256 m in the file, which moves the projection by up to 0.006 pixels.
    """
    disparity = int(rng.integers(1, 9))
    depth = FOCAL[0] * -BASELINE / disparity
    u, v = int(rng.integers(disparity, WIDTH)), int(rng.integers(0, HEIGHT))
    truth = np.zeros((HEIGHT, WIDTH), np.uint16)
    truth[v, u] = round(depth * 256)
    parts = {
        "0.png": encode(_white(u, v), "png"),
        "s.png": encode(_white(u - disparity, v), "png"),
        "depth.png": encode(truth, "png"),
        "k.f32": np.array([*FOCAL, *CENTRE], "<f4").tobytes(),
        "t.f32": np.array([BASELINE], "<f4").tobytes(),
        "meta.json": b"{}",
    }
    return Sample(f"spot_{number:03d}", parts)


def _white(u: int, v: int) -> Array:
    image = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    image[v, u] = 255
    return image
