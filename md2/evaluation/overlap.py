"""The leak audit: how many of the evaluated images a model has seen in training."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import PurePosixPath

from md2.config import DataConfig
from shards.dataset import read_index
from shards.errors import DatasetError, StorageError
from shards.publish import require_manifest
from shards.storage import is_local, open_storage

_KEY = re.compile(r"(.+)_([lr])_(\d+)")
"""A sample's key: drive, side, frame."""


@dataclass(frozen=True)
class Overlap:
    """Numbers of evaluated images that occur in a training dataset.

    Attributes:
        images: all evaluated images.
        targets: those that were target frames.
        seen: those that were loaded as target frame, temporal frame or stereo partner.
        drives: those of drives that training used.
    """

    images: int
    targets: int
    seen: int
    drives: int

    def __str__(self) -> str:
        if not self.drives:
            return f"training used none of the {self.images} images, and none of their drives"
        return (
            f"training used {self.seen} of the {self.images} images ({self.targets} as target frame), "
            f"and drives of {self.drives}"
        )


def training_overlap(keys: Iterable[str], data: DataConfig) -> Overlap | None:
    """Compare evaluated samples with the `train` part of the dataset that a model was trained on.

    Args:
        keys: sample keys of the evaluated images.
        data: the model's configuration: where its dataset lies, and which frames it loaded.

    Returns:
        None if the dataset is not on this machine any more, or cannot be read.
    """
    if not is_local(data.url):
        return None
    try:
        storage = open_storage(data.url)
        shards = require_manifest(storage).manifest.part("train")
        names = [entries[0].name for shard in shards for entries in read_index(storage, shard)]
    except (DatasetError, StorageError):
        return None
    targets = {_place(PurePosixPath(name).name.partition(".")[0]) for name in names}
    seen = {(drive, side, frame + offset) for drive, side, frame in targets for offset in data.frames}
    if data.stereo:
        seen |= {(drive, {"l": "r", "r": "l"}.get(side, side), frame) for drive, side, frame in targets}
    drives = {drive for drive, _, _ in targets}
    places = [_place(key) for key in keys]
    return Overlap(
        len(places),
        sum(place in targets for place in places),
        sum(place in seen for place in places),
        sum(drive in drives for drive, _, _ in places),
    )


def _place(key: str) -> tuple[str, str, int]:
    """Split a key into drive, side and frame; a key of another form is a drive of its own."""
    match = _KEY.fullmatch(key)
    return (match[1], match[2], int(match[3])) if match else (key, "", 0)
