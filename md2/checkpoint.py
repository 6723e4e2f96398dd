"""Checkpoints: one file from which a run, an evaluation or a colleague can continue.

A file is written under another name, synced, then renamed. The one before is kept, so a damaged `last.pt` (full disk,
power cut) costs a few steps, not the run. Files are read with `weights_only=True`, so a stranger's checkpoint cannot
run code.

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

from md2.config import Config, config_from_dict, recipes
from shards.errors import InputError, first_line
from shards.files import fsync_folder

FORMAT = 1
LAST, PREVIOUS, BEST = "last.pt", "previous.pt", "best.pt"
_RESUMABLE = (LAST, PREVIOUS, BEST)
StateDict = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Checkpoint:
    """Contents of a checkpoint file.

    Attributes:
        config: the run's resolved configuration, as a nested dictionary.
        networks: sub-network name (encoder, depth, pose_encoder, pose, predictive_mask) -> state dict.
        metres_per_unit: metres in one unit of predicted depth; None: unknown (mono).
        step: optimiser steps done.
        epoch: epochs completed.
        training: state that only resuming needs (optimiser, schedule, scaler, loaders); empty in a checkpoint for
            inference.
        metrics: validation metrics at this step, if any.
    """

    config: dict[str, Any]
    networks: dict[str, StateDict]
    metres_per_unit: float | None
    step: int = 0
    epoch: int = 0
    training: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)

    def parsed_config(self, where: str = "checkpoint") -> Config:
        """Return the configuration as a `Config`.

        Raises:
            UsageError: another version of md2 wrote it, with keys that this one does not have.
        """
        return config_from_dict(self.config, where)


def save_checkpoint(checkpoint: Checkpoint, path: Path, *, keep: Path | None = None) -> None:
    """Write a checkpoint, whole or not at all; the present file at `path` is renamed to `keep`, if given.

    Raises:
        InputError: the disk is full or the folder cannot be written.
    """
    beside = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with beside.open("wb") as file:
            torch.save({"format": FORMAT, **vars(checkpoint)}, file)
            file.flush()
            os.fsync(file.fileno())
        if keep is not None and path.exists():
            path.replace(keep)
        beside.replace(path)
        fsync_folder(path.parent)
    except (OSError, RuntimeError) as error:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
        # torch's own message is about positions in its archive; the reason is in the error's context.
        cause = error.__context__ if isinstance(error.__context__, OSError) else error
        reason = getattr(cause, "strerror", None) or first_line(cause)
        raise InputError(
            f"cannot write checkpoint {path}: {reason}; free some space there, or choose another --run"
        ) from error


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Read a checkpoint file onto the CPU, checking every byte against the file's own CRCs.

    Raises:
        InputError: missing, damaged, or not a checkpoint of this format, down to the types of its fields.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such checkpoint")
    if foreign := what_else(path):
        raise InputError(f"{path}: {foreign}, not a checkpoint")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise InputError(f"{path}: damaged at {damaged}; use an earlier checkpoint")
        data = torch.load(path, map_location="cpu", weights_only=True)
    except InputError:
        raise
    except Exception as error:  # on other contents torch's unpickler fails in any way
        raise InputError(f"{path}: damaged or not a checkpoint ({reason_of(error)})") from error
    if not isinstance(data, dict) or data.pop("format", None) != FORMAT:
        raise InputError(f"{path}: not a checkpoint of md2's format {FORMAT}")
    if not _is_sound(data):
        raise InputError(f"{path}: not a checkpoint's fields; another version of md2 or another program wrote it")
    return Checkpoint(**data)


def what_else(path: Path) -> str | None:
    """Say what a file is if its first bytes show that it holds no weights; None if it may."""
    with path.open("rb") as file:
        start = file.read(64)
    kinds = {
        b"version https://git-lfs": "a git-lfs pointer (git lfs pull fetches the file)",
        b"\x89PNG": "a PNG picture",
        b"\xff\xd8\xff": "a JPEG picture",
    }
    if start.lstrip().lower().startswith((b"<!doctype", b"<html")):
        return "a web page"
    found = next((kind for magic, kind in kinds.items() if start.startswith(magic)), None)
    if found is None and start.startswith(b"PK"):
        try:
            with zipfile.ZipFile(path) as archive:
                names = archive.namelist()
        except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
            return None
        if any(name.endswith("encoder.pth") for name in names):
            return "a zip of Monodepth2 weights (unpack it and give the folder with encoder.pth)"
    return found


def reason_of(error: Exception) -> str:
    """Say why torch cannot read a file, without torch's advice to run the file's code."""
    text = str(error)
    if "Unsupported global" in text or "weights_only" in text:
        return "it holds Python objects, whose code md2 does not run: save the model's state_dict()"
    return first_line(error)


def _is_sound(data: dict[str, Any]) -> bool:
    """Whether the fields are a `Checkpoint`'s, by name and type."""
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
    """Whether a run has a checkpoint, damaged or not."""
    return any((run / "checkpoints" / name).exists() for name in _RESUMABLE)


def load_latest(run: Path) -> tuple[Checkpoint, str | None]:
    """Load the newest undamaged checkpoint of a run; returns a warning too if a newer file is damaged.

    Raises:
        InputError: no checkpoint, or all are damaged.
    """
    folder = run / "checkpoints"
    damages: list[str] = []
    for path in (folder / name for name in _RESUMABLE if (folder / name).exists()):
        try:
            return load_checkpoint(path), f"{damages[0]}; resuming from {path.name}" if damages else None
        except InputError as error:
            damages.append(str(error))
    raise InputError(
        f"{run}: no checkpoint to resume from ({'; '.join(damages) or 'none there'}); start a new run: "
        "md2 train CONFIG --run DIR"
    )


def resolve(path: str | Path) -> Path:
    """Return the path of a run's best checkpoint, else its last; a checkpoint file is returned as it is.

    Args:
        path: a run folder, its folder `checkpoints`, or a file.

    Raises:
        InputError: no checkpoint there.
    """
    path = Path(path)
    if path.is_file():
        return path
    for folder in (path / "checkpoints", path):
        for name in (BEST, LAST, PREVIOUS):
            if (folder / name).is_file():
                return folder / name
    if not path.exists():
        known = f" (a recipe: train it first, md2 train {path})" if str(path) in recipes() else ""
        raise InputError(f"{path}: no such file or folder{known}; {EXPECTED}")
    inner = sorted(file.parent for file in path.glob("*/encoder.pth"))
    hint = f"; did you mean {inner[0]}?" if inner else f"; {EXPECTED}"
    raise InputError(f"{path}: neither a checkpoint nor a folder with one{hint}")


EXPECTED = "give a run folder, a checkpoint, or a folder of Monodepth2 weights (encoder.pth, depth.pth)"
