"""Ranks: one process per GPU (or per CPU process in tests), started by torchrun.

Without torchrun there is one rank, and no call here communicates.
"""

from __future__ import annotations

import os
import re
import sys
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from inspect import signature
from pathlib import Path
from typing import Any, Literal

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from shards.errors import Md2Error, UsageError, visible
from shards.storage.retry import patience_from_environment

TIMEOUT = timedelta(minutes=10)
"""A collective that waits longer, beyond the storage's time limit, ends the job: a rank hangs."""
DRIVER = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True)
class Ranks:
    """This process's place among all of them, and its device."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def main(self) -> bool:
        """Whether this is the rank that writes files and prints."""
        return self.rank == 0

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Element-wise sum over the ranks (in place, and returned)."""
        if self.world_size > 1:
            distributed.all_reduce(values, distributed.ReduceOp.SUM)
        return values

    def any(self, flag: bool) -> bool:
        """Whether any rank's flag is set."""
        if self.world_size == 1:
            return flag
        value = torch.tensor([float(flag)], device=self.device)
        distributed.all_reduce(value, distributed.ReduceOp.MAX)
        return bool(value.item())

    def gather(self, value: Any) -> list[Any]:
        """`value` of every rank, in rank order, on every rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        distributed.all_gather_object(values, value)
        return values

    def broadcast(self, tensors: Iterable[torch.Tensor]) -> None:
        """Overwrite the tensors with rank 0's, in place."""
        if self.world_size > 1:
            for tensor in tensors:
                distributed.broadcast(tensor, 0)

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world_size > 1:
            distributed.barrier()


def pick_device(setting: Literal["auto", "cpu", "gpu"], local_rank: int = 0) -> torch.device:
    """The device of a rank; `auto` is a GPU if torch can use one.

    Raises:
        UsageError: `gpu` without a usable GPU.
    """
    if setting == "cpu" or (setting == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UsageError(f"device gpu: {unused_gpu() or 'torch sees no CUDA device; use cpu'}")
    if local_rank >= torch.cuda.device_count():
        raise UsageError(f"rank {local_rank} on this machine has no GPU: {torch.cuda.device_count()} found")
    return torch.device("cuda", local_rank)


def unused_gpu() -> str | None:
    """Why torch cannot use the GPU of this machine; None if it can, has none, or it is hidden on purpose."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1", "NoDevFiles")
    if torch.cuda.is_available() or hidden or not DRIVER.is_file():
        return None
    found = re.search(r"\b\d{3}\.\d+(\.\d+)*\b", DRIVER.read_text(errors="replace"))
    driver = f"this machine has NVIDIA driver {found[0] if found else '(version unknown)'}"
    if torch.version.cuda is None:
        return f"{driver}, but torch {torch.__version__} is built without CUDA; install a CUDA build of torch"
    needed = {"13": "580", "12": "525"}.get(torch.version.cuda.partition(".")[0], "a newer one")
    return (
        f"{driver}, but torch {torch.__version__}, built for CUDA {torch.version.cuda}, sees no GPU; that CUDA needs "
        f"driver {needed} or newer: update the driver, or install a torch built for an older CUDA"
    )


def describe(device: torch.device) -> str:
    """A device for messages: the GPU's name, or the CPU and its threads."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)} (cuda:{device.index or 0})"
    threads = torch.get_num_threads()
    return f"the CPU ({threads} thread{'s' * (threads != 1)})"


def exchange_gradients(networks: nn.Module, in_place: bool) -> DistributedDataParallel:
    """Networks whose gradients become the mean over all ranks in the backward pass.

    Buffers are not exchanged: each rank normalises by its own batches, and validation copies rank 0's.

    Args:
        in_place: gradients are views of what is sent, without a copy.
    """
    # PyTorch 2.13 has another name for it, and a warning about this one.
    new = "forward_sync_buffers" in signature(DistributedDataParallel).parameters
    sync: dict[str, Any] = {"forward_sync_buffers" if new else "broadcast_buffers": False}
    return DistributedDataParallel(networks, gradient_as_bucket_view=in_place, **sync)


@contextmanager
def ranks(setting: Literal["auto", "cpu", "gpu"]) -> Iterator[Ranks]:
    """Join the job that torchrun started (RANK, WORLD_SIZE, LOCAL_RANK); without torchrun, the only rank.

    A rank of several that raises prints its error and ends its process at once: leaving the group is collective under
    NCCL, so a farewell would wait for ranks that wait for this one. torchrun then ends the others.

    Raises:
        UsageError: as `pick_device`; `auto` on a machine whose GPU torch cannot use.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if setting == "auto" and (reason := unused_gpu()):
        raise UsageError(f"{reason}, or train on the CPU with train.device=cpu")
    device = pick_device(setting, local)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world_size == 1:
        yield Ranks(0, 1, device)
        return
    # The others wait while a rank waits for a shard.
    timeout = TIMEOUT + timedelta(seconds=patience_from_environment())
    if device.type == "cuda":
        # Given its device, NCCL connects now: a missing rank shows here, and barriers need not guess the device.
        distributed.init_process_group("nccl", timeout=timeout, device_id=device)
    else:
        distributed.init_process_group("gloo", timeout=timeout)
    rank = distributed.get_rank()
    try:
        yield Ranks(rank, world_size, device)
    except BaseException as error:
        _leave(rank, error)
    distributed.destroy_process_group()


def _leave(rank: int, error: BaseException) -> None:
    """Print why a rank ends, and end the process."""
    code = 1
    if isinstance(error, Md2Error):
        code = error.exit_code
        print(f"md2 (rank {rank}): {visible(str(error))}", file=sys.stderr)
    elif isinstance(error, KeyboardInterrupt):
        code = 130
        print(f"md2 (rank {rank}): interrupted", file=sys.stderr)
    elif isinstance(error, SystemExit):
        code = 0 if error.code is None else error.code if isinstance(error.code, int) else 1
    elif os.environ.get("MD2_DEBUG"):
        traceback.print_exception(error)
    else:
        text = visible(" ".join(str(error).split()))
        print(f"md2 (rank {rank}): {type(error).__name__}: {text}; MD2_DEBUG=1 shows where", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
