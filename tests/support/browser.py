"""Opens pages in a browser without a window."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

_OPTIONS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars")


@pytest.fixture(scope="session")
def chromium() -> str:
    names = (os.environ.get("MD2_CHROMIUM", ""), "chromium", "chromium-browser", "google-chrome", "chrome")
    found = next((path for name in names if name and (path := shutil.which(name))), None)
    if found is None:
        pytest.skip("no Chromium on PATH (or in MD2_CHROMIUM): the page is not opened in a browser")
    return found


def command(chromium: str, folder: Path, size: tuple[int, int], *options: str) -> list[str]:
    """Its command line with a window of this size; `folder` holds its profile."""
    window = f"--window-size={size[0]},{size[1]}"
    return [chromium, *_OPTIONS, f"--user-data-dir={folder / 'profile'}", window, *options]


def browse(chromium: str, file: Path, folder: Path, size: tuple[int, int], *options: str) -> list[str]:
    """Save what a page looks like as `shot.png` in `folder`; what it wrote to the console."""
    shot = folder / "shot.png"
    told = command(chromium, folder, size, "--enable-logging=stderr", f"--screenshot={shot}", *options, file.as_uri())
    done = subprocess.run(told, capture_output=True, text=True, timeout=120, check=False)
    assert shot.is_file(), done.stderr[-2000:]
    return [line for line in done.stderr.splitlines() if "CONSOLE" in line]
