"""The package as a user gets it: its metadata, the wheel, and the commands where there is no checkout."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from email.parser import Parser
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

import md2

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("prep", "shards", "md2", "cli")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
BROUGHT_BY_OTHERS = {"wandb", "mlflow", "triton", "aiobotocore"}
"""A run's configuration names the first two, and the user installs them; CUDA builds of torch require the third, s3fs
the last, in a version of its own."""

FOUND_BY_NAME = {"s3fs", "gcsfs", "tensorboard", "onnxscript"}
"""fsspec imports the first two, torch the others."""


def canonical(requirement: str) -> str:
    """A distribution's normalised name, from a requirement such as `moto[server]>=5`."""
    return re.sub(r"[-_.]+", "-", re.split(r"[\s\[<>=;!~]", requirement)[0]).lower()


def package_files() -> set[str]:
    """Files of the packages in this checkout, relative to its root."""
    found = {path.relative_to(ROOT) for package in PACKAGES for path in (ROOT / package).rglob("*") if path.is_file()}
    return {str(path) for path in found if "__pycache__" not in path.parts}


def copy_sources(folder: Path) -> None:
    """Copy what a build reads, so that it leaves nothing in the checkout."""
    for package in PACKAGES:
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sources, out = tmp_path_factory.mktemp("sources"), tmp_path_factory.mktemp("wheel")
    copy_sources(sources)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-index", "--no-build-isolation"]
    subprocess.run([*command, "-w", str(out), str(sources)], check=True, timeout=120)
    (built,) = out.glob("*.whl")
    return built


def test_the_version_stands_in_one_place() -> None:
    files = [ROOT / "pyproject.toml", *(ROOT / name for name in package_files() if name.endswith(".py"))]
    assert [path.name for path in files if f'"{md2.__version__}"' in path.read_text()] == ["version.py"]


def test_the_wheel_holds_every_file_of_the_packages_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == package_files()
    assert {f"{package}/py.typed" for package in PACKAGES} <= names
    assert len([name for name in names if name.endswith(".yaml")]) > 20, "the recipes"


def test_the_wheel_s_metadata(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = Parser().parsestr(archive.read(name).decode())
        assert any(name.endswith("licenses/LICENSE") for name in archive.namelist())
    assert metadata["Name"] == "md2"
    assert metadata["Version"] == md2.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert set(metadata.get_all("Provides-Extra")) == set(PROJECT["optional-dependencies"])
    assert "# md2" in metadata.get_payload()


def test_the_installed_wheel_works_without_the_checkout(wheel: Path, tmp_path: Path) -> None:
    """In an environment that holds md2 from the wheel; its libraries are this environment's, added by path alone."""
    home, work = tmp_path / "venv", tmp_path / "work"
    work.mkdir()
    venv.create(home, symlinks=True)
    python = home / "bin" / "python"
    site = Path(sysconfig.get_path("purelib", vars={"base": str(home), "platbase": str(home)}))
    # A path in a .pth file: the .pth files in that folder, an editable md2 among them, are not read.
    (site / "libraries.pth").write_text(f"{sysconfig.get_path('purelib')}\n{sysconfig.get_path('platlib')}\n")
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-deps", "--no-index"]
    subprocess.run([*install, "--ignore-installed", str(wheel)], check=True, timeout=120)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "MD2_"))}
    environment |= {"MD2_CACHE": str(tmp_path / "cache"), "OMP_WAIT_POLICY": "PASSIVE", "COLUMNS": "100"}

    def run(*command: str, code: int = 0) -> str:
        done = subprocess.run(
            command, cwd=work, env=environment, capture_output=True, text=True, timeout=240, check=False
        )
        assert done.returncode == code, f"{command}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout + done.stderr

    where = "import cli, md2, prep, shards; print(*(m.__file__ for m in (cli, md2, prep, shards)), sep='\\n')"
    places = run(str(python), "-c", where).split()
    assert [Path(place).relative_to(site).parts[0] for place in places] == ["cli", "md2", "prep", "shards"]
    assert "No module named 'bench" in run(str(python), "-c", "import bench.loader", code=1)

    command = str(home / "bin" / "md2")
    assert run(command, "--version") == f"md2 {md2.__version__}\n"
    assert "monodepth2_resnet18_kitti_mono_640x192" in run(command, "zoo")
    run(command, "sample", "raw", "--drives", "1", "--frames", "10", "--size", "192x64")
    split = next((work / "raw/splits").iterdir())
    run(command, "prep", "--split", str(split), "--raw", "raw", "--out", "packed", "--size", "96x64", "--workers", "1")
    small = ["data.url=packed", "data.width=96", "data.height=64", "train.batch_size=2", "train.max_steps=2"]
    run(command, "train", "demo", *small, "train.val_batches=1", "--run", "trained")
    assert (work / "trained/checkpoints/last.pt").is_file()
    refused = run(command, "bench", "loader", code=2).strip()
    assert refused.startswith("md2: ") and "checkout" in refused and "\n" not in refused, refused


def test_every_extra_that_a_message_names_exists() -> None:
    files = [ROOT / name for name in package_files() if name.endswith(".py")]
    files += [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    named = {extra for path in files for extra in re.findall(r"md2\[(\w+)\]", path.read_text())}
    assert named, "the messages name extras"
    assert named <= set(PROJECT["optional-dependencies"])


def imported_libraries() -> dict[str, str]:
    """Third-party modules that the packages import, each with one file that does."""
    found = {}
    for name in sorted(package_files()):
        if not name.endswith(".py"):
            continue
        for node in ast.walk(ast.parse((ROOT / name).read_text())):
            modules = []
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                modules = [node.module or ""]
            found |= {module.split(".")[0]: name for module in modules}
    return {name: file for name, file in found.items() if name not in sys.stdlib_module_names | {*PACKAGES, "bench"}}


def test_imported_libraries_are_declared_and_declared_ones_are_imported() -> None:
    """But for development: bench/ and tests/ use what `dev` and `bench` list."""
    extras = [
        r for name, extra in PROJECT["optional-dependencies"].items() if name not in ("dev", "bench") for r in extra
    ]
    declared = {canonical(requirement) for requirement in [*PROJECT["dependencies"], *extras]}
    provided = packages_distributions()
    imported = {
        name: ({canonical(distribution) for distribution in provided.get(name, [name])}, file)
        for name, file in imported_libraries().items()
    }
    missing = {
        name: file for name, (names, file) in imported.items() if not names & declared and name not in BROUGHT_BY_OTHERS
    }
    assert not missing, f"imported, not in pyproject.toml: {missing}"
    unused = declared - set().union(*(names for names, _ in imported.values())) - FOUND_BY_NAME
    assert not unused, f"in pyproject.toml, never imported: {unused}"


def test_every_requirement_is_pinned() -> None:
    pins = {
        canonical(line)
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    }
    requirements = [
        *PROJECT["dependencies"],
        *(r for extra in PROJECT["optional-dependencies"].values() for r in extra),
    ]
    assert {canonical(requirement) for requirement in requirements} <= pins
