"""The whole loss, in every mode and with every option, against the per-pixel reference of naive.py."""

from __future__ import annotations

from dataclasses import asdict

import naive
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from md2.config import LossConfig, ModelConfig
from md2.data.batch import Batch, Offset
from md2.geometry import disparity_to_depth
from md2.loss import LossOutput, ReprojectionLoss, image_pyramid, reprojection_loss, smoothness
from md2.model import Pose, Prediction
from md2.photometric.ties import seeded_noise

HEIGHT, WIDTH, BATCH = 16, 40, 2
MONO: list[Offset] = [-1, 1]
STEREO: list[Offset] = ["s"]
BOTH: list[Offset] = [-1, 1, "s"]


def smooth_image(rng: np.random.Generator, height: int, width: int) -> naive.Array:
    coarse = rng.random((3, max(height // 3, 2), max(width // 3, 2)))
    return np.asarray(naive.upsample(coarse, height, width) * 0.8 + 0.2 * rng.random((3, height, width)))


def make_scenes(
    sources: list[Offset], scales: list[int], seed: int = 0, relative: bool = False, averaged: bool = False
) -> list[naive.Scene]:
    """Random smooth images with small motions: warped pixels mostly inside, errors of all kinds."""
    rng = np.random.default_rng(seed)
    scenes = []
    for _ in range(BATCH):
        sizes = {s: (HEIGHT >> s, WIDTH >> s) for s in {0, *scales}}
        images = {o: {s: smooth_image(rng, *size) for s, size in sizes.items()} for o in [0, *sources]}
        K = {s: np.array([[25 / 2**s, 0, 19 / 2**s], [0, 28 / 2**s, 9 / 2**s], [0, 0, 1]]) for s in sizes}
        disparities = {s: naive.upsample(rng.uniform(0.02, 0.2, (1, 2, 3)), *sizes[s])[0] for s in scales}
        motions = {
            int(o): (rng.normal(0, 0.03, 3), rng.normal(0, 0.05, 3) * (0.5 if relative else 1), int(o) < 0)
            for o in sources
            if o != "s"
        }
        stereo = np.eye(4)
        stereo[0, 3] = -0.1
        masks = {s: rng.uniform(0.1, 0.9, (len(sources), *sizes[s])) for s in scales}
        scene = naive.Scene(images, K, disparities, motions, stereo if "s" in sources else None, masks)
        scene.noise = {s: rng.normal(0, 1, (1 if averaged else len(sources), HEIGHT, WIDTH)) for s in scales}
        scene.relative = relative
        scenes.append(scene)
    return scenes


def tensor(arrays: list[naive.Array], dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.from_numpy(np.stack(arrays)).to(dtype)


def as_prediction(scenes: list[naive.Scene], masks: bool, dtype: torch.dtype) -> Prediction:
    first = scenes[0]
    poses: dict[Offset, Pose] = {
        offset: Pose(
            tensor([s.motions[offset][0] for s in scenes], dtype),
            tensor([s.motions[offset][1] for s in scenes], dtype),
            first.motions[offset][2],
            first.relative,
        )
        for offset in first.motions
    }
    return Prediction(
        {scale: tensor([s.disparities[scale][None] for s in scenes], dtype) for scale in first.disparities},
        poses,
        {scale: tensor([s.masks[scale] for s in scenes], dtype) for scale in first.masks} if masks else {},
    )


def run(
    scenes: list[naive.Scene],
    config: LossConfig,
    dtype: torch.dtype = torch.float64,
    panels: bool = False,
    fast: bool = True,
) -> LossOutput:
    """md2's loss on the scenes, everything given: pyramids, intrinsics, noise."""
    first = scenes[0]
    pyramids = {o: {s: tensor([x.images[o][s] for x in scenes], dtype) for s in first.images[o]} for o in first.images}
    intrinsics = tensor([x.K[0] for x in scenes], dtype)
    stereo = tensor([x.stereo for x in scenes if x.stereo is not None], dtype) if first.stereo is not None else None
    noise = {s: tensor([x.noise[s] for x in scenes], dtype) for s in first.noise} if first.noise else None
    prediction = as_prediction(scenes, config.predictive_mask, dtype)
    return reprojection_loss(prediction, pyramids, intrinsics, stereo, config, noise=noise, panels=panels, fast=fast)


MASKED = {"disable_automasking": True, "predictive_mask": True}
CASES = {
    "mono": (MONO, [0, 1, 2, 3], {}),
    "stereo": (STEREO, [0, 1, 2, 3], {}),
    "mono_stereo": (BOTH, [0, 1, 2, 3], {}),
    "one_source": ([1], [0, 1, 2, 3], {}),
    "far_frames": ([-2, -1, 1, 2], [0, 1], {}),
    "one_scale": (MONO, [0], {}),
    "scales_0_2": (MONO, [0, 2], {}),
    "v1_multiscale": (MONO, [0, 1, 2, 3], {"v1_multiscale": True}),
    "v1_mono_stereo": (BOTH, [0, 1, 2, 3], {"v1_multiscale": True}),
    "avg_reprojection": (MONO, [0, 1, 2, 3], {"avg_reprojection": True}),
    "avg_no_automask": (BOTH, [0, 1, 2, 3], {"avg_reprojection": True, "disable_automasking": True}),
    "disable_automasking": (MONO, [0, 1, 2, 3], {"disable_automasking": True}),
    "predictive_mask": (MONO, [0, 1, 2, 3], MASKED),
    "predictive_mask_v1": (BOTH, [0, 1, 2, 3], {**MASKED, "v1_multiscale": True}),
    "predictive_mask_avg": (BOTH, [0, 1, 2, 3], {**MASKED, "avg_reprojection": True}),
    "no_ssim": (MONO, [0, 1, 2, 3], {"no_ssim": True}),
    "no_ssim_stereo": (STEREO, [0, 1, 2, 3], {"no_ssim": True, "disable_automasking": True}),
    "smoothness": (MONO, [0, 1, 2, 3], {"disparity_smoothness": 0.5}),
    "paper_baseline": (
        MONO,
        [0, 1, 2, 3],
        {"v1_multiscale": True, "disable_automasking": True, "avg_reprojection": True},
    ),
}


def naive_options(options: dict[str, bool | float]) -> naive.Options:
    return naive.Options(**options)  # type: ignore[arg-type]


def at_level(scenes: list[naive.Scene], options: dict[str, bool | float]) -> list[naive.Scene]:
    """With v1_multiscale the unwarped errors, and so the noise, have each scale's own size."""
    if options.get("v1_multiscale"):
        for scene in scenes:
            scene.noise = {s: n[:, : HEIGHT >> s, : WIDTH >> s] for s, n in scene.noise.items()}
    return scenes


@pytest.mark.parametrize("case", CASES)
def test_loss_equals_reference(case: str) -> None:
    sources, scales, options = CASES[case]
    scenes = at_level(make_scenes(sources, scales, averaged="avg_reprojection" in options), options)
    expected, expected_scales = naive.loss(scenes, naive_options(options))
    found = run(scenes, LossConfig(**options))
    assert found.total.item() == pytest.approx(expected, rel=1e-6)
    assert {s: value.item() for s, value in found.per_scale.items()} == pytest.approx(expected_scales, rel=1e-6)
    readable = run(scenes, LossConfig(**options), fast=False)
    assert readable.total.item() == pytest.approx(expected, rel=1e-6)
    assert {s: value.item() for s, value in readable.per_scale.items()} == pytest.approx(expected_scales, rel=1e-6)
    single = run(scenes, LossConfig(**options), torch.float32)
    assert single.total.item() == pytest.approx(expected, rel=1e-5)


def test_posecnn_translation_is_relative_to_the_depth() -> None:
    scenes = make_scenes(MONO, [0, 1], relative=True)
    expected, _ = naive.loss(scenes, naive.Options())
    for fast in (True, False):
        assert run(scenes, LossConfig(), fast=fast).total.item() == pytest.approx(expected, rel=1e-6)
    for scene in scenes:
        scene.relative = False
    assert run(scenes, LossConfig()).total.item() != pytest.approx(expected, rel=1e-4)


# What each option changes, relative to the default: a loss that ignored it would give the same number.
@pytest.mark.parametrize(
    ("name", "sources", "lower"),
    [
        ("v1_multiscale", MONO, None),
        ("avg_reprojection", MONO, False),  # a mean is above the minimum
        ("disable_automasking", MONO, False),  # fewer candidates for the minimum
        ("no_ssim", MONO, None),
    ],
)
def test_option_changes_the_number(name: str, sources: list[Offset], lower: bool | None) -> None:
    scenes = make_scenes(sources, [0, 1])
    for scene in scenes:
        scene.noise = {}
    default = run(scenes, LossConfig()).total.item()
    changed = run(scenes, LossConfig(**{name: True})).total.item()
    assert changed != pytest.approx(default, rel=1e-3)
    if lower is not None:
        assert (changed < default) == lower


def test_depth_range_changes_the_number() -> None:
    scenes = make_scenes(MONO, [0])
    first = scenes[0]
    prediction = as_prediction(scenes, False, torch.float64)
    pyramids = {o: {0: tensor([x.images[o][0] for x in scenes])} for o in first.images}
    K = tensor([x.K[0] for x in scenes])
    found = reprojection_loss(prediction, pyramids, K, None, LossConfig(), min_depth=0.5, max_depth=20.0)
    for scene in scenes:
        scene.noise = {}
    expected, _ = naive.loss(scenes, naive.Options(min_depth=0.5, max_depth=20.0))
    assert found.total.item() == pytest.approx(expected, rel=1e-6)
    assert found.total.item() != pytest.approx(naive.loss(scenes, naive.Options())[0], rel=1e-3)


def test_the_configured_depth_range_is_the_losss() -> None:
    generator = torch.Generator().manual_seed(0)
    images: dict[Offset, torch.Tensor] = {o: torch.rand(1, 3, 16, 24, generator=generator) for o in (0, "s")}
    K, stereo = torch.tensor([[[20.0, 0, 12], [0, 20, 8], [0, 0, 1]]]), torch.eye(4)[None].clone()
    stereo[0, 0, 3] = -0.3
    batch = Batch(images, images, K, stereo, 5.4, None, None, ["a"])
    prediction = Prediction({0: torch.rand(1, 1, 16, 24, generator=generator)})
    found = ReprojectionLoss(LossConfig(), ModelConfig(min_depth=0.5, max_depth=20.0))(batch, prediction).total
    pyramids = image_pyramid(images, [0])
    expected = reprojection_loss(prediction, pyramids, K, stereo, LossConfig(), min_depth=0.5, max_depth=20.0).total
    assert torch.equal(found, expected)
    assert not torch.equal(found, ReprojectionLoss(LossConfig(), ModelConfig())(batch, prediction).total)


def test_predictive_mask_of_ones_is_the_unmasked_loss_and_of_halves_half_of_it() -> None:
    scenes = make_scenes(MONO, [0])
    plain = run(scenes, LossConfig(disable_automasking=True, disparity_smoothness=0.0)).total.item()
    config = LossConfig(disable_automasking=True, predictive_mask=True, disparity_smoothness=0.0)
    for scene in scenes:
        scene.masks = {0: np.ones((2, HEIGHT, WIDTH))}
    assert run(scenes, config).total.item() == pytest.approx(plain, rel=1e-9)
    for scene in scenes:
        scene.masks = {0: np.full((2, HEIGHT, WIDTH), 0.5)}
    assert run(scenes, config).total.item() == pytest.approx(plain / 2 + 0.2 * np.log(2), rel=1e-9)


def test_smoothness_by_hand() -> None:
    disparity = torch.tensor([[1.0, 3.0], [1.0, 3.0]]).view(1, 1, 2, 2)
    image = torch.zeros(1, 3, 2, 2)
    image[:, :, :, 1] = torch.tensor([0.0, 0.3, 0.6]).view(1, 3, 1)
    # Mean 2: normalised 0.5 | 1.5. Steps in x are 1 over an edge of mean 0.3; none in y.
    assert smoothness(disparity, image).item() == pytest.approx(np.exp(-0.3), rel=1e-6)


def test_smoothness_does_not_depend_on_the_disparitys_scale() -> None:
    torch.manual_seed(0)
    disparity, image = torch.rand(2, 1, 6, 7), torch.rand(2, 3, 6, 7)
    torch.testing.assert_close(smoothness(disparity * 7, image), smoothness(disparity, image), rtol=1e-5, atol=0)


def test_automask_hides_what_does_not_move_with_the_camera() -> None:
    """A static frame with an unhelpful pose: the unwarped source fits exactly, so every pixel is masked."""
    scenes = make_scenes([1], [0])
    for scene in scenes:
        scene.images[1] = scene.images[0]
        scene.noise = {}
    output = run(scenes, LossConfig(disparity_smoothness=0.0), panels=True)
    automask = output.panels[0].automask
    assert automask is not None and not automask.any()
    assert output.total.item() == pytest.approx(0.0, abs=1e-12)


def test_noise_breaks_ties_and_is_scaled() -> None:
    """Where warped and unwarped are the same image, the sign of the noise decides."""
    scenes = make_scenes([1], [0])
    for scene in scenes:
        scene.motions = {1: (np.zeros(3), np.zeros(3), False)}
        scene.stereo = None
        scene.noise = {0: np.where(np.arange(WIDTH) % 2, 1.0, -1.0) * np.ones((1, HEIGHT, WIDTH))}
    output = run(scenes, LossConfig(disparity_smoothness=0.0), panels=True)
    automask = output.panels[0].automask
    assert automask is not None
    assert automask[..., 1::2].all() and not automask[..., ::2].any()
    for scene in scenes:
        scene.noise = {}
    # Half of the pixels gain 1e-5; the z + 1e-7 of the projection takes a little of it.
    without = run(scenes, LossConfig(disparity_smoothness=0.0))
    assert without.total.item() - output.total.item() == pytest.approx(0.5e-5, rel=0.03)


def test_seeds_give_each_sample_its_own_noise_whatever_else_is_in_the_batch() -> None:
    scenes = make_scenes(MONO, [0, 1])
    first = scenes[0]
    prediction = as_prediction(scenes, False, torch.float64)
    pyramids = {o: {s: tensor([x.images[o][s] for x in scenes]) for s in first.images[o]} for o in first.images}
    K = tensor([x.K[0] for x in scenes])

    def total(noise: torch.Tensor | None) -> float:
        return reprojection_loss(prediction, pyramids, K, None, LossConfig(), noise=noise).total.item()

    seeds, shape = torch.tensor([2**53 - 1, 5]), torch.Size([2, HEIGHT, WIDTH])
    drawn = torch.cat([seeded_noise(seeds[row : row + 1], shape) for row in (0, 1)])
    assert total(seeds) == total(drawn)
    assert len({total(noise) for noise in (seeds, seeds.flip(0), seeds + 1, None)}) == 4


def test_noise_of_seeds_is_standard_normal() -> None:
    """Its moments, within five standard errors of 400,000 numbers; neighbours and sources are independent."""
    noise = seeded_noise(torch.arange(8) * 10**5, torch.Size([2, 100, 250])).double()
    for power, moment in ((1, 0), (2, 1), (3, 0), (4, 3)):
        assert noise.pow(power).mean().item() == pytest.approx(moment, abs=5 * (105 / 400_000) ** 0.5)
    for one, other in ((noise[..., 1:], noise[..., :-1]), (noise[:, :1], noise[:, 1:]), (noise[:1], noise[1:2])):
        assert (one * other).mean().item() == pytest.approx(0, abs=5 * one.numel() ** -0.5)


@pytest.mark.parametrize("fast", [True, False])
def test_panels_hold_warped_images_errors_and_mask(fast: bool) -> None:
    scenes = make_scenes(BOTH, [0, 1])
    for scene in scenes:
        scene.noise = {}
    output = run(scenes, LossConfig(disparity_smoothness=0.0), panels=True, fast=fast)
    assert not run(scenes, LossConfig()).panels
    panel = output.panels[1]
    scene = scenes[1]
    depth = disparity_to_depth(torch.from_numpy(naive.upsample(scene.disparities[1][None], HEIGHT, WIDTH)[0]), 0.1, 100)
    assert scene.stereo is not None
    warped = naive.warp(scene.images["s"][0], depth.numpy(), scene.K[0], scene.stereo)
    np.testing.assert_allclose(panel.warped["s"][1].numpy(), warped, atol=1e-5)
    assert list(panel.warped) == BOTH
    assert panel.error.mean().item() == pytest.approx(output.per_scale[1].item(), rel=1e-9)
    assert panel.automask is not None and panel.automask.dtype == torch.bool
    assert 0.05 < panel.automask.double().mean().item() < 0.95
    assert panel.mask is None


@pytest.mark.parametrize("case", ["mono_stereo", "v1_multiscale", "avg_reprojection", "predictive_mask", "no_ssim"])
def test_gradients_equal_finite_differences(case: str) -> None:
    """Along random directions through disparities, motions and masks at once."""
    sources, _, options = CASES[case]
    scales = [0, 1]
    scenes = at_level(make_scenes(sources, scales, seed=7, averaged="avg_reprojection" in options), options)
    config = LossConfig(**options)
    first = scenes[0]
    pyramids = {o: {s: tensor([x.images[o][s] for x in scenes]) for s in first.images[o]} for o in first.images}
    K = tensor([x.K[0] for x in scenes])
    stereo = tensor([x.stereo for x in scenes if x.stereo is not None]) if "s" in sources else None
    noise = {s: tensor([x.noise[s] for x in scenes]) for s in first.noise}
    start = as_prediction(scenes, config.predictive_mask, torch.float64)
    leaves = [
        *start.disparities.values(),
        *(t for pose in start.poses.values() for t in (pose.axis_angle, pose.translation)),
        *start.masks.values(),
    ]

    def total() -> torch.Tensor:
        return reprojection_loss(start, pyramids, K, stereo, config, noise=noise).total

    for leaf in leaves:
        leaf.requires_grad_()
    gradients = torch.autograd.grad(total(), leaves)
    torch.manual_seed(0)
    for index, (leaf, gradient) in enumerate(zip(leaves, gradients, strict=True)):
        direction = torch.randn_like(leaf)
        step = 1e-7
        with torch.no_grad():
            leaf.add_(direction, alpha=step)
            above = total()
            leaf.add_(direction, alpha=-2 * step)
            below = total()
            leaf.add_(direction, alpha=step)
        slope = ((above - below) / (2 * step)).item()
        assert (gradient * direction).sum().item() == pytest.approx(slope, rel=2e-4, abs=1e-6), index


def test_loss_stays_float32_under_autocast() -> None:
    scenes = make_scenes(MONO, [0, 1])
    plain = run(scenes, LossConfig(), torch.float32).total
    with torch.autocast("cpu", torch.bfloat16):
        inside = run(scenes, LossConfig(), torch.float32).total
    assert inside.dtype == torch.float32
    assert inside.item() == plain.item()


def test_half_precision_disparity_is_widened() -> None:
    scenes = make_scenes(STEREO, [0])
    first = scenes[0]
    pyramids = {o: {0: tensor([x.images[o][0] for x in scenes], torch.float32)} for o in first.images}
    K = tensor([x.K[0] for x in scenes], torch.float32)
    stereo = tensor([x.stereo for x in scenes if x.stereo is not None], torch.float32)
    rounded = tensor([s.disparities[0][None] for s in scenes]).bfloat16()
    low = reprojection_loss(Prediction({0: rounded}), pyramids, K, stereo, LossConfig())
    high = reprojection_loss(Prediction({0: rounded.float()}), pyramids, K, stereo, LossConfig())
    assert low.total.item() == high.total.item()


def test_image_pyramid_halves_by_means_and_skips_what_is_not_read() -> None:
    torch.manual_seed(0)
    images: dict[Offset, torch.Tensor] = {0: torch.rand(1, 3, 8, 16), 1: torch.rand(1, 3, 8, 16)}
    pyramids = image_pyramid(images, [0, 2])
    assert {o: sorted(levels) for o, levels in pyramids.items()} == {0: [0, 2], 1: [0]}
    torch.testing.assert_close(pyramids[0][2], images[0].unflatten(2, (2, 4)).unflatten(4, (4, 4)).mean(dim=(3, 5)))
    assert sorted(image_pyramid(images, [0, 2], v1_multiscale=True)[1]) == [0, 2]
    v1_only_small = image_pyramid(images, [1])
    torch.testing.assert_close(v1_only_small[0][1], F.interpolate(images[0], (4, 8), mode="area"))


def test_nan_in_a_source_or_disparity_reaches_the_loss() -> None:
    """The auto-mask must not hide a broken step behind an unwarped source that still fits."""
    scenes = make_scenes(MONO, [0])
    scenes[0].disparities[0][3, 5] = np.nan
    for fast in (True, False):
        assert np.isnan(run(scenes, LossConfig(disparity_smoothness=0.0), fast=fast).total.item())
    scenes = make_scenes(MONO, [0])
    scenes[1].images[1][0][:] = np.nan
    assert np.isnan(run(scenes, LossConfig(disparity_smoothness=0.0)).total.item())


@pytest.mark.parametrize("broken", ["disparity", "motion"])
def test_a_diverged_prediction_gives_a_nan_that_hangs_on_every_output(broken: str) -> None:
    """Without reaching the sampler, which it would crash; each output has a gradient, or DDP would wait for ever."""
    generator = torch.Generator().manual_seed(0)
    images: dict[Offset, torch.Tensor] = {o: torch.rand(1, 3, 16, 24, generator=generator) for o in (0, 1)}
    K = torch.tensor([[[20.0, 0, 12], [0, 20, 8], [0, 0, 1]]])
    batch = Batch(images, images, K, None, 5.4, None, None, ["a"])
    disparities = {s: torch.rand(1, 1, 16 >> s, 24 >> s, generator=generator) for s in (0, 1)}
    pose = Pose(torch.zeros(1, 3), torch.zeros(1, 3))
    prediction = Prediction(disparities, {1: pose}, {0: torch.rand(1, 1, 16, 24)})
    (disparities[1] if broken == "disparity" else pose.translation).view(-1)[1] = torch.nan
    for tensor in prediction.tensors():
        tensor.requires_grad_()
    output = ReprojectionLoss(LossConfig(), ModelConfig())(batch, prediction, panels=True)
    assert output.total.isnan() and not output.panels
    assert all(output.per_scale[s].isnan() for s in (0, 1))
    output.total.backward()  # type: ignore[no-untyped-call]
    assert all(tensor.grad is not None and tensor.grad.isnan().all() for tensor in prediction.tensors())


def test_missing_stereo_transform_or_sources_is_named() -> None:
    scenes = make_scenes(STEREO, [0])
    pyramids = {o: {0: tensor([x.images[o][0] for x in scenes])} for o in scenes[0].images}
    K = tensor([x.K[0] for x in scenes])
    prediction = as_prediction(scenes, False, torch.float64)
    with pytest.raises(ValueError, match="stereo transform"):
        reprojection_loss(prediction, pyramids, K, None, LossConfig())
    with pytest.raises(ValueError, match="no source"):
        reprojection_loss(prediction, {0: pyramids[0]}, K, None, LossConfig())


def test_defaults_are_the_papers() -> None:
    assert LossConfig().velocity == 0
    published = LossConfig().model_dump(exclude={"velocity"})
    assert asdict(naive.Options()) == {**published, "min_depth": 0.1, "max_depth": 100.0}
