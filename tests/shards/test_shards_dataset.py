"""A dataset in a folder: written, opened, and refused when it is not what its manifest says."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from storage_data import SPLIT, all_samples, make_dataset, make_samples

from bench.write_dataset import write_dataset
from prep.raw.kitti import KITTI_LICENCE
from shards.card import card
from shards.dataset import open_dataset
from shards.errors import DatasetError
from shards.manifest import DepthInfo, JpegInfo, Manifest
from shards.sample import Sample
from shards.tar import format_index, parse_index


def test_what_was_written_is_read_back(tmp_path: Path) -> None:
    manifest = make_dataset(tmp_path / "d", train=7, val=2, per_shard=3)
    dataset = open_dataset(str(tmp_path / "d"))
    assert dataset.manifest == manifest
    assert [s.samples for s in manifest.part("train")] == [3, 3, 1]
    assert all_samples(dataset.tars("train")) == list(make_samples(7))
    assert all_samples(dataset.tars("val")) == list(make_samples(2, 50))
    assert [p.stem for p in dataset.indexes("train")] == [p.stem for p in dataset.tars("train")]
    assert open_dataset((tmp_path / "d").as_uri()).manifest_sha256 == dataset.manifest_sha256


def test_packing_again_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in "ab":
        make_dataset(tmp_path / name)
    files = [{p.relative_to(tmp_path / n): p.read_bytes() for p in (tmp_path / n).rglob("*.*")} for n in "ab"]
    assert files[0] == files[1]
    assert len(files[0]) == 2 * 5 + 2


def test_a_shard_ends_at_its_size(tmp_path: Path) -> None:
    samples = [Sample(f"k{i}", {"0.jpg": b"x" * 5000, "k.f32": b"y" * 16}) for i in range(10)]
    manifest = write_small(tmp_path / "d", {"train": samples}, shard_bytes=12_000)
    assert [s.samples for s in manifest.shards] == [2, 2, 2, 2, 2]  # (512 + 5120) + (512 + 512) a sample


def write_small(folder: Path, parts: dict[str, list[Sample]], shard_bytes: int = 1 << 20) -> Manifest:
    return write_dataset(
        folder, parts, split=SPLIT, frames=[0], stereo=False, depth=None, size=None, codec="jpeg", quality=90, seed=0,
        shard_bytes=shard_bytes,
    )  # fmt: skip


def test_components_are_counted(tmp_path: Path) -> None:
    train = [Sample("a", {"0.jpg": b"x", "s.jpg": b"x"}), Sample("b", {"0.jpg": b"x", "depth.png": b"x"})]
    manifest = write_small(tmp_path, {"train": train, "val": [Sample("a", {"0.jpg": b"x", "s.jpg": b"x"})]})
    assert manifest.components == ["0.jpg"]
    assert manifest.optional_components == {"depth.png": 1, "s.jpg": 2}


def test_bad_input_is_refused_and_nothing_is_committed(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="no samples"):
        write_small(tmp_path / "a", {"train": []})
    sample = Sample("k", {"0.jpg": b"x" * 5000})
    with pytest.raises(DatasetError, match="twice"):
        write_small(tmp_path / "b", {"train": [sample, Sample("l", {"0.jpg": b"x"}), sample]}, shard_bytes=1)
    for name in "ab":
        assert not list((tmp_path / name).rglob("dataset.json"))
    with pytest.raises(DatasetError, match="no dataset"):
        open_dataset(str(tmp_path / "b"))


def test_a_published_dataset_is_never_overwritten(tmp_path: Path) -> None:
    make_dataset(tmp_path)
    with pytest.raises(DatasetError, match="never overwritten"):
        make_dataset(tmp_path, seed=2)


def _drop_sample_from_index(folder: Path) -> None:
    """DALI takes this index and silently reads fewer samples."""
    index = folder / "train/000001.idx"
    index.write_bytes(format_index(parse_index(index.read_bytes(), "")[:-1]))


def _edit(change: Callable[[dict], None]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "dataset.json"
        data = json.loads(path.read_text())
        change(data)
        path.write_text(json.dumps(data))

    return edit


def _count(data: dict) -> None:
    data["shards"][1]["samples"] += 1


def _swap(folder: Path) -> None:
    a, b = folder / "train/000000.idx", folder / "train/000001.idx"
    x, y = a.read_bytes(), b.read_bytes()
    a.write_bytes(y)
    b.write_bytes(x)


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda f: (f / "train/000001.tar").unlink(), "train/000001.tar: missing"),
        (lambda f: (f / "train/000001.idx").unlink(), "train/000001.idx: missing"),
        (lambda f: (f / "train/000001.tar").write_bytes(b"x" * 10), "train/000001.tar: 10 bytes"),
        (_drop_sample_from_index, "train/000001.idx"),
        (_swap, "train/00000.*idx"),
        (_edit(_count), "train/000001.idx: 3 samples, the manifest says 4"),
    ],
)
def test_damage_is_named_before_dali_sees_it(tmp_path: Path, damage: Callable[[Path], None], named: str) -> None:
    make_dataset(tmp_path)
    damage(tmp_path)
    dataset = open_dataset(str(tmp_path))
    with pytest.raises(DatasetError, match=named):
        dataset.tars("train")
    assert len(dataset.tars("val")) == 1  # the other part is sound


@pytest.mark.parametrize(
    "name",
    ["../../etc/000000.tar", "/etc/000000.tar", "train/../../000000.tar", "train/000000.tar/x", "train/0.tar",
     "C:/000000.tar", "%2e%2e/000000.tar", "..%2f000000.tar", "train\\000000.tar",
     ".publish/000000.tar", "train/000000.tar\n"],
)  # fmt: skip
def test_manifest_paths_cannot_leave_the_dataset(tmp_path: Path, name: str) -> None:
    make_dataset(tmp_path)

    def rename(data: dict) -> None:
        data["shards"][0]["name"] = name

    _edit(rename)(tmp_path)
    with pytest.raises(DatasetError, match="shard name"):
        open_dataset(str(tmp_path))


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda data: data["shards"][0].update(bytes=10**30), "shards.0.bytes"),
        (lambda data: data["shards"][0].update(index_bytes=1 << 30), "shards.0.index_bytes"),
        (lambda data: data["shards"][0].update(samples=-1), "shards.0.samples"),
        (lambda data: data["shards"].append(data["shards"][0]), "'train/000000.tar' is listed twice"),
        (lambda data: data.update(shards=[]), "shards"),
        (lambda data: data.update(frames=[]), "frames"),
        (lambda data: data.update(frames=list(range(10_000))), "frames"),
        (lambda data: data.update(size=[1 << 40, 1]), "size"),
        (lambda data: data["split"].update(name="x" * 1000), "split.name"),
        (lambda data: data["split"].update(name="\x1b[2Jeigen"), "split.name"),
        (lambda data: data.update(md2_version="0.1\n"), "md2_version"),
        (lambda data: data["components"].append("0.jpg\x9b"), "components"),
        (lambda data: data["optional_components"].update({"\x00": 1}), "optional_components"),
    ],
)
def test_manifests_that_would_flood_memory_or_steer_a_terminal_are_refused(
    tmp_path: Path, change: Callable[[dict], None], field: str
) -> None:
    make_dataset(tmp_path)
    _edit(change)(tmp_path)
    with pytest.raises(DatasetError, match=rf"dataset\.json: .*{field}"):
        open_dataset(str(tmp_path))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "not JSON"),
        ("[]", "schema version"),
        ('{"schema_version": 2}', "schema version 2"),
        ('{"schema_version": 1}', "md2_version"),
        (b"\xff\xfe\x80", "not JSON"),
        (b"\x80", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ('{"schema_version": ' + "1" * 5000 + "}", "not JSON"),
    ],
)
def test_broken_manifests_are_explained(tmp_path: Path, text: str | bytes, reason: str) -> None:
    (tmp_path / "dataset.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DatasetError, match=reason) as caught:
        open_dataset(str(tmp_path))
    assert "dataset.json" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_part_names_those_there_are(tmp_path: Path) -> None:
    make_dataset(tmp_path)
    with pytest.raises(DatasetError, match="train, val"):
        open_dataset(str(tmp_path)).tars("test")


def test_dali_reads_every_sample_of_a_dataset(tmp_path: Path) -> None:
    from nvidia.dali import fn, pipeline_def, types

    make_dataset(tmp_path, train=5, per_shard=2)
    dataset = open_dataset(str(tmp_path))

    @pipeline_def(batch_size=5, num_threads=1, device_id=None)
    def pipeline() -> object:
        return tuple(
            fn.readers.webdataset(
                paths=[str(p) for p in dataset.tars("train")],
                index_paths=[str(p) for p in dataset.indexes("train")],
                ext=["meta.json", "k.f32"],
                dtypes=[types.UINT8, types.FLOAT],
            )
        )

    built = pipeline()
    built.build()
    meta, intrinsics = built.run()
    assert [json.loads(bytes(meta.at(i)))["frame"] for i in range(5)] == [0, 1, 2, 3, 4]
    assert intrinsics.at(4).tolist() == pytest.approx([37.1, 61.4, 31.5, 15.5])


def test_a_manifest_from_before_jpegs_were_described_stays_as_it_is(tmp_path: Path) -> None:
    """It means standard tables and full chroma, and a copy has the same bytes."""
    packed = make_dataset(tmp_path, train=2)
    text = (tmp_path / "dataset.json").read_text()
    assert not {"jpeg", "intrinsics"} & {*json.loads(text)}
    assert Manifest.from_json(text, "x").to_json() == text
    assert packed.encoding == "JPEG, quality 90, chroma 4:4:4"
    info = JpegInfo(chroma="420", chroma_blur=2, tables="even")
    now = packed.model_copy(update={"quality": None, "jpeg": info})
    assert Manifest.from_json(now.to_json(), "x") == now
    assert now.encoding == "JPEG, even tables, chroma 4:2:0 (smoothed, 2 px)"
    assert now.encoding in card(now)
    guessed = now.model_copy(update={"intrinsics": "guessed"})
    assert Manifest.from_json(guessed.to_json(), "x") == guessed
    assert "a guess from a field of view" in card(guessed)
    assert "a guess" not in card(now)


def test_card_says_what_is_in_it(tmp_path: Path) -> None:
    packed = make_dataset(tmp_path, train=6, val=3, per_shard=3)
    assert (tmp_path / "README.md").read_text() == card(packed)
    shards = [packed.shards[0].model_copy(update={"samples": 1197}), *packed.shards[1:]]
    manifest = packed.model_copy(update={"shards": shards})
    text = card(manifest)
    for words in (
        "| train | 1,200 | 2 |",
        "64 x 32",
        "JPEG, quality 90, chroma 4:4:4",
        "frame t-1",
        "1,203",
        "velodyne",
        "camera",
    ):
        assert words in text
    assert "CC BY-NC-SA" not in text
    assert "CC BY-NC-SA 3.0" in card(manifest, licence=KITTI_LICENCE)
    lidar = manifest.model_copy(update={"depth": DepthInfo(source="improved", convention="lidar_x")})
    assert "lidar's forward x" in card(lidar)


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_the_cards_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """webdataset's reader leaves its files open, hence the filter."""
    make_dataset(tmp_path, train=2)
    monkeypatch.chdir(tmp_path)
    block = re.search(r"    import io.*\n(?:    .*\n)+", (tmp_path / "README.md").read_text())
    assert block is not None
    names: dict[str, Any] = {}
    exec("\n".join(line[4:] for line in block[0].splitlines()), names)
    assert names["image"].size == (64, 32)
    assert names["intrinsics"].tolist() == pytest.approx([37.1, 61.4, 31.5, 15.5])
    stored = list(make_samples(2))[-1].components["depth.png"]
    assert names["depth"].max() > 20, "metres, not levels of an 8-bit picture"
    assert (names["depth"] * 256).round().max() == np.asarray(Image.open(io.BytesIO(stored))).max()
