"""A loader's state, taken anywhere, goes on bit for bit in another process; where it would not, it is refused."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from pipeline_data import config, loader, make_samples, pack

import md2.data.dali
import md2.pipeline
from md2.data.batch import Batch
from md2.data.dali import fn
from md2.data.reader_state import transplant
from md2.pipeline import Loader
from shards.dataset import LocalDataset, open_dataset
from shards.errors import UsageError

STEPS = 5
OF_THE_LOADER = ("batch_size", "seed", "rank", "world", "train", "accumulate")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> LocalDataset:
    return pack(tmp_path_factory.mktemp("resume") / "data", make_samples(23, stereo=True), stereo=True)


def make(dataset: LocalDataset, *, state: Any = None, **changes: Any) -> Loader:
    settings = {"stereo": True, "flip": True, "color_jitter": True, "shuffle_buffer": 8}
    arguments = {name: changes.pop(name) for name in OF_THE_LOADER if name in changes}
    return loader(dataset, config(**{**settings, **changes}), state=state, **arguments)


def digest(batch: Batch) -> str:
    """Of everything in a batch: keys, pixels of every image, jittered ones too, camera and baseline."""
    found = hashlib.sha256(" ".join(batch.keys).encode())
    assert batch.stereo is not None
    for tensor in (*batch.images.values(), *batch.augmented.values(), batch.intrinsics, batch.stereo):
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
            here = make(dataset, rank=rank, world=2, batch_size=2)
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
        ({"batch_size": 3}, "batch_size was 4, is 3"),
        ({"shuffle_buffer": 9}, "shuffle_buffer was 8, is 9"),
        ({"world": 2}, "world was 1, is 2"),
        ({"seed": 1}, "seed was 0, is 1"),
        ({"flip": False}, "flip was True, is False"),
        ({"color_jitter": False}, "color_jitter was True, is False"),
        ({"frames": [0, 1]}, "components was"),
        ({"stereo": False}, "components was"),
        ({"width": 64}, r"size was \[96, 64\], is \[64, 64\]"),
        ({"train": False}, "train was True, is False"),
        ({"accumulate": 2}, "steps was 5, is 4"),
    ],
)
def test_a_state_that_would_give_another_order_is_refused(
    dataset: LocalDataset, changes: dict[str, Any], message: str
) -> None:
    state = make(dataset).state()
    make(dataset, state=state)
    with pytest.raises(UsageError, match=message):
        make(dataset, state=state, **changes)


def test_another_ranks_state_is_refused(dataset: LocalDataset) -> None:
    state = make(dataset, rank=0, world=2).state()
    with pytest.raises(UsageError, match="rank was 0, is 1"):
        make(dataset, rank=1, world=2, state=state)


def test_a_state_knows_its_epoch(dataset: LocalDataset) -> None:
    here = make(dataset)
    take(here, 7)
    there = make(dataset, state=here.state())
    assert (there.epoch, there.step) == (here.epoch, here.step) == (1, 2)


def test_another_dataset_is_refused(dataset: LocalDataset, tmp_path: Path) -> None:
    other = pack(tmp_path / "other", make_samples(23, seed=1, stereo=True), stereo=True)
    with pytest.raises(UsageError, match="shards was"):
        make(other, state=make(dataset).state())


def test_the_same_dataset_elsewhere_is_not_refused(dataset: LocalDataset, tmp_path: Path) -> None:
    here = make(dataset)
    take(here, 2)
    moved = pack(tmp_path / "moved", make_samples(23, stereo=True), stereo=True)
    assert take(make(moved, state=here.state()), 4) == take(here, 4)


def test_a_state_from_reading_another_number_at_once_is_refused(
    dataset: LocalDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = make(dataset).state()
    monkeypatch.setattr(md2.pipeline, "SAMPLES_AHEAD", 8)
    with pytest.raises(UsageError, match="batches_ahead was 6, is 2"):
        make(dataset, state=state)


@pytest.mark.parametrize("taken", [0, 3, 5, 9])
def test_a_state_goes_on_where_images_go_through_other_operators(
    dataset: LocalDataset, monkeypatch: pytest.MonkeyPatch, taken: int
) -> None:
    """As on another device. DALI itself refuses the state there, and the reader is built with it all the same."""
    here = make(dataset)
    take(here, taken)
    state = here.state()
    expected = take(here, 6)
    images = md2.data.dali._images
    monkeypatch.setattr(md2.data.dali, "_images", lambda *given: [fn.copy(image) for image in images(*given)])
    refused: list[RuntimeError] = []
    go_on = md2.data.dali._go_on

    def watched(start: Any, checkpoint: bytes) -> Any:
        with pytest.raises(RuntimeError) as raised:
            start(checkpoint)
        refused.append(raised.value)
        return go_on(start, checkpoint)

    monkeypatch.setattr(md2.data.dali, "_go_on", watched)
    assert take(make(dataset, state=state), 6) == expected
    assert len(refused) == 1


def test_a_state_is_not_transplanted_where_part_of_it_would_be_lost(dataset: LocalDataset) -> None:
    with_draws, without = make(dataset).state()["reader"], make(dataset, color_jitter=False).state()["reader"]
    with pytest.raises(ValueError, match="takes the state of jitter, draws"):
        transplant(with_draws, without)
    for broken in (with_draws[:-3], with_draws[: len(with_draws) // 2], b"\x0b" + with_draws):
        with pytest.raises(ValueError, match="checkpoint of DALI's"):
            transplant(broken, with_draws)
    assert transplant(with_draws, with_draws) == with_draws


@pytest.mark.gpu
@pytest.mark.parametrize("decode", ["cpu", "gpu"])
def test_a_state_from_the_cpu_goes_on_on_the_gpu_and_back(dataset: LocalDataset, decode: str) -> None:
    def keys(batches: Loader) -> list[list[str]]:
        return [batch.keys for _, batch in zip(range(2), batches, strict=False)]

    settings = config(stereo=True, flip=True, color_jitter=True, shuffle_buffer=8, device=decode)
    here = make(dataset)
    take(here, 1)
    there = loader(dataset, settings, state=here.state(), device=torch.device("cuda"))
    assert keys(there) == keys(here)
    assert keys(make(dataset, state=there.state())) == keys(here)


if __name__ == "__main__":
    md2.pipeline.SAMPLES_AHEAD = int(sys.argv[3])
    for file in sorted(Path(sys.argv[2]).glob("*.pt")):
        saved = torch.load(file, weights_only=True)
        restored = make(open_dataset(sys.argv[1]), state=saved, rank=int(file.name[0]), world=2, batch_size=2)
        print("\n".join(take(restored, 6)))
