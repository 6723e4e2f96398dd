"""Compare the loader with those that it replaces, and with its floor, on the same frames, in turns.

    md2 bench loader [RAW] [--modes mono,mono+stereo] [--batch 12] [--threads 2] [--append bench/RESULTS.md]

RAW holds drives in KITTI's raw layout with both cameras; without it, a synthetic drive of KITTI's size is rendered
(about a minute). Its images are smoother than KITTI's, and therefore cheaper to decode, in every row. prep packs the
frames with its default options, and the samples are repeated until there are enough. The rows are

    plain, png     PyTorch's DataLoader: full-size PNGs, decoded by Pillow, resized to 640x192 with antialiasing
    …, 4 scales    the same with a pyramid of every image, plain and jittered, as in Monodepth2's own loader
    plain, jpeg    the same as `plain, png` from full-size JPEGs (quality 92, as many people convert KITTI)
    webdataset     the webdataset library and Pillow in a DataLoader, on the shards that md2 reads
    floor          bare decoding of the shards' JPEGs by libjpeg-turbo (simplejpeg) on threads; the pixels are dropped
    …, ppm         webdataset and md2 on the same samples packed with `--codec ppm`: uncompressed, nothing to decode

Each has as many workers or threads as md2 has decoding threads. The plain loaders jitter colours as torchvision does
(half of the samples, all frames of a sample alike) and return plain and jittered tensors. Every row except the floor
ends in float batches, which are checked before the timing. Rows take turns, and each starts when the others are idle.
Ratios are taken within a turn; the tables show medians of rates and ratios. CPU time is that of this process and its
workers; on a busy machine it is more reliable than the rates.
"""

from __future__ import annotations

import argparse
import os
import random
import shlex
import statistics
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib.util import find_spec
from io import BytesIO
from itertools import count
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageEnhance
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from bench.data import SIZE, find_samples, image_bytes, pack_samples, raw_tree
from bench.machine import busy, processor, versions
from md2.config import DataConfig
from md2.pipeline import SAMPLES_AHEAD, Loader
from shards.dataset import LocalDataset
from shards.sample import image_extension
from shards.tar import read_samples

FULL_QUALITY = 92
MIN_BATCHES = 8
READ_AHEAD = 4 * SAMPLES_AHEAD
"""Samples that md2 may have prepared during the other rows' turns."""
STEMS = {"mono": ["0", "m1", "p1"], "mono+stereo": ["0", "m1", "p1", "s"]}
GOALS = [
    ("md2", "plain, png, jitter", 30.0),
    ("md2", "plain, png", None),
    ("md2", "webdataset", 3.5),
    ("md2", "floor", 0.7),
    ("md2, jitter", "plain, png, jitter", 12.0),
    ("md2, jitter", "plain, png, jitter, 4 scales", None),
    ("md2, jitter", "webdataset, jitter", None),
    ("md2, ppm", "plain, png, jitter", 30.0),
    ("md2, ppm", "webdataset, ppm", None),
    ("md2, ppm, jitter", "plain, png, jitter", 12.0),
]
"""Row, the row that it is divided by, and the target."""
Batches = Iterator[Sequence[Tensor]]


@dataclass
class Contender:
    """One row: `batches` yields the tensors of each batch, endlessly; `buffered` of them are skipped before timing."""

    name: str
    batches: Batches
    buffered: int
    tensors: int
    """(B, 3, H, W) images in each batch at the networks' size; 0 for the floor, which drops them."""
    rates: list[float] = field(default_factory=list)
    costs: list[float] = field(default_factory=list)

    def check(self, batch: int) -> None:
        """Check shapes, types and values of one batch.

        Raises:
            SystemExit: the batch differs from what every row promises.
        """
        found = [image for image in next(self.batches) if image.shape[-2:] == SIZE[::-1]]
        shapes = {(tuple(image.shape), image.dtype) for image in found}
        if self.tensors == 0:
            return
        if len(found) != self.tensors or shapes != {((batch, 3, *SIZE[::-1]), torch.float32)}:
            raise SystemExit(f"{self.name}: {len(found)} images of {shapes}, not {self.tensors}")
        for image in found:
            if image.min() < 0 or image.max() > 1 or image.flatten(1).std(1).min() < 0.02:
                raise SystemExit(f"{self.name}: a batch does not hold pictures in [0, 1]")

    def measure(self, seconds: float) -> None:
        """Take a turn: record samples per second, and CPU milliseconds per sample of this process and its workers."""
        settle()
        for _ in range(self.buffered):
            next(self.batches)
        samples, batches, begin, cpu = 0, 0, time.perf_counter(), cpu_seconds()
        while time.perf_counter() - begin < seconds or batches < MIN_BATCHES:
            samples, batches = samples + len(next(self.batches)[0]), batches + 1
        self.rates.append(samples / (time.perf_counter() - begin))
        self.costs.append(1000 * (cpu_seconds() - cpu) / samples)


def settle(longest: float = 10.0) -> None:
    """Wait until the previous row has filled its queues and is idle."""
    end = time.perf_counter() + longest
    cpu = cpu_seconds()
    while time.perf_counter() < end:
        time.sleep(0.2)
        before, cpu = cpu, cpu_seconds()
        if cpu - before < 0.01:
            return


def cpu_seconds() -> float:
    """CPU seconds of this process and of its current workers."""
    ticks = 0
    for worker in active_children():
        fields = Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


# --- common loaders


def color_jitter(images: list[Image.Image]) -> list[Image.Image]:
    """Jitter images as torchvision's ColorJitter(0.2, 0.2, 0.2, 0.1) does: one draw for all, steps in random order."""
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
    """Convert to a (3, H, W) float32 tensor in [0, 1], as torchvision's ToTensor does."""
    pixels = torch.from_numpy(np.array(image))
    return pixels.permute(2, 0, 1).contiguous().to(torch.float32).div_(255)


def present(images: list[Image.Image], jitter: bool, scales: int = 1) -> dict[str, Tensor]:
    """Flip, build the pyramid, jitter, and convert to tensors."""
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


def plain(samples: list[list[Path]], jitter: bool, batch: int, workers: int, scales: int = 1) -> Batches:
    loader = DataLoader(PlainDataset(samples, jitter, scales), batch, num_workers=workers, drop_last=True)
    for found in loader:
        yield list(found.values())


def web(dataset: LocalDataset, stems: list[str], jitter: bool, batch: int, workers: int) -> Batches:
    import webdataset

    def to_sample(sample: dict[str, Any]) -> dict[str, Tensor]:
        images = []
        for stem in stems:
            with Image.open(BytesIO(sample[f"{stem}.{image_extension(dataset.manifest.codec)}"])) as image:
                images.append(image.convert("RGB"))
        return present(images, jitter)

    urls = [str(tar) for tar in dataset.tars("train")]
    source = webdataset.WebDataset(urls, resampled=True, shardshuffle=False).shuffle(256).map(to_sample)
    for found in DataLoader(source, batch, num_workers=workers, drop_last=True):
        yield [value for value in found.values() if isinstance(value, Tensor)]  # and not the keys


# --- md2 and its floor


def md2(dataset: LocalDataset, stereo: bool, jitter: bool, batch: int, threads: int) -> Batches:
    config = DataConfig(width=SIZE[0], height=SIZE[1], stereo=stereo, color_jitter=jitter, threads=threads)
    loader = Loader(dataset, "train", config, batch_size=batch, seed=0, train=True, device=torch.device("cpu"))
    while True:
        for found in loader:
            yield [*found.images.values(), *(found.augmented.values() if jitter else [])]


def floor(dataset: LocalDataset, stems: list[str], batch: int, threads: int) -> Batches:
    import simplejpeg

    samples = [
        [sample.components[f"{stem}.jpg"] for stem in stems]
        for tar in dataset.tars("train")
        for sample in read_samples(tar)
    ]

    def decode(images: list[bytes]) -> None:
        for image in images:
            simplejpeg.decode_jpeg(image, colorspace="RGB")

    counted = torch.empty(batch, 0)
    with ThreadPoolExecutor(threads) as pool:
        under_way: deque[list[Future[None]]] = deque()
        for begin in count(step=batch):
            chosen = [samples[(begin + place) % len(samples)] for place in range(batch)]
            under_way.append([pool.submit(decode, images) for images in chosen])
            if len(under_way) > 2:  # batches ahead, so that no thread waits for the others at a batch's end
                wait(under_way.popleft())
                yield [counted]


# --- data


def full_jpegs(found: list[list[Path]], folder: Path) -> list[list[Path]]:
    """Write the same samples as full-size JPEG files."""
    full: dict[Path, Path] = {}
    for path in {path for sample in found for path in sample}:
        full[path] = folder / f"{len(full):06d}.jpg"
        with Image.open(path) as image:
            image.convert("RGB").save(full[path], "JPEG", quality=FULL_QUALITY)
    return [[full[path] for path in sample] for sample in found]


# --- the measurement


def run(
    given: Path | None,
    *,
    modes: list[str],
    batch: int = 12,
    threads: int | None = None,
    seconds: float = 4.0,
    repeats: int = 5,
    samples: int = 960,
    show: Callable[[str], object] = print,
) -> dict[str, dict[str, float]]:
    """Measure, print two tables per mode, and return mode -> row -> median samples/s.

    Args:
        given: drives in KITTI's raw layout; None: a synthetic one.
        modes: keys of `STEMS`.
        batch: samples in a batch.
        threads: decoding threads or workers of each row; None: one per core.
        seconds: length of a row's turn.
        repeats: number of turns.
        samples: size of the dataset; the frames are repeated to fill it.
        show: receives each table.
    """
    threads = threads or len(os.sched_getaffinity(0))
    results = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        raw = raw_tree(given, folder)
        found = find_samples(raw)
        dataset = pack_samples(found, raw, folder, samples)
        uncompressed = pack_samples(found, raw, folder, samples, codec="ppm")
        show(describe(found, dataset, given is None, batch, threads, repeats))
        jpegs = full_jpegs(found, folder)
        for mode in modes:
            rows = measure_mode(mode, dataset, uncompressed, found, jpegs, batch, threads, seconds, repeats)
            show(table(mode, rows))
            show(goals(rows))
            results[mode] = {row.name: statistics.median(row.rates) for row in rows}
    return results


def measure_mode(
    mode: str,
    dataset: LocalDataset,
    uncompressed: LocalDataset,
    pngs: list[list[Path]],
    jpegs: list[list[Path]],
    batch: int,
    threads: int,
    seconds: float,
    repeats: int,
) -> list[Contender]:
    stems = STEMS[mode]
    images, stereo = len(stems), "s" in stems
    pngs, jpegs = [paths[:images] for paths in pngs], [paths[:images] for paths in jpegs]
    queued = 2 * threads + 1
    both = 2 * images
    rows = [
        Contender("plain, png, jitter", plain(pngs, True, batch, threads), queued, both),
        Contender("plain, png, jitter, 4 scales", plain(pngs, True, batch, threads, 4), queued, both),
        Contender("plain, png", plain(pngs, False, batch, threads), queued, images),
        Contender("plain, jpeg, jitter", plain(jpegs, True, batch, threads), queued, both),
        Contender("webdataset", web(dataset, stems, False, batch, threads), queued, images),
        Contender("webdataset, jitter", web(dataset, stems, True, batch, threads), queued, both),
        Contender("floor", floor(dataset, stems, batch, threads), 3, 0),
        Contender("md2", md2(dataset, stereo, False, batch, threads), READ_AHEAD // batch, images),
        Contender("md2, jitter", md2(dataset, stereo, True, batch, threads), READ_AHEAD // batch, both),
        Contender("webdataset, ppm", web(uncompressed, stems, False, batch, threads), queued, images),
        Contender("md2, ppm", md2(uncompressed, stereo, False, batch, threads), READ_AHEAD // batch, images),
        Contender("md2, ppm, jitter", md2(uncompressed, stereo, True, batch, threads), READ_AHEAD // batch, both),
    ]
    rows = [row for row in rows if row.name not in missing_rows()]
    with ExitStack() as stack:
        for row in rows:
            stack.callback(row.batches.close)  # type: ignore[attr-defined]
            row.check(batch)
        for _ in range(repeats):
            for row in rows:
                row.measure(seconds)
    return rows


def missing_rows() -> dict[str, str]:
    """Rows that cannot be measured here, and the package that each needs."""
    needs = {"floor": "simplejpeg"} | dict.fromkeys(
        ("webdataset", "webdataset, jitter", "webdataset, ppm"), "webdataset"
    )
    return {row: package for row, package in needs.items() if find_spec(package) is None}


def ratios(row: Contender, other: Contender) -> tuple[float, float]:
    """Medians over the turns of the ratio of rates, and of the inverse ratio of CPU times."""
    rates = statistics.median(a / b for a, b in zip(row.rates, other.rates, strict=True))
    costs = statistics.median(b / a for a, b in zip(row.costs, other.costs, strict=True))
    return rates, costs


def table(mode: str, rows: list[Contender]) -> str:
    lines = [
        f"{mode}:",
        "",
        "| | samples/s | CPU ms/sample | / plain, png, jitter | / floor |",
        "|---|---|---|---|---|",
    ]
    by_name = {row.name: row for row in rows}
    for row in rows:
        cells = [f"{statistics.median(row.rates):.0f}", f"{statistics.median(row.costs):.2f}"]
        cells += [
            f"{ratios(row, by_name[other])[0]:.2f}" if other in by_name else ""
            for other in ("plain, png, jitter", "floor")
        ]
        lines.append(f"| {row.name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def goals(rows: list[Contender]) -> str:
    """Table of the targets and the measured ratios, by samples/s and by CPU time."""
    by_name = {row.name: row for row in rows}
    lines = ["| ratio | target | by samples/s | by CPU time |", "|---|---|---|---|"]
    for name, other, aim in GOALS:
        if other not in by_name:
            lines.append(
                f"| {name} / {other} | {aim or ''} | not measured: {missing_rows()[other]} is not installed | |"
            )
            continue
        rate, cost = ratios(by_name[name], by_name[other])
        lines.append(f"| {name} / {other} | {aim or ''} | {rate:.2f} | {cost:.2f} |")
    return "\n".join(lines) + "\n"


def describe(
    found: list[list[Path]], dataset: LocalDataset, synthetic: bool, batch: int, threads: int, repeats: int
) -> str:
    with Image.open(found[0][0]) as image:
        size = image.size
    words = ["RAW" if Path(word).is_dir() else word for word in sys.argv[1:]]
    kind = "synthetic (smoother than KITTI's)" if synthetic else "given"
    about = dataset.manifest
    packages = versions("torch", "nvidia-dali-cuda120", "nvidia-dali-cuda130", "webdataset", "pillow", "simplejpeg")
    return (
        f"### Loader\n\n`{shlex.join(['md2', 'bench', 'loader', *words])}`\n\n"
        f"{len(found)} time steps of {size[0]}x{size[1]}, {kind}, packed by prep's defaults: {SIZE[0]}x{SIZE[1]} "
        f"{about.encoding}, {image_bytes(dataset) / 1000:.0f} kB an image; "
        f"batch {batch}, {threads} threads or workers, medians of {repeats} turns.\n"
        f"{processor()}, {busy()}, {packages}.\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "raw", nargs="?", type=Path, metavar="RAW", help="drives in KITTI's raw layout; default: synthetic"
    )
    parser.add_argument("--modes", default="mono,mono+stereo", help="mono, mono+stereo, or both, comma-separated")
    parser.add_argument("--batch", type=int, default=12, help="samples in a batch")
    parser.add_argument("--threads", type=int, help="decoding threads or workers of each row; default: one per core")
    parser.add_argument("--seconds", type=float, default=4, help="length of a row's turn")
    parser.add_argument("--repeats", type=int, default=5, help="number of turns")
    parser.add_argument("--samples", type=int, default=960, help="samples in the dataset")
    parser.add_argument("--append", type=Path, help="file that the result is appended to")
    options = parser.parse_args()
    modes = options.modes.split(",")
    if not set(modes) <= set(STEMS):
        parser.error(f"--modes {options.modes}: of {', '.join(STEMS)}")
    shown: list[str] = []

    def show(text: str) -> None:
        print(text, flush=True)
        shown.append(text)

    run(
        options.raw,
        modes=modes,
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
