"""Calibration files, split lists and pose files in the forms of other tools."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prep_data import DATE, DRIVE, odometry_raw, read_part, run_pack, write_split

from prep.raw.calibration import read_raw_calibration
from prep.raw.kitti import open_sequence
from prep.raw.poses import parse_poses, read_poses
from prep.raw.splits import SplitLine, parse_line, part_of, read_split
from shards.errors import InputError

LINES = [f"{DATE}/{DRIVE} {n} {s}" for n in (2, 3) for s in "lr"]


def test_calibration_in_utf_16_is_read(drive: Path) -> None:
    text = {name: (drive / DATE / name).read_text() for name in ("calib_cam_to_cam.txt", "calib_velo_to_cam.txt")}
    plain, wide = (
        read_raw_calibration(DATE, lambda path, e=encoding: text[path.split("/")[1]].encode(e), depth=True)
        for encoding in ("utf-8", "utf-16")
    )
    np.testing.assert_array_equal(plain.lidar_projection("l"), wide.lidar_projection("l"))


def test_normalised_intrinsics_in_kittis_files_are_refused(drive: Path) -> None:
    text = (drive / DATE / "calib_cam_to_cam.txt").read_text()
    line = next(row for row in text.splitlines() if row.startswith("P_rect_02"))
    other = text.replace(line, "P_rect_02: 5.8e-01 0 5.0e-01 0 0 1.92 5.0e-01 0 0 0 1 0")
    with pytest.raises(InputError, match=r"line 'P_rect_02:': .*normalised; in pixels they are fx: 111.36"):
        read_raw_calibration(DATE, lambda path: other.encode(), depth=False)


D = f"{DATE}/{DATE}_drive_0002_sync"


@pytest.mark.parametrize(
    ("row", "line"),
    [
        (f"{D} 69 l", SplitLine(D, 69, "l")),
        (f"{D}/ 0000000069 3", SplitLine(D, 69, "r")),
        (f"{D}/image_02/data/0000000069.png {D}/image_03/data/0000000069.png", SplitLine(D, 69, "l")),  # Monodepth
        (f"{D}/image_02/data/0000000069.jpg", SplitLine(D, 69, "l")),
        (f"/data/kitti/{D}/image_03/data/0000000069.png x/y.png 721.5377", SplitLine(D, 69, "r")),  # BTS
        (f"{DATE}_drive_0002_sync_03 0000000069", SplitLine(D, 69, "r")),  # SfMLearner
        (f"/{D}/image_02/data/0000000069.png None 721.5377", SplitLine(D, 69, "l")),  # BTS, without ground truth
        (f"{D}/proj_depth/velodyne/image_03/0000000069.npz", SplitLine(D, 69, "r")),  # PackNet
        (f"train/{DATE}_drive_0002_sync/proj_depth/groundtruth/image_02/0000000069.png", SplitLine(D, 69, "l")),
        (f"{DATE}_drive_0002_sync/image_02/data/0000000069.png,x.png", SplitLine(D, 69, "l")),
        (D.replace("/", "\\") + "\\image_02\\data\\0000000069.png", SplitLine(D, 69, "l")),
        ("dataset/sequences/09/image_3/000012.png", SplitLine("9", 12, "r")),
        ("two words 5 r", SplitLine("two words", 5, "r")),
        (f"{D}/image_00/data/0000000069.png", None),
        ("image 0", None),
        ("drive 5 L", None),
        ("drive five l", None),
    ],
)
def test_lists_of_other_projects(row: str, line: SplitLine | None) -> None:
    assert parse_line(row) == line


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=200), st.integers(0, 10**10 - 1), st.sampled_from("lr"))
def test_any_drive_name_survives_a_list(name: str, number: int, side: str) -> None:
    name = " ".join(name.split()).strip("/")
    line = parse_line(f"{name} {number} {side}")
    if name and not name.endswith("/"):
        assert line is not None
        assert (line.drive.rstrip("/"), line.frame, line.side) == (name, number, side)


def test_a_line_of_a_million_spaces_takes_no_time(tmp_path: Path) -> None:
    path = tmp_path / "train_files.txt"
    path.write_text("a" + " " * 1_000_000 + "b\n" + LINES[0] + "\n" + "x" + " 1" * 500_000 + " l\n")
    lists = read_split(str(path))
    assert [len(lists.parts["train"]), len(lists.bad["train"])] == [1, 2]
    assert len(str(lists.bad["train"][0])) < 400


def test_lists_as_windows_and_macos_leave_them(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "train_files.txt").write_bytes("\r\n".join(LINES).encode("utf-16"))
    (folder / "val_files.txt").write_bytes("\r\n".join(LINES[:1]).encode("utf-16-le"))
    (folder / "._train_files.txt").write_bytes(b"\0\5\26\7")
    lists = read_split(str(folder))
    assert {part: len(lines) for part, lines in lists.parts.items()} == {"train": 4, "val": 1}
    assert not any(lists.bad.values())
    assert lists.parts["train"][0] == SplitLine(f"{DATE}/{DRIVE}", 2, "l")


def test_parts_of_lists_that_carry_the_splits_name(tmp_path: Path) -> None:
    assert [part_of(Path(f"{name}.txt")) for name in ("eigen_train_files", "kitti_val_files", "test_files_09")] == [
        "train",
        "val",
        "test_09",
    ]
    write_split(tmp_path, LINES[0])
    (tmp_path / "eigen_train_files.txt").write_text(LINES[1])
    with pytest.raises(InputError, match=r"a second list for the part train"):
        read_split(str(tmp_path))


def poses() -> np.ndarray:
    """Two rigid transforms: the identity, and a quarter turn about y with a shift."""
    turn = np.array([[0.0, 0, 1, 1], [0, 1, 0, 2], [-1, 0, 0, 3]])
    return np.stack([np.eye(4)[:3], turn])


def rows(values: np.ndarray, *, index: bool = False) -> bytes:
    lines = [" ".join(map(str, row.ravel())) for row in values]
    return "".join(f"{n} {line}\n" if index else f"{line}\n" for n, line in enumerate(lines)).encode()


HALF = 0.5**0.5
WHOLE = np.concatenate([poses(), np.tile([[[0.0, 0, 0, 1]]], (2, 1, 1))], axis=1)


@pytest.mark.parametrize(
    "data",
    [
        rows(poses()),
        rows(poses()).replace(b"\n", b"\r\n\r\n") + b"\n\n",
        b"# poses\n" + rows(poses()),
        rows(poses(), index=True),
        rows(WHOLE),
        rows(WHOLE, index=True),
        "\n".join(" ".join(map(str, row)) for row in WHOLE.reshape(-1, 4)).encode(),
        f"1.5 0 0 0 0 0 0 1\n2.5 1 2 3 0 {HALF} 0 {HALF}\n".encode(),
        rows(poses()).replace(b" ", b", "),
        rows(poses()).decode().encode("utf-16"),
    ],
)
def test_pose_files_of_all_forms(data: bytes, tmp_path: Path) -> None:
    np.testing.assert_allclose(parse_poses(data, "p.txt"), poses(), atol=1e-9)
    (tmp_path / "p.txt").write_bytes(data)
    np.testing.assert_allclose(read_poses(tmp_path / "p.txt"), poses(), atol=1e-9)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "no poses in it"),
        (b"1 0 0 0 0 1 0 0 0 0 1 0\n1 2 3\n", r"p\.txt:2: 3 numbers, but 12 in the first line"),
        (b"1 2 3\n", r"p\.txt:1: 3 numbers"),
        (b"1 0 0 0 0 1 0 0 0 0 1 x\n", r"p\.txt:1: not numbers"),
        (b"1 0 0 0 0 1 0 0 0 0 1 nan\n", r"p\.txt:1: a number is not finite"),
        (b"2 0 0 0 0 1 0 0 0 0 1 0\n", r"p\.txt:1: its rotation"),
        (b"1 0 0 0 9 9 9 9\n", r"p\.txt:1: its rotation"),
        (b"0 1 0 0 0 0 1 0 0 0 0 1 0\n2 1 0 0 0 0 1 0 0 0 0 1 0\n", r"p\.txt:2: frame 2 follows frame 0"),
    ],
)
def test_malformed_pose_files_are_named(data: bytes, says: str) -> None:
    with pytest.raises(InputError, match=says):
        parse_poses(data, "p.txt")


def test_a_sequence_with_unusable_poses_is_packed_without_them(drive: Path, tmp_path: Path) -> None:
    raw = odometry_raw(drive, tmp_path / "raw")
    (raw / "poses" / "09.txt").write_text("1 2 3\n")
    run_pack(write_split(tmp_path / "s", "9 3 l"), raw, tmp_path / "out")
    assert b'"pose"' not in read_part(tmp_path / "out")[0]["meta.json"]
    with pytest.raises(InputError, match=r"poses/09\.txt:1: 3 numbers"):  # odometry needs them
        open_sequence([str(raw)], "09")
    (raw / "poses" / "09.txt").write_bytes(rows(np.tile(np.eye(4)[None, :3], (8, 1, 1))))
    mended = run_pack(write_split(tmp_path / "s", "9 3 l"), raw, tmp_path / "out")
    assert mended.url.endswith("-v2")
