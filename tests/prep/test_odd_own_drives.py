"""Own drives as people have them: what does not fit is named, clips are told apart, deep frames keep their contrast."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from prep_data import image, read_part, write_split

from prep.packing.pack import Packed, pack
from prep.raw.camera import parse_camera
from prep.raw.clips import clip_starts, counter_of
from prep.raw.files import RawData
from prep.raw.folder import FolderLayout
from prep.raw.velodyne import depth_png
from prep.request import make_request
from prep.workers import start_workers
from shards.errors import InputError, SampleError, UsageError

CAMERA = {"width": 48, "height": 32, "fx": 40.0, "fy": 40.0, "cx": 23.5, "cy": 15.5}


def write_camera(folder: Path, name: str = "camera.yaml", **fields: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("".join(f"{key}: {value}\n" for key, value in (CAMERA | fields).items()))


def frame(number: int) -> Image.Image:
    """A grey ramp whose brightness is its number: 20 + 5 n to 60 + 5 n."""
    ramp = np.linspace(20, 60, 48)[None].repeat(32, 0) + 5 * number
    return Image.fromarray(ramp.astype(np.uint8)).convert("RGB")


def write_frames(folder: Path, names: list[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        frame(number).save(folder / name)


def simple(tmp_path: Path, count: int = 6, **fields: Any) -> Path:
    """tmp/raw with one drive `d` of left frames 0 … count-1."""
    write_camera(tmp_path / "raw", **fields)
    write_frames(tmp_path / "raw" / "d" / "left", [f"{n:03d}.png" for n in range(count)])
    return tmp_path / "raw"


def run(raw: Path, out: Path, **options: Any) -> Packed:
    content = {"size": "native", "frames": None, "stereo": None, "depth": True, "depth_source": None, "codec": "png"}
    fixed = {"dataset": "folder", "split": None, "splits": None, "raw": [str(raw)], "download": None, "out": str(out)}
    request = make_request(**{**fixed, **content, **options})  # type: ignore[arg-type]
    notes.clear()
    plan = request.plan("stop", None)
    notes.extend(plan.notes)
    with start_workers(1) as workers:
        return pack(plan, request.lists, str(out), out.with_name("scratch"), workers)


notes: list[str] = []


# What lies beside the frames


def test_right_frames_without_a_baseline_are_refused(tmp_path: Path) -> None:
    raw = simple(tmp_path)
    write_frames(raw / "d" / "right", [f"{n:03d}.png" for n in range(6)])
    with pytest.raises(InputError, match=r"d/right: .*no baseline; add it .*--no-stereo"):
        run(raw, tmp_path / "out")
    assert not run(raw, tmp_path / "out", stereo=False).manifest.stereo


@pytest.mark.parametrize(
    ("left", "right"),
    [("{:03d}_left.png", "{:03d}_right.png"), ("{:03d}.png", "{:03d}_R.png"), ("x_{:03d}_leftImg8bit.png",) * 2],
)
def test_pairs_named_left_and_right_are_pairs(tmp_path: Path, left: str, right: str) -> None:
    right = right.replace("leftImg8bit", "rightImg8bit")
    write_camera(tmp_path / "raw", baseline=0.5)
    write_frames(tmp_path / "raw" / "d" / "left", [left.format(n) for n in range(4)])
    write_frames(tmp_path / "raw" / "d" / "right", [right.format(n) for n in range(4)])
    assert run(tmp_path / "raw", tmp_path / "out").manifest.stereo
    for sample in read_part(tmp_path / "out"):  # frame n of both cameras shows the same picture
        np.testing.assert_array_equal(image(sample["s.png"]), image(sample["0.png"]))


def test_right_frames_under_other_names_are_refused(tmp_path: Path) -> None:
    raw = simple(tmp_path, baseline=0.5)
    write_frames(raw / "d" / "right", [f"image{n + 100}.png" for n in range(6)])
    with pytest.raises(InputError, match=r"d/right: none of its 6 frames has a left frame's name .*--no-stereo"):
        run(raw, tmp_path / "out")


@pytest.mark.parametrize("extension", ["exr", "h5", "jpg"])
def test_depth_in_another_format_is_refused(tmp_path: Path, extension: str) -> None:
    raw = simple(tmp_path)
    (raw / "d" / "depth").mkdir()
    (raw / "d" / "depth" / f"000.{extension}").write_bytes(b"x")
    (raw / "d" / "depth" / ".DS_Store").write_bytes(b"x")
    with pytest.raises(InputError, match=rf"d/depth: 1 files \.{extension}; ground truth is read as 16-bit PNG"):
        run(raw, tmp_path / "out")
    assert run(raw, tmp_path / "out", depth=False).manifest.depth is None


def test_depth_under_other_names_is_refused(tmp_path: Path) -> None:
    raw = simple(tmp_path)
    (raw / "d" / "depth").mkdir()
    Image.fromarray(np.full((32, 48), 256, np.uint16)).save(raw / "d" / "depth" / "depth_000.png")
    with pytest.raises(InputError, match=r"d/depth: none of its 1 maps has a frame's name"):
        run(raw, tmp_path / "out")


def metres(frame: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """0.5 m more in each column, from the frame's number on."""
    return (frame + np.arange(48, dtype=np.float32) / 2)[None].repeat(32, 0)


@pytest.mark.parametrize("extension", ["npy", "tif", "tiff"])
@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
def test_depth_in_floating_point_metres_is_packed(tmp_path: Path, extension: str, kind: type) -> None:
    raw = simple(tmp_path)
    (raw / "d" / "depth").mkdir()
    for n in range(6):
        depth = metres(n).astype(kind)
        depth[0, :5] = np.inf, np.nan, 0, 255, 300  # three without a measurement, and one too far for the PNG
        path = raw / "d" / "depth" / f"{n:03d}.{extension}"
        if extension == "npy":
            np.save(path, depth[None] if n % 2 else depth)
        else:
            Image.fromarray(depth.astype(np.float32)).save(path)
    run(raw, tmp_path / "out", frames="0")
    samples = read_part(tmp_path / "out")
    assert samples
    for sample in samples:
        expected = metres(int(sample["__key__"][-10:])) * 256
        expected[0, :5] = 0, 0, 0, 255 * 256, 0
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(sample["depth.png"]))), expected)


def npy(values: np.ndarray[Any, Any]) -> bytes:
    file = io.BytesIO()
    np.save(file, values, allow_pickle=True)
    return file.getvalue()


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("x.npy", npy(np.full((32, 48), 9)), r"int64 \(32, 48\); floating-point metres \(32, 48\)"),
        ("x.npy", npy(np.full((48, 32), 9.0)), r"float64 \(48, 32\); floating-point metres \(32, 48\)"),
        ("x.npy", npy(np.full((32, 48), -1.0)), "negative depth; write 0"),
        ("x.npy", npy(np.full((32, 48), 9000.0)), "its median is 9,000, but metres are needed.*millimetres"),
        ("x.npy", npy(np.full((32, 48), 9.0))[:-9], "not an .npy, or damaged"),
        ("x.npy", npy(np.full((32, 48), 9.0)).replace(b"(32, 48)", b"(1<<60,)"), "not an .npy, or damaged"),
        ("x.npy", npy(np.array([None] * 3)), "object"),
        ("x.npy", b"", "not an .npy, or damaged"),
        ("x.tif", b"II*\0", "broken depth map"),
    ],
)
def test_depth_that_is_no_metres_is_refused(name: str, data: bytes, says: str) -> None:
    with pytest.raises(SampleError, match=rf"{name}: .*{says}|{says}") as caught:
        depth_png(data, (48, 32), name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("folder", "key"), [("Right", "right"), ("image_03", "right"), ("depth_gt", "depth"), ("disp", "depth")]
)
def test_a_folder_that_would_be_ignored_is_named(tmp_path: Path, folder: str, key: str) -> None:
    raw = simple(tmp_path)
    write_frames(raw / "d" / folder, [f"{n:03d}.png" for n in range(6)])
    with pytest.raises(InputError, match=rf"d/{folder}: this folder would be ignored; write {key}: {folder} in camera"):
        run(raw, tmp_path / "out")
    run(raw, tmp_path / "out", stereo=False, depth=False)


def test_a_baseline_without_right_frames_is_noted(tmp_path: Path) -> None:
    run(simple(tmp_path, baseline=0.5), tmp_path / "out")
    assert "d: camera.yaml has a baseline, but there are no right frames in d/right" in notes


# Clips and short drives


def test_no_sample_reaches_across_clips(tmp_path: Path) -> None:
    write_camera(tmp_path / "raw")
    names = [f"clip{c}_{n:04d}.png" for c in "AB" for n in range(5)]
    write_frames(tmp_path / "raw" / "d" / "left", names)
    run(tmp_path / "raw", tmp_path / "out")
    assert any("2 clips (the second begins with clipB_0000)" in note for note in notes)
    # Each clip of five has three frames with both neighbours; numbers count on through the folder.
    keys = sorted(s["__key__"] for part in ("train",) for s in read_part(tmp_path / "out", part))
    assert keys == [f"d_l_{n:010d}" for n in (1, 2, 3, 6, 7, 8)]
    split = write_split(tmp_path / "split", *(f"d {n} l" for n in range(10)))
    packed = run(tmp_path / "raw", tmp_path / "listed", split=str(split))
    assert {s.line: s.reason for s in packed.skipped} == {
        f"d {n} l": f"drive's end, no neighbour {'-1' if n in (0, 5) else '+1'}" for n in (0, 4, 5, 9)
    }
    assert not any(skip.wanted for skip in packed.skipped)


CITY = [f"aachen_{clip:06d}_{n:06d}_leftImg8bit" for clip in range(3) for n in range(19, 25)]


@pytest.mark.parametrize(
    ("stems", "starts"),
    [
        (CITY, [6, 12]),
        ([f"{n:06d}" for n in range(20)], []),
        ([f"{n:06d}" for n in (0, 1, 2, 50, 51, 52, 90, 91)], []),  # dropped frames are no clips
        ([f"{1403636579763555584 + 50_000_000 * n + n % 3 * 977}" for n in range(40)], []),
        ([f"{1305031100 + n // 30}.{n % 30 * 33333:06d}" for n in range(90)], []),  # seconds and microseconds
        ([f"2024-01-05_12-{n // 60:02d}-{n % 60:02d}" for n in range(150)], []),  # a time of day
        ([f"part{n // 10}_{n:04d}" for n in range(30)], []),  # a counter that goes on
        ([f"{name}_{n}" for name in ("day", "night") for n in range(1, 5)], [4]),
        (["alpha", "beta", "gamma", "delta"], []),
        (["0"], []),
    ],
)
def test_clips_are_told_by_names(stems: list[str], starts: list[int]) -> None:
    assert clip_starts(stems) == starts


def test_the_counter_is_the_number_that_varies() -> None:
    assert counter_of(CITY[:6]) == list(range(19, 25))
    assert counter_of(["a1", "b22", "c"]) == [1, 22, None]


def test_a_short_drive_trains_as_a_whole_and_says_that_there_is_no_val(tmp_path: Path) -> None:
    packed = run(simple(tmp_path, 12), tmp_path / "out")
    assert packed.manifest.parts == ["train"]
    assert sorted(int(s["__key__"][-10:]) for s in read_part(tmp_path / "out")) == list(range(1, 11))
    assert "no val part: a tenth of 12 frames" in notes[0]


def test_of_many_short_drives_the_last_is_for_validation(tmp_path: Path) -> None:
    write_camera(tmp_path / "raw")
    for name in ("a", "b", "c", "d"):
        write_frames(tmp_path / "raw" / name / "left", [f"{n}.png" for n in range(6)])
    run(tmp_path / "raw", tmp_path / "out")
    train, val = ({s["__key__"][0] for s in read_part(tmp_path / "out", part)} for part in ("train", "val"))
    assert (train, val) == ({"a", "b", "c"}, {"d"})
    assert len(read_part(tmp_path / "out", "val")) == 4
    assert not notes


# Deep frames


@pytest.mark.parametrize("bits", [10, 12, 14])
def test_deep_grey_frames_are_scaled_by_the_drives_range(tmp_path: Path, bits: int) -> None:
    """One scale for the drive: contrast is kept within a frame, and brightness between frames."""
    write_camera(tmp_path / "raw")
    (tmp_path / "raw" / "d" / "left").mkdir(parents=True)
    top = (1 << bits) - 1
    values = [np.linspace(0, top * (n + 1) / 4, 48).round()[None].repeat(32, 0) for n in range(4)]
    for n, value in enumerate(values):
        Image.fromarray(value.astype(np.uint16)).save(tmp_path / "raw" / "d" / "left" / f"{n}.png")
    run(tmp_path / "raw", tmp_path / "out", frames="0")
    assert f"d: frames of 16 bits; their values 0 to {top} become 0 to 255" in notes
    for sample in read_part(tmp_path / "out"):
        expected = values[int(sample["__key__"][-10:])] * 255 / top
        np.testing.assert_allclose(image(sample["0.png"])[..., 0], expected, atol=1)


def test_frames_that_fill_16_bits_keep_their_upper_8(tmp_path: Path) -> None:
    write_camera(tmp_path / "raw")
    (tmp_path / "raw" / "d" / "left").mkdir(parents=True)
    values = np.linspace(0, 65535, 48).round()[None].repeat(32, 0).astype(np.uint16)
    for n in range(3):
        Image.fromarray(values).save(tmp_path / "raw" / "d" / "left" / f"{n}.png")
    run(tmp_path / "raw", tmp_path / "out", frames="0")
    np.testing.assert_array_equal(image(read_part(tmp_path / "out")[0]["0.png"])[..., 0], values >> 8)


def test_a_narrow_range_far_up_is_scaled_too(tmp_path: Path) -> None:
    """Upper 8 bits of 40000 to 41000 would be 5 grey levels."""
    write_camera(tmp_path / "raw")
    (tmp_path / "raw" / "d" / "left").mkdir(parents=True)
    values = np.linspace(40000, 41000, 48).round()[None].repeat(32, 0)
    for n in range(3):
        Image.fromarray(values.astype(np.uint16)).save(tmp_path / "raw" / "d" / "left" / f"{n}.png")
    run(tmp_path / "raw", tmp_path / "out", frames="0")
    found = image(read_part(tmp_path / "out")[0]["0.png"])[..., 0]
    np.testing.assert_allclose(found, (values - 40000) * 255 / 1000, atol=1)


# Cameras


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        (
            {"fx": 0.58, "fy": 1.92, "cx": 0.5, "cy": 0.5},
            r"in pixels they are fx: 27.84, fy: 61.44, cx: 24",
        ),
        ({"fx": 4800.0}, "fx = 4800 is not a focal length"),
        ({"fx": 1e308}, "fx = 1e"),
        ({"fx": 1e-320, "fy": 1e-320}, "fx = 9.99989e-321 cannot be pixels"),
        ({"cx": 900.0}, r"cx = 900 lies outside the 48x32 image"),
        ({"cy": -40}, r"cy = -40 lies outside"),
        ({"cx": 0.5, "cy": 0.5}, r"look normalised; in pixels they are cx: 24, cy: 16"),
        ({"k1": -0.28}, r"k1: a lens is written as distortion: \[k1"),
        ({"distortion_model": "equidistant"}, "distortion_model: a lens is written as"),
        ({"left": "../../private"}, "left: .*a folder inside the drive's"),
        ({"depth": "/etc"}, "depth: .*a folder inside the drive's"),
        ({"fx": "abc"}, r"fx: .*it is 'abc'"),
    ],
)
def test_an_impossible_camera_is_refused(tmp_path: Path, fields: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says) as caught:
        run(simple(tmp_path, **fields), tmp_path / "out")
    assert "\n" not in str(caught.value)


def test_camera_files_of_other_tools() -> None:
    plain = "".join(f"{key}: {value}\n" for key, value in CAMERA.items())
    expected = parse_camera(plain.encode(), "camera.yaml")
    assert parse_camera(b"%YAML:1.0\n---\n" + plain.encode(), "camera.yaml") == expected
    assert parse_camera(plain.encode("utf-16"), "camera.yaml") == expected
    assert parse_camera(b"\xef\xbb\xbf" + plain.replace("\n", "\r\n").encode(), "camera.yaml") == expected


@pytest.mark.parametrize("text", ["[" * 5000, "a: " + "{a: " * 5000, "x: &a [1]\n" * 3 + "- y"])
def test_nested_yaml_is_one_line(text: str) -> None:
    with pytest.raises(InputError, match=r"camera\.yaml"):
        parse_camera(text.encode(), "camera.yaml")


def test_a_camera_file_of_many_megabytes_is_not_read(tmp_path: Path) -> None:
    raw = simple(tmp_path)
    with (raw / "camera.yaml").open("ab") as file:
        file.truncate(100 << 20)
    with pytest.raises(InputError, match=r"camera\.yaml: 104,857,600 bytes"):
        run(raw, tmp_path / "out")


# Nothing found


def no_drives(raw: Path) -> str:
    with pytest.raises(InputError, match="no drives") as caught:
        FolderLayout(RawData([str(raw)])).drives()
    return str(caught.value)


def test_drives_that_are_not_found_say_what_is_there(tmp_path: Path) -> None:
    write_camera(tmp_path / "a")
    write_frames(tmp_path / "a" / "run", ["1.png"])
    assert "frames lie in run: write left: . if run is the drive" in no_drives(tmp_path / "a")
    write_camera(tmp_path / "b")
    write_frames(tmp_path / "b" / "run" / "cam0", ["1.png"])
    assert "write left: cam0 in camera.yaml if run is the drive" in no_drives(tmp_path / "b")
    write_camera(tmp_path / "c")
    write_frames(tmp_path / "c" / "run" / "left", ["1.bmp"])
    assert "run/left/1.bmp: frames are read as PNG or JPEG; convert them" in no_drives(tmp_path / "c")
    write_camera(tmp_path / "d", name="camera.yml")
    write_frames(tmp_path / "d" / "run" / "left", ["1.png"])
    assert "there is no camera.yaml; rename camera.yml to camera.yaml" in no_drives(tmp_path / "d")
    write_camera(tmp_path / "e")
    write_frames(tmp_path / "e" / "1" / "2" / "3" / "4" / "5" / "6" / "left", ["1.png"])
    assert "frames lie too deep, in 1/2/3/4/5/6/left" in no_drives(tmp_path / "e")
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "drive.mp4").write_bytes(b"x")
    assert "there is no camera.yaml; it holds width, height, fx, fy, cx, cy, or only fov" in no_drives(tmp_path / "f")
    assert f"{tmp_path / 'none'} does not exist" in no_drives(tmp_path / "none")


# Names and paths


def test_names_in_any_bytes_are_packed(tmp_path: Path) -> None:
    write_camera(tmp_path / "raw")
    folder = tmp_path / "raw" / os.fsdecode(b"stra\xdfe") / "left"
    folder.mkdir(parents=True)
    for n in range(4):
        buffer = io.BytesIO()
        frame(n).save(buffer, "PNG")
        (folder / os.fsdecode(b"%d\xe9.png" % n)).write_bytes(buffer.getvalue())
    run(tmp_path / "raw", tmp_path / "out")
    samples = read_part(tmp_path / "out")
    assert len(samples) == 2
    assert all(s["__key__"].isascii() and s["__key__"].startswith("stra_e_") for s in samples)
    assert rb"stra\\xdfe/left/1\\xe9.png" in samples[0]["meta.json"] + samples[1]["meta.json"]
    split = tmp_path / "train_files.txt"
    split.write_bytes(b"stra\xdfe 1 l\nstra\xdfe 0 l\n")
    listed = run(tmp_path / "raw", tmp_path / "listed", split=str(split))
    assert listed.skipped[0].line == r"stra\xdfe 0 l"
    assert len(read_part(tmp_path / "listed")) == 1


@pytest.mark.parametrize("name", ["../private/photos", "/etc", "d/../../private", "~/x"])
def test_a_split_line_stays_inside_the_raw_location(tmp_path: Path, name: str) -> None:
    raw = simple(tmp_path)
    write_frames(tmp_path / "private" / "photos" / "left", ["0.png", "1.png", "2.png"])
    with pytest.raises(InputError, match="a drive is a folder inside --raw"):
        run(raw, tmp_path / "out", split=str(write_split(tmp_path / "s", f"{name} 1 l")))


def test_links_that_lead_outside_need_an_option(tmp_path: Path) -> None:
    raw = simple(tmp_path)
    write_frames(tmp_path / "private" / "left", [f"{n:03d}.png" for n in range(4)])
    (raw / "linked").symlink_to(tmp_path / "private")
    with pytest.raises(InputError, match=r"a link leads out of .*--follow-links"):
        run(raw, tmp_path / "out")
    run(raw, tmp_path / "out", follow_links=True)
    assert {s["__key__"].rpartition("_l_")[0] for s in read_part(tmp_path / "out")} == {"d", "linked"}
    (raw / "linked").unlink()
    (raw / "d" / "left" / "001.png").unlink()
    (raw / "d" / "left" / "001.png").symlink_to(tmp_path / "private" / "left" / "001.png")
    with pytest.raises(InputError, match=r"001\.png: a link leads out of"):
        run(raw, tmp_path / "out2")
    (raw / "d" / "left" / "001.png").unlink()
    (raw / "d" / "left" / "001.png").symlink_to("002.png")  # a link that stays inside
    run(raw, tmp_path / "out2")


def test_options_for_kitti_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--download is for KITTI"):
        run(simple(tmp_path), tmp_path / "out", download="public")


def test_a_drive_that_links_give_other_names_is_packed_once(tmp_path: Path) -> None:
    """One of them by way of a link to the folder above it."""
    raw = simple(tmp_path)
    (raw / "week").mkdir()
    (raw / "d").rename(raw / "week" / "d")
    (raw / "x").symlink_to("week/d")
    (raw / "y").symlink_to("week")
    write_frames(raw / "z" / "left", ["0.png", "1.png", "2.png"])
    assert FolderLayout(RawData([str(raw)])).drives() == ["week/d", "z"]
    second = RawData([str(tmp_path / "none"), str(raw)])
    assert FolderLayout(second).drives() == ["week/d", "z"]
