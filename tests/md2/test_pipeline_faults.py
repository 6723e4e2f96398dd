"""Broken datasets end the epoch with an error that names the sample, and never look like an epoch's end."""

from __future__ import annotations

import io
import re
import resource
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pipeline_data import HEIGHT, WIDTH, Array, config, encode, loader, make_samples, pack, smooth

import shards.stream
from md2.data.headers import MAX_IMAGE_PIXELS, image_size, size_problem
from shards.dataset import LocalDataset
from shards.errors import DatasetError, StorageError
from shards.manifest import Manifest
from shards.sample import Codec, Sample, ppm_header

BROKEN = "drive_009"


def with_component(name: str, change: Callable[[bytes], bytes], **options: Any) -> list[Sample]:
    """23 samples of which one, in the second of five shards, has a changed component."""
    return [
        Sample(sample.key, {**sample.components, name: change(sample.components[name])})
        if sample.key == BROKEN
        else sample
        for sample in make_samples(23, **options)
    ]


@pytest.mark.parametrize(
    "change",
    [
        lambda data: b"\x17" * 500,
        lambda data: data[: len(data) // 2],
        lambda data: data[:300],
        lambda data: data[:300] + b"\xff\xd9",
        lambda data: data[:30],
        lambda data: data[:1],
    ],
    ids=["garbage", "cut in half", "cut in its tables", "tables without pixels", "cut in its header", "one byte"],
)
@pytest.mark.parametrize("train", [True, False], ids=["training", "evaluation"])
def test_an_image_that_cannot_be_decoded_is_named_with_its_shard(
    tmp_path: Path, change: Callable[[bytes], bytes], train: bool
) -> None:
    batches = loader(pack(tmp_path / "data", with_component("m1.jpg", change)), train=train)
    taken = 0
    named = rf"000001\.tar.*{BROKEN}\.m1\.jpg.*(md2 shards verify|pull or pack)"
    with pytest.raises(DatasetError, match=named):
        for _ in batches:
            taken += 1
    assert taken < len(batches)
    # It stays broken: another pass must not begin as if nothing had been.
    with pytest.raises(DatasetError, match=named):
        next(iter(batches))


@pytest.mark.parametrize(
    ("format", "options"),
    [("JPEG", {}), ("JPEG", {"progressive": True, "comment": b"x" * 999}), ("PNG", {"optimize": True}), ("PPM", {})],
)
@pytest.mark.parametrize("more", [b"", b"\0" * 5000], ids=["exact", "more behind"])
def test_whole_images_are_let_through_and_those_cut_short_are_not(
    format: str, options: dict[str, Any], more: bytes
) -> None:
    buffer = io.BytesIO()
    Image.fromarray(smooth(np.random.default_rng(0), 96, 64)).save(buffer, format, **options)
    data = buffer.getvalue()

    def problem(data: bytes) -> str | None:
        return size_problem(np.frombuffer(data, np.uint8), MAX_IMAGE_PIXELS)

    assert problem(data + more) is None
    if format != "PPM":
        assert problem(data[:-40]) and problem(data[:200])


def test_an_image_of_another_size_than_the_manifest_says_is_named(tmp_path: Path) -> None:
    small: Array = smooth(np.random.default_rng(0), 48, 64)
    dataset = pack(tmp_path / "data", with_component("p1.jpg", lambda _: encode(small)))
    with pytest.raises(DatasetError, match=rf"{BROKEN} image 1 has the shape \(64, 48, 3\).*\(64, 96, 3\)"):
        list(loader(dataset))


def header_of(width: int, height: int) -> Callable[[bytes], bytes]:
    return lambda data: ppm_header(width, height) + data[-3 * WIDTH * HEIGHT :]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (header_of(HEIGHT, WIDTH), rf"{BROKEN}\.m1\.ppm does not begin with b'P6\\n96 64"),
        (header_of(WIDTH * 10, HEIGHT * 10), rf"{BROKEN}\.m1\.ppm has 18447 bytes, .*18445"),
        (lambda data: data[:-1], rf"{BROKEN}\.m1\.ppm has 18444 bytes"),
        (lambda data: data + b"\0", rf"{BROKEN}\.m1\.ppm has 18446 bytes"),
        (lambda data: data[:7], rf"{BROKEN}\.m1\.ppm has 7 bytes"),
        (lambda data: b"\x17" * len(data), rf"{BROKEN}\.m1\.ppm does not begin"),
    ],
    ids=["turned", "claims more", "a byte short", "a byte long", "cut in its header", "garbage"],
)
def test_an_uncompressed_image_that_is_not_what_the_manifest_says_is_named(
    tmp_path: Path, change: Callable[[bytes], bytes], told: str
) -> None:
    """No decoder looks at it: a file of the right length would else be taken for a picture whatever it holds."""
    dataset = pack(tmp_path / "data", with_component("m1.ppm", change, codec="ppm"), codec="ppm")
    batches = loader(dataset)
    for _ in range(2):
        with pytest.raises(DatasetError, match=told):
            list(batches)


def test_all_images_of_a_batch_having_another_size_is_no_way_round_that(tmp_path: Path) -> None:
    dataset = pack(tmp_path / "data", make_samples(4, size=lambda number: (48, 64)))
    with pytest.raises(DatasetError, match=r"image 0 has the shape \(64, 48, 3\)"):
        list(loader(dataset))


def claiming(height: int, width: int) -> Callable[[bytes], bytes]:
    """A JPEG whose frame header (marker FF C0: length, precision, height, width) claims another size."""

    def change(data: bytes) -> bytes:
        place = data.index(b"\xff\xc0") + 5
        return data[:place] + struct.pack(">HH", height, width) + data[place + 4 :]

    return change


@pytest.mark.parametrize("size", [(8200, 8200), (65500, 65500)], ids=["200 MB", "13 GB"])
@pytest.mark.parametrize("width", [96, 192], ids=["as stored", "resized"])
def test_an_image_that_claims_more_memory_than_any_camera_needs_is_refused_undecoded(
    tmp_path: Path, size: tuple[int, int], width: int
) -> None:
    dataset = pack(tmp_path / "data", with_component("m1.jpg", claiming(*size)))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DatasetError, match=rf"000001\.tar: {BROKEN}\.m1\.jpg claims {size[0]}x{size[1]} pixels, more"):
        list(loader(dataset, config(width=width)))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 150_000, "kB: nothing of that size was made"


def test_so_is_an_uncompressed_one_that_is_to_be_resized(tmp_path: Path) -> None:
    dataset = pack(tmp_path / "data", with_component("m1.ppm", header_of(65500, 65500), codec="ppm"), codec="ppm")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DatasetError, match=rf"000001\.tar: {BROKEN}\.m1\.ppm claims 65500x65500 pixels"):
        list(loader(dataset, config(width=192)))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 150_000, "kB: nothing of that size was made"


def test_a_depth_map_that_claims_more_memory_is_refused_undecoded(tmp_path: Path) -> None:
    def claim(data: bytes) -> bytes:
        header = data[12:16] + struct.pack(">II", 60000, 60000) + data[24:29]  # a PNG's first chunk, before its CRC
        return data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]

    samples = with_component("depth.png", claim, depth=lambda number: np.full((64, 96), 2560, np.uint16))
    dataset = pack(tmp_path / "data", samples)
    with pytest.raises(DatasetError, match=rf"{BROKEN}\.depth\.png claims 60000x60000 pixels"):
        list(loader(dataset, depth=True, train=False))


@pytest.mark.parametrize("side", [(4000, 3000), (97, 64)])
def test_images_larger_than_the_manifest_says_are_refused_undecoded(tmp_path: Path, side: tuple[int, int]) -> None:
    """All of a read-ahead may be so: 96 images of 36 MB each are not decoded to find that out."""
    large = encode(np.zeros((side[1], side[0], 3), np.uint8))
    samples = [Sample(s.key, {**s.components, "0.jpg": large}) for s in make_samples(96)]
    dataset = pack(tmp_path / "data", samples)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DatasetError, match=rf"drive_\d+\.0\.jpg claims {side[0]}x{side[1]} pixels, more than the 6144"):
        list(loader(dataset))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 150_000, "kB: nothing of that size was made"


@pytest.mark.parametrize(
    ("truth", "told"),
    [
        (np.full((64, 96), 10, np.uint8), "a PNG of 8 bits, grey"),
        (np.full((64, 96, 3), 10, np.uint8), "a PNG of 8 bits, RGB"),
    ],
    ids=["8 bits", "RGB"],
)
def test_depth_that_is_not_16_bits_grey_is_refused_and_not_scaled(tmp_path: Path, truth: Array, told: str) -> None:
    samples = with_component(
        "depth.png", lambda _: encode(truth, "png"), depth=lambda number: np.ones((8, 8), np.uint16)
    )
    dataset = pack(tmp_path / "data", samples)
    with pytest.raises(DatasetError, match=rf"{BROKEN}\.depth\.png is {told}; depth is a PNG of 16 bits, grey"):
        list(loader(dataset, depth=True, train=False))


@given(
    st.binary(max_size=400),
    st.sampled_from([b"", b"\xff\xd8", b"\x89PNG\r\n\x1a\n", b"P6\n", b"\xff\xd8\xff\xe0\x00\x10"]),
)
def test_headers_of_rubbish_are_looked_at_without_harm(rubbish: bytes, magic: bytes) -> None:
    size = image_size(memoryview(magic + rubbish))
    assert size is None or min(size) >= 0


@given(st.integers(1, 300), st.integers(1, 300), st.sampled_from(["jpeg", "png", "ppm"]), st.booleans())
def test_sizes_are_read_as_pillow_wrote_them(width: int, height: int, codec: Codec, more: bool) -> None:
    options: dict[str, Any] = (
        {"comment": b"x" * 9000, "progressive": True, "exif": b"Exif\0\0" + b"\xff" * 999} if more else {}
    )
    data = encode(np.zeros((height, width, 3), np.uint8), codec, **(options if codec == "jpeg" else {}))
    assert image_size(memoryview(data)) == (width, height)


def test_intrinsics_cut_short_are_named(tmp_path: Path) -> None:
    dataset = pack(tmp_path / "data", with_component("k.f32", lambda data: data[:8]))
    with pytest.raises(DatasetError, match=rf"{BROKEN} k\.f32 has 8 bytes instead of 16"):
        list(loader(dataset))


def test_a_grey_image_becomes_rgb(tmp_path: Path) -> None:
    grey = smooth(np.random.default_rng(0))[..., 0]
    dataset = pack(tmp_path / "data", with_component("0.jpg", lambda _: encode(grey, quality=95)))
    batch = [batch for batch in loader(dataset, train=False) if BROKEN in batch.keys][0]  # noqa: RUF015
    image = batch.images[0][batch.keys.index(BROKEN)]
    assert (image[0] == image[1]).all()
    assert (image[0] == image[2]).all()


def test_an_index_with_fewer_samples_than_the_manifest_is_refused(tmp_path: Path) -> None:
    dataset = pack(tmp_path / "data", make_samples(10))
    index = dataset.indexes("train")[0]
    lines = index.read_text().splitlines(keepends=True)
    index.write_text(re.sub(r" \d+", " 4", lines[0]) + "".join(lines[1:-1]))
    with pytest.raises(DatasetError, match=r"000000\.idx: .* bytes, the manifest says"):
        loader(dataset)


def test_a_manifest_that_counts_more_than_the_reader_finds_is_refused(tmp_path: Path) -> None:
    """Sizes and hashes may all be right, and the reader still group files into fewer samples than were written."""
    dataset = pack(tmp_path / "data", make_samples(10))
    unchecked = _Unchecked(dataset.url, dataset.folder, _with_more_samples(dataset), dataset.manifest_sha256)
    with pytest.raises(DatasetError, match=r"000000\.idx: 5 samples, the manifest says 6"):
        list(loader(unchecked))


def test_a_shard_that_is_gone_is_named(tmp_path: Path) -> None:
    dataset = pack(tmp_path / "data", make_samples(10))
    dataset.tars("train")[1].unlink()
    with pytest.raises(DatasetError, match=r"000001\.tar"):
        loader(dataset)


def test_a_tar_that_became_garbage_at_its_size_is_no_silent_epoch(tmp_path: Path) -> None:
    dataset = pack(tmp_path / "data", make_samples(10))
    tar = dataset.tars("train")[1]
    tar.write_bytes(b"\x17" * tar.stat().st_size)
    with pytest.raises(DatasetError, match=r"000001\.tar"):
        list(loader(dataset))


class _Unchecked(LocalDataset):
    """Hands out its files without looking at them."""

    def tars(self, part: str) -> list[Path]:
        return [self.folder / shard.name for shard in self.manifest.part(part)]


def _with_more_samples(dataset: LocalDataset) -> Manifest:
    manifest = dataset.manifest
    shards = [shard.model_copy(update={"samples": shard.samples + 1}) for shard in manifest.shards]
    return manifest.model_copy(update={"shards": shards})


def test_a_shard_that_may_not_be_read_names_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = pack(tmp_path / "data", make_samples(4))
    allowed = shards.stream.open_regular

    def refuse(path: Path) -> Any:
        if path.suffix == ".tar":  # not by chmod, which the superuser does not notice
            raise PermissionError(13, "Permission denied", str(path))
        return allowed(path)

    monkeypatch.setattr(shards.stream, "open_regular", refuse)
    with pytest.raises(StorageError, match=r"train/000000\.tar: cannot be read \(Permission denied\)$"):
        list(loader(dataset))
