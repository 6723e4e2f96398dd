"""The benchmarks run, as the commands that the README names, and say what failed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import bench.gpu
from bench.gpu_record import Record, Setup
from bench.gpu_sections import SECTIONS
from cli.console import run
from cli.main import app
from shards.errors import InputError

ROOT = Path(__file__).resolve().parents[2]


def test_all_of_the_gpu_benchmark_runs_on_a_cpu_and_says_that_it_did(tmp_path: Path) -> None:
    """In a process of its own: it forks none of the tests' threads, and imports Triton as it needs it."""
    command = [sys.executable, "-m", "cli.main", "bench", "gpu", str(tmp_path), "--device", "cpu", "--tiny"]
    # tests/md2/test_loss_work.py runs the baseline, the next test the kernels.
    sections = [name for name in SECTIONS if name not in ("baseline", "kernels")]
    done = subprocess.run(
        [*command, "--only", ",".join(sections)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert [section["name"] for section in found["sections"]] == sections
    assert all(holds for section in found["sections"] for _, holds, _ in section["checks"])
    rows = {section["name"]: [row for _, table in section["tables"] for row in table] for section in found["sections"]}
    assert [row["decoded on"] for row in rows["decode"]] == ["cpu, batches on cpu", "nowhere (ppm), batches on cpu"]
    assert {row[""] for row in rows["step"]} == {"float32", "bf16"}
    assert [row["shards"] for row in rows["training"]] == ["jpeg", "jpeg", "ppm"]
    assert [row["data.ahead"] for row in rows["training"]] == [False, True, False]
    assert all(row["triplets/s"] > 0 for row in rows["training"])
    assert rows["training"][0]["peak, MiB"] is None
    text = (tmp_path / "gpu.md").read_text()
    assert text.startswith("# GPU: none used: every figure below is the CPU's")
    assert "**Tiny**" in text and "the figures mean nothing" in text


def test_steps_are_counted_for_each_way_of_waiting(narrow: None) -> None:
    from bench.waiting import measure

    assert measure(0) > 0


def test_the_last_step_is_read_from_whole_lines(tmp_path: Path) -> None:
    from bench.waiting import steps_done

    metrics = tmp_path / "metrics.jsonl"
    assert steps_done(metrics) == 0
    metrics.write_text('{"kind": "train", "step": 9}\n{"kind": "train", "step": 10}\n{"kind": "train", "st')
    assert steps_done(metrics) == 10


def test_what_needs_no_loader_needs_no_dali() -> None:
    """On a machine without it, the kernels and the step against the baseline can still be measured."""
    code = (
        "import sys; sys.modules['nvidia.dali'] = None; from bench.gpu_sections import SECTIONS, kernels;"
        "from bench.gpu_record import Record, Setup; import bench.gpu, torch; from pathlib import Path;"
        "options = bench.gpu.parse(['x', '--device', 'cpu', '--tiny']);"
        "record = bench.gpu.guarded('kernels', kernels, Setup.of(options, torch.device('cpu'), Path('.')), Path('.'));"
        "print(record.failed, record.error); sys.exit(record.failed)"
    )
    pytest.importorskip("triton", reason="Triton is not installed")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_section_that_fails_is_a_row_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def breaks(setup: Setup, record: Record) -> None:
        record.table("half a table").append({"a": 1.0})
        raise RuntimeError("no memory\nmore of it")

    def does_not_hold(setup: Setup, record: Record) -> None:
        record.check("two is one", False, "2 != 1")

    def works(setup: Setup, record: Record) -> None:
        record.check("one is one", True, "1")

    for name, section in {"kernels": breaks, "decode": does_not_hold, "loader": works}.items():
        monkeypatch.setitem(SECTIONS, name, section)
    options = ["--device", "cpu", "--tiny", "--only", "kernels,decode,loader"]
    assert bench.gpu.main([str(tmp_path), *options]) == 1
    text = (tmp_path / "gpu.md").read_text()
    for line in (
        "| kernels | **FAILED** |",
        "| decode | **FAILED** |",
        "| loader | done |",
        "**FAILED**: RuntimeError: no memory (traceback: kernels.txt)",
        "| 1 |",
        "| two is one | **FAILED** | 2 != 1 |",
    ):
        assert line in text
    assert "more of it" in (tmp_path / "kernels.txt").read_text()
    assert "FAILED: kernels, decode" in capsys.readouterr().out
    assert bench.gpu.main([str(tmp_path), *options[:-1], "loader"]) == 0


def test_a_gpu_that_is_not_there_or_an_unknown_section_ends_with_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for words, message in (
        (["x"], "no CUDA device; --device cpu --tiny shows that the code runs"),
        (["x", "--only", "speed"], "--only speed: of kernels, decode"),
    ):
        with pytest.raises(SystemExit) as ended:
            bench.gpu.main([str(tmp_path / words[0]), *words[1:]])
        assert ended.value.code == 2
        assert message in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        bench.gpu.main([str(tmp_path / "file"), "--device", "cpu"])


def test_a_misspelt_measurement_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for word, hint in (("stepp", "did you mean step?"), ("x", "choose from loader, step")):
        assert run(app, ["bench", word]) == 2
        assert f"md2 bench {word}: no such measurement; {hint}" in capsys.readouterr().err


def test_variants_repeat_no_training_that_is_done_and_compare_with_the_baseline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from bench import variants

    monkeypatch.setattr(variants, "md2", lambda *words: pytest.fail(f"md2 {words}"))
    for name, seed, result in (
        ("mono", 0, {"abs_rel": 0.2}),
        ("mono", 1, {"abs_rel": 0.22}),
        ("given", 0, {"abs_rel": 0.1, "metres": 0.11, "factor": 1.02}),
        ("given", 1, {"abs_rel": 0.11, "metres": 0.13, "factor": 0.98}),
    ):
        (tmp_path / "runs" / f"{name}-{seed}").mkdir(parents=True)
        (tmp_path / "runs" / f"{name}-{seed}" / "result.json").write_text(json.dumps(result))
    variants.main([str(tmp_path), "--cases", "mono,given,crop", "--report"])
    shown = capsys.readouterr().out
    assert "| mono | 2 | 0.210 ± 0.014 |" in shown
    # Welch: each variance of two runs is half the squared difference, halved again.
    assert "| given | 2 | 0.105 ± 0.007 | -50.0 ± 5.3 % | -9.4 | better | 0.120 ± 0.014 | 1.000 ± 0.028 |" in shown
    assert "| crop | 0 |" in shown
    with pytest.raises(SystemExit):
        variants.main([str(tmp_path), "--cases", "mono,corp"])
    assert "no such case: corp; choose from mono, crop" in capsys.readouterr().err
