"""Checkpoints: one file from which a run, an evaluation or a colleague can continue.

A file is written under another name, synced, then renamed. The one before is kept, so a damaged `last.pt` (full disk,
power cut) costs a few steps, not the run. Files are read with `weights_only=True`, so a stranger's checkpoint cannot
run code.

    RUN/checkpoints/last.pt       newest
    RUN/checkpoints/previous.pt   the one before
    RUN/checkpoints/best.pt       lowest validation abs_rel

A published model is a folder or URL with `model.safetensors`, the weights, and `config.json`, which has the rest and
the sha256 of the weights (`md2 export --to safetensors`).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import zipfile
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import IO, Any, cast

import torch

from md2.config import Config, config_from_dict, recipes
from shards.cache.download import fetch
from shards.errors import InputError, first_line
from shards.files import (
    BoundedReader,
    bounded_zip,
    cache_folder,
    disk_errors,
    fsync_folder,
    open_regular,
    read_small,
    sha256_file,
    temporary,
    write_atomic,
)
from shards.locks import FileLock
from shards.storage import is_local, open_storage
from shards.storage.retry import patience_from_environment

FORMAT = 1
LAST, PREVIOUS, BEST = "last.pt", "previous.pt", "best.pt"
_RESUMABLE = (LAST, PREVIOUS, BEST)
WEIGHTS, ABOUT = "model.safetensors", "config.json"
_LONGEST_ABOUT = 1 << 20
_LONGEST_PICKLE = 4 << 20
"""Bytes of a file's description of its tensors. The largest of timm's models with its optimiser takes 1 MB."""
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
    beside = temporary(path)
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
        raise InputError(
            f"cannot write checkpoint {path}: {unwritten(error)}; free some space there, or choose another --run"
        ) from error


def unwritten(error: OSError | RuntimeError) -> str:
    """Say why torch cannot write a file: its message is about positions in it, the reason in the error's context."""
    cause = error.__context__ if isinstance(error.__context__, OSError) else error
    return getattr(cause, "strerror", None) or first_line(cause)


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
    if path.suffix == ".safetensors":
        return _load_published(path)
    try:
        with bounded_zip(path) as archive:
            _require_stored(archive, path)
            damaged = archive.testzip()
        if damaged is not None:
            raise InputError(f"{path}: damaged at {damaged}; use an earlier checkpoint")
        data = read_torch(path)
    except InputError:
        raise
    except Exception as error:  # on other contents torch's unpickler fails in any way
        raise InputError(f"{path}: damaged or not a checkpoint ({reason_of(error)})") from error
    if not isinstance(data, dict) or data.pop("format", None) != FORMAT:
        raise InputError(f"{path}: not a checkpoint of md2's format {FORMAT}")
    if not _is_sound(data):
        raise InputError(f"{path}: not a checkpoint's fields; another version of md2 or another program wrote it")
    return Checkpoint(**data)


def read_torch(path: Path) -> Any:
    """Return what `torch.save` wrote, in memory that is in proportion to the file. No code of the file runs.

    Raises:
        ValueError: the file claims more than it holds.
        Exception: of any kind, as torch fails at other contents.
    """
    with path.open("rb") as file:
        if file.read(2) == b"PK":
            with bounded_zip(path) as archive:
                _require_stored(archive, path)
            data = torch.load(path, map_location="cpu", weights_only=True)
        else:
            file.seek(0)
            data = torch.load(cast(IO[bytes], _Pieces(file)), map_location="cpu", weights_only=True)
    _require_plain(data)
    return data


def _require_stored(archive: zipfile.ZipFile, path: Path) -> None:
    """Refuse an archive that unpacks to more than the file, or whose description of the tensors is long."""
    members = archive.infolist()
    pickles = sum(member.file_size for member in members if member.filename.endswith("data.pkl"))
    packed = any(member.compress_type != zipfile.ZIP_STORED for member in members)
    if packed or sum(member.file_size for member in members) > path.stat().st_size or pickles > _LONGEST_PICKLE:
        raise ValueError("it unpacks to more than it holds")


def _require_plain(data: Any) -> None:
    """Refuse tensors that stand for more than the file holds: views that repeat it, sparse ones."""
    for value in data.values() if isinstance(data, dict) else data if isinstance(data, list | tuple) else ():
        if isinstance(value, torch.Tensor):
            whole = value.layout is torch.strided and value.device.type == "cpu" and not value.is_quantized
            if not whole or value.numel() * value.element_size() > value.untyped_storage().nbytes():
                raise ValueError("a tensor claims more than the file holds")
        else:
            _require_plain(value)


class _Pieces(BoundedReader):
    """A file in torch's old format, which is read in pieces, of a limited number."""

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file, _LONGEST_PICKLE)
        self._left = _LONGEST_PICKLE

    def read(self, size: int = -1) -> bytes:
        self._left -= 1
        if self._left < 0:
            raise ValueError("more objects than weights have")
        return super().read(size)

    def __getattr__(self, name: str) -> Any:
        if name in ("fileno", "readinto"):  # else torch reads past `read`
            raise AttributeError(name)
        return super().__getattr__(name)


def require_short_header(path: Path) -> None:
    """Refuse a safetensors file that begins with megabytes of names.

    Raises:
        InputError: it cannot be read, or does so.
    """
    try:
        with open_regular(path) as file:
            size = int.from_bytes(file.read(8), "little")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    if size > _LONGEST_PICKLE:
        raise InputError(f"{path}: not a safetensors file of weights: a header of {size:,} bytes")


def write_published(checkpoint: Checkpoint, folder: Path, about: dict[str, Any]) -> None:
    """Write the weights as `model.safetensors`, and `config.json`: all else, with `about` in front.

    Raises:
        OSError: a file cannot be written.
    """
    from safetensors.torch import save_file

    tensors = {
        f"{name}.{key}": value.detach().cpu().clone().contiguous()
        for name, state in checkpoint.networks.items()
        for key, value in state.items()
    }
    path = folder / WEIGHTS
    save_file(tensors, path, metadata={"format": "pt"})
    facts = {name: value for name, value in vars(checkpoint).items() if name not in ("networks", "training")}
    weights = {"sha256": sha256_file(path), "bytes": path.stat().st_size}
    write_atomic(
        folder / ABOUT, (json.dumps({"format": FORMAT, **about, "weights": weights, **facts}, indent=1) + "\n").encode()
    )


def _load_published(path: Path) -> Checkpoint:
    """Read published weights with the `config.json` beside them."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    beside = path.with_name(ABOUT)
    try:
        data = read_small(beside, _LONGEST_ABOUT)
    except OSError as error:
        raise InputError(f"{beside}: cannot be read ({error.strerror}); it belongs to {path.name}") from error
    about = _parse_about(data, str(beside))
    weights = about["weights"]
    if path.stat().st_size != weights["bytes"] or sha256_file(path) != weights["sha256"]:
        raise InputError(f"{path}: not the weights that {ABOUT} beside it describes; fetch both again")
    require_short_header(path)
    networks: dict[str, StateDict] = {}
    try:
        for name, value in load_file(path).items():
            networks.setdefault(name.partition(".")[0], {})[name.partition(".")[2]] = value
    except SafetensorError as error:
        raise InputError(f"{path}: not a safetensors file ({first_line(error)})") from error
    facts = {name: about[name] for name in ("config", "metres_per_unit", "step", "epoch", "metrics")}
    return Checkpoint(networks=networks, **facts)


def _parse_about(data: bytes, where: str) -> dict[str, Any]:
    """Parse a published model's `config.json`.

    Raises:
        InputError: it is another program's, or damaged.
    """
    try:
        about = json.loads(data)
        weights = about["weights"]
        fields_ = {name: about[name] for name in ("config", "metres_per_unit", "step", "epoch", "metrics")}
        whole = _is_sound({**fields_, "networks": {}, "training": {}}) and about["format"] == FORMAT
        if not whole or len(bytes.fromhex(weights["sha256"])) != 32 or not 0 < weights["bytes"] < 1 << 40:
            raise ValueError("fields of another kind")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{where}: not the {ABOUT} of a model that md2 has exported ({first_line(error)})") from error
    found: dict[str, Any] = about
    return found


def download(url: str) -> Path:
    """Bring a published model into the cache; return its weights, whose sha256 has been checked.

    Raises:
        InputError: no model there.
        DatasetError: the weights are missing or others, or the storage fails.
    """
    storage = open_storage(url)
    data = storage.read(ABOUT, _LONGEST_ABOUT)
    if data is None:
        raise InputError(f"{storage.url}: no model there (no {ABOUT}); md2 export RUN --to safetensors writes one")
    weights = _parse_about(data, f"{storage.url}/{ABOUT}")["weights"]
    folder = cache_folder() / "models" / hashlib.sha256(data).hexdigest()
    path = folder / WEIGHTS
    with disk_errors(folder), FileLock(folder / "lock").acquire(patience_from_environment()):
        if not path.is_file():
            fetch(storage, WEIGHTS, path, size=weights["bytes"], sha256=weights["sha256"])
        write_atomic(folder / ABOUT, data)
    return path


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
            with bounded_zip(path) as archive:
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
        and all(isinstance(data[name], int) and 0 <= data[name] < 1 << 53 for name in ("step", "epoch"))
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
        path: a run folder, its folder `checkpoints`, a file, or a folder or URL of a published model.

    Raises:
        InputError: no checkpoint there.
        DatasetError: the storage behind a URL fails.
    """
    if not is_local(str(path)):
        return download(str(path))
    path = Path(path)
    if path.is_file():
        return path
    for folder in (path / "checkpoints", path):
        for name in (BEST, LAST, PREVIOUS):
            if (folder / name).is_file():
                return folder / name
    if (path / WEIGHTS).is_file():
        return path / WEIGHTS
    if not path.exists():
        known = f" (a recipe: train it first, md2 train {path})" if str(path) in recipes() else ""
        raise InputError(f"{path}: no such file or folder{known}; {EXPECTED}")
    inner = sorted(file.parent for file in path.glob("*/encoder.pth"))
    hint = f"; did you mean {inner[0]}?" if inner else f"; {EXPECTED}"
    raise InputError(f"{path}: neither a checkpoint nor a folder with one{hint}")


EXPECTED = (
    "give a run folder, a checkpoint, a model that md2 has exported, or a folder of Monodepth2 weights (encoder.pth, "
    "depth.pth)"
)
