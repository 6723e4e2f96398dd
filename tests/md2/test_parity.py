"""The reference trainer is the same method as md2, and the verdict finds a worse learner."""

from __future__ import annotations

import colorsys
import copy
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bench import parity, parity_report, plain
from bench.parity_report import FLOOR, Verdict
from bench.plain import Colours, RawFrames, Samples, Setting, plain_loss
from bench.step import MODES, Inputs, md2_loss
from md2.config import Config, DataConfig, LossConfig, ModelConfig
from md2.loss import image_pyramid
from md2.model import Networks
from md2.pipeline import Loader
from shards.dataset import open_dataset


@pytest.mark.parametrize("mode", MODES)
def test_loss_and_gradients_of_the_reference_equal_md2s(mode: str) -> None:
    """Float64, batch norm frozen: the reference passes pairs one by one, md2 as one batch."""
    inputs = Inputs.make(mode, 2, 64, 96, torch.device("cpu"), torch.float64)
    frames, stereo = MODES[mode]
    torch.manual_seed(1)
    whole = Networks(ModelConfig(), DataConfig(frames=frames, stereo=stereo), LossConfig())
    ours = plain.narrowed(whole, 4).double().eval()
    theirs = copy.deepcopy(ours)
    expected = md2_loss(ours(inputs.images), inputs)
    pyramids = image_pyramid(inputs.images, range(4))
    loss = plain_loss(plain.predict(theirs, inputs.images), pyramids, inputs.K, inputs.stereo, lambda: inputs.noise)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-10)
    for value in (expected, loss):
        value.backward()  # type: ignore[no-untyped-call]
    pairs = [(a.grad, b.grad) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True)]
    gradients = [(a, b) for a, b in pairs if a is not None and b is not None]
    assert len(gradients) > 40
    for a, b in gradients:
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-12)


def test_colour_jitter_is_torchvisions_by_its_documentation() -> None:
    """Each operation against its formula in floating point, a pixel at a time; order matters."""
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    image, rgb = Image.fromarray(pixels), pixels.astype(float)
    grey = rgb @ [0.299, 0.587, 0.114]

    def turned(factor: float) -> np.ndarray:  # type: ignore[type-arg]
        hsv = [colorsys.rgb_to_hsv(*pixel) for pixel in (rgb / 255).reshape(-1, 3)]
        return np.array([colorsys.hsv_to_rgb((h + factor) % 1, s, v) for h, s, v in hsv]).reshape(rgb.shape) * 255

    formulas: list[tuple[float, Callable[[float], np.ndarray], float]] = [  # type: ignore[type-arg]
        (1.2, lambda f: rgb * f, 1.0),
        (0.8, lambda f: f * rgb + (1 - f) * round(grey.mean()), 1.0),
        (1.2, lambda f: f * rgb + (1 - f) * grey[..., None], 1.5),
        (0.1, turned, 10.0),  # Pillow's HSV has 256 hues and saturations
    ]
    for index, (factor, formula, tolerance) in enumerate(formulas):
        factors = [1.0, 1.0, 1.0, 0.0]
        factors[index] = factor
        found = np.asarray(Colours(tuple(factors), (index,))(image), dtype=float)  # type: ignore[arg-type]
        assert np.abs(found - formula(factor).clip(0, 255)).max() <= tolerance
    bright_first, contrast_first = (
        np.asarray(Colours((1.2, 0.8, 1, 0), order)(image), dtype=int) for order in ((0, 1), (1, 0))
    )
    assert np.abs(bright_first - contrast_first).max() > 2


def test_the_reference_sees_the_frames_of_lossless_shards(drive: Path, tmp_path: Path) -> None:
    """Image, camera and stereo shift of every sample equal what md2's loader reads, flips included."""
    setting = Setting((0, -1, 1), True, size=(96, 64))
    lines = parity.read_lines(drive / "splits/sample/train_files.txt")
    shards = parity.pack(drive, drive / "splits/sample", tmp_path / "png", ["--codec", "png", "--size", "96x64"])
    config = parity.config_of(setting, shards, 0, ["data.color_jitter=false"])
    loader = Loader(
        open_dataset(str(shards)), "train", config.data, batch_size=1, seed=3, train=True, device=torch.device("cpu")
    )
    samples, flips = Samples(RawFrames(drive, lines), setting, 0, None), set()
    places = {parity.ending(line): index for index, line in enumerate(lines)}
    for batch in loader:
        index = next(place for end, place in places.items() if batch.keys[0].endswith(end))
        drawn: dict[bool, dict[str, torch.Tensor]] = {}
        while len(drawn) < 2:  # until both sides of the coin have come up
            sample = samples[index]
            width = sample["stereo"][0, 3].item() * (-1 if lines[index][2] == "l" else 1)
            drawn[width < 0] = sample
        assert batch.stereo is not None
        flipped = bool((batch.stereo[0, 0, 3] < 0) == (lines[index][2] == "r"))
        flips.add(flipped)
        for offset in (0, -1, 1, "s"):
            torch.testing.assert_close(batch.images[offset][0], drawn[flipped][f"image {offset} 0"], rtol=0, atol=1e-6)
        torch.testing.assert_close(batch.intrinsics[0], drawn[flipped]["K"])
        torch.testing.assert_close(batch.stereo[0], drawn[flipped]["stereo"], rtol=1e-5, atol=0)
    assert flips == {True, False}


def test_the_verdict_flags_a_worse_learner_and_passes_an_equal_one() -> None:
    rng = np.random.default_rng(2)
    reference = (0.2 + 0.01 * rng.standard_normal(5)).tolist()
    assert not Verdict.of((0.2 + 0.01 * rng.standard_normal(5)).tolist(), reference).worse
    assert Verdict.of((0.24 + 0.01 * rng.standard_normal(5)).tolist(), reference).worse
    assert not Verdict.of((0.16 + 0.01 * rng.standard_normal(5)).tolist(), reference).worse
    assert Verdict.of([math.nan] * 3, reference).worse
    # By hand: variances 1 and 4, three runs each, so that the error is sqrt(1/3 + 4/3).
    assert Verdict.of([1, 2, 3], [2, 4, 6]) == Verdict(-2.0, pytest.approx(math.sqrt(5 / 3)), 4.0)


def test_certain_but_trifling_differences_are_no_failure() -> None:
    reference = [0.2, 0.2001, 0.1999]
    slightly = [value * (1 + FLOOR / 2) for value in reference]
    assert Verdict.of(slightly, reference).sigmas > 10
    assert not Verdict.of(slightly, reference).worse


def test_the_check_fails_for_a_crippled_md2_and_keeps_its_runs(
    drive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A real run of both trainers, a few steps of a tiny network each: md2 without a learning rate to speak of."""
    tiny = Setting((0,), True, size=(64, 64), batch=2, epochs=2, drop=2, narrow=8, every=6, rate=3e-3)
    (tmp_path / "synthetic_2x8").mkdir()
    (tmp_path / "synthetic_2x8" / "raw").symlink_to(drive)
    monkeypatch.setattr(parity, "THIN", 1)
    for module in (parity, parity_report):
        monkeypatch.setattr(module, "SETTINGS", {"stereo": tiny})
    common = [str(tmp_path), "--settings", "stereo", "--seeds", "2", "--drives", "2", "--frames", "8", "--check"]
    started: list[Networks] = []
    original = parity.train_md2

    def followed(config: Config, setting: Setting, run: Path, probe: parity.Probe) -> None:
        original(config, setting, run, probe)
        assert probe.networks is not None
        started.append(probe.networks)

    monkeypatch.setattr(parity, "train_md2", followed)
    crippled = [*common, "train.learning_rate=1e-7"]
    assert parity.main(crippled) == 1
    assert "worse than the reference: stereo md2 png with train.learning_rate=1e-7" in capsys.readouterr().out
    path = tmp_path / "runs.jsonl"
    runs = [json.loads(line) for line in path.read_text().splitlines()]
    shown = [(run["variant"], run["seed"], run["steps"]) for run in runs[::2]]
    assert shown == [("reference", seed, [6, 12]) for seed in (0, 1)]
    for seed, networks in enumerate(started):  # hardly moved: both trainers start from the same weights
        for mine, same in zip(networks.parameters(), tiny.networks(seed).parameters(), strict=True):
            torch.testing.assert_close(mine, same, rtol=0, atol=1e-5)
    assert parity.main(crippled) == 1  # from the runs that are there
    assert len(started) == 2 and len(path.read_text().splitlines()) == 4
    assert (tmp_path / "parity.png").stat().st_size > 10_000
