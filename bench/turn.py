"""One turn of a row of `bench/peers.py`, in a process of its own; and whether the row resumes.

python -m bench.turn turn|resumes|store ROW TASK.json [SECONDS]        prints JSON
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from bench.peers import ROWS, Loaded, Task, store_for_litdata
from shards.dataset import open_dataset

WARM_SECONDS = 1.0
TURN_BATCHES = 8
"""md2 reads as many batches at once, so a turn takes a multiple of them."""


def turn(row: str, task: Task, seconds: float) -> dict[str, float]:
    """Measure a row in this process, which has done nothing else.

    Returns:
        `rate` samples/s, `cpu` milliseconds a sample, `first` seconds until the first batch (from before the library is
        imported; torch is), `memory` PSS in MB of this process and its workers.

    Raises:
        SystemExit: a batch is not what every row promises.
    """
    begin = time.perf_counter()
    batches, _ = ROWS[row](task)
    found = next(batches)
    first = time.perf_counter() - begin
    if row != "floor":
        check(row, task, found)
    while time.perf_counter() - begin < first + min(WARM_SECONDS, seconds):
        next(batches)
    samples, begin, cpu = 0, time.perf_counter(), cpu_seconds()
    while not samples or time.perf_counter() - begin < seconds:
        samples += sum(len(next(batches).intrinsics) for _ in range(TURN_BATCHES if row != "plain" else 1))
    wall, cpu = time.perf_counter() - begin, cpu_seconds() - cpu
    return {"rate": samples / wall, "cpu": 1000 * cpu / samples, "first": first, "memory": memory()}


def check(row: str, task: Task, found: Loaded) -> None:
    size = open_dataset(task.folder).manifest.size
    assert size is not None
    wanted = ((task.batch, 3, size[1], size[0]), torch.float32)
    shapes = {(tuple(image.shape), image.dtype) for image in (*found.images, *found.augmented)}
    if shapes != {wanted} or len(found.images) != len(task.stems) or len(found.augmented) != len(task.stems):
        raise SystemExit(f"{row}: {len(found.images)} frames of {shapes}, expected {len(task.stems)} of {wanted}")
    if any(x.min() < 0 or x.max() > 1 or x.flatten(1).std(1).min() < 0.02 for x in (*found.images, *found.augmented)):
        raise SystemExit(f"{row}: a batch does not hold pictures in [0, 1]")


def processes() -> list[int]:
    """This process and its descendants."""
    found = [os.getpid()]
    for process in found:
        for children in Path(f"/proc/{process}/task").glob("*/children"):
            found += [int(child) for child in children.read_text().split()]
    return found


def cpu_seconds() -> float:
    """CPU seconds of this process and its descendants that live."""
    ticks = 0
    for process in processes()[1:]:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


def memory() -> float:
    """Proportional set size (PSS) of this process and its descendants, MB: pages that they share count once."""
    maps = [Path(f"/proc/{process}/smaps_rollup").read_text() for process in processes()]
    return sum(int(line.split()[1]) for text in maps for line in text.splitlines() if line.startswith("Pss:")) / 1e3


def resumes(row: str, task: Task) -> dict[str, str]:
    """Try whether a row resumes in the middle of an epoch, with the same batches; and on two ranks instead of one.

    Args:
        task: of a dataset whose samples differ in fx (`bench.data.numbered_dataset`).

    Returns:
        `mid-epoch` and `other ranks`: yes or no; other ranks: whether both together give the rest of the epoch, each
        sample once.
    """

    def taken(batches: Iterator[Any], number: int) -> list[list[float]]:
        return [batch.intrinsics[:, 0, 0].tolist() for batch in islice(batches, number)]

    batches, state = ROWS[row](task)
    if state is None:
        return {"mid-epoch": "no", "other ranks": "no"}
    before = [fx for batch in taken(batches, 2) for fx in batch]
    saved = state()
    after = taken(batches, 2)
    same = taken(ROWS[row](replace(task, state=saved))[0], 2) == after
    total = sum(shard.samples for shard in open_dataset(task.folder).manifest.part("train"))
    half = replace(task, batch=task.batch // 2, world_size=2, state=saved)
    left = (total - len(before)) // task.batch
    try:
        ranks = [taken(ROWS[row](replace(half, rank=rank))[0], left) for rank in (0, 1)]
    except Exception as error:  # each library has its own way to refuse
        print(f"{row}, other ranks: {error!r}", file=sys.stderr)
        ranks = []
    found = before + [fx for batches in ranks for batch in batches for fx in batch]
    other = len(found) == total and len(set(found)) == total
    return {"mid-epoch": "yes" if same else "no", "other ranks": "yes" if other else "no"}


def end() -> None:
    """End this process and its workers at once: those of some rows do not end by themselves."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch would raise for a worker that is killed
    for process in processes()[1:]:
        os.kill(process, signal.SIGKILL)
    os._exit(0)


def main() -> None:
    """Do what the module's docstring says."""
    what, row, file, *seconds = sys.argv[1:]
    task = Task(**json.loads(Path(file).read_text()))
    if what == "store":
        store_for_litdata(task.folder, task.lit)
        return
    torch.set_num_threads(1)  # the cores decode: OpenMP's threads would wait for each other
    print(json.dumps(turn(row, task, float(seconds[0])) if what == "turn" else resumes(row, task)), flush=True)
    end()


if __name__ == "__main__":
    main()
