"""What the process may use, and what it finds: set before anything else is imported, so this needs Python alone.

Address space (ulimit -v), threads (ulimit -u, a container's pids.max) and memory of a container are limits that NumPy,
OpenMP and DALI otherwise meet in the middle of an import, and end the process with lines of their own.
"""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from itertools import pairwise
from math import inf
from pathlib import Path, PurePosixPath
from typing import Literal

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("shards", "prep", "cli", "md2")
_WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
_SHORT_WAIT = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "1000"}
"""GNU's OpenMP, which PyTorch's wheels bring, spins some 10 microseconds, then sleeps; Intel's sleeps at once."""
_COUNTS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
Libraries = Literal["NumPy", "PyTorch", "PyTorch with DALI"]
DALI: Libraries = "PyTorch with DALI"
_NEEDS: dict[Libraries, tuple[list[str], int]] = {
    "NumPy": ([], 256 << 20),
    "PyTorch": (["torch/lib"], 700 << 20),
    DALI: (["torch/lib", "nvidia/dali"], 1500 << 20),
}
"""Folders of shared libraries, and the address space that work takes beside them (measured on two cores)."""
THREAD_BYTES = 112 << 20
"""Address space that a thread takes: a stack of 8 MiB, an arena of glibc's (64 MiB), BLAS's buffer (32 MiB)."""
LEAST_MEMORY = 300 << 20
"""Memory that PyTorch takes before it computes."""
THREADS_A_CORE, OTHER_THREADS = 4, 18
"""OpenMP, DALI, conversion and decoding have a thread for each core; the others wait or write."""


def begin() -> None:
    """What `import md2` does first. A training that torchrun or `python -m` starts ends here if it has no room."""
    set_threads()
    trains = ("-m", "md2.train") in pairwise(sys.orig_argv)
    if trains:
        own_path()
    own_package("shards")
    if trains and (reason := shortage(DALI)):
        print(f"md2: {reason}", file=sys.stderr)
        sys.exit(1)


def own_package(name: str) -> None:
    """Let `import NAME` find md2's own package, also if the current folder has a file or folder of that name.

    Raises:
        ImportError: another module of that name has been imported already.
    """
    folder = ROOT / name
    module = sys.modules.get(name)
    if module is None:
        spec = spec_from_file_location(name, folder / "__init__.py", submodule_search_locations=[str(folder)])
        assert spec is not None and spec.loader is not None
        module = sys.modules[name] = module_from_spec(spec)
        spec.loader.exec_module(module)
    elif str(folder) not in [str(Path(place).resolve()) for place in getattr(module, "__path__", [])]:
        other = getattr(module, "__file__", None) or "another module"
        raise ImportError(f"{other} has the name of md2's package {name!r}: rename it, or import md2 before it")


def own_path() -> None:
    """Put md2's place at the front of sys.path if something else would be found under the name of one of its packages.

    For the commands, whose process is md2's alone; worker processes inherit the path.
    """
    for entry in sys.path:
        folder = Path(entry)
        if folder.is_dir() and folder.samefile(ROOT):
            return
        if any((folder / name).is_dir() or (folder / f"{name}.py").is_file() for name in PACKAGES):
            sys.path.insert(0, str(ROOT))
            return


def set_threads() -> None:
    """Set how OpenMP's and BLAS's threads wait and how many there are, unless the user has.

    They read it when torch and NumPy load them. Threads otherwise spin for milliseconds while they wait for one
    another: on a machine with other work each spins away the core that the awaited one needs. If they never spin, a
    quiet machine loses 7 % to falling asleep and waking up (figures: bench/RESULTS.md, Waiting).
    """
    if not any(name in os.environ for name in _WAITING):
        os.environ |= _SHORT_WAIT
    fitting = threads_that_fit()
    if fitting < len(os.sched_getaffinity(0)):
        for name in _COUNTS:
            os.environ.setdefault(name, str(int(fitting)))


@cache
def threads_that_fit() -> float:
    """Return for how many cores there may be threads, at least 1: infinite without a limit."""
    address_space = resource.getrlimit(resource.RLIMIT_AS)[0]
    room = inf
    if address_space != resource.RLIM_INFINITY:
        room = (address_space - needed_bytes(DALI)) / THREAD_BYTES
    return max(1.0, min(room, free_threads() - OTHER_THREADS) / THREADS_A_CORE)  # not //: inf // 4 is not a number


def free_threads(cgroups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> float:
    """Return how many threads may still be started: by `ulimit -u` and the container's `pids.max`."""
    free = inf
    limit = resource.getrlimit(resource.RLIMIT_NPROC)[0]
    if os.getuid() != 0 and 0 <= limit < 10_000:  # root is exempt; a high limit is not worth the count
        free = limit - sum(_threads_of(process) for process in Path("/proc").glob("[0-9]*"))
    for most, now in cgroup_values("pids", ["pids.max", "pids.current"], ["pids.max", "pids.current"], cgroups, own):
        if most.isdigit() and now.isdigit():
            free = min(free, int(most) - int(now))
    return free


def _threads_of(process: Path) -> int:
    """Threads of a process of this user; 0 for others' and for one that has ended."""
    try:
        return len(os.listdir(process / "task")) if process.stat().st_uid == os.getuid() else 0  # noqa: PTH208
    except OSError:
        return 0


def memory_limit(cgroups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> float:
    """Return the container's limit on memory in bytes; infinite without one."""
    files = ["memory.max"], ["memory.limit_in_bytes"]
    return min(
        (int(value) for (value,) in cgroup_values("memory", *files, cgroups, own) if value.isdigit()), default=inf
    )


def cgroup_values(
    controller: str, files: list[str], files_v1: list[str], cgroups: Path, own: Path
) -> Iterator[list[str]]:
    """Yield the words in some files of this process's control group and of those above it.

    In a container its own group is the root, whatever path the host knows it by.

    Args:
        controller: such as `cpu`, under which version 1 keeps its groups.
        files: their names in version 2.
        files_v1: their names in version 1.
    """
    try:
        groups = [line.split(":", 2) for line in own.read_text().splitlines()]
    except OSError:
        return
    for number, controllers, path in groups:
        if number != "0" and controller not in controllers.split(","):
            continue
        root = cgroups
        if number != "0":
            root = cgroups / controllers if (cgroups / controllers).is_dir() else cgroups / controller
        inner = PurePosixPath(path.lstrip("/"))
        for folder in {root, *(root / parent for parent in (inner, *inner.parents))}:
            try:
                yield " ".join((folder / file).read_text() for file in (files if number == "0" else files_v1)).split()
            except OSError:
                continue


def _library_bytes(package: str) -> int:
    """Size of the libraries in a folder of a package, which is not imported."""
    name, _, inner = package.partition("/")
    spec = find_spec(name)
    folders = [Path(place) / inner for place in (spec and spec.submodule_search_locations) or []]
    return sum(file.stat().st_size for folder in folders for file in folder.glob("*.so*") if not file.is_symlink())


def needed_bytes(libraries: Libraries) -> int:
    """Return the address space that libraries take with the smallest input that makes sense."""
    packages, working = _NEEDS[libraries]
    return sum(map(_library_bytes, packages)) + working


def shortage(libraries: Libraries) -> str | None:
    """Return why libraries cannot be loaded here, None if they can."""
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY and limit < (needed := needed_bytes(libraries)):
        return (
            f"ulimit -v allows {limit / 1e9:.2f} GB of addresses, but {libraries} and the smallest input need "
            f"{needed / 1e9:.2f} GB: raise it"
        )
    threads = THREADS_A_CORE + OTHER_THREADS
    if libraries == DALI and (free := free_threads()) < threads:
        return (
            f"only {max(0, int(free))} more threads may be started, but training needs {threads}: "
            "raise ulimit -u, or the container's pids.max"
        )
    if libraries != "NumPy" and (memory := memory_limit()) < LEAST_MEMORY:
        return f"this container may use {memory / 1e6:.0f} MB of memory, but PyTorch alone takes 300 MB: allow 2 GB"
    return None
