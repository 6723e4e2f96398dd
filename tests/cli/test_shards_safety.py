"""What `md2 shards` never does: publish other files, print secrets, give up at one fault, remove files of others."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from storage_data import all_samples, make_dataset
from storage_fixtures import Packed, RunShards, files, one_server
from storage_servers import Bucket, Fault, Proxy

from shards.cache.folder import Cache
from shards.card import card
from shards.dataset import open_dataset
from shards.errors import Md2Error, conceal, first_line, visible
from shards.files import ProcessIdentity, is_abandoned, scratch_folder, temporary, write_atomic
from shards.publish import Store
from shards.storage import open_storage

SECRET = "hUnTeR2secret/value"
"""Marked, and with a slash as AWS's own have."""
DOORS = [
    f"s3://AKIAKEY:{SECRET}@bucket/x", f"s3:/AKIAKEY:{SECRET}@bucket/x", f"simplecache::s3://AKIAKEY:{SECRET}@bucket/x",
    f"filecache::simplecache::https://u:{SECRET}@host/x", f"s3::x://AKIAKEY:{SECRET}@b", f"https://u:{SECRET}@host/x",
    f"https://host/x?X-Amz-Signature={SECRET}&X-Amz-Credential=a", f"https://host/x?token={SECRET}", f"sftp://u:{SECRET}@h/x",
    f"ftp://{SECRET}@h/x", f"hf://u:{SECRET}@x/y", f"memory://u:{SECRET}@x", f"zip://x::s3://u:{SECRET}@b/x.zip",
    f"HTTPS://u:{SECRET}@host", f"http://u:{SECRET}@[::1", f"https://host/x#access_token={SECRET}", f"gs://t:{SECRET}@b/x",
    f"file://u:{SECRET}@host/x", f"http://[{SECRET.replace('/', '')}@::1]/x", f"s3://bucket/x?Signature={SECRET}",
    f"gs://bucket/x y#token={SECRET}",
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(DOORS)))
def test_no_door_lets_a_secret_out(md2: RunShards, number: int, tmp_path: Path, packed: Packed) -> None:
    """Each door with three of the commands in turn, which all open a URL by one function."""
    url, there = DOORS[number], str(tmp_path / "d")
    commands = [[command, url] for command in ("ls", "show", "verify", "rm", "clean")]
    commands += [["pull", url, there], ["push", packed.url, url], ["push", url, there]]
    commands += [["copy", url, there]]
    told = [md2(*debug, *command) for command in commands[number % 3 :: 3] for debug in ([], ["--debug"])]
    for code, out, err in told:
        assert code in (2, 5), err
        assert "hUnTeR2" not in out + err
        assert "secret" not in out + err
        assert len(err.strip().splitlines()) == 1 or "Traceback" in err, err
    assert [path.name for path in tmp_path.iterdir()] == []


@pytest.mark.parametrize("url", DOORS)
def test_prep_does_not_print_it_either(url: str, tmp_path: Path) -> None:
    from prep.raw.files import RawData

    for use in (lambda: RawData([url]), lambda: RawData([str(tmp_path), url])):
        try:
            use()
        except Md2Error as error:
            assert "hUnTeR2" not in f"{error} {error!r}"
        except Exception as error:  # of another library: what the commands print of it
            assert "hUnTeR2" not in first_line(error)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("s3://b/a@v2: x", "s3://b/a@v2: x"),
        ("http://host:8080/a@b", "http://host:8080/a@b"),
        ("s3://team/*?  x=1&y", "s3://team/*?  x=1&y"),
        ("(https://h/p?sig=abc)", "(https://h/p?…)"),
        ("Authorization: Bearer abc def", "Authorization: …"),
        ("{'X-Amz-Security-Token': 'abc', 'a': 1}", "{'X-Amz-Security-Token': '…', 'a': 1}"),
        ("no secret: just words about a token here", "no secret: just words about a token here"),
        ("proxy http://me:pw@proxy:3128 is down", "proxy http://…@proxy:3128 is down"),
    ],
)
def test_only_secrets_are_taken_out(text: str, shown: str) -> None:
    assert conceal(text) == shown


def test_values_of_the_environment_are_taken_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "abcdefgh12345")
    assert conceal("InvalidHeader: b'abcdefgh12345\\r'") == "InvalidHeader: b'…\\r'"
    assert str(Md2Error("key abcdefgh12345")) == "key …"
    assert visible("\x1b[31m\u202eabcdefgh12345") == "\\x1b[31m\\u202e…"


@pytest.mark.parametrize(
    ("value", "text", "shown"),
    [
        ("https://h:1/tokentoken/x/", "h:1/tokentoken/x/a: 404 for url: /tokentoken/x", "h:1/…/a: 404 for url: /…"),
        ("https://h;tokentoken", "https://h;tokentoken/eigen/a.txt: no", "https://h;…/eigen/a.txt: no"),
        ("https://h/tokentoken?key=1", "https://h/tokentoken/eigen: no", "https://h/…/eigen: no"),
        ("https://u:to/ken@h/tokentoken", "https://u:to/ken@h/tokentoken: no", "https://…@h/…: no"),
        ("tokentoken", "ValueError: Invalid endpoint: tokentoken", "ValueError: Invalid endpoint: …"),
        ("http://minio:9000/", "http://minio:9000/ is down", "http://minio:9000/ is down"),
        ("http://minio:9000/s3", "http://minio:9000/s3 is down", "http://minio:9000/s3 is down"),
    ],
)
@pytest.mark.parametrize("name", ["MD2_SPLITS_URL", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"])
def test_of_an_address_in_the_environment_only_the_server_is_shown(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, text: str, shown: str
) -> None:
    monkeypatch.setenv(name, value)
    assert conceal(text) == shown
    assert str(Md2Error(text)) == shown


def test_concealing_a_long_text_takes_no_time() -> None:
    began = time.monotonic()
    for text in (
        "a." * 100_000,
        "a:/" * 100_000,
        "x://" + "@" * 100_000,
        "s3://" + "a" * 100_000 + "?",
    ):
        conceal(text)
    assert time.monotonic() - began < 20


@pytest.mark.parametrize(
    "name", ["README.md", "report.json", "dataset.json", "train/000000.tar", "train/000001.idx", "train"]
)
def test_a_link_out_of_a_received_dataset_is_not_published(md2: RunShards, tmp_path: Path, name: str) -> None:
    make_dataset(tmp_path / "d", train=4, val=2, per_shard=2)
    private = tmp_path / "private"
    if (tmp_path / "d" / name).exists():
        (tmp_path / "d" / name).rename(private)  # the same bytes, so that no check of content can notice
    else:
        private.write_text("{}")
    (tmp_path / "d" / name).symlink_to(private)
    code, _, err = md2("push", str(tmp_path / "d"), str(tmp_path / "e"))
    assert code == 5
    assert "leads out of the dataset" in err
    assert not (tmp_path / "e").exists()


@pytest.mark.parametrize("name", ["README.md", "train/000000.tar"])
def test_a_link_in_a_circle_is_refused_in_one_line(md2: RunShards, tmp_path: Path, name: str) -> None:
    make_dataset(tmp_path / "d", train=4, val=2, per_shard=2)
    (tmp_path / "d" / name).unlink(missing_ok=True)
    (tmp_path / "d" / name).symlink_to(tmp_path / "d" / name)
    for command in ("push", "pull", "copy"):
        code, _, err = md2(command, str(tmp_path / "d"), str(tmp_path / "e"))
        assert code == 5
        assert f"{name}: a link in a circle" in err
        assert not (tmp_path / "e").exists()


def test_a_link_to_the_dataset_or_within_it_is_published(md2: RunShards, tmp_path: Path) -> None:
    make_dataset(tmp_path / "real", train=2, val=2)
    (tmp_path / "real/README.md").rename(tmp_path / "real/card.md")
    (tmp_path / "real/README.md").symlink_to("card.md")
    (tmp_path / "d").symlink_to("real")
    assert md2("push", str(tmp_path / "d"), str(tmp_path / "e"))[0] == 0
    assert (tmp_path / "e/README.md").read_bytes() == (tmp_path / "real/card.md").read_bytes()


@one_server
def test_verify_goes_on_after_an_object_that_cannot_be_read(
    md2: RunShards, bucket: Bucket, proxied: Proxy, packed: Packed, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert md2("push", packed.url, f"{bucket.url}/d")[0] == 0
    monkeypatch.setenv("MD2_STORAGE_PATIENCE", "3")
    data = bytearray(bucket.get("d/val/000000.tar"))
    data[3000] ^= 1
    bucket.put("d/val/000000.tar", bytes(data))
    unread = "train/000001.tar"
    proxied.rule = lambda method, path, number: Fault(status=503) if path.endswith(unread) else None
    code, out, err = md2("verify", f"{bucket.url}/d")
    assert code == 5
    assert sorted(line.split()[1] for line in out.splitlines() if line.startswith("broken")) == [
        unread,
        "val/000000.tar",
    ]
    assert "gave up" in out
    assert "2 of 4 shards are broken" in err


@one_server
def test_verify_ends_soon_if_the_whole_storage_is_down(
    md2: RunShards, bucket: Bucket, proxied: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_dataset(tmp_path / "many", train=12, val=2, per_shard=1)
    assert md2("push", str(tmp_path / "many"), f"{bucket.url}/d")[0] == 0
    monkeypatch.setenv("MD2_STORAGE_PATIENCE", "1")
    asked: set[str] = set()

    def rule(method: str, path: str, number: int) -> Fault | None:
        if path.endswith((".tar", ".idx")):
            asked.add(path)
            return Fault(status=503)
        return None

    proxied.rule = rule
    code, _, err = md2("verify", f"{bucket.url}/d")
    assert code == 5
    assert "gave up" in err
    assert "broken or unreadable so far: train/0" in err
    assert len(asked) < 10


def test_show_onto_a_place_that_cannot_be_written_is_one_line(md2: RunShards, tmp_path: Path) -> None:
    make_dataset(tmp_path / "d", train=2, val=2)
    for sheet, word in (
        ("/proc/x.png", ""),
        ("/dev/full/x.png", ""),
        (str(tmp_path / "d"), "directory"),
    ):
        code, _, err = md2("show", str(tmp_path / "d"), "--sheet", sheet)
        assert code == 5
        assert len(err.strip().splitlines()) == 1, err
        assert "--sheet FILE" in err
        assert word in err


def test_cleaning_up_does_not_hide_the_first_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    monkeypatch.setattr(Path, "unlink", fail)
    with pytest.raises(OSError, match="No space left"):
        write_atomic(tmp_path / "x", b"x")


def test_pull_and_push_say_which_command_is_meant(md2: RunShards, tmp_path: Path) -> None:
    code, _, err = md2("push", "s3://team/kitti/mine", str(tmp_path))
    assert code == 2
    assert "s3://team/kitti/mine: not a local folder" in err
    assert "md2 shards pull" in err
    code, _, err = md2("pull", "s3://team/kitti/mine", "s3://elsewhere/x")
    assert code == 2
    assert "md2 shards copy" in err


def test_a_copy_to_a_path_in_another_form_is_not_another_dataset(
    md2: RunShards, packed: Packed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for number, target in enumerate(("./a", "b/", "file://{}/c", "./x/../d", "{}/e//")):
        url = target.format(tmp_path)
        code, out, _ = md2("copy", packed.url, url)
        assert code == 0
        assert "another dataset" not in out, url
        assert files(tmp_path / "abcde"[number]) == files(packed.folder)


@pytest.mark.parametrize("remote", [False, True])
def test_one_part_is_a_dataset_of_its_own(
    md2: RunShards, moto_bucket: Bucket, packed: Packed, tmp_path: Path, remote: bool
) -> None:
    source = packed.url
    if remote:
        source = f"{moto_bucket.url}/d"
        md2("push", packed.url, source)
    code, out, err = md2("pull", source, str(tmp_path / "v"), "--part", "val")
    assert code == 0, err
    assert "2 val" in out
    assert "train" not in out
    assert md2("verify", str(tmp_path / "v"))[0] == 0, "component counts are the part's own"
    found = open_dataset(str(tmp_path / "v"))
    assert found.manifest.parts == ["val"]
    assert found.manifest.plan_sha256 != packed.manifest.plan_sha256
    assert all_samples(found.tars("val")) == all_samples([packed.folder / "val/000000.tar"])
    assert (tmp_path / "v/README.md").read_text() == card(found.manifest)
    assert "already" in md2("pull", source, str(tmp_path / "v"), "--part", "val")[1]
    code, _, err = md2("pull", source, str(tmp_path / "t"), "--part", "test")
    assert code == 5
    assert "it has train, val" in err


def test_all_datasets_below_a_place_are_copied_and_verified(
    md2: RunShards, packed: Packed, repacked: Packed, tmp_path: Path
) -> None:
    source, target = str(tmp_path / "team"), str(tmp_path / "mine")
    md2("push", packed.url, f"{source}/kitti/a")
    md2("push", repacked.url, f"{source}/b")
    unfinished(f"{source}/c", packed)
    code, out, _ = md2("copy", source, target)
    assert code == 4, "one could not be copied"
    assert f"{source}/c  skipped: unfinished" in out
    assert files(tmp_path / "mine/kitti/a") == files(packed.folder)
    assert files(tmp_path / "mine/b") == files(repacked.folder)
    assert not (tmp_path / "mine/c").exists()
    assert md2("verify", target)[0] == 0
    tar = tmp_path / "mine/b/train/000000.tar"
    tar.write_bytes(tar.read_bytes()[:-1] + b"x")
    code, out, err = md2("verify", target)
    assert code == 5
    assert f"{target}/kitti/a  sound" in out, "it goes on"
    assert f"broken  {target}/b: 1 of" in out
    assert "1 of 2 are broken" in err
    code, _, err = md2("copy", packed.url, f"{target}/b/train")
    assert code == 2
    assert f"inside the dataset at {target}/b" in err


def test_latest_is_the_newest_committed_version(md2: RunShards, packed: Packed, tmp_path: Path) -> None:
    for name in ("d", "d-v2", "d-v10", "d-v2-old", "e-v11"):
        md2("push", packed.url, str(tmp_path / name))
    unfinished(str(tmp_path / "d-v12"), packed)
    for name in ("d", "d-v2", "d-v77"):
        assert md2("latest", str(tmp_path / name))[:2] == (0, f"{tmp_path}/d-v10\n")
    code, _, err = md2("latest", str(tmp_path / "f"))
    assert code == 5
    assert "no dataset there" in err


def test_the_cache_is_listed_and_cleared_but_for_what_is_in_use(
    md2: RunShards, packed: Packed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MD2_CACHE", str(tmp_path / "cache"))
    assert "0 datasets" in md2("cache", "--clear")[1]
    place = Cache(tmp_path / "cache").dataset("ab" * 32)
    shutil.copytree(packed.folder, place.folder, dirs_exist_ok=True)
    assert re.search(r"abab\S+  \S+ \S+ here of synthetic: 6 train, 2 val; .*; in use", md2("cache")[1])
    md2("cache", "--clear", "--yes")
    assert place.folder.exists()
    place.close()
    assert "last used 20" in md2("cache")[1]
    assert md2("cache", "--clear", answer="n\n")[0] == 1
    assert place.folder.exists()
    assert md2("cache", "--clear", answer="y\n")[0] == 0
    assert not place.folder.exists()


def unfinished(url: str, packed: Packed) -> None:
    """A publication that stops after its first shard, by a process that has ended."""
    store = Store(url)
    store.begin({"split": "other"})
    shard = packed.manifest.shards[0]
    store.put_shard(shard, packed.folder / shard.name, packed.folder / shard.index_name)


def test_clean_removes_what_a_dead_host_left(
    md2: RunShards, bucket: Bucket, packed: Packed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for url in (f"{bucket.url}/kitti", str(tmp_path / "local")):
        md2("push", packed.url, f"{url}/sound")
        unfinished(f"{url}/left", packed)
        storage = open_storage(f"{url}/left")
        claim = json.loads(storage.read(".publish/claim.json", 1 << 20) or b"")
        claim |= {"host": "node\x1b[31m7", "process": 4711, "machine": "f" * 12, "since": "2026-01-02T03:04:05+00:00"}
        storage.write(".publish/claim.json", json.dumps(claim).encode())
        storage.write("notes.txt", b"not md2's")
        code, _, err = md2("push", packed.url, f"{url}/left")
        assert code == 5
        assert f"md2 shards clean {url}/left" in err
        code, out, _ = md2("clean", url, answer="n\n")
        assert code == 1
        assert f"{url}/left  unfinished: 4 files; claimed by node\\x1b[31m7 (process 4711) since 2026-01-02" in out
        assert "sound" not in out
        assert storage.read(".publish/claim.json", 1 << 20) is not None
        code, out, _ = md2("clean", url, "--yes")
        assert code == 0
        assert storage.names("") == ["notes.txt"], "what md2 did not put there stays"
        assert md2("push", packed.url, f"{url}/left")[0] == 0
        assert "nothing unfinished" in md2("clean", url)[1]
        assert md2("verify", f"{url}/sound")[0] == 0


def test_clean_without_a_terminal_asks_for_yes(md2: RunShards, packed: Packed, tmp_path: Path) -> None:
    unfinished(str(tmp_path / "d"), packed)
    before = files(tmp_path / "d")
    code, _, err = md2("clean", str(tmp_path / "d"), answer="")
    assert code == 2
    assert "--yes" in err
    assert files(tmp_path / "d") == before


def test_rm_removes_the_manifest_first_and_only_its_own(
    md2: RunShards, bucket: Bucket, packed: Packed, tmp_path: Path
) -> None:
    for url in (f"{bucket.url}/d", str(tmp_path / "d")):
        md2("push", packed.url, url)
        storage = open_storage(url)
        storage.write("mine.txt", b"x")
        storage.write("train/notes.md", b"x")
        code, out, _ = md2("rm", url, answer="n\n")
        assert code == 1
        assert "6 train, 2 val" in out
        assert md2("verify", url)[0] == 0
        code, out, _ = md2("rm", url, "-y")
        assert code == 0
        assert "removed: 10 files" in out
        assert storage.names("") == ["mine.txt", "train/notes.md"]
        code, _, err = md2("rm", url, "-y")
        assert code == 5
        assert "no dataset there" in err


def test_a_process_is_known_by_more_than_its_number(tmp_path: Path) -> None:
    own = ProcessIdentity.own()
    assert not own.has_ended()
    assert own._replace(started=own.started - 1).has_ended(), "its number was given to another process since"
    assert not own._replace(machine="0" * 12, process=2**22 + 1).has_ended(), (
        "another container's processes are not seen"
    )
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    assert own._replace(process=ended.pid).has_ended()
    made = temporary(tmp_path / "x")
    assert not is_abandoned(made)
    assert is_abandoned(made.with_name(made.name.replace(f"-{own.process}-", f"-{ended.pid}-")))
    assert not is_abandoned(made.with_name(made.name.replace(own.machine, "0" * 12)))
    other = subprocess.run(
        ["unshare", "--pid", "--fork", sys.executable, "-c",
         "import shards.files as f; print(f.ProcessIdentity.own()[0])"],
        check=False, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    if other.returncode == 0:
        assert other.stdout.strip() != own.machine, "a container with the same host name"


def test_the_folder_of_a_killed_copy_goes_with_the_next(tmp_path: Path) -> None:
    code = (
        "import os, pathlib, sys; from shards.files import scratch_folder\n"
        "with scratch_folder('md2-copy', pathlib.Path(sys.argv[1])): os._exit(9)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    left = list(tmp_path.iterdir())
    assert len(left) == 1
    with scratch_folder("md2-copy", tmp_path) as first, scratch_folder("md2-copy", tmp_path) as second:
        assert sorted(tmp_path.iterdir()) == sorted([first, second])
        assert first.stat().st_mode & 0o077 == 0
    assert list(tmp_path.iterdir()) == []
