"""What packing puts into a sample, against the raw files read by other libraries."""

from __future__ import annotations

import hashlib
import io
import json
import re
import shutil
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, JpegImagePlugin
from prep_data import DATE, DRIVE, VAL_DRIVE, files_of, image, long_raw, odometry_raw, read_part, run_pack, write_split

from prep.packing.encode import EVEN_TABLES, ImageFormat, encode, encode_image, versions
from prep.packing.plan import make_plan
from prep.raw.calibration import read_raw_calibration
from prep.raw.files import RawData
from prep.raw.kitti import Kitti
from prep.raw.splits import read_split
from prep.raw.zips import Ref
from prep.request import make_content
from shards.manifest import JpegInfo, Manifest
from shards.sample import Chroma, Codec


def raw_image(drive: Path, frame: int, camera: str, name: str = DRIVE) -> Image.Image:
    with Image.open(drive / DATE / name / f"image_{camera}" / "data" / f"{frame:010d}.png") as picture:
        return picture.convert("RGB")


def resized(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture.resize((96, 32), Image.Resampling.LANCZOS))


def manifest(dataset: Path) -> Manifest:
    return Manifest.from_json((dataset / "dataset.json").read_bytes(), str(dataset))


def test_keys_are_the_lists_lines_in_another_order(dataset: Path, drive: Path) -> None:
    for part in ("train", "val"):
        lines = (drive / "splits" / "sample" / f"{part}_files.txt").read_text().split("\n")[:-1]
        expected = [f"{d.partition('/')[2]}_{s}_{int(f):010d}" for d, f, s in (line.split() for line in lines)]
        keys = [sample["__key__"] for sample in read_part(dataset, part)]
        assert sorted(keys) == sorted(expected)
        assert keys != expected


@pytest.mark.parametrize("codec", ["png", "ppm"])
def test_every_image_is_the_right_frame_of_the_right_camera(drive: Path, tmp_path: Path, codec: Codec) -> None:
    """Lossless, so that each must equal Pillow's own resize of one raw file exactly."""
    run_pack(drive / "splits" / "sample", drive, tmp_path / "out", codec=codec)
    samples = read_part(tmp_path / "out") + read_part(tmp_path / "out", "val")
    assert len(samples) == 18
    for sample in samples:
        match = re.fullmatch(rf"({DATE}_drive_\d+_sync)_([lr])_(\d{{10}})", sample["__key__"])
        assert match is not None
        name, frame = match[1], int(match[3])
        own, partner = ("02", "03") if match[2] == "l" else ("03", "02")
        for component, (camera, number) in {
            f"0.{codec}": (own, frame),
            f"m1.{codec}": (own, frame - 1),
            f"p1.{codec}": (own, frame + 1),
            f"s.{codec}": (partner, frame),
        }.items():
            np.testing.assert_array_equal(image(sample[component]), resized(raw_image(drive, number, camera, name)))


def test_jpeg_is_close_to_the_resized_frame(dataset: Path, drive: Path) -> None:
    sample = next(s for s in read_part(dataset) if s["__key__"].endswith("_l_0000000003"))
    with Image.open(io.BytesIO(sample["0.jpg"])) as picture:
        assert (picture.format, picture.mode, picture.size) == ("JPEG", "RGB", (96, 32))
        grey = np.asarray(picture.convert("L"), dtype=float)
    difference = grey - np.asarray(Image.fromarray(resized(raw_image(drive, 3, "02"))).convert("L"))
    assert np.sqrt(np.mean(difference**2)) < 1.5


def test_intrinsics_translation_and_meta(dataset: Path, drive: Path) -> None:
    rows = dict(
        line.split(": ", 1) for line in (drive / DATE / "calib_cam_to_cam.txt").read_text().splitlines() if ": " in line
    )
    for sample in read_part(dataset):
        side = sample["__key__"].split("_")[-2]
        own, partner = (
            np.array(rows[f"P_rect_{c}"].split(), float) for c in (("02", "03") if side == "l" else ("03", "02"))
        )
        # 192x64 to 96x32: everything halves, about the corner of the pixel grid.
        expected = [own[0] / 2, own[5] / 2, (own[2] + 0.5) / 2 - 0.5, (own[6] + 0.5) / 2 - 0.5]
        np.testing.assert_allclose(np.frombuffer(sample["k.f32"], "<f4"), expected, rtol=1e-6)
        (t,) = np.frombuffer(sample["t.f32"], "<f4")
        assert t == pytest.approx((partner[3] - own[3]) / own[0], rel=1e-6)
        assert t == pytest.approx(-0.54 if side == "l" else 0.54, rel=1e-5)
        meta = json.loads(sample["meta.json"])
        number, camera = int(sample["__key__"][-10:]), "image_02" if side == "l" else "image_03"
        assert (meta["drive"], meta["frame"], meta["side"]) == (f"{DATE}/{DRIVE}", number, side)
        assert meta["native_size"] == [192, 64]
        assert meta["sources"]["m1.jpg"] == f"{DATE}/{DRIVE}/{camera}/data/{number - 1:010d}.png"
        assert meta["sources"]["depth.png"] == f"{DATE}/{DRIVE}/velodyne_points/data/{number:010d}.bin"


def test_depth_is_native_and_metric(dataset: Path, drive: Path) -> None:
    """Against the camera's own ray casting; one pixel down and right by KITTI's convention (see test_velodyne)."""
    for sample in read_part(dataset):
        with Image.open(io.BytesIO(sample["depth.png"])) as picture:
            assert (picture.mode, picture.size) == ("I;16", (192, 64))
            depth = np.asarray(picture) / 256.0
        camera = "02" if "_l_" in sample["__key__"] else "03"
        truth = np.load(drive / DATE / DRIVE / f"true_depth_{camera}" / "data" / f"{sample['__key__'][-10:]}.npy")
        inner, there = depth[:-1, :-1], truth[1:, 1:]
        measured = inner > 0
        assert measured.sum() > 1000
        assert np.mean(np.abs(inner - there)[measured] / inner[measured] < 0.03) > 0.8


def test_the_manifest_says_what_is_there(dataset: Path, drive: Path) -> None:
    found = manifest(dataset)
    lists = read_split(str(drive / "splits" / "sample"))
    assert (found.split.name, found.split.sha256) == ("sample", lists.sha256)
    assert (found.frames, found.stereo, found.size) == ([0, -1, 1], True, (96, 32))
    assert (found.codec, found.quality) == ("jpeg", None)
    assert found.jpeg == JpegInfo(chroma="420", chroma_blur=2, tables="even")
    assert found.depth is not None
    assert (found.depth.source, found.depth.convention) == ("velodyne", "camera_z")
    names = ["0.jpg", "depth.png", "k.f32", "m1.jpg", "meta.json", "p1.jpg", "s.jpg", "t.f32"]
    assert (found.components, found.optional_components, found.skipped) == (names, {}, 0)
    for sample in read_part(dataset):
        assert {name for name in sample if not name.startswith("__")} == set(names)
    for shard in found.shards:
        tar, index = ((dataset / name).read_bytes() for name in (shard.name, shard.index_name))
        assert (len(tar), hashlib.sha256(tar).hexdigest()) == (shard.bytes, shard.sha256)
        assert (len(index), hashlib.sha256(index).hexdigest()) == (shard.index_bytes, shard.index_sha256)


def test_same_input_same_bytes_and_another_seed_another_order(drive: Path, tmp_path: Path, dataset: Path) -> None:
    again = run_pack(drive / "splits" / "sample", drive, tmp_path / "again", parts=["train", "val"])
    assert files_of(tmp_path / "again") == files_of(dataset)
    assert not again.already
    run_pack(drive / "splits" / "sample", drive, tmp_path / "other", parts=["train", "val"], seed=1)
    keys, others = ([s["__key__"] for s in read_part(folder)] for folder in (dataset, tmp_path / "other"))
    assert keys != others
    assert sorted(keys) == sorted(others)


def test_another_zlib_is_another_dataset(monkeypatch: pytest.MonkeyPatch) -> None:
    """It writes the depth maps, so that its version is among what decides the bytes."""
    before = versions.__wrapped__()
    monkeypatch.setattr(zlib, "ZLIB_RUNTIME_VERSION", "0.0")
    assert versions.__wrapped__() != before


def test_every_raw_file_is_planned_once(drive: Path) -> None:
    """Up to four samples hold a frame, and two a scan."""
    lists = read_split(str(drive / "splits" / "sample"))
    content = make_content(lists)
    plan = make_plan(lists, Kitti(RawData([str(drive)]), content.depth), content)
    refs = [ref for job in plan.jobs(Path("unused"), False, "") for i in job.time_steps for ref in i.refs()]
    assert len(refs) == len(set(refs))
    needed = set()
    for line in (line for lines in lists.parts.values() for line in lines):
        own, partner = ("02", "03") if line.side == "l" else ("03", "02")
        frames = [(own, line.frame + offset) for offset in (-1, 0, 1)] + [(partner, line.frame)]
        needed |= {f"{line.drive}/image_{c}/data/{n:010d}.png" for c, n in frames}
    assert sorted(ref.path for ref in refs if ref.path.endswith(".png")) == sorted(needed)
    assert plan.images == len(needed)


def test_mono_without_depth_holds_nothing_else(drive: Path, tmp_path: Path) -> None:
    run_pack(
        drive / "splits" / "sample",
        drive,
        tmp_path / "out",
        frames="0,-2,2",
        stereo=False,
        depth=False,
        parts=["train"],
    )
    found = manifest(tmp_path / "out")
    assert found.components == ["0.jpg", "k.f32", "m2.jpg", "meta.json", "p2.jpg"]
    assert found.depth is None
    assert not found.stereo


def test_native_png_goes_through_untouched(drive: Path, tmp_path: Path) -> None:
    run_pack(drive / "splits" / "sample", drive, tmp_path / "out", size="native", codec="png", parts=["val"])
    assert manifest(tmp_path / "out").size is None
    for sample in read_part(tmp_path / "out", "val"):
        sources = json.loads(sample["meta.json"])["sources"]
        for component in ("0.png", "m1.png", "p1.png", "s.png"):
            assert sample[component] == (drive / sources[component]).read_bytes()
        np.testing.assert_allclose(np.frombuffer(sample["k.f32"], "<f4")[[0, 2]], [111.36, 93.868], rtol=1e-6)


def jpeg_raw(drive: Path, target: Path) -> Path:
    """The raw tree after the usual conversion of its PNGs."""
    for path in sorted((drive / DATE / DRIVE).glob("image_*/data/*.png")):
        new = target / path.relative_to(drive).with_suffix(".jpg")
        new.parent.mkdir(parents=True, exist_ok=True)
        with Image.open(path) as picture:
            picture.save(new, quality=92)
    for path in (drive / DATE).glob("calib_*"):
        shutil.copy(path, target / DATE)
    return target


def test_jpg_frames_are_accepted_and_native_ones_go_through(drive: Path, tmp_path: Path) -> None:
    raw = jpeg_raw(drive, tmp_path / "raw")
    split = write_split(tmp_path, f"{DATE}/{DRIVE} 3 r")
    run_pack(split, raw, tmp_path / "native", size="native")
    (sample,) = read_part(tmp_path / "native")
    source = raw / DATE / DRIVE / "image_03" / "data" / "0000000003.jpg"
    assert sample["0.jpg"] == source.read_bytes()
    assert "depth.png" not in sample  # no scans there: the sample goes without
    run_pack(split, raw, tmp_path / "small", codec="png")
    (sample,) = read_part(tmp_path / "small")
    with Image.open(source) as picture:
        np.testing.assert_array_equal(image(sample["0.png"]), resized(picture.convert("RGB")))


@pytest.mark.parametrize("codec", ["jpeg", "png", "ppm"])
def test_a_camera_held_sideways_is_turned_upright(codec: Codec) -> None:
    """By its EXIF orientation, which decoders on the way to the GPU treat differently: it must not go through."""
    upright = Image.linear_gradient("L").resize((40, 20)).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees clockwise
    buffer = io.BytesIO()
    upright.transpose(Image.Transpose.ROTATE_90).save(buffer, "JPEG", quality=100, subsampling=0, exif=exif)
    ref = Ref("a.jpg", "a.jpg", 1)
    data, native = encode_image(buffer.getvalue(), ref, (40, 20), ImageFormat(None, codec, 100))
    assert native == (40, 20)
    with Image.open(io.BytesIO(data)) as stored:
        assert 0x0112 not in stored.getexif()
        np.testing.assert_allclose(np.asarray(stored, float), np.asarray(upright, float), atol=6)


def png_of_16_bits(values: np.ndarray) -> bytes:
    """(h, w) grey or (h, w, 3) colour, by the standard's own words: Pillow cannot write the latter."""
    height, width = values.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", width, height, 16, 0 if values.ndim == 2 else 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


@pytest.mark.parametrize("shape", [(8, 12), (8, 12, 3)])
def test_of_16_bits_the_upper_8_are_kept(shape: tuple[int, ...]) -> None:
    """Pillow clips 16-bit grey at 255, which makes a frame white; and no decoder downstream shall see 16 bits."""
    values = np.random.default_rng(0).integers(0, 1 << 16, shape)
    ref = Ref("a.png", "a.png", 1)
    data, _ = encode_image(png_of_16_bits(values), ref, (12, 8), ImageFormat(None, "png", 93))
    assert data[24] == 8  # bits a channel, in the header
    with Image.open(io.BytesIO(data)) as stored:
        assert stored.mode == "RGB"
        expected = np.broadcast_to((values >> 8).reshape(8, 12, -1), (8, 12, 3))
        np.testing.assert_array_equal(np.asarray(stored), expected)


def noise(*shape: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8))


@pytest.mark.parametrize(("chroma", "sampling"), [("444", 0), ("420", 2)])
@pytest.mark.parametrize("quality", [93, None])
def test_jpegs_have_the_tables_and_the_chroma_that_were_asked_for(
    quality: int | None, chroma: Chroma, sampling: int
) -> None:
    """Read back from the file; the standard tables are those of Pillow's own quality."""
    standard = io.BytesIO()
    noise(32, 32).save(standard, "JPEG", quality=93)
    with Image.open(standard) as picture:
        expected = picture.quantization if quality else dict(enumerate(EVEN_TABLES))  # type: ignore[attr-defined]
    form = ImageFormat(None, "jpeg", quality, chroma)
    with Image.open(io.BytesIO(encode(noise(32, 32), form))) as picture:
        assert JpegImagePlugin.get_sampling(picture) == sampling
        assert {number: list(table) for number, table in picture.quantization.items()} == {  # type: ignore[attr-defined]
            number: list(table) for number, table in expected.items()
        }
    assert form.jpeg == JpegInfo(
        chroma=chroma, chroma_blur=2 * (chroma == "420"), tables="standard" if quality else "even"
    )


def test_halved_colours_lose_their_noise_and_brightness_nothing() -> None:
    """White noise behind a Gaussian of 2 pixels has 1 / (2 · 2 · sqrt(pi)) of its deviation; flat colours stay."""
    luma = np.random.default_rng(1).integers(60, 190, (64, 96))
    colour = np.random.default_rng(2).normal(128, 12, (64, 96))
    planes = [Image.fromarray(np.asarray(plane, dtype=np.uint8)) for plane in (luma, colour, np.full_like(luma, 120))]
    stored = encode(Image.merge("YCbCr", planes).convert("RGB"), ImageFormat(None, "jpeg"))
    with Image.open(io.BytesIO(stored)) as picture:
        picture.draft("YCbCr", picture.size)
        found = np.asarray(picture, dtype=float)
    assert picture.mode == "YCbCr"
    np.testing.assert_allclose(found[..., 0], luma, atol=4)
    assert found[8:-8, 8:-8, 1].std() == pytest.approx(12 / (4 * np.sqrt(np.pi)), rel=0.25)
    np.testing.assert_allclose(found[..., 2], 120, atol=4)


@pytest.mark.parametrize("quality", [100, None])
@pytest.mark.parametrize("size", [(1, 1), (8, 8), (192, 640)])
def test_jpegs_larger_than_their_pixels_are_written(size: tuple[int, int], quality: int | None) -> None:
    """Pillow's buffer for a JPEG with tables of its own would be too small for noise."""
    picture = noise(*size)
    data = encode(picture, ImageFormat(None, "jpeg", quality, "444"))
    with Image.open(io.BytesIO(data)) as stored:
        assert np.abs(np.asarray(stored, dtype=int) - np.asarray(picture)).mean() < 4


def test_png_comes_before_the_jpg_made_from_it(drive: Path, tmp_path: Path) -> None:
    raw = jpeg_raw(drive, tmp_path / "raw")
    split = write_split(tmp_path, f"{DATE}/{DRIVE} 3 l")
    shutil.copytree(drive / DATE / DRIVE / "image_02", raw / DATE / DRIVE / "image_02", dirs_exist_ok=True)
    run_pack(split, raw, tmp_path / "out")
    sources = json.loads(read_part(tmp_path / "out")[0]["meta.json"])["sources"]
    assert sources["0.jpg"].endswith("image_02/data/0000000003.png")
    assert sources["s.jpg"].endswith("image_03/data/0000000003.jpg")


def test_limit_takes_the_first_lines_of_each_part(drive: Path, tmp_path: Path) -> None:
    run_pack(drive / "splits" / "sample", drive, tmp_path / "out", limit=2, parts=["train", "val"])
    assert {s["__key__"] for s in read_part(tmp_path / "out")} == {f"{DRIVE}_l_0000000001", f"{DRIVE}_r_0000000001"}
    assert len(read_part(tmp_path / "out", "val")) == 2


def test_shards_are_cut_by_size(drive: Path, tmp_path: Path) -> None:
    raw, split = long_raw(drive, tmp_path / "raw", 20)
    run_pack(split, raw, tmp_path / "out", size="native", codec="png", shard_mb=1)
    found = manifest(tmp_path / "out")
    train = found.part("train")
    assert [shard.name for shard in train] == [f"train/{n:06d}.tar" for n in range(len(train))]
    assert len(train) > 1
    largest = max(sum(len(v) for k, v in s.items() if not k.startswith("__")) for s in read_part(tmp_path / "out"))
    for shard in train[:-1]:
        assert 1 << 20 <= shard.bytes < (1 << 20) + largest + 20 * 1024
    assert len(read_part(tmp_path / "out")) == 36


def test_shards_are_cut_by_number(drive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prep.packing.assemble.SAMPLES_PER_SHARD", 5)
    run_pack(drive / "splits" / "sample", drive, tmp_path / "out")
    assert [shard.samples for shard in manifest(tmp_path / "out").part("train")] == [5, 5, 2]


def test_eigens_test_split_packs_what_the_published_numbers_used() -> None:
    def content_of(name: str, **options: object) -> object:
        lists = read_split_named(name)
        return make_content(lists, **options)  # type: ignore[arg-type]

    eigen, benchmark, zhou = (content_of(n) for n in ("eigen", "eigen_benchmark", "eigen_zhou"))
    assert (eigen.frames, eigen.depth, eigen.convention) == ((0,), "velodyne", "lidar_x")  # type: ignore[attr-defined]
    found = (benchmark.frames, benchmark.depth, benchmark.convention)  # type: ignore[attr-defined]
    assert found == ((0,), "improved", "camera_z")
    assert (zhou.frames, zhou.stereo, zhou.convention) == ((0, -1, 1), True, "camera_z")  # type: ignore[attr-defined]
    asked = content_of("eigen", depth_source="improved")
    assert (asked.depth, asked.convention) == ("improved", "camera_z")  # type: ignore[attr-defined]


def read_split_named(name: str) -> object:
    from prep.raw.splits import SplitLists

    return SplitLists(name, {"test": []}, {"test": []}, "0" * 64)


def test_lidar_x_is_the_other_depth_of_the_same_points(drive: Path, tmp_path: Path) -> None:
    split = write_split(tmp_path, f"{DATE}/{DRIVE} 3 l")
    depths = []
    for convention in ("camera_z", "lidar_x"):
        run_pack(split, drive, tmp_path / convention, depth_convention=convention)
        with Image.open(io.BytesIO(read_part(tmp_path / convention)[0]["depth.png"])) as picture:
            depths.append(np.asarray(picture) / 256.0)
        found = manifest(tmp_path / convention)
        assert found.depth is not None
        assert found.depth.convention == convention
    camera_z, lidar_x = depths
    np.testing.assert_array_equal(camera_z > 0, lidar_x > 0)
    # The lidar stands 0.27 m behind the camera and looks the same way.
    calibration = read_raw_calibration(DATE, lambda path: (drive / path).read_bytes(), depth=True)
    behind = -calibration.lidar_projection("l")[2, 3]
    assert np.median((lidar_x - camera_z)[camera_z > 0]) == pytest.approx(behind, abs=0.05)


def improved(drive: Path, raw: Path, folder: str, frame: int, camera: str = "02") -> bytes:
    """A ground-truth PNG of the depth benchmark, made of the true depth by Pillow."""
    truth = np.load(drive / DATE / DRIVE / f"true_depth_{camera}" / "data" / f"{frame:010d}.npy")
    units = np.where(np.isfinite(truth) & (truth < 250), np.rint(truth * 256), 0).astype(np.uint16)
    path = raw / folder / "proj_depth" / "groundtruth" / f"image_{camera}" / f"{frame:010d}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(units).save(path)
    return path.read_bytes()


@pytest.mark.parametrize("folder", [f"train/{DRIVE}", f"val/{DRIVE}", f"{DATE}/{DRIVE}"])
def test_improved_ground_truth_is_copied(drive: Path, tmp_path: Path, folder: str) -> None:
    expected = improved(drive, tmp_path / "gt", folder, 3)
    split = write_split(tmp_path, f"{DATE}/{DRIVE} 3 l", f"{DATE}/{DRIVE} 4 l")
    packed = run_pack(split, [str(tmp_path / "gt"), str(drive)], tmp_path / "out", depth_source="improved")
    samples = {s["__key__"][-1]: s for s in read_part(tmp_path / "out")}
    assert samples["3"]["depth.png"] == expected
    assert "depth.png" not in samples["4"]  # the benchmark leaves out the drives' ends: no reason to lose the images
    assert packed.manifest.optional_components == {"depth.png": 1}
    assert not packed.skipped


def test_improved_ground_truth_in_the_benchmarks_zip(drive: Path, tmp_path: Path) -> None:
    expected = improved(drive, tmp_path / "gt", f"train/{DRIVE}", 3)
    (tmp_path / "raw").mkdir()
    with zipfile.ZipFile(tmp_path / "raw" / "data_depth_annotated.zip", "w") as archive:
        for path in (tmp_path / "gt").rglob("*.png"):
            archive.write(path, path.relative_to(tmp_path / "gt"))
    split = write_split(tmp_path, f"{DATE}/{DRIVE} 3 l")
    run_pack(split, [str(drive), str(tmp_path / "raw")], tmp_path / "out", depth_source="improved")
    assert read_part(tmp_path / "out")[0]["depth.png"] == expected


@pytest.mark.parametrize("inner", ["", "dataset"])
def test_odometrys_layout(drive: Path, tmp_path: Path, inner: str) -> None:
    """The same frames under odometry's names give the same images, intrinsics and depth; poses go into meta.json."""
    odometry_raw(drive, tmp_path / "raw" / inner)
    lines = [(3, "l"), (4, "r")]
    run_pack(write_split(tmp_path / "a", *(f"9 {n} {s}" for n, s in lines)), tmp_path / "raw", tmp_path / "out")
    run_pack(write_split(tmp_path / "b", *(f"{DATE}/{VAL_DRIVE} {n} {s}" for n, s in lines)), drive, tmp_path / "same")
    found = {s["__key__"]: s for s in read_part(tmp_path / "out")}
    poses = np.loadtxt(drive / DATE / VAL_DRIVE / "true_pose_02.txt")
    for expected in read_part(tmp_path / "same"):
        sample = found[expected["__key__"].replace(VAL_DRIVE, "odom_09")]
        for component in ("0.jpg", "m1.jpg", "p1.jpg", "s.jpg", "k.f32", "t.f32", "depth.png"):
            assert sample[component] == expected[component], component
        np.testing.assert_allclose(json.loads(sample["meta.json"])["pose"], poses[int(sample["__key__"][-10:])])


@pytest.mark.kitti
def test_real_frames(kitti: Path, tmp_path: Path) -> None:
    drive_2, drive_9001 = f"{DATE}/{DATE}_drive_0002_sync", f"{DATE}/{DATE}_drive_9001_sync"
    split = write_split(tmp_path, f"{drive_2} 5 l", f"{drive_9001} 10 r", f"{drive_9001} 20 l")
    packed = run_pack(split, kitti / "raw", tmp_path / "out", size="640x192")
    samples = {s["__key__"]: s for s in read_part(tmp_path / "out")}
    sample = samples[f"{DATE}_drive_0002_sync_l_0000000005"]
    np.testing.assert_allclose(
        np.frombuffer(sample["k.f32"], "<f4"),
        [721.5377 * 640 / 1242, 721.5377 * 192 / 375, 610.0593 * 640 / 1242 - 0.5, 173.354 * 192 / 375 - 0.5],
        rtol=1e-6,
    )
    assert np.frombuffer(sample["t.f32"], "<f4")[0] == pytest.approx(-0.53272545)
    with Image.open(io.BytesIO(sample["depth.png"])) as picture:
        assert picture.size == (1242, 375)
    other = samples[f"{DATE}_drive_9001_sync_r_0000000010"]
    assert "depth.png" not in other
    with Image.open(kitti / "raw" / drive_9001 / "image_02" / "data" / "0000000010.png") as picture:
        small = picture.convert("RGB").resize((640, 192), Image.Resampling.LANCZOS)
    grey = np.asarray(Image.fromarray(image(other["s.jpg"])).convert("L"), dtype=float)
    assert np.sqrt(np.mean((grey - np.asarray(small.convert("L"))) ** 2)) < 1.5
    assert [(s.line, s.reason) for s in packed.skipped] == [(f"{drive_9001} 20 l", "drive's end, no neighbour +1")]
