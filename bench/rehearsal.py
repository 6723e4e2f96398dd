"""Rehearse KITTI at full size, from the literal command to an epoch: check, pack, publish to S3, read from there.

    md2 bench rehearsal [RAW] [--splits DIR] [--share 0.1] [--workers 2] [--folder DIR]

The raw tree has all drives of eigen_zhou with all their frames and scans, as links to the time steps of RAW (KITTI's
layout; without it, a synthetic drive is rendered). `--check` always looks at the whole tree. `--share` packs and reads
only the first lines of each drive, about that share of all: the whole takes about half an hour of two cores and 60 GB
of disk. Each step is a process of its own, as a user would run it; an S3 server (rclone) runs on loopback. The epoch
reads the train part through a cache that may hold a third of the dataset.

Speed is given in frames per second and per CPU second, over the first and the last fifth of a step: on a busy machine
trust the latter. Memory is the sum over a step's processes of what each holds (shared pages divided among those that
share them), at its highest.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from bench.data import raw_tree, time_steps
from bench.machine import add_append, busy, processor, publish, versions
from prep.packing.pack import scratch_folder
from prep.raw.calibration import other
from prep.raw.splits import SplitLists, read_split
from shards.dataset import open_dataset
from shards.errors import INCOMPLETE

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "support"))
from storage_servers import ACCESS_KEY, SECRET_KEY, rclone_server

SPLIT = "eigen_zhou"
EVERY = 0.5
"""Seconds between two looks at a step."""
BATCH = 12
FOLDERS = ("image_02", "image_03", "velodyne_points")


@dataclass
class Step:
    """One process with those that it starts, watched.

    Attributes:
        seen: (seconds, CPU seconds, frames done) at each look.
        memory, disk: the most bytes at a look.
    """

    seconds: float = 0.0
    memory: int = 0
    disk: int = 0
    output: str = ""
    seen: list[tuple[float, float, float]] = field(default_factory=list)

    def speed(self, low: float, high: float) -> str:
        """Frames per second and per CPU second between two shares of the frames; the start of the step is left out."""
        total = self.seen[-1][2]
        first = next(look for look in self.seen if look[2] > 0 and look[2] >= low * total)
        last = next(look for look in self.seen if look[2] >= high * total)
        seconds, cpu_seconds, frames = (b - a for a, b in zip(first, last, strict=True))
        return f"{frames / seconds:.0f}, {frames / cpu_seconds:.0f}" if frames and cpu_seconds else "too short"

    def count(self, frames: int) -> None:
        """Turn what was seen, in any unit, into frames, of which there were so many at the end."""
        total = self.seen[-1][2] or 1.0
        self.seen = [(seconds, cpu_seconds, frames * done / total) for seconds, cpu_seconds, done in self.seen]

    def row(self, name: str) -> str:
        """A line of the table."""
        speeds = [self.speed(0, 0.2), self.speed(0.8, 1)] if self.seen[-1][2] else ["", ""]
        return (
            f"| {name} | {self.seconds:,.0f} | {self.seen[-1][1]:,.0f} | {speeds[0]} | {speeds[1]} | "
            f"{self.memory / 1e6:,.0f} | {self.disk / 1e9:.2f} |"
        )


def processes(pid: int) -> Iterator[int]:
    """Yield a process and all that it has started."""
    yield pid
    with suppress(OSError):
        for listed in Path(f"/proc/{pid}/task").glob("*/children"):
            for child in listed.read_text().split():
                yield from processes(int(child))


def held(pid: int) -> int:
    """Bytes of memory of a process."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    return 0


def cpu(pid: int) -> float:
    """CPU seconds of a process and of its children that have ended."""
    with suppress(OSError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
    return 0.0


def size_of(*folders: Path) -> int:
    """Bytes on disk below folders; a file with several names counts once."""
    found = {}
    for folder in folders:
        for path in folder.rglob("*"):
            with suppress(OSError):
                about = path.lstat()
                found[about.st_dev, about.st_ino] = about.st_blocks * 512
    return sum(found.values())


def chunk_bytes(scratch: Path) -> int:
    """Bytes of the finished chunks; 0 while the folder goes away."""
    with suppress(OSError):
        return sum(path.stat().st_size for path in scratch.glob("*.chunk"))
    return 0


def watch(arguments: list[str | Path], frames: Callable[[], float], *folders: Path) -> Step:
    """Run Python with these arguments to its end, and look at it now and then.

    Args:
        frames: returns how many are done.
        folders: count as its disk.
    """
    step, start, done = Step(), time.monotonic(), 0.0
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen([sys.executable, *arguments], stdout=output, stderr=output)
        while process.poll() is None:
            tree, done = list(processes(process.pid)), max(done, frames())
            step.memory = max(step.memory, sum(map(held, tree)))
            step.seen.append((time.monotonic() - start, sum(map(cpu, tree)), done))
            if len(step.seen) % 20 == 1:
                step.disk = max(step.disk, size_of(*folders))
            time.sleep(EVERY)
        output.seek(0)
        step.output = output.read()
    step.seconds, step.disk = time.monotonic() - start, max(step.disk, size_of(*folders))
    if process.returncode not in (0, INCOMPLETE):
        raise SystemExit(f"{' '.join(map(str, arguments))}: exit code {process.returncode}\n{step.output}")
    return step


def link_tree(raw: Path, root: Path, lists: SplitLists) -> tuple[int, int]:
    """Link RAW's time steps under every drive and frame of the lists, the neighbours included; count both.

    A tree that is there already is used again.
    """
    found = time_steps(raw)
    steps, beside = 0, root.with_name("raw.tmp")
    for name in sorted({line.drive for lines in lists.parts.values() for line in lines}):
        date, drive = beside / name.partition("/")[0], beside / name
        last = max(line.frame for lines in lists.parts.values() for line in lines if line.drive == name) + 1
        steps += last + 1
        if root.exists():
            continue
        for kind in FOLDERS:
            (drive / kind / "data").mkdir(parents=True)
        for calibration in found[0][0].parents[3].glob("calib_*.txt"):
            with suppress(FileExistsError):
                (date / calibration.name).symlink_to(calibration)
        for number in range(last + 1):
            for kind, source in zip(FOLDERS, found[number % len(found)], strict=True):
                (drive / kind / "data" / f"{number:010d}{source.suffix}").symlink_to(source)
    if not root.exists():
        beside.rename(root)
    return 2 * steps, steps


def unique_frames(lists: SplitLists) -> int:
    """Number of images that mono+stereo samples of the lists need."""
    lines = [line for rows in lists.parts.values() for line in rows]
    temporal = {(line.drive, line.frame + offset, line.side) for line in lines for offset in (-1, 0, 1)}
    return len(temporal | {(line.drive, line.frame, other(line.side)) for line in lines})


def write_share(lists: SplitLists, share: float, folder: Path) -> Path:
    """Write the lists into a folder of the split's name, cut to the first frames of each drive."""
    folder.mkdir(parents=True)
    ends = {
        name: sorted(line.frame for lines in lists.parts.values() for line in lines if line.drive == name)
        for name in {line.drive for lines in lists.parts.values() for line in lines}
    }
    ends = {name: frames[min(int(len(frames) * share), len(frames) - 1)] for name, frames in ends.items()}
    for part, lines in lists.parts.items():
        kept = [line.text for line in lines if share >= 1 or line.frame < ends[line.drive]]
        (folder / f"{part}_files.txt").write_text("".join(f"{text}\n" for text in kept))
    return folder


EPOCH = """
import sys, torch
from pathlib import Path
from md2.config import DataConfig
from md2.pipeline import Loader
from shards.dataset import open_dataset
loader = Loader(open_dataset(sys.argv[1]), "train", DataConfig(threads=int(sys.argv[3])), batch_size=int(sys.argv[4]),
                seed=0, train=True, device=torch.device("cpu"))
done, progress = 0, Path(sys.argv[2])
for batch in loader:
    done += batch.size
    progress.write_text(str(done))
"""
"""An epoch of the loader as training uses it: mono, with flip and colour jitter."""


def rehearse(options: argparse.Namespace, folder: Path) -> str:
    """Run all steps below `folder`; return the result as Markdown."""
    lists = read_split(SPLIT, options.splits)
    raw, out = folder / "raw", folder / "shards" / SPLIT
    images, scans = link_tree(raw_tree(options.raw, folder, lidar=True), raw, lists)
    split = write_share(lists, 1, folder / "whole" / SPLIT)
    prep: list[str | Path] = ["-m", "cli.main", "prep", "--raw", raw, "--follow-links", "--out", out, "--split"]
    check = watch([*prep, split, "--check"], lambda: 0)
    print(check.output)
    if options.share < 1:
        split = write_share(lists, options.share, folder / "share" / SPLIT)
    scratch = scratch_folder(str(out))
    packing = watch(
        [*prep, split, "--workers", str(options.workers)],
        lambda: chunk_bytes(scratch),
        out,
        scratch,
    )
    packing.count(unique_frames(read_split(str(split))))
    encoded = next(seconds for seconds, _, frames in packing.seen if frames == packing.seen[-1][2])
    print(packing.output)
    dataset = open_dataset(str(out))
    shards = dataset.manifest.shards
    size, largest = sum(shard.bytes for shard in shards), max(shard.bytes for shard in shards)
    files = len(list(out.rglob("*.*")))
    (folder / "s3" / "rehearsal").mkdir(parents=True)
    url, cache = f"s3://rehearsal/{SPLIT}", folder / "cache"
    limit = max(size // 3, 10 * largest)
    os.environ |= {
        "AWS_ACCESS_KEY_ID": ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": SECRET_KEY, "AWS_DEFAULT_REGION": "us-east-1",
        "MD2_CACHE": str(cache), "MD2_CACHE_LIMIT": str(limit),
    }  # fmt: skip
    with rclone_server(folder / "s3") as endpoint:
        os.environ["AWS_ENDPOINT_URL"] = endpoint
        push = watch(["-m", "cli.main", "shards", "push", out, url], lambda: 0, folder / "s3")
        progress = folder / "progress"
        progress.write_text("0")
        epoch = watch(
            ["-c", EPOCH, url, progress, str(options.workers), str(BATCH)],
            lambda: 3 * float(progress.read_text() or 0),  # three images a sample
            cache,
        )
    packed = f"the first {100 * options.share:g}% of each drive's lines" if options.share < 1 else "all lines"
    return f"""\
### Rehearsal: {SPLIT}, {packed}

{processor()}, {busy()}; {versions()}. `md2 bench rehearsal --share {options.share:g} --workers {options.workers}`

The tree: {len(list(raw.glob("*/*_sync")))} drives, {images:,} images, {scans:,} scans. The dataset: \
{sum(shard.samples for shard in shards):,} samples, {len(shards)} shards, {size / 1e9:.2f} GB in {files} files. \
The cache may hold {limit / 1e9:.2f} GB.

| step | seconds | CPU seconds | frames/s, per CPU second: first fifth | last fifth | memory, MB | disk, GB |
|---|---|---|---|---|---|---|
{check.row("`md2 prep --check`, whole tree")}
{packing.row(f"`md2 prep`, of which {packing.seconds - encoded:,.0f} s writing shards")}
{push.row(f"`md2 shards push`, {size / 1e6 / push.seconds:,.0f} MB/s")}
{epoch.row("an epoch of the loader from S3")}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("raw", nargs="?", type=Path, metavar="RAW", help="KITTI's raw layout; default: synthetic")
    parser.add_argument("--splits", type=Path, help="folder that holds eigen_zhou; default: downloaded once")
    parser.add_argument("--share", type=float, default=0.1, help="share of the lines to pack and to read (0.1)")
    parser.add_argument("--workers", type=int, default=2, help="processes of prep, and threads of the loader (2)")
    parser.add_argument("--folder", type=Path, help="where to work; it is kept, and its raw tree used again")
    add_append(parser)
    options = parser.parse_args()
    if not 0 < options.share <= 1:
        parser.error("--share: above 0, up to 1")
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        publish(rehearse(options, folder.resolve()), options.append)


if __name__ == "__main__":
    main()
