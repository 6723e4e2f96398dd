"""The synthetic pictures: filtered as a camera filters, depth that is not, shadows where the sun is blocked."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_synthetic_cast import textbook

from prep.synthetic.cast import Solid
from prep.synthetic.noise import Noise, resolved
from prep.synthetic.paint import _band, _repeated
from prep.synthetic.render import Renderer
from prep.synthetic.rig import CameraRig
from prep.synthetic.street import Street, build_street


@pytest.fixture(scope="module")
def street() -> Street:
    return build_street(seed=5, drive=1, frames=8)


def test_a_small_picture_is_the_mean_of_a_large_one(street: Street) -> None:
    """Point samples would shimmer from frame to frame; a camera's pixel is the mean over its area."""
    small = Renderer(street, CameraRig((160, 64))).image(4, 2)[0] / 255
    large = Renderer(street, CameraRig((640, 256))).image(4, 2)[0] / 255
    mean = large.reshape(64, 4, 160, 4, 3).mean(axis=(1, 3))
    sampled = large[2::4, 2::4]
    assert np.abs(small - mean).mean() < 0.02
    assert np.square(small - mean).mean() < 0.5 * np.square(sampled - mean).mean()


def test_depth_is_that_of_the_pixels_centre(street: Street) -> None:
    """Depth must not be averaged over edges: each value is one that a three times finer picture has in its middle."""
    coarse = Renderer(street, CameraRig((96, 48))).image(2, 3)[1]
    fine = Renderer(street, CameraRig((288, 144))).image(2, 3)[1][1::3, 1::3]
    same = np.isclose(coarse, fine, rtol=1e-4) | (coarse == fine)
    assert same.mean() > 0.995


def test_shadows_lie_where_the_sun_is_blocked(street: Street) -> None:
    renderer = Renderer(street, CameraRig((320, 96)))
    rng = np.random.default_rng(0)
    z = rng.uniform(0, 60, 120)
    x = street.road.centre(z) + rng.uniform(-7, 7, 120)
    share = renderer.shadow.at(x.astype(np.float32), z.astype(np.float32), np.full(120, 0.01, np.float32))
    clear = (share < 0.01) | (share > 0.99)
    blocked = [sun_is_blocked(renderer.solids, street.sun, px, pz) for px, pz in zip(x[clear], z[clear], strict=True)]
    assert clear.mean() > 0.85
    assert 0.05 < np.mean(blocked) < 0.95
    assert np.mean((share[clear] > 0.5) == np.array(blocked)) > 0.99


def sun_is_blocked(solids: list[Solid], sun: np.ndarray, x: float, z: float) -> bool:
    near = [solid for solid in solids if np.abs(solid.corners[:, 2] - z).min() < 45]  # no shadow is longer
    distance, _ = textbook(near, np.array([x, -1e-6, z]), sun[None])
    return bool(np.isfinite(distance[0]))


lengths = st.floats(0.05, 5)


@settings(deadline=None, max_examples=60)
@given(st.floats(-50, 50), lengths, lengths, st.floats(0, 0.5), st.floats(0.5, 1))
def test_stripes_cover_what_counting_says(centre: float, period: float, blur: float, start: float, stop: float) -> None:
    low, high = start * period, stop * period
    inside = (centre + blur * ((np.arange(20000) + 0.5) / 20000 - 0.5)) % period
    counted = np.mean((inside >= low) & (inside <= high))
    value, width = np.array([centre], np.float32), np.array([blur], np.float32)
    # A period in a pixel is known to float32 of the position: 50 m and 5 cm leave three digits.
    assert _repeated(value, period, low, high, width)[0] == pytest.approx(counted, abs=5e-3)
    plain = centre + blur * ((np.arange(20000) + 0.5) / 20000 - 0.5)
    assert _band(value, low, high, width)[0] == pytest.approx(np.mean((plain >= low) & (plain <= high)), abs=5e-3)


def test_noise_is_seeded_bounded_and_gone_where_a_pixel_cannot_show_it() -> None:
    points = np.random.default_rng(1).uniform(-300, 300, (4000, 3)).astype(np.float32)
    scales = {0.5: 1.0}
    near, far = np.full(4000, 0.05, np.float32), np.full(4000, 0.6, np.float32)
    first = Noise.seeded(7).octaves(points, near, scales)
    assert np.array_equal(first, Noise.seeded(7).octaves(points, near, scales))
    assert not np.array_equal(first, Noise.seeded(8).octaves(points, near, scales))
    assert np.abs(first).max() <= 1 and first.std() > 0.15 and abs(first.mean()) < 0.05
    assert not Noise.seeded(7).octaves(points, far, scales).any()
    fading = resolved(0.5, np.linspace(0.1, 0.7, 100, dtype=np.float32))
    assert (np.diff(fading) <= 0).all() and fading[0] == 1 and fading[-1] == 0
    # Smooth: a hundredth of the spacing away it is nearly the same, a whole spacing away it is not.
    moved = Noise.seeded(7).octaves(points + np.float32(0.005), near, scales)
    assert np.abs(moved - first).max() < 0.1
    away = Noise.seeded(7).octaves(points + np.float32(0.5), near, scales)
    assert np.corrcoef(first, away)[0, 1] < 0.4
