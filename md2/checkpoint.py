"""Checkpoints: one file that a run, an evaluation or a colleague can go on from.

A file is written beside its place, synced, then renamed; the last one but one is kept, so that a
damaged `last.pt` (full disk, power cut) costs a few steps and not the run. Files are read with
`weights_only=True`: a checkpoint from a stranger cannot run code.

    RUN/checkpoints/last.pt       newest
    RUN/checkpoints/previous.pt   the one before
    RUN/checkpoints/best.pt       lowest validation abs_rel
"""

from __future__ import annotations

import contextlib
import os
import zipfile
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from md2.config import Config, config_from_dict
from shards.errors import InputError, first_line
from shards.files import fsync_folder

FORMAT = 1
LAST, PREVIOUS, BEST = "last.pt", "previous.pt", "best.pt"
_TO_GO_ON_FROM = (LAST, PREVIOUS, BEST)
StateDict = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Checkpoint:
    """Contents of a checkpoint file.

    Attributes:
        config: the run's resolved configuration, as a nested dictionary.
        networks: sub-network name (encoder, depth, pose_encoder, pose, predictive_mask) -> state dict.
        metres_per_unit: metres in one unit of predicted depth; None where the scale is unknown (mono).
        step: optimiser steps done.
        epoch: epochs completed.
        training: what resuming needs beyond that (optimiser, schedule, scaler, loader, random state);
            empty in a checkpoint that is only for inference.
        metrics: validation metrics at this point, if any.
    """

    config: dict[str, Any]
    networks: dict[str, StateDict]
    metres_per_unit: float | None
    step: int = 0
    epoch: int = 0
    training: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)

    def parsed_config(self, where: str = "checkpoint") -> Config:
        """The configuration as a model.

        Raises:
            UsageError: written by another version, with keys that this one does not have.
        """
        return config_from_dict(self.config, where)


def save_checkpoint(checkpoint: Checkpoint, path: Path, *, keep: Path | None = None) -> None:
    """Write atomically; `keep`: where the file now at `path` goes (a rename) instead of being replaced.

    Raises:
        InputError: the disk is full or the folder cannot be written.
    """
    beside = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with beside.open("wb") as file:
            torch.save({"format": FORMAT, **_fields(checkpoint)}, file)
            file.flush()
            os.fsync(file.fileno())
        if keep is not None and path.exists():
            path.replace(keep)
        beside.replace(path)
        fsync_folder(path.parent)
    except (OSError, RuntimeError) as error:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
        # Where a write fails torch speaks of positions in its archive; the reason is behind that.
        cause = error.__context__ if isinstance(error.__context__, OSError) else error
        told = getattr(cause, "strerror", None) or first_line(cause)
        raise InputError(
            f"cannot write checkpoint {path}: {told}; free some space there, or choose another --run"
        ) from error


def _fields(checkpoint: Checkpoint) -> dict[str, Any]:
    """The fields without the deep copy of `dataclasses.asdict` (which would double the memory)."""
    return {each.name: getattr(checkpoint, each.name) for each in fields(checkpoint)}


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Read a checkpoint file onto the CPU, checking every byte against the file's own CRCs.

    Raises:
        InputError: missing, damaged, or not a checkpoint of this format, down to the types of its fields.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such checkpoint")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise InputError(f"{path}: damaged at {damaged}; use an earlier checkpoint")
        data = torch.load(path, map_location="cpu", weights_only=True)
    except InputError:
        raise
    except Exception as error:  # a zip with other things in it trips torch's unpickler in any way
        raise InputError(f"{path}: damaged or not a checkpoint ({first_line(error)})") from error
    if not isinstance(data, dict) or data.pop("format", None) != FORMAT:
        raise InputError(f"{path}: not a checkpoint of md2's format {FORMAT}")
    if not _is_sound(data):
        raise InputError(f"{path}: not what a checkpoint holds; another version of md2 or another program wrote it")
    return Checkpoint(**data)


def _is_sound(data: dict[str, Any]) -> bool:
    """Whether the fields are those of a `Checkpoint`, and hold what it says."""
    networks, unit = data.get("networks"), data.get("metres_per_unit")
    needed = {each.name for each in fields(Checkpoint)}
    return (
        needed == data.keys()
        and all(isinstance(data[name], dict) for name in ("config", "training", "metrics"))
        and all(isinstance(data[name], int) for name in ("step", "epoch"))
        and (unit is None or (isinstance(unit, int | float) and 0 < unit < float("inf")))
        and isinstance(networks, dict)
        and all(
            isinstance(state, dict) and all(isinstance(value, torch.Tensor) for value in state.values())
            for state in networks.values()
        )
    )


def has_checkpoint(run: Path) -> bool:
    """Whether a run has come to its first checkpoint, damaged or not."""
    return any((run / "checkpoints" / name).exists() for name in _TO_GO_ON_FROM)


def load_latest(run: Path) -> tuple[Checkpoint, str | None]:
    """The newest undamaged checkpoint of a run, and a warning if that is not the newest file.

    Raises:
        InputError: the run has none.
    """
    folder = run / "checkpoints"
    damages: list[str] = []
    for path in (folder / name for name in _TO_GO_ON_FROM):
        if not path.exists():
            continue
        try:
            checkpoint = load_checkpoint(path)
        except InputError as error:
            damages.append(str(error))
            continue
        return checkpoint, f"{damages[0]}; going on from {path.name}" if damages else None
    raise InputError(
        f"{run}: no checkpoint to go on from ({'; '.join(damages) or 'none there'}); start a new run, for instance "
        f"from this one's weights: md2 train CONFIG model.weights={folder / BEST} --run DIR"
    )


def resolve(path: str | Path) -> Path:
    """A run folder -> its best checkpoint, else its last; a file -> itself.

    Raises:
        InputError: neither a checkpoint nor a run with one.
    """
    path = Path(path)
    if path.is_file():
        return path
    for name in (BEST, LAST, PREVIOUS):
        candidate = path / "checkpoints" / name
        if candidate.is_file():
            return candidate
    raise InputError(f"{path}: neither a checkpoint nor a run folder with checkpoints/")
