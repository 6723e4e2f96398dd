"""The loader against what it replaces and against its floor, on the same frames, in turns.

    python -m bench.loader RAW [--modes mono,mono+stereo] [--batch 12] [--threads 2] [--append bench/RESULTS.md]

RAW holds drives in KITTI's raw layout with both cameras (real ones, or `md2 sample --size 1242x375`). Compared are

    plain, png     PyTorch DataLoader: full-size PNG by Pillow, antialiased resize to 640x192, tensors
    …, 4 scales    the same, and the pyramid of every image, plain and jittered, as Monodepth2's own trainer does
    plain, jpeg    the same from full-size JPEG (quality 92, as many people convert KITTI)
    webdataset     the webdataset library and Pillow in a DataLoader, on the very shards that md2 reads
    floor          bare libjpeg-turbo (simplejpeg) decode of the shards' JPEGs on threads, thrown away

each with as many workers or threads as md2 has decoding threads. The plain loaders jitter colours as torchvision does
(half of the samples, all frames alike) and hand out plain and jittered tensors. Every row but the floor ends in float
batches. Rows take turns; ratios are taken within a turn, and the table has medians of rates and ratios. CPU time
is this process's and its workers': on a busy machine it says more than the rates do.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import shlex
import statistics
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib.metadata import version
from io import BytesIO
from itertools import count
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import torch
import webdataset
from PIL import Image, ImageEnhance
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from md2.config import DataConfig
from md2.pipeline import SAMPLES_AHEAD, Loader
from shards.dataset import LocalDataset, open_dataset, write_dataset
from shards.manifest import Split
from shards.sample import Sample
from shards.tar import read_samples

SIZE = (640, 192)
QUALITY = 95
FULL_QUALITY = 92
MIN_BATCHES = 8
READ_AHEAD = 4 * SAMPLES_AHEAD
"""Samples that md2 may have prepared while other rows were timed."""
STEMS = {"mono": ["0", "m1", "p1"], "mono+stereo": ["0", "m1", "p1", "s"]}


@dataclass
class Contender:
    """One row: `batches` yields the number of samples of each batch, endlessly, skipping `buffered` before timing."""

    name: str
    batches: Iterator[int]
    buffered: int
    rates: list[float] = field(default_factory=list)
    costs: list[float] = field(default_factory=list)

    def measure(self, seconds: float) -> None:
        """Adds a turn: samples per second, and CPU milliseconds per sample of this process and its workers."""
        time.sleep(0.5)  # until the row before has filled its queues and rests
        for _ in range(self.buffered):
            next(self.batches)
        samples, batches, begin, cpu = 0, 0, time.perf_counter(), cpu_seconds()
        while time.perf_counter() - begin < seconds or batches < MIN_BATCHES:
            samples, batches = samples + next(self.batches), batches + 1
        self.rates.append(samples / (time.perf_counter() - begin))
        self.costs.append(1000 * (cpu_seconds() - cpu) / samples)


def cpu_seconds() -> float:
    """CPU time of this process and of the workers that it has now."""
    ticks = 0
    for worker in active_children():
        fields = Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


# --- what people do today


def color_jitter(images: list[Image.Image]) -> list[Image.Image]:
    """torchvision's ColorJitter(0.2, 0.2, 0.2, 0.1) on PIL images, one draw for all, its four steps in random order."""
    factors = [random.uniform(0.8, 1.2) for _ in range(3)]
    hue = random.uniform(-0.1, 0.1)
    enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    steps: list[Callable[[Image.Image], Image.Image]] = [
        lambda image, which=which, factor=factor: which(image).enhance(factor)  # type: ignore[misc]
        for which, factor in zip(enhancers, factors, strict=True)
    ]
    steps.append(lambda image: _turn_hue(image, hue))
    random.shuffle(steps)
    jittered = []
    for image in images:
        for step in steps:
            image = step(image)  # noqa: PLW2901
        jittered.append(image)
    return jittered


def _turn_hue(image: Image.Image, hue: float) -> Image.Image:
    h, s, v = image.convert("HSV").split()
    turned = (np.asarray(h) + np.uint8(round(hue * 255) % 256)).astype(np.uint8)
    return Image.merge("HSV", (Image.fromarray(turned), s, v)).convert("RGB")


def to_tensor(image: Image.Image) -> Tensor:
    """As torchvision's ToTensor: (3, H, W) float32 in [0, 1]."""
    pixels = torch.from_numpy(np.array(image))
    return pixels.permute(2, 0, 1).contiguous().to(torch.float32).div_(255)


def present(images: list[Image.Image], jitter: bool, scales: int = 1) -> dict[str, Tensor]:
    """Flip, pyramid, jitter, tensors."""
    if random.random() < 0.5:
        images = [image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for image in images]
    level = images
    for scale in range(1, scales):
        size = (SIZE[0] >> scale, SIZE[1] >> scale)
        level = [image.resize(size, Image.Resampling.LANCZOS) for image in level]
        images = images + level
    result = {f"images{place}": to_tensor(image) for place, image in enumerate(images)}
    if jitter:
        seen = color_jitter(images) if random.random() < 0.5 else images
        result |= {f"augmented{place}": to_tensor(image) for place, image in enumerate(seen)}
    return result


class PlainDataset(Dataset[dict[str, Tensor]]):
    """Full-size image files, decoded and resized for every sample."""

    def __init__(self, samples: list[list[Path]], jitter: bool, scales: int) -> None:
        self.samples, self.jitter, self.scales = samples, jitter, scales

    def __len__(self) -> int:
        return 1 << 30

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        images = []
        for path in self.samples[number % len(self.samples)]:
            with path.open("rb") as file, Image.open(file) as image:
                images.append(image.convert("RGB").resize(SIZE, Image.Resampling.LANCZOS))
        return present(images, self.jitter, self.scales)


def plain(samples: list[list[Path]], jitter: bool, batch: int, workers: int, scales: int = 1) -> Iterator[int]:
    loader = DataLoader(PlainDataset(samples, jitter, scales), batch, num_workers=workers, drop_last=True)
    for found in loader:
        yield len(found["images0"])


def web(dataset: LocalDataset, stems: list[str], jitter: bool, batch: int, workers: int) -> Iterator[int]:
    def to_sample(sample: dict[str, Any]) -> dict[str, Tensor]:
        images = []
        for stem in stems:
            with Image.open(BytesIO(sample[f"{stem}.jpg"])) as image:
                images.append(image.convert("RGB"))
        return present(images, jitter)

    urls = [str(tar) for tar in dataset.tars("train")]
    source = webdataset.WebDataset(urls, resampled=True, shardshuffle=False).shuffle(256).map(to_sample)
    for found in DataLoader(source, batch, num_workers=workers, drop_last=True):
        yield len(found["images0"])


# --- md2 and its floor


def md2(dataset: LocalDataset, stereo: bool, jitter: bool, batch: int, threads: int) -> Iterator[int]:
    config = DataConfig(width=SIZE[0], height=SIZE[1], stereo=stereo, color_jitter=jitter, threads=threads)
    loader = Loader(dataset, "train", config, batch_size=batch, seed=0, train=True, device=torch.device("cpu"))
    while True:
        for found in loader:
            yield found.size


def floor(dataset: LocalDataset, stems: list[str], batch: int, threads: int) -> Iterator[int]:
    samples = [
        [sample.components[f"{stem}.jpg"] for stem in stems]
        for tar in dataset.tars("train")
        for sample in read_samples(tar)
    ]

    def decode(images: list[bytes]) -> None:
        for image in images:
            simplejpeg.decode_jpeg(image, colorspace="RGB")

    with ThreadPoolExecutor(threads) as pool:
        under_way: deque[list[Future[None]]] = deque()
        for begin in count(step=batch):
            chosen = [samples[(begin + place) % len(samples)] for place in range(batch)]
            under_way.append([pool.submit(decode, images) for images in chosen])
            if len(under_way) > 2:  # batches ahead, so that no thread waits for the others at a batch's end
                wait(under_way.popleft())
                yield batch


# --- data


def find_samples(raw: Path) -> list[list[Path]]:
    """Paths of t, t-1, t+1 and the right camera's t, for every left frame that has them."""
    found = []
    for target in sorted(raw.resolve().glob("*/*_sync/image_02/data/*.png")):
        number, other = int(target.stem), target.parents[2] / "image_03" / "data" / target.name
        near = [target.with_name(f"{number + step:010d}.png") for step in (-1, 1)]
        if all(path.exists() for path in (*near, other)):
            found.append([target, *near, other])
    if not found:
        raise SystemExit(f"{raw}: no drive with both cameras and three frames in a row")
    return found


def make_data(found: list[list[Path]], samples: int, folder: Path) -> tuple[LocalDataset, list[list[Path]]]:
    """A dataset of `samples` samples, repeating what there is, and the same samples as full-size JPEG files."""
    small: dict[Path, bytes] = {}
    full: dict[Path, Path] = {}
    for path in {path for sample in found for path in sample}:
        with Image.open(path) as image:
            rgb = image.convert("RGB")
        full[path] = folder / f"{len(full):06d}.jpg"
        rgb.save(full[path], "JPEG", quality=FULL_QUALITY)
        buffer = BytesIO()
        rgb.resize(SIZE, Image.Resampling.LANCZOS).save(buffer, "JPEG", quality=QUALITY, subsampling="4:2:0")
        small[path] = buffer.getvalue()
    extra = {"k.f32": np.array([371, 369, 314, 87], "<f4").tobytes(), "t.f32": np.array([-0.54], "<f4").tobytes()}

    def packed() -> Iterator[Sample]:
        for number in range(samples):
            names = [f"{stem}.jpg" for stem in STEMS["mono+stereo"]]
            paths = found[number % len(found)]
            parts = {name: small[path] for name, path in zip(names, paths, strict=True)}
            yield Sample(f"bench_{number:06d}", {**parts, **extra, "meta.json": b"{}"})

    write_dataset(
        folder / "shards",
        {"train": packed()},
        split=Split(name="bench", sha256="0" * 64),
        frames=[0, -1, 1],
        stereo=True,
        depth=None,
        size=SIZE,
        codec="jpeg",
        quality=QUALITY,
        seed=0,
        samples_per_shard=120,
    )
    return open_dataset(str(folder / "shards")), [[full[path] for path in sample] for sample in found]


# --- the measurement


def run(
    raw: Path,
    *,
    modes: list[str],
    batch: int = 12,
    threads: int | None = None,
    seconds: float = 4.0,
    repeats: int = 5,
    samples: int = 960,
    show: Callable[[str], object] = print,
) -> dict[str, dict[str, float]]:
    """Measure and print one table per mode; mode -> row -> median samples/s.

    Args:
        raw: drives in KITTI's raw layout.
        modes: of `STEMS`.
        seconds: of each row in each turn.
        samples: in the dataset; repetitions of the frames that there are.
    """
    threads = threads or len(os.sched_getaffinity(0))
    found = find_samples(raw)
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        dataset, jpegs = make_data(found, samples, Path(folder))
        show(describe(found, batch, threads, repeats))
        for mode in modes:
            results[mode] = measure_mode(mode, dataset, found, jpegs, batch, threads, seconds, repeats, show)
    return results


def measure_mode(
    mode: str,
    dataset: LocalDataset,
    pngs: list[list[Path]],
    jpegs: list[list[Path]],
    batch: int,
    threads: int,
    seconds: float,
    repeats: int,
    show: Callable[[str], object],
) -> dict[str, float]:
    stems = STEMS[mode]
    images, stereo = len(stems), "s" in stems
    pngs, jpegs = [paths[:images] for paths in pngs], [paths[:images] for paths in jpegs]
    queued = 2 * threads + 1
    with ExitStack() as stack:
        rows = [
            Contender("plain, png, jitter", plain(pngs, True, batch, threads), queued),
            Contender("plain, png, jitter, 4 scales", plain(pngs, True, batch, threads, 4), queued),
            Contender("plain, png", plain(pngs, False, batch, threads), queued),
            Contender("plain, jpeg, jitter", plain(jpegs, True, batch, threads), queued),
            Contender("webdataset", web(dataset, stems, False, batch, threads), queued),
            Contender("webdataset, jitter", web(dataset, stems, True, batch, threads), queued),
            Contender("floor", floor(dataset, stems, batch, threads), 3),
            Contender("md2", md2(dataset, stereo, False, batch, threads), READ_AHEAD // batch),
            Contender("md2, jitter", md2(dataset, stereo, True, batch, threads), READ_AHEAD // batch),
        ]
        for row in rows:
            stack.callback(row.batches.close)  # type: ignore[attr-defined]
        for _ in range(repeats):
            for row in rows:
                row.measure(seconds)
    show(table(mode, rows))
    return {row.name: statistics.median(row.rates) for row in rows}


def table(mode: str, rows: list[Contender]) -> str:
    by_name = {row.name: row for row in rows}

    def ratio(row: Contender, other: str) -> str:
        return f"{statistics.median(a / b for a, b in zip(row.rates, by_name[other].rates, strict=True)):.2f}"

    against = ["plain, png, jitter", "plain, png, jitter, 4 scales", "webdataset", "floor"]
    lines = [
        f"{mode}: samples/s",
        "",
        "| | samples/s | CPU ms/sample | " + " | ".join(f"/ {name}" for name in against) + " |",
    ]
    lines.append("|---|" + "---|" * (2 + len(against)))
    for row in rows:
        ratios = " | ".join(ratio(row, name) for name in against)
        rate, cost = statistics.median(row.rates), statistics.median(row.costs)
        lines.append(f"| {row.name} | {rate:.0f} | {cost:.2f} | {ratios} |")
    return "\n".join(lines) + "\n"


def describe(found: list[list[Path]], batch: int, threads: int, repeats: int) -> str:
    with Image.open(found[0][0]) as image:
        size = image.size
    packages = ", ".join(
        f"{name} {version(name)}" for name in ("torch", "nvidia-dali-cuda120", "webdataset", "pillow", "simplejpeg")
    )
    command = shlex.join("RAW" if Path(word).is_dir() else word for word in sys.argv[1:])
    return (
        f"### Loader\n\n`python -m bench.loader {command}`\n\n"
        f"{len(found)} instants of {size[0]}x{size[1]}; {SIZE[0]}x{SIZE[1]} JPEG of quality {QUALITY}; batch {batch}, "
        f"{threads} threads or workers, medians of {repeats} turns.\n{processor()}, "
        f"{len(os.sched_getaffinity(0))} cores, Python {platform.python_version()}, {packages}.\n"
    )


def processor() -> str:
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return models[0].partition(":")[2].strip() if models else platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("raw", type=Path)
    parser.add_argument("--modes", default="mono,mono+stereo")
    parser.add_argument("--batch", type=int, default=12)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--seconds", type=float, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--samples", type=int, default=960)
    parser.add_argument("--append", type=Path, help="file that the result is appended to")
    options = parser.parse_args()
    shown: list[str] = []

    def show(text: str) -> None:
        print(text, flush=True)
        shown.append(text)

    run(
        options.raw,
        modes=options.modes.split(","),
        batch=options.batch,
        threads=options.threads,
        seconds=options.seconds,
        repeats=options.repeats,
        samples=options.samples,
        show=show,
    )
    if options.append:
        with options.append.open("a") as file:
            file.write("\n" + "\n".join(shown))


if __name__ == "__main__":
    main()
