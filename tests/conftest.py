"""Shared fixtures: real KITTI frames (if present), a synthetic drive, its dataset; tests marked `gpu` need a GPU."""

from __future__ import annotations

import os
import re
import resource
import signal
from collections.abc import Iterator
from pathlib import Path

# Processes that the tests start import this checkout and the tests' helpers.
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(Path(__file__).parents[1]), str(Path(__file__).parent / "support"), os.environ.get("PYTHONPATH", "")]
).rstrip(os.pathsep)
# Set before torch is imported: with a thread for each core in each process, the tests' processes starve one another.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from browser import chromium
from storage_fixtures import (
    bucket,
    md2,
    moto,
    moto_bucket,
    moto_gate,
    moto_proxy,
    moto_url,
    own_job,
    packed,
    proxied,
    rclone,
    rclone_bucket,
    rclone_gate,
    rclone_proxy,
    repacked,
)

# A script ignores Ctrl-C for its background jobs, and the commands under test would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# Set before Triton is imported: without a GPU it interprets the kernels.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

__all__ = [
    "bucket",
    "chromium",
    "md2",
    "moto",
    "moto_bucket",
    "moto_gate",
    "moto_proxy",
    "moto_url",
    "own_job",
    "packed",
    "proxied",
    "rclone",
    "rclone_bucket",
    "rclone_gate",
    "rclone_proxy",
    "repacked",
]


LONGEST = (
    "test_distributed.py",
    "test_train.py",
    "test_resume.py",
    "test_cache.py",
    "test_cache_training.py",
    "test_kernels.py",
    "test_prep_resume.py",
    "test_train_options.py",
    "test_storage_faults.py",
    "test_packaging.py",
    "test_pages.py",
    "test_bench.py",
    "test_bench_loader.py",
)
"""Files that take half a minute or more begin first: at the end the processes have about as much to do."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="module")
def narrow() -> Iterator[None]:
    """ResNets a quarter as wide, for tests of the loop: a step takes a fifth of the time, a checkpoint of the space."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("md2.networks.resnet.WIDTH", 16)
        yield


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs without `summary.png`, which takes a second to draw; those of module fixtures have one."""
    for module in ("md2.training.summary", "md2.training.trainer"):
        monkeypatch.setattr(f"{module}.run_figure", lambda run: None)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Log of all syncs and renames, in order: `sync a.tmp`, `a.tmp -> a`. A power cut keeps nothing else."""
    log: list[str] = []
    fsync, rename, link = os.fsync, os.replace, os.link

    def name(path: object) -> str:
        return re.sub(r"\.([^/]*)\.[0-9a-f]{12}-\d+-\d+-[0-9a-f]{12}\.tmp$", r"\1.tmp", Path(str(path)).name)

    def recorded_fsync(descriptor: int) -> None:
        log.append(f"sync {name(Path(f'/proc/self/fd/{descriptor}').readlink())}")
        fsync(descriptor)

    def recorded_rename(source: object, target: object) -> None:
        log.append(f"{name(source)} -> {name(target)}")
        rename(source, target)  # type: ignore[type-var]

    def recorded_link(source: object, target: object) -> None:
        log.append(f"{name(source)} -> {name(target)}")
        link(source, target)  # type: ignore[type-var]

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "replace", recorded_rename)
    monkeypatch.setattr(os, "link", recorded_link)
    return log


@pytest.fixture(scope="session")
def kitti() -> Path:
    """Folder with real KITTI frames: `raw/`, `splits/`, `odometry/` (not part of the project: licence)."""
    default = Path(__file__).resolve().parents[2] / "shared" / "kitti"
    folder = Path(os.environ.get("MD2_KITTI", default))
    if not (folder / "raw" / "2011_09_26").is_dir():
        pytest.skip("no real KITTI frames: set MD2_KITTI to a folder with raw/ and splits/")
    return folder


@pytest.fixture(scope="session")
def drive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Synthetic drives in KITTI's raw layout: 0001 for training, 0002 held out; 8 frames each, 192x64, with velodyne.

    Read-only, rendered once a session. Split lists are in `splits/sample`, true depth is beside the images.
    """
    from prep.synthetic import write_drives

    return write_drives(tmp_path_factory.mktemp("synthetic") / "raw", drives=2, frames=8, size=(192, 64)).root


@pytest.fixture(scope="session")
def long(drive: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Raw folder and split of a drive of 240 time steps, links to `drive`: 476 samples in 10 chunks. Read-only."""
    from prep_data import long_raw

    return long_raw(drive, tmp_path_factory.mktemp("long"), 240)


@pytest.fixture(scope="session")
def dataset(drive: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `drive` fixture packed by prep: parts train and val, 96x32, frames 0 -1 1, stereo, velodyne depth.

    Read-only, packed once a session.
    """
    from prep.packing.pack import pack
    from prep.packing.plan import make_plan
    from prep.raw.files import RawData
    from prep.raw.kitti import Kitti
    from prep.raw.splits import read_split
    from prep.request import make_content
    from prep.workers import start_workers

    folder = tmp_path_factory.mktemp("dataset")
    lists = read_split(str(drive / "splits" / "sample"))
    content = make_content(lists, size="96x32")
    plan = make_plan(lists, Kitti(RawData([str(drive)]), content.depth), content, parts=["train", "val"])
    with start_workers(1) as workers:
        pack(plan, lists, str(folder / "sample"), folder / "scratch", workers)
    return folder / "sample"


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file may become larger than 8 kB: writes fail as on a full disk, in the middle of the archive."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
