"""The speed switches: what `auto` is on each device, what is refused, and that compiling changes no number."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from md2.config import DataConfig, LossConfig, ModelConfig, TrainConfig, load_config
from md2.data.batch import Offset
from md2.model import Networks
from md2.training.precision import Switches
from shards.errors import UsageError

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_auto_is_bfloat16_on_a_gpu_float32_on_a_cpu_and_channels_last_on_both() -> None:
    assert Switches.of(TrainConfig(), CUDA) == Switches(CUDA, torch.bfloat16, True, False)
    assert Switches.of(TrainConfig(), CPU) == Switches(CPU, None, True, False)
    explicit = TrainConfig(precision="fp16", channels_last=False, compile=True)
    assert Switches.of(explicit, CUDA) == Switches(CUDA, torch.float16, False, True)
    assert load_config(None, ["train.compile=graphs"]).train.compile == "graphs"
    assert Switches.of(TrainConfig(compile="graphs"), CUDA).compile == "graphs"


def test_graphs_are_refused_on_a_cpu() -> None:
    with pytest.raises(UsageError, match=r"train\.compile graphs needs a GPU"):
        Switches.of(TrainConfig(compile="graphs"), CPU)


def test_networks_compile_into_one_graph_with_the_same_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced as for a GPU, and run by plain operators: generating code takes a minute, and is torch's."""
    asked: list[str | None] = []
    real = partial(torch.compile, backend="aot_eager", fullgraph=True)

    def traced(networks: torch.nn.Module, mode: str | None) -> object:
        asked.append(mode)
        return real(networks)

    monkeypatch.setattr(torch, "compile", traced)
    torch.manual_seed(0)
    networks = Networks(ModelConfig(), DataConfig(stereo=True), LossConfig()).eval()
    images: dict[Offset, torch.Tensor] = {offset: torch.rand(1, 3, 64, 96) for offset in (0, -1, 1, "s")}
    compiled = Switches(CPU, None, True, True).compiled(networks)
    Switches(CUDA, torch.bfloat16, True, "graphs").compiled(networks)
    assert asked == [None, "reduce-overhead"]
    assert Switches(CPU, None, True, False).compiled(networks) is networks
    expected, found = networks(images), compiled(images)
    assert [pose.invert for pose in found.poses.values()] == [True, False]
    for one, other in zip(found.tensors(), expected.tensors(), strict=True):
        torch.testing.assert_close(one, other)
    torch._dynamo.reset()


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")  # of compiling, which are torch's: that float32 could be TF32, for one
@pytest.mark.parametrize("compiled", [True, "graphs"])
def test_compiled_training_steps_equal_plain_ones_on_the_gpu(compiled: bool) -> None:
    losses = []
    for switches in (Switches(CUDA, None, True, False), Switches(CUDA, None, True, compiled)):
        torch.manual_seed(0)
        networks = switches.prepare(Networks(ModelConfig(), DataConfig(), LossConfig()).to(CUDA))
        model = switches.compiled(networks)
        optimizer = torch.optim.SGD(networks.parameters(), lr=1e-3)
        images: dict[Offset, torch.Tensor] = {offset: torch.rand(2, 3, 64, 96, device=CUDA) for offset in (0, -1, 1)}
        for _ in range(4):  # graphs are recorded in the second, replayed after
            optimizer.zero_grad()
            total = torch.stack([tensor.float().mean() for tensor in model(switches.inputs(images)).tensors()]).sum()
            total.backward()
            optimizer.step()
        losses.append(total.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
