"""Camera motion over a sequence: predict it, chain it to a trajectory, compare that with ground truth as published.

A motion T_t is (4, 4) and takes points in frame t's camera to frame t+1's. A pose P_t takes points in frame t's
camera to the first frame's (or the world's): P_{t+1} = P_t T_t^-1.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from md2.data.batch import Offset
from md2.geometry import disparity_to_depth
from md2.inference.predictor import Predictor, float32_convolutions
from md2.visualize import write_file
from shards.errors import InputError, UsageError

Matrices = NDArray[np.float64]
SNIPPET = 5
"""Frames in a snippet of the published error."""


@dataclass(frozen=True)
class SnippetError:
    """Absolute trajectory error over all snippets, metres: mean and standard deviation; `errors` of each snippet."""

    mean: float
    std: float
    errors: NDArray[np.float64]


class MotionPredictor:
    """Runs the pose network of a model along a sequence; the model itself stays as it is.

    Raises:
        UsageError: the model has no pose network, or one that cannot follow a sequence.
    """

    def __init__(self, predictor: Predictor) -> None:
        # A copy of the module with the same parameters: its frames are set below.
        networks = copy.copy(predictor.networks)
        if not networks.learns_poses:
            raise UsageError(
                "this model has no pose network (trained from stereo alone, or with given poses): odometry needs one"
            )
        self.predictor, self.networks = predictor, networks
        self.pairs = networks.pairs
        if self.pairs:
            # A pair network takes any two frames in temporal order, so one pass per pair of neighbours is enough.
            networks.frames, networks.temporal = [0, 1], [1]
        elif set(networks.temporal) != {-1, 1}:
            raise UsageError(f"a pose network that sees frames {networks.frames} at once cannot follow a sequence")

    def motions(self, images: Iterable[Image.Image], batch_size: int = 8) -> Iterator[Matrices]:
        """Yield motions (n, 4, 4), batch by batch, in the model's unit; n + 1 frames give n motions.

        At least two frames are needed, or three if the pose network sees three at once.
        """
        frames = (self.predictor.input(image) for image in images)
        overlap = 1 if self.pairs else 2
        known = list(islice(frames, overlap))
        first = True
        while batch := list(islice(frames, batch_size)):
            window = torch.stack([*known, *batch])
            known = [*known, *batch][-overlap:]
            if self.pairs:
                yield self.of_pairs(window[:-1], window[1:])
                continue
            found = self._transforms({0: window[1:-1], -1: window[:-2], 1: window[2:]})
            # The network sees a middle frame: the first motion is the inverse of that back to the frame before.
            yield np.concatenate([np.linalg.inv(found[-1][:1]), found[1]]) if first else found[1]
            first = False

    def of_pairs(self, first: Tensor, second: Tensor) -> Matrices:
        """Predict motions (B, 4, 4) from frames (B, 3, H, W) in [0, 1] to the next ones, in the model's unit.

        Raises:
            UsageError: the network sees more than two frames at once.
        """
        if not self.pairs:
            raise UsageError("this pose network sees more than two frames at once: give the frames, not a dataset")
        return self._transforms({0: first, 1: second})[1]

    @torch.inference_mode()
    def _transforms(self, images: dict[Offset, Tensor]) -> dict[Offset, Matrices]:
        """Predict the transform from the target to each source."""
        predictor, model = self.predictor, self.predictor.config.model
        images = {offset: image.to(predictor.device, torch.float32) for offset, image in images.items()}
        depth = None
        with float32_convolutions():
            poses = self.networks.poses(images)
            if any(pose.relative for pose in poses.values()):
                sigmoid = self.networks.disparities(images[0])[0].float()
                depth = disparity_to_depth(sigmoid, model.min_depth, model.max_depth)
        return {offset: pose.transform(depth).double().cpu().numpy() for offset, pose in poses.items()}


def trajectory(motions: Matrices, scale: float = 1.0) -> Matrices:
    """Chain motions (n, 4, 4) to poses (n + 1, 4, 4), the first the identity; translations times `scale`."""
    scaled = motions.copy()
    scaled[:, :3, 3] *= scale
    return _chain(np.linalg.inv(scaled))


def motions_of(poses: Matrices) -> Matrices:
    """Return the motions (n, 4, 4) between poses (n + 1, 4, 4)."""
    return np.linalg.inv(poses[1:]) @ poses[:-1]


def _chain(steps: NDArray[Any]) -> Matrices:
    """Multiply transforms (n, 4, 4) one after the other: (n + 1, 4, 4), the first the identity."""
    poses = [np.eye(4)]
    for step in steps:
        poses.append(poses[-1] @ step)
    return np.stack(poses)


def snippet_error(true: Matrices, predicted: Matrices, length: int = SNIPPET) -> SnippetError:
    """Compute the absolute trajectory error on snippets of 5 frames, as published.

    A snippet starts at every frame but the last; those at the end are shorter. Both sides are chained from their
    motions (not from the inverses) and start at the origin. The prediction is scaled by least squares:
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
        a, b = (_chain(motions[start : start + length - 1])[:, :3, 3] for motions in (true, predicted))
        # A prediction without motion has no scale; its error is the distance that the truth moved.
        difference = _scale(a, b, still=0.0) * b - a
        errors.append(float(np.sqrt((difference**2).sum())) / len(difference))
    found = np.array(errors)
    return SnippetError(float(found.mean()), float(found.std()), found)


def _scale(true: NDArray[np.float64], predicted: NDArray[np.float64], still: float) -> float:
    """Return the least-squares factor from predicted to true places (n, 3); `still` if nothing moves."""
    squared = float((predicted**2).sum())
    return float((true * predicted).sum()) / squared if squared else still


def write_poses(path: Path, poses: Matrices) -> None:
    """Write poses (n, 4, 4) in KITTI's format: one a line, 12 numbers, row-major 3x4.

    Raises:
        InputError: the file cannot be written.
    """
    buffer = io.BytesIO()
    np.savetxt(buffer, poses[:, :3].reshape(-1, 12), "%.6e")
    write_file(path, buffer.getvalue())


def write_tum(path: Path, poses: Matrices) -> None:
    """Write poses (n, 4, 4) in TUM's format: lines `time tx ty tz qx qy qz qw`; the time is the frame's number.

    Raises:
        InputError: the file cannot be written.
    """
    lines = []
    for frame, pose in enumerate(poses):
        numbers = [*pose[:3, 3], *_quaternion(pose[:3, :3])]
        lines.append(" ".join([str(frame), *(f"{number:.9g}" for number in numbers)]))
    write_file(path, "".join(f"{line}\n" for line in lines).encode())


def _quaternion(turn: NDArray[np.float64]) -> list[float]:
    """x, y, z, w of a rotation (3, 3): the eigenvector of Bar-Itzhack's matrix (J. Guidance, 2000), w at least 0."""
    a, b, c = turn
    symmetric = np.array(
        [
            [a[0] - b[1] - c[2], b[0] + a[1], c[0] + a[2], c[1] - b[2]],
            [b[0] + a[1], b[1] - a[0] - c[2], c[1] + b[2], a[2] - c[0]],
            [c[0] + a[2], c[1] + b[2], c[2] - a[0] - b[1], b[0] - a[1]],
            [c[1] - b[2], a[2] - c[0], b[0] - a[1], a[0] + b[1] + c[2]],
        ]
    )
    vector = np.linalg.eigh(symmetric)[1][:, -1]
    return list(vector if vector[3] >= 0 else -vector)


def trajectory_scale(true: Matrices, predicted: Matrices) -> float:
    """Return the least-squares factor from predicted to true places, both (n, 4, 4) with the first the identity."""
    return _scale(true[:, :3, 3], predicted[:, :3, 3], still=1.0)


def trajectory_png(predicted: Matrices, true: Matrices | None, title: str, note: str, *, metres: bool = False) -> bytes:
    """Draw the trajectory from above (x to the right, z up) as PNG; `true` (n, 4, 4) starts at the identity too."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 7), layout="constrained")
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
