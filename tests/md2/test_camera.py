"""Learned intrinsics: exact geometry shows the focal length, and a run keeps what it learned."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluation_data import tiny_checkpoint, tiny_config
from PIL import Image
from train_data import Silent, config, trainer

import md2.networks.camera as camera_module
from bench import intrinsics
from md2.checkpoint import load_checkpoint
from md2.config import DataConfig, LossConfig, ModelConfig, load_config
from md2.data.batch import Batch, Offset
from md2.data.warnings import guess_warning
from md2.inference.inputs import find_inputs
from md2.inference.predict import PredictOptions, run_predict
from md2.inference.predictor import load
from md2.loss import ReprojectionLoss
from md2.model import Pose, Prediction
from md2.networks.camera import LearnedCamera, in_pixels, matrices
from md2.train import resume_run, start_run
from md2.training.runlog import Reporter, read_metrics
from prep.synthetic.render import Renderer
from prep.synthetic.rig import Array, CameraRig, Trajectory, inverse, rigid, rotation
from prep.synthetic.street import build_street
from shards.dataset import open_dataset
from shards.errors import UsageError

WIDTH, HEIGHT = 96, 64


@dataclass(frozen=True)
class Looking(Trajectory):
    """The car's motion with a camera that looks around by about 4 degrees a frame, to the sides, up and down."""

    def world_from_rectified(self, frame: float) -> Array:
        turn = rotation(0.1 * math.sin(2.1 * frame), 0.12 * math.sin(frame), 0.1 * math.sin(1.6 * frame))
        return super().world_from_rectified(frame) @ rigid(turn, (0, 0, 0))


def axis_angle(turn: Array) -> Array:
    """A rotation matrix as axis times angle."""
    angle = math.acos((np.trace(turn) - 1) / 2)
    axis = np.array([turn[2, 1] - turn[1, 2], turn[0, 2] - turn[2, 0], turn[1, 0] - turn[0, 1]])
    return np.asarray(axis * angle / (2 * math.sin(angle)))


def exact(frames: range) -> tuple[Batch, Prediction]:
    """Rendered frames with what perfect networks would say: exact depth (up to 10 km) and motion."""
    street = build_street(0, 1, frames.stop + 1)
    old = street.trajectory
    view = Renderer(replace(street, trajectory=Looking(old.road, old.speed, old.phase)), CameraRig((WIDTH, HEIGHT)))
    seen = {n: view.image(n, 2) for n in range(frames.start - 1, frames.stop + 1)}
    images: dict[Offset, torch.Tensor] = {
        offset: torch.stack([torch.from_numpy(seen[n + offset][0]).permute(2, 0, 1) / 255 for n in frames])
        for offset in (0, -1, 1)
    }
    depth = torch.stack([torch.from_numpy(seen[n][1])[None] for n in frames]).clamp(0.1, 1e4)
    poses: dict[Offset, Pose] = {}
    for offset in (-1, 1):
        motions = [inverse(view.pose(n + offset, 2)) @ view.pose(n, 2) for n in frames]
        turns, shifts = ([axis_angle(m[:3, :3]) for m in motions], [m[:3, 3] for m in motions])
        poses[offset] = Pose(*(torch.tensor(np.array(values), dtype=torch.float32) for values in (turns, shifts)))
    unknown = torch.full((len(frames), 3, 3), torch.nan)  # a loss that still took the dataset's would be NaN
    batch = Batch(images, images, unknown, None, 5.4, None, None, [str(n) for n in frames])
    return batch, Prediction({0: (1 / depth - 1e-4) / (10 - 1e-4)}, poses)


def mirrored(batch: Batch, prediction: Prediction) -> tuple[Batch, Prediction]:
    """The mirror world: images and disparity are flipped, and so are motions."""
    images = {offset: image.flip(-1) for offset, image in batch.images.items()}
    turn, shift = torch.tensor([1.0, -1, -1]), torch.tensor([-1.0, 1, 1])
    poses = {o: Pose(pose.axis_angle * turn, pose.translation * shift) for o, pose in prediction.poses.items()}
    flipped = torch.ones(batch.size, dtype=torch.bool)
    return replace(batch, images=images, flipped=flipped), Prediction({0: prediction.disparities[0].flip(-1)}, poses)


def test_exact_depth_and_motion_show_the_camera(monkeypatch: pytest.MonkeyPatch) -> None:
    """Focal lengths within 1 %, the centre within half a pixel, from a guess of 60 degrees (true: 82)."""
    monkeypatch.setattr(camera_module, "GAINS", (30.0, 30.0, 10.0, 10.0))  # 60 steps are enough
    seen = exact(range(2, 6))
    pairs = [seen, mirrored(*seen)]
    camera = LearnedCamera(WIDTH, HEIGHT, 60)
    loss = ReprojectionLoss(LossConfig(), ModelConfig(max_depth=1e4))
    optimizer = torch.optim.Adam(camera.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.93)
    for step in range(60):
        batch, prediction = pairs[step % 2]
        optimizer.zero_grad()
        loss(batch, replace(prediction, camera=camera())).total.backward()
        optimizer.step()
        schedule.step()
    fx, fy, cx, cy = in_pixels(camera(), (HEIGHT, WIDTH))
    true = CameraRig((WIDTH, HEIGHT)).intrinsics
    assert (fx, fy) == (pytest.approx(true[0, 0], rel=0.01), pytest.approx(true[1, 1], rel=0.01))
    assert (cx, cy) == (pytest.approx(true[0, 2], abs=0.5), pytest.approx(true[1, 2], abs=0.5))


def test_a_mirrored_image_has_a_mirrored_camera() -> None:
    """A point at x before an unmirrored camera lies at -x before the mirrored one, in the pixel across the image."""
    camera = torch.tensor([0.6, 0.9, 0.45, 0.4])
    plain, mirror = matrices(camera, (HEIGHT, WIDTH), torch.tensor([False, True]), 2)
    point, other = torch.tensor([0.7, -0.3, 4.0]), torch.tensor([-0.7, -0.3, 4.0])
    (u, v, z), (u_mirror, v_mirror, _) = (plain @ point).tolist(), (mirror @ other).tolist()
    assert u / z == pytest.approx(0.6 * WIDTH * 0.7 / 4 + 0.45 * WIDTH - 0.5)
    assert v / z == pytest.approx(0.9 * HEIGHT * -0.3 / 4 + 0.4 * HEIGHT - 0.5)
    assert (u_mirror / z, v_mirror) == pytest.approx((WIDTH - 1 - u / z, v))
    assert torch.equal(matrices(camera, (HEIGHT, WIDTH), None, 2), torch.stack([plain, plain]))


def test_the_first_guess_is_a_field_of_view_of_square_pixels() -> None:
    fx, fy, cx, cy = in_pixels(LearnedCamera(WIDTH, HEIGHT, 90)(), (HEIGHT, WIDTH))
    assert (fx, fy, cx, cy) == pytest.approx((48, 48, 47.5, 31.5))


def test_a_run_learns_its_camera_and_resumes_with_it(dataset: Path, tmp_path: Path) -> None:
    """Held for two steps, then moved; in metrics and checkpoint; the same numbers with a break as without."""
    learned = ["data.intrinsics=learned", "data.fov=80", "train.camera_from=2", "model.pose_network=posecnn"]
    settings = config(dataset, "mono", learned)

    whole, parted = tmp_path / "whole", tmp_path / "parted"
    start_run(settings, whole, Silent())
    rows = [row for row in read_metrics(whole) if row["kind"] == "train"]
    focal = [row["camera/fx"] for row in rows]
    assert len(focal) >= 4
    start = WIDTH / 2 / math.tan(math.radians(40))
    assert focal[:3] == pytest.approx([start] * 3, rel=1e-6)  # a row has the camera that the step began with
    assert abs(focal[3] / start - 1) > 1e-4
    start_run(config(dataset, "mono", [*learned, "train.max_steps=3"]), parted, Silent())
    resume_run(parted, ["train.max_steps=100"], Silent())
    one, other = (load_checkpoint(run / "checkpoints/last.pt").networks["camera"] for run in (whole, parted))
    assert one["offsets"].abs().min() > 0
    assert all(torch.equal(one[name], other[name]) for name in one)
    camera = load(whole, "cpu").predict(np.zeros((HEIGHT, 2 * WIDTH, 3), np.uint8)).intrinsics
    assert camera is not None
    assert camera[0] == pytest.approx(
        2 * WIDTH * float(one["start"][0] * torch.exp(camera_module.GAINS[0] * one["offsets"][0]))
    )


def test_the_bench_trains_on_drives_with_poses_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps, then a third, from 0.7 times the true focal length."""
    monkeypatch.setattr(intrinsics, "STREETS", 1)
    monkeypatch.setattr(intrinsics, "LENGTH", 10)
    few = ["train.batch_size=2", "train.camera_from=0", "train.log_every=1"]
    true = CameraRig(intrinsics.SIZE).intrinsics[0, 0]
    first = intrinsics.train(tmp_path, 4, "given", 0.7, [*few, "train.max_steps=1"])
    assert first["camera/fx"] == pytest.approx(0.7 * true)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(intrinsics, "film", None)  # what is there is used again
        patched.setattr(intrinsics, "resume_run", partial(_resume, steps=3))
        third = intrinsics.train(tmp_path, 4, "given", 0.7, [])
    assert third["step"] == 3
    assert 0.001 < abs(third["camera/fx"] / first["camera/fx"] - 1) < 0.05


def _resume(run: Path, overrides: list[str], reporter: Reporter, steps: int) -> object:
    return resume_run(run, [*overrides, f"train.max_steps={steps}"], reporter)


def test_intrinsics_that_are_a_guess_are_reported_unless_they_are_learned(dataset: Path) -> None:
    packed = open_dataset(str(dataset)).manifest
    guessed = packed.model_copy(update={"intrinsics": "guessed"})
    assert guess_warning(packed, DataConfig()) is None
    assert "data.intrinsics=learned" in (guess_warning(guessed, DataConfig()) or "")
    assert guess_warning(guessed, DataConfig(intrinsics="learned")) is None


def test_gradients_are_exchanged_while_the_camera_is_held(dataset: Path, tmp_path: Path) -> None:
    """DistributedDataParallel waits for the gradient of every parameter: 0, not none."""
    one = trainer(dataset, tmp_path / "run", ["data.intrinsics=learned", "model.pose_network=posecnn"], "mono")
    one._step([next(iter(one.loader))])
    assert one.networks.camera is not None
    assert one.networks.camera.offsets.grad is not None
    assert one.networks.camera.offsets.grad.tolist() == [0, 0, 0, 0]


def test_point_clouds_are_of_the_learned_camera(tmp_path: Path) -> None:
    """Its field of view, not KITTI's nominal one: the point of the first pixel lies on that pixel's ray."""
    plain = tiny_config()
    data = plain.data.model_copy(update={"intrinsics": "learned", "fov": 90.0})
    model = load(tiny_checkpoint(tmp_path / "a.pt", plain.model_copy(update={"data": data})), "cpu")
    Image.new("RGB", (80, 40), "grey").save(tmp_path / "a.png")
    inputs = find_inputs([str(tmp_path / "a.png")], tmp_path / "out")
    run_predict(model, inputs, PredictOptions(tmp_path / "out", ("ply",), max_depth=1e9))
    _, _, body = (tmp_path / "out/a.ply").read_bytes().partition(b"end_header\n")
    x, y, z = np.frombuffer(body, dtype="<f4", count=3)
    fy = 40 / 2 * data.width / data.height  # square pixels at the networks' size
    assert (x / z, y / z) == pytest.approx((-39.5 / 40, -19.5 / fy))


def test_without_motion_the_focal_length_cannot_be_learned() -> None:
    with pytest.raises(UsageError, match="only motion shows the focal length"):
        load_config("stereo", ["data.intrinsics=learned"])
