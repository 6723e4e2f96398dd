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

    DALI 2.4 may crash with all of the process on a file that is cut short: while it raises the error of one image, its
    threads are at others. So a file without an end is shown to Pillow first.
    """
    size = image_size(file.data)
    if size is None:
        return "is not a readable image"
    width, height = size
    if width * height > most:
        return f"claims {width}x{height} pixels, more than the {most} that are allowed"
    return None if _has_end(file) else image_problem(file)


def _has_end(file: Bytes) -> bool:
    """Whether a JPEG or PNG ends as it should; other data may follow."""
    head, tail = file[:2].tobytes(), file[-1024:].tobytes()
    return {b"\xff\xd8": b"\xff\xd9", _PNG[:2]: b"IEND"}.get(head, b"") in tail


def image_size(file: memoryview) -> tuple[int, int] | None:
    """Width and height in the header of a JPEG, PNG or binary PPM; None if it is none of these or cut short.

    JPEG (ITU-T T.81, annex B): segments of marker and length, until a frame header (SOF, FF C0 to FF CF without C4, C8
    and CC) with precision, height and width. A kB of it takes Pillow ten times as long, and there are three a sample.
    """
    if bytes(file[:2]) == b"\xff\xd8":
        place = 2
        while place + 9 <= len(file) and file[place] == 0xFF:
            marker = file[place + 1]
            if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
                return int.from_bytes(file[place + 7 : place + 9]), int.from_bytes(file[place + 5 : place + 7])
            # A marker may be preceded by any number of bytes FF.
            place += 1 if marker == 0xFF else 2 + int.from_bytes(file[place + 2 : place + 4])
        return None
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
