"""`md2 train` in this process: what a run writes, each mode learns, steps that are not finite."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from ranks_gradient import fixed_batch, share

from md2.checkpoint import load_checkpoint
from md2.config import Config, load_config
from md2.distributed import Ranks
from md2.loss import LossOutput
from md2.prediction import Prediction
from md2.runlog import RunLog, read_metrics
from md2.train import Outcome, StopRequest, resume_run, start_run
from md2.trainer import Trainer
from md2.validate import validate
from shards.dataset import open_dataset
from shards.errors import InputError, TrainingError, UsageError

SMALL = [
    "model.weights=scratch",
    "data.width=96",
    "data.height=64",
    "data.threads=2",
    "train.device=cpu",
    "train.batch_size=2",
    "train.epochs=1",
    "train.log_every=1",
    "train.image_every=2",
]


LABELS = ("kind", "step", "epoch")


class Silent:
    """A reporter that remembers."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    def start(self, total: int, done: int) -> None:
        self.total = total

    def step(self, step: int, epoch: int, loss: float | None, images_per_second: float) -> None:
        self.last = step

    def message(self, text: str) -> None:
        self.messages.append(text)


def config(dataset: Path, recipe: str = "mono_stereo", extra: Sequence[str] = ()) -> Config:
    return load_config(recipe, [f"data.url={dataset}", *SMALL, *extra])


def train(dataset: Path, run: Path, recipe: str = "mono_stereo", extra: Sequence[str] = ()) -> tuple[Outcome, Silent]:
    reporter = Silent()
    return start_run(config(dataset, recipe, extra), run, reporter), reporter


def trainer(dataset: Path, run: Path, extra: Sequence[str], recipe: str = "mono_stereo") -> Trainer:
    run.mkdir()
    settings = config(dataset, recipe, extra)
    return Trainer(settings, open_dataset(str(dataset)), run, Ranks(0, 1, torch.device("cpu")), Silent())


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(run) if line["kind"] == "train"]


@pytest.fixture(scope="module")
def finished(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "finished"
    train(dataset, run, extra=["train.max_steps=4"])
    return run


def test_a_run_folder_holds_what_is_promised(finished: Path, dataset: Path) -> None:
    assert load_config(finished / "config.yaml") == config(dataset, extra=["train.max_steps=4"])
    environment = json.loads((finished / "environment.json").read_text())
    assert environment["packages"]["torch"] == torch.__version__
    assert len(environment["dataset"]["manifest_sha256"]) == 64
    lines = read_metrics(finished)
    steps = [line for line in lines if line["kind"] == "train"]
    assert [line["step"] for line in steps] == [1, 2, 3, 4]
    for line in steps:
        scales = [line[f"loss/{scale}"] for scale in range(4)]
        assert line["loss"] == pytest.approx(sum(scales) / 4, rel=1e-6)
        assert line["lr"] == 1e-4
        assert 0 <= line["data_wait"] <= 1
        assert line["images_per_second"] > 0
    (val,) = (line for line in lines if line["kind"] == "val")
    assert {"loss", "abs_rel", "sq_rel", "rmse", "rmse_log", "a1", "a2", "a3"} <= set(val)
    assert {"last.pt", "best.pt"} <= {path.name for path in (finished / "checkpoints").iterdir()}
    assert list((finished / "tensorboard").iterdir())


def test_panels_and_summary_are_pictures(finished: Path) -> None:
    with Image.open(finished / "panels" / "train-00000002.png") as panel:
        # Two samples; target, three warped sources, disparity, auto-mask.
        assert panel.size == (6 * 96, 2 * 64)
        target = panel.crop((0, 0, 96, 64))
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
    values = [one._step([batch])[1].total.item() for _ in range(12)]
    assert sum(values[-3:]) < 0.97 * sum(values[:3]), values
    moved = {name.split(".")[0] for name, value in one.networks.named_parameters() if not value.equal(before[name])}
    assert moved == {"encoder", "depth"} | ({"pose_encoder", "pose"} if recipe != "stereo" else set())
    one._save({})
    assert load_checkpoint(tmp_path / "run/checkpoints/last.pt").metres_per_unit == unit


def test_the_learning_rate_drops_where_the_schedule_says(dataset: Path, tmp_path: Path) -> None:
    extra = ["train.epochs=3", "train.lr_step_epochs=2", "train.lr_gamma=0.5", "train.batch_size=4"]
    train(dataset, tmp_path / "run", "stereo", extra)
    rates = {line["epoch"]: line["lr"] for line in read_metrics(tmp_path / "run") if line["kind"] == "train"}
    assert rates == {0: 1e-4, 1: 1e-4, 2: 0.5e-4}


def test_accumulated_batches_step_as_one_large_batch(dataset: Path, tmp_path: Path) -> None:
    # Auto-masking off: its noise is drawn batch by batch.
    parts = trainer(dataset, tmp_path / "parts", ["train.accumulate=2", "loss.disable_automasking=true"])
    whole = trainer(dataset, tmp_path / "whole", ["loss.disable_automasking=true"])
    assert parts.steps_per_epoch == whole.steps_per_epoch // 2
    batch = fixed_batch()
    for each, group in ((parts, [share(batch, 0, 2), share(batch, 1, 2)]), (whole, [batch])):
        each.networks.eval()  # batch norm frozen: its statistics are those of each batch
        each._step(group)
    gradients = [
        torch.cat([p.grad.flatten() for p in each.networks.parameters() if p.grad is not None])
        for each in (parts, whole)
    ]
    assert ((gradients[0] - gradients[1]).norm() / gradients[1].norm()).item() < 1e-5


def test_the_logged_loss_is_the_mean_over_accumulated_batches_and_ranks(dataset: Path, tmp_path: Path) -> None:
    """Of two halves of a batch, and of this rank and one whose losses are five times as large."""
    one = trainer(dataset, tmp_path / "run", ["train.accumulate=2", "loss.disable_automasking=true"])
    one.networks.eval()
    halves = [share(fixed_batch(), 0, 2), share(fixed_batch(), 1, 2)]
    with torch.no_grad():
        outputs = [one._forward(half, 0)[1] for half in halves]
    expected = [sum(o.total.item() for o in outputs) / 2, sum(o.per_scale[3].item() for o in outputs) / 2]
    assert outputs[0].total.item() != pytest.approx(outputs[1].total.item(), rel=1e-3)
    one.log = RunLog(tmp_path / "run")
    output = one._step(halves)
    one.step = 1
    one.ranks = BesideOther(0, 2, torch.device("cpu"))
    one._report(halves[-1], output)
    one.log.close()
    (line,) = read_metrics(tmp_path / "run")
    assert [line["loss"], line["loss/3"]] == pytest.approx([3 * value for value in expected], rel=1e-6)


class BesideOther(Ranks):
    """One of two ranks."""

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        return values + 5 * values


def predictions(dataset: Path, run: Path, *extra: str) -> tuple[Prediction, LossOutput, Trainer]:
    one = trainer(dataset, run, extra, "stereo")
    one.networks.train()
    prediction, losses = one._forward(share(fixed_batch(), 0, 1), 0)
    losses.total.backward()  # type: ignore[no-untyped-call]
    return prediction, losses, one


def test_precision_is_that_of_the_networks_only(dataset: Path, tmp_path: Path) -> None:
    full, exact, _ = predictions(dataset, tmp_path / "full", "train.precision=float32")
    assert full.disparities[0].dtype == torch.float32
    for name, dtype, bound in (("bf16", torch.bfloat16, 2e-2), ("fp16", torch.float16, 2e-3)):
        half, losses, one = predictions(dataset, tmp_path / name, f"train.precision={name}")
        assert half.disparities[0].dtype == dtype
        assert losses.total.dtype == torch.float32
        assert {p.grad.dtype for p in one.networks.parameters() if p.grad is not None} == {torch.float32}
        difference = (half.disparities[0].float() - full.disparities[0]).abs().max().item()
        assert 0 < difference < bound
        assert 0 < abs(losses.total.item() - exact.total.item()) < bound * exact.total.item()
        assert one.scaler.is_enabled() == (name == "fp16")


def test_memory_format_and_compiling_change_nothing_but_rounding(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, exact, rows = predictions(dataset, tmp_path / "plain", "train.channels_last=false")
    weight = rows.networks.encoder.encoder.layer1[0].conv1.weight
    assert weight.is_contiguous() and rows.model is rows.networks
    _, pixels, one = predictions(dataset, tmp_path / "last", "train.channels_last=true")
    weight = one.networks.encoder.encoder.layer1[0].conv1.weight
    assert weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
    assert pixels.total.item() == pytest.approx(exact.total.item(), rel=1e-5)
    # Traced, but run by torch: generating and building C++ takes a minute.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager", fullgraph=True))
    traced, losses, one = predictions(dataset, tmp_path / "traced", "train.compile=true", "train.channels_last=false")
    assert one.model is not one.networks
    torch.testing.assert_close(traced.disparities[0], plain.disparities[0])
    assert losses.total.item() == pytest.approx(exact.total.item(), rel=1e-6)
    assert set(one.networks.state_dicts()) == {"encoder", "depth"}


def test_every_so_many_steps(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """log_every, image_every, checkpoint_every, val_batches."""
    saved: list[int] = []
    save = Trainer._save
    monkeypatch.setattr(Trainer, "_save", lambda self, metrics: (saved.append(self.step), save(self, metrics))[1])
    counts: list[int] = []

    def counted(networks: Any, loss: Any, batches: Any, *rest: Any) -> Any:
        batches = list(batches)
        counts.append(len(batches))
        return validate(networks, loss, batches, *rest)

    monkeypatch.setattr("md2.trainer.validate", counted)
    every = ["train.log_every=2", "train.image_every=4", "train.checkpoint_every=3", "train.val_batches=1"]
    train(dataset, tmp_path / "run", "stereo", ["train.max_steps=5", "train.batch_size=1", *every])
    assert [line["step"] for line in read_metrics(tmp_path / "run") if line["kind"] == "train"] == [2, 4, 5]
    assert [p.name for p in sorted((tmp_path / "run/panels").glob("train-*"))] == ["train-00000004.png"]
    assert saved == [3, 5]
    assert counts == [1]


def test_the_seed_decides_weights_samples_and_nothing_else_does(dataset: Path, tmp_path: Path) -> None:
    found = []
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        one = trainer(dataset, tmp_path / name, [f"train.seed={seed}"], "stereo")
        torch.rand(7)  # whatever else draws from torch's own generator
        batch = next(iter(one.loader))
        found.append((one._forward(batch, 0)[1].total.item(), tuple(batch.keys)))
    assert found[0] == found[1]
    assert found[2][0] != found[0][0]


def test_a_step_that_is_not_finite_stops_and_names_its_samples(dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"step \d+: the gradient is not finite; samples 2011_09_26"):
        train(dataset, tmp_path / "run", "stereo", ["train.learning_rate=1e36"])


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_or_is_skipped_and_leaves_the_weights_alone(dataset: Path, tmp_path: Path, precision: str) -> None:
    extra = ["train.learning_rate=1e36", "train.on_nan=skip", "train.max_steps=3", f"train.precision={precision}"]
    outcome, reporter = train(dataset, tmp_path / "run", "stereo", extra)
    assert outcome.stopped.step == 3
    skipped = [message for message in reporter.messages if "skipped" in message]
    assert skipped
    networks = load_checkpoint(tmp_path / "run/checkpoints/last.pt").networks
    assert all(value.isfinite().all() for state in networks.values() for value in state.values())


def test_a_used_run_folder_is_not_overwritten(finished: Path, dataset: Path) -> None:
    before = (finished / "metrics.jsonl").read_bytes()
    with pytest.raises(UsageError, match="already holds a run"):
        train(dataset, finished)
    assert (finished / "metrics.jsonl").read_bytes() == before


class FakeSink(ModuleType):
    """As much of wandb and of mlflow as the sinks use; remembers what it is told."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.started: list[str | None] = []
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.info = SimpleNamespace(run_id="given")

    def init(self, id: str, **_: Any) -> FakeSink:
        self.started.append(id)
        return self

    def start_run(self, run_id: str | None, run_name: str) -> FakeSink:
        self.started.append(run_id)
        return self

    def log(self, values: dict[str, float], step: int) -> None:
        self.logged.append((step, values))

    log_metrics = log

    def log_dict(self, config: dict[str, Any], name: str) -> None:
        assert config["train"]["sinks"] == ["wandb", "mlflow"]

    def finish(self) -> None:
        self.logged.append((-1, {}))

    end_run = finish


def test_sinks_get_the_scalars_and_a_resumed_run_is_the_same_one_there(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fakes = [FakeSink("wandb"), FakeSink("mlflow")]
    for fake in fakes:
        monkeypatch.setitem(sys.modules, fake.__name__, fake)
    train(dataset, tmp_path / "run", "stereo", ["train.max_steps=2", "train.sinks=[wandb, mlflow]"])
    resume_run(tmp_path / "run", ["train.max_steps=3"], Silent())
    lines = read_metrics(tmp_path / "run")
    for fake in fakes:
        told = [(step, v.get("train/loss", v.get("val/loss"))) for step, v in fake.logged if step >= 0]
        assert told == [(line["step"], line["loss"]) for line in lines]
        assert [step for step, _ in fake.logged].count(-1) == 2, "closed"
    wandb, mlflow = fakes
    assert wandb.started[0] == wandb.started[1] and len(wandb.started[0] or "") == 12
    assert mlflow.started == [None, "given"]
    assert "train/loss/0" in wandb.logged[0][1]
    names = set(mlflow.logged[0][1])
    assert "train/loss_0" in names
    assert not any(a.startswith(f"{b}/") for a in names for b in names)


def test_a_sink_that_fails_does_not_end_the_run(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ConnectionError("no server\nand a page of details")

    wandb = FakeSink("wandb")
    monkeypatch.setattr(wandb, "log", fail)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    extra = ["train.max_steps=2", "train.sinks=[wandb]"]
    outcome, reporter = train(dataset, tmp_path / "run", "stereo", extra)
    assert outcome.stopped.step == 2
    (warning,) = (message for message in reporter.messages if message.startswith("warning"))
    assert "Wandb failed and is told no more: no server" in warning
    monkeypatch.setattr(wandb, "init", fail)
    with pytest.raises(UsageError, match=r"^train\.sinks: wandb does not start: no server$"):
        train(dataset, tmp_path / "other", "stereo", extra)


def test_resume_refuses_what_would_change_the_numbers(finished: Path) -> None:
    with pytest.raises(UsageError, match=r"train\.batch_size cannot change"):
        resume_run(finished, ["train.batch_size=3"], Silent())


def test_resume_of_nothing(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no run to resume"):
        resume_run(tmp_path, [], Silent())
    (tmp_path / "config.yaml").write_text("data: [")
    with pytest.raises(UsageError, match=r"config\.yaml: not YAML"):
        resume_run(tmp_path, [], Silent())


@pytest.mark.parametrize(
    ("recipe", "mistake", "kind", "message"),
    [
        ("stereo", "train.batch_size=5000", TrainingError, "fewer training samples"),
        ("stereo", "train.sinks=[wandb]", UsageError, r"train\.sinks has wandb, which is not installed"),
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
    with pytest.raises(UsageError, match=r"not every sample has s\.\w+, t\.f32, which .* data\.stereo true ask for"):
        train(mono, tmp_path / "run", "stereo")


def test_killed_before_its_first_checkpoint_a_run_begins_again(finished: Path, dataset: Path, tmp_path: Path) -> None:
    run = tmp_path / "early"
    shutil.copytree(finished, run)
    shutil.rmtree(run / "checkpoints")
    reporter = Silent()
    assert resume_run(run, [], reporter).stopped.step == 4
    assert reporter.messages[0] == "warning: no checkpoint yet: from the start"
    assert losses(run) == losses(finished)
    first, second = (load_checkpoint(folder / "checkpoints/last.pt").networks for folder in (run, finished))
    assert all(torch.equal(value, second[name][key]) for name in first for key, value in first[name].items())


def test_stopped_in_validation_a_run_measures_when_resumed(
    finished: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A preempted job has seconds: it does not finish validating, and its numbers are those of one left alone."""
    run = tmp_path / "run"
    monkeypatch.setattr("md2.trainer.validate", lambda *_: (os.kill(os.getpid(), signal.SIGTERM), ({}, None))[1])
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


def test_overflow_in_half_precision_is_skipped_by_the_scaler(dataset: Path, tmp_path: Path) -> None:
    """fp16 on the CPU: activations overflow, the loss scale is halved, weights and running averages stay whole."""
    one = trainer(dataset, tmp_path / "run", ["train.precision=fp16"], "stereo")
    batch = next(iter(one.loader))
    one.networks.train()
    one._step([batch])
    convolution = one.networks.encoder.encoder.conv1.weight
    scale, kept = one.scaler.get_scale(), convolution.detach().clone()
    with torch.no_grad():
        convolution.mul_(1e6)
    assert not one._step([batch])[1].total.isfinite()
    assert one.scaler.get_scale() == scale / 2
    assert torch.equal(convolution, kept * 1e6), "not stepped"
    assert all(buffer.isfinite().all() for buffer in one.networks.buffers())
    with torch.no_grad():
        convolution.copy_(kept)
    assert one._step([batch])[1].total.isfinite()
    assert not torch.equal(convolution, kept)
