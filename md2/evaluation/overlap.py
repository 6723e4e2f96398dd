"""The leak audit: how many of the evaluated images a model has seen in training."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from md2.config import DataConfig
from shards.errors import DatasetError, StorageError
from shards.manage import loaded_places, part_keys
from shards.publish import require_manifest
from shards.sample import place_of
from shards.storage import is_local, open_storage


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
        targets = {place_of(key) for key in part_keys(storage, require_manifest(storage).manifest, "train")}
    except (DatasetError, StorageError):
        return None
    seen = loaded_places(targets, data.frames, data.stereo)
    drives = {drive for drive, _, _ in targets}
    places = [place_of(key) for key in keys]
    return Overlap(
        len(places),
        sum(place in targets for place in places),
        sum(place in seen for place in places),
        sum(drive in drives for drive, _, _ in places),
    )
