"""Files that are whole or absent: write beside, sync, rename."""

from __future__ import annotations

import hashlib
import os
import re
import socket
import uuid
from functools import cache
from pathlib import Path

_TEMPORARY = re.compile(r"\..+\.([0-9a-f]{8})-(\d+)-[0-9a-f]{12}\.tmp")


CACHE_FOLDER = "MD2_CACHE"
"""Environment variable: where downloads, cached datasets and unfinished work that has no other place go."""


def cache_folder() -> Path:
    """As `MD2_CACHE` says; else `md2` in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get(CACHE_FOLDER) or Path(base) / "md2").expanduser()


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
    """A name beside `path` that no other process uses; it tells whose it is (`is_abandoned`)."""
    return path.with_name(f".{path.name}.{_host()}-{os.getpid()}-{uuid.uuid4().hex[:12]}.tmp")


def is_abandoned(path: Path) -> bool:
    """Whether `temporary` made the name in a process of this machine that has ended: killed while it wrote."""
    made = _TEMPORARY.fullmatch(path.name)
    return made is not None and made[1] == _host() and not is_running(int(made[2]))


def is_running(process: int) -> bool:
    """Whether this machine has a process of that number; it may be another than the one that is meant."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # someone else's; no process has such a number, and none is known to have ended
        return True
    return True


@cache
def _host() -> str:
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


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
