"""`md2 compare`: groups by configuration, mean and standard deviation over seeds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image
from prep_data import command

from md2.config import load_config
from md2.report.compare import compare
from shards.errors import InputError, UsageError


def write_run(folder: Path, abs_rel: float, *overrides: str) -> str:
    folder.mkdir()
    (folder / "config.yaml").write_text(load_config("mono", overrides).to_yaml())
    worse = {"kind": "val", "step": 1, "epoch": 0, "abs_rel": abs_rel + 0.1, "rmse": 9.0, "sq_rel": 1.0, "a1": 0.1}
    best = {**worse, "step": 2, "abs_rel": abs_rel, "rmse": 5.0, "a1": 0.8}
    rows = [worse, best, {**worse, "step": 3}, {"kind": "train", "step": 3, "epoch": 0, "abs_rel": 0.0}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def test_seeds_are_averaged_and_settings_told_apart(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / f"plain{seed}", 0.1 + 0.01 * seed, f"train.seed={seed}") for seed in range(3)]
    runs.append(write_run(tmp_path / "velocity", 0.09, "loss.velocity=0.05", f"data.url={tmp_path}"))
    plain, velocity = compare(runs)
    assert (plain.name, plain.runs, velocity.name, velocity.runs) == ("velocity=0.0", 3, "velocity=0.05", 1)
    assert plain.means["abs_rel"] == pytest.approx(0.11) and plain.deviations["abs_rel"] == pytest.approx(0.01)
    assert plain.means["rmse"] == 5, "of the validation with the least abs_rel"
    done = command("compare", *runs, "--json", "c.json", "--png", "c.png", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "0.110 ± 0.010" in done.stdout and "0.090 " in done.stdout
    tree = json.loads((tmp_path / "c.json").read_text())
    assert tree[1]["std"]["abs_rel"] is None and tree[0]["runs"] == ["plain0", "plain1", "plain2"]
    with Image.open(tmp_path / "c.png") as picture:
        assert picture.width == 1200
    with pytest.raises(UsageError, match="named twice"):
        compare([runs[0], f"{runs[0]}/."])


def test_files_of_md2_eval_are_read_and_not_mixed_with_validations(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 0.2)
    metrics = dict.fromkeys(("abs_rel", "sq_rel", "rmse", "rmse_log", "a1", "a2", "a3"), 0.5)
    tree = {"model": run, "split": "eigen", "part": "test", "scaling": "median", "metrics": metrics}
    (tmp_path / "e.json").write_text(json.dumps({**tree, "further": {"SILog": 20.0}}))
    (group,) = compare([str(tmp_path / "e.json")])
    assert (group.name, group.means["abs_rel"], group.means["SILog"]) == ("run", 0.5, 20)
    with pytest.raises(UsageError, match="different data"):
        compare([run, str(tmp_path / "e.json")])


def test_what_is_no_run_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"metrics": []}')
    (tmp_path / "empty").mkdir()
    for name in ("x.json", "none", "empty"):
        with pytest.raises(InputError, match=name):
            compare([str(tmp_path / name)])
    run = write_run(tmp_path / "run", 0.2)
    (Path(run) / "metrics.jsonl").write_text("")
    with pytest.raises(InputError, match="not been validated"):
        compare([run])
