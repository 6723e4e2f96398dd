"""The local cache: filled once per machine, verified, resumed, bounded, and nothing a running job uses is evicted."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from storage_data import all_samples, make_dataset
from storage_fixtures import Packed, end_job, note_fault
from storage_servers import Bucket, Fault, Proxy

from shards.cache import fill as fill_module
from shards.cache import folder as cache_module
from shards.cache.folder import Cache, format_bytes, parse_bytes, residents
from shards.dataset import LocalDataset, open_dataset
from shards.errors import StorageError, UsageError
from shards.manifest import Manifest
from shards.transfer import copy_dataset

pytestmark = pytest.mark.usefixtures("own_job")


@pytest.fixture
def url(bucket: Bucket, packed: Packed) -> str:
    copy_dataset(packed.url, f"{bucket.url}/drive")
    return f"{bucket.url}/drive"


def contents(dataset: LocalDataset, part: str) -> list[bytes]:
    return [path.read_bytes() for path in dataset.tars(part) + dataset.indexes(part)]


def published(packed: Packed, part: str) -> list[bytes]:
    shards = packed.manifest.part(part)
    return [(packed.folder / name).read_bytes() for name in [s.name for s in shards] + [s.index_name for s in shards]]


def test_fills_once_and_is_local_from_then_on(url: str, packed: Packed, proxied: Proxy) -> None:
    dataset = open_dataset(url)
    assert dataset.manifest == packed.manifest
    assert not any(r.path.endswith(".tar") for r in proxied.requests), "opening alone fetches no shard"
    assert contents(dataset, "train") == published(packed, "train")
    for shard in packed.manifest.part("train"):
        assert proxied.sent(f"/{shard.name}") == shard.bytes
    assert not any("/val/" in r.path for r in proxied.requests), "only the part that was asked for"
    proxied.requests.clear()
    for _ in range(2):
        assert contents(open_dataset(url), "train") == published(packed, "train")
    assert {r.path.rpartition("/")[2] for r in proxied.requests} == {"dataset.json"}
    assert contents(dataset, "val") == published(packed, "val")


PROGRAM = """
import sys, time
import shards.storage
shards.storage.CHUNK = 65536
from shards.dataset import open_dataset
from shards.tar import read_samples
dataset = open_dataset(sys.argv[1])
print("open", flush=True)
if sys.argv[2] == "fill":
    tars = dataset.tars("train")
    print(sum(1 for tar in tars for _ in read_samples(tar)), flush=True)
sys.stdin.read()
"""


@contextmanager
def job(url: str, what: str = "fill") -> Iterator[subprocess.Popen[str]]:
    """Another process with the dataset open, until its input closes."""
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, url, what], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_several_processes_share_one_filling(moto_url: str, packed: Packed, moto_proxy: Proxy) -> None:
    moto_proxy.rule = lambda method, path, number: Fault(delay=0.2) if path.endswith(".tar") else None
    with job(moto_url) as a, job(moto_url) as b, job(moto_url) as c:
        assert [line(p) for p in (a, b, c)] == ["open"] * 3
        assert [line(p) for p in (a, b, c)] == ["6"] * 3
    for shard in packed.manifest.part("train"):
        assert moto_proxy.sent(f"/{shard.name}") == shard.bytes, "fetched by one of them, whole, once"


def test_a_process_killed_while_filling_loses_nothing(
    moto_url: str, packed: Packed, moto_proxy: Proxy, tmp_path: Path
) -> None:
    moto_proxy.rule = lambda method, path, number: Fault(delay=0.25) if path.endswith(".tar") else None
    total = sum(s.bytes for s in packed.manifest.part("train"))
    with job(moto_url) as process:
        deadline = time.monotonic() + 60
        while not sum(p.stat().st_size for p in (tmp_path / "cache").rglob("*.tar.part")) > total // 4:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
    kept = sum(p.stat().st_size for p in (tmp_path / "cache").rglob("*.tar.part"))
    whole = {p.name: p.stat().st_size for p in (tmp_path / "cache").rglob("*.tar")}
    moto_proxy.rule = None
    before, began = moto_proxy.sent(".tar"), time.monotonic()
    dataset = open_dataset(moto_url)
    assert contents(dataset, "train") == published(packed, "train")
    assert moto_proxy.sent(".tar") - before == total - kept - sum(whole.values()), "what had come came again"
    note_fault("process killed while the cache fills", "the next one goes on, no byte fetched twice", began)


def test_a_part_of_a_file_that_is_rubbish_is_thrown_away(moto_url: str, packed: Packed, moto_proxy: Proxy) -> None:
    """A crash of the machine may leave a `.part` of the right length with wrong bytes in it."""
    dataset = open_dataset(moto_url)
    part = dataset.folder / "train/000000.tar.part"
    part.parent.mkdir(parents=True)
    for rubbish in (b"\0" * 5000, b"\0" * packed.manifest.shards[0].bytes, b"\0" * 10_000_000):
        shutil.rmtree(dataset.folder / "train", ignore_errors=True)
        part.parent.mkdir(parents=True)
        part.write_bytes(rubbish)
        assert contents(open_dataset(moto_url), "train") == published(packed, "train")
        assert not part.exists()


def test_a_corrupted_file_is_found_and_fetched_again(url: str, packed: Packed, proxied: Proxy) -> None:
    dataset = open_dataset(url)
    victim = dataset.tars("train")[1]
    before = victim.stat()
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 0xFF
    victim.write_bytes(data)
    os.utime(victim, ns=(before.st_atime_ns, before.st_mtime_ns))  # same length, same date
    proxied.requests.clear()
    began = time.monotonic()
    assert contents(open_dataset(url), "train") == published(packed, "train")
    note_fault("cache file corrupted on disk (same length and date)", "found, that file fetched again", began)
    assert [r.path.rpartition("/")[2] for r in proxied.requests if r.path.endswith(".tar")] == [victim.name]


def test_a_disk_that_rots_is_found_within_a_day(
    moto_url: str, packed: Packed, moto_proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing was written, so neither size nor times tell; the sha256 is checked again once a day."""
    dataset = open_dataset(moto_url)
    victim = dataset.tars("train")[0]
    data = bytearray(victim.read_bytes())
    data[5000] ^= 1
    victim.write_bytes(data)
    place = cache_module.CachedFolder(Cache.from_environment(), dataset.folder.name)
    place.mark_verified(packed.manifest.part("train")[0])  # as if the file had never been touched since
    assert open_dataset(moto_url).tars("train")[0].read_bytes() == data, "not the case that is meant"
    now = time.time()
    monkeypatch.setattr(cache_module.time, "time", lambda: now + cache_module.VERIFY_EVERY + 1)
    assert contents(open_dataset(moto_url), "train") == published(packed, "train")


@pytest.mark.parametrize("stamp", ["", "{", "[]", '{"at": 0, "files": []}', '{"at": 9e99, "files": []}'])
def test_a_broken_stamp_only_means_checking_again(moto_url: str, packed: Packed, stamp: str) -> None:
    dataset = open_dataset(moto_url)
    dataset.tars("train")
    for path in (dataset.folder / ".verified").iterdir():
        path.write_text(stamp)
    assert contents(open_dataset(moto_url), "train") == published(packed, "train")


def test_a_running_jobs_data_survive_the_replacement_of_a_corrupted_file(
    moto_url: str, packed: Packed, moto_proxy: Proxy
) -> None:
    """Replaced, not written over: who has the old file open (and mapped) keeps reading it."""
    tar = open_dataset(moto_url).tars("train")[0]
    with tar.open("rb") as held:
        inode = tar.stat().st_ino
        tar.write_bytes(b"\0" * tar.stat().st_size)
        open_dataset(moto_url).tars("train")
        assert tar.stat().st_ino != inode
        assert held.read() == b"\0" * packed.manifest.shards[0].bytes


def size_of(manifest: Manifest, *parts: str) -> int:
    return sum(s.bytes + s.index_bytes for part in parts for s in manifest.part(part))


@pytest.fixture
def three(moto_bucket: Bucket, packed: Packed, repacked: Packed, tmp_path: Path) -> dict[str, str]:
    """Three datasets of one size in one bucket."""
    make_dataset(tmp_path / "third", train=6, val=2, per_shard=2, seed=2, padding=60_000)
    for name, folder in (("a", packed.url), ("b", repacked.url), ("c", str(tmp_path / "third"))):
        copy_dataset(folder, f"{moto_bucket.url}/{name}")
    return {name: f"{moto_bucket.url}/{name}" for name in "abc"}


def held(cache: Cache) -> list[str]:
    """Which datasets are in the cache, the least recently used first."""
    return [resident.folder.name for resident in residents(cache) if resident.present]


def test_the_limit_evicts_what_was_not_used_for_longest(three: dict[str, str], packed: Packed, tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache", limit=int(2.5 * size_of(packed.manifest, "train")))
    names = {}
    for name in ("a", "b", "a"):
        dataset = open_dataset(three[name], cache=cache)
        dataset.tars("train")
        names[name] = dataset.folder.name
        end_job()
        time.sleep(0.02)
    dataset = open_dataset(three["c"], cache=cache)
    dataset.tars("train")
    assert held(cache) == [names["a"], dataset.folder.name]
    assert sum(r.present for r in residents(cache)) <= cache.limit


def test_a_dataset_that_a_running_job_has_open_is_never_evicted(
    three: dict[str, str], packed: Packed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = int(1.5 * size_of(packed.manifest, "train"))
    cache = Cache(tmp_path / "cache", limit)
    monkeypatch.setenv("MD2_STORAGE_PATIENCE", "0.5")
    monkeypatch.setattr(fill_module, "_STALL_GRACE", 0.5)
    with job(three["a"]) as other:
        assert [line(other), line(other)] == ["open", "6"]
        dataset = open_dataset(three["b"], cache=cache)
        with pytest.raises(StorageError, match="no room") as caught:
            dataset.tars("train")
        assert "MD2_CACHE_LIMIT" in str(caught.value)
        assert all_samples(open_dataset(three["a"], cache=cache).tars("train"))
        end_job()
        other.kill()
        other.wait()
        open_dataset(three["b"], cache=cache).tars("train")  # killed, so it uses nothing any more
    assert len(held(cache)) == 1


def test_a_dataset_larger_than_the_limit_is_refused_before_it_is_fetched(
    moto_url: str, packed: Packed, moto_proxy: Proxy, tmp_path: Path
) -> None:
    dataset = open_dataset(moto_url, cache=Cache(tmp_path / "cache", size_of(packed.manifest, "train") - 1))
    with pytest.raises(StorageError, match="no room"):
        dataset.tars("train")
    assert not any(r.path.endswith(".tar") for r in moto_proxy.requests)
    assert dataset.tars("val"), "the part that fits can be used"


DISK = """
import sys
import shards.cache.fill
import shards.cache.folder
from shards.errors import StorageError
shards.cache.fill._STALL_GRACE = 0.5
from shards.dataset import open_dataset
if sys.argv[2] == "mid":  # the disk fills up after the room was looked for
    shards.cache.folder.make_room = lambda *_, **__: None
else:
    shards.cache.folder._SPARE = 0
try:
    open_dataset(sys.argv[1]).tars("train")
except StorageError as error:
    print(error)
else:
    print("fetched")
"""


@pytest.mark.parametrize("when", ["before", "mid"])
def test_a_full_disk(moto_url: str, packed: Packed, tmp_path: Path, when: str) -> None:
    """On a real file system of 600 kB, mounted for this test alone."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = f"mount -t tmpfs -o size=600k tmpfs {disk}"
    if (
        not shutil.which("unshare")
        or subprocess.run(["unshare", "-rm", "sh", "-c", mount], capture_output=True, check=False).returncode
    ):
        pytest.skip("no small file system can be mounted here (needs unshare and user namespaces)")
    began = time.monotonic()
    script = f'{mount} && "$0" -c "$1" {moto_url} {when}; ls -A {disk}/*/train'
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script, sys.executable, DISK],
        env={**os.environ, "MD2_CACHE": str(disk), "MD2_STORAGE_PATIENCE": "0.5"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    message = done.stdout.splitlines()[0]
    note_fault(f"full cache disk, {when}", message, began)
    assert str(disk) in message
    assert ("no room" if when == "before" else "the disk is full") in message, done.stdout + done.stderr
    assert "MD2_CACHE" in message


def test_a_process_that_stands_still_is_not_waited_for_for_ever(
    moto_url: str, moto_proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    moto_proxy.rule = lambda method, path, number: Fault(silent=True) if path.endswith(".tar") else None
    with job(moto_url) as other:
        deadline = time.monotonic() + 60
        while not any(r.path.endswith(".tar") for r in moto_proxy.requests):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        other.send_signal(signal.SIGSTOP)
        monkeypatch.setenv("MD2_STORAGE_PATIENCE", "0.5")
        monkeypatch.setattr(fill_module, "_STALL_GRACE", 0.5)
        began = time.monotonic()
        with pytest.raises(StorageError, match=rf"process {other.pid} .* stood still") as caught:
            open_dataset(moto_url).tars("train")
        note_fault("the process that fetches is stopped (patience and grace 0.5 s)", str(caught.value), began)
        other.send_signal(signal.SIGCONT)


def test_a_cache_folder_that_cannot_be_made_is_named(
    moto_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MD2_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(StorageError, match=r"file/cache: .*set MD2_CACHE"):
        open_dataset(moto_url)


def test_training_data_are_the_same_from_a_bucket_and_from_a_folder(moto_url: str, packed: Packed) -> None:
    import torch
    from pipeline_data import config, loader

    settings = config(width=64, height=64, stereo=True, flip=True)
    near, far = (
        loader(open_dataset(url), settings, batch_size=2, seed=3, depth=True) for url in (packed.url, moto_url)
    )
    count = 0
    for ours, theirs in zip(near, far, strict=True):
        assert ours.keys == theirs.keys
        assert all(torch.equal(ours.images[name], theirs.images[name]) for name in (0, -1, 1, "s"))
        assert ours.depth is not None
        assert theirs.depth is not None
        assert torch.equal(ours.depth, theirs.depth)
        count += 1
    assert count == 3


@pytest.mark.parametrize(
    ("text", "count"),
    [("5000", 5000), ("200GB", 200 * 10**9), ("1.5 TiB", 3 * 2**39), ("10m", 10**7), ("1KiB", 1024), ("0", 0)],
)
def test_sizes_are_read(text: str, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "GB", "-1", "5 apples", "5iB", "1e9"])
def test_what_is_no_size_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="not a size"):
        parse_bytes(text)
    monkeypatch.setenv("MD2_CACHE_LIMIT", text or " ")
    with pytest.raises(UsageError, match="MD2_CACHE_LIMIT"):
        Cache.from_environment()


def test_sizes_are_written() -> None:
    assert [format_bytes(n) for n in (999, 1000, 5_240_000_000, 2e12)] == ["999 bytes", "1.0 kB", "5.2 GB", "2.0 TB"]


def test_the_cache_is_readable_by_its_owner_alone(moto_url: str, tmp_path: Path) -> None:
    open_dataset(moto_url).tars("val")
    assert (tmp_path / "cache").stat().st_mode & 0o777 == 0o700
