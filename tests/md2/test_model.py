"""Networks: names, shapes, order of frames, and each option's effect on what comes out."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from md2.config import DataConfig, LossConfig, ModelConfig
from md2.data.batch import Offset
from md2.model import Networks, Pose
from md2.networks.decoder import Reflect
from md2.networks.pose import PoseDecoder
from md2.networks.resnet import BatchNorm, ResNetEncoder
from shards.errors import InputError

# Official checkpoint layout: parameters of the depth decoder, number -> (outputs, inputs).
DECODER = [(256, 512), (256, 512), (128, 256), (128, 256), (64, 128), (64, 128), (32, 64), (32, 96), (16, 32), (16, 16)]
HEADS = [(1, 16), (1, 32), (1, 64), (1, 128)]


def build(
    model: dict[str, Any] | None = None,
    frames: tuple[int, ...] = (0, -1, 1),
    stereo: bool = False,
    mask: bool = False,
    seed: int = 0,
) -> Networks:
    torch.manual_seed(seed)
    loss = LossConfig(predictive_mask=mask, disable_automasking=mask)
    data = DataConfig(frames=list(frames), stereo=stereo)
    return Networks(ModelConfig(**(model or {})), data, loss).eval()


def images(frames: tuple[Offset, ...] = (0, -1, 1), batch: int = 2, seed: int = 1) -> dict[Offset, torch.Tensor]:
    torch.manual_seed(seed)
    return {offset: torch.rand(batch, 3, 64, 96) for offset in frames}


def test_batch_normalisation_is_pytorchs_but_for_the_count() -> None:
    ours, theirs = BatchNorm(5), nn.BatchNorm2d(5)
    for norm in (ours, theirs):
        nn.init.constant_(norm.weight, 1.5)
    found = []
    for norm in (ours, theirs):
        torch.manual_seed(0)
        found.append([norm(3 + torch.randn(4, 5, 3, 2)) for _ in range(2)] + [norm.eval()(torch.rand(1, 5, 2, 2))])
    assert all(map(torch.equal, *found))
    assert theirs.num_batches_tracked == 2 and ours.num_batches_tracked == 0
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert torch.equal(ours.running_mean, theirs.running_mean) and torch.equal(ours.running_var, theirs.running_var)


def test_state_dict_names_and_shapes_are_the_official_ones() -> None:
    states = build().state_dicts()
    assert list(states) == ["encoder", "depth", "pose_encoder", "pose"]
    depth = {}
    for index, (outputs, inputs) in enumerate(DECODER):
        depth[f"decoder.{index}.conv.conv.weight"] = (outputs, inputs, 3, 3)
        depth[f"decoder.{index}.conv.conv.bias"] = (outputs,)
    for index, (outputs, inputs) in enumerate(HEADS, start=10):
        depth[f"decoder.{index}.conv.weight"] = (outputs, inputs, 3, 3)
        depth[f"decoder.{index}.conv.bias"] = (outputs,)
    assert {key: tuple(value.shape) for key, value in states["depth"].items()} == depth
    pose = {f"net.{i}.weight": s for i, s in enumerate([(256, 512, 1, 1), (256, 256, 3, 3), (256, 256, 3, 3)])}
    pose |= {"net.3.weight": (12, 256, 1, 1), "net.3.bias": (12,)} | {f"net.{i}.bias": (256,) for i in range(3)}
    assert {key: tuple(value.shape) for key, value in states["pose"].items()} == pose
    assert tuple(states["pose_encoder"]["encoder.conv1.weight"].shape) == (64, 6, 7, 7)
    assert len(states["encoder"]) == len(states["pose_encoder"]) == 122
    assert tuple(states["encoder"]["encoder.fc.weight"].shape) == (1000, 512)


@pytest.mark.parametrize(
    ("name", "parameters", "channels"),
    [
        # Parameter counts that torchvision's documentation gives for the ImageNet classifiers.
        ("resnet18", 11_689_512, [64, 64, 128, 256, 512]),
        ("resnet34", 21_797_672, [64, 64, 128, 256, 512]),
        ("resnet50", 25_557_032, [64, 256, 512, 1024, 2048]),
        ("resnet101", 44_549_160, [64, 256, 512, 1024, 2048]),
        ("resnet152", 60_192_808, [64, 256, 512, 1024, 2048]),
    ],
)
def test_encoder_sizes(name: str, parameters: int, channels: list[int]) -> None:
    with torch.device("meta"):
        encoder = ResNetEncoder(name)
        features = encoder(torch.empty(1, 3, 64, 96))
    assert sum(p.numel() for p in encoder.parameters()) == parameters
    assert [tuple(f.shape) for f in features] == [(1, c, 64 >> i, 96 >> i) for i, c in enumerate(channels, start=1)]
    strided = [n for n, m in encoder.named_modules() if isinstance(m, nn.Conv2d) and m.stride == (2, 2)]
    inner = "conv1" if name in ("resnet18", "resnet34") else "conv2"
    assert strided[1:] == [f"encoder.layer{i}.0.{part}" for i in (2, 3, 4) for part in (inner, "downsample.0")]


def test_encoder_normalises_its_input() -> None:
    encoder = ResNetEncoder("resnet18").eval()
    first = encoder(torch.full((1, 3, 32, 32), 0.45))[0]
    # All pixels at the mean: the convolution sees zeros, and fresh batch norm passes zero on.
    assert first.abs().max().item() < 1e-6
    one = encoder(torch.full((1, 3, 32, 32), 0.45 + 0.225))[0]
    expected = torch.relu(encoder.encoder.conv1(torch.ones(1, 3, 32, 32)) / (1 + 1e-5) ** 0.5)
    torch.testing.assert_close(one, expected)


def test_resnet18_equals_the_layers_written_out() -> None:
    """One pass through stage 2 by hand: stride on the first convolution, shortcut, ReLU after the sum."""
    torch.manual_seed(0)
    encoder = ResNetEncoder("resnet18").eval()
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_var, 0.5, 1.5)  # type: ignore[arg-type]
            nn.init.uniform_(module.weight)
            nn.init.uniform_(module.bias)
    features = encoder(torch.rand(2, 3, 32, 32))
    state = encoder.encoder.state_dict()

    def conv(x: torch.Tensor, name: str, norm: str, stride: int, padding: int) -> torch.Tensor:
        y = nn.functional.conv2d(x, state[f"{name}.weight"], stride=stride, padding=padding)
        mean, var, weight, bias = (state[f"{norm}.{k}"] for k in ("running_mean", "running_var", "weight", "bias"))
        return (y - mean.view(1, -1, 1, 1)) / (var.view(1, -1, 1, 1) + 1e-5).sqrt() * weight.view(
            1, -1, 1, 1
        ) + bias.view(1, -1, 1, 1)

    x = features[1]
    y = conv(x, "layer2.0.conv1", "layer2.0.bn1", 2, 1).relu()
    y = conv(y, "layer2.0.conv2", "layer2.0.bn2", 1, 1)
    x = (y + conv(x, "layer2.0.downsample.0", "layer2.0.downsample.1", 2, 0)).relu()
    y = conv(x, "layer2.1.conv1", "layer2.1.bn1", 1, 1).relu()
    x = (conv(y, "layer2.1.conv2", "layer2.1.bn2", 1, 1) + x).relu()
    torch.testing.assert_close(features[2], x, rtol=1e-4, atol=1e-4)


def test_decoder_equals_the_stages_written_out() -> None:
    networks = build(seed=3)
    x = images()[0]
    features = networks.encoder(x)
    state = networks.depth.state_dict()

    def block(y: torch.Tensor, index: int) -> torch.Tensor:
        padded = nn.ReflectionPad2d(1)(y)
        return nn.functional.elu(
            nn.functional.conv2d(
                padded, state[f"decoder.{index}.conv.conv.weight"], state[f"decoder.{index}.conv.conv.bias"]
            )
        )

    y, expected = features[4], {}
    for step, scale in enumerate((4, 3, 2, 1, 0)):
        y = block(y, 2 * step).repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
        y = block(torch.cat([y, features[scale - 1]], dim=1) if scale else y, 2 * step + 1)
        if scale < 4:
            weight, bias = state[f"decoder.{10 + scale}.conv.weight"], state[f"decoder.{10 + scale}.conv.bias"]
            expected[scale] = nn.functional.conv2d(nn.ReflectionPad2d(1)(y), weight, bias).sigmoid()
    found = networks.disparities(x)
    assert list(found) == [0, 1, 2, 3]
    for scale, disparity in found.items():
        torch.testing.assert_close(disparity, expected[scale])
        assert tuple(disparity.shape) == (2, 1, 64 >> scale, 96 >> scale)


@pytest.mark.parametrize("network", ["separate_resnet", "shared", "posecnn"])
def test_pairs_enter_in_temporal_order_and_backward_ones_are_inverted(network: str) -> None:
    networks = build({"pose_network": network})
    frames = images()
    poses = networks(frames).poses
    assert [(offset, pose.invert, pose.relative) for offset, pose in poses.items()] == [
        (-1, True, network == "posecnn"),
        (1, False, network == "posecnn"),
    ]
    # The pair (t, t+1) of a sample whose target is our t-1 and whose t+1 is our target: the same two images.
    shifted: dict[Offset, torch.Tensor] = {0: frames[-1], 1: frames[0], -1: frames[-1]}
    same = networks(shifted).poses[1]
    torch.testing.assert_close(same.axis_angle, poses[-1].axis_angle)
    torch.testing.assert_close(same.translation, poses[-1].translation)
    assert not torch.allclose(poses[1].axis_angle, poses[-1].axis_angle, rtol=1e-3)
    identity = torch.eye(4).expand(2, 4, 4)
    torch.testing.assert_close(same.transform() @ poses[-1].transform(), identity, atol=1e-5, rtol=0)


@pytest.mark.parametrize("network", ["separate_resnet", "shared", "posecnn"])
def test_one_batch_of_pairs_equals_separate_passes(network: str) -> None:
    together = build({"pose_network": network})
    alone = build({"pose_network": network}, frames=(0, 1))
    alone.load_networks(together.state_dicts())
    frames = images()
    torch.testing.assert_close(together(frames).poses[1].axis_angle, alone(frames).poses[1].axis_angle)


@pytest.mark.parametrize("network", ["separate_resnet", "shared", "posecnn"])
def test_all_frames_at_once_give_one_motion_per_source(network: str) -> None:
    networks = build({"pose_network": network, "pose_input": "all"}, frames=(0, -1, 1, 2), stereo=True)
    frames = images((0, -1, 1, 2))
    poses = networks(frames).poses
    assert list(poses) == [-1, 1, 2]
    assert not any(pose.invert for pose in poses.values())
    assert not torch.allclose(poses[-1].axis_angle, poses[1].axis_angle, rtol=1e-3)
    # Every frame has a say in every motion, unlike with pairs.
    frames[2] = frames[2].flip(3)
    assert not torch.allclose(networks(frames).poses[-1].axis_angle, poses[-1].axis_angle, rtol=1e-6, atol=0)
    # They enter in the order of `frames`, not of time: two offsets that change places change places.
    swapped = build({"pose_network": network, "pose_input": "all"}, frames=(0, 2, 1, -1), stereo=True)
    swapped.load_networks(networks.state_dicts())
    exchanged = swapped({0: frames[0], -1: frames[2], 1: frames[1], 2: frames[-1]}).poses
    for first, second in ((-1, 2), (1, 1), (2, -1)):
        torch.testing.assert_close(exchanged[second].axis_angle, networks(frames).poses[first].axis_angle)
    pairs = build({"pose_network": network}, frames=(0, -1, 1, 2))
    before = pairs(images((0, -1, 1, 2))).poses[-1].axis_angle
    torch.testing.assert_close(pairs(frames).poses[-1].axis_angle, before)


def test_posecnn_equals_its_convolutions_written_out() -> None:
    networks = build({"pose_network": "posecnn"}, frames=(0, 1))
    frames = images((0, 1))
    state = networks.pose.state_dict()
    x = torch.cat([frames[0], frames[1]], dim=1)  # not normalised
    for index, size in enumerate((7, 5, 3, 3, 3, 3, 3)):
        weight = state[f"net.{index}.weight"]
        assert weight.shape[2] == size
        x = nn.functional.conv2d(x, weight, state[f"net.{index}.bias"], 2, size // 2).relu()
    x = nn.functional.conv2d(x, state["pose_conv.weight"], state["pose_conv.bias"]).mean((2, 3)) * 0.01
    pose = networks(frames).poses[1]
    torch.testing.assert_close(torch.cat([pose.axis_angle, pose.translation], dim=1), x)


def test_pose_decoder_equals_its_convolutions_written_out() -> None:
    networks = build({"pose_network": "shared"}, frames=(0, 1))
    frames = images((0, 1))
    state = networks.pose.state_dict()

    def conv(x: torch.Tensor, index: int, padding: int) -> torch.Tensor:
        return nn.functional.conv2d(x, state[f"net.{index}.weight"], state[f"net.{index}.bias"], padding=padding)

    x = torch.cat([conv(networks.encoder(frames[o])[-1], 0, 0).relu() for o in (0, 1)], dim=1)
    x = conv(conv(conv(x, 1, 1).relu(), 2, 1).relu(), 3, 0).mean((2, 3)) * 0.01
    pose = networks(frames).poses[1]
    torch.testing.assert_close(torch.cat([pose.axis_angle, pose.translation], dim=1), x, rtol=1e-4, atol=1e-7)


def test_official_channels_are_six_numbers_for_one_motion_after_the_other() -> None:
    """Of the 12 that a pair network has, the first six are read; `all` has six a source."""
    decoder = PoseDecoder([64, 64, 128, 256, 512], inputs=1, motions=2)
    with torch.no_grad():
        decoder.net[3].weight.zero_()
        decoder.net[3].bias.copy_(torch.arange(12.0))
    motions = decoder([torch.rand(3, 512, 2, 3)])
    torch.testing.assert_close(motions, 0.01 * torch.arange(12.0).view(1, 2, 6).expand(3, 2, 6))
    networks = build()
    networks.pose.load_state_dict(decoder.state_dict())
    for pose in networks(images()).poses.values():
        torch.testing.assert_close(pose.axis_angle, torch.tensor([[0.0, 0.01, 0.02]]).expand(2, 3))
        torch.testing.assert_close(pose.translation, torch.tensor([[0.03, 0.04, 0.05]]).expand(2, 3))


def test_relative_translation_is_multiplied_by_the_mean_inverse_depth() -> None:
    pose = Pose(torch.zeros(1, 3), torch.tensor([[1.0, 2.0, 3.0]]), relative=True)
    depth = torch.tensor([0.5, 0.25]).view(1, 1, 1, 2)  # inverse depths 2 and 4
    torch.testing.assert_close(pose.transform(depth)[0, :3, 3], torch.tensor([3.0, 6.0, 9.0]))
    torch.testing.assert_close(pose.transform()[0, :3, 3], torch.tensor([1.0, 2.0, 3.0]))


def test_stereo_alone_has_no_pose_network() -> None:
    networks = build(frames=(0,), stereo=True)
    assert list(networks.state_dicts()) == ["encoder", "depth"]
    assert networks({0: images()[0]}).poses == {}


def test_predictive_mask_has_one_channel_per_source() -> None:
    networks = build(stereo=True, mask=True)
    assert list(networks.state_dicts()) == ["encoder", "depth", "pose_encoder", "pose", "predictive_mask"]
    masks = networks(images()).masks
    assert {s: tuple(mask.shape) for s, mask in masks.items()} == {s: (2, 3, 64 >> s, 96 >> s) for s in range(4)}
    assert all(mask.min() > 0 and mask.max() < 1 for mask in masks.values())
    assert build().eval()(images()).masks == {}


def test_scales_choose_the_heads() -> None:
    networks = build({"scales": [0, 2]})
    assert list(networks.disparities(images()[0])) == [0, 2]
    heads = {k: tuple(v.shape)[1] for k, v in networks.depth.state_dict().items() if "conv.conv" not in k and "w" in k}
    assert heads == {"decoder.10.conv.weight": 16, "decoder.11.conv.weight": 64}


@pytest.mark.parametrize(
    ("model", "frames", "stereo", "mask"),
    [
        ({}, (0, -1, 1), False, False),
        ({"pose_network": "shared"}, (0, -1, 1), True, True),
        ({"pose_network": "posecnn", "pose_input": "all"}, (0, -1, 1), False, False),
        ({"scales": [0]}, (0,), True, False),
        ({"decoder": "hrdepth"}, (0,), True, True),
        ({"decoder": "hrdepth", "scales": [0]}, (0,), True, False),
    ],
)
def test_every_trainable_parameter_gets_a_gradient(
    model: dict[str, Any], frames: tuple[int, ...], stereo: bool, mask: bool
) -> None:
    """DistributedDataParallel waits for each one: what no loss reaches must be frozen, and nothing else."""
    networks = build(model, frames, stereo, mask).train()
    prediction = networks(images())
    maps = [*prediction.disparities.values(), *prediction.masks.values()]
    motions = [t for pose in prediction.poses.values() for t in (pose.axis_angle, pose.translation)]
    torch.stack([t.square().mean() for t in itertools.chain(maps, motions)]).sum().backward()
    assert [name for name, p in networks.named_parameters() if p.requires_grad == (p.grad is None)] == []
    assert all(".fc." in name for name, p in networks.named_parameters() if not p.requires_grad)


def test_odometry_and_depth_alone_equal_the_whole() -> None:
    networks = build({"pose_network": "shared"})
    frames = images()
    whole = networks(frames)
    torch.testing.assert_close(networks.poses(frames)[-1].axis_angle, whole.poses[-1].axis_angle)
    torch.testing.assert_close(networks.disparities(frames[0])[0], whole.disparities[0])


def test_states_that_do_not_fit_are_named_and_nothing_is_loaded() -> None:
    networks = build()
    states = {name: dict(state) for name, state in build(seed=9).state_dicts().items()}
    before = networks.depth.state_dict()["decoder.0.conv.conv.bias"].clone()
    states["depth"]["decoder.9.typo"] = states["depth"].pop("decoder.9.conv.conv.bias")
    states["pose"]["net.3.bias"] = torch.zeros(6)
    del states["pose_encoder"]
    with pytest.raises(InputError) as caught:
        networks.load_networks(states, "some file")
    message = str(caught.value)
    assert message.startswith("some file does not fit")
    for part in (
        "missing sub-networks: pose_encoder",
        "depth: missing keys: decoder.9.conv.conv.bias",
        "depth: extra keys: decoder.9.typo",
        "pose: other shapes: net.3.bias (6,) instead of (12,)",
    ):
        assert part in message
    assert torch.equal(networks.depth.state_dict()["decoder.0.conv.conv.bias"], before)


def test_official_files_without_counters_or_classifier_are_whole() -> None:
    networks, other = build(), build(seed=9)
    states = {
        name: {k: v for k, v in state.items() if "num_batches" not in k and ".fc." not in k}
        for name, state in other.state_dicts().items()
    }
    networks.load_networks(states)
    frames = images()
    assert torch.equal(networks(frames).disparities[0], other(frames).disparities[0])


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", [(2, 3), (5, 4), (2, 2)])
def test_padding_on_a_gpu_is_reflection(size: tuple[int, int], layout: torch.memory_format) -> None:
    """The same numbers and gradients as torch's own, in the memory format that came in."""
    x = torch.rand(2, 3, *size, dtype=torch.float64).to(memory_format=layout).requires_grad_()
    weights = torch.rand(2, 3, size[0] + 2, size[1] + 2, dtype=torch.float64)
    padded, expected = Reflect.apply(x), F.pad(x, (1, 1, 1, 1), mode="reflect")
    assert torch.equal(padded, expected)
    assert padded.is_contiguous(memory_format=layout)
    found, own = (torch.autograd.grad((one * weights).sum(), x)[0] for one in (padded, expected))
    torch.testing.assert_close(found, own)
