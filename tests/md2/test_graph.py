"""The whole step as one graph: the plain step is recorded, never waits for the device, and reads new batches.

Without a GPU, a stand-in for the CUDA graph does the recorded work again, on the tensors that it was recorded with.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from train_data import QUICK, Silent, config, losses, trainer

import md2.training.graph
from md2.config import TrainConfig
from md2.distributed import Ranks
from md2.training.amp import AmpSettings
from md2.training.graph import StepGraph, why_not_whole
from md2.training.trainer import Trainer
from shards.dataset import open_dataset

pytestmark = QUICK
RUN = ["train.epochs=2", "train.lr_step_epochs=1", "train.image_every=3", "model.scales=[0]"]


class Again:
    """Does the recorded work again."""

    def __init__(self) -> None:
        self.recorded: list[Callable[[], Any]] = []

    def warm(self, work: Callable[[], Any]) -> Any:
        assert not self.recorded
        return work()

    def record(self, work: Callable[[], Any]) -> None:
        self.recorded.append(work)

    def replay(self) -> Any:
        (work,) = self.recorded
        return work()


class Refuses(Again):
    def record(self, work: Callable[[], Any]) -> None:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")


def whole(one: Trainer, kind: type[Again] = Again) -> list[Again]:
    """Have a trainer record its steps; what it makes for that."""
    made: list[Again] = []

    def make() -> Again:
        made.append(kind())
        return made[-1]

    one.graph = StepGraph(lambda batch: one._compute([batch]), one.reporter.message, make)
    return made


def test_recorded_steps_equal_plain_ones_bit_for_bit(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over two epochs with another learning rate, with panels in between; also where recording fails."""
    monkeypatch.setattr(md2.training.graph, "WARM_STEPS", 1)
    runs = {kind: trainer(dataset, tmp_path / kind, RUN) for kind in ("plain", "again", "refuses")}
    made, refused = whole(runs["again"]), whole(runs["refuses"], Refuses)
    for one in runs.values():
        one.fit()
    plain = losses(tmp_path / "plain")
    assert len(plain) > 6 and losses(tmp_path / "again") == losses(tmp_path / "refuses") == plain
    for kind in ("again", "refuses"):
        pairs = zip(
            runs["plain"].networks.state_dict().values(), runs[kind].networks.state_dict().values(), strict=True
        )
        assert all(torch.equal(ours, theirs) for ours, theirs in pairs)
    # The second learning rate needs a recording of its own; one that failed is not tried again.
    assert [len(one.recorded) for one in made] == [1, 1] and len(refused) == 1
    said = runs["refuses"].reporter
    assert isinstance(said, Silent)
    (warning,) = [message for message in said.messages if "recorded" in message]
    assert warning.endswith(
        "RuntimeError: operation not permitted when stream is capturing; train.compile=true leaves it out"
    )


class Waits(TorchDispatchMode):
    """Counts operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names = Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def test_what_is_recorded_never_waits_for_the_device(dataset: Path, tmp_path: Path) -> None:
    """With the optimiser of a GPU, which leaves the weights alone if the gradient is not finite."""
    one = trainer(dataset, tmp_path / "run", ["train.on_nan=skip"])
    trainable = [p for p in one.networks.parameters() if p.requires_grad]
    one.optimizer = torch.optim.Adam(trainable, lr=1e-3, fused=True)
    batch = next(iter(one.loader))
    one.model.train()
    with Waits() as seen:
        prediction, _, means, bad = one._compute([batch])
    assert not bad and means.isfinite().all()
    assert seen.names["_fused_adam_"] == 1 and seen.names["convolution"] > 20
    # The loss asks on the CPU alone whether the prediction is finite.
    assert seen.names["_local_scalar_dense"] == len(prediction.tensors())
    assert seen.names["nonzero"] == seen.names["lift_fresh"] == 0
    before = [p.detach().clone() for p in trainable]
    broken = batch.map(lambda tensor: tensor * torch.nan if tensor.is_floating_point() else tensor)
    assert one._compute([broken])[3]
    assert all(torch.equal(p, kept) for p, kept in zip(trainable, before, strict=True))


def test_the_whole_step_is_recorded_where_that_is_possible(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[bool] = []
    monkeypatch.setattr(AmpSettings, "of", lambda train, device: AmpSettings(device, None, True, "graphs"))
    monkeypatch.setattr(AmpSettings, "compiled", lambda self, networks, whole: compiled.append(whole) or networks)
    one, two = (trainer(dataset, tmp_path / str(n), [f"train.accumulate={n}"]) for n in (1, 2))
    assert one.graph is not None and one.optimizer.param_groups[0]["capturable"]
    assert two.graph is None and not two.optimizer.param_groups[0]["capturable"]
    assert compiled == [True, False]
    assert isinstance(two.reporter, Silent)
    assert two.reporter.messages[-1].endswith("not of the whole step: train.accumulate makes it of several batches")
    assert why_not_whole(TrainConfig(), 1, scaled=False) is None
    assert "ranks" in str(why_not_whole(TrainConfig(), 2, scaled=False))
    assert "fp16" in str(why_not_whole(TrainConfig(), 1, scaled=True))


@pytest.mark.gpu
def test_a_recorded_step_equals_the_plain_one_on_the_gpu(dataset: Path, tmp_path: Path) -> None:
    extra = [*RUN, "train.device=gpu", "train.precision=float32"]
    found = []
    for compile_ in ("false", "graphs"):
        settings = config(dataset, "mono_stereo", [*extra, f"train.compile={compile_}"])
        place = Ranks(0, 1, torch.device("cuda", 0))
        (tmp_path / compile_).mkdir()
        Trainer(settings, open_dataset(str(dataset)), tmp_path / compile_, place, Silent()).fit()
        found.append(losses(tmp_path / compile_))
    assert found[1] == pytest.approx(found[0], rel=1e-2)
