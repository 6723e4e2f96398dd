"""`md2 predict`: which files come out of images, folders, globs, videos and cameras, and what is in them."""

from __future__ import annotations

import struct
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evaluation_data import tiny_checkpoint, tiny_config
from PIL import Image
from pipeline_data import smooth

from md2.inference.film import VideoWriter
from md2.inference.inputs import ImageFile, find_inputs, parse_kinds
from md2.inference.predict import Predicted, PredictOptions, next_ends, predict_video, run_predict
from md2.inference.predictor import Predictor, load
from md2.visualize import colorize, point_cloud
from shards.errors import InputError, UsageError
from shards.video import _open, open_camera, open_video

Array = np.ndarray[Any, np.dtype[Any]]


@pytest.fixture(scope="module")
def stereo(tmp_path_factory: pytest.TempPathFactory) -> Predictor:
    return load(tiny_checkpoint(tmp_path_factory.mktemp("c") / "stereo.pt", tiny_config(stereo=True)), "cpu")


@pytest.fixture(scope="module")
def mono(tmp_path_factory: pytest.TempPathFactory) -> Predictor:
    return load(tiny_checkpoint(tmp_path_factory.mktemp("c") / "mono.pt"), "cpu")


def save_image(path: Path, seed: int = 0, width: int = 90, height: int = 40) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(smooth(np.random.default_rng(seed), width, height)).save(path)
    return path


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def predict(model: Predictor, inputs: list[str], out: Path, save: str | None = None, **options: Any) -> Predicted:
    """What the command does."""
    kinds = parse_kinds(save) if save is not None else None
    return run_predict(model, find_inputs(inputs, out), PredictOptions(out, kinds, **options))


def find_images(inputs: list[str]) -> list[ImageFile]:
    return find_inputs(inputs).images


def test_default_files_of_a_metric_model(tmp_path: Path, stereo: Predictor) -> None:
    image = save_image(tmp_path / "in" / "a.png")
    found = predict(stereo, [str(image)], tmp_path / "out")
    assert names(tmp_path / "out") == ["a.png", "a_depth.npy", "a_depth.png", "a_disparity.png"]
    assert sorted(path.name for path in found.written) == names(tmp_path / "out")
    expected = stereo.predict(Image.open(image))
    np.testing.assert_allclose(np.load(tmp_path / "out" / "a_depth.npy"), expected.depth, rtol=1e-6)
    stored = np.asarray(Image.open(tmp_path / "out" / "a_depth.png")).astype(float) / 256
    assert np.abs(stored - expected.depth).max() <= 0.5 / 256 + 1e-4
    colours = np.asarray(Image.open(tmp_path / "out" / "a_disparity.png"))
    np.testing.assert_array_equal(colours, colorize(expected.disparity))
    both = np.asarray(Image.open(tmp_path / "out" / "a.png"))
    np.testing.assert_array_equal(both[:40], expected.image)
    np.testing.assert_array_equal(both[-40:], colours)


def test_a_mono_model_writes_nothing_in_metres(tmp_path: Path, mono: Predictor) -> None:
    image = save_image(tmp_path / "a.png")
    predict(mono, [str(image)], tmp_path / "out")
    assert names(tmp_path / "out") == ["a.png", "a_depth.npy", "a_disparity.png"]
    with pytest.raises(UsageError, match="scale is unknown"):
        predict(mono, [str(image)], tmp_path / "out", save="npy,png16")
    predict(mono, [str(image)], tmp_path / "scaled", save="npy,benchmark", scale=2.0)
    assert names(tmp_path / "scaled") == ["a.png", "a_depth.npy"]
    unscaled = np.load(tmp_path / "out" / "a_depth.npy")
    np.testing.assert_allclose(np.load(tmp_path / "scaled" / "a_depth.npy"), 2 * unscaled, rtol=1e-6)
    upload = np.asarray(Image.open(tmp_path / "scaled" / "a.png")).astype(float) / 256
    assert np.abs(upload - np.minimum(2 * unscaled, 80)).max() <= 0.5 / 256 + 1e-4


def test_folders_keep_their_structure_and_globs_match(tmp_path: Path, mono: Predictor) -> None:
    for name in ("b/1.png", "a/1.jpg", "a/2.PNG"):
        save_image(tmp_path / "in" / name)
    (tmp_path / "in" / "notes.txt").write_text("no image")
    assert predict(mono, [str(tmp_path / "in")], tmp_path / "out", save="npy", batch_size=2).images == 3
    assert names(tmp_path / "out") == ["a/1_depth.npy", "a/2_depth.npy", "b/1_depth.npy"]
    assert [image.name for image in find_images([str(tmp_path / "in" / "*" / "1.*")])] == ["a/1", "b/1"]
    # Two images of one name: neither is lost.
    files = [str(tmp_path / "in" / "a" / "1.jpg"), str(tmp_path / "in" / "b" / "1.png")]
    assert [image.name for image in find_images(files)] == ["1", "1_2"]
    assert [i.path.name for i in find_images([str(tmp_path / "in" / "**" / "*.jpg")])] == ["1.jpg"]
    for nothing in ("absent.png", "*.webp", "b/*.jpg"):
        with pytest.raises(InputError, match="no "):
            find_images([str(tmp_path / "in" / nothing)])
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no image in this folder"):
        find_images([str(tmp_path / "empty")])


def test_results_of_different_images_are_different_files(tmp_path: Path, mono: Predictor) -> None:
    """`a` gives a_disparity.png, which would be the picture of `a_disparity`; `b/a` is another image still."""
    for name in ("in/a.png", "in/a_disparity.png", "in/a.jpg", "other/a.png"):
        save_image(tmp_path / name)
    inputs = [str(tmp_path / "in"), str(tmp_path / "other" / "a.png")]
    found = predict(mono, inputs, tmp_path / "out")
    assert found.images == 4
    assert len(found.written) == 4 * 3
    assert sorted(str(path.relative_to(tmp_path / "out")) for path in found.written) == names(tmp_path / "out")


def test_results_never_replace_their_inputs(tmp_path: Path, mono: Predictor) -> None:
    image = save_image(tmp_path / "in" / "a.png")
    (tmp_path / "link").symlink_to(tmp_path / "in")
    before = image.read_bytes()
    for out in (tmp_path / "in", tmp_path / "link"):
        with pytest.raises(UsageError, match=r"a\.png is an input.*--out"):
            predict(mono, [str(tmp_path / "in")], out)
    assert image.read_bytes() == before
    # Beside their inputs under other names they may lie; and what lies in the folder of results is no input.
    predict(mono, [str(tmp_path / "in")], tmp_path / "in", save="npy")
    inside = tmp_path / "in" / "depth"
    for _ in range(2):
        assert predict(mono, [str(tmp_path / "in")], inside, save="disparity").images == 1
    assert names(tmp_path / "in") == ["a.png", "a_depth.npy", "depth/a_disparity.png"]


def test_frames_are_taken_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for name in ("frame10", "frame2", "frame1"):
        save_image(tmp_path / f"{name}.png")
    for given in (str(tmp_path), str(tmp_path / "*.png")):
        assert [image.name for image in find_images([given])] == ["frame1", "frame2", "frame10"]


def test_folders_are_searched_through_links_and_circles_end(tmp_path: Path) -> None:
    save_image(tmp_path / "elsewhere" / "drive" / "2.png")
    save_image(tmp_path / "in" / "real" / "1.png")
    (tmp_path / "in" / "a_link").symlink_to(tmp_path / "in" / "real")
    (tmp_path / "in" / "linked").symlink_to(tmp_path / "elsewhere")
    for name in ("circle", "circle2"):
        (tmp_path / "in" / "real" / name).symlink_to(tmp_path / "in")
    for given in (tmp_path / "in", tmp_path / "in" / "**" / "*.png"):
        assert [image.name for image in find_images([str(given)])] == ["linked/drive/2", "real/1"]
    assert [image.name for image in find_images([str(tmp_path / "in" / "**" / "drive" / "*")])] == ["linked/drive/2"]
    assert [image.name for image in find_images([str(tmp_path / "in" / "*" / "*.png")])] == ["a_link/1", "real/1"]


def test_what_macos_writes_beside_files_is_no_image(tmp_path: Path, mono: Predictor) -> None:
    image = save_image(tmp_path / "in" / "a.png")
    (tmp_path / "in" / "._a.png").write_bytes(b"\0\5\26\7")
    for given in (tmp_path / "in", tmp_path / "in" / "*.png"):
        assert [found.path for found in find_images([str(given)])] == [image]
    found = predict(mono, [str(tmp_path / "in")], tmp_path / "out", save="npy")
    assert (found.images, found.failed) == (1, [])


def test_advice_names_what_the_command_takes(tmp_path: Path) -> None:
    (tmp_path / "films").mkdir()
    (tmp_path / "films" / "a.mp4").write_bytes(b"")
    with pytest.raises(InputError, match=r"it holds videos: give .*films/\*\.mp4"):
        find_images([str(tmp_path / "films")])
    with pytest.raises(InputError, match="from files, not from URLs"):
        find_images(["rtsp://camera/1"])
    assert find_inputs(["a.flv", "b.wmv", "c.3gp"]).videos == [Path("a.flv"), Path("b.wmv"), Path("c.3gp")]


def test_a_broken_image_is_listed_and_the_others_go_on(tmp_path: Path, mono: Predictor) -> None:
    good = save_image(tmp_path / "good.png")
    bad = tmp_path / "bad.png"
    bad.write_bytes(good.read_bytes()[:900])
    found = predict(mono, [str(bad), str(good)], tmp_path / "out", save="npy", batch_size=1)
    assert (found.images, len(found.failed)) == (1, 1)
    assert "bad.png" in found.failed[0]
    with pytest.raises(InputError, match=r"bad\.png"):
        predict(mono, [str(bad)], tmp_path / "out")


def test_unwritable_folder_is_one_line(tmp_path: Path, mono: Predictor) -> None:
    image = save_image(tmp_path / "a.png")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"):
        predict(mono, [str(image)], tmp_path / "file" / "out")


def test_point_cloud_by_hand() -> None:
    """2x3 depths of 10 (one 0, one beyond the limit), f = 5, centre at pixel (1, 0)."""
    depth = np.array([[10, 10, 0], [10, 99, 10]], np.float32)
    points, kept = point_cloud(depth, (5, 5, 1, 0), limit=50)
    assert kept.tolist() == [[True, True, False], [True, False, True]]
    assert points.tolist() == [[-2, 0, 10], [0, 0, 10], [-2, 2, 10], [2, 2, 10]]


def test_ply_reads_back(tmp_path: Path, stereo: Predictor) -> None:
    image = save_image(tmp_path / "a.png")
    predict(stereo, [str(image)], tmp_path / "out", save="ply", intrinsics=(60, 60, 44.5, 19.5), max_depth=50)
    data = (tmp_path / "out" / "a.ply").read_bytes()
    header, _, body = data.partition(b"end_header\n")
    lines = header.decode().splitlines()
    assert lines[:2] == ["ply", "format binary_little_endian 1.0"]
    assert "unit metres" in lines[2]
    vertices = np.frombuffer(body, dtype=[("xyz", "<f4", 3), ("rgb", "u1", 3)])
    result = stereo.predict(Image.open(image))
    near = result.depth <= 50
    assert lines[3] == f"element vertex {near.sum()}" == f"element vertex {len(vertices)}"
    np.testing.assert_allclose(vertices["xyz"][:, 2], result.depth[near], rtol=1e-6)
    np.testing.assert_array_equal(vertices["rgb"], result.image[near])
    row, column = np.argwhere(near)[7]
    z = result.depth[row, column]
    np.testing.assert_allclose(vertices["xyz"][7], [(column - 44.5) / 60 * z, (row - 19.5) / 60 * z, z], rtol=1e-4)


def test_colours_run_from_the_minimum_to_the_95th_percentile() -> None:
    import matplotlib

    magma = (np.array(matplotlib.colormaps["magma"](np.linspace(0, 1, 256)))[:, :3] * 255).round().astype(int)
    ramp = np.arange(101, dtype=np.float32)[None]
    colours = colorize(ramp).astype(int)
    assert colours[0, 0].tolist() == magma[0].tolist()
    assert colours[0, 95].tolist() == colours[0, 100].tolist() == magma[255].tolist()
    assert colours[0, 19].tolist() == magma[round(255 * 19 / 95)].tolist()
    assert colorize(np.array([[np.nan, 1.0, 2.0]])).tolist()[0][0] == [0, 0, 0]
    assert colorize(np.full((2, 2), 3.0)).shape == (2, 2, 3)
    with pytest.raises(InputError, match="no such colour map"):
        colorize(ramp, cmap="mauve")


def test_what_is_saved_is_checked(tmp_path: Path, mono: Predictor) -> None:
    image = str(save_image(tmp_path / "a.png"))
    for wrong, message in (("jpeg", "choose from"), ("", "no output named"), ("benchmark,side_by_side", "both write")):
        with pytest.raises(UsageError, match=message):
            predict(mono, [image], tmp_path / "out", save=wrong)
    with pytest.raises(InputError, match="no such colour map"):
        predict(mono, [image], tmp_path / "out", cmap="mauve")
    assert not (tmp_path / "out").exists()
    with pytest.raises(UsageError, match="positive"):
        predict(mono, [image], tmp_path, scale=-1)


# Video


def film(path: Path, frames: list[Array], rate: int = 10) -> Path:
    with VideoWriter(path, Fraction(rate)) as writer:
        for frame in frames:
            writer.write(frame)
    return path


@pytest.fixture(scope="module")
def pictures() -> list[Array]:
    return [smooth(np.random.default_rng(seed), 96, 64) for seed in range(7)]


def test_a_film_reads_back_as_written(tmp_path: Path, pictures: list[Array]) -> None:
    source = open_video(film(tmp_path / "a.mp4", pictures))
    assert (source.rate, source.frames) == (10, 7)
    frames = [np.asarray(frame).astype(float) for frame in source]
    source.close()
    assert len(frames) == 7
    for written, read in zip(pictures, frames, strict=True):
        # Lossy, with colour at half resolution; another frame is 30 levels off.
        assert np.abs(written - read).mean() < 12


def test_a_video_becomes_a_film_of_the_same_length(tmp_path: Path, stereo: Predictor, pictures: list[Array]) -> None:
    film(tmp_path / "drive.mp4", pictures)
    found = predict(stereo, [str(tmp_path / "drive.mp4")], tmp_path / "out", batch_size=3)
    assert found.images == 7
    assert names(tmp_path / "out") == ["drive.mp4"]
    result = open_video(tmp_path / "out" / "drive.mp4")
    assert (result.rate, result.frames) == (10, 7)
    frame = np.asarray(next(iter(result))).astype(float)
    result.close()
    assert frame.shape[:2] == (2 * 64 + 4, 96) or frame.shape[:2] == (64, 2 * 96 + 4)
    source = open_video(tmp_path / "drive.mp4")
    first = np.asarray(next(iter(source)))
    source.close()
    shown = frame[:64, :96] if frame.shape[1] == 96 else frame[:, :96]
    assert np.abs(shown - first).mean() < 12


def test_films_of_one_name_are_different_films(tmp_path: Path, stereo: Predictor, pictures: list[Array]) -> None:
    for place in ("a/drive.mp4", "b/drive.mp4"):
        (tmp_path / place).parent.mkdir()
        film(tmp_path / place, pictures[:2])
    found = predict(stereo, [str(tmp_path / "*" / "drive.mp4")], tmp_path / "out")
    assert found.images == 4
    assert names(tmp_path / "out") == ["drive.mp4", "drive_2.mp4"]
    before = (tmp_path / "a" / "drive.mp4").read_bytes()
    with pytest.raises(UsageError, match=r"drive\.mp4 is an input"):
        predict(stereo, [str(tmp_path / "a" / "drive.mp4")], tmp_path / "a")
    assert (tmp_path / "a" / "drive.mp4").read_bytes() == before
    with pytest.raises(InputError, match="no video matches"):
        predict(stereo, [str(tmp_path / "*" / "night*.mp4")], tmp_path / "out")


def test_a_videos_depth_files_are_per_frame(tmp_path: Path, stereo: Predictor, pictures: list[Array]) -> None:
    film(tmp_path / "drive.mp4", pictures[:3])
    found = predict(stereo, [str(tmp_path / "drive.mp4")], tmp_path / "out", save="disparity,npy", limit=2)
    assert found.images == 2
    assert names(tmp_path / "out") == ["drive/000000_depth.npy", "drive/000001_depth.npy", "drive_disparity.mp4"]


def test_a_cut_video_gives_its_frames_and_says_where_it_ends(
    tmp_path: Path, stereo: Predictor, pictures: list[Array]
) -> None:
    """Our films have their index in front, so that what comes before a cut can be read."""
    whole = film(tmp_path / "whole.mp4", pictures * 6).read_bytes()
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(whole[: len(whole) // 2])
    found = predict(stereo, [str(cut)], tmp_path / "out")
    assert 0 < found.images < 42
    assert len(found.failed) == 1
    assert f"after {found.images} " in found.failed[0]
    kept = open_video(tmp_path / "out" / "cut.mp4")
    assert len(list(kept)) == found.images
    kept.close()
    (tmp_path / "text.mp4").write_text("no video")
    with pytest.raises(InputError, match=r"text\.mp4: cannot be opened"):
        predict(stereo, [str(tmp_path / "text.mp4")], tmp_path / "none")
    assert not (tmp_path / "none").exists()
    # Playlists would show any file of this machine that they name.
    (tmp_path / "list.mp4").write_text(f"#EXTM3U\n#EXTINF:1,\n{tmp_path / 'whole.mp4'}\n#EXT-X-ENDLIST\n")
    (tmp_path / "concat.mp4").write_text("ffconcat version 1.0\nfile whole.mp4\n")
    for name in ("list.mp4", "concat.mp4"):
        with pytest.raises(InputError, match="cannot be opened"):
            open_video(tmp_path / name)
    with pytest.raises(InputError, match="no such video"):
        open_video(tmp_path / "absent.mp4")


def test_a_film_whose_size_changes_ends_there(tmp_path: Path, stereo: Predictor, pictures: list[Array]) -> None:
    """Two MPEG streams in a row, as some cameras write when their resolution is changed."""
    import av

    for name, size in (("a", (96, 64)), ("b", (128, 64))):
        with av.open(str(tmp_path / f"{name}.ts"), "w") as container:
            stream: Any = container.add_stream("libx264", rate=10)
            (stream.width, stream.height), stream.pix_fmt = size, "yuv420p"
            for number in range(6):
                pixels = np.full((size[1], size[0], 3), 40 * number, np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            container.mux(stream.encode())
    (tmp_path / "change.ts").write_bytes((tmp_path / "a.ts").read_bytes() + (tmp_path / "b.ts").read_bytes())
    found = predict(stereo, [str(tmp_path / "change.ts")], tmp_path / "out")
    (failure,) = found.failed
    assert f"after {found.images} frames the size changes from 96x64 to 128x64" in failure
    assert 4 <= found.images <= 6
    kept = open_video(tmp_path / "out" / "change.mp4")
    assert len(list(kept)) == found.images
    kept.close()


def test_a_film_that_is_open_when_python_ends_says_nothing(tmp_path: Path, pictures: list[Array]) -> None:
    """prep keeps the last video open; its frames are let go when nothing can be imported any more."""
    path = film(tmp_path / "a.mp4", pictures[:3])
    lines = [
        "import builtins",
        "from pathlib import Path",
        "from shards.video import open_video",
        f"builtins.kept = open_video(Path({str(path)!r})).decode()",
        "print(next(builtins.kept).height)",
    ]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.stdout, done.stderr) == ("64\n", "")


def test_frames_keep_their_times(tmp_path: Path, stereo: Predictor, pictures: list[Array]) -> None:
    """A film of variable rate: 0, 1, 1.1, 4 seconds; an even rate would show its frames elsewhere."""
    times = [0.0, 1.0, 1.1, 4.0]
    with VideoWriter(tmp_path / "uneven.mp4", Fraction(10)) as writer:
        for picture, seconds in zip(pictures, times, strict=False):
            writer.write(picture, seconds)
    for path in (tmp_path / "uneven.mp4", tmp_path / "out" / "uneven.mp4"):
        source = open_video(path)
        assert [frame.info["seconds"] for frame in source] == pytest.approx(times, abs=1e-3)
        source.close()
        predict(stereo, [str(tmp_path / "uneven.mp4")], tmp_path / "out")


def test_times_that_run_backwards_or_are_missing_still_make_a_film(tmp_path: Path, pictures: list[Array]) -> None:
    with VideoWriter(tmp_path / "a.mp4", Fraction(10)) as writer:
        for picture, seconds in zip(pictures, [5.0, 4.0, None, 5.05, 9.0], strict=False):
            writer.write(picture, seconds)
    source = open_video(tmp_path / "a.mp4")
    found = [frame.info["seconds"] for frame in source]
    source.close()
    assert len(found) == 5
    assert found == sorted(set(found))
    assert found[-1] == pytest.approx(4.0, abs=1e-3)


def test_pictures_carry_a_scale_in_metres_where_there_is_room(tmp_path: Path, stereo: Predictor) -> None:
    image = save_image(tmp_path / "a.png", width=300, height=100)
    predict(stereo, [str(image)], tmp_path / "out", save="side_by_side,disparity")
    both = np.asarray(Image.open(tmp_path / "out" / "a.png"))
    colours = np.asarray(Image.open(tmp_path / "out" / "a_disparity.png"))
    assert both.shape == (100 + 4 + 100 + 22, 300, 3)
    np.testing.assert_array_equal(both[104:204], colours)
    strip = both[204:]
    ramp = colorize(np.linspace(0, 1, 150)[None], low=0, high=1)[0]
    np.testing.assert_array_equal(strip[10, 75:225], ramp)
    assert (strip[:, :70] < 100).any() and (strip[:, 230:] < 100).any(), "labels on both sides"


def test_a_phones_film_is_turned_upright(tmp_path: Path) -> None:
    """The track's matrix says: a quarter turn clockwise, so that the left edge comes to lie on top."""
    picture = np.zeros((64, 96, 3), np.uint8)
    picture[:, :32] = 250
    data = film(tmp_path / "a.mp4", [picture] * 3).read_bytes()
    one = 0x10000
    plain = struct.pack(">9i", one, 0, 0, 0, one, 0, 0, 0, 0x40000000)
    turned = struct.pack(">9i", 0, one, 0, -one, 0, 0, 64 * one, 0, 0x40000000)
    track = data.index(b"tkhd")
    at = data.index(plain, track)
    assert at - track < 60
    (tmp_path / "a.mp4").write_bytes(data[:at] + turned + data[at + len(plain) :])
    source = open_video(tmp_path / "a.mp4")
    frame = np.asarray(next(iter(source)))
    source.close()
    assert frame.shape == (96, 64, 3)
    assert frame[:28].mean() > 200
    assert frame[36:].mean() < 50


def test_a_film_that_fails_leaves_nothing(tmp_path: Path, pictures: list[Array]) -> None:
    with pytest.raises(InputError, match="96x64"), VideoWriter(tmp_path / "a.mp4", Fraction(10)) as writer:
        writer.write(pictures[0])
        writer.write(pictures[0][:, :50])
    assert names(tmp_path) == []


def test_the_colour_scale_follows_slowly() -> None:
    first = next_ends(None, np.full((4, 4), 1.0))
    assert first == pytest.approx((1.0, 1.0))
    assert next_ends(first, np.full((4, 4), 2.0)) == pytest.approx((1.1, 1.1))


def test_a_camera_that_is_not_there_is_one_line() -> None:
    if sys.platform != "linux":
        pytest.skip("device names are Linux's")
    with pytest.raises(InputError, match=r"camera 97: cannot be opened .*/dev/video97"):
        open_camera(97)


def test_a_live_source_is_taken_until_the_limit(tmp_path: Path, stereo: Predictor) -> None:
    """FFmpeg's own test picture generator has no end, as a camera has none."""
    source = _open("testsrc=size=96x64:rate=5", "lavfi", "camera")
    assert source.frames is None
    found = predict_video(stereo, source, "camera0", PredictOptions(tmp_path, limit=3), endless=True)
    source.close()
    assert found.images == 3
    written = open_video(tmp_path / "camera0.mp4")
    assert len(list(written)) == 3
    written.close()


def test_ctrl_c_ends_a_camera_and_keeps_what_was_filmed(tmp_path: Path, stereo: Predictor) -> None:
    def stop(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    options = PredictOptions(tmp_path, batch_size=1)
    for endless in (True, False):
        source = _open("testsrc=size=96x64:rate=5", "lavfi", "camera")
        try:
            found = predict_video(stereo, source, f"film{endless}", options, endless=endless, progress=stop)
            assert found.images == 2
        except KeyboardInterrupt:
            assert not endless
        source.close()
    assert names(tmp_path) == ["filmTrue.mp4"]


def test_inputs_are_told_apart(tmp_path: Path) -> None:
    image = save_image(tmp_path / "b.png")
    found = find_inputs(["a.mp4", str(image), str(tmp_path / "*.png"), "d.MOV"])
    assert (found.videos, [one.name for one in found.images]) == ([Path("a.mp4"), Path("d.MOV")], ["b", "b_2"])
    assert find_inputs(["0"]).cameras == [0]
    with pytest.raises(UsageError, match="never ends"):
        find_inputs(["0", "a.png"])
    with pytest.raises(UsageError, match="at least one"):
        find_inputs([])
