"""Five readers open one packed folder and see the same pixels: tar, webdataset, DALI, Hugging Face `datasets`, md2."""

from __future__ import annotations

import base64
import importlib.util
import io
import json
import os
import re
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset
import yaml
from PIL import Image
from prep_data import DATE, DRIVE, VAL_DRIVE, read_part, run_pack, write_split
from read_with_datasets import digest

from prep.packing.pack import Packed
from shards.card import card, without_front_matter
from shards.dataset import open_dataset
from shards.manifest import Manifest
from shards.transfer import copy_dataset

READER = Path(__file__).parents[1] / "support" / "read_with_datasets.py"
PARTS = ("test", "train", "val")
IMAGES = ("0.jpg", "m1.jpg", "p1.jpg", "s.jpg")
Pixels = dict[str, dict[str, str]]
"""Sample's key -> component -> hash of its pixels."""


def link_raw(drive: Path, target: Path, without_scans: set[int]) -> Path:
    """The raw tree by links, without the scans of some frames."""
    for path in drive.glob(f"{DATE}/**/*"):
        scan = "velodyne_points/data" in str(path)
        if path.is_file() and not (scan and int(path.stem) in without_scans):
            link = target / path.relative_to(drive)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path)
    return target


@pytest.fixture(scope="module")
def folders(drive: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two datasets of parts train, val and test. Half of the samples lack `depth.png`: in one the first, in one not."""
    top = tmp_path_factory.mktemp("readers")
    split = top / "street"
    write_split(split, *(f"{DATE}/{DRIVE} {frame} {side}" for frame in range(1, 7) for side in "lr"))
    write_split(split, *(f"{DATE}/{VAL_DRIVE} {frame} l" for frame in range(1, 7)), part="val")
    write_split(split, *(f"{DATE}/{VAL_DRIVE} {frame} r" for frame in range(1, 7)), part="test")
    outs = [top / f"packed-{parity}" for parity in (0, 1)]
    for parity, out in enumerate(outs):
        raw = link_raw(drive, top / f"raw-{parity}", {frame for frame in range(8) if frame % 2 == parity})
        packed = run_pack(split, raw, out, size="192x64")
        assert isinstance(packed, Packed)
        assert packed.manifest.optional_components == {"depth.png": 12}
    # The order does not depend on the ground truth.
    assert sorted("depth.png" in read_part(out)[0] for out in outs) == [False, True]
    return outs


def decoded(components: dict[str, Any]) -> dict[str, str]:
    """Component -> hash of its pixels as Pillow decodes them."""
    return {
        name: digest(np.asarray(Image.open(io.BytesIO(components[name])))) for name in components if "f32" not in name
    }


def by_tar(folder: Path, part: str) -> Pixels:
    found: dict[str, dict[str, bytes]] = {}
    for path in sorted((folder / part).glob("*.tar")):
        with tarfile.open(path) as archive:
            for member in archive:
                key, _, name = member.name.partition(".")
                file = archive.extractfile(member)
                assert file is not None
                found.setdefault(key, {})[name] = file.read()
    return {key: decoded({n: d for n, d in parts.items() if n != "meta.json"}) for key, parts in found.items()}


def by_webdataset(folder: Path, part: str) -> Pixels:
    urls = sorted(map(str, (folder / part).glob("*.tar")))
    samples: Iterator[dict[str, Any]] = iter(webdataset.WebDataset(urls, shardshuffle=False))
    return {
        sample["__key__"]: decoded({n: d for n, d in sample.items() if n.endswith(("jpg", "png"))})
        for sample in samples
    }


def by_dali(folder: Path, part: str) -> Pixels:
    """NVIDIA's own reader and decoders, with the `.idx` files."""
    from nvidia.dali import fn, pipeline_def, types

    tars = sorted((folder / part).glob("*.tar"))
    names = (*IMAGES, "depth.png")
    keys = [sample["__key__"] for sample in read_part(folder, part)]

    @pipeline_def(batch_size=len(keys), num_threads=1, device_id=None)
    def pipeline() -> Any:
        parts = fn.readers.webdataset(
            paths=list(map(str, tars)),
            index_paths=[str(tar.with_suffix(".idx")) for tar in tars],
            ext=list(names),
            missing_component_behavior="empty",
        )
        images = [fn.decoders.image(encoded, device="cpu", output_type=types.RGB) for encoded in parts[:-1]]
        return (*images, parts[-1])

    built = pipeline()
    built.build()
    outputs = built.run()
    found: Pixels = {}
    for number, key in enumerate(keys):
        found[key] = {name: digest(outputs[i].at(number)) for i, name in enumerate(IMAGES)}
        if (depth := outputs[-1].at(number)).size:  # DALI has no decoder of 16-bit grey PNG on the CPU
            found[key] |= decoded({"depth.png": depth.tobytes()})
    return found


def by_md2(folder: Path, part: str) -> Pixels:
    from md2.config import DataConfig
    from md2.pipeline import Loader

    data = DataConfig(width=192, height=64, threads=1, stereo=True)
    loader = Loader(
        open_dataset(str(folder)), part, data, batch_size=5, seed=0, train=False, device=torch.device("cpu"), depth=True
    )
    names = {0: "0.jpg", -1: "m1.jpg", 1: "p1.jpg", "s": "s.jpg"}
    found: Pixels = {}
    for batch in loader:
        assert batch.depth is not None and batch.depth_size is not None
        for number, key in enumerate(batch.keys):
            found[key] = {
                name: digest((batch.images[offset][number] * 255).round().byte().permute(1, 2, 0).numpy())  # type: ignore[index]
                for offset, name in names.items()
            }
            height, width = batch.depth_size[number].tolist()
            if height:
                metres = batch.depth[number, 0, :height, :width].numpy()
                found[key]["depth.png"] = digest((metres * 256).round().astype(np.uint16))
    return found


def by_datasets(folders: list[Path], home: Path) -> list[dict[str, Any]]:
    """In a process of its own: the library takes its settings and its caches from the environment when it is loaded."""
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(home)}
    command = [sys.executable, READER, *folders]
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, timeout=300, env={**os.environ, **offline}
    )
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


@pytest.mark.skipif(importlib.util.find_spec("datasets") is None, reason="datasets is not installed: make install")
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_five_readers_see_the_same_pixels(folders: list[Path], tmp_path: Path) -> None:
    """webdataset's reader leaves its files open, hence the filter."""
    for folder, found in zip(folders, by_datasets(folders, tmp_path), strict=True):
        expected = {part: by_tar(folder, part) for part in PARTS}
        assert [len(samples) for samples in expected.values()] == [6, 12, 6]
        assert sum("depth.png" in parts for samples in expected.values() for parts in samples.values()) == 12
        for reader in (by_webdataset, by_dali, by_md2):
            assert {part: reader(folder, part) for part in PARTS} == expected, reader.__name__
        assert {part: {row[0]: row[1] for row in rows} for part, rows in found.items()} == expected
        for part in PARTS:
            assert [row[0] for row in found[part]] == list(expected[part]), "in the order of the shards"
            for row, sample in zip(found[part], read_part(folder, part), strict=True):
                numbers = {name: base64.b64decode(text) for name, text in row[2].items()}
                assert numbers == {name: sample[name] for name in ("k.f32", "t.f32")}
                meta = {name: value for name, value in row[3].items() if value is not None}
                meta["sources"] = {name: path for name, path in meta["sources"].items() if path is not None}
                assert meta == json.loads(sample["meta.json"])
                assert row[4] == ([] if "depth.png" in sample else ["depth.png"])


def front_matter(text: str) -> dict[str, Any]:
    match = re.match(r"---\n(.*?\n)---\n", text, re.DOTALL)
    assert match is not None
    head: dict[str, Any] = yaml.safe_load(match[1])
    return head


def test_the_card_begins_with_what_the_hub_reads(folders: list[Path], tmp_path: Path) -> None:
    folder = folders[0]
    text = (folder / "README.md").read_text()
    head = front_matter(text)
    manifest = Manifest.from_json((folder / "dataset.json").read_bytes(), "x")
    assert head["pretty_name"] == "street"
    assert head["license"] == "unknown"
    assert head["task_categories"] == ["depth-estimation"]
    assert head["size_categories"] == ["n<1K"]
    assert {"webdataset", "stereo"} < set(head["tags"])
    assert [entry["split"] for entry in head["configs"][0]["data_files"]] == list(PARTS)
    size = sum(path.stat().st_size for path in folder.glob("*/*.tar"))
    assert head["dataset_info"]["download_size"] == size
    assert without_front_matter(text).startswith("# street\n")
    assert without_front_matter(without_front_matter(text)) == without_front_matter(text)

    kitti = card(manifest, licence="CC BY-NC-SA 3.0: no commercial use")
    assert front_matter(kitti)["license"] == "cc-by-nc-sa-3.0"
    assert front_matter(card(manifest, licence="Ask us."))["license"] == "other"
    shards = [manifest.shards[0].model_copy(update={"samples": 39_810})]
    odd = manifest.model_copy(
        update={"shards": shards, "split": manifest.split.model_copy(update={"name": "a: #b\"'"})}
    )
    assert front_matter(card(odd))["size_categories"] == ["10K<n<100K"]
    assert front_matter(card(odd))["pretty_name"] == "a: #b\"'"
    copy_dataset(str(folder), str(tmp_path / "val"), parts=["val"])
    chosen = front_matter((tmp_path / "val" / "README.md").read_text())
    assert [entry["name"] for entry in chosen["dataset_info"]["splits"]] == ["val"]
