"""Exported files: the same numbers as PyTorch on onnxruntime, any batch, and an example that needs neither."""

from __future__ import annotations

import errno
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from evaluation_data import HEIGHT, WIDTH, tiny_checkpoint, tiny_config
from PIL import Image
from pipeline_data import smooth

from md2.checkpoint import load_checkpoint, save_checkpoint
from md2.inference.export import DepthNetwork, export_monodepth2, export_onnx, export_torch, write_checked
from md2.inference.predictor import Predictor, load
from shards.errors import InputError, UsageError

pytestmark = pytest.mark.usefixtures("narrow")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def checkpoint(narrow: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stereo; its outputs are sharpened, since fresh networks say 0.5 everywhere and anything would agree."""
    path = tiny_checkpoint(tmp_path_factory.mktemp("c") / "stereo.pt", tiny_config(stereo=True))
    found = load_checkpoint(path)
    found.networks["depth"]["decoder.10.conv.weight"] *= 20
    save_checkpoint(found, path)
    return path


@pytest.fixture(scope="module")
def predictor(checkpoint: Path) -> Predictor:
    return load(checkpoint, "cpu")


@pytest.fixture(scope="module")
def dynamic(predictor: Predictor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("onnx") / "dynamic.onnx"
    assert export_onnx(predictor, path, dynamic_batch=True).difference is not None
    return path


def images(count: int) -> torch.Tensor:
    rng = np.random.default_rng(count)
    return torch.stack(
        [torch.from_numpy(smooth(rng, WIDTH, HEIGHT)).permute(2, 0, 1).float() / 255 for _ in range(count)]
    )


def run(path: Path, batch: torch.Tensor) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(["depth", "disparity"], {"image": batch.numpy()})


def test_onnx_agrees_with_pytorch_for_any_batch(dynamic: Path, predictor: Predictor) -> None:
    for count in (1, 2, 5):
        depth, disparity = run(dynamic, images(count))
        expected = 5.4 / predictor.disparity(images(count)).numpy()
        assert depth.shape == (count, 1, HEIGHT, WIDTH)
        assert expected.max() / expected.min() > 1.5, "outputs that do not vary would prove nothing"
        np.testing.assert_allclose(depth, expected, rtol=1e-4)
        np.testing.assert_allclose(disparity * depth, 1, rtol=1e-5)


def test_onnx_says_its_unit_and_size(dynamic: Path) -> None:
    about = onnxruntime.InferenceSession(str(dynamic), providers=["CPUExecutionProvider"]).get_modelmeta()
    known = about.custom_metadata_map
    assert (known["unit"], known["metres_per_unit"]) == ("metres", "5.4")
    assert (int(known["width"]), int(known["height"])) == (WIDTH, HEIGHT)


def test_onnx_of_batch_one_takes_no_other(tmp_path: Path, predictor: Predictor) -> None:
    written = export_onnx(predictor, tmp_path / "one.onnx")
    assert written.difference is not None
    assert written.difference <= 1e-4
    depth, _ = run(written.path, images(1))
    np.testing.assert_allclose(depth, 5.4 / predictor.disparity(images(1)).numpy(), rtol=1e-4)
    with pytest.raises(Exception, match="INVALID_ARGUMENT"):
        run(written.path, images(2))
    assert [path.name for path in tmp_path.iterdir()] == ["one.onnx"]


def test_torch_export_runs_without_md2s_classes(tmp_path: Path, predictor: Predictor) -> None:
    export_torch(predictor, tmp_path / "depth.pt2", dynamic_batch=True)
    np.save(tmp_path / "images.npy", images(2).numpy())
    script = (
        "import sys, numpy as np, torch\n"
        "network = torch.export.load('depth.pt2').module()\n"
        "depth, _ = network(torch.from_numpy(np.load('images.npy')))\n"
        "np.save('depth.npy', depth.numpy())\n"
        "assert not any(name.startswith('md2') for name in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True, timeout=120)
    expected = 5.4 / predictor.disparity(images(2)).numpy()
    np.testing.assert_allclose(np.load(tmp_path / "depth.npy"), expected, rtol=1e-4)


def test_the_example_needs_numpy_pillow_and_onnxruntime_alone(
    dynamic: Path, tmp_path: Path, predictor: Predictor
) -> None:
    Image.fromarray(smooth(np.random.default_rng(3), 200, 90)).save(tmp_path / "street.png")
    script = (
        "import runpy, sys\n"
        "for name in ('torch', 'md2', 'shards', 'matplotlib', 'onnx'): sys.modules[name] = None\n"
        f"sys.argv = ['depth_onnx.py', {str(dynamic)!r}, 'street.png', 'street']\n"
        f"runpy.run_path({str(ROOT / 'examples' / 'depth_onnx.py')!r}, run_name='__main__')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, check=True, timeout=120, capture_output=True, text=True
    )
    assert "metres" in done.stdout
    with Image.open(tmp_path / "street_disparity.png") as disparity:
        assert disparity.size == (200, 90)
        low, high = disparity.getextrema()
        assert (low < 40, high) == (True, 255)
    with Image.open(tmp_path / "street.png") as image, Image.open(tmp_path / "street_depth.png") as depth:
        expected = predictor.predict(image).depth
        np.testing.assert_allclose(np.asarray(depth) / 256, expected, rtol=5e-3, atol=1 / 256)


def test_a_file_that_disagrees_is_not_written(tmp_path: Path, predictor: Predictor) -> None:
    """A runtime whose depth is off by a thousandth; by a millionth is rounding."""
    network = DepthNetwork(predictor)

    def off_by(error: float) -> Callable[[Path, torch.Tensor], list[Any]]:
        return lambda path, image: [output.numpy() * (1 + error) for output in network(image)]

    def write(path: Path) -> None:
        path.write_bytes(b"program")

    with pytest.raises(InputError, match="differs from PyTorch by 1"):
        write_checked(tmp_path / "wrong.onnx", network, [images(1)], write, off_by(1e-3))
    with pytest.raises(InputError, match="differs from PyTorch by nan"):
        write_checked(tmp_path / "wrong.onnx", network, [images(1)], write, off_by(float("nan")))
    assert list(tmp_path.iterdir()) == []
    assert write_checked(tmp_path / "right.onnx", network, [images(1)], write, off_by(1e-6)).path.exists()


def test_a_file_system_that_fails_is_one_line_and_the_clean_up_does_not_hide_it(
    tmp_path: Path, predictor: Predictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_only(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    def full(path: Path) -> None:
        monkeypatch.setattr(Path, "unlink", read_only)
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(InputError, match=r"cannot write .*a\.onnx: No space left on device; name another place"):
        write_checked(tmp_path / "a.onnx", DepthNetwork(predictor), [images(1)], full, lambda *_: [])


def test_official_folder_round_trip(tmp_path: Path, checkpoint: Path, predictor: Predictor) -> None:
    export_monodepth2(checkpoint, tmp_path / "official")
    assert sorted(path.name for path in (tmp_path / "official").iterdir()) == ["depth.pth", "encoder.pth"]
    again = load(tmp_path / "official", "cpu")
    torch.testing.assert_close(again.disparity(images(1)), predictor.disparity(images(1)), rtol=0, atol=0)
    export_monodepth2(tmp_path / "official", tmp_path / "copy")
    with pytest.raises(InputError, match="not empty"):
        export_monodepth2(checkpoint, tmp_path / "official")


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [("data", "baseline", "metres", "multiply stereo depth by 5.4"), ("model", "max_depth", 80.0, "0.1 to 80")],
)
def test_what_the_official_form_cannot_say_is_refused(
    checkpoint: Path, tmp_path: Path, section: str, key: str, value: Any, message: str
) -> None:
    found = load_checkpoint(checkpoint)
    found.config[section][key] = value
    save_checkpoint(found, tmp_path / "other.pt")
    with pytest.raises(UsageError, match=message):
        export_monodepth2(tmp_path / "other.pt", tmp_path / "official")
    assert not (tmp_path / "official").exists()
