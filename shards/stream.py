"""Reading a remote dataset without keeping it: whole shards, fetched ahead into a bounded window, verified, dropped.

    for sample in stream_samples("s3://team/kitti/eigen_zhou", "train"):
        sample.key, sample.components["0.jpg"]

Latency is paid per shard and hidden behind the shards before it; a cut connection or a busy server is ridden out as
everywhere in `shards`, and no sample of a shard appears before the shard's sha256 is right. Every pass fetches all
of its bytes again: for training, the cache (`open_dataset`) is the better choice wherever the dataset fits the disk.
"""

from __future__ import annotations

import random
import tempfile
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from shards.cache.download import fetch
from shards.manifest import Shard
from shards.publish import require_manifest
from shards.sample import Sample
from shards.storage import Storage, open_storage
from shards.tar import read_samples

WINDOW = 1 << 30
PARALLEL = 4


def stream_samples(
    url: str,
    part: str,
    *,
    seed: int | None = None,
    rank: int = 0,
    world: int = 1,
    window: int = WINDOW,
    scratch: Path | None = None,
) -> Iterator[Sample]:
    """All samples of a part, once.

    Args:
        url: folder or URL of a dataset.
        seed: order of the shards (another each epoch); None: as published. Within a shard samples stand in
            their published order, which is a random one.
        rank, world: take every `world`-th shard from `rank` on.
        window: bytes of shards on local disk at once; one shard always fits.
        scratch: where the window lies; None: the system's temporary folder.

    Raises:
        DatasetError: no dataset or part there, or its bytes are not the published ones.
        StorageError: the storage fails beyond patience, or the local disk is full.
    """
    storage = open_storage(url)
    shards = require_manifest(storage).manifest.part(part)
    if seed is not None:
        random.Random(seed).shuffle(shards)
    with tempfile.TemporaryDirectory(prefix="md2-stream-", dir=scratch) as folder:
        yield from _run(storage, shards[rank::world], window, Path(folder))


def _run(storage: Storage, shards: list[Shard], window: int, folder: Path) -> Iterator[Sample]:
    def bring(shard: Shard) -> Path:
        tar = folder / shard.name
        fetch(storage, shard.name, tar, size=shard.bytes, sha256=shard.sha256)
        return tar

    waiting, ahead, held = deque(shards), deque[tuple[Shard, Future[Path]]](), 0
    with ThreadPoolExecutor(PARALLEL) as pool:
        try:
            while waiting or ahead:
                while waiting and (not ahead or held + waiting[0].bytes <= window):
                    shard = waiting.popleft()
                    ahead.append((shard, pool.submit(bring, shard)))
                    held += shard.bytes
                shard, future = ahead.popleft()
                tar = future.result()
                yield from read_samples(tar)
                tar.unlink()
                held -= shard.bytes
        finally:
            storage.cancel()
            pool.shutdown(cancel_futures=True)
