"""Which samples an epoch holds, on how many ranks, in which order."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from math import inf
from pathlib import Path
from threading import Barrier

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pipeline_data import config, loader, make_samples, pack

import md2.data.cpu
import md2.pipeline
from md2.data.cpu import cores, cpu_quota, default_threads, host_threads
from md2.data.order import Order
from md2.pipeline import Loader
from shards.dataset import LocalDataset

COUNT = 23


@pytest.fixture(autouse=True, params=[96, 8], ids=["read whole", "read by 8"])
def samples_ahead(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """How many samples are read at once must not show."""
    monkeypatch.setattr(md2.pipeline, "SAMPLES_AHEAD", request.param)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> LocalDataset:
    """23 samples in shards of 5, 5, 5, 5 and 3."""
    return pack(tmp_path_factory.mktemp("epochs") / "data", make_samples(COUNT, frames=[0, 1]), frames=[0, 1])


def one(dataset: LocalDataset, **arguments: object) -> Loader:
    settings = arguments.pop("settings", {})
    return loader(dataset, config(frames=[0, 1], **settings), **arguments)  # type: ignore[arg-type]


def keys(batches: Loader) -> list[str]:
    return list(chain.from_iterable(batch.keys for batch in batches))


@pytest.mark.parametrize("shuffle", ["window", "global"])
@pytest.mark.parametrize(("world", "batch_size"), [(1, 1), (1, 4), (2, 1), (2, 4), (3, 3), (4, 5)])
def test_an_epoch_holds_each_sample_once_on_one_rank_less_than_a_step_excepted(
    dataset: LocalDataset, world: int, batch_size: int, shuffle: str
) -> None:
    shared = {"world_size": world, "batch_size": batch_size, "settings": {"shuffle": shuffle}}
    ranks = [one(dataset, rank=rank, **shared) for rank in range(world)]
    steps = COUNT // world // batch_size
    assert {len(rank) for rank in ranks} == {steps}
    left_out = set()
    for _ in range(5):
        parts = [keys(rank) for rank in ranks]
        assert {len(part) for part in parts} == {steps * batch_size}
        assert {rank.left_out for rank in ranks} == {COUNT - steps * batch_size * world}
        seen = list(chain.from_iterable(parts))
        assert len(set(seen)) == len(seen)
        left_out.add(frozenset(sample.key for sample in make_samples(COUNT, frames=[0, 1])) - frozenset(seen))
    if steps * batch_size * world < COUNT:
        assert len(left_out) > 1, "the same samples are left out every epoch"
    else:
        assert left_out == {frozenset()}


def test_orders_differ_between_epochs_and_seeds_but_not_between_runs(dataset: LocalDataset) -> None:
    def epochs(seed: int) -> list[list[str]]:
        batches = one(dataset, seed=seed, batch_size=1)
        return [keys(batches) for _ in range(3)]

    first = epochs(0)
    assert first == epochs(0)
    orders = {tuple(order) for order in [*first, *epochs(1)]}
    assert len(orders) == 6


def test_the_loader_takes_the_samples_of_the_order(dataset: LocalDataset) -> None:
    """Keys by sample number, against the pure function."""
    order = Order([5, 5, 5, 5, 3], seed=3, shuffle="window")
    batches = one(dataset, batch_size=1, seed=3)
    for epoch in range(2):
        assert keys(batches) == [f"drive_{number:03d}" for number in order.epoch(epoch)]


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(0, 99))
def test_slices_of_the_ranks_are_disjoint_complete_and_in_the_order_of_the_steps(
    dataset: LocalDataset, world: int, batch_size: int, accumulate: int, seed: int
) -> None:
    shared = {"world_size": world, "batch_size": batch_size, "accumulate": accumulate, "seed": seed}
    parts = [[batch.keys for batch in one(dataset, rank=rank, **shared)] for rank in range(world)]
    steps = COUNT // (world * batch_size * accumulate)
    assert {len(part) for part in parts} == {steps * accumulate}
    expected = [f"drive_{number:03d}" for number in Order([5, 5, 5, 5, 3], seed=seed, shuffle="window").epoch(0)]
    taken = []
    for step in range(steps):
        for part in parts:
            taken += chain.from_iterable(part[step * accumulate : (step + 1) * accumulate])
    assert taken == expected[: steps * world * batch_size * accumulate]


def test_ranks_read_other_samples_each_epoch(dataset: LocalDataset) -> None:
    rank = one(dataset, world_size=2, rank=0, batch_size=1)
    shares = {frozenset(keys(rank)) for _ in range(4)}
    assert len(shares) == 4


@pytest.mark.parametrize(("world", "batch_size"), [(1, 23), (1, 7), (2, 4), (3, 8), (5, 2), (30, 4)])
def test_evaluation_covers_each_sample_exactly_once_over_the_ranks(
    dataset: LocalDataset, world: int, batch_size: int
) -> None:
    ranks = [one(dataset, world_size=world, rank=rank, batch_size=batch_size, train=False) for rank in range(world)]
    expected = [sample.key for sample in make_samples(COUNT, frames=[0, 1])]
    for _ in range(2):
        parts = [[batch.keys for batch in rank] for rank in ranks]
        assert [len(part) for part in parts] == [len(rank) for rank in ranks]
        assert list(chain.from_iterable(chain.from_iterable(parts))) == expected


def test_an_epoch_left_in_the_middle_goes_on_where_it_was(dataset: LocalDataset) -> None:
    whole = one(dataset)
    expected = [batch.keys for batch in whole]
    batches = one(dataset)
    found = [next(iter(batches)).keys for _ in range(2)]
    assert (batches.epoch, batches.step) == (0, 2)
    assert found + [batch.keys for batch in batches] == expected


def test_gradient_accumulation_gets_whole_groups(dataset: LocalDataset) -> None:
    batches = one(dataset, batch_size=2, accumulate=4)
    assert len(batches) == 8
    assert [len(list(batches)) for _ in range(3)] == [8, 8, 8]


def test_fewer_samples_than_a_step_make_an_epoch_of_no_steps(dataset: LocalDataset) -> None:
    batches = one(dataset, batch_size=24)
    assert len(batches) == 0
    assert list(batches) == []


def test_reading_leaves_torchs_threads_as_they_are(dataset: LocalDataset) -> None:
    """Batches are made on a thread without OpenMP's help; neither this thread nor a new one may lose it."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        host_threads.cache_clear()
        next(iter(one(dataset)))
        assert host_threads().batch.submit(torch.get_num_threads).result() == 1
        together = Barrier(cores())

        def ask() -> int:
            together.wait()
            return torch.get_num_threads()

        assert {thread.result() for thread in [host_threads().images.submit(ask) for _ in range(cores())]} == {1}
        assert torch.get_num_threads() == 3
        with ThreadPoolExecutor(1) as fresh:
            assert fresh.submit(torch.get_num_threads).result() == 3
    finally:
        torch.set_num_threads(before)


def test_the_order_does_not_depend_on_how_much_is_read_at_once(
    dataset: LocalDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    def orders() -> list[list[str]]:
        batches = one(dataset, batch_size=2)
        return [keys(batches) for _ in range(3)]

    expected = orders()
    for ahead in (1, 4, 6, 22):
        monkeypatch.setattr(md2.pipeline, "SAMPLES_AHEAD", ahead)
        assert orders() == expected


@pytest.mark.parametrize(
    ("files", "own", "quota"),
    [
        ({"cpu.max": "max 100000"}, "0::/", inf),
        ({"cpu.max": "250000 100000"}, "0::/", 2.5),
        ({"a/cpu.max": "max 100000", "a/b/cpu.max": "150000 100000"}, "0::/a/b", 1.5),
        ({"a/cpu.max": "50000 100000", "a/b/cpu.max": "150000 100000"}, "0::/a/b", 0.5),
        ({"cpu.max": "200000 100000"}, "0::/kubepods/known/to/the/host/alone", 2),
        (
            {"cpu,cpuacct/x/cpu.cfs_quota_us": "300000", "cpu,cpuacct/x/cpu.cfs_period_us": "100000"},
            "4:cpu,cpuacct:/x",
            3,
        ),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, "1:cpu:/", inf),
        ({"cpu.max": "rubbish"}, "0::/", inf),
        ({}, "", inf),
    ],
)
def test_a_containers_share_of_the_cores_is_read(tmp_path: Path, files: dict[str, str], own: str, quota: float) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    (tmp_path / "own").write_text(own + "\n" if own else "")
    assert cpu_quota(tmp_path, tmp_path / "own") == quota


def test_threads_keep_to_a_containers_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(md2.data.cpu.os, "sched_getaffinity", lambda _: set(range(16)))
    monkeypatch.setattr(md2.data.cpu, "cpu_quota", lambda: 2.5)
    monkeypatch.setattr(md2.data.cpu, "threads_that_fit", lambda: inf)
    assert cores() == 3
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert cores() == 1
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    monkeypatch.setattr(md2.data.cpu, "threads_that_fit", lambda: 1.75)
    assert cores() == 1


def test_threads_are_a_core_each_and_few_where_the_gpu_decodes(monkeypatch: pytest.MonkeyPatch) -> None:
    """nvJPEG's decoders, one for each image of a sample, have as many threads again, each with memory of its own."""
    monkeypatch.setattr(md2.data.cpu, "cores", lambda: 64)
    assert (default_threads("cpu"), default_threads("gpu")) == (64, 8)
    monkeypatch.setattr(md2.data.cpu, "cores", lambda: 2)
    assert (default_threads("cpu"), default_threads("gpu")) == (2, 2)
