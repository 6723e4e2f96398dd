"""Predicts depth from single images.

    import md2
    model = md2.load("runs/mono")                # a run, a checkpoint, or a folder of Monodepth2 weights
    result = model.predict(Image.open("a.png"))  # PIL image, NumPy array or tensor
    result.depth                                 # (H, W) float32, at the image's size
    result.unit                                  # "metres", or "unknown" (trained on one camera alone)

A model that was trained on one camera predicts depth up to an unknown factor; `unit` is then "unknown".
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from md2.checkpoint import load_checkpoint, resolve
from md2.config import Config
from md2.distributed import pick_device
from md2.geometry import disparity_to_depth
from md2.inference.images import ImageLike, to_pil
from md2.model import Networks
from md2.networks.camera import in_pixels
from md2.weights import is_monodepth2, load_monodepth2
from shards.errors import UsageError

Unit = Literal["metres", "unknown"]
DeviceChoice = Literal["auto", "cpu", "gpu"]


@dataclass(frozen=True)
class DepthMap:
    """The prediction for one image.

    Attributes:
        image: (H, W, 3) uint8, the image itself.
        depth: (H, W) float32 along the camera's z, in `unit`.
        unit: "metres", or "unknown": depth is right up to one factor, the same for all images of a model.
        intrinsics: fx, fy, cx, cy in pixels of the image, if the model has learned them; else None.
    """

    image: NDArray[np.uint8]
    depth: NDArray[np.float32]
    unit: Unit
    intrinsics: tuple[float, float, float, float] | None = None

    @property
    def metric(self) -> bool:
        """Whether depth is in metres."""
        return self.unit == "metres"

    @property
    def disparity(self) -> NDArray[np.float32]:
        """(H, W) float32, 1 / depth."""
        return np.reciprocal(self.depth)


class Predictor:
    """Runs trained networks, at the size and in the unit of their training.

    Attributes:
        networks: on `device`, in eval mode, without gradients.
        config: the configuration of their run.
        metres_per_unit: metres in one unit of predicted depth; None: unknown.
        width, height: size of the networks' input, pixels.
    """

    def __init__(
        self, networks: Networks, config: Config, metres_per_unit: float | None, device: torch.device | None = None
    ) -> None:
        self.device = device or torch.device("cpu")
        self.networks = networks.to(self.device).eval().requires_grad_(False)
        self.config = config
        self.metres_per_unit = metres_per_unit
        self.width, self.height = config.data.width, config.data.height

    def __repr__(self) -> str:
        unit = "depth of unknown unit" if self.metres_per_unit is None else f"{self.metres_per_unit:g} m per unit"
        return f"Predictor({self.config.model.encoder}, {self.width}x{self.height}, {unit}, on {self.device})"

    def with_unit(self, metres_per_unit: float) -> Predictor:
        """Return a predictor with the same networks and this unit.

        Raises:
            UsageError: not a positive number.
        """
        if not 0 < metres_per_unit < float("inf"):
            raise UsageError(f"{metres_per_unit} metres per unit: a positive number is needed")
        return Predictor(self.networks, self.config, metres_per_unit, self.device)

    @property
    def unit(self) -> Unit:
        """Unit of the predicted depths."""
        return "unknown" if self.metres_per_unit is None else "metres"

    @torch.inference_mode()
    def disparity(self, images: Tensor, *, flip: bool = False) -> Tensor:
        """Predict 1 / depth in the networks' own unit (not metres).

        Args:
            images: (B, 3, height, width) in [0, 1], the networks' size.
            flip: average with the prediction for the mirrored image (`post_process`).

        Returns:
            (B, 1, height, width) float32 on `device`, from 1 / max_depth to 1 / min_depth.
        """
        images = images.to(self.device, torch.float32)
        with float32_convolutions():
            merged = self._disparity(images)
            return post_process(merged, self._disparity(images.flip(-1))) if flip else merged

    def _disparity(self, images: Tensor) -> Tensor:
        sigmoid = self.networks.disparities(images)[0].float()
        return disparity_to_depth(sigmoid, self.config.model.min_depth, self.config.model.max_depth).reciprocal()

    def predict(self, image: ImageLike, *, flip: bool = False) -> DepthMap:
        """Predict the depth of one image, at its own size.

        Args:
            image: PIL image; (H, W, 3) or (H, W) array; or (3, H, W) tensor. Integers are 0..255, floats
                0..1.
            flip: average with the prediction for the mirrored image, which takes twice the time and is slightly better.

        Raises:
            InputError: not an image of 8 bits or of floats in 0..1.
        """
        return self.predict_batch([image], flip=flip)[0]

    def predict_batch(self, images: Sequence[ImageLike] | Tensor, *, flip: bool = False) -> list[DepthMap]:
        """Predict several images in one pass of the networks: a sequence of any sizes, or (B, 3, H, W).

        Raises:
            InputError: as `predict`.
        """
        pictures = [to_pil(image) for image in images]
        if not pictures:
            return []
        disparities = self.disparity(torch.stack([self.input(picture) for picture in pictures]), flip=flip)
        factor = 1.0 if self.metres_per_unit is None else self.metres_per_unit
        results = []
        for picture, one in zip(pictures, disparities, strict=True):
            depth = _depth_at(one, picture.height, picture.width, factor)
            results.append(DepthMap(np.asarray(picture), depth, self.unit, self.intrinsics(picture.size)))
        return results

    def intrinsics(self, size: tuple[int, int]) -> tuple[float, float, float, float] | None:
        """Learned fx, fy, cx, cy in pixels of images of this width and height; None if they were not learned."""
        camera = self.networks.camera
        return None if camera is None else in_pixels(camera(), (size[1], size[0]))

    def input(self, picture: Image.Image) -> Tensor:
        """Resize to (3, height, width) in [0, 1], with antialiasing, as prep and the published code do."""
        resized = picture.resize((self.width, self.height), Image.Resampling.LANCZOS)
        return torch.from_numpy(np.array(resized)).permute(2, 0, 1).float() / 255


def load(path: str | Path, device: DeviceChoice = "auto") -> Predictor:
    """Load a run folder (its best checkpoint), a checkpoint file, or a folder of official Monodepth2 weights.

    Also a folder of `md2 export --to safetensors`, or its URL: `hf://USER/NAME`, `s3://`, `https://`.

    Raises:
        InputError: no model there, a damaged file, or weights that do not fit (by name).
        DatasetError: the storage behind a URL fails.
        UsageError: `gpu` is chosen, but no GPU works.
    """
    place = pick_device(device)
    if is_monodepth2(path):
        networks, config = load_monodepth2(path)
        return Predictor(networks, config, config.metres_per_unit, place)
    found = resolve(path)
    checkpoint = load_checkpoint(found)
    config = checkpoint.parsed_config(str(found))
    networks = Networks.of(config)
    networks.load_networks(checkpoint.networks, str(found))
    return Predictor(networks, config, checkpoint.metres_per_unit, place)


@contextmanager
def float32_convolutions() -> Iterator[None]:
    """Let a GPU's convolutions compute in float32 within; PyTorch's default is TF32, whose mantissa has 10 bits."""
    cudnn: Any = torch.backends.cudnn
    # PyTorch 2.9 has a new setting, and refuses to read the old one if a program has used the new one.
    new = hasattr(cudnn, "conv")
    place, name, exact = (cudnn.conv, "fp32_precision", "ieee") if new else (cudnn, "allow_tf32", False)
    before = getattr(place, name)
    setattr(place, name, exact)
    try:
        yield
    finally:
        setattr(place, name, before)


def post_process(disparity: Tensor, flipped: Tensor) -> Tensor:
    """Merge the disparities of an image and of its mirror image, which removes artefacts at the sides.

    The left 5 % come from the mirrored image, the right 5 % from the image. Over the next 5 % they blend into the mean
    of both, which fills the rest.

    Args:
        disparity: (B, 1, H, W) of the image.
        flipped: (B, 1, H, W) of the mirrored image, as predicted (still mirrored).

    Source:
        Godard et al., CVPR 2017, section 3.4 ("post-processing").
    """
    width = disparity.shape[-1]
    other = flipped.flip(-1)
    across = torch.linspace(0, 1, width, dtype=disparity.dtype, device=disparity.device)
    left = 1 - (20 * (across - 0.05)).clamp(0, 1)
    right = left.flip(0)
    return right * disparity + left * other + (1 - left - right) * (disparity + other) / 2


def _depth_at(disparity: Tensor, height: int, width: int, factor: float) -> NDArray[np.float32]:
    """Convert disparity (1, h, w) to depth (height, width); disparity is interpolated, not depth."""
    resized = interpolate(disparity[None], size=(height, width), mode="bilinear", align_corners=False)
    depth: NDArray[np.float32] = (factor / resized[0, 0]).cpu().numpy()
    return depth
