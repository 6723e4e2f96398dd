"""KITTI's benchmark metrics, point clouds and drift, against closed forms; trajectory files, against evo."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from md2.data.batch import Batch
from md2.evaluation.further import FurtherMetrics, back_project, benchmark_metrics, drift, f_scores
from md2.evaluation.metrics import Protocol, evaluate_batch
from md2.evaluation.odometry import trajectory, write_poses, write_tum


def test_a_constant_factor_has_no_scale_invariant_error() -> None:
    true = torch.tensor([2.0, 5, 10, 40])
    silog, squared, absolute, inverse = benchmark_metrics(true, 1.1 * true)
    assert silog == pytest.approx(0, abs=1e-5)
    assert (squared, absolute) == pytest.approx((1, 10), rel=1e-5)
    expected = 1000 * (1 - 1 / 1.1) * math.sqrt(sum(1 / float(d) ** 2 for d in true) / 4)
    assert inverse == pytest.approx(expected, rel=1e-5)


def test_benchmark_metrics_by_hand() -> None:
    """Two points: 4 m taken for 2 m, and 1 m for 2 m."""
    silog, squared, absolute, inverse = benchmark_metrics(torch.tensor([4.0, 1.0]), torch.tensor([2.0, 2.0]))
    assert silog == pytest.approx(100 * math.log(2))  # log errors -ln 2 and ln 2: mean 0
    assert squared == pytest.approx(100 * (0.25 + 1) / 2)
    assert absolute == pytest.approx(100 * (0.5 + 1) / 2)
    assert inverse == pytest.approx(1000 * math.sqrt((0.25**2 + 0.5**2) / 2))


def test_f_scores_by_hand_and_by_brute_force() -> None:
    true = torch.tensor([[0.0, 0, 80], [1, 0, 80], [2, 0, 80]])
    predicted = torch.tensor([[0.05, 0, 80], [0, 0.06, 80], [1, 0, 80.15], [9, 0, 9]])
    near, far = f_scores(true, predicted)
    # 10 cm: two of four predicted points near one of three true ones; 20 cm: three of four near two of three.
    assert near == pytest.approx(2 * 0.5 * (1 / 3) / (0.5 + 1 / 3))
    assert far == pytest.approx(2 * 0.75 * (2 / 3) / (0.75 + 2 / 3))
    assert f_scores(true, true) == [1, 1] and f_scores(true, true + 50) == [0, 0]
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.rand(n, 3, generator=generator) * 2 + 70 for n in (1500, 900))
    gaps = np.linalg.norm(a.numpy()[:, None].astype(np.float64) - b.numpy()[None], axis=2)
    recall, precision = (gaps.min(1) < 0.1).mean(), (gaps.min(0) < 0.1).mean()
    assert f_scores(a, b)[0] == pytest.approx(2 * precision * recall / (precision + recall))


def test_points_lie_where_native_intrinsics_put_them() -> None:
    """Depth at twice the input's size: a wall 2 m too near at 10 m moves all points by 2 m along z, and across."""
    camera = torch.tensor([[50.0, 0, 31.5], [0, 50, 15.5], [0, 0, 1]])[None]
    depth = torch.full((1, 1, 64, 128), 10.0)
    batch = Batch(
        images={0: torch.zeros(1, 3, 32, 64)}, augmented={}, intrinsics=camera, stereo=None, metres_per_unit=1.0,
        depth=depth, depth_size=torch.tensor([[64, 128]]), keys=["a"],
    )  # fmt: skip
    protocol = Protocol(crop="none")
    found = {}
    for name, wrong in (("right", 0.0), ("near", 0.05), ("off", 0.15)):
        disparity = 1 / (depth[:, :, ::2, ::2] - wrong)
        collected = FurtherMetrics(protocol, points=True)
        collected(batch, disparity, evaluate_batch(disparity, depth, scaling=1.0, protocol=protocol))
        found[name] = collected.means
    assert found["right"]["F-score 10 cm"] == 1 and found["right"]["SILog"] < 1e-3
    assert found["near"]["F-score 10 cm"] == 1
    assert (found["off"]["F-score 10 cm"], found["off"]["F-score 20 cm"]) == (0, 1)
    assert found["off"]["absErrorRel"] == pytest.approx(1.5, rel=1e-3)
    # The corner of the native image: fx' = 100, cx' = (31.5 + 0.5) x 2 - 0.5 = 63.5.
    native = torch.tensor([[100.0, 0, 63.5], [0, 100, 31.5], [0, 0, 1]])
    corner = back_project(torch.tensor([10.0]), torch.tensor([63]), torch.tensor([127]), native)
    assert corner[0].tolist() == pytest.approx([6.35, 3.15, 10])


def straight(frames: int, step: float, turn: float = 0.0) -> np.ndarray:
    """Poses of a car that drives `step` metres forward and turns by `turn` about y each frame."""
    motion = np.eye(4)
    motion[:3, :3] = [[math.cos(turn), 0, math.sin(turn)], [0, 1, 0], [-math.sin(turn), 0, math.cos(turn)]]
    motion[2, 3] = -step
    return trajectory(np.tile(motion, (frames - 1, 1, 1)))


def test_drift_of_a_scale_and_of_a_bias_of_rotation() -> None:
    true = straight(1200, 1.0)
    assert drift(true, true) == pytest.approx((0, 0), abs=1e-4)
    found = drift(true, straight(1200, 1.02))
    assert found is not None
    # A stretch ends at the first frame beyond its length, here one metre further: 2 % of 101 m in 100 m, ...
    starts = {length: len(range(0, 1200 - length - 1, 10)) for length in range(100, 900, 100)}
    moved = sum(n * 2 * (length + 1) / length for length, n in starts.items()) / sum(starts.values())
    assert found == pytest.approx((moved, 0), rel=1e-6, abs=1e-4)
    bias = math.radians(0.01)
    turned = drift(true, straight(1200, 1.0, bias))
    assert turned is not None
    expected = sum(n * (length + 1) / length for length, n in starts.items()) / sum(starts.values())
    assert turned[1] == pytest.approx(expected, rel=1e-4)  # 0.01 degrees a metre are 1 degree in 100 m
    assert drift(straight(90, 1.0), straight(90, 1.0)) is None


def test_evo_reads_both_files_as_the_same_trajectory(tmp_path: Path) -> None:
    interface = pytest.importorskip("evo.tools.file_interface", reason="evo is not installed: pip install -e '.[dev]'")
    rng = np.random.default_rng(0)
    motions = np.tile(np.eye(4), (40, 1, 1))
    for motion in motions:
        motion[:3, :3] = np.linalg.qr(rng.normal(size=(3, 3)))[0]
        motion[:3, :3] *= np.sign(np.linalg.det(motion[:3, :3]))
    motions[:, :3, 3] = rng.normal(size=(40, 3))
    poses = trajectory(motions)
    write_poses(tmp_path / "kitti.txt", poses)
    write_tum(tmp_path / "poses.tum", poses)
    kitti, tum = (
        interface.read_kitti_poses_file(tmp_path / "kitti.txt"),
        interface.read_tum_trajectory_file(tmp_path / "poses.tum"),
    )
    np.testing.assert_allclose(np.stack(kitti.poses_se3), poses, atol=1e-4)
    np.testing.assert_allclose(np.stack(tum.poses_se3), poses, atol=1e-7)
    assert tum.timestamps.tolist() == list(range(41))
