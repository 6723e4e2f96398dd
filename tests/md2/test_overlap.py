"""The leak audit: images that a model was evaluated on, and trained on."""

from __future__ import annotations

import json
from pathlib import Path

from evaluation_data import constant, measured, pack_truth, tiny_checkpoint, tiny_config
from prep_data import command

from md2.evaluation.overlap import Overlap, training_overlap
from shards.manage import difference


def key(frame: int, side: str = "l", drive: str = "2011_09_26_drive_0001_sync") -> str:
    return f"{drive}_{side}_{frame:010d}"


def test_targets_neighbours_partners_and_drives_are_counted_apart(tmp_path: Path) -> None:
    """Training has frames 10 and 20 of the left camera. Frame 11 is a neighbour, frame 20 right the stereo partner."""
    train = [key(10), key(20)]
    pack_truth(tmp_path / "train", [constant(5)] * 2, part="train", split="own", keys=train)
    tested = [key(10), key(11), key(12), key(20, "r"), key(10, drive="2011_09_28_drive_0002_sync")]
    mono = tiny_config(data={"url": str(tmp_path / "train")}).data
    assert training_overlap(tested, mono) == Overlap(images=5, targets=1, seen=2, drives=4)
    stereo = tiny_config(stereo=True, data={"url": str(tmp_path / "train")}).data
    assert training_overlap(tested, stereo) == Overlap(images=5, targets=1, seen=2, drives=4)
    both = stereo.model_copy(update={"frames": [0, -1, 1]})
    assert training_overlap(tested, both) == Overlap(images=5, targets=1, seen=3, drives=4)
    assert training_overlap(tested[-1:], mono) == Overlap(images=1, targets=0, seen=0, drives=0)


def test_a_dataset_that_is_elsewhere_gives_no_answer(tmp_path: Path) -> None:
    pack_truth(tmp_path / "test", [constant(5)])
    for url in ("s3://nowhere/x", str(tmp_path / "gone"), str(tmp_path / "test")):
        assert training_overlap([key(1)], tiny_config(data={"url": url}).data) is None


def test_the_evaluation_says_it(tmp_path: Path) -> None:
    train = pack_truth(tmp_path / "train", [constant(5)] * 2, part="train", split="own", keys=[key(1), key(5)])
    test = pack_truth(tmp_path / "test", [constant(5)] * 3, keys=[key(5), key(6), key(9)])
    model = tiny_checkpoint(tmp_path / "m.pt", tiny_config(data={"url": str(train)}))
    report = measured(test, model=str(model), json_file=tmp_path / "e.json")
    (warning,) = report.warnings
    assert warning.startswith("training used 2 of the 3 images (1 as target frame), and drives of 3: ")
    assert json.loads((tmp_path / "e.json").read_text())["training_overlap"] == vars(report.overlap)


def test_diff_says_what_two_datasets_hold_and_where_one_trains_on_the_others_test_images(tmp_path: Path) -> None:
    train = pack_truth(tmp_path / "train", [constant(5)] * 3, part="train", split="own", keys=[key(1), key(5), key(8)])
    test = pack_truth(tmp_path / "test", [constant(5)] * 3, keys=[key(5), key(6), key(30)])
    found = difference(str(test), str(train))
    assert found.samples == {"test": (0, 3, 0), "train": (0, 0, 3)}
    assert found.settings["split"] != found.settings["split"][::-1]
    (leak,) = found.leaks
    assert (leak.train, leak.part, leak.images, leak.targets) == (str(train), "test", 3, 1)
    done = command("shards", "diff", "test", "train", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "B's part train uses" in done.stdout and "(1 as target frame)" in done.stdout
    same = difference(str(train), str(train))
    assert (same.settings, same.samples, same.leaks) == ({}, {"train": (3, 0, 0)}, [])
