"""Decodes text files of other tools: UTF-8 with or without a mark, UTF-16, UTF-32, names in Latin-1."""

from __future__ import annotations

import codecs

from shards.errors import InputError

_UTF32 = (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)
"""Marks. The first begins like UTF-16's."""
_LINE_ENDS = "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"
"""Characters at which `str.splitlines` splits."""
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def decode_text(data: bytes) -> str:
    """Decode a text file.

    UTF-16 (PowerShell, Notepad) is recognised by its mark, or by a NUL in every second byte. Bytes that are not UTF-8
    become surrogates, as in Python's file names, so that a list can name such a folder.
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


def text_lines(data: bytes, where: str, most: int) -> list[str]:
    """Lines of a text file.

    Args:
        where: the file, for messages.
        most: limit of their number, checked before they take memory.

    Raises:
        InputError: it has more.
    """
    text = decode_text(data)
    if sum(map(text.count, _LINE_ENDS)) > 2 * most or len(lines := text.splitlines()) > most:
        raise InputError(f"{where}: more than {most:,} lines")
    return lines


def printable(text: str) -> str:
    """A path or name for any encoder: bytes that are not UTF-8 are written out as `\\xe9`."""
    return text.encode("utf-8", errors="surrogateescape").decode("utf-8", errors="backslashreplace")
