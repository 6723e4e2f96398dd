"""The commands from outside: real processes, exit codes, one line per mistake."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from typer.main import get_command

from cli.console import run
from cli.main import app
from md2.config import load_config
from md2.zoo import zoo as list_zoo
from prep.raw.splits import NAMED

COMMANDS = ("sample", "prep", "shards", "train", "eval", "predict", "odometry", "export", "report", "bench", "zoo")


def md2(*arguments: str, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cli.main", *arguments]
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "COLUMNS": "100"}
    return subprocess.run(
        command, capture_output=True, text=True, timeout=240, check=False, cwd=folder or root, env=environment
    )


def test_a_current_folder_that_is_gone_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    command = f"cd gone; rmdir ../gone; PYTHONPATH={Path(__file__).parents[2]} {sys.executable} -m cli.main zoo"
    done = subprocess.run(["sh", "-c", command], cwd=tmp_path, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 2
    assert re.fullmatch(r"md2: the current folder cannot be used \(.*\): change to another\n", done.stderr)


@pytest.mark.parametrize("place", ["/", "~nobody-of-that-name/x", "x\0y", "n" * 300, f"~{'n' * 300}"])
def test_a_place_that_can_be_none_is_one_line(
    drive: Path,
    dataset: Path,
    place: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    split = str(drive / "splits" / "sample")
    for words in (
        ["prep", "--raw", str(drive), "--split", split, "--out", place, "--workers", "1"],
        ["shards", "show", str(dataset), "--sheet", place.partition("~")[0] or "/"],
        ["shards", "pull", str(dataset), place],
        ["train", "mono", f"data.url={dataset}", "--run", place, "train.max_steps=x"],
        ["report", place],
        ["compare", place],
        ["eval", place, place],
        ["predict", place, place, "--out", place],
    ):
        capsys.readouterr()
        code, lines = run(app, words), capsys.readouterr().err.strip().splitlines()
        assert code in (2, 3, 5) and len(lines) == 1, (words, lines)


def test_help_names_every_command_and_needs_no_torch() -> None:
    script = (
        "import sys; sys.argv = ['md2', '--help']; from cli.main import main\ntry: main()\nexcept SystemExit: pass\n"
    )
    check = "print('HEAVY', [m for m in ('torch', 'nvidia.dali', 'matplotlib') if m in sys.modules])"
    found = subprocess.run(
        [sys.executable, "-c", script + check], capture_output=True, text=True, timeout=60, check=True
    )
    for command in COMMANDS:
        assert command in found.stdout
    assert "HEAVY []" in found.stdout


def test_help_fits_80_columns_and_speaks_no_python() -> None:
    """Every command's help: no line is wider, no summary is cut, and no option or argument shows a Python type."""
    root = get_command(app)
    groups = {"md2": root} | {f"md2 {name}": one for name, one in root.commands.items()}  # type: ignore[attr-defined]
    groups |= {f"md2 shards {name}": one for name, one in groups["md2 shards"].commands.items()}
    for name, command in groups.items():
        text = command.get_help(command.context_class(command, info_name=name, terminal_width=80))
        assert text.startswith(f"Usage: {name} ")
        assert max(map(len, text.splitlines())) <= 80, text
        assert not re.search(r"<(bool|str|int|float|path|list\b.*)>|[a-z]\.\.\.$", text, re.MULTILINE), text
    bench = md2("bench", "--help").stdout
    assert "intrinsics" in bench
    assert max(map(len, bench.splitlines())) <= 80


def test_ctrl_c_while_python_imports_is_quiet(tmp_path: Path) -> None:
    """An import that is interrupted, whenever it is pressed."""
    (tmp_path / "typer.py").write_text("raise KeyboardInterrupt\n")
    root = Path(__file__).resolve().parents[2]
    module, name = tomllib.loads((root / "pyproject.toml").read_text())["project"]["scripts"]["md2"].split(":")
    line = f"from {module} import {name}; {name}()"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    found = subprocess.run(
        [sys.executable, "-c", line], capture_output=True, text=True, timeout=60, check=False, env=environment
    )
    assert (found.returncode, found.stdout, found.stderr) == (130, "", "md2: interrupted\n")


MISTAKES: list[tuple[list[str], int, str]] = [
    (["train", "no_such_recipe"], 2, "no_such_recipe"),
    (["train", "mono", "train.batchsize=3"], 2, "did you mean 'train.batch_size'"),
    (["train"], 2, "give a configuration"),
    (["train", "--resume", "nowhere"], 2, "no run to resume"),
    (["train", "mono", "data.url=nowhere", "model.weights=scratch"], 5, "nowhere"),
    (["prep", "--split", "no_such_split"], 2, "no_such_split"),
    (["eval", "nowhere", "nowhere"], 3, "nowhere"),
    (["zoo", "nothing"], 2, "md2 zoo"),
]


@pytest.mark.parametrize(("arguments", "code", "message"), MISTAKES)
def test_a_mistake_ends_with_one_line_and_its_exit_code(
    arguments: list[str], code: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert run(app, arguments) == code
    told_once(capfd.readouterr().err, message)
    assert not list(tmp_path.iterdir()), "a refused command must leave nothing behind"


def test_so_it_does_from_outside(tmp_path: Path) -> None:
    arguments, code, message = MISTAKES[1]
    found = md2(*arguments, folder=tmp_path)
    assert found.returncode == code, found.stderr
    told_once(found.stderr, message)


def told_once(error: str, message: str) -> None:
    (line,) = error.strip().splitlines()
    assert line.startswith("md2: ")
    assert message in line


def test_mistakes_in_words_are_seen_before_torch_is_imported(dataset: Path, tmp_path: Path) -> None:
    """In a process that cannot import torch."""
    run, image = tmp_path / "run", tmp_path / "image.png"
    run.mkdir()
    (run / "config.yaml").write_text(f"data: {{url: {dataset}}}\n")
    image.write_bytes(b"")
    mistakes = [
        *((words, message) for words, _, message in MISTAKES),
        (["eval", run, "nowhere"], "nowhere: no dataset"),
        (["eval", run, dataset, "--part", "vall"], "no part 'vall'"),
        (["report", run, "--part", "tes"], "no part 'tes'"),
        (["report", run, "--dataset", "nowhere"], "nowhere: no dataset"),
        (["odometry", run, "nowhere"], "nowhere: no such image"),
        (["odometry", run, dataset], "name a sequence with --sequence"),
        (["odometry", run, dataset, "--sequence", "09"], "no part 'test_09'"),
        (["odometry", run, tmp_path, "--sequence", "09"], "sequence 09 is not at"),
        (["predict", run, image, "--cmap", "nope"], "no such colour map"),
        (["predict", "mono", image], "mono is a recipe"),
        (["compare", "nowhere"], "nowhere: no such run"),
        (["train", "demo", f"data.url={dataset}", "model.weights=nope"], "model.weights=nope: no such file or folder"),
    ]
    lines = [[str(word) for word in words] for words, _ in mistakes]
    script = (
        f"import sys\nsys.modules['torch'] = None\nfrom cli.main import app, run\nfor line in {lines}: run(app, line)"
    )
    found = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True, cwd=tmp_path
    )
    told = found.stderr.splitlines()
    assert len(told) == len(mistakes), told
    for line, (_, message) in zip(told, mistakes, strict=True):
        assert message in line


def test_unknown_commands_and_options_are_usage_errors() -> None:
    assert md2("nonsense").returncode == 2
    assert md2("prep", "--nonsense").returncode == 2


def test_version_is_the_installed_one() -> None:
    assert md2("--version").stdout == f"md2 {version('md2')}\n"


def test_doctor_checks_the_decoder() -> None:
    found = md2("doctor")
    assert found.returncode == 0, found.stdout + found.stderr
    place = "GPU" if torch.cuda.is_available() else "CPU"
    assert f"decodes on the {place} (64x32)" in found.stdout


def test_show_prints_all_keys_with_the_overrides_and_trains_nothing(tmp_path: Path) -> None:
    shown = md2("train", "mono", "--show", "train.epochs=3", folder=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout == load_config("mono", ["train.epochs=3"]).to_yaml()
    assert all(key in shown.stdout for key in ("epochs: 3", "shuffle: window", "disparity_smoothness: 0.001"))
    assert not list(tmp_path.iterdir())
    assert "data.url" in md2("train", "-h").stdout


def test_the_zoos_commands_pack_what_its_recipes_read() -> None:
    """A named split, the recipe's size (640x192 is prep's default), and the place where the recipe looks."""
    for recipe in list_zoo():
        if recipe.name == "demo":
            assert recipe.prep_command.startswith("make demo")
            continue
        words = [word for word in recipe.prep_command.split() if word != "--motion"]
        assert ("--motion" in recipe.prep_command) == bool(recipe.config.motion), recipe.name
        options = dict(zip(words[2::2], words[3::2], strict=True))
        data = recipe.config.data
        assert options["--split"] in NAMED, recipe.name
        # Random windows are cut out of larger images.
        size = "832x256" if data.crop else f"{data.width}x{data.height}"
        assert options.get("--size", "640x192") == size, recipe.name
        assert options.get("--out", f"kitti_shards/{options['--split']}") == data.url, recipe.name


def test_zoo_gives_figures_and_commands() -> None:
    name = "monodepth2_resnet18_kitti_stereo_1024x320"
    listed = md2("zoo").stdout.splitlines()
    assert max(map(len, listed[: listed.index("")])) <= 80, "the table; the text below it wraps by itself"
    assert f"{name:56}   0.107   4.764   0.874" in listed
    long = listed.index("monodepth2_resnet18_kitti_mono_baseline_full_resolution_multiscale_640x192")
    assert listed[long + 1].split() == ["0.124", "5.249", "0.865"]
    assert "0.017 ± 0.008 m" in listed[listed.index("monodepth2_resnet18_kitti_odometry_mono_640x192") + 1]
    shown = md2("zoo", name).stdout
    # The paper's Table 1, row S 1024x320.
    assert "abs_rel 0.107  sq_rel 0.849  rmse 4.764  rmse_log 0.201  a1 0.874  a2 0.953  a3 0.977" in shown
    assert "md2 prep --split eigen_full --size 1024x320" in shown
    assert f"md2 train {name}" in shown
    assert "JPEG, even tables, chroma 4:2:0 (smoothed, 2 px)" in shown, "what its data are packed as"


def test_completion_can_be_installed_and_needs_no_torch() -> None:
    assert "--install-completion" in md2("--help").stdout
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "_MD2_COMPLETE": "complete_bash", "COMP_WORDS": "md2 exp", "COMP_CWORD": "1"}
    found = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "md2"],
        capture_output=True,
        text=True,
        cwd=root,
        check=False,
        env=environment,
    )
    assert found.stdout.split() == ["export"]
    assert " torch" not in found.stderr
