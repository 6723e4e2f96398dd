"""Storage that fails, on real servers: retried where that helps, else one clear line, in bounded time, nothing wrong.

With MD2_FAULT_TABLE set to a file, what the user sees at each fault and how long it took is appended to it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from storage_data import all_samples
from storage_fixtures import Packed, note_fault, one_server
from storage_servers import Bucket, Fault, Proxy, faulty_proxy, free_port, plain_web_server

import shards.storage
from shards.dataset import open_dataset
from shards.errors import DatasetError, Md2Error, StorageError
from shards.publish import Store
from shards.storage import open_storage, retry
from shards.transfer import copy_dataset

BOUND = 30.0
"""Seconds within which every test here must have its answer, on a loaded machine."""


@contextmanager
def seen_by_user(fault: str, kind: type[Md2Error] | None, *words: str) -> Iterator[None]:
    """The block raises `kind` with all `words` in one line, or nothing if None; either way within `BOUND`."""
    began, message = time.monotonic(), "goes on, and ends well"
    try:
        yield
    except Md2Error as error:
        assert kind is not None, error
        assert type(error) is kind
        message = str(error)
        assert "\n" not in message
        for word in words:
            assert word in message
        assert os.environ.get("AWS_SECRET_ACCESS_KEY", "AKIASECRET") not in message
        assert "AKIASECRET" not in message
    else:
        assert kind is None, "no error"
    assert time.monotonic() - began < BOUND
    note_fault(fault, message, began)


@pytest.fixture
def published(bucket: Bucket, packed: Packed) -> str:
    """URL of the packed dataset on either server."""
    copy_dataset(packed.url, f"{bucket.url}/drive")
    return f"{bucket.url}/drive"


def nothing_wrong_in(cache: Path, packed: Packed) -> None:
    """Whatever stands in the cache under a shard's own name is that shard."""
    for path in cache.rglob("*"):
        if path.suffix in (".tar", ".idx"):
            assert path.read_bytes() == (packed.folder / path.parent.name / path.name).read_bytes()


def test_wrong_secret_and_unknown_key(rclone_bucket: Bucket, packed: Packed, monkeypatch: pytest.MonkeyPatch) -> None:
    copy_dataset(packed.url, f"{rclone_bucket.url}/drive")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-the-secret")
    with seen_by_user("wrong secret key, reading", StorageError, "/drive", "SignatureDoesNotMatch", "AWS_PROFILE"):
        open_dataset(f"{rclone_bucket.url}/drive")
    with seen_by_user("wrong secret key, publishing", StorageError, "SignatureDoesNotMatch"):
        Store(f"{rclone_bucket.url}/other").begin({})
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    with seen_by_user("unknown access key", StorageError, "InvalidAccessKeyId"):
        open_dataset(f"{rclone_bucket.url}/drive")


def test_no_credentials_at_all(moto_bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    with seen_by_user("no credentials on the machine", StorageError, moto_bucket.url, "credentials", "https://"):
        open_dataset(f"{moto_bucket.url}/drive")


def test_missing_bucket_dataset_and_shard(bucket: Bucket, published: str) -> None:
    with seen_by_user("missing bucket, reading", StorageError, "s3://no-such-bucket/drive", "no such bucket"):
        open_dataset("s3://no-such-bucket/drive")
    with seen_by_user("missing bucket, publishing", StorageError, "s3://no-such-bucket/drive", "no such bucket"):
        Store("s3://no-such-bucket/drive").begin({})
    with seen_by_user("nothing at the URL", DatasetError, f"{bucket.url}/none", "no dataset there"):
        open_dataset(f"{bucket.url}/none")
    bucket.remove("drive/train/000001.tar")
    with seen_by_user("a shard is missing", DatasetError, f"{published}/train/000001.tar", "missing"):
        open_dataset(published).tars("train")


@one_server
def test_nobody_listens(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("MD2_STORAGE_PATIENCE", "8")
    with seen_by_user("wrong endpoint: nobody listens", StorageError, bucket.url, "cannot connect", "AWS_ENDPOINT_URL"):
        open_dataset(f"{bucket.url}/drive")


def test_a_web_address_where_nobody_listens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As short a wait as with s3://; requests tells it in words that sound like a cut connection."""
    monkeypatch.setenv("MD2_STORAGE_PATIENCE", "8")
    for host in (f"127.0.0.1:{free_port()}", "no-such-host.invalid"):
        with seen_by_user(f"http://{host.partition(':')[0]}: nobody listens", StorageError, host, "cannot connect"):
            open_dataset(f"http://{host}/drive")


@pytest.mark.parametrize(
    ("variable", "value", "told"),
    [
        ("AWS_ENDPOINT_URL", "minio", "AWS_ENDPOINT_URL is not an address"),
        ("AWS_ENDPOINT_URL", "http://127.0.0.1:99999", "AWS_ENDPOINT_URL is not an address"),
        ("AWS_ENDPOINT_URL", "https", "does not speak https"),
        ("AWS_ACCESS_KEY_ID", "AKIASECRET\r", "line end"),
    ],
)
@one_server
def test_settings_that_cannot_work_are_told_at_once(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, told: str
) -> None:
    monkeypatch.setenv(variable, bucket.endpoint.replace("http:", "https:") if value == "https" else value)
    with seen_by_user(f"{variable} cannot work: {told}", StorageError, bucket.url, told):
        open_dataset(f"{bucket.url}/drive")


@one_server
def test_a_name_that_no_bucket_can_have(bucket: Bucket) -> None:
    with seen_by_user("a bucket name with a space", StorageError, "s3://my bucket/drive", "not a valid bucket name"):
        open_dataset("s3://my bucket/drive")


def failing_for(seconds: float, statuses: tuple[int, ...]) -> Callable[[str, str, int], Fault | None]:
    """From the first request to the bucket on, errors for a while."""
    began: list[float] = []

    def rule(method: str, path: str, number: int) -> Fault | None:
        began.append(time.monotonic())
        return Fault(status=statuses[number % len(statuses)]) if began[-1] - began[0] < seconds else None

    return rule


def test_errors_for_a_while_are_ridden_out(published: str, packed: Packed, proxied: Proxy) -> None:
    proxied.rule = failing_for(0.7, (500, 503, 429))
    with seen_by_user("500, 503, 429 for 0.7 s, reading", None):
        tars = open_dataset(published).tars("train")
    assert [t.read_bytes() for t in tars] == [(packed.folder / "train" / t.name).read_bytes() for t in tars]
    proxied.rule = failing_for(0.7, (503, 500))
    with seen_by_user("500, 503 for 0.7 s, publishing", None):
        copy_dataset(packed.url, published.replace("drive", "other"))
    proxied.rule = None
    assert open_dataset(published.replace("drive", "other")).manifest == packed.manifest


def test_every_third_request_fails(published: str, packed: Packed, proxied: Proxy, tmp_path: Path) -> None:
    proxied.rule = lambda method, path, number: Fault(status=503) if number % 3 == 2 else None
    with seen_by_user("every third request 503", None):
        copied = copy_dataset(published, str(tmp_path / "copy"))
    assert copied.sent == len(packed.manifest.shards)
    nothing_wrong_in(tmp_path / "copy", packed)


@one_server
def test_errors_for_ever_end_with_patience(published: str, proxied: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MD2_STORAGE_PATIENCE", "1")
    proxied.rule = lambda method, path, number: Fault(status=503) if ".tar" in path else None
    with seen_by_user("503 for ever (patience 1 s)", StorageError, published, ".tar", "503", "gave up after"):
        open_dataset(published).tars("train")


def test_a_cut_connection_is_taken_up(published: str, packed: Packed, proxied: Proxy) -> None:
    cut: list[int] = []

    def rule(method: str, path: str, number: int) -> Fault | None:
        if method == "GET" and path.endswith(".tar") and len(cut) < 4:
            cut.append(number)
            return Fault(cut_after=70_000)
        return None

    proxied.rule = rule
    with seen_by_user("connection cut mid-object, 4 times, reading", None):
        tars = open_dataset(published).tars("train")
    assert len(cut) == 4
    assert [t.read_bytes() for t in tars] == [(packed.folder / "train" / t.name).read_bytes() for t in tars]


@pytest.mark.parametrize("answer_lost", [False, True])
def test_a_connection_cut_while_publishing(bucket: Bucket, packed: Packed, proxied: Proxy, answer_lost: bool) -> None:
    """Also where the request was carried out and only its answer got lost: the second try finds it done."""
    cut: dict[str, int] = {}

    def rule(method: str, path: str, number: int) -> Fault | None:
        if method == "PUT" and cut.setdefault(path, 0) < 1:
            cut[path] += 1
            return Fault(lose_answer=True) if answer_lost else Fault(cut_after=0)
        return None

    proxied.rule = rule
    what = "the answer to every upload lost" if answer_lost else "every upload's connection cut once"
    with seen_by_user(f"{what}, publishing", None):
        copy_dataset(packed.url, f"{bucket.url}/drive")
    assert len(cut) > 2 * len(packed.manifest.shards)
    for shard in packed.manifest.shards:
        assert bucket.get(f"drive/{shard.name}") == (packed.folder / shard.name).read_bytes()
    assert open_dataset(f"{bucket.url}/drive").manifest == packed.manifest


@one_server
def test_a_silent_server(published: str, proxied: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "ATTEMPT", 0.4)
    monkeypatch.setattr(retry, "SLOWEST", 1e9)
    monkeypatch.setenv("MD2_STORAGE_PATIENCE", "1")
    proxied.rule = lambda method, path, number: Fault(silent=True)
    with seen_by_user("server accepts and never answers (patience 1 s)", StorageError, published, "in time", "gave up"):
        open_dataset(published)


@one_server
def test_a_trickle_is_not_waited_for(published: str, proxied: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes keep coming, so no socket ever times out; the whole request has a limit."""
    monkeypatch.setattr(retry, "ATTEMPT", 0.5)
    monkeypatch.setattr(retry, "SLOWEST", 1e9)
    monkeypatch.setenv("MD2_STORAGE_PATIENCE", "1")
    proxied.rule = lambda method, path, number: Fault(rate=2000.0) if path.endswith(".tar") else None
    with seen_by_user("bytes trickle at 2 kB/s (patience 1 s)", StorageError, published, "in time"):
        open_dataset(published).tars("train")


CHANGES: dict[str, Callable[[bytes], bytes]] = {
    "one byte of a shard changed": lambda data: data[:1000] + bytes([data[1000] ^ 1]) + data[1001:],
    "a shard cut short": lambda data: data[:-512],
    "a shard replaced by nothing": lambda data: b"",
}


@pytest.mark.parametrize("change", CHANGES)
def test_an_object_changed_after_publishing(
    bucket: Bucket, published: str, packed: Packed, tmp_path: Path, change: str
) -> None:
    key = "drive/train/000001.tar"
    bucket.put(key, CHANGES[change](bucket.get(key)))
    with seen_by_user(f"{change} after publishing", DatasetError, f"{published}/train/000001.tar", "not the bytes"):
        open_dataset(published).tars("train")
    assert not (next((tmp_path / "cache").glob("*/train")) / "000001.tar").exists()
    nothing_wrong_in(tmp_path / "cache", packed)


@one_server
def test_a_changed_index(bucket: Bucket, published: str) -> None:
    lines = bucket.get("drive/train/000000.idx").decode().splitlines()
    bucket.put("drive/train/000000.idx", ("\n".join(["v1.2 1", lines[1]]) + "\n").encode())
    with seen_by_user("an index with too few samples", DatasetError, f"{published}/train/000000.idx", "not the bytes"):
        open_dataset(published).tars("train")


def test_more_than_was_announced_is_neither_read_nor_kept(
    bucket: Bucket, published: str, packed: Packed, proxied: Proxy
) -> None:
    """Someone appended to a published shard: no byte beyond the manifest's size is taken."""
    key = "drive/train/000000.tar"
    bucket.put(key, bucket.get(key) + os.urandom(20_000_000))
    with seen_by_user("a shard has grown (what was published is still its beginning)", None):
        tars = open_dataset(published).tars("train")
    assert tars[0].read_bytes() == (packed.folder / "train/000000.tar").read_bytes()
    assert proxied.sent("/train/000000.tar") <= shards.storage.CHUNK


@one_server
def test_a_manifest_of_any_size_is_refused_unread(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    from shards import publish as store

    monkeypatch.setattr(store, "MAX_MANIFEST_BYTES", 10_000)
    bucket.put("drive/dataset.json", b" " * 10_001)
    with seen_by_user("dataset.json is huge", StorageError, "dataset.json", "larger than 10000"):
        open_dataset(f"{bucket.url}/drive")


@pytest.fixture
def web(packed: Packed, moto_bucket: Bucket, tmp_path: Path) -> Iterator[Proxy]:
    """The packed dataset on a plain web server without range requests, behind the proxy, at /drive."""
    with plain_web_server(packed.folder.parent) as server, faulty_proxy(server) as proxy:
        yield proxy


def test_a_public_bucket_is_read_over_http(moto_bucket: Bucket, packed: Packed) -> None:
    copy_dataset(packed.url, f"{moto_bucket.url}/drive")
    moto_bucket.make_public()
    with faulty_proxy(moto_bucket.endpoint) as proxy:
        sizes = {shard.name: shard.bytes for shard in packed.manifest.part("train")}
        cut: set[str] = set()

        def rule(method: str, path: str, number: int) -> Fault | None:
            if path.endswith(".tar") and path not in cut:
                cut.add(path)
                return Fault(cut_after=100_000)
            return None

        proxy.rule = rule
        with seen_by_user("connection cut mid-object, http", None):
            tars = open_dataset(f"{proxy.endpoint}/{moto_bucket.name}/drive").tars("train")
        assert [t.read_bytes() for t in tars] == [(packed.folder / "train" / t.name).read_bytes() for t in tars]
        for name, size in sizes.items():
            assert proxy.sent(name) == size, "taken up where it was cut, no byte twice"


def test_a_private_bucket_over_http(moto_bucket: Bucket, packed: Packed) -> None:
    copy_dataset(packed.url, f"{moto_bucket.url}/drive")
    with seen_by_user("http address of a private bucket", StorageError, moto_bucket.endpoint, "403", "not public"):
        open_dataset(f"{moto_bucket.endpoint}/{moto_bucket.name}/drive")


def test_a_web_server_without_ranges(web: Proxy, packed: Packed) -> None:
    cut: list[int] = []

    def rule(method: str, path: str, number: int) -> Fault | None:
        if path.endswith(".tar") and not cut:
            cut.append(number)
            return Fault(cut_after=100_000)
        return Fault(status=503) if number % 4 == 3 else None

    web.rule = rule
    with seen_by_user("plain web server without ranges, cut and 503", None):
        dataset = open_dataset(f"{web.endpoint}/drive")
        samples = all_samples(dataset.tars("train"))
    assert samples == all_samples([packed.folder / s.name for s in packed.manifest.part("train")])
    with seen_by_user("nothing at a web address", DatasetError, "/none", "no dataset there"):
        open_dataset(f"{web.endpoint}/none")
    assert (
        open_storage(f"{web.endpoint}/drive").read_range("train/000000.tar", 700, 50)
        == ((packed.folder / "train/000000.tar").read_bytes()[700:750])
    )


def test_a_trickle_over_http(web: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "ATTEMPT", 0.5)
    monkeypatch.setattr(retry, "SLOWEST", 1e9)
    monkeypatch.setenv("MD2_STORAGE_PATIENCE", "1")
    web.rule = lambda method, path, number: Fault(rate=20_000.0) if path.endswith(".tar") else None
    with seen_by_user("bytes trickle over http (patience 1 s)", StorageError, ".tar", "in time"):
        open_dataset(f"{web.endpoint}/drive").tars("train")
