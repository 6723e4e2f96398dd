"""Prediction from Python: `md2.load(path).predict(image)`; its size, its unit, what it takes and refuses."""

from __future__ import annotations

import os
import struct
import zlib
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from evaluation_data import HEIGHT, WIDTH, documented, run_lines, tiny_checkpoint, tiny_config
from PIL import Image
from pipeline_data import smooth
from torch.nn.functional import interpolate

from md2.checkpoint import load_checkpoint
from md2.inference.film import VideoWriter
from md2.inference.images import read_image, to_pil
from md2.inference.inputs import parse_intrinsics
from md2.inference.predictor import Predictor, load
from md2.model import Networks
from md2.visualize import open_picture
from md2.weights import save_monodepth2
from shards.errors import InputError, UsageError
from shards.video import open_video

Array = np.ndarray[Any, np.dtype[Any]]


@pytest.fixture(scope="module")
def stereo_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("checkpoints") / "stereo.pt", tiny_config(stereo=True))


@pytest.fixture(scope="module")
def stereo(stereo_file: Path) -> Predictor:
    return load(stereo_file, "cpu")


@pytest.fixture(scope="module")
def mono(tmp_path_factory: pytest.TempPathFactory) -> Predictor:
    return load(tiny_checkpoint(tmp_path_factory.mktemp("checkpoints") / "mono.pt"), "cpu")


@pytest.fixture
def picture() -> Array:
    return smooth(np.random.default_rng(5), 150, 70)


def test_depth_by_hand_from_the_networks_output(stereo_file: Path, stereo: Predictor, picture: Array) -> None:
    """Lanczos to the networks' size; sigmoid s gives 1/depth = 1/100 + (1/0.1 - 1/100) s; resized; 5.4 m a unit."""
    checkpoint = load_checkpoint(stereo_file)
    config = checkpoint.parsed_config()
    networks = Networks.of(config)
    networks.load_networks(checkpoint.networks)
    resized = Image.fromarray(picture).resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS)
    pixels = torch.from_numpy(np.array(resized)).permute(2, 0, 1)[None].float() / 255
    with torch.no_grad():
        sigmoid = networks.eval().disparities(pixels)[0]
    inverse = interpolate(0.01 + 9.99 * sigmoid, (70, 150), mode="bilinear", align_corners=False)
    result = stereo.predict(Image.fromarray(picture))
    assert result.unit == "metres"
    assert result.depth.shape == (70, 150)
    assert result.depth.dtype == np.float32
    np.testing.assert_allclose(result.depth, (5.4 / inverse)[0, 0].numpy(), rtol=1e-5)
    np.testing.assert_allclose(result.disparity * result.depth, 1, rtol=1e-6)
    np.testing.assert_array_equal(result.image, picture)


def test_a_mono_model_says_that_its_scale_is_unknown(mono: Predictor, picture: Array) -> None:
    result = mono.predict(picture)
    assert result.unit == "unknown"
    assert not result.metric
    assert 0.1 <= result.depth.min() <= result.depth.max() <= 100


def test_pil_array_and_tensor_of_one_image_give_one_depth(mono: Predictor, picture: Array) -> None:
    expected = mono.predict(Image.fromarray(picture)).depth
    tensor = torch.from_numpy(picture.copy()).permute(2, 0, 1)
    assert mono.predict((tensor.float() / 255).bfloat16()).depth.shape == expected.shape
    for same in (picture, picture / 255, (picture / 255).astype(np.float32), tensor, tensor.float() / 255):
        np.testing.assert_array_equal(mono.predict(same).depth, expected)


def test_grey_and_palette_images_are_images(mono: Predictor, picture: Array) -> None:
    grey = Image.fromarray(picture).convert("L")
    expected = mono.predict(np.asarray(grey)).depth
    np.testing.assert_array_equal(mono.predict(grey).depth, expected)
    assert mono.predict(Image.fromarray(picture).convert("P")).depth.shape == (70, 150)
    assert mono.predict(Image.fromarray(picture).convert("RGBA")).depth.shape == (70, 150)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((4, 5, 4), np.uint8), r"\(H, W, 3\)"),
        (np.zeros((0, 5, 3), np.uint8), r"\(H, W, 3\)"),
        (torch.zeros(2, 3, 4, 5), r"\(3, H, W\) is needed \(predict_batch takes several\)"),
        (np.zeros((4, 5, 3), bool), "True and False"),
        (torch.zeros(4, 5, 3), r"\(3, H, W\)"),
        (np.full((4, 5, 3), 200.0), "0..1 is needed"),
        (np.full((4, 5, 3), -0.1), "0..1 is needed"),
        (np.full((4, 5, 3), 300, np.uint16), "0..255 is needed"),
        (np.full((4, 5, 3), np.nan), "finite"),
        (Image.fromarray(np.zeros((4, 5), np.uint16)), "8 bits"),
    ],
)
def test_what_is_no_image_is_refused_with_the_reason(image: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        to_pil(image)


def test_a_batch_of_different_sizes_gives_each_its_own(mono: Predictor, picture: Array) -> None:
    other = smooth(np.random.default_rng(6), 33, 90)
    together = mono.predict_batch([picture, other])
    assert [result.depth.shape for result in together] == [(70, 150), (90, 33)]
    np.testing.assert_allclose(together[1].depth, mono.predict(other).depth, rtol=1e-4)
    tensors = mono.predict_batch(torch.from_numpy(np.stack([picture, picture])).permute(0, 3, 1, 2))
    np.testing.assert_allclose(tensors[1].depth, together[0].depth, rtol=1e-4)
    assert mono.predict_batch([]) == []


def test_flip_post_processing_is_symmetric(mono: Predictor, picture: Array) -> None:
    """Merged with its mirror image's, the mirror image's prediction is the mirror image."""
    there = mono.predict(picture, flip=True).depth
    back = mono.predict(np.ascontiguousarray(picture[:, ::-1]), flip=True).depth[:, ::-1]
    np.testing.assert_allclose(there, back, rtol=1e-4)
    assert np.abs(there / mono.predict(picture).depth - 1).max() > 1e-3


def test_official_weights_load_with_their_size_and_unit(stereo_file: Path, tmp_path: Path, picture: Array) -> None:
    checkpoint = load_checkpoint(stereo_file)
    save_monodepth2(checkpoint.networks, tmp_path / "official", height=HEIGHT, width=WIDTH, stereo=True)
    official = load(tmp_path / "official", "cpu")
    assert (official.width, official.height, official.metres_per_unit) == (WIDTH, HEIGHT, 5.4)
    np.testing.assert_array_equal(official.predict(picture).depth, load(stereo_file, "cpu").predict(picture).depth)


def test_a_run_folder_means_its_best_checkpoint(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path / "run" / "checkpoints" / "last.pt", seed=1)
    best = tiny_checkpoint(tmp_path / "run" / "checkpoints" / "best.pt", seed=2)
    weight = load(best, "cpu").networks.encoder.encoder.conv1.weight
    torch.testing.assert_close(load(tmp_path / "run", "cpu").networks.encoder.encoder.conv1.weight, weight)
    with pytest.raises(InputError, match="no such file or folder"):
        load(tmp_path / "nothing", "cpu")


def test_image_files_are_turned_upright_and_broken_ones_named(tmp_path: Path, picture: Array) -> None:
    image = Image.fromarray(picture)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert read_image(tmp_path / "turned.jpg").size == (70, 150)
    (tmp_path / "cut.png").write_bytes(_png(image)[:2000])
    with pytest.raises(InputError, match=r"cut\.png.*cut short"):
        read_image(tmp_path / "cut.png")
    (tmp_path / "cut.ppm").write_bytes(b"P6\n150 ")
    with pytest.raises(InputError, match=r"cut\.ppm.*cut short"):
        read_image(tmp_path / "cut.ppm")
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(InputError, match=r"text\.png"):
        read_image(tmp_path / "text.png")
    with pytest.raises(InputError, match="no such image"):
        read_image(tmp_path / "absent.png")


def _png(image: Image.Image) -> bytes:
    import io

    buffer = io.BytesIO()
    image.save(buffer, "png")
    return buffer.getvalue()


def test_intrinsics_are_four_numbers() -> None:
    assert parse_intrinsics("721.5,700,609.5,172.8") == (721.5, 700.0, 609.5, 172.8)
    for wrong in ("1,2,3", "a,b,c,d", "0,1,2,3"):
        with pytest.raises(UsageError, match="intrinsics"):
            parse_intrinsics(wrong)


def test_the_documented_lines_work_and_importing_md2_stays_light(tmp_path: Path) -> None:
    """As they stand in docs/prediction.md, in a folder that has the run and the picture."""
    tiny_checkpoint(tmp_path / "runs" / "mono_stereo" / "checkpoints" / "best.pt", tiny_config(stereo=True))
    Image.fromarray(smooth(np.random.default_rng(5), 150, 70)).save(tmp_path / "street.png")
    lines = documented("prediction.md")
    assert len(lines) == 5
    lines.insert(1, "import sys; assert 'torch' not in sys.modules")
    assert run_lines(lines, tmp_path) == "(70, 150) metres\n"


@pytest.mark.gpu
def test_the_gpu_predicts_the_same_depth(stereo_file: Path, picture: Array) -> None:
    here, there = (
        load(stereo_file, "cpu").predict(picture, flip=True),
        load(stereo_file, "gpu").predict(picture, flip=True),
    )
    np.testing.assert_allclose(there.depth, here.depth, rtol=1e-2)


def test_a_model_introduces_itself_and_md2_lists_what_it_offers(mono: Predictor, stereo: Predictor) -> None:
    assert repr(stereo) == "Predictor(resnet18, 96x64, 5.4 m per unit, on cpu)"
    assert repr(mono) == "Predictor(resnet18, 96x64, depth of unknown unit, on cpu)"
    import md2

    assert sorted(md2.__all__) == ["__version__", "load"]


def test_images_that_must_not_be_decoded_are_refused(tmp_path: Path) -> None:
    """A PNG of some bytes that claims 70 million pixels, a program (PostScript) under a picture's name, a pipe."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 10_000, 7_000, 8, 2, 0, 0, 0)
    chunks = [
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
        for chunk in (header, b"IDAT" + zlib.compress(b""))
    ]
    (tmp_path / "vast.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))
    (tmp_path / "program.png").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
    )
    os.mkfifo(tmp_path / "pipe.png")
    for name, message in (
        ("vast", "10000x7000 pixels; at most 67,108,864 are read"),
        ("program", "not an image, or its beginning is missing"),
        ("pipe", "not a regular file"),
    ):
        with pytest.raises(InputError, match=message):
            read_image(tmp_path / f"{name}.png")
        with pytest.raises(InputError, match=message), open_picture(tmp_path / f"{name}.png", name) as image:
            image.load()


@pytest.mark.parametrize("interrupted", [False, True])
def test_a_film_on_a_full_disk_is_one_line(tmp_path: Path, interrupted: bool, small_files: None) -> None:
    """An earlier error is not hidden by that of closing the file."""
    noise = np.random.default_rng(0).integers(0, 255, (9, 64, 96, 3), dtype=np.uint8)

    def film() -> None:
        with VideoWriter(tmp_path / "a.mp4", Fraction(10)) as writer:
            for picture in noise:
                writer.write(picture)
            if interrupted:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt if interrupted else InputError):
        film()
    assert list(tmp_path.iterdir()) == []


def test_a_film_of_an_unknown_coding_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    with VideoWriter(path, Fraction(10)) as writer:
        writer.write(np.zeros((64, 96, 3), np.uint8))
    open_video(path).close()
    path.write_bytes(path.read_bytes().replace(b"avc1", b"xxxx"))
    with pytest.raises(InputError, match="coded in a way that FFmpeg does not know"):
        open_video(path)
