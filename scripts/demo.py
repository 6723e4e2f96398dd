"""Run the whole way on a synthetic drive, from raw frames to pictures, on the CPU (`make demo`).

    python scripts/demo.py FOLDER

It runs the commands that a user would run. Then it compares three depth maps of every test image with the scene's exact
depth: a constant one, the untrained network's and the trained network's.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from md2.evaluation.metrics import evaluate_batch
from md2.inference.predictor import Predictor, load
from md2.model import Networks

Predict = Callable[[Image.Image], np.ndarray]


def run(*command: str) -> None:
    """Print a command and run it.

    Raises:
        CalledProcessError: the command fails.
    """
    print(f"\n$ {shlex.join(command)}", flush=True)
    subprocess.run(command, check=True)


def test_images(raw: Path) -> Iterator[tuple[Path, Path]]:
    """Paths of the image and of its exact depth, for every line of the test split."""
    for line in (raw / "splits/sample/test_files.txt").read_text().splitlines():
        drive, frame, side = line.split()
        camera = "02" if side == "l" else "03"
        stem = f"data/{int(frame):010d}"
        yield raw / drive / f"image_{camera}" / f"{stem}.png", raw / drive / f"true_depth_{camera}" / f"{stem}.npy"


def score(raw: Path, predict: Predict, scaling: str) -> tuple[float, float, float]:
    """Mean abs_rel, rmse (metres) and a1 over the test images, in the Garg crop up to 80 m.

    Args:
        raw: the synthetic drives.
        predict: image -> depth (H, W).
        scaling: `median` or `metres` (as predicted).
    """
    rows = []
    for image, depth in test_images(raw):
        truth = torch.from_numpy(np.nan_to_num(np.load(depth), posinf=0.0)).float()[None, None]
        with Image.open(image) as picture:
            disparity = torch.from_numpy(1 / predict(picture.convert("RGB")))[None, None]
        factor = 1.0 if scaling == "metres" else "median"
        rows.append(evaluate_batch(disparity, truth, scaling=factor).values[0])
    abs_rel, _, rmse, _, a1, *_ = torch.stack(rows).mean(dim=0).tolist()
    return abs_rel, rmse, a1


def table(raw: Path, trained: Predictor) -> bool:
    """Print the comparison; return whether the trained network's abs_rel is below 0.7 of the best untrained one."""
    torch.manual_seed(0)
    config = trained.config
    blank = Predictor(Networks.of(config).eval(), config, trained.metres_per_unit)
    rows = {
        "constant depth (median-scaled)": score(raw, lambda image: np.ones(image.size[::-1], np.float32), "median"),
        "untrained network (median-scaled)": score(raw, lambda image: blank.predict(image).depth, "median"),
        "trained network (median-scaled)": score(raw, lambda image: trained.predict(image).depth, "median"),
        "trained network (its own metres)": score(raw, lambda image: trained.predict(image).depth, "metres"),
    }
    print(f"\n{'against exact depth, test drive':36} abs_rel    rmse      a1")
    for name, (abs_rel, rmse, a1) in rows.items():
        print(f"{name:36} {abs_rel:7.3f} {rmse:7.2f} {a1:7.3f}")
    constant, untrained, median, metres = (row[0] for row in rows.values())
    return max(median, metres) < 0.7 * min(constant, untrained)


def main(folder: Path) -> int:
    began = time.monotonic()
    raw, shards, trained, pictures = (folder / name for name in ("kitti_data", "shards", "run", "pictures"))
    if folder.exists():
        print(f"{folder} exists: remove it, or choose another (make demo DEMO=...)", file=sys.stderr)
        return 2
    run("md2", "sample", str(raw), "--drives", "4", "--frames", "40", "--size", "416x128")
    run(
        "md2",
        "prep",
        "--split",
        str(raw / "splits/sample"),
        "--raw",
        str(raw),
        "--out",
        str(shards),
        "--size",
        "192x64",
    )
    run("md2", "train", "demo", f"data.url={shards}", "--run", str(trained))
    run("md2", "eval", str(trained), str(shards), "--part", "test", "--json", str(folder / "metrics.json"))
    images = [str(image) for image, _ in test_images(raw)][::10]
    run("md2", "predict", str(trained), *images, "--out", str(pictures))
    learned = table(raw, load(trained))
    print(
        f"\n{'It learned.' if learned else 'It has NOT learned: this should not happen.'}\n"
        f"  pictures   {pictures}\n"
        f"  run        {trained} (summary.png; tensorboard --logdir {shlex.quote(str(trained))})\n"
        f"  metrics    {folder / 'metrics.json'}, {trained / 'metrics.jsonl'}\n"
        f"  {time.monotonic() - began:.0f} s"
    )
    return 0 if learned else 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
