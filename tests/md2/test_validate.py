"""Validation during training: means over images and ranks, scaling by what is known, networks as they are at test."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from md2.config import Config, load_config
from md2.data.batch import Batch, Offset
from md2.distributed import Ranks
from md2.loss import LossOutput
from md2.model import Prediction
from md2.training.amp import AmpSettings
from md2.training.validate import validate

CPU = torch.device("cpu")
HEIGHT, WIDTH = 64, 96


class Constant(nn.Module):
    """Networks that see each image's depth in its brightness, at the finest scale; elsewhere there is nonsense."""

    def __init__(self) -> None:
        super().__init__()
        self.modes: list[bool] = []

    def forward(self, augmented: dict[Offset, torch.Tensor]) -> Prediction:
        self.modes.append(self.training)
        assert not torch.is_grad_enabled()
        inverse = 1 / augmented[0][:, :1]
        sigmoid = (inverse - 0.01) / (10 - 0.01)
        return Prediction({1: torch.ones_like(sigmoid), 0: sigmoid})


class Recorder:
    """A loss that is the number of the batch."""

    def __init__(self) -> None:
        self.batches = 0

    def __call__(self, batch: Batch, prediction: Prediction, *, panels: bool) -> LossOutput:
        self.batches += 1
        return LossOutput(torch.tensor(float(self.batches)), {}, {})


class Twins(Ranks):
    """One of two ranks; the other has seen the same."""

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        return values * 2


def batch(seen: list[float], true: list[float | None]) -> Batch:
    """Images whose predicted depth is `seen`, in units, and whose true one is `true`, in metres."""
    count = len(seen)
    image = torch.tensor(seen).view(-1, 1, 1, 1).expand(count, 3, HEIGHT, WIDTH)
    depth = torch.tensor([metres or 0.0 for metres in true]).view(-1, 1, 1, 1).repeat(1, 1, 375, 1242)
    sizes = torch.tensor([[375, 1242] if metres else [0, 0] for metres in true])
    K = torch.eye(3).repeat(count, 1, 1)
    return Batch({0: image * 0}, {0: image}, K, None, 5.4, depth, sizes, [f"{i}" for i in range(count)])


def run(recipe: str, batches: list[Batch], ranks: Ranks | None = None) -> tuple[dict[str, float], Constant, Recorder]:
    config: Config = load_config(recipe, ["train.device=cpu", "train.channels_last=false"])
    networks, loss = Constant(), Recorder()
    networks.train()
    arguments: list[Any] = [
        networks,
        loss,
        batches,
        config,
        ranks or Ranks(0, 1, CPU),
        AmpSettings.of(config.train, CPU),
    ]
    found, picture = validate(*arguments)
    assert picture is None
    return found, networks, loss


def test_every_image_counts_once_and_one_without_a_measurement_not_at_all() -> None:
    batches = [batch([2.0, 2.0, 4.0], [10.8, 16.2, None]), batch([4.0], [21.6])]
    found, networks, _ = run("stereo", batches)
    assert found["loss"] == pytest.approx((3 * 1 + 1 * 2) / 4)
    # 2 and 4 units are 10.8 and 21.6 metres; the second image is 5.4 metres off.
    assert found["abs_rel"] == pytest.approx((0 + 5.4 / 16.2 + 0) / 3, rel=1e-5)
    assert found["rmse"] == pytest.approx(5.4 / 3, rel=1e-5)
    assert found["a1"] == pytest.approx(2 / 3)
    assert networks.modes == [False, False] and networks.training


def test_what_one_camera_learned_is_scaled_by_the_median() -> None:
    found, _, _ = run("mono", [batch([2.0, 3.0], [10.0, 70.0])])
    assert found["abs_rel"] == pytest.approx(0, abs=1e-5)
    assert found["a1"] == 1


def test_ranks_are_added_up() -> None:
    batches = [batch([2.0, 2.0], [10.8, 16.2])]
    alone, both = (run("stereo", batches, ranks)[0] for ranks in (None, Twins(0, 2, CPU)))
    assert both == pytest.approx(alone)


def test_without_batches_there_is_nothing_and_without_depth_only_the_loss() -> None:
    assert run("stereo", [])[0] == {}
    assert run("stereo", [batch([2.0], [None])])[0] == {"loss": 1.0}
