"""Broken and missing input: one line that names the file and what to do, or skipped and listed; never half a thing."""

from __future__ import annotations

import io
import json
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from prep_data import DATE, DRIVE, VAL_DRIVE, command, copy_raw, files_of, long_raw, read_part, run_pack, write_split

from prep.packing.encode import ImageFormat, encode_image
from prep.packing.pack import scratch_folder
from prep.raw.zips import Ref
from shards.errors import InputError, SampleError, StorageError
from shards.sample import Codec

LEFT = f"{DATE}/{DRIVE}/image_02/data"
SCANS = f"{DATE}/{DRIVE}/velodyne_points/data"
TRAIN = [f"{DATE}/{DRIVE} {frame} {side}" for frame in range(1, 7) for side in "lr"]


def md2(*arguments: str | Path, limit: int | None = None) -> subprocess.CompletedProcess[str]:
    """The command, in a process of its own; `limit` bounds the size of any file it writes."""
    return subprocess.run(
        [sys.executable, "-m", "cli.main", *map(str, arguments)],
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
        preexec_fn=None if limit is None else lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )


def report(dataset: Path) -> dict[str, object]:
    return json.loads((dataset / "report.json").read_text())  # type: ignore[no-any-return]


def truncate(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def test_a_truncated_png_stops_or_takes_out_the_samples_that_hold_it(drive: Path, tmp_path: Path) -> None:
    raw = copy_raw(drive, tmp_path / "raw")
    truncate(raw / LEFT / "0000000003.png", 9000)
    split = write_split(tmp_path, *TRAIN)
    with pytest.raises(SampleError, match=rf"{LEFT}/0000000003\.png: broken image .*fetch it again"):
        run_pack(split, raw, tmp_path / "out")
    assert not (tmp_path / "out" / "dataset.json").exists()
    packed = run_pack(split, raw, tmp_path / "out", on_error="skip")
    # Left frame 3 is target of 3 l, neighbour of 2 l and 4 l, partner of 3 r.
    out = {f"{DATE}/{DRIVE} {n} {s}" for n, s in ((2, "l"), (3, "l"), (4, "l"), (3, "r"))}
    assert {skip.line for skip in packed.skipped} == out
    assert {(skip.reason, "0000000003.png" in skip.detail) for skip in packed.skipped} == {("broken frame", True)}
    assert len(read_part(tmp_path / "out")) == 8
    assert report(tmp_path / "out")["skipped_by_reason"] == {"broken frame": 4}
    assert {entry["line"] for entry in report(tmp_path / "out")["skipped_lines"]} == out  # type: ignore[attr-defined,index]
    assert packed.manifest.skipped == 4


def test_a_mended_file_is_taken_up_where_packing_stopped(drive: Path, tmp_path: Path) -> None:
    raw = copy_raw(drive, tmp_path / "raw")
    split = write_split(tmp_path, *TRAIN)
    truncate(raw / LEFT / "0000000003.png", 9000)
    with pytest.raises(SampleError):
        run_pack(split, raw, tmp_path / "out")
    (raw / LEFT / "0000000003.png").write_bytes((drive / LEFT / "0000000003.png").read_bytes())
    packed = run_pack(split, raw, tmp_path / "out")
    assert not packed.skipped
    run_pack(split, drive, tmp_path / "expected")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "expected")


def test_a_file_mended_after_its_samples_were_skipped_gives_a_new_version(drive: Path, tmp_path: Path) -> None:
    raw = copy_raw(drive, tmp_path / "raw")
    split = write_split(tmp_path, *TRAIN)
    truncate(raw / LEFT / "0000000003.png", 9000)
    run_pack(split, raw, tmp_path / "out", on_error="skip")
    before = files_of(tmp_path / "out")
    assert str(tmp_path) not in before["report.json"].decode()  # it is published: no path of this machine
    assert run_pack(split, raw, tmp_path / "out", on_error="skip").already
    (raw / LEFT / "0000000003.png").write_bytes((drive / LEFT / "0000000003.png").read_bytes())
    mended = run_pack(split, raw, tmp_path / "out")
    assert (mended.url, mended.skipped) == (f"{tmp_path}/out-v2", [])
    assert run_pack(split, raw, tmp_path / "out").already
    assert files_of(tmp_path / "out") == before


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_no_damage_to_an_image_escapes(data: st.DataObject) -> None:
    """Cut or changed anywhere: an image of the right size comes out, or a SampleError that names the file."""
    picture = Image.linear_gradient("L").resize((40, 20)).convert("RGB")
    buffer = io.BytesIO()
    kind = data.draw(st.sampled_from(["PNG", "JPEG"]))
    picture.save(buffer, kind)
    whole = buffer.getvalue()
    position = data.draw(st.integers(0, len(whole) - 1))
    cut = data.draw(st.booleans())
    broken = whole[:position] if cut else whole[:position] + bytes([whole[position] ^ 0xFF]) + whole[position + 1 :]
    ref = Ref("a/b.png", "/raw/a/b.png", len(broken))
    try:
        stored, native = encode_image(broken, ref, (40, 20), ImageFormat((20, 10), "png", 90))
    except SampleError as error:
        assert "/raw/a/b.png" in str(error)
        assert "\n" not in str(error)
        assert " at 0x" not in str(error)
    else:
        assert native == (40, 20)
        with Image.open(io.BytesIO(stored)) as image:
            assert image.size == (20, 10)
        if cut:  # of the end only checksums and end marks can be missed
            expected, _ = encode_image(whole, ref, (40, 20), ImageFormat((20, 10), "png", 90))
            assert stored == expected
            # Nothing that is cut goes through as it is.
            codec: Codec = "png" if kind == "PNG" else "jpeg"
            native_size, _ = encode_image(broken, ref, (40, 20), ImageFormat(None, codec, 90))
            assert native_size != broken


def test_a_frame_of_another_size_than_calibrated_is_refused(drive: Path, tmp_path: Path) -> None:
    raw = copy_raw(drive, tmp_path / "raw")
    Image.new("RGB", (96, 32)).save(raw / LEFT / "0000000003.png")
    with pytest.raises(SampleError, match=r"0000000003\.png: 96x32 pixels, but the calibration is for 192x64"):
        run_pack(write_split(tmp_path, TRAIN[4]), raw, tmp_path / "out")


def test_a_scan_of_a_wrong_length(drive: Path, tmp_path: Path) -> None:
    raw = copy_raw(drive, tmp_path / "raw")
    truncate(raw / SCANS / "0000000003.bin", 1001)
    split = write_split(tmp_path, *TRAIN)
    with pytest.raises(SampleError, match=r"0000000003\.bin: 1001 bytes, not a multiple of 16"):
        run_pack(split, raw, tmp_path / "out")
    packed = run_pack(split, raw, tmp_path / "out", on_error="skip")
    # Frame 3's own samples lose their ground truth; the neighbours that only show frame 3 lose nothing.
    assert {s.line for s in packed.skipped} == {f"{DATE}/{DRIVE} 3 {side}" for side in "lr"}
    assert {s.reason for s in packed.skipped} == {"broken depth"}
    assert len(read_part(tmp_path / "out")) == 10
    without = run_pack(split, raw, tmp_path / "images", depth=False)
    assert not without.skipped


@pytest.mark.parametrize("name", ["calib_cam_to_cam.txt", "calib_velo_to_cam.txt"])
@pytest.mark.parametrize(
    ("damage", "says"),
    [(lambda path: path.unlink(), "not found"), (lambda path: path.write_text("calib_time: x\n"), "is missing")],
)
def test_broken_calibration(drive: Path, tmp_path: Path, name: str, damage: Callable[[Path], None], says: str) -> None:
    raw = copy_raw(drive, tmp_path / "raw")
    damage(raw / DATE / name)
    split = write_split(tmp_path, *TRAIN)
    with pytest.raises(InputError, match=rf"{name}.*{says}"):
        run_pack(split, raw, tmp_path / "out")
    with pytest.raises(InputError, match=r"none of the split's lines can be packed: 12 broken drive"):
        run_pack(split, raw, tmp_path / "out", on_error="skip")
    assert not (tmp_path / "out").exists()


def test_a_line_that_is_none_stops_or_is_listed(drive: Path, tmp_path: Path) -> None:
    split = write_split(tmp_path, TRAIN[2], "2011_09_26_drive_0001 five l", TRAIN[2])
    with pytest.raises(InputError, match=r"train_files\.txt:2: '2011_09_26_drive_0001 five l' is not of the form"):
        run_pack(split, drive, tmp_path / "out")
    packed = run_pack(split, drive, tmp_path / "out", on_error="skip")
    assert [(s.line, s.reason) for s in packed.skipped] == [
        ("2011_09_26_drive_0001 five l", "not a split line"),
        (TRAIN[2], "not a split line"),
    ]
    assert "repeats" in packed.skipped[1].detail
    assert len(read_part(tmp_path / "out")) == 1


def test_what_is_missing_is_counted_by_reason(drive: Path, tmp_path: Path) -> None:
    raw = copy_raw(drive, tmp_path / "raw")
    (raw / DATE / DRIVE / "image_03" / "data" / "0000000004.png").unlink()
    lines = {
        f"{DATE}/{DRIVE} 0 l": "drive's end, no neighbour -1",
        f"{DATE}/{DRIVE} 7 l": "drive's end, no neighbour +1",
        f"{DATE}/{DRIVE} 99 l": "missing frame",
        f"{DATE}/{DRIVE} 4 l": "missing stereo partner",
        f"{DATE}/{DRIVE} 3 r": "missing neighbour +1",
        f"{DATE}/{DATE}_drive_7777_sync 3 r": "missing drive",
    }
    packed = run_pack(write_split(tmp_path, *lines, TRAIN[2]), raw, tmp_path / "out")
    assert {s.line: s.reason for s in packed.skipped} == lines
    assert len(read_part(tmp_path / "out")) == packed.manifest.samples("train") == 1
    assert report(tmp_path / "out")["skipped"] == 6


def test_a_repaired_source_gives_a_new_version_and_never_overwrites(drive: Path, tmp_path: Path) -> None:
    raw = copy_raw(drive, tmp_path / "raw")
    (raw / LEFT / "0000000003.png").unlink()
    split = write_split(tmp_path, *TRAIN)
    first = run_pack(split, raw, tmp_path / "out")
    before = files_of(tmp_path / "out")
    (raw / LEFT / "0000000003.png").write_bytes((drive / LEFT / "0000000003.png").read_bytes())
    second = run_pack(split, raw, tmp_path / "out")
    assert files_of(tmp_path / "out") == before
    assert (first.manifest.samples("train"), second.manifest.samples("train")) == (8, 12)
    assert second.url == f"{tmp_path}/out-v2"
    again = run_pack(split, raw, tmp_path / "out")
    assert again.already
    assert again.url == second.url


def test_a_drive_name_of_no_layout(drive: Path, tmp_path: Path) -> None:
    split = write_split(tmp_path, "holiday 3 l")
    failed = command("prep", "--split", split, "--raw", drive, "--out", "out", cwd=tmp_path)
    assert failed.returncode == 3
    assert "'holiday' is neither KITTI raw's" in failed.stderr
    assert "--dataset folder" in failed.stderr
    with pytest.raises(InputError, match=rf"did you mean {DATE}/{DRIVE}\?$"):
        run_pack(write_split(tmp_path, f"{DRIVE} 3 l"), drive, tmp_path / "out")


def test_commands_end_with_the_documented_exit_codes(drive: Path, tmp_path: Path) -> None:
    write_split(tmp_path / "split", f"{DATE}/{DRIVE} 99 l", TRAIN[2])
    write_split(tmp_path / "split", f"{DATE}/{VAL_DRIVE} 3 l", part="val")
    ends = write_split(tmp_path / "ends", f"{DATE}/{DRIVE} 0 l", TRAIN[2])
    whole = md2("prep", "--split", ends, "--size", "96x32", "--raw", drive, "--out", tmp_path / "whole")
    assert whole.returncode == 0  # a drive's first frame has no neighbour for anybody
    assert "1 line left out: 1 drive's end, no neighbour -1" in whole.stdout
    common = ["prep", "--split", tmp_path / "split", "--size", "96x32", "--workers", "1"]
    incomplete = command(*common, "--raw", drive, "--out", "out", cwd=tmp_path)
    assert incomplete.returncode == 4
    assert "1 train, 1 val samples" in incomplete.stdout
    assert "1 line left out: 1 missing frame" in incomplete.stdout
    assert "report.json" in incomplete.stdout
    nothing = command(*common, cwd=tmp_path)  # --raw is ./kitti_data
    assert nothing.returncode == 3
    assert "kitti_data" in nothing.stderr
    assert nothing.stderr.rstrip().count("\n") == 1  # the bar's line and the message
    assert "Traceback" not in nothing.stderr
    check = command(*common, "--raw", drive, "--check", cwd=tmp_path)
    assert check.returncode == 4
    assert "frames   12 needed, 8 present, 4 missing" in check.stdout
    assert not (tmp_path / "kitti_shards").exists()
    raw = copy_raw(drive, tmp_path / "[raw]")
    (raw / DATE / "calib_velo_to_cam.txt").unlink()
    with (tmp_path / "split" / "val_files.txt").open("a") as file:
        file.write("no line\n")
    broken = command(*common, "--raw", raw, "--check", cwd=tmp_path)
    assert broken.returncode == 4
    assert "samples  4 lines, 0 can be packed" in broken.stdout
    assert f"broken   {tmp_path}/split/val_files.txt:2: 'no line' is not of the form" in broken.stdout
    lost = f"{DATE}/calib_velo_to_cam.txt: not found in --raw; KITTI has it in {DATE}_calib.zip"
    assert f"broken   {lost}" in broken.stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--split", "eigen_zhuo"], "did you mean eigen_zhou"),
        (["--size", "640"], "--size 640"),
        (["--size", "4x4"], "8 to 16384"),
        (["--frames", "1,2"], "must hold 0"),
        (["--frames", "0,one"], "--frames 0,one"),
        (["--quality", "0"], "--quality 0"),
        (["--quality", "93", "--codec", "ppm"], "--quality 93 goes with --codec jpeg"),
        (["--quality", "93", "--codec", "png"], "--quality 93 goes with --codec jpeg"),
        (["--chroma", "420", "--codec", "png"], "--chroma 420 goes with --codec jpeg"),
        (["--limit", "0"], "--limit 0"),
        (["--shard-mb", "0"], "--shard-mb 0"),
        (["--depth-source", "improved", "--depth-convention", "lidar_x"], "lidar_x goes with"),
        (["--part", "val"], "no part 'val'"),
    ],
)
def test_wrong_options(
    drive: Path, tmp_path: Path, arguments: list[str], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from typer.testing import CliRunner

    from cli.main import app
    from shards.errors import Md2Error

    split = str(write_split(tmp_path, TRAIN[2]))
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["prep", "--split", split, "--raw", str(drive), "--workers", "1", *arguments])
    assert isinstance(result.exception, Md2Error)
    assert says in str(result.exception)
    assert not (tmp_path / "kitti_shards").exists()


def test_download_takes_a_url_or_stands_alone(drive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where `--raw` has nothing, the archive is asked; alone, the option means the public one."""
    from prep_data import serve, zip_raw
    from typer.testing import CliRunner

    import prep.request
    from cli.main import app

    split = str(write_split(tmp_path, TRAIN[2]))
    monkeypatch.chdir(tmp_path)
    with serve(zip_raw(drive, tmp_path / "zips", nested=True)) as web:
        monkeypatch.setattr(prep.request, "PUBLIC_ARCHIVE", web.url)
        for number, arguments in enumerate((["--download", web.url], ["--download", "--workers", "1"], ["--download"])):
            out = f"out{number}"
            result = CliRunner().invoke(
                app, ["prep", "--split", split, "--workers", "1", "--out", out, "--size", "96x32", *arguments]
            )
            assert result.exception is None, result.output
            assert len(read_part(tmp_path / out)) == 1


def test_an_unwritable_target_is_found_out_before_the_work(drive: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    split = write_split(tmp_path, *TRAIN)
    with pytest.raises(StorageError, match=r"file.*Not a directory"):
        run_pack(split, drive, tmp_path / "file" / "out")
    missing = tmp_path / "gone"
    missing.symlink_to(tmp_path / "nowhere" / "at" / "all")
    with pytest.raises(StorageError, match="gone"):
        run_pack(split, drive, missing)


@contextmanager
def small_disk(size: int) -> Iterator[None]:
    """The kernel refuses to let any file grow beyond `size` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_says_so_and_leaves_nothing_half_written(drive: Path, tmp_path: Path) -> None:
    """First no chunk can be finished; then, with room for chunks, no shard; then there is room."""
    raw, split = long_raw(drive, tmp_path / "raw", 60)
    out, scratch = tmp_path / "out", tmp_path / ".out.scratch"
    for size in (300_000, 1_500_000):
        with small_disk(size), pytest.raises(StorageError, match=rf"{scratch}: .* \(File too large\).*--scratch"):
            run_pack(split, raw, out, size="native")
        assert not list(scratch.glob("**/*.tmp"))
        assert not (out / "dataset.json").exists()
    assert len(list(scratch.glob("*.chunk"))) == 3
    run_pack(split, raw, out, size="native")
    run_pack(split, raw, tmp_path / "expected", size="native")
    assert files_of(out) == files_of(tmp_path / "expected")
    assert not scratch.exists()


def test_a_full_disk_under_workers(drive: Path, tmp_path: Path) -> None:
    raw, split = long_raw(drive, tmp_path / "raw", 60)
    options = ["--out", tmp_path / "out", "--scratch", tmp_path / "scratch", "--size", "native", "--workers", "2"]
    full = md2("prep", "--split", split, "--raw", raw, "--follow-links", *options, limit=300_000)
    assert full.returncode == 5, full.stderr
    scratch = scratch_folder(str(tmp_path / "out"), tmp_path / "scratch")
    assert f"{scratch}: cannot be used (File too large)" in full.stderr.replace("\n", "")
    assert "Traceback" not in full.stderr
    assert not list(scratch.glob("**/*.tmp"))
    assert not (tmp_path / "out" / "dataset.json").exists()


def test_two_runs_at_once_do_not_share_scratch(drive: Path, tmp_path: Path) -> None:
    import fcntl

    scratch = tmp_path / ".out.scratch"
    scratch.mkdir()
    with (scratch / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(StorageError, match="another md2 prep is at work there"):
            run_pack(write_split(tmp_path, TRAIN[2]), drive, tmp_path / "out")
