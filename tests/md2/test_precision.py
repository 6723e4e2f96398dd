"""The speed settings: what `auto` is on each device, what is refused, and that compiling changes no number."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from evaluation_data import HEIGHT, WIDTH, tiny_config

from md2.config import DataConfig, LossConfig, ModelConfig, TrainConfig, load_config
from md2.data.batch import Offset
from md2.evaluation.odometry import MotionPredictor
from md2.inference.predictor import Predictor
from md2.model import Networks
from md2.training.amp import AmpSettings
from shards.errors import UsageError

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_auto_is_compiled_bfloat16_on_a_gpu_float32_on_a_cpu_and_channels_last_on_both(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    capability = [(9, 0)]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability[0])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name == "triton" or None)
    assert AmpSettings.of(TrainConfig(), CUDA) == AmpSettings(CUDA, torch.bfloat16, True, True, required=False)
    assert AmpSettings.of(TrainConfig(), CPU) == AmpSettings(CPU, None, True, False, required=False)
    # Turing and Volta have units for fp16 and emulate bf16; Pascal has neither.
    for capability[0], dtype in (((8, 0), torch.bfloat16), ((7, 5), torch.float16), ((6, 1), None)):
        assert AmpSettings.of(TrainConfig(), CUDA).dtype is dtype
        assert AmpSettings.of(TrainConfig(precision="bf16"), CUDA).dtype is torch.bfloat16
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert not AmpSettings.of(TrainConfig(), CUDA).compile
    explicit = TrainConfig(precision="fp16", channels_last=False, compile=True)
    assert AmpSettings.of(explicit, CUDA) == AmpSettings(CUDA, torch.float16, False, True)
    assert load_config(None, ["train.compile=graphs"]).train.compile == "graphs"
    assert AmpSettings.of(TrainConfig(compile="graphs"), CUDA).compile == "graphs"


def test_graphs_are_refused_on_a_cpu() -> None:
    with pytest.raises(UsageError, match=r"train\.compile graphs needs a GPU"):
        AmpSettings.of(TrainConfig(compile="graphs"), CPU)


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
    compiled = AmpSettings(CPU, None, True, True).compiled(networks)
    AmpSettings(CUDA, torch.bfloat16, True, "graphs").compiled(networks)
    assert asked == [None, "reduce-overhead"]
    assert AmpSettings(CPU, None, True, False).compiled(networks) is networks
    expected, found = networks(images), compiled(images)
    assert [pose.invert for pose in found.poses.values()] == [True, False]
    for one, other in zip(found.tensors(), expected.tensors(), strict=True):
        torch.testing.assert_close(one, other)
    torch._dynamo.reset()


def test_inference_has_no_tf32_and_leaves_the_setting_as_it_was() -> None:
    cudnn: Any = torch.backends.cudnn
    config = tiny_config()
    config = config.model_copy(update={"model": config.model.model_copy(update={"pose_network": "posecnn"})})
    predictor = Predictor(Networks.of(config), config, None)
    seen: dict[str, object] = {}

    def look(name: str) -> object:
        seen[name] = cudnn.conv.fp32_precision if hasattr(cudnn, "conv") else not cudnn.allow_tf32
        if hasattr(predictor, "broken"):
            raise RuntimeError(name)
        return None

    for name in ("encoder", "depth", "pose"):
        # Odometry runs a copy of the networks with the same children.
        getattr(predictor.networks, name).register_forward_pre_hook(lambda module, inputs, name=name: look(name))
    assert cudnn.allow_tf32, "PyTorch's default has changed: this test and what it tests can go"
    images = torch.rand(1, 3, HEIGHT, WIDTH)
    predictor.disparity(images, flip=True)
    assert set(seen) == {"encoder", "depth"} and set(seen.values()) <= {"ieee", True}
    seen.clear()
    MotionPredictor(predictor).of_pairs(images, images)
    assert set(seen) == {"encoder", "depth", "pose"} and set(seen.values()) <= {"ieee", True}
    assert cudnn.allow_tf32
    predictor.broken = True  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match="encoder"):
        predictor.disparity(images)
    assert cudnn.allow_tf32


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")  # of compiling, which are torch's: that float32 could be TF32, for one
@pytest.mark.parametrize("compiled", [True, "graphs"])
def test_compiled_training_steps_equal_plain_ones_on_the_gpu(compiled: bool) -> None:
    losses = []
    for amp in (AmpSettings(CUDA, None, True, False), AmpSettings(CUDA, None, True, compiled)):
        torch.manual_seed(0)
        networks = amp.prepare(Networks(ModelConfig(), DataConfig(), LossConfig()).to(CUDA))
        model = amp.compiled(networks)
        optimizer = torch.optim.SGD(networks.parameters(), lr=1e-3)
        images: dict[Offset, torch.Tensor] = {offset: torch.rand(2, 3, 64, 96, device=CUDA) for offset in (0, -1, 1)}
        for _ in range(4):  # graphs are recorded in the second, replayed after
            optimizer.zero_grad()
            total = torch.stack([tensor.float().mean() for tensor in model(amp.inputs(images)).tensors()]).sum()
            total.backward()
            optimizer.step()
        losses.append(total.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
