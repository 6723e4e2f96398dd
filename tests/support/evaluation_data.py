"""Packed datasets with ground truth that is known by construction, and untrained checkpoints."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pipeline_data import encode, smooth

from bench.write_dataset import write_dataset
from md2.checkpoint import Checkpoint, save_checkpoint
from md2.config import Config
from md2.evaluation.predictions import keys_file
from md2.evaluation.run import EvalOptions, EvalReport, measure, write_results
from md2.inference.predictor import Predictor, load
from md2.model import Networks
from shards.manifest import DepthInfo, Split
from shards.sample import Sample

Array = np.ndarray[Any, np.dtype[Any]]
WIDTH, HEIGHT = 96, 64
ROOT = Path(__file__).resolve().parents[2]


def constant(metres: float, height: int = 40, width: int = 120) -> Array:
    return np.full((height, width), round(metres * 256), np.uint16)


def pack_truth(
    folder: Path,
    truth: Sequence[Array | None],
    *,
    part: str = "test",
    split: str = "eigen",
    source: Literal["velodyne", "improved", "dense"] = "velodyne",
    convention: Literal["camera_z", "lidar_x"] = "lidar_x",
    keys: Sequence[str] | None = None,
) -> Path:
    """Samples with random 96x64 images and these 16-bit depth maps; keys None: `drive_000` ..."""
    rng = np.random.default_rng(1)
    samples = []
    for number, depth in enumerate(truth):
        parts = {
            "0.png": encode(smooth(rng, WIDTH, HEIGHT), "png"),
            "k.f32": np.array([50, 48, 47.5, 31.5], "<f4").tobytes(),
            "meta.json": b"{}",
        }
        if depth is not None:
            parts["depth.png"] = encode(depth, "png")
        samples.append(Sample(keys[number] if keys else f"drive_{number:03d}", parts))
    write_dataset(
        folder,
        {part: samples},
        split=Split(name=split, sha256="0" * 64),
        frames=[0],
        stereo=False,
        depth=DepthInfo(source=source, convention=convention),
        size=(WIDTH, HEIGHT),
        codec="png",
        quality=None,
        seed=0,
    )
    return folder


def tiny_config(*, stereo: bool = False, **changes: Any) -> Config:
    """ResNet-18 at 96x64; mono (with the smallest pose network), or stereo in the paper's unit."""
    data = {"width": WIDTH, "height": HEIGHT, "threads": 2, "stereo": stereo, "frames": [0] if stereo else [0, -1, 1]}
    model = {"weights": "scratch"} if stereo else {"weights": "scratch", "pose_network": "posecnn"}
    return Config.model_validate({"data": {**data, **changes.pop("data", {})}, "model": model, **changes})


def tiny_checkpoint(path: Path, config: Config | None = None, seed: int = 0) -> Path:
    config = config or tiny_config()
    torch.manual_seed(seed)
    networks = Networks.of(config)
    states = networks.state_dicts()
    save_checkpoint(
        Checkpoint(config=config.model_dump(mode="json"), networks=states, metres_per_unit=config.metres_per_unit), path
    )
    return path


def documented(page: str) -> list[str]:
    """The lines of Python under "From Python" in a page of docs/."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    section = text.partition("## From Python\n")[2].partition("\n#")[0]
    return [line.removeprefix("    ") for line in section.splitlines() if line.startswith("    ")]


def run_lines(lines: Sequence[str], folder: Path) -> str:
    """What they print, run by a new Python in `folder`."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", "\n".join(lines)]
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=120, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@lru_cache(maxsize=2)
def _loaded(model: str) -> Predictor:
    return load(model, "cpu")


def measured(dataset: Path, **options: Any) -> EvalReport:
    """What `md2 eval` measures with these options, its files written."""
    model = options.get("model")
    chosen = EvalOptions(dataset=str(dataset), **{"model": None, **options})
    report = measure(chosen, _loaded(model) if model else None)
    assert all(path.exists() for path in write_results(chosen, report))
    return report


def save_disparities(path: Path, depths: Sequence[float], keys: Sequence[str] | None = None) -> Path:
    """Disparities of constant depth, with the keys beside them (None: those of `pack_truth`)."""
    np.save(path, np.stack([np.full((8, 24), 1 / depth, np.float32) for depth in depths]))
    names = keys if keys is not None else [f"drive_{number:03d}" for number in range(len(depths))]
    keys_file(path).write_text("\n".join(names))
    return path
