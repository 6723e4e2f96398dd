"""`md2 prep --motion`: poses and distances of the temporal frames, against the synthetic drive's exact poses."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from prep_data import DATE, DRIVE, copy_raw, read_part, run_pack, write_split
from test_prep_folder import run_job, write_camera, write_drive

from prep.raw.poses import pose_motion, speed_motion
from shards.errors import InputError
from shards.manifest import Manifest

OPTIONS = {"motion": True, "stereo": True, "depth": False, "frames": "0,-1,1", "size": "96x32"}


def exact(drive: Path, camera: str = "02") -> np.ndarray:
    """(8, 4, 4) camera to world."""
    rows = np.loadtxt(drive / DATE / DRIVE / f"true_pose_{camera}.txt").reshape(-1, 3, 4)
    return np.concatenate([rows, np.broadcast_to([[[0, 0, 0, 1.0]]], (len(rows), 1, 4))], axis=1)


def motions(dataset: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Key -> (2, 3, 4) poses and (2,) distances; without those that a sample lacks."""
    return {
        sample["__key__"]: (
            np.frombuffer(sample["poses.f32"], "<f4").reshape(-1, 3, 4),
            np.frombuffer(sample["distances.f32"], "<f4"),
        )
        for sample in read_part(dataset)
        if "poses.f32" in sample
    }


def manifest(dataset: Path) -> Manifest:
    return Manifest.from_json((dataset / "dataset.json").read_bytes(), "here")


def test_oxts_take_target_points_to_each_temporal_frame_of_either_camera(drive: Path, tmp_path: Path) -> None:
    split = write_split(tmp_path, *(f"{DATE}/{DRIVE} {frame} {side}" for frame in (2, 5) for side in "lr"))
    run_pack(split, drive, tmp_path / "out", **OPTIONS)
    found = motions(tmp_path / "out")
    assert len(found) == 4
    left = exact(drive)
    for key, (poses, distances) in found.items():
        frame = int(key[-10:])
        world = left if "_l_" in key else exact(drive, "03")
        for place, offset in enumerate((-1, 1)):
            true = np.linalg.inv(world[frame + offset]) @ world[frame]
            # The records' and the calibration's decimals bound the agreement, as in KITTI.
            np.testing.assert_allclose(poses[place], true[:3], atol=2e-3)
            assert distances[place] == pytest.approx(np.linalg.norm(true[:3, 3]), abs=2e-3)
        assert poses[0][2, 3] > 0.5 and poses[1][2, 3] < -0.5, "ahead of the frame before, behind the one after"
    assert {"poses.f32", "distances.f32"} <= {*manifest(tmp_path / "out").components}


def test_a_broken_record_leaves_its_samples_without_motion(drive: Path, tmp_path: Path) -> None:
    raw = copy_raw(drive, tmp_path / "raw")
    (raw / DATE / DRIVE / "oxts" / "data" / "0000000003.txt").write_text("49 8 nan\n")
    (raw / DATE / DRIVE / "oxts" / "data" / "0000000004.txt").unlink()
    split = write_split(tmp_path, *(f"{DATE}/{DRIVE} {frame} l" for frame in (1, 2, 5, 6)))
    packed = run_pack(split, raw, tmp_path / "out", **OPTIONS)
    assert sorted(key[-1] for key in motions(tmp_path / "out")) == ["1", "6"]
    assert packed.manifest.optional_components == {"poses.f32": 2, "distances.f32": 2}
    shutil.rmtree(raw / DATE / DRIVE / "oxts")
    assert run_pack(split, raw, tmp_path / "none", **OPTIONS).manifest.optional_components == {}
    (raw / DATE / "calib_imu_to_velo.txt").unlink()
    with pytest.raises(InputError, match="calib_imu_to_velo"):
        run_pack(split, raw, tmp_path / "no", **OPTIONS)


def test_without_the_option_nothing_changes(drive: Path, tmp_path: Path, dataset: Path) -> None:
    assert not {"poses.f32", "distances.f32"} & {*manifest(dataset).components}


def test_own_drives_have_poses_or_speeds(drive: Path, tmp_path: Path) -> None:
    write_camera(tmp_path / "drives")
    write_drive(drive, tmp_path / "drives" / "monday")
    folder = tmp_path / "drives" / "monday"
    lines = (drive / DATE / DRIVE / "true_pose_02.txt").read_text()
    (folder / "poses.txt").write_text(lines)
    run_job(tmp_path / "drives", tmp_path / "out", motion=True, frames="0,-1,1")
    world = exact(drive)
    for key, (poses, _) in motions(tmp_path / "out").items():
        frame = int(key[-10:])
        np.testing.assert_allclose(poses[1], (np.linalg.inv(world[frame + 1]) @ world[frame])[:3], atol=1e-6)
    (folder / "poses.txt").unlink()
    (folder / "speed.txt").write_text("".join(f"{100 + frame * 0.5} {frame}\n" for frame in range(8)))
    run_job(tmp_path / "drives", tmp_path / "speeds", motion=True, frames="0,-1,1")
    sample = {s["__key__"][-1]: s for s in read_part(tmp_path / "speeds")}["3"]
    assert "poses.f32" not in sample
    assert np.frombuffer(sample["distances.f32"], "<f4").tolist() == [1.25, 1.75]  # half a second at the mean speed


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("0 1\n1 2\n", "2 lines for 3 frames"),
        ("0 1\n1 2 3\n2 2\n", ":2: expected two numbers"),
        ("0 1\n0 2\n2 2\n", ":2: its time does not follow"),
        ("0 1\n1 nan\n2 2\n", ":2: nan is not a speed"),
        ("0 1\n1 500\n2 2\n", ":2: 500 is not a speed"),
        ("inf 1\n1 5\n2 2\n", ":1: 1 is not a speed"),
    ],
)
def test_malformed_speeds_are_named(text: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        speed_motion(text.encode(), range(3), "speed.txt")


def test_a_turning_camera_beside_the_origin_moves_although_the_origin_turns_in_place() -> None:
    """A quarter turn to the right about the rectified origin: a camera 1 m to its left swings forward and right."""
    turned = np.array([[0.0, 0, 1, 0], [0, 1, 0, 0], [-1, 0, 0, 0]])  # camera z is the world's x
    motion = pose_motion(np.stack([np.eye(4)[:3], turned]))
    assert motion.distance(0, 1, np.zeros(3)) == 0
    # Camera coordinates are rectified ones plus (1, 0, 0): the camera stands at x = -1 of the rectified frame.
    transform = motion.transform(0, 1, np.array([1.0, 0, 0]))
    assert transform is not None
    # The camera moves from the world's (-1, 0, 0) to (0, 0, 1): the old place, seen from the new, is behind and left.
    np.testing.assert_allclose(transform @ [0, 0, 0, 1], [1, 0, -1])
    assert motion.distance(0, 1, np.array([1.0, 0, 0])) == pytest.approx(2**0.5)
    assert motion.transform(0, 2, np.zeros(3)) is None
