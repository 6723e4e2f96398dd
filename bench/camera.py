"""What lens distortion, its correction by prep, and a wrong focal length do to the depth that is learned.

    md2 bench camera FOLDER [--cases NAME,NAME] [key.sub=value …]      FOLDER keeps everything; a rerun resumes

Four synthetic streets are filmed by a camera with barrel distortion, and by the pinhole camera that prep makes of it.
Three are packed as own videos and trained on, mono. The depth of the fourth is compared with the exact depth
(median-scaled, Garg's crop). Overrides are for `md2 train`, for example train.epochs=4.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from md2.inference.film import VideoWriter
from prep.raw.view import Lens, View
from prep.synthetic.render import Renderer
from prep.synthetic.rig import CameraRig
from prep.synthetic.street import build_street

Intrinsics = tuple[float, float, float, float]
SIZE, STORED = (384, 128), "192x64"
CAMERA: Intrinsics = (230.0, 230.0, 190.0, 60.0)
COEFFICIENTS = (-0.28, 0.07, 0.001, -0.0015, 0.0)
FRAMES, STREETS, RATE = 40, 4, 10
TRAINING = ["data.frames=[0,-1,1]", "data.stereo=false", "train.batch_size=4", "train.epochs=10"]
TRAINING += ["train.lr_step_epochs=8", "train.val_batches=1", "train.image_every=100000"]


@dataclass(frozen=True)
class Case:
    """One training.

    Attributes:
        films: `distorted` or `pinhole`.
        factor: of the focal lengths in camera.yaml; 1 is right.
        distortion: whether camera.yaml has the coefficients.
        overrides: for `md2 train`.
    """

    films: str = "pinhole"
    factor: float = 1.0
    distortion: bool = False
    overrides: tuple[str, ...] = ()


CASES = {
    "pinhole": Case(),
    "undistorted": Case("distorted", distortion=True),
    "distortion_ignored": Case("distorted"),
    "fx_fy_x_0.8": Case(factor=0.8),
    "fx_fy_x_1.25": Case(factor=1.25),
}


@dataclass(frozen=True)
class OwnRig(CameraRig):
    """Cameras of given intrinsics (fx, fy, cx, cy)."""

    camera: Intrinsics

    @property
    def intrinsics(self) -> npt.NDArray[np.float64]:
        fx, fy, cx, cy = self.camera
        return np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1.0]])


@dataclass(frozen=True)
class Distorted:
    """A camera with a lens: fx, fy, cx, cy in pixels, and OpenCV's k1, k2, p1, p2, k3."""

    size: tuple[int, int] = SIZE
    camera: Intrinsics = CAMERA
    coefficients: tuple[float, ...] = COEFFICIENTS

    def wide(self, finer: float = 2) -> OwnRig:
        """A pinhole camera that sees all that this one does, `finer` times as fine."""
        fx, fy, cx, cy = self.camera
        margin = 2 * round(self.size[0] * 0.3), 2 * round(self.size[1] * 0.4)
        width, height = (round((side + m) * finer) for side, m in zip(self.size, margin, strict=True))
        u, v = ((c + m / 2 + 0.5) * finer - 0.5 for c, m in zip((cx, cy), margin, strict=True))
        return OwnRig((width, height), (fx * finer, fy * finer, u, v))

    def image(self, picture: npt.NDArray[np.uint8], seen: Intrinsics) -> npt.NDArray[np.uint8]:
        """A wide camera's picture as this one sees it, by OpenCV's iteration and bilinear weights.

        Args:
            seen: the wide camera's intrinsics.
        """
        x, y = self._rays
        # Four rays a pixel, as a sensor's pixel averages: half a wide pixel to each side.
        total = np.zeros((*x.shape, 3), np.float32)
        for du in (-0.5, 0.5):
            for dv in (-0.5, 0.5):
                a, b = x * seen[0] + seen[2] + du, y * seen[1] + seen[3] + dv
                i, j = np.floor(a).astype(int), np.floor(b).astype(int)
                s, t = ((value % 1).astype(np.float32)[..., None] for value in (a, b))
                upper = picture[j, i] * (1 - s) + picture[j, i + 1] * s
                total += upper * (1 - t) + (picture[j + 1, i] * (1 - s) + picture[j + 1, i + 1] * s) * t
        return np.rint(total / 4).astype(np.uint8)

    @cached_property
    def _rays(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """x and y of each pixel's ray at z = 1."""
        fx, fy, cx, cy = self.camera
        k1, k2, p1, p2, k3 = self.coefficients
        u, v = np.meshgrid(*map(np.arange, self.size))
        x0, y0 = (u - cx) / fx, (v - cy) / fy
        x, y = x0, y0
        for _ in range(60):
            r2 = x * x + y * y
            q = 1 + k1 * r2 + k2 * r2**2 + k3 * r2**3
            dx, dy = 2 * p1 * x * y + p2 * (r2 + 2 * x * x), p1 * (r2 + 2 * y * y) + 2 * p2 * x * y
            x, y = (x0 - dx) / q, (y0 - dy) / q
        return x, y


def straight() -> View:
    """What prep makes of the distorted camera."""
    return View(SIZE, CAMERA, (0, 0, *SIZE), Lens("distortion", (*COEFFICIENTS, 0.0, 0.0, 0.0)), "camera.yaml")


def camera_file(camera: Intrinsics, factor: float = 1.0, distortion: bool = False) -> str:
    """camera.yaml of these intrinsics, the focal lengths times `factor`."""
    fields = {"width": SIZE[0], "height": SIZE[1], "fx": camera[0] * factor, "fy": camera[1] * factor}
    fields |= {"cx": camera[2], "cy": camera[3], "rate": 30}
    lens = f"distortion: {list(COEFFICIENTS)}\n" if distortion else ""
    return "".join(f"{key}: {value}\n" for key, value in fields.items()) + lens


def render(folder: Path, streets: int = STREETS, frames: int = FRAMES) -> None:
    """Write the films `distorted/N.mp4` and `pinhole/N.mp4` for training, and frames and depth of the last street."""
    lens, view = Distorted(), straight()
    large = lens.wide()
    for number in range(1, streets + 1):
        street = build_street(0, number, frames)
        seen, true = Renderer(street, large), Renderer(street, OwnRig(SIZE, view.intrinsics))
        if number < streets:
            with (
                VideoWriter(folder / "distorted" / f"{number}.mp4", Fraction(RATE)) as bent,
                VideoWriter(folder / "pinhole" / f"{number}.mp4", Fraction(RATE)) as unbent,
            ):
                for n in range(frames):
                    bent.write(lens.image(seen.image(n, 2)[0], large.camera))
                    unbent.write(true.image(n, 2)[0])
            continue
        for name in ("left", "depth"):
            (folder / "test/street" / name).mkdir(parents=True, exist_ok=True)
        for n in range(frames):
            picture, depth = true.image(n, 2)
            Image.fromarray(picture).save(folder / "test/street/left" / f"{n:03d}.png")
            np.save(folder / "test/street/depth" / f"{n:03d}.npy", depth)
    (folder / "test/camera.yaml").write_text(camera_file(view.intrinsics))
    (folder / "test_files.txt").write_text("".join(f"street {n} l\n" for n in range(frames)))


def md2(*words: object) -> None:
    subprocess.run([sys.executable, "-m", "cli.main", *map(str, words)], check=True, stdout=subprocess.DEVNULL)


def prep(raw: Path, out: Path, *words: object) -> None:
    if not (out / "dataset.json").exists():
        md2("prep", "--dataset", "folder", "--raw", raw, "--out", out, "--size", STORED, "--workers", 1, *words)


def measure(folder: Path, name: str, overrides: Sequence[str]) -> dict[str, float]:
    """Pack, train and evaluate one case, or what is left of that.

    Returns:
        Metric -> value.
    """
    case = CASES[name]
    place = folder / "cases" / name
    raw, run, found = place / "drives", place / "run", place / "metrics.json"
    if not found.exists():
        raw.mkdir(parents=True, exist_ok=True)
        for film in sorted((folder / case.films).glob("*.mp4")):
            if not (raw / film.name).exists():
                (raw / film.name).hardlink_to(film)
        camera = straight().intrinsics if case.films == "pinhole" else CAMERA
        (raw / "camera.yaml").write_text(camera_file(camera, case.factor, case.distortion))
        prep(folder / "test", folder / "tested", "--split", folder / "test_files.txt", "--frames", "0")
        prep(raw, place / "shards")
        if (run / "checkpoints/last.pt").exists():
            md2("train", "--resume", run)
        else:
            words = [*TRAINING, *case.overrides, *overrides]
            md2("train", "demo", f"data.url={place / 'shards'}", *words, "--run", run)
        md2("eval", run, folder / "tested", "--part", "test", "--json", found)
    return dict(json.loads(found.read_text())["metrics"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--cases", default=",".join(CASES), help=f"some of {', '.join(CASES)} (default: all)")
    parser.add_argument("overrides", nargs="*", help="key.sub=value for md2 train")
    options = parser.parse_args()
    cases = options.cases.split(",")
    if unknown := [name for name in cases if name not in CASES]:
        parser.error(f"--cases: no such case: {', '.join(unknown)}; choose from {', '.join(CASES)}")
    if not (options.folder / "test_files.txt").exists():
        render(options.folder)
    print("| case | abs_rel | rmse | a1 |\n|---|---:|---:|---:|", flush=True)
    for name in cases:
        found = measure(options.folder, name, options.overrides)
        print(f"| {name} | {found['abs_rel']:.3f} | {found['rmse']:.2f} | {found['a1']:.3f} |", flush=True)


if __name__ == "__main__":
    main()
