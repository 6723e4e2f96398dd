"""Camera motion over a sequence: predict it, chain it to a trajectory, compare it with ground truth as published.

A motion T_t is (4, 4) and takes points in frame t's camera to frame t+1's. A pose P_t takes points in frame t's
camera to the first frame's (or the world's): P_{t+1} = P_t T_t^-1.
"""

from __future__ import annotations

import copy
import io
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from md2.data.batch import Offset
from md2.geometry import disparity_to_depth
from md2.inference.predictor import Predictor
from md2.visualize import write_file
from shards.errors import InputError, UsageError

Matrices = NDArray[np.float64]
SNIPPET = 5
"""Frames in a snippet of the published measure."""


@dataclass(frozen=True)
class SnippetError:
    """Absolute trajectory error over all snippets, metres.

    Attributes:
        mean, std: over snippets, as published.
        errors: of each snippet, (frames - 1,).
    """

    mean: float
    std: float
    errors: NDArray[np.float64]


class MotionPredictor:
    """Runs the pose network of a model along a sequence; the model itself stays as it is.

    Raises:
        UsageError: the model was trained from stereo alone and has no pose network, or one that cannot follow a
            sequence.
    """

    def __init__(self, predictor: Predictor) -> None:
        # A copy of the module with the same parameters: its frames are set below.
        networks = copy.copy(predictor.networks)
        if not networks.temporal:
            raise UsageError("this model was trained from stereo alone and has no pose network: odometry needs one")
        self.predictor, self.networks = predictor, networks
        self.pairs = networks.pairs
        if self.pairs:
            # A pair network takes any two frames in temporal order, so one pass for each pair of neighbours is enough.
            networks.frames, networks.temporal = [0, 1], [1]
        elif set(networks.temporal) != {-1, 1}:
            raise UsageError(f"a pose network that sees frames {networks.frames} at once cannot follow a sequence")

    def motions(self, images: Iterable[Image.Image], batch_size: int = 8) -> Iterator[Matrices]:
        """Yield motions (n, 4, 4), batch by batch, in the model's unit; n + 1 frames give n motions.

        At least two frames are needed, three if the pose network sees three at once.
        """
        frames = (self.predictor.input(image) for image in images)
        steps = self._pair_steps(frames) if self.pairs else self._window_steps(frames)
        for batch in _batched(steps, batch_size):
            yield self._run(batch)

    def of_pairs(self, first: Tensor, second: Tensor) -> Matrices:
        """Predict motions (B, 4, 4) from frames (B, 3, H, W) in [0, 1] to the next ones, in the model's unit.

        Raises:
            UsageError: the network sees more than two frames at once.
        """
        if not self.pairs:
            raise UsageError("this pose network sees more than two frames at once: give the frames, not a dataset")
        return self._transforms({0: first, 1: second}, [(1, False)] * len(first))

    @staticmethod
    def _pair_steps(frames: Iterator[Tensor]) -> Iterator[_Step]:
        for first, second in pairwise(frames):
            images: dict[Offset, Tensor] = {0: first, 1: second}
            yield _Step(images, 1, False)

    @staticmethod
    def _window_steps(frames: Iterator[Tensor]) -> Iterator[_Step]:
        """For every three frames the motion from the middle one to the last; for the first three also the first."""
        window: deque[Tensor] = deque(maxlen=3)
        for number, frame in enumerate(frames):
            window.append(frame)
            if len(window) < 3:
                continue
            images: dict[Offset, Tensor] = {0: window[1], -1: window[0], 1: window[2]}
            if number == 2:
                yield _Step(images, -1, True)
            yield _Step(images, 1, False)

    def _run(self, steps: Sequence[_Step]) -> Matrices:
        images = {offset: torch.stack([step.images[offset] for step in steps]) for offset in steps[0].images}
        return self._transforms(images, [(step.offset, step.invert) for step in steps])

    @torch.inference_mode()
    def _transforms(self, images: dict[Offset, Tensor], wanted: Sequence[tuple[Offset, bool]]) -> Matrices:
        """Predict, for each row, the transform to one offset, inverted or not."""
        predictor = self.predictor
        images = {offset: image.to(predictor.device, torch.float32) for offset, image in images.items()}
        poses = self.networks.poses(images)
        model = predictor.config.model
        depth = None
        if any(pose.relative for pose in poses.values()):
            sigmoid = self.networks.disparities(images[0])[0].float()
            depth = disparity_to_depth(sigmoid, model.min_depth, model.max_depth)
        found = {offset: pose.transform(depth).double().cpu().numpy() for offset, pose in poses.items()}
        rows = [found[offset][row] for row, (offset, _) in enumerate(wanted)]
        return np.stack([_inverse(row) if invert else row for row, (_, invert) in zip(rows, wanted, strict=True)])


@dataclass(frozen=True)
class _Step:
    """Images for one motion, the offset whose pose it is, and whether to invert it."""

    images: dict[Offset, Tensor]
    offset: Offset
    invert: bool


def _batched(steps: Iterable[_Step], size: int) -> Iterator[list[_Step]]:
    batch: list[_Step] = []
    for step in steps:
        batch.append(step)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def trajectory(motions: Matrices, scale: float = 1.0) -> Matrices:
    """Chain motions (n, 4, 4) to poses (n + 1, 4, 4), the first the identity; translations times `scale`."""
    poses = [np.eye(4)]
    for motion in motions:
        scaled = motion.copy()
        scaled[:3, 3] *= scale
        poses.append(poses[-1] @ _inverse(scaled))
    return np.stack(poses)


def motions_of(poses: Matrices) -> Matrices:
    """Return the motions (n, 4, 4) between poses (n + 1, 4, 4)."""
    return np.stack([_inverse(after) @ before for before, after in pairwise(poses)])


def _inverse(transform: Matrices) -> Matrices:
    """Invert a rigid transform exactly."""
    rotation = transform[:3, :3].T
    inverse = np.eye(4)
    inverse[:3, :3], inverse[:3, 3] = rotation, -rotation @ transform[:3, 3]
    return inverse


def snippet_error(true: Matrices, predicted: Matrices, length: int = SNIPPET) -> SnippetError:
    """Measure the absolute trajectory error on snippets of 5 frames, as published.

    One snippet starts at every frame but the last; those at the end are shorter. Both sides are chained from their
    motions as they are (not their inverses), start at the origin, and the prediction is scaled by least squares:
    s = sum(true . predicted) / sum(predicted . predicted). The error is |s predicted - true| (all coordinates of
    all frames together) divided by the number of frames, not by its root, as in the published numbers.

    Args:
        true, predicted: motions (n, 4, 4).

    Raises:
        InputError: the two differ in length, or are empty.

    Source:
        Zhou et al., "Unsupervised Learning of Depth and Ego-Motion from Video", CVPR 2017, section 4.3 and its
        released evaluation, which Godard et al., ICCV 2019, supplement, use.
    """
    if len(true) != len(predicted) or not len(true):
        raise InputError(f"{len(predicted)} predicted motions for {len(true)} true ones: the same frames are needed")
    errors = []
    for start in range(len(true)):
        places = _chain(true[start : start + length - 1]), _chain(predicted[start : start + length - 1])
        errors.append(_aligned_error(*places))
    found = np.array(errors)
    return SnippetError(float(found.mean()), float(found.std()), found)


def _chain(motions: Matrices) -> NDArray[np.float64]:
    """Chain n motions to places (n + 1, 3)."""
    pose = np.eye(4)
    places = [pose[:3, 3]]
    for motion in motions:
        pose = pose @ motion
        places.append(pose[:3, 3])
    return np.stack(places)


def _aligned_error(true: NDArray[np.float64], predicted: NDArray[np.float64]) -> float:
    squared = float((predicted**2).sum())
    # A prediction without motion has no scale; its error is how far the truth moved.
    scale = float((true * predicted).sum()) / squared if squared else 0.0
    return float(np.sqrt(((scale * predicted - true) ** 2).sum())) / len(true)


def write_poses(path: Path, poses: Matrices) -> None:
    """Write poses (n, 4, 4) in KITTI's format: one a line, 12 numbers, row-major 3x4.

    Raises:
        InputError: the file cannot be written.
    """
    rows = ("".join(" ".join(f"{number:.6e}" for number in pose[:3].ravel()) + "\n") for pose in poses)
    write_file(path, "".join(rows).encode())


def trajectory_scale(true: Matrices, predicted: Matrices) -> float:
    """Return the least-squares factor from predicted to true places, both (n, 4, 4) with the first the identity."""
    a, b = true[:, :3, 3], predicted[:, :3, 3]
    squared = float((b**2).sum())
    return float((a * b).sum()) / squared if squared else 1.0


def trajectory_png(predicted: Matrices, true: Matrices | None, title: str, note: str, *, metres: bool = False) -> bytes:
    """Draw the trajectory from above (x to the right, z up) as PNG; `true` is (n, 4, 4) in its own first frame."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 7), layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.add_subplot()
    if true is not None:
        axes.plot(true[:, 0, 3], true[:, 2, 3], color="0.35", linewidth=2, label="ground truth")
    axes.plot(predicted[:, 0, 3], predicted[:, 2, 3], color="tab:red", linewidth=1.5, label=f"predicted{note}")
    axes.plot(0, 0, "o", color="black", markersize=6, label="start")
    axes.set_aspect("equal", adjustable="datalim")
    unit = "m" if metres else "the model's unit"
    axes.set_xlabel(f"x, to the right [{unit}]")
    axes.set_ylabel(f"z, forward [{unit}]")
    axes.set_title(title, loc="left", fontsize=11)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()
