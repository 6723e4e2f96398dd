"""Exports the depth network for other runtimes, as ONNX or torch.export's PT2, and checks each file by running it.

Input `image`: (B, 3, height, width) float32 RGB in [0, 1]. Outputs `depth` and `disparity` (1 / depth):
(B, 1, height, width) float32, in metres if the unit is known. The ONNX file's metadata hold `unit`, `width`,
`height` and `metres_per_unit`.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from copy import deepcopy
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from md2 import __version__
from md2.checkpoint import load_checkpoint, resolve
from md2.config import RESNETS, Config, ModelConfig
from md2.geometry import disparity_to_depth
from md2.inference.predictor import Predictor
from md2.visualize import require_writable
from md2.weights import is_monodepth2, read_monodepth2, save_monodepth2
from shards.errors import InputError, UsageError
from shards.files import fsync_folder, replace, temporary

TOLERANCE = 1e-4
"""Largest relative difference from PyTorch that a written file may have."""
OPSET = 18
Floats = NDArray[np.float32]


class DepthNetwork(nn.Module):
    """Maps an image to depth and disparity, in metres if the unit is known."""

    def __init__(self, predictor: Predictor) -> None:
        super().__init__()
        self.encoder, self.decoder = predictor.networks.encoder, predictor.networks.depth
        self.min_depth, self.max_depth = predictor.config.model.min_depth, predictor.config.model.max_depth
        self.factor = predictor.metres_per_unit or 1.0

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) in [0, 1] -> depth and 1 / depth, (B, 1, H, W)."""
        sigmoid = self.decoder(self.encoder(image))[0]
        depth = disparity_to_depth(sigmoid, self.min_depth, self.max_depth) * self.factor
        return depth, depth.reciprocal()


@dataclass(frozen=True)
class Exported:
    """A written file and its largest relative difference from PyTorch; None for weights, which cannot be run."""

    path: Path
    difference: float | None


def export_onnx(predictor: Predictor, path: Path, *, dynamic_batch: bool = False) -> Exported:
    """Write ONNX and run it on onnxruntime against PyTorch; the file appears only if they agree to 1e-4.

    Args:
        dynamic_batch: accept any batch size; otherwise 1.

    Raises:
        UsageError: onnx or onnxruntime is not installed.
        InputError: the file cannot be written, or does not agree.
    """
    try:
        import onnx
        import onnxruntime  # noqa: F401  (missing ones are found before the work)
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UsageError(f"ONNX export needs {error.name}: pip install 'md2[export]'") from error
    require_writable(path)
    network, batches, dynamic = _prepare(predictor, dynamic_batch)
    with _quiet():
        program = torch.onnx.export(
            network,
            (batches[-1],),
            dynamo=True,
            input_names=["image"],
            output_names=["depth", "disparity"],
            dynamic_shapes=dynamic,
            opset_version=OPSET,
            external_data=False,
            verbose=False,
        )
    assert program is not None
    model = program.model_proto
    onnx.helper.set_model_props(model, {key: str(value) for key, value in metadata(predictor).items()})
    onnx.checker.check_model(model, full_check=True)

    def write(beside: Path) -> None:
        beside.write_bytes(model.SerializeToString())

    return write_checked(path, network, batches, write, _run_onnx)


def _run_onnx(path: Path, image: Tensor) -> Sequence[Floats]:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    outputs: list[Floats] = session.run(["depth", "disparity"], {"image": image.numpy()})
    return outputs


def export_torch(predictor: Predictor, path: Path, *, dynamic_batch: bool = False) -> Exported:
    """Write torch.export's PT2 (`torch.export.load(path).module()`), checked as `export_onnx` does.

    Raises:
        InputError: the file cannot be written, or does not agree.
    """
    require_writable(path)
    network, batches, dynamic = _prepare(predictor, dynamic_batch)
    with _quiet():
        program = torch.export.export(network, (batches[-1],), dynamic_shapes=dynamic)

    def write(beside: Path) -> None:
        with beside.open("wb") as file:
            torch.export.save(program, file)

    return write_checked(path, network, batches, write, _run_torch)


def _run_torch(path: Path, image: Tensor) -> Sequence[Floats]:
    with path.open("rb") as file:
        return [output.numpy() for output in torch.export.load(file).module()(image)]


def export_monodepth2(model: str | Path, folder: Path) -> Exported:
    """Write a run or checkpoint as an official Monodepth2 folder (`encoder.pth`, `depth.pth`, ...).

    Raises:
        InputError: no checkpoint there, or the folder already exists or cannot be written.
        UsageError: the format cannot express the model's unit or range of depth.
    """
    if is_monodepth2(model):
        found = read_monodepth2(model)
        states, size, stereo = found.networks, (found.height, found.width), found.stereo
    else:
        path = resolve(model)
        checkpoint = load_checkpoint(path)
        config = checkpoint.parsed_config(str(path))
        _check_official(config, path)
        data = config.data
        states, size, stereo = checkpoint.networks, (data.height, data.width), data.stereo
    save_monodepth2(states, folder, height=size[0], width=size[1], stereo=stereo)
    return Exported(folder, None)


def _check_official(config: Config, path: Path) -> None:
    """Refuse what readers of an official folder do not know: they assume one ResNet, Monodepth2's decoder, depth 0.1 to
    100, and stereo units of 5.4 m."""
    model, plain = config.model, ModelConfig()
    for key, known in (
        ("encoder", model.encoder in RESNETS),
        ("pose_encoder", model.pose_encoder in (None, model.encoder)),
        ("decoder", model.decoder == plain.decoder),
    ):
        if not known:
            raise UsageError(
                f"{path} has model.{key} {getattr(model, key)}, which readers of Monodepth2 weights do not know: "
                "export with --to onnx or torch"
            )
    if config.data.baseline != "paper":
        raise UsageError(
            f"{path} has depth in metres, but readers of Monodepth2 weights multiply stereo depth by 5.4: "
            "export with --to onnx or torch, or train with data.baseline=paper"
        )
    if (model.min_depth, model.max_depth) != (plain.min_depth, plain.max_depth):
        raise UsageError(
            f"{path} has depth from {model.min_depth:g} to {model.max_depth:g}, but readers of "
            "Monodepth2 weights assume 0.1 to 100: export with --to onnx or torch"
        )


def metadata(predictor: Predictor) -> dict[str, Any]:
    """Return the facts that a user of the file needs besides the shapes."""
    return {
        "md2_version": __version__,
        "unit": predictor.unit,
        "metres_per_unit": predictor.metres_per_unit if predictor.metres_per_unit is not None else "unknown",
        "width": predictor.width,
        "height": predictor.height,
        "input": "RGB float32 in [0, 1], resized with antialiasing",
    }


def _prepare(predictor: Predictor, dynamic_batch: bool) -> tuple[DepthNetwork, list[Tensor], dict[str, Any] | None]:
    """Return the network on the CPU, random batches for the check, and torch.export's form of a free batch size."""
    network = deepcopy(DepthNetwork(predictor)).cpu().eval()
    generator = torch.Generator().manual_seed(0)
    sizes = (1, 3) if dynamic_batch else (1,)
    batches = [torch.rand(size, 3, predictor.height, predictor.width, generator=generator) for size in sizes]
    return network, batches, {"image": {0: torch.export.Dim("batch", min=1, max=1024)}} if dynamic_batch else None


def write_checked(
    path: Path,
    network: DepthNetwork,
    images: Sequence[Tensor],
    write: Callable[[Path], None],
    run: Callable[[Path, Tensor], Sequence[Floats]],
) -> Exported:
    """Write under a temporary name, run the file on each batch of images, and rename it only if it agrees.

    Raises:
        InputError: it does not agree with the network, or cannot be written.
    """
    beside = temporary(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(beside)
        # Python's max would skip a NaN.
        difference = float(np.max([_difference(network, image, run(beside, image)) for image in images]))
        if not difference <= TOLERANCE:
            raise InputError(f"{path}: differs from PyTorch by {difference:.1e}, more than {TOLERANCE:g}; not written")
        replace(beside, path)
        fsync_folder(path.parent)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}; name another place") from error
    finally:
        with suppress(OSError):  # must not hide the first error
            beside.unlink(missing_ok=True)
    return Exported(path, difference)


@torch.no_grad()
def _difference(network: DepthNetwork, image: Tensor, found: Sequence[Floats]) -> float:
    """Largest relative difference of depth and disparity."""
    expected = [output.numpy() for output in network(image)]
    return float(np.max([np.abs(a / b - 1).max() for a, b in zip(found, expected, strict=True)]))


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporters' progress texts and warnings, which concern their own internals."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
