"""What `md2 odometry` does: motions along a sequence, the error against ground truth, files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from md2.evaluation.evaluate import single_part_loader
from md2.evaluation.odometry import (
    Matrices,
    MotionPredictor,
    SnippetError,
    motions_of,
    read_poses,
    snippet_error,
    trajectory,
    trajectory_png,
    trajectory_scale,
    write_poses,
)
from md2.inference.inputs import find_images, sort_inputs
from md2.inference.output import Progress
from md2.inference.predictor import Predictor, decode_image, read_image
from md2.inference.video import open_video
from md2.visualize import write_file
from shards.dataset import LocalDataset
from shards.errors import DatasetError, InputError


@dataclass(frozen=True)
class OdometryReport:
    """What came out.

    Attributes:
        name: of the sequence.
        frames: how many.
        unit: "metres" or "unknown", of the written trajectory.
        error: on 5-frame snippets; None without ground truth.
        scale: factor that fits the whole predicted trajectory to the true one; None without ground truth.
        written: files.
    """

    name: str
    frames: int
    unit: str
    error: SnippetError | None
    scale: float | None
    written: list[Path] = field(default_factory=list)


@dataclass(frozen=True)
class Frames:
    """Images of a sequence, in order; `total` is 0 where a video does not say. `name` is the video's or folder's."""

    name: str
    images: Iterator[Image.Image]
    total: int


def open_frames(source: str) -> Frames:
    """A folder, a glob or a video.

    Raises:
        InputError: nothing there, or images in several folders (two cameras, two drives).
    """
    given = sort_inputs([source])
    if given.videos:
        video = open_video(given.videos[0])
        return Frames(given.videos[0].stem, iter(video), video.frames or 0)
    images = find_images(given.images)
    folders = sorted({str(image.path.parent) for image in images})
    if len(folders) > 1:
        raise InputError(
            f"{source}: frames in {len(folders)} folders ({folders[0]}, {folders[1]} ...); a sequence is the frames of "
            "one camera, in one folder"
        )
    name = Path(folders[0]).resolve().name if folders else source
    return Frames(name, (read_image(image.path) for image in images), len(images))


def decode_frames(name: str, files: Iterable[tuple[str, bytes]], total: int) -> Frames:
    """Frames from named file contents."""
    return Frames(name, (decode_image(data, where) for where, data in files), total)


def true_poses(path: Path | None, given: Matrices | None, limit: int | None) -> Matrices | None:
    """Ground truth from a file, else as found beside the frames, (n, 3, 4); (n, 4, 4) of the first `limit` frames.

    Raises:
        InputError: the file is missing or broken.
    """
    if path is not None:
        return read_poses(path)[:limit]
    if given is None:
        return None
    poses = np.tile(np.eye(4), (len(given), 1, 1))
    poses[:, :3] = given
    return poses[:limit]


def predict_motions(
    predictor: Predictor,
    images: Iterable[Image.Image],
    *,
    batch_size: int = 8,
    total: int = 0,
    progress: Progress = lambda done, total: None,
) -> Matrices:
    """Motions (n, 4, 4) along n + 1 images, in the model's unit.

    Raises:
        UsageError: the model has no pose network that can follow a sequence.
        InputError: fewer than two images.
    """
    parts: list[Matrices] = []
    for motions in MotionPredictor(predictor).motions(images, batch_size):
        parts.append(motions)
        progress(sum(map(len, parts)) + 1, total)
    if not parts:
        raise InputError("a trajectory needs at least two frames (three where the pose network sees three at once)")
    return np.concatenate(parts)


def dataset_motions(
    predictor: Predictor,
    dataset: LocalDataset,
    part: str,
    *,
    limit: int | None = None,
    batch_size: int = 8,
    progress: Progress = lambda done, total: None,
) -> Matrices:
    """The same from packed samples of one sequence (`md2 prep --split odom`), whatever their order.

    Each sample gives the motion to its next frame, or from the one before, so that what a list leaves out at its
    ends is found in its neighbours.

    Args:
        limit: of so many frames at the start; all samples are looked at, since packed ones are in random order.

    Raises:
        DatasetError: the samples have no neighbouring frames, are of two sequences, or frames are missing.
    """
    offsets = [offset for offset in (1, -1) if offset in dataset.manifest.frames]
    if not offsets:
        raise DatasetError(f"{dataset.url}: frames {dataset.manifest.frames}; odometry needs the next or previous one")
    runner = MotionPredictor(predictor)
    found: dict[int, Matrices] = {}
    sequences: set[str] = set()
    total, done = dataset.manifest.samples(part), 0
    for batch in single_part_loader(dataset, part, predictor, [0, *offsets], batch_size):
        for offset in offsets:
            pair = (batch.images[0], batch.images[1]) if offset == 1 else (batch.images[-1], batch.images[0])
            for key, motion in zip(batch.keys, runner.of_pairs(*pair), strict=True):
                sequence, _, number = key.rpartition("_")
                sequences.add(sequence)
                found.setdefault(int(number) + min(offset, 0), motion)
        done += batch.size
        progress(done, total)
    if len(sequences) != 1:
        raise DatasetError(f"{dataset.url} part {part}: {len(sequences)} sequences in one part; odometry needs one")
    starts = sorted(found)
    if starts != list(range(starts[0], starts[-1] + 1)):
        missing = next(n for n in range(starts[0], starts[-1]) if n not in found)
        raise DatasetError(f"{dataset.url} part {part}: no sample leads from frame {missing} to the next")
    return np.stack([found[start] for start in starts[: limit - 1 if limit is not None else None]])


def report_motions(
    motions: Matrices, name: str, metres_per_unit: float | None, poses: Matrices | None, out: Path, model: str
) -> OdometryReport:
    """Compare with ground truth where there is some, and write NAME_poses.txt, NAME.png and NAME.json.

    Args:
        motions: (n, 4, 4) in the model's unit.
        poses: (n + 1, 4, 4) true, metres.

    Raises:
        InputError: another number of frames than of poses; the folder cannot be written.
    """
    if poses is not None and len(poses) != len(motions) + 1:
        raise InputError(f"sequence {name}: {len(motions) + 1} frames, but {len(poses)} true poses; they must agree")
    true = motions_of(poses) if poses is not None else None
    error = snippet_error(true, motions) if true is not None else None
    predicted = trajectory(motions, metres_per_unit or 1.0)
    truth = trajectory(true) if true is not None else None
    scale = trajectory_scale(truth, predicted) if truth is not None else None
    unit = "unknown" if metres_per_unit is None else "metres"

    files = {suffix: out / f"{name.replace('/', '_')}{suffix}" for suffix in ("_poses.txt", ".png", ".json")}
    write_poses(files["_poses.txt"], predicted)
    shown, note = predicted, ""
    if metres_per_unit is None and scale is not None:
        shown, note = trajectory(motions, scale), f" (scaled by {scale:.3g} to fit)"
    title = f"sequence {name}: {len(motions) + 1} frames" + (
        f", ATE {error.mean:.3f} ± {error.std:.3f} m" if error else ""
    )
    write_file(files[".png"], trajectory_png(shown, truth, title, note, metres=unit == "metres" or truth is not None))
    summary = {
        "sequence": name,
        "model": model,
        "frames": len(motions) + 1,
        "unit": unit,
        "ate_mean": error.mean if error else None,
        "ate_std": error.std if error else None,
        "trajectory_scale": scale,
    }
    write_file(files[".json"], (json.dumps(summary, indent=1) + "\n").encode())
    return OdometryReport(name, len(motions) + 1, unit, error, scale, list(files.values()))
