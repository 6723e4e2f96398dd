"""Where the photometric error is smallest: the measure, and a guard over what prep and the loader leave of it."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import naive
import numpy as np
import pytest
import simplejpeg
import torch
from PIL import Image
from prep_data import DATE, DRIVE, run_pack, write_split
from torch import Tensor

from bench.codec import CHAIN, PUBLISHED, ROUTES, Route
from bench.matching import DISPARITIES, View, find_poses, find_views, geometry, identity_error, match, measure
from md2.config import DataConfig
from md2.pipeline import Loader
from prep.packing.encode import ImageFormat, encode
from prep.raw.calibration import read_raw_calibration
from prep.synthetic import write_drives
from shards.dataset import open_dataset
from shards.errors import InputError, UsageError

STORED = (320, 96)
TARGETS = range(1, 5)
LOSS = 2.6
"""Points by which the default lay below lossless images in this street when it was chosen (quality 93 with full
chroma: 10.5)."""


@pytest.fixture(scope="module")
def street(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six frames of one synthetic drive, at twice the size that they are packed at."""
    out = tmp_path_factory.mktemp("street") / "raw"
    return write_drives(out, drives=1, frames=6, size=(640, 192), lidar=False, workers=1).root


@pytest.fixture(scope="module")
def views(street: Path) -> list[View]:
    """Stereo pairs and neighbours of the frames that have both."""
    found = [view for view in find_views(street, STORED, points=600)[DRIVE] if int(view.target.stem) in TARGETS]
    assert {view.kind for view in found} == {"stereo", "temporal"}
    return found


def by_pillow(path: Path, change: Callable[[Image.Image], bytes] | None = None, nearest: bool = False) -> Tensor:
    """A raw frame resized by Pillow alone; lossless, or encoded by `change`."""
    with Image.open(path) as picture:
        small = picture.convert("RGB").resize(STORED, Image.Resampling.NEAREST if nearest else Image.Resampling.LANCZOS)
    if change is not None:
        small = Image.open(io.BytesIO(change(small)))
    return torch.from_numpy(np.array(small)).permute(2, 0, 1) / 255


def by_md2(raw: Path, folder: Path, **options: object) -> dict[Path, Tensor]:
    """Raw file -> its image out of a batch: packed by prep, decoded by the loader."""
    split = write_split(folder, *(f"{DATE}/{DRIVE} {number} l" for number in TARGETS))
    width, height = STORED
    run_pack(split, raw, folder / "out", size=f"{width}x{height}", depth=False, **options)
    config = DataConfig(url=str(folder / "out"), width=width, height=height, frames=[0, -1, 1], stereo=True)
    dataset, device = open_dataset(str(folder / "out")), torch.device("cpu")
    found = {}
    for batch in Loader(dataset, "train", config, batch_size=2, seed=0, train=False, device=device):
        for place, key in enumerate(batch.keys):
            for offset, images in batch.images.items():
                camera, frame = ("03", int(key[-10:])) if offset == "s" else ("02", int(key[-10:]) + int(offset))
                found[raw / DATE / DRIVE / f"image_{camera}" / "data" / f"{frame:010d}.png"] = images[place].clone()
    return found


def share(found: dict[str, dict[str, object]], name: str) -> float:
    """Mean of the shares by stereo pairs and by neighbours."""
    kinds = found[name].values()
    return sum(matches.share() for matches in kinds) / len(kinds)  # type: ignore[attr-defined]


def test_prep_and_the_loader_lose_no_more_of_the_true_depth_than_when_they_were_chosen(
    street: Path, views: list[View], tmp_path: Path
) -> None:
    """The guard of codec, resize filter, colour conversion and decoder: a point of slack. The last three must not pass.

    Lossless images are Pillow's alone, so that every step of the chain can only lose against them.
    """
    variants: dict[str, Callable[[Path], Tensor]] = {
        "lossless": by_pillow,
        "png": by_md2(street, tmp_path / "png", codec="png").__getitem__,
        "default": by_md2(street, tmp_path / "default").__getitem__,
        "former codec": lambda path: by_pillow(path, lambda p: encode(p, ImageFormat(None, "jpeg", 93, "444"))),
        "quality 90": lambda path: by_pillow(path, lambda p: encode(p, ImageFormat(None, "jpeg", 90))),
        "nearest pixel": lambda path: by_pillow(path, nearest=True),
    }
    found = measure(views, variants, by_pillow)
    worst = share(found, "lossless") - LOSS - 1
    assert share(found, "png") == share(found, "lossless"), "every step but the codec is lossless"
    assert share(found, "default") > worst
    for bad in ("former codec", "quality 90", "nearest pixel"):
        assert share(found, bad) < worst, bad


def test_decoders_that_treat_chroma_in_another_way_differ_by_a_fraction_of_a_level(street: Path) -> None:
    """Chroma that is repeated instead of interpolated is the most that a GPU's decoder may do otherwise.

    The CPU's decoders agree bit for bit (test_pipeline_decode.py). Without smoothing, as by plain 4:2:0, they differ by
    more.
    """
    path = street / DATE / DRIVE / "image_02" / "data" / "0000000002.png"
    with Image.open(path) as picture:
        small = picture.convert("RGB").resize(STORED, Image.Resampling.LANCZOS)
    means = []
    for words in ("jpeg", "jpeg even 420 blur0"):
        data = Route.of(words).store(small)
        interpolated, repeated = (simplejpeg.decode_jpeg(data, fastupsample=fast) for fast in (False, True))
        means.append(float(np.abs(interpolated.astype(int) - repeated).mean()))
    assert 0 < means[0] < 0.6
    assert means[1] > 1.5 * means[0]


def test_colours_stay_where_they_are() -> None:
    """A wave of colour keeps its phase: halving and enlarging are centred alike (else it moves by half a pixel)."""
    wave = 128 + 60 * np.cos(2 * np.pi * (np.arange(320) - 5) / 32)
    planes = [
        Image.fromarray(np.broadcast_to(np.uint8(np.rint(row)), (96, 320)).copy())
        for row in (0 * wave + 128, wave, wave)
    ]
    picture = Image.merge("YCbCr", planes).convert("RGB")
    found = simplejpeg.decode_jpeg(encode(picture, ImageFormat(None, "jpeg")))
    phases = [
        np.angle((image[:, 32:-32].mean(0)[:, 2] * np.exp(-2j * np.pi * np.arange(32, 288) / 32)).sum())
        for image in (np.asarray(picture, dtype=float), found.astype(float))
    ]
    assert abs(phases[0] - phases[1]) * 32 / (2 * np.pi) < 0.1


def test_errors_are_the_losses(views: list[View]) -> None:
    """Over whole images against the formula written out; the border is left out, where windows differ."""
    a, b = (by_pillow(path) for path in (views[0].target, views[0].other))
    expected = naive.photometric(a.double().numpy(), b.double().numpy(), no_ssim=False)[1:-1, 1:-1].mean()
    assert identity_error(a, b) == pytest.approx(expected, abs=1e-5)


def test_the_true_depth_wins_everywhere_where_the_other_image_is_shifted(views: list[View]) -> None:
    """A random image and itself moved by 7 pixels; 6 and 8.5 are then wrong, by more and less than the tolerance."""
    view = next(view for view in views if view.kind == "stereo")
    random = torch.rand(3, STORED[1], STORED[0], generator=torch.Generator().manual_seed(0))
    images = {view.target: random, view.other: random.roll(-7, 2)}
    for disparity, won in ((7.0, True), (6.25, True), (5.5, False), (8.5, False)):
        moved = replace(view, disparity=torch.full_like(view.disparity, disparity))
        found = match(moved, images, geometry(moved, STORED), random)
        assert len(found.won) > 300
        assert bool((found.won == won).all()), disparity
    exact = replace(view, disparity=torch.full_like(view.disparity, 7.0))
    where = geometry(exact, STORED)
    found = match(exact, images, where, random)
    assert float(found.error.max()) < 1e-3
    pixels = exact.pixels[where.keep]
    place = where.corner[:, 1 + DISPARITIES.tolist().index(7.0), 4] + where.fraction[0, :, 1 + 12, 4]
    np.testing.assert_allclose(place % STORED[0], pixels[:, 0] - 7, atol=2e-3)


def test_wrong_poses_let_other_depths_win(views: list[View]) -> None:
    """Neighbours say where depth is only with the motion between them: the other way round, hardly any point wins."""
    temporal = [view for view in views if view.kind == "temporal"]
    turned = [replace(view, transform=torch.linalg.inv(view.transform)) for view in temporal]
    right, wrong = (
        measure(chosen, {"x": by_pillow}, by_pillow)["x"]["temporal"].share() for chosen in (temporal, turned)
    )
    assert right > 70
    assert wrong < right / 2


def test_oxts_give_the_poses_of_the_cameras(street: Path, tmp_path: Path) -> None:
    """A synthetic drive's oxts, which have the car's place and angles, against its exact poses."""
    calibration = read_raw_calibration(DATE, lambda path: (street / path).read_bytes(), depth=True)
    exact = find_poses(street, street / DATE / DRIVE, calibration)
    without = tmp_path / DATE / DRIVE
    without.mkdir(parents=True)
    for name in ("oxts", "image_02"):
        (without / name).symlink_to(street / DATE / DRIVE / name)
    for path in (street / DATE).glob("calib_*"):
        (tmp_path / DATE / path.name).symlink_to(path)
    found = find_poses(tmp_path, without, calibration)
    assert sorted(found) == sorted(exact) == list(range(6))
    for frame in range(5):
        steps = [np.linalg.inv(poses[frame]) @ poses[frame + 1] for poses in (found, exact)]
        np.testing.assert_allclose(*steps, atol=2e-3)
    (without / "oxts").unlink()
    assert find_poses(tmp_path, without, calibration) == {}


def test_routes_are_lists_of_words(street: Path, tmp_path: Path) -> None:
    for words in (*ROUTES, *CHAIN):
        assert Route.of(words).words == words
    published = Route.of(PUBLISHED)
    assert (published.tables, published.chroma, published.blur, published.size) == (92, "420", 0, None)
    assert Route.of("jpeg steps2,6 832x256").tables == ([2] * 64, [6] * 64)
    picture = Image.open(street / DATE / DRIVE / "image_02" / "data" / "0000000000.png").convert("RGB")
    assert Route.of("jpeg").store(picture) == encode(picture, ImageFormat(None, "jpeg"))
    for words in ("jpeg 101", "gif", "blur", "steps2"):
        with pytest.raises(UsageError, match=f"{words.split()[-1]}' has no meaning"):
            Route.of(words)
    with pytest.raises(InputError, match="no drive with image_02"):
        find_views(tmp_path, STORED)
