"""Reads images from files, arrays and tensors, as 8-bit RGB."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from md2.visualize import open_picture
from shards.errors import InputError
from shards.files import read_small

ImageLike = Image.Image | NDArray[Any] | Tensor
MOST_BYTES = 2**29
"""Size of the largest file that is read. Pillow's limit of 179 million pixels fits into it in any format."""


def read_image(path: Path) -> Image.Image:
    """Read an image file as RGB, turned upright according to its EXIF data.

    Raises:
        InputError: missing, damaged, too large, or not an image.
    """
    try:
        data = read_small(path, MOST_BYTES)
    except FileNotFoundError:
        raise InputError(f"{path}: no such image") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    return decode_image(data, str(path))


def decode_image(data: bytes, where: str) -> Image.Image:
    """Decode a file's content as RGB, upright; `where` names it in messages.

    Raises:
        InputError: damaged, or not an image.
    """
    if not data:
        raise InputError(f"{where}: empty")
    with open_picture(io.BytesIO(data), where) as image:
        if image.mode.startswith(("I", "F")):
            raise InputError(f"{where}: {_eight_bits(image.mode)}")
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        return to_pil(image)


def _eight_bits(mode: str) -> str:
    return f"image of mode {mode}: 8 bits a channel are needed; convert it first"


def to_pil(image: ImageLike) -> Image.Image:
    """Convert a PIL image, an array or a tensor to 8-bit RGB.

    Args:
        image: PIL image of 8 bits a channel; (H, W, 3) or (H, W) array; (3, H, W) tensor. Integers are 0..255,
            floats 0..1.

    Raises:
        InputError: another shape, range or depth.
    """
    if isinstance(image, Image.Image):
        if image.mode.startswith(("I", "F")):
            raise InputError(_eight_bits(image.mode))
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
