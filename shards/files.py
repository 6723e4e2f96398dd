"""Files that are whole or absent: write beside, sync, rename."""

from __future__ import annotations

import hashlib
import os
import uuid
from pathlib import Path


def fsync_folder(folder: Path) -> None:
    """Make the folder's entries (renames, new files) survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace(tmp: Path, path: Path) -> None:
    """Sync `tmp` to disk and give it the name `path`, whatever was there."""
    with tmp.open("rb") as file:
        os.fsync(file.fileno())
    tmp.replace(path)


def temporary(path: Path) -> Path:
    """A name beside `path` that no other process uses."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")


def write_atomic(path: Path, data: bytes) -> None:
    """Write `data` to `path`: a reader sees the old file or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = temporary(path)
    try:
        tmp.write_bytes(data)
        replace(tmp, path)
        fsync_folder(path.parent)
    finally:
        tmp.unlink(missing_ok=True)


def create_from(tmp: Path, path: Path) -> bool:
    """Give `tmp` the name `path` unless something is there; True if it was given.

    Two processes that create the same path at once: one of them gets True.
    """
    with tmp.open("rb") as file:
        os.fsync(file.fileno())
    try:
        os.link(tmp, path)
    except FileExistsError:
        return False
    except OSError:  # a file system without hard links: not atomic, but still never half a file
        if path.exists():
            return False
        tmp.replace(path)
    tmp.unlink(missing_ok=True)
    fsync_folder(path.parent)
    return True


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file's content, read in pieces.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
