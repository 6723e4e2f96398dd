"""Measure the loader as datasets and runs grow: start-up, memory and speed by number of shards; memory of a long run.

    md2 bench scale [--shards 10,100,1000,10000] [--steps 10000] [--append bench/RESULTS.md]

The shards are synthetic and hold a few small images. Each number of shards is opened in its own process. The table
shows the seconds until the dataset is open, until the loader is built and until the first batch arrives; the memory
and open files beyond those of a process that has imported everything; and the samples/s after that. The long run
takes batches with flips and jitter and reports the process's memory; it contains ends of epochs, and takes a
checkpoint every 500 steps.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from bench.data import numbered_dataset
from bench.machine import add_append, busy, processor, publish, versions
from md2.config import DataConfig
from md2.data.batch import Batch
from md2.pipeline import Loader
from shards.dataset import open_dataset

SIZE = (96, 64)
BATCH = 8
SPEED_SECONDS = 4.0


def memory() -> float:
    """Resident memory of this process, in MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def endless(loader: Loader) -> Iterator[Batch]:
    while True:
        yield from loader


def make_loader(folder: Path) -> Loader:
    config = DataConfig(width=SIZE[0], height=SIZE[1], threads=2)
    return Loader(
        open_dataset(str(folder)), "train", config, batch_size=BATCH, seed=0, train=True, device=torch.device("cpu")
    )


def measure_start(folder: Path) -> dict[str, Any]:
    """Measure, in a new process, the seconds, MB and files that opening a dataset takes, then the samples/s."""
    before, begin = memory(), time.perf_counter()
    open_dataset(str(folder))
    opened = time.perf_counter()
    loader = make_loader(folder)
    built = time.perf_counter()
    batches = endless(loader)
    next(batches)
    first = time.perf_counter()
    grown = memory() - before
    steps = 0
    while time.perf_counter() - first < SPEED_SECONDS:
        next(batches)
        steps += 1
    speed = steps * BATCH / (time.perf_counter() - first)
    return {
        "samples": loader.samples,
        "open": opened - begin,
        "build": built - opened - (opened - begin),
        "first": first - built,
        "memory": grown,
        "files": len(list(Path("/proc/self/fd").iterdir())),
        "speed": speed,
    }


def measure_run(folder: Path, steps: int) -> dict[str, Any]:
    """Measure, in a new process, the memory over a run."""
    loader = make_loader(folder)
    batches = endless(loader)
    marks = {}
    begin = time.perf_counter()
    for step in range(1, steps + 1):
        next(batches)
        if step % 500 == 0:
            loader.state()
        if step == min(500, steps) or step % max(1, steps // 10) == 0:
            marks[step] = memory()
    return {"marks": marks, "epochs": loader.epoch, "speed": steps * BATCH / (time.perf_counter() - begin)}


def in_fresh_process(*arguments: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "bench.scale", *arguments]
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(command, cwd=root, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def run(shards: list[int], per_shard: int, steps: int) -> str:
    """Measure all and return the report in Markdown."""
    lines = [
        f"{per_shard} samples of three {SIZE[0]}x{SIZE[1]} JPEGs a shard, batch {BATCH}, 2 threads; {processor()}, "
        f"{busy()}, {versions('torch', 'nvidia-dali-cuda120', 'nvidia-dali-cuda130')}",
        "",
        "| shards | samples | open, s | build, s | first batch, s | memory, MB | open files | samples/s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as folder:
        for count in shards:
            data = Path(folder) / str(count)
            numbered_dataset(data, count, per_shard, SIZE)
            found = in_fresh_process("--start", str(data))
            times = " | ".join(f"{found[name]:.2f}" for name in ("open", "build", "first"))
            lines.append(
                f"| {count} | {found['samples']} | {times} | {found['memory']:.0f} | {found['files']} "
                f"| {found['speed']:.0f} |"
            )
        if steps:
            data = Path(folder) / str(shards[0])
            found = in_fresh_process("--run", str(data), "--steps", str(steps))
            marks = found["marks"]
            lines += ["", f"{steps} steps, {found['epochs']} epochs, {found['speed']:.0f} samples/s; memory, MB:", ""]
            lines += [f"| step | {' | '.join(marks)} |", "|---" * (1 + len(marks)) + "|"]
            lines.append(f"| MB | {' | '.join(f'{value:.0f}' for value in marks.values())} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", default="10,100,1000,10000", help="numbers of shards")
    parser.add_argument("--per-shard", type=int, default=16, help="samples in a shard")
    parser.add_argument("--steps", type=int, default=10000, help="length of the long run; 0: no long run")
    add_append(parser)
    parser.add_argument("--start", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.start:
        print(json.dumps(measure_start(options.start)))
    elif options.run:
        print(json.dumps(measure_run(options.run, options.steps)))
    else:
        report = run([int(count) for count in options.shards.split(",")], options.per_shard, options.steps)
        publish(f"### Loader at scale\n\n`md2 bench scale {shlex.join(sys.argv[1:])}`\n\n{report}", options.append)


if __name__ == "__main__":
    main()
