"""Text files as other tools write them: UTF-8 with or without a mark, UTF-16 and UTF-32, Latin-1 names."""

from __future__ import annotations

import codecs

_UTF32 = (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)
"""The first begins as UTF-16's mark does."""
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def decode_text(data: bytes) -> str:
    """Decode a text file.

    UTF-16 (PowerShell, Notepad) is recognised by its mark, or by a NUL in every second byte. Bytes that are not
    UTF-8 come back as surrogates, as Python has them in file names, so that a list can name such a folder.
    """
    if data.startswith(_UTF32):
        return data.decode("utf-32", errors="replace")
    if data.startswith(_UTF16):
        return data.decode("utf-16", errors="replace")
    head = data[:512]
    for offset, encoding in ((1, "utf-16-le"), (0, "utf-16-be")):
        zeros = head[offset::2]
        if len(head) >= 8 and zeros.count(0) > 0.9 * len(zeros):
            return data.decode(encoding, errors="replace")
    return data.removeprefix(codecs.BOM_UTF8).decode("utf-8", errors="surrogateescape")


def printable(text: str) -> str:
    """A path or name that any encoder takes: bytes that are not UTF-8 are written out as `\\xe9`."""
    return text.encode("utf-8", errors="surrogateescape").decode("utf-8", errors="backslashreplace")
