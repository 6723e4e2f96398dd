"""The training configuration: YAML -> pydantic models, `key.sub=value` overrides, helpful errors.

The message for an unknown key names the nearest known one; that for an impossible combination gives the reason.
"""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from shards.errors import InputError, UsageError, first_line
from shards.files import expanded
from shards.sample import DISTANCES, POSES
from shards.yaml_text import load_yaml, read_yaml_text

RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")


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
    width: int = Field(640, ge=64, le=8192, multiple_of=32)
    """Width of the networks' input in pixels; stored images of another size are resized."""
    height: int = Field(192, ge=64, le=8192, multiple_of=32)
    """Height of the networks' input in pixels."""
    intrinsics: Literal["calibrated", "nominal", "learned"] = "calibrated"
    """Camera matrices: `calibrated` is each drive's own, `nominal` the paper's one for all images, `learned` one camera
    that is learned with the depth (Gordon et al., ICCV 2019), whatever the dataset says.

    Nominal: fx = 0.58 width, fy = 1.92 height, the centre at width / 2, height / 2."""
    fov: float = Field(75.0, ge=5, le=150)
    """Horizontal field of view, in degrees, at which learned intrinsics begin."""
    baseline: Literal["paper", "metres"] = "paper"
    """Unit of translations, and so of depth: `paper` is 5.4 m (a stereo baseline of 0.1 for 0.54 m)."""
    flip: bool = True
    """Flip each sample left-right with probability 0.5."""
    crop: list[float] | None = Field(None, min_length=2, max_length=2)
    """Train on a random window of each stored image, resized to `width` x `height`: the least and the largest share of
    the image's width and height, such as [0.7, 1]. None: the whole image."""
    color_jitter: bool = True
    """Jitter brightness, contrast, saturation and hue of the networks' inputs with probability 0.5."""
    device: Literal["auto", "cpu", "gpu"] = "auto"
    """Where images are decoded; `auto` is the GPU if the networks train on one."""
    threads: int | None = Field(None, gt=0, le=1024)
    """Decoding threads; None: one per available core, at most 8 if the GPU decodes."""
    prefetch: int = Field(2, gt=0, le=100)
    """Batches that DALI prepares ahead."""
    ahead: Literal["auto"] | bool = "auto"
    """Make the next batch (flips, floats, jitter) on a thread and CUDA stream of its own while a step runs; `auto`: on
    a GPU. A CPU's cores are busy with the step. The batches are the same."""
    shuffle: Literal["window", "global"] = "window"
    """`window`: random order of shards, samples shuffled over 8 shards at a time; `global`: over the whole part."""

    @model_validator(mode="before")
    @classmethod
    def _drop_former_key(cls, values: Any) -> Any:
        """Accept `shuffle_buffer`, which earlier run folders have and which no longer has an effect."""
        if isinstance(values, dict) and "shuffle_buffer" in values:
            values = {name: value for name, value in values.items() if name != "shuffle_buffer"}
            logging.getLogger(__name__).warning("data.shuffle_buffer is ignored: data.shuffle sets the shuffling")
        return values

    @model_validator(mode="after")
    def _check_frames(self) -> Self:
        if self.frames[:1] != [0]:
            raise ValueError(f"frames {self.frames}: the target frame 0 comes first, e.g. [0, -1, 1]")
        if len(set(self.frames)) != len(self.frames):
            raise ValueError(f"frames {self.frames}: an offset appears twice")
        if self.crop is not None and not 0 < self.crop[0] <= self.crop[1] <= 1:
            raise ValueError(f"crop {self.crop}: two shares of the image's sides, 0 < least <= largest <= 1")
        if self.frames == [0] and not self.stereo:
            raise ValueError("frames [0] without stereo leaves no source image to warp: add offsets or stereo=true")
        if self.intrinsics == "learned" and not self.temporal:
            raise ValueError("intrinsics learned without temporal frames: only motion shows the focal length")
        return self

    @property
    def temporal(self) -> list[int]:
        """Offsets of the temporal source frames."""
        return [frame for frame in self.frames if frame != 0]

    @property
    def metres_per_unit(self) -> float:
        """Metres in one unit of translations."""
        return PAPER_METRES_PER_UNIT if self.baseline == "paper" else 1.0


class ModelConfig(Section):
    """The networks."""

    encoder: str = "resnet18"
    """Encoder of the depth network: `resnet18`, 34, 50, 101, 152, or `timm/NAME` for a model of the timm library."""
    pose_encoder: str | None = None
    """Encoder of a `separate_resnet` pose network; None: as `encoder`, but `resnet18` if that is of timm."""
    decoder: Literal["monodepth2", "hrdepth"] = "monodepth2"
    """Decoder of the depth network; `hrdepth` has dense skip connections (Lyu et al., AAAI 2021)."""
    weights: str = "imagenet"
    """Weights at the start: `imagenet`, `scratch`, a torchvision or timm file, a run, a checkpoint, or a folder of
    official Monodepth2 weights."""
    scales: list[int] = [0, 1, 2, 3]
    """Scales of the disparity outputs; scale s has 1 / 2^s of the resolution."""
    min_depth: float = Field(0.1, gt=0)
    """Depth at disparity 1, in the unit of depth."""
    max_depth: float = Field(100.0, gt=0)
    """Depth at disparity 0."""
    start: list[float] | None = Field(None, min_length=2, max_length=2)
    """Depth, and motion forward between the frames of a pair, in metres, at which random weights begin, such as
    [15, 1]. None: as in the paper, at about 1 m and at rest.

    A metre is 1 / 5.4 of the unit of depth, unless `data.baseline` is `metres`."""
    pose_network: Literal["separate_resnet", "shared", "posecnn"] = "separate_resnet"
    """Network that predicts the camera's motion: with an encoder of its own (a ResNet, unless `pose_encoder` names
    another), from the depth encoder's features, or a small plain one."""
    pose_input: Literal["pairs", "all"] = "pairs"
    """Frames that the pose network sees at once: target and one source, or all."""

    @field_validator("encoder", "pose_encoder")
    @classmethod
    def _check_encoder(cls, name: str | None, info: ValidationInfo) -> str | None:
        if name is None or name in RESNETS or re.fullmatch(r"timm/[\w.-]+", name):
            return name
        raise ValueError(f"model.{info.field_name} {name!r}: one of {', '.join(RESNETS)}, or timm/NAME")

    @property
    def pose_encoder_name(self) -> str:
        """Encoder of a `separate_resnet` pose network."""
        return self.pose_encoder or (self.encoder if self.encoder in RESNETS else RESNETS[0])

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.pose_encoder is not None and self.pose_network != "separate_resnet":
            raise ValueError(f"model.pose_encoder has no effect with pose_network {self.pose_network}: leave it out")
        if 0 not in self.scales or len(set(self.scales)) != len(self.scales) or not set(self.scales) <= {0, 1, 2, 3}:
            raise ValueError(f"scales {self.scales}: some of 0, 1, 2, 3, each once, with 0, which evaluation reads")
        if self.min_depth >= self.max_depth:
            raise ValueError(f"min_depth {self.min_depth} must be below max_depth {self.max_depth}")
        return self


class LossConfig(Section):
    """The reprojection loss; keys have the names of the official implementation's options."""

    v1_multiscale: bool = False
    """Warp at each scale's own resolution instead of at full resolution."""
    avg_reprojection: bool = False
    """Average the error over the source frames instead of taking the minimum."""
    disable_automasking: bool = False
    """Count every pixel, also those whose identity error is below the reprojection error."""
    predictive_mask: bool = False
    """Learn a mask instead of auto-masking (Zhou et al., CVPR 2017); needs disable_automasking."""
    no_ssim: bool = False
    """Use L1 alone as photometric error, without SSIM."""
    disparity_smoothness: float = Field(1e-3, ge=0)
    """Weight of the edge-aware smoothness; halved at each smaller scale."""
    velocity: float = Field(0.0, ge=0)
    """Weight of the error of predicted translations in metres (Guizilini et al., CVPR 2020, use 0.05); 0: off.

    Depth is then in metres. It needs a dataset that was packed with `--motion`."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.predictive_mask and not self.disable_automasking:
            raise ValueError("predictive_mask replaces auto-masking: set disable_automasking=true with it")
        return self


class TrainConfig(Section):
    """The training loop."""

    epochs: int = Field(20, gt=0)
    """Passes over the `train` part."""
    batch_size: int = Field(12, gt=0)
    """Samples that a rank processes at once."""
    accumulate: int = Field(1, gt=0)
    """Gradient accumulation: batches whose gradients are averaged into one step."""
    learning_rate: float = Field(1e-4, gt=0)
    """Adam's learning rate at the start."""
    lr_step_epochs: int = Field(15, gt=0)
    """Number of epochs after which, each time, the learning rate is multiplied by lr_gamma."""
    lr_gamma: float = Field(0.1, gt=0)
    """Factor of the learning rate's steps."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Seed of random weights, sample order, augmentation and noise."""
    device: Literal["auto", "cpu", "gpu"] = "auto"
    """Where to train; `auto` is a GPU if the machine has one."""
    precision: Literal["auto", "float32", "bf16", "fp16"] = "auto"
    """Precision of the networks' arithmetic; loss and geometry stay float32.

    `auto`: float32 on a CPU; on a GPU bf16, or the precision that an older GPU supports natively. `float32` on a GPU
    uses TF32 in convolutions, as PyTorch does by default; evaluation and prediction never do."""
    channels_last: Literal["auto"] | bool = "auto"
    """Memory format of the networks; `auto` is channels_last."""
    compile: Literal["auto", "graphs"] | bool = "auto"
    """Compile the networks with torch.compile.

    `auto`: on a GPU with Triton; if compiling fails, training continues without it. `graphs`: also replay the whole
    step as one CUDA graph, for GPUs that wait for the host's launches; with several ranks, accumulation or fp16 the
    networks alone."""
    cudnn_benchmark: bool = True
    """On a GPU, have cuDNN try its convolutions at the first step and keep the fastest; false: the ones that it thinks
    best, the same in each run."""
    poses: Literal["learned", "given"] = "learned"
    """Motion between target and temporal frames: `learned` by a pose network, or `given` by the dataset.

    `given` needs a dataset that was packed with `--motion`, and depth is then in metres."""
    on_nan: Literal["stop", "skip"] = "stop"
    """What to do at a NaN or infinite loss or gradient: stop the run, or skip the step and report it."""
    max_steps: int | None = Field(None, gt=0)
    """Steps after which the run ends, even if `epochs` are not complete."""
    checkpoint_every: int = Field(1000, gt=0)
    """Steps between checkpoints; each epoch's end also writes one."""
    log_every: int = Field(50, gt=0)
    """Steps between logged rows of metrics."""
    image_every: int = Field(500, gt=0)
    """Steps between panels, the pictures of a training batch."""
    loggers: list[Literal["wandb", "mlflow"]] = []
    """Further loggers of the metrics; each needs its own package and reads its settings from the environment."""
    camera_from: int = Field(1000, ge=0)
    """Steps before learned intrinsics begin to move: depth and motion must be roughly right first."""
    val_batches: int | None = Field(None, gt=0)
    """Batches to validate on; None: the whole `val` part."""

    @model_validator(mode="before")
    @classmethod
    def _rename_former_key(cls, values: Any) -> Any:
        """Accept `sinks`, the former name of `loggers`, which earlier run folders have."""
        if isinstance(values, dict) and "sinks" in values:
            values = {"loggers": values["sinks"], **{key: value for key, value in values.items() if key != "sinks"}}
        return values


class Config(Section):
    """A whole run."""

    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    loss: LossConfig = LossConfig()
    train: TrainConfig = TrainConfig()

    @model_validator(mode="after")
    def _check(self) -> Self:
        pose = (self.model.pose_network, self.model.pose_input, self.model.pose_encoder)
        if not self.data.temporal and pose != ("separate_resnet", "pairs", None):
            raise ValueError("pose_* keys of the model have no effect without temporal frames: leave them out")
        if self.train.poses == "given" and self.model.pose_encoder:
            raise ValueError("model.pose_encoder has no effect with train.poses given: leave it out")
        if self.train.poses == "given" and self.loss.velocity:
            raise ValueError("loss.velocity has no effect with train.poses given, which leaves no pose to learn")
        if self.motion and not self.data.temporal:
            raise ValueError(f"{'loss.velocity' if self.loss.velocity else 'train.poses given'} needs temporal frames")
        if self.motion and self.model.pose_network == "posecnn":
            raise ValueError("posecnn's translations are relative to the depth and not in metres: choose another")
        if self.data.baseline == "metres" and self.metres_per_unit is None:
            raise ValueError("data.baseline metres without stereo: mono depth has no unit; leave it out or add stereo")
        if self.train.device == "cpu" and self.data.device == "gpu":
            raise ValueError("data.device gpu with train.device cpu would copy every image back: use auto or cpu")
        return self

    @model_validator(mode="after")
    def _check_start(self) -> Self:
        if self.model.start is not None:
            depth, forward = (metres / self.data.metres_per_unit for metres in self.model.start)
            if not (self.model.min_depth < depth < self.model.max_depth and forward >= 0):
                raise ValueError(f"start {self.model.start}: a depth within the model's range, and a motion from 0")
            if self.model.pose_network == "posecnn":
                raise ValueError("posecnn's translations are relative to the depth: leave model.start out")
        return self

    @property
    def motion(self) -> tuple[str, ...]:
        """Components of `md2 prep --motion` that training reads."""
        return (POSES,) if self.train.poses == "given" else (DISTANCES,) if self.loss.velocity else ()

    @property
    def metres_per_unit(self) -> float | None:
        """Metres in one unit of predicted depth: 5.4 (the paper's stereo unit), 1 (metres), or None (mono: unknown)."""
        if not self.data.stereo and not self.motion:
            return None
        return self.data.metres_per_unit

    def to_yaml(self) -> str:
        """Return the resolved configuration as YAML, which loads back to an equal one."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


PAPER_METRES_PER_UNIT = 5.4
"""The paper's models are trained with a stereo baseline of 0.1 for KITTI's 0.54 m (see its released code)."""


def load_config(source: str | Path | None, overrides: Iterable[str] = ()) -> Config:
    """Read a YAML file or a published recipe, merge `key.sub=value` overrides, validate.

    Args:
        source: path of a YAML file, name of a recipe in `md2/configs/`, or None for the defaults.
        overrides: values are parsed as YAML (`data.frames=[0,-1,1]`, `train.learning_rate=1e-4`), except those of keys
            that hold text, such as `data.url`.

    Raises:
        UsageError: no such file or recipe, not YAML, unknown key (names the nearest), wrong value,
            impossible combination (gives the reason).
    """
    tree = {} if source is None else _read_yaml(str(source), _find(source))
    merge_overrides(tree, overrides)
    return config_from_dict(tree, "defaults" if source is None else str(source))


def load_source(source: str | None, overrides: Iterable[str] = ()) -> Config:
    """Load the configuration that a command names, as `load_config` does.

    Raises:
        UsageError: the command names none; or as `load_config`.
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
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise UsageError(f"override {override!r} is not of the form key.sub=value, e.g. train.batch_size=8")
        try:
            # As YAML, a folder named 2024-11-28 would be a date, and # in a name would begin a comment.
            value = text if text and known_keys().get(key) is str else load_yaml(text)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise UsageError(f"override {override!r}: the value is not YAML") from error
        *sections, last = key.split(".")
        inner = tree
        for section in sections:
            inner = inner.setdefault(section, {})
            if not isinstance(inner, dict):
                raise UsageError(f"override {override!r}: {section!r} is not a section")
        inner[last] = value


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
    """Return the published recipes: name -> YAML text."""
    found = (entry for entry in files("md2.configs").iterdir() if entry.name.endswith(".yaml"))
    return {entry.name.removesuffix(".yaml"): entry.read_text("utf-8") for entry in sorted(found, key=lambda e: e.name)}


def recipe_hint(name: str) -> str:
    """Return the end of a message about a recipe that does not exist: what may be meant."""
    known, words = recipes(), re.findall(r"[^\W\d_]+|\d+", name)
    part = [recipe for recipe in known if words and all(word in recipe for word in words)]
    if len(part) > 1:
        return f"; {len(part)} recipes have it in their name, such as {part[0]}: `md2 zoo` lists them"
    near = part or difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean the recipe {near[0]}?" if near else "; `md2 zoo` lists the recipes"


def _find(source: str | Path) -> str:
    """Return the YAML text of a file or recipe."""
    path, name, known = Path(source), str(source), recipes()
    if path.is_file():
        return _text(path)
    if name in known:
        return known[name]
    raise UsageError(f"no configuration file or recipe {name!r}{recipe_hint(name)}")


def read_config_tree(path: Path) -> dict[str, Any]:
    """Read a configuration file as nested dictionaries, not yet checked.

    Raises:
        UsageError: it cannot be read or is not YAML.
    """
    return _read_yaml(str(path), _text(path))


def _text(path: Path) -> str:
    try:
        return read_yaml_text(path)
    except InputError as error:
        raise UsageError(str(error)) from error
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: not a configuration file: {error}") from error


def _read_yaml(name: str, text: str) -> dict[str, Any]:
    try:
        tree = load_yaml(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = "" if mark is None else f", line {mark.line + 1}, column {mark.column + 1}"
        raise UsageError(f"{name}{where}: not YAML: {error.problem or error.context}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # 2011-09-31, which is not a date, is a ValueError
        raise UsageError(f"{name}: not YAML: {first_line(error)}") from error
    if tree is not None and not isinstance(tree, dict):
        raise UsageError(f"{name}: expected sections (data, model, loss, train), found {type(tree).__name__}")
    return {section: {} if values is None else values for section, values in (tree or {}).items()}


def known_keys() -> dict[str, Any]:
    """Return all dotted keys, sections included, with the types of their values."""
    found: dict[str, Any] = {}
    for section, keys in Config.model_fields.items():
        assert isinstance(keys.annotation, type) and issubclass(keys.annotation, BaseModel)
        fields = keys.annotation.model_fields.items()
        found |= {section: keys.annotation, **{f"{section}.{name}": field.annotation for name, field in fields}}
    return found


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
    same_leaf = [known for known in known_keys() if known.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]]
    near = same_leaf or difflib.get_close_matches(key, known_keys(), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else f"; sections are {', '.join(Config.model_fields)}"


def weights_path(weights: str) -> Path:
    """Return the file or folder that `model.weights` names.

    Raises:
        InputError: there is none.
    """
    path = expanded(Path(weights))
    if not path.exists():
        raise InputError(
            f"model.weights={weights}: no such file or folder; give imagenet, scratch, a torchvision or timm file, "
            "a run, a checkpoint or a folder of Monodepth2 weights"
        )
    return path
