"""Encoders of the timm library: `timm/NAME` for every model that timm can use for features."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shards.errors import InputError, UsageError, first_line

PREFIX = "timm/"
STRIDES = (2, 4, 8, 16, 32)
"""Of the features that the decoders read, in pixels of the image."""
_IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
_declared: list[torch.library.Library] = []


class TimmEncoder(nn.Module):
    """Feature pyramid of one or several images from a timm model, which normalises them as it was trained.

    Args:
        name: `timm/NAME`, with or without timm's tag of the weights (`timm/convnext_tiny.fb_in1k`).
        size: height and width of the images, for models of fixed size.
        images: how many RGB images are stacked along the channels (2 or more in the pose encoder).

    Attributes:
        channels: of the features at 1/2, 1/4, 1/8, 1/16 and 1/32 of the size, 0 where the model has none.

    Raises:
        UsageError: timm is not installed, knows no such model, or it has no features at these strides.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, name: str, size: tuple[int, int], images: int = 1) -> None:
        super().__init__()
        self.name, self.images, self._size = name, images, size
        self.model = self._create(features_only=True)
        strides, counts = self.model.feature_info.reduction(), self.model.feature_info.channels()
        # Of several features at one stride, the last.
        last = {stride: index for index, stride in enumerate(strides) if stride in STRIDES}
        self._chosen = sorted(last.values())
        self.channels = [counts[last[stride]] if stride in last else 0 for stride in STRIDES]
        self._channels_last = str(getattr(self.model, "output_fmt", "NCHW")).endswith("NHWC")
        about = {**_IMAGENET, **(getattr(self.model, "pretrained_cfg", None) or self.model.default_cfg)}
        for key in _IMAGENET:
            self.register_buffer(key, torch.tensor(about[key]).repeat(images).view(1, -1, 1, 1))
        self._check(strides)

    def _check(self, strides: list[int]) -> None:
        """Try the model on a small image: what timm says of its features, some models keep for some sizes only."""
        present = [level for level, count in enumerate(self.channels) if count]
        wanted = [(self.channels[level], *(side // STRIDES[level] for side in self._size)) for level in present]
        found: list[Any] = []
        try:
            with torch.no_grad():
                features = self.eval()(torch.zeros(1, 3 * self.images, *self._size))
            found = [tuple(feature.shape[1:]) for feature in features]
        except (RuntimeError, AssertionError, ValueError) as error:
            found = [first_line(error)]
        self.train()
        # The decoders go from the deepest feature up to the first, stride by stride.
        whole = bool(present) and present[-1] >= 3 and len(present) == present[-1] - present[0] + 1
        if not whole or found != wanted:
            raise UsageError(
                f"model.encoder {self.name}: its features, of strides {strides}, do not fit the decoders, which need "
                f"those of {', '.join(map(str, STRIDES))}, or the last few of them, at exactly these parts of the "
                f"image's size" + (f" (found {found[0]} instead of {wanted[0]})" if whole else "")
            )

    def _create(self, **options: Any) -> Any:
        timm = _timm()
        name = self.name.removeprefix(PREFIX)
        if not timm.is_model(name):
            near = [f"{PREFIX}{one}" for one in timm.list_models(f"*{name.partition('.')[0]}*")[:3]]
            hint = f"; did you mean {' or '.join(near)}?" if near else "; timm.list_models() lists them"
            raise UsageError(f"model.encoder {self.name}: timm {timm.__version__} has no such model{hint}")
        fixed = getattr(timm.get_pretrained_cfg(name), "fixed_input_size", False)
        size = {"img_size": self._size} if fixed else {}
        try:
            return timm.create_model(name, in_chans=3 * self.images, **size, **options)
        except (RuntimeError, ValueError, TypeError, AttributeError, NotImplementedError, AssertionError) as error:
            if options.get("pretrained"):
                raise
            raise UsageError(
                f"model.encoder {self.name}: timm cannot use it for features ({first_line(error)})"
            ) from error

    def load_pretrained(self, file: Path | None = None) -> None:
        """Load the weights that timm publishes for this model, or a file of the whole model's weights.

        timm downloads them once into its cache and checks what it downloads; it adapts the first layer to several
        images, so that n equal images give about the features of one.

        Raises:
            InputError: the download fails, or the weights are not of this model.
        """
        overlay = {} if file is None else {"pretrained_cfg_overlay": {"file": str(file)}}
        try:
            with redirect_stdout(sys.stderr):
                whole: Mapping[str, Tensor] = self._create(pretrained=True, **overlay).state_dict()
        except Exception as error:  # of timm, torch, huggingface_hub, safetensors and whatever carries HTTP for them
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            if file is not None:
                raise InputError(f"{file}: not weights of {self.name}: {reason}") from error
            raise InputError(
                f"cannot get the ImageNet weights of {self.name}: {reason}; download the file elsewhere and give its "
                "path as model.weights, or use model.weights=scratch"
            ) from error
        # timm names layers of a model for features by their path, with _ for some of the dots.
        by_name = {key.replace(".", "_"): value for key, value in whole.items()}
        own = self.model.state_dict()
        names = {key: key.removeprefix("model.").replace(".", "_") for key in own}
        if missing := [key for key, name in names.items() if name not in by_name]:
            raise InputError(f"{self.name}: timm's weights have no {', '.join(missing[:3])}; use model.weights=scratch")
        self.model.load_state_dict({key: by_name[name] for key, name in names.items()})

    def forward(self, x: Tensor) -> list[Tensor]:
        """(B, 3 * images, H, W) in [0, 1] -> the features that there are, the largest first."""
        features = self.model((x - self.mean) / self.std)
        chosen = [features[index] for index in self._chosen]
        return [one.permute(0, 3, 1, 2) for one in chosen] if self._channels_last else chosen


def _timm() -> Any:
    """The library, which imports torchvision, whose wheel looks for operators that it has only beside a CUDA build."""
    try:
        import torchvision  # noqa: F401
    except ImportError:
        pass  # timm says so
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
        for name in ("nms", "qnms"):
            with suppress(RuntimeError):
                library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")  # type: ignore[no-untyped-call]
        _declared.append(library)  # they go when it goes
    try:
        import timm
    except ImportError as error:
        raise UsageError(f"model.encoder timm/... needs {error.name}: pip install 'md2[timm]'") from error
    timm.models.set_pretrained_check_hash(True)
    return timm
