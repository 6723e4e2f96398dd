"""Errors that a user can act on, and the exit codes that the commands end with.

    Md2Error                 1   anything below; itself only where a worker process died
    ├── UsageError           2   a wrong option, configuration key or combination
    ├── InputError           3   an input is missing or broken: raw data, image, checkpoint
    │   └── SampleError      3   one sample's input is: it can be skipped and listed
    ├── DatasetError         5   a packed dataset is broken, or not the one that was promised
    │   └── StorageError     5   the storage behind a URL refuses or fails
    └── TrainingError        6   training cannot go on: NaN, a rank that died

Exit code 0 means done, 4 (`INCOMPLETE`) means done but with samples left out (listed in the report),
130 and 143 mean interrupted and terminated. A message is one line that says what is wrong, where,
and what to do; the commands print it without a traceback.
"""

from __future__ import annotations

import re

INCOMPLETE = 4
_LONGEST = 200
# Control characters, and the marks that change the direction of text or cannot be seen.
_UNSEEN = re.compile(r"[\x00-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]")


class Md2Error(Exception):
    """Base of every error that md2 raises on purpose."""

    exit_code = 1


class UsageError(Md2Error):
    """A wrong option, configuration key or combination of them."""

    exit_code = 2


class InputError(Md2Error):
    """An input is missing or broken: raw data, a calibration file, an image, a checkpoint."""

    exit_code = 3


class SampleError(InputError):
    """The input of a single sample is missing or broken; the rest can go on without it."""


class DatasetError(Md2Error):
    """A packed dataset is broken, or is not what its manifest promises."""

    exit_code = 5


class StorageError(DatasetError):
    """The storage behind a URL refuses or fails: credentials, missing bucket, network, full disk."""


class TrainingError(Md2Error):
    """Training cannot go on."""

    exit_code = 6


def first_line(error: BaseException) -> str:
    """Another library's exception for a message of one line: the first of its text, or its type if it has none."""
    lines = str(error).strip().splitlines()
    return lines[0][:_LONGEST] if lines else type(error).__name__


def visible(text: str) -> str:
    """`text` with unseen characters written out (`\\x1b`, `\\u202e`): names from outside must not steer a terminal.

    Bytes of a file name that are not UTF-8 are written out as well.
    """
    text = text.encode(errors="backslashreplace").decode()
    return _UNSEEN.sub(lambda found: repr(found[0])[1:-1], text)
