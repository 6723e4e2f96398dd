"""Fixtures of the storage tests: two S3 servers of different makers, a bucket on each, a proxy that fails."""

from __future__ import annotations

import io
import itertools
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import pytest
from storage_data import make_dataset
from storage_servers import Bucket, Proxy, client, faulty_proxy, moto_server, rclone_server, use_endpoint

from shards.cache import folder as cache_module
from shards.manifest import Manifest
from shards.transfer import copy_dataset

_numbers = itertools.count()
one_server = pytest.mark.parametrize("bucket", ["moto"], indirect=True)
"""For tests of what does not depend on the server."""


def note_fault(fault: str, seen: str, began: float) -> None:
    """Append a row to the table of faults, where MD2_FAULT_TABLE names a file."""
    if table := os.environ.get("MD2_FAULT_TABLE"):
        with Path(table).open("a") as file:
            file.write(f"| {fault} | {seen} | {time.monotonic() - began:.1f} s |\n")


@dataclass(frozen=True)
class Packed:
    """A dataset in a local folder."""

    folder: Path
    manifest: Manifest

    @property
    def url(self) -> str:
        return str(self.folder)


@pytest.fixture(scope="session")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Packed:
    """6 train samples in 3 shards, 2 val samples in 1, about 250 kB a shard. Read only."""
    folder = tmp_path_factory.mktemp("packed") / "drive"
    return Packed(folder, make_dataset(folder, train=6, val=2, per_shard=2, padding=60_000))


@pytest.fixture(scope="session")
def repacked(tmp_path_factory: pytest.TempPathFactory) -> Packed:
    """The same shape of dataset with other bytes."""
    folder = tmp_path_factory.mktemp("repacked") / "drive"
    return Packed(folder, make_dataset(folder, train=6, val=2, per_shard=2, seed=1, padding=60_000))


@pytest.fixture(scope="session")
def moto() -> Iterator[str]:
    with moto_server() as endpoint:
        yield endpoint


@pytest.fixture(scope="session")
def rclone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with rclone_server(tmp_path_factory.mktemp("rclone")) as endpoint:
        yield endpoint


def _bucket(endpoint: str, server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Bucket:
    bucket = Bucket(endpoint, f"team-{next(_numbers)}", server)
    client(endpoint).create_bucket(Bucket=bucket.name)
    use_endpoint(monkeypatch, endpoint)
    monkeypatch.setenv("MD2_CACHE", str(tmp_path / "cache"))
    return bucket


@pytest.fixture(params=["moto", "rclone"])
def bucket(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Bucket:
    """An empty bucket, on one server and then on the other; AWS_* and MD2_CACHE are set for it."""
    return _bucket(request.getfixturevalue(request.param), request.param, monkeypatch, tmp_path)


@pytest.fixture
def moto_bucket(moto: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Bucket:
    """An empty bucket on moto's server, which has conditional writes."""
    return _bucket(moto, "moto", monkeypatch, tmp_path)


@pytest.fixture
def rclone_bucket(rclone: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Bucket:
    """An empty bucket on rclone's server, which checks credentials and has no conditional writes."""
    return _bucket(rclone, "rclone", monkeypatch, tmp_path)


@pytest.fixture(scope="session")
def moto_gate(moto: str) -> Iterator[Proxy]:
    with faulty_proxy(moto) as proxy:
        yield proxy


@pytest.fixture(scope="session")
def rclone_gate(rclone: str) -> Iterator[Proxy]:
    with faulty_proxy(rclone) as proxy:
        yield proxy


@pytest.fixture
def proxied(bucket: Bucket, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """The proxy before `bucket`; the code under test talks to it, the test's own client does not."""
    yield from _through(request.getfixturevalue(f"{bucket.server}_gate"), monkeypatch)


@pytest.fixture
def moto_proxy(moto_bucket: Bucket, moto_gate: Proxy, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """As `proxied`, for `moto_bucket`."""
    yield from _through(moto_gate, monkeypatch)


@pytest.fixture
def rclone_proxy(rclone_bucket: Bucket, rclone_gate: Proxy, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """As `proxied`, for `rclone_bucket`."""
    yield from _through(rclone_gate, monkeypatch)


def _through(proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """One proxy serves all tests, so that not each of them has to connect anew."""
    proxy.rule, proxy.requests = None, []
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
    yield proxy
    proxy.rule = None


@pytest.fixture
def moto_url(moto_bucket: Bucket, packed: Packed) -> str:
    """`packed`, published in `moto_bucket`."""
    copy_dataset(packed.url, f"{moto_bucket.url}/drive")
    return f"{moto_bucket.url}/drive"


@pytest.fixture
def own_job() -> Iterator[None]:
    """A test is a job of its own: it keeps no part of a cache in use."""
    yield
    end_job()


def end_job() -> None:
    """What the end of the process does for its locks."""
    for lock in cache_module._in_use.values():
        lock.release()
    cache_module._in_use.clear()


class RunShards(Protocol):
    """Runs `md2 shards …` in this process; returns exit code, stdout, stderr. `answer` is what stdin holds."""

    def __call__(self, *args: str, answer: str = "") -> tuple[int, str, str]: ...


@pytest.fixture
def md2(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> RunShards:
    from cli.main import main

    def run(*args: str, answer: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["md2", "shards", *args])
        monkeypatch.setattr(sys, "stdin", io.StringIO(answer))
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return run


def files(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
