"""docs/camera.md, from top to bottom: its camera film a street, its commands make a depth picture of it."""

from __future__ import annotations

import io
import os
import re
import shlex
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from prep_data import read_part

from bench.camera import Distorted, OwnRig
from cli.console import run
from cli.main import app
from md2.inference.film import VideoWriter
from prep.raw.camera import parse_camera
from prep.synthetic.render import Renderer
from prep.synthetic.street import Street, build_street
from shards.video import open_video

PAGE = (Path(__file__).resolve().parents[2] / "docs/camera.md").read_text()
FRAMES = 6
SHORT = {
    "train": ["model.weights=scratch", "train.device=cpu", "train.max_steps=1", "train.batch_size=1"],
    "predict": ["--limit", "2", "--device", "cpu", "--save", "side_by_side,ply"],
    "report": ["--device", "cpu"],
}
"""What the test adds to the page's commands."""


def block(first: str) -> str:
    """The page's code block that begins like this."""
    (found,) = re.findall(rf"((?:^    {first}.*\n)(?:^(?:    .*)?\n)*)", PAGE, re.MULTILINE)
    return "".join(f"{line[4:]}\n" for line in found.splitlines())


def film(street: Street, path: Path) -> None:
    """The street as the page's camera sees it, rendered at half its size."""
    camera = yaml.safe_load(block("width"))
    half = [camera["fx"] / 2, camera["fy"] / 2, (camera["cx"] + 0.5) / 2 - 0.5, (camera["cy"] + 0.5) / 2 - 0.5]
    size = (camera["width"], camera["height"])
    lens = Distorted((size[0] // 2, size[1] // 2), (half[0], half[1], half[2], half[3]), tuple(camera["distortion"]))
    wide = lens.wide(0.7)
    renderer = Renderer(street, wide)
    with VideoWriter(path, Fraction(camera["rate"])) as video:
        for n in range(FRAMES):
            picture = Image.fromarray(lens.image(renderer.image(n, 2)[0], wide.camera))
            video.write(np.asarray(picture.resize(size, Image.Resampling.BILINEAR)))


@pytest.fixture(scope="module")
def street() -> Street:
    return build_street(0, 1, FRAMES)


@pytest.fixture(scope="module")
def walked(street: Street, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which all of the page's commands were run."""
    folder, before = tmp_path_factory.mktemp("own"), Path.cwd()
    film(street, folder / "drives/monday.mp4")
    (folder / "drives/camera.yaml").write_text(block("width"))
    os.chdir(folder)
    try:
        for line in block("md2 prep").strip().splitlines():
            _, *words = shlex.split(line, comments=True)
            assert run(app, words + SHORT.get(words[0], [])) == 0, line
    finally:
        os.chdir(before)
    return folder


def test_the_commands_end_in_a_depth_picture(walked: Path) -> None:
    assert {path.name for path in walked.iterdir()} == {"drives", "shards", "drives.png", "runs", "predictions"}
    assert (walked / "runs/drives/report.html").is_file()
    (picture, *more) = open_video(walked / "predictions/monday.mp4")
    assert len(more) == 1
    assert picture.width == 1280, "as cropped: above the disparity, which is as large"
    assert 2 * 640 < picture.height < 2 * 640 + 100
    assert len(list((walked / "predictions/monday").glob("*.ply"))) == 2


def test_what_was_packed_and_predicted_is_what_a_pinhole_camera_sees(walked: Path, street: Street) -> None:
    samples = read_part(walked / "shards/drives")
    assert len(samples) == FRAMES - 2
    fx, fy, cx, cy = np.frombuffer(samples[0]["k.f32"], "<f4").astype(float)
    packed = grey(samples[0]["0.jpg"])
    renderer = Renderer(street, OwnRig(packed.size, (fx, fy, cx, cy)))
    exact = renderer.image(int(samples[0]["__key__"].rsplit("_", 1)[1]), 2)[0]
    assert likeness(packed, exact) > 0.97
    for axis in (0, 1):
        shifted = Image.fromarray(np.roll(np.asarray(packed), 1, axis))
        assert likeness(shifted, exact) < 0.96, "one pixel is noticed"
    (first, *_) = open_video(walked / "predictions/monday.mp4")
    seen = first.crop((0, 0, 1280, 640)).resize(packed.size, Image.Resampling.LANCZOS).convert("L")
    assert likeness(seen, renderer.image(0, 2)[0]) > 0.97


def grey(data: bytes) -> Image.Image:
    with Image.open(io.BytesIO(data)) as picture:
        return picture.convert("L")


def likeness(picture: Image.Image, exact: np.ndarray) -> float:
    """Correlation in the worst of the picture's corners, where the lens bends most."""
    width, height = picture.size
    a, b = np.asarray(picture).astype(float), np.asarray(Image.fromarray(exact).convert("L")).astype(float)
    corners = [
        np.s_[y : y + height // 3, x : x + width // 4] for x in (0, width * 3 // 4) for y in (0, height * 2 // 3)
    ]
    return min(np.corrcoef(a[c].ravel(), b[c].ravel())[0, 1] for c in corners)


def test_the_calibration_from_python_is_the_page_s_camera(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(block("import yaml"), {})
    found, written = (
        parse_camera(text, "c") for text in ((tmp_path / "camera.yaml").read_bytes(), block("width").encode())
    )
    assert (found.fx, found.fy, found.cx, found.cy, found.lens) == (
        written.fx,
        written.fy,
        written.cx,
        written.cy,
        written.lens,
    )
