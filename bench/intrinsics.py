"""How far learned intrinsics come from a wrong guess, by how much the camera turns.

    md2 bench intrinsics FOLDER [--turns 0,1,4] [--train] [key.sub=value ...]      FOLDER keeps films, shards and runs

A synthetic street is filmed by a car that goes straight, or whose camera swings to the sides and a little up and down;
TURNS are the fastest swings, in degrees a frame. The camera's focal length is 0.58 of the image's width.

First with exact depth: the camera and the motion of each frame are free, then a plane for each frame's inverse depth,
too, since networks can learn that as well. Then, with --train, as a user would: drives of each kind are packed with a
camera.yaml that holds a field of view alone, and `md2 train` learns depth, motion and camera. Overrides are for it.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch

from bench.camera import md2
from md2.config import LossConfig, ModelConfig
from md2.data.batch import Batch, Offset
from md2.inference.film import VideoWriter
from md2.loss import ReprojectionLoss
from md2.model import Pose, Prediction
from md2.networks.camera import LearnedCamera, in_pixels
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
STREETS, LENGTH, RATE = 3, 60, 10
TRAINING = ["data.frames=[0,-1,1]", "data.stereo=false", "data.intrinsics=learned", f"data.width={SIZE[0]}"]
TRAINING += [f"data.height={SIZE[1]}", "train.batch_size=4", "train.epochs=40", "train.lr_step_epochs=32"]
TRAINING += ["train.camera_from=500", "train.image_every=100000", "train.log_every=20"]


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


def train(folder: Path, turn: float, overrides: list[str]) -> Iterator[dict[str, float]]:
    """Learned intrinsics of a run on films of one kind, from its guess to its last row of metrics."""
    place = folder / f"turn{turn:g}"
    if not (place / "drives/camera.yaml").exists():
        for street in range(1, STREETS + 1):
            view = renderer(street, turn, LENGTH, (SIZE[0] * 2, SIZE[1] * 2))
            with VideoWriter(place / f"drives/{street}.mp4", Fraction(RATE)) as film:
                for frame in range(LENGTH):
                    film.write(view.image(frame, 2)[0])
        (place / "drives/camera.yaml").write_text("fov: 75\nrate: 30\n")
    if not (place / "shards/dataset.json").exists():
        words = ["--dataset", "folder", "--raw", place / "drives", "--out", place / "shards", "--workers", 1]
        md2("prep", *words, "--size", f"{SIZE[0]}x{SIZE[1]}")
    if (place / "run/checkpoints/last.pt").exists():
        md2("train", "--resume", place / "run")
    else:
        md2("train", "demo", f"data.url={place / 'shards'}", *TRAINING, *overrides, "--run", place / "run")
    true = CameraRig(SIZE).intrinsics
    for row in read_metrics(place / "run"):
        if row["kind"] == "train":
            yield {axis: row[f"camera/{axis}"] / true[i, i] - 1 for i, axis in enumerate(("fx", "fy"))} | row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--turns", default="0,1,4", help="fastest turns, degrees a frame (default: 0,1,4)")
    parser.add_argument("--train", action="store_true", help="also train, which takes most of the time")
    parser.add_argument("overrides", nargs="*", help="key.sub=value for md2 train")
    options = parser.parse_args()
    turns = [float(turn) for turn in options.turns.split(",")]
    print("| turns, degrees a frame | free | first guess | error of fx | error of fy |\n|---|---|---:|---:|---:|")
    for turn in turns:
        view = renderer(1, turn, FRAMES.stop + 3)
        for planes in (False, True):
            for guess in GUESSES:
                found = fit(view, guess, planes)
                free = "camera, motion" + ", planes" * planes
                start = SIZE[0] / 2 / math.tan(math.radians(guess) / 2) / CameraRig(SIZE).intrinsics[0, 0] - 1
                print(f"| {turn:g} | {free} | {start:+.0%} | {found['fx']:+.1%} | {found['fy']:+.1%} |", flush=True)
    if options.train:
        print("\n| turns, degrees a frame | step | error of fx | error of fy |\n|---|---:|---:|---:|")
        for turn in turns:
            rows = list(train(options.folder, turn, options.overrides))
            for row in [rows[0], *rows[len(rows) // 4 :: max(1, len(rows) // 4)]]:
                print(f"| {turn:g} | {row['step']} | {row['fx']:+.1%} | {row['fy']:+.1%} |", flush=True)


if __name__ == "__main__":
    main()
