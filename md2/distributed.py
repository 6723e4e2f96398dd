"""Ranks: one process per GPU (or per CPU worker in tests), started by torchrun.

Without torchrun there is one rank, and every call here is free.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import torch
from torch import distributed

from shards.errors import UsageError

TIMEOUT = timedelta(minutes=10)
"""A collective that waits longer ends the job: a rank died or hangs."""


@dataclass(frozen=True)
class Ranks:
    """This process's place among all of them, and its device."""

    rank: int
    world: int
    device: torch.device

    @property
    def main(self) -> bool:
        """The one rank that writes files and prints."""
        return self.rank == 0

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Element-wise sum over the ranks (in place, and returned)."""
        if self.world > 1:
            distributed.all_reduce(values, distributed.ReduceOp.SUM)
        return values

    def any(self, flag: bool) -> bool:
        """Whether any rank's flag is set."""
        if self.world == 1:
            return flag
        value = torch.tensor([float(flag)], device=self.device)
        distributed.all_reduce(value, distributed.ReduceOp.MAX)
        return bool(value.item())

    def gather(self, value: Any) -> list[Any]:
        """`value` of every rank, in rank order, on every rank."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        distributed.all_gather_object(values, value)
        return values

    def broadcast(self, tensors: Iterable[torch.Tensor]) -> None:
        """Overwrite the tensors with rank 0's, in place."""
        if self.world > 1:
            for tensor in tensors:
                distributed.broadcast(tensor, 0)

    def barrier(self) -> None:
        if self.world > 1:
            distributed.barrier()


def pick_device(setting: Literal["auto", "cpu", "gpu"], local_rank: int = 0) -> torch.device:
    """`auto`: the GPU where there is one.

    Raises:
        UsageError: `gpu` asked for, none usable.
    """
    if setting == "cpu" or (setting == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UsageError("device gpu: torch sees no CUDA device; use cpu, or install a CUDA build of torch")
    if local_rank >= torch.cuda.device_count():
        raise UsageError(f"rank {local_rank} on this machine has no GPU: {torch.cuda.device_count()} found")
    return torch.device("cuda", local_rank)


@contextmanager
def ranks(setting: Literal["auto", "cpu", "gpu"]) -> Iterator[Ranks]:
    """Join the job that torchrun started (RANK, WORLD_SIZE, LOCAL_RANK), else be alone."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    local = int(os.environ.get("LOCAL_RANK", "0"))
    device = pick_device(setting, local)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world == 1:
        yield Ranks(0, 1, device)
        return
    if device.type == "cuda":
        # With its device NCCL connects now, where a rank that is missing shows, and barriers need not guess it.
        distributed.init_process_group("nccl", timeout=TIMEOUT, device_id=device)
    else:
        distributed.init_process_group("gloo", timeout=TIMEOUT)
    try:
        yield Ranks(distributed.get_rank(), world, device)
    finally:
        distributed.destroy_process_group()
