"""The training configuration: YAML -> pydantic models, `key.sub=value` overrides, helpful errors.

The message for an unknown key names the nearest known one, that for an impossible combination its reason.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from shards.errors import UsageError, first_line

Encoder = Literal["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"]


class Section(BaseModel):
    """A group of keys; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class DataConfig(Section):
    """The dataset, and how its samples reach the networks."""

    url: str = "kitti_shards/eigen_zhou"
    """Folder or URL of a packed dataset."""
    frames: list[int] = [0, -1, 1]
    """Target (0) and temporal source frames, as offsets."""
    stereo: bool = False
    """Use the stereo partner as a source frame."""
    width: int = Field(640, ge=64, multiple_of=32)
    """Width of the images in pixels; stored images of another size are resized."""
    height: int = Field(192, ge=64, multiple_of=32)
    """Height of the images in pixels."""
    intrinsics: Literal["calibrated", "nominal"] = "calibrated"
    """Camera matrices: each drive's own, or `nominal` (the published numbers): fx 0.58 w, fy 1.92 h, cx w/2, cy h/2."""
    baseline: Literal["paper", "metres"] = "paper"
    """Unit of the stereo translation: the paper's (0.1 for 0.54 m) or metres."""
    flip: bool = True
    """Flip each sample left-right with probability 0.5."""
    color_jitter: bool = True
    """Jitter brightness, contrast, saturation and hue of the networks' inputs with probability 0.5."""
    device: Literal["auto", "cpu", "gpu"] = "auto"
    """Where images are decoded; `auto` is the GPU if the model trains on one."""
    threads: int | None = Field(None, gt=0)
    """Decoding threads; None: one per available core, at most 8 where the GPU decodes."""
    prefetch: int = Field(2, gt=0)
    """Batches that DALI prepares ahead."""
    shuffle: Literal["window", "global"] = "window"
    """`window`: shards in random order, samples shuffled over 8 of them; `global`: over the whole part."""

    @model_validator(mode="before")
    @classmethod
    def _drop_what_earlier_versions_had(cls, values: Any) -> Any:
        """Configurations and run folders of earlier versions have `shuffle_buffer`, which no longer has an effect."""
        if isinstance(values, dict) and "shuffle_buffer" in values:
            values = {name: value for name, value in values.items() if name != "shuffle_buffer"}
            logging.getLogger(__name__).warning("data.shuffle_buffer is ignored: data.shuffle says what is shuffled")
        return values

    @model_validator(mode="after")
    def _check_frames(self) -> Self:
        if 0 not in self.frames or self.frames[0] != 0:
            raise ValueError(f"frames {self.frames}: the target frame 0 comes first, e.g. [0, -1, 1]")
        if len(set(self.frames)) != len(self.frames):
            raise ValueError(f"frames {self.frames}: an offset appears twice")
        if self.frames == [0] and not self.stereo:
            raise ValueError(
                "frames [0] without stereo leaves no source image to reproject: add offsets or stereo=true"
            )
        return self

    @property
    def temporal(self) -> list[int]:
        """Offsets of the temporal source frames."""
        return [frame for frame in self.frames if frame != 0]


class ModelConfig(Section):
    """The networks."""

    encoder: Encoder = "resnet18"
    """ResNet of the depth network, and of a `separate_resnet` pose network."""
    weights: str = "imagenet"
    """`imagenet`, `scratch`, a torchvision ResNet file, or a run, checkpoint or folder to start from."""
    scales: list[int] = [0, 1, 2, 3]
    """Scales with a disparity output; 0 is full resolution."""
    min_depth: float = Field(0.1, gt=0)
    """Depth at disparity 1, in the unit of depth."""
    max_depth: float = Field(100.0, gt=0)
    """Depth at disparity 0."""
    pose_network: Literal["separate_resnet", "shared", "posecnn"] = "separate_resnet"
    """Network of the camera's motion: a ResNet of its own, the depth encoder's features, or a small plain one."""
    pose_input: Literal["pairs", "all"] = "pairs"
    """Frames that the pose network sees at once: target and one source, or all."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if 0 not in self.scales or len(set(self.scales)) != len(self.scales) or not set(self.scales) <= {0, 1, 2, 3}:
            raise ValueError(f"scales {self.scales}: some of 0, 1, 2, 3, each once; 0, which evaluation reads, always")
        if self.min_depth >= self.max_depth:
            raise ValueError(f"min_depth {self.min_depth} must be below max_depth {self.max_depth}")
        return self


class LossConfig(Section):
    """The reprojection loss; names as in the paper and its official implementation."""

    v1_multiscale: bool = False
    """Warp at each scale's own resolution instead of at full resolution."""
    avg_reprojection: bool = False
    """Average the error over the sources instead of taking the minimum."""
    disable_automasking: bool = False
    """Count every pixel, also where an unwarped source fits better than all warped ones."""
    predictive_mask: bool = False
    """Learn a mask instead of auto-masking (Zhou et al.); needs disable_automasking."""
    no_ssim: bool = False
    """Photometric error without SSIM: L1 alone."""
    disparity_smoothness: float = Field(1e-3, ge=0)
    """Weight of edge-aware smoothness; divided by 2 at each smaller scale."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.predictive_mask and not self.disable_automasking:
            raise ValueError("predictive_mask replaces auto-masking: set disable_automasking=true with it")
        return self


class TrainConfig(Section):
    """The loop."""

    epochs: int = Field(20, gt=0)
    """Passes over the train part."""
    batch_size: int = Field(12, gt=0)
    """Samples per step and rank."""
    accumulate: int = Field(1, gt=0)
    """Batches whose gradients are averaged into one step."""
    learning_rate: float = Field(1e-4, gt=0)
    """Adam's learning rate at the start."""
    lr_step_epochs: int = Field(15, gt=0)
    """Epochs after which the learning rate is multiplied by lr_gamma, again and again."""
    lr_gamma: float = Field(0.1, gt=0)
    """Factor on the learning rate."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Seed of random weights, order, augmentation and noise."""
    device: Literal["auto", "cpu", "gpu"] = "auto"
    """Where to train; `auto` is a GPU if the machine has one."""
    precision: Literal["auto", "float32", "bf16", "fp16"] = "auto"
    """Autocast of the networks; loss and geometry stay float32.

    `auto`: float32 on a CPU; on a GPU bf16, or what older GPUs compute in natively. `float32` on a GPU uses TF32 in
    convolutions, as PyTorch does by default."""
    channels_last: Literal["auto"] | bool = "auto"
    """Memory format of the networks; `auto` is channels_last."""
    compile: Literal["auto", "graphs"] | bool = "auto"
    """torch.compile of the networks.

    `auto`: on a GPU with Triton, and without compiling if that fails. `graphs`: replayed as CUDA graphs, for GPUs that
    wait for the host's launches."""
    on_nan: Literal["stop", "skip"] = "stop"
    """On a NaN or infinite loss or gradient: stop the run, or skip the step and report it."""
    max_steps: int | None = Field(None, gt=0)
    """Optimiser steps after which the run ends, whatever `epochs` is."""
    checkpoint_every: int = Field(1000, gt=0)
    """Steps between checkpoints; one is written at each epoch's end as well."""
    log_every: int = Field(50, gt=0)
    """Steps between logged scalars."""
    image_every: int = Field(500, gt=0)
    """Steps between image panels in TensorBoard."""
    sinks: list[Literal["wandb", "mlflow"]] = []
    """Loggers that get the scalars as well; each needs its own package and reads its settings from the environment."""
    val_batches: int | None = Field(None, gt=0)
    """Batches to validate on; None: the whole val part."""


class Config(Section):
    """A whole run."""

    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    loss: LossConfig = LossConfig()
    train: TrainConfig = TrainConfig()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.data.temporal and (self.model.pose_network, self.model.pose_input) != ("separate_resnet", "pairs"):
            raise ValueError("pose_network and pose_input have no effect without temporal frames: leave them out")
        if self.data.baseline == "metres" and not self.data.stereo:
            raise ValueError("data.baseline metres without stereo: mono depth has no unit; leave it out or add stereo")
        if self.train.device == "cpu" and self.data.device == "gpu":
            raise ValueError("data.device gpu with train.device cpu would copy every image back: use auto or cpu")
        return self

    @property
    def metres_per_unit(self) -> float | None:
        """Metres in one unit of predicted depth: 5.4 (paper's stereo unit), 1 (metres), None (mono: unknown)."""
        if not self.data.stereo:
            return None
        return PAPER_METRES_PER_UNIT if self.data.baseline == "paper" else 1.0

    def to_yaml(self) -> str:
        """The resolved configuration; loads back to an equal one."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


PAPER_METRES_PER_UNIT = 5.4
"""The paper's models are trained with a stereo baseline of 0.1 for KITTI's 0.54 m (its released code)."""


def load_config(source: str | Path | None, overrides: Iterable[str] = ()) -> Config:
    """Read a YAML file (or a published recipe by name), merge `key.sub=value` overrides, validate.

    Args:
        source: path of a YAML file, name of a recipe in `md2/configs/`, or None for the defaults.
        overrides: values are parsed as YAML (`data.frames=[0,-1,1]`, `train.learning_rate=1e-4`), but for keys that
            hold text, such as `data.url`, whose value is taken as it is.

    Raises:
        UsageError: no such file or recipe, not YAML, unknown key (names the nearest), wrong value,
            impossible combination (gives the reason).
    """
    where = "defaults" if source is None else str(source)
    tree = {} if source is None else _read_yaml(*_find(source))
    merge_overrides(tree, overrides)
    return config_from_dict(tree, where)


def load_source(source: str | None, overrides: Iterable[str] = ()) -> Config:
    """`load_config` of the configuration that a command names.

    Raises:
        UsageError: none is named, or as `load_config`.
    """
    if source is None:
        raise UsageError("give a configuration: a YAML file or a recipe name (md2 zoo lists them), or --resume RUN")
    return load_config(source, overrides)


def merge_overrides(tree: dict[str, Any], overrides: Iterable[str]) -> None:
    """Merge `key.sub=value` overrides into a nested dictionary, in place.

    Raises:
        UsageError: not of that form, or the value is not YAML.
    """
    for override in overrides:
        _merge(tree, override)


def config_from_dict(tree: dict[str, Any], where: str) -> Config:
    """Validate a nested dictionary; `where` goes into the message.

    Raises:
        UsageError: as `load_config`.
    """
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise UsageError(f"{where}: {_explain(error)}") from error


def recipes() -> dict[str, str]:
    """Published recipes: name -> YAML text."""
    folder = files("md2.configs")
    found = (entry for entry in folder.iterdir() if entry.name.endswith(".yaml"))
    return {entry.name.removesuffix(".yaml"): entry.read_text("utf-8") for entry in sorted(found, key=lambda e: e.name)}


def _find(source: str | Path) -> tuple[str, str]:
    path = Path(source)
    if path.is_file():
        return str(path), _text(path)
    known = recipes()
    if str(source) in known:
        return str(source), known[str(source)]
    part = [name for name in known if str(source) and str(source) in name]
    near = part or difflib.get_close_matches(str(source), known, n=1, cutoff=0.5)
    hint = f"; did you mean the recipe {near[0]}?" if near else "; `md2 zoo` lists the recipes"
    if len(part) > 1:
        hint = f"; {len(part)} recipes have it in their name, such as {part[0]}: `md2 zoo` lists them"
    raise UsageError(f"no configuration file or recipe {str(source)!r}{hint}")


def read_config_tree(path: Path) -> dict[str, Any]:
    """A configuration file as nested dictionaries, not yet checked.

    Raises:
        UsageError: it cannot be read or is not YAML.
    """
    return _read_yaml(str(path), _text(path))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: not a configuration file: {error}") from error


def _read_yaml(name: str, text: str) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = "" if mark is None else f", line {mark.line + 1}, column {mark.column + 1}"
        raise UsageError(f"{name}{where}: not YAML: {error.problem or error.context}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # 2011-09-31, which is no date, is a ValueError
        raise UsageError(f"{name}: not YAML: {first_line(error)}") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UsageError(f"{name}: expected sections (data, model, loss, train), found {type(tree).__name__}")
    return {section: {} if values is None else values for section, values in tree.items()}


def _merge(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UsageError(f"override {override!r} is not of the form key.sub=value, e.g. train.batch_size=8")
    try:
        # A folder named 2024-11-28 is no date, and one with # in its name has no comment.
        value = text if text and key in _text_keys() else yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UsageError(f"override {override!r}: the value is not YAML") from error
    *sections, last = key.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise UsageError(f"override {override!r}: {section!r} is not a section")
    tree[last] = value


def known_keys(model: type[BaseModel] = Config, prefix: str = "") -> Iterator[str]:
    """All dotted keys, sections included."""
    for name, field in model.model_fields.items():
        yield prefix + name
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from known_keys(field.annotation, f"{prefix}{name}.")


def _text_keys() -> set[str]:
    """Dotted keys whose values are any text."""
    sections = {name: field.annotation for name, field in Config.model_fields.items()}
    return {
        f"{section}.{name}"
        for section, model in sections.items()
        if isinstance(model, type) and issubclass(model, BaseModel)
        for name, field in model.model_fields.items()
        if field.annotation is str
    }


def _explain(error: ValidationError) -> str:
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return f"unknown key {key!r}{_nearest(key)}"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":
        return message
    how = f"; a list is written {key}=[0,-1,1]" if first["type"] == "list_type" else ""
    return f"{key} = {first['input']!r}: {message[0].lower()}{message[1:]}{how}"


def _nearest(key: str) -> str:
    keys = list(known_keys())
    same_leaf = [known for known in keys if known.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]]
    near = same_leaf or difflib.get_close_matches(key, keys, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else f"; sections are {', '.join(Config.model_fields)}"
