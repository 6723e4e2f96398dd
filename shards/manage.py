"""Datasets below a URL, what differs between two, and the removal of datasets and of unfinished publications.

`md2 shards ls|diff|rm|clean`
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath

from shards.dataset import read_index
from shards.errors import DatasetError, StorageError, UsageError
from shards.manifest import CARD, MANIFEST, REPORT, Manifest
from shards.publish import FOLDER, Claim, read_claim, read_manifest, require_manifest
from shards.sample import place_of
from shards.storage import Storage, is_local, open_storage

MAX_DEPTH = 6
_VERSION = re.compile(r"-v\d+$")
_OWN = re.compile(rf"[a-z0-9_]+/\d{{6}}\.(tar|idx)|{re.escape(CARD)}|{re.escape(REPORT)}|{re.escape(FOLDER)}/.+")
"""Names that md2 gives within a dataset, besides the manifest."""


@dataclass(frozen=True)
class Found:
    """A dataset below a URL: its manifest, or why it has none."""

    url: str
    manifest: Manifest | None
    note: str = ""
    unfinished: bool = False


@dataclass(frozen=True)
class Leavings:
    """An unfinished publication: who claims it, and the objects that are there already."""

    url: str
    claim: Claim | None
    note: str
    """Why the claim is not known, "" if it is."""
    names: list[str]
    """Of the objects that md2 put there."""

    @property
    def who(self) -> str:
        """The claim in words."""
        if self.claim is None:
            return self.note or "nobody claims it"
        return f"claimed by {self.claim.who}{', which has ended' if self.claim.has_ended else ''}"


def find_datasets(url: str) -> Iterator[Found]:
    """Yield every dataset at `url` and up to six folders below it; unfinished and broken ones have a note.

    Raises:
        DatasetError: `url` itself is a dataset with a broken manifest.
        StorageError: the storage fails.
        UsageError: a web address that is not a dataset itself: it cannot be listed.
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
        yield Found(here, None, f"cannot be listed: {error}")  # another user's folder does not end the list
        return
    if MANIFEST in files:
        yield _look(here)
    elif FOLDER in folders:
        yield Found(here, None, "unfinished: being published, or interrupted", unfinished=True)
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


def datasets_at(url: str) -> list[Found]:
    """Return the dataset at `url`, or else all below it; unfinished and broken ones have a note.

    Raises:
        DatasetError: there is none, or `url` itself is a dataset with a broken manifest.
        StorageError: the storage fails.
    """
    try:
        found = list(find_datasets(url))
    except UsageError:  # a web address, which cannot be listed
        found = []
    if not any(dataset.manifest for dataset in found):
        require_manifest(open_storage(url))
    return found


def newest_version(url: str) -> str:
    """Return the URL of the newest of the datasets NAME, NAME-v2, NAME-v3, … beside each other.

    Args:
        url: of NAME, with or without a version.

    Raises:
        DatasetError: there is none.
        StorageError: the storage fails.
        UsageError: a web address, which cannot be listed.
    """
    parent, _, name = open_storage(url).url.rpartition("/")
    stem = _VERSION.sub("", name)
    folders = open_storage(parent).children("")[1]
    versions = {
        int(match[1] or 1): folder
        for folder in folders
        if (match := re.fullmatch(rf"{re.escape(stem)}(?:-v(\d+))?", folder))
    }
    for _, folder in sorted(versions.items(), reverse=True):
        if read_manifest(open_storage(f"{parent}/{folder}")) is not None:
            return f"{parent}/{folder}"
    raise DatasetError(f"{parent}/{stem}: no dataset there, nor any {stem}-v2 and so on")


def find_unfinished(url: str) -> list[Leavings]:
    """Return the unfinished publications at `url` and below it, and leftovers of one beside a committed dataset.

    Raises:
        StorageError: the storage fails.
    """
    storage = open_storage(url)
    if storage.stat(MANIFEST) is not None:
        left = [name for name in storage.names(FOLDER) if _OWN.fullmatch(name)]
        return [_leavings(storage, left)] if left else []
    found = []
    for dataset in _below(storage, "", 0):
        if dataset.unfinished:
            below = open_storage(dataset.url)
            found.append(_leavings(below, [name for name in below.names("") if _OWN.fullmatch(name)]))
    return found


def _leavings(storage: Storage, names: list[str]) -> Leavings:
    try:
        return Leavings(storage.url, read_claim(storage), "", names)
    except StorageError as error:
        return Leavings(storage.url, None, str(error), names)


def remove_unfinished(leavings: Leavings) -> None:
    """Remove an unfinished publication, the claim last, so that an interruption leaves it claimed.

    Raises:
        StorageError: the storage fails, or the dataset was committed meanwhile.
    """
    storage = open_storage(leavings.url)
    if storage.stat(MANIFEST) is not None and not all(name.startswith(f"{FOLDER}/") for name in leavings.names):
        raise StorageError(f"{leavings.url}: was committed meanwhile; nothing is removed")
    storage.delete(sorted(leavings.names, key=lambda name: name.endswith("/claim.json")))
    storage.sweep()


def remove_dataset(url: str) -> int:
    """Remove a committed dataset, the manifest first, so that readers see it whole or not at all.

    Objects that md2 did not put there stay.

    Returns:
        Number of removed objects.

    Raises:
        DatasetError: no dataset, or a broken manifest.
        StorageError: the storage fails.
        UsageError: a web address.
    """
    storage = open_storage(url)
    require_manifest(storage)
    names = [name for name in storage.names("") if _OWN.fullmatch(name)]
    storage.delete([MANIFEST, *names])
    storage.sweep()
    return 1 + len(names)


Place = tuple[str, str, int]
"""Drive, side, frame."""
_PARTNER = {"l": "r", "r": "l"}
_BYTES = ("md2_version", "split", "frames", "stereo", "depth", "size", "codec", "quality", "jpeg", "seed", "components")
"""Fields of a manifest that are compared."""


def part_keys(storage: Storage, manifest: Manifest, part: str) -> list[str]:
    """Return the keys of a part's samples, in order, out of its indexes.

    Raises:
        DatasetError: no such part, or an index differs from the manifest.
        StorageError: the storage fails.
    """
    names = [entries[0].name for shard in manifest.part(part) for entries in read_index(storage, shard)]
    return [PurePosixPath(name).name.partition(".")[0] for name in names]


def loaded_places(targets: Iterable[Place], frames: Iterable[int], stereo: bool) -> set[Place]:
    """Return the images that training loads: targets, temporal frames at these offsets, stereo partners."""
    targets, offsets = set(targets), {0, *frames}
    seen = {(drive, side, frame + offset) for drive, side, frame in targets for offset in offsets}
    return seen | ({(drive, _PARTNER.get(side, side), frame) for drive, side, frame in targets} if stereo else set())


@dataclass(frozen=True)
class Leak:
    """Images of one dataset's part that another's `train` part holds: all, as targets, as any image."""

    train: str
    part: str
    images: int
    targets: int
    seen: int


@dataclass(frozen=True)
class Difference:
    """What differs between datasets A and B.

    Attributes:
        settings: field of the manifest -> its values in A and B, where they differ.
        samples: part -> number of samples in both, in A alone, in B alone.
        leaks: held-out parts of one that meet the `train` part of the other.
    """

    settings: dict[str, tuple[str, str]]
    samples: dict[str, tuple[int, int, int]]
    leaks: list[Leak]


def difference(a: str, b: str) -> Difference:
    """Compare two datasets by their manifests and indexes.

    Raises:
        DatasetError, StorageError: one cannot be read.
    """
    storages = [open_storage(url) for url in (a, b)]
    manifests = [require_manifest(storage).manifest for storage in storages]
    trees = [manifest.model_dump(mode="json") for manifest in manifests]
    values = {name: (_short(trees[0][name]), _short(trees[1][name])) for name in _BYTES}
    settings = {name: (mine, other) for name, (mine, other) in values.items() if mine != other}
    keys = [
        {part: part_keys(storage, manifest, part) for part in manifest.parts}
        for storage, manifest in zip(storages, manifests, strict=True)
    ]
    samples = {}
    for part in sorted({*keys[0], *keys[1]}):
        mine, others = set(keys[0].get(part, [])), set(keys[1].get(part, []))
        samples[part] = (len(mine & others), len(mine - others), len(others - mine))
    leaks = []
    for train, held, name in ((0, 1, a), (1, 0, b)):
        if "train" not in keys[train]:
            continue
        targets = {place_of(key) for key in keys[train]["train"]}
        seen = loaded_places(targets, manifests[train].frames, manifests[train].stereo)
        for part in manifests[held].parts:
            places = [place_of(key) for key in keys[held][part]]
            leak = Leak(name, part, len(places), sum(p in targets for p in places), sum(p in seen for p in places))
            if part != "train" and leak.seen:
                leaks.append(leak)
    return Difference(settings, samples, leaks)


def _short(value: object) -> str:
    return ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)
