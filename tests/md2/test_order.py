"""The order of samples: every property by hypothesis, its randomness against closed forms, its numbers by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from md2.data.order import WINDOW, Order, Shuffle, uniform_draws

counts = st.lists(st.integers(1, 40), min_size=1, max_size=40)
shuffles = st.sampled_from(["window", "global"])
seeds = st.integers(0, 2**64 - 1)


@settings(max_examples=40, deadline=None)
@given(counts, seeds, st.integers(0, 10**6), shuffles)
def test_an_epoch_is_a_permutation(counts: list[int], seed: int, epoch: int, shuffle: Shuffle) -> None:
    order = Order(counts, seed=seed, shuffle=shuffle)
    assert sorted(order.epoch(epoch).tolist()) == list(range(sum(counts)))
    assert np.array_equal(Order(counts, seed=seed, shuffle=shuffle).epoch(epoch), order.epoch(epoch))


@settings(max_examples=40, deadline=None)
@given(counts, st.integers(0, 99), st.integers(0, 9), shuffles)
def test_uses_of_shards_are_those_of_their_samples(counts: list[int], seed: int, epoch: int, shuffle: Shuffle) -> None:
    order = Order(counts, seed=seed, shuffle=shuffle)
    shards = order.shards(order.epoch(epoch)).tolist()
    first, last = order.shard_uses(epoch)
    for shard in range(len(counts)):
        places = [place for place, other in enumerate(shards) if other == shard]
        assert (first[shard], last[shard]) == (places[0], places[-1])
        assert len(places) == counts[shard]


@settings(max_examples=40, deadline=None)
@given(counts, st.integers(0, 99), st.integers(0, 9))
def test_a_window_never_needs_more_than_its_shards_at_a_time(counts: list[int], seed: int, epoch: int) -> None:
    order = Order(counts, seed=seed, shuffle="window")
    first, last = order.shard_uses(epoch)
    for place in range(order.samples):
        assert ((first <= place) & (place <= last)).sum() <= WINDOW


def test_a_window_mixes_all_its_shards_and_visits_them_in_another_order_each_epoch() -> None:
    order = Order([500] * 40, seed=1, shuffle="window")
    assert len({tuple(np.argsort(order.shard_uses(epoch)[0])) for epoch in range(20)}) == 20
    shards = order.shards(order.epoch(0))
    for begin in range(5000, 15000, 500):
        # Of 500 samples 62 are expected from each of 8 shards, give or take 7; the window moves by one shard meanwhile.
        found = np.sort(np.bincount(shards[begin : begin + 500], minlength=40))[::-1]
        assert found[: WINDOW - 1].min() > 30
        assert found[: WINDOW + 1].sum() == 500


def test_samples_of_a_shard_are_spread_uniformly_over_the_window() -> None:
    """In the middle of an epoch a shard's samples come at uniform times of the 8 visits: their quartiles say so."""
    order = Order([2000] * 32, seed=3, shuffle="window")
    samples = order.epoch(0)
    shards, (first, last) = order.shards(samples), order.shard_uses(0)
    for shard in np.argsort(first)[WINDOW:-WINDOW]:
        places = np.flatnonzero(shards == shard)
        relative = (places - first[shard]) / (last[shard] - first[shard])
        np.testing.assert_allclose(np.quantile(relative, [0.25, 0.5, 0.75]), [0.25, 0.5, 0.75], atol=0.05)
        # Which of a shard's samples come early is random, too.
        assert abs(np.corrcoef(samples[places], places)[0, 1]) < 0.1


@pytest.mark.parametrize("shuffle", ["window", "global"])
def test_all_orders_of_a_single_shard_are_as_likely(shuffle: Shuffle) -> None:
    """2,400 epochs of 4 samples: each of 24 orders 100 times, give or take 10."""
    order = Order([4], seed=0, shuffle=shuffle)
    found: dict[tuple[int, ...], int] = {}
    for epoch in range(2400):
        key = tuple(order.epoch(epoch).tolist())
        found[key] = found.get(key, 0) + 1
    assert len(found) == 24
    assert min(found.values()) > 50 and max(found.values()) < 150


def test_global_places_every_sample_uniformly() -> None:
    order = Order([10] * 10, seed=5, shuffle="global")
    places = np.array([np.argsort(order.epoch(epoch)) for epoch in range(2000)])
    # The mean of 2,000 uniform numbers from 0 to 99: 49.5, give or take 0.65.
    np.testing.assert_allclose(places.mean(0), 49.5, atol=4)
    np.testing.assert_allclose(places.std(0), np.sqrt((100**2 - 1) / 12), rtol=0.1)


def test_evaluation_keeps_the_datasets_order() -> None:
    order = Order([3, 1, 2], seed=5, shuffle=None)
    assert order.epoch(7).tolist() == [0, 1, 2, 3, 4, 5]
    assert order.shards(order.epoch(0)).tolist() == [0, 0, 0, 1, 2, 2]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 10**7), min_size=1, max_size=20), seeds, st.integers(0, 1000), st.integers(1, 9))
def test_draws_depend_on_seed_epoch_and_sample_alone(samples: list[int], seed: int, epoch: int, count: int) -> None:
    draws = uniform_draws(seed, epoch, np.array(samples), count)
    assert draws.shape == (len(samples), count)
    assert (draws >= 0).all() and (draws < 1).all()
    for row, sample in enumerate(samples):
        alone = uniform_draws(seed, epoch, np.array([sample]), 9)[0]
        assert np.array_equal(draws[row], alone[:count])
        # NumPy's own way to a float from a generator that starts at this counter.
        key, counter = np.array([seed, 2], np.uint64), np.array([0, sample, epoch, 0], np.uint64)
        expected = np.random.Generator(np.random.Philox(key=key, counter=counter)).random(count)
        assert np.array_equal(draws[row], expected)


def test_draws_are_uniform_and_differ_between_samples_epochs_and_seeds() -> None:
    samples = np.arange(4000)
    draws = [uniform_draws(seed, epoch, samples, 6) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    for drawn in draws:
        np.testing.assert_allclose(drawn.mean(0), 0.5, atol=0.02)
        np.testing.assert_allclose(drawn.std(0), 12**-0.5, atol=0.01)
        assert np.abs(np.corrcoef(drawn.T) - np.eye(6)).max() < 0.07
    assert np.abs(np.corrcoef([drawn[:, 0] for drawn in draws]) - np.eye(3)).max() < 0.07


def test_the_order_of_a_seed_never_changes() -> None:
    """A resumed run relies on it: another order under the same fingerprint would repeat and lose samples in silence."""
    assert Order([3, 2, 4, 1], seed=7, shuffle="window").epoch(2).tolist() == FIXED["window"]
    assert Order([3, 2, 4, 1], seed=7, shuffle="global").epoch(2).tolist() == FIXED["global"]


FIXED = {"window": [5, 8, 9, 2, 4, 6, 1, 3, 7, 0], "global": [5, 4, 2, 8, 9, 6, 3, 1, 0, 7]}
