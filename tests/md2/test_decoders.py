"""HR-Depth's decoder: its nodes, its size as published, and what becomes of its checkpoints."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from evaluation_data import tiny_checkpoint, tiny_config
from torch import Tensor

from md2.config import Config
from md2.inference.export import export_monodepth2, export_onnx
from md2.inference.predictor import load
from md2.model import Networks
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


@pytest.mark.parametrize("channels", [RESNET18, [0, 12, 24, 48, 96], [8, 12, 24, 48, 0]])
def test_hr_depth_equals_its_nodes_written_out(channels: list[int]) -> None:
    """By recursion from the definition; features of an encoder may begin at 1/4 or end at 1/16."""
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
        before = [node(row, earlier) for earlier in range(column) if earlier or row in features]
        x = torch.cat([*before, upsampled(F.elu(conv(node(row + 1, column - 1), f"up.{row}{column}.conv.conv")))], 1)
        if row + column == deepest:
            means = x.flatten(2).sum(2) / (x.shape[2] * x.shape[3])
            hidden = (means @ state[f"{name}.squeeze.weight"].T + state[f"{name}.squeeze.bias"]).clamp(min=0)
            weights = torch.sigmoid(hidden @ state[f"{name}.excite.weight"].T + state[f"{name}.excite.bias"])
            assert hidden.shape[1] == x.shape[1] // 16
            return conv(x * weights[:, :, None, None], f"{name}.fuse").clamp(min=0)
        if column == 1:
            return F.elu(conv(x, f"{name}.conv.conv"))
        return F.elu(conv(conv(x, f"{name}.0"), f"{name}.1.conv.conv"))

    tops = {row + 1: node(row, deepest - row) for row in range(3)}
    tops[0] = F.elu(conv(upsampled(F.elu(conv(tops[1], "last.0.conv.conv"))), "last.1.conv.conv"))
    found = decoder([features[row] for row in present])
    assert list(found) == [0, 1, 2, 3]
    for scale, disparity in found.items():
        torch.testing.assert_close(disparity, torch.sigmoid(conv(tops[scale], f"heads.{scale}.conv")))
        assert tuple(disparity.shape) == (2, 1, 128 >> scale, 192 >> scale)


def test_hr_depth_goes_to_onnx_but_not_into_an_official_folder(tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path / "hr.pt", config())
    predictor = load(path, "cpu")
    torch.testing.assert_close(
        predictor.networks.disparities(torch.full((1, 3, 64, 96), 0.2)),
        networks().disparities(torch.full((1, 3, 64, 96), 0.2)),
    )
    with torch.no_grad():  # fresh networks say 0.5 everywhere, and anything would agree
        predictor.networks.depth.heads["0"].conv.weight *= 50
    exported = export_onnx(predictor, tmp_path / "hr.onnx")
    assert exported.difference is not None
    assert exported.difference <= 1e-4
    with pytest.raises(UsageError, match=r"has model\.decoder hrdepth, .* export with --to onnx or torch$"):
        export_monodepth2(path, tmp_path / "official")
    with pytest.raises(InputError, match=r"hr\.pt: weights of another decoder .* model\.decoder=hrdepth$"):
        initialise(networks("monodepth2"), str(path))
    assert initialise(networks(), str(path)) == []
