"""Guards against steps whose gradient is NaN or infinite."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class NotFinite:
    """A step whose gradient is not finite, and the keys of its samples."""

    step: int
    keys: list[str]


class FiniteGuard:
    """Skips optimiser steps whose gradient is not finite, and reports them.

    On a GPU the decision stays on the device (fused Adam reads `found_inf`), and the host reads the outcome one step
    later, so that it never waits for the running step. fp16's loss scaling skips steps while it looks for its scale;
    with it, only a loss that is not finite and a scale that has collapsed are reported.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._pending: list[tuple[NotFinite, Tensor, torch.cuda.Event | None]] = []

    def step(self, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, loss: Tensor) -> Tensor:
        """Step the optimiser unless the gradient is not finite; returns whether that was so, as a scalar on the device.

        `loss` is the scalar, not scaled. With a fused optimiser the host does not wait for the device.
        """
        if scaler.is_enabled():
            scaler.step(optimizer)
            scaler.update()
            # get_scale() would wait for the step.
            scale: Tensor = scaler.scale(torch.ones((), device=self.device))
            return (scale < 1) | ~loss.isfinite()
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        bad = ~torch.isfinite(torch.nn.utils.get_total_norm(gradients))
        if optimizer.defaults.get("fused"):
            optimizer.found_inf = bad.float()  # type: ignore[attr-defined]
            optimizer.step()
        elif not bad:
            optimizer.step()
        return bad

    def read_later(self, which: NotFinite, bad: Tensor) -> None:
        """Copy the outcome of a step to the host without waiting for it; `found` then reports it."""
        if self.device.type != "cuda":
            self._pending.append((which, bad, None))
            return
        host = torch.empty((), dtype=torch.bool, pin_memory=True)
        host.copy_(bad, non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        self._pending.append((which, host, event))

    def found(self, wait: bool = False) -> list[NotFinite]:
        """Steps found not finite since the last call; on a GPU without the last step, unless `wait`."""
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
    """Keeps batch norm's running averages finite over a skipped step: infinity would never leave them."""

    def __init__(self, buffers: Iterable[Tensor]) -> None:
        self._buffers = [buffer for buffer in buffers if buffer.is_floating_point()]

    def keep(self) -> None:
        """Copy them, before the step."""
        self._before = [buffer.clone() for buffer in self._buffers]

    def mend(self) -> None:
        """Restore numbers that are no longer finite, after the step; without waiting for the device."""
        for buffer, before in zip(self._buffers, self._before, strict=True):
            buffer.copy_(torch.where(buffer.isfinite(), buffer, before))
