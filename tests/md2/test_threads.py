"""How OpenMP's threads wait: what each entry of md2 sets before torch is loaded, and what it leaves alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
# Whatever imports torch runs this stand-in, which shows the environment at that moment, and ends.
TORCH = f"import os\nprint({{name: os.environ.get(name) for name in {NAMES}}}, flush=True)\nos._exit(0)\n"
ENTRIES = {
    "console script": ["-c", "import sys; sys.argv = ['md2', 'doctor']; from cli.start import start; start()"],
    "python -m cli.main": ["-m", "cli.main", "doctor"],
    "python -m md2.train": ["-m", "md2.train", "mono", "data.url=nowhere"],
    "import md2": ["-c", "import md2; md2.load('nowhere')"],
    "md2 bench": ["-m", "cli.main", "bench", "step"],
}


def seen(entry: str, folder: Path, **variables: str) -> str:
    """What `import torch` finds in the environment of a fresh process."""
    (folder / "torch.py").write_text(TORCH)
    kept = {name: value for name, value in os.environ.items() if name not in NAMES}
    done = subprocess.run(
        [sys.executable, *ENTRIES[entry]],
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
def test_threads_sleep_while_they_wait(entry: str, tmp_path: Path) -> None:
    assert seen(entry, tmp_path) == str({"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": None, "KMP_BLOCKTIME": None})


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
