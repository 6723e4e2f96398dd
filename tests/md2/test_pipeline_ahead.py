"""Batches that are made ahead on a thread of their own are the same ones, counted when they are taken."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import wait
from pathlib import Path
from typing import Any

import pytest
import torch
from pipeline_data import config, make_samples, pack
from train_data import QUICK, losses, train

from md2.data.batch import Batch
from md2.pipeline import Loader
from shards.dataset import LocalDataset, open_dataset
from shards.errors import DatasetError
from shards.sample import Sample

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> LocalDataset:
    return pack(tmp_path_factory.mktemp("ahead") / "data", make_samples(11))


def make(dataset: LocalDataset, ahead: bool, **changes: Any) -> Loader:
    settings = {"batch_size": 2, "seed": 3, "train": True, **changes}
    return Loader(dataset, "train", config(flip=True, color_jitter=True, ahead=ahead), device=CPU, **settings)


def equal(one: Batch, other: Batch) -> bool:
    tensors: list[list[torch.Tensor]] = [[], []]
    for batch, found in zip((one, other), tensors, strict=True):
        batch.map(lambda tensor, found=found: found.append(tensor) or tensor)  # type: ignore[misc]
    return one.keys == other.keys and all(map(torch.equal, *tensors)) and len(tensors[0]) == len(tensors[1]) > 6


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_same_batches_and_states_over_epochs_and_from_any_state(dataset: LocalDataset, accumulate: int) -> None:
    plain, ahead = (make(dataset, made, accumulate=accumulate) for made in (False, True))
    seen, states = [], []
    for _ in range(3):
        for one, other in zip(plain, ahead, strict=True):
            assert equal(one, other)
            assert plain.state() == ahead.state()  # of what is taken, though another batch is begun
            seen.append(one)
            states.append(plain.state())
    assert len(seen) == 3 * (11 // (2 * accumulate) * accumulate)
    place = len(seen) // 2
    if states[place]["samples"] == states[place - 1]["samples"]:
        place += 1  # only whole steps can be resumed
    resumed = make(dataset, True, accumulate=accumulate, state=states[place])
    assert equal(next(iter(resumed)), seen[place + 1])


def test_the_next_batch_is_made_while_one_is_used(dataset: LocalDataset) -> None:
    threads: list[str] = []
    loader = make(dataset, True)
    instead(loader, lambda: threads.append(threading.current_thread().name))
    next(iter(loader))
    assert loader._next is not None
    wait([loader._next], timeout=60)
    assert len(threads) == 2 and all(name.startswith("md2-ahead") for name in threads)
    loader.close()


def instead(loader: Loader, first: Callable[[], object]) -> None:
    """Have a loader do something before it makes a batch."""
    make_batch = loader._batch

    def both() -> Batch:
        first()
        return make_batch()

    loader._batch = both  # type: ignore[method-assign]


def test_an_error_is_raised_where_its_batch_would_be_taken(dataset: LocalDataset) -> None:
    made: list[int] = []
    loader, taken = make(dataset, True), list[Batch]()

    def fail() -> None:
        made.append(1)
        if len(made) == 3:
            raise DatasetError("the third is broken")

    instead(loader, fail)
    with pytest.raises(DatasetError, match="the third is broken"):
        for batch in loader:
            taken.append(batch)
            wait([loader._next] if loader._next else [], timeout=60)
    assert len(taken) == 2 and loader.state()["samples"] == 4


@QUICK
def test_a_run_has_the_same_losses_and_says_what_is_broken(dataset: LocalDataset, tmp_path: Path) -> None:
    for ahead in ("false", "true"):
        train(dataset.folder, tmp_path / ahead, "mono", [f"data.ahead={ahead}"])
    assert losses(tmp_path / "true") == losses(tmp_path / "false")
    assert len(losses(tmp_path / "true")) == 5
    broken = pack(tmp_path / "data", [*make_samples(10), broken_sample()])
    with pytest.raises(DatasetError, match=r"train/000002\.tar.*broken_000.*0\.jpg"):
        train(broken.folder, tmp_path / "broken", "mono", ["data.ahead=true"])


def broken_sample() -> Sample:
    (sample,) = make_samples(1, prefix="broken")
    return Sample(sample.key, {**sample.components, "0.jpg": sample.components["0.jpg"][:300]})


def test_evaluation_begins_at_the_beginning_after_whole_and_broken_passes(dataset: LocalDataset) -> None:
    plain, ahead = (make(dataset, made, train=False, batch_size=4) for made in (False, True))
    whole = [batch.keys for batch in plain]
    assert [len(keys) for keys in whole] == [4, 4, 3]
    next(iter(ahead))
    for _ in range(2):
        assert [batch.keys for batch in ahead] == whole


def test_what_nobody_waits_for_is_no_waiting_time(dataset: LocalDataset) -> None:
    waited = []
    for made in (False, True):
        loader = make(dataset, made)
        instead(loader, lambda: time.sleep(0.5))
        batches = iter(loader)
        next(batches)
        before = loader.waited["conversion"]
        wait([loader._next] if loader._next else [])
        next(batches)
        waited.append(loader.waited["conversion"] - before)
        loader.close()
    assert waited[0] >= 0.5 and waited[1] < 0.4


def test_a_process_ends_while_a_batch_is_being_made(dataset: LocalDataset) -> None:
    done = subprocess.run(
        [sys.executable, __file__, str(dataset.folder)], capture_output=True, text=True, timeout=240, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "2\n", "")


if __name__ == "__main__":
    print(next(iter(make(open_dataset(sys.argv[1]), True))).size)
