"""KITTI as people have it on disk: one step away, re-zipped, cut, in other tools' forms; and hostile input."""

from __future__ import annotations

import io
import re
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from prep_data import DATE, DRIVE, VAL_DRIVE, copy_raw, files_of, odometry_raw, read_part, run_pack, write_split

from prep.packing.encode import ImageFormat, encode_image
from prep.packing.plan import make_plan
from prep.raw.calibration import read_raw_calibration
from prep.raw.files import RawData, read
from prep.raw.kitti import Kitti, open_sequence
from prep.raw.poses import parse_poses, read_poses
from prep.raw.splits import SplitLine, parse_line, part_of, read_split
from prep.raw.velodyne import check_depth_png, points_in_view, read_scan
from prep.raw.zips import Ref
from prep.request import make_content, parse_frames, refuse_empty
from shards.errors import InputError, SampleError, StorageError, UsageError

LINES = [f"{DATE}/{DRIVE} {n} {s}" for n in (2, 3) for s in "lr"]
SCANS = f"{DATE}/{DRIVE}/velodyne_points/data"


@pytest.fixture(scope="module")
def expected(drive: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Files of a dataset of four lines from the raw tree as it should be."""
    folder = tmp_path_factory.mktemp("expected")
    run_pack(write_split(folder / "s", *LINES), drive, folder / "out")
    return files_of(folder / "out")


def empty_message(raw: Path, tmp_path: Path, line: str = LINES[0]) -> str:
    lists = read_split(str(write_split(tmp_path / "empty_split", line)))
    content = make_content(lists)
    data = RawData([str(raw)])
    with pytest.raises(InputError) as caught:
        refuse_empty(make_plan(lists, Kitti(data, content.depth), content), data)
    return str(caught.value)


# Data one step away


def test_zips_that_were_extracted_into_folders_of_their_names(
    drive: Path, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    raw = copy_raw(drive, tmp_path / "all")
    for name in (DRIVE, VAL_DRIVE):
        (tmp_path / "raw" / name / DATE).mkdir(parents=True)
        (raw / DATE / name).rename(tmp_path / "raw" / name / DATE / name)
    (tmp_path / "raw" / f"{DATE}_calib").mkdir()
    (raw / DATE).rename(tmp_path / "raw" / f"{DATE}_calib" / DATE)
    run_pack(write_split(tmp_path / "s", *LINES), tmp_path / "raw", tmp_path / "out")
    assert files_of(tmp_path / "out") == expected


@pytest.mark.parametrize("prefix", ["", "kitti_data/", "./", "a/b/"])
@pytest.mark.parametrize("place", ["kitti.zip", "KITTI.ZIP", "downloads/x.zip", f"{DATE}/x.zip"])
def test_data_that_was_zipped_again(
    drive: Path, tmp_path: Path, expected: dict[str, bytes], prefix: str, place: str
) -> None:
    if prefix and place != "kitti.zip":
        pytest.skip("either is enough")
    path = tmp_path / "raw" / place
    path.parent.mkdir(parents=True)
    with zipfile.ZipFile(path, "w") as archive:
        for file in (file for file in (drive / DATE).rglob("*") if file.is_file()):
            archive.write(file, prefix + file.relative_to(drive).as_posix())
        archive.writestr(f"__MACOSX/{DATE}/{DRIVE}/image_02/data/._0000000001.png", b"x")
    run_pack(write_split(tmp_path / "s", *LINES), tmp_path / "raw", tmp_path / "out")
    assert files_of(tmp_path / "out") == expected
    run_pack(write_split(tmp_path / "s", *LINES), path, tmp_path / "alone")  # --raw names the zip itself
    assert files_of(tmp_path / "alone") == expected


def test_what_is_there_instead_is_said(drive: Path, tmp_path: Path) -> None:
    parent = tmp_path / "parent"
    copy_raw(drive, parent / "kitti_data")
    assert f"drives are one folder deeper: give --raw {parent}/kitti_data" in empty_message(parent, tmp_path)
    assert f"give --raw {parent}/kitti_data;" in empty_message(parent / "kitti_data" / DATE, tmp_path)
    assert f"a single drive: give --raw {parent}/kitti_data" in empty_message(
        parent / "kitti_data" / DATE / DRIVE, tmp_path
    )
    assert "/no/such does not exist" in empty_message(Path("/no/such"), tmp_path)
    (tmp_path / "tar").mkdir()
    (tmp_path / "tar" / "kitti_raw.tar.gz").write_bytes(b"x")
    assert "kitti_raw.tar.gz is not read: unpack it" in empty_message(tmp_path / "tar", tmp_path)
    grey = tmp_path / "grey" / DATE / DRIVE / "image_00" / "data"
    grey.mkdir(parents=True)
    (grey / "0000000000.png").write_bytes(b"x")
    assert "only the grey cameras are there" in empty_message(tmp_path / "grey", tmp_path)
    odometry_raw(drive, tmp_path / "odometry" / "inner")
    assert "give --raw" in empty_message(tmp_path / "odometry", tmp_path, "9 2 l")


def test_a_broken_zip_that_is_not_needed_does_not_matter(
    drive: Path, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    raw = copy_raw(drive, tmp_path / "raw")
    for name in ("notes.zip", "data_depth_annotated.zip", f"{DRIVE}.zip", f"{DRIVE} (1).zip", f"{DATE}_calib.zip"):
        (raw / name).write_bytes(b"half of a download")
    run_pack(write_split(tmp_path / "s", *LINES), raw, tmp_path / "out")
    assert files_of(tmp_path / "out") == expected
    (raw / DATE / DRIVE / "image_03" / "data" / "0000000002.png").unlink()
    with pytest.raises(InputError, match=rf"{DRIVE}\.zip: cut short or not a zip"):  # now it is needed
        run_pack(write_split(tmp_path / "s", *LINES), raw, tmp_path / "out2")
    run_pack(write_split(tmp_path / "s", LINES[0]), raw, tmp_path / "mono", stereo=False)


def test_without_right_cameras_no_stereo_is_proposed(drive: Path, tmp_path: Path) -> None:
    import shutil

    raw = copy_raw(drive, tmp_path / "raw")
    shutil.rmtree(raw / DATE / DRIVE / "image_03")
    with pytest.raises(InputError, match=r"no right camera \(image_03\): give --no-stereo"):
        run_pack(write_split(tmp_path / "s", LINES[0]), raw, tmp_path / "out")


# Calibration, splits, poses of other tools


def test_calibration_in_utf_16_is_read(drive: Path) -> None:
    text = {name: (drive / DATE / name).read_text() for name in ("calib_cam_to_cam.txt", "calib_velo_to_cam.txt")}
    plain, wide = (
        read_raw_calibration(DATE, lambda path, e=encoding: text[path.split("/")[1]].encode(e), depth=True)
        for encoding in ("utf-8", "utf-16")
    )
    np.testing.assert_array_equal(plain.lidar_projection("l"), wide.lidar_projection("l"))


def test_normalised_intrinsics_in_kittis_files_are_refused(drive: Path) -> None:
    text = (drive / DATE / "calib_cam_to_cam.txt").read_text()
    line = next(row for row in text.splitlines() if row.startswith("P_rect_02"))
    other = text.replace(line, "P_rect_02: 5.8e-01 0 5.0e-01 0 0 1.92 5.0e-01 0 0 0 1 0")
    with pytest.raises(InputError, match=r"line 'P_rect_02:': .*normalised; in pixels they are fx: 111.36"):
        read_raw_calibration(DATE, lambda path: other.encode(), depth=False)


D = f"{DATE}/{DATE}_drive_0002_sync"


@pytest.mark.parametrize(
    ("row", "line"),
    [
        (f"{D} 69 l", SplitLine(D, 69, "l")),
        (f"{D}/ 0000000069 3", SplitLine(D, 69, "r")),
        (f"{D}/image_02/data/0000000069.png {D}/image_03/data/0000000069.png", SplitLine(D, 69, "l")),  # Monodepth
        (f"{D}/image_02/data/0000000069.jpg", SplitLine(D, 69, "l")),
        (f"/data/kitti/{D}/image_03/data/0000000069.png x/y.png 721.5377", SplitLine(D, 69, "r")),  # BTS
        (f"{DATE}_drive_0002_sync_03 0000000069", SplitLine(D, 69, "r")),  # SfMLearner
        (f"/{D}/image_02/data/0000000069.png None 721.5377", SplitLine(D, 69, "l")),  # BTS, without ground truth
        (f"{D}/proj_depth/velodyne/image_03/0000000069.npz", SplitLine(D, 69, "r")),  # PackNet
        (f"train/{DATE}_drive_0002_sync/proj_depth/groundtruth/image_02/0000000069.png", SplitLine(D, 69, "l")),
        (f"{DATE}_drive_0002_sync/image_02/data/0000000069.png,x.png", SplitLine(D, 69, "l")),
        (D.replace("/", "\\") + "\\image_02\\data\\0000000069.png", SplitLine(D, 69, "l")),
        ("dataset/sequences/09/image_3/000012.png", SplitLine("9", 12, "r")),
        ("two words 5 r", SplitLine("two words", 5, "r")),
        (f"{D}/image_00/data/0000000069.png", None),
        ("image 0", None),
        ("drive 5 L", None),
        ("drive five l", None),
    ],
)
def test_lists_of_other_projects(row: str, line: SplitLine | None) -> None:
    assert parse_line(row) == line


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=200), st.integers(0, 10**10 - 1), st.sampled_from("lr"))
def test_any_drive_name_survives_a_list(name: str, number: int, side: str) -> None:
    name = " ".join(name.split()).strip("/")
    line = parse_line(f"{name} {number} {side}")
    if name and not name.endswith("/"):
        assert line is not None
        assert (line.drive.rstrip("/"), line.frame, line.side) == (name, number, side)


def test_a_line_of_a_million_spaces_takes_no_time(tmp_path: Path) -> None:
    path = tmp_path / "train_files.txt"
    path.write_text("a" + " " * 1_000_000 + "b\n" + LINES[0] + "\n" + "x" + " 1" * 500_000 + " l\n")
    lists = read_split(str(path))
    assert [len(lists.parts["train"]), len(lists.bad["train"])] == [1, 2]
    assert len(str(lists.bad["train"][0])) < 400


def test_lists_as_windows_and_macos_leave_them(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "train_files.txt").write_bytes("\r\n".join(LINES).encode("utf-16"))
    (folder / "val_files.txt").write_bytes("\r\n".join(LINES[:1]).encode("utf-16-le"))
    (folder / "._train_files.txt").write_bytes(b"\0\5\26\7")
    lists = read_split(str(folder))
    assert {part: len(lines) for part, lines in lists.parts.items()} == {"train": 4, "val": 1}
    assert not any(lists.bad.values())
    assert lists.parts["train"][0] == SplitLine(f"{DATE}/{DRIVE}", 2, "l")


def test_parts_of_lists_that_carry_the_splits_name(tmp_path: Path) -> None:
    assert [part_of(Path(f"{name}.txt")) for name in ("eigen_train_files", "kitti_val_files", "test_files_09")] == [
        "train",
        "val",
        "test_09",
    ]
    write_split(tmp_path, LINES[0])
    (tmp_path / "eigen_train_files.txt").write_text(LINES[1])
    with pytest.raises(InputError, match=r"a second list for the part train"):
        read_split(str(tmp_path))


def poses() -> np.ndarray:
    """Two rigid transforms: the identity, and a quarter turn about y with a shift."""
    turn = np.array([[0.0, 0, 1, 1], [0, 1, 0, 2], [-1, 0, 0, 3]])
    return np.stack([np.eye(4)[:3], turn])


def rows(values: np.ndarray, *, index: bool = False) -> bytes:
    lines = [" ".join(map(str, row.ravel())) for row in values]
    return "".join(f"{n} {line}\n" if index else f"{line}\n" for n, line in enumerate(lines)).encode()


HALF = 0.5**0.5
WHOLE = np.concatenate([poses(), np.tile([[[0.0, 0, 0, 1]]], (2, 1, 1))], axis=1)


@pytest.mark.parametrize(
    "data",
    [
        rows(poses()),
        rows(poses()).replace(b"\n", b"\r\n\r\n") + b"\n\n",
        b"# poses\n" + rows(poses()),
        rows(poses(), index=True),
        rows(WHOLE),
        rows(WHOLE, index=True),
        "\n".join(" ".join(map(str, row)) for row in WHOLE.reshape(-1, 4)).encode(),
        f"1.5 0 0 0 0 0 0 1\n2.5 1 2 3 0 {HALF} 0 {HALF}\n".encode(),
        rows(poses()).replace(b" ", b", "),
        rows(poses()).decode().encode("utf-16"),
    ],
)
def test_pose_files_of_all_forms(data: bytes, tmp_path: Path) -> None:
    np.testing.assert_allclose(parse_poses(data, "p.txt"), poses(), atol=1e-9)
    (tmp_path / "p.txt").write_bytes(data)
    np.testing.assert_allclose(read_poses(tmp_path / "p.txt"), poses(), atol=1e-9)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "no poses in it"),
        (b"1 0 0 0 0 1 0 0 0 0 1 0\n1 2 3\n", r"p\.txt:2: 3 numbers, but 12 in the first line"),
        (b"1 2 3\n", r"p\.txt:1: 3 numbers"),
        (b"1 0 0 0 0 1 0 0 0 0 1 x\n", r"p\.txt:1: not numbers"),
        (b"1 0 0 0 0 1 0 0 0 0 1 nan\n", r"p\.txt:1: a number is not finite"),
        (b"2 0 0 0 0 1 0 0 0 0 1 0\n", r"p\.txt:1: its rotation"),
        (b"1 0 0 0 9 9 9 9\n", r"p\.txt:1: its rotation"),
        (b"0 1 0 0 0 0 1 0 0 0 0 1 0\n2 1 0 0 0 0 1 0 0 0 0 1 0\n", r"p\.txt:2: frame 2 follows frame 0"),
    ],
)
def test_malformed_pose_files_are_named(data: bytes, says: str) -> None:
    with pytest.raises(InputError, match=says):
        parse_poses(data, "p.txt")


def test_a_sequence_with_unusable_poses_is_packed_without_them(drive: Path, tmp_path: Path) -> None:
    raw = odometry_raw(drive, tmp_path / "raw")
    (raw / "poses" / "09.txt").write_text("1 2 3\n")
    run_pack(write_split(tmp_path / "s", "9 3 l"), raw, tmp_path / "out")
    assert b'"pose"' not in read_part(tmp_path / "out")[0]["meta.json"]
    with pytest.raises(InputError, match=r"poses/09\.txt:1: 3 numbers"):  # odometry needs them
        open_sequence([str(raw)], "09")
    (raw / "poses" / "09.txt").write_bytes(rows(np.tile(np.eye(4)[None, :3], (8, 1, 1))))
    mended = run_pack(write_split(tmp_path / "s", "9 3 l"), raw, tmp_path / "out")
    assert mended.url.endswith("-v2")


# Scans


def test_a_scan_cut_at_a_page_is_noticed_by_its_neighbours(drive: Path, tmp_path: Path) -> None:
    raw = copy_raw(drive, tmp_path / "raw")
    path = raw / SCANS / "0000000002.bin"
    path.write_bytes(path.read_bytes()[:4096])
    split = write_split(tmp_path / "s", *LINES)
    with pytest.raises(SampleError, match=r"0000000002\.bin: 256 points, where this drive's scans have about [\d,]+"):
        run_pack(split, raw, tmp_path / "out")
    packed = run_pack(split, raw, tmp_path / "out", on_error="skip")
    assert {(s.line, s.reason) for s in packed.skipped} == {(line, "broken depth") for line in LINES[:2]}


def scan(count: int = 4096) -> np.ndarray:
    points = np.random.default_rng(0).uniform(-50, 50, (count, 4)).astype(np.float32)
    points[:, 3] = np.abs(points[:, 3]) / 50
    return points


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (scan().tobytes() + bytes(4096), "ends in zeros"),
        (bytes(40_960), "ends in zeros"),
        (scan().astype(np.float64).tobytes(), "beyond 1000 m or have a negative reflectance"),
        (np.ascontiguousarray(scan()[:, :3]).tobytes(), "negative reflectance"),
    ],
)
def test_what_is_no_scan_is_refused(data: bytes, says: str) -> None:
    with pytest.raises(SampleError, match=says):
        read_scan(data, "scan.bin")
    assert len(read_scan(scan().tobytes(), "scan.bin")) == 4096


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("share", "noted"), [(0.6, True), (0.75, True), (0.9, False)])
def test_a_scan_with_fewer_points_than_its_neighbours_is_noted(
    drive: Path, tmp_path: Path, share: float, noted: bool
) -> None:
    """Cut too late for a refusal: its beginning is a whole scan of fewer points."""
    raw = copy_raw(drive, tmp_path / "raw")
    scan = raw / SCANS / "0000000003.bin"
    data = scan.read_bytes()
    points = int(share * min((raw / SCANS / f"{n:010d}.bin").stat().st_size for n in (2, 3, 4))) // 16
    scan.write_bytes(data[: 16 * points])
    lists = read_split(str(write_split(tmp_path / "s", *LINES)))
    content = make_content(lists)
    plan = make_plan(lists, Kitti(RawData([str(raw)]), content.depth), content)
    assert [
        f"1 scans with far fewer points than their neighbours (first: frame 3, {points:,}" in n for n in plan.notes
    ] == ([True] if noted else [])


@pytest.mark.parametrize("odometry", [False, True])
def test_deep_frames_in_kittis_layout_are_scaled_by_the_drives_range(
    drive: Path, tmp_path: Path, odometry: bool
) -> None:
    """14 bits in 16: one linear scale for both cameras, from the drive's darkest to its brightest value."""
    raw = odometry_raw(drive, tmp_path / "raw") if odometry else copy_raw(drive, tmp_path / "raw")
    paths = [p for p in sorted(raw.rglob("*.png")) if re.search(r"image_0?[23]/", p.as_posix())]
    shallow = {p: np.asarray(Image.open(p).convert("L")).astype(np.uint16) for p in paths}
    for path, values in shallow.items():
        path.unlink()
        Image.fromarray(values * 40 + 3000).save(path)
    split = write_split(tmp_path / "s", "9 2 l" if odometry else LINES[0])
    run_pack(split, raw, tmp_path / "out", codec="png", size="native")
    (sample,) = read_part(tmp_path / "out")
    number = "000002" if odometry else "0000000002"
    for side, component in (("2", "0.png"), ("3", "s.png")):
        camera = re.compile(rf".*({DRIVE}|sequences/09)/image_0?{side}/.*{number}\.png")
        (path,) = [path for path in paths if camera.fullmatch(path.as_posix())]
        stored = np.asarray(Image.open(io.BytesIO(sample[component])).convert("L")).astype(float)
        inside = (stored > 5) & (stored < 250)
        slope, offset = np.polyfit(shallow[path][inside], stored[inside], 1)
        assert slope >= 1  # 256 / 40 levels without scaling: a slope of 0.16
        np.testing.assert_allclose(stored[inside], slope * shallow[path][inside] + offset, atol=1)


def test_points_that_are_not_numbers_are_dropped_in_silence() -> None:
    points = scan()
    points[::7, 1], points[::11, 0], points[::13, 2] = np.nan, np.inf, -np.inf
    p = np.array([[20.0, -10, 0, -10], [10, 0, -10, -5], [1, 0, 0, -0.5]])
    seen = points_in_view(read_scan(points.tobytes(), "scan"), [p], 40)
    assert np.isfinite(seen).all()
    good = points[np.isfinite(points).all(axis=1)]
    np.testing.assert_array_equal(seen, points_in_view(good, [p], 40))


# Hostile and enormous input


def directory_of(path: Path) -> bytes:
    """A zip of one stored file `x`, with its end record's size and offset of the directory at -10 and -6."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{DATE}/{DRIVE}/image_02/data/0000000000.png", b"x" * 100)
    return path.read_bytes()


def test_absurd_zip_directories_are_one_line(tmp_path: Path) -> None:
    path = tmp_path / f"{DRIVE}.zip"
    whole = directory_of(path)
    raw = f"{DATE}/{DRIVE}/image_02/data"
    for size, offset in ((0xFFFFFFF0, 0), (1 << 30, 0), (10, 5)):
        path.write_bytes(whole[:-10] + struct.pack("<II", size, offset) + whole[-2:])
        data = RawData([str(tmp_path)])
        assert data.files(raw) == {}
        assert "cut short or not a zip" in str(data.problem(raw))
    with path.open("wb") as file:  # a gigabyte that claims to be all directory
        file.truncate(1 << 30)
        file.seek(0, 2)
        file.write(b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, 1, 1, 1 << 30, 0, 0))
    data = RawData([str(tmp_path)])
    assert data.files(raw) == {}
    assert "its directory claims 1,073,741,824 bytes" in str(data.problem(raw))
    name = f"{DRIVE}/image_02".encode()
    flagged = whole.replace(name, name[:-2] + b"\xff\xfe")
    place = flagged.rfind(b"PK\x01\x02")
    path.write_bytes(flagged[: place + 8] + struct.pack("<H", 0x800) + flagged[place + 10 :])  # "names are UTF-8"
    data = RawData([str(tmp_path)])
    assert data.files(raw) == {}
    assert "a name in it is not text" in str(data.problem(raw))


def test_encrypted_members_are_named(tmp_path: Path) -> None:
    path = tmp_path / f"{DRIVE}.zip"
    whole = directory_of(path)
    place = whole.rfind(b"PK\x01\x02")
    path.write_bytes(whole[: place + 8] + struct.pack("<H", 1) + whole[place + 10 :])
    with pytest.raises(SampleError, match="encrypted; unpack this zip yourself"):
        read(RawData([str(tmp_path)]).files(f"{DATE}/{DRIVE}/image_02/data")["0000000000.png"])


def test_a_member_that_inflates_beyond_its_size_takes_no_memory(tmp_path: Path) -> None:
    import tracemalloc

    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    packed = b"".join(deflate.compress(bytes(1 << 24)) for _ in range(24)) + deflate.flush()  # 400 MB of zeros
    path = tmp_path / f"{DRIVE}.zip"
    name = f"{DATE}/{DRIVE}/image_02/data/0000000000.png"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, b"x" * 1000)
        info = archive.infolist()[0]
    header = struct.pack("<4sHHHHHIIIHH", b"PK\x03\x04", 20, 0, 8, 0, 33, info.CRC, len(packed), 1000, len(name), 0)
    entry = struct.pack(
        "<4sHHHHHHIIIHHHHHII",
        *(b"PK\x01\x02", 20, 20, 0, 8, 0, 33, info.CRC, len(packed), 1000, len(name), 0, 0, 0, 0, 0, 0),
    )
    start = len(header) + len(name) + len(packed)
    end = struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, 1, 1, len(entry) + len(name), start, 0)
    path.write_bytes(header + name.encode() + packed + entry + name.encode() + end)
    (ref,) = RawData([str(tmp_path)]).files(f"{DATE}/{DRIVE}/image_02/data").values()
    tracemalloc.start()
    with pytest.raises(SampleError, match=r"damaged in the zip \(checksum differs\)"):
        read(ref)
    assert tracemalloc.get_traced_memory()[1] < 10 << 20
    tracemalloc.stop()


@pytest.mark.parametrize("name", ["calib_cam_to_cam.txt", f"{DRIVE}/velodyne_points/data/0000000002.bin"])
def test_files_of_a_gigabyte_are_not_read(drive: Path, tmp_path: Path, name: str) -> None:
    raw = copy_raw(drive, tmp_path / "raw")
    with (raw / DATE / name).open("ab") as file:
        file.truncate(1 << 30)
    with pytest.raises(InputError, match=rf"{Path(name).name}: 1,073,741,824 bytes"):
        run_pack(write_split(tmp_path / "s", *LINES), raw, tmp_path / "out")


def huge_png(width: int, height: int, colour: int, bits: int) -> bytes:
    """A PNG of a few bytes that claims to be this large."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)), (b"IDAT", zlib.compress(b""))]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in [*chunks, (b"IEND", b"")]
    )


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("size", [(10_000, 10_000), (60_000, 60_000), (13_000, 9_000)])
def test_images_far_larger_than_promised_are_refused_before_they_are_decoded(size: tuple[int, int]) -> None:
    ref = Ref("a.png", "/raw/a.png", 1)
    for expected in ((192, 64), None):
        with pytest.raises(SampleError, match=r"/raw/a\.png: ") as caught:
            encode_image(huge_png(*size, 2, 8), ref, expected, ImageFormat((96, 32), "png"))
        assert "\n" not in str(caught.value)
    with pytest.raises(SampleError, match=r"gt\.png: "):
        check_depth_png(huge_png(*size, 0, 16), (192, 64), "gt.png")


@pytest.mark.parametrize(
    "url",
    [
        "sftp://user:S3CRET@host/kitti",
        "https://host/kitti?X-Amz-Signature=S3CRET",
        "simplecache::s3://KEY:S3CRET@bucket/x",
        "filecache::/S3CRET/x",
        "zip://a.zip::https://S3CRET@host/x",
        "s3://bucket/x#S3CRET",
        "ftp://me:S3/CRET@host",
    ],
)
def test_secrets_in_raw_urls_are_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(UsageError) as caught:
        RawData([url])
    assert "CRET" not in str(caught.value)
    assert caught.value.__cause__ is None


def test_secrets_in_a_mirrors_address_are_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MD2_CACHE", str(tmp_path))
    for url in ("http://me:S3CRET@127.0.0.1:9/lists", "http://127.0.0.1:9/lists?token=S3CRET", "http://a..b/S3CRET?x"):
        with pytest.raises(InputError) as caught:
            read_split("eigen", url=url)
        assert "S3CRET@" not in str(caught.value)
        assert "token" not in str(caught.value)


def test_no_file_locks_is_one_line(drive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno
    import fcntl

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(StorageError, match=r"no file locks on this file system \(No locks available\); give --scratch"):
        run_pack(write_split(tmp_path / "s", *LINES), drive, tmp_path / "out")


@pytest.mark.parametrize(
    "text", ["{", "[]", "null", '{"skipped_lines": 3}', '{"skipped_lines": [{"part": 1}]}', "[" * 100_000, "\udcff"]
)
def test_a_damaged_report_in_the_target_is_no_obstacle(drive: Path, tmp_path: Path, text: str) -> None:
    split = write_split(tmp_path / "s", LINES[0], f"{DATE}/{DRIVE} 99 l")
    first = run_pack(split, drive, tmp_path / "out")
    (tmp_path / "out" / "report.json").write_bytes(text.encode(errors="surrogateescape"))
    again = run_pack(split, drive, tmp_path / "out")
    assert again.already
    assert again.skipped == first.skipped


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("0,1,2000", "2000 is too far; offsets are -1000 to 1000"),
        ("0,1,1", "an offset is repeated"),
        (",".join(map(str, range(101))), "101 offsets; at most 100"),
        ("1,2", "must hold 0"),
    ],
)
def test_impossible_offsets_are_named_before_any_work(text: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        parse_frames(text)
    assert parse_frames("1,0,-1") == (0, 1, -1)


def test_a_new_version_is_announced_before_the_work(drive: Path, tmp_path: Path) -> None:
    from prep.packing.pack import pack
    from prep.packing.plan import make_plan
    from prep.raw.kitti import Kitti
    from prep.workers import start_workers

    told: list[str] = []

    class Progress:
        def phase(self, label: str, total: int, unit: str) -> None:
            told.append(label)

        def advance(self, count: int) -> None:
            pass

        def note(self, text: str) -> None:
            told.append(text)

    split = write_split(tmp_path / "s", *LINES)
    run_pack(split, drive, tmp_path / "out")
    lists = read_split(str(split))
    content = make_content(lists, size="48x16")
    plan = make_plan(lists, Kitti(RawData([str(drive)]), content.depth), content)
    with start_workers(1) as workers:
        pack(plan, lists, str(tmp_path / "out"), tmp_path / "scratch", workers, progress=Progress())
    place = f"{tmp_path}/out"
    assert told[0] == f"another dataset is at {place} and stays as it is; this one goes to {place}-v2"
    assert told[1] == "encoding frames"


def test_a_depth_map_is_read_back_by_another_library() -> None:
    from prep.raw.velodyne import SparseDepth

    depth = np.zeros((37, 53), np.uint16)
    random = np.random.default_rng(0)
    for density in (0.0, 0.01, 0.5, 1.0):
        depth = np.where(random.random((37, 53)) < density, random.integers(1, 1 << 16, (37, 53)), 0).astype(np.uint16)
        pixels = np.flatnonzero(depth)
        data = SparseDepth(pixels, depth.ravel()[pixels], (53, 37)).png()
        with Image.open(io.BytesIO(data)) as picture:
            picture.verify()  # the chunks' checksums
        with Image.open(io.BytesIO(data)) as picture:
            assert picture.mode == "I;16"
            np.testing.assert_array_equal(np.asarray(picture), depth)


def test_names_from_outside_do_not_steer_the_terminal(drive: Path, tmp_path: Path) -> None:
    from test_prep_faults import md2

    name = f"evil\x1b[31m\u202e{DRIVE}"
    split = write_split(tmp_path / "s", LINES[0], f"{name} 1 x")
    common = ["prep", "--split", split, "--raw", drive, "--size", "48x16", "--workers", "1", "--on-error", "skip"]
    for arguments in (["--check"], ["--out", tmp_path / "out"]):
        done = md2(*common, *arguments, cwd=tmp_path)
        assert done.returncode == 4
        assert "evil\\x1b[31m\\u202e" in done.stdout
        assert "\x1b" not in done.stdout + done.stderr
        assert "\u202e" not in done.stdout + done.stderr


def test_a_check_of_nothing_says_what_to_do(drive: Path, tmp_path: Path) -> None:
    from test_prep_faults import md2

    lines = [f"{DATE}/{DATE}_drive_{n:04d}_sync 1 l" for n in range(40)]
    done = md2("prep", "--split", write_split(tmp_path / "s", *lines), "--raw", tmp_path, "--check", cwd=tmp_path)
    assert done.returncode == 4
    assert "and 36 more drives" in done.stdout
    assert "--download to read them from https://" in done.stdout
    assert max(map(len, done.stdout.splitlines())) < 250
