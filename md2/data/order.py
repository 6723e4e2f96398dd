"""The order of an epoch's samples, and what augmentation draws for each: pure functions of seed, epoch and sample.

    order = Order([shard.samples for shard in manifest.part("train")], seed=0, shuffle="window")
    order.epoch(3)                    # numbers of the part's samples, in the order in which they come
    uniform_draws(0, 3, order.epoch(3)[:12], 6)

Nothing else decides them: neither ranks nor batch size, threads, device, machine or storage. Random numbers are the raw
output of NumPy's Philox, a counter-based generator (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC
2011). NumPy keeps that output the same from version to version, which it does not promise for its shuffles.

`window` visits the shards in random order and spreads the samples of each uniformly over its own visit and the next
`WINDOW - 1`. So at most `WINDOW` shards are needed at any time, an epoch starts with the first of them, and one is
done as another comes. `global` shuffles the whole part uniformly; a reader then needs all shards at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Shuffle = Literal["window", "global"]
Numbers = npt.NDArray[np.int64]

WINDOW = 8
"""Shards that `window` shuffles over (a power of two): with prep's 256 MB a shard, 2 GB and about 8,000 samples."""
_SHARDS, _SAMPLES, _DRAWS = range(3)


def uniform_draws(seed: int, epoch: int, samples: Numbers, count: int) -> npt.NDArray[np.float64]:
    """`count` numbers from [0, 1) for each sample; asking for more does not change the first ones.

    Args:
        samples: (n,) their numbers in the part.

    Returns:
        (n, count).
    """
    generator, state = _philox(seed, _DRAWS, epoch)
    counter = state["state"]["counter"]
    raw = np.empty((len(samples), count), np.uint64)
    for row, sample in enumerate(samples):
        counter[1] = sample
        generator.state = state  # a generator for each sample would take five times as long
        raw[row] = generator.random_raw(count)
    uniform = (raw >> np.uint64(11)).astype(np.float64)
    uniform *= 2.0**-53
    return uniform


class Order:
    """The orders of one part, epoch by epoch.

    Args:
        counts: samples of each shard, in the manifest's order.
        shuffle: None: as they are stored, in every epoch.
    """

    def __init__(self, counts: Sequence[int], *, seed: int, shuffle: Shuffle | None) -> None:
        self.counts, self.seed, self.shuffle = np.asarray(counts), seed, shuffle
        self.starts: Numbers = np.concatenate([[0], np.cumsum(self.counts)])
        """Number of the first sample of each shard, and behind them the number of all samples."""
        self.samples = int(self.starts[-1])
        # The reader and what fetches shards for it ask for the same epochs, and for the next one early.
        self.epoch = lru_cache(maxsize=3)(self._epoch)

    def shards(self, samples: Numbers) -> Numbers:
        """The shard that each sample is in."""
        return np.searchsorted(self.starts, samples, side="right") - 1

    def shard_uses(self, epoch: int) -> tuple[Numbers, Numbers]:
        """For each shard, the places in the epoch of its first and of its last sample."""
        shards = np.repeat(np.arange(len(self.counts)), self.counts)[self.epoch(epoch)]
        places = np.arange(self.samples)
        first, last = np.empty_like(self.starts[1:]), np.empty_like(self.starts[1:])
        first[shards[::-1]] = places[::-1]  # of several values for one place NumPy keeps the last
        last[shards] = places
        return first, last

    def _epoch(self, epoch: int) -> Numbers:
        if self.shuffle is None:
            return np.arange(self.samples)
        raw = _raw(self.seed, _SAMPLES, epoch, self.samples)
        if self.shuffle == "global":
            return _sorted_by(raw)
        visited = _sorted_by(_raw(self.seed, _SHARDS, epoch, len(self.counts)))
        visit = np.empty(len(self.counts), np.uint64)
        visit[visited] = np.arange(len(self.counts))
        # A time is a visit's number and a fraction of `bits`; below it `_sorted_by` needs room for the sample's number.
        bits = 64 - self.samples.bit_length() - (len(self.counts) + WINDOW).bit_length()
        later = raw >> np.uint64(64 - bits - (WINDOW - 1).bit_length())
        times = (np.repeat(visit, self.counts) << np.uint64(bits)) + later
        return _sorted_by(times << np.uint64(self.samples.bit_length()))


def _sorted_by(keys: npt.NDArray[np.uint64]) -> Numbers:
    """The places of the keys in ascending order of the keys, of which the lowest bits, as many as a place takes, do
    not count. To sort keys that hold their own place is several times faster than `argsort`."""
    bits = np.uint64(len(keys).bit_length())
    sorted_keys = np.sort((keys >> bits << bits) | np.arange(len(keys), dtype=np.uint64))
    return (sorted_keys & ((np.uint64(1) << bits) - np.uint64(1))).astype(np.int64)


def _raw(seed: int, purpose: int, epoch: int, count: int) -> npt.NDArray[np.uint64]:
    raw: npt.NDArray[np.uint64] = _philox(seed, purpose, epoch)[0].random_raw(count)
    return raw


def _philox(seed: int, purpose: int, epoch: int) -> tuple[np.random.Philox, Any]:
    """A generator of its own for each seed and purpose, at the epoch's place, and its state.

    NumPy counts up the first word of the counter; the second is the sample, the third the epoch.
    """
    key, counter = np.array([seed % 2**64, purpose], np.uint64), np.array([0, 0, epoch, 0], np.uint64)
    generator = np.random.Philox(key=key, counter=counter)
    return generator, generator.state
