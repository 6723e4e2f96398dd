"""A loader's state, taken anywhere, goes on bit for bit in another process; where it would not, it is refused."""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from pipeline_data import config, loader, make_samples, pack

import md2.pipeline
from md2.data.batch import Batch
from md2.pipeline import Loader
from shards.dataset import LocalDataset, open_dataset
from shards.errors import UsageError

STEPS = 5
OF_THE_LOADER = ("batch_size", "seed", "rank", "world_size", "train", "accumulate")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> LocalDataset:
    return pack(tmp_path_factory.mktemp("resume") / "data", make_samples(23, stereo=True), stereo=True)


def make(dataset: LocalDataset, *, state: Any = None, **changes: Any) -> Loader:
    settings = {"stereo": True, "flip": True, "color_jitter": True}
    arguments = {name: changes.pop(name) for name in OF_THE_LOADER if name in changes}
    return loader(dataset, config(**{**settings, **changes}), state=state, **arguments)


def digest(batch: Batch) -> str:
    """Of everything in a batch: keys, pixels of every image, jittered ones too, camera, baseline and seeds."""
    found = hashlib.sha256(" ".join(batch.keys).encode())
    assert batch.stereo is not None and batch.seeds is not None
    for tensor in (*batch.images.values(), *batch.augmented.values(), batch.intrinsics, batch.stereo, batch.seeds):
        found.update(tensor.contiguous().numpy().tobytes())
    return found.hexdigest()


def take(batches: Loader, count: int) -> list[str]:
    """The next batches, over the ends of epochs."""
    found: list[str] = []
    while len(found) < count:
        for batch in batches:
            found.append(digest(batch))
            if len(found) == count:
                break
    return found


@pytest.mark.parametrize("ahead", [96, 6, 2])
def test_another_process_goes_on_with_the_same_batches(
    dataset: LocalDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ahead: int
) -> None:
    """World 2, batch 2: five steps an epoch, so that some states are at its end, others in the middle of a read."""
    monkeypatch.setattr(md2.pipeline, "SAMPLES_AHEAD", ahead)
    expected = []
    for rank in (0, 1):
        for taken in (0, 1, 3, 5, 9):
            here = make(dataset, rank=rank, world_size=2, batch_size=2)
            take(here, taken)
            torch.save(here.state(), tmp_path / f"{rank}-{taken}.pt")
            expected += take(here, 6)
    assert len(set(expected)) > 20
    command = [sys.executable, __file__, str(dataset.folder), str(tmp_path), str(ahead)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == expected


def test_state_does_not_depend_on_what_is_prefetched_and_threads_may_change(dataset: LocalDataset) -> None:
    here = make(dataset, threads=1, prefetch=1)
    take(here, 3)
    state = here.state()
    assert take(make(dataset, threads=2, prefetch=4, state=state), 7) == take(here, 7)


def test_uncompressed_images_come_as_lossless_ones_do_and_go_on_alike(tmp_path: Path) -> None:
    """Another way through DALI, the same order, flips and colours; bit for bit, and after a state as well."""
    png, ppm = (
        pack(tmp_path / codec, make_samples(23, stereo=True, codec=codec), stereo=True, codec=codec)
        for codec in ("png", "ppm")
    )
    expected = take(make(png), 12)
    here = make(ppm)
    assert take(here, 3) == expected[:3]
    state = here.state()
    assert take(here, 9) == expected[3:]
    assert take(make(ppm, state=state), 9) == expected[3:]


def test_state_is_small_and_loads_without_running_code(dataset: LocalDataset) -> None:
    here = make(dataset)
    take(here, 3)
    buffer = BytesIO()
    torch.save(here.state(), buffer)
    assert buffer.tell() < 10_000
    buffer.seek(0)
    assert torch.load(buffer, weights_only=True) == here.state()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shuffle": "global"}, "shuffle was window of 8 shards, is global"),
        ({"seed": 1}, "seed was 0, is 1"),
        ({"flip": False}, "flip was True, is False"),
        ({"color_jitter": False}, "color_jitter was True, is False"),
        ({"frames": [0, 1]}, "components was"),
        ({"stereo": False}, "components was"),
        ({"width": 64}, r"size was \[96, 64\], is \[64, 64\]"),
        ({"train": False}, "train was True, is False"),
    ],
)
def test_a_state_that_would_give_another_order_is_refused(
    dataset: LocalDataset, changes: dict[str, Any], message: str
) -> None:
    state = make(dataset).state()
    make(dataset, state=state)
    with pytest.raises(UsageError, match=message):
        make(dataset, state=state, **changes)


def test_a_state_knows_its_epoch(dataset: LocalDataset) -> None:
    here = make(dataset)
    take(here, 7)
    there = make(dataset, state=here.state())
    assert (there.epoch, there.taken) == (here.epoch, here.taken) == (1, 8)


def test_another_dataset_is_refused(dataset: LocalDataset, tmp_path: Path) -> None:
    other = pack(tmp_path / "other", make_samples(23, seed=1, stereo=True), stereo=True)
    with pytest.raises(UsageError, match="shards was"):
        make(other, state=make(dataset).state())


def test_the_same_dataset_elsewhere_is_not_refused(dataset: LocalDataset, tmp_path: Path) -> None:
    here = make(dataset)
    take(here, 2)
    moved = pack(tmp_path / "moved", make_samples(23, stereo=True), stereo=True)
    assert take(make(moved, state=here.state()), 4) == take(here, 4)


def test_how_much_is_read_at_once_may_change(dataset: LocalDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    here = make(dataset)
    take(here, 3)
    state = here.state()
    monkeypatch.setattr(md2.pipeline, "SAMPLES_AHEAD", 8)
    assert take(make(dataset, state=state), 6) == take(here, 6)


def samples(batches: Loader, count: int) -> list[tuple[str, float, int, bytes]]:
    """Of the next batches, sample by sample: key, baseline (its sign is the flip), seed and the jittered image."""
    found: list[tuple[str, float, int, bytes]] = []
    while count:
        for batch in batches:
            assert batch.stereo is not None and batch.seeds is not None
            shifts, images = batch.stereo[:, 0, 3].tolist(), batch.augmented[0].contiguous().numpy()
            parts = zip(batch.keys, shifts, batch.seeds.tolist(), images, strict=True)
            found += [(key, shift, seed, image.tobytes()) for key, shift, seed, image in parts]
            if not (count := count - 1):
                break
    return found


def steps(dataset: LocalDataset, state: Any, count: int, world: int, batch: int, accumulate: int) -> tuple[Any, Any]:
    """The samples of the next steps, all ranks together and in their order, and the state behind them."""
    shared = {"world_size": world, "batch_size": batch, "accumulate": accumulate, "state": state}
    ranks = [make(dataset, rank=rank, **shared) for rank in range(world)]
    found = []
    for _ in range(count):
        for rank in ranks:
            found += samples(rank, accumulate)
    (after,) = {str(rank.state()): rank.state() for rank in ranks}.values()
    return found, after


@pytest.mark.parametrize("way", [(1, 4, 1), (2, 2, 1), (4, 1, 1), (1, 1, 4), (2, 1, 2)])
def test_a_steps_samples_and_draws_are_the_same_on_any_number_of_ranks(
    dataset: LocalDataset, way: tuple[int, int, int]
) -> None:
    expected, state = steps(dataset, None, 7, 1, 4, 1)
    assert len({key for key, *_ in expected[:20]}) == 20
    assert len({seed for _, _, seed, _ in expected}) == 28, "each epoch draws anew"
    assert steps(dataset, None, 7, *way) == (expected, state)
    first, middle = steps(dataset, None, 3, *way)
    rest, end = steps(dataset, middle, 4, 1, 4, 1)
    assert (first + rest, end) == (expected, state)
    assert make(dataset, state=middle).note is None


def test_a_samples_seed_is_the_same_in_every_evaluation(dataset: LocalDataset) -> None:
    def seeds(**changes: Any) -> dict[str, int]:
        batches = [batch for batch in make(dataset, train=False, **changes) if batch.seeds is not None]
        return {k: s for batch in batches for k, s in zip(batch.keys, batch.seeds.tolist(), strict=True)}  # type: ignore[union-attr]

    expected = seeds(batch_size=4)
    assert len(set(expected.values())) == 23
    assert seeds(rank=0, world_size=2, batch_size=3) | seeds(rank=1, world_size=2, batch_size=5) == expected


def test_with_other_steps_a_loader_continues_at_the_same_place_and_says_so(dataset: LocalDataset) -> None:
    whole, _ = steps(dataset, None, 23, 1, 1, 1)
    first, middle = steps(dataset, None, 3, 2, 2, 1)
    there = make(dataset, state=middle, batch_size=3)
    assert there.note is not None
    assert re.search("took 4 samples and now takes 3: epoch 1 continues behind its first 12 samples", there.note)
    assert (there.left, len(there), there.left_out) == (3, 7, 2)
    assert first + samples(there, 3) == whole[:21]
    assert (there.left, there.epoch) == (0, 0)
    assert there.state()["samples"] == 21


@pytest.mark.parametrize(("step", "begins"), [(0, 3), (2, 3), (5, 4)])
def test_a_state_of_dalis_reader_continues_at_the_beginning_of_its_epoch(
    dataset: LocalDataset, step: int, begins: int
) -> None:
    here = make(dataset)
    kept = ("part", "shards", "seed", "train", "components", "size", "flip", "color_jitter")
    fingerprint = {name: here.state()["fingerprint"][name] for name in kept}
    fingerprint |= {"batch_size": 4, "steps": 5, "batches_ahead": 6, "rank": 0, "world": 2, "shuffle_buffer": 1024}
    old = {"fingerprint": fingerprint, "epoch": 3, "step": step, "reader": b"protobuf"}
    there = make(dataset, state=old)
    assert (there.note is None) == (begins == 4)
    assert there.note is None or re.search("earlier md2.*epoch 4 starts again", there.note)
    fresh = make(dataset, state={**here.state(), "epoch": begins})
    assert take(there, 3) == take(fresh, 3)
    with pytest.raises(UsageError, match="seed was 0, is 1"):
        make(dataset, state=old, seed=1)


@pytest.mark.parametrize(
    "change",
    [{"epoch": -1}, {"samples": 10**9}, {"samples": -1}, {"samples": "x"}, {"fingerprint": None}, {"epoch": None}],
)
def test_a_state_that_no_loader_made_is_refused(dataset: LocalDataset, change: dict[str, Any]) -> None:
    state = make(dataset).state()
    with pytest.raises(UsageError, match="start a new run"):
        make(dataset, state={**state, **change})
    for name in state:
        with pytest.raises(UsageError, match="start a new run"):
            make(dataset, state={key: value for key, value in state.items() if key != name})


@pytest.mark.gpu
@pytest.mark.parametrize("decode", ["cpu", "gpu"])
def test_a_state_from_the_cpu_goes_on_on_the_gpu_and_back(dataset: LocalDataset, decode: str) -> None:
    def keys(batches: Loader) -> list[list[str]]:
        return [batch.keys for _, batch in zip(range(2), batches, strict=False)]

    settings = config(stereo=True, flip=True, color_jitter=True, device=decode)
    here = make(dataset)
    take(here, 1)
    there = loader(dataset, settings, state=here.state(), device=torch.device("cuda"))
    assert keys(there) == keys(here)
    assert keys(make(dataset, state=there.state())) == keys(here)


if __name__ == "__main__":
    md2.pipeline.SAMPLES_AHEAD = int(sys.argv[3])
    for file in sorted(Path(sys.argv[2]).glob("*.pt")):
        saved = torch.load(file, weights_only=True)
        restored = make(open_dataset(sys.argv[1]), state=saved, rank=int(file.name[0]), world_size=2, batch_size=2)
        print("\n".join(take(restored, 6)))
