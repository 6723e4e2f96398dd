"""Versions of what decides a dataset's bytes: with others the same input is another dataset."""

from __future__ import annotations

from functools import cache

import PIL
from PIL import features

from shards.version import __version__


@cache
def versions() -> str:
    """`md2 0.1.0, pillow 12.0, pillow's libjpeg_turbo 3.1, …`. Nothing of Python's own is among it."""
    codecs = {name: features.version(name) for name in ("libjpeg_turbo", "zlib", "zlib_ng")}
    words = [f"md2 {__version__}", f"pillow {PIL.__version__}"]
    return ", ".join(words + [f"pillow's {name} {number}" for name, number in codecs.items() if number])
