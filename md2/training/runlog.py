"""A run's record of itself: metrics as JSON lines, TensorBoard events, panels, environment.

RUN/config.yaml          the resolved configuration
RUN/environment.json     versions, device, git revision, dataset hash, command line
RUN/metrics.jsonl        {"kind": "train" | "val", "step": ..., "epoch": complete ones, name: value ...}
RUN/tensorboard/         the same scalars, and the image panels
RUN/panels/              the panels as PNG
"""

from __future__ import annotations

import io
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from PIL import Image

from md2 import __version__
from md2.training.loggers import Logger
from md2.visualize import Picture
from shards.errors import InputError
from shards.files import read_small, write_atomic

METRICS = "metrics.jsonl"
ENVIRONMENT = "environment.json"
RowKind = Literal["train", "val"]
MOST_METRICS = 128 << 20
"""Bytes of metrics.jsonl: a row every step of twenty epochs of KITTI."""


class Reporter(Protocol):
    """Shows progress: a progress bar, or lines of text."""

    def start(self, total: int, done: int) -> None:
        """Training begins; `done` of `total` steps are done."""

    def step(self, step: int, epoch: int, loss: float | None, images_per_second: float) -> None:
        """A step is done; `loss` is None unless it was logged."""

    def message(self, text: str) -> None:
        """Show one line."""


@dataclass(frozen=True)
class Stopped:
    """How training ended: the step and epoch reached, whether that was before the end, and the last metrics.

    `alone`: this rank of several left the others within a step, and communicates no more.
    """

    step: int
    epoch: int
    early: bool
    metrics: dict[str, float]
    alone: bool = False


class RunLog:
    """Scalars and panels of one run; only the main rank makes one.

    Args:
        run: the run folder.
        step: steps done. Rows that an interrupted run wrote beyond it are dropped, since those steps are repeated.
        measured: whether validation after `step` is done as well; otherwise its row is dropped, too.
        loggers: receive the scalars as well; closed with the log.
        warn: receives a message when a logger fails. That logger gets no more scalars; training continues.
    """

    def __init__(
        self,
        run: Path,
        step: int = 0,
        loggers: Sequence[Logger] = (),
        warn: Callable[[str], None] = print,
        *,
        measured: bool = True,
    ) -> None:
        # TensorBoard takes a second to import, which `md2 --help` must not wait for.
        from torch.utils.tensorboard import SummaryWriter

        self.run, self.loggers, self.warn = run, list(loggers), warn
        self.path = run / METRICS
        _drop_after(self.path, step, measured)
        self._file = self.path.open("a", encoding="utf-8")
        self._events = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)

    def scalars(self, kind: RowKind, step: int, epoch: int, values: dict[str, float]) -> None:
        """Write one line of metrics; values that are not finite become null (JSON has no NaN)."""
        clean = {name: value if np.isfinite(value) else None for name, value in values.items()}
        self._file.write(json.dumps({"kind": kind, "step": step, "epoch": epoch, **clean}) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._events.add_scalar(f"{kind}/{name}", value, step)
        named = {f"{kind}/{name}": value for name, value in values.items()}
        for logger in list(self.loggers):
            self._call(logger, partial(logger.log, named, step))

    def panel(self, kind: RowKind, step: int, image: Picture) -> None:
        """Write an (H, W, 3) uint8 picture, which appears whole or not at all."""
        png = io.BytesIO()
        Image.fromarray(image).save(png, "png")
        write_atomic(self.run / "panels" / f"{kind}-{step:08d}.png", png.getvalue())
        self._events.add_image(f"{kind}/panel", image, step, dataformats="HWC")

    def close(self) -> None:
        self._file.close()
        self._events.close()
        for logger in list(self.loggers):
            self._call(logger, logger.close)

    def _call(self, logger: Logger, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # each package has its own
            self.loggers.remove(logger)
            self.warn(f"warning: {type(logger).__name__} failed and gets no more scalars: {error}")


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Read the rows of metrics.jsonl, up to the first malformed one (half a row of a killed run).

    Raises:
        InputError: it cannot be read.
    """
    path = run / METRICS
    if not path.exists():
        return []
    if not path.is_file():
        raise InputError(f"{path}: not a file")
    try:
        text = read_small(path, MOST_METRICS).decode(errors="replace")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    rows: list[dict[str, Any]] = []
    for line in text.splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            break
        if not _is_row(row):
            break
        rows.append(row)
    return rows


def _is_row(row: Any) -> bool:
    """Whether a line holds what `RunLog.scalars` writes: a kind, a step, and numbers or nulls."""
    if not isinstance(row, dict) or row.get("kind") not in ("train", "val") or not isinstance(row.get("step"), int):
        return False
    return all(value is None or isinstance(value, int | float) for name, value in row.items() if name != "kind")


def _drop_after(path: Path, step: int, measured: bool) -> None:
    """Remove the rows of steps and validations that the resumed run repeats."""
    if not path.exists():
        return
    last = {"train": step, "val": step if measured else step - 1}
    kept = {(row["kind"], row["step"]): row for row in read_metrics(path.parent) if row["step"] <= last[row["kind"]]}
    write_atomic(path, "".join(json.dumps(row) + "\n" for row in kept.values()).encode())


def environment(device: torch.device, dataset: dict[str, str]) -> dict[str, Any]:
    """Versions, hardware, git revision and data of this run, for environment.json."""
    packages = {}
    for name in ("torch", "nvidia-dali-cuda120", "nvidia-dali-cuda130", "webdataset", "numpy", "pillow"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "md2": __version__,
        "git": _git_revision(),
        "python": platform.python_version(),
        "packages": packages,
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "cuda": torch.version.cuda,
        "world_size": int(os.environ.get("WORLD_SIZE", "1")),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "dataset": dataset,
    }


def _git_revision() -> str | None:
    """The revision of the checkout that md2 runs from; None for an installed package."""
    folder = Path(__file__).resolve().parent
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None if found.returncode == 0 else None


class Window:
    """Images and waiting time since the last report."""

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self.begin, self.images = time.perf_counter(), 0
        self.waited: dict[str, float] = {}

    def wait(self, seconds: dict[str, float]) -> None:
        """Count waiting for data: all of it under "", and its kinds under "/storage" and so on."""
        for kind, more in seconds.items():
            self.waited[kind] = self.waited.get(kind, 0.0) + more

    def add(self, images: int) -> None:
        """Count images."""
        self.images += images

    @property
    def images_per_second(self) -> float:
        """Target images per second since the last report, over all ranks."""
        return self.images / max(time.perf_counter() - self.begin, 1e-9)

    def shares(self) -> dict[str, float]:
        """Shares of the time so far spent waiting for data, by kind as `wait` has them."""
        elapsed = max(time.perf_counter() - self.begin, 1e-9)
        return {kind: seconds / elapsed for kind, seconds in self.waited.items()}

    def rates(self) -> dict[str, float]:
        """Target images per second over all ranks, and the share of time spent waiting for data."""
        found = {f"data_wait{kind}": share for kind, share in self.shares().items()}
        found["images_per_second"] = self.images_per_second
        self._reset()
        return found
