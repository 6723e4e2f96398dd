"""Killed or told to stop, a run goes on with the very numbers of one that was left alone.

Real processes, real signals.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import narrow_main
import pytest
import torch
from train_data import SMALL

from md2.checkpoint import load_checkpoint
from md2.distributed import Ranks
from md2.train import PlainReporter, main
from md2.training.trainer import Trainer
from shards.dataset import open_dataset

SETTINGS = [
    *SMALL,
    "train.batch_size=3",
    "train.epochs=2",
    "train.image_every=1000",
    "train.checkpoint_every=2",
    "model.pose_network=posecnn",
]
LIMIT = 240


def start(*arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, str(Path(narrow_main.__file__)), "md2.train", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def finish(process: subprocess.Popen[str]) -> str:
    try:
        output, _ = process.communicate(timeout=LIMIT)
    finally:
        process.kill()
    return output


def train_lines(run: Path) -> list[dict[str, float]]:
    path = run / "metrics.jsonl"
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n") and '"kind": "train"' in line]


def wait_for_step(process: subprocess.Popen[str], run: Path, step: int) -> None:
    deadline = time.monotonic() + LIMIT
    while not any(line["step"] >= step for line in train_lines(run)):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def losses(run: Path) -> list[tuple[float, ...]]:
    return [(line["step"], line["epoch"], line["loss"], line["loss/3"], line["lr"]) for line in train_lines(run)]


@pytest.fixture(scope="module")
def whole(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nobody interrupts."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    process = start("mono_stereo", f"data.url={dataset}", *SETTINGS, "--run", str(run))
    output = finish(process)
    assert process.returncode == 0, output
    return run


def assert_same(run: Path, whole: Path) -> None:
    assert losses(run) == losses(whole)
    mine, theirs = (load_checkpoint(folder / "checkpoints/last.pt") for folder in (run, whole))
    assert (mine.step, mine.epoch) == (theirs.step, theirs.epoch)
    for name, state in theirs.networks.items():
        for key, value in state.items():
            assert torch.equal(mine.networks[name][key], value), f"{name}.{key}"


def test_sigkill_in_two_epochs_and_resume(dataset: Path, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "killed"
    per_epoch = sum(line["epoch"] == 0 for line in train_lines(whole))
    assert per_epoch >= 4, "the test needs epochs with a middle"
    process = start("mono_stereo", f"data.url={dataset}", *SETTINGS, "--run", str(run))
    for step in (3, per_epoch + 3):
        wait_for_step(process, run, step)
        process.kill()
        finish(process)
        assert process.returncode == -signal.SIGKILL
        process = start("--resume", str(run))
    output = finish(process)
    assert process.returncode == 0, output
    assert_same(run, whole)


def test_sigterm_writes_a_checkpoint_and_says_so(dataset: Path, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "preempted"
    process = start("mono_stereo", f"data.url={dataset}", *SETTINGS, "train.checkpoint_every=1000", "--run", str(run))
    wait_for_step(process, run, 2)
    process.terminate()
    output = finish(process)
    assert process.returncode == 128 + signal.SIGTERM, output
    stopped_at = train_lines(run)[-1]["step"]
    assert load_checkpoint(run / "checkpoints/last.pt").step == stopped_at
    # A damaged newest checkpoint must not cost the run: there is none before it here, so keep a copy.
    last = run / "checkpoints/last.pt"
    (run / "checkpoints/previous.pt").write_bytes(last.read_bytes())
    last.write_bytes(last.read_bytes()[:-1000])
    process = start("--resume", str(run))
    output = finish(process)
    assert process.returncode == 0, output
    assert "resuming from previous.pt" in output
    assert_same(run, whole)


def test_another_dataset_is_refused_on_resume(
    whole: Path, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    shutil.copytree(dataset, other)
    manifest = other / "dataset.json"
    manifest.write_text(manifest.read_text() + "\n")
    assert main(["--resume", str(whole), f"data.url={other}", "train.epochs=4"]) == 6
    assert "not the dataset" in capsys.readouterr().err


@pytest.mark.usefixtures("narrow")
def test_how_the_optimiser_steps_is_the_devices_and_not_the_checkpoints(
    whole: Path, dataset: Path, tmp_path: Path
) -> None:
    """Adam is fused on a GPU and not on a CPU; a checkpoint of the one is gone on with on the other."""
    saved = load_checkpoint(whole / "checkpoints/last.pt")
    for group in saved.training["optimizer"]["param_groups"]:
        assert group["fused"] is False
        group["fused"] = True
    here = Ranks(0, 1, torch.device("cpu"))
    config = saved.parsed_config()
    trainer = Trainer(config, open_dataset(str(dataset)), tmp_path, here, PlainReporter(), resume=saved)
    assert [group["fused"] for group in trainer.optimizer.param_groups] == [False]
    moments = trainer.optimizer.state_dict()["state"]
    assert moments and all(
        torch.equal(moments[i]["exp_avg"], m["exp_avg"]) for i, m in saved.training["optimizer"]["state"].items()
    )
