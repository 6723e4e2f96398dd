"""Compare md2 prep with its floor: decoding, resizing and encoding every frame once, and nothing else.

    md2 bench prep [RAW] [--instants 1500] [--workers 2] [--repeats 3]

RAW holds drives in KITTI's raw layout with velodyne; without it, a synthetic drive is rendered. Its time steps are
repeated under new frame numbers, through links, until there are enough. The samples are mono+stereo with depth, and
every image of both cameras is a target frame. Floor and prep take turns on the same cores. The ratio floor / prep is
the share of unavoidable work in prep's time; at 1, reading, lidar and shards would cost nothing. Prep's time includes
the start of the workers, half a second, so use enough time steps. On a busy machine, trust the ratio of CPU seconds.
"""

from __future__ import annotations

import argparse
import io
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

from PIL import Image

from bench.data import raw_tree, time_steps
from bench.machine import busy, processor, versions
from prep.packing.encode import ImageFormat, encode
from prep.packing.pack import pack
from prep.packing.plan import make_plan
from prep.raw.files import RawData
from prep.raw.kitti import Kitti
from prep.raw.splits import read_split
from prep.request import make_content
from prep.workers import start_workers

SIZE = (640, 192)
FORMAT = ImageFormat(SIZE, "jpeg")
DATE = "2011_09_26"
DRIVE = f"{DATE}_drive_0001_sync"


def link_drive(raw: Path, root: Path, instants: int) -> list[Path]:
    """Link RAW's time steps that have both images and a scan into one long drive; return each image's path once."""
    found = time_steps(raw)
    date = root / DATE
    folders = [date / DRIVE / name / "data" for name in ("image_02", "image_03", "velodyne_points")]
    for folder in folders:
        folder.mkdir(parents=True)
    for calibration in found[0][0].parents[3].glob("calib_*.txt"):
        (date / calibration.name).symlink_to(calibration)
    for number in range(instants):
        for folder, source in zip(folders, found[number % len(found)], strict=True):
            (folder / f"{number:010d}{source.suffix}").symlink_to(source)
    lines = [f"{DATE}/{DRIVE} {number} {side}" for number in range(1, instants - 1) for side in "lr"]
    (root / "train_files.txt").write_text("\n".join(lines) + "\n")
    return [image for left, right, _ in found for image in (left, right)]


def bare(images: list[bytes], count: int) -> None:
    """Do the floor's work on `count` frames, taken in turn from memory."""
    for number in range(count):
        with Image.open(io.BytesIO(images[number % len(images)])) as image:
            small = image.convert("RGB").resize(SIZE, Image.Resampling.LANCZOS)
        encode(small, FORMAT)


_images: list[bytes] = []


def load(paths: list[Path]) -> None:
    _images.extend(path.read_bytes() for path in paths)


def bare_loaded(count: int) -> float:
    """Do the floor's work and return its CPU seconds."""
    start = time.process_time()
    bare(_images, count)
    return time.process_time() - start


def timed(work: Callable[[], float]) -> tuple[float, float]:
    """Run `work`; return its wall seconds and the CPU seconds that it reports."""
    start = time.perf_counter()
    cpu = work()
    return time.perf_counter() - start, cpu


def cpu_seconds() -> float:
    """CPU seconds of this process and of its children that have ended."""
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in usage)


def run_prep(root: Path, out: Path, workers: int) -> float:
    """Do the work of `md2 prep`, from the split's file to the committed dataset; return its CPU seconds.

    They include the start of the workers.
    """
    start = cpu_seconds()
    lists = read_split(str(root / "train_files.txt"))
    content = make_content(lists, size=f"{SIZE[0]}x{SIZE[1]}")
    plan = make_plan(lists, Kitti(RawData([str(root)], follow_links=True), content.depth), content)
    with start_workers(workers) as pool:
        packed = pack(plan, lists, str(out), out.with_name("scratch"), pool)
    assert not packed.skipped
    return cpu_seconds() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "raw", nargs="?", type=Path, metavar="RAW", help="drives in KITTI's raw layout; default: synthetic"
    )
    parser.add_argument("--instants", type=int, default=1500)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    count = 2 * options.instants
    floors, preps = [], []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "repeated"
        raw = raw_tree(options.raw, Path(folder), lidar=True)
        paths = link_drive(raw, root, options.instants)
        pool = ProcessPoolExecutor(
            options.workers, mp_context=get_context("spawn"), initializer=load, initargs=(paths,)
        )
        with pool:
            list(pool.map(bare_loaded, [2] * options.workers))
            pieces = [8] * (count // 8)

            def floor() -> float:
                return sum(pool.map(bare_loaded, pieces))

            for repeat in range(options.repeats):
                floors.append(timed(floor))
                out = root / f"out{repeat}"
                preps.append(timed(partial(run_prep, root, out, options.workers)))
                floor_wall, prep_wall = floors[-1][0], preps[-1][0]
                print(f"run {repeat + 1}: floor {floor_wall:.2f} s, prep {prep_wall:.2f} s", flush=True)
        size = sum(path.stat().st_size for path in root.glob("out0/train/*"))
    print(
        f"\n{count} images, {2 * (options.instants - 2)} samples of 4 images and depth, {size / 1e6:.0f} MB of shards,"
    )
    print(
        f"{options.workers} workers, {options.repeats} runs, medians; {processor()}, {busy()}, {versions('pillow')}\n"
    )
    print("| | wall s | frames/s | CPU s | CPU ms/frame |\n|---|---|---|---|---|")
    for name, times in (("floor: decode + resize + encode", floors), ("md2 prep", preps)):
        wall, cpu = (statistics.median(column) for column in zip(*times, strict=True))
        print(f"| {name} | {wall:.2f} | {count / wall:.1f} | {cpu:.2f} | {1e3 * cpu / count:.2f} |")
    ratios = [[f[i] / p[i] for f, p in zip(floors, preps, strict=True)] for i in (0, 1)]
    wall, cpu = (f"{statistics.median(r):.3f} ({', '.join(f'{x:.3f}' for x in r)})" for r in ratios)
    print(f"| ratio | {wall} | | {cpu} | |")


if __name__ == "__main__":
    main()
