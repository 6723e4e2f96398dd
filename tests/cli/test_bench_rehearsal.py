"""The rehearsal's own arithmetic: what its tree holds, what a share keeps, what a speed means."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.rehearsal import Step, link_tree, unique_frames, write_share
from prep.packing.plan import make_plan
from prep.raw.files import RawData
from prep.raw.kitti import Kitti
from prep.raw.splits import read_split
from prep.request import make_content

DRIVES = ("2011_09_26/2011_09_26_drive_0022_sync", "2011_10_03/2011_10_03_drive_0034_sync")


def test_the_tree_has_all_that_the_lists_need_and_a_share_keeps_the_first_frames(drive: Path, tmp_path: Path) -> None:
    split = tmp_path / "lists" / "street"
    split.mkdir(parents=True)
    for part, side in (("train", "l"), ("val", "r")):
        lines = [f"{name} {frame} {side}" for name in DRIVES for frame in range(1, 41)]
        (split / f"{part}_files.txt").write_text("\n".join(lines) + "\n")
    lists = read_split(str(split))
    assert link_tree(drive, tmp_path / "raw", lists) == (2 * 2 * 42, 2 * 42)
    assert link_tree(drive, tmp_path / "raw", lists) == (2 * 2 * 42, 2 * 42), "used again"
    content = make_content(lists)
    plan = make_plan(lists, Kitti(RawData([str(tmp_path / "raw")], follow_links=True), content.depth), content)
    assert (plan.total, plan.skipped, plan.images) == (160, [], unique_frames(lists))

    whole = read_split(str(write_share(lists, 1, tmp_path / "whole" / "street")))
    assert (whole.sha256, whole.name) == (lists.sha256, "street")
    quarter = read_split(str(write_share(lists, 0.25, tmp_path / "quarter" / "street")))
    assert {part: len(lines) for part, lines in quarter.parts.items()} == {"train": 20, "val": 20}
    assert max(line.frame for line in quarter.parts["train"]) == 10


def test_speed_is_that_of_the_first_and_the_last_fifth() -> None:
    """100 frames at 10 a second after 5 seconds of start, then 100 at 5 a second with twice the CPU, then the end."""
    looks = [(0.0, 0.0, 0.0), (5.0, 1.0, 0.0)]
    looks += [(5 + number, 1 + number, 10.0 * number) for number in range(1, 11)]
    looks += [(15 + 2 * number, 11 + 4 * number, 100 + 10.0 * number) for number in range(1, 11)]
    step = Step(seen=[*looks, (60.0, 60.0, 200.0)])
    assert step.speed(0, 0.2) == "10, 10"
    assert step.speed(0.8, 1) == "5, 2"
    step.count(400)  # as if it had been seen in another unit
    assert step.speed(0.8, 1) == "10, 5"
    assert Step(seen=[(0.0, 0.0, 0.0), (1.0, 1.0, 8.0)]).speed(0, 0.2) == "too short"


@pytest.mark.parametrize("share", ["0", "1.5"])
def test_an_impossible_share_is_refused(share: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import bench.rehearsal

    monkeypatch.setattr("sys.argv", ["rehearsal", "--share", share])
    with pytest.raises(SystemExit) as ended:
        bench.rehearsal.main()
    assert ended.value.code == 2
