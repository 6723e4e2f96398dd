"""The objects of a storage: how they may be named, and what is known of one without reading it."""

from __future__ import annotations

import re
from dataclasses import dataclass

from shards.errors import StorageError

_NAME = re.compile(r"[A-Za-z0-9_.-]+(/[A-Za-z0-9_.-]+)*")


def check_name(name: str) -> str:
    """`name` if it stays inside the storage.

    Raises:
        StorageError: an absolute name, `..`, or a character that some storage reads differently.
    """
    if not _NAME.fullmatch(name) or any(part in (".", "..") for part in name.split("/")):
        raise StorageError(f"name {name!r} would leave the dataset; refused")
    return name


def check_folder(name: str) -> str:
    """As `check_name`, for a folder found by listing: a bucket may hold folders of any other name as well.

    Raises:
        StorageError: it leaves the storage.
    """
    if any(part in ("", ".", "..") for part in name.split("/")):
        raise StorageError(f"folder {name!r} would leave the storage; refused")
    return name


@dataclass(frozen=True)
class Stat:
    """Size in bytes, and a tag that changes when the content does ("" where the storage has none)."""

    size: int
    tag: str
