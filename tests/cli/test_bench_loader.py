"""The loader's benchmark: its tables, and that the other loaders give the same batches as md2's."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image

from bench.data import numbered_dataset
from bench.loader import NEEDS, ROWS, Row, table
from bench.peers import ROWS as PEERS
from bench.peers import Task
from bench.what_if import Rate, predicted, sentence, what_if
from shards.dataset import open_dataset
from shards.tar import read_samples

ROOT = Path(__file__).resolve().parents[2]
BATCHES = """
import sys, torch
from itertools import islice
from bench.peers import ROWS, Task, store_for_litdata
from bench.turn import end
row, folder, out = sys.argv[1:]
task = Task(folder, lit=folder + "-lit", jitter=True, batch=8, threads=2)
if row == "litdata":
    store_for_litdata(task.folder, task.lit)
torch.save([tuple(batch) for batch in islice(ROWS[row](task)[0], 4)], out)
end()
"""


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)


@pytest.mark.parametrize("row", [row for row in ROWS if row not in ("floor", "plain")])
def test_every_loader_gives_the_same_images_flipped_and_jittered_alike(row: str, tmp_path: Path) -> None:
    """Against Pillow's decoder; the sample is known by its fx, the flip by its cx."""
    if missing := [name for name in NEEDS.get(row, ()) if find_spec(name) is None]:
        pytest.skip(f"{', '.join(missing)} not installed: pip install -e '.[bench]'")
    folder = tmp_path / "data"
    numbered_dataset(folder, shards=2, per_shard=16)
    done = python("-c", BATCHES, row, str(folder), str(tmp_path / "batches.pt"))
    assert done.returncode == 0, done.stderr
    stored = [sample.components for tar in open_dataset(str(folder)).tars("train") for sample in read_samples(tar)]
    flips, jittered, seen = 0, 0, set()
    for images, augmented, cameras in torch.load(tmp_path / "batches.pt"):
        assert [tuple(image.shape) for image in (*images, *augmented)] == [(8, 3, 64, 96)] * 6
        for place, camera in enumerate(cameras.numpy()):
            number = round(float(camera[0, 0])) - 1
            flipped = camera[0, 2] != 40
            assert camera[0, 2] == (95 - 40 if flipped else 40)
            frames = [pixels(stored[number][f"{stem}.jpg"]) for stem in ("0", "m1", "p1")]
            plain = [image[place].permute(1, 2, 0).numpy() for image in images]
            for found, frame in zip(plain, frames, strict=True):
                np.testing.assert_allclose(found, frame[:, ::-1] if flipped else frame, atol=1.5 / 255)
            changed = [image[place].permute(1, 2, 0).numpy() for image in augmented]
            if any(np.abs(a - b).max() > 0.01 for a, b in zip(plain, changed, strict=True)):
                jittered += 1
                check_one_colour_map(plain, changed)
            flips += flipped
            seen.add(number)
    assert 4 <= flips <= 28 and 4 <= jittered <= 28  # of 32, half; outside in one run of 100,000
    assert len(seen) >= 12


def pixels(file: bytes) -> npt.NDArray[np.float64]:
    with Image.open(BytesIO(file)) as image:
        return np.asarray(image) / 255


def check_one_colour_map(plain: Sequence[npt.NDArray[np.float32]], jittered: Sequence[npt.NDArray[np.float32]]) -> None:
    """Each frame is an affine map of its colours, with the same matrix for all frames; clamped ones aside."""
    matrices = []
    for before, after in zip(plain, jittered, strict=True):
        inside = ((after > 0.02) & (after < 0.98)).all(2)
        colours = np.column_stack([before[inside], np.ones(inside.sum())])
        solved, *_ = np.linalg.lstsq(colours, after[inside], rcond=None)
        assert np.abs(colours @ solved - after[inside]).max() < 0.03
        matrices.append(solved[:3])
    for matrix in matrices[1:]:
        np.testing.assert_allclose(matrix, matrices[0], atol=0.03)


def test_the_benchmark_packs_with_prep_and_fills_its_table(drive: Path) -> None:
    small = ["--modes", "mono", "--codecs", "jpeg", "--rows", "md2,floor", "--seconds", "0.01", "--repeats", "1"]
    done = python("-m", "cli.main", "bench", "loader", str(drive), *small, "--samples", "24", "--batch", "2")
    assert done.returncode == 0, done.stderr
    assert "640x192 JPEG, even tables, chroma 4:2:0" in done.stdout
    rows = {line.split("|")[1].strip(): line.split("|")[2:-1] for line in done.stdout.splitlines() if line[:1] == "|"}
    assert all(float(cell) > 0 for cell in (*rows["md2"][:2], *rows["md2"][4:8], rows["floor"][0], *rows["floor"][2:4]))
    assert [cell.strip() for cell in rows["md2"][-2:]] == ["yes", "yes"]


def test_the_plain_loader_resizes_full_size_files(drive: Path, dataset: Path) -> None:
    paths = tuple(str(path) for path in sorted(drive.glob("*/*_0001_sync/image_02/data/*.png"))[:3])
    task = Task(str(dataset), pngs=(paths,), batch=4, threads=0)
    images, augmented, _ = next(PEERS["plain"](task)[0])
    assert len(images) == len(augmented) == 3
    for image, path in zip(images, paths, strict=True):
        with Image.open(path) as full:
            small = np.asarray(full.resize((96, 32), Image.Resampling.LANCZOS)) / 255
        for found in image.permute(0, 2, 3, 1).numpy():
            assert min(np.abs(found - small).max(), np.abs(found - small[:, ::-1]).max()) < 0.03


def test_ratios_are_of_the_same_round_and_the_floor_stands_for_both() -> None:
    ours, floor = Row("md2"), Row("floor")
    for rate, jittered, bare in ((10, 8, 20), (30, 24, 40), (5, 4, 5)):
        ours.turns[False].append({"rate": rate, "cpu": 1, "first": 0.5, "memory": 100})
        ours.turns[True].append({"rate": jittered, "cpu": 2, "first": 0.5, "memory": 100})
        floor.turns[False].append({"rate": bare, "cpu": 3, "first": 0.1, "memory": 50})
    cells = [cell.strip() for cell in table("mono", [ours, floor]).splitlines()[-1].split("|")]
    assert cells[1:6] == ["floor", "20", "", "0.75", "0.60"]


def test_an_unknown_row_is_one_line() -> None:
    done = python("-m", "cli.main", "bench", "loader", "--rows", "md2,spdll")
    assert done.returncode == 2
    assert "--rows: spdll: choose from md2, spdl" in done.stderr


@pytest.mark.parametrize(
    ("step", "loader", "seconds", "what"),
    [
        # Wall and CPU seconds on two cores; a step of 1 s that hands over for 0.1 s.
        (Rate(1.0, 1.0), Rate(0.5, 0.5, 0.1), 1.1, "the training step limits it"),
        (Rate(1.0, 0.1), Rate(2.0, 2.0, 0.1), 2.0, "the loader limits it"),
        (Rate(1.0, 2.0), Rate(0.9, 1.8, 0.1), 1.9, "the processor, which both share, limits it"),
    ],
)
def test_what_both_give_is_limited_by_the_slowest(step: Rate, loader: Rate, seconds: float, what: str) -> None:
    assert predicted(step, loader, 2) == pytest.approx(seconds)
    said = sentence(step, {2: loader}, 2, 2)
    assert f"takes {1 / seconds:.2f} steps/s, {1 / seconds:.0%} of what the step alone would: {what}" in said


def test_more_or_fewer_threads_are_advised_where_they_pay() -> None:
    step, loaders = Rate(1.0, 0.1), {1: Rate(4.0, 4.0), 2: Rate(2.0, 4.0), 8: Rate(0.5, 4.0)}
    assert sentence(step, loaders, 2, 16).endswith("the loader limits it, and data.threads=8 would give 1.00.")
    assert sentence(step, loaders, 8, 16).endswith(
        "the training step limits it, and more decoding threads would not help."
    )


@pytest.mark.usefixtures("narrow")
def test_what_if_measures_step_loader_and_both(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("md2.pipeline.SAMPLES_AHEAD", 2)
    small = ["model.weights=scratch", "data.width=96", "data.height=64", "train.batch_size=2", "train.device=cpu"]
    text = what_if(str(dataset), "stereo", [*small, "data.threads=2"], 0.01)
    rows = [line.split("|")[1:3] for line in text.splitlines() if line.startswith("|")][2:]
    assert [name.strip() for name, _ in rows] == [
        "training step alone",
        "loader alone, 1 thread",
        "loader alone, 2 threads",
        "both, 1 thread, predicted",
        "both, 2 threads, predicted",
        "both, 2 threads, measured",
    ]
    assert all(float(rate.split()[0]) > 0 for _, rate in rows)
    assert text.count("training takes ") == 1
