"""Tensor work on the host beside DALI's threads, which keep the cores busy: threads without OpenMP, memory used again.

An operation that is spread over OpenMP threads ends with the slowest of them: beside decoding, a product of
microseconds was seen to take ten milliseconds. So each batch is made on a thread of its own, and the images of a large
one are shared among a few more, each of which works through its own.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from itertools import pairwise
from math import ceil, inf
from pathlib import Path
from threading import Barrier
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from md2.process import cgroup_values, threads_that_fit

GPU_DECODER_THREADS = 8
SHARED_FROM = 1 << 22
"""Bytes of float images from which on they are shared: handing over less costs more than it saves."""


def cores() -> int:
    """Cores for this process: those that it may use, shared with the other ranks on this machine."""
    quota = cpu_quota()
    allowed = min(len(os.sched_getaffinity(0)), quota if quota == inf else ceil(quota), threads_that_fit())
    return max(1, int(allowed) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def cpu_quota(cgroups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> float:
    """Cores' worth of time that a container may use (cgroup v2 `cpu.max`, v1 `cpu.cfs_quota_us`); infinite if no limit.

    More threads than that would be stopped all at once when the time is used up.
    """
    quota = inf
    for values in cgroup_values("cpu", ["cpu.max"], ["cpu.cfs_quota_us", "cpu.cfs_period_us"], cgroups, own):
        with suppress(ValueError):  # no limit, or not two numbers
            limit, period = map(int, values)
            quota = min(quota, limit / period if limit >= 0 else inf)
    return quota


def default_threads(decode: Literal["cpu", "gpu"]) -> int:
    """A thread for each core; few if the GPU decodes, each of whose decoders has as many of its own, with buffers."""
    return min(cores(), GPU_DECODER_THREADS) if decode == "gpu" else cores()


class HostThreads(NamedTuple):
    """One that makes batches, and those that it shares a batch's images with."""

    batch: Executor
    images: Executor


@cache
def host_threads() -> HostThreads:
    """Threads whose tensor operations do not fan out over the cores.

    torch's setting holds for the thread that makes it and for those that start later, so it is put back for these.
    """
    before = torch.get_num_threads()
    threads = HostThreads(_threads("md2-batch", 1), _threads("md2-images", cores()))
    torch.set_num_threads(before)
    return threads


def batch_thread() -> Executor:
    """A thread like that of `host_threads().batch`, for one loader that makes its batches ahead."""
    before = torch.get_num_threads()
    thread = _threads("md2-ahead", 1)
    torch.set_num_threads(before)
    return thread


def _threads(name: str, count: int) -> Executor:
    executor = ThreadPoolExecutor(count, name, initializer=torch.set_num_threads, initargs=(1,))
    # All must start now, so each waits for the others: the pool starts none while one is idle.
    together = Barrier(count)

    def start() -> None:
        together.wait()
        torch.get_num_threads()  # a thread's setting is fixed when it is first used: later it would be what is put back

    for started in [executor.submit(start) for _ in range(count)]:
        started.result()
    return executor


def over_images(work: Callable[[slice], None], out: Tensor) -> None:
    """Have `work` fill all images of `out` (B, H, W, 3), which it is called for by slices of the batch."""
    count = min(cores(), len(out)) if out.nbytes >= SHARED_FROM else 1
    if count == 1:
        work(slice(len(out)))
        return
    cuts = [len(out) * place // count for place in range(count + 1)]
    for done in [host_threads().images.submit(work, slice(*cut)) for cut in pairwise(cuts)]:
        done.result()


class HostMemory:
    """Float buffers of the host that come back when the last tensor on them is gone.

    The kernel clears every page of new memory, which takes about as long as filling it with an image; so memory is
    used again, but never while a tensor, a view or the autograd graph still holds it. What was of another size
    is let go.
    """

    def __init__(self) -> None:
        self._free: dict[tuple[int, ...], list[npt.NDArray[np.float32]]] = {}

    def take(self, shape: tuple[int, ...]) -> Tensor:
        """An uninitialised float32 tensor."""
        if shape not in self._free:
            self._free = {shape: []}
        free = self._free[shape]
        # pop() instead of a look and a pop: buffers may come back, or be taken, on another thread in between.
        try:
            memory = free.pop()
        except IndexError:
            memory = np.empty(shape, np.float32)
        lent = memory.view()
        weakref.finalize(lent, free.append, memory).atexit = False
        return torch.from_numpy(lent)  # holds `lent` as long as anything uses its storage


host_memory = HostMemory()
