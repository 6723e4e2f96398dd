"""Decoders for encoders that lack a feature; HR-Depth's nodes, its size as published, and its checkpoints."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from evaluation_data import tiny_checkpoint, tiny_config
from torch import Tensor

from md2.config import Config
from md2.inference.export import export_monodepth2
from md2.model import Networks
from md2.networks.decoder import DepthDecoder
from md2.networks.hrdepth import HRDepthDecoder
from md2.weights import initialise
from shards.errors import InputError, UsageError

RESNET18 = [64, 64, 128, 256, 512]


def config(decoder: str = "hrdepth") -> Config:
    plain = tiny_config(stereo=True)
    return plain.model_copy(update={"model": plain.model.model_copy(update={"decoder": decoder})})


def networks(decoder: str = "hrdepth") -> Networks:
    torch.manual_seed(0)
    chosen = config(decoder)
    return Networks(chosen.model, chosen.data, chosen.loss).eval()


def test_hr_depth_has_the_published_number_of_parameters() -> None:
    """14.62 million with ResNet-18 and its classifier (Lyu et al., table 2), counting convolutions that nothing reads:

    those that would upsample the nodes (0, 0) to (0, 3) beyond the top row, 64 -> 32 and three times 32 -> 16 channels.
    """
    count = sum(parameter.numel() for parameter in networks().parameters())
    unread = (9 * 64 * 32 + 32) + 3 * (9 * 32 * 16 + 16)
    assert round((count + unread) / 1e6, 2) == 14.62
    assert count == 14_582_992


@pytest.mark.parametrize("channels", [RESNET18, [0, 12, 24, 48, 96], [0, 0, 0, 16, 0]])
def test_hr_depth_equals_its_nodes_written_out(channels: list[int]) -> None:
    """By recursion from the definition; the features may begin at 1/4, or be a single one at 1/16."""
    torch.manual_seed(1)
    decoder = HRDepthDecoder(channels, [0, 1, 2, 3]).double()
    state = decoder.state_dict()
    present = [row for row, count in enumerate(channels) if count]
    deepest = present[-1]
    features = {row: torch.rand(2, channels[row], 64 >> row, 96 >> row, dtype=torch.float64) for row in present}

    def conv(x: Tensor, name: str) -> Tensor:
        weight = state[f"{name}.weight"]
        padded = F.pad(x, (1, 1, 1, 1), mode="reflect") if weight.shape[2] == 3 else x
        return F.conv2d(padded, weight, state[f"{name}.bias"])

    def upsampled(x: Tensor) -> Tensor:
        return x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)

    @cache
    def node(row: int, column: int) -> Tensor:
        if column == 0:
            return features[row]
        name = f"nodes.{row}{column}"
        before = [node(row, earlier) for earlier in range(column) if row + earlier in features]
        x = torch.cat([*before, upsampled(F.elu(conv(node(row + 1, column - 1), f"up.{row}{column}.conv.conv")))], 1)
        if row + column == deepest:
            means = x.flatten(2).sum(2) / (x.shape[2] * x.shape[3])
            hidden = (means @ state[f"{name}.squeeze.weight"].T + state[f"{name}.squeeze.bias"]).clamp(min=0)
            weights = torch.sigmoid(hidden @ state[f"{name}.excite.weight"].T + state[f"{name}.excite.bias"])
            assert hidden.shape[1] == x.shape[1] // 16
            return conv(x * weights[:, :, None, None], f"{name}.fuse").clamp(min=0)
        if f"{name}.conv.conv.weight" in state:
            assert column == 1
            return F.elu(conv(x, f"{name}.conv.conv"))
        return F.elu(conv(conv(x, f"{name}.0"), f"{name}.1.conv.conv"))

    tops = {row + 1: node(row, deepest - row) for row in range(3)}
    tops[0] = F.elu(conv(upsampled(F.elu(conv(tops[1], "last.0.conv.conv"))), "last.1.conv.conv"))
    found = decoder([features[row] for row in present])
    assert list(found) == [0, 1, 2, 3]
    for scale, disparity in found.items():
        torch.testing.assert_close(disparity, torch.sigmoid(conv(tops[scale], f"heads.{scale}.conv")))
        assert tuple(disparity.shape) == (2, 1, 128 >> scale, 192 >> scale)


@pytest.mark.parametrize("missing", [[0], [0, 1], [4]])
def test_monodepth2_s_decoder_upsamples_where_the_encoder_has_no_feature(missing: list[int]) -> None:
    """As the whole decoder does with weights of 0 for that feature, or none of the stages below the deepest one."""
    torch.manual_seed(2)
    channels = [0 if level in missing else count for level, count in enumerate([6, 8, 10, 12, 14])]
    partial = DepthDecoder(channels, [0, 1, 2, 3])
    features = {level: torch.rand(2, c, 32 >> level, 48 >> level) for level, c in enumerate(channels) if c}
    found = partial(list(features.values()))
    assert [tuple(found[scale].shape) for scale in range(4)] == [(2, 1, 64 >> s, 96 >> s) for s in range(4)]
    state = partial.state_dict()
    if 4 in missing:
        assert not any(key.startswith(("decoder.0.", "decoder.1.")) for key in state)
        assert state["decoder.2.conv.conv.weight"].shape[1] == 12
        return
    whole = DepthDecoder([6, 8, 10, 12, 14], [0, 1, 2, 3])
    filled = {key: torch.zeros_like(value) for key, value in whole.state_dict().items()}
    for key, value in state.items():
        # The upsampled channels come first, then the feature's.
        filled[key][tuple(slice(side) for side in value.shape)] = value
    whole.load_state_dict(filled)
    for level in missing:
        features[level] = torch.rand(2, 6 + 2 * level, 32 >> level, 48 >> level)
    expected = whole([features[level] for level in range(5)])
    for scale in range(4):
        torch.testing.assert_close(found[scale], expected[scale])


def test_hr_depth_does_not_go_into_an_official_folder(tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path / "hr.pt", config())
    with pytest.raises(UsageError, match=r"has model\.decoder hrdepth, .* export with --to onnx or torch$"):
        export_monodepth2(path, tmp_path / "official")
    with pytest.raises(InputError, match=r"hr\.pt: weights of another decoder .* model\.decoder=hrdepth$"):
        initialise(networks("monodepth2"), str(path))
    assert initialise(networks(), str(path)) == []
