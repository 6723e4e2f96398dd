"""md2's version, for what is written down about a dataset."""

from __future__ import annotations

import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def md2_version() -> str:
    """Of the installed package; of the checkout, where md2 runs from one without being installed."""
    try:
        return version("md2")
    except PackageNotFoundError:
        project = Path(__file__).resolve().parents[1] / "pyproject.toml"
        found: str = tomllib.loads(project.read_text())["project"]["version"]
        return found
