"""Where the photometric error is smallest: the share of points at which the true depth wins.

Training learns depth because the photometric error between an image and its warped partner is smallest at the true
depth. How often that holds depends on how images are stored, decoded and resized. For a point of known depth, the 3x3
patch around it is warped with each depth whose disparity in a stereo pair is 1, 1.5, … 48 pixels, and compared by
0.85 · SSIM + 0.15 · L1, as in the loss. The point counts where the smallest error lies within 1 pixel of the true
disparity. The patch faces the camera, so the true depth does not win everywhere even in perfect images: compare shares,
do not read one alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from prep.raw.calibration import StereoCalibration, read_raw_calibration
from prep.raw.files import RawData
from prep.raw.kitti import Kitti
from prep.raw.velodyne import points_in_view, project, read_scan
from shards.errors import InputError
from shards.sample import DEPTH_SCALE

Array = npt.NDArray[np.float64]
Images = Mapping[Path, Tensor]
"""Raw file -> its image as the networks see it: (3, height, width) in 0 … 1."""

C1, C2 = 0.01**2, 0.03**2
SSIM_WEIGHT = 0.85
DISPARITIES = torch.arange(1, 48.25, 0.5)
TOLERANCE = 1.0
FLAT_LEVELS = 4.0
"""A point is flat where the grey levels of the 5x5 pixels around it have a smaller standard deviation."""
NEAR_METRES = 15.0
PARALLAX = 0.5
"""A neighbouring frame says little about points near the direction of travel: its parallax must be this much of the
stereo pair's."""


@dataclass(frozen=True)
class View:
    """A target image, another image of the same scene, and points of the target with their true disparity.

    Attributes:
        kind: `stereo` or `temporal`.
        target, other: raw files.
        camera: (3, 3) intrinsics at the measured size, pixel centres at integers.
        transform: (4, 4), target camera to the other one.
        baseline: of the drive's stereo pair, metres; disparity = fx · baseline / depth.
        pixels: (N, 2) integer x, y.
        disparity: (N,) true disparity in pixels.
    """

    kind: str
    target: Path
    other: Path
    camera: Tensor
    transform: Tensor
    baseline: float
    pixels: Tensor
    disparity: Tensor

    def depth(self, disparity: Tensor) -> Tensor:
        return self.camera[0, 0] * self.baseline / disparity


@dataclass(frozen=True)
class Matches:
    """One number a point: whether the true depth wins, the error there, and the mean error of all depths."""

    won: Tensor
    error: Tensor
    mean: Tensor
    flat: Tensor
    near: Tensor

    @classmethod
    def joined(cls, parts: Sequence[Matches]) -> Matches:
        return cls(*(torch.cat([getattr(part, name) for part in parts]) for name in cls.__dataclass_fields__))

    def share(self, chosen: Tensor | None = None) -> float:
        """Percentage of (chosen) points at which the true depth wins."""
        won = self.won if chosen is None else self.won[chosen]
        return 100 * float(won.double().mean())

    @property
    def contrast(self) -> float:
        """Mean error over all depths less the error at the true one."""
        return float((self.mean - self.error).mean())


def photometric_error(target: Tensor, other: Tensor) -> Tensor:
    """0.85 · SSIM + 0.15 · L1 of patches, both (..., pixels of the window, 3): (...)."""
    mx, my = target.mean(-2), other.mean(-2)
    vx, vy = (target * target).mean(-2) - mx * mx, (other * other).mean(-2) - my * my
    covariance = (target * other).mean(-2) - mx * my
    ssim = (2 * mx * my + C1) * (2 * covariance + C2) / ((mx * mx + my * my + C1) * (vx + vy + C2))
    middle = target.shape[-2] // 2
    l1 = (target[..., middle, :] - other[..., middle, :]).abs()
    return (SSIM_WEIGHT * ((1 - ssim) / 2).clamp(0, 1) + (1 - SSIM_WEIGHT) * l1).mean(-1)


def identity_error(target: Tensor, other: Tensor) -> float:
    """Identity error: mean photometric error of two (3, H, W) images, neither warped, without the border."""
    windows = [F.unfold(image[None], 3)[0].view(3, 9, -1).permute(2, 1, 0) for image in (target, other)]
    return float(photometric_error(*windows).mean())


@dataclass(frozen=True)
class Geometry:
    """Where each pixel of each point's patch falls in the other image, for the true disparity and for every other one.

    Attributes:
        corner: (N, 1 + D, 9) index of the upper left of the four pixels to interpolate.
        fraction: (2, N, 1 + D, 9) share of the right and of the lower ones.
        seen: (N, 1 + D) whether the whole patch falls inside.
        keep: (N,) the view's points that the other image sees, which the above are of.
    """

    corner: Tensor
    fraction: Tensor
    seen: Tensor
    keep: Tensor


def geometry(view: View, size: tuple[int, int]) -> Geometry:
    """Project the patches of all points with all depths, at an image size (width, height)."""
    width, height = size
    steps = torch.tensor([(x, y) for y in (-1, 0, 1) for x in (-1, 0, 1)], dtype=torch.float64)
    patch = view.pixels.double()[:, None] + steps
    rays = torch.cat([patch, torch.ones_like(patch[..., :1])], -1) @ torch.linalg.inv(view.camera).T
    turned = rays @ (view.camera @ view.transform[:3, :3]).T
    moved = view.camera @ view.transform[:3, 3]
    disparities = torch.cat([view.disparity.double()[:, None], DISPARITIES.double().expand(len(view.disparity), -1)], 1)
    points = turned[:, None] * view.depth(disparities)[..., None, None] + moved
    place = points[..., :2] / points[..., 2:].clamp(min=1e-6)
    limit = torch.tensor([width - 1.0, height - 1.0], dtype=torch.float64)
    seen = ((place >= 0) & (place <= limit)).all(-1).all(-1) & (points[..., 2] > 0.1).all(-1)
    infinity = turned[:, 4, :2] / turned[:, 4, 2:]
    parallax = (place[:, 0, 4] - infinity).norm(dim=-1)
    keep = seen[:, 0] & (parallax >= PARALLAX * view.disparity)
    place = place[keep].clamp(min=torch.zeros(2, dtype=torch.float64), max=limit - 1e-3)
    corner = place.floor()
    index = (corner[..., 1] * width + corner[..., 0]).long()
    return Geometry(index, (place - corner).float().movedim(-1, 0), seen[keep], keep)


def match(view: View, images: Images, where: Geometry, reference: Tensor) -> Matches:
    """Compare the patches of a view's points with every depth's.

    Args:
        images: as stored and decoded in the way that is measured.
        reference: the target, lossless, which decides what is flat.
    """
    target, other = images[view.target], images[view.other]
    width = target.shape[2]
    pixels, disparity = view.pixels[where.keep], view.disparity[where.keep]
    flat_index = (pixels[:, 1] * width + pixels[:, 0])[:, None] + torch.tensor(
        [y * width + x for y in (-1, 0, 1) for x in (-1, 0, 1)]
    )
    a, b = (image.flatten(1).T.contiguous() for image in (target, other))
    right, down = where.fraction.unsqueeze(-1)
    upper = torch.lerp(b[where.corner], b[where.corner + 1], right)
    lower = torch.lerp(b[where.corner + width], b[where.corner + width + 1], right)
    errors = photometric_error(a[flat_index][:, None], torch.lerp(upper, lower, down))
    depths = errors[:, 1:].masked_fill(~where.seen[:, 1:], math.inf)
    best = DISPARITIES[depths.argmin(1)]
    mean = errors[:, 1:].where(where.seen[:, 1:], torch.nan).nanmean(1)
    return Matches(
        won=(best - disparity).abs() <= TOLERANCE,
        error=errors[:, 0],
        mean=mean,
        flat=_deviation(reference)[pixels[:, 1], pixels[:, 0]] < FLAT_LEVELS / 255,
        near=view.depth(disparity) < NEAR_METRES,
    )


def _deviation(image: Tensor) -> Tensor:
    grey = image.mean(0)[None, None]
    squares, means = (F.avg_pool2d(x, 5, 1, 2, count_include_pad=False) for x in (grey * grey, grey))
    return (squares - means * means).clamp(min=0).sqrt()[0, 0]


def find_views(raw: Path, size: tuple[int, int], *, frames: int = 6, points: int = 1000) -> dict[str, list[View]]:
    """Views of every drive in KITTI's raw layout whose depth is known, by drive.

    Depth comes from the exact maps of a synthetic drive (`md2 sample`), else from lidar. Neighbouring frames need
    poses: a synthetic drive's exact ones, else those of oxts; without any there are only stereo pairs.

    Args:
        size: width and height at which images are measured.
        frames: at most this many targets of a drive, spread over it.
        points: at most this many of a target, drawn at random, the same in each run.

    Raises:
        InputError: no drive has left and right images and depth.
    """
    drives = {folder.name: _drive_views(raw, folder, size, frames, points) for folder in sorted(raw.glob("*/*_sync"))}
    found = {name: views for name, views in drives.items() if views}
    if not found:
        raise InputError(
            f"{raw}: no drive with image_02, image_03 and velodyne_points (or true_depth_02, as md2 sample writes); "
            "expected there: 2011_09_26/2011_09_26_drive_0001_sync/image_02/data/0000000000.png"
        )
    return found


def _drive_views(raw: Path, folder: Path, size: tuple[int, int], frames: int, points: int) -> list[View]:
    date = folder.parent.name
    calibration = read_raw_calibration(date, lambda path: (raw / path).read_bytes(), depth=True)
    lefts = {int(path.stem): path for path in sorted((folder / "image_02/data").glob("*.png"))}
    poses = find_poses(raw, folder, calibration)
    views = []
    for number, left in [list(lefts.items())[i] for i in _spread(len(lefts), frames)]:
        right = folder / "image_03/data" / left.name
        depth = _depth_map(folder, left.stem, calibration) if right.exists() else None
        if depth is None:
            continue
        shift = torch.eye(4, dtype=torch.float64)
        shift[0, 3] = calibration.stereo_translation("l")
        others = [("stereo", right, shift)]
        if poses:
            near = [n for n in (number - 1, number + 1) if n in lefts and n in poses and number in poses]
            others += [("temporal", lefts[n], torch.from_numpy(np.linalg.inv(poses[n]) @ poses[number])) for n in near]
        views += _views(left, others, depth, calibration, size, points, number)
    return views


def _spread(total: int, count: int) -> list[int]:
    """`count` places of `total`, evenly spread: the middle of each stretch."""
    count = min(count, total)
    return [(2 * i + 1) * total // (2 * count) for i in range(count)]


def _views(
    target: Path,
    others: Iterable[tuple[str, Path, Tensor]],
    depth: Array,
    calibration: StereoCalibration,
    size: tuple[int, int],
    points: int,
    seed: int,
) -> list[View]:
    """Views of one target: the same points for all of them."""
    native = depth.shape[1], depth.shape[0]
    fx, fy, cx, cy = (float(v) for v in calibration.intrinsics("l", native, size))
    camera = torch.tensor([[fx, 0, cx], [0, fy, cy], [0, 0, 1]], dtype=torch.float64)
    baseline = abs(calibration.stereo_translation("l"))
    rows, columns = np.nonzero(np.isfinite(depth) & (depth > 0))
    scale = np.array([size[0] / native[0], size[1] / native[1]])
    pixels = np.rint((np.column_stack([columns, rows]) + 0.5) * scale - 0.5).astype(np.int64)
    disparity = fx * baseline / depth[rows, columns]
    inside = ((pixels > 0) & (pixels < np.array(size) - 1)).all(1)
    usable = np.flatnonzero(inside & (disparity > DISPARITIES[0].item()) & (disparity < DISPARITIES[-1].item()))
    chosen = np.random.default_rng(seed).permutation(usable)[:points]
    return [
        View(
            kind,
            target,
            other,
            camera,
            transform,
            baseline,
            torch.from_numpy(pixels[chosen]),
            torch.from_numpy(disparity[chosen]).float(),
        )
        for kind, other, transform in others
    ]


def _depth_map(folder: Path, stem: str, calibration: StereoCalibration) -> Array | None:
    """Depth of the left image at native size, metres, 0 or infinite where unknown; None without any."""
    exact, scan = folder / f"true_depth_02/data/{stem}.npy", folder / f"velodyne_points/data/{stem}.bin"
    if exact.exists():
        return np.asarray(np.load(exact), dtype=np.float64)
    if not scan.exists() or calibration.size is None:
        return None
    matrix = calibration.lidar_projection("l")
    points = points_in_view(read_scan(scan.read_bytes(), str(scan)), [matrix], calibration.size[0])
    return project(points, matrix, calibration.size) / DEPTH_SCALE


def find_poses(raw: Path, folder: Path, calibration: StereoCalibration) -> dict[int, Array]:
    """Frame -> (4, 4) left camera to world; empty without a synthetic drive's poses or oxts."""
    exact = folder / "true_pose_02.txt"
    if exact.exists():
        matrices = np.loadtxt(exact).reshape(-1, 3, 4)
        return {number: np.vstack([matrix, [0, 0, 0, 1]]) for number, matrix in enumerate(matrices)}
    drive = Kitti(RawData([str(raw)], follow_links=True), None, motion=True).open(f"{folder.parent.name}/{folder.name}")
    if drive is None or drive.motion is None or drive.motion.poses is None:
        return {}
    camera = np.eye(4)
    camera[:3, 3] = calibration.shift("l")
    rectified = (np.vstack([pose, [0, 0, 0, 1]]) for pose in drive.motion.poses)
    return {frame: pose @ np.linalg.inv(camera) for frame, pose in zip(drive.motion.rows, rectified, strict=True)}


def measure(
    views: Sequence[View], variants: Mapping[str, Callable[[Path], Tensor]], reference: Callable[[Path], Tensor]
) -> dict[str, dict[str, Matches]]:
    """Variant -> kind of view -> matches of all points, each point in the same place for every variant.

    Args:
        variants: name -> the image of a raw file, as that variant stores it.
        reference: the image of a raw file, lossless; its texture sorts the points.
    """
    collected: dict[str, dict[str, list[Matches]]] = {name: {} for name in variants}
    for view in views:
        lossless = reference(view.target)
        where = geometry(view, (lossless.shape[2], lossless.shape[1]))
        for name, image in variants.items():
            images = {path: image(path) for path in (view.target, view.other)}
            collected[name].setdefault(view.kind, []).append(match(view, images, where, lossless))
    return {name: {kind: Matches.joined(parts) for kind, parts in kinds.items()} for name, kinds in collected.items()}
