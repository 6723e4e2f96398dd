"""The training loop: forward, reprojection loss, backward, step; validation; checkpoints; resume.

An epoch is one pass of the loader. After it the learning rate is stepped, the validation part is
measured and a checkpoint written; between that, one every `checkpoint_every` steps. Everything that
decides what comes next (weights, optimiser, schedule, scaler, the reader's position on every rank)
is in the checkpoint, and the only other randomness, the noise that breaks auto-masking ties, is
seeded by the step: a resumed run repeats the numbers of an uninterrupted one.

Batch normalisation uses each rank's own batch statistics; the running averages kept are rank 0's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from md2.batch import Batch
from md2.checkpoint import BEST, LAST, PREVIOUS, Checkpoint, save_checkpoint
from md2.config import Config
from md2.distributed import Ranks
from md2.loss import LossOutput, ReprojectionLoss
from md2.model import Networks
from md2.panels import panel
from md2.pipeline import Loader
from md2.precision import FiniteGuard, Switches
from md2.prediction import Prediction
from md2.runlog import RunLog
from md2.sinks import open_sinks
from md2.validate import validate
from md2.weights import initialise
from shards.dataset import LocalDataset
from shards.errors import TrainingError

STOP_CHECK = 10
"""Steps between asking all ranks whether one was told to stop (each asking is a collective)."""
SHOWN = ("loss", "abs_rel", "rmse", "a1")
"""What the console's line for an epoch holds; metrics.jsonl and TensorBoard have all of it."""


class Reporter(Protocol):
    """Who is told about progress; the console's progress bar, or nothing."""

    def start(self, total: int, done: int) -> None: ...

    def step(self, step: int, epoch: int, loss: float | None, images_per_second: float) -> None: ...

    def message(self, text: str) -> None: ...


@dataclass(frozen=True)
class Stopped:
    """How training ended: `step` and `epoch` reached, and whether it was told to stop before its end."""

    step: int
    epoch: int
    early: bool
    metrics: dict[str, float]


class Trainer:
    """One run.

    Args:
        config: resolved configuration.
        dataset: with the parts `train` and, for validation, `val`.
        run: run folder; exists.
        ranks: this process's place.
        reporter: told about progress on the main rank.
        resume: checkpoint to go on from.
        should_stop: polled between steps; True ends the run with a checkpoint (SIGTERM, Ctrl-C).
    """

    def __init__(
        self,
        config: Config,
        dataset: LocalDataset,
        run: Path,
        ranks: Ranks,
        reporter: Reporter,
        *,
        resume: Checkpoint | None = None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self.config, self.dataset, self.run, self.ranks = config, dataset, run, ranks
        self.reporter, self.should_stop = reporter, should_stop
        self.step = self.epoch = self.step_in_epoch = 0
        self.best = float("inf")
        self.switches = Switches.of(config.train, ranks.device)
        torch.manual_seed(config.train.seed)
        networks = Networks(config.model, config.data, config.loss)
        if resume is None:
            initialise(networks, config.model.weights)
        else:
            networks.load_networks(resume.networks)
        self.networks = self.switches.prepare(networks.to(ranks.device))
        self.loss = ReprojectionLoss(config.loss, config.model)
        self.optimizer = torch.optim.Adam(
            [p for p in self.networks.parameters() if p.requires_grad],
            lr=config.train.learning_rate,
            fused=ranks.device.type == "cuda",
        )
        self.schedule = torch.optim.lr_scheduler.StepLR(
            self.optimizer, config.train.lr_step_epochs, config.train.lr_gamma
        )
        self.scaler = torch.amp.GradScaler(ranks.device.type, enabled=self.switches.scaled)
        self.guard = FiniteGuard(ranks.device)
        self.noise = torch.Generator(ranks.device)
        state = self._restore(resume) if resume is not None else None
        self.loader = self._loader("train", state)
        self.log: RunLog | None = None
        self.model: nn.Module = self.switches.compiled(self.networks)
        if ranks.world > 1:
            self.model = DistributedDataParallel(self.model)
        self.window = _Window()

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps in an epoch; the same on every rank."""
        return len(self.loader) // self.config.train.accumulate

    @property
    def total_steps(self) -> int:
        planned = self.steps_per_epoch * self.config.train.epochs
        return min(planned, self.config.train.max_steps or planned)

    def fit(self) -> Stopped:
        """Train to the end, or until told to stop.

        Raises:
            TrainingError: the loss or a gradient is not finite and `on_nan` is `stop`.
            DatasetError: the dataset turned out to be broken.
        """
        if self.steps_per_epoch == 0:
            raise TrainingError(
                f"{self.dataset.folder}: fewer training samples than one step needs "
                f"({self.config.train.batch_size} x {self.config.train.accumulate} x {self.ranks.world} ranks); "
                "lower train.batch_size or pack more"
            )
        if self.ranks.main:
            sinks = open_sinks(self.config.train.sinks, self.run, self.config.model_dump(mode="json"))
            self.log = RunLog(self.run, self.step, sinks)
        self.reporter.start(self.total_steps, self.step)
        metrics: dict[str, float] = {}
        early = False
        try:
            while self.step < self.total_steps and not early:
                early = self._train_epoch()
                if self.step_in_epoch == self.steps_per_epoch:
                    self.schedule.step()
                    self.epoch, self.step_in_epoch = self.epoch + 1, 0
                    metrics = self._validate()
                    self._save(metrics)
                elif early or self.step >= self.total_steps:
                    metrics = {} if early else self._validate()
                    self._save(metrics)
        finally:
            if self.log is not None:
                self.log.close()
        return Stopped(self.step, self.epoch, early, metrics)

    def _train_epoch(self) -> bool:
        """Steps until the epoch (or the run) ends; True if told to stop before."""
        self.model.train()
        batches = iter(self.loader)
        while self.step_in_epoch < self.steps_per_epoch and self.step < self.total_steps:
            waited = time.perf_counter()
            group = list(islice(batches, self.config.train.accumulate))
            self.window.wait(time.perf_counter() - waited)
            if len(group) < self.config.train.accumulate:
                raise TrainingError(
                    f"the loader ended after {self.step_in_epoch} of {self.steps_per_epoch} steps: "
                    "verify the dataset with md2 shards verify"
                )
            output = self._step(group)
            self.step, self.step_in_epoch = self.step + 1, self.step_in_epoch + 1
            self.window.add(sum(batch.size for batch in group) * self.ranks.world)
            self._report(group[-1], output)
            if self._told_to_stop():
                return True
            if self.step % self.config.train.checkpoint_every == 0 and self.step_in_epoch < self.steps_per_epoch:
                self._save({})
        return False

    def _step(self, group: list[Batch]) -> tuple[Prediction, LossOutput]:
        """One optimiser step over a group of batches, whose gradients are averaged."""
        self.optimizer.zero_grad(set_to_none=True)
        for index, batch in enumerate(group):
            with self._without_sync(index < len(group) - 1):
                prediction, losses = self._forward(batch, index)
                self.scaler.scale(losses.total / len(group)).backward()  # type: ignore[no-untyped-call]
        self.guard.step(self.optimizer, self.scaler, step=self.step + 1, keys=[key for b in group for key in b.keys])
        for bad in self.guard.found():
            self._not_finite(bad.step, bad.keys)
        return prediction, losses

    def _forward(self, batch: Batch, index: int) -> tuple[Prediction, LossOutput]:
        with self.switches.autocast():
            prediction: Prediction = self.model(self.switches.inputs(batch.augmented))
        seed = ((self.config.train.seed * 1_000_003 + self.step) * 64 + index) * 4096 + self.ranks.rank
        self.noise.manual_seed(seed % 2**63)
        return prediction, self.loss(batch, prediction, noise=self.noise, panels=self._wants_panel())

    def _without_sync(self, skip: bool) -> AbstractContextManager[Any]:
        if skip and isinstance(self.model, DistributedDataParallel):
            return self.model.no_sync()
        return nullcontext()

    def _not_finite(self, step: int, keys: list[str]) -> None:
        where = f"step {step}: the gradient is not finite; samples {', '.join(keys)}"
        if self.config.train.on_nan == "stop":
            raise TrainingError(f"{where}; look at them, lower train.learning_rate, or set train.on_nan=skip")
        self.reporter.message(f"{where}; the step was skipped")

    def _wants_panel(self) -> bool:
        return self.ranks.main and (self.step + 1) % self.config.train.image_every == 0

    def _report(self, batch: Batch, output: tuple[Prediction, LossOutput]) -> None:
        due = self.step % self.config.train.log_every == 0 or self.step == self.total_steps
        if self.log is not None and due:
            values = {f"loss/{scale}": value.item() for scale, value in output[1].per_scale.items()}
            values = {"loss": output[1].total.item(), **values}
            rates = {"lr": float(self.schedule.get_last_lr()[0]), **self.window.rates()}
            self.log.scalars("train", self.step, self.epoch, {**values, **rates})
            self.reporter.step(self.step, self.epoch, values["loss"], rates["images_per_second"])
        elif self.ranks.main:
            self.reporter.step(self.step, self.epoch, None, 0.0)
        if self.log is not None and output[1].panels:
            self.log.panel("train", self.step, panel(batch, *output))

    def _told_to_stop(self) -> bool:
        if self.ranks.world == 1:
            return self.should_stop()
        return self.step % STOP_CHECK == 0 and self.ranks.any(self.should_stop())

    def _validate(self) -> dict[str, float]:
        if "val" not in self.dataset.manifest.parts:
            return {}
        # Each rank has its own running statistics; all measure rank 0's network.
        self.ranks.broadcast(self.networks.buffers())
        loader = self._loader("val", None)
        batches: Iterator[Batch] = islice(iter(loader), self.config.train.val_batches)
        metrics, picture = validate(self.networks, self.loss, batches, self.config, self.ranks, self.switches)
        if self.log is not None and metrics:
            self.log.scalars("val", self.step, self.epoch, metrics)
            if picture is not None:
                self.log.panel("val", self.step, picture)
            shown = "  ".join(f"{name} {metrics[name]:.3f}" for name in SHOWN if name in metrics)
            self.reporter.message(f"epoch {self.epoch}: {shown}")
        return metrics

    def _loader(self, part: str, state: Any) -> Loader:
        train = part == "train"
        return Loader(
            self.dataset,
            part,
            self.config.data,
            batch_size=self.config.train.batch_size,
            seed=self.config.train.seed,
            train=train,
            rank=self.ranks.rank,
            world=self.ranks.world,
            device=self.ranks.device,
            depth=not train and self.dataset.manifest.depth is not None,
            accumulate=self.config.train.accumulate if train else 1,
            state=state,
        )

    def _save(self, metrics: dict[str, float]) -> None:
        """Write last.pt (and best.pt); collective, since every rank's reader position is in it."""
        loaders = self.ranks.gather(self.loader.state())
        if not self.ranks.main:
            return
        score = metrics.get("abs_rel", metrics.get("loss", float("inf")))
        improved = score < self.best
        self.best = min(self.best, score)
        checkpoint = Checkpoint(
            config=self.config.model_dump(mode="json"),
            networks=self.networks.state_dicts(),
            metres_per_unit=self.config.metres_per_unit,
            step=self.step,
            epoch=self.epoch,
            training={
                "optimizer": self.optimizer.state_dict(),
                "schedule": self.schedule.state_dict(),
                "scaler": self.scaler.state_dict(),
                "loaders": loaders,
                "step_in_epoch": self.step_in_epoch,
                "best": self.best,
                "dataset": self.dataset.manifest_sha256,
            },
            metrics=metrics,
        )
        folder = self.run / "checkpoints"
        save_checkpoint(checkpoint, folder / LAST, keep=folder / PREVIOUS)
        if improved:
            save_checkpoint(checkpoint, folder / BEST)

    def _restore(self, checkpoint: Checkpoint) -> Any:
        """Take over a checkpoint's state; returns this rank's reader position."""
        state = checkpoint.training
        if state["dataset"] != self.dataset.manifest_sha256:
            raise TrainingError(
                f"{self.dataset.folder} is not the dataset that the run was trained on (its manifest differs): "
                "give the original as data.url=..., or start a new run"
            )
        if len(state["loaders"]) != self.ranks.world:
            raise TrainingError(
                f"the run had {len(state['loaders'])} ranks, this job has {self.ranks.world}: "
                "start as many, since each rank's place in the data is saved"
            )
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.scaler.load_state_dict(state["scaler"])
        self.step, self.epoch, self.step_in_epoch = checkpoint.step, checkpoint.epoch, state["step_in_epoch"]
        self.best = state["best"]
        return state["loaders"][self.ranks.rank]


class _Window:
    """Images and waiting time since the last report."""

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self.begin, self.images, self.waited = time.perf_counter(), 0, 0.0

    def wait(self, seconds: float) -> None:
        self.waited += seconds

    def add(self, images: int) -> None:
        self.images += images

    def rates(self) -> dict[str, float]:
        """Target images per second over all ranks, and the share of time spent waiting for data."""
        elapsed = max(time.perf_counter() - self.begin, 1e-9)
        found = {"images_per_second": self.images / elapsed, "data_wait": self.waited / elapsed}
        self._reset()
        return found
