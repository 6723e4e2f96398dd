"""Videos, lenses and crops of own cameras: which frames, which pixels, which intrinsics."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image
from prep_data import files_of, image, read_part

from md2.inference.film import VideoWriter
from prep.packing.pack import Packed, pack, scratch_folder
from prep.raw.camera import parse_camera, read_view
from prep.raw.files import RawData, read
from prep.raw.folder import FolderLayout, fitting_sizes
from prep.raw.video import find_frames
from prep.raw.zips import Ref
from prep.request import make_request
from prep.workers import start_workers
from shards.errors import InputError

Array = npt.NDArray[Any]
CAMERA = {"width": 320, "height": 200, "fx": 180.0, "fy": 190.0, "cx": 150.3, "cy": 104.2}
BROWN = (-0.25, 0.06, 0.002, -0.003, 0.001)
FISHEYE = (0.05, -0.02, 0.004, -0.001)
PYTHON = (sys.executable, "-m", "cli.main")


def write_camera(folder: Path, **fields: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "camera.yaml").write_text("".join(f"{key}: {value}\n" for key, value in fields.items()))


def run(raw: Path, out: Path, **options: Any) -> tuple[Packed, list[str]]:
    content = {"size": "native", "frames": None, "stereo": None, "depth": True, "depth_source": None, "codec": "png"}
    fixed = {"dataset": "folder", "split": None, "splits": None, "raw": [str(raw)], "download": None, "out": str(out)}
    request = make_request(**{**fixed, **content, **options})  # type: ignore[arg-type]
    plan = request.plan("stop", None)
    with start_workers(1) as workers:
        return pack(plan, request.lists, str(out), out.with_name("scratch"), workers), plan.notes


def layout(raw: Path) -> FolderLayout:
    return FolderLayout(RawData([str(raw)]))


# Lenses. A frame's colour is a function of the *distorted* coordinates, so it is exact without inverting anything.


def colour(x: Array, y: Array) -> Array:
    waves = (np.sin(9 * x + 1) * np.cos(7 * y), np.cos(8 * x - 5 * y), np.sin(6 * x + 6 * y + 2))
    return np.stack([128 + 90 * wave for wave in waves], axis=-1)


def lens(kind: str, x: Array, y: Array) -> tuple[Array, Array]:
    """OpenCV's documentation, line by line."""
    if kind == "fisheye":
        a, b = x, y
        r = np.sqrt(a**2 + b**2)
        theta = np.arctan(r)
        k1, k2, k3, k4 = FISHEYE
        theta_d = theta * (1 + k1 * theta**2 + k2 * theta**4 + k3 * theta**6 + k4 * theta**8)
        return (theta_d / r) * a, (theta_d / r) * b
    k1, k2, p1, p2, k3 = BROWN
    r2 = x**2 + y**2
    radial = 1 + k1 * r2 + k2 * r2**2 + k3 * r2**3
    return x * radial + 2 * p1 * x * y + p2 * (r2 + 2 * x**2), y * radial + p1 * (r2 + 2 * y**2) + 2 * p2 * x * y


@pytest.mark.parametrize("crop", [{}, {"left": 8, "top": 30, "right": 3, "bottom": 41}])
@pytest.mark.parametrize("kind", ["distortion", "fisheye"])
def test_frames_are_straightened(kind: str, crop: dict[str, int], tmp_path: Path) -> None:
    fx, fy, cx, cy = (CAMERA[key] for key in ("fx", "fy", "cx", "cy"))
    v, u = np.mgrid[:200, :320]
    pixels = np.rint(colour((u - cx) / fx, (v - cy) / fy)).astype(np.uint8)
    extra = {kind: list(BROWN if kind == "distortion" else FISHEYE), "crop": crop}
    write_camera(tmp_path / "raw", **CAMERA, **extra)
    for name in ("left", "depth"):
        (tmp_path / "raw/run" / name).mkdir(parents=True)
    depth = (u + 320.0 * v).astype(np.float32) / 256  # each pixel has its own depth
    for n in range(3):
        Image.fromarray(pixels).save(tmp_path / "raw/run/left" / f"{n}.png")
        np.save(tmp_path / "raw/run/depth" / f"{n}.npy", depth)
    run(tmp_path / "raw", tmp_path / "out")
    (sample,) = read_part(tmp_path / "out")
    k = np.frombuffer(sample["k.f32"], "<f4").astype(np.float64)
    box = [crop.get(side, 0) for side in ("left", "top", "right", "bottom")]
    size = (320 - box[0] - box[2], 200 - box[1] - box[3])
    assert json.loads(sample["meta.json"])["native_size"] == list(size)
    v2, u2 = np.mgrid[: size[1], : size[0]].astype(np.float64)
    x, y = lens(kind, (u2 - k[2]) / k[0], (v2 - k[3]) / k[1])
    error = np.abs(image(sample["0.png"]).astype(float) - colour(x, y))
    assert error.max() < 3
    assert error.mean() < 0.65  # rounding twice; half a pixel would be 1.5
    # All of it was filmed, and it reaches each edge: no larger upright rectangle was.
    source_u, source_v = x * fx + cx, y * fy + cy
    edges = [source_u.min() - box[0], source_v.min() - box[1]]
    edges += [320 - 1 - box[2] - source_u.max(), 200 - 1 - box[3] - source_v.max()]
    assert np.abs(edges).max() < 0.02
    assert min(edges) > -0.01
    with Image.open(io.BytesIO(sample["depth.png"])) as picture:
        stored = np.asarray(picture).astype(float)
    off = np.hypot(stored % 320 - source_u, stored // 320 - source_v)
    assert off.max() < 0.75  # half a pixel's diagonal


def test_a_camera_file_serves_single_frames(tmp_path: Path) -> None:
    write_camera(tmp_path, **CAMERA, crop={"left": 20, "bottom": 50})
    frame = Image.fromarray(np.random.default_rng(0).integers(0, 255, (200, 320, 3), dtype=np.uint8))
    picture, camera = read_view(tmp_path / "camera.yaml")(frame)
    np.testing.assert_array_equal(np.asarray(picture), np.asarray(frame)[:150, 20:])
    assert camera == (180.0, 190.0, 150.3 - 20, 104.2)
    with pytest.raises(InputError, match=r"a frame of 300x200, but .*camera.yaml is for 320x200"):
        read_view(tmp_path / "camera.yaml")(frame.resize((300, 200)))
    with pytest.raises(InputError, match="cannot be read"):
        read_view(tmp_path / "nowhere.yaml")


def test_a_lens_without_distortion_changes_nothing(tmp_path: Path) -> None:
    assert parse_camera(b"fov: 90\n", "c").lens is None
    text = "".join(f"{key}: {value}\n" for key, value in CAMERA.items())
    assert parse_camera(f"{text}distortion: [0, 0, 0, 0, 0]\n".encode(), "c").lens is None


# Crops and sizes


def test_intrinsics_of_a_crop_by_hand(tmp_path: Path) -> None:
    """Bonnet and sky are cut off, then the rest is halved: cx' = (cx - left + 0.5) / 2 - 0.5."""
    write_camera(tmp_path / "raw", **CAMERA, crop={"left": 20, "top": 30, "bottom": 10})
    noise = np.random.default_rng(0).integers(0, 255, (200, 320, 3), dtype=np.uint8)
    (tmp_path / "raw/run/left").mkdir(parents=True)
    for n in range(3):
        Image.fromarray(noise).save(tmp_path / "raw/run/left" / f"{n}.png")
    run(tmp_path / "raw", tmp_path / "out", size="150x80")
    (sample,) = read_part(tmp_path / "out")
    k = np.frombuffer(sample["k.f32"], "<f4")
    np.testing.assert_allclose(k, [90, 95, 64.9, 36.85], rtol=1e-6)
    expected = Image.fromarray(noise[30:190, 20:]).resize((150, 80), Image.Resampling.LANCZOS)
    np.testing.assert_array_equal(image(sample["0.png"]), np.asarray(expected))


def test_a_corrected_camera_is_another_dataset(tmp_path: Path) -> None:
    write_camera(tmp_path / "raw", **CAMERA)
    (tmp_path / "raw/run/left").mkdir(parents=True)
    for n in range(3):
        Image.new("RGB", (320, 200), (n, n, n)).save(tmp_path / "raw/run/left" / f"{n}.png")
    run(tmp_path / "raw", tmp_path / "out")
    assert run(tmp_path / "raw", tmp_path / "out")[0].already
    write_camera(tmp_path / "raw", **{**CAMERA, "fx": 185})
    packed, _ = run(tmp_path / "raw", tmp_path / "out")
    assert packed.manifest.intrinsics is None
    assert packed.url.endswith("out-v2")
    k = np.frombuffer(read_part(Path(packed.url))[0]["k.f32"], "<f4")
    assert k[0] == 185


def test_fov_stands_for_a_calibration(tmp_path: Path) -> None:
    (tmp_path / "run/left").mkdir(parents=True)
    Image.new("RGB", (1920, 1080)).save(tmp_path / "run/left/0.png")
    write_camera(tmp_path, fov=90)
    drive = layout(tmp_path).open("run")
    assert drive is not None
    p = drive.calibration.projection["l"]
    np.testing.assert_allclose([p[0, 0], p[1, 1], p[0, 2], p[1, 2]], [960, 960, 959.5, 539.5])


@pytest.mark.parametrize(
    ("frame", "sizes"),
    [
        ((1920, 1080), {(512, 288)}),
        ((1080, 1920), {(288, 512)}),
        ((640, 480), {(384, 288)}),
        ((1242, 375), {(640, 192)}),
    ],
)
def test_sizes_that_fit(frame: tuple[int, int], sizes: set[tuple[int, int]]) -> None:
    found = fitting_sizes(frame)
    assert sizes <= set(found)
    for width, height in found:
        assert width % 32 == height % 32 == 0
        assert abs(frame[0] * height / (frame[1] * width) - 1) < 0.06


def test_a_squeeze_is_noted(tmp_path: Path) -> None:
    write_film(tmp_path / "raw/a.mp4", size=(192, 108), seconds=[n / 10 for n in range(5)])
    write_camera(tmp_path / "raw", fov=90)
    packed, notes = run(tmp_path / "raw", tmp_path / "out", size="640x192")
    assert packed.manifest.intrinsics == "guessed"
    assert any("192x108 become 640x192, which squeezes them 1.88 times; --size 512x288 or" in note for note in notes)
    assert run(tmp_path / "raw", tmp_path / "b", size="512x288")[1] == notes[:-1]
    notes = run(tmp_path / "raw", tmp_path / "c", size="500x20")[1]
    assert any("would resize 500x20 in every batch; --size 512x64 avoids" in note for note in notes)


# Videos


def picture(number: int, size: tuple[int, int] = (96, 64)) -> Array:
    """Stripes that move; the left edge's grey level is the number, and the top left corner is light."""
    across = np.arange(size[0])[None].repeat(size[1], 0)
    grey = 100 + 60 * np.sin((across + 5 * number) / 9)
    grey[:, :16] = 20 + 3 * number
    grey[:16, :16] = 250
    return np.repeat(grey[..., None], 3, axis=2).astype(np.uint8)


def write_film(
    path: Path, numbers: list[int] | None = None, seconds: list[float] | None = None, size: tuple[int, int] = (96, 64)
) -> Path:
    """Frames `numbers` shown at `seconds`."""
    seconds = seconds or [n / 10 for n in range(len(numbers or []))]
    with VideoWriter(path, Fraction(1000)) as film:
        for number, second in zip(numbers or range(len(seconds)), seconds, strict=True):
            film.write(picture(number, size), second)
    return path


def found(path: Path, rate: float = 10) -> tuple[list[int], list[int], list[str]]:
    """The numbers in a film's chosen frames, by their grey level; where clips start; notes."""
    video = find_frames(Ref(path.name, str(path), path.stat().st_size), path.name, rate)
    levels = [image(read(frame))[40:60, 4:12].mean() for frame in video.frames]
    return [round((level - 20) / 3) for level in levels], video.starts, video.notes


def test_frames_are_chosen_by_their_times(tmp_path: Path) -> None:
    """A phone's film: 30 a second, then 15, then 60, with jitter; ten a second are taken, evenly in time."""
    times = [n / 30 for n in range(15)] + [0.5 + n / 15 for n in range(8)] + [1.034 + n / 60 for n in range(12)]
    numbers, starts, _ = found(write_film(tmp_path / "a.mp4", seconds=times))
    chosen = [times[n] for n in numbers]
    for tick in np.arange(0, 1.2, 0.1):  # the first frame at or after each tenth
        first = next(time for time in times if time >= tick - 0.001)
        assert first in chosen
    assert len(chosen) == len({round(time, 4) for time in chosen}) <= 13
    assert not starts
    assert found(tmp_path / "a.mp4", rate=1000)[0] == list(range(len(times)))


def test_repeated_pictures_and_pauses(tmp_path: Path) -> None:
    """A screen recorder writes each picture three times; the recording pauses for two seconds."""
    shown = [n for n in range(12) for _ in range(3)]
    times = [n / 30 for n in range(18)] + [2.6 + n / 30 for n in range(18)]
    numbers, starts, notes = found(write_film(tmp_path / "a.mp4", shown, times), rate=30)
    assert numbers == list(range(12))
    assert starts == [6]
    assert any("24 frames show the picture before them" in note for note in notes)
    write_camera(tmp_path, fov=80)
    run(tmp_path, tmp_path / "out")
    pairs = {int(s["__key__"][-10:]) for part in ("train", "val") for s in read_part(tmp_path / "out", part)}
    assert pairs
    assert not pairs & {5, 6}  # their neighbours are on the other side of the pause


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_a_turned_film_is_upright(turns: int, tmp_path: Path) -> None:
    """A phone stores the sensor's picture and how to turn it, in the track header's matrix (ISO 14496-12)."""
    path = tmp_path / "raw/a.mp4"
    with VideoWriter(path, Fraction(10)) as film:
        for n in range(4):
            film.write(np.ascontiguousarray(np.rot90(picture(n), turns)))  # counter-clockwise
    one, data = 0x10000, bytearray(path.read_bytes())
    cos, sin = [(1, 0), (0, 1), (-1, 0), (0, -1)][turns]  # shown turned clockwise
    at = data.index(b"tkhd") + 4 + 4 + 20 + 8 + 8
    assert data[at : at + 36] == b"".join(n.to_bytes(4, "big") for n in (one, 0, 0, 0, one, 0, 0, 0, 0x40000000))
    matrix = [cos * one, sin * one, 0, -sin * one, cos * one, 0, 0, 0, 0x40000000]
    data[at : at + 36] = b"".join(n.to_bytes(4, "big", signed=True) for n in matrix)
    path.write_bytes(data)
    write_camera(tmp_path / "raw", fov=80)
    run(tmp_path / "raw", tmp_path / "out")
    for sample in read_part(tmp_path / "out"):
        pixels = image(sample["0.png"]).astype(float)
        assert pixels.shape == (64, 96, 3)
        assert np.abs(pixels - picture(int(sample["__key__"][-10:]))).mean() < 4


def test_a_killed_run_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    """Frames are found again from key frames: chunks that are made alone are those of one pass."""
    write_film(tmp_path / "raw/a.mp4", list(range(70)))
    write_camera(
        tmp_path / "raw", width=96, height=64, fx=60, fy=60, cx=47.5, cy=31.5, distortion=[-0.2, 0.03, 0, 0, 0]
    )
    run(tmp_path / "raw", tmp_path / "whole", codec="jpeg", shard_mb=1)
    out = tmp_path / "out"
    command = [*PYTHON, "prep", "--dataset", "folder", "--raw", str(tmp_path / "raw"), "--out", str(out)]
    command += ["--size", "native", "--workers", "1", "--shard-mb", "1"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while not list(scratch_folder(str(out)).glob("*.chunk")):
            assert process.poll() is None, "finished before it was killed"
            time.sleep(0.002)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert files_of(out) == files_of(tmp_path / "whole")


# Calibrations of other tools


K_TEXT = "[ 500.5, 0., 320.25, 0., 501., 240.75, 0., 0., 1. ]"
OPENCV = f"""%YAML:1.0
---
image_width: 640
image_height: 480
camera_matrix: !!opencv-matrix
   rows: 3
   cols: 3
   dt: d
   data: {K_TEXT}
distortion_coefficients: !!opencv-matrix
   rows: 5
   cols: 1
   dt: d
   data: [ -0.28, 0.07, 0.001, -0.002, 0. ]
"""
ROS = f"""image_width: 640
image_height: 480
camera_name: dash
camera_matrix: {{rows: 3, cols: 3, data: {K_TEXT}}}
distortion_model: MODEL
distortion_coefficients: {{rows: 1, cols: 5, data: COEFFICIENTS}}
rectification_matrix: {{rows: 3, cols: 3, data: [1, 0, 0, 0, 1, 0, 0, 0, 1]}}
crop: {{bottom: 60}}
"""
KALIBR = """cam0:
  camera_model: pinhole
  intrinsics: [500.5, 501.0, 320.25, 240.75]
  distortion_model: MODEL
  distortion_coeffs: COEFFICIENTS
  resolution: [640, 480]
  rostopic: /cam0
"""


@pytest.mark.parametrize(
    ("text", "model", "values", "expected"),
    [
        (OPENCV, "", "", ("distortion", (-0.28, 0.07, 0.001, -0.002))),
        (ROS, "plumb_bob", "[-0.28, 0.07, 0.001, -0.002, 0.0]", ("distortion", (-0.28, 0.07, 0.001, -0.002))),
        (ROS, "equidistant", "[-0.02, 0.01, 0.0, 0.0]", ("fisheye", (-0.02, 0.01, 0, 0))),
        (KALIBR, "radtan", "[-0.28, 0.07, 0.001, -0.002]", ("distortion", (-0.28, 0.07, 0.001, -0.002))),
        (KALIBR, "equidistant", "[-0.02, 0.01, 0.0, 0.0]", ("fisheye", (-0.02, 0.01, 0, 0))),
        (KALIBR, "none", "[]", None),
    ],
)
def test_calibrations_of_other_tools_are_read(text: str, model: str, values: str, expected: Any) -> None:
    camera = parse_camera(text.replace("MODEL", model).replace("COEFFICIENTS", values).encode(), "camera.yaml")
    assert (camera.width, camera.height) == (640, 480)
    assert (camera.fx, camera.fy, camera.cx, camera.cy) == (500.5, 501, 320.25, 240.75)
    assert camera.crop.bottom == (60 if text is ROS else 0)
    if expected is None:
        assert camera.lens is None
    else:
        assert camera.lens is not None
        assert (camera.lens.kind, camera.lens.coefficients[:4]) == expected


# What cannot be


FIELDS = "".join(f"{key}: {value}\n" for key, value in CAMERA.items())


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("fov: 200\n", "fov: .*150"),
        (FIELDS + "fov: 90\n", "fov stands for fx, fy, cx and cy"),
        ("fov: 90\ndistortion: [0.1, 0, 0, 0, 0]\n", "not with fov"),
        ("fov: 90\nwidth: 640\n", "width and height go together"),
        (FIELDS + "distortion: [0.1, 0.2]\n", "distortion: k1, k2, p1, p2, k3 are needed"),
        (FIELDS + "distortion: [.nan, 0, 0, 0, 0]\n", "distortion.*finite"),
        (FIELDS + "distortion: [-0.2, 0, 0, 0, 0]\nfisheye: [0, 0, 0, 0]\n", "distortion or fisheye, not both"),
        (FIELDS + "fisheye: [0.1]\n", "fisheye"),
        (FIELDS + "distortion: [-2.5, 0, 0, 0, 0]\n", "distortion: a pinhole camera cannot show the frame's edges"),
        (FIELDS.replace("180.0", "60").replace("190.0", "60") + "fisheye: [0, 0, 0, 0]\n", "fisheye: .*crop:"),
        (FIELDS + "k1: -0.3\n", r"k1: a lens is written as distortion: \[k1, k2, p1, p2, k3\]"),
        (FIELDS + "crop: {top: 150, bottom: 60}\n", "crop leaves less than 8 pixels of frames of 320x200"),
        (FIELDS + "crop: {top: -3}\n", "crop.top"),
        (FIELDS + "rate: 0\n", "rate"),
        ("fov 90\n", "not lines of the form fov: 90"),
        (KALIBR.replace("pinhole", "omni").replace("MODEL", "radtan").replace("COEFFICIENTS", "[]"), "kind omni"),
        ("K: [[500, 0, 320], [0, 500, 240], [0, 0, 1]]\n", r"its K\) without the frames' size"),
    ],
)
def test_a_camera_that_cannot_be_is_one_line(text: str, says: str) -> None:
    with pytest.raises(InputError, match=rf"raw/camera\.yaml: .*{says}") as caught:
        parse_camera(text.encode(), "raw/camera.yaml")
    assert "\n" not in str(caught.value)


def test_videos_that_cannot_be(tmp_path: Path) -> None:
    write_camera(tmp_path / "raw", fov=90, width=640, height=480)
    film = write_film(tmp_path / "raw/a.mp4", list(range(6)))
    with pytest.raises(InputError, match=r"a\.mp4: 96x64 pixels, but .*camera\.yaml is for 640x480"):
        layout(tmp_path / "raw").open("a.mp4")
    write_camera(tmp_path / "raw", fov=90)
    (tmp_path / "elsewhere.mp4").write_bytes(film.read_bytes())
    (tmp_path / "raw/b.mp4").symlink_to(tmp_path / "elsewhere.mp4")
    with pytest.raises(InputError, match=r"b\.mp4: a link leads out of"):
        layout(tmp_path / "raw").drives()
    (tmp_path / "raw/b.mp4").unlink()
    (tmp_path / "raw/b.mp4").write_text("no video")
    with pytest.raises(InputError, match=r"b\.mp4: cannot be opened"):
        layout(tmp_path / "raw").open("b.mp4")
    with pytest.raises(InputError, match=r"a\.mp4: a video; give its folder as --raw, with a camera\.yaml in it"):
        RawData([str(film)])
    drive = layout(tmp_path / "raw").open("a.mp4")
    assert drive is not None
    write_film(film, list(range(10, 16)))
    with pytest.raises(InputError, match=r"a\.mp4: frame 3: cannot be read again; was the video changed"):
        read(drive.images["l"][3])
