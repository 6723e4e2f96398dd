"""Fetching published files to local disk: resumed where an earlier attempt stopped, checked by sha256."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

from shards.errors import DatasetError
from shards.files import disk_error, replace
from shards.storage import Storage
from shards.storage.retry import MissingError

_WHOLE_TRIES = 2
_READ = 1 << 20


def fetch(
    storage: Storage, name: str, path: Path, *, size: int, sha256: str, advance: Callable[[int], None] | None = None
) -> None:
    """Bring one published file to `path`, whole and verified, or not at all.

    What has come so far stands in `….part`; the next call, also of another process, goes on behind it. Never more
    than `size` bytes are taken from the storage or written.

    Args:
        advance: called with the bytes that came; negative when some have to come again.

    Raises:
        DatasetError: it is missing, or its bytes are not the published ones (tried from the start twice).
        StorageError: the storage fails beyond patience, or the local disk is full.
    """
    part = path.with_name(path.name + ".part")
    advance = advance or (lambda _: None)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tries = 0
        while tries < _WHOLE_TRIES:
            resumed = part.exists()
            tries += not resumed
            came = _fetch_once(storage, name, part, size, sha256, advance)
            if came is None:
                replace(part, path)
                return
            part.unlink()
            advance(-came)
    except MissingError as error:
        raise DatasetError(f"{storage.url}/{name}: missing, though the manifest lists it; publish it again") from error
    except OSError as error:
        raise disk_error(path, error) from error
    raise DatasetError(
        f"{storage.url}/{name}: not the bytes that were published (changed or damaged there; fetched {tries} times); "
        "restore it, or publish the dataset under another name"
    )


def _fetch_once(
    storage: Storage, name: str, part: Path, size: int, sha256: str, advance: Callable[[int], None]
) -> int | None:
    """Fill `part`; None if it is then the published content, else how many bytes it holds."""
    digest = hashlib.sha256()
    with part.open("a+b") as file:
        file.seek(0)
        while piece := file.read(_READ):
            digest.update(piece)
        have = file.tell()
        advance(have)
        if have < size:
            for came in storage.stream(name, have):
                piece = came[: size - have]
                file.write(piece)
                digest.update(piece)
                have += len(piece)
                advance(len(piece))
                if have >= size:
                    break
    return None if have == size and digest.hexdigest() == sha256 else have
