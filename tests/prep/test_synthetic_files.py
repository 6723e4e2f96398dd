"""`md2 sample`: what lies where, the same bytes for the same seed, whole or not at all."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from prep.synthetic import write_drives
from prep.synthetic.write import split_lines
from shards.errors import InputError, UsageError

DATE = "2011_09_26"
TINY = {"frames": 6, "size": (64, 32)}


def digests(root: Path) -> dict[str, str]:
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_drives(tmp_path_factory.mktemp("tiny") / "raw", drives=1, seed=3, **TINY).root


def command(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "cli.main", "sample", *(str(argument) for argument in arguments)]
    environment = {**os.environ, **environment}
    return subprocess.run(line, env=environment, capture_output=True, text=True, timeout=280, check=False)


def test_every_file_of_the_layout_is_there(drive: Path) -> None:
    assert {path.name for path in (drive / DATE).iterdir() if path.is_file()} == {
        "calib_cam_to_cam.txt",
        "calib_velo_to_cam.txt",
        "calib_imu_to_velo.txt",
    }
    for name in ("2011_09_26_drive_0001_sync", "2011_09_26_drive_0002_sync"):
        folder = drive / DATE / name
        for part, ending in (
            ("image_02", "png"),
            ("image_03", "png"),
            ("velodyne_points", "bin"),
            ("oxts", "txt"),
            ("true_depth_02", "npy"),
            ("true_depth_03", "npy"),
        ):
            assert sorted(p.name for p in (folder / part / "data").iterdir()) == [
                f"{n:010d}.{ending}" for n in range(8)
            ]
        for part in ("image_02", "image_03", "velodyne_points", "oxts"):
            stamps = [np.datetime64(line) for line in (folder / part / "timestamps.txt").read_text().splitlines()]
            assert set(np.diff(stamps)) == {np.timedelta64(100, "ms")} and len(stamps) == 8
        with Image.open(folder / "image_03/data/0000000007.png") as image:
            assert (image.size, image.mode) == ((192, 64), "RGB")
    assert not list(drive.parent.glob(".*")), "nothing half-written is left"


def test_frames_differ_and_drives_differ(drive: Path) -> None:
    images = list(drive.glob("*/*/image_0*/data/*.png"))
    assert len({path.read_bytes() for path in images}) == len(images) == 32


def test_same_seed_same_bytes_whatever_renders(tiny: Path, tmp_path: Path) -> None:
    """Two worker processes, and a linear-algebra library with another number of threads, change nothing."""
    options = ["--drives", 1, "--frames", 6, "--size", "64x32", "--seed", 3]
    done = command(tmp_path / "two", *options, "--workers", 2, OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    assert f"md2 prep --split {tmp_path / 'two' / 'splits' / 'sample'} --raw {tmp_path / 'two'}" in done.stdout
    assert digests(tmp_path / "two") == digests(tiny)
    assert len(digests(tiny)) > 40


def test_another_seed_is_another_street(tiny: Path, tmp_path: Path) -> None:
    other = write_drives(tmp_path / "raw", drives=1, seed=4, lidar=False, **TINY).root
    ours, theirs = digests(tiny), digests(other)
    pixels = [name for name in theirs if name.endswith((".png", ".npy"))]
    assert len(pixels) == 24 and all(ours[name] != theirs[name] for name in pixels)
    assert not list(other.rglob("velodyne*")), "lidar=False"


def test_an_error_leaves_nothing_behind(tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        assert total == 6
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_drives(tmp_path / "raw", drives=1, progress=interrupt, **TINY)
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_leaves_nothing_behind(tmp_path: Path) -> None:
    """The terminal sends SIGINT to the whole group: the command and its workers."""
    line = [sys.executable, "-m", "cli.main", "sample", str(tmp_path / "raw"), "--frames", "200", "--size", "64x32"]
    with subprocess.Popen([*line, "--workers", "2"], stderr=subprocess.PIPE, text=True, start_new_session=True) as run:
        try:
            deadline = time.monotonic() + 60
            while not list(tmp_path.glob(".raw.*/*/*/*/data/*.png")):
                assert run.poll() is None and time.monotonic() < deadline
                time.sleep(0.05)
            os.killpg(run.pid, signal.SIGINT)
            _, messages = run.communicate(timeout=60)
        finally:
            run.kill()
    assert run.returncode == 130
    assert "Traceback" not in messages
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_is_never_touched(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match=r"raw: exists already"):
        write_drives(tmp_path / "raw", **TINY)
    assert [path.name for path in tmp_path.rglob("*")] == ["raw", "mine.txt"]
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file"):
        write_drives(tmp_path / "file" / "raw", **TINY)


@pytest.mark.parametrize(
    ("option", "value"),
    [("drives", 0), ("frames", 5), ("size", (16, 64)), ("size", (64, 16)), ("seed", -1), ("workers", 0)],
)
def test_numbers_out_of_range_are_refused(tmp_path: Path, option: str, value: object) -> None:
    with pytest.raises(UsageError, match=r"must be from \d+ to \d+"):
        write_drives(tmp_path / "raw", **{**TINY, option: value})  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_command_explains_a_bad_size(tmp_path: Path) -> None:
    done = command(tmp_path / "raw", "--size", "640")
    assert done.returncode == 2
    assert "--size 640: give width and height" in done.stderr
    assert "Traceback" not in done.stderr


def parsed(lines: list[str]) -> list[tuple[str, int, str]]:
    return [(folder.split("/")[1], int(frame), side) for folder, frame, side in (line.split(" ") for line in lines)]


@pytest.mark.parametrize(("drives", "frames"), [(1, 6), (1, 8), (1, 60), (2, 6), (2, 60), (4, 30)])
def test_split_lines_have_neighbours_and_share_nothing(drives: int, frames: int) -> None:
    names = [f"{DATE}_drive_{number:04d}_sync" for number in range(drives)]
    parts = {part: parsed(lines) for part, lines in split_lines(names, frames).items()}
    assert set(parts) == {"train", "val", "test"}
    for part, lines in parts.items():
        assert lines and len(set(lines)) == len(lines)
        assert all(1 <= frame <= frames - 2 for _, frame, _ in lines)
        assert {side for _, _, side in lines} == ({"l"} if part == "test" else {"l", "r"})
    if drives > 1:
        assert {name for name, _, _ in parts["train"]} == set(names[:-1])
        assert {name for name, _, _ in parts["val"] + parts["test"]} == {names[-1]}
    used = {part: {(name, frame) for name, frame, _ in lines} for part, lines in parts.items()}
    assert not (used["train"] & used["val"] or used["train"] & used["test"] or used["val"] & used["test"])
    if frames >= 30:  # long enough to spare frames: not even neighbours are shared
        reach = {part: {(n, f + d) for n, f in frames_ for d in (-1, 0, 1)} for part, frames_ in used.items()}
        assert not (reach["train"] & reach["val"] or reach["val"] & reach["test"])


def test_split_files_hold_these_lines(drive: Path) -> None:
    names = ["2011_09_26_drive_0001_sync", "2011_09_26_drive_0002_sync"]
    for part, lines in split_lines(names, 8).items():
        assert (drive / "splits/sample" / f"{part}_files.txt").read_text().splitlines() == lines
        for folder, frame, _ in (line.split(" ") for line in lines):
            for step in (-1, 0, 1):
                assert (drive / folder / f"image_02/data/{int(frame) + step:010d}.png").is_file()
