"""Hostile and enormous input: one line each, within bounded memory; few threads, no locks."""

from __future__ import annotations

import errno
import os
import struct
import subprocess
import sys
import tracemalloc
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from prep_data import DATE, DRIVE, copy_raw, files_of, run_pack, write_split

from prep.packing import encode
from prep.packing.encode import ImageFormat, encode_image
from prep.raw import zips
from prep.raw.files import RawData, read
from prep.raw.splits import read_split
from prep.raw.velodyne import check_depth_png
from prep.raw.zips import Ref
from prep.workers import run, start_workers
from shards.errors import InputError, Md2Error, SampleError, StorageError, UsageError

LINES = [f"{DATE}/{DRIVE} {n} {s}" for n in (2, 3) for s in "lr"]


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
    assert "a part of it claims 1,073,741,824 bytes" in str(data.problem(raw))
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
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    packed = b"".join(deflate.compress(bytes(1 << 24)) for _ in range(6)) + deflate.flush()  # 100 MB of zeros
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


@pytest.mark.parametrize(
    "name",
    [
        "calib_cam_to_cam.txt",
        f"{DRIVE}/velodyne_points/data/0000000002.bin",
        f"{DRIVE}/image_02/data/0000000002.png",
    ],
)
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
@pytest.mark.parametrize("size", [(8_000, 8_000), (10_000, 10_000), (60_000, 60_000)])
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
        with pytest.raises(Md2Error) as caught:
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


# Each attack runs in a process of its own, whose peak memory includes the interpreter and the libraries.
ATTACK = """
import re, sys
from pathlib import Path
from prep.packing.encode import ImageFormat, encode_image
from prep.raw.files import RawData
from prep.raw.poses import read_poses
from prep.raw.splits import read_split
from prep.raw.velodyne import depth_png
from prep.raw.zips import Ref
from shards.errors import Md2Error
path = Path(sys.argv[1])
try:
    {work}
except Md2Error as error:
    print(error)
print(int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) >> 10)
"""


def attack(work: str, path: Path) -> tuple[str, int]:
    """The message in which an attack ends, and the peak memory in MiB."""
    code = ATTACK.format(work=work)
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, timeout=120, check=True)
    *message, peak = done.stdout.splitlines()
    assert len(message) <= 1
    return "".join(message), int(peak)


def filled(path: Path, line: bytes, size: int, first: bytes = b"") -> Path:
    """A file of one line again and again; of no line a sparse one."""
    with path.open("wb") as file:
        file.write(first + line * (size // len(line)) if line else b"")
        file.truncate(file.tell() or size)
    return path


@pytest.mark.parametrize(
    ("line", "size", "says"),
    [
        (b"", 1 << 30, "larger than 64 MiB"),
        (b"a 1 l\n", 60 << 20, "more than 500,000 lines"),
        (b"\r", 60 << 20, "more than 500,000 lines"),
    ],
)
def test_enormous_split_lists_take_little_memory(tmp_path: Path, line: bytes, size: int, says: str) -> None:
    message, peak = attack("read_split(str(path))", filled(tmp_path / "train_files.txt", line, size))
    assert says in message
    assert peak < 500


def test_the_largest_split_list_takes_little_memory(tmp_path: Path) -> None:
    path, count = tmp_path / "train_files.txt", 20_000
    path.write_bytes(b"\n".join(b"%07d%s %d l" % (i, b"x" * 100, i) for i in range(count)))
    tracemalloc.start()
    lists = read_split(str(path))
    kept = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert len(lists.parts["train"]) == count
    assert kept / count * 500_000 < 200 << 20


@pytest.mark.parametrize(
    ("first", "line", "size", "says"),
    [
        (b"", b"", 1 << 30, "larger than 32 MiB"),
        (b"", b"1 0 0 0\n0 1 0 0\n0 0 1 0\n0 0 0 1\n", 20 << 20, "more than 1,000,000 lines"),
        (b"", b"0 ", 31 << 20, "numbers"),
        (b"1 0 0 0 0 1 0 0 0 0 1 0\n", b"0,", 31 << 20, "numbers"),
    ],
)
def test_enormous_pose_files_take_little_memory(
    tmp_path: Path, first: bytes, line: bytes, size: int, says: str
) -> None:
    message, peak = attack("read_poses(path)", filled(tmp_path / "09.txt", line, size, first))
    assert says in message
    assert peak < 500


def test_directories_of_several_zips_have_a_limit_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of the zips has a directory within the limit of one."""
    count = 20_000
    names = [f"{DATE}/{DRIVE}/image_02/data/{number:010d}.png".encode() for number in range(count)]
    numbers = (20, 20, 0, 0, 0, 33, 0, 9, 9)
    entries = [
        struct.pack("<4sHHHHHHIIIHHHHHII", b"PK\1\2", *numbers, len(name), 0, 0, 0, 0, 0, 0) + name for name in names
    ]
    directory = b"".join(entries)
    end = struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, count, count, len(directory), 0, 0)
    for number in range(3):
        (tmp_path / f"part{number}.zip").write_bytes(directory + end)
    tracemalloc.start()
    data = RawData([str(tmp_path / "part0.zip")])
    assert len(data.files(f"{DATE}/{DRIVE}/image_02/data")) == count
    kept = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert kept / count * zips._MAX_FILES < 300 << 20
    monkeypatch.setattr(zips, "_MAX_FILES", 50_000)
    with pytest.raises(InputError, match=r"part2\.zip: with it, the zips at --raw hold more than 50,000 files"):
        RawData([str(tmp_path)]).files(f"{DATE}/{DRIVE}/image_02/data")


@pytest.mark.parametrize(
    ("mode", "name", "work"),
    [
        ("RGB", "a.png", "encode_image(path.read_bytes(), Ref('x', str(path), 1), None, ImageFormat(None, 'jpeg'))"),
        ("F", "a.tif", "depth_png(path.read_bytes(), (7680, 4320), str(path))"),
    ],
)
def test_the_largest_images_and_depth_maps_take_bounded_memory(tmp_path: Path, mode: str, name: str, work: str) -> None:
    path = tmp_path / name
    options: dict[str, Any] = {"compression": "tiff_deflate"} if mode == "F" else {"compress_level": 1}
    Image.new(mode, (7680, 4320), 3 if mode == "F" else (90, 200, 30)).save(path, **options)
    assert path.stat().st_size < 3 << 20
    message, peak = attack(work, path)
    assert not message
    assert peak < 600


def test_raw_files_beyond_the_read_ahead_are_read_one_by_one(
    drive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    split = write_split(tmp_path / "s", *LINES)
    run_pack(split, drive, tmp_path / "expected")
    monkeypatch.setattr(encode, "_READ_AHEAD_BYTES", 1000)
    monkeypatch.setattr(encode, "read_many", lambda refs: pytest.fail(f"{len(refs)} files at once"))
    run_pack(split, drive, tmp_path / "out")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "expected")


def test_files_are_read_one_by_one_without_a_thread(
    drive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class NoThreads(ThreadPoolExecutor):
        def submit(self, *_: Any, **__: Any) -> Any:
            raise RuntimeError("can't start new thread")

    split = write_split(tmp_path / "s", *LINES)
    run_pack(split, drive, tmp_path / "expected")
    monkeypatch.setattr(encode, "ThreadPoolExecutor", NoThreads)
    run_pack(split, drive, tmp_path / "out")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "expected")


@pytest.mark.parametrize("error", [BlockingIOError(11, "no process"), RuntimeError("can't start new thread")])
def test_workers_that_cannot_start_are_one_line(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(process: object) -> None:
        raise error

    monkeypatch.setattr("multiprocessing.process.BaseProcess.start", refuse)
    says = r"no process or thread can be started \(a limit on them\?\); try --workers 1"
    with pytest.raises(Md2Error, match=says), start_workers(2) as workers:
        list(run(workers, abs, [1]))


@pytest.mark.parametrize("code", [errno.EDQUOT, errno.EROFS, errno.EIO])
def test_a_scratch_folder_that_fails_is_one_line(
    drive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(zipfile.ZipFile, "writestr", refuse)
    with pytest.raises(StorageError, match=rf"{os.strerror(code)}\); free some space or give --scratch DIR"):
        run_pack(write_split(tmp_path / "s", *LINES), drive, tmp_path / "out")
    assert not list(tmp_path.glob(".out.scratch/*.tmp"))
