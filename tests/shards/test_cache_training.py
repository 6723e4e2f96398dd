"""Training through a cache: runs that share one, a dataset larger than its limit, outages and damaged shards."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from storage_data import all_samples, make_dataset
from storage_fixtures import Packed
from storage_servers import Bucket, Fault, Proxy

from shards.dataset import open_dataset
from shards.errors import DatasetError, StorageError
from shards.manifest import Manifest
from shards.transfer import copy_dataset

pytestmark = pytest.mark.usefixtures("own_job")
SHARDS, IN_CACHE = 32, 12
"""Of two samples each; a window of 8 is needed at a time."""


def size_of(manifest: Manifest, *parts: str) -> int:
    return sum(s.bytes + s.index_bytes for part in parts for s in manifest.part(part))


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two datasets of many shards."""
    folders = {name: tmp_path_factory.mktemp("many") / name for name in "ab"}
    for seed, folder in enumerate(folders.values()):
        make_dataset(folder, train=2 * SHARDS, val=2, per_shard=2, seed=seed, padding=20_000)
    return folders


def limit_for(folder: Path) -> int:
    shards = open_dataset(str(folder)).manifest.part("train")
    return IN_CACHE * max(shard.bytes + shard.index_bytes for shard in shards)


EPOCHS = """
import sys, hashlib
import md2.pipeline
from pipeline_data import config, loader
from shards.dataset import open_dataset
def epochs(url, count=2, **options):
    batches = loader(open_dataset(url), config(width=64, height=64, flip=True), batch_size=2, seed=3, **options)
    for _ in range(count):
        for batch in batches:
            yield batch.keys, hashlib.sha256(batch.images[0].contiguous().numpy().tobytes()).hexdigest()
if __name__ == "__main__":
    for keys, digest in epochs(sys.argv[1]):
        print(*keys, digest, flush=True)
"""


@cache
def epochs_of(url: str) -> list[str]:
    scope: dict[str, Any] = {"__name__": "epochs"}
    exec(EPOCHS, scope)
    return [f"{' '.join(keys)} {digest}" for keys, digest in scope["epochs"](url)]


def held_bytes(folder: Path) -> int:
    total = 0
    for path in folder.glob("*/*/*"):
        with suppress(FileNotFoundError):
            total += path.stat().st_size if path.suffix in (".tar", ".idx", ".part") else 0
    return total


def test_two_runs_share_a_cache_that_holds_neither_dataset_whole(
    moto_bucket: Bucket, many: dict[str, Path], tmp_path: Path
) -> None:
    """Both see the samples of their own folder, and the disk never holds more than the limit."""
    limit = 2 * limit_for(many["a"])
    environment = {**os.environ, "MD2_CACHE_LIMIT": str(limit)}
    jobs = []
    for name, folder in many.items():
        copy_dataset(str(folder), f"{moto_bucket.url}/{name}")
        command = [sys.executable, "-c", EPOCHS, f"{moto_bucket.url}/{name}"]
        jobs.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment))
    most, deadline = 0, time.monotonic() + 120
    try:
        while any(process.poll() is None for process in jobs):
            most = max(most, held_bytes(tmp_path / "cache"))
            assert time.monotonic() < deadline
            time.sleep(0.01)
        found = [process.communicate()[0].splitlines() for process in jobs]
    finally:
        for process in jobs:
            process.kill()
    assert [process.returncode for process in jobs] == [0, 0]
    assert limit // 2 < most <= limit
    assert found == [epochs_of(str(folder)) for folder in many.values()]


def test_training_starts_with_the_first_shards_and_survives_an_outage(
    moto_bucket: Bucket, moto_proxy: Proxy, many: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MD2_CACHE_LIMIT", str(limit_for(many["a"])))
    copy_dataset(str(many["a"]), f"{moto_bucket.url}/a")
    outage = [float("inf"), float("inf")]
    moto_proxy.rule = lambda method, path, number: (
        Fault(status=503) if outage[0] <= time.monotonic() < outage[1] else Fault(delay=0.02)
    )
    scope: dict[str, Any] = {"__name__": "epochs"}
    exec(EPOCHS, scope)
    found = []
    for number, (keys, digest) in enumerate(scope["epochs"](f"{moto_bucket.url}/a")):
        if number == 0:
            fetched = {r.path for r in moto_proxy.requests if r.method == "GET" and r.path.endswith(".tar")}
            assert 1 <= len(fetched) <= IN_CACHE, "not the whole part"
        if number == SHARDS // 2:
            outage[:] = [time.monotonic(), time.monotonic() + 1.5]
        assert held_bytes(tmp_path / "cache") <= limit_for(many["a"])
        found.append(f"{' '.join(keys)} {digest}")
    assert found == epochs_of(str(many["a"]))
    sent = Counter(r.path for r in moto_proxy.requests if r.method == "GET" and r.path.endswith(".tar") and r.sent)
    assert len(sent) == SHARDS and sum(sent.values()) > 1.3 * SHARDS, "evicted, and fetched again in the second epoch"


def test_a_damaged_shard_ends_training_before_a_sample_of_it_is_used(
    moto_bucket: Bucket, many: dict[str, Path]
) -> None:
    copy_dataset(str(many["a"]), f"{moto_bucket.url}/a")
    name = "a/train/000007.tar"
    data = bytearray(moto_bucket.get(name))
    data[-20_000] ^= 1
    moto_bucket.put(name, bytes(data))
    damaged = {sample.key for sample in all_samples([many["a"] / "train/000007.tar"])}
    scope: dict[str, Any] = {"__name__": "epochs"}
    exec(EPOCHS, scope)
    seen: set[str] = set()
    with pytest.raises(DatasetError, match=r"train/000007\.tar: not the bytes that were published"):
        for keys, _ in scope["epochs"](f"{moto_bucket.url}/a"):
            seen.update(keys)
    assert not seen & damaged


def test_a_limit_below_the_window_is_refused_at_the_start(
    moto_url: str, packed: Packed, moto_proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline_data import config, loader

    monkeypatch.setenv("MD2_CACHE_LIMIT", str(size_of(packed.manifest, "train") - 1))
    with pytest.raises(StorageError, match=r"no room: 3 shards of .* are needed at once.*MD2_CACHE_LIMIT"):
        loader(open_dataset(moto_url), config(width=64, height=64), batch_size=1)
    assert not any(r.path.endswith(".tar") for r in moto_proxy.requests)
