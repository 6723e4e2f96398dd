"""Compare md2's loader with what people would use instead, on the same shards, in turns.

    md2 bench loader [RAW] [--modes mono,mono+stereo] [--codecs jpeg,ppm] [--rows md2,spdl,…]
    md2 bench loader --what-if URL|FOLDER CONFIG [key.sub=value …]      what limits a training (bench/what_if.py)

RAW holds drives in KITTI's raw layout with both cameras; without it, a synthetic drive of KITTI's size is rendered
(about a minute). Its images are smoother than KITTI's, and therefore cheaper to decode, in every row. prep packs the
frames with its default options, and the samples are repeated until there are enough. `bench/peers.py` has the rows.

Each turn is a process of its own, with nothing else running, and all rows have as many workers or threads as md2 has
decoding threads. Rows take turns; ratios are taken within a round, and the tables show medians. `memory` is the
proportional set size of all of a row's processes; it contains torch and the pages of the shards that are mapped.
`first batch` is the time from building the loader, with its library still to be imported and torch imported.
`mid-epoch` and `other ranks` are tried: does a new loader continue with the same batches from a state that was saved
in the middle of an epoch; and do two ranks instead of one get the rest of the epoch, each sample once?
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

from PIL import Image

from bench.data import SIZE, find_samples, image_bytes, numbered_dataset, pack_samples, raw_tree
from bench.machine import add_append, busy, processor, publish, versions
from shards.dataset import LocalDataset, open_dataset
from shards.errors import Md2Error

ROWS = ("md2", "spdl", "litdata", "webdataset", "dali", "floor", "plain")
NEEDS = {
    "spdl": ("spdl", "simplejpeg", "cv2"),
    "litdata": ("litdata", "simplejpeg", "cv2"),
    "webdataset": ("webdataset", "simplejpeg", "cv2"),
    "floor": ("simplejpeg",),
}
"""Modules of each row, beside what md2 itself needs."""
INSTALL = "pip install -c constraints.txt -e '.[bench]'"
ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Row:
    """Results of a row: one of each list a round, without jitter and with it."""

    name: str
    turns: dict[bool, list[dict[str, float]]] = field(default_factory=lambda: {False: [], True: []})
    resumes: dict[str, str] = field(default_factory=dict)

    def median(self, what: str, jitter: bool, digits: int) -> str:
        found = [turn[what] for turn in self.turns[jitter]]
        return f"{statistics.median(found):.{digits}f}" if found else ""

    def times(self, other: Row, jitter: bool) -> str:
        """Median over the rounds of this row's rate over another's; the floor has no jitter and stands for both."""
        pairs = zip(self.turns[jitter], other.turns[jitter] or other.turns[False], strict=True)
        found = [mine["rate"] / its["rate"] for mine, its in pairs]
        return f"{statistics.median(found):.2f}" if found else ""


def child(what: str, row: str, task: dict[str, Any], *arguments: str) -> Any:
    """Run `bench.turn` in a process of its own; its result.

    Raises:
        Md2Error: it fails.
    """
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(task, file)
        file.flush()
        command = [sys.executable, "-m", "bench.turn", what, row, file.name, *arguments]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Md2Error(f"md2 bench loader: {what} of {row} failed: {done.stderr or done.returncode}")
    return json.loads(done.stdout.splitlines()[-1]) if done.stdout else None


def try_resuming(rows: Sequence[str], folder: Path) -> dict[str, dict[str, str]]:
    """Row -> whether it resumes (see `bench.turn.resumes`)."""
    shards, lit = folder / "numbered", folder / "numbered-lit"
    if not shards.exists():
        numbered_dataset(shards, 6, 8)
    if "litdata" in rows and not lit.exists():
        child("store", "litdata", {"folder": str(shards), "lit": str(lit)})
    task = {"folder": str(shards), "lit": str(lit), "batch": 4}
    return {row: child("resumes", row, task) for row in rows if row not in ("floor", "plain")}


def measure(rows: Sequence[str], task: dict[str, Any], seconds: float, repeats: int) -> list[Row]:
    """Let the rows take turns."""
    found = [Row(name) for name in rows]
    for number in range(repeats):
        for row, jitter in product(found, (False, True)):
            if row.name == "floor" and jitter:
                continue
            row.turns[jitter].append(child("turn", row.name, {**task, "jitter": jitter}, str(seconds)))
            rate = row.turns[jitter][-1]["rate"]
            print(f"round {number + 1}: {row.name}{', jitter' * jitter}: {rate:.0f}", file=sys.stderr, flush=True)
    return found


def table(title: str, rows: Sequence[Row]) -> str:
    """Markdown table; `md2 / it` has md2's rate over the row's, without jitter and with it."""
    lines = [
        f"| {title} | samples/s | jitter | md2 / it | jitter | CPU ms/sample | jitter | first batch, s | memory, MB "
        "| mid-epoch | other ranks |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---|---|",
    ]
    ours = next((row for row in rows if row.name == "md2"), None)
    for row in rows:
        training = row.name != "floor"
        cells = [row.median("rate", jitter, 0) for jitter in (False, True)]
        cells += [ours.times(row, jitter) if ours is not None and ours is not row else "" for jitter in (False, True)]
        cells += [row.median("cpu", jitter, 2) for jitter in (False, True)]
        cells += [row.median("first", training, 2), row.median("memory", training, 0)]
        cells += [row.resumes.get(what, "") for what in ("mid-epoch", "other ranks")]
        lines.append(f"| {row.name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def prepare(raw: Path, found: list[list[Path]], folder: Path, samples: int, codec: str, lit: bool) -> LocalDataset:
    """The packed samples, and the same in LitData's format, unless they are there."""
    if (folder / codec / "shards" / "dataset.json").exists():
        dataset = open_dataset(str(folder / codec / "shards"))
    else:
        dataset = pack_samples(found, raw, folder, samples, codec=codec)  # type: ignore[arg-type]
    if lit and not (folder / codec / "lit").exists():
        child("store", "litdata", {"folder": str(dataset.folder), "lit": str(folder / codec / "lit")})
    return dataset


def describe(found: list[list[Path]], datasets: Sequence[LocalDataset], options: argparse.Namespace) -> str:
    with Image.open(found[0][0]) as image:
        size = image.size
    words = ["RAW" if Path(word).is_dir() else word for word in sys.argv[1:]]
    kind = "synthetic (smoother than KITTI's)" if options.raw is None else "given"
    packed = ", ".join(f"{data.manifest.encoding} ({image_bytes(data) / 1000:.0f} kB an image)" for data in datasets)
    packages = versions(
        "torch", "nvidia-dali-cuda120", "nvidia-dali-cuda130", "spdl", "litdata", "webdataset", "simplejpeg", "pillow"
    )
    return (
        f"### Loader\n\n`{shlex.join(['md2', 'bench', 'loader', *words])}`\n\n"
        f"{len(found)} time steps of {size[0]}x{size[1]}, {kind}, packed by prep: {SIZE[0]}x{SIZE[1]} {packed}; "
        f"batch {options.batch}, {options.threads} threads or workers, medians of {options.repeats} rounds.\n"
        f"{processor()}, {busy()}, {packages}.\n"
    )


def run(options: argparse.Namespace, folder: Path) -> str:
    """Measure all modes and codecs; Markdown."""
    raw = raw_tree(options.raw, folder)
    found = find_samples(raw)
    rows = [row for row in options.rows if all(find_spec(name) for name in NEEDS.get(row, ()))]
    codecs = {c: prepare(raw, found, folder, options.samples, c, "litdata" in rows) for c in options.codecs}
    parts = [describe(found, list(codecs.values()), options)]
    resumes = try_resuming(rows, folder) if options.repeats else {}
    for mode, (codec, dataset) in product(options.modes, codecs.items()):
        task = {
            "folder": str(dataset.folder),
            "lit": str(folder / codec / "lit"),
            "pngs": [[str(path) for path in paths] for paths in found],
            "stereo": mode == "mono+stereo",
            "batch": options.batch,
            "threads": options.threads,
        }
        measured = [row for row in rows if codec == "jpeg" or row not in ("floor", "plain")]
        results = measure(measured, task, options.seconds, options.repeats)
        for row in results:
            row.resumes = resumes.get(row.name, {})
        parts.append(table(f"{mode}, {codec}", results) + "\n")
    if missing := [row for row in options.rows if row not in rows]:
        parts.append(f"Not measured, since not installed: {', '.join(missing)}. {INSTALL}\n")
    return "\n".join(parts)


def words(known: Sequence[str]) -> Any:
    """Type of an option that takes some of `known`, comma-separated."""

    def parse(text: str) -> list[str]:
        found = text.split(",")
        if unknown := set(found) - set(known):
            raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))}: choose from {', '.join(known)}")
        return found

    return parse


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "raw", nargs="?", type=Path, metavar="RAW", help="drives in KITTI's raw layout; default: synthetic"
    )
    for name, known in (("modes", ("mono", "mono+stereo")), ("codecs", ("jpeg", "ppm")), ("rows", ROWS)):
        parser.add_argument(f"--{name}", type=words(known), default=list(known), help=f"some of {', '.join(known)}")
    parser.add_argument("--batch", type=int, default=12, help="samples in a batch")
    threads = len(os.sched_getaffinity(0))
    parser.add_argument(
        "--threads", type=int, default=threads, help="threads or workers of a row; default: a core each"
    )
    parser.add_argument("--seconds", type=float, default=2, help="length of a row's turn")
    parser.add_argument("--repeats", type=int, default=3, help="number of rounds; 0: only prepare the data")
    parser.add_argument("--samples", type=int, default=960, help="samples in the dataset")
    parser.add_argument("--data", type=Path, help="folder to keep the data in, and to take it from")
    parser.add_argument(
        "--what-if",
        nargs="+",
        metavar=("URL", "CONFIG"),
        help="instead: a training's step and loader, alone and together",
    )
    add_append(parser)
    options = parser.parse_args()
    if options.what_if:
        from bench.what_if import main as what_if

        publish(what_if(options.what_if, options.seconds), options.append)
        return
    with tempfile.TemporaryDirectory() as name:
        if options.data is not None:
            options.data.mkdir(parents=True, exist_ok=True)
        publish(run(options, options.data or Path(name)), options.append)


if __name__ == "__main__":
    main()
