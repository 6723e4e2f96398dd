"""What the first and last bytes of an image or depth map say, before a decoder believes them."""

from __future__ import annotations

import re
from functools import cache
from io import BytesIO

import numpy as np
from PIL import Image

from shards.stream import Bytes

MAX_IMAGE_PIXELS = 1 << 26
"""A larger image is refused before it is decoded: 67 million pixels, 201 MB."""
_JPEG, _JPEG_END = b"\xff\xd8", b"\xff\xd9"
_PNG, _PNG_HEAD = b"\x89PNG\r\n\x1a\n", 26
_PPM, _PPM_HEAD = re.compile(rb"P6\s(?:#.*\n|\s)*(\d{1,9})\s(?:#.*\n|\s)*(\d{1,9})\s"), 200
_PNG_KINDS = {0: "grey", 2: "RGB", 3: "palette", 4: "grey and alpha", 6: "RGBA"}


def image_problem(file: Bytes) -> str | None:
    """Why an image cannot be decoded, as far as Pillow can say; None if it decodes it."""
    try:
        with Image.open(BytesIO(file.tobytes())) as image:
            image.load()
    except (OSError, SyntaxError, ValueError) as error:  # the last by PPM
        return "is cut short or damaged" if "truncated" in str(error) else "is not a readable image"
    return None


def size_problem(file: Bytes, most: int) -> str | None:
    """Why an image must not be decoded: it claims more than `most` pixels, is none, or is cut short; else None.

    DALI 2.4 may crash, with all of the process, on a file whose parts do not follow one another: while it raises that
    error, its threads are at other images. So Pillow sees such a file first.
    """
    data = file.data
    jpeg = bytes(data[:2]) == _JPEG
    size, leads_to_pixels = _jpeg_head(data) if jpeg else (image_size(data), _png_leads_to_pixels(data))
    if size is None:
        return "is not a readable image"
    width, height = size
    if width * height > most:
        return f"claims {width}x{height} pixels, more than the {most} that are allowed"
    if not leads_to_pixels:
        return image_problem(file) or "has parts that do not follow one another"
    end = _JPEG_END if jpeg else b"IEND" if bytes(data[:8]) == _PNG else b""
    return None if end in bytes(data[-1024:]) else image_problem(file)


def _jpeg_head(file: memoryview) -> tuple[tuple[int, int] | None, bool]:
    """Width and height of a JPEG, and whether its segments lead to the pixels (ITU-T T.81, annex B).

    The size is in the frame header (SOF, FF C0 to FF CF without C4, C8 and CC), behind the precision. Segments are
    marker and length. There are three images a sample, so this makes no calls; Pillow takes ten times as long.
    """
    place, last, size = 2, len(file) - 9, None
    while place <= last and file[place] == 0xFF:
        marker = file[place + 1]
        if marker == 0xDA:
            return size, True
        if marker == 0xFF:  # a marker may be preceded by any number of bytes FF
            place += 1
            continue
        if size is None and 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            size = file[place + 7] << 8 | file[place + 8], file[place + 5] << 8 | file[place + 6]
        place += 2 + (file[place + 2] << 8 | file[place + 3])
    return size, False


def _png_leads_to_pixels(file: memoryview) -> bool:
    """Whether a PNG's chunks follow one another until the pixels; true of other formats."""
    if bytes(file[:8]) != _PNG:
        return True
    place = 8
    while place + 12 <= len(file) and bytes(file[place + 4 : place + 8]) != b"IDAT":
        place += 12 + int.from_bytes(file[place : place + 4])
    return place + 12 <= len(file)


def image_size(file: memoryview) -> tuple[int, int] | None:
    """Width and height in the header of a JPEG, PNG or binary PPM; None if it is none of these or cut short."""
    if bytes(file[:2]) == _JPEG:
        return _jpeg_head(file)[0]
    if bytes(file[:8]) == _PNG and bytes(file[12:16]) == b"IHDR" and len(file) >= _PNG_HEAD:
        return int.from_bytes(file[16:20]), int.from_bytes(file[20:24])
    found = _PPM.match(bytes(file[:_PPM_HEAD]))
    return (int(found[1]), int(found[2])) if found else None


def depth_problem(file: Bytes) -> str | None:
    """Why a file is no depth map, by the first chunk of a PNG.

    Decoders scale other bit depths to 16 bits, so that metres would be wrong in silence.
    """
    head = file[:_PNG_HEAD].tobytes()
    if problem := size_problem(file, MAX_IMAGE_PIXELS):
        return problem
    if head[:8] != _PNG or (head[24], head[25]) != (16, 0):
        kind = (
            f"a PNG of {head[24]} bits, {_PNG_KINDS.get(head[25], 'of unknown kind')}" if head[:8] == _PNG else "no PNG"
        )
        return f"is {kind}; depth is a PNG of 16 bits, grey"
    return None


@cache
def no_depth() -> Bytes:
    """The smallest depth map, for samples that have none."""
    buffer = BytesIO()
    Image.fromarray(np.zeros((1, 1), np.uint16)).save(buffer, "PNG")
    return np.frombuffer(buffer.getvalue(), np.uint8)
