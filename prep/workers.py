"""Workers behind `concurrent.futures.Executor`: this process, a pool of processes, or a dask cluster.

with start_workers(4) as workers: ...
with start_workers(scheduler="tcp://host:8786") as workers: ...
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import platform
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import wait as wait_for_handles
from types import FrameType
from typing import Any, Protocol, TypeVar

from shards.errors import Md2Error, UsageError
from shards.parallel import run_jobs

Job = TypeVar("Job")
Result = TypeVar("Result")
SCHEDULER_TIMEOUT = 10
"""Seconds to wait for a dask scheduler's answer."""
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_KEPT_BYTES = 32 << 20
PATIENCE = 3.0
"""Seconds after which another Ctrl-C no longer waits for running jobs."""


class Progress(Protocol):
    """Receives the reports of a long job: phases, each with a total in some unit, and notes."""

    def phase(self, label: str, total: int, unit: str) -> None:
        """A phase begins."""

    def advance(self, count: int) -> None:
        """`count` more units are done."""

    def note(self, text: str) -> None:
        """A remark for the user, before the work is done."""


class Quiet:
    """Reports nothing."""

    def phase(self, label: str, total: int, unit: str) -> None:
        """Nothing."""

    def advance(self, count: int) -> None:
        """Nothing."""

    def note(self, text: str) -> None:
        """Nothing."""


@dataclass(frozen=True)
class Workers:
    """An executor and the number of jobs that it runs at a time."""

    executor: Executor
    count: int


class InProcess(Executor):
    """Runs each job in the thread that submits it."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


@contextmanager
def start_workers(count: int = 1, scheduler: str | None = None) -> Iterator[Workers]:
    """Start workers for a `with` block. They end with it, and with this process even if it is killed.

    Args:
        count: number of processes; 1: this process does the work.
        scheduler: address of a dask scheduler, whose workers are used instead.

    Raises:
        UsageError: a count below 1; dask is not installed; no scheduler answers.
    """
    if scheduler is not None:
        with _dask(scheduler) as workers:
            yield workers
    elif count < 1:
        raise UsageError(f"--workers {count}: at least 1")
    elif count == 1:
        with _without_torch():
            yield Workers(InProcess(), 1)
    else:
        # Not fork: it copies the locks of fsspec's event loop without the threads that hold them.
        context = multiprocessing.get_context("spawn")
        with _interrupts() as ending, _Pool(count, mp_context=context, initializer=_begin_worker) as pool:
            try:
                yield Workers(pool, count)
            finally:
                ending.set()
                pool.shutdown(cancel_futures=True)


@contextmanager
def _without_torch() -> Iterator[None]:
    """Keep webdataset, which writes the tars, from importing torch: it works without, two seconds and 200 MB less."""
    if "torch" in sys.modules or "webdataset" in sys.modules:
        yield
        return
    sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] in ("torch", "webdataset")]:
            del sys.modules[name]


class _Pool(ProcessPoolExecutor):
    """Worker processes that ignore Ctrl-C from their first instruction on."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # a new process inherits it
        try:
            return super().submit(fn, *args, **kwargs)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _interrupts() -> Iterator[threading.Event]:
    """Let Ctrl-C raise KeyboardInterrupt as usual until the event is set, and at the end of the block after that.

    An interrupted pool ends when its running jobs have finished, in a second or two. An exception in that time, or a
    killed process, would leave the pool's thread half ended, and Python could hang at exit. After `PATIENCE` another
    Ctrl-C ends this process at once, and the workers with it.
    """
    ending = threading.Event()
    pressed: float | None = None

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal pressed
        if pressed is None:
            pressed = time.monotonic()
            if not ending.is_set():
                ending.set()
                raise KeyboardInterrupt
        elif time.monotonic() - pressed > PATIENCE:
            os._exit(128 + number)

    # Only in the main thread, and only if nobody has set another handler.
    if threading.current_thread() is not threading.main_thread() or (
        signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    ):
        yield ending
        return
    signal.signal(signal.SIGINT, interrupt)
    try:
        yield ending
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if pressed is not None:
        raise KeyboardInterrupt


def _begin_worker() -> None:
    """Prepare a worker process: it ends when the main process ends, even by SIGKILL."""
    _keep_freed_memory()
    sys.modules.setdefault("torch", None)  # type: ignore[arg-type]  # as `_without_torch`
    with suppress(RuntimeError):  # a limit on threads
        threading.Thread(target=_end_with_parent, daemon=True).start()


def _keep_freed_memory() -> None:
    """Keep freed memory: by default glibc returns it after each frame and asks for 200 fresh pages for the next."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        for parameter in (_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD):
            libc.mallopt(parameter, _KEPT_BYTES)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait_for_handles([parent.sentinel])
        os._exit(1)


@contextmanager
def _dask(scheduler: str) -> Iterator[Workers]:
    try:
        from distributed import Client
    except ImportError as error:
        raise UsageError("--scheduler needs dask: pip install 'md2[dask]'") from error
    try:
        client: Any = Client(scheduler, timeout=SCHEDULER_TIMEOUT)  # type: ignore[no-untyped-call]
    except (OSError, ValueError, TimeoutError) as error:
        raise UsageError(f"--scheduler {scheduler}: no dask scheduler answers there ({error})") from error
    with client:
        count = sum(client.nthreads().values())
        if count == 0:
            raise UsageError(f"--scheduler {scheduler}: it has no workers; start some: dask worker {scheduler}")
        with client.get_executor(pure=False) as executor:
            yield Workers(executor, count)


def run(workers: Workers, work: Callable[[Job], Result], jobs: Iterable[Job]) -> Iterator[Result]:
    """Results of `work` over the jobs, in the order of completion. Few jobs are taken from `jobs` ahead of time.

    The first error of a job is raised, and jobs that have not begun are cancelled.

    Raises:
        Md2Error: a worker process died, ran out of memory, or could not be started.
    """
    try:
        yield from run_jobs(workers.executor, workers.count, work, jobs)
    except BrokenExecutor as error:
        raise Md2Error(
            "a worker process died (out of memory?); try fewer --workers; run the same command again"
        ) from error
    except MemoryError as error:
        raise Md2Error("out of memory; try fewer --workers, then run the same command again") from error
    except (RuntimeError, BlockingIOError) as error:
        if not isinstance(error, BlockingIOError) and "start new thread" not in str(error):
            raise
        raise Md2Error("no process or thread can be started (a limit on them?); try --workers 1") from error
