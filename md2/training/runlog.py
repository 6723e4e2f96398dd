"""What a run writes about itself: metrics as JSON lines, TensorBoard events, panels, environment.

RUN/config.yaml          the resolved configuration
RUN/environment.json     versions, device, git revision, dataset hash, command line
RUN/metrics.jsonl        {"kind": "train" | "val", "step": ..., "epoch": ..., name: value ...}
RUN/tensorboard/         the same as scalars, and the image panels
RUN/panels/              the panels as PNG
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from md2 import __version__
from md2.training.loggers import Sink

METRICS = "metrics.jsonl"
ENVIRONMENT = "environment.json"
Kind = Literal["train", "val"]


class RunLog:
    """Scalars and panels of one run. Only the main rank makes one.

    Args:
        run: the run folder.
        step: steps already done; what an interrupted run wrote beyond that is dropped, since those
            steps are done again.
        sinks: told about the scalars as well; closed with the log.
        warn: told of a sink that fails, which is left alone from then on: training goes on without it.
    """

    def __init__(
        self, run: Path, step: int = 0, sinks: Sequence[Sink] = (), warn: Callable[[str], None] = print
    ) -> None:
        # TensorBoard takes a second to import, which `md2 --help` must not wait for.
        from torch.utils.tensorboard import SummaryWriter

        self.run, self.sinks, self.warn = run, list(sinks), warn
        self.path = run / METRICS
        _drop_after(self.path, step)
        self._file = self.path.open("a", encoding="utf-8")
        self._events = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)

    def scalars(self, kind: Kind, step: int, epoch: int, values: dict[str, float]) -> None:
        """Write one line of metrics; values that are not finite become null (JSON has no NaN)."""
        clean = {name: value if np.isfinite(value) else None for name, value in values.items()}
        self._file.write(json.dumps({"kind": kind, "step": step, "epoch": epoch, **clean}) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._events.add_scalar(f"{kind}/{name}", value, step)
        named = {f"{kind}/{name}": value for name, value in values.items()}
        for sink in list(self.sinks):
            self._told(sink, partial(sink.log, named, step))

    def panel(self, kind: Kind, step: int, image: np.ndarray[Any, np.dtype[np.uint8]]) -> None:
        """Write an (H, W, 3) uint8 picture."""
        folder = self.run / "panels"
        folder.mkdir(exist_ok=True)
        Image.fromarray(image).save(folder / f"{kind}-{step:08d}.png")
        self._events.add_image(f"{kind}/panel", image, step, dataformats="HWC")

    def close(self) -> None:
        self._file.close()
        self._events.close()
        for sink in list(self.sinks):
            self._told(sink, sink.close)

    def _told(self, sink: Sink, tell: Callable[[], None]) -> None:
        try:
            tell()
        except Exception as error:  # each package has its own
            self.sinks.remove(sink)
            self.warn(f"warning: {type(sink).__name__} failed and is told no more: {error}")


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; a half-written last line (killed run) is left out."""
    path = run / METRICS
    if not path.exists():
        return []
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines


def _drop_after(path: Path, step: int) -> None:
    if not path.exists():
        return
    kept = [line for line in read_metrics(path.parent) if line["step"] <= step]
    beside = path.with_suffix(".tmp")
    beside.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
    beside.replace(path)


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
    """Revision of the checkout that md2 runs from; None for an installed package."""
    folder = Path(__file__).resolve().parent
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None if found.returncode == 0 else None
