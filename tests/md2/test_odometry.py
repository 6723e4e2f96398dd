"""Odometry: trajectories, the published error, pose files, and motions along frames and packed samples."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from evaluation_data import HEIGHT, WIDTH, tiny_checkpoint, tiny_config
from PIL import Image
from pipeline_data import encode, smooth

from bench.write_dataset import write_dataset
from md2.evaluation.odometry import (
    MotionPredictor,
    motions_of,
    snippet_error,
    trajectory,
    trajectory_scale,
    write_poses,
)
from md2.evaluation.run_odometry import (
    OdometryOptions,
    OdometryReport,
    dataset_motions,
    open_frames,
    predict_motions,
    report_motions,
    run_odometry,
    square,
)
from md2.inference.predictor import Predictor, load
from prep.raw.kitti import open_sequence
from shards.dataset import open_dataset
from shards.errors import DatasetError, InputError, UsageError
from shards.manifest import Split
from shards.sample import Sample

Matrices = np.ndarray[Any, np.dtype[np.float64]]
FRAMES = 6


def move(x: float = 0, y: float = 0, z: float = 0, yaw: float = 0) -> Matrices:
    """Turn about y (down), then shift."""
    pose = np.eye(4)
    pose[0, 0] = pose[2, 2] = math.cos(yaw)
    pose[0, 2], pose[2, 0] = math.sin(yaw), -math.sin(yaw)
    pose[:3, 3] = x, y, z
    return pose


# Trajectories


def test_a_car_that_turns_drives_a_circle() -> None:
    """Each frame 1 m along the new heading after a turn of 10 degrees: a 36-gon that closes."""
    step = math.radians(10)
    poses = [np.eye(4)]
    for _ in range(36):
        poses.append(poses[-1] @ move(z=1.0) @ move(yaw=step))
    found = trajectory(motions_of(np.stack(poses)))
    np.testing.assert_allclose(found, np.stack(poses), atol=1e-12)
    np.testing.assert_allclose(found[36], np.eye(4), atol=1e-12)
    # The polygon's radius: side 1, half the turn.
    places = found[:36, :3, 3]
    radius = np.linalg.norm(places - places.mean(0), axis=1)
    np.testing.assert_allclose(radius, 0.5 / math.sin(step / 2), rtol=1e-9)


def test_any_drive_comes_back_from_its_motions_in_any_unit() -> None:
    """Turns and shifts that all differ: motions that commute would hide in which order they are put together."""
    rng = np.random.default_rng(1)
    poses = [np.eye(4)]
    for _ in range(12):
        tilt = move(yaw=rng.normal())[[1, 2, 0, 3]][:, [1, 2, 0, 3]]
        poses.append(poses[-1] @ move(*rng.normal(size=3), yaw=rng.normal()) @ tilt)
    true = np.stack(poses)
    for scale in (1.0, 0.3):
        found = trajectory(motions_of(true), scale)
        np.testing.assert_allclose(found[:, :3, :3], true[:, :3, :3], atol=1e-12)
        np.testing.assert_allclose(found[:, :3, 3], scale * true[:, :3, 3], atol=1e-12)


def test_motion_takes_points_to_the_next_camera() -> None:
    """A car drives 2 m forward: a point 10 m ahead is then 8 m ahead."""
    motion = motions_of(np.stack([np.eye(4), move(z=2)]))[0]
    np.testing.assert_allclose(motion @ [0, 0, 10, 1], [0, 0, 8, 1])
    np.testing.assert_allclose(trajectory(motion[None])[1, :3, 3], [0, 0, 2])
    np.testing.assert_allclose(trajectory(motion[None], scale=3)[1, :3, 3], [0, 0, 6])


# The published error


def test_error_of_one_motion_by_hand() -> None:
    """True (0, 0, -1), predicted (1, 0, -1): factor 1/2, error (0.5, 0, 0.5), over 2 frames and not their root."""
    true, predicted = motions_of(np.stack([np.eye(4), move(z=1)])), move(x=1, z=-1)[None]
    found = snippet_error(true, predicted)
    assert found.mean == pytest.approx(math.sqrt(0.5) / 2)
    assert found.std == 0


def test_snippets_start_at_every_frame_and_are_shorter_at_the_end() -> None:
    """6 steps of 1 m; the prediction stands still: errors are the lengths of the true places, by hand."""
    true = np.stack([move(z=-1)] * 6)
    found = snippet_error(true, np.stack([np.eye(4)] * 6))
    four = math.sqrt(1 + 4 + 9 + 16) / 5
    by_hand = [four, four, four, math.sqrt(1 + 4 + 9) / 4, math.sqrt(1 + 4) / 3, 1 / 2]
    assert found.errors.tolist() == pytest.approx(by_hand)
    assert found.mean == pytest.approx(sum(by_hand) / 6)
    assert found.std == pytest.approx(math.sqrt(sum((e - sum(by_hand) / 6) ** 2 for e in by_hand) / 6))


def test_every_snippet_has_its_own_scale() -> None:
    rng = np.random.default_rng(0)
    true = np.stack([move(*rng.normal(size=3), yaw=rng.normal() / 10) for _ in range(9)])
    scaled = true.copy()
    scaled[:, :3, 3] *= 0.02
    assert snippet_error(true, scaled).errors == pytest.approx(np.zeros(9), abs=1e-12)
    # Half of the sequence in another unit: only the snippets across the change suffer.
    scaled[5:, :3, 3] *= 7
    errors = snippet_error(true, scaled).errors
    assert errors[[0, 1, 5, 6, 7, 8]] == pytest.approx(np.zeros(6), abs=1e-12)
    assert (errors[2:5] > 0.01).all()


def test_turns_count_and_not_only_places() -> None:
    """A missed turn of 0.1 rad before a step of 1 m puts the next place 0.1 m off."""
    true = np.stack([move(z=-1, yaw=0.1), move(z=-1)])
    predicted = np.stack([move(z=-1), move(z=-1)])
    places = np.array([[0, 0, 0], [0, 0, -1], [-math.sin(0.1), 0, -1 - math.cos(0.1)]])
    straight = np.array([[0, 0, 0], [0, 0, -1], [0, 0, -2.0]])
    scale = (places * straight).sum() / (straight**2).sum()
    expected = math.sqrt(((scale * straight - places) ** 2).sum()) / 3
    assert snippet_error(true, predicted).errors[0] == pytest.approx(expected)


def test_other_number_of_frames_is_refused() -> None:
    with pytest.raises(InputError, match="3 predicted motions for 2"):
        snippet_error(np.stack([np.eye(4)] * 2), np.stack([np.eye(4)] * 3))


def test_real_poses_against_themselves(kitti: Path) -> None:
    poses = square(np.loadtxt(kitti / "odometry" / "09.txt").reshape(-1, 3, 4))
    assert len(poses) == 1591
    motions = motions_of(poses)
    found = snippet_error(motions, motions)
    assert (found.mean, len(found.errors)) == (pytest.approx(0, abs=1e-9), 1590)
    # KITTI's file has 7 digits, so its rotations are orthonormal to about 1e-6.
    np.testing.assert_allclose(trajectory(motions)[-1, :3, 3], poses[-1, :3, 3], atol=0.05)


# Pose files


def test_pose_files_are_kittis(tmp_path: Path) -> None:
    poses = np.stack([np.eye(4), move(1, 2, 3, 0.5)])
    write_poses(tmp_path / "p.txt", poses)
    rows = [[float(word) for word in line.split()] for line in (tmp_path / "p.txt").read_text().splitlines()]
    assert rows[0] == [1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0]
    assert rows[1][3::4] == [1, 2, 3]


# Prediction


def test_frames_are_one_folders_in_the_order_of_their_numbers(tmp_path: Path, pictures: list[Image.Image]) -> None:
    """A drive's folder holds two cameras: their frames in a row would be no trajectory."""
    for number, picture in enumerate(pictures[:3]):
        for camera in ("image_02", "image_03"):
            (tmp_path / "drive" / camera).mkdir(parents=True, exist_ok=True)
            picture.save(tmp_path / "drive" / camera / f"{(10, 2, 1)[number]}.png")
    name, images, total = open_frames(str(tmp_path / "drive" / "image_02" / "*.png"))
    assert (name, total) == ("image_02", 3)
    for image, picture in zip(images, reversed(pictures[:3]), strict=True):
        np.testing.assert_array_equal(np.asarray(image), np.asarray(picture))
    with pytest.raises(InputError, match=r"frames in 2 folders .*image_02.*image_03"):
        open_frames(str(tmp_path / "drive"))


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    return [Image.fromarray(smooth(np.random.default_rng(seed), WIDTH, HEIGHT)) for seed in range(FRAMES)]


def predictor(folder: Path, **model: Any) -> Predictor:
    config = tiny_config().model_dump()
    config["model"].update(model)
    from md2.config import Config

    return load(tiny_checkpoint(folder / "model.pt", Config.model_validate(config)), "cpu")


def pixels(picture: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 255


@pytest.mark.parametrize("network", ["posecnn", "shared"])
def test_motions_are_the_networks_for_each_pair(tmp_path: Path, pictures: list[Image.Image], network: str) -> None:
    """Offset 1 as in training, (target, next); and the inverse of offset -1 with the roles exchanged."""
    model = predictor(tmp_path, pose_network=network)
    reference = predictor(tmp_path, pose_network=network).networks
    found = predict_motions(model, iter(pictures), batch_size=4)
    assert found.shape == (FRAMES - 1, 4, 4)
    with torch.no_grad():
        for t in range(FRAMES - 1):
            first, second = pixels(pictures[t]), pixels(pictures[t + 1])
            depth = None
            if network == "posecnn":
                depth = 1 / (0.01 + 9.99 * reference.disparities(first)[0])
            forward = reference.poses({0: first, 1: second, -1: first})[1].transform(depth)[0].numpy()
            np.testing.assert_allclose(found[t], forward, atol=1e-5)
            if network == "shared":
                backward = reference.poses({0: second, 1: second, -1: first})[-1].transform()[0].numpy()
                np.testing.assert_allclose(found[t] @ backward, np.eye(4), atol=1e-5)


def test_a_network_that_sees_three_frames_goes_along_windows(tmp_path: Path, pictures: list[Image.Image]) -> None:
    model = predictor(tmp_path, pose_network="shared", pose_input="all")
    found = predict_motions(model, iter(pictures), batch_size=2)
    networks = model.networks
    with torch.no_grad():
        three = networks.poses({0: pixels(pictures[1]), -1: pixels(pictures[0]), 1: pixels(pictures[2])})
        np.testing.assert_allclose(found[1], three[1].transform()[0].numpy(), atol=1e-5)
        np.testing.assert_allclose(found[0] @ three[-1].transform()[0].numpy(), np.eye(4), atol=1e-5)
    assert len(found) == FRAMES - 1
    with pytest.raises(InputError, match="three"):
        predict_motions(model, iter(pictures[:2]))


def test_a_trajectory_leaves_the_model_as_it_is(tmp_path: Path, pictures: list[Image.Image]) -> None:
    model = predictor(tmp_path)
    frames, temporal = list(model.networks.frames), list(model.networks.temporal)
    predict_motions(model, iter(pictures))
    assert (model.networks.frames, model.networks.temporal) == (frames, temporal) == ([0, -1, 1], [-1, 1])
    images = {offset: pixels(pictures[0]) for offset in frames}
    assert set(model.networks.poses(images)) == {-1, 1}


def test_what_the_command_decides(tmp_path: Path, pictures: list[Image.Image]) -> None:
    """Frames, a raw sequence and a packed one, each with the poses that are given or found."""
    model = predictor(tmp_path)
    expected = predict_motions(model, iter(pictures))
    for number, picture in enumerate(pictures):
        (tmp_path / "frames").mkdir(exist_ok=True)
        picture.save(tmp_path / "frames" / f"{number}.png")
    poses = np.stack([move(z=float(z)) for z in range(FRAMES)])[:, :3]

    class Raw:
        frames = dict.fromkeys(range(FRAMES))

        def __init__(self) -> None:
            self.poses = poses

        def read(self) -> Any:
            yield from ((f"frame {n}", (tmp_path / "frames" / f"{n}.png").read_bytes()) for n in range(FRAMES))

    def run(source: str, **options: Any) -> OdometryReport:
        chosen = OdometryOptions(model="m", source=source, out=tmp_path / "out", **options)
        return run_odometry(model, chosen, lambda place, name: Raw())

    packed = str(pack_sequence(tmp_path / "d", pictures, [0, -1, 1], [3, 1, 4, 2]))
    given = run(str(tmp_path / "frames"), poses=poses)
    found = run("kitti", sequence="09")
    stored = run(packed, packed=True, sequence="09", poses=poses)
    assert given.error is not None and found.error is not None and stored.error is not None
    assert given.name == "frames" and found.name == stored.name == "09"
    by_hand = snippet_error(motions_of(square(poses)), expected)
    for report in (given, found, stored):
        assert report.error is not None
        assert report.error.errors == pytest.approx(by_hand.errors, abs=1e-5)
    assert run(str(tmp_path / "frames"), limit=3).frames == 3
    for source, options, message in (
        (packed, {"packed": True}, "name a sequence with --sequence, or a --part"),
        (str(tmp_path / "frames"), {"part": "test_09"}, "--part names a part of a packed dataset"),
    ):
        with pytest.raises(UsageError, match=message):
            run(source, **options)
    with pytest.raises(InputError, match=r"6 frames, but 4 true poses; .*--limit 4"):
        run(str(tmp_path / "frames"), poses=poses[:4])
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"):
        run_odometry(model, OdometryOptions("m", "nowhere", tmp_path / "file"), lambda place, name: Raw())


def test_a_model_without_pose_network_says_why(tmp_path: Path, pictures: list[Image.Image]) -> None:
    stereo = load(tiny_checkpoint(tmp_path / "stereo.pt", tiny_config(stereo=True)), "cpu")
    with pytest.raises(UsageError, match="stereo alone"):
        MotionPredictor(stereo)
    mono = predictor(tmp_path)
    with pytest.raises(InputError, match="two frames"):
        predict_motions(mono, iter(pictures[:1]))


def pack_sequence(folder: Path, pictures: list[Image.Image], frames: list[int], targets: list[int]) -> Path:
    samples = []
    for target in targets:
        parts = {"k.f32": np.array([50, 48, 47.5, 31.5], "<f4").tobytes(), "meta.json": b"{}"}
        for offset, name in ((0, "0"), (-1, "m1"), (1, "p1")):
            if offset in frames:
                parts[f"{name}.png"] = encode(np.asarray(pictures[target + offset]), "png")
        samples.append(Sample(f"odom_09_l_{target:010d}", parts))
    write_dataset(
        folder,
        {"test_09": samples},
        split=Split(name="odom", sha256="0" * 64),
        frames=frames,
        stereo=False,
        depth=None,
        size=(WIDTH, HEIGHT),
        codec="png",
        quality=None,
        seed=0,
    )
    return folder


def test_packed_samples_in_any_order_give_the_same_motions(tmp_path: Path, pictures: list[Image.Image]) -> None:
    """The first and last frame are in no list of targets (they lack a neighbour), and are found all the same."""
    model = predictor(tmp_path)
    expected = predict_motions(model, iter(pictures))
    packed = open_dataset(str(pack_sequence(tmp_path / "d", pictures, [0, -1, 1], [3, 1, 4, 2])))
    found = dataset_motions(model, packed, "test_09", batch_size=3)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    forward = open_dataset(str(pack_sequence(tmp_path / "f", pictures, [0, 1], [0, 4, 1, 2, 3])))
    np.testing.assert_allclose(dataset_motions(model, forward, "test_09"), expected, atol=1e-5)
    first = dataset_motions(model, forward, "test_09", limit=3)
    np.testing.assert_allclose(first, expected[:2], atol=1e-5)
    hole = open_dataset(str(pack_sequence(tmp_path / "h", pictures, [0, 1], [0, 1, 3])))
    with pytest.raises(DatasetError, match="frame 2 to the next"):
        dataset_motions(model, hole, "test_09")


def test_report_writes_trajectory_picture_and_numbers(tmp_path: Path) -> None:
    poses = np.stack([move(z=float(z)) for z in range(8)])
    motions = motions_of(poses)
    motions[:, :3, 3] /= 4
    report = report_motions(motions, "09", None, poses, tmp_path, "model.pt")
    assert report.error is not None
    assert report.error.mean == pytest.approx(0, abs=1e-12)
    assert report.scale == pytest.approx(4)
    assert report.unit == "unknown"
    np.testing.assert_allclose(np.loadtxt(tmp_path / "09_poses.txt")[-1, 3::4], [0, 0, 7 / 4], atol=1e-6)
    assert json.loads((tmp_path / "09.json").read_text())["ate_mean"] == report.error.mean
    with Image.open(tmp_path / "09.png") as picture:
        assert picture.size == (840, 840)
    metric = report_motions(motions, "10", 4.0, None, tmp_path, "model.pt")
    assert (metric.error, metric.unit) == (None, "metres")
    np.testing.assert_allclose(np.loadtxt(tmp_path / "10_poses.txt")[-1, 3::4], [0, 0, 7], atol=1e-6)
    with pytest.raises(InputError, match="8 frames, but 7 true poses"):
        report_motions(motions, "09", None, poses[:7], tmp_path, "model.pt")


def test_scale_of_a_whole_trajectory() -> None:
    true = np.stack([np.eye(4), move(z=2), move(x=2, z=2)])
    predicted = np.stack([np.eye(4), move(z=1), move(x=1, z=1)])
    assert trajectory_scale(true, predicted) == pytest.approx(2)
    assert trajectory_scale(true, np.stack([np.eye(4)] * 3)) == 1


def test_sequences_are_found_in_kittis_odometry_layout(tmp_path: Path, pictures: list[Image.Image]) -> None:
    folder = tmp_path / "dataset" / "sequences" / "09"
    (folder / "image_2").mkdir(parents=True)
    for number, picture in enumerate(pictures):
        picture.save(folder / "image_2" / f"{number:06d}.png")
    row = "50 0 47.5 0 0 48 31.5 0 0 0 1 0"
    (folder / "calib.txt").write_text("".join(f"P{n}: {row}\n" for n in range(4)))
    (tmp_path / "dataset" / "poses").mkdir()
    write_poses(tmp_path / "dataset" / "poses" / "09.txt", np.stack([move(z=float(z)) for z in range(FRAMES)]))
    found = open_sequence([str(tmp_path / "dataset")], "09")
    assert [name for name, _ in found.read()] == [f"09 frame {n}" for n in range(FRAMES)]
    assert found.poses is not None
    assert square(found.poses)[:, 2, 3].tolist() == [0, 1, 2, 3, 4, 5]
    (folder / "image_2" / "000002.png").unlink()
    with pytest.raises(InputError, match="frame 2 is missing"):
        open_sequence([str(tmp_path / "dataset")], "09")
    with pytest.raises(InputError, match="sequences/10/image_2"):
        open_sequence([str(tmp_path / "dataset")], "10")
