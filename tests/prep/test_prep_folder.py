"""Your own drives: folders of frames and a camera.yaml become a dataset that trains as KITTI's does."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from prep_data import DATE, DRIVE, image, read_part, write_split
from train_data import losses, train

import md2
from prep.packing.pack import Packed, pack
from prep.raw.camera import parse_camera
from prep.raw.clips import natural
from prep.raw.files import RawData
from prep.raw.folder import FolderLayout, split_drives
from prep.request import Request, make_request
from prep.workers import start_workers
from shards.errors import InputError, UsageError

# The synthetic drive's left camera (see its calib_cam_to_cam.txt).
CAMERA = {"width": 192, "height": 64, "fx": 111.36, "fy": 111.36, "cx": 93.868, "cy": 29.068}


def write_camera(folder: Path, **fields: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "camera.yaml").write_text("".join(f"{key}: {value}\n" for key, value in (CAMERA | fields).items()))


def write_drive(drive: Path, folder: Path, frames: int = 8, name: str = "{:06d}", right: bool = False) -> None:
    """FrameRefs of the synthetic drive under other names."""
    for side, camera in [("left", "02")] + ([("right", "03")] if right else []):
        (folder / side).mkdir(parents=True)
        for number in range(frames):
            source = drive / DATE / DRIVE / f"image_{camera}" / "data" / f"{number % 8:010d}.png"
            shutil.copy(source, folder / side / (name.format(number) + ".png"))


def job(raw: Path, out: Path, **options: Any) -> Request:
    content = {"size": "96x32", "frames": None, "stereo": None, "depth": True, "depth_source": None, "codec": "png"}
    fixed = {"dataset": "folder", "split": None, "splits": None, "raw": [str(raw)], "download": None, "out": str(out)}
    return make_request(**{**fixed, **content, **options})  # type: ignore[arg-type]


def run_job(raw: Path, out: Path, **options: Any) -> Packed:
    made = job(raw, out, **options)
    with start_workers(1) as workers:
        return pack(made.plan("stop", None), made.lists, str(out), out.with_name("scratch"), workers)


def test_own_drives_train_and_their_unit_is_metres(drive: Path, tmp_path: Path) -> None:
    """From folders to a checkpoint: both cameras, the baseline in camera.yaml."""
    write_camera(tmp_path / "drives", baseline=0.54)
    write_drive(drive, tmp_path / "drives" / "monday", frames=20, right=True)
    run_job(tmp_path / "drives", tmp_path / "out")
    extra = ["train.max_steps=2", "data.baseline=metres"]
    outcome, _ = train(tmp_path / "out", tmp_path / "run", "mono_stereo", extra)
    assert outcome.stopped.step == 2
    assert all(loss > 0 for loss in losses(tmp_path / "run"))
    assert len(losses(tmp_path / "run")) == 2
    assert md2.load(tmp_path / "run").metres_per_unit == 1


def test_frames_intrinsics_and_an_automatic_split(drive: Path, tmp_path: Path) -> None:
    write_camera(tmp_path / "drives")
    write_drive(drive, tmp_path / "drives" / "monday", frames=20)
    packed = run_job(tmp_path / "drives", tmp_path / "out")
    assert not packed.skipped
    assert (packed.manifest.stereo, packed.manifest.depth, packed.manifest.split.name) == (False, None, "drives")
    assert packed.manifest.components == ["0.png", "k.f32", "m1.png", "meta.json", "p1.png"]
    train, val = ({int(s["__key__"][-10:]): s for s in read_part(tmp_path / "out", part)} for part in ("train", "val"))
    # Of 20 frames the last 2 would be val's, but neither has its neighbours there: then no frame is lost to it.
    assert sorted(train) == list(range(1, 19))
    assert not val
    for number, sample in train.items():
        assert sample["__key__"] == f"monday_l_{number:010d}"
        for component, offset in (("m1.png", -1), ("0.png", 0), ("p1.png", 1)):
            source = tmp_path / "drives" / "monday" / "left" / f"{number + offset:06d}.png"
            with Image.open(source) as picture:
                expected = np.asarray(picture.resize((96, 32), Image.Resampling.LANCZOS))
            np.testing.assert_array_equal(image(sample[component]), expected)
        k = np.frombuffer(sample["k.f32"], "<f4")
        np.testing.assert_allclose(k, [55.68, 55.68, 94.368 / 2 - 0.5, 29.568 / 2 - 0.5], rtol=1e-6)
    assert json.loads(train[3]["meta.json"])["sources"]["p1.png"] == "monday/left/000004.png"
    assert "KITTI" not in (tmp_path / "out" / "README.md").read_text().split("## Licence")[1]


def test_no_frame_is_in_both_parts(drive: Path, tmp_path: Path) -> None:
    write_camera(tmp_path / "drives")
    write_drive(drive, tmp_path / "drives" / "monday", frames=60)
    run_job(tmp_path / "drives", tmp_path / "out", frames="0,-2,1")
    frames: dict[str, set[str]] = {}
    for part in ("train", "val"):
        samples = read_part(tmp_path / "out", part)
        frames[part] = {source for s in samples for source in json.loads(s["meta.json"])["sources"].values()}
    assert not frames["train"] & frames["val"]
    assert len(read_part(tmp_path / "out", "val")) == 3  # 54 to 59, less two before and one after
    assert len(read_part(tmp_path / "out")) == 51  # 2 to 52


def test_a_stereo_pair_and_ground_truth(drive: Path, tmp_path: Path) -> None:
    folder = tmp_path / "drives" / "monday"
    write_camera(tmp_path / "drives", baseline=0.54)
    write_drive(drive, folder, right=True)
    (folder / "depth").mkdir()
    depth = np.zeros((64, 192), np.uint16)
    depth[10, 20] = 5 * 256
    Image.fromarray(depth).save(folder / "depth" / "000003.png")
    packed = run_job(tmp_path / "drives", tmp_path / "out")
    assert packed.manifest.stereo
    assert packed.manifest.depth is not None
    assert (packed.manifest.depth.source, packed.manifest.depth.convention) == ("dense", "camera_z")
    assert packed.manifest.optional_components == {"depth.png": 1}
    samples = {s["__key__"]: s for s in read_part(tmp_path / "out")}
    assert len([key for key in samples if "_r_" in key]) == len(samples) / 2
    for key, sample in samples.items():
        (t,) = np.frombuffer(sample["t.f32"], "<f4")
        assert t == pytest.approx(-0.54 if "_l_" in key else 0.54)
    left, right = samples["monday_l_0000000003"], samples["monday_r_0000000003"]
    assert left["s.png"] == right["0.png"]
    assert right["s.png"] == left["0.png"]
    with Image.open(io.BytesIO(left["depth.png"])) as picture:
        np.testing.assert_array_equal(np.asarray(picture), depth)
    assert "depth.png" not in right


def test_several_drives_with_their_own_cameras(drive: Path, tmp_path: Path) -> None:
    write_camera(tmp_path / "drives" / "a")
    write_camera(tmp_path / "drives" / "b" / "one", fx=200.0)
    write_drive(drive, tmp_path / "drives" / "a" / "first run")
    write_drive(drive, tmp_path / "drives" / "b" / "one")
    layout = FolderLayout(RawData([str(tmp_path / "drives")]))
    assert layout.drives() == ["a/first run", "b/one"]
    focal = [layout.open(name).calibration.projection["l"][0, 0] for name in layout.drives()]  # type: ignore[union-attr]
    assert focal == [111.36, 200.0]
    run_job(tmp_path / "drives", tmp_path / "out")
    assert {s["__key__"].rsplit("_", 2)[0] for s in read_part(tmp_path / "out")} == {"a_first_run", "b_one"}


def test_own_lists(drive: Path, tmp_path: Path) -> None:
    write_camera(tmp_path / "drives")
    write_drive(drive, tmp_path / "drives" / "monday")
    (tmp_path / "val_files.txt").write_text("monday 3 l\nmonday 0 l\n")
    packed = run_job(tmp_path / "drives", tmp_path / "out", split=str(tmp_path / "val_files.txt"))
    assert [s["__key__"] for s in read_part(tmp_path / "out", "val")] == ["monday_l_0000000003"]
    assert [skip.reason for skip in packed.skipped] == ["drive's end, no neighbour -1"]


def test_timestamps_follow_each_other_by_order_and_gaps_count_by_name(drive: Path, tmp_path: Path) -> None:
    write_camera(tmp_path / "a")
    write_drive(drive, tmp_path / "a" / "run", name="{:d}83555584")
    by_order = FolderLayout(RawData([str(tmp_path / "a")])).open("run")
    assert by_order is not None
    assert sorted(by_order.images["l"]) == list(range(8))
    assert by_order.images["l"][5].path == "run/left/583555584.png"
    write_camera(tmp_path / "b", numbering="names")
    write_drive(drive, tmp_path / "b" / "run", name="frame_{:d}")
    (tmp_path / "b" / "run" / "left" / "frame_4.png").unlink()
    layout = FolderLayout(RawData([str(tmp_path / "b")]))
    by_name = layout.open("run")
    assert by_name is not None
    assert sorted(by_name.images["l"]) == [0, 1, 2, 3, 5, 6, 7]
    lines = split_drives([by_name], "b", (0, -1, 1), stereo=False, val=0).parts["train"]
    assert [line.frame for line in lines] == [1, 2, 6]


def test_natural_order() -> None:
    stems = ["f10", "f2", "f1b", "f1a", "10", "9"]
    assert sorted(stems, key=natural) == ["9", "10", "f1a", "f1b", "f2", "f10"]


def test_frames_in_the_drives_folder_itself(drive: Path, tmp_path: Path) -> None:
    write_camera(tmp_path / "run", left=".")
    for path in sorted((drive / DATE / DRIVE / "image_02" / "data").glob("*.png")):
        shutil.copy(path, tmp_path / "run" / path.name)
    layout = FolderLayout(RawData([str(tmp_path)]))
    assert layout.drives() == ["run"]
    found = layout.open("run")
    assert found is not None
    assert found.images["l"][3].path == "run/0000000003.png"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("width: 192\n", "height is missing"),
        ("width: [", "not YAML"),
        ("width: 2011-09-31", "not YAML"),
        ("".join(f"{k}: {v}\n" for k, v in (CAMERA | {"cx": ".nan"}).items()), "cx: Input should be a finite number"),
        ("".join(f"{k}: {v}\n" for k, v in (CAMERA | {"fx": ".inf"}).items()), "fx: Input should be a finite number"),
        ("", "width is missing"),
        ("- 1\n", "camera.yaml"),
        ("".join(f"{k}: {v}\n" for k, v in CAMERA.items()) + "focal: 3\n", "focal: no such field"),
        ("".join(f"{k}: {v}\n" for k, v in (CAMERA | {"fx": -1}).items()), "fx: Input should be greater than 0"),
        ("".join(f"{k}: {v}\n" for k, v in (CAMERA | {"baseline": 0}).items()), "baseline"),
    ],
)
def test_a_broken_camera_file_is_named(text: str, says: str) -> None:
    with pytest.raises(InputError, match=r"raw/camera\.yaml") as caught:
        parse_camera(text.encode(), "raw/camera.yaml")
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_drives_in_any_script_have_keys_of_their_own(drive: Path, tmp_path: Path) -> None:
    names = ["早上", "晚上", "x" * 120, "x" * 121, "monday morning", "a.b", "week/1"]
    write_camera(tmp_path / "drives")
    for name in names:
        write_drive(drive, tmp_path / "drives" / name, frames=3)
    (tmp_path / "drives" / "a.b" / "left" / "._000001.png").write_text("macOS puts these beside files")
    split = write_split(tmp_path / "split", *(f"{name} 1 l" for name in names))
    run_job(tmp_path / "drives", tmp_path / "out", split=str(split))
    samples = {json.loads(s["meta.json"])["drive"]: s["__key__"] for s in read_part(tmp_path / "out")}
    assert set(samples) == set(names)
    assert len(set(samples.values())) == len(names)
    assert samples["monday morning"] == "monday_morning_l_0000000001"
    write_drive(drive, tmp_path / "drives" / "week_1", frames=3)
    both = write_split(tmp_path / "both", "week/1 1 l", "week_1 1 l")
    with pytest.raises(InputError, match="drives 'week/1' and 'week_1' would both be week_1 in the dataset"):
        run_job(tmp_path / "drives", tmp_path / "out2", split=str(both))


def test_what_cannot_be(drive: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no drives; there is no camera\.yaml"):
        job(tmp_path, tmp_path / "out")
    write_camera(tmp_path / "drives")
    write_drive(drive, tmp_path / "drives" / "monday", frames=2)
    with pytest.raises(UsageError, match="--stereo: no drive"):
        job(tmp_path / "drives", tmp_path / "out", stereo=True)
    with pytest.raises(UsageError, match="--download is for KITTI"):
        job(tmp_path / "drives", tmp_path / "out", download="public")
    with pytest.raises(UsageError, match="--depth-source is for KITTI"):
        job(tmp_path / "drives", tmp_path / "out", depth_source="improved")
    with pytest.raises(InputError, match="monday: too few frames for --frames 0,-1,1"):
        job(tmp_path / "drives", tmp_path / "out")
    elsewhere = job(tmp_path / "drives", tmp_path / "out", split=str(write_split(tmp_path, "tuesday 1 l")))
    with pytest.raises(InputError, match=r"first: tuesday.*drives there: monday"):
        elsewhere.refuse_empty(elsewhere.plan("stop", None))
    with pytest.raises(UsageError, match="--split is missing"):
        job(tmp_path / "drives", tmp_path / "out", dataset="kitti")


def test_a_frame_of_another_size_than_the_cameras(drive: Path, tmp_path: Path) -> None:
    write_camera(tmp_path / "drives", width=200)
    write_drive(drive, tmp_path / "drives" / "monday")
    with pytest.raises(InputError, match="192x64 pixels, but the calibration is for 200x64"):
        run_job(tmp_path / "drives", tmp_path / "out")
