"""Where raw data may lie: folders, zips, web servers with and without ranges, object storage, mixes of them."""

from __future__ import annotations

import io
import shutil
import zipfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prep_data import DATE, DRIVE, VAL_DRIVE, files_of, odometry_raw, read_part, run_pack, serve, write_split, zip_raw

from prep.packing.pack import pack
from prep.packing.plan import make_plan
from prep.raw.files import RawData, read, read_many
from prep.raw.kitti import Kitti
from prep.raw.splits import read_split
from prep.request import make_content, refuse_empty
from prep.workers import start_workers
from shards.errors import InputError, SampleError, StorageError, UsageError

IMAGES = f"{DATE}/{DRIVE}/image_02/data"


@pytest.mark.parametrize(("nested", "stored"), [(False, False), (True, False), (True, True)])
def test_zips_give_the_same_bytes_as_folders(
    drive: Path, dataset: Path, tmp_path: Path, nested: bool, stored: bool
) -> None:
    zips = zip_raw(drive, tmp_path / "zips", nested=nested, stored=stored)
    run_pack(drive / "splits" / "sample", zips, tmp_path / "out", parts=["train", "val"])
    # All but the card's licence: the zips hold md2 sample's marker as well, so even that is the same.
    assert files_of(tmp_path / "out") == files_of(dataset)


@pytest.mark.parametrize("base", ["", "/raw_data"])
def test_a_web_server_is_read_by_ranges(drive: Path, dataset: Path, tmp_path: Path, base: str) -> None:
    zips = zip_raw(drive, tmp_path / "zips", nested=True)
    with serve(zips) as web:
        run_pack(drive / "splits" / "sample", web.url + base, tmp_path / "out", parts=["train", "val"])
    assert files_of(tmp_path / "out") == files_of(dataset)


def test_the_grey_cameras_never_cross_the_network(drive: Path, tmp_path: Path) -> None:
    """16 grey frames of 200 kB stand before what is needed; all that is read is what is needed, and directories."""
    zips = zip_raw(drive, tmp_path / "zips", nested=True, stored=True)
    split = write_split(tmp_path, f"{DATE}/{DRIVE} 3 l")
    with serve(zips) as web:
        run_pack(split, web.url, tmp_path / "out", depth=False)
        names = [f"image_02/data/{n:010d}.png" for n in (2, 3, 4)] + ["image_03/data/0000000003.png"]
        needed = sum((drive / DATE / DRIVE / name).stat().st_size for name in names)
        archive = zips / "raw_data" / DRIVE.removesuffix("_sync") / f"{DRIVE}.zip"
        with zipfile.ZipFile(archive) as opened:
            directory = archive.stat().st_size - opened.start_dir
        calibration = (zips / "raw_data" / f"{DATE}_calib.zip").stat().st_size
    assert archive.stat().st_size > 3_200_000 + needed
    # The last mebibyte of the zip is read for its directory: no grey frame lies there.
    assert web.sent < needed + max(directory, 1 << 20) + 3 * calibration + 10_000
    assert web.sent > needed


def test_a_server_without_ranges_is_refused_with_what_to_do(drive: Path, tmp_path: Path) -> None:
    zips = zip_raw(drive, tmp_path / "zips")
    with serve(zips) as web:
        web.ranges = False
        with pytest.raises(InputError, match=r"_sync\.zip: this server does not serve byte ranges.*--raw"):
            run_pack(drive / "splits" / "sample", web.url, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_server_that_fails_for_a_while_is_asked_again(drive: Path, tmp_path: Path) -> None:
    zips = zip_raw(drive, tmp_path / "zips", nested=True)
    split = write_split(tmp_path, f"{DATE}/{DRIVE} 3 l")
    with serve(zips) as web:
        web.failures = 3
        run_pack(split, web.url, tmp_path / "out")
    assert len(read_part(tmp_path / "out")) == 1


def test_a_server_that_fails_for_good_stops_and_is_not_taken_for_absent(
    drive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MD2_STORAGE_PATIENCE", "0.5")
    zips = zip_raw(drive, tmp_path / "zips", nested=True)
    split = write_split(tmp_path, f"{DATE}/{DRIVE} 3 l")
    with serve(zips) as web:
        web.failures = 10_000
        with pytest.raises(StorageError, match=r"127\.0\.0\.1.*503"):
            run_pack(split, web.url, tmp_path / "out", on_error="skip")


def test_mixed_sources_complete_each_other(drive: Path, dataset: Path, tmp_path: Path) -> None:
    """Left images in a folder, everything else of one drive in a zip, the other drive on a web server."""
    zips = zip_raw(drive, tmp_path / "zips")
    local, remote = tmp_path / "local", tmp_path / "remote"
    shutil.copytree(drive / IMAGES, local / IMAGES)
    remote.mkdir()
    (zips / f"{VAL_DRIVE}.zip").rename(remote / f"{VAL_DRIVE}.zip")
    with serve(remote) as web:
        sources = [str(local), str(zips), web.url]
        run_pack(drive / "splits" / "sample", sources, tmp_path / "out", parts=["train", "val"])
    assert files_of(tmp_path / "out") == files_of(dataset)


def test_the_first_source_that_has_a_file_gives_it(drive: Path, tmp_path: Path) -> None:
    other = tmp_path / "other" / IMAGES
    other.mkdir(parents=True)
    shutil.copy(drive / IMAGES / "0000000005.png", other / "0000000003.png")
    raw = RawData([str(tmp_path / "other"), str(drive)])
    files = raw.files(IMAGES)
    assert sorted(files) == [f"{n:010d}.png" for n in range(8)]
    assert read(files["0000000003.png"]) == (drive / IMAGES / "0000000005.png").read_bytes()
    assert read(files["0000000004.png"]) == (drive / IMAGES / "0000000004.png").read_bytes()


def test_any_file_system_of_fsspec_that_can_list(drive: Path, tmp_path: Path) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.put(str(zip_raw(drive, tmp_path / "raw_zips")) + "/", "/prep_sources/zips/", recursive=True)
    memory.put(str(drive / DATE) + "/", f"/prep_sources/drives/{DATE}/", recursive=True)
    split = write_split(tmp_path, f"{DATE}/{DRIVE} 3 l", f"{DATE}/{VAL_DRIVE} 4 r")
    run_pack(split, drive, tmp_path / "expected")
    for name in ("zips", "drives"):
        run_pack(split, f"memory://prep_sources/{name}", tmp_path / name)
        assert files_of(tmp_path / name) == files_of(tmp_path / "expected")
    memory.rm("/prep_sources", recursive=True)


def test_from_bucket_to_bucket(drive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """KITTI's zips in a bucket, the dataset into another prefix: nothing but scratch on this machine."""
    from storage_servers import Bucket, client, moto_server, use_endpoint

    split = write_split(tmp_path, f"{DATE}/{DRIVE} 3 l", f"{DATE}/{DRIVE} 4 r")
    run_pack(split, drive, tmp_path / "expected")
    with moto_server() as endpoint:
        use_endpoint(monkeypatch, endpoint)
        client(endpoint).create_bucket(Bucket="kitti")
        bucket = Bucket(endpoint, "kitti", "moto")
        zips = zip_raw(drive, tmp_path / "zips", nested=True)
        for path in zips.rglob("*.zip"):
            bucket.put(f"archive/{path.relative_to(zips)}", path.read_bytes())
        lists = read_split(str(split))
        content = make_content(lists, size="96x32")
        plan = make_plan(lists, Kitti(RawData(["s3://kitti/archive"]), content.depth), content)
        with start_workers(1) as alone:
            packed = pack(plan, lists, "s3://kitti/shards", tmp_path / "scratch", alone)
        names = [key for key in bucket.objects() if key.startswith("shards/")]
        assert packed.url == "s3://kitti/shards"
        assert {n.removeprefix("shards/"): bucket.get(n) for n in names} == files_of(tmp_path / "expected")


def test_nothing_there_says_what_is_expected_and_how_to_get_it(drive: Path, tmp_path: Path) -> None:
    lists = read_split(str(drive / "splits" / "sample"))
    content = make_content(lists)
    plan = make_plan(lists, Kitti(RawData([str(tmp_path / "nothing")]), content.depth), content)
    with pytest.raises(InputError) as caught:
        refuse_empty(plan, RawData([str(tmp_path / "nothing")]), ", or --download")
    for word in (
        str(tmp_path / "nothing"),
        DRIVE,
        "image_02/data",
        "calib_cam_to_cam.txt",
        ".zip",
        "--raw",
        "--download",
    ):
        assert word in str(caught.value)


def test_odometry_that_is_not_there_says_what_odometry_looks_like(tmp_path: Path) -> None:
    lists = read_split(str(write_split(tmp_path, "9 1 l")))
    content = make_content(lists)
    plan = make_plan(lists, Kitti(RawData([str(tmp_path)]), content.depth), content)
    with pytest.raises(InputError, match=r"sequences/00/image_2/000000\.png.*data_odometry_calib\.zip"):
        refuse_empty(plan, RawData([str(tmp_path)]))


@pytest.mark.parametrize("over_http", [False, True])
def test_odometrys_own_zips(drive: Path, tmp_path: Path, over_http: bool) -> None:
    """The images' zip has a calib.txt as well, which lacks the lidar's line and must not hide the right one."""
    whole = odometry_raw(drive, tmp_path / "raw")
    zips = tmp_path / "zips"
    zips.mkdir()
    kinds = {"color": "image_", "calib": "calib.txt", "velodyne": "velodyne/", "poses": "poses/"}
    for kind, part in kinds.items():
        with zipfile.ZipFile(zips / f"data_odometry_{kind}.zip", "w") as archive:
            for path in (path for path in whole.rglob("*") if path.is_file()):
                name = path.relative_to(whole).as_posix()
                if part in name:
                    archive.write(path, f"dataset/{name}")
                elif kind == "color" and path.name == "calib.txt":
                    archive.writestr(f"dataset/{name}", path.read_text().partition("Tr:")[0])
    split = write_split(tmp_path / "split", "9 3 l", "9 4 r")
    run_pack(split, whole, tmp_path / "expected")
    with serve(zips) as web:
        run_pack(split, web.url if over_http else zips, tmp_path / "out")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "expected")


def test_odometry_without_the_lidars_calibration_says_where_it_is(drive: Path, tmp_path: Path) -> None:
    calibration = odometry_raw(drive, tmp_path / "raw") / "sequences/09/calib.txt"
    calibration.write_text(calibration.read_text().partition("Tr:")[0])
    split = write_split(tmp_path / "split", "9 3 l")
    with pytest.raises(InputError, match=r"sequences/09/calib.txt: line 'Tr:' is missing; unpack data_odometry_calib"):
        run_pack(split, tmp_path / "raw", tmp_path / "out")


def test_a_zip_cut_short_is_named(drive: Path, tmp_path: Path) -> None:
    zips = zip_raw(drive, tmp_path / "zips")
    path = zips / f"{DRIVE}.zip"
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(InputError, match=rf"{DRIVE}\.zip: cut short or not a zip .*download it again"):
        run_pack(drive / "splits" / "sample", zips, tmp_path / "out")
    packed = run_pack(drive / "splits" / "sample", zips, tmp_path / "out", on_error="skip", parts=["train", "val"])
    assert len(read_part(tmp_path / "out", "val")) == 6
    assert {s.reason for s in packed.skipped} == {"broken drive"}
    assert len(packed.skipped) == 12
    assert f"{DRIVE}.zip" in packed.skipped[0].detail
    report = (tmp_path / "out" / "report.json").read_text()
    assert f'"detail": "{DRIVE}.zip: cut short' in report
    assert str(tmp_path) not in report  # it is published: no path of this machine


@pytest.mark.parametrize(
    ("message", "shared"),
    [
        ("/data/raw/a.zip: cut short", "a.zip: cut short"),
        (
            "x.txt: not found in /data/raw, /data/raw/more, https://host/kitti; fetch it",
            "x.txt: not found in --raw; fetch it",
        ),
        ("https://host/kitti/b.zip: the file ends. Fetch it", "b.zip: the file ends. Fetch it"),
        ("/data/raw2/a.zip and b/data/raw", "/data/raw2/a.zip and b/data/raw"),
    ],
)
def test_where_the_sources_lie_is_taken_out_of_what_is_published(message: str, shared: str) -> None:
    raw = RawData(["/data/raw", "/data/raw/more/", "https://host/kitti", "."])
    assert raw.without_place(message) == shared


@pytest.mark.parametrize(
    "url",
    ["https://me:s3cret@host/kitti", "http://me:s3/cret@host/kitti", "s3://key:s3cret@bucket/x", "gs://me@bucket",
     "https://me:s3cret"],
)  # fmt: skip
def test_credentials_in_a_url_are_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(UsageError, match="no credentials in a URL") as caught:
        RawData([url])
    assert "s3" not in str(caught.value).replace("s3://", "")


def test_addresses_with_a_port_are_no_credentials() -> None:
    assert RawData(["http://localhost:8000/kitti", "https://[::1]:8000", "http://host"]).urls


def test_a_kind_of_source_that_there_is_not() -> None:
    with pytest.raises(UsageError, match=r"--raw nowhere://x: Protocol not known: nowhere"):
        RawData(["nowhere://x"])


def flipped(data: bytes, position: int) -> bytes:
    return data[:position] + bytes([data[position] ^ 0x55]) + data[position + 1 :]


@settings(max_examples=60, deadline=None)
@given(st.booleans(), st.data())
def test_a_damaged_zip_member_is_never_taken_for_whole(stored: bool, data: st.DataObject) -> None:
    """Any byte of header, name or content changed: what comes out is the content, or an error that names it."""
    import tempfile

    content = bytes(range(256)) * 4
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED if stored else zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(f"{IMAGES}/0000000000.png", content)
        end = archive.fp.tell()  # type: ignore[union-attr]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{DRIVE}.zip"
        path.write_bytes(flipped(buffer.getvalue(), data.draw(st.integers(0, end - 1))))
        (found,) = read_many([RawData([folder]).files(IMAGES)["0000000000.png"]])
    if isinstance(found, SampleError):
        assert f"{DRIVE}.zip" in str(found)
        assert "0000000000.png" in str(found)
    else:
        assert found == content


def test_local_extra_fields_longer_than_the_directorys(tmp_path: Path) -> None:
    """The local header's length must be read from the file: zip tools write other extra fields there."""
    name, content = f"{IMAGES}/0000000000.png".encode(), b"frame" * 100
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(name.decode(), content)
    data = buffer.getvalue()
    extra = b"UT\x09\x00" + bytes(9) + b"ux\x0b\x00" + bytes(11)
    # Insert the extra field into the local header and move the directory's offset along.
    local = data[:28] + len(extra).to_bytes(2, "little") + name + extra + content
    directory = data[30 + len(name) + len(content) :]
    end = directory.rfind(b"PK\x05\x06")
    directory = directory[: end + 16] + len(local).to_bytes(4, "little") + directory[end + 20 :]
    (tmp_path / f"{DRIVE}.zip").write_bytes(local + directory)
    assert read(RawData([str(tmp_path)]).files(IMAGES)["0000000000.png"]) == content


def test_an_unreadable_folder_is_an_error_and_not_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    folder = tmp_path / DATE
    folder.mkdir()
    real = os.scandir

    def refuse(path: str) -> object:
        if str(path) == str(folder):
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(os, "scandir", refuse)  # tests may run as root, whom no mode bits stop
    with pytest.raises(InputError, match=r"2011_09_26: cannot be listed \(Permission denied\)"):
        RawData([str(tmp_path)]).files(DATE)
