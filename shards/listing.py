"""Which datasets lie below a URL: `md2 shards ls`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from shards.errors import DatasetError, StorageError
from shards.manifest import MANIFEST, Manifest
from shards.publish import FOLDER, read_manifest
from shards.storage import Storage, is_local, open_storage

MAX_DEPTH = 6


@dataclass(frozen=True)
class Found:
    """A dataset below a URL: its manifest, or why there is none."""

    url: str
    manifest: Manifest | None
    note: str = ""


def find_datasets(url: str) -> Iterator[Found]:
    """Every dataset at `url` and up to six folders below it, unfinished and broken ones with a note.

    Raises:
        StorageError: the storage fails.
        UsageError: a web address that is no dataset itself: it cannot be listed.
    """
    storage = open_storage(url)
    found = read_manifest(storage)
    if found is not None:
        yield Found(storage.url, found.manifest)
        return
    yield from _below(storage, "", 0)


def _below(storage: Storage, prefix: str, depth: int) -> Iterator[Found]:
    here = f"{storage.url}/{prefix}" if prefix else storage.url
    try:
        files, folders = storage.children(prefix)
    except StorageError as error:
        if not prefix or not is_local(storage.url):
            raise
        yield Found(here, None, f"cannot be looked into: {error}")  # someone else's folder is no reason to stop
        return
    if MANIFEST in files:
        yield _look(here)
    elif FOLDER in folders:
        yield Found(here, None, "unfinished: being published, or interrupted")
    elif depth < MAX_DEPTH:
        for name in folders:
            if not name.startswith("."):
                yield from _below(storage, f"{prefix}/{name}" if prefix else name, depth + 1)


def _look(url: str) -> Found:
    try:
        found = read_manifest(open_storage(url))
    except DatasetError as error:
        if isinstance(error, StorageError) and not is_local(url):
            raise
        return Found(url, None, f"broken: {error}")
    return Found(url, found.manifest if found else None)
