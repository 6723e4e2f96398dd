"""What each entry of md2 settles before torch is loaded: how threads wait, the limits, whose `shards` it is."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from math import inf
from pathlib import Path

import pytest

from md2.process import free_threads, memory_limit, shortage, threads_that_fit

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
# Whatever imports torch runs this stand-in, which shows the environment at that moment, and ends.
TORCH = f"import os\nprint({{name: os.environ.get(name) for name in {NAMES}}}, flush=True)\nos._exit(0)\n"
ENTRIES = {
    "console script": ["-c", "import sys; sys.argv = ['md2', 'doctor']; from md2.__main__ import start; start()"],
    "python -m cli.main": ["-m", "cli.main", "doctor"],
    "python -m md2.train": ["-m", "md2.train", "mono", "data.url=DATASET"],
    "import md2": ["-c", "import md2; md2.load('nowhere')"],
    "md2 bench": ["-m", "cli.main", "bench", "step"],
}


def seen(entry: str, folder: Path, dataset: Path | None = None, **variables: str) -> str:
    """What `import torch` finds in the environment of a fresh process."""
    (folder / "torch.py").write_text(TORCH)
    kept = {name: value for name, value in os.environ.items() if name not in NAMES}
    done = subprocess.run(
        [sys.executable, *(word.replace("DATASET", str(dataset)) for word in ENTRIES[entry])],
        cwd=ROOT,
        env={**kept, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}", **variables},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stdout.count("{") == 1, done.stdout + done.stderr
    return done.stdout[done.stdout.index("{") :].strip()


@pytest.mark.parametrize("entry", ENTRIES)
def test_threads_soon_sleep_while_they_wait(entry: str, tmp_path: Path, dataset: Path) -> None:
    assert seen(entry, tmp_path, dataset) == str(
        {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "1000", "KMP_BLOCKTIME": None}
    )


def test_a_misspelt_recipe_or_key_is_reported_before_torch_is_imported(tmp_path: Path) -> None:
    """Which takes seconds, and on a busy machine a quarter of a minute."""
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    mistakes = {"momo": "did you mean the recipe mono?", "mono data.ulr=x": "did you mean 'data.url'?"}
    for words, message in mistakes.items():
        command = [sys.executable, "-m", "cli.main", "train", *words.split()]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 2 and message in done.stderr, done.stderr


@pytest.mark.parametrize(
    ("name", "value"), [("OMP_WAIT_POLICY", "ACTIVE"), ("GOMP_SPINCOUNT", "7"), ("KMP_BLOCKTIME", "")]
)
def test_what_the_user_set_is_left_alone(name: str, value: str, tmp_path: Path) -> None:
    assert seen("import md2", tmp_path, **{name: value}) == str({**dict.fromkeys(NAMES), name: value})


# Limits


def limited(limit: int, *words: str) -> subprocess.CompletedProcess[str]:
    """Run Python with an address space of so many MB, as after `ulimit -v`."""

    def lower() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (limit << 20, limit << 20))

    command = [sys.executable, *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        command, cwd=ROOT, env=environment, preexec_fn=lower, capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.parametrize(
    ("megabytes", "words"),
    [
        (100, "-m md2 zoo"),
        (700, "-m md2 train mono"),
        (1500, "-m md2 eval a b"),
        (1500, "-m md2.train mono"),
        (900, "-m md2 predict a b"),
    ],
)
def test_too_little_address_space_is_one_line_before_the_libraries_have_theirs(megabytes: int, words: str) -> None:
    done = limited(megabytes, *words.split())
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("md2: ulimit -v allows "), done.stderr


def test_with_little_address_space_there_are_fewer_threads() -> None:
    script = "import os; os.environ.pop('OMP_NUM_THREADS', None); import md2; print(os.environ.get('OMP_NUM_THREADS'))"
    assert limited(3000, "-c", script).stdout == "1\n"
    assert limited(90_000, "-c", script).stdout == "None\n"


@pytest.mark.parametrize(
    ("files", "own", "free", "cores"),
    [
        ({"pids.max": "max", "pids.current": "7"}, "0::/", inf, inf),
        ({"a/pids.max": "40", "a/pids.current": "7", "a/b/pids.max": "max", "a/b/pids.current": "3"}, "0::/a/b", 33, 3),
        ({"pids/x/pids.max": "20", "pids/x/pids.current": "18"}, "8:pids:/x", 2, 1),
        ({}, "", inf, inf),
    ],
)
def test_a_containers_limit_on_threads_is_found(
    tmp_path: Path, files: dict[str, str], own: str, free: float, cores: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And for how many cores they are enough, without a limit for all."""
    for name, text in {**files, "own": own}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text + "\n" if text else "")
    assert free_threads(tmp_path, tmp_path / "own") == free
    monkeypatch.setattr("md2.process.free_threads", lambda: free)
    assert (shortage("PyTorch with DALI") is None) == (free > 21)
    threads_that_fit.cache_clear()
    fitting = threads_that_fit()
    threads_that_fit.cache_clear()
    assert fitting // 1 == cores if cores < inf else fitting == inf


def test_a_containers_limit_on_memory_is_found(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "memory.max").write_text("200000000\n")
    (tmp_path / "own").write_text("0::/a\n")
    assert memory_limit(tmp_path, tmp_path / "own") == 2e8
    (tmp_path / "a" / "memory.max").write_text("max\n")
    assert memory_limit(tmp_path, tmp_path / "own") == inf


# Files of the user with the names of md2's packages


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder of somebody's own, in which every name of md2's packages is taken."""
    for name in ("shards.py", "prep.py", "cli.py", "configs/__init__.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine = True\n")
    return tmp_path


def python(folder: Path, *words: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def test_names_that_the_current_folder_takes_do_not_matter(project: Path, drive: Path) -> None:
    assert python(project, "-c", "import md2; print(md2.load.__name__)") == (0, "load\n")
    code, shown = python(project, "-m", "md2.train", "momo")
    assert code == 2 and "did you mean the recipe mono?" in shown
    # Worker processes find prep, too.
    command = (
        f"prep --raw {drive} --split {drive}/splits/sample --part val --size 64x64 --frames 0 --workers 2 --out new"
    )
    code, shown = python(project, "-m", "md2", *command.split())
    assert code == 0, shown


def test_a_module_that_took_the_name_first_is_named(project: Path) -> None:
    code, shown = python(project, "-c", "import shards, md2")
    assert code == 1
    assert f"{project / 'shards.py'} has the name of md2's package 'shards'" in shown.splitlines()[-1]
