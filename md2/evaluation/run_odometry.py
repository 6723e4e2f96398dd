"""The work of `md2 odometry`: predict the motions along a sequence, compare with ground truth, write files."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from md2.evaluation.evaluate import single_part_loader
from md2.evaluation.further import drift
from md2.evaluation.odometry import (
    SNIPPET,
    Matrices,
    MotionPredictor,
    SnippetError,
    motions_of,
    snippet_error,
    trajectory,
    trajectory_png,
    trajectory_scale,
    write_poses,
    write_tum,
)
from md2.inference.images import decode_image, read_image
from md2.inference.inputs import Progress, find_inputs, require_one_sequence
from md2.inference.predictor import Predictor
from md2.visualize import require_writable, write_file
from shards.dataset import LocalDataset, open_dataset
from shards.errors import DatasetError, InputError
from shards.video import open_video


@dataclass(frozen=True)
class OdometryOptions:
    """Options of `md2 odometry`; see its help.

    Attributes:
        packed: whether `source` is a packed dataset; otherwise it is raw KITTI if `sequence` is given, else frames.
        poses: true poses, (n, 3, 4) camera-to-world, metres; None: those of the raw sequence, if it has any.
    """

    model: str
    source: str
    out: Path
    packed: bool = False
    sequence: str | None = None
    part: str | None = None
    poses: Matrices | None = None
    limit: int | None = None
    batch_size: int = 8


class RawSequence(Protocol):
    """A sequence of raw KITTI: names and contents of its frames' files, and its poses (n, 3, 4) if it has them."""

    @property
    def frames(self) -> Mapping[int, object]: ...

    @property
    def poses(self) -> Matrices | None: ...

    def read(self) -> Iterator[tuple[str, bytes]]: ...


@dataclass(frozen=True)
class OdometryReport:
    """The result of `md2 odometry`.

    Attributes:
        name: name of the sequence.
        frames: number of frames.
        unit: "metres" or "unknown", the unit of the written trajectory.
        error: the error on 5-frame snippets; None without ground truth.
        scale: factor that fits the whole predicted trajectory to the true one; None without ground truth.
        drift: t_rel in per cent and r_rel in degrees per 100 m, of a model without a unit after that fit; None without
            ground truth, or if the way is shorter than 100 m.
        written: the files.
    """

    name: str
    frames: int
    unit: str
    error: SnippetError | None
    scale: float | None
    drift: tuple[float, float] | None
    written: list[Path]


def run_odometry(
    predictor: Predictor,
    options: OdometryOptions,
    open_raw: Callable[[str, str], RawSequence],
    progress: Progress = lambda done, total: None,
) -> OdometryReport:
    """Predict a trajectory, compare it with ground truth if present, and write the files.

    Args:
        open_raw: opens a sequence of raw KITTI, given its location and name.

    Raises:
        UsageError: a part of something that is not packed, or a model that cannot follow a sequence.
        InputError, DatasetError: frames are missing or unreadable, or ground truth has another length.
    """
    require_writable(options.out, folder=True)
    require_one_sequence(options.source, options.packed, options.sequence, options.part)
    limit, size, poses = options.limit, options.batch_size, options.poses
    if options.packed:
        part = options.part or f"test_{options.sequence}"
        name = options.sequence or part
        dataset = open_dataset(options.source)
        motions = dataset_motions(predictor, dataset, part, limit=limit, batch_size=size, progress=progress)
    else:
        if options.sequence is not None:
            raw = open_raw(options.source, options.sequence)
            images: Iterator[Image.Image] = (decode_image(data, where) for where, data in raw.read())
            name, total = options.sequence, len(raw.frames)
            poses = raw.poses if poses is None else poses
        else:
            name, images, total = open_frames(options.source)
        total = min(total, limit or total)
        motions = predict_motions(predictor, islice(images, limit), batch_size=size, total=total, progress=progress)
    true = square(poses)[:limit] if poses is not None else None
    return report_motions(motions, name, predictor.metres_per_unit, true, options.out, options.model)


def open_frames(source: str) -> tuple[str, Iterator[Image.Image], int]:
    """Open a folder, a glob or a video as one sequence.

    Returns:
        Its name, its images in order, and their number (0: a video that does not state it).

    Raises:
        InputError: no frames there, or images in several folders (two cameras, two drives).
    """
    given = find_inputs([source])
    if given.videos:
        video = open_video(given.videos[0])
        return given.videos[0].stem, iter(video), video.frames or 0
    folders = sorted({str(image.path.parent) for image in given.images})
    if len(folders) > 1:
        raise InputError(
            f"{source}: frames in {len(folders)} folders ({folders[0]}, {folders[1]} ...); a sequence is the frames of "
            "one camera, in one folder"
        )
    name = Path(folders[0]).resolve().name if folders else source
    return name, (read_image(image.path) for image in given.images), len(given.images)


def square(poses: Matrices) -> Matrices:
    """Complete (n, 3, 4) to (n, 4, 4)."""
    whole = np.tile(np.eye(4), (len(poses), 1, 1))
    whole[:, :3] = poses
    return whole


def predict_motions(
    predictor: Predictor,
    images: Iterable[Image.Image],
    *,
    batch_size: int = 8,
    total: int = 0,
    progress: Progress = lambda done, total: None,
) -> Matrices:
    """Predict the motions (n, 4, 4) along n + 1 images, in the model's unit.

    Raises:
        UsageError: the model has no pose network that can follow a sequence.
        InputError: fewer than two images.
    """
    parts: list[Matrices] = []
    for motions in MotionPredictor(predictor).motions(images, batch_size):
        parts.append(motions)
        progress(sum(map(len, parts)) + 1, total)
    if not parts:
        raise InputError("a trajectory needs at least two frames (three if the pose network sees three at once)")
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
    """Predict the motions along packed samples of one sequence (`md2 prep --split odom`), in any order.

    Each sample gives the motion to its next frame and from its previous one. So neighbours cover the first and last
    frames of a sequence, which are not samples themselves.

    Args:
        limit: number of frames at the start. All samples are read, since packed ones are in random order.

    Raises:
        DatasetError: the samples have no neighbouring frames, come from two sequences, or frames are missing.
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
                if not number.isdecimal():
                    raise DatasetError(
                        f"{dataset.url} part {part}: sample {key} has no frame number; odometry needs one"
                    )
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
    """Compare motions with ground truth, if any, and write NAME_poses.txt, NAME.tum, NAME.png and NAME.json.

    Args:
        motions: (n, 4, 4) in the model's unit.
        poses: (n + 1, 4, 4) true, metres.

    Raises:
        InputError: frames and poses differ in number, or the folder cannot be written.
    """
    if poses is not None and len(poses) != len(motions) + 1:
        fewer = min(len(poses), len(motions) + 1)
        raise InputError(
            f"sequence {name}: {len(motions) + 1} frames, but {len(poses)} true poses; they must agree "
            f"(--limit {fewer} takes the first of both)"
        )
    metres = metres_per_unit is not None
    predicted = trajectory(motions, metres_per_unit or 1.0)
    shown, truth, error, scale, note = predicted, None, None, None, ""
    drifted = None
    title = f"sequence {name}: {len(motions) + 1} frames, seen from above"
    if poses is not None:
        true = motions_of(poses)
        truth, error = trajectory(true), snippet_error(true, motions)
        scale = trajectory_scale(truth, predicted)
        title += (
            f"\nATE {error.mean:.3f} ± {error.std:.3f} m: absolute trajectory error on {SNIPPET}-frame snippets,\n"
            "each scaled to fit; not the distance between the curves below"
        )
        if not metres:
            shown, note = trajectory(motions, scale), f" (scaled by {scale:.3g} to fit)"
        drifted = drift(truth, shown)

    files = [out / f"{name.replace('/', '_')}{suffix}" for suffix in ("_poses.txt", ".tum", ".png", ".json")]
    unit = "metres" if metres else "unknown"
    summary = {
        "sequence": name,
        "model": model,
        "frames": len(motions) + 1,
        "unit": unit,
        "ate_mean": error.mean if error else None,
        "ate_std": error.std if error else None,
        "trajectory_scale": scale,
        "t_rel_percent": drifted[0] if drifted else None,
        "r_rel_degrees_per_100m": drifted[1] if drifted else None,
    }
    write_poses(files[0], predicted)
    write_tum(files[1], predicted)
    write_file(files[2], trajectory_png(shown, truth, title, note, metres=metres or truth is not None))
    write_file(files[3], (json.dumps(summary, indent=1) + "\n").encode())
    return OdometryReport(name, len(motions) + 1, unit, error, scale, drifted, files)
