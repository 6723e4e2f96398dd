"""KITTI as people have it on disk: one step away, zipped again, cut, with odd scans, frames and reports."""

from __future__ import annotations

import io
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from prep_data import (
    DATE,
    DRIVE,
    VAL_DRIVE,
    command,
    copy_raw,
    files_of,
    odometry_raw,
    read_part,
    run_pack,
    write_split,
)

from prep.packing.plan import make_plan
from prep.raw.files import RawData
from prep.raw.kitti import Kitti
from prep.raw.splits import read_split
from prep.raw.velodyne import encode_png, points_in_view, read_scan
from prep.request import make_content, parse_frames, refuse_empty
from shards.errors import InputError, SampleError, UsageError

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


# Targets and messages


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
    depth = np.zeros((37, 53), np.uint16)
    random = np.random.default_rng(0)
    for density in (0.0, 0.01, 0.5, 1.0):
        depth = np.where(random.random((37, 53)) < density, random.integers(1, 1 << 16, (37, 53)), 0).astype(np.uint16)
        data = encode_png(depth)
        with Image.open(io.BytesIO(data)) as picture:
            picture.verify()  # the chunks' checksums
        with Image.open(io.BytesIO(data)) as picture:
            assert picture.mode == "I;16"
            np.testing.assert_array_equal(np.asarray(picture), depth)


def test_names_from_outside_do_not_steer_the_terminal(drive: Path, tmp_path: Path) -> None:
    name = f"evil\x1b[31m\u202e{DRIVE}"
    split = write_split(tmp_path / "s", LINES[0], f"{name} 1 x")
    common = ["prep", "--split", split, "--raw", drive, "--size", "48x16", "--workers", "1", "--on-error", "skip"]
    for arguments in (["--check"], ["--out", tmp_path / "out"]):
        done = command(*common, *arguments, cwd=tmp_path)
        assert done.returncode == 4
        assert "evil\\x1b[31m\\u202e" in done.stdout
        assert "\x1b" not in done.stdout + done.stderr
        assert "\u202e" not in done.stdout + done.stderr


def test_a_check_of_nothing_says_what_to_do(drive: Path, tmp_path: Path) -> None:
    lines = [f"{DATE}/{DATE}_drive_{n:04d}_sync 1 l" for n in range(40)]
    done = command("prep", "--split", write_split(tmp_path / "s", *lines), "--raw", tmp_path, "--check", cwd=tmp_path)
    assert done.returncode == 4
    assert "and 36 more drives" in done.stdout
    # Of each line three frames, the partner and a scan.
    assert f"--download to read about {40 * (4 * 0.83 + 1.93):.1f} MB from https://" in done.stdout
    assert max(map(len, done.stdout.splitlines())) < 250
