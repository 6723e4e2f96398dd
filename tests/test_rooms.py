"""House rules: which folder may import which, how many files a folder may hold."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("shards", "prep", "md2", "cli")
MOST_FILES = 16

LAYERS = {
    # Each line lists folders, or modules that stand alone. They may import what the lines above list.
    "shards": [
        "shards.errors shards.version",
        "shards.files shards.locks shards.parallel shards.video",
        "shards.yaml_text",
        "shards.sample",
        "shards.manifest",
        "shards.tar",
        "shards.storage",
        "shards.card shards.cache",
        "shards.stream",
        "shards.publish",
        "shards.dataset",
        "shards.manage shards.contact_sheet shards.transfer",
    ],
    "prep": [
        "prep.workers",
        "prep.synthetic prep.raw",
        "prep.packing",
        "prep.request",
        "prep.evaluation prep.check",
    ],
    "md2": [
        "md2.process",
        "md2.config md2.geometry md2.visualize",
        "md2.zoo md2.distributed md2.networks md2.checkpoint md2.data",
        "md2.model md2.pipeline",
        "md2.photometric",
        "md2.loss md2.weights",
        "md2.inference",
        "md2.evaluation",
        "md2.training",
        "md2.report md2.train",
        "md2.__main__",
    ],
    "cli": ["cli.console", "cli.*", "cli.main"],
}
OTHER_ROOMS = {"shards": set(), "prep": {"shards"}, "md2": {"shards"}, "cli": {"shards", "prep", "md2"}}
STARTS = {
    # `python -m md2` is the command line.
    "md2.__main__": {"cli.main"},
}
LAZY = {
    # `md2.load` imports what it needs when it is called.
    "md2": {"md2.inference", "md2.process"},
}


def modules() -> dict[str, Path]:
    found = {}
    for room in ROOMS:
        for path in (ROOT / room).rglob("*.py"):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = path
    return found


def imports(path: Path) -> set[str]:
    """Modules of this project that a file imports, at its top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {name if name in MODULES else node.module for name in names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name.split(".")[0] in {*ROOMS, "bench", "tests"}}


MODULES = modules()


def unit(module: str) -> str:
    """Entry of a module in LAYERS: its folder, or the module itself if it lies directly in a room."""
    return ".".join(module.split(".")[:2])


def layer(room: str, name: str) -> int:
    for number, line in enumerate(LAYERS[room]):
        if name in line.split():
            return number
    if f"{room}.*" in " ".join(LAYERS[room]):
        return next(number for number, line in enumerate(LAYERS[room]) if f"{room}.*" in line.split())
    pytest.fail(f"{name} has no place in LAYERS: decide what it may import")


@pytest.mark.parametrize("room", ROOMS)
def test_imports_go_one_way(room: str) -> None:
    wrong = []
    for module, path in MODULES.items():
        if module.split(".")[0] != room:
            continue
        for target in imports(path):
            other = target.split(".")[0]
            if target in STARTS.get(module, set()):
                continue
            if other != room:
                if other not in OTHER_ROOMS[room]:
                    wrong.append(f"{module} imports {target}")
                continue
            if unit(target) in {unit(module), room} | LAZY.get(module, set()):
                continue
            if layer(room, unit(target)) >= layer(room, unit(module)):
                wrong.append(f"{module} imports {target}, which stands beside or above it")
    assert not wrong, "\n".join(wrong)


def test_the_rule_sees_a_forbidden_import(tmp_path: Path) -> None:
    file = tmp_path / "x.py"
    file.write_text("def f():\n    from prep.raw import splits\n    import md2.loss\n")
    assert imports(file) == {"prep.raw.splits", "md2.loss"}


@pytest.mark.parametrize("room", ROOMS)
def test_no_floor_is_crowded(room: str) -> None:
    for folder in [ROOT / room, *(path for path in (ROOT / room).rglob("*") if path.is_dir())]:
        files = [path.name for path in folder.glob("*.py")]
        assert len(files) <= MOST_FILES, f"{folder}: {sorted(files)}"


def test_every_package_says_what_it_is_for() -> None:
    for module, path in MODULES.items():
        if path.name == "__init__.py":
            docstring = ast.get_docstring(ast.parse(path.read_text()))
            assert docstring, f"{module} has no docstring"
            assert docstring.splitlines()[0].endswith("."), f"{module}: {docstring.splitlines()[0]}"
