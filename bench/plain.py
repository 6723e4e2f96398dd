"""The method trained the plain way, from raw PNGs: what `md2 bench parity` holds md2 against.

Frames are decoded, flipped and resized by Pillow, every level of the target's pyramid by its antialiasing LANCZOS
filter from the level above; colours are jittered image by image in a random order; each pair of frames goes through
the pose network by itself; PyTorch's DataLoader makes the batches; `bench.reference` is the loss. The networks are
md2's, so that both start from the same weights. Written from the paper (Godard et al., ICCV 2019, section 4), its
supplement and torchvision's documentation of `ColorJitter`.

A `deviation` turns on one thing that md2 does otherwise, and nothing else: flips, jitter and order are still those of
the seed.
"""

from __future__ import annotations

import io
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, RandomSampler

from bench.reference import photometric, predict, smoothness, warp
from md2.config import DataConfig, LossConfig, ModelConfig
from md2.data.augment import Jitter, camera_matrices
from md2.data.batch import Offset
from md2.loss import image_pyramid
from md2.model import Networks, Prediction
from md2.networks.pose import OUTPUT_SCALE
from prep.packing.encode import ImageFormat, encode

DEVIATIONS = {
    "pose pairs": "both pairs through the pose network as one batch",
    "pyramid": "the target's smaller levels are means of 2x2 pixels",
    "jitter": "colour jitter as one affine map of RGB, clamped once",
    "order": "samples in the order of md2's loader",
    "tie-break": "one draw of the auto-mask's noise for all scales",
    "channels_last": "convolutions in channels_last",
    "bf16": "networks under bfloat16 autocast",
    "jpeg": "frames stored at training size as md2 prep stores them",
    "jpeg 93 4:4:4": "frames stored at training size as JPEG 93, full chroma",
    "calibrated": "the calibrated camera instead of the nominal one",
}
STORED = {"jpeg": ImageFormat(None, "jpeg"), "jpeg 93 4:4:4": ImageFormat(None, "jpeg", 93, "444")}
LANCZOS = Image.Resampling.LANCZOS
LEVELS = 4
START = -2.5
"""Bias of the disparities' logits to begin with."""
FORWARD = -0.19
"""The points' motion along z from one frame to the next to begin with, in the paper's unit."""
BASELINE = 0.1
"""Of KITTI's cameras in the paper's unit."""


@dataclass(frozen=True)
class Setting:
    """What is trained; the same for both trainers.

    Attributes:
        frames, stereo: target and source frames, as in md2's configuration.
        size: width and height.
        batch: samples a step.
        epochs, drop: passes, and after how many of them the learning rate drops to a tenth.
        rate: Adam's learning rate.
        narrow: every width inside the networks is divided by this.
        every: steps between evaluations.
    """

    frames: tuple[int, ...]
    stereo: bool
    size: tuple[int, int] = (96, 64)
    batch: int = 4
    epochs: int = 5
    drop: int = 4
    rate: float = 1e-3
    narrow: int = 4
    every: int = 19

    def networks(self, seed: int) -> Networks:
        """Their initial weights, as md2's trainer draws them."""
        torch.manual_seed(seed)
        data = DataConfig(frames=list(self.frames), stereo=self.stereo)
        return self.prepared(Networks(ModelConfig(), data, LossConfig()))

    def prepared(self, networks: Networks) -> Networks:
        """New networks made fit for runs of a minute on a CPU, in place.

        They are narrower, disparities begin at 0.08 (7 m in stereo) and motion at a metre forward. From 0.5, where
        disparities begin otherwise, everything lies at 1 m: displaced by a third of a small image, it overlaps with
        nothing to learn from, and with no motion mono ends at the nearest depth, all in all a few hundred steps long.
        """
        narrowed(networks, self.narrow)
        for head in networks.depth.decoder[10:]:
            nn.init.constant_(head.conv.bias, START)
        if networks.learns_poses:
            with torch.no_grad():
                networks.pose.net[-1].bias[5::6] = FORWARD / OUTPUT_SCALE
        return networks


@dataclass(frozen=True)
class RawFrames:
    """Frames in KITTI's layout.

    Attributes:
        root: holds the dates' folders.
        lines: (drive, frame, side) of each training sample.
    """

    root: Path
    lines: Sequence[tuple[str, int, str]]

    def path(self, drive: str, frame: int, side: str) -> Path:
        camera = {"l": "02", "r": "03"}[side]
        return self.root / drive / f"image_{camera}" / "data" / f"{frame:010d}.png"

    def intrinsics(self, drive: str, side: str) -> list[float]:
        """fx, fy, cx, cy in pixels of the raw frames."""
        text = (self.root / drive).parent.joinpath("calib_cam_to_cam.txt").read_text()
        name = {"l": "P_rect_02:", "r": "P_rect_03:"}[side]
        row = next(line for line in text.splitlines() if line.startswith(name))
        values = [float(word) for word in row.split()[1:]]
        return [values[0], values[5], values[2], values[6]]


def narrowed(networks: Networks, factor: int) -> Networks:
    """The same networks with every width inside them divided by `factor`, in place, for runs of seconds on a CPU.

    Weights are the first ones of each layer, times the root of `factor`: so much wider is the initialisation of a
    narrower layer.
    """

    def cut(channels: int) -> int:
        # Images, disparities and motions are no multiple of 16; all widths inside are.
        return channels // factor if channels % 16 == 0 else channels

    for parent in list(networks.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, nn.Conv2d):
                inputs, outputs = cut(layer.in_channels), cut(layer.out_channels)
                bias = layer.bias is not None
                shape = (layer.kernel_size, layer.stride, layer.padding)
                slim: nn.Module = nn.Conv2d(inputs, outputs, *shape, bias=bias)  # type: ignore[arg-type]
                slim.weight.data = layer.weight.data[:outputs, :inputs] * factor**0.5
                if layer.bias is not None:
                    slim.bias.data = layer.bias.data[:outputs] * factor**0.5
            elif isinstance(layer, nn.BatchNorm2d):
                slim = nn.BatchNorm2d(cut(layer.num_features))
            else:
                continue
            setattr(parent, name, slim)
    return networks


@dataclass(frozen=True)
class Colours:
    """One draw of colour jitter: factors of brightness, contrast, saturation, hue, and the order they come in."""

    factors: tuple[float, float, float, float]
    order: tuple[int, ...]

    @classmethod
    def draw(cls, dice: random.Random) -> Colours:
        brightness, contrast, saturation = (dice.uniform(0.8, 1.2) for _ in range(3))
        return cls((brightness, contrast, saturation, dice.uniform(-0.1, 0.1)), tuple(dice.sample(range(4), 4)))

    def __call__(self, image: Image.Image) -> Image.Image:
        for index in self.order:
            factor = self.factors[index]
            if index == 3:
                image = turn_hue(image, factor)
            else:
                kind = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)[index]
                image = kind(image).enhance(factor)
        return image

    def affine(self, image: Tensor) -> Tensor:
        """The same of an image (3, H, W) as md2 does it."""
        return Jitter.of(torch.tensor([0]), torch.tensor([self.factors]))(image.unsqueeze(0))[0]


def turn_hue(image: Image.Image, factor: float) -> Image.Image:
    """Turn the hue by a fraction of the circle, in 256 steps of Pillow's HSV."""
    hue, saturation, value = image.convert("HSV").split()
    turned = (np.asarray(hue, dtype=np.int16) + int(factor * 255)) % 256
    return Image.merge("HSV", (Image.fromarray(turned.astype(np.uint8)), saturation, value)).convert("RGB")


def to_tensor(image: Image.Image) -> Tensor:
    """(3, H, W) float32 in [0, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


class Samples(Dataset[dict[str, Any]]):
    """Training samples. What is decoded and resized once stays in memory."""

    def __init__(self, raw: RawFrames, setting: Setting, seed: int, deviation: str | None) -> None:
        self.raw, self.setting, self.deviation = raw, setting, deviation
        self.dice = random.Random(seed)
        self._levels: dict[tuple[Path, bool], list[Image.Image]] = {}
        self._cameras: dict[tuple[str, str], list[float]] = {}

    def __len__(self) -> int:
        return len(self.raw.lines)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """`image OFFSET LEVEL` and `seen OFFSET` (3, h, w), `K` (3, 3), `stereo` (4, 4)."""
        drive, frame, side = self.raw.lines[index]
        flip, jittered, colours = self.dice.random() < 0.5, self.dice.random() < 0.5, Colours.draw(self.dice)
        sample: dict[str, Any] = {}
        for offset in (*self.setting.frames, *(["s"] if self.setting.stereo else [])):
            other = {"l": "r", "r": "l"}[side]
            where = (drive, frame, other) if offset == "s" else (drive, frame + int(offset), side)
            levels = self.levels(self.raw.path(*where), flip)
            for level, image in enumerate(levels if offset == 0 else levels[:1]):
                sample[f"image {offset} {level}"] = to_tensor(image)
            if not jittered:
                sample[f"seen {offset}"] = sample[f"image {offset} 0"]
            elif self.deviation == "jitter":
                sample[f"seen {offset}"] = colours.affine(sample[f"image {offset} 0"])
            else:
                sample[f"seen {offset}"] = to_tensor(colours(levels[0]))
        sample["K"] = self.camera(drive, side, flip)
        if self.setting.stereo:
            sample["stereo"] = torch.eye(4)
            sample["stereo"][0, 3] = BASELINE * (-1 if side == "l" else 1) * (-1 if flip else 1)
        return sample

    def levels(self, path: Path, flip: bool) -> list[Image.Image]:
        """The pyramid of a frame, its first level at the training's size."""
        if (path, flip) not in self._levels:
            with Image.open(path) as image:
                picture = image.convert("RGB")
            width, height = self.setting.size
            if self.deviation in STORED:
                stored = encode(picture.resize((width, height), LANCZOS), STORED[self.deviation])
                with Image.open(io.BytesIO(stored)) as image:
                    picture = image.convert("RGB")
            if flip:
                picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            levels = [picture.resize((width, height), LANCZOS)]
            for level in range(1, LEVELS):
                levels.append(levels[-1].resize((width >> level, height >> level), LANCZOS))
            self._levels[path, flip] = levels
        return self._levels[path, flip]

    def camera(self, drive: str, side: str, flip: bool) -> Tensor:
        if (drive, side) not in self._cameras:
            self._cameras[drive, side] = self.raw.intrinsics(drive, side)
        calibrated = torch.tensor([self._cameras[drive, side]])
        nominal = self.deviation != "calibrated"
        stored = torch.tensor([self.native])
        return camera_matrices(calibrated, stored, self.setting.size, torch.tensor([flip]), nominal=nominal)[0]

    @cached_property
    def native(self) -> tuple[int, int]:
        """Width and height of the raw frames."""
        with Image.open(self.raw.path(*self.raw.lines[0])) as image:
            return image.size


def plain_loss(
    prediction: Prediction,
    pyramids: Mapping[Offset, Mapping[int, Tensor]],
    K: Tensor,
    stereo: Tensor | None,
    draw: Callable[[], Tensor],
) -> Tensor:
    """The paper's loss: minimum over sources, auto-mask, full-resolution warping, smoothness; the mean over scales.

    `bench.reference.loss` with its options left out and the unwarped sources' error computed once.

    Args:
        prediction: disparities, and the poses of temporal sources.
        pyramids: offset -> level -> image; the target's levels, the sources' first.
        K: (B, 3, 3).
        stereo: (B, 4, 4), target to partner.
        draw: standard normal numbers (B, sources, H, W), called once a scale.
    """
    target = pyramids[0][0]
    sources = [offset for offset in pyramids if offset != 0]
    unwarped = torch.cat([photometric(pyramids[source][0], target) for source in sources], dim=1)
    total = K.new_zeros(())
    for scale, disparity in prediction.disparities.items():
        full = F.interpolate(disparity, target.shape[2:], mode="bilinear", align_corners=False)
        depth = 1 / (1 / 100 + (1 / 0.1 - 1 / 100) * full)
        transforms = [stereo if source == "s" else prediction.poses[source].transform() for source in sources]
        images = [warp(pyramids[o][0], depth, K, T) for o, T in zip(sources, transforms, strict=True) if T is not None]
        warped = torch.cat([photometric(image, target) for image in images], dim=1)
        error = torch.cat([unwarped + 1e-5 * draw(), warped], dim=1).min(dim=1)[0]
        total = total + error.mean() + 1e-3 / 2**scale * smoothness(disparity, pyramids[0][scale])
    return total / len(prediction.disparities)


@dataclass
class Plain:
    """The reference trainer.

    Attributes:
        deviation: one of `DEVIATIONS`, or None.
        orders: for the deviation `order`: indices of each epoch's samples.
    """

    raw: RawFrames
    setting: Setting
    seed: int
    deviation: str | None = None
    orders: Sequence[Sequence[int]] | None = None

    def __post_init__(self) -> None:
        self.networks = self.setting.networks(self.seed)
        if self.deviation == "channels_last":
            self.networks.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def train(self, report: Callable[[int, float, Networks], None]) -> None:
        """All epochs; `report` receives step, loss and networks after each step."""
        samples = Samples(self.raw, self.setting, self.seed, self.deviation)
        shuffled = RandomSampler(samples, generator=torch.Generator().manual_seed(self.seed))
        trainable = [p for p in self.networks.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(trainable, lr=self.setting.rate)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, self.setting.drop)
        step = 0
        for epoch in range(self.setting.epochs):
            order: Iterable[int] = shuffled if self.orders is None else self.orders[epoch]
            loader = DataLoader(samples, self.setting.batch, sampler=order, drop_last=True)
            for batch in loader:
                loss = self.loss(batch)
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                step += 1
                report(step, loss.item(), self.networks)
            schedule.step()

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        """The loss of one batch of `Samples`."""
        offsets: list[Offset] = [*self.setting.frames, *(["s"] if self.setting.stereo else [])]
        seen = {offset: batch[f"seen {offset}"] for offset in offsets}
        pyramids = {o: {s: batch[f"image {o} {s}"] for s in range(LEVELS if o == 0 else 1)} for o in offsets}
        if self.deviation == "pyramid":
            pyramids = image_pyramid({offset: levels[0] for offset, levels in pyramids.items()}, range(LEVELS))  # type: ignore[assignment]
        if self.deviation == "channels_last":
            seen = {o: image.contiguous(memory_format=torch.channels_last) for o, image in seen.items()}
        with torch.autocast("cpu", torch.bfloat16) if self.deviation == "bf16" else nullcontext():
            together = self.deviation == "pose pairs"
            prediction = self.networks(seen) if together else predict(self.networks, seen)
        noise = torch.randn(len(batch["K"]), len(offsets) - 1, *self.setting.size[::-1])
        draw = (lambda: noise) if self.deviation == "tie-break" else (lambda: torch.randn_like(noise))
        return plain_loss(prediction, pyramids, batch["K"], batch.get("stereo"), draw)
