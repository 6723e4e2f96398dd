"""Speed switches (autocast, channels_last, compile) and the guards against steps that are not finite."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from md2.config import TrainConfig
from md2.data.batch import Offset
from shards.errors import UsageError


@dataclass(frozen=True)
class Switches:
    """Resolved switches for one device. Geometry and loss are float32 whatever these say.

    Attributes:
        dtype: autocast type of the networks, or None for plain float32.
        scaled: whether losses are scaled before backward (fp16 only: its range is small).
    """

    device: torch.device
    dtype: torch.dtype | None
    channels_last: bool
    compile: bool | Literal["graphs"]

    @property
    def scaled(self) -> bool:
        return self.dtype is torch.float16

    @classmethod
    def of(cls, train: TrainConfig, device: torch.device) -> Switches:
        """Resolve `auto`: channels_last everywhere (measured, bench/RESULTS.md); bf16 on a GPU, float32 on a CPU.

        bf16 measured faster on a CPU with units for it; float32 gives the same training with and without them. On a GPU
        bf16 is what the hardware is made for, not what was measured.

        Raises:
            UsageError: CUDA graphs on a CPU.
        """
        gpu = device.type == "cuda"
        precision = train.precision if train.precision != "auto" else ("bf16" if gpu else "float32")
        if train.compile == "graphs" and not gpu:
            raise UsageError("train.compile graphs needs a GPU: use true or false")
        dtypes = {"float32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
        channels_last = True if train.channels_last == "auto" else train.channels_last
        compiled = False if train.compile == "auto" else train.compile
        return cls(device, dtypes[precision], channels_last, compiled)

    def prepare(self, networks: nn.Module) -> Any:
        """Weights in the memory format that convolutions are fastest in."""
        return networks.to(memory_format=torch.channels_last) if self.channels_last else networks  # type: ignore[call-overload]

    def compiled(self, networks: nn.Module) -> Any:
        if not self.compile:
            return networks
        return torch.compile(networks, mode="reduce-overhead" if self.compile == "graphs" else None)

    def autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, self.dtype) if self.dtype is not None else nullcontext()

    def inputs(self, images: dict[Offset, Tensor]) -> dict[Offset, Tensor]:
        if not self.channels_last:
            return images
        return {offset: image.contiguous(memory_format=torch.channels_last) for offset, image in images.items()}


@dataclass(frozen=True)
class NotFinite:
    """A step whose gradient held NaN or infinity, and the keys of its samples."""

    step: int
    keys: list[str]


class FiniteGuard:
    """Skips an optimiser step whose gradient is not finite, and tells which it was.

    On the GPU the decision stays on the device (fused Adam reads `found_inf`) and the host looks at
    the outcome one step later, so that it never waits for the step under way. With fp16's scaler a
    skipped step is how it finds its scale: told are only those whose loss, which is not scaled, was not
    finite, and a loss scale that has collapsed.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._pending: list[tuple[NotFinite, Tensor, torch.cuda.Event | None]] = []

    def step(
        self,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        loss: Tensor,
        *,
        step: int,
        keys: list[str],
    ) -> None:
        """Step the optimiser unless the gradient is not finite, as it is not where the (scalar) loss is not."""
        if scaler.is_enabled():
            self._scaled_step(optimizer, scaler, loss, NotFinite(step, keys))
            return
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        bad = ~torch.isfinite(torch.nn.utils.get_total_norm(gradients))
        if self.device.type != "cuda":
            if not bad:
                optimizer.step()
            self._look_later(NotFinite(step, keys), bad)
            return
        optimizer.found_inf = bad.float()  # type: ignore[attr-defined]
        optimizer.step()
        self._look_later(NotFinite(step, keys), bad)

    def _scaled_step(
        self, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, loss: Tensor, which: NotFinite
    ) -> None:
        scaler.step(optimizer)
        scaler.update()
        # Not get_scale(), which would wait for the step.
        scale: Tensor = scaler.scale(torch.ones((), device=self.device))
        self._look_later(which, (scale < 1) | ~loss.isfinite())

    def _look_later(self, which: NotFinite, bad: Tensor) -> None:
        """Bring the outcome to the host without waiting for it."""
        if self.device.type != "cuda":
            self._pending.append((which, bad, None))
            return
        host = torch.empty((), dtype=torch.bool, pin_memory=True)
        host.copy_(bad, non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        self._pending.append((which, host, event))

    def found(self, wait: bool = False) -> list[NotFinite]:
        """Steps found not finite since the last call; on the GPU, unless `wait`, up to the step before the last."""
        found = []
        while self._pending:
            which, flag, event = self._pending[0]
            if event is not None and len(self._pending) == 1 and not wait:
                break
            if event is not None:
                event.synchronize()
            self._pending.pop(0)
            if flag:
                found.append(which)
        return found


class FiniteBuffers:
    """Keeps batch norm's running averages finite over a step that is skipped.

    Activations that overflowed are forgotten with the step, but an average that has met infinity never recovers.
    """

    def __init__(self, buffers: Iterable[Tensor]) -> None:
        self._buffers = [buffer for buffer in buffers if buffer.is_floating_point()]

    def keep(self) -> None:
        """Before the step."""
        self._before = [buffer.clone() for buffer in self._buffers]

    def mend(self) -> None:
        """After it: put back what is not finite any more. Nothing waits for the device."""
        for buffer, before in zip(self._buffers, self._before, strict=True):
            buffer.copy_(torch.where(buffer.isfinite(), buffer, before))
