"""`md2 train` in this process: what a run writes, each mode learns, how it ends and goes on."""

from __future__ import annotations

import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from train_data import QUICK, Silent, config, losses, train, trainer

from md2.checkpoint import load_checkpoint
from md2.config import load_config
from md2.distributed import Ranks
from md2.train import StopRequest, resume_run, start_run
from md2.training.panels import HEADER
from md2.training.runlog import RunLog, read_metrics
from md2.training.summary import run_figure
from md2.training.trainer import Trainer
from shards.dataset import open_dataset
from shards.errors import InputError, TrainingError, UsageError
from shards.locks import FileLock

pytestmark = QUICK
LABELS = ("kind", "step", "epoch")


@pytest.fixture(scope="module")
def finished(narrow: None, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "finished"
    train(dataset, run, extra=["train.max_steps=4"])
    return run


def test_a_run_folder_holds_what_is_promised(finished: Path, dataset: Path) -> None:
    assert load_config(finished / "config.yaml") == config(dataset, extra=["train.max_steps=4"])
    environment = json.loads((finished / "environment.json").read_text())
    # The wheel of the CUDA build leaves out the +cu130 that torch itself adds.
    assert environment["packages"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert len(environment["dataset"]["manifest_sha256"]) == 64
    assert environment["dataset"]["images"] == open_dataset(str(dataset)).manifest.encoding
    lines = read_metrics(finished)
    steps = [line for line in lines if line["kind"] == "train"]
    assert [line["step"] for line in steps] == [1, 2, 3, 4]
    for line in steps:
        scales = [line[f"loss/{scale}"] for scale in range(4)]
        assert line["loss"] == pytest.approx(sum(scales) / 4, rel=1e-6)
        assert line["lr"] == 1e-4
        kinds = [line[f"data_wait/{kind}"] for kind in ("storage", "decoding", "conversion")]
        assert 0 < sum(kinds) <= line["data_wait"] + 1e-9 <= 1
        assert line["images_per_second"] > 0
    (val,) = (line for line in lines if line["kind"] == "val")
    assert {"loss", "abs_rel", "sq_rel", "rmse", "rmse_log", "a1", "a2", "a3"} <= set(val)
    assert {"last.pt", "best.pt"} <= {path.name for path in (finished / "checkpoints").iterdir()}
    assert list((finished / "tensorboard").iterdir())


def test_panels_and_summary_are_pictures(finished: Path) -> None:
    with Image.open(finished / "panels" / "train-00000002.png") as panel:
        # A row of labels, two samples; target, three warped sources, disparity, auto-mask.
        assert panel.size == (6 * 96, HEADER + 2 * 64)
        labels = [panel.crop((96 * i, 0, 96 * (i + 1), HEADER)).tobytes() for i in range(6)]
        assert len(set(labels)) == 6 and not any(label.count(0) == len(label) for label in labels)
        target = panel.crop((0, HEADER, 96, HEADER + 64))
        assert len(target.getcolors(100_000) or []) > 50
    with Image.open(finished / "summary.png") as summary:
        assert summary.width > 1000


def test_tensorboard_has_the_same_losses(finished: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(finished / "tensorboard"))
    events.Reload()
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx(losses(finished), rel=1e-6)
    assert events.Tags()["images"] == ["train/panel", "val/panel"]


@pytest.mark.parametrize(("recipe", "unit"), [("mono", None), ("stereo", 5.4), ("mono_stereo", 5.4)])
def test_each_mode_learns(dataset: Path, tmp_path: Path, recipe: str, unit: float | None) -> None:
    """One batch again and again: its loss falls, and so it does through depth and, where there is one, pose."""
    quiet = ["data.color_jitter=false", "data.flip=false", "train.learning_rate=5e-4", "loss.disable_automasking=true"]
    one = trainer(dataset, tmp_path / "run", quiet, recipe)
    batch = next(iter(one.loader))
    one.networks.train()
    before = {name: value.clone() for name, value in one.networks.named_parameters()}
    values = [one._step([batch])[1].total.item() for _ in range(18)]
    assert sum(values[-3:]) < 0.97 * sum(values[:3]), values
    moved = {name.split(".")[0] for name, value in one.networks.named_parameters() if not value.equal(before[name])}
    assert moved == {"encoder", "depth"} | ({"pose_encoder", "pose"} if recipe != "stereo" else set())
    one._save({})
    assert load_checkpoint(tmp_path / "run/checkpoints/last.pt").metres_per_unit == unit


def test_a_used_run_folder_is_not_overwritten(finished: Path, dataset: Path) -> None:
    before = (finished / "metrics.jsonl").read_bytes()
    with pytest.raises(UsageError, match="already holds a run"):
        train(dataset, finished)
    assert (finished / "metrics.jsonl").read_bytes() == before


def test_resume_refuses_what_would_change_the_numbers(finished: Path) -> None:
    with pytest.raises(UsageError, match=r"train\.learning_rate cannot change"):
        resume_run(finished, ["train.learning_rate=3"], Silent())


def test_a_run_has_one_process_that_trains_in_it(finished: Path, dataset: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    with FileLock(run / ".lock").acquire(1):
        with pytest.raises(UsageError, match=rf"process {os.getpid()} is training there"):
            resume_run(run, [], Silent())
        (run / "config.yaml").unlink()
        with pytest.raises(UsageError, match="is training there"):
            train(dataset, run)
    assert not (run / "config.yaml").exists()


def test_of_two_that_start_in_one_folder_the_second_is_refused(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both have found it empty; the other one has ended when this one is ready."""
    run = tmp_path / "run"

    def other(*arguments: Any, **options: Any) -> Trainer:
        made = Trainer(*arguments, **options)
        run.mkdir()
        (run / "config.yaml").write_text("the other's")
        return made

    monkeypatch.setattr("md2.training.trainer.Trainer", other)
    with pytest.raises(UsageError, match="already holds a run"):
        train(dataset, run)
    assert (run / "config.yaml").read_text() == "the other's"


def test_a_run_resumes_from_any_folder(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(dataset.parent)
    run = tmp_path / "run"
    start_run(config(Path(dataset.name), extra=["train.max_steps=1"]), run, Silent())
    monkeypatch.chdir("/")
    reporter = Silent()
    assert resume_run(run, [], reporter).stopped.step == 1
    assert any("the run is finished (1 steps)" in message for message in reporter.messages)
    rows = read_metrics(run)
    assert [(row["kind"], row["step"]) for row in rows] == [("train", 1), ("val", 1)]


def test_rows_that_a_resumed_run_writes_again_are_dropped(tmp_path: Path) -> None:
    def write(run: Path) -> None:
        run.mkdir()
        log = RunLog(run)
        for kind, step in (("train", 1), ("val", 1), ("train", 2), ("val", 2), ("val", 2), ("train", 3)):
            log.scalars(kind, step, 0, {"loss": 1.0})
        log.close()

    for measured, rows in ((True, ["train1", "val1", "train2", "val2"]), (False, ["train1", "val1", "train2"])):
        write(tmp_path / str(measured))
        RunLog(tmp_path / str(measured), 2, measured=measured).close()
        found = read_metrics(tmp_path / str(measured))
        assert [f"{row['kind']}{row['step']}" for row in found] == rows


def test_a_summary_skips_panels_that_are_half_written_and_is_drawn_if_anything_is_new(
    finished: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    summary = run / "summary.png"
    (run / "panels/val-99999999.png").write_bytes(b"\x89PNG\r\n\x1a\nhalf")
    summary.write_bytes(b"an earlier one")
    (run / "metrics.jsonl").touch()
    assert run_figure(run) == summary
    assert summary.read_bytes().startswith(b"\x89PNG")
    drawn = summary.stat()
    assert run_figure(run) == summary
    assert summary.stat() == drawn


PLACE = {"fingerprint": {}, "epoch": 0, "samples": 0, "step_samples": 1}


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("loader", None),
        ("loader", "one"),
        ("loader", {**PLACE, "samples": 10**9}),
        ("loader", {**PLACE, "epoch": "x"}),
        ("optimizer", None),
        ("optimizer", {"param_groups": 3}),
        ("optimizer", {"param_groups": [], "state": {}}),
        ("schedule", None),
        ("schedule", [1]),
        ("scaler", 7),
        ("best", None),
        ("measured", 1),
    ],
)
def test_a_training_state_that_does_not_fit_is_one_line(
    finished: Path, dataset: Path, tmp_path: Path, part: str, value: Any
) -> None:
    saved = load_checkpoint(finished / "checkpoints/last.pt")
    training = {name: state for name, state in saved.training.items() if name != part}
    if value is not None:
        training[part] = value
    here = Ranks(0, 1, torch.device("cpu"))
    kind = UsageError if isinstance(value, dict) and part == "loader" else InputError  # the first is the loader's
    with pytest.raises(kind, match=r"start a new run|cannot resume") as caught:
        broken = replace(saved, training=training)
        Trainer(saved.parsed_config(), open_dataset(str(dataset)), tmp_path, here, Silent(), resume=broken)
    assert "\n" not in str(caught.value)
    assert kind is UsageError or "training state cannot be resumed (start a new run with its weights" in str(
        caught.value
    )
    assert kind is UsageError or f"'{part}'" in str(caught.value)


def test_the_dataset_is_looked_at_before_weights_are_fetched(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("md2.training.trainer.initialise", lambda *_: pytest.fail("weights were fetched"))
    with pytest.raises(UsageError, match="not every sample has"):
        train(dataset, tmp_path / "run", "mono", ["data.frames=[0,-3,3]", "model.weights=imagenet"])


def test_resume_of_nothing(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no run to resume"):
        resume_run(tmp_path, [], Silent())
    (tmp_path / "config.yaml").write_text("data: [")
    with pytest.raises(UsageError, match=r"config\.yaml, line 1, column 8: not YAML"):
        resume_run(tmp_path, [], Silent())


@pytest.mark.parametrize(
    ("recipe", "mistake", "kind", "message"),
    [
        ("stereo", "train.batch_size=5000", TrainingError, "samples, one step needs 5000 "),
        ("stereo", "train.loggers=[wandb]", UsageError, r"train\.loggers has wandb, which is not installed"),
        ("stereo", "model.weights=/dev/null/nothing", InputError, "no such file or folder"),
        ("mono", "data.frames=[0,-3,3]", UsageError, r"not every sample has m3\.\w+, p3\.\w+"),
    ],
)
def test_a_mistake_leaves_no_run_behind(
    dataset: Path, tmp_path: Path, recipe: str, mistake: str, kind: type[Exception], message: str
) -> None:
    """The corrected command, with the same --run, must not meet "already holds a run"."""
    with pytest.raises(kind, match=message):
        train(dataset, tmp_path / "run", recipe, [mistake])
    assert not (tmp_path / "run").exists()


def test_stereo_asked_of_a_mono_dataset(dataset: Path, tmp_path: Path) -> None:
    mono = tmp_path / "mono"
    shutil.copytree(dataset, mono)
    manifest = json.loads((mono / "dataset.json").read_text())
    gone = ("s.jpg", "s.png", "t.f32")
    manifest["components"] = [name for name in manifest["components"] if name not in gone]
    manifest["stereo"] = False
    (mono / "dataset.json").write_text(json.dumps(manifest))
    told = r"not every sample has s\.\w+, t\.f32, which .*: train with data\.frames=\[0,-1,1\] data\.stereo=false, or"
    with pytest.raises(UsageError, match=told):
        train(mono, tmp_path / "run", "stereo")


def test_killed_before_its_first_checkpoint_a_run_begins_again(finished: Path, dataset: Path, tmp_path: Path) -> None:
    run = tmp_path / "early"
    shutil.copytree(finished, run)
    shutil.rmtree(run / "checkpoints")
    reporter = Silent()
    assert resume_run(run, [], reporter).stopped.step == 4
    assert reporter.messages[0] == "warning: no checkpoint yet: from the start"
    assert any(message.startswith("training on the CPU (") for message in reporter.messages)
    assert any("stored at 96x32 and enlarged to 96x64" in message for message in reporter.messages)
    assert losses(run) == losses(finished)
    first, second = (load_checkpoint(folder / "checkpoints/last.pt").networks for folder in (run, finished))
    assert all(torch.equal(value, second[name][key]) for name in first for key, value in first[name].items())


def test_stopped_in_validation_a_run_measures_when_resumed(
    finished: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A preempted job has seconds: it does not finish validating, and its numbers are those of one left alone."""
    run = tmp_path / "run"
    monkeypatch.setattr(
        "md2.training.trainer.validate", lambda *_: (os.kill(os.getpid(), signal.SIGTERM), ({}, None))[1]
    )
    outcome, _ = train(dataset, run, extra=["train.max_steps=4"])
    assert (outcome.exit_code, outcome.stopped.step, outcome.stopped.early) == (143, 4, True)
    assert [line["kind"] for line in read_metrics(run)] == ["train"] * 4
    assert not (run / "checkpoints/best.pt").exists()
    monkeypatch.undo()
    assert resume_run(run, [], Silent()).exit_code == 0
    (mine,), (theirs,) = ([line for line in read_metrics(r) if line["kind"] == "val"] for r in (run, finished))
    assert mine == theirs
    assert load_checkpoint(run / "checkpoints/best.pt").metrics == {k: mine[k] for k in mine if k not in LABELS}


def test_a_signal_that_comes_twice_is_one_and_a_second_ctrl_c_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun passes on what a scheduler has sent to every process already."""
    clock = [100.0]
    monkeypatch.setattr("md2.train.time.monotonic", lambda: clock[0])
    for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        request = StopRequest()
        request.handle(number, None)
        request.handle(number, None)
        assert request() and request.exit_code == code
    clock[0] += 1.5
    request.handle(signal.SIGTERM, None)
    with pytest.raises(KeyboardInterrupt):
        request.handle(signal.SIGINT, None)


def test_validation_changes_nothing_that_training_computes(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights and batch norm's running averages after two epochs are the same bit by bit, validated or not."""
    settings = ["train.epochs=2", "train.batch_size=4", "train.image_every=1000", "train.val_batches=1"]
    train(dataset, tmp_path / "validated", "stereo", settings)
    assert [line["kind"] for line in read_metrics(tmp_path / "validated")].count("val") == 2
    monkeypatch.setattr("md2.training.trainer.validate", lambda *_: ({}, None))
    train(dataset, tmp_path / "bare", "stereo", settings)
    assert losses(tmp_path / "validated") == losses(tmp_path / "bare")
    mine, theirs = (load_checkpoint(tmp_path / run / "checkpoints/last.pt") for run in ("validated", "bare"))
    for name, state in theirs.networks.items():
        for key, value in state.items():
            assert torch.equal(mine.networks[name][key], value), f"{name}.{key}"
