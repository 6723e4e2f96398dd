"""Publishing: the manifest last, nothing overwritten, interrupted runs resumed, two writers kept apart."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from storage_fixtures import Packed, one_server
from storage_servers import Bucket, Fault, Proxy

from shards import publish as store_module
from shards.dataset import open_dataset
from shards.errors import DatasetError, StorageError, UsageError
from shards.files import temporary
from shards.manifest import Manifest, Shard
from shards.publish import Store, read_manifest
from shards.storage import check_name, open_storage, remote
from shards.storage.local import LocalStorage

PLAN = {"split": "drive", "size": [64, 32], "seed": 0}


def put(store: Store, packed: Packed, shard: Shard, note: dict[str, object] | None = None) -> bool:
    return store.put_shard(shard, packed.folder / shard.name, packed.folder / shard.index_name, note)


def publish(url: str, packed: Packed, plan: dict[str, object] = PLAN) -> Store:
    store = Store(url)
    store.begin(plan)
    for shard in packed.manifest.shards:
        put(store, packed, shard)
    store.put_text("README.md", "card")
    store.commit(packed.manifest)
    return store


def test_what_killed_runs_left_half_written_goes_with_the_commit(tmp_path: Path, packed: Packed) -> None:
    """A kill between writing and naming a file; what a live process, or another machine, may be writing stays."""
    out = tmp_path / "out"
    dead = subprocess.run([sys.executable, "-c", ABANDON, str(out)], capture_output=True, text=True, check=False)
    assert dead.returncode == -9, dead.stderr
    left = [path for path in out.rglob("*") if path.is_file()]
    assert len(left) == 2 and all(path.name.endswith(".tmp") for path in left)
    mine = temporary(out / "train" / "000000.tar")
    host = mine.name.rsplit(".", 2)[1].split("-")[0]
    foreign = left[0].with_name(left[0].name.replace(host, "0" * 8 if host != "0" * 8 else "1" * 8))
    for path in (mine, foreign):
        path.write_bytes(b"half")
    publish(str(out), packed)
    assert {path for path in out.rglob("*.tmp")} == {mine, foreign}
    assert open_dataset(str(out)).manifest.samples("train")
    mine.unlink()
    foreign.unlink()
    # A run that is killed right after its commit leaves its tidying to the next.
    again = out / "train" / next(path.name for path in left if ".tar." in path.name)
    again.write_bytes(b"half")
    publish(str(out), packed)
    assert not list(out.rglob("*.tmp"))


ABANDON = """
import os, sys
from pathlib import Path
from shards.files import temporary
for name in (".publish/train/000000.json", "train/000000.tar"):
    path = temporary(Path(sys.argv[1]) / name)
    path.parent.mkdir(parents=True)
    path.write_bytes(b"half")
os.kill(os.getpid(), 9)
"""


def digests(bucket: Bucket) -> dict[str, str]:
    return {key: hashlib.sha256(bucket.get(key)).hexdigest() for key in bucket.objects()}


@pytest.fixture
def no_second_look(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody else is writing: a broken record stays broken."""
    monkeypatch.setattr(store_module, "_PAUSE", 0.01)


@pytest.fixture(params=["folder", "moto", "rclone"])
def target(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where to publish: a folder, or a prefix on either server."""
    if request.param == "folder":
        return str(tmp_path / "published" / "drive")
    return request.getfixturevalue(f"{request.param}_bucket").url + "/kitti/drive"


def test_what_is_published_is_what_was_packed(target: str, packed: Packed) -> None:
    publish(target, packed)
    storage = open_storage(target)
    names = storage.names("")
    expected = ["README.md", "dataset.json"]
    for shard in packed.manifest.shards:
        expected += [shard.name, shard.index_name]
        assert storage.read(shard.name, 1 << 30) == (packed.folder / shard.name).read_bytes()
        assert storage.read(shard.index_name, 1 << 30) == (packed.folder / shard.index_name).read_bytes()
    assert names == sorted(expected), "claims, receipts or temporary files are left"


def test_the_manifest_is_the_commit_and_comes_last(target: str, packed: Packed) -> None:
    store = Store(target)
    store.begin(PLAN)
    for shard in packed.manifest.shards:
        with pytest.raises(DatasetError, match="no dataset"):
            open_dataset(target)
        with pytest.raises(DatasetError, match="not published"):
            store.commit(packed.manifest)
        put(store, packed, shard)
    with pytest.raises(DatasetError, match="no dataset"):
        open_dataset(target)
    store.commit(packed.manifest)
    assert open_dataset(target).manifest.shards == packed.manifest.shards


@one_server
def test_on_object_storage_the_manifest_is_the_last_upload(bucket: Bucket, proxied: Proxy, packed: Packed) -> None:
    publish(f"{bucket.url}/d", packed)
    uploads = [r.path.split("?")[0] for r in proxied.requests if r.method == "PUT"]
    assert uploads[-1].endswith("/d/dataset.json")
    assert sum(path.endswith("dataset.json") for path in uploads) == 1


def test_an_interrupted_publication_sends_only_what_is_missing(bucket: Bucket, proxied: Proxy, packed: Packed) -> None:
    url, shards = f"{bucket.url}/d", packed.manifest.shards
    first = Store(url)
    assert first.begin(PLAN) == {}
    for number, shard in enumerate(shards[:2]):
        put(first, packed, shard, {"number": number})
    # The process ends here. In the third shard it had sent the tar, but neither index nor receipt.
    bucket.put(f"d/{shards[2].name}", (packed.folder / shards[2].name).read_bytes())

    proxied.requests.clear()
    second = Store(url)
    receipts = second.begin(PLAN)
    assert second.resumed
    assert {name: receipt.shard for name, receipt in receipts.items()} == {s.name: s for s in shards[:2]}
    assert [receipts[s.name].note for s in shards[:2]] == [{"number": 0}, {"number": 1}]
    assert [put(second, packed, shard) for shard in shards] == [False, False, True, True]
    second.commit(packed.manifest)
    sent = [proxied.received(f"/{s.name}") for s in shards]
    assert sent == [0, 0, 0, shards[3].bytes]
    assert open_dataset(url).manifest.shards == shards


@pytest.mark.usefixtures("no_second_look")
@one_server
def test_half_a_shard_left_under_its_name_is_not_taken_for_it(bucket: Bucket, packed: Packed) -> None:
    shard = packed.manifest.shards[0]
    bucket.put(f"d/{shard.name}", (packed.folder / shard.name).read_bytes()[:-1] + b"!")
    store = Store(f"{bucket.url}/d")
    store.begin(PLAN)
    with pytest.raises(StorageError, match="other bytes"):
        put(store, packed, shard)


def test_a_repack_makes_a_version_beside_the_old_one(target: str, packed: Packed, repacked: Packed) -> None:
    publish(target, packed)
    before = {name: open_storage(target).read(name, 1 << 30) for name in open_storage(target).names("")}
    assert publish(target, repacked, {**PLAN, "seed": 1}).url == f"{target}-v2"
    assert publish(target, packed, {**PLAN, "seed": 2}).url == f"{target}-v3"
    assert {name: open_storage(target).read(name, 1 << 30) for name in open_storage(target).names("")} == before
    assert open_dataset(f"{target}-v2").manifest.shards == repacked.manifest.shards


def test_the_same_again_is_found_and_nothing_is_sent(bucket: Bucket, proxied: Proxy, packed: Packed) -> None:
    publish(f"{bucket.url}/d", packed)
    before = digests(bucket)
    proxied.requests.clear()
    store = Store(f"{bucket.url}/d")
    receipts = store.begin(PLAN)
    assert store.published is not None
    assert set(receipts) == {shard.name for shard in packed.manifest.shards}
    assert not any(put(store, packed, shard) for shard in packed.manifest.shards)
    store.commit(packed.manifest)
    assert {r.method for r in proxied.requests} <= {"GET", "HEAD"}
    assert digests(bucket) == before


def test_the_same_plan_with_other_bytes_is_refused(target: str, packed: Packed, repacked: Packed) -> None:
    """Raw data or a codec changed though no option did: the published shard stays."""
    publish(target, packed)
    store = Store(target)
    store.begin(PLAN)
    with pytest.raises(StorageError, match="never overwritten") as caught:
        put(store, repacked, repacked.manifest.shards[0])
    assert target in str(caught.value)
    with pytest.raises(StorageError, match="never overwritten"):
        store.commit(repacked.manifest)


def test_a_second_writer_of_something_else_is_refused(target: str, packed: Packed, repacked: Packed) -> None:
    first = Store(target)
    first.begin(PLAN)
    put(first, packed, packed.manifest.shards[0])
    with pytest.raises(StorageError, match="another dataset is being published") as caught:
        Store(target).begin({**PLAN, "seed": 1})
    assert target in str(caught.value)
    assert f"process {os.getpid()}" in str(caught.value)
    for shard in packed.manifest.shards:
        put(first, packed, shard)
    first.commit(packed.manifest)
    assert open_dataset(target).manifest.shards == packed.manifest.shards


def test_what_an_ended_process_never_began_to_publish_is_not_in_the_way(target: str, packed: Packed) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    Store(target).begin({**PLAN, "seed": 1})
    storage = open_storage(target)
    claim = json.loads(storage.read(".publish/claim.json", 1 << 20) or b"")
    another = {**claim, "process": ended.pid, "machine": "0" * 12}
    storage.write(".publish/claim.json", json.dumps(another).encode())
    with pytest.raises(StorageError, match="another dataset is being published"):
        Store(target).begin(PLAN)  # whether a process of another machine has ended cannot be known
    storage.write(".publish/claim.json", json.dumps({**claim, "process": ended.pid}).encode())
    first = Store(target)
    first.begin(PLAN)
    put(first, packed, packed.manifest.shards[0])
    storage.write(".publish/claim.json", json.dumps({**claim, "process": ended.pid}).encode())
    with pytest.raises(StorageError, match=r"part of another dataset.*left unfinished by a process of this machine"):
        Store(target).begin(PLAN)  # now a shard is there
    with pytest.raises(StorageError, match="part of another dataset"):
        put(first, packed, packed.manifest.shards[-1])


def test_two_writers_of_the_same_at_once_end_with_one_dataset(target: str, packed: Packed) -> None:
    def write(_: int) -> Manifest:
        return publish(target, packed).published  # type: ignore[return-value]

    with ThreadPoolExecutor(3) as pool:
        committed = list(pool.map(write, range(3)))
    assert all(manifest == committed[0] for manifest in committed)
    storage = open_storage(target)
    for shard in packed.manifest.shards:
        assert storage.read(shard.name, 1 << 30) == (packed.folder / shard.name).read_bytes()


def test_of_two_writers_of_the_same_one_sends_each_shard(bucket: Bucket, packed: Packed) -> None:
    """The second looked before the first's receipt was there, and finds the bytes themselves."""
    url, shard = f"{bucket.url}/d", packed.manifest.shards[0]
    first, second = Store(url), Store(url)
    first.begin(PLAN)
    second.begin(PLAN)
    assert put(first, packed, shard)
    bucket.remove(f"d/.publish/{shard.name.removesuffix('.tar')}.json")
    assert not put(second, packed, shard)
    assert second.has_shard(shard)


def _race(first: Store, second: Store, packed: Packed, repacked: Packed) -> None:
    """Both claimed at the same moment (the second's claim wiped out the first's); then both go on."""
    with pytest.raises(StorageError, match="another dataset"):
        put(first, packed, packed.manifest.shards[1])
    with pytest.raises(StorageError, match=r"other bytes|never overwritten"):
        put(second, repacked, repacked.manifest.shards[0])


@pytest.mark.usefixtures("no_second_look")
def test_a_server_without_conditional_writes_commits_no_mixture(
    rclone_bucket: Bucket, packed: Packed, repacked: Packed
) -> None:
    url = f"{rclone_bucket.url}/d"
    first = Store(url)
    first.begin(PLAN)
    put(first, packed, packed.manifest.shards[0])
    claim = json.loads(rclone_bucket.get("d/.publish/claim.json"))
    # What the server allows: a second writer looked before the first had claimed, and writes its claim after it.
    rclone_bucket.remove("d/.publish/claim.json")
    second = Store(url)
    second.begin({**PLAN, "seed": 1})
    assert json.loads(rclone_bucket.get("d/.publish/claim.json"))["plan_sha256"] != claim["plan_sha256"]
    _race(first, second, packed, repacked)
    assert "d/dataset.json" not in rclone_bucket.objects()


def test_a_shard_replaced_before_the_commit_is_noticed(bucket: Bucket, packed: Packed) -> None:
    """Same name, same length, written by someone who does not ask: the storage's tag tells."""
    store = Store(f"{bucket.url}/d")
    store.begin(PLAN)
    for shard in packed.manifest.shards:
        put(store, packed, shard)
    victim = packed.manifest.shards[1]
    bucket.put(f"d/{victim.name}", bytes(victim.bytes))
    with pytest.raises(DatasetError, match=r"train/000001\.tar"):
        store.commit(packed.manifest)
    assert "d/dataset.json" not in bucket.objects()


def test_the_storage_itself_excludes_the_second_of_two_creates(moto_bucket: Bucket, tmp_path: Path) -> None:
    """With conditional writes not even a writer who looked too early can replace anything."""
    storage = open_storage(moto_bucket.url)
    looks: Iterator[bool] = iter([True, False])

    class Blind(remote.RemoteStorage):
        def stat(self, name: str) -> remote.Stat | None:
            next(looks, None)
            return None

    assert storage.create("a/x", b"first")
    blind = Blind(moto_bucket.url)
    assert not blind.create("a/x", b"second")
    (tmp_path / "f").write_bytes(b"third")
    assert not blind.create_file("a/x", tmp_path / "f")
    assert moto_bucket.get("a/x") == b"first"


def test_a_large_shard_goes_up_in_parts_and_survives_a_failing_one(
    bucket: Bucket, proxied: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "PART", 5 << 20)  # the smallest that S3 takes
    content = os.urandom(12_000_000)
    (tmp_path / "big").write_bytes(content)
    failed: list[int] = []

    def rule(method: str, path: str, number: int) -> Fault | None:
        if "partNumber=2" in path and len(failed) < 3:
            failed.append(number)
            return Fault(status=(500, 503)[len(failed) % 2])
        return None

    proxied.rule = rule
    storage = open_storage(bucket.url)
    assert storage.create_file("big", tmp_path / "big")
    assert bucket.get("big") == content
    assert len(failed) == 3
    assert {"partNumber=1", "partNumber=2", "partNumber=3"} <= {
        word for r in proxied.requests for word in r.path.replace("?", "&").split("&")
    }


@one_server
def test_a_store_that_has_begun_works_in_another_process(bucket: Bucket, packed: Packed) -> None:
    store = Store(f"{bucket.url}/d")
    store.begin(PLAN)
    other = pickle.loads(pickle.dumps(store))
    for shard in packed.manifest.shards:
        assert put(other, packed, shard)
        assert store.has_shard(shard)
    store.commit(packed.manifest)


@one_server
def test_local_files_that_are_not_what_they_should_be_are_not_sent(bucket: Bucket, packed: Packed) -> None:
    store = Store(f"{bucket.url}/d")
    store.begin(PLAN)
    first, second = packed.manifest.shards[:2]
    with pytest.raises(DatasetError, match="not the bytes"):
        store.put_shard(first, packed.folder / second.name, packed.folder / first.index_name)
    assert set(bucket.objects()) == {"d/.publish/claim.json"}


def test_moved_files_are_given_up(tmp_path: Path, packed: Packed) -> None:
    shard = packed.manifest.shards[0]
    for name in (shard.name, shard.index_name):
        (tmp_path / "scratch" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "scratch" / name).write_bytes((packed.folder / name).read_bytes())
    store = Store(str(tmp_path / "out"))
    store.begin(PLAN)
    store.put_shard(shard, tmp_path / "scratch" / shard.name, tmp_path / "scratch" / shard.index_name, move=True)
    assert not (tmp_path / "scratch" / shard.name).exists()
    assert (tmp_path / "out" / shard.name).read_bytes() == (packed.folder / shard.name).read_bytes()
    assert store.has_shard(shard)


@pytest.mark.usefixtures("no_second_look")
def test_a_broken_claim_or_receipt_is_named(tmp_path: Path, packed: Packed) -> None:
    store = Store(str(tmp_path))
    store.begin(PLAN)
    put(store, packed, packed.manifest.shards[0])
    (tmp_path / ".publish/train/000000.json").write_text("{")
    with pytest.raises(StorageError, match=r"000000\.json: not a receipt"):
        Store(str(tmp_path)).begin(PLAN)
    (tmp_path / ".publish/claim.json").write_text("{")
    with pytest.raises(StorageError, match=r"claim\.json: not a claim"):
        Store(str(tmp_path)).begin(PLAN)


def test_prep_publishes_to_a_bucket_what_it_publishes_to_a_folder(
    rclone_bucket: Bucket, drive: Path, dataset: Path, tmp_path: Path
) -> None:
    from prep.packing.pack import pack
    from prep.packing.plan import make_plan
    from prep.raw.files import RawData
    from prep.raw.kitti import Kitti
    from prep.raw.splits import read_split
    from prep.request import make_content
    from prep.workers import start_workers

    lists = read_split(str(drive / "splits" / "sample"))
    content = make_content(lists, size="96x32")
    plan = make_plan(lists, Kitti(RawData([str(drive)]), content.depth), content, parts=["train", "val"])
    url = f"{rclone_bucket.url}/kitti/sample"
    with start_workers(1) as workers:
        packed = pack(plan, lists, url, tmp_path / "scratch", workers)
        assert packed.url == url
        assert not packed.already
        assert pack(plan, lists, url, tmp_path / "scratch", workers).already
    local = {p.relative_to(dataset).as_posix(): p.read_bytes() for p in dataset.rglob("*") if p.is_file()}
    assert {k.removeprefix("kitti/sample/"): rclone_bucket.get(k) for k in rclone_bucket.objects()} == local


@pytest.mark.parametrize("name", ["../x", "/x", "a/../../x", "a//b", "", "a/./b", "a b", "a\\b", "ä", "a/", ".."])
def test_names_cannot_leave_a_storage(tmp_path: Path, name: str) -> None:
    with pytest.raises(StorageError, match="leave"):
        check_name(name)
    storage = LocalStorage(tmp_path / "in")
    with pytest.raises(StorageError, match="leave"):
        storage.write(name, b"x")
    assert list(tmp_path.rglob("*")) == []


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("s3://key:secret@bucket/x", "no credentials in a URL"),
        ("https://user:secret@host/x", "no credentials in a URL"),
        ("s3://key:/secret@bucket/x", "no credentials in a URL"),
        ("https://user:/secret@host/x", "no credentials in a URL"),
        ("https://user:p/secret@host/x", "not a web address"),
        ("https://host/x?X-Amz-Signature=secret", "no \\?"),
        ("https:///x", "no valid host"),
        ("s3:///x", "no bucket"),
        ("s3://", "no bucket"),
        ("s3:/bucket/x", "two slashes"),
        ("nosuch://x/y", "no such kind of storage"),
        ("ftp://x/y", "no such kind of storage"),
        ("file://host/x", "three slashes"),
        ("simplecache::s3://key:secret@bucket/x", "chained"),
        ("s3::simplecache://key:secret@bucket/x", "chained"),
        ("filecache://x::s3://key:secret@bucket/x", "chained"),
        ("s3:/key:secret@bucket/x", "two slashes"),
        ("sftp://user:secret@host/x", "no credentials in a URL"),
        ("http://a..b/", "no valid host"),
    ],
)
def test_urls_that_cannot_be_used_are_explained_without_their_secrets(url: str, reason: str) -> None:
    with pytest.raises(UsageError, match=reason) as caught:
        open_storage(url).read("x", 1)
    assert "secret" not in str(caught.value)


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(UsageError, match=r"pip install 'md2\[gcs\]'"):
        open_storage("gs://bucket/x").read("x", 1)


def test_a_web_address_is_read_only() -> None:
    with pytest.raises(UsageError, match="only be read"):
        open_storage("http://127.0.0.1:9/x").create("a", b"x")


def test_read_manifest_of_nothing(target: str) -> None:
    assert read_manifest(open_storage(target)) is None
