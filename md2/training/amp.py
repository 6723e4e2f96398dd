"""Speed settings of the networks: autocast, memory format, compilation. Geometry and loss stay float32."""

from __future__ import annotations

import importlib.util
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from md2.config import TrainConfig
from md2.data.batch import Offset
from shards.errors import UsageError

DTYPES = {"float32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class AmpSettings:
    """Settings for one device, with `auto` resolved.

    Attributes:
        dtype: autocast type of the networks, or None for float32.
        compile: whether `torch.compile` is used; `graphs`: with CUDA graphs.
        required: whether a network that does not compile is an error; otherwise it runs without.
    """

    device: torch.device
    dtype: torch.dtype | None
    channels_last: bool
    compile: bool | Literal["graphs"]
    required: bool = True

    @property
    def scaled(self) -> bool:
        """Whether losses are scaled before backward: only for fp16, whose range is small."""
        return self.dtype is torch.float16

    @classmethod
    def of(cls, train: TrainConfig, device: torch.device) -> AmpSettings:
        """Resolve `auto`.

        channels_last: on every device (measured, bench/RESULTS.md). compile: on a GPU with Triton. precision: float32
        on a CPU, which gives the same training on CPUs with and without bf16 instructions; on a GPU bf16, or fp16
        (compute capability 7) and float32 (older) on GPUs that only emulate bf16.

        Raises:
            UsageError: CUDA graphs on a CPU.
        """
        gpu = device.type == "cuda"
        precision = train.precision if train.precision != "auto" else (_native(device) if gpu else "float32")
        if train.compile == "graphs" and not gpu:
            raise UsageError("train.compile graphs needs a GPU: use true or false")
        compiled = gpu and importlib.util.find_spec("triton") is not None if train.compile == "auto" else train.compile
        channels_last = True if train.channels_last == "auto" else train.channels_last
        return cls(device, DTYPES[precision], channels_last, compiled, required=train.compile != "auto")

    def prepare(self, networks: nn.Module) -> Any:
        """Networks with weights in the chosen memory format."""
        return networks.to(memory_format=torch.channels_last) if self.channels_last else networks  # type: ignore[call-overload]

    def compiled(self, networks: nn.Module, whole: bool = False) -> Any:
        """Networks that compile when they are first called, or the networks themselves.

        `whole`: the step that they are part of is recorded as one CUDA graph, so they need none of their own.
        """
        if not self.compile:
            return networks
        gather_pooled_gradients()
        return torch.compile(networks, mode="reduce-overhead" if self.compile == "graphs" and not whole else None)

    def autocast(self) -> AbstractContextManager[Any]:
        """The context that the networks run in."""
        return torch.autocast(self.device.type, self.dtype) if self.dtype is not None else nullcontext()

    def inputs(self, images: dict[Offset, Tensor]) -> dict[Offset, Tensor]:
        """Images in the chosen memory format."""
        if not self.channels_last:
            return images
        return {offset: image.contiguous(memory_format=torch.channels_last) for offset, image in images.items()}


def gather_pooled_gradients() -> None:
    """Have what is compiled from now on gather the gradients of max pooling.

    PyTorch 2.13 replaces that operation by atomic additions into float32 images that are not channels_last. That moves
    86 MB more a sample of a mono step (bench/RESULTS.md), and adds in another order each time. TorchInductor has a
    kernel that gathers, which PyTorch's deterministic mode and its earlier versions use.
    """
    from torch._inductor.decomposition import decompositions

    decompositions.pop(torch.ops.aten.max_pool2d_with_indices_backward.default, None)


def _native(device: torch.device) -> str:
    """The fastest precision that a GPU computes in natively."""
    capability = torch.cuda.get_device_capability(device)
    return "bf16" if capability >= (8, 0) else "fp16" if capability >= (7, 0) else "float32"
