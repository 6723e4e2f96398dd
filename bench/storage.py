"""Compare ways to train from object storage: through md2's cache, from a local folder, and by DALI itself.

    md2 bench storage [--samples 800] [--shard-mb 1] [--latency 0 10 50] [--repeats 3] [--shards 100 10000]

An S3 server (rclone) runs on loopback behind a proxy, in its own process. The proxy delays every request, counts
bytes and, for the last table, answers 503 for two seconds. A sample is three 640x192 JPEGs, decoded on the CPU.

    local     md2's loader on the folder itself
    bucket    md2's loader on the URL with an empty cache: epoch 1 fetches, epoch 2 is local
    quarter   the same, with a cache that may hold a quarter of the dataset
    native    DALI's webdataset reader on s3:// itself, decoding alone (on fewer samples, because it is slow)

A table before says how long datasets of many small shards take to start, at the first latency.

Cold start is the time from opening to the first batch. Fetched / needed divides the bytes that left the server in an
epoch by the bytes of the decoded images; for native, it includes about 24 samples that DALI has prefetched
(`--native-samples` sets the number of samples). Figures are medians of the repeats. Bytes are exact; seconds depend
on the machine, so trust the ratios.
"""

from __future__ import annotations

import argparse
import io
import itertools
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from bench.data import numbered_dataset
from bench.write_dataset import write_dataset
from md2.config import DataConfig
from md2.pipeline import Loader
from shards.cache.folder import Cache, _in_use
from shards.dataset import open_dataset
from shards.manifest import Manifest, Split
from shards.sample import Sample
from shards.transfer import copy_dataset

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "support"))
from storage_servers import ACCESS_KEY, SECRET_KEY, Fault, faulty_proxy, rclone_server

IMAGES = ["0.jpg", "m1.jpg", "p1.jpg"]
BATCH, THREADS = 12, 2
OUTAGE, OUTAGE_AFTER = 2.0, 12
"""Seconds for which the failing server answers 503, and the number of the request that starts them."""
DIFFERENT = 200
"""Samples that are made; more are the same again."""
BUCKET = "bench"
URL = f"s3://{BUCKET}/drive"


@dataclass
class Run:
    """One way of reading, once."""

    first: float
    """Seconds to the first batch."""
    epochs: list[float]
    """Samples per second of each epoch, its start included."""
    fetched: list[int]
    """Bytes from the server in each epoch."""
    cpu: list[float]
    """CPU milliseconds of this process a sample in each epoch; the server has a process of its own."""


def serve(folder: str, pipe: Connection) -> None:
    """Run the server: send its address, then obey each (latency, failing) and answer with the bytes sent so far."""
    with rclone_server(Path(folder)) as endpoint, faulty_proxy(endpoint) as proxy:
        latency, failing, asked = 0.0, False, 0
        outage = (float("inf"), float("inf"))

        def rule(method: str, path: str, number: int) -> Fault:
            nonlocal asked, outage
            asked += 1
            now = time.monotonic()
            if failing and asked == OUTAGE_AFTER:
                outage = (now, now + OUTAGE)
            return Fault(status=503) if outage[0] <= now < outage[1] else Fault(delay=latency)

        proxy.rule = rule
        pipe.send(proxy.endpoint)
        while (message := pipe.recv()) is not None:
            latency, failing = message
            asked, outage = 0, (float("inf"), float("inf"))
            pipe.send(sum(request.sent for request in proxy.requests))


class Server:
    """Handle of the server's process. All tables share one: DALI's S3 client keeps the first address that it sees."""

    def __init__(self, folder: Path) -> None:
        self._pipe, theirs = multiprocessing.Pipe()
        context = multiprocessing.get_context("spawn")
        self._process = context.Process(target=serve, args=(str(folder), theirs))
        self._process.start()
        self.latency, self.failing = 0.0, False
        os.environ["AWS_ENDPOINT_URL"] = self._pipe.recv()

    def sent(self) -> int:
        """Return the bytes sent so far, and apply `latency` (seconds) and `failing` from now on."""
        self._pipe.send((self.latency, self.failing))
        return int(self._pipe.recv())

    def stop(self) -> None:
        self._pipe.send(None)
        self._process.join()


def make_samples(count: int) -> Iterator[Sample]:
    """Make samples with as much detail as street images: about 45 kB an image at quality 93."""
    rng = np.random.default_rng(0)
    made: list[dict[str, bytes]] = []
    for number in range(count):
        if number >= DIFFERENT:
            yield Sample(f"drive_l_{number:010d}", made[number % DIFFERENT])
            continue
        components = {"k.f32": b"\0" * 16, "meta.json": b"{}"}
        for name in IMAGES:
            coarse = Image.fromarray(rng.integers(0, 256, (24, 80, 3), np.uint8)).resize((640, 192))
            picture = np.clip(np.asarray(coarse, np.int16) + rng.integers(-7, 8, (192, 640, 3)), 0, 255)
            buffer = io.BytesIO()
            Image.fromarray(picture.astype(np.uint8)).save(buffer, "JPEG", quality=93)
            components[name] = buffer.getvalue()
        made.append(components)
        yield Sample(f"drive_l_{number:010d}", components)


def reader(tars: list[str], indexes: list[str]) -> Any:
    """Build a DALI pipeline that reads tars and indexes."""
    from nvidia.dali import fn, pipeline_def

    @pipeline_def(batch_size=BATCH, num_threads=THREADS, device_id=None)
    def pipeline() -> Any:
        raw = fn.readers.webdataset(paths=tars, index_paths=indexes, ext=IMAGES, name="r", prefetch_queue_depth=2)
        return tuple(fn.decoders.image(list(raw)))

    built = pipeline()
    built.build()
    return built


def take(pipeline: Any, batches: int) -> None:
    for _ in range(batches):
        pipeline.run()


def measure(samples: int, epochs: list[Callable[[], Any]], server: Server | None) -> Run:
    """Time epochs; each callable opens the dataset and returns a pipeline."""
    run, batches = Run(0.0, [], [], []), samples // BATCH
    before = server.sent() if server else 0
    for open_pipeline in epochs:
        began, cpu = time.monotonic(), time.process_time()
        pipeline = open_pipeline()
        pipeline.run()
        run.first = run.first or time.monotonic() - began
        take(pipeline, batches - 1)
        run.epochs.append(batches * BATCH / (time.monotonic() - began))
        run.cpu.append(1000 * (time.process_time() - cpu) / (batches * BATCH))
        del pipeline
        after = server.sent() if server else 0
        run.fetched.append(after - before)
        before = after
    return run


class Batches:
    """md2's loader, endlessly."""

    def __init__(self, url: str, cache: Cache | None) -> None:
        config = DataConfig(color_jitter=False, threads=THREADS)
        self._loader = Loader(
            open_dataset(url, cache=cache), "train", config, batch_size=BATCH, seed=0, train=True,
            device=torch.device("cpu"),
        )  # fmt: skip
        self._batches = itertools.chain.from_iterable(itertools.repeat(self._loader))

    def run(self) -> None:
        next(self._batches)


def from_md2(url: str, limit: int | None = None) -> list[Callable[[], Any]]:
    """Two epochs of one loader; with a URL, through a cache of its own."""
    folder = tempfile.TemporaryDirectory(prefix="md2-bench-", ignore_cleanup_errors=True)
    loaders: list[Batches] = []

    def open_batches() -> Batches:
        if not loaders:
            loaders.append(Batches(url, Cache(Path(folder.name), limit)))
        return loaders[0]

    return [open_batches, open_batches]


def native(manifest: Manifest) -> Callable[[], Any]:
    def open_pipeline() -> Any:
        shards = manifest.part("train")
        return reader([f"{URL}/{s.name}" for s in shards], [f"{URL}/{s.index_name}" for s in shards])

    return open_pipeline


def row(name: str, runs: list[Run], needed: int, base: float) -> str:
    """Line of the table; each number is the median over the runs."""
    first = statistics.median(run.first for run in runs)
    rates = [statistics.median(rates) for rates in zip(*(run.epochs for run in runs), strict=True)]
    fetched = [statistics.median(f) / needed for f in zip(*(run.fetched for run in runs), strict=True)]
    rate = " / ".join(f"{r:.0f} ({r / base:.2f})" for r in rates)
    cpu = [statistics.median(each) for each in zip(*(run.cpu for run in runs), strict=True)]
    cells = [rate, " / ".join(f"{c:.2f}" for c in cpu), " / ".join(f"{f:.2f}" for f in fetched)]
    return f"| {name} | {first:.2f} s | {' | '.join(cells)} |"


def payload(samples: int, per_sample: float) -> int:
    return int(samples // BATCH * BATCH * per_sample)


def table(options: argparse.Namespace, drive: Path, manifest: Manifest, per_sample: float, server: Server) -> None:
    few = min(options.samples, options.native_samples)
    print(f"\nlatency {server.latency * 1000:g} ms a request\n")
    print("| | cold start | samples/s, epoch 1 / 2 (over local) | CPU ms a sample | fetched / needed, epoch 1 / 2 |")
    print("|---|---|---|---|---|")
    runs: dict[str, list[Run]] = {"local": [], "bucket": [], "quarter": [], "native": []}
    quarter = sum(shard.bytes + shard.index_bytes for shard in manifest.shards) // 4
    for _ in range(options.repeats):
        runs["local"].append(measure(options.samples, from_md2(str(drive)), None))
        runs["bucket"].append(measure(options.samples, from_md2(URL), server))
        runs["quarter"].append(measure(options.samples, from_md2(URL, quarter), server))
        runs["native"].append(measure(few, [native(manifest)], server))
        for lock in _in_use.values():
            lock.release()
        _in_use.clear()
    base = statistics.median(run.epochs[1] for run in runs["local"])
    for name, done in runs.items():
        needed = payload(few if name == "native" else options.samples, per_sample)
        print(row(name, done, needed, base), flush=True)


def starts(options: argparse.Namespace, bucket: Path, server: Server) -> None:
    """Print how long datasets of many shards, of four small samples each, take to the first batch from the bucket."""
    print(
        f"\nlatency {server.latency * 1000:g} ms a request, medians of {options.repeats} starts with an empty cache\n"
    )
    print("| shards | opened | first batch |\n|---:|---:|---:|")
    server.sent()
    for count in options.shards:  # before the first request: rclone remembers what is in a folder
        numbered_dataset(bucket / f"shards-{count}", count, 4)
    for count in options.shards:
        times = []
        for _ in range(options.repeats):
            with tempfile.TemporaryDirectory(prefix="md2-bench-", ignore_cleanup_errors=True) as folder:
                cache, began = Cache(Path(folder)), time.monotonic()
                open_dataset(f"s3://{BUCKET}/shards-{count}", cache=cache)
                opened = time.monotonic() - began
                batches = Batches(f"s3://{BUCKET}/shards-{count}", cache)
                batches.run()
                times.append((opened, time.monotonic() - began - opened))
                del batches
        print(
            f"| {count} | {' | '.join(f'{statistics.median(t):.2f} s' for t in zip(*times, strict=True))} |", flush=True
        )


def faults(options: argparse.Namespace, manifest: Manifest, server: Server) -> None:
    """Print what each way of reading does during an outage of two seconds in the middle of an epoch."""
    server.latency, server.failing = 0.0, True
    few = min(options.samples, options.native_samples)
    print(f"\nThe server answers 503 for {OUTAGE:g} s in the middle of an epoch\n\n| | |\n|---|---|")
    ways: dict[str, tuple[int, Callable[[], Any]]] = {
        "bucket": (options.samples, from_md2(URL)[0]),
        "native": (few, native(manifest)),
    }
    for name, (samples, way) in ways.items():
        try:
            run = measure(samples, [way], server)
        except RuntimeError as error:
            reason = str(error).rpartition("encountered:")[2].split("Current pipeline")[0]
            print(f"| {name} | the pipeline dies: {' '.join(reason.split())[:120]} |", flush=True)
        else:
            print(f"| {name} | {samples // BATCH * BATCH} samples, {run.epochs[0]:.0f} samples/s |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=800)
    parser.add_argument("--native-samples", type=int, default=36)
    parser.add_argument("--shard-mb", type=int, default=1)
    parser.add_argument("--shards", type=int, nargs="*", default=[100, 10000], help="start datasets of so many shards")
    parser.add_argument("--latency", type=float, nargs="*", default=[0.0, 10.0, 50.0])
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    os.environ |= {
        "AWS_ACCESS_KEY_ID": ACCESS_KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    os.environ |= {"AWS_EC2_METADATA_DISABLED": "true"}
    with tempfile.TemporaryDirectory(prefix="md2-bench-") as name:
        folder = Path(name)
        (folder / "server" / BUCKET).mkdir(parents=True)
        manifest = write_dataset(
            folder / "drive", {"train": make_samples(options.samples)}, split=Split(name="bench", sha256="0" * 64),
            frames=[0, -1, 1], stereo=False, depth=None, size=(640, 192), codec="jpeg", quality=93, seed=0,
            shard_bytes=options.shard_mb << 20,
        )  # fmt: skip
        copy_dataset(str(folder / "drive"), str(folder / "server" / BUCKET / "drive"))
        first = next(make_samples(1))
        per_sample = float(sum(len(first.components[name]) for name in IMAGES))
        total = sum(shard.bytes for shard in manifest.shards)
        print(
            f"{options.samples} samples, {per_sample / 3e3:.0f} kB an image, {len(manifest.shards)} shards, "
            f"{total / 1e6:.0f} MB; {THREADS} decoding threads, batch {BATCH}, {os.cpu_count()} cores"
        )
        measure(BATCH, from_md2(str(folder / "drive"))[:1], None)  # so that DALI's own start is not measured
        server = Server(folder / "server")
        try:
            server.latency = options.latency[0] / 1000
            if options.shards:
                starts(options, folder / "server" / BUCKET, server)
            for server.latency in (milliseconds / 1000 for milliseconds in options.latency):
                table(options, folder / "drive", manifest, per_sample, server)
            faults(options, manifest, server)
        finally:
            server.stop()


if __name__ == "__main__":
    main()
