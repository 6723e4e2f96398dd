"""What the options of the loop change in the numbers: steps, precision, compiling, logging."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from ranks_gradient import fixed_batch, share
from train_data import QUICK, Silent, config, train, trainer

from md2.checkpoint import load_checkpoint
from md2.distributed import Ranks
from md2.loss import LossOutput
from md2.model import Prediction
from md2.train import resume_run
from md2.training.amp import AmpSettings
from md2.training.panels import HEADER, panel
from md2.training.runlog import RunLog, read_metrics
from md2.training.trainer import Trainer
from md2.training.validate import validate
from shards.dataset import open_dataset
from shards.errors import TrainingError, UsageError

pytestmark = QUICK


@pytest.mark.parametrize("rate", [1e-4, 3e-4])
def test_the_first_step_is_adams(dataset: Path, tmp_path: Path, rate: float) -> None:
    """Adam's first step moves every weight by the learning rate, against its gradient's sign."""
    one = trainer(dataset, tmp_path / "run", [f"train.learning_rate={rate}"], "mono")
    before = {name: value.clone() for name, value in one.networks.named_parameters()}
    one.networks.train()
    one._step([next(iter(one.loader))])
    compared = 0
    for name, value in one.networks.named_parameters():
        if value.grad is None:
            assert ".fc." in name and torch.equal(value, before[name])
            continue
        felt = value.grad.abs() > 1e-5  # Adam's epsilon, 1e-8, is nothing beside it
        moved = (value.detach() - before[name])[felt]
        expected = -rate * value.grad[felt].sign()
        # Adding 1e-4 to a weight near 1 rounds to 6e-8.
        torch.testing.assert_close(moved, expected, rtol=2e-3, atol=1.2e-7)
        compared += int(felt.sum())
    assert compared > 100_000
    assert one.optimizer.defaults["betas"] == (0.9, 0.999) and one.optimizer.defaults["weight_decay"] == 0


def test_the_learning_rate_drops_where_the_schedule_says(dataset: Path, tmp_path: Path) -> None:
    extra = ["train.epochs=3", "train.lr_step_epochs=2", "train.lr_gamma=0.5", "train.batch_size=5"]
    _, reporter = train(dataset, tmp_path / "run", "stereo", extra)
    left_out = open_dataset(str(dataset)).manifest.samples("train") - 2 * 5
    assert left_out > 1
    said = [m for m in reporter.messages if m.endswith(f"; {left_out} samples left out (less than a step)")]
    assert [m.partition(":")[0].partition(" (")[0] for m in said] == [
        "training on the CPU",
        *(f"epoch {n}" for n in (1, 2, 3)),
    ]
    rates = {line["epoch"]: line["lr"] for line in read_metrics(tmp_path / "run") if line["kind"] == "train"}
    assert rates == {0: 1e-4, 1: 1e-4, 2: 0.5e-4}
    measured = [(line["step"], line["epoch"]) for line in read_metrics(tmp_path / "run") if line["kind"] == "val"]
    assert measured == [(2, 1), (4, 2), (6, 3)], "after so many whole epochs"


def test_the_networks_see_jittered_images_and_the_loss_the_batch(dataset: Path, tmp_path: Path) -> None:
    given: list[Any] = []
    plain = share(fixed_batch(), 0, 1)
    batch = replace(plain, augmented={offset: image / 2 for offset, image in plain.images.items()})
    one = trainer(dataset, tmp_path / "run", [])
    one.loss = lambda *arguments, panels: given.append(arguments)  # type: ignore[assignment]
    one.model = lambda images: images  # type: ignore[assignment]
    one._forward(batch)
    ((compared, seen),) = given
    assert compared is batch
    assert torch.equal(seen[0], batch.augmented[0])


def test_gradients_are_exchanged_after_the_last_part_of_a_step_alone(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = trainer(dataset, tmp_path / "run", ["train.accumulate=3"], "stereo")
    skips: list[bool] = []
    monkeypatch.setattr(one, "_without_sync", lambda skip: (skips.append(skip), nullcontext())[1])
    one._step([share(fixed_batch(), part, 4) for part in range(3)])
    assert skips == [True, True, False]


def test_the_best_is_that_of_the_lowest_abs_rel_also_after_a_resume(
    dataset: Path, tmp_path: Path, disk: list[str]
) -> None:
    small = ["data.width=64", "data.height=64", "train.batch_size=1"]  # few CPUs compute in half precision
    one = trainer(dataset, tmp_path / "run", ["train.precision=fp16", *small], "stereo")
    one.scaler.load_state_dict({**one.scaler.state_dict(), "scale": 128.0})
    folder = tmp_path / "run/checkpoints"
    for one.step, abs_rel, loss in ((1, 0.3, 1.0), (2, 0.2, 5.0), (3, 0.25, 0.5), (4, 0.2, 0.5)):
        one._save({"abs_rel": abs_rel, "loss": loss})
    assert [load_checkpoint(folder / name).step for name in ("best.pt", "last.pt", "previous.pt")] == [2, 4, 3]
    renames = [line for line in disk if "-> best" in line or "-> last" in line]
    best, last = "best.pt.tmp -> best.pt", "last.pt.tmp -> last.pt"
    assert renames == [best, last, best, last, last, last], "a run killed in between would miss its best"
    here = Ranks(0, 1, torch.device("cpu"))
    saved = load_checkpoint(folder / "last.pt")
    resumed = Trainer(one.config, one.dataset, tmp_path / "run", here, Silent(), resume=saved)
    assert (resumed.best, resumed.step, resumed.scaler.get_scale()) == (0.2, 4, 128.0)
    resumed._save({"abs_rel": 0.21})
    assert load_checkpoint(folder / "best.pt").step == 2


def test_all_ranks_measure_the_first_ones_running_averages(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = trainer(dataset, tmp_path / "run", [], "stereo")
    told: list[str] = []
    monkeypatch.setattr(Ranks, "broadcast", lambda self, tensors: told.extend("buffer" for _ in tensors))
    monkeypatch.setattr("md2.training.trainer.validate", lambda *_: (told.append("validated"), ({}, None))[1])
    one._validate()
    assert told == ["buffer"] * len(list(one.networks.buffers())) + ["validated"]


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


def test_what_replayed_graphs_accumulate_is_added_outside_of_their_memory(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradients stay where they are from step to step, and are those of a step that starts from none."""
    extra = ["train.accumulate=2", "loss.disable_automasking=true", "train.learning_rate=1e-12"]
    plain = trainer(dataset, tmp_path / "plain", extra)
    monkeypatch.setattr(AmpSettings, "of", lambda train, device: AmpSettings(device, None, True, "graphs"))
    monkeypatch.setattr(AmpSettings, "compiled", lambda self, networks, whole: networks)
    graphs = trainer(dataset, tmp_path / "graphs", extra)
    group = [share(fixed_batch(), 0, 2), share(fixed_batch(), 1, 2)]
    places = []
    for _ in range(2):
        for each in (plain, graphs):
            each.networks.eval()
            each._step(group)
        places.append([p.grad.data_ptr() for p in graphs.networks.parameters() if p.grad is not None])
    assert places[0] == places[1]
    pairs = zip(plain.networks.parameters(), graphs.networks.parameters(), strict=True)
    for ours, theirs in pairs:
        assert (ours.grad is None) == (theirs.grad is None)
        if ours.grad is not None and theirs.grad is not None:
            torch.testing.assert_close(theirs.grad, ours.grad, rtol=1e-4, atol=1e-6)
            assert theirs.grad.stride() == theirs.stride()


def test_networks_that_do_not_compile_run_without_unless_compiling_is_asked_for(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("Failed to find C compiler.\nSet CC.")

    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    batch = share(fixed_batch(), 0, 4)
    for name, required, compiled in (("auto", False, broken), ("asked", True, broken), ("full", False, full)):
        settings = AmpSettings(torch.device("cpu"), None, True, True, required)
        monkeypatch.setattr(AmpSettings, "of", lambda train, device, settings=settings: settings)
        monkeypatch.setattr(AmpSettings, "compiled", lambda self, networks, whole, compiled=compiled: compiled)
        one = trainer(dataset, tmp_path / name, [], "stereo")
        if name == "auto":
            for _ in range(2):
                assert one._step([batch])[1].total.isfinite()
            assert isinstance(one.reporter, Silent)
            (said,) = (message for message in one.reporter.messages if "do not compile" in message)
            assert said.endswith("RuntimeError: Failed to find C compiler.; train.compile=false leaves it out")
        else:
            with pytest.raises((RuntimeError, torch.OutOfMemoryError), match=r"C compiler|out of memory"):
                one._step([batch])


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")  # of compiling, which are torch's
def test_replayed_graphs_accumulate_the_plain_gradients(dataset: Path, tmp_path: Path) -> None:
    norms = []
    for compiled in ("false", "graphs"):
        extra = [f"train.compile={compiled}", "train.accumulate=2", "train.precision=float32"]
        settings = config(dataset, extra=[*extra, "train.device=gpu", "train.learning_rate=1e-12"])
        run = tmp_path / compiled
        run.mkdir()
        there = Ranks(0, 1, torch.device("cuda", 0))
        one = Trainer(settings, open_dataset(str(dataset)), run, there, Silent())
        one.model.train()
        batches = iter(one.loader)
        group = [next(batches), next(batches)]
        for _ in range(4):  # recorded in the second, replayed after
            one._step(group)
        norms.append([p.grad.norm().item() for p in one.networks.parameters() if p.grad is not None])
    assert norms[1] == pytest.approx(norms[0], rel=0.05, abs=1e-4)


def test_the_logged_loss_is_the_mean_over_accumulated_batches_and_ranks(dataset: Path, tmp_path: Path) -> None:
    """Of two halves of a batch, and of this rank and one whose losses are five times as large."""
    one = trainer(dataset, tmp_path / "run", ["train.accumulate=2", "loss.disable_automasking=true"])
    one.networks.eval()
    halves = [share(fixed_batch(), 0, 2), share(fixed_batch(), 1, 2)]
    with torch.no_grad():
        outputs = [one._forward(half)[1] for half in halves]
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


def predictions(
    dataset: Path, run: Path, *extra: str, width: int = 96, inside: list[torch.dtype] | None = None
) -> tuple[Prediction, LossOutput, Trainer]:
    """A step's, and into `inside` what the depth decoder's last block computed in."""
    one = trainer(dataset, run, [f"data.width={width}", *extra], "stereo")
    one.networks.train()
    batch = share(fixed_batch(), 0, 1)
    images = {offset: image[..., :width].contiguous() for offset, image in batch.images.items()}
    if inside is not None:
        one.networks.depth.decoder[9].register_forward_hook(lambda module, x, y: inside.append(y.dtype))
    prediction, losses = one._forward(replace(batch, images=images, augmented=images))
    losses.total.backward()  # type: ignore[no-untyped-call]
    return prediction, losses, one


def test_precision_is_that_of_the_networks_only(dataset: Path, tmp_path: Path) -> None:
    full, exact, _ = predictions(dataset, tmp_path / "full", "train.precision=float32", width=64)  # few CPUs do half
    assert full.disparities[0].dtype == torch.float32
    for name, dtype, bound in (("bf16", torch.bfloat16, 2e-2), ("fp16", torch.float16, 2e-3)):
        inside: list[torch.dtype] = []
        half, losses, one = predictions(dataset, tmp_path / name, f"train.precision={name}", width=64, inside=inside)
        assert inside == [dtype]
        # The heads are in float32: from bfloat16 ones come 200 values at best, and a depth that goes in steps.
        assert {disparity.dtype for disparity in half.disparities.values()} == {torch.float32}
        assert half.disparities[0].unique().numel() > 0.5 * half.disparities[0].numel()
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


def test_predictive_masks_are_shown_one_per_source(dataset: Path, tmp_path: Path) -> None:
    masked = ["loss.predictive_mask=true", "loss.disable_automasking=true", "train.image_every=1", "train.batch_size=1"]
    one = trainer(dataset, tmp_path / "run", masked, "mono")
    batch = next(iter(one.loader))
    prediction, losses = one._forward(batch)
    drawn = panel(batch, prediction, losses)
    header, picture = drawn[:HEADER], drawn[HEADER:]
    assert picture.shape == (64, 6 * 96, 3), "target, two warped sources, disparity, two masks"
    masks = prediction.masks[0][0].detach().numpy()
    for place, mask in enumerate(masks):
        cell = picture[:, (4 + place) * 96 : (5 + place) * 96]
        assert (np.abs(cell / 255 - mask[..., None]) < 0.003).all()
        assert (header[:, (4 + place) * 96 : (5 + place) * 96] > 128).any(), "labelled"
    assert not np.array_equal(masks[0], masks[1])


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

    monkeypatch.setattr("md2.training.trainer.validate", counted)
    every = ["train.log_every=2", "train.image_every=4", "train.checkpoint_every=3", "train.val_batches=1"]
    train(dataset, tmp_path / "run", "stereo", ["train.max_steps=5", "train.batch_size=1", *every])
    assert [line["step"] for line in read_metrics(tmp_path / "run") if line["kind"] == "train"] == [2, 4, 5]
    assert [p.name for p in sorted((tmp_path / "run/panels").glob("train-*"))] == ["train-00000004.png"]
    assert saved == [3, 5]
    last, previous = (load_checkpoint(tmp_path / f"run/checkpoints/{name}.pt") for name in ("last", "previous"))
    assert (last.step, previous.step) == (5, 3)
    # In the middle of an epoch: a longer run goes on from there with the same learning rate.
    assert (last.epoch, last.training["schedule"]["last_epoch"]) == (0, 0)
    assert counts == [1]


def test_the_seed_decides_weights_samples_and_nothing_else_does(dataset: Path, tmp_path: Path) -> None:
    found = []
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        one = trainer(dataset, tmp_path / name, [f"train.seed={seed}"], "stereo")
        torch.rand(7)  # whatever else draws from torch's own generator
        batch = next(iter(one.loader))
        found.append((one._forward(batch)[1].total.item(), tuple(batch.keys)))
    assert found[0] == found[1]
    assert found[2][0] != found[0][0]
    assert found[2][1] != found[0][1]


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


class FakeLogger(ModuleType):
    """As much of wandb and of mlflow as the loggers use; remembers its calls."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.started: list[str | None] = []
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.info = SimpleNamespace(run_id="given")

    def init(self, id: str, **_: Any) -> FakeLogger:
        self.started.append(id)
        return self

    def start_run(self, run_id: str | None, run_name: str) -> FakeLogger:
        self.started.append(run_id)
        return self

    def log(self, values: dict[str, float], step: int) -> None:
        self.logged.append((step, values))

    log_metrics = log

    def log_dict(self, config: dict[str, Any], name: str) -> None:
        assert config["train"]["loggers"] == ["wandb", "mlflow"]

    def finish(self) -> None:
        self.logged.append((-1, {}))

    end_run = finish


def test_loggers_get_the_scalars_and_a_resumed_run_is_the_same_one_there(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fakes = [FakeLogger("wandb"), FakeLogger("mlflow")]
    for fake in fakes:
        monkeypatch.setitem(sys.modules, fake.__name__, fake)
    train(dataset, tmp_path / "run", "stereo", ["train.max_steps=2", "train.loggers=[wandb, mlflow]"])
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


def test_a_logger_that_fails_does_not_end_the_run(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ConnectionError("no server\nand a page of details")

    wandb = FakeLogger("wandb")
    monkeypatch.setattr(wandb, "log", fail)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    extra = ["train.max_steps=2", "train.loggers=[wandb]"]
    outcome, reporter = train(dataset, tmp_path / "run", "stereo", extra)
    assert outcome.stopped.step == 2
    (warning,) = (message for message in reporter.messages if "Wandb" in message)
    assert warning.startswith("warning: ") and "Wandb failed and gets no more scalars: no server" in warning
    monkeypatch.setattr(wandb, "init", fail)
    with pytest.raises(UsageError, match=r"^train\.loggers: wandb does not start: no server$"):
        train(dataset, tmp_path / "other", "stereo", extra)


def test_overflow_in_half_precision_is_skipped_by_the_scaler(dataset: Path, tmp_path: Path) -> None:
    """fp16 on the CPU: activations overflow, the loss scale is halved, weights and running averages stay whole."""
    small = ["data.width=64", "data.height=64", "train.batch_size=1"]  # few CPUs compute in half precision
    one = trainer(dataset, tmp_path / "run", ["train.precision=fp16", "train.on_nan=skip", *small], "stereo")
    batch = next(iter(one.loader))
    assert isinstance(one.reporter, Silent)
    one.networks.train()
    one.reporter.messages.clear()
    one._step([batch])
    convolution = one.networks.encoder.encoder.conv1.weight
    scale, kept = one.scaler.get_scale(), convolution.detach().clone()
    with torch.no_grad():
        convolution.mul_(1e6)
    assert not one._step([batch])[1].total.isfinite()
    assert one.scaler.get_scale() == scale / 2
    assert torch.equal(convolution, kept * 1e6), "not stepped"
    assert one.reporter.messages == [
        f"step 1: the gradient is not finite; samples {batch.keys[0]}; the step was skipped"
    ], "the loss is not scaled: that it is not finite is not the scale's doing"
    stops = one.config.train.model_copy(update={"on_nan": "stop"})
    one.config = one.config.model_copy(update={"train": stops})
    with pytest.raises(TrainingError, match=batch.keys[0]):
        one._step([batch])
    assert all(buffer.isfinite().all() for buffer in one.networks.buffers())
    with torch.no_grad():
        convolution.copy_(kept)
    one.scaler.update(2.0**100)
    assert one._step([batch])[1].total.isfinite()
    assert torch.equal(convolution, kept), "gradients that overflow alone are how the scale is found, and no news"
    one.scaler.update(scale)
    assert one._step([batch])[1].total.isfinite()
    assert not torch.equal(convolution, kept)
