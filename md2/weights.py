"""Weights from elsewhere: torchvision's ImageNet ResNets, official Monodepth2 folders, earlier runs.

An official folder holds one state dict per sub-network: `encoder.pth` (with `height`, `width` and `use_stereo` beside
the weights), `depth.pth`, for learned poses `pose.pth` and `pose_encoder.pth`, for a predictive mask
`predictive_mask.pth`. Every file is read with `weights_only=True`, so a stranger's file cannot run code.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from md2.checkpoint import (
    StateDict,
    load_checkpoint,
    read_torch,
    reason_of,
    require_short_header,
    resolve,
    unwritten,
    what_else,
)
from md2.config import Config, config_from_dict, weights_path
from md2.model import Networks
from md2.networks.decoder import WIDTHS
from md2.networks.resnet import ARCHITECTURES, ResNetEncoder
from md2.networks.states import load_state
from md2.networks.timm_encoder import TimmEncoder
from shards.errors import InputError, first_line
from shards.files import fsync_folder, remove_quietly, replace, temporary
from shards.storage.http import HttpStorage
from shards.storage.retry import MissingError

IMAGENET_URLS = {
    name: f"https://download.pytorch.org/models/{name}-{digest}.pth"
    for name, digest in {
        "resnet18": "f37072fd",
        "resnet34": "b627a593",
        "resnet50": "0676ba61",
        "resnet101": "63fe2227",
        "resnet152": "394f9c45",
    }.items()
}
"""torchvision's IMAGENET1K_V1 files; their names end with the first digits of the content's sha256."""

_LARGEST_WEIGHTS = 1 << 30
OFFICIAL_NAMES = ("encoder", "depth", "pose_encoder", "pose", "predictive_mask")
_EXTRAS = ("height", "width", "use_stereo")
_BLOCK = re.compile(r"encoder\.layer([1-4])\.(\d{1,4})\.")


def initialise(networks: Networks, weights: str) -> list[str]:
    """Load the weights that `model.weights` names into new networks.

    Args:
        networks: sub-networks that `weights` lacks keep their random values.
        weights: `scratch`; `imagenet` (downloaded once, into the cache of torch.hub or timm, hash checked); a file of
            the encoder's weights as torchvision or timm has them; or a run folder, checkpoint or official Monodepth2
            folder, whose sub-networks are loaded if `networks` has them too.

    Returns:
        Names of the sub-networks that `weights` lacks.

    Raises:
        InputError: no such file, the download fails, a damaged file, keys or shapes that do not fit, or a pose
            network without the encoder that it was trained on.
    """
    if weights == "scratch":
        return []
    if weights == "imagenet":
        for encoder in networks.encoders.values():
            if isinstance(encoder, TimmEncoder):
                encoder.load_pretrained()
            else:
                _load_resnet(encoder, download_imagenet(encoder.name), IMAGENET_URLS[encoder.name])
        return []
    path = weights_path(weights)
    if is_monodepth2(path):
        return _load_common(networks, read_monodepth2(path).networks, str(path))
    if path.is_file() and isinstance(networks.encoder, TimmEncoder):
        if _holds_weights(path):
            return _load_encoders(networks, lambda encoder: encoder.load_pretrained(path))
    elif path.is_file() and "conv1.weight" in (state := _tensors(_read(path))):
        return load_imagenet(networks, state, str(path))
    found = resolve(path)
    return _load_common(networks, load_checkpoint(found).networks, str(found))


def _holds_weights(path: Path) -> bool:
    """Whether timm may read a file: weights, and not a checkpoint of md2's."""
    if path.suffix != ".safetensors":
        return bool(_tensors(_read(path)))
    require_short_header(path)
    return True


def download_imagenet(encoder: str) -> StateDict:
    """Return torchvision's ImageNet state dict of `resnet18` ... `resnet152`, cached by torch.hub.

    Raises:
        InputError: the download fails or its hash is wrong, or the cached file is damaged.
    """
    url = IMAGENET_URLS[encoder]
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    try:
        if not path.is_file():
            _fetch(url, path)
        state: StateDict = read_torch(path)
    except Exception as error:  # on other contents torch's unpickler fails in any way
        reason = "nothing there" if isinstance(error, MissingError) else first_line(error)
        raise InputError(
            f"cannot get the ImageNet weights {url}: {reason}; download the file elsewhere and give its "
            "path as model.weights, or use model.weights=scratch"
        ) from error
    return state


def _fetch(url: str, path: Path) -> None:
    """Bring a file whose name ends in the begin of its sha256 into torch.hub's cache.

    Raises:
        StorageError, MissingError: the storage fails, or has no such file.
        InputError: another file.
        OSError: the cache cannot be written.
    """
    place, _, name = url.rpartition("/")
    print(f"fetching {url} to {path}", file=sys.stderr)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside, digest = temporary(path), hashlib.sha256()
    try:
        with beside.open("wb") as file:
            for piece in HttpStorage(place).stream(name):
                digest.update(piece)
                if file.tell() + file.write(piece) > _LARGEST_WEIGHTS:
                    raise InputError("it does not end")
        if not digest.hexdigest().startswith(path.stem.rpartition("-")[2]):
            raise InputError(f"its sha256 is {digest.hexdigest()}, so it is another file")
        replace(beside, path)
    finally:
        remove_quietly(beside)


def load_imagenet(networks: Networks, state: Mapping[str, Tensor], where: str) -> list[str]:
    """Load a torchvision ResNet state dict into the depth encoder and the pose encoder.

    An encoder of n images gets the first filter n times, divided by n, so that n equal images give the features of one.

    Returns:
        Names of encoders that are another ResNet than the depth encoder, and keep their random values.

    Raises:
        InputError: another ResNet, or keys or shapes do not fit.
    """
    _check_encoder(networks, {f"encoder.{key}": value for key, value in state.items()}, where)
    return _load_encoders(networks, lambda encoder: _load_resnet(encoder, state, where))


def _load_encoders(networks: Networks, load: Callable[[Any], None]) -> list[str]:
    """Load the depth encoder, and the pose encoder if it is the same model; return the name of one that is not."""
    for encoder in networks.encoders.values():
        if encoder.name == networks.encoder.name:
            load(encoder)
    return [name for name, encoder in networks.encoders.items() if encoder.name != networks.encoder.name]


def _load_resnet(encoder: ResNetEncoder, state: Mapping[str, Tensor], where: str) -> None:
    images = encoder.encoder.conv1.in_channels // 3
    adapted = dict(state)
    if images > 1 and "conv1.weight" in state:
        adapted["conv1.weight"] = state["conv1.weight"].repeat(1, images, 1, 1) / images
    load_state(encoder.encoder, adapted, where)


@dataclass(frozen=True)
class Monodepth2:
    """Contents of an official folder.

    Attributes:
        height, width: size of the training images.
        stereo: whether it was trained with the stereo partner, in the paper's unit.
        networks: sub-network name -> state dict.
    """

    height: int
    width: int
    stereo: bool
    networks: dict[str, StateDict]

    def config(self, where: str) -> Config:
        """Return the configuration whose `Networks` these weights fit.

        Frames are 0, -1, 1 for a pose network of pairs, and for a mono model that comes without its pose network.

        Raises:
            InputError: not a ResNet encoder and a Monodepth2 decoder.
            UsageError: the configuration refuses the size or the scales.
        """
        encoder = _encoder_of(self.networks["encoder"])
        if encoder is None:
            raise InputError(
                f"{where}: the encoder is not a ResNet-18, 34, 50, 101 or 152, and no other encoders can be loaded "
                f"(its first weights: {next(iter(self.networks['encoder']), 'none')})"
            )
        scales = [WIDTHS.index(weight.shape[1]) for weight in _heads(self.networks["depth"], where)]
        pose, frames = _pose_of(self.networks, where)
        if frames == [0] and not self.stereo:
            frames = [0, -1, 1]
        masked = "predictive_mask" in self.networks
        return config_from_dict(
            {
                "data": {"frames": frames, "stereo": self.stereo, "width": self.width, "height": self.height},
                "model": {"encoder": encoder, "scales": scales, "weights": "scratch", **pose},
                "loss": {"predictive_mask": masked, "disable_automasking": masked},
            },
            where,
        )


def is_monodepth2(path: str | Path) -> bool:
    """Whether a path is a folder of official Monodepth2 weights."""
    return (Path(path) / "encoder.pth").is_file()


def read_monodepth2(folder: str | Path) -> Monodepth2:
    """Read an official folder. Loading the weights into networks checks their keys.

    Raises:
        InputError: `encoder.pth`, its size or `depth.pth` is missing, or a file is damaged or holds no state dict.
    """
    folder = Path(folder)
    missing = [f"{name}.pth" for name in ("encoder", "depth") if not (folder / f"{name}.pth").is_file()]
    if missing:
        raise InputError(f"{folder}: {', '.join(missing)} missing; a Monodepth2 folder has encoder.pth and depth.pth")
    states = {name: _read(folder / f"{name}.pth") for name in OFFICIAL_NAMES if (folder / f"{name}.pth").is_file()}
    extras = {name: states["encoder"].pop(name, None) for name in _EXTRAS}
    height, width = extras["height"], extras["width"]
    if not isinstance(height, int) or not isinstance(width, int):
        raise InputError(f"{folder}/encoder.pth: height and width are missing; it is not Monodepth2's encoder file")
    networks = {name: _tensors(state) for name, state in states.items()}
    if "pose" not in networks:
        networks.pop("pose_encoder", None)  # useless alone
    return Monodepth2(height, width, bool(extras["use_stereo"]), networks)


def load_monodepth2(folder: str | Path) -> tuple[Networks, Config]:
    """Load an official folder as networks, and return their configuration too.

    A mono model that comes without its pose network predicts depth only.

    Raises:
        InputError: a file is missing, damaged or does not fit; names keys that are missing or extra.
    """
    found = read_monodepth2(folder)
    config = found.config(str(folder))
    networks = Networks.of(config)
    if "pose" not in found.networks:
        networks.drop_poses()
    networks.load_networks(found.networks, str(folder))
    return networks, config


def save_monodepth2(
    states: Mapping[str, Mapping[str, Tensor]], folder: str | Path, *, height: int, width: int, stereo: bool
) -> None:
    """Write the state dicts of sub-networks as an official folder, which appears whole or not at all.

    Raises:
        InputError: the folder exists and is not empty, or cannot be written.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} exists and is not empty: give a new folder")
    beside = temporary(folder)
    try:
        beside.mkdir(parents=True)
        for name, state in states.items():
            extras = {"height": height, "width": width, "use_stereo": stereo} if name == "encoder" else {}
            contents = {key: value.detach().cpu().contiguous() for key, value in state.items()}
            tmp = temporary(beside / f"{name}.pth")
            with tmp.open("wb") as file:
                torch.save({**contents, **extras}, file)
            replace(tmp, beside / f"{name}.pth")
        fsync_folder(beside)
        beside.replace(folder)
        fsync_folder(folder.parent)
    except (OSError, RuntimeError) as error:
        raise InputError(f"cannot write {folder}: {unwritten(error)}; name another place") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _load_common(networks: Networks, states: Mapping[str, Mapping[str, Tensor]], where: str) -> list[str]:
    """Load the sub-networks that both sides have, so that an old depth network may get a new pose network.

    Returns the names of those that only `networks` has, and that stay random: not the camera, which has a start.
    """
    if "encoder" in states:
        _check_encoder(networks, states["encoder"], where)
    if "depth" in states and _is_monodepth2(states["depth"]) != _is_monodepth2(networks.depth.state_dict()):
        given = "monodepth2" if _is_monodepth2(states["depth"]) else "hrdepth"
        raise InputError(f"{where}: weights of another decoder than model.decoder: train with model.decoder={given}")
    children: dict[str, nn.Module] = dict(networks.named_children())
    if "pose" in states and "pose_encoder" in children and "pose_encoder" not in states:
        raise InputError(f"{where}: pose_encoder is missing, which pose needs; remove pose too, to train both anew")
    for name in [name for name in children if name in states]:
        load_state(children[name], states[name], f"{where}: {name}")
    return [name for name in children if name not in states and name != "camera"]


def _check_encoder(networks: Networks, state: Mapping[str, Tensor], where: str) -> None:
    """Refuse a ResNet of another depth by its name; a mismatch of keys would list a hundred."""
    name = _encoder_of(state)
    if name not in (None, networks.encoder.name):
        raise InputError(f"{where}: weights of a {name}, but model.encoder is {networks.encoder.name}")


def _is_monodepth2(depth: Mapping[str, Tensor]) -> bool:
    """Whether the weights are of Monodepth2's decoder."""
    return any(key.startswith("decoder.") for key in depth)


def _read(path: Path) -> dict[str, Any]:
    if foreign := what_else(path):
        raise InputError(f"{path}: {foreign}, not a file of weights")
    try:
        data = read_torch(path)
    except Exception as error:  # on other contents torch's unpickler fails in any way: IndexError, TypeError ...
        raise InputError(f"{path}: damaged or not a file of weights ({reason_of(error)})") from error
    if not isinstance(data, dict):
        raise InputError(f"{path}: holds a {type(data).__name__}, not a state dict")
    return data


def _tensors(state: Mapping[str, Any]) -> StateDict:
    """Return the weights of a state dict, without DataParallel's prefix and the counts that thop leaves there."""
    counts = ("total_ops", "total_params")
    found = {k: v for k, v in state.items() if isinstance(v, Tensor) and k.rpartition(".")[2] not in counts}
    if found and all(key.startswith("module.") for key in found):
        found = {key.removeprefix("module."): value for key, value in found.items()}
    return found


def _encoder_of(state: Mapping[str, Tensor]) -> str | None:
    """Return the ResNet's name, from the kind and number of blocks in each stage; None if it is not one of ours."""
    found = [match for key in state if (match := _BLOCK.match(key))]
    blocks = tuple(1 + max((int(m[2]) for m in found if m[1] == str(stage)), default=-1) for stage in range(1, 5))
    shape = (blocks, 4 if "encoder.layer1.0.conv3.weight" in state else 1)
    return next((name for name, one in ARCHITECTURES.items() if (one.blocks, one.block.expansion) == shape), None)


def _heads(state: StateDict, where: str) -> list[Tensor]:
    """Return the weights (outputs, WIDTHS[scale], 3, 3) of the decoder's output convolutions, in order."""
    heads: list[Tensor] = []
    while (key := f"decoder.{10 + len(heads)}.conv.weight") in state:
        heads.append(state[key])
    if not heads or any(head.ndim != 4 or head.shape[1] not in WIDTHS[:4] for head in heads):
        raise InputError(f"{where}: depth.pth has no disparity outputs (decoder.10.conv.weight ...)")
    return heads


def _pose_of(networks: Mapping[str, StateDict], where: str) -> tuple[dict[str, str], list[int]]:
    """Return `pose_network` and `pose_input`, and the frame offsets that the weights expect."""
    pose = networks.get("pose")
    if pose is None:
        return {}, [0]
    if "pose_conv.weight" in pose:
        kind, images = "posecnn", _shape(pose, "net.0.weight", where)[1] // 3
    elif "pose_encoder" in networks:
        kind, images = "separate_resnet", _shape(networks["pose_encoder"], "encoder.conv1.weight", where)[1] // 3
    else:
        kind, images = "shared", _shape(pose, "net.1.weight", where)[1] // 256
        if images == 1:
            raise InputError(f"{where}: pose_encoder.pth is missing, which pose.pth needs")
    offsets = [sign * step for step in range(1, 1 + max(1, images // 2)) for sign in (-1, 1)]
    if images == 2:
        return {"pose_network": kind, "pose_input": "pairs"}, [0, -1, 1]
    return {"pose_network": kind, "pose_input": "all"}, [0, *offsets[: images - 1]]


def _shape(state: StateDict, key: str, where: str) -> torch.Size:
    """Return the shape of a convolution's weights."""
    if key not in state or state[key].ndim != 4:
        raise InputError(f"{where}: a pose file is not Monodepth2's: no convolution {key}")
    return state[key].shape
