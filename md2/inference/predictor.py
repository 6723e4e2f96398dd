"""Depth from single images.

    import md2
    model = md2.load("runs/mono")                # a run, a checkpoint, or a folder of Monodepth2 weights
    result = model.predict(Image.open("a.png"))  # PIL image, NumPy array or tensor
    result.depth                                 # (H, W) float32, at the image's size
    result.unit                                  # "metres", or "unknown" (trained on one camera alone)

A model trained on a single camera knows depth up to one unknown factor; `unit` says so.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.nn.functional import interpolate

from md2.checkpoint import load_checkpoint, resolve
from md2.config import Config
from md2.distributed import pick_device
from md2.geometry import disparity_to_depth
from md2.inference.post_process import post_process
from md2.model import Networks
from md2.weights import is_monodepth2, load_monodepth2
from shards.errors import InputError, UsageError

Unit = Literal["metres", "unknown"]
ImageLike = Image.Image | NDArray[Any] | Tensor
Device = Literal["auto", "cpu", "gpu"]


@dataclass(frozen=True)
class DepthMap:
    """What is predicted for one image.

    Attributes:
        image: (H, W, 3) uint8, the image itself.
        depth: (H, W) float32 along the camera's z, in `unit`.
        unit: "metres", or "unknown": depth is right up to one factor per model.
    """

    image: NDArray[np.uint8]
    depth: NDArray[np.float32]
    unit: Unit

    @property
    def metric(self) -> bool:
        """Whether depth is in metres."""
        return self.unit == "metres"

    @property
    def disparity(self) -> NDArray[np.float32]:
        """(H, W) float32, 1 / depth."""
        return np.reciprocal(self.depth)


class Predictor:
    """Networks in inference mode, with the size and the unit that they were trained with.

    Attributes:
        networks: on `device`, in eval mode, without gradients.
        config: of the run that they come from.
        metres_per_unit: metres in one unit of predicted depth; None: unknown.
        width, height: of the networks' input, pixels.
    """

    def __init__(
        self, networks: Networks, config: Config, metres_per_unit: float | None, device: torch.device | None = None
    ) -> None:
        self.device = device or torch.device("cpu")
        self.networks = networks.to(self.device).eval().requires_grad_(False)
        self.config = config
        self.metres_per_unit = metres_per_unit
        self.width, self.height = config.data.width, config.data.height

    def with_unit(self, metres_per_unit: float) -> Predictor:
        """The same networks, their unit given by hand.

        Raises:
            UsageError: not a positive number.
        """
        if not 0 < metres_per_unit < float("inf"):
            raise UsageError(f"{metres_per_unit} metres per unit: a positive number is needed")
        return Predictor(self.networks, self.config, metres_per_unit, self.device)

    @property
    def unit(self) -> Unit:
        """Unit of the depths that are predicted."""
        return "unknown" if self.metres_per_unit is None else "metres"

    @torch.inference_mode()
    def disparity(self, images: Tensor, *, flip: bool = False) -> Tensor:
        """1 / depth in the networks' own unit (not metres).

        Args:
            images: (B, 3, height, width) in [0, 1], the networks' size.
            flip: predict the mirror image too and merge both (`md2.inference.post_process`).

        Returns:
            (B, 1, height, width) float32 on `device`, within 1 / max_depth and 1 / min_depth.
        """
        images = images.to(self.device, torch.float32)
        merged = self._disparity(images)
        return post_process(merged, self._disparity(images.flip(-1))) if flip else merged

    def _disparity(self, images: Tensor) -> Tensor:
        sigmoid = self.networks.disparities(images)[0].float()
        return disparity_to_depth(sigmoid, self.config.model.min_depth, self.config.model.max_depth).reciprocal()

    def predict(self, image: ImageLike, *, flip: bool = False) -> DepthMap:
        """Depth of one image, at its own size.

        Args:
            image: PIL image; (H, W, 3) or (H, W) array; or (3, H, W) tensor. Integers are 0..255, floats
                0..1.
            flip: merge with the mirror image's prediction: slower by half, slightly better.

        Raises:
            InputError: not an image of 8 bits or of floats in 0..1.
        """
        return self.predict_batch([image], flip=flip)[0]

    def predict_batch(self, images: Sequence[ImageLike] | Tensor, *, flip: bool = False) -> list[DepthMap]:
        """Depth of several images, which may differ in size, in one pass of the networks; or (B, 3, H, W).

        Raises:
            InputError: as `predict`.
        """
        pictures = [to_pil(image) for image in images]
        if not pictures:
            return []
        disparities = self.disparity(torch.stack([self.input(picture) for picture in pictures]), flip=flip)
        factor = 1.0 if self.metres_per_unit is None else self.metres_per_unit
        return [
            DepthMap(np.asarray(picture), _depth_at(one, picture.height, picture.width, factor), self.unit)
            for picture, one in zip(pictures, disparities, strict=True)
        ]

    def input(self, picture: Image.Image) -> Tensor:
        """(3, height, width): the antialiased resize that prep and the published code use."""
        resized = picture.resize((self.width, self.height), Image.Resampling.LANCZOS)
        return torch.from_numpy(np.array(resized)).permute(2, 0, 1).float() / 255


def load(path: str | Path, device: Device = "auto") -> Predictor:
    """A run folder (its best checkpoint), a checkpoint file, or a folder of official Monodepth2 weights.

    Raises:
        InputError: nothing there, damaged, or weights that do not fit (by name).
        UsageError: `gpu` asked for, none usable.
    """
    place = pick_device(device)
    if is_monodepth2(path):
        networks, config = load_monodepth2(path)
        return Predictor(networks, config, config.metres_per_unit, place)
    found = resolve(path)
    checkpoint = load_checkpoint(found)
    config = checkpoint.parsed_config(str(found))
    networks = Networks(config.model, config.data, config.loss)
    networks.load_networks(checkpoint.networks, str(found))
    return Predictor(networks, config, checkpoint.metres_per_unit, place)


def read_image(path: Path) -> Image.Image:
    """An image file as RGB, turned upright as its EXIF says.

    Raises:
        InputError: missing, damaged, or not an image.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"{path}: no such image") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    return decode_image(data, str(path))


def decode_image(data: bytes, where: str) -> Image.Image:
    """The same from a file's content; `where` goes into the message.

    Raises:
        InputError: damaged, or not an image.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            return to_pil(ImageOps.exif_transpose(image))
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"{where}: cannot be read as an image ({_reason(error)}); it may be cut short") from error


def _reason(error: Exception) -> str:
    return "no image format" if isinstance(error, UnidentifiedImageError) else str(error)


def to_pil(image: ImageLike) -> Image.Image:
    """PIL image, array or tensor -> 8-bit RGB.

    Raises:
        InputError: another shape, range or depth than `Predictor.predict` takes.
    """
    if isinstance(image, Image.Image):
        if image.mode.startswith(("I", "F")):
            raise InputError(f"image of mode {image.mode}: 8 bits a channel are needed; convert it first")
        return image.convert("RGB")
    if isinstance(image, Tensor):
        if image.ndim != 3 or image.shape[0] != 3:
            several = " (predict_batch takes several)" if image.ndim == 4 else ""
            raise InputError(f"tensor of shape {tuple(image.shape)}: (3, H, W) is needed{several}")
        image = image.detach().cpu().permute(1, 2, 0)
        # NumPy has no bfloat16.
        image = (image.float() if image.is_floating_point() else image).numpy()
    if image.ndim == 2:
        image = image[..., None].repeat(3, axis=2)
    if image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise InputError(f"array of shape {image.shape}: (H, W, 3) or (H, W) is needed")
    return Image.fromarray(_to_uint8(image))


def _to_uint8(image: NDArray[Any]) -> NDArray[np.uint8]:
    if image.dtype == np.bool_:
        raise InputError("image of True and False: integers 0..255 or floats 0..1 are needed")
    if image.dtype == np.uint8:
        return np.ascontiguousarray(image)
    if not np.isfinite(image).all():
        raise InputError("image values are not all finite")
    low, high = float(image.min()), float(image.max())
    top = 1 if np.issubdtype(image.dtype, np.floating) else 255
    if low < 0 or high > top:
        raise InputError(f"{image.dtype} image with values {low:g}..{high:g}: 0..{top} is needed")
    return (image * (255 / top)).round().astype(np.uint8)


def _depth_at(disparity: Tensor, height: int, width: int, factor: float) -> NDArray[np.float32]:
    """(1, h, w) disparity -> (height, width) depth. Disparity, and not depth, is what is interpolated."""
    resized = interpolate(disparity[None], size=(height, width), mode="bilinear", align_corners=False)
    depth: NDArray[np.float32] = (factor / resized[0, 0]).cpu().numpy()
    return depth


def intrinsics_option(text: str) -> tuple[float, float, float, float]:
    """`721.5,721.5,609.6,172.9` -> fx, fy, cx, cy in pixels.

    Raises:
        UsageError: not four numbers, or a focal length that is not positive.
    """
    try:
        fx, fy, cx, cy = (float(number) for number in text.split(","))
    except ValueError:
        raise UsageError(f"intrinsics {text!r}: four numbers fx,fy,cx,cy in pixels of the image are needed") from None
    if not (fx > 0 and fy > 0):
        raise UsageError(f"intrinsics {text!r}: focal lengths must be positive")
    return fx, fy, cx, cy


def nominal_intrinsics(width: int, height: int) -> tuple[float, float, float, float]:
    """KITTI's camera as the published code approximates it: 0.58 and 1.92 of the size, centred."""
    return 0.58 * width, 1.92 * height, 0.5 * width, 0.5 * height
