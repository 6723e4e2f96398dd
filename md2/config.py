"""The training configuration: YAML -> pydantic models, `key.sub=value` overrides, helpful errors.

Nothing is derived before the overrides are merged. An unknown key names the nearest known one, an
impossible combination its reason.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Encoder = Literal["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class DataConfig(Section):
    """What to read and how to present it to the networks."""

    url: str = "kitti_shards/eigen_zhou"
    """Folder or URL of a packed dataset."""
    frames: list[int] = [0, -1, 1]
    """Target (0) and temporal source frames, as offsets."""
    stereo: bool = False
    """Use the stereo partner as a source frame."""
    width: int = Field(640, gt=0, multiple_of=32)
    height: int = Field(192, gt=0, multiple_of=32)
    intrinsics: Literal["calibrated", "nominal"] = "calibrated"
    """`nominal`: fx = 0.58 w, fy = 1.92 h, cx = 0.5 w, cy = 0.5 h, which the published numbers used."""
    baseline: Literal["paper", "metres"] = "paper"
    """Unit of the stereo translation: the paper's (0.1 for 0.54 m) or metres."""
    flip: bool = True
    """Flip each sample left-right with probability 0.5."""
    color_jitter: bool = True
    """Jitter brightness, contrast, saturation and hue of the networks' inputs with probability 0.5."""
    device: Literal["auto", "cpu", "gpu"] = "auto"
    """Where images are decoded; `auto` is the GPU if the model trains on one."""
    threads: int | None = Field(None, gt=0)
    """Decoding threads; None: one per available core."""
    prefetch: int = Field(2, gt=0)
    shuffle_buffer: int = Field(1024, gt=0)
    """Samples in the reader's shuffle buffer (the shards are shuffled globally when packed)."""


class ModelConfig(Section):
    """The networks."""

    encoder: Encoder = "resnet18"
    weights: str = "imagenet"
    """`imagenet`, `scratch`, a torchvision ResNet file, or a run, checkpoint or folder to start from."""
    scales: list[int] = [0, 1, 2, 3]
    """Scales with a disparity output; 0 is full resolution."""
    min_depth: float = Field(0.1, gt=0)
    max_depth: float = Field(100.0, gt=0)
    pose_network: Literal["separate_resnet", "shared", "posecnn"] = "separate_resnet"
    pose_input: Literal["pairs", "all"] = "pairs"


class LossConfig(Section):
    """The reprojection loss; names as in the paper and its official implementation."""

    v1_multiscale: bool = False
    """Warp at each scale's own resolution instead of at full resolution."""
    avg_reprojection: bool = False
    """Average the error over the sources instead of taking the minimum."""
    disable_automasking: bool = False
    predictive_mask: bool = False
    """Learn a mask instead of auto-masking (Zhou et al.); needs disable_automasking."""
    no_ssim: bool = False
    disparity_smoothness: float = Field(1e-3, ge=0)


class TrainConfig(Section):
    """The loop."""

    epochs: int = Field(20, gt=0)
    batch_size: int = Field(12, gt=0)
    """Samples per step and rank."""
    accumulate: int = Field(1, gt=0)
    """Batches whose gradients are averaged into one step."""
    learning_rate: float = Field(1e-4, gt=0)
    lr_step_epochs: int = Field(15, gt=0)
    """Multiply the learning rate by lr_gamma every so many epochs."""
    lr_gamma: float = Field(0.1, gt=0)
    seed: int = 0
    device: Literal["auto", "cpu", "gpu"] = "auto"
    precision: Literal["auto", "float32", "bf16", "fp16"] = "auto"
    """Autocast of the networks; loss and geometry stay float32. `auto`: what measured best."""
    channels_last: Literal["auto"] | bool = "auto"
    compile: Literal["auto"] | bool = "auto"
    on_nan: Literal["stop", "skip"] = "stop"
    """A loss or gradient that is NaN or infinite: stop the run, or skip the step (and report it)."""
    max_steps: int | None = Field(None, gt=0)
    """Stop after so many optimiser steps, whatever `epochs` says."""
    checkpoint_every: int = Field(1000, gt=0)
    """Steps between checkpoints; one is written at each epoch's end as well."""
    log_every: int = Field(50, gt=0)
    """Steps between logged scalars."""
    image_every: int = Field(500, gt=0)
    """Steps between image panels in TensorBoard."""
    val_batches: int | None = Field(None, gt=0)
    """Validate on so many batches; None: the whole validation part."""


class Config(Section):
    """A whole run."""

    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    loss: LossConfig = LossConfig()
    train: TrainConfig = TrainConfig()
