"""`md2 shards` from outside, and what stands behind it: copies, verification, listings, contact sheets, streaming."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pipeline_data import encode
from storage_data import SIZE, all_samples, make_dataset, make_samples
from storage_fixtures import Packed, RunShards, files, one_server
from storage_servers import Bucket, Fault, Proxy

from bench.write_dataset import write_dataset
from md2.checkpoint import load_checkpoint
from shards import contact_sheet as sheet_module
from shards.contact_sheet import CELL, FAR, NEAR, contact_sheet, depth_colours, read_some
from shards.dataset import open_dataset
from shards.errors import DatasetError
from shards.manifest import DepthInfo, Split
from shards.sample import DEPTH, Codec, Sample


def test_push_ls_show_verify_pull(md2: RunShards, bucket: Bucket, packed: Packed, tmp_path: Path) -> None:
    url = f"{bucket.url}/kitti/drive"
    assert md2("push", packed.url, url)[0] == 0
    code, out, _ = md2("ls", bucket.url)
    assert code == 0
    assert out.split()[0] == url
    assert "6 train, 2 val; 64x32 jpeg; 4 shards" in out
    code, out, _ = md2("verify", url)
    assert code == 0
    assert "sound" in out
    code, out, _ = md2("show", url, "--samples", "3", "--sheet", str(tmp_path / "s.png"))
    assert code == 0
    for words in ("synthetic", "0, -1, 1 and the stereo partner", "velodyne, camera_z", "depth.png", "s.png"):
        assert words in out
    with Image.open(tmp_path / "s.png") as image:
        assert image.width > 5 * CELL
    code, out, _ = md2("pull", url, str(tmp_path / "pulled"))
    assert code == 0
    assert "4 shards copied" in out
    assert files(tmp_path / "pulled") == files(packed.folder), "byte for byte, and nothing besides"
    assert {p.name for p in (tmp_path / "pulled").iterdir() if p.is_dir()} == {"train", "val"}
    code, out, _ = md2("pull", url, str(tmp_path / "pulled"))
    assert code == 0
    assert "already" in out


def test_copy_within_object_storage(md2: RunShards, moto_bucket: Bucket, packed: Packed) -> None:
    assert md2("push", packed.url, f"{moto_bucket.url}/a")[0] == 0
    assert md2("copy", f"{moto_bucket.url}/a", f"{moto_bucket.url}/b")[0] == 0
    a, b = ({k[2:]: moto_bucket.get(k) for k in moto_bucket.objects() if k.startswith(f"{p}/")} for p in "ab")
    assert a == b == files(packed.folder)


def test_pushing_something_else_goes_beside_and_says_so(
    md2: RunShards, tmp_path: Path, packed: Packed, repacked: Packed
) -> None:
    target = str(tmp_path / "d")
    md2("push", packed.url, target)
    code, out, _ = md2("push", repacked.url, target)
    assert code == 0
    assert f"{target}-v2 (another dataset is at {target})" in out
    assert files(tmp_path / "d") == files(packed.folder)
    assert files(tmp_path / "d-v2") == files(repacked.folder)


def test_a_pull_that_was_killed_goes_on(
    md2: RunShards, rclone_bucket: Bucket, packed: Packed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from storage_servers import faulty_proxy

    md2("push", packed.url, f"{rclone_bucket.url}/d")
    with faulty_proxy(rclone_bucket.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        slow = "train/000002.tar"
        proxy.rule = lambda method, path, number: Fault(silent=True) if path.endswith(slow) else None
        process = subprocess.Popen(
            [sys.executable, "-m", "cli.main", "shards", "pull", f"{rclone_bucket.url}/d", str(tmp_path / "d")],
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + 60
        while len(list((tmp_path / "d").glob(".publish/*/*.json"))) < 3:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (tmp_path / "d/dataset.json").exists()
        code, out, _ = md2("ls", str(tmp_path))
        assert code == 0
        assert "unfinished" in out
        proxy.rule = None
        proxy.requests.clear()
        code, out, _ = md2("pull", f"{rclone_bucket.url}/d", str(tmp_path / "d"))
        assert code == 0
        assert "1 shard copied, 3 were there already" in out
        fetched = {r.path.rpartition("/d/")[2] for r in proxy.requests if r.path.endswith((".tar", ".idx"))}
        assert fetched <= {slow, "train/000002.idx"}
    assert files(tmp_path / "d") == files(packed.folder)


@one_server
@pytest.mark.parametrize(
    ("command", "number", "code"),
    [
        ("pull", signal.SIGINT, 130),
        ("pull", signal.SIGTERM, 143),
        ("pull http", signal.SIGINT, 130),
        ("train", signal.SIGTERM, 143),
    ],
)
def test_an_interruption_is_obeyed_while_the_server_is_silent(
    md2: RunShards, proxied: Proxy, bucket: Bucket, packed: Packed, tmp_path: Path, command: str,
    number: signal.Signals, code: int,
) -> None:  # fmt: skip
    md2("push", packed.url, f"{bucket.url}/d")
    proxied.rule = lambda method, path, number: Fault(silent=True) if path.endswith(".tar") else None
    bucket.make_public()
    url = bucket.url if "http" not in command else f"{proxied.endpoint}/{bucket.name}"
    pull = ["shards", "pull", f"{url}/d", str(tmp_path / "d")]
    train = ["train", "demo", f"data.url={bucket.url}/d", "train.batch_size=1", "--run", str(tmp_path / "run")]
    process = subprocess.Popen(
        [sys.executable, "-m", "cli.main", *(train if command == "train" else pull)], stderr=subprocess.PIPE
    )
    try:
        deadline = time.monotonic() + 40
        while not any(r.method == "GET" and r.path.endswith(".tar") for r in proxied.requests):
            assert time.monotonic() < deadline and process.poll() is None, process.communicate(timeout=1)
            time.sleep(0.05)
        process.send_signal(number)
        _, err = process.communicate(timeout=40)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == code
    assert b"Traceback" not in err
    if command == "train":
        assert load_checkpoint(tmp_path / "run/checkpoints/last.pt").step == 0, "it resumes where it waited"


def damaged(folder: Path, name: str, change: Callable[[bytes], bytes]) -> None:
    (folder / name).write_bytes(change((folder / name).read_bytes()))


@pytest.mark.parametrize("remote", [False, True])
def test_verify_names_every_broken_shard(md2: RunShards, moto_bucket: Bucket, tmp_path: Path, remote: bool) -> None:
    make_dataset(tmp_path / "d", train=8, val=2, per_shard=2)
    url = str(tmp_path / "d")
    if remote:
        url = f"{moto_bucket.url}/d"
        md2("push", str(tmp_path / "d"), url)
    flip = lambda data: data[:2000] + bytes([data[2000] ^ 1]) + data[2001:]  # noqa: E731
    if remote:
        moto_bucket.put("d/train/000001.tar", flip(moto_bucket.get("d/train/000001.tar")))
        moto_bucket.put("d/train/000001.idx", moto_bucket.get("d/train/000001.idx")[:-1])
        moto_bucket.remove("d/train/000003.idx")
    else:
        damaged(tmp_path / "d", "train/000001.tar", flip)
        damaged(tmp_path / "d", "train/000001.idx", lambda data: data[:-1])
        (tmp_path / "d/train/000003.idx").unlink()
    code, out, err = md2("verify", url)
    assert code == 5
    assert sorted(line.split()[1] for line in out.splitlines() if line.startswith("broken")) == [
        "train/000001.tar",
        "train/000003.tar",
    ]
    both = next(line for line in out.splitlines() if "000001" in line)
    assert "train/000001.tar: " in both
    assert "train/000001.idx: " in both
    assert "2 of 5 shards are broken" in err


def test_verify_sees_an_index_that_fits_its_hash_but_not_its_tar(md2: RunShards, tmp_path: Path) -> None:
    """The manifest vouches for a wrong index: only the tar's own headers tell."""
    from hashlib import sha256

    make_dataset(tmp_path, train=4, val=2, per_shard=2)
    index = tmp_path / "train/000000.idx"
    text = index.read_text().splitlines()
    index.write_text("\n".join([text[0], text[2], text[1]]) + "\n")
    data = json.loads((tmp_path / "dataset.json").read_text())
    data["shards"][0]["index_sha256"] = sha256(index.read_bytes()).hexdigest()
    (tmp_path / "dataset.json").write_text(json.dumps(data))
    code, out, _ = md2("verify", str(tmp_path))
    assert code == 5
    assert "train/000000.idx: is not the index of 000000.tar" in out


def test_verify_sees_a_wrong_component_list(md2: RunShards, tmp_path: Path) -> None:
    make_dataset(tmp_path, train=4, val=2, per_shard=2)
    data = json.loads((tmp_path / "dataset.json").read_text())
    data["components"].remove("depth.png")
    (tmp_path / "dataset.json").write_text(json.dumps(data))
    code, out, err = md2("verify", str(tmp_path))
    assert code == 5
    assert "depth.png" in out
    assert "component list" in err


def test_ls_finds_datasets_at_every_depth(md2: RunShards, tmp_path: Path, bucket: Bucket) -> None:
    for name in ("x", "deep/er/y"):
        make_dataset(tmp_path / name, train=2, val=2)
        md2("push", str(tmp_path / name), f"{bucket.url}/{name}")
    bucket.put("broken/dataset.json", b"{")
    bucket.put("unrelated/file.txt", b"hello")
    code, out, _ = md2("ls", bucket.url)
    assert code == 0
    found = {line.split()[0]: line for line in out.splitlines()}
    assert set(found) == {f"{bucket.url}/{name}" for name in ("x", "deep/er/y", "broken")}
    assert "broken" in found[f"{bucket.url}/broken"]
    code, _, err = md2("ls", f"{bucket.url}/unrelated")
    assert code == 5
    assert "no datasets" in err
    code, _, err = md2("ls", "s3://no-such-bucket")
    assert code == 5
    assert "no such bucket" in err


def test_ls_copes_with_whatever_else_is_there(md2: RunShards, bucket: Bucket, packed: Packed) -> None:
    """Names that no dataset of ours has, and names that would steer a terminal."""
    names = ["My Files/ü #1+%20", "x=1&y", "[b]bold[/b]", "*?", "red\x1b[31m"]
    for name in names:
        bucket.put(f"{name}/dataset.json", (packed.folder / "dataset.json").read_bytes())
    code, out, _ = md2("ls", bucket.url)
    assert code == 0
    shown = {name: name.replace("\x1b", "\\x1b") for name in names}
    assert sorted(line.partition("  synthetic")[0] for line in out.splitlines()) == sorted(
        f"{bucket.url}/{name}" for name in shown.values()
    )


def test_ls_passes_over_folders_of_others(md2: RunShards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_dataset(tmp_path / "mine", train=2, val=2)
    (tmp_path / "locked").mkdir()
    list_folder = Path.iterdir

    def iterdir(path: Path) -> Iterator[Path]:
        if path.name == "locked":
            raise PermissionError(13, "Permission denied")
        return list_folder(path)

    monkeypatch.setattr(Path, "iterdir", iterdir)  # the tests may run as root, who may look everywhere
    code, out, _ = md2("ls", str(tmp_path))
    assert code == 0
    assert f"{tmp_path}/mine" in out
    assert "locked  cannot be listed" in out


def test_the_sheets_name_comes_from_the_url_not_from_the_dataset(
    md2: RunShards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_dataset(tmp_path / "in" / "drive", train=2, val=2)
    path = tmp_path / "in" / "drive" / "dataset.json"
    data = json.loads(path.read_text())
    data["split"]["name"] = "../../outside"
    path.write_text(json.dumps(data))
    monkeypatch.chdir(path.parent)
    assert md2("show", ".")[0] == 0
    assert [p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*.png")] == ["in/drive/drive.png"]


def solid(colour: tuple[int, int, int], codec: Codec) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", SIZE, colour).save(buffer, codec.upper())
    return buffer.getvalue()


@pytest.mark.parametrize("codec", ["png", "ppm"])
def test_the_contact_sheet_shows_each_image_in_its_column(tmp_path: Path, codec: Codec) -> None:
    depth = np.zeros((64, 128), np.uint16)
    depth[:32] = int(NEAR * 256)
    depth[32:, ::7] = int(FAR * 256)
    buffer = io.BytesIO()
    Image.fromarray(depth).save(buffer, "PNG")
    colours = {"0": (200, 200, 200), "m1": (255, 0, 0), "p1": (0, 255, 0), "s": (0, 0, 255)}
    images = {f"{k}.{codec}": solid(c, codec) for k, c in colours.items()}
    samples = [Sample("k", images | {"depth.png": buffer.getvalue()}), Sample("none", images)]
    write_dataset(
        tmp_path, {"train": samples}, split=Split(name="x", sha256="0" * 64), frames=[0, -1, 1], stereo=True,
        depth=DepthInfo(source="dense", convention="camera_z"), size=SIZE, codec=codec, quality=None, seed=0,
    )  # fmt: skip
    manifest, some = read_some(str(tmp_path))
    image = np.asarray(Image.open(io.BytesIO(contact_sheet(manifest, sorted(some, key=lambda sample: sample.key)))))
    middle = 18 + CELL // 4
    for column, colour in enumerate(colours.values()):
        assert tuple(image[middle, 6 + column * (CELL + 6) + CELL // 2]) == colour
    left = 6 + 4 * (CELL + 6)
    near, far = depth_colours(np.array([NEAR, FAR]))
    assert (image[18 + CELL // 8, left + 100] == near).all(), "near depth in the upper half"
    rows = image[18 + 3 * CELL // 8, left : left + CELL]
    grey = np.full(3, int(200 * 0.35))
    assert (rows == far).all(1).mean() > 0.1
    assert (rows == grey).all(1).mean() > 0.3, "no depth where none was measured"
    assert ((rows == far).all(1) | (rows == grey).all(1)).all()
    cells = [image[top : top + CELL // 2, left : left + CELL] for top in (18, 18 + CELL // 2 + 18 + 6)]
    assert [bool((cell == 255).all(2).any()) for cell in cells] == [False, True], "says that there is no depth"
    assert near[0] > near[2], "near is red"
    assert far[2] > far[0], "far is blue"


def test_a_contact_sheet_shows_depth_if_any_sample_has_it(tmp_path: Path) -> None:
    """Only the last of 40 samples, and only in val: an even choice of six would miss it."""
    plain = [{"0.png": solid((9, 9, 9), "png")} for _ in range(40)]
    deep = plain[-1] | {"depth.png": encode(np.full((4, 6), 2560, np.uint16), "png")}
    parts = {"train": plain, "val": [*plain[:-1], deep]}
    named = {part: [Sample(f"{part}{n:02d}", one) for n, one in enumerate(found)] for part, found in parts.items()}
    write_dataset(
        tmp_path, named,
        split=Split(name="x", sha256="0" * 64), frames=[0], stereo=False, size=SIZE, codec="png", quality=None, seed=0,
        depth=DepthInfo(source="dense", convention="camera_z"),
    )  # fmt: skip
    for part in (None, "val"):
        samples = read_some(str(tmp_path), part)[1]
        assert [DEPTH in sample.components for sample in samples] == [False] * 5 + [True]
    assert not any(DEPTH in sample.components for sample in read_some(str(tmp_path), "train")[1])


@one_server
def test_show_fetches_only_what_it_shows(
    md2: RunShards, bucket: Bucket, proxied: Proxy, packed: Packed, tmp_path: Path
) -> None:
    md2("push", packed.url, f"{bucket.url}/d")
    proxied.requests.clear()
    assert md2("show", f"{bucket.url}/d", "--samples", "2", "--sheet", str(tmp_path / "s.png"))[0] == 0
    assert proxied.sent(".tar") < sum(s.bytes for s in packed.manifest.part("train")) / 2
    _, samples = read_some(f"{bucket.url}/d", "train", 6)
    assert samples == all_samples([packed.folder / s.name for s in packed.manifest.part("train")])
    assert md2("show", f"{bucket.url}/d", "--part", "test", "--sheet", str(tmp_path / "t.png"))[0] == 5


def test_an_image_that_claims_to_be_huge_is_not_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = make_dataset(tmp_path, train=2, val=2)
    monkeypatch.setattr(sheet_module, "MAX_PIXELS", 64 * 32 - 1)
    with pytest.raises(DatasetError, match="64x32 pixels, refused"):
        contact_sheet(manifest, list(make_samples(1)))


@pytest.mark.parametrize(
    ("component", "data", "reason"),
    [
        ("0.jpg", b"not an image", r"0\.jpg cannot be decoded \(no JPEG, PNG or PPM\)$"),
        ("meta.json", b"[" * 100_000, r"meta\.json is not JSON"),
    ],
    ids=["an image", "meta.json"],
)
def test_what_cannot_be_drawn_is_named(tmp_path: Path, component: str, data: bytes, reason: str) -> None:
    manifest = make_dataset(tmp_path, train=2, val=2)
    broken = Sample("k", next(make_samples(1)).components | {component: data})
    with pytest.raises(DatasetError, match=reason):
        contact_sheet(manifest, [broken])


def test_nothing_in_a_sample_makes_the_contact_sheet_huge(tmp_path: Path) -> None:
    """One column of pixels, scaled to a cell's width, would be a thousand times as high as the image."""
    manifest = make_dataset(tmp_path, train=2, val=2)
    buffer = io.BytesIO()
    Image.new("RGB", (1, 20_000)).save(buffer, "JPEG")
    strange = {"0.jpg": buffer.getvalue(), "meta.json": json.dumps({"drive": "x\n" * 100_000}).encode()}
    with Image.open(
        io.BytesIO(contact_sheet(manifest, [Sample("k", next(make_samples(1)).components | strange)]))
    ) as image:
        assert image.height < 6 * CELL


def test_no_secret_is_ever_printed_or_written(
    md2: RunShards, moto_bucket: Bucket, packed: Packed, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG", logger="shards")
    told = [md2("push", packed.url, f"{moto_bucket.url}/d"), md2("show", f"{moto_bucket.url}/d", "--no-sheet")]
    open_dataset(f"{moto_bucket.url}/d").tars("train")
    told.append(md2("ls", "s3://nobody:md2tests-secret@bucket/x"))
    assert told[-1][0] == 2
    secret = os.environ["AWS_SECRET_ACCESS_KEY"].encode()
    assert secret not in json.dumps(told).encode()
    assert secret.decode() not in caplog.text
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or secret not in path.read_bytes()
    assert all(secret not in moto_bucket.get(key) for key in moto_bucket.objects())
