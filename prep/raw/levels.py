"""Finds the range of values of a drive whose frames have more than 8 bits."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from prep.raw.files import read
from prep.raw.velodyne import MAX_PIXELS, open_image
from prep.raw.zips import Ref
from shards.errors import InputError, SampleError

_PNG_DEPTH, _PNG_COLOUR = 24, 25
"""Offsets in a PNG of the bits of a channel, and of the kind of channels."""
_SAMPLED = 9
"""Number of frames that decide the range."""
_ENOUGH = 1 << 21
"""Pixels of a frame; of a larger one fewer rows are used."""
_FULL_HIGH, _FULL_RANGE = 1 << 15, 1 << 14
"""The upper 8 bits suffice if a drive's values reach the first number and span the second."""
_COLOUR_HIGH, _COLOUR_RANGE = 1 << 6, 1 << 4
"""The same for colour, of which Pillow reads the upper 8 bits only."""


def find_levels(refs: Sequence[Ref]) -> tuple[int, int] | None:
    """Lowest and highest value of a drive whose 16-bit frames use a part of the range; None for others.

    Cameras of 10 to 14 bits store their values in 16-bit PNGs, whose upper 8 bits are then nearly constant. A few
    frames decide one range for the drive, which keeps the brightness of its frames comparable.

    Args:
        refs: the drive's frames, in order.

    Raises:
        InputError: such frames in colour, which cannot be read at their full depth.
    """
    if not refs or not refs[0].path.lower().endswith(".png"):
        return None
    samples = []
    for ref in refs[:: max(1, len(refs) // _SAMPLED)][:_SAMPLED]:
        try:
            data = read(ref)
            if len(data) <= _PNG_COLOUR or data[_PNG_DEPTH] != 16:
                return None
            with open_image(data, "PNG") as image:
                pixels = image.width * image.height
                if pixels <= MAX_PIXELS:
                    samples.append(np.asarray(image)[:: max(2, pixels // _ENOUGH)].ravel())
        except (SampleError, OSError, SyntaxError, ValueError, Image.DecompressionBombError):
            continue  # a broken frame is named when it is packed
    if not samples:
        return None
    low, high = (int(np.quantile(np.concatenate(samples), q, method="nearest")) for q in (0.0005, 0.9995))
    if samples[0].dtype == np.uint8:
        if high < _COLOUR_HIGH or high - low < _COLOUR_RANGE:
            raise InputError(
                f"{refs[0].place}: 16-bit colour that uses a small part of its range; convert the frames to 8 bits a "
                "channel"
            )
        return None
    return None if high <= low or (high >= _FULL_HIGH and high - low >= _FULL_RANGE) else (low, high)


def levels_note(drive: str, levels: tuple[int, int] | None) -> list[str]:
    """A note for the user if frames have more than 8 bits."""
    return [f"{drive}: frames of 16 bits; their values {levels[0]} to {levels[1]} become 0 to 255"] if levels else []
