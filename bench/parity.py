"""Whether md2 learns as well as the method trained the plain way (plain.py), and what each of its deviations does.

    md2 bench parity OUT                            synthetic drives: reference, md2 and every deviation, five seeds
    md2 bench parity OUT --raw RAW                  real frames, in OUT/real: drives with lidar test, the others train
    md2 bench parity OUT --check                    reference and md2 from lossless shards, three seeds; exit 1 where
                                                    md2's abs_rel or loss is measurably worse
    md2 bench parity OUT --check train.learning_rate=1e-4      a crippled md2: what the check must notice

Both train from the same initial weights, on the same frames, for as many steps, and are measured by one function on
the same test images. From JPEG shards the loss itself has another floor, so the check takes lossless ones; what
storing frames costs is measured here as a deviation, and by `md2 bench codec`. Runs are lines of OUT/runs.jsonl; those
that are there are not run again, so that a measurement may be stopped and continued. OUT/parity.md and OUT/parity.png
are made from them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any
from unittest.mock import patch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from torch import Tensor  # noqa: E402

from bench.machine import busy, processor, versions  # noqa: E402
from bench.parity_report import REFERENCE, SETTINGS, SHARDS, final, picture, read_runs, table, verdicts  # noqa: E402
from bench.plain import DEVIATIONS, LANCZOS, Plain, RawFrames, Setting, to_tensor  # noqa: E402
from md2.config import Config, load_config  # noqa: E402
from md2.data.cpu import cores  # noqa: E402
from md2.evaluation.metrics import evaluate_batch  # noqa: E402
from md2.geometry import disparity_to_depth  # noqa: E402
from md2.model import Networks  # noqa: E402
from md2.pipeline import Loader  # noqa: E402
from md2.train import start_run  # noqa: E402
from prep.synthetic import write_drives  # noqa: E402
from shards.dataset import open_dataset  # noqa: E402
from shards.errors import InputError, UsageError  # noqa: E402
from shards.sample import DEPTH_SCALE  # noqa: E402
from shards.tar import read_samples  # noqa: E402

METRES_PER_UNIT = 5.4
THIN = 3
"""Every third line of a synthetic split is trained on: more passes, and so more evaluations, in the same time."""

Report = Callable[[int, float, Networks], None]


@dataclass(frozen=True)
class Course:
    """Frames to train on, and test images with their depth.

    Attributes:
        raw: training frames.
        split: folder of the split lists, for `md2 prep`.
        test: paths of the test images.
        depth: (n, 1, h, w) metres, 0 = no measurement.
    """

    raw: RawFrames
    split: Path
    test: list[Path]
    depth: Tensor

    @classmethod
    def synthetic(cls, folder: Path, drives: int, frames: int) -> Course:
        """Synthetic drives with exact depth, rendered below `folder` unless they are there."""
        base = folder / f"synthetic_{drives}x{frames}"
        root, split = base / "raw", base / "split"
        if not root.exists():
            print(f"rendering {drives} drives of {frames} frames ...", flush=True)
            base.mkdir(exist_ok=True)
            write_drives(root, drives=drives, frames=frames, lidar=False, workers=cores())
        split.mkdir(exist_ok=True)
        for part in ("train", "val", "test"):
            lines = (
                (root / "splits" / "sample" / f"{part}_files.txt")
                .read_text()
                .splitlines()[:: THIN if part == "train" else 1]
            )
            (split / f"{part}_files.txt").write_text("".join(f"{line}\n" for line in lines))
        raw, test = RawFrames(root, read_lines(split / "train_files.txt")), read_lines(split / "test_files.txt")
        paths = [raw.path(*line) for line in test]
        maps = [np.load(path.parents[2] / "true_depth_02" / "data" / f"{path.stem}.npy") for path in paths]
        depth = torch.from_numpy(np.nan_to_num(np.stack(maps), posinf=0.0)).float().unsqueeze(1)
        return cls(raw, split, paths, depth)

    @classmethod
    def real(cls, root: Path, folder: Path) -> Course:
        """KITTI's layout: left frames of drives with lidar are for testing, both cameras of the others for training."""
        split = folder / "split"
        split.mkdir(parents=True, exist_ok=True)
        parts: dict[str, list[str]] = {"train": [], "test": []}
        for drive in sorted(path for path in root.glob("*/*_sync") if (path / "image_02").is_dir()):
            frames = sorted(int(path.stem) for path in (drive / "image_02" / "data").glob("*.png"))[1:-1]
            lidar = (drive / "velodyne_points").is_dir()
            name = drive.relative_to(root).as_posix()
            sides = "l" if lidar else "lr"
            parts["test" if lidar else "train"] += [f"{name} {frame} {side}" for frame in frames for side in sides]
        for part, lines in parts.items():
            (split / f"{part}_files.txt").write_text("".join(f"{line}\n" for line in lines))
        raw = RawFrames(root, read_lines(split / "train_files.txt"))
        packed = pack(root, split, folder / "test", ["--part", "test", "--size", "native", "--codec", "png"])
        found: dict[str, Tensor] = {}
        for tar in open_dataset(str(packed)).tars("test"):
            for sample in read_samples(tar):
                depth = next(data for name, data in sample.components.items() if name.startswith("depth"))
                with Image.open(BytesIO(depth)) as image:
                    found[sample.key] = torch.from_numpy(np.array(image).astype(np.float32)) / DEPTH_SCALE
        test = read_lines(split / "test_files.txt")
        paths = [raw.path(*line) for line in test]
        maps = [next(depth for key, depth in found.items() if key.endswith(ending(line))) for line in test]
        return cls(raw, split, paths, torch.stack(maps).unsqueeze(1))

    def images(self, size: tuple[int, int]) -> Tensor:
        """(n, 3, H, W), the test images as the published evaluation reads them."""
        found = []
        for path in self.test:
            with Image.open(path) as image:
                found.append(to_tensor(image.convert("RGB").resize(size, LANCZOS)))
        return torch.stack(found)


def read_lines(path: Path) -> list[tuple[str, int, str]]:
    rows = [line.split() for line in path.read_text().splitlines()]
    return [(drive, int(frame), side) for drive, frame, side in rows]


def ending(line: tuple[str, int, str]) -> str:
    """What the key of a line's sample ends with."""
    drive, frame, side = line
    return f"{drive.rpartition('/')[2]}_{side}_{frame:010d}"


def pack(root: Path, split: Path, out: Path, options: Sequence[str]) -> Path:
    """The split packed by `md2 prep`, unless it is there.

    Raises:
        SystemExit: prep fails.
    """
    if not out.exists():
        command = [sys.executable, "-m", "cli.main", "prep", "--split", str(split), "--raw", str(root)]
        command += ["--out", str(out), "--workers", "1", *options]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return out


class Probe:
    """Follows a run: loss over the steps, and abs_rel every so many; md2's reporter and the reference's alike."""

    def __init__(self, course: Course, setting: Setting) -> None:
        self.setting, self.images, self.depth = setting, course.images(setting.size), course.depth
        self.networks: Networks | None = None
        self.losses: list[float] = []
        self.steps: list[int] = []
        self.metric: list[float] = []
        self.median: list[float] = []

    def take(self, step: int, loss: float, networks: Networks) -> None:
        self.losses.append(loss)
        if step % self.setting.every:
            return
        networks.eval()
        with torch.no_grad():
            disparity = disparity_to_depth(networks.disparities(self.images)[0], 0.1, 100).reciprocal()
        networks.train()
        self.steps.append(step)
        for scaling, found in ((METRES_PER_UNIT, self.metric), ("median", self.median)):
            values = evaluate_batch(disparity, self.depth, scaling=scaling).values[:, 0]  # type: ignore[arg-type]
            found.append(values.nanmean().item())

    def result(self) -> dict[str, Any]:
        """Steps, abs_rel at them, and the mean loss up to each since the one before."""
        every = self.setting.every
        losses = [statistics.fmean(self.losses[step - every : step]) for step in self.steps]
        own = self.metric if self.setting.stereo else self.median
        return {"steps": self.steps, "abs_rel": own, "abs_rel median": self.median, "loss": losses}

    def start(self, total: int, done: int) -> None:
        pass

    def step(self, step: int, epoch: int, loss: float | None, images_per_second: float) -> None:
        assert loss is not None and self.networks is not None
        self.take(step, loss, self.networks)

    def message(self, text: str) -> None:
        print(text, flush=True)


def config_of(setting: Setting, shards: Path, seed: int, overrides: Sequence[str] = ()) -> Config:
    """md2's configuration for a setting: the published recipes' camera, everything else as it is by default."""
    width, height = setting.size
    return load_config(
        None,
        [
            f"data.url={shards}",
            f"data.frames={list(setting.frames)}",
            f"data.stereo={str(setting.stereo).lower()}",
            f"data.width={width}",
            f"data.height={height}",
            "data.intrinsics=nominal",
            "data.threads=1",
            "model.weights=scratch",
            f"train.batch_size={setting.batch}",
            f"train.epochs={setting.epochs}",
            f"train.lr_step_epochs={setting.drop}",
            f"train.learning_rate={setting.rate}",
            f"train.seed={seed}",
            "train.device=cpu",
            "train.log_every=1",
            "train.image_every=1000000",
            "train.val_batches=1",
            *overrides,
        ],
    )


def train_md2(config: Config, setting: Setting, run: Path, probe: Probe) -> None:
    """md2's own trainer and loader; only the networks are made fit for the setting."""

    class Prepared(Networks):
        @classmethod
        def of(cls, config: Config) -> Networks:
            probe.networks = setting.prepared(Networks.of(config))
            return probe.networks

    with patch("md2.training.trainer.Networks", Prepared):
        result = start_run(config, run, probe)
    if result.exit_code:
        raise SystemExit(result.exit_code)  # stopped by a signal: half a run is no result


def loader_orders(raw: RawFrames, config: Config, seed: int) -> list[list[int]]:
    """Indices of the training lines in the order that md2's loader reads them, for each epoch."""
    places = {ending(line): index for index, line in enumerate(raw.lines)}
    loader = Loader(
        open_dataset(config.data.url),
        "train",
        config.data,
        batch_size=config.train.batch_size,
        seed=seed,
        train=True,
        device=torch.device("cpu"),
    )
    length = len(next(iter(places)))
    return [[places[key[-length:]] for batch in loader for key in batch.keys] for _ in range(config.train.epochs)]


def train(course: Course, out: Path, name: str, variant: str, seed: int, overrides: Sequence[str]) -> dict[str, Any]:
    """One run; a line for `runs.jsonl`."""
    setting = SETTINGS[name]
    probe = Probe(course, setting)
    size = ["--size", "{}x{}".format(*setting.size), "--no-depth"]
    shards = {
        packed: course.split.parent / "shards" / packed.replace(" ", "_").replace(":", "")
        for packed in SHARDS
        if packed == variant.partition(" with ")[0] or (packed == "md2 png" and variant == "order")
    }
    for packed, folder in shards.items():
        pack(course.raw.root, course.split, folder, [*size, *SHARDS[packed]])
    began, used = time.perf_counter(), time.process_time()
    if variant == REFERENCE or variant in DEVIATIONS:
        orders = None
        if variant == "order":
            orders = loader_orders(course.raw, config_of(setting, shards["md2 png"], seed), seed)
        Plain(course.raw, setting, seed, None if variant == REFERENCE else variant, orders).train(probe.take)
    else:
        folder = shards[variant.partition(" with ")[0]]
        with tempfile.TemporaryDirectory(dir=out) as run:
            train_md2(config_of(setting, folder, seed, overrides), setting, Path(run) / "run", probe)
    times = {"seconds": round(time.perf_counter() - began, 1), "cpu": round(time.process_time() - used, 1)}
    return {"setting": name, "variant": variant, "seed": seed, **probe.result(), **times}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train md2 and the plain reference side by side.")
    parser.add_argument("out", type=Path, help="folder for the runs and the report")
    parser.add_argument("overrides", nargs="*", help="key.sub=value for md2, as for md2 train")
    parser.add_argument("--raw", type=Path, help="real frames in KITTI's layout instead of synthetic drives")
    parser.add_argument("--settings", default="stereo,mono", help="(default: %(default)s)")
    parser.add_argument("--variants", help=f"of: {', '.join((REFERENCE, *SHARDS, *DEVIATIONS))}")
    parser.add_argument("--seeds", type=int, help="runs of each (default: 5; 3 with --check)")
    parser.add_argument("--drives", type=int, default=4, help="synthetic ones (default: %(default)s)")
    parser.add_argument("--frames", type=int, default=40, help="of each (default: %(default)s)")
    parser.add_argument("--check", action="store_true", help="reference and lossless md2; exit 1 if md2 is worse")
    parser.add_argument("--report", action="store_true", help="train nothing: table and picture of the runs there")
    return parser.parse_intermixed_args(arguments)


def chosen_variants(options: argparse.Namespace) -> list[str]:
    """Those asked for, in order."""
    known = (REFERENCE, *SHARDS, *DEVIATIONS)
    default = (REFERENCE, "md2 png") if options.check else known
    chosen = options.variants.split(",") if options.variants else list(default)
    for variant in chosen:
        if variant not in known:
            raise UsageError(f"--variants {variant}: of {', '.join(known)}")
    changed = f" with {' '.join(options.overrides)}" if options.overrides else ""
    return [variant + changed if variant in SHARDS else variant for variant in chosen]


def run_all(options: argparse.Namespace, variants: Sequence[str], settings: Sequence[str]) -> None:
    """Every run that is not there yet, a seed of all before the next seed."""
    out = options.out
    out.mkdir(parents=True, exist_ok=True)
    path = out / "runs.jsonl"
    if options.raw is not None:
        course = Course.real(options.raw.resolve(), out)
    else:
        course = Course.synthetic(out, options.drives, options.frames)
    done = {(run["setting"], run["variant"], run["seed"]) for run in read_runs(path)}
    for seed in range(options.seeds or (3 if options.check else 5)):
        for setting in settings:
            for variant in variants:
                if (setting, variant, seed) in done or (variant == "pose pairs" and setting == "stereo"):
                    continue
                run = train(course, out, setting, variant, seed, options.overrides)
                with path.open("a") as file:
                    file.write(json.dumps(run) + "\n")
                print(
                    f"{setting} {variant} seed {seed}: abs_rel {final(run):.4f} loss {final(run, 'loss'):.5f} "
                    f"{run['seconds']:.0f} s ({run['cpu']:.0f} s of CPU)",
                    flush=True,
                )


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    torch.set_num_threads(1)  # such small batches gain nothing from more
    if options.raw is not None:
        options.out, options.settings = options.out / "real", "real"
    settings, variants = options.settings.split(","), chosen_variants(options)
    for setting in settings:
        if setting not in SETTINGS:
            raise UsageError(f"--settings {setting}: of {', '.join(SETTINGS)}")
    if not options.report:
        run_all(options, variants, settings)
    runs = read_runs(options.out / "runs.jsonl")
    if not runs:
        raise InputError(f"{options.out}: no runs there")
    text = f"{table(runs)}\non {processor()}, {busy()}; {versions('torch', 'pillow')}\n"
    (options.out / "parity.md").write_text(text)
    picture(runs, options.out / "parity.png")
    print(f"\n{text}\n{options.out / 'parity.png'}")
    if not options.check:
        return 0
    judged = {
        f"{setting} {variant}: {what}": verdict
        for setting in settings
        for what in ("abs_rel", "loss")
        for variant, verdict in verdicts(runs, setting, what).items()
        if variant in variants
    }
    if not judged:
        raise InputError(f"{options.out}: at least two runs each of {REFERENCE} and md2 are needed")
    worse = [f"{name} {verdict.sigmas:+.1f} standard errors" for name, verdict in judged.items() if verdict.worse]
    found = f"worse than the reference: {'; '.join(worse)}" if worse else "as well as the reference"
    print(f"md2 learns {found}")
    return 1 if worse else 0


if __name__ == "__main__":
    raise SystemExit(main())
