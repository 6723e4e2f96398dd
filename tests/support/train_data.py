"""What the tests of training share: a small run, and someone who is told about it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from md2.config import Config, load_config
from md2.distributed import Ranks
from md2.train import TrainingResult, start_run
from md2.training.runlog import read_metrics
from md2.training.trainer import Trainer
from shards.dataset import open_dataset

QUICK = pytest.mark.usefixtures("narrow", "undrawn")
"""For tests of the loop, which networks and pictures have no part in."""
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


def train(
    dataset: Path, run: Path, recipe: str = "mono_stereo", extra: Sequence[str] = ()
) -> tuple[TrainingResult, Silent]:
    reporter = Silent()
    return start_run(config(dataset, recipe, extra), run, reporter), reporter


def trainer(dataset: Path, run: Path, extra: Sequence[str], recipe: str = "mono_stereo") -> Trainer:
    run.mkdir()
    settings = config(dataset, recipe, extra)
    return Trainer(settings, open_dataset(str(dataset)), run, Ranks(0, 1, torch.device("cpu")), Silent())


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(run) if line["kind"] == "train"]
