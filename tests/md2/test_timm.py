"""Encoders of timm: the same features as ours, weights in and out, missing strides, and what is refused."""

from __future__ import annotations

import hashlib
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluation_data import tiny_checkpoint, tiny_config
from safetensors.torch import save_file
from torch import nn
from train_data import train

from md2.checkpoint import load_checkpoint
from md2.config import Config
from md2.inference.export import export_monodepth2, export_onnx
from md2.inference.predictor import load
from md2.model import Networks
from md2.networks.resnet import ResNetEncoder
from md2.networks.timm_encoder import TimmEncoder, _timm
from md2.weights import initialise
from shards.errors import InputError, UsageError

SIZE = (64, 96)


def config(stereo: bool = False, **model: Any) -> Config:
    """At 96x64, with timm's smallest ConvNeXt, whose first feature is at 1/4."""
    plain = tiny_config(stereo=stereo)
    changes = {"encoder": "timm/test_convnext", "pose_network": "separate_resnet", **model}
    return plain.model_copy(update={"model": plain.model.model_copy(update=changes)})


def networks(**changes: Any) -> Networks:
    torch.manual_seed(0)
    chosen = config(**changes)
    return Networks(chosen.model, chosen.data, chosen.loss).eval()


def test_timm_s_resnet18_has_the_features_of_ours(tmp_path: Path) -> None:
    torch.manual_seed(0)
    ours = ResNetEncoder("resnet18").double().eval()
    for module in ours.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_var, 0.5, 1.5)  # type: ignore[arg-type]
            nn.init.uniform_(module.weight)
            nn.init.uniform_(module.bias)
    torch.save(ours.encoder.state_dict(), tmp_path / "resnet18.pth")
    both = networks(encoder="timm/resnet18").double()
    assert isinstance(both.encoder, TimmEncoder) and isinstance(both.pose_encoder, ResNetEncoder)
    assert initialise(both, str(tmp_path / "resnet18.pth")) == ["pose_encoder"]
    images = torch.rand(2, 3, *SIZE, dtype=torch.float64)
    mean, std = (
        torch.tensor(row, dtype=torch.float64).view(3, 1, 1) for row in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    )
    # Each normalises as its weights were trained: the same numbers go into the first layer.
    theirs = both.encoder((images - 0.45) / 0.225 * std + mean)
    expected = ours(images)
    assert both.encoder.channels == ours.channels
    for found, feature in zip(theirs, expected, strict=True):
        assert (found - feature).abs().max() <= 1e-6 * feature.abs().max()


def test_a_convnext_is_trained_saved_exported_and_loaded(dataset: Path, tmp_path: Path) -> None:
    """Its stride of 2 is missing; the pose encoder is a timm model too, of two images."""
    extra = ["model.encoder=timm/test_convnext", "model.decoder=hrdepth", "model.pose_encoder=timm/test_resnet"]
    extra += ["train.max_steps=2", "train.val_batches=1"]
    train(dataset, tmp_path / "run", "mono", extra)
    last = tmp_path / "run" / "checkpoints" / "last.pt"
    states = load_checkpoint(last).networks
    assert states["pose_encoder"]["model.conv1.0.weight"].shape[1] == 6
    fresh = networks(decoder="hrdepth").encoder.state_dict()
    assert [key for key, value in fresh.items() if states["encoder"][key].shape != value.shape] == []
    predictor = load(tmp_path / "run", "cpu")
    assert torch.equal(predictor.networks.encoder.mean, torch.full((1, 3, 1, 1), 0.5)), "its own, not ImageNet's"
    with torch.no_grad():  # after two steps it says 0.5 everywhere, and anything would agree
        predictor.networks.depth.heads["0"].conv.weight *= 50
    disparity = predictor.networks.disparities(torch.rand(1, 3, *SIZE))[0]
    assert disparity.max() - disparity.min() > 0.1
    exported = export_onnx(predictor, tmp_path / "depth.onnx")
    assert exported.difference is not None
    assert exported.difference <= 1e-4
    with pytest.raises(UsageError, match=r"has model\.encoder timm/test_convnext, .* --to onnx or torch$"):
        export_monodepth2(last, tmp_path / "official")


@pytest.mark.parametrize("decoder", ["monodepth2", "hrdepth"])
@pytest.mark.parametrize("encoder", ["test_convnext", "test_vit", "test_efficientnet"])
def test_every_feature_is_used_and_every_parameter_learns(encoder: str, decoder: str) -> None:
    """A first feature at 1/4, one feature at 1/16, all five."""
    one = networks(stereo=True, encoder=f"timm/{encoder}", decoder=decoder).train()
    assert isinstance(one.encoder, TimmEncoder)
    features = [feature.detach().requires_grad_() for feature in one.encoder(torch.rand(2, 3, *SIZE))]
    grads = torch.autograd.grad(one.depth(features)[0].sum(), features)
    assert all(grad.abs().max() > 0 for grad in grads)
    disparities = one.disparities(torch.rand(2, 3, *SIZE))
    assert [tuple(disparities[s].shape) for s in range(4)] == [(2, 1, SIZE[0] >> s, SIZE[1] >> s) for s in range(4)]
    torch.stack([disparity.square().mean() for disparity in disparities.values()]).sum().backward()
    assert [name for name, p in one.named_parameters() if p.grad is None] == []


def test_shared_pose_network_reads_the_deepest_feature() -> None:
    one = networks(encoder="timm/test_vit", pose_network="shared")
    images = {offset: torch.rand(1, 3, *SIZE) for offset in (0, -1, 1)}
    assert one.pose.net[0].weight.shape[1] == 64
    assert one(images).poses[1].axis_angle.shape == (1, 3)


def published(folder: Path, name: str) -> tuple[Path, dict[str, torch.Tensor]]:
    """A file as timm publishes it: the whole classifier, the hash in its name."""
    torch.manual_seed(7)
    state = _timm().create_model(name).state_dict()
    plain = folder / "plain.pth"
    torch.save(state, plain)
    digest = hashlib.sha256(plain.read_bytes()).hexdigest()
    return plain.rename(folder / f"{name}-{digest[:8]}.pth"), state


@pytest.mark.parametrize("damaged", [False, True])
def test_imagenet_weights_come_through_timm(damaged: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a URL whose hash timm checks, into both encoders; the pose encoder's first layer for two images."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    file, state = published(tmp_path, "test_resnet")
    if damaged:
        file = file.rename(tmp_path / "test_resnet-00000000.pth")
    registry = sys.modules["timm.models._registry"]._model_pretrained_cfgs  # type: ignore[attr-defined]
    for name in [name for name in registry if name.partition(".")[0] == "test_resnet"]:
        monkeypatch.setitem(registry, name, replace(registry[name], hf_hub_id=None, url=file.as_uri()))
    both = networks(encoder="timm/test_resnet", pose_encoder="timm/test_resnet")
    if damaged:
        with pytest.raises(
            InputError, match=r"ImageNet weights of timm/test_resnet: invalid hash value.* model\.weights"
        ):
            initialise(both, "imagenet")
        return
    assert initialise(both, "imagenet") == []
    depth, pose = both.encoder.state_dict(), both.pose_encoder.state_dict()
    assert torch.equal(depth["model.conv1.0.weight"], state["conv1.0.weight"])
    assert torch.equal(depth["model.layer4.0.bn2.bias"], state["layer4.0.bn2.bias"])
    torch.testing.assert_close(pose["model.conv1.0.weight"], torch.cat([state["conv1.0.weight"] / 2] * 2, dim=1))
    assert torch.equal(pose["model.layer1.0.conv1.weight"], state["layer1.0.conv1.weight"])


def test_weights_from_a_file(tmp_path: Path) -> None:
    """As safetensors, which the hub has, and as a run of md2; other weights are refused in one line."""
    _, state = published(tmp_path, "test_convnext")
    save_file(state, tmp_path / "model.safetensors")
    one = networks()
    assert initialise(one, str(tmp_path / "model.safetensors")) == ["pose_encoder"]
    assert torch.equal(
        one.encoder.state_dict()["model.stages_3.blocks.0.norm.weight"], state["stages.3.blocks.0.norm.weight"]
    )
    again = networks()
    assert initialise(again, str(tiny_checkpoint(tmp_path / "run.pt", config(), seed=3))) == []
    assert not torch.equal(
        again.depth.state_dict()["decoder.0.conv.conv.bias"], one.depth.state_dict()["decoder.0.conv.conv.bias"]
    )
    for other, path in ((networks(encoder="timm/test_vit"), "model.safetensors"), (one, "none.safetensors")):
        (tmp_path / "none.safetensors").write_bytes(b"nothing")
        with pytest.raises(
            InputError, match=rf"{path}: not (weights of timm/test_\w+|a safetensors file of weights): "
        ) as caught:
            initialise(other, str(tmp_path / path))
        assert "\n" not in str(caught.value)


def test_what_cannot_be_an_encoder_is_one_line(monkeypatch: pytest.MonkeyPatch, dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"timm/convnext_tinny: timm [\d.]+ has no such model"):
        networks(encoder="timm/convnext_tinny")
    with pytest.raises(UsageError, match=r"timm/convnext: .*did you mean timm/convnext_\w+ or "):
        networks(encoder="timm/convnext")
    with pytest.raises(
        UsageError, match=r"timm/inception_v3: its features, of strides \[2, 4, 8, 16, 32\], do not fit"
    ):
        networks(encoder="timm/inception_v3")
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UsageError, match=r"needs timm: pip install 'md2\[timm\]'$"):
        train(dataset, tmp_path / "run", "mono", ["model.encoder=timm/test_convnext"])
    assert not (tmp_path / "run").exists()
