"""How far learned intrinsics come from a wrong guess, by how much the camera turns.

    md2 bench intrinsics FOLDER [--turns 0,1,4] [--train [--poses learned,given]] [key.sub=value ...]

FOLDER keeps drives, shards and runs.

A synthetic street is filmed by a car that goes straight, or whose camera swings to the sides and a little up and down;
TURNS are the fastest swings, in degrees a frame. The camera's focal length is 0.58 of the image's width.

First with exact depth: the camera and the motion of each frame are free, then a plane for each frame's inverse depth,
too, since networks can learn that as well. Then, with --train: drives of each kind are packed with a camera.yaml that
holds a field of view alone, and narrow networks learn depth, motion and camera from random weights, at a first focal
length of 0.7 and 1.4 of the true one. A run takes 3 to 4 minutes of one core; a rerun resumes. Overrides are for it.
"""

from __future__ import annotations

import argparse
import itertools
import math
from dataclasses import dataclass, replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image

from bench.camera import md2
from bench.plain import Setting
from md2.config import Config, LossConfig, ModelConfig, load_config
from md2.data.batch import Batch, Offset
from md2.loss import ReprojectionLoss
from md2.model import Networks, Pose, Prediction
from md2.networks.camera import LearnedCamera, in_pixels
from md2.train import PlainReporter, resume_run, start_run
from md2.training.runlog import read_metrics
from prep.synthetic.render import Renderer
from prep.synthetic.rig import Array, CameraRig, Trajectory, inverse, rigid, rotation
from prep.synthetic.street import build_street

SIZE = (96, 64)
FRAMES = range(1, 6)
GUESSES = (65, 100)
"""Degrees; the true field of view is 82."""
FIT_STEPS = 100
FAR = 1e4
STARTS = (0.7, 1.4)
"""First focal lengths of trainings, as shares of the true one."""
STREETS, LENGTH = 3, 60
SETTING = Setting((0, -1, 1), stereo=False, size=SIZE)
TRAINING = ["data.frames=[0,-1,1]", "data.stereo=false", "data.intrinsics=learned", "data.color_jitter=false"]
TRAINING += [f"data.width={SIZE[0]}", f"data.height={SIZE[1]}", "data.threads=1", "model.scales=[0]"]
TRAINING += ["train.max_steps=1200", "train.epochs=100", "train.lr_step_epochs=50", "train.learning_rate=1e-3"]
TRAINING += ["train.camera_from=300", "train.image_every=100000", "train.log_every=50"]


class Narrow(Networks):
    """A quarter as wide, and their first disparities and motions those of a street (`bench.plain`)."""

    @classmethod
    def of(cls, config: Config) -> Networks:
        return SETTING.prepared(Networks.of(config))


@dataclass(frozen=True)
class Turning(Trajectory):
    """The car's motion with a camera that swings; exactly straight ahead without a swing.

    Attributes:
        fastest: radians a frame to the sides, and 0.4 of that up and down.
    """

    fastest: float = 0.0

    def world_from_rectified(self, frame: float) -> Array:
        if not self.fastest:
            return rigid(np.eye(3), (1.7, -1.65, self._position(frame)[2]))
        sideways = self.fastest / 0.7 * math.sin(0.7 * frame + self.phase)
        pitch = 0.4 * self.fastest / 0.9 * math.sin(0.9 * frame + 2 * self.phase)
        return super().world_from_rectified(frame) @ rigid(rotation(pitch, sideways, 0), (0, 0, 0))


def renderer(street: int, turn: float, frames: int, size: tuple[int, int] = SIZE) -> Renderer:
    """A street that is filmed with swings of up to `turn` degrees a frame."""
    built = build_street(0, street, frames)
    old = built.trajectory
    motion = Turning(old.road, old.speed, old.phase, math.radians(turn))
    return Renderer(replace(built, trajectory=motion), CameraRig(size))


def axis_angle(turn: Array) -> Array:
    """A rotation matrix as axis times angle (radians)."""
    angle = math.acos(min(1.0, (np.trace(turn) - 1) / 2))
    axis = np.array([turn[2, 1] - turn[1, 2], turn[0, 2] - turn[2, 0], turn[1, 0] - turn[0, 1]]) / 2
    return np.asarray(axis if angle < 1e-6 else axis * angle / math.sin(angle))


def fit(view: Renderer, guess: float, planes: bool) -> dict[str, float]:
    """Camera and motions that fit the images best, from a guess and the motions that look alike with it.

    Args:
        guess: field of view in degrees.
        planes: whether each frame's inverse depth may be multiplied by exp(a + b x + c y).

    Returns:
        Relative errors of fx and fy, and the loss.
    """
    width, height = SIZE
    seen = {n: view.image(n, 2) for n in range(FRAMES.start - 1, FRAMES.stop + 1)}
    images: dict[Offset, torch.Tensor] = {
        o: torch.stack([torch.from_numpy(seen[n + o][0]).permute(2, 0, 1) / 255 for n in FRAMES]) for o in (0, -1, 1)
    }
    nearness = 1 / torch.stack([torch.from_numpy(seen[n][1])[None] for n in FRAMES]).clamp(0.1, FAR)
    count = len(FRAMES)
    batch = Batch(images, images, torch.empty(count, 3, 3), None, 5.4, None, None, [""] * count)
    camera = LearnedCamera(width, height, guess)
    true = view.rig.intrinsics[0, 0]
    motions = {}
    for offset in (-1, 1):
        exact = [inverse(view.pose(n + offset, 2)) @ view.pose(n, 2) for n in FRAMES]
        # A turn by the angle times the focal length moves the image's centre by as much.
        alike = true / in_pixels(camera(), (height, width))[0]
        rows = [np.concatenate([axis_angle(m[:3, :3]) * alike, m[:3, 3]]) for m in exact]
        motions[offset] = torch.tensor(np.array(rows), dtype=torch.float32).requires_grad_()
    plane = torch.zeros(count, 3, 1, 1, requires_grad=True)
    x, y = torch.linspace(-1, 1, width), torch.linspace(-1, 1, height).view(-1, 1)
    groups = [{"params": camera.parameters(), "lr": 2e-3}, {"params": motions.values(), "lr": 4e-3}]
    optimizer = torch.optim.Adam([*groups, {"params": [plane], "lr": 0.01 * planes}])
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.97)
    loss = ReprojectionLoss(LossConfig(disparity_smoothness=0.0), ModelConfig(max_depth=FAR))
    for _ in range(FIT_STEPS):
        tilted = nearness * torch.exp(plane[:, :1] + plane[:, 1:2] * x + plane[:, 2:] * y)
        disparity = ((tilted - 1 / FAR) / (10 - 1 / FAR)).clamp(0, 1)
        poses: dict[Offset, Pose] = {o: Pose(row[:, :3], row[:, 3:]) for o, row in motions.items()}
        optimizer.zero_grad()
        total = loss(batch, Prediction({0: disparity}, poses, {}, camera())).total
        total.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    fx, fy, _, _ = in_pixels(camera(), (height, width))
    return {"fx": fx / true - 1, "fy": fy / true - 1, "loss": total.item()}


def film(folder: Path, turn: float) -> None:
    """Write drives as a user has them: frames, each camera's poses, and a camera.yaml with a field of view alone."""
    for street in range(1, STREETS + 1):
        view = renderer(street, turn, LENGTH)
        frames = folder / str(street) / "left"
        frames.mkdir(parents=True, exist_ok=True)
        for number in range(LENGTH):
            Image.fromarray(view.image(number, 2)[0]).save(frames / f"{number:03d}.png")
        np.savetxt(frames.parent / "poses.txt", [view.pose(number, 2)[:3].ravel() for number in range(LENGTH)])
    (folder / "camera.yaml").write_text("fov: 75\n")


def train(folder: Path, turn: float, poses: str, guess: float, overrides: list[str]) -> dict[str, float]:
    """Train depth, motion and camera from random weights, or resume that; one run.

    Args:
        turn: degrees a frame.
        poses: `learned`, or `given`: the true ones.
        guess: first focal length, as a share of the true one.

    Returns:
        The last row of the run's metrics.
    """
    place, true = folder / f"turn{turn:g}", CameraRig(SIZE).intrinsics
    drives, shards, run = place / "drives", place / "shards", place / f"{poses}_{guess:g}"
    if not (drives / "camera.yaml").exists():
        film(drives, turn)
    if not (shards / "dataset.json").exists():
        words = ["--dataset", "folder", "--raw", drives, "--out", shards, "--part", "train", "--motion", "--workers", 1]
        md2("prep", *words, "--size", f"{SIZE[0]}x{SIZE[1]}")
    with patch("md2.training.trainer.Networks", Narrow):
        if (run / "config.yaml").exists():
            resume_run(run, [], PlainReporter())
        else:
            fov = math.degrees(2 * math.atan(SIZE[0] / 2 / (true[0, 0] * guess)))
            settings = [f"data.url={shards}", f"data.fov={fov}", f"train.poses={poses}", *TRAINING, *overrides]
            start_run(load_config("demo", settings), run, PlainReporter())
    return [row for row in read_metrics(run) if row["kind"] == "train"][-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--turns", default="0,1,4", help="fastest turns, degrees a frame (default: 0,1,4)")
    parser.add_argument("--train", action="store_true", help="train instead")
    parser.add_argument("--poses", default="learned", help="learned, given, or both (default: learned)")
    parser.add_argument("overrides", nargs="*", help="key.sub=value for md2 train")
    options = parser.parse_args()
    turns = [float(turn) for turn in options.turns.split(",")]
    if options.train:
        train_all(options.folder, turns, options.poses.split(","), options.overrides)
    else:
        fit_all(turns)


def fit_all(turns: list[float]) -> None:
    print("| turns, degrees a frame | free | first guess | error of fx | error of fy |\n|---|---|---:|---:|---:|")
    for turn in turns:
        view = renderer(1, turn, FRAMES.stop + 3)
        for planes in (False, True):
            for guess in GUESSES:
                found = fit(view, guess, planes)
                free = "camera, motion" + ", planes" * planes
                start = SIZE[0] / 2 / math.tan(math.radians(guess) / 2) / CameraRig(SIZE).intrinsics[0, 0] - 1
                print(f"| {turn:g} | {free} | {start:+.0%} | {found['fx']:+.1%} | {found['fy']:+.1%} |", flush=True)


def train_all(folder: Path, turns: list[float], motions: list[str], overrides: list[str]) -> None:
    true = CameraRig(SIZE).intrinsics
    focal = float(true[0, 0])
    print(f"true: fx = fy = {focal:.1f}, cx = {true[0, 2]:.1f}, cy = {true[1, 2]:.1f} pixels\n")
    print("| turns, degrees a frame | poses | first guess | steps | fx | fy | cx | cy |")
    print("|---|---|---:|---:|---:|---:|---:|---:|")
    for turn, poses, guess in itertools.product(turns, motions, STARTS):
        row = train(folder, turn, poses, guess, overrides)
        fx, fy, cx, cy = (row[f"camera/{name}"] for name in ("fx", "fy", "cx", "cy"))
        found = f"{fx:.1f} ({fx / focal - 1:+.1%}) | {fy:.1f} ({fy / focal - 1:+.1%}) | {cx:.1f} | {cy:.1f}"
        print(f"| {turn:g} | {poses} | {guess - 1:+.0%} | {row['step']} | {found} |", flush=True)


if __name__ == "__main__":
    main()
