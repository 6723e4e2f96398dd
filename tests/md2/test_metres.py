"""Depth in metres from motion that the dataset knows: `loss.velocity` and `train.poses: given`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from prep_data import DATE, DRIVE, VAL_DRIVE, run_pack, write_split
from train_data import config, losses, train

import md2
from md2.config import load_config
from md2.data.augment import rigid_transforms
from md2.data.batch import Batch, Offset
from md2.geometry import disparity_to_depth
from md2.loss import ReprojectionLoss
from md2.model import GivenPose, Networks, Pose, Prediction
from md2.photometric.velocity import velocity_error
from md2.pipeline import Loader
from shards.dataset import open_dataset
from shards.errors import UsageError
from shards.sample import DISTANCES, POSES


@pytest.fixture(scope="module")
def moving(drive: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The synthetic drive with poses and distances: 192x64, lossless, exact depth."""
    folder = tmp_path_factory.mktemp("moving")
    write_split(folder, *(f"{DATE}/{DRIVE} {frame} l" for frame in range(1, 7)))
    split = write_split(folder, *(f"{DATE}/{VAL_DRIVE} {frame} l" for frame in range(2, 5)), part="val")
    options = {"motion": True, "stereo": True, "frames": "0,-1,1", "size": "native", "codec": "png"}
    run_pack(split.parent, drive, folder / "out", **options)
    return folder / "out"


def batches(dataset: Path, *overrides: str) -> list[Batch]:
    settings = load_config("mono", ["data.width=192", "data.height=64", "data.color_jitter=false", *overrides])
    where, device = open_dataset(str(dataset)), torch.device("cpu")
    both = (POSES, DISTANCES)
    return list(Loader(where, "train", settings.data, batch_size=2, seed=3, train=True, device=device, motion=both))


def true_depth(drive: Path, key: str) -> torch.Tensor:
    depth = np.load(next((drive / DATE / DRIVE / "true_depth_02").rglob(f"*{key[-10:]}.npy")))
    return torch.from_numpy(depth.astype(np.float32))[None]


@pytest.mark.parametrize("unit", ["paper", "metres"])
def test_exact_depth_and_given_poses_warp_every_source_into_the_target_flipped_or_not(
    moving: Path, drive: Path, unit: str
) -> None:
    """The error of the warped sources is a fraction of that of any other motion: unit, offset, mirror, direction."""
    stereo = ["data.stereo=true", f"data.baseline={unit}"]
    settings = load_config("mono", ["train.poses=given", "loss.disable_automasking=true", *stereo])
    mirrored = set()
    for batch in batches(moving, *stereo):
        assert batch.depth is None and batch.stereo is not None
        flips = batch.stereo[:, 0, 3] > 0
        mirrored |= set(flips.tolist())
        depth = torch.stack([true_depth(drive, key) for key in batch.keys]) / batch.metres_per_unit
        depth = torch.where(flips.view(-1, 1, 1, 1), depth.flip(3), depth).clamp(max=90)
        disparity = (1 / depth - 1 / 100) / (1 / 0.1 - 1 / 100)
        torch.testing.assert_close(disparity_to_depth(disparity, 0.1, 100), depth, rtol=1e-4, atol=1e-4)
        mono = type(batch)(**{**vars(batch), "stereo": None, "images": {o: batch.images[o] for o in (0, -1, 1)}})

        def error(poses: dict[Offset, torch.Tensor]) -> float:
            chosen = type(batch)(**{**vars(mono), "poses": poses, "distances": {}})  # noqa: B023
            loss = ReprojectionLoss(settings.loss, settings.model)
            return float(loss(chosen, Prediction({0: disparity})).total)  # noqa: B023

        given = error(batch.poses)
        swapped = error({-1: batch.poses[1], 1: batch.poses[-1]})
        still = error({offset: torch.eye(4).expand(2, 4, 4) for offset in (-1, 1)})
        mirror = torch.diag(torch.tensor([-1.0, 1, 1, 1]))
        unmirrored = error({offset: mirror @ pose @ mirror for offset, pose in batch.poses.items()})
        assert given < 0.6 * min(swapped, still), (given, swapped, still)
        assert given < unmirrored
        for offset, pose in batch.poses.items():
            torch.testing.assert_close(pose[:, :3, 3].norm(dim=1), batch.distances[offset], rtol=1e-5, atol=1e-6)
        metres = batch.distances[1] * batch.metres_per_unit
        assert ((metres > 0.5) & (metres < 1.6)).all(), "about a metre a frame"
    assert mirrored == {True, False}


def test_mirroring_a_motion_is_what_mirrored_points_see() -> None:
    generator = torch.Generator().manual_seed(0)
    angle = torch.randn(3, 3, generator=generator) * 0.3
    motion = Pose(angle, torch.randn(3, 3, generator=generator)).transform()
    flipped = rigid_transforms(motion[:, :3], torch.tensor([True, False, True]), 2.0)
    point = torch.randn(3, 3, generator=generator)
    turned = point * torch.tensor([-1.0, 1, 1])
    moved = (motion[:, :3, :3] @ point[:, :, None]).squeeze(2) + motion[:, :3, 3] / 2
    seen = (flipped[:, :3, :3] @ turned[:, :, None]).squeeze(2) + flipped[:, :3, 3]
    torch.testing.assert_close(seen[[0, 2]], (moved * torch.tensor([-1.0, 1, 1]))[[0, 2]])
    torch.testing.assert_close(flipped[1, :3, :3], motion[1, :3, :3])


def test_the_velocity_error_is_the_difference_of_lengths_and_leaves_out_what_is_not_known() -> None:
    t = torch.tensor([[3.0, 0, 4], [0, 0, 2], [1, 0, 0]], requires_grad=True)
    poses = {-1: Pose(torch.zeros(3, 3), t, invert=True), 1: Pose(torch.zeros(3, 3), 2 * t)}
    nan = float("nan")
    distances = {1: torch.tensor([9.0, nan, 2]), -1: torch.tensor([7.0, 2, nan])}
    error = velocity_error(poses, distances)  # |5 - 7|, |2 - 2|; |10 - 9|, |2 - 2|
    assert error.item() == pytest.approx(3 / 4)
    error.backward()
    assert t.grad is not None and t.grad.isfinite().all()
    unknown = velocity_error(poses, {o: torch.full((3,), nan) for o in (-1, 1)})
    assert unknown.item() == 0


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["loss.velocity=0.05", "train.poses=given"], "no effect with train.poses given"),
        (["loss.velocity=0.05", "data.frames=[0]", "data.stereo=true"], "needs temporal frames"),
        (["train.poses=given", "model.pose_network=posecnn"], "relative to the depth"),
        (["data.baseline=metres"], "without stereo"),
        (["model.start=[0.5,1]"], r"start \[0.5, 1.0\]: a depth within the model's range"),
        (["model.start=[15,1]", "model.pose_network=posecnn"], "leave model.start out"),
    ],
)
def test_what_does_not_go_together(overrides: list[str], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        load_config("mono", overrides)


@pytest.mark.parametrize(
    ("recipe", "key"),
    [("monodepth2_resnet18_kitti_mono_velocity_640x192", "loss.velocity=0.1"), ("mono", "train.poses=given")],
)
def test_a_mono_run_that_knows_its_motion_is_in_metres(moving: Path, tmp_path: Path, recipe: str, key: str) -> None:
    train(moving, tmp_path / "run", recipe, [key, "data.baseline=metres", "train.max_steps=2"])
    assert len(losses(tmp_path / "run")) == 2
    model = md2.load(tmp_path / "run")
    assert model.metres_per_unit == 1
    assert config(moving, "mono", [key]).metres_per_unit == 5.4


def test_a_run_with_given_poses_has_no_pose_network() -> None:
    networks = Networks.of(load_config("mono", ["train.poses=given"]))
    assert sorted(networks.state_dicts()) == ["depth", "encoder"]
    assert networks({offset: torch.zeros(1, 3, 64, 96) for offset in (0, -1, 1)}).poses == {}
    assert not GivenPose(torch.eye(4)[None]).relative


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["data.baseline=metres", "data.stereo=true"],
        ["model.decoder=hrdepth", "model.pose_network=shared"],
        ["model.pose_input=all", "data.frames=[0,1,-1,-2]"],
        ["train.poses=given"],
    ],
)
def test_random_weights_begin_at_the_depth_and_motion_that_are_asked_for(options: list[str]) -> None:
    settings = load_config("mono", ["model.start=[15,1]", *options])
    torch.manual_seed(0)
    networks, plain = Networks.of(settings).eval(), Networks.of(load_config("mono", options)).eval()
    images: dict[Offset, torch.Tensor] = {offset: torch.rand(2, 3, 64, 96) for offset in settings.data.frames}
    unit = settings.data.metres_per_unit
    with torch.no_grad():
        prediction, usual = networks(images), plain(images)
    for disparity in prediction.disparities.values():
        assert 10 < float(disparity_to_depth(disparity, 0.1, 100).median()) * unit < 20
    assert float(disparity_to_depth(usual.disparities[0], 0.1, 100).median()) < 0.3
    for offset, pose in prediction.poses.items():
        # The car moves towards what is ahead: its points are closer in the next frame.
        frames = offset if settings.model.pose_input == "all" else np.sign(offset)
        moved = pose.transform()[:, :3, 3] * unit
        torch.testing.assert_close(moved, torch.tensor([[0.0, 0, -frames]] * 2).float(), atol=0.05, rtol=0)
    assert bool(prediction.poses) == (settings.train.poses == "learned")


def test_a_dataset_without_motion_is_refused_in_one_line(dataset: Path, tmp_path: Path) -> None:
    for key, name in (("loss.velocity=0.1", DISTANCES), ("train.poses=given", POSES)):
        with pytest.raises(UsageError, match=f"not every sample has {name}: pack it with md2 prep --motion"):
            train(dataset, tmp_path / key, "mono", [key])
