"""The training loop: forward, reprojection loss, backward, step; validation; checkpoints; resume.

An epoch is one pass of the loader. After it the validation part is measured, the learning rate stepped and a checkpoint
written; within it a checkpoint is written every `checkpoint_every` steps. A checkpoint holds everything that the next
steps depend on: weights, optimiser, schedule, scaler, the place in the order of samples. So a resumed run repeats the
numbers of an uninterrupted one.

Batch normalisation uses each rank's own batch statistics; the saved running averages are rank 0's.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import islice, takewhile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from md2.checkpoint import BEST, LAST, PREVIOUS, Checkpoint, save_checkpoint
from md2.config import Config
from md2.data.batch import Batch, Offset
from md2.data.warnings import data_warnings
from md2.distributed import Ranks, describe, exchange_gradients
from md2.loss import LossOutput, ReprojectionLoss
from md2.model import Networks, Prediction
from md2.networks.camera import figures
from md2.pipeline import Loader
from md2.training.amp import AmpSettings
from md2.training.finite import FiniteBuffers, FiniteGuard, NotFinite
from md2.training.graph import StepGraph, why_not_whole
from md2.training.loggers import check_loggers, open_loggers
from md2.training.panels import panel
from md2.training.runlog import Reporter, RunLog, Stopped, Window
from md2.training.summary import run_figure
from md2.training.validate import validate
from md2.weights import initialise
from shards.dataset import LocalDataset
from shards.errors import InputError, TrainingError, first_line
from shards.storage.retry import CancelledError

STOP_CHECK = 10
"""Steps between asking all ranks whether one should stop; each asking is a collective."""
LONG_WAIT = 2.0
"""Seconds that a rank of several waits for data, once it is to stop, before it leaves the others."""
SHOWN = ("loss", "abs_rel", "rmse", "a1")
"""Metrics in the console's line of an epoch; metrics.jsonl and TensorBoard have all."""


class Trainer:
    """One run.

    Args:
        config: resolved configuration.
        dataset: with the parts `train` and, for validation, `val`.
        run: run folder; exists when `fit` begins.
        ranks: this process's place.
        reporter: shows progress on the main rank.
        resume: checkpoint to resume from.
        should_stop: polled between steps and in validation; True ends the run with a checkpoint (SIGTERM, Ctrl-C).

    Raises:
        TrainingError: a part has fewer samples than one step or the ranks need, or the checkpoint is of another set-up.
        UsageError, InputError, DatasetError: as the dataset, the loader and `initialise` raise them.
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
        check_loggers(config.train.loggers)
        self.config, self.dataset, self.run, self.ranks = config, dataset, run, ranks
        self.reporter, self.should_stop = reporter, should_stop
        self.step = self.epoch = 0
        self.measured = False
        self.best = float("inf")
        self.amp = AmpSettings.of(config.train, ranks.device)
        # The dataset is checked first: weights may be fetched from elsewhere.
        self.loader = self._loader("train", None if resume is None else self._place(resume))
        if resume is not None and self.loader.epoch < resume.epoch:  # saved between two epochs by an earlier version
            self.loader.next_epoch()
        if self.steps_per_epoch == 0:
            raise TrainingError(
                f"{dataset.url}: part 'train' has {dataset.manifest.samples('train')} samples, one step needs "
                f"{config.train.batch_size * config.train.accumulate * ranks.world_size} (train.batch_size "
                f"{config.train.batch_size} x train.accumulate {config.train.accumulate} x {ranks.world_size} ranks): "
                "lower train.batch_size or pack more"
            )
        # Made once for all epochs, and now, so that its faults show before an epoch is trained.
        self.val_loader = self._loader("val", None) if "val" in dataset.manifest.parts else None
        self._build(resume)
        planned = self.step + self.loader.left // config.train.accumulate
        planned += self.steps_per_epoch * (config.train.epochs - self.loader.epoch - 1)
        self.total_steps = min(planned, config.train.max_steps or planned)
        self.log: RunLog | None = None
        self.window = Window()
        self._waits_since: float | None = None
        self._alone = False

    def _build(self, resume: Checkpoint | None) -> None:
        """Make the networks and everything that trains them."""
        config, device, main = self.config, self.ranks.device, self.ranks.main
        if device.type == "cuda":
            # All batches have one size, so the fastest convolutions are worth a search.
            torch.backends.cudnn.benchmark = config.train.cudnn_benchmark
        torch.manual_seed(config.train.seed)
        networks = Networks.of(config)
        if resume is None:
            if (left := initialise(networks, config.model.weights)) and main:
                self.reporter.message(f"{config.model.weights} has no {', '.join(left)}: random weights there")
        else:
            networks.load_networks(resume.networks, f"{self.run}/checkpoints")
        for text in data_warnings(self.dataset.manifest, config.data) if main else []:
            self.reporter.message(f"warning: {text}")
        self.networks = self.amp.prepare(networks.to(device))
        self.loss = ReprojectionLoss(config.loss, config.model)
        trainable = [p for p in self.networks.parameters() if p.requires_grad]
        self.graph = self._step_graph()
        whole = self.graph is not None
        self.optimizer = torch.optim.Adam(
            trainable, lr=config.train.learning_rate, fused=device.type == "cuda", capturable=whole
        )
        self.schedule = torch.optim.lr_scheduler.StepLR(
            self.optimizer, config.train.lr_step_epochs, config.train.lr_gamma
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.amp.scaled)
        self.guard = FiniteGuard(device)
        skips = self.amp.scaled or config.train.on_nan == "skip"
        self.averages = FiniteBuffers(self.networks.buffers() if skips else ())
        if resume is not None:
            self._restore(resume)
        # A replayed graph writes gradients into its own memory, which the next replay fills again. Those that are
        # accumulated must lie elsewhere, for autograd to add to.
        self.keep_gradients = self.amp.compile == "graphs" and config.train.accumulate > 1
        if self.keep_gradients:
            for parameter in trainable:
                parameter.grad = torch.zeros_like(parameter)
        self.eager: nn.Module = self.networks
        if self.ranks.world_size > 1:
            self.eager = exchange_gradients(self.networks, in_place=not self.keep_gradients)
        # Compiled around DDP, so that gradients are exchanged while the rest of the backward pass runs.
        self.model: nn.Module = self.amp.compiled(self.eager, whole)
        self.compiles = not self.amp.required and self.model is not self.eager

    def _step_graph(self) -> StepGraph[tuple[Prediction, LossOutput, Tensor, Tensor]] | None:
        """What records whole steps, if that is asked for and possible."""
        if self.amp.compile != "graphs":
            return None
        parts = why_not_whole(self.config.train, self.ranks.world_size, self.amp.scaled)
        if parts is None:
            return StepGraph(lambda batch: self._compute([batch]), self.reporter.message)
        if self.ranks.main:
            self.reporter.message(f"train.compile=graphs: CUDA graphs of the networks, not of the whole step: {parts}")
        return None

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps in an epoch; the same on every rank."""
        return len(self.loader) // self.config.train.accumulate

    def fit(self) -> Stopped:
        """Train to the end, or until `should_stop`.

        Raises:
            TrainingError: the loss or a gradient is not finite and `on_nan` is `stop`.
            DatasetError: the dataset is broken.
        """
        if self.ranks.main:
            loggers = open_loggers(self.config.train.loggers, self.run, self.config.model_dump(mode="json"))
            self.log = RunLog(self.run, self.step, loggers, self.reporter.message, measured=self.measured)
            ranks = f", {self.ranks.world_size} ranks" if self.ranks.world_size > 1 else ""
            samples, size = self.loader.samples, self.loader.step_samples
            steps = f"{samples} samples, {self.steps_per_epoch} steps of {size} an epoch{_left_out(samples % size)}"
            self.reporter.message(f"training on {describe(self.ranks.device)}{ranks}: {steps}")
        self.reporter.start(self.total_steps, self.step)
        if self.ranks.main and self.loader.note is not None:
            self.reporter.message(self.loader.note)
        if self.ranks.main and self.val_loader is None:
            self.reporter.message("the dataset has no part val: no validation, and no best.pt")
        metrics: dict[str, float] | None = {}
        try:
            while metrics is not None and not (self.measured and self.step >= self.total_steps):
                metrics = self._train_and_measure()
        finally:
            self.loader.close()
            if self.log is not None:
                self.log.close()
        return Stopped(self.step, self.epoch, metrics is None, metrics or {}, self._alone)

    def _train_and_measure(self) -> dict[str, float] | None:
        """Finish the epoch (or the run): its steps, validation, a checkpoint. None if stopped meanwhile.

        A run that is stopped in validation validates when it is resumed.
        """
        if self._train_epoch():
            self._save({})
            return None
        metrics = self._validate()
        if metrics is None:
            self._save({})
            return None
        if not self.loader.left:
            self.schedule.step()
            self.loader.next_epoch()
            self.epoch = self.loader.epoch
        self.measured = True
        self._save(metrics)
        return metrics

    def _train_epoch(self) -> bool:
        """Run steps until the epoch (or the run) ends; True if stopped before."""
        self.model.train()
        self.window, whole = Window(), Window()  # rates leave validation out
        batches = self._awaited(iter(self.loader))
        while self.loader.left and self.step < self.total_steps:
            began, before = time.perf_counter(), dict(self.loader.waited)
            try:
                group = list(islice(batches, self.config.train.accumulate))
            except CancelledError:  # stopped while it waited for the storage: the checkpoint is of the last whole step
                self._alone = self.ranks.world_size > 1
                return True
            waits = {f"/{what}": seconds - before[what] for what, seconds in self.loader.waited.items()}
            waits[""] = time.perf_counter() - began
            for window in (self.window, whole):
                window.wait(waits)
            if len(group) < self.config.train.accumulate:
                raise TrainingError(
                    f"the loader ended within epoch {self.epoch + 1}: verify the dataset with md2 shards verify"
                )
            output = self._step(group)
            self.step, self.measured = self.step + 1, False
            self.window.add(sum(batch.size for batch in group) * self.ranks.world_size)
            self._report(group[-1], output)
            if self._should_stop():
                return True
            if self.step % self.config.train.checkpoint_every == 0 and self.loader.left:
                self._save({})
        if self.ranks.main and (shares := whole.shares()):
            kinds = ", ".join(f"{kind.removeprefix('/')} {share:.0%}" for kind, share in shares.items() if kind)
            waiting = f"{shares['']:.0%} of the time waiting for data ({kinds})"
            left_out = "" if self.loader.left else _left_out(self.loader.left_out)
            self.reporter.message(f"epoch {self.epoch + 1}: {waiting}{left_out}")
        return False

    def _step(self, group: list[Batch]) -> tuple[Prediction, LossOutput]:
        """One optimiser step over a group of batches, whose gradients are averaged."""
        held = self.step < self.config.train.camera_from
        self.networks.hold_camera(held)
        if self.graph is None or self._wants_panel():
            computed = self._compute(group)
        else:
            computed = self.graph(group[0], (held, *self.schedule.get_last_lr()))
        prediction, losses, self.losses, bad = computed
        keys = [key for batch in group for key in batch.keys]
        self.guard.read_later(NotFinite(self.step + 1, keys), bad)
        self._check_steps()
        return prediction, losses

    def _compute(self, group: list[Batch]) -> tuple[Prediction, LossOutput, Tensor, Tensor]:
        """All that a step computes, as one CUDA graph if that is asked for: nothing here may wait for a GPU.

        Returns:
            Prediction and losses of the last batch, the step's mean losses (total, then each scale's), and whether its
            gradient was not finite.
        """
        self.optimizer.zero_grad(set_to_none=not self.keep_gradients)
        self.averages.keep()
        means = torch.zeros(1 + len(self.config.model.scales), device=self.ranks.device)
        for index, batch in enumerate(group):
            with self._without_sync(index < len(group) - 1):
                prediction, losses = self._forward(batch)
                self.scaler.scale(losses.total / len(group)).backward()  # type: ignore[no-untyped-call]
            means += torch.stack([losses.total, *losses.per_scale.values()]).detach() / len(group)
        self.averages.mend()
        return prediction, losses, means, self.guard.step(self.optimizer, self.scaler, means[0])

    def _forward(self, batch: Batch) -> tuple[Prediction, LossOutput]:
        with self.amp.autocast():
            prediction = self._predict(self.amp.inputs(batch.augmented))
        return prediction, self.loss(batch, prediction, panels=self._wants_panel())

    def _predict(self, images: dict[Offset, Tensor]) -> Prediction:
        """The networks' outputs; uncompiled from the first call on if they do not compile and need not."""
        if self.compiles:
            self.compiles = False
            try:
                return self.model(images)  # type: ignore[no-any-return]
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # of torch's compilers, Triton and the machine's C compiler
                self.reporter.message(
                    f"warning: the networks do not compile and run slower without: {type(error).__name__}: "
                    f"{first_line(error)}; train.compile=false leaves it out"
                )
                self.model = self.eager
        prediction: Prediction = self.model(images)
        return prediction

    def _without_sync(self, skip: bool) -> AbstractContextManager[Any]:
        if skip and isinstance(self.eager, DistributedDataParallel):
            return self.eager.no_sync()
        return nullcontext()

    def _check_steps(self, wait: bool = False) -> None:
        """Report the steps that were not finite, or end training, as `on_nan` says."""
        for bad in self.guard.found(wait):
            rank = f" (rank {self.ranks.rank})" if self.ranks.world_size > 1 else ""
            where = f"step {bad.step}: the gradient is not finite; samples{rank} {', '.join(bad.keys)}"
            if self.config.train.on_nan == "stop":
                raise TrainingError(f"{where}; look at them, lower train.learning_rate, or set train.on_nan=skip")
            self.reporter.message(f"{where}; the step was skipped")

    def _wants_panel(self) -> bool:
        return self.ranks.main and (self.step + 1) % self.config.train.image_every == 0

    def _report(self, batch: Batch, output: tuple[Prediction, LossOutput]) -> None:
        due = self.step % self.config.train.log_every == 0 or self.step == self.total_steps
        if due:
            # The mean over all ranks and accumulated batches.
            loss, *per_scale = (self.ranks.sum(self.losses) / self.ranks.world_size).tolist()
        if self.log is not None and due:
            scales = {f"loss/{scale}": value for scale, value in zip(output[1].per_scale, per_scale, strict=True)}
            rates = {"lr": float(self.schedule.get_last_lr()[0]), **self.window.rates()}
            learned = figures(output[0].camera, (self.config.data.height, self.config.data.width))
            self.log.scalars("train", self.step, self.epoch, {"loss": loss, **scales, **rates, **learned})
            self.reporter.step(self.step, self.epoch, loss, rates["images_per_second"])
        elif self.ranks.main:
            self.reporter.step(self.step, self.epoch, None, self.window.images_per_second)
        if self.log is not None and output[1].panels:
            self.log.panel("train", self.step, panel(batch, *output))

    def _should_stop(self) -> bool:
        if self.ranks.world_size == 1:
            return self.should_stop()
        return self.step % STOP_CHECK == 0 and self.ranks.any(self.should_stop())

    def cancel_waits(self) -> None:
        """End waits for the storage: called from another thread when the run is to stop.

        With several ranks only a long wait: the rank that leaves a step keeps the others from finishing it.
        """
        begun = time.monotonic()
        while self.ranks.world_size > 1 and time.monotonic() - max(begun, self._waits_since or math.inf) < LONG_WAIT:
            time.sleep(0.1)
        for loader in (self.loader, self.val_loader):
            if loader is not None:
                loader.cancel()

    def _awaited(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Yield the batches, and note since when the next is waited for."""
        while True:
            self._waits_since = time.monotonic()
            batch = next(batches, None)
            self._waits_since = None
            if batch is None:
                return
            yield batch

    def _until_stopped(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        try:
            yield from takewhile(lambda _: not self.should_stop(), batches)
        except CancelledError:
            return

    def _validate(self) -> dict[str, float] | None:
        """Metrics; empty without a part to validate on, None if stopped meanwhile."""
        if self.val_loader is None:
            return {}
        # Each rank has running averages of its own; all validate rank 0's.
        self.ranks.broadcast(self.networks.buffers())
        batches: Iterator[Batch] = islice(self._awaited(iter(self.val_loader)), self.config.train.val_batches)
        batches = self._until_stopped(batches)
        metrics, picture = validate(self.networks, self.loss, batches, self.config, self.ranks, self.amp)
        if self.ranks.any(self.should_stop()):
            return None
        if self.log is not None and metrics:
            epochs = self.epoch + (not self.loader.left)
            self.log.scalars("val", self.step, epochs, metrics)
            if picture is not None:
                self.log.panel("val", self.step, picture)
            shown = "  ".join(f"{name} {metrics[name]:.3f}" for name in SHOWN if name in metrics)
            self.reporter.message(f"validation after step {self.step}: {shown}")
            run_figure(self.run)
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
            world_size=self.ranks.world_size,
            device=self.ranks.device,
            depth=not train and self.dataset.manifest.depth is not None,
            motion=self.config.motion,
            accumulate=self.config.train.accumulate if train else 1,
            state=state,
        )

    def _save(self, metrics: dict[str, float]) -> None:
        """Write last.pt (and best.pt) on the main rank; the place in the data is the same on all ranks."""
        self._check_steps(wait=True)
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
                "loader": self.loader.state(),
                "measured": self.measured,
                "best": self.best,
            },
            metrics=metrics,
        )
        folder = self.run / "checkpoints"
        # The best first: after a kill between the two, last.pt would name a best score without its file.
        if improved:
            save_checkpoint(checkpoint, folder / BEST)
        save_checkpoint(checkpoint, folder / LAST, keep=folder / PREVIOUS)

    def _place(self, checkpoint: Checkpoint) -> Any:
        """The place in the data; earlier versions saved one for each rank.

        Raises:
            InputError: the checkpoint has none.
        """
        state = checkpoint.training
        places = [state["loader"]] if "loader" in state else state.get("loaders")
        if not isinstance(places, list) or not places or not isinstance(places[0], dict):
            raise InputError(f"{self.run}/checkpoints: {_NOT_RESUMABLE}: 'loader' is missing or malformed")
        return places[0]

    def _restore(self, checkpoint: Checkpoint) -> None:
        """Take over a checkpoint's training state.

        Raises:
            InputError: a part is missing or malformed.
        """
        state = checkpoint.training
        part = ""
        try:
            part = "optimizer"
            # Whether it is fused depends on the device, not on the run.
            ours = {name: self.optimizer.param_groups[0][name] for name in ("fused", "capturable")}
            groups = [{**group, **ours} for group in state[part]["param_groups"]]
            self.optimizer.load_state_dict({**state[part], "param_groups": groups})
            part = "schedule"
            self.schedule.load_state_dict(state[part])
            self.schedule.get_last_lr()
            part = "scaler"
            self.scaler.load_state_dict(state[part])
            for part, kind in (("scaler", dict), ("measured", bool), ("best", float)):
                if not isinstance(state[part], kind):
                    raise TypeError(f"{type(state[part]).__name__} instead of {kind.__name__}")
        except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
            reason = "missing" if isinstance(error, KeyError) and part not in state else first_line(error)
            raise InputError(f"{self.run}/checkpoints: {_NOT_RESUMABLE}: {part!r}: {reason}") from error
        self.step, self.epoch = checkpoint.step, checkpoint.epoch
        self.best, self.measured = state["best"], state["measured"]


_NOT_RESUMABLE = "its training state cannot be resumed (start a new run with its weights: model.weights=RUN)"


def _left_out(samples: int) -> str:
    return f"; {samples} sample{'s' * (samples != 1)} left out (less than a step)" if samples else ""
